"""The policy: Janus-Pro as it is used by GoT-R1. One network writes a chain of objects and boxes,
then draws it token by token.

A sample is one sequence. Two heads of the same network sample it, from one key-value cache:

    [bos] User: … {prompt}\n\nAssistant: | chain … <begin_of_image> | z_1 … z_I
    given                                | sampled by lm_head       | sampled by generation_head

Letters, here and in every other file:
    B prompts, G samples per prompt, N = B*G samples (sample n belongs to prompt n // G), P prompt
    tokens, T text positions (chain and <begin_of_image>), I image tokens (576; toy 64), S = T + I,
    V text vocabulary, K image codes, D width of the language model.

Classifier-free guidance needs two rows of the batch per sample. The first N rows are conditional,
the last N unconditional: all tokens between bos and <begin_of_image> are pads, which are attended
to like any token. The released checkpoints were trained that way. Guided logits are
uncond + cfg * (cond - uncond).

    python gotr1.py "a red ball left of a blue cube" --n 4    # the toy model, in seconds

Read `plain_rollout` first: it is short and slow. `rollout` samples the same tokens for many prompts
at once; what makes it fast stands in engine/decode.py.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from engine import decode

JANUS_IMAGE_TOKENS = 576  # of Janus-Pro, 1B and 7B; the toy has 64
INSTRUCTION = "Follow the caption to generate an image through a chain of thought process: "
SPECIAL_TOKENS = {  # looked up by name: the ids differ between the 1B and the 7B checkpoint
    "bos_token": "<｜begin▁of▁sentence｜>",
    "eos_token": "<｜end▁of▁sentence｜>",
    "pad_token": "<｜▁pad▁｜>",
    "boi_token": "<begin_of_image>",
    "eoi_token": "<end_of_image>",
    "image_token": "<image_placeholder>",
}


def load_policy(name_or_path: str, device="cpu", dtype: torch.dtype | None = None):
    """(model, tokenizer) from `toy`, a folder, or a hub id: see engine.checkpoints.load_policy."""
    from engine import checkpoints  # not at the top: who copies this file can do without it

    return checkpoints.load_policy(name_or_path, device, dtype)


def convert_deepseek(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """DeepSeek's names of tensors -> transformers': see engine.checkpoints.convert_deepseek."""
    from engine import checkpoints

    return checkpoints.convert_deepseek(state_dict)


# ------------------------------------------------------------------------------------------------
# The prompt


def special_ids(tokenizer) -> tuple[int, int, int]:
    """Ids of (bos, pad, begin_of_image), looked up by name: in some checkpoints
    `tokenizer.pad_token_id` is another token. Raises ValueError when one is missing."""
    names = [SPECIAL_TOKENS[key] for key in ("bos_token", "pad_token", "boi_token")]
    ids = [tokenizer.convert_tokens_to_ids(name) for name in names]
    missing = []
    for name, token_id in zip(names, ids, strict=True):
        # of an unknown name the id is None or that of another token
        if tokenizer.convert_ids_to_tokens(token_id or 0) != name:
            missing.append(name)
    if missing:
        raise ValueError(
            f"the tokenizer lacks {', '.join(missing)}: expected one of Janus-Pro or GoT-R1"
        )
    return tuple(ids)


def format_prompt(prompt: str) -> str:
    """The text that the GoT-R1 checkpoints were trained on (official infer.py), without bos."""
    return f"User: {INSTRUCTION}{prompt}\n\nAssistant:"


def encode_prompt(tokenizer, prompt: str) -> list[int]:
    """Token ids of `format_prompt`, with one bos."""
    bos, _, _ = special_ids(tokenizer)
    return [bos, *tokenizer.encode(format_prompt(prompt), add_special_tokens=False)]


def encode_chain(tokenizer, chain: str) -> list[int]:
    """Token ids of a chain and of the <begin_of_image> that ends it, without bos. Raises ValueError
    when a <begin_of_image> stands inside the chain."""
    _, _, boi = special_ids(tokenizer)
    text = chain.removesuffix(SPECIAL_TOKENS["boi_token"])
    ids = tokenizer.encode(text, add_special_tokens=False)
    if boi in ids:
        raise ValueError(f"a chain ends with {SPECIAL_TOKENS['boi_token']}, not before: {chain!r}")
    return [*ids, boi]


def image_token_count(model) -> int:
    """I: the image tokens of a picture."""
    return model.config.vq_config.num_patches**2


# ------------------------------------------------------------------------------------------------
# Samples


@dataclass
class Rollout:
    """N samples, and what was recorded while they were drawn. Shorter chains are padded on the
    right to T, the length of the longest."""

    chains: list[str]  # N texts, without the closing <begin_of_image>
    prompt_ids: list[list[int]]  # N, bos included
    chain_ids: torch.Tensor  # (N, T) int64, the closing <begin_of_image> included
    chain_lens: torch.Tensor  # (N,) int64
    image_tokens: torch.Tensor  # (N, I) int64
    mask: torch.Tensor  # (N, S) float32: 1 if sampled; 0 if given, forced or padding
    logp: torch.Tensor  # (N, S) float32: log-probability of each sampled token, see `logp_mode`
    entropy: torch.Tensor  # (N, S) float32: of the distribution it was sampled from, in nats
    forced: torch.Tensor  # (N,) bool: the chain reached max_chain, <begin_of_image> was forced
    pad_id: int
    cfg: float
    temperature: float
    logp_mode: str  # "cond" or "guided", see `rollout`

    @classmethod
    def from_data(
        cls, tokenizer, prompt_ids: list[list[int]], chain_ids: list[list[int]], image_tokens
    ) -> "Rollout":
        """Samples for SFT, from data: ids as `encode_prompt` and `encode_chain` make them. The mask
        covers all tokens of chain and image."""
        _, pad, _ = special_ids(tokenizer)
        device = image_tokens.device
        lens = torch.tensor([len(ids) for ids in chain_ids], device=device)
        text = right_pad(chain_ids, pad, device)
        text_mask = torch.arange(text.shape[1], device=device) < lens[:, None]
        mask = torch.cat([text_mask, torch.ones_like(image_tokens, dtype=torch.bool)], dim=1)
        nothing_recorded = torch.zeros_like(mask, dtype=torch.float32)
        return cls(
            chains=[],
            prompt_ids=prompt_ids,
            chain_ids=text,
            chain_lens=lens,
            image_tokens=image_tokens,
            mask=mask.float(),
            logp=nothing_recorded,
            entropy=nothing_recorded,
            forced=torch.zeros(len(prompt_ids), dtype=torch.bool, device=device),
            pad_id=pad,
            cfg=1.0,
            temperature=1.0,
            logp_mode="cond",
        )

    @classmethod
    def join(cls, parts: list["Rollout"]) -> "Rollout":
        """Rollouts with the same settings, one after the other; text is padded to the longest T."""
        first = parts[0]
        longest = max(part.chain_ids.shape[1] for part in parts)

        def joined(name: str, text_fill=0):
            """The field `name` of all parts, (N, T) or (N, S); its text is padded with
            `text_fill`."""
            values = []
            for part in parts:
                value = getattr(part, name)
                length = part.chain_ids.shape[1]
                text = F.pad(value[:, :length], (0, longest - length), value=text_fill)
                values.append(torch.cat([text, value[:, length:]], dim=1))
            return torch.cat(values)

        chains = []
        prompt_ids = []
        for part in parts:
            chains += part.chains
            prompt_ids += part.prompt_ids
        return replace(
            first,
            chains=chains,
            prompt_ids=prompt_ids,
            chain_ids=joined("chain_ids", text_fill=first.pad_id),
            chain_lens=torch.cat([part.chain_lens for part in parts]),
            image_tokens=torch.cat([part.image_tokens for part in parts]),
            mask=joined("mask"),
            logp=joined("logp"),
            entropy=joined("entropy"),
            forced=torch.cat([part.forced for part in parts]),
        )

    def __len__(self) -> int:
        return len(self.prompt_ids)

    def select(self, samples: list[int]) -> "Rollout":
        """Some of the samples, by index, as a Rollout."""
        return replace(
            self,
            chains=[self.chains[n] for n in samples] if self.chains else [],
            prompt_ids=[self.prompt_ids[n] for n in samples],
            chain_ids=self.chain_ids[samples],
            chain_lens=self.chain_lens[samples],
            image_tokens=self.image_tokens[samples],
            mask=self.mask[samples],
            logp=self.logp[samples],
            entropy=self.entropy[samples],
            forced=self.forced[samples],
        )


def right_pad(sequences: list[list[int]], pad: int, device) -> torch.Tensor:
    """N lists of ids -> (N, length of the longest) int64."""
    width = max(map(len, sequences))
    padded = [ids + [pad] * (width - len(ids)) for ids in sequences]
    return torch.tensor(padded, device=device)


# ------------------------------------------------------------------------------------------------
# Sampling one token


def uniforms(seed, indices: list[int], group: int, length: int) -> torch.Tensor:
    """(B*G, length) float32 in [0, 1): a random number for each token that may be sampled.

    They depend on seed, prompt index and sample alone, so the samples of a prompt are the same in
    any batch, on any number of ranks and after a resume. `seed` is an int or a tuple of ints, for
    instance (seed, step)."""
    seed = seed if isinstance(seed, tuple) else (seed,)
    rows = []
    for index in indices:
        for sample in range(group):
            generator = np.random.default_rng([*seed, index, sample])
            rows.append(generator.random(length, np.float32))
    return torch.from_numpy(np.stack(rows))


def at_least_float32(values):
    """bfloat16 becomes float32; float64 stays, for tests."""
    return values if values.dtype == torch.float64 else values.float()


def sample_token(logits, u, temperature: float):
    """Inverse-CDF sampling: logits (N, V), random numbers u (N,) -> token, its log-probability, and
    the entropy of the distribution, (N,) each.

    Temperature 0 takes the most likely token; the other two are then those of temperature 1."""
    logps = torch.log_softmax(at_least_float32(logits) / (temperature or 1.0), dim=-1)
    probs = logps.exp()
    if temperature == 0:
        token = logits.argmax(-1)
    else:
        cdf = probs.cumsum(-1)
        token = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True).squeeze(-1)
        last_possible = (cdf < cdf[:, -1:]).sum(-1)  # tokens after it have probability 0
        token = torch.minimum(token, last_possible)
    entropy = -(probs * logps.clamp(min=-1e4)).sum(-1)  # clamp: 0 * -inf would be nan
    return token, logps.gather(-1, token[:, None]).squeeze(-1), entropy


def guide(logits, cfg: float):
    """Logits (2N, K), conditional half first -> (conditional, guided), both (N, K). Without
    guidance (cfg 1) logits are (N, K), and returned twice."""
    if cfg == 1.0:
        return logits, logits
    cond, uncond = logits.chunk(2)
    return cond, uncond + cfg * (cond - uncond)


def gather_logps(logits, tokens, temperature: float = 1.0):
    """Logits (..., V), tokens (...) -> log-probability of each token (...). Temperature 0 counts as
    1."""
    logits = at_least_float32(logits) / (temperature or 1.0)
    return logits.gather(-1, tokens[..., None]).squeeze(-1) - logits.logsumexp(-1)


# ------------------------------------------------------------------------------------------------
# The rollout, plainly


def unconditional_ids(length: int, bos: int, pad: int, boi: int) -> list[int]:
    """What stands in an unconditional row in place of prompt and chain: `length` tokens."""
    return [bos] + [pad] * (length - 2) + [boi]


@torch.no_grad()
def plain_rollout(model, tokenizer, prompt: str, cfg: float, u, max_chain: int) -> dict:
    """N chains and images of one prompt, at temperature 1, as the official code samples them: first
    each chain on a cache of its own; then prompt and chain once more, all samples and their
    unconditional rows in a batch, and after them the image.

    u: (N, I + max_chain) from `uniforms`: random numbers of the image, then of the chain.
    Returns `chain_ids` (N, T) and `image_tokens` (N, I), the same tokens as `rollout`. All chains
    must come out equally long; with N = 1 they do."""
    lm = model.model.language_model
    embed = model.get_input_embeddings()
    image_len = image_token_count(model)
    bos, pad, boi = special_ids(tokenizer)
    prompt_ids = encode_prompt(tokenizer, prompt)

    # Text: until <begin_of_image>, which is forced after max_chain tokens
    chains = []
    for numbers in u:
        cache = DynamicCache(config=lm.config)
        new_ids = prompt_ids
        chain = []
        while len(chain) < max_chain and boi not in chain:
            embeds = embed(torch.tensor([new_ids], device=u.device))
            out = lm(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
            logits = model.lm_head(out.last_hidden_state[:, -1])
            number = numbers[None, image_len + len(chain)]
            token, _, _ = sample_token(logits, number, temperature=1.0)
            chain.append(token.item())
            new_ids = chain[-1:]
        chains.append(chain if boi in chain else [*chain, boi])

    # Guidance: an unconditional row per sample, as long as the conditional one
    rows = [prompt_ids + chain for chain in chains]
    if cfg != 1.0:
        rows += [unconditional_ids(len(row), bos, pad, boi) for row in rows]

    # Image: both rows of a sample are continued with the same code
    cache = DynamicCache(config=lm.config)
    embeds = embed(torch.tensor(rows, device=u.device))
    codes = []
    for i in range(image_len):
        out = lm(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
        logits = at_least_float32(model.model.generation_head(out.last_hidden_state[:, -1]))
        _, guided = guide(logits, cfg)
        code, _, _ = sample_token(guided, u[:, i], temperature=1.0)
        codes.append(code)
        code_of_row = code.repeat(len(rows) // len(u))
        embeds = model.prepare_embeddings_for_image_generation(code_of_row[:, None])
    return {"chain_ids": torch.tensor(chains), "image_tokens": torch.stack(codes, dim=1).cpu()}


# ------------------------------------------------------------------------------------------------
# The rollout, for many prompts at once


@dataclass(frozen=True)
class Sampling:
    """Settings of a rollout that the step functions below read from its buffers."""

    cfg: float
    temperature: float
    logp_mode: str
    pad: int
    boi: int


def text_step(model, buffers: decode.Decoder, width: int) -> None:
    """Samples one chain token per sample. A finished chain gets masked pads, and its last hidden
    state is kept for the image. After `cap` tokens <begin_of_image> is forced."""
    sampling = buffers.settings
    done = buffers.done
    hidden = buffers.hidden[: buffers.samples]  # text has no unconditional rows
    logits = model.lm_head(hidden)
    token, logp, entropy = sample_token(logits, buffers.text.number(), sampling.temperature)
    at_cap = buffers.text.place == buffers.cap  # (1,): all chains are equally far
    token = token.masked_fill(at_cap, sampling.boi).masked_fill(done, sampling.pad)
    buffers.text.record(token=token, logp=logp, entropy=entropy, sampled=~(done | at_cap))
    buffers.forced |= at_cap & ~done

    embeds = model.get_input_embeddings()(token)
    new_hidden = buffers.feed(model, embeds, visible=~done, width=width)
    hidden.copy_(torch.where(done[:, None], hidden, new_hidden))
    buffers.done |= token == sampling.boi


def sample_code(model, buffers: decode.Decoder):
    """Samples one image token per sample, (N,), with guidance."""
    sampling = buffers.settings
    logits = at_least_float32(model.model.generation_head(buffers.hidden))
    cond, guided = guide(logits, sampling.cfg)
    code, logp, entropy = sample_token(guided, buffers.image.number(), sampling.temperature)
    if sampling.logp_mode == "cond" and sampling.cfg != 1.0:
        logp = gather_logps(cond, code, sampling.temperature)
    sampled = torch.ones_like(buffers.done)
    buffers.image.record(token=code, logp=logp, entropy=entropy, sampled=sampled)
    return code


def image_step(model, buffers: decode.Decoder, width: int) -> None:
    """Samples one image token per sample and feeds it to all rows of the sample."""
    code = sample_code(model, buffers)
    rows_per_sample = len(buffers.hidden) // buffers.samples  # 2 with guidance, else 1
    code_of_row = code.repeat(rows_per_sample)
    embeds = model.prepare_embeddings_for_image_generation(code_of_row[:, None])[:, 0]
    visible = torch.ones_like(code_of_row, dtype=torch.bool)
    buffers.hidden.copy_(buffers.feed(model, embeds, visible=visible, width=width))


def check_room(model, given: list[list[int]], chain: int) -> int:
    """Tokens of the longest possible sequence: the longest of `given`, then `chain` sampled tokens,
    then the image. Raises ValueError when the model's context is shorter."""
    longest = max(map(len, given)) + chain + image_token_count(model)
    limit = model.config.text_config.max_position_embeddings
    if longest > limit:
        raise ValueError(
            f"prompt, chain and image can take {longest} tokens but this model holds {limit}: "
            f"shorten the prompt or lower max_chain ({max(0, chain - 1)})"
        )
    return longest


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
    at_once: int = 0,
    each=None,
) -> Rollout:
    """Samples `group` chains and images for each of B prompts.

    temperature: 0 is greedy.
    seed, indices: fix the random numbers, see `uniforms`; `indices` are B ints, by default 0..B-1.
    max_chain: a chain ends with <begin_of_image>, which is forced after so many tokens.
    chains: B chains to draw; none is sampled then.
    logp_mode: the log-probabilities to record for image tokens: "cond" under the conditional
        distribution, "guided" under the one they were sampled from.
    draw: False stops after the chains; I is then 0.
    at_once: prompts per part; 0: all. Memory grows with it, samples do not depend on it.
    each: called as each(first, part) after each part: index of its first prompt, and its Rollout.
    progress: called as progress(1) after each token, at most max_chain + 1 + I times per part.

    Raises ValueError when the sequence would not fit the model's context."""
    indices = indices or list(range(len(prompts)))
    at_once = at_once or len(prompts)
    parts = []
    for first in range(0, len(prompts), at_once):
        chosen = slice(first, first + at_once)
        part = rollout_part(
            model,
            tokenizer,
            prompts[chosen],
            group=group,
            cfg=cfg,
            temperature=temperature,
            seed=seed,
            max_chain=max_chain,
            chains=chains[chosen] if chains is not None else None,
            indices=indices[chosen],
            logp_mode=logp_mode,
            draw=draw,
            progress=progress,
        )
        parts.append(part)
        if each:
            each(first, part)
    return Rollout.join(parts)


