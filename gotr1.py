"""The policy: Janus-Pro as it is used by GoT-R1. One network writes a chain of objects and boxes,
then draws it token by token.

One sequence per sample, two heads, one cache:

    [bos] User: … {prompt}\n\nAssistant: | chain … <begin_of_image> | z_1 … z_I
    given                                | sampled by lm_head         | by generation_head

Letters, here and in every other file:
    B prompts, G samples per prompt, N = B*G samples (sample n belongs to prompt n // G), P prompt
    tokens, T text positions (chain and <begin_of_image>), I image tokens (576; toy 64), S = T + I,
    V text vocabulary, K image codes, D width of the language model.

Classifier-free guidance runs two rows per sample: the conditional half first, the unconditional
half second. The unconditional row keeps bos and <begin_of_image> and has the pad token everywhere
between, attended, chain included: the released checkpoints were trained that way. Guided logits are
u + cfg * (c - u).

    python gotr1.py "a red ball left of a blue cube" --n 4    # the toy model, in seconds

Read `plain_rollout` first: the recipe as it is, slowly. `rollout` samples the same tokens for many
prompts at once; what makes it fast stands in engine/decode.py.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from engine import decode

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
    from engine import checkpoints  # here: sampling and scoring can be lifted without it

    return checkpoints.load_policy(name_or_path, device, dtype)


def convert_deepseek(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """DeepSeek's names of tensors -> transformers' names: see
    engine.checkpoints.convert_deepseek."""
    from engine import checkpoints

    return checkpoints.convert_deepseek(state_dict)


# ------------------------------------------------------------------------------------------------
# The prompt


def special_ids(tokenizer) -> tuple[int, int, int]:
    """(bos, pad, begin_of_image) by name. `tokenizer.pad_token_id` is no help: some checkpoints set
    it to another token. Raises ValueError when one is missing."""
    names = [SPECIAL_TOKENS[key] for key in ("bos_token", "pad_token", "boi_token")]
    ids = [tokenizer.convert_tokens_to_ids(name) for name in names]
    missing = []
    for name, token_id in zip(names, ids, strict=True):
        if tokenizer.convert_ids_to_tokens(token_id or 0) != name:
            missing.append(name)
    if missing:
        raise ValueError(
            f"the tokenizer lacks {', '.join(missing)}: expected one of Janus-Pro or GoT-R1"
        )
    return tuple(ids)


def format_prompt(prompt: str) -> str:
    """The one user turn that the GoT-R1 checkpoints know (official infer.py); bos is added by
    `encode_prompt`."""
    return f"User: {INSTRUCTION}{prompt}\n\nAssistant:"


def encode_prompt(tokenizer, prompt: str) -> list[int]:
    """Token ids of the whole turn, bos exactly once."""
    bos, _, _ = special_ids(tokenizer)
    return [bos, *tokenizer.encode(format_prompt(prompt), add_special_tokens=False)]


def encode_chain(tokenizer, chain: str) -> list[int]:
    """Token ids of a chain and the <begin_of_image> that ends it; no bos (`tokenizer.encode` would
    put a second one here)."""
    _, _, boi = special_ids(tokenizer)
    text = chain.removesuffix(SPECIAL_TOKENS["boi_token"])
    return [*tokenizer.encode(text, add_special_tokens=False), boi]


def image_token_count(model) -> int:
    return model.config.vq_config.num_patches**2


def default_sampling(model) -> dict:
    """Guidance and most chain tokens that suit a model, for flags that were left out.

    Janus-Pro, which has 576 image tokens: those of the official inference code. The toy: no
    guidance, since its unconditional half is weak, and room for three objects."""
    if image_token_count(model) == 576:
        return {"cfg": 5.0, "max_chain": 600}
    return {"cfg": 1.0, "max_chain": 96}


def with_defaults(config, model):
    """A configuration whose `cfg` and `max_chain` are set where they were None; prints them."""
    chosen = {}
    for name, value in default_sampling(model).items():
        if getattr(config, name) is None:
            chosen[name] = value
    if chosen:
        flags = " ".join(f"--{name} {value:g}" for name, value in chosen.items())
        print(f"{flags}: as suits this model")
    return replace(config, **chosen)


def check_sampling(config) -> None:
    """Ends the program in one line when `cfg` or `max_chain` is given and out of range."""
    from engine import run

    if config.cfg is not None and not config.cfg >= 0:  # nan is not
        run.fail(f"--cfg is {config.cfg}: expected 0 or more")
    if config.max_chain is not None and config.max_chain < 1:
        run.fail(f"--max_chain is {config.max_chain}: expected 1 or more")


# ------------------------------------------------------------------------------------------------
# Samples


@dataclass
class Rollout:
    """N samples and what was recorded while they were drawn. Text is padded on the right to T, the
    longest chain."""

    chains: list[str]  # N texts, without the closing <begin_of_image>
    prompt_ids: list[list[int]]  # N, bos included
    chain_ids: torch.Tensor  # (N, T) int64, the closing <begin_of_image> included
    chain_lens: torch.Tensor  # (N,) int64
    image_tokens: torch.Tensor  # (N, I) int64
    mask: torch.Tensor  # (N, S) float32: 1 if sampled; 0 if given, forced or padding
    logp: torch.Tensor  # (N, S) float32: log-probability of each sampled token, see `logp_mode`
    entropy: torch.Tensor  # (N, S) float32: of the distribution it was sampled from, in nats
    forced: torch.Tensor  # (N,) bool: the chain hit the cap, its <begin_of_image> was not sampled
    pad_id: int
    cfg: float
    temperature: float
    logp_mode: str  # "cond" or "guided"

    @classmethod
    def from_data(
        cls, tokenizer, prompt_ids: list[list[int]], chain_ids: list[list[int]], image_tokens
    ) -> "Rollout":
        """Samples that were not drawn but given, for SFT: ids as `encode_prompt` and `encode_chain`
        make them, all of chain and image to be trained."""
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
            """A field that is text, (N, T), or text and image, (N, S); padding goes after the
            text."""
            values = []
            for part in parts:
                value = getattr(part, name)
                short = part.chain_ids.shape[1]
                text = F.pad(value[:, :short], (0, longest - short), value=text_fill)
                values.append(torch.cat([text, value[:, short:]], dim=1))
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

    def select(self, rows: list[int]) -> "Rollout":
        """The samples `rows`, as a Rollout of its own."""
        return replace(
            self,
            chains=[self.chains[row] for row in rows] if self.chains else [],
            prompt_ids=[self.prompt_ids[row] for row in rows],
            chain_ids=self.chain_ids[rows],
            chain_lens=self.chain_lens[rows],
            image_tokens=self.image_tokens[rows],
            mask=self.mask[rows],
            logp=self.logp[rows],
            entropy=self.entropy[rows],
            forced=self.forced[rows],
        )


def right_pad(rows: list[list[int]], pad: int, device) -> torch.Tensor:
    """R lists of ids -> (R, longest) int64."""
    width = max(map(len, rows))
    return torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=device)


# ------------------------------------------------------------------------------------------------
# Sampling one token


def uniforms(seed, indices: list[int], group: int, length: int) -> torch.Tensor:
    """(B*G, length) float32 in [0, 1): one number for each token that may be sampled, fixed by
    (seed, prompt index, sample).

    The samples of a prompt are therefore the same in any batch, on any number of ranks and after a
    resume. `seed` is an int or a tuple of ints, for instance (run, step)."""
    seed = seed if isinstance(seed, tuple) else (seed,)
    rows = []
    for index in indices:
        for sample in range(group):
            generator = np.random.default_rng([*seed, index, sample])
            rows.append(generator.random(length, np.float32))
    return torch.from_numpy(np.stack(rows))


def at_least_float32(values):
    """bfloat16 becomes float32, in which tokens are sampled and scored; float64 stays (tests use
    it)."""
    return values if values.dtype == torch.float64 else values.float()


def sample_token(logits, u, temperature: float):
    """Inverse-CDF sampling: logits (N, V), u (N,) -> token (N,), its logp (N,), entropy (N,), all
    at this temperature, in float32. Temperature 0 takes the most likely token and reports its
    log-probability at temperature 1."""
    logps = torch.log_softmax(at_least_float32(logits) / (temperature or 1.0), dim=-1)
    probs = logps.exp()
    if temperature == 0:
        token = logits.argmax(-1)
    else:
        cdf = probs.cumsum(-1)
        token = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True).squeeze(-1)
        last_possible = (cdf < cdf[:, -1:]).sum(-1)  # rounding must not step past it
        token = torch.minimum(token, last_possible)
    entropy = -(probs * logps.clamp(min=-1e4)).sum(-1)
    return token, logps.gather(-1, token[:, None]).squeeze(-1), entropy


def guide(logits, cfg: float):
    """(2N, K) logits, conditional half first -> (conditional, guided), both (N, K). With N rows (no
    guidance) they are the same."""
    if cfg == 1.0:
        return logits, logits
    cond, uncond = logits.chunk(2)
    return cond, uncond + cfg * (cond - uncond)


def gather_logps(logits, tokens, temperature: float = 1.0):
    """logits (..., V), tokens (...) -> log-probability of each token (...), float32. Temperature 0
    counts as 1."""
    logits = at_least_float32(logits) / (temperature or 1.0)
    return logits.gather(-1, tokens[..., None]).squeeze(-1) - logits.logsumexp(-1)


# ------------------------------------------------------------------------------------------------
# The rollout, plainly


def unconditional_ids(length: int, bos: int, pad: int, boi: int) -> list[int]:
    """What stands in place of prompt and chain, `length` tokens, when guidance asks for no
    condition."""
    return [bos] + [pad] * (length - 2) + [boi]


@torch.no_grad()
def plain_rollout(model, tokenizer, prompt: str, cfg: float, u, max_chain: int) -> dict:
    """Read this first. The official recipe written plainly, at temperature 1, and slow: N chains
    one after the other on a growing cache; then the whole prefix again, for all chains and their
    unconditional rows together, and from there the image.

    u (N, I + max_chain), as `uniforms` makes it: the image's random numbers, then the chain's.
    Returns `chain_ids` (N, T), for which all chains must be equally long (N = 1 always is), and
    `image_tokens` (N, I): the same tokens as those of `rollout`."""
    lm = model.model.language_model
    embed = model.get_input_embeddings()
    images = image_token_count(model)
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
            token, _, _ = sample_token(logits, numbers[None, images + len(chain)], temperature=1.0)
            chain.append(token.item())
            new_ids = chain[-1:]
        chains.append(chain if boi in chain else [*chain, boi])

    # Guidance: a second row per sample, as long as the first
    rows = [prompt_ids + chain for chain in chains]
    if cfg != 1.0:
        rows += [unconditional_ids(len(row), bos, pad, boi) for row in rows]

    # Image: the same code for both rows of a sample
    cache = DynamicCache(config=lm.config)
    embeds = embed(torch.tensor(rows, device=u.device))
    codes = []
    for i in range(images):
        out = lm(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
        logits = at_least_float32(model.model.generation_head(out.last_hidden_state[:, -1]))
        _, guided = guide(logits, cfg)
        code, _, _ = sample_token(guided, u[:, i], temperature=1.0)
        codes.append(code)
        both = code.repeat(len(rows) // len(u))
        embeds = model.prepare_embeddings_for_image_generation(both[:, None])
    return {"chain_ids": torch.tensor(chains), "image_tokens": torch.stack(codes, dim=1).cpu()}


# ------------------------------------------------------------------------------------------------
# The rollout, for many prompts at once


@dataclass(frozen=True)
class Sampling:
    """What the steps below read: the same for a whole rollout."""

    cfg: float
    temperature: float
    logp_mode: str
    pad: int
    boi: int


def text_step(model, s: decode.Decoder, width: int) -> None:
    """One chain token for each sample. A finished row waits: it is fed pads that it never sees, and
    keeps its last hidden state. A chain that has not ended at the cap is ended for it, and that
    token is not trained."""
    how = s.settings
    hidden = s.hidden[: s.samples]  # text has no unconditional rows
    token, logp, entropy = sample_token(model.lm_head(hidden), s.text.number(), how.temperature)
    at_cap = s.text.place == s.cap  # (1,)
    token = token.masked_fill(at_cap, how.boi).masked_fill(s.done, how.pad)
    s.text.record(token=token, logp=logp, entropy=entropy, sampled=~(s.done | at_cap))
    s.forced |= at_cap & ~s.done

    embeds = model.get_input_embeddings()(token)
    new = s.feed(model, embeds, shown=~s.done, width=width)
    hidden.copy_(torch.where(s.done[:, None], hidden, new))
    s.done |= token == how.boi


def draw_code(model, s: decode.Decoder):
    """One image token for each sample (N,), under guidance, from the hidden states of the last
    ones."""
    how = s.settings
    logits = at_least_float32(model.model.generation_head(s.hidden))
    cond, guided = guide(logits, how.cfg)
    code, logp, entropy = sample_token(guided, s.image.number(), how.temperature)
    if how.logp_mode == "cond" and how.cfg != 1.0:
        logp = gather_logps(cond, code, how.temperature)
    s.image.record(token=code, logp=logp, entropy=entropy, sampled=torch.ones_like(s.done))
    return code


def image_step(model, s: decode.Decoder, width: int) -> None:
    """One image token for each sample, and with guidance the same one for its unconditional row."""
    code = draw_code(model, s)
    both = code.repeat(len(s.hidden) // s.samples)
    embeds = model.prepare_embeddings_for_image_generation(both[:, None])[:, 0]
    shown = torch.ones_like(both, dtype=torch.bool)
    s.hidden.copy_(s.feed(model, embeds, shown, width))


def check_room(model, given: list[list[int]], chain: int) -> int:
    """Most tokens of a sequence: the longest of `given`, `chain` sampled ones, the image. Raises
    ValueError when the model's context is smaller."""
    longest = max(map(len, given)) + chain + image_token_count(model)
    limit = model.config.text_config.max_position_embeddings
    if longest > limit:
        raise ValueError(
            f"prompt, chain and image can take {longest} tokens but this model holds {limit}: "
            f"shorten the prompt or lower max_chain ({max(0, chain - 1)})"
        )
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

    temperature: 0 is greedy.
    seed, indices: fix the random numbers, see `uniforms`; `indices` are B ints, by default 0..B-1.
    max_chain: a chain ends with the first <begin_of_image>; after so many tokens it is forced.
    chains: B texts that are drawn as they are, instead of sampling any.
    logp_mode: which distribution of an image token is recorded: "cond", the conditional one, or
        "guided", the one it was sampled from.
    draw: False stops after the chains; I is then 0.
    progress: called as progress(1) after each token, at most `max_chain` + 1 + I times.

    Raises ValueError when the sequence would not fit the model's context."""
    images = image_token_count(model)
    bos, pad, boi = special_ids(tokenizer)
    prompt_ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    prefixes = prompt_ids
    most_text_steps = max_chain + 1  # the last one only ends chains that are at the cap
    if chains is not None:
        given = [encode_chain(tokenizer, chain) for chain in chains]
        prefixes = [ids + chain for ids, chain in zip(prompt_ids, given, strict=True)]
        max_chain = 0
        most_text_steps = 0
    columns = check_room(model, prefixes, most_text_steps)

    # 1) Buffers, and the random numbers: the image's first, then the chain's
    n = len(prompts) * group
    s = decode.decoder_for(
        model,
        samples=n,
        rows=n if cfg == 1.0 else 2 * n,
        columns=columns,
        images=images,
        settings=Sampling(cfg, temperature, logp_mode, pad, boi),
    )
    device = s.hidden.device
    numbers = uniforms(seed, indices or range(len(prompts)), group, images + max_chain)
    s.image.u[:] = numbers[:, :images]
    s.text.u[:, :max_chain] = numbers[:, images:]
    s.cap.fill_(max_chain)

    # 2) Prompts, and given chains: once per prompt, then copied to its G samples
    prompt_width = max(map(len, prefixes))
    s.rewind(prompt_width)
    s.load(0, torch.arange(n, device=device) // group, *decode.prefill(model, prefixes, pad))

    # 3) Chains: all rows in step, until the last one has ended
    for t in range(most_text_steps):
        # the question makes a GPU wait for the answer, so it is asked seldom
        if t % s.patience == 0 and bool(s.done.all()):
            break
        s.step(text_step, model)
        if progress:
            progress(1)

    if chains is None:
        chain_lens = s.text.sampled.sum(-1) + s.forced
        chain_ids = s.text.token[:, : int(chain_lens.max())].clone()
        # columns that were filled after the last chain had ended are used again
        s.rewind(prompt_width + chain_ids.shape[1])
    else:
        chain_lens = torch.tensor([len(ids) for ids in given], device=device)
        chain_lens = chain_lens.repeat_interleave(group)
        chain_ids = right_pad(given, pad, device).repeat_interleave(group, 0)

    # 4) Unconditional rows, each as long as its sample; equal lengths are computed once
    if cfg != 1.0 and draw:
        lengths, which = s.position[:n].unique(return_inverse=True)
        rows = [unconditional_ids(length, bos, pad, boi) for length in lengths.tolist()]
        s.load(n, which, *decode.prefill(model, rows, pad))

    # 5) Image: the last token is sampled but no longer fed
    drawn = images if draw else 0
    for i in range(drawn):
        if i < images - 1:
            s.step(image_step, model)
        else:
            draw_code(model, s)
        if progress:
            progress(1)

    # 6) What was recorded, copied: the next rollout writes to the same buffers
    def recorded(name: str):
        """(N, S), text first."""
        text = getattr(s.text, name)[:, : chain_ids.shape[1]]
        image = getattr(s.image, name)[:, :drawn]
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
        image_tokens=s.image.token[:, :drawn].clone(),
        mask=mask,
        logp=recorded("logp") * mask,
        entropy=recorded("entropy") * mask,
        forced=s.forced.clone(),
        pad_id=pad,
        cfg=cfg,
        temperature=temperature,
        logp_mode=logp_mode,
    )


