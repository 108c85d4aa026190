"""The policy: Janus-Pro as it is used by GoT-R1. One network writes a chain of objects and boxes, then draws it token
by token.

One sequence a sample, two heads, one cache:

    [bos] User: Follow the caption ... : {prompt}\\n\\nAssistant: | chain ... <begin_of_image> | z_1 ... z_I
          given                                                   | sampled by lm_head         | by generation_head

Letters, here and in every other file:
    B prompts, G samples a prompt, N = B*G samples (sample n belongs to prompt n // G), P prompt tokens,
    T text positions (chain and <begin_of_image>), I image tokens (576; toy 64), S = T + I,
    V text vocabulary, K image codes, D width of the language model.

Classifier-free guidance runs two rows a sample: the conditional half first, the unconditional half second. The
unconditional row keeps bos and <begin_of_image> and has the pad token everywhere between, attended, chain included: the
released checkpoints were trained that way. Guided logits are u + cfg * (c - u).

    python gotr1.py "a red ball left of a blue cube" --n 4          # draws with the toy model, on a laptop, in seconds
    python gotr1.py --bench                     # how fast `rollout` is here, beside a straightforward loop
"""

import json
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import DynamicCache, JanusConfig, JanusForConditionalGeneration
from transformers.initialization import no_init_weights

import rewards
from benchmarks.stats import draw_plans
from engine import decode, run
from engine.checkpoints import TOY, convert_deepseek, janus_pro_config, load_policy  # noqa: F401 - this module's interface
from engine.decode import gather_logps, guide, prefill, run_layers, sample_token, uniforms  # noqa: F401 - likewise
from render_boxes import chain_problems, draw_boxes, parse_chain
from toy import world as toy

INSTRUCTION = "Follow the caption to generate an image through a chain of thought process: "
SPECIAL_TOKENS = {  # looked up by name: the ids differ between the 1B and the 7B checkpoint
    "bos_token": "<｜begin▁of▁sentence｜>",
    "eos_token": "<｜end▁of▁sentence｜>",
    "pad_token": "<｜▁pad▁｜>",
    "boi_token": "<begin_of_image>",
    "eoi_token": "<end_of_image>",
    "image_token": "<image_placeholder>",
}


# ---------------------------------------------------------------------------------------------------------------------
# The prompt


def special_ids(tokenizer) -> tuple[int, int, int]:
    """(bos, pad, begin_of_image) by name. `tokenizer.pad_token_id` is no help: some checkpoints set it to another
    token."""
    names = [SPECIAL_TOKENS[key] for key in ("bos_token", "pad_token", "boi_token")]
    ids = [
        tokenizer.convert_tokens_to_ids(name) for name in names
    ]  # `get_vocab()` would make a dict of 100,000 names
    if missing := [
        name
        for name, k in zip(names, ids, strict=True)
        if tokenizer.convert_ids_to_tokens(k or 0) != name
    ]:
        raise ValueError(
            f"the tokenizer lacks {', '.join(missing)}: expected one of Janus-Pro or GoT-R1"
        )
    return tuple(ids)


def format_prompt(prompt: str) -> str:
    """The one user turn that the GoT-R1 checkpoints know (official infer.py); bos is added by `encode_prompt`."""
    return f"User: {INSTRUCTION}{prompt}\n\nAssistant:"


def encode_prompt(tokenizer, prompt: str) -> list[int]:
    """Token ids of the whole turn, bos exactly once."""
    return [
        special_ids(tokenizer)[0],
        *tokenizer.encode(format_prompt(prompt), add_special_tokens=False),
    ]


def encode_chain(tokenizer, chain: str) -> list[int]:
    """Token ids of a chain and the <begin_of_image> that ends it; no bos (`tokenizer.encode` would put a second one
    here)."""
    text = chain.removesuffix(SPECIAL_TOKENS["boi_token"])
    return [*tokenizer.encode(text, add_special_tokens=False), special_ids(tokenizer)[2]]


def image_token_count(model) -> int:
    return model.config.vq_config.num_patches**2


def trainable_parameters(model) -> list[torch.nn.Parameter]:
    """The language model, both heads, and what embeds image tokens; all else (picture tokenizer, image understanding)
    is frozen."""
    frozen = ("model.vqmodel.", "model.vision_model.", "model.aligner.")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


