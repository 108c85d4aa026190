"""What makes sampling fast: static buffers, hand-written layers, CUDA graphs. Which token is
sampled, and from what, stands in gotr1.py; nothing here knows about prompts, chains or pictures.

A token needs all weights once, so a step's floor is (bytes of weights + bytes of the cache read) /
memory bandwidth: about 1.5 ms for 32 rows of Janus-Pro-1B on an H200. Ordinary PyTorch takes 15 to
30 ms, since a step is a thousand tiny kernels that Python starts one by one. What is done about it:

1. Static buffers: keys, values, positions, masks, random numbers and results stay in place for the
   whole rollout.
2. No value on the host that changes: the column to write is a tensor on the device, too. All that
   Python knows is the bucket: how many columns of the cache are read, rounded up.
3. On GPUs a step is recorded as a CUDA graph, once per bucket, and replayed: one launch per token.
   Elsewhere the same functions run as they are.
4. Fewer kernels: a fused RMSNorm, and rotary embedding on queries and keys together: about 23 per
   layer instead of 41. LoRA adapters of layers with the same input share their first product.

Letters as in gotr1.py. R rows are the N samples, or 2N with guidance; W is the bucket; C the
columns of the cache. A row attends to its own tokens only:

    columns 0..C   | prompt, aligned on the right | chain, all rows in step | image |
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

KEPT = weakref.WeakKeyDictionary()  # model -> its Decoder, for the next rollout of the same shape


# ------------------------------------------------------------------------------------------------
# LoRA: a linear layer gives x W^T + (x A^T) B^T, with A (r, in) and B (out, r) in float32
#
# What an adapter adds in its first thousand steps is smaller than half a step of bfloat16's grid.
# Merged into W, or added to an x W^T that is already rounded (as peft does), most of it is rounded
# away. So the sum is rounded once: a matrix product that adds has its sum in float32.


def add_adapter(layer, x, low, up):
    """x W^T + low up^T, in the precision of x, rounded once. `low` (..., r) is x A^T."""
    change = F.linear(low, up).to(x.dtype)
    if layer.bias is not None:
        change = change + layer.bias
    total = torch.addmm(change.flatten(0, -2), x.flatten(0, -2), layer.weight.T)
    return total.view(change.shape)


class AdaptedLinear(torch.nn.Linear):
    """A linear layer with a frozen adapter beside its weight, for models that are not float32;
    `down` (r, in) is A times its scale, `up` (out, r) is B, both float32."""

    def __init__(self, layer: torch.nn.Linear, down, up):
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.weight = layer.weight
        self.bias = layer.bias
        self.register_buffer("down", down)
        self.register_buffer("up", up)

    def forward(self, x):
        return add_adapter(self, x, F.linear(x.to(self.down.dtype), self.down), self.up)


def adapters_of(layer) -> list[tuple] | None:
    """The adapters that take part in a layer, (A, B, scale) each: none in a plain one. None for
    what only its own forward can compute: another kind of layer, a variant of LoRA."""
    if type(layer) is torch.nn.Linear:
        return []
    if isinstance(layer, AdaptedLinear):
        return [(layer.down, layer.up, 1.0)]
    if not hasattr(layer, "lora_A"):  # what peft calls it
        return None
    found = adapters_of(layer.base_layer)
    if found is None or (layer.merged and layer.disable_adapters):
        return None
    if layer.merged or layer.disable_adapters:
        return found
    for name in layer.active_adapters:
        if name in layer.lora_A:
            if layer.lora_variant.get(name) or layer.lora_B[name].bias is not None:
                return None
            down = layer.lora_A[name].weight
            found.append((down, layer.lora_B[name].weight, layer.scaling[name]))
    return found


@dataclass
class LowRank:
    """The adapters of linear layers that have the same input."""

    down: torch.Tensor  # (r, in): the A of all layers, scaled, one below the other: one product
    ups: list[torch.Tensor | None]  # per layer B (out, its part of r); None: it has no adapter


def low_rank(layers: list) -> LowRank | None:
    """None when there are no adapters, or one that only its layer's forward can compute."""
    downs = []
    ups = []
    for layer in layers:
        adapters = adapters_of(layer)
        if adapters is None:
            return None
        mine = [up for _, up, _ in adapters]
        downs += [down * scale for down, _, scale in adapters]
        if len(mine) > 1:
            ups.append(torch.cat(mine, dim=1))
        elif mine:
            ups.append(mine[0])  # not a copy: a graph then sees what the optimizer changes
        else:
            ups.append(None)
    return LowRank(torch.cat(downs), ups) if downs else None