@torch.no_grad()
def rollout_part(
    model,
    tokenizer,
    prompts: list[str],
    group: int,
    cfg: float,
    temperature: float,
    seed,
    max_chain: int,
    chains: list[str] | None,
    indices: list[int],
    logp_mode: str,
    draw: bool,
    progress,
) -> Rollout:
    """`rollout` of prompts that are sampled together, one token of all samples at a time."""
    image_len = image_token_count(model)
    bos, pad, boi = special_ids(tokenizer)
    prompt_ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    prefixes = prompt_ids
    most_text_steps = max_chain + 1  # one more, to force <begin_of_image>
    if chains is not None:
        given = [encode_chain(tokenizer, chain) for chain in chains]
        prefixes = [ids + chain for ids, chain in zip(prompt_ids, given, strict=True)]
        max_chain = 0
        most_text_steps = 0
    columns = check_room(model, prefixes, most_text_steps)

    # 1) Buffers, and the random numbers: of the image first, then of the chain
    n_samples = len(prompts) * group
    buffers = decode.decoder_for(
        model,
        samples=n_samples,
        rows=n_samples if cfg == 1.0 else 2 * n_samples,
        columns=columns,
        images=image_len,
        settings=Sampling(cfg=cfg, temperature=temperature, logp_mode=logp_mode, pad=pad, boi=boi),
    )
    device = buffers.hidden.device
    numbers = uniforms(seed, indices, group, image_len + max_chain)
    buffers.image.u[:] = numbers[:, :image_len]
    buffers.text.u[:, :max_chain] = numbers[:, image_len:]
    buffers.cap.fill_(max_chain)

    # 2) Prompts and given chains: one forward pass per prompt, copied to its G samples
    prompt_width = max(map(len, prefixes))
    buffers.rewind(prompt_width)
    prompt_of_sample = torch.arange(n_samples, device=device) // group
    hidden, cache, seen = decode.prefill(model, prefixes, pad)
    buffers.load(0, prompt_of_sample, hidden, cache, seen)

    # 3) Chains: one token of each at a time, until the last chain has ended
    for t in range(most_text_steps):
        # to look, the host must wait for the GPU: only every `patience` steps
        if t % buffers.patience == 0 and bool(buffers.done.all()):
            break
        buffers.step(text_step, model)
        if progress:
            progress(1)

    if chains is None:
        chain_lens = buffers.text.sampled.sum(-1) + buffers.forced
        chain_ids = buffers.text.token[:, : int(chain_lens.max())].clone()
        # steps after the end of the last chain have written pads: the image overwrites them
        buffers.rewind(prompt_width + chain_ids.shape[1])
    else:
        chain_lens = torch.tensor([len(ids) for ids in given], device=device)
        chain_lens = chain_lens.repeat_interleave(group)
        chain_ids = right_pad(given, pad, device).repeat_interleave(group, 0)

    # 4) Unconditional rows: one forward pass per length, copied to the samples of that length
    if cfg != 1.0 and draw:
        lengths, length_of_sample = buffers.position[:n_samples].unique(return_inverse=True)
        rows = [unconditional_ids(length, bos, pad, boi) for length in lengths.tolist()]
        hidden, cache, seen = decode.prefill(model, rows, pad)
        buffers.load(n_samples, length_of_sample, hidden, cache, seen)

    # 5) Image: no token comes after the last one, so it is sampled but not fed
    drawn = image_len if draw else 0
    for i in range(drawn):
        if i < image_len - 1:
            buffers.step(image_step, model)
        else:
            sample_code(model, buffers)
        if progress:
            progress(1)

    # 6) Copies of what was recorded: the next rollout may write to the same buffers
    def recorded(name: str):
        """(N, S), text first."""
        text = getattr(buffers.text, name)[:, : chain_ids.shape[1]]
        image = getattr(buffers.image, name)[:, :drawn]
        return torch.cat([text, image], dim=1)

    mask = recorded("sampled").float()
    texts = []
    for ids, length in zip(chain_ids.tolist(), chain_lens.tolist(), strict=True):
        texts.append(tokenizer.decode(ids[: length - 1]))
    return Rollout(
        chains=texts,
        prompt_ids=[ids for ids in prompt_ids for _ in range(group)],
        chain_ids=chain_ids,
        chain_lens=chain_lens,
        image_tokens=buffers.image.token[:, :drawn].clone(),
        mask=mask,
        logp=recorded("logp") * mask,
        entropy=recorded("entropy") * mask,
        forced=buffers.forced.clone(),
        pad_id=pad,
        cfg=cfg,
        temperature=temperature,
        logp_mode=logp_mode,
    )