# ------------------------------------------------------------------------------------------------
# Scoring: the log-probability of what was sampled, in one pass with gradients


def hidden_states(model, batch: Rollout, blank: torch.Tensor | None = None):
    """One causal pass over whole sequences -> the hidden states that predict the text (N, T, D) and
    the image (N, I, D).

    A row is laid out without gaps, [prompt | chain | image | padding], so positions are the plain
    ones and no mask is needed. Rows where `blank` (N,) bool is set are unconditional: pads between
    bos and <begin_of_image>."""
    device = batch.image_tokens.device
    images = batch.image_tokens.shape[1]

    # Ids of prompt and chain, then room for the image; its last token predicts nothing: no room
    texts = []
    chains = zip(batch.chain_ids.tolist(), batch.chain_lens.tolist(), strict=True)
    for prompt_ids, (chain_ids, length) in zip(batch.prompt_ids, chains, strict=True):
        texts.append(prompt_ids + chain_ids[:length])
    text = F.pad(right_pad(texts, batch.pad_id, device), (0, images - 1), value=batch.pad_id)
    prompt_lens = torch.tensor([len(ids) for ids in batch.prompt_ids], device=device)[:, None]
    text_lens = prompt_lens + batch.chain_lens[:, None]  # (N, 1)
    column = torch.arange(text.shape[1], device=device)  # (W,)
    if blank is not None:
        kept = ~blank[:, None] | (column == 0) | (column == text_lens - 1)
        text = text.where(kept, batch.pad_id)

    # Embeddings: of the image where text has ended, of the text before
    place = (column - text_lens)[..., None]  # (N, W, 1): which image token stands in a column
    picture = model.prepare_embeddings_for_image_generation(batch.image_tokens)  # (N, I, D)
    picture = picture.gather(1, place.clamp(0, images - 1).expand(-1, -1, picture.shape[-1]))
    embeds = torch.where(place >= 0, picture, model.get_input_embeddings()(text))
    out = model.model.language_model(inputs_embeds=embeds, use_cache=False)
    hidden = out.last_hidden_state  # (N, W, D)

    def states_before(first, count: int):
        """(N, count, D): a token is predicted one column before its own; `first` (N, 1) are
        columns."""
        columns = first - 1 + torch.arange(count, device=device)
        columns = columns.clamp(max=hidden.shape[1] - 1)
        return hidden.gather(1, columns[..., None].expand(-1, -1, hidden.shape[-1]))

    text_hidden = states_before(prompt_lens, batch.chain_ids.shape[1])
    image_hidden = states_before(text_lens, images)
    return text_hidden, image_hidden