def project(layers: list, x, adapters: LowRank | None) -> list:
    """What linear layers with the same input x give; `adapters` is `low_rank` of them."""
    if adapters is None:
        return [layer(x) for layer in layers]
    low = F.linear(x.to(adapters.down.dtype), adapters.down)
    results = []
    first = 0
    for layer, up in zip(layers, adapters.ups, strict=True):
        if up is None:
            results.append(layer(x))
            continue
        part = low[..., first : first + up.shape[1]]
        first += up.shape[1]
        while hasattr(layer, "base_layer"):
            layer = layer.base_layer
        results.append(add_adapter(layer, x, part, up))
    return results


def adapted_forward(layer, x):
    """The forward pass of one of peft's LoRA layers, without peft's rounding in between."""
    adapters = low_rank([layer])
    if adapters is None:  # switched off, or merged
        return layer.base_layer(x)
    return project([layer], x, adapters)[0]


@torch.no_grad()
def adapters_by_layer(model) -> list[dict[str, LowRank | None]]:
    """`low_rank` of the linear layers with the same input, for each layer of the language model."""
    found = []
    for layer in model.model.language_model.layers:
        attention = layer.self_attn
        mlp = layer.mlp
        adapters = {
            "qkv": low_rank([attention.q_proj, attention.k_proj, attention.v_proj]),
            "o": low_rank([attention.o_proj]),
            "gate_up": low_rank([mlp.gate_proj, mlp.up_proj]),
            "down": low_rank([mlp.down_proj]),
        }
        found.append(adapters)
    return found


# ------------------------------------------------------------------------------------------------
# The layers


def rms_norm(norm, x):
    """transformers' LlamaRMSNorm, which rounds before it multiplies by the weight, in 2 kernels
    instead of 8."""
    return norm.weight * F.rms_norm(x, x.shape[-1:], eps=norm.variance_epsilon)


def rotary(model, embeds, positions):
    """(cos, sin) of rotary position embedding, each (R, n, 1, head_dim), with the sign of half of
    the sines changed: then rotate_half(x) * sin, as transformers writes it, is roll(x) * sin."""
    cos, sin = model.model.language_model.rotary_emb(embeds, position_ids=positions)
    half = cos.shape[-1] // 2
    sin = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
    return cos[:, :, None], sin[:, :, None]