@dataclass
class Rollout:
    """N samples and what was recorded while they were drawn. Text is right-padded to T, the longest chain."""

    chains: list[str]  # N texts, without the closing <begin_of_image>
    prompt_ids: list[list[int]]  # N, bos included
    chain_ids: torch.Tensor  # (N, T) int64, the closing <begin_of_image> included
    chain_lens: torch.Tensor  # (N,) int64
    image_tokens: torch.Tensor  # (N, I) int64
    mask: (
        torch.Tensor
    )  # (N, S) float32: 1 where a token was sampled, 0 where it was given, forced or is padding
    logp: torch.Tensor  # (N, S) float32: log-probability of each sampled token, as `logp_mode` says
    entropy: (
        torch.Tensor
    )  # (N, S) float32: of the distribution each token was sampled from, in nats
    forced: torch.Tensor  # (N,) bool: the chain hit the cap, its <begin_of_image> was not sampled
    pad_id: int
    cfg: float
    temperature: float
    logp_mode: str  # "cond" or "guided"

    @classmethod
    def from_data(
        cls, tokenizer, prompt_ids: list[list[int]], chain_ids: list[list[int]], image_tokens
    ) -> "Rollout":
        """Samples that were not drawn but given, for SFT: ids as `encode_prompt` and `encode_chain` make them, all to
        be trained."""
        n, pad, device = len(prompt_ids), special_ids(tokenizer)[1], image_tokens.device
        lens = torch.tensor([len(ids) for ids in chain_ids], device=device)
        ids = right_pad(chain_ids, pad, device)
        text_mask = torch.arange(ids.shape[1], device=device) < lens[:, None]
        mask = torch.cat([text_mask, torch.ones_like(image_tokens, dtype=torch.bool)], 1).float()
        blank, no = torch.zeros_like(mask), torch.zeros(n, dtype=torch.bool, device=device)
        return cls(
            [], prompt_ids, ids, lens, image_tokens, mask, blank, blank, no, pad, 1.0, 1.0, "cond"
        )

    @classmethod
    def join(cls, parts: list["Rollout"]) -> "Rollout":
        """Rollouts with the same settings, one after the other; text is padded to the longest T."""
        longest = max(part.chain_ids.shape[1] for part in parts)

        def wide(
            value, fill, part
        ):  # text stands on the left, so that its padding is in the middle of a (N, S) tensor
            text = value[:, : part.chain_ids.shape[1]]
            return torch.cat(
                [F.pad(text, (0, longest - text.shape[1]), value=fill), value[:, text.shape[1] :]],
                1,
            )

        values = {name: torch.cat([wide(getattr(part, name), fill, part) for part in parts]) for name, fill in (
            ("chain_ids", parts[0].pad_id), ("mask", 0), ("logp", 0), ("entropy", 0))}  # fmt: skip
        values |= {
            k: torch.cat([getattr(part, k) for part in parts])
            for k in ("chain_lens", "image_tokens", "forced")
        }
        values |= {
            k: [x for part in parts for x in getattr(part, k)] for k in ("chains", "prompt_ids")
        }
        return replace(parts[0], **values)

    def __len__(self) -> int:
        return len(self.prompt_ids)

    def select(self, rows: list[int]) -> "Rollout":
        """The samples `rows`, as a Rollout of its own."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values = {k: v[rows] for k, v in values.items() if torch.is_tensor(v)}
        chains = [self.chains[r] for r in rows] if self.chains else []
        return replace(self, chains=chains, prompt_ids=[self.prompt_ids[r] for r in rows], **values)


def right_pad(rows: list[list[int]], pad: int, device) -> torch.Tensor:
    """R lists of ids -> (R, longest) int64."""
    width = max(map(len, rows))
    return torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=device)


def check_room(model, given: list[list[int]], chain: int) -> int:
    """Most tokens of a sequence: the longest of `given`, `chain` sampled ones, the image. Raises ValueError when the
    model's context is smaller."""
    longest = max(map(len, given)) + chain + image_token_count(model)
    if longest > (limit := model.config.text_config.max_position_embeddings):
        takes = f"prompt, chain and image can take {longest} tokens but this model holds {limit}"
        raise ValueError(f"{takes}: shorten the prompt or lower max_chain ({max(0, chain - 1)})")
    return longest


