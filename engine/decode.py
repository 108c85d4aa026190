"""One decode step, as fast as the machine allows: sampling, the next embedding, the layers; nothing asks the host.

A token needs all weights once, so a step's floor is (bytes of weights + bytes of the cache read) / memory bandwidth:
about 1.5 ms for 32 rows of Janus-Pro-1B on an H200. Ordinary PyTorch takes 15 to 30 ms, since a step is a thousand tiny
kernels that Python starts one by one. What is done about it:

1. Static buffers: keys, values, positions, masks, random numbers and results stay in place for the whole rollout.
2. No host value that changes: also the column to write is a tensor on the device. All that Python knows is the bucket,
   how many columns of the cache are read, rounded up.
3. On GPUs a step is recorded as a CUDA graph, once a bucket, and replayed, one launch a token. Elsewhere the same
   functions run as they are.
4. Fewer kernels: a fused RMSNorm, and rotary embedding on queries and keys together: about 23 a layer instead of 41.

Letters as in gotr1.py. R rows are the N samples, or 2N with guidance; W is the bucket; C the columns of the cache:

    columns 0..C   | right-aligned prompt | chain, all rows in step | image |      a row sees only its own tokens
    places  0..C   | image | chain |        where a token's random number is, and where what was sampled is recorded
"""

import weakref

import numpy as np
import torch
import torch.nn.functional as F

KEPT = weakref.WeakKeyDictionary()  # model -> its Decoder, for the next rollout of the same shape

# ---------------------------------------------------------------------------------------------------------------------
# Sampling


def uniforms(seed, indices: list[int], group: int, length: int) -> torch.Tensor:
    """(B*G, length) float32 in [0, 1): one number for every token that may be sampled, fixed by (seed, prompt index,
    sample).

    The samples of a prompt are therefore the same in any batch, on any number of ranks and after a resume. `seed` is an
    int or a tuple of ints, for instance (run, step)."""
    seed = seed if isinstance(seed, tuple) else (seed,)
    keys = [[*seed, index, g] for index in indices for g in range(group)]
    return torch.from_numpy(
        np.stack([np.random.default_rng(key).random(length, np.float32) for key in keys])
    )


def sample_token(logits, u, temperature: float):
    """Inverse-CDF sampling: logits (N, V), u (N,) -> token (N,), its logp (N,), entropy (N,), all at this temperature,
    in float32. Temperature 0 takes the most likely token and reports its log-probability at temperature 1."""
    logps = torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)
    probs = logps.exp()
    if temperature == 0:
        token = logits.argmax(-1)
    else:
        cdf = probs.cumsum(-1)
        token = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True).squeeze(-1)
        token = torch.minimum(
            token, (cdf < cdf[:, -1:]).sum(-1)
        )  # rounding must not step past the last possible token
    entropy = -(probs * logps.clamp(min=-1e4)).sum(-1)
    return token, logps.gather(-1, token[:, None]).squeeze(-1), entropy


def guide(hidden_logits, cfg: float):
    """(2N, K) logits, conditional half first -> (conditional, guided), both (N, K). With N rows (no guidance) they are
    the same."""
    if cfg == 1.0:
        return hidden_logits, hidden_logits
    cond, uncond = hidden_logits.chunk(2)
    return cond, uncond + cfg * (cond - uncond)


def gather_logps(logits, tokens, temperature: float = 1.0):
    """logits (..., V), tokens (...) -> log-probability of each token (...), float32. Temperature 0 counts as 1."""
    logits = logits.float() / (temperature or 1.0)
    return logits.gather(-1, tokens[..., None]).squeeze(-1) - logits.logsumexp(-1)


# ---------------------------------------------------------------------------------------------------------------------
# The layers


def rms_norm(norm, x):
    """transformers' LlamaRMSNorm, which rounds before it multiplies by the weight, in 2 kernels instead of 8."""
    return norm.weight * F.rms_norm(x, x.shape[-1:], eps=norm.variance_epsilon)