def chunked_logps(head, tokens, temperature: float, chunk: int = 1024):
    """Log-probabilities (M,) of `tokens` (M,) under `head(rows)`, a function from a slice of the M
    rows to logits (m, V).

    The logits of a chunk are recomputed in the backward pass, so that no (N, S, V) tensor ever
    exists."""

    def score(rows: slice):
        return gather_logps(head(rows), tokens[rows], temperature)

    pieces = []
    for start in range(0, len(tokens), chunk):
        rows = slice(start, start + chunk)
        if torch.is_grad_enabled():
            pieces.append(checkpoint(score, rows, use_reentrant=False))
        else:
            pieces.append(score(rows))
    return torch.cat(pieces) if pieces else torch.zeros(0, device=tokens.device)


def with_one_row(trained):
    """`trained` (N, T) bool, with its first place set if none is. In shards (FSDP) the head has to
    take part in each pass of each process, also in one without a token to train, or the others wait
    forever."""
    rows = trained.clone()
    rows[0, 0] |= ~trained.any()
    return rows


def text_logps(model, batch: Rollout, hidden, trained, chunk: int):
    """(N, T): log-probabilities of the chain's tokens where `trained` (N, T) bool is set, else
    0."""
    scored = with_one_row(trained)
    rows = hidden[scored]  # (M, D)
    tokens = batch.chain_ids[scored]
    logp = chunked_logps(lambda part: model.lm_head(rows[part]), tokens, batch.temperature, chunk)
    padded = logp.new_zeros(scored.shape).masked_scatter(scored, logp)
    return padded.where(trained, 0.0)