# ------------------------------------------------------------------------------------------------
# Scoring: the log-probability of what was sampled, in one pass with gradients


def hidden_states(model, batch: Rollout, blank: torch.Tensor | None = None):
    """One causal forward pass over N sequences -> the hidden states that predict the text (N, T, D)
    and the image (N, I, D).

    A sequence is [prompt | chain | image | padding]. Padding stands only at its end, so positions
    count from 0 and causal attention needs no further mask.
    blank: (N,) bool, the sequences to make unconditional: pads between bos and <begin_of_image>."""
    device = batch.image_tokens.device
    image_len = batch.image_tokens.shape[1]

    # Ids of prompt and chain, then columns for the image, all but its last token, after which
    # nothing is predicted
    texts = []
    chains = zip(batch.chain_ids.tolist(), batch.chain_lens.tolist(), strict=True)
    for prompt_ids, (chain_ids, length) in zip(batch.prompt_ids, chains, strict=True):
        texts.append(prompt_ids + chain_ids[:length])
    text = F.pad(right_pad(texts, batch.pad_id, device), (0, image_len - 1), value=batch.pad_id)
    prompt_lens = torch.tensor([len(ids) for ids in batch.prompt_ids], device=device)[:, None]
    text_lens = prompt_lens + batch.chain_lens[:, None]  # (N, 1)
    column = torch.arange(text.shape[1], device=device)  # (W,)
    if blank is not None:
        kept = ~blank[:, None] | (column == 0) | (column == text_lens - 1)
        text = text.where(kept, batch.pad_id)

    # Embeddings: of the image where the text has ended, of the text before
    index = (column - text_lens)[..., None]  # (N, W, 1): of a column's image token; < 0 in the text
    picture = model.prepare_embeddings_for_image_generation(batch.image_tokens)  # (N, I, D)
    picture = picture.gather(1, index.clamp(0, image_len - 1).expand(-1, -1, picture.shape[-1]))
    embeds = torch.where(index >= 0, picture, model.get_input_embeddings()(text))
    out = model.model.language_model(inputs_embeds=embeds, use_cache=False)
    hidden = out.last_hidden_state  # (N, W, D)

    def states_before(first, count: int):
        """(N, count, D): the states that predict the `count` tokens from column `first` (N, 1) on,
        each from the column before its own."""
        columns = first - 1 + torch.arange(count, device=device)
        columns = columns.clamp(max=hidden.shape[1] - 1)
        return hidden.gather(1, columns[..., None].expand(-1, -1, hidden.shape[-1]))

    text_hidden = states_before(prompt_lens, batch.chain_ids.shape[1])
    image_hidden = states_before(text_lens, image_len)
    return text_hidden, image_hidden