def run_layers(model, embeds, positions, mask, cache, columns, width: int):
    """The language model on n new tokens a row: embeds (R, n, D), positions (R, n) -> hidden (R, n, D).

    Keys and values go to `columns` (n,) of `cache` (2, layers, R, heads, C, head_dim), in place; the first `width`
    columns are read, `mask` (R, 1, n, width) is added to the attention scores.

    This is transformers' LlamaDecoderLayer, rounding included, but not called as a module: hooks (FSDP's, gradient
    checkpointing's) stay out. Linear layers are called, so adapters on them (LoRA) take part."""
    lm, (rows, n, _) = model.model.language_model, embeds.shape
    cos, sin = (
        part[:, :, None] for part in lm.rotary_emb(embeds, position_ids=positions)
    )  # (R, n, 1, head_dim)
    half = cos.shape[-1] // 2
    sin = torch.cat(
        [-sin[..., :half], sin[..., half:]], dim=-1
    )  # rotate_half(x) * sin is roll(x) * this
    for layer, (keys, values) in zip(lm.layers, cache.unbind(1), strict=True):
        attention = layer.self_attn
        x = rms_norm(layer.input_layernorm, embeds)
        q, k, v = attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
        qk = torch.cat([q, k], dim=-1).view(rows, n, -1, 2 * half)
        qk = (qk * cos + qk.roll(half, dims=-1) * sin).transpose(
            1, 2
        )  # (R, heads of both, n, head_dim)
        q, k = qk.split([qk.shape[1] - keys.shape[1], keys.shape[1]], dim=1)
        keys.index_copy_(2, columns, k)
        values.index_copy_(2, columns, v.view(rows, n, -1, 2 * half).transpose(1, 2))
        gqa = q.shape[1] != keys.shape[1]  # fewer heads of keys and values than of queries
        k, v = keys[:, :, :width], values[:, :, :width]
        x = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=attention.scaling, enable_gqa=gqa
        )
        embeds = embeds + attention.o_proj(x.transpose(1, 2).reshape(rows, n, -1))
        embeds = embeds + layer.mlp(rms_norm(layer.post_attention_layernorm, embeds))
    return rms_norm(lm.norm, embeds)