def image_logps(model, batch: Rollout, hidden, guided: bool, chunk: int):
    """(N, I): log-probabilities of the image tokens; `guided`: under the distribution with
    guidance, its unconditional half without gradient (one more forward pass)."""
    head = model.model.generation_head
    cond = hidden.flatten(0, 1)  # (N * I, D)

    def conditional_logits(rows: slice):
        return head(cond[rows])

    logits = conditional_logits
    if guided:
        with torch.no_grad():
            everywhere = torch.ones(len(batch), dtype=torch.bool, device=cond.device)
            _, uncond = hidden_states(model, batch, blank=everywhere)
            uncond = uncond.flatten(0, 1)

        def guided_logits(rows: slice):
            with torch.no_grad():
                second_half = at_least_float32(head(uncond[rows]))
            first_half = at_least_float32(head(cond[rows]))
            return guide(torch.cat([first_half, second_half]), batch.cfg)[1]

        logits = guided_logits
    tokens = batch.image_tokens.flatten()
    return chunked_logps(logits, tokens, batch.temperature, chunk).view_as(batch.image_tokens)


def token_logps(model, batch: Rollout, logp_mode: str | None = None, blank=None, chunk: int = 1024):
    """(logp, mask), both (N, S) float32, the image's I last: the log-probabilities of a rollout's
    tokens under `model`, with gradient. Where the mask is 0 (given, forced, padding) logp is 0.

    logp_mode: "cond" or "guided", see `rollout`; by default as the rollout was recorded.
    blank: (N,) bool, rows that are scored as unconditional ones, their text masked: condition
        dropout in SFT.
    chunk: rows of logits that exist at a time.

    The temperature is the rollout's."""
    images = batch.image_tokens.shape[1]
    mask = batch.mask.clone()
    if blank is not None:
        mask[blank, :-images] = 0
    mode = logp_mode or batch.logp_mode
    text_hidden, image_hidden = hidden_states(model, batch, blank)
    text = text_logps(model, batch, text_hidden, mask[:, :-images].bool(), chunk)
    guided = mode == "guided" and batch.cfg != 1.0
    image = image_logps(model, batch, image_hidden, guided, chunk)
    return torch.cat([text, image], dim=1), mask


