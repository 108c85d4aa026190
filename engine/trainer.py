"""What is trained and where it lies: all weights or a LoRA adapter, in which precision, whole on
each process or in shards; its optimizer, its frozen reference, its checkpoints. Nothing of the
algorithm.

    trained     | forward pass in             | AdamW changes   | processes
    full        | float32                     | the same        | one: plain
    full        | float32 or bfloat16         | float32 shards  | several, or one in bfloat16: FSDP2
    LoRA (peft) | float32 or bfloat16, frozen | float32 adapter | any: replicated, gradients summed

Only the language model, its heads and what embeds tokens are trained; of these LoRA adapts the
layers. Image understanding (SigLIP) is never used and stays on the host; the picture tokenizer is
on the device, frozen. A rollout takes thousands of decoding steps, so sharded weights are gathered
once for all of it (`gathered`), not at every token.

The loss needs log-probabilities, and this file does not know how they are computed: a trainer hands
over its function `token_logps(model, batch, ...)`.
"""

import contextlib
import functools
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from engine import checkpoints, decode, run
from engine.checkpoints import DTYPES

# transformers 6 has another name for it, which the oldest version that works here does not know;
# peft asks by the old name too
warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing", FutureWarning)

# What LoRA adapts: every linear map in the layers of the language model
LINEAR = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"
FROZEN = ("model.vqmodel.", "model.vision_model.", "model.aligner.")  # what is never trained


@dataclass
class TrainerConfig:
    """The flags that both trainers have."""

    out: str = "out/run"  # folder of this run; the same flags again continue where it stopped
    # Optimisation
    lr: float = 1e-5  # peak learning rate
    warmup: float = 0.05  # share of the steps over which the learning rate rises to its peak
    clip_grad: float = 1.0  # largest gradient norm
    micro_batch: int = 16  # samples per forward and backward pass; changes memory, not the gradient
    lora: int = 0  # rank of the LoRA adapter (paper: 32); 0 trains the whole language model
    lora_alpha: float = 32.0  # its scale: the adapter counts lora_alpha / lora times
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the forward pass; AdamW's are float32
    shard: Literal["auto", "yes", "no"] = "auto"  # FSDP2; auto: several processes, or bfloat16
    gradient_checkpointing: bool = False  # keep one vector per token and layer: less memory
    # Keeping it
    save_every: int = 20  # steps between checkpoints; also at the end, on SIGTERM and on Ctrl-C
    keep: int = 2  # checkpoints that stay
    wandb: str = ""  # name of a Weights & Biases project that gets the log too
    seed: int = 0  # fixes all random numbers, on any number of processes


# ------------------------------------------------------------------------------------------------
# The schedule: which rows a step takes, and its learning rate. Functions of the step alone, so that
# a run that resumes needs nothing but its number