def chunked_logps(head, tokens, temperature: float, chunk: int = 1024):
    """Log-probabilities (M,) of `tokens` (M,), `chunk` of them at a time. `head` is a function from
    a slice of the M tokens to their logits (m, V).

    The logits of a chunk are recomputed in the backward pass: never do all M exist, which would be
    gigabytes."""

    def score(part: slice):
        return gather_logps(head(part), tokens[part], temperature)

    pieces = []
    for start in range(0, len(tokens), chunk):
        part = slice(start, start + chunk)
        if torch.is_grad_enabled():
            pieces.append(checkpoint(score, part, use_reentrant=False))
        else:
            pieces.append(score(part))
    return torch.cat(pieces) if pieces else torch.zeros(0, device=tokens.device)


def at_least_one(trained):
    """`trained` (N, T) bool, with [0, 0] set if nothing is. With weights in shards (FSDP) all
    processes run the head in each pass; one that left it out would make the others wait forever."""
    scored = trained.clone()
    scored[0, 0] |= ~trained.any()
    return scored


def text_logps(model, batch: Rollout, hidden, trained, chunk: int):
    """(N, T): log-probabilities of the chain tokens where `trained` (N, T) bool is set, else 0."""
    scored = at_least_one(trained)
    states = hidden[scored]  # (M, D)
    tokens = batch.chain_ids[scored]
    logp = chunked_logps(lambda part: model.lm_head(states[part]), tokens, batch.temperature, chunk)
    padded = logp.new_zeros(scored.shape).masked_scatter(scored, logp)
    return padded.where(trained, 0.0)