def attend(attention, x, cos, sin, keys, values, columns, width: int, mask, adapters: dict):
    """transformers' LlamaAttention on x (R, n, D); new keys and values go to `columns` (n,) of
    `keys` and `values` (R, heads, C, head_dim), in place."""
    rows, n, _ = x.shape
    head_dim = cos.shape[-1]
    heads_kv = keys.shape[1]
    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    q, k, v = project(projections, x, adapters["qkv"])

    qk = torch.cat([q, k], dim=-1).view(rows, n, -1, head_dim)  # rotated together: half the kernels
    qk = qk * cos + qk.roll(head_dim // 2, dims=-1) * sin
    qk = qk.transpose(1, 2)  # (R, heads of both, n, head_dim)
    q, k = qk.split([qk.shape[1] - heads_kv, heads_kv], dim=1)

    keys.index_copy_(2, columns, k)
    values.index_copy_(2, columns, v.view(rows, n, -1, head_dim).transpose(1, 2))
    x = F.scaled_dot_product_attention(
        q,
        keys[:, :, :width],
        values[:, :, :width],
        attn_mask=mask,
        scale=attention.scaling,
        enable_gqa=q.shape[1] != heads_kv,  # fewer heads of keys and values than of queries
    )
    x = x.transpose(1, 2).reshape(rows, n, -1)
    return project([attention.o_proj], x, adapters["o"])[0]


def feed_forward(mlp, x, adapters: dict):
    """transformers' LlamaMLP."""
    gate, up = project([mlp.gate_proj, mlp.up_proj], x, adapters["gate_up"])
    return project([mlp.down_proj], mlp.act_fn(gate) * up, adapters["down"])[0]


def run_layers(model, embeds, positions, mask, cache, columns, width: int, adapters: list[dict]):
    """The language model on n new tokens per row: embeds (R, n, D), positions (R, n) -> hidden (R,
    n, D).

    Keys and values go to `columns` (n,) of `cache` (2, layers, R, heads, C, head_dim), in place;
    the first `width` columns are read; `mask` (R, 1, n, width) is added to the attention scores;
    `adapters`: see `adapters_by_layer`.

    This is transformers' LlamaDecoderLayer, rounding included, but not called as a module: hooks
    (FSDP's, gradient checkpointing's) stay out."""
    language_model = model.model.language_model
    cos, sin = rotary(model, embeds, positions)
    parts = zip(language_model.layers, cache.unbind(1), adapters, strict=True)
    for layer, (keys, values), adapted in parts:
        x = rms_norm(layer.input_layernorm, embeds)
        x = attend(layer.self_attn, x, cos, sin, keys, values, columns, width, mask, adapted)
        embeds = embeds + x
        x = rms_norm(layer.post_attention_layernorm, embeds)
        embeds = embeds + feed_forward(layer.mlp, x, adapted)
    return rms_norm(language_model.norm, embeds)


def added_mask(visible, dtype):
    """bool -> 0 where visible, -inf elsewhere, made once per step: attention would convert a bool
    mask in every layer. Not by `torch.where` with two numbers, which copies them from the host and
    so cannot be captured."""
    zeros = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return zeros.masked_fill(~visible, -torch.inf)


def new_cache(model, rows: int, columns: int):
    """Keys and values, (2, layers, rows, heads, columns, head_dim). Zeros: masked columns must not
    hold NaN."""
    config = model.config.text_config
    weight = model.get_input_embeddings().weight
    heads = config.num_key_value_heads
    shape = (2, config.num_hidden_layers, rows, heads, columns, config.head_dim)
    return torch.zeros(shape, dtype=weight.dtype, device=weight.device)


def prefill(model, rows: list[list[int]], pad: int):
    """R lists of ids, aligned on the right -> hidden state of the last token (R, D), keys and
    values (as in `new_cache`), which columns hold a token (R, P) bool."""
    embed = model.get_input_embeddings()
    device = embed.weight.device
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
    lengths = torch.tensor([[len(row)] for row in rows], device=device)
    columns = torch.arange(width, device=device)
    seen = columns >= width - lengths  # (R, P)

    # A token sees what stands left of it, and itself: also when it is padding, or its row would be
    # all -inf
    causal = columns <= columns[:, None]
    itself = torch.eye(width, dtype=torch.bool, device=device)
    visible = (seen[:, None] & causal) | itself

    embeds = embed(ids)
    positions = (seen.cumsum(-1) - 1).clamp(min=0)
    mask = added_mask(visible[:, None], embeds.dtype)
    cache = new_cache(model, len(rows), width)
    adapters = adapters_by_layer(model)
    hidden = run_layers(model, embeds, positions, mask, cache, columns, width, adapters)
    return hidden[:, -1], cache, seen


# ------------------------------------------------------------------------------------------------
# The buffers


class Tokens:
    """What is sampled of one kind, text or image, by N samples: a random number for each token, and
    what came of it. Everything is (N, L) and stays where it is; `place` is the column that comes
    next."""

    def __init__(self, samples: int, length: int, device):
        def buffer(dtype):
            return torch.zeros(samples, length, dtype=dtype, device=device)

        self.u = buffer(torch.float32)  # uniform random numbers
        self.token = buffer(torch.int64)
        self.logp = buffer(torch.float32)
        self.entropy = buffer(torch.float32)
        self.sampled = buffer(torch.bool)  # neither padding nor forced
        self.place = torch.zeros(1, dtype=torch.int64, device=device)

    def number(self):
        """The random numbers of the current place, (N,)."""
        return self.u.index_select(1, self.place).squeeze(1)

    def record(self, token, logp, entropy, sampled) -> None:
        """What was sampled, (N,) each, goes to the current place; the place moves on."""
        self.token.index_copy_(1, self.place, token[:, None])
        self.logp.index_copy_(1, self.place, logp[:, None].float())
        self.entropy.index_copy_(1, self.place, entropy[:, None].float())
        self.sampled.index_copy_(1, self.place, sampled[:, None])
        self.place += 1


class Decoder:
    """The buffers of a rollout of N samples, and the graphs recorded on them. It keeps no reference
    to the model. `settings` is whatever the step functions read; a graph has its values baked
    in."""

    def __init__(self, model, samples: int, rows: int, columns: int, images: int, settings):
        weight = model.get_input_embeddings().weight
        device = weight.device
        self.settings = settings
        self.samples = samples
        self.capture = CAPTURE.get(device.type)  # records a step; None: steps run as they are
        self.bucket = 128 if self.capture else 1  # columns; without graphs any width is free
        self.patience = 16 if self.capture else 1  # steps between looks at `done`
        self.capacity = round_up(columns, self.bucket)  # other prompts will often fit as well
        self.used = 0  # columns written so far: the host's copy of `column`
        self.graphs = {}  # (step function, width) -> function that replays it
        self.pool = None  # memory that all graphs share
        self.stream = None  # beside the usual one: what is recorded runs there once before

        self.cache = new_cache(model, rows, self.capacity)
        # The hidden state of each row's last token, and which columns hold a token of the row
        self.hidden = torch.zeros(rows, weight.shape[1], dtype=weight.dtype, device=device)
        self.visible = torch.zeros(rows, self.capacity, dtype=torch.bool, device=device)
        self.position = torch.zeros(rows, dtype=torch.int64, device=device)  # of the next token
        self.column = torch.zeros(1, dtype=torch.int64, device=device)  # that is written next
        self.done = torch.zeros(samples, dtype=torch.bool, device=device)  # the chain has ended
        self.forced = torch.zeros(samples, dtype=torch.bool, device=device)  # ended at the cap
        self.cap = torch.zeros(1, dtype=torch.int64, device=device)  # most sampled chain tokens
        self.text = Tokens(samples, self.capacity, device)
        self.image = Tokens(samples, images, device)
        self.adapters = adapters_by_layer(model)  # copies of A: of the weights at that time

    def renew_adapters(self, model) -> None:
        """The adapters as they are now, at the addresses that graphs know."""
        for old_layer, new_layer in zip(self.adapters, adapters_by_layer(model), strict=True):
            for name, new in new_layer.items():
                if new is None:
                    continue
                old = old_layer[name]
                old.down.copy_(new.down)
                for old_up, new_up in zip(old.ups, new.ups, strict=True):
                    if new_up is not None and new_up.data_ptr() != old_up.data_ptr():
                        old_up.copy_(new_up)

    def clear(self) -> None:
        """All zeros, for another rollout; the cache as well, since the last rollout may have left
        NaN."""
        for owner in (self, self.text, self.image):
            for value in vars(owner).values():
                if torch.is_tensor(value):
                    value.zero_()

    def rewind(self, columns: int) -> None:
        """The next token goes to column `columns`."""
        self.column.fill_(columns)
        self.used = columns

    def load(self, first: int, which, hidden, cache, seen) -> None:
        """Rows `first`, `first` + 1, ... become copies of rows `which` (a tensor) of a `prefill`,
        so that its last column is the last one used."""
        rows = slice(first, first + len(which))
        columns = slice(self.used - seen.shape[1], self.used)
        for layer in range(cache.shape[1]):  # one at a time: the copies of all may not fit together
            self.cache[:, layer, rows, :, columns] = cache[:, layer, which]
        self.visible[rows, columns] = seen[which]
        self.hidden[rows] = hidden[which]
        self.position[rows] = seen.sum(-1)[which]

    def feed(self, model, embeds, visible, width: int):
        """The embeddings of new tokens (R, D) go through the layers -> hidden (R, D). `visible`
        (R,): whether later tokens may attend to this one. R is N for text, although the buffers may
        have 2N rows."""
        rows = len(embeds)
        self.visible[:rows].index_copy_(1, self.column, visible[:, None])
        mask = added_mask(self.visible[:rows, None, None, :width], self.hidden.dtype)
        positions = self.position[:rows, None]
        cache = self.cache[:, :, :rows]
        hidden = run_layers(
            model, embeds[:, None], positions, mask, cache, self.column, width, self.adapters
        )
        self.position[:rows] += visible
        self.column += 1
        return hidden[:, -1]

    def step(self, function: Callable, model) -> None:
        """`function(model, decoder, width)`, one token for all rows; from its graph once there is
        one."""
        width = round_up(self.used + 1, self.bucket)
        graph = self.graphs.get((function, width))
        if graph:
            graph()
        elif self.capture:
            graph = self.capture(lambda: function(model, self, width), self)
            self.graphs[function, width] = graph
        else:
            function(model, self, width)
        self.used += 1


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


# ------------------------------------------------------------------------------------------------
# CUDA graphs


def cuda_graph(step: Callable, decoder: Decoder) -> Callable:
    """Runs `step` once and returns a function that repeats it: the same kernels on the same
    addresses, in one launch. The first run is on a side stream, as PyTorch's documentation asks
    for: it loads kernels and sets libraries up, which is not allowed during a capture. A capture
    itself computes nothing."""
    if decoder.stream is None:  # one for all: each stream has a workspace of cuBLAS of its own
        decoder.stream = torch.cuda.Stream()
    side = decoder.stream
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    if decoder.pool is None:  # one for all: graphs never run at the same time
        decoder.pool = torch.cuda.graph_pool_handle()
    graph = torch.cuda.CUDAGraph()
    # thread_local: NCCL's watchdog thread may ask for events meanwhile
    with torch.cuda.graph(graph, pool=decoder.pool, stream=side, capture_error_mode="thread_local"):
        step()
    return graph.replay


CAPTURE = {"cuda": cuda_graph}  # device type -> what records a step there


def fingerprint(model) -> tuple:
    """What a graph has baked in of a model: the addresses of its weights, and which adapters take
    part. Optimizers update weights in place, so the same graphs serve a whole training run."""
    inner = model.model
    adapters = []
    tensors = []
    for part in (
        model.lm_head,
        inner.language_model,
        inner.generation_embeddings,
        inner.generation_aligner,
        inner.generation_head,
    ):
        for module in part.modules():
            if hasattr(module, "merged_adapters"):  # a LoRA layer of peft
                active = tuple(module.active_adapters)
                adapters.append((active, module.disable_adapters, module.merged))
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                tensors.append((tensor.device, tensor.dtype, tensor.data_ptr()))
    return model.training, tuple(adapters), tuple(tensors)


def decoder_for(model, *, samples: int, rows: int, columns: int, images: int, settings) -> Decoder:
    """A Decoder with empty buffers. One with graphs is kept for the next rollout that it fits: only
    the newest, and only as long as the model lives. `KEPT.clear()` gives the memory back
    earlier."""
    key = (samples, rows, images, settings, fingerprint(model))
    decoder = KEPT.pop(model, None)  # before a new one is made: there may not be room for both
    if decoder is not None and decoder.key == key and decoder.capacity >= columns:
        decoder.clear()
        decoder.renew_adapters(model)
    else:
        del decoder
        decoder = Decoder(model, samples, rows, columns, images, settings)
        decoder.key = key
    if decoder.capture:  # elsewhere new buffers are as fast, and the memory is free meanwhile
        KEPT[model] = decoder
    return decoder