@torch.no_grad()
def rollout(
    model,
    tokenizer,
    prompts: list[str],
    group: int = 1,
    cfg: float = 1.0,
    temperature: float = 1.0,
    seed=0,
    max_chain: int = 600,
    chains: list[str] | None = None,
    indices: list[int] | None = None,
    logp_mode: str = "cond",
    draw: bool = True,
    progress=None,
) -> Rollout:
    """Samples `group` chains and pictures for each of B prompts: text, then image, from one cache.

    `temperature=0` is greedy. `chains` (B texts) are drawn as they are instead of sampling any. `seed` and `indices` (B
    ints, default 0..B-1) fix the random numbers, see `uniforms`. A chain ends with the first <begin_of_image>; after
    `max_chain` sampled tokens without one it is forced. `logp_mode` says which distribution of an image token is
    recorded: "cond" (the conditional one) or "guided" (the one it was sampled from). `draw=False` stops after the
    chains (then I is 0). `progress(1)` is called after each token, at most `max_chain` + 1 + I times. Raises ValueError
    when the sequence would not fit the model's context."""
    device, n = model.get_input_embeddings().weight.device, len(prompts) * group
    (bos, pad, boi), images = special_ids(tokenizer), image_token_count(model)
    given = None if chains is None else [encode_chain(tokenizer, chain) for chain in chains]
    max_chain = max_chain if given is None else 0
    prompt_ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    prefixes = [p + c for p, c in zip(prompt_ids, given or [[]] * len(prompts), strict=True)]
    longest = check_room(model, prefixes, max_chain + 1 if given is None else 0)
    s = decode.decoder_for(model, n, longest, cfg, temperature, logp_mode, (pad, boi))

    # Prompt (and given chain): once a prompt, then its keys and values are copied to its G samples
    width = max(map(len, prefixes))
    s.start(
        uniforms(seed, indices or range(len(prompts)), group, images + max_chain), images, width
    )
    s.load(0, torch.arange(n, device=device) // group, *prefill(model, prefixes, pad))

    # Chain: all rows in step, until the last one has ended
    for t in range(max_chain + 1 if given is None else 0):
        if t % s.patience == 0 and bool(
            s.done.all()
        ):  # the question makes a GPU wait: it is asked seldom
            break
        s.step(decode.text_step, model)
        if progress:
            progress(1)

    if given is None:
        chain_lens = s.sampled[:, images:].sum(-1) + s.forced
        chain_ids = s.token[:, images : images + int(chain_lens.max())].clone()
        s.rewind(
            width + chain_ids.shape[1]
        )  # columns that were filled after the last chain had ended
    else:
        chain_lens = torch.tensor([len(chain) for chain in given], device=device).repeat_interleave(
            group
        )
        chain_ids = right_pad(given, pad, device).repeat_interleave(group, 0)

    # Unconditional rows: bos, pads, <begin_of_image>, each as long as its sample; equal lengths are computed once
    if cfg != 1.0 and draw:
        sizes, which = s.position[:n].unique(return_inverse=True)
        rows = [[bos] + [pad] * (size - 2) + [boi] for size in sizes.tolist()]
        s.load(n, which, *prefill(model, rows, pad))

    # Image: the last token is sampled but no longer fed
    s.place.zero_()
    for i in range(images if draw else 0):
        if i + 1 < images:
            s.step(decode.image_step, model)
        else:
            decode.draw_code(model, s)
        if progress:
            progress(1)

    def recorded(
        values,
    ):  # (N, places) -> (N, S), text first; copied, since the next rollout writes there again
        return torch.cat(
            [values[:, images:][:, : chain_ids.shape[1]], values[:, : images * draw]], dim=1
        )

    mask = recorded(s.sampled).float()
    texts = [
        ids[: size - 1] for ids, size in zip(chain_ids.tolist(), chain_lens.tolist(), strict=True)
    ]
    return Rollout(
        chains=[tokenizer.decode(ids) for ids in texts],
        prompt_ids=[ids for ids in prompt_ids for _ in range(group)],
        chain_ids=chain_ids,
        chain_lens=chain_lens,
        image_tokens=s.token[:, : images * draw].clone(),
        mask=mask,
        logp=recorded(s.logp) * mask,
        entropy=recorded(s.entropy) * mask,
        forced=s.forced.clone(),
        pad_id=pad,
        cfg=cfg,
        temperature=temperature,
        logp_mode=logp_mode,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Scoring: the log-probability of what was sampled, in one pass with gradients


def chunked_logps(head, tokens, temperature: float, chunk: int = 1024):
    """Log-probabilities (M,) of `tokens` (M,) under `head(rows)`, a function from a slice of the M rows to logits (m,
    V).

    The logits of a chunk are recomputed in the backward pass, so that no (N, S, V) tensor ever exists."""
    pieces = []
    for start in range(0, len(tokens), chunk):
        rows = slice(start, start + chunk)
        score = lambda rows=rows: gather_logps(head(rows), tokens[rows], temperature)  # noqa: E731
        pieces.append(
            checkpoint(score, use_reentrant=False) if torch.is_grad_enabled() else score()
        )
    return torch.cat(pieces) if pieces else tokens.float()


def hidden_states(model, batch: Rollout, blank: torch.Tensor | None = None):
    """One causal pass over whole sequences -> the hidden states that predict the text (N, T, D) and the image (N, I,
    D).

    A row is laid out without gaps, [prompt | chain | image | padding], so positions are the plain ones and no mask is
    needed. Rows where `blank` (N,) bool is set are unconditional: pads between bos and <begin_of_image>."""
    device, images = batch.image_tokens.device, batch.image_tokens.shape[1]
    prompt_lens = torch.tensor([len(ids) for ids in batch.prompt_ids], device=device)
    text_lens = (prompt_lens + batch.chain_lens)[:, None]  # (N, 1)
    chains = [
        ids[:size]
        for ids, size in zip(batch.chain_ids.tolist(), batch.chain_lens.tolist(), strict=True)
    ]
    text = right_pad(
        [p + c for p, c in zip(batch.prompt_ids, chains, strict=True)], batch.pad_id, device
    )
    column = torch.arange(
        text.shape[1] + images - 1, device=device
    )  # the last image token predicts nothing
    text = F.pad(text, (0, images - 1), value=batch.pad_id)
    if blank is not None:
        text = text.where(~blank[:, None] | (column == 0) | (column == text_lens - 1), batch.pad_id)
    place = (column - text_lens)[..., None]  # (N, W, 1): which image token stands in a column
    picture = model.prepare_embeddings_for_image_generation(batch.image_tokens)  # (N, I, D)
    picture = picture.gather(1, place.clamp(0, images - 1).expand(-1, -1, picture.shape[-1]))
    embeds = torch.where(place >= 0, picture, model.get_input_embeddings()(text))
    hidden = model.model.language_model(
        inputs_embeds=embeds, use_cache=False
    ).last_hidden_state  # (N, W, D)

    def before(
        first, count
    ):  # the states one column before each of `count` columns from `first` (N, 1) on
        at = (first - 1 + torch.arange(count, device=device)).clamp(max=hidden.shape[1] - 1)
        return hidden.gather(1, at[..., None].expand(-1, -1, hidden.shape[-1]))

    return before(prompt_lens[:, None], batch.chain_ids.shape[1]), before(text_lens, images)


def token_logps(model, batch: Rollout, logp_mode: str | None = None, blank=None, chunk: int = 1024):
    """(logp, mask), both (N, S) float32, the image's I last: the log-probabilities of a rollout's tokens under `model`,
    with gradient.

    Scored at the rollout's temperature and, unless `logp_mode` says otherwise, in its mode: "cond" takes the
    conditional logits; "guided" the distribution that was sampled from, its unconditional half without gradient (one
    more forward pass). Rows where `blank` (N,) bool is set are scored as unconditional ones, their text is masked
    (condition dropout in SFT). Where the mask is 0 (given, forced, padding) logp is 0."""
    text_hidden, image_hidden = hidden_states(model, batch, blank)
    n, images = batch.image_tokens.shape
    mask = batch.mask.clone()
    if blank is not None:
        mask[blank, :-images] = 0
    trained = mask[:, :-images].bool()
    scored = trained.clone()
    scored[
        0, 0
    ] |= (
        ~trained.any()
    )  # in shards each weight takes part in each pass, or the processes wait forever
    rows = text_hidden[scored]
    text = chunked_logps(
        lambda part: model.lm_head(rows[part]), batch.chain_ids[scored], batch.temperature, chunk
    )
    text = (
        torch.zeros(scored.shape, device=text.device)
        .masked_scatter(scored, text)
        .where(trained, 0.0)
    )

    cond = image_hidden.flatten(0, 1)  # (N * I, D)
    head = model.model.generation_head
    if (logp_mode or batch.logp_mode) == "guided" and batch.cfg != 1.0:
        with torch.no_grad():
            uncond = hidden_states(model, batch, torch.ones_like(batch.forced))[1].flatten(0, 1)

        def image_logits(part):
            with torch.no_grad():
                blank = head(uncond[part]).float()
            return guide(torch.cat([head(cond[part]).float(), blank]), batch.cfg)[1]

    else:

        def image_logits(part):
            return head(cond[part])

    image = chunked_logps(
        image_logits, batch.image_tokens.flatten(), batch.temperature, chunk
    ).view(n, images)
    return torch.cat([text, image], dim=1), mask


# ---------------------------------------------------------------------------------------------------------------------
# Pictures to tokens and back


@torch.no_grad()
def encode_images(model, images) -> torch.Tensor:
    """PIL images, or (N, 3, H, W) in [-1, 1] -> image tokens (N, I), row by row. Pictures are resized to the model's
    size.

    The nearest code on the unit sphere, as DeepSeek's own encoder; transformers' quantizer compares lengths as well."""
    vq, config = model.model.vqmodel, model.config.vq_config
    if not torch.is_tensor(images):
        side = config.num_patches * 2 ** (len(config.channel_multiplier) - 1)
        images = [
            image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC) for image in images
        ]
        images = (
            torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
            / 127.5
            - 1
        )
    weight = vq.quant_conv.weight
    latent = vq.quant_conv(vq.encoder(images.to(weight.device, weight.dtype)))
    latent = F.normalize(
        latent.float(), dim=1
    )  # (N, 8, h, w); in bfloat16 the nearest code would often be another
    codes = F.normalize(vq.quantize.embedding.weight.float(), dim=-1)  # (K, 8)
    return (
        (latent.permute(0, 2, 3, 1) @ codes.T)
        .argmax(-1)
        .flatten(1)
        .to(model.get_input_embeddings().weight.device)
    )


@torch.no_grad()
def decode_images(model, image_tokens, batch_size: int = 32) -> list[Image.Image]:
    """Image tokens (N, I) -> N PIL images. Pixels are cut off to whole numbers, not rounded, as in the official
    code."""
    pictures, device = (
        [],
        model.model.vqmodel.quantize.embedding.weight.device,
    )  # not always the language model's
    for part in image_tokens.to(device).split(batch_size):
        pixels = model.decode_image_tokens(part).float()  # (n, H, W, 3) in [-1, 1]
        pixels = ((pixels + 1) / 2 * 255).clamp(0, 255).to(torch.uint8).cpu().numpy()
        pictures += [Image.fromarray(array) for array in pixels]
    return pictures


# ---------------------------------------------------------------------------------------------------------------------
# How fast the rollout is: beside a straightforward loop on the same weights, and above the floor of the memory


@torch.no_grad()
def plain_rollout(model, tokenizer, prompt: str, cfg: float, u, max_chain: int):
    """The official recipe written plainly: N chains one after the other on a growing cache, each asked after every
    token whether it has ended; then the whole prefix again, for all chains and their unconditional rows together.

    u (N, I + max_chain) -> `chain_ids` (N, T), equally long ones, and `image_tokens` (N, I): those of `rollout`."""
    lm, embed, images = (
        model.model.language_model,
        model.get_input_embeddings(),
        image_token_count(model),
    )
    (bos, pad, boi), prompt_ids, chains = (
        special_ids(tokenizer),
        encode_prompt(tokenizer, prompt),
        [],
    )
    for numbers in u:
        cache, new, chain = DynamicCache(config=lm.config), prompt_ids, []
        while len(chain) < max_chain and boi not in chain:
            new = embed(torch.tensor([new], device=u.device))
            hidden = lm(inputs_embeds=new, past_key_values=cache, use_cache=True).last_hidden_state[
                :, -1
            ]
            chain.append(
                sample_token(model.lm_head(hidden), numbers[None, images + len(chain)], 1.0)[
                    0
                ].item()
            )
            new = chain[-1:]
        chains.append(chain if boi in chain else [*chain, boi])
    rows = [prompt_ids + chain for chain in chains]
    if cfg != 1.0:
        rows += [[bos] + [pad] * (len(row) - 2) + [boi] for row in rows]
    cache, codes, new = (
        DynamicCache(config=lm.config),
        [],
        embed(torch.tensor(rows, device=u.device)),
    )
    for i in range(images):
        hidden = lm(inputs_embeds=new, past_key_values=cache, use_cache=True).last_hidden_state[
            :, -1
        ]
        guided = guide(model.model.generation_head(hidden).float(), cfg)[1]
        codes.append(sample_token(guided, u[:, i], 1.0)[0])
        new = model.prepare_embeddings_for_image_generation(
            codes[-1].repeat(len(rows) // len(u))[:, None]
        )
    return {"chain_ids": torch.tensor(chains), "image_tokens": torch.stack(codes, dim=1).cpu()}


def random_policy(size: str, device):
    """(model, the toy's tokenizer) with random weights: Janus-Pro's "1b" or "7b", or "small", 8 layers of width 512
    and about the 1B's proportions. bfloat16 on GPUs, float32 elsewhere."""
    parts = json.loads((TOY / "config.json").read_text())
    parts["text_config"] |= {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "head_dim": 64,
    }
    parts["text_config"] |= {"num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 8192}
    parts["vision_config"] |= {"image_size": 48, "projection_dim": 512}  # 12 x 12 image tokens
    parts["vq_config"] |= {
        "num_embeddings": 1024,
        "projection_dim": 512,
        "image_token_embed_dim": 512,
    }
    config = JanusConfig(**parts) if size == "small" else janus_pro_config(size)
    with device, no_init_weights():
        model = JanusForConditionalGeneration(
            config
        ).eval()  # its buffers (rotary frequencies) stay float32
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for name, parameter in model.named_parameters():
        parameter.data = torch.randn(parameter.shape, dtype=dtype, device=device) * 0.02 + (
            "norm" in name
        )
    return model, load_policy("toy")[1]


def rollout_floor(model, n: int, cfg: float, prompt: int, chain: int, bandwidth: float) -> float:
    """Seconds that a rollout takes at least: every step reads the weights that it uses, and the keys and values of what
    its rows have seen so far. Prints the arithmetic. `prompt` and `chain` are counts of tokens."""
    inner, lm, config = model.model, model.model.language_model, model.config.text_config
    images, both, seconds = image_token_count(model), n if cfg == 1.0 else 2 * n, 0.0
    kept = (
        2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    )  # numbers a token
    kept *= model.lm_head.weight.element_size()  # bytes
    for name, steps, rows, tokens, *heads in (
        ("chain", chain, n, prompt + chain / 2, model.lm_head),
        (
            "image",
            images,
            both,
            prompt + chain + images / 2,
            inner.generation_head,
            inner.generation_aligner,
        ),
    ):
        weights = sum(
            p.numel() * p.element_size()
            for part in (lm.layers, lm.norm, *heads)
            for p in part.parameters()
        )
        total = steps * (weights + rows * tokens * kept)
        seconds += total / bandwidth
        sizes = f"{weights / 1e9:.2f} GB of weights + {rows} rows x {tokens:.0f} tokens x {kept / 1e3:.0f} kB"
        print(f"  {name} {steps} x ({sizes}) = {total / 1e12:.2f} TB: {total / bandwidth:.2f} s")
    return seconds


def bench(size: str, n: int, cfg: float, chain: int, repeats: int, device) -> dict[str, float]:
    """Times both loops on one prompt and prints what was measured. Chains of random weights end anywhere, so
    <begin_of_image> is taken out of the logits: for both, all chains have `chain` tokens and are then ended."""
    gpu = device.type == "cuda"
    size = size or ("1b" if gpu else "small")
    chain = chain or (62 if size == "small" else 250)
    model, tokenizer = random_policy(size, device)
    boi, prompt = (
        torch.tensor(special_ids(tokenizer)[2:], device=device),
        "a red ball left of a blue cube " * 6,
    )
    model.lm_head.register_forward_hook(
        lambda _, __, logits: logits.index_fill(-1, boi, -torch.inf)
    )
    images, given, config = (
        image_token_count(model),
        len(encode_prompt(tokenizer, prompt)),
        model.config.text_config,
    )
    u = uniforms(0, [0], n, images + chain).to(device)

    def timed(run):  # all that is timed ends with a copy to the host, so that a GPU has finished
        start, result = time.perf_counter(), run()
        return time.perf_counter() - start, result

    print(
        f"{size}: {config.num_hidden_layers} layers of width {config.hidden_size}, random weights, on",
        end=" ",
    )
    print(torch.cuda.get_device_name(device) if gpu else f"{torch.get_num_threads()} CPU threads")
    print(
        f"{n} samples of a prompt of {given} tokens, each {chain} + 1 chain and {images} image tokens, cfg {cfg}"
    )
    loops = {
        "straightforward": lambda: plain_rollout(model, tokenizer, prompt, cfg, u, chain),
        "rollout": lambda: vars(rollout(model, tokenizer, [prompt], n, cfg, max_chain=chain)),
    }
    first, medians, result = timed(loops["rollout"])[0], {}, {}
    for name, loop in loops.items():
        count = (
            1 if gpu and name == "straightforward" else repeats
        )  # it takes minutes for the real sizes
        seconds, results = zip(*[timed(loop) for _ in range(count)], strict=True)
        medians[name], result[name] = float(np.median(seconds)), results[-1]
        print(
            f"{name:16}{medians[name]:8.2f} s, {n / medians[name]:.2f} samples a second, median of {count}"
        )
    old, new = (
        torch.cat([part["chain_ids"], part["image_tokens"]], dim=1).cpu()
        for part in result.values()
    )
    same, ratio = int((old == new).all(1).sum()), medians["straightforward"] / medians["rollout"]
    print(
        f"ratio {ratio:.1f}; {same} of {n} samples have the same tokens; first rollout (graphs) {first:.2f} s"
    )
    if gpu:
        source, target = torch.zeros(2, 2**32, dtype=torch.uint8, device=device)
        bandwidth = (
            10
            * 2
            * 2**32
            / timed(lambda: [target.copy_(source) for _ in range(10)][-1][0].item())[0]
        )
        print(
            f"floor at {bandwidth / 1e12:.2f} TB/s, measured by copying 4 GiB 10 times, read and written:"
        )
        floor = medians["floor"] = rollout_floor(model, n, cfg, given, chain, bandwidth)
        print(f"  {floor:.2f} s in all: {floor / medians['rollout']:.0%} of what the rollout takes")
    return medians | {"same": same}


# ---------------------------------------------------------------------------------------------------------------------
# Draw prompts from the command line


def best_plans(model, tokenizer, judge, prompts: list[str], plans: int, **sampling) -> list[str]:
    """Plan first, check, draw later: samples `plans` chains a prompt, without drawing, and returns for each prompt the
    one to which the judge (see rewards.py) gives the highest R_sem + R_spa; the first of equals."""
    chains = rollout(model, tokenizer, prompts, plans, draw=False, **sampling).chains
    asked = [prompt for prompt in prompts for _ in range(plans)]
    scores = [
        row["total"] for row in rewards.score(judge, None, asked, chains, [], parts=("sem", "spa"))
    ]
    groups = (range(b * plans, (b + 1) * plans) for b in range(len(prompts)))
    return [chains[max(group, key=scores.__getitem__)] for group in groups]


@dataclass
class Args:
    prompt: tyro.conf.Positional[str] = (
        ""  # what to draw, or a text file (.txt) with one prompt a line
    )
    model: str = "toy"  # `toy`, or a folder or hub id of a checkpoint
    n: int = 4  # pictures a prompt
    cfg: float = 1.0  # guidance: 5 for the released checkpoints, 1 (none) for the toy
    temperature: float = 1.0  # 0 takes the most likely token every time
    seed: int = 0  # the same seed, prompt and place give the same picture in any batch
    max_chain: int = 96  # most chain tokens (Janus-Pro: 600)
    chain: str = ""  # a text file with a chain that is drawn instead of writing one: edit a plan, then draw it
    plans: int = (
        1  # write this many plans for each picture and draw the one that the judge likes best
    )
    judge: str = (
        ""  # scores plans and pictures: `toy`, or a folder or hub id of a vision-language judge
    )
    batch_size: int = 64  # sequences at a time
    out: str = "out/draw"  # folder for pictures, plans, chains and a contact sheet
    bench: bool = False  # draw nothing: time the rollout of a model with random weights
    bench_size: Literal["", "small", "1b", "7b"] = (
        ""  # of that model; empty: 1b on a GPU, small elsewhere
    )
    bench_samples: int = 16  # of one prompt
    bench_cfg: float = 5.0  # its guidance
    bench_chain: int = 0  # its chain tokens; 0: 250, for small 62
    bench_repeats: int = (
        3  # rollouts timed after a first one; the straightforward loop runs as often, on GPUs once
    )


def main(argv: list[str] | None = None) -> None:
    args = run.parse_args(Args, __doc__, argv)
    device = run.start_processes()[2]
    counts = "n max_chain plans batch_size bench_samples bench_repeats"
    run.check_ranges(
        args, at_least_one=counts, not_negative="cfg temperature seed bench_cfg bench_chain"
    )
    if args.bench:
        bench(
            args.bench_size,
            args.bench_samples,
            args.bench_cfg,
            args.bench_chain,
            args.bench_repeats,
            device,
        )
        return
    if args.plans > 1 and (args.chain or not args.judge):
        run.fail("--plans needs a --judge that chooses among them, and no --chain")
    out = Path(args.out)
    try:
        lines = (
            Path(args.prompt).read_text().splitlines()
            if args.prompt.endswith(".txt")
            else [args.prompt]
        )
        prompts = [line.strip() for line in lines if line.strip() for _ in range(args.n)]
        chain = (
            Path(args.chain).read_text().strip().removesuffix("<begin_of_image>")
            if args.chain
            else None
        )
        if not prompts:
            raise ValueError("there is nothing to draw: the prompt is empty (give one, or --bench)")
        if chain is not None and (problems := chain_problems(chain)):
            raise ValueError(f"{args.chain}: {'; '.join(problems)}")
        model, tokenizer = load_policy(args.model, device)
        judge = rewards.QwenJudge(args.judge, device) if args.judge not in ("", "toy") else None
        if args.judge == "toy":
            judge = toy.ToyJudge()
        tokens, rows = args.max_chain + 1 + image_token_count(model), []
        size = max(1, args.batch_size // args.plans)
        parts = [
            range(start, min(start + size, len(prompts))) for start in range(0, len(prompts), size)
        ]
        out.mkdir(parents=True, exist_ok=True)
        with tqdm(total=tokens * len(parts), desc="tokens") as bar:
            for done, part in enumerate(parts, start=1):
                batch, chains = [prompts[k] for k in part], chain and [chain] * len(part)
                how = {
                    "temperature": args.temperature,
                    "seed": args.seed,
                    "max_chain": args.max_chain,
                }
                how["indices"] = list(part)
                if args.plans > 1:
                    chains = best_plans(model, tokenizer, judge, batch, args.plans, **how)
                sampled = rollout(
                    model, tokenizer, batch, cfg=args.cfg, chains=chains, progress=bar.update, **how
                )
                rows += zip(
                    batch, sampled.chains, decode_images(model, sampled.image_tokens), strict=True
                )
                bar.update(done * tokens - bar.n)  # chains end before their cap
    except (OSError, ValueError) as problem:
        run.fail(str(problem))
    save_drawings(rows, judge, out, args.n)


def save_drawings(rows: list[tuple], judge, out: Path, n: int) -> None:
    """Writes what was drawn, (prompt, chain, image) a row, `n` rows a prompt; scores it if there is a judge."""
    prompts, chains, images = map(list, zip(*rows, strict=True))
    scores = rewards.score(judge, None, prompts, chains, images) if judge else [{}] * len(rows)
    sheet = []
    for k, (prompt, chain, image) in enumerate(rows):
        path = out / f"{k // n:03d}_{k % n}"
        boxes, large = parse_chain(chain), image.resize((448, 448), Image.Resampling.NEAREST)
        image.save(f"{path}.png")
        draw_boxes(boxes).save(f"{path}_plan.png")
        draw_boxes(boxes, image=large).save(f"{path}_boxes.png")
        Path(f"{path}.txt").write_text(chain, encoding="utf-8")
        note = "  ".join(f"{part} {value:.2f}" for part, value in scores[k].items()) or path.name
        sheet.append({"prompt": prompt, "note": note, "chain": chain, "image": image})
    draw_plans(sheet[:24], out / "sheet.png", columns=2)
    print(f"{prompts[0]}\n  {chains[0]}")
    if judge:
        means = {part: np.mean([row[part] for row in scores]) for part in scores[0]}
        print(
            f"mean of {len(rows)}: "
            + "  ".join(f"{part} {value:.3f}" for part, value in means.items())
        )
    print(f"wrote {len(rows)} pictures with their chains and plans, and {out / 'sheet.png'}")


if __name__ == "__main__":
    main()