def image_logps(model, batch: Rollout, hidden, guided: bool, chunk: int):
    """(N, I): log-probabilities of the image tokens. `guided`: under the guided distribution. Its
    unconditional half takes one more forward pass, without gradient."""
    head = model.model.generation_head
    cond = hidden.flatten(0, 1)  # (N * I, D)
    if guided:
        with torch.no_grad():
            all_blank = torch.ones(len(batch), dtype=torch.bool, device=cond.device)
            _, uncond = hidden_states(model, batch, blank=all_blank)
            uncond = uncond.flatten(0, 1)

    def logits(part: slice):
        if not guided:
            return head(cond[part])
        with torch.no_grad():
            uncond_logits = at_least_float32(head(uncond[part]))
        cond_logits = at_least_float32(head(cond[part]))
        _, guided_logits = guide(torch.cat([cond_logits, uncond_logits]), batch.cfg)
        return guided_logits

    tokens = batch.image_tokens.flatten()
    return chunked_logps(logits, tokens, batch.temperature, chunk).view_as(batch.image_tokens)


def token_logps(model, batch: Rollout, logp_mode: str | None = None, blank=None, chunk: int = 1024):
    """(logp, mask), both (N, S) float32, text first: log-probabilities of the tokens of a rollout
    under `model`, with gradient, at the temperature of the rollout. Where the mask is 0 (given,
    forced, padding), logp is 0.

    logp_mode: "cond" or "guided", see `rollout`; by default as the rollout was recorded.
    blank: (N,) bool, samples to score without prompt and chain, their text masked: condition
        dropout in SFT.
    chunk: tokens whose logits exist at a time."""
    image_len = batch.image_tokens.shape[1]
    mask = batch.mask.clone()
    if blank is not None:
        mask[blank, :-image_len] = 0
    mode = logp_mode or batch.logp_mode
    text_hidden, image_hidden = hidden_states(model, batch, blank)
    text = text_logps(model, batch, text_hidden, mask[:, :-image_len].bool(), chunk)
    guided = mode == "guided" and batch.cfg != 1.0
    image = image_logps(model, batch, image_hidden, guided, chunk)
    return torch.cat([text, image], dim=1), mask