def added_mask(visible, dtype):
    """bool -> 0 where visible, -inf elsewhere, made once a step: attention would convert a bool mask in every layer.
    Not by `torch.where` with two numbers, which copies them from the host and so cannot be captured."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(
        ~visible, -torch.inf
    )


def new_cache(model, rows: int, columns: int):
    """Keys and values, (2, layers, rows, heads, columns, head_dim). Zeros: masked columns must not hold NaN."""
    config, weight = model.config.text_config, model.get_input_embeddings().weight
    shape = (
        2,
        config.num_hidden_layers,
        rows,
        config.num_key_value_heads,
        columns,
        config.head_dim,
    )
    return torch.zeros(shape, dtype=weight.dtype, device=weight.device)


def prefill(model, rows: list[list[int]], pad: int):
    """R lists of ids, aligned on the right -> hidden state of the last token (R, D), keys and values (as in
    `new_cache`), which columns hold a token (R, P) bool."""
    embed, width = model.get_input_embeddings(), max(map(len, rows))
    device = embed.weight.device
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
    columns = torch.arange(width, device=device)
    seen = columns >= width - torch.tensor([[len(row)] for row in rows], device=device)
    # a token sees what stands left of it, and itself: also when it is padding, or its row would be all -inf
    visible = (seen[:, None] & (columns <= columns[:, None])) | torch.eye(
        width, dtype=torch.bool, device=device
    )
    cache, embeds = new_cache(model, len(rows), width), embed(ids)
    positions = (seen.cumsum(-1) - 1).clamp(min=0)
    mask = added_mask(visible[:, None], embeds.dtype)
    return run_layers(model, embeds, positions, mask, cache, columns, width)[:, -1], cache, seen


# ---------------------------------------------------------------------------------------------------------------------
# The step


class Decoder:
    """The buffers of a rollout of N samples, and the graphs recorded on them. It keeps no reference to the model."""

    def __init__(
        self,
        model,
        samples: int,
        columns: int,
        cfg: float,
        temperature: float,
        logp_mode: str,
        ids: tuple,
    ):
        weight = model.get_input_embeddings().weight
        device, rows = weight.device, samples if cfg == 1.0 else 2 * samples
        self.cfg, self.temperature, self.logp_mode, (self.pad, self.boi) = (
            cfg,
            temperature,
            logp_mode,
            ids,
        )
        self.capture = CAPTURE.get(
            device.type
        )  # records a step; None: steps run as they are, and any width is free
        self.bucket, self.patience = (
            (128, 16) if self.capture else (1, 1)
        )  # patience: steps between looks at `done`
        self.capacity = (
            -(-columns // self.bucket) * self.bucket
        )  # so that prompts of other lengths often fit as well
        self.graphs, self.pool, self.used = (
            {},
            None,
            0,
        )  # used: columns written so far; the host's copy of `column`
        places = (samples, self.capacity)

        def buffer(*shape, dtype=torch.int64):
            return torch.zeros(shape, dtype=dtype, device=device)

        self.cache = new_cache(model, rows, self.capacity)
        self.hidden = buffer(rows, weight.shape[1], dtype=weight.dtype)  # of each row's last token
        self.visible = buffer(
            rows, self.capacity, dtype=torch.bool
        )  # columns that hold a token of this row
        self.position = buffer(rows)  # of the next token in its own sequence
        self.column, self.place, self.last = (
            buffer(1),
            buffer(1),
            buffer(1),
        )  # last: the place where chains must end
        self.done, self.forced = (
            buffer(samples, dtype=torch.bool),
            buffer(samples, dtype=torch.bool),
        )
        self.token, self.sampled = (
            buffer(*places),
            buffer(*places, dtype=torch.bool),
        )  # sampled: not padding or forced
        self.u, self.logp, self.entropy = (buffer(*places, dtype=torch.float32) for _ in range(3))
        self.buffers = [value for value in vars(self).values() if torch.is_tensor(value)]

    def start(self, u, images: int, columns: int) -> None:
        """A new rollout: its random numbers (N, I + longest chain), and how many columns its prompts take."""
        self.u[:, : u.shape[1]] = u
        self.place.fill_(images)
        self.last.fill_(u.shape[1])
        self.rewind(columns)

    def rewind(self, columns: int) -> None:
        self.column.fill_(columns)
        self.used = columns

    def load(self, first: int, which, hidden, cache, seen) -> None:
        """Rows `first`, `first` + 1, ... become copies of rows `which` (a tensor) of a `prefill`, right-aligned."""
        rows, columns = (
            slice(first, first + len(which)),
            slice(self.used - seen.shape[1], self.used),
        )
        for layer in range(cache.shape[1]):  # one at a time: the copies of all together may not fit
            self.cache[:, layer, rows, :, columns] = cache[:, layer, which]
        self.visible[rows, columns] = seen[which]
        self.hidden[rows], self.position[rows] = hidden[which], seen.sum(-1)[which]

    def step(self, function, model) -> None:
        """One token for all rows: `text_step` or `image_step`, from its graph once there is one."""
        width = -(-(self.used + 1) // self.bucket) * self.bucket
        graph = self.graphs.get((function, width))
        if graph:
            graph()
        elif self.capture:
            self.graphs[function, width] = self.capture(lambda: function(model, self, width), self)
        else:
            function(model, self, width)
        self.used += 1


def record(s: Decoder, **values) -> None:
    """What was sampled, (N,) each, goes to the current place; the place moves on."""
    for name, value in values.items():
        getattr(s, name).index_copy_(1, s.place, value[:, None])
    s.place += 1


def feed(model, s: Decoder, embeds, shown, width: int):
    """The sampled tokens' embeddings (R, D) go through the layers -> hidden (R, D); `shown` (R,): may be seen later.
    R is N for text, although the buffers may have 2N rows."""
    n = len(embeds)
    s.visible[:n].index_copy_(1, s.column, shown[:, None])
    mask = added_mask(s.visible[:n, None, None, :width], s.hidden.dtype)
    hidden = run_layers(
        model, embeds[:, None], s.position[:n, None], mask, s.cache[:, :, :n], s.column, width
    )[:, -1]
    s.position[:n] += shown
    s.column += 1
    return hidden


def text_step(model, s: Decoder, width: int) -> None:
    """One chain token for each sample. A finished row waits: it is fed pads that it never sees, and keeps its last
    hidden state. A chain that has not ended at the cap is ended for it, and not trained on that token."""
    hidden = s.hidden[: len(s.done)]
    token, logp, entropy = sample_token(
        model.lm_head(hidden), s.u.index_select(1, s.place).squeeze(1), s.temperature
    )
    capped = s.place == s.last  # (1,)
    token = token.masked_fill(capped, s.boi).masked_fill(s.done, s.pad)
    record(s, token=token, logp=logp, entropy=entropy, sampled=~(s.done | capped))
    s.forced |= capped & ~s.done
    new = feed(model, s, model.get_input_embeddings()(token), ~s.done, width)
    hidden.copy_(torch.where(s.done[:, None], hidden, new))
    s.done |= token == s.boi


def draw_code(model, s: Decoder):
    """One image token for each sample (N,), under guidance, from the hidden states of the last ones."""
    cond, guided = guide(model.model.generation_head(s.hidden).float(), s.cfg)
    code, logp, entropy = sample_token(
        guided, s.u.index_select(1, s.place).squeeze(1), s.temperature
    )
    if s.logp_mode == "cond" and s.cfg != 1.0:
        logp = gather_logps(cond, code, s.temperature)
    record(s, token=code, logp=logp, entropy=entropy, sampled=torch.ones_like(s.done))
    return code


def image_step(model, s: Decoder, width: int) -> None:
    """One image token for each sample, and with guidance the same one for its unconditional row."""
    code = draw_code(model, s).repeat(len(s.hidden) // len(s.done))
    embeds = model.prepare_embeddings_for_image_generation(code[:, None])[:, 0]
    s.hidden.copy_(feed(model, s, embeds, torch.ones_like(code, dtype=torch.bool), width))


# ---------------------------------------------------------------------------------------------------------------------
# CUDA graphs


def cuda_graph(step, decoder: Decoder):
    """Runs `step` once and returns a function that repeats it: the same kernels on the same addresses, in one launch.
    The first run is on a side stream, as the PyTorch documentation asks for: it loads kernels and sets libraries up,
    which is not allowed during a capture. A capture itself computes nothing."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    decoder.pool = (
        decoder.pool or torch.cuda.graph_pool_handle()
    )  # one for all: graphs never run at the same time
    graph = torch.cuda.CUDAGraph()
    # thread_local: NCCL's watchdog thread may ask for events meanwhile
    with torch.cuda.graph(graph, pool=decoder.pool, capture_error_mode="thread_local"):
        step()
    return graph.replay