@functools.lru_cache(maxsize=2)
def permutation(count: int, epoch: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def order_of_step(count: int, step: int, batch_size: int, seed: int) -> list[int]:
    """Which of `count` prompts or records a step takes: each once per epoch, in an order fixed by
    (seed, epoch). A batch may begin in one epoch and end in the next."""
    chosen = []
    for place in range(step * batch_size, (step + 1) * batch_size):
        epoch, place_in_epoch = divmod(place, count)
        chosen.append(int(permutation(count, epoch, seed)[place_in_epoch]))
    return chosen


def cosine_lr(step: int, steps: int, peak: float, warmup: float, floor: float = 0.0) -> float:
    """Learning rate of a step: linear over the share `warmup` of the steps, then a cosine from peak
    to floor * peak."""
    warm = max(1, round(warmup * steps))
    if step < warm:
        return peak * (step + 1) / warm
    progress = (step - warm) / max(1, steps - warm)  # 0 to 1
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


# ------------------------------------------------------------------------------------------------
# Where weights lie


def trainable_parameters(model) -> list[torch.nn.Parameter]:
    """The language model, both heads, and what embeds image tokens; all else (picture tokenizer,
    image understanding) is frozen, in place."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(FROZEN))
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def is_sharded(lora: int, dtype: str, shard: str) -> bool:
    """Whether weights lie in shards. With `--shard auto` they do when all of them are trained by
    several processes or in bfloat16: the shards are the float32 masters."""
    if lora:
        return False
    several = dist.is_initialized() and dist.get_world_size() > 1
    wanted = several or dtype == "bfloat16"
    return shard == "yes" or (shard == "auto" and wanted)


class Whole(torch.nn.Module):
    """Calls a function of the model as a forward pass: FSDP2 gathers weights when a module's
    forward is called, and scoring uses parts of the model, not its forward."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, function, *args, **kwargs):
        return function(self.model, *args, **kwargs)


def add_lora(model, rank: int, alpha: float, adapter: Path | None, base: str):
    """Puts LoRA layers into the language model, in place -> the PeftModel around it, which saves
    and switches them. The adapter is float32, whatever the model is.

    adapter: a folder to go on with, or None for a new one; base: what loading it later starts
    from."""
    from peft import LoraConfig, PeftModel, get_peft_model

    if adapter is not None:
        wrapped = PeftModel.from_pretrained(
            model, str(adapter), is_trainable=True, autocast_adapter_dtype=True
        )
        return round_once(wrapped)
    torch.manual_seed(0)  # the adapter starts with random numbers: the same on every process
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=LINEAR, lora_dropout=0.0, bias="none"
    )
    wrapped = get_peft_model(model, config, autocast_adapter_dtype=True)
    if base != "toy" and Path(base).is_dir():
        base = str(Path(base).resolve())
    wrapped.peft_config["default"].base_model_name_or_path = base
    return round_once(wrapped)


def round_once(wrapped):
    """A PeftModel whose layers lose nothing of a small adapter, see engine/decode.py; in place."""
    for layer in wrapped.modules():
        if decode.adapters_of(layer) is not None and hasattr(layer, "lora_A"):
            layer.forward = functools.partial(decode.adapted_forward, layer)
    return wrapped


def shard_model(model, device: torch.device, dtype: torch.dtype) -> Whole:
    """Shards over all processes in the precision that the weights have, gathered in `dtype` one
    layer at a time. Gradients are summed in float32."""
    policy = MixedPrecisionPolicy(
        param_dtype=dtype,
        reduce_dtype=torch.promote_types(dtype, torch.float32),
        cast_forward_inputs=False,  # a Rollout's masks and log-probabilities stay float32
    )
    mesh = torch.distributed.init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in model.model.language_model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    whole = Whole(model)
    kept = set()  # frozen parameters, which are left as they are
    for part in (model.model.vqmodel, model.model.vision_model, model.model.aligner):
        kept.update(part.parameters())
    return fully_shard(whole, mesh=mesh, mp_policy=policy, ignored_params=kept)


def to_device(
    model, device: torch.device, dtype: torch.dtype, sharded: bool, tensors: Iterable | None = None
) -> Whole:
    """Everything but image understanding, which is never used, goes to the device; shards go there
    one layer at a time. The frozen picture tokenizer stays float32: rounded, it would often name
    another code. `tensors`: the weights of a model that has none yet, see `fill`."""
    inner = model.model
    if tensors is not None:
        whole = shard_model(model, device, dtype)
        fill(model, tensors, device)
        return whole
    inner.vqmodel.to(device, torch.float32)
    if sharded:
        return shard_model(model, device, dtype)
    for part in (
        inner.language_model,
        inner.generation_embeddings,
        inner.generation_aligner,
        inner.generation_head,
        model.lm_head,
    ):
        part.to(device)
    return Whole(model)


def fill(model, tensors: Iterable[tuple[str, torch.Tensor]], device: torch.device) -> None:
    """Gives a model in shards that `checkpoints.open_policy` made its weights: of each tensor this
    process reads its own rows. Image understanding, which is only saved again, is with rank 0."""
    parameters = dict(model.named_parameters())
    weights = {}
    for name, value in tensors:
        parameter = parameters[name]
        if isinstance(parameter, DTensor):
            weights[name] = own_part(value, parameter, device)
        elif name.startswith("model.vqmodel."):
            weights[name] = value.to(device, torch.float32, copy=True)
        elif run.rank() == 0:
            weights[name] = value.to(parameter.dtype, copy=True)
    model.load_state_dict(weights, strict=False, assign=True)