# ------------------------------------------------------------------------------------------------
# Pictures to tokens and back


@torch.no_grad()
def encode_images(model, images) -> torch.Tensor:
    """PIL images, or (N, 3, H, W) in [-1, 1] -> image tokens (N, I), row by row. PIL images are
    resized to the model's size.

    The nearest code on the unit sphere, as DeepSeek's own encoder; transformers' quantizer compares
    lengths as well."""
    vq = model.model.vqmodel
    config = model.config.vq_config
    if not torch.is_tensor(images):
        from PIL import Image  # here: sampling and scoring do without it

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
    """Image tokens (N, I) -> N PIL images. Pixels are cut off to whole numbers, not rounded, as in
    the official code. Few at a time, at most 32: one of 576 tokens, 384 x 384, takes a quarter of a
    gigabyte."""
    from PIL import Image

    # the picture tokenizer is not always where the language model is
    device = model.model.vqmodel.quantize.embedding.weight.device
    batch_size = min(32, max(1, tokens_at_once // image_tokens.shape[1]))
    pictures = []
    for part in image_tokens.to(device).split(batch_size):
        pixels = model.decode_image_tokens(part).float()  # (n, H, W, 3) in [-1, 1]
        pixels = ((pixels + 1) / 2 * 255).clamp(0, 255).to(torch.uint8).cpu().numpy()
        pictures += [Image.fromarray(array) for array in pixels]
    return pictures


# ------------------------------------------------------------------------------------------------
# Draw prompts from the command line


def best_plans(model, tokenizer, judge, prompts: list[str], plans: int, **sampling) -> list[str]:
    """Plan first, check, draw later: samples `plans` chains per prompt, without drawing, and
    returns for each prompt the one to which the judge (see rewards.py) gives the highest R_sem +
    R_spa; the first of equals. `sampling`: settings of `rollout`."""
    import rewards

    chains = rollout(model, tokenizer, prompts, plans, draw=False, **sampling).chains
    asked = [prompt for prompt in prompts for _ in range(plans)]
    scores = rewards.score(judge, None, asked, chains, [], parts=("sem", "spa"))
    best = []
    for first in range(0, len(chains), plans):
        group = range(first, first + plans)
        best.append(chains[max(group, key=lambda row: scores[row]["total"])])
    return best


@dataclass
class Config:
    prompt: str  # what to draw, or a text file (.txt) with one prompt per line
    model: str = "toy"  # `toy`, or a folder or hub id of a checkpoint
    n: int = 4  # pictures per prompt
    cfg: float = 1.0  # guidance: 5 for the released checkpoints, 1 (none) for the toy
    temperature: float = 1.0  # 0 takes the most likely token every time
    seed: int = 0  # the same seed, prompt and place give the same picture in any batch
    max_chain: int = 96  # most chain tokens (Janus-Pro: 600)
    chain: str = ""  # a text file with a chain that is drawn: edit a plan, then draw it
    plans: int = 1  # write so many plans per picture and draw the one that the judge likes best
    judge: str = ""  # scores plans and pictures: `toy`, folder or hub id of a VLM, or http://…/v1
    judge_model: str = ""  # its name on the server of http://…/v1; default: the only one there
    batch_size: int = 64  # sequences at a time
    out: str = "out/draw"  # folder for pictures, plans, chains and a contact sheet


def main(argv: list[str] | None = None) -> None:
    from engine import run

    config = run.parse_args(Config, __doc__, argv)
    _, _, device = run.start_processes()
    run.check_ranges(
        config, at_least_one="n max_chain plans batch_size", not_negative="cfg temperature seed"
    )
    if config.plans > 1 and (config.chain or not config.judge):
        run.fail("--plans needs a --judge that chooses among them, and no --chain")
    try:
        prompts = read_prompts(config.prompt)
        chain = read_chain(config.chain) if config.chain else None
        draw_prompts(config, prompts, chain, device)
    except (OSError, ValueError) as problem:
        run.fail(str(problem))


def read_prompts(prompt: str) -> list[str]:
    """The prompt itself, or the lines of a text file. Raises OSError or ValueError."""
    lines = [prompt]
    if prompt.endswith(".txt"):
        lines = Path(prompt).read_text(encoding="utf-8").splitlines()
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError("there is nothing to draw: the prompt is empty")
    return prompts


def read_chain(path: str) -> str:
    """A chain that a person wrote or edited. Raises OSError, or ValueError with all that is
    wrong."""
    from render_boxes import chain_problems

    text = Path(path).read_text(encoding="utf-8").strip()
    chain = text.removesuffix(SPECIAL_TOKENS["boi_token"])
    problems = chain_problems(chain)
    if problems:
        raise ValueError(f"{path}: {'; '.join(problems)}")
    return chain


def draw_prompts(config: Config, prompts: list[str], chain: str | None, device) -> None:
    """Draws `config.n` pictures of each prompt and writes them to `config.out`.

    `chain`: the plan of all."""
    from tqdm import tqdm

    import rewards

    judge = None
    if config.judge:
        flags = rewards.JudgeConfig(judge=config.judge, judge_model=config.judge_model, hps="")
        judge, _ = rewards.load_judge(flags, device)
    model, tokenizer = load_policy(config.model, device)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)

    asked = [prompt for prompt in prompts for _ in range(config.n)]
    batch_size = max(1, config.batch_size // config.plans)
    starts = range(0, len(asked), batch_size)
    most_tokens = config.max_chain + 1 + image_token_count(model)  # per batch
    drawings = []
    with tqdm(total=most_tokens * len(starts), desc="tokens") as bar:
        for done, start in enumerate(starts, start=1):
            batch = asked[start : start + batch_size]
            sampling = {
                "temperature": config.temperature,
                "seed": config.seed,
                "max_chain": config.max_chain,
                "indices": list(range(start, start + len(batch))),
            }
            chains = [chain] * len(batch) if chain else None
            if config.plans > 1:
                chains = best_plans(model, tokenizer, judge, batch, config.plans, **sampling)
            sampled = rollout(
                model,
                tokenizer,
                batch,
                cfg=config.cfg,
                chains=chains,
                progress=bar.update,
                **sampling,
            )
            pictures = decode_images(model, sampled.image_tokens)
            drawings += zip(batch, sampled.chains, pictures, strict=True)
            bar.update(done * most_tokens - bar.n)  # chains end before their cap
    save_drawings(drawings, judge, out, config.n)


def save_drawings(drawings: list[tuple], judge, out: Path, n: int) -> None:
    """Writes what was drawn, (prompt, chain, picture) each, `n` per prompt; scores it if there is a
    judge."""
    from PIL import Image

    import rewards
    from evaluation.stats import draw_plans
    from render_boxes import draw_boxes, parse_chain

    prompts, chains, pictures = map(list, zip(*drawings, strict=True))
    scores = [{}] * len(drawings)
    if judge:
        scores = rewards.score(judge, None, prompts, chains, pictures)
    sheet = []
    for k, (prompt, chain, picture) in enumerate(drawings):
        path = out / f"{k // n:03d}_{k % n}"
        boxes = parse_chain(chain)
        large = picture.resize((448, 448), Image.Resampling.NEAREST)
        picture.save(f"{path}.png")
        draw_boxes(boxes).save(f"{path}_plan.png")
        draw_boxes(boxes, image=large).save(f"{path}_boxes.png")
        Path(f"{path}.txt").write_text(chain, encoding="utf-8")
        shown = [part for part in scores[k] if not part.startswith("sem_")]  # short enough for it
        note = "  ".join(f"{part} {scores[k][part]:.2f}" for part in shown) or path.name
        sheet.append({"prompt": prompt, "note": note, "chain": chain, "image": picture})
    draw_plans(sheet[:24], out / "sheet.png", columns=2)

    print(f"{prompts[0]}\n  {chains[0]}")
    if judge:
        means = []
        for part in scores[0]:
            mean = np.mean([row[part] for row in scores])
            means.append(f"{part} {mean:.3f}")
        print(f"mean of {len(drawings)}: " + "  ".join(means))
    print(f"wrote {len(drawings)} pictures with chains and plans, and {out / 'sheet.png'}")


if __name__ == "__main__":
    main()