CAPTURE = {"cuda": cuda_graph}


def fingerprint(model) -> tuple:
    """What a graph has baked in of a model: the addresses of its weights, and which adapters take part.
    Optimizers update weights in place, so the same graphs serve a whole training run."""
    names = ("language_model", "generation_embeddings", "generation_aligner", "generation_head")
    modules = [
        m
        for part in (model.lm_head, *(getattr(model.model, name) for name in names))
        for m in part.modules()
    ]
    tensors = [
        t for m in modules for t in (*m.parameters(recurse=False), *m.buffers(recurse=False))
    ]
    lora = [
        (tuple(m.active_adapters), m.disable_adapters, m.merged)
        for m in modules
        if hasattr(m, "merged_adapters")
    ]
    return model.training, tuple(lora), tuple((t.device, t.dtype, t.data_ptr()) for t in tensors)


def decoder_for(model, samples: int, columns: int, *settings) -> Decoder:
    """A Decoder with empty buffers. One with graphs is kept for the next rollout that it fits: only the newest, and
    only as long as the model lives. `KEPT.clear()` gives the memory back earlier."""
    key = (samples, *settings, fingerprint(model))
    kept = KEPT.pop(model, None)  # before a new one is made: there may not be room for both
    if kept is not None and kept.key == key and kept.capacity >= columns:
        for buffer in kept.buffers:
            buffer.zero_()  # also the cache: the last rollout may have left NaN
    else:
        del kept
        kept = Decoder(model, samples, columns, *settings)
        kept.key = key
    if kept.capture:  # elsewhere new buffers are as fast, and the memory is free meanwhile
        KEPT[model] = kept
    return kept