# ------------------------------------------------------------------------------------------------
# Pictures to tokens and back


@torch.no_grad()
def encode_images(model, images) -> torch.Tensor:
    """PIL images, resized to the model's size, or (N, 3, H, W) in [-1, 1] -> image tokens (N, I).

    A token is the nearest code after both are scaled to length 1, as in DeepSeek's encoder;
    transformers' own quantizer does not scale them."""
    vq = model.model.vqmodel
    config = model.config.vq_config
    if not torch.is_tensor(images):
        from PIL import Image  # not at the top: who copies this file may do without it

        side = config.num_patches * 2 ** (len(config.channel_multiplier) - 1)  # pixels
        arrays = []
        for image in images:
            small = image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
            arrays.append(np.asarray(small))
        images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 127.5 - 1
    weight = vq.quant_conv.weight
    latent = vq.quant_conv(vq.encoder(images.to(weight.device, weight.dtype)))
    # In float32: in bfloat16 the nearest code would often be another one
    latent = F.normalize(latent.float(), dim=1)  # (N, 8, h, w)
    codes = F.normalize(vq.quantize.embedding.weight.float(), dim=-1)  # (K, 8)
    cosines = latent.permute(0, 2, 3, 1) @ codes.T  # (N, h, w, K)
    tokens = cosines.argmax(-1).flatten(1)
    return tokens.to(model.get_input_embeddings().weight.device)