def sum_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Adds up the gradients of all processes; one that has no gradient of its own takes part with
    zeros, or the others would wait for it forever."""
    if not dist.is_initialized():
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)


def full(value: torch.Tensor) -> torch.Tensor:
    """A tensor with all its shards on this process."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def in_parts(value: torch.Tensor) -> Iterator[torch.Tensor]:
    """A tensor that may lie in shards, from its first row to its last: the rows of one process
    after the other, so that no process ever holds all of them. Every process has to go through
    it."""
    if not isinstance(value, DTensor):
        yield value.detach()
        return
    local = value.detach().to_local()
    rows = -(-len(value) // dist.get_world_size())  # as fully_shard divides them
    for rank in range(dist.get_world_size()):
        count = max(0, min(rows, len(value) - rank * rows))
        part = local
        if rank != run.rank():
            part = local.new_empty(count, *value.shape[1:])
        if count:
            dist.broadcast(part, src=rank)
        yield part


def own_part(value: torch.Tensor, like: DTensor, device: torch.device) -> DTensor:
    """The rows of a whole tensor that this process holds, on the device, laid out as the parameter
    `like`. A tensor that is mapped from a file is read at these rows only."""
    rows = -(-len(value) // like.device_mesh.size())  # as fully_shard divides them
    first = like.device_mesh.get_local_rank() * rows
    mine = value[first : first + rows].to(device, like.dtype, copy=True)
    return DTensor.from_local(
        mine,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=value.shape,
        stride=value.stride(),
    )


def distribute(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The part of a whole tensor that this process holds, laid out as the parameter `like`. AdamW's
    counter of steps, a number, is whole everywhere."""
    if isinstance(like, DTensor) and value.dim():
        return own_part(value, like, like.device)
    return value.clone()


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Writes tensors, which may lie in shards, as a safetensors file: part by part, so that the
    host of rank 0 never holds a whole one. Every process has to call it."""
    # large elements first: each tensor then begins at a multiple of its element's size
    names = sorted(tensors, key=lambda name: -tensors[name].element_size())
    tensors = {name: tensors[name] for name in names}
    writes = run.rank() == 0
    with open(path if writes else os.devnull, "wb") as file:
        if writes:
            file.write(checkpoints.safetensors_header(tensors))
        for value in tensors.values():
            for part in in_parts(value):
                if writes:
                    flat = part.cpu().contiguous().flatten()
                    file.write(flat.view(torch.uint8).numpy().data)


# ------------------------------------------------------------------------------------------------
# The engine


class Engine:
    """A model that is trained, with its optimizer. Sizes, flags and names as in TrainerConfig.

    model, tokenizer: what `checkpoints.load_policy` gives on the CPU: float32 when all weights are
        trained, the forward pass's precision under LoRA.
    tensors: the weights, when model and tokenizer come from `checkpoints.open_policy`.
    token_logps: function (model, batch, **settings) -> what `score` returns; gotr1.token_logps.
    saved: a checkpoint of this run to go on from; when all weights are trained, `model` has to be
        loaded from it."""

    def __init__(
        self,
        model,
        tokenizer,
        device: torch.device,
        token_logps: Callable,
        tensors: Iterable[tuple[str, torch.Tensor]] | None = None,
        base: str = "toy",
        saved: Path | None = None,
        lora: int = 0,
        lora_alpha: float = 32.0,
        dtype: str = "float32",
        shard: str = "auto",
        gradient_checkpointing: bool = False,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.device = device
        self.token_logps = token_logps
        self.dtype = DTYPES[dtype]
        self.sharded = is_sharded(lora, dtype, shard)
        if self.sharded and not dist.is_initialized():  # one process: float32 shards under bfloat16
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)

        trainable_parameters(model)
        self.lora = add_lora(model, lora, lora_alpha, saved, base) if lora else None
        self.gradient_checkpointing = gradient_checkpointing
        if gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.whole = to_device(model, device, self.dtype, self.sharded, tensors)
        self.reference = None

        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=0.0, betas=betas, weight_decay=weight_decay
        )
        self.first_step = self.resume(saved) if saved else 0

    def keep_reference(self, model, tensors: Iterable | None = None) -> None:
        """The frozen policy that the KL compares with: `model`, loaded anew in the precision of the
        forward pass. LoRA needs none: its adapter is switched off."""
        frozen = model.requires_grad_(False)
        self.reference = to_device(frozen, self.device, self.dtype, self.sharded, tensors)

    @contextlib.contextmanager
    def gathered(self, reference: bool = False):
        """The model with all its weights whole on this process, for sampling: one gathering for a
        whole rollout. `reference`: the frozen policy instead."""
        whole = self.whole
        adapter_off = contextlib.nullcontext()
        if reference and self.lora is not None:
            adapter_off = self.lora.disable_adapter()
        elif reference:
            whole = self.reference
        shards = [module for module in whole.modules() if isinstance(module, FSDPModule)]
        for module in shards:
            module.unshard()
        try:
            with adapter_off:
                yield whole.model
        finally:
            for module in shards:
                module.reshard()
            if shards:  # recorded graphs point at weights that are no longer there
                decode.KEPT.pop(whole.model, None)

    def score(self, batch, **settings):
        """`token_logps` of the policy: (logp, mask), both (N, S), with gradients unless they are
        switched off."""
        # transformers checkpoints in training mode only; there is no dropout to be switched on
        self.model.train(self.gradient_checkpointing)
        result = self.whole(self.token_logps, batch, **settings)
        self.model.eval()
        if self.sharded and not torch.is_grad_enabled():
            # a backward pass does it; weights that are left gathered would miss the next step
            self.whole.reshard()
        return result

    @torch.no_grad()
    def score_reference(self, batch, **settings):
        """`token_logps` of the reference: the adapter switched off, or the frozen copy."""
        if self.lora is not None:
            with self.lora.disable_adapter():
                return self.whole(self.token_logps, batch, **settings)
        result = self.reference(self.token_logps, batch, **settings)
        if self.sharded:
            self.reference.reshard()
        return result

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of this process's share of the loss; over all calls and processes the
        shares add up."""
        if self.sharded:
            loss = loss * dist.get_world_size()  # fully_shard takes the mean over processes
        loss.backward()

    def step(self, lr: float, clip_grad: float) -> float:
        """Sums the gradients over processes, clips, takes an AdamW step; returns the norm before
        clipping, the same on every process. A gradient that is zero or not finite changes
        nothing."""
        if not self.sharded:
            sum_gradients(self.parameters)
        norm = full(torch.nn.utils.clip_grad_norm_(self.parameters, clip_grad)).item()
        if 0 < norm < math.inf:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    # Checkpoints

    def save(self, folder: Path, step: int, keep: int = 2) -> None:
        """`folder/step_000100/`: what `--model` takes (all weights, or an adapter in peft's
        format), its tokenizer, and in `trainer.pt` and `optimizer.safetensors` what resuming needs.
        Every process has to call it.

        Written beside and renamed, so that what has the name is whole; `latest` names it; all but
        the last `keep` go. Raises RuntimeError when it cannot be written; the last checkpoint then
        stays as it was."""
        target = folder / f"step_{step:06d}"
        beside = folder / f"step_{step:06d}.tmp"
        optimizer = self.optimizer.state_dict()
        moments = {}
        for index, values in optimizer["state"].items():
            for name, value in values.items():
                moments[f"{index}.{name}"] = value
        try:
            if run.rank() == 0:
                shutil.rmtree(beside, ignore_errors=True)
                beside.mkdir(parents=True)
            if self.lora is None:
                write_tensors(beside / "model.safetensors", self.model.state_dict())
            write_tensors(beside / "optimizer.safetensors", moments)
            if run.rank() > 0:
                return

            if self.lora is not None:
                # without the second argument peft asks the hub about the base
                self.lora.save_pretrained(beside, save_embedding_layers=False)
            else:
                config = self.model.config
                config.architectures = [type(self.model).__name__]
                config.dtype = str(self.parameters[0].dtype).removeprefix("torch.")
                config.save_pretrained(beside)
                self.model.generation_config.save_pretrained(beside)
            self.tokenizer.save_pretrained(beside)
            groups = optimizer["param_groups"]
            torch.save({"step": step, "param_groups": groups}, beside / "trainer.pt")
            shutil.rmtree(target, ignore_errors=True)
            beside.rename(target)
            run.write_whole(folder / "latest", target.name)
        except (OSError, RuntimeError, SafetensorError) as problem:  # a full disk has three names
            shutil.rmtree(beside, ignore_errors=True)
            raise RuntimeError(f"cannot save {target}: {problem}") from problem
        remove_old_checkpoints(folder, target, keep)

    def resume(self, saved: Path) -> int:
        """The optimizer's state from a checkpoint, whatever the number of processes was; returns
        the step to go on with."""
        state = torch.load(saved / "trainer.pt", map_location="cpu", mmap=True, weights_only=True)
        if "optimizer" in state:  # in older checkpoints all of it is in this file
            moments = []
            for index, values in state["optimizer"]["state"].items():
                moments += [(f"{index}.{name}", value) for name, value in values.items()]
            groups = state["optimizer"]["param_groups"]
        else:
            moments = checkpoints.read_file(saved / "optimizer.safetensors")
            groups = state["param_groups"]
        own = {}
        for key, value in moments:
            index, name = key.split(".", 1)
            index = int(index)
            own.setdefault(index, {})[name] = distribute(value, self.parameters[index])
        self.optimizer.load_state_dict({"state": own, "param_groups": groups})
        return state["step"]


def remove_old_checkpoints(folder: Path, newest: Path, keep: int) -> None:
    """Leaves the last `keep` up to `newest`. Later ones are from before a kill: written, never
    named."""
    found = sorted(folder.glob("step_*[0-9]"))
    kept = [path for path in found if path.name <= newest.name][-keep:]
    for path in found:
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)


def check(flags: TrainerConfig) -> None:
    """Ends the program in one line when flags contradict each other."""
    if flags.dtype == "bfloat16" and flags.shard == "no" and not flags.lora:
        run.fail(
            "--dtype bfloat16 trains all weights through float32 shards: "
            "leave --shard out, or give --lora"
        )
    if flags.lora and flags.shard == "yes":
        run.fail(
            "--shard yes is for all weights; an adapter is replicated: "
            "leave one of --lora and --shard out"
        )


def load(
    flags: TrainerConfig,
    device: torch.device,
    token_logps: Callable,
    base: str,
    saved: Path | None,
    **optimizer,
) -> Engine:
    """The engine that the flags describe. `base` is what training starts from, `saved` this run's
    checkpoint to go on with; `optimizer`: betas and weight_decay of AdamW. Raises OSError or
    ValueError."""
    source = base
    dtype = DTYPES["float32"]
    if flags.lora:
        dtype = DTYPES[flags.dtype]
    elif saved is not None:
        source = str(saved)  # an adapter goes on top of its base instead
    opened = None
    if is_sharded(flags.lora, flags.dtype, flags.shard):
        opened = checkpoints.open_policy(source, dtype)
    if opened is not None:
        model, tokenizer, tensors = opened
    else:
        model, tokenizer = checkpoints.load_policy(source, "cpu", dtype)
        tensors = None
    engine = Engine(
        model,
        tokenizer,
        device,
        token_logps,
        tensors=tensors,
        base=base,
        saved=saved,
        lora=flags.lora,
        lora_alpha=flags.lora_alpha,
        dtype=flags.dtype,
        shard=flags.shard,
        gradient_checkpointing=flags.gradient_checkpointing,
        **optimizer,
    )
    return engine


def load_reference(engine: Engine, source: str) -> None:
    """Gives the engine a frozen reference: the policy `source`, as `load` reads it, in the
    precision of the forward pass."""
    opened = checkpoints.open_policy(source, engine.dtype) if engine.sharded else None
    if opened is not None:
        model, _, tensors = opened
        engine.keep_reference(model, tensors)
        return
    model, _ = checkpoints.load_policy(source, "cpu", DTYPES["float32"])
    for parameter in model.parameters():  # not before: an adapter is merged in float32
        parameter.data = parameter.data.to(engine.dtype)
    engine.keep_reference(model)