@torch.no_grad()
def decode_images(model, image_tokens, tokens_at_once: int = 8 * 576) -> list:
    """Image tokens (N, I) -> N PIL images. Pixels are rounded down, as in the official code. 32 are
    decoded at a time, of Janus-Pro 8: each of them takes a quarter of a gigabyte."""
    from PIL import Image

    # the picture tokenizer may be on another device than the language model
    device = model.model.vqmodel.quantize.embedding.weight.device
    batch_size = min(32, max(1, tokens_at_once // image_tokens.shape[1]))
    pictures = []
    for part in image_tokens.to(device).split(batch_size):
        pixels = model.decode_image_tokens(part).float()  # (n, H, W, 3) in [-1, 1]
        pixels = ((pixels + 1) / 2 * 255).clamp(0, 255).to(torch.uint8).cpu().numpy()
        pictures += [Image.fromarray(array) for array in pixels]
    return pictures


# ------------------------------------------------------------------------------------------------
# Guidance and chain length that suit a model


def default_sampling(model) -> dict:
    """Defaults of `cfg` and `max_chain`. Janus-Pro: those of the official inference code. The toy:
    no guidance, since its unconditional predictions are poor, and room for three objects."""
    if image_token_count(model) == JANUS_IMAGE_TOKENS:
        return {"cfg": 5.0, "max_chain": 600}
    return {"cfg": 1.0, "max_chain": 96}


def with_defaults(config, model):
    """A copy of `config` with defaults where `cfg` or `max_chain` is None; prints them."""
    from engine import run

    chosen = {}
    for name, value in default_sampling(model).items():
        if getattr(config, name) is None:
            chosen[name] = value
    if chosen:
        flags = " ".join(f"--{name} {value:g}" for name, value in chosen.items())
        run.say(f"{flags}: as suits this model")
    return replace(config, **chosen)


# ------------------------------------------------------------------------------------------------
# Draw prompts from the command line


@dataclass
class Config:
    prompt: str  # what to draw, or a text file (.txt) with one prompt per line
    model: str = "toy"  # `toy`, or a folder or hub id of a checkpoint
    n: int = 4  # pictures per prompt
    cfg: float | None = None  # guidance; default: 5 for Janus-Pro, 1 (none) for the toy
    temperature: float = 1.0  # 0 takes the most likely token every time
    seed: int = 0  # the same seed, prompts and n give the same pictures, whatever --batch_size is
    max_chain: int | None = None  # most chain tokens; default: 600 for Janus-Pro, 96 for the toy
    chain: str = ""  # a text file with a chain to draw, for instance one that you have edited
    judge: str = ""  # scores what was drawn: `toy`, folder or hub id of a VLM, or http://…/v1
    judge_model: str = ""  # its name on the server of http://…/v1; default: the only one there
    batch_size: int = 64  # pictures that are drawn at a time
    out: str = "out/draw"  # folder for pictures, plans, chains and a contact sheet


def main(argv: list[str] | None = None) -> None:
    from engine import run

    config = run.parse_args(Config, __doc__, argv)
    _, _, device = run.start_processes()
    run.check_ranges(
        config, at_least_one="n batch_size max_chain", not_negative="temperature seed cfg"
    )
    try:
        prompts = read_prompt_argument(config.prompt)
        chain = read_chain(config.chain) if config.chain else None
        draw_prompts(config, prompts, chain, device)
    except (OSError, ValueError) as problem:
        run.fail(str(problem))


def read_prompt_argument(prompt: str) -> list[str]:
    """The prompt itself, or the lines of a text file. Raises OSError or ValueError."""
    lines = [prompt]
    if prompt.endswith(".txt"):
        lines = Path(prompt).read_text(encoding="utf-8").splitlines()
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError("there is nothing to draw: the prompt is empty")
    return prompts


def read_chain(path: str) -> str:
    """A chain that a person wrote or edited. Raises OSError, or ValueError with all its faults."""
    from render_boxes import chain_problems

    text = Path(path).read_text(encoding="utf-8").strip()
    chain = text.removesuffix(SPECIAL_TOKENS["boi_token"])
    problems = chain_problems(chain)
    if problems:
        raise ValueError(f"{path}: {'; '.join(problems)}")
    return chain


def draw_prompts(config: Config, prompts: list[str], chain: str | None, device) -> None:
    """Draws `config.n` pictures per prompt and writes them to `config.out`. `chain`: draw this one,
    in all of them, instead of sampling chains."""
    from tqdm import tqdm

    import rewards

    judge = None
    if config.judge:
        judge_config = rewards.JudgeConfig(
            judge=config.judge, judge_model=config.judge_model, hps=""
        )
        judge, _ = rewards.load_judge(judge_config, device)
    model, tokenizer = load_policy(config.model, device)
    config = with_defaults(config, model)
    warn_of_unknown_words(model, prompts)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)

    prompts = [prompt for prompt in prompts for _ in range(config.n)]  # one per picture
    most_tokens = config.max_chain + 1 + image_token_count(model)
    parts = math.ceil(len(prompts) / config.batch_size)
    with tqdm(total=most_tokens * parts, desc="tokens, at most") as bar:
        sampled = rollout(
            model,
            tokenizer,
            prompts,
            cfg=config.cfg,
            temperature=config.temperature,
            seed=config.seed,
            max_chain=config.max_chain,
            chains=[chain] * len(prompts) if chain else None,
            at_once=config.batch_size,
            progress=bar.update,
        )
    forced = sampled.forced.float().mean().item()
    print(f"{forced:.0%} of the chains were cut at --max_chain {config.max_chain}")
    save_drawings(prompts, sampled, decode_images(model, sampled.image_tokens), judge, config)


def warn_of_unknown_words(model, prompts: list[str]) -> None:
    """Prints the words that the toy has not learned: of them it draws nonsense."""
    from toy.world import unknown_words

    if image_token_count(model) == JANUS_IMAGE_TOKENS:
        return
    for prompt in prompts:
        unknown = unknown_words(prompt)
        if unknown:
            print(f"the toy does not know {', '.join(unknown)} in {prompt!r}: see docs/toy.md")


def save_drawings(prompts: list[str], sampled: Rollout, pictures: list, judge, config) -> None:
    """Writes pictures, plans and chains, and a sheet of the first 24; scores them if there is a
    judge. Picture k is number k % config.n of prompt k // config.n."""
    from PIL import Image

    import rewards
    from evaluation.sheets import draw_sheet
    from render_boxes import draw_boxes, parse_chain

    scores = [{}] * len(pictures)
    if judge:
        scores = rewards.score(judge, None, prompts, sampled.chains, pictures)
    out = Path(config.out)
    sheet = []
    for k, chain in enumerate(sampled.chains):
        path = out / f"{k // config.n:03d}_{k % config.n}"
        boxes = parse_chain(chain)
        large = pictures[k].resize((448, 448), Image.Resampling.NEAREST)
        pictures[k].save(f"{path}.png")
        draw_boxes(boxes).save(f"{path}_plan.png")
        draw_boxes(boxes, image=large).save(f"{path}_boxes.png")
        Path(f"{path}.txt").write_text(chain, encoding="utf-8")
        parts = [part for part in scores[k] if not part.startswith("sem_")]  # more has no room
        note = "  ".join(f"{part} {scores[k][part]:.2f}" for part in parts) or path.name
        cell = {"prompt": prompts[k], "note": note, "chain": chain, "image": pictures[k]}
        sheet.append(cell)
    draw_sheet(sheet[:24], out / "sheet.png", columns=2)

    print(f"{prompts[0]}\n  {sampled.chains[0]}")
    if judge:
        means = []
        for part in scores[0]:
            mean = np.mean([row[part] for row in scores])
            means.append(f"{part} {mean:.3f}")
        print(f"mean of {len(pictures)}: " + "  ".join(means))
    print(f"wrote {len(pictures)} pictures with chains and plans, and {out / 'sheet.png'}")


if __name__ == "__main__":
    main()
