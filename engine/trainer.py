"""What both trainers stand on: the flags that they share, the schedule of data and learning rate,
and the engine: a model, its optimizer, its frozen reference, its checkpoints. The losses are in the
trainers.

    trained     | forward pass in             | AdamW changes   | processes
    full        | float32                     | the same        | one: plain
    full        | float32 or bfloat16         | float32 shards  | several, or one in bfloat16: FSDP2
    LoRA (peft) | float32 or bfloat16, frozen | float32 adapter | any: replicated, gradients summed

Only the language model, its heads and what embeds tokens are trained; of these LoRA adapts the
layers. Image understanding (SigLIP) is never used and stays on the host; the picture tokenizer is
on the device, frozen. A rollout takes thousands of decoding steps, so sharded weights are gathered
once per rollout (`gathered`), not at every token.

How log-probabilities are computed is not known here: a trainer hands over its function
`token_logps(model, batch, ...)`.
"""

import contextlib
import functools
import math
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from engine import checkpoints, decode, run
from engine.checkpoints import DTYPES

# transformers 6 renames gradient_checkpointing; the oldest version that works here, and peft, know
# only the old name
warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing", FutureWarning)

# What LoRA adapts: every linear map in the layers of the language model
LINEAR = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"
FROZEN = ("model.vqmodel.", "model.vision_model.", "model.aligner.")  # what is never trained


@dataclass
class TrainerConfig:
    """The flags that both trainers have."""

    out: str = "out/run"  # folder of this run; the same flags continue where it stopped
    # Optimisation
    lr: float = 1e-5  # peak learning rate
    warmup: float = 0.05  # share of the steps over which the learning rate rises to its peak
    micro_batch: int = 16  # samples per forward and backward pass; changes memory, not the gradient
    lora: int = 0  # rank of the LoRA adapter (paper: 32); 0 trains the whole language model
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the forward pass; AdamW's are float32
    gradient_checkpointing: bool = False  # keep one vector per token and layer: less memory
    # Keeping it
    save_every: int = 20  # steps between checkpoints; also at the end, on SIGTERM and on Ctrl-C
    keep: int = 2  # checkpoints that stay
    wandb: str = ""  # name of a Weights & Biases project that gets the log too
    seed: int = 0  # fixes all random numbers, on any number of processes


# ------------------------------------------------------------------------------------------------
# The schedule: which records a step takes, and its learning rate. Functions of the step alone, so
# that a run that resumes needs nothing but the number of its step


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
    """The language model, both heads, and what embeds image tokens. The rest (picture tokenizer,
    image understanding) is frozen, in place."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(FROZEN))
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def is_sharded(lora: int, dtype: str) -> bool:
    """Whether weights lie in shards (FSDP2): when all of them are trained by several processes, or
    in bfloat16, where the shards are the float32 masters."""
    several = dist.is_initialized() and dist.get_world_size() > 1
    return not lora and (several or dtype == "bfloat16")


class FunctionWrapper(torch.nn.Module):
    """Calls a function of the model inside a forward pass: FSDP2 gathers weights when a module's
    forward is called, and scoring calls parts of the model, not its forward."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, function, *args, **kwargs):
        return function(self.model, *args, **kwargs)


def add_lora(model, rank: int, adapter: Path | None, base: str):
    """Puts LoRA layers into the language model, in place -> the PeftModel around it, which saves
    and switches them. The adapter is float32, whatever the model is.

    adapter: a folder to go on with, or None for a new one; base: what loading it later starts
    from."""
    from peft import LoraConfig, PeftModel, get_peft_model

    if adapter is not None:
        wrapped = PeftModel.from_pretrained(
            model, str(adapter), is_trainable=True, autocast_adapter_dtype=True
        )
    else:
        torch.manual_seed(0)  # the adapter starts with random numbers: the same on every process
        # alpha = rank, as in the paper: the adapter's product counts once
        config = LoraConfig(
            r=rank, lora_alpha=rank, target_modules=LINEAR, lora_dropout=0.0, bias="none"
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


def shard_model(model, device: torch.device, dtype: torch.dtype) -> FunctionWrapper:
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
    frozen = set()  # parameters that stay as they are, on every process
    for part in (model.model.vqmodel, model.model.vision_model, model.model.aligner):
        frozen.update(part.parameters())
    return fully_shard(FunctionWrapper(model), mesh=mesh, mp_policy=policy, ignored_params=frozen)


def to_device(model, device: torch.device, dtype: torch.dtype, sharded: bool) -> FunctionWrapper:
    """Everything but image understanding, which is never used, goes to the device; shards go there
    one layer at a time. The frozen picture tokenizer stays float32: rounded, it would often name
    another code."""
    inner = model.model
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
    return FunctionWrapper(model)


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
    """A tensor with all its shards on this process. Every process has to call it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def gather_on_rank_0(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors that may lie in shards -> on rank 0 all of them, complete, on the host; on other
    ranks nothing. Every process has to call it."""
    gathered = {}
    for name, value in tensors.items():
        value = full(value.detach())  # one at a time: all at once may not fit on a device
        if run.rank() == 0:
            gathered[name] = value.cpu()
    return gathered


def shard_like(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """The part of a complete tensor that this process holds, laid out as the parameter. AdamW's
    counter of steps, a number, is complete everywhere."""
    if isinstance(parameter, DTensor) and value.dim():
        mesh, placements = parameter.device_mesh, parameter.placements
        value = distribute_tensor(value, mesh, placements, src_data_rank=None)
    return value.clone()  # until now a view: of a mapped file, or of the complete tensor


# ------------------------------------------------------------------------------------------------
# The engine


class Engine:
    """A model that is trained, with its optimizer. Sizes, flags and names as in TrainerConfig.

    model, tokenizer: what `checkpoints.load_policy` gives on the CPU: float32 when all weights are
        trained, the forward pass's precision under LoRA. Every process loads them.
    token_logps: function (model, batch, **settings) -> what `score` returns; gotr1.token_logps.
    saved: a checkpoint of this run to resume; when all weights are trained, `model` has to be
        loaded from it."""

    def __init__(
        self,
        model,
        tokenizer,
        device: torch.device,
        token_logps: Callable,
        base: str = "toy",
        saved: Path | None = None,
        lora: int = 0,
        dtype: str = "float32",
        gradient_checkpointing: bool = False,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.device = device
        self.token_logps = token_logps
        self.dtype = DTYPES[dtype]
        self.sharded = is_sharded(lora, dtype)
        if self.sharded and not dist.is_initialized():  # one process: float32 shards under bfloat16
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)

        trainable_parameters(model)
        self.lora = add_lora(model, lora, saved, base) if lora else None
        self.gradient_checkpointing = gradient_checkpointing
        if gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.wrapped = to_device(model, device, self.dtype, self.sharded)
        self.reference = None  # wrapped as well, see `keep_reference`

        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=0.0, betas=betas, weight_decay=weight_decay
        )
        self.first_step = self.resume(saved) if saved else 0

    def keep_reference(self, model) -> None:
        """The frozen policy that the KL compares with: `model`, another copy, in the precision of
        the forward pass. LoRA needs none: its adapter is switched off."""
        frozen = model.requires_grad_(False)
        self.reference = to_device(frozen, self.device, self.dtype, self.sharded)

    @contextlib.contextmanager
    def gathered(self):
        """The model with all its weights on this process, for sampling: one gathering per rollout,
        not one per token."""
        shards = [module for module in self.wrapped.modules() if isinstance(module, FSDPModule)]
        for module in shards:
            module.unshard()
        try:
            yield self.model
        finally:
            for module in shards:
                module.reshard()
            if shards:  # recorded graphs point at weights that are no longer there
                decode.KEPT.pop(self.model, None)

    def score(self, batch, **settings):
        """`token_logps` of the policy: (logp, mask), both (N, S), with gradients unless they are
        switched off."""
        # transformers checkpoints in training mode only; there is no dropout to be switched on
        self.model.train(self.gradient_checkpointing)
        result = self.wrapped(self.token_logps, batch, **settings)
        self.model.eval()
        if self.sharded and not torch.is_grad_enabled():
            # a backward pass does it; weights that are left gathered would miss the next step
            self.wrapped.reshard()
        return result

    @torch.no_grad()
    def score_reference(self, batch, **settings):
        """`token_logps` of the reference: the adapter switched off, or the frozen copy."""
        if self.lora is not None:
            with self.lora.disable_adapter():
                return self.wrapped(self.token_logps, batch, **settings)
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

    def step(self, lr: float, clip_grad: float = 1.0) -> float:
        """Sums the gradients over processes, clips their norm, takes an AdamW step.

        Returns the norm before clipping, the same on every process. A gradient that is zero or not
        finite changes nothing."""
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

        Written beside and renamed, so that what has the name is complete; `latest` names it; all
        but the last `keep` go. Raises RuntimeError when it cannot be written; the last checkpoint
        then stays as it was."""
        target = folder / f"step_{step:06d}"
        beside = folder / f"step_{step:06d}.tmp"
        weights = {}
        if self.lora is None:
            weights = gather_on_rank_0(self.model.state_dict())
        optimizer = self.optimizer.state_dict()
        moments = {}
        for index, values in optimizer["state"].items():
            for name, value in values.items():
                moments[f"{index}.{name}"] = value
        moments = gather_on_rank_0(moments)
        if run.rank() > 0:
            return

        try:
            shutil.rmtree(beside, ignore_errors=True)
            if self.lora is None:
                self.model.save_pretrained(beside, state_dict=weights)
            else:
                # without the second argument peft asks the hub about the base
                self.lora.save_pretrained(beside, save_embedding_layers=False)
            self.tokenizer.save_pretrained(beside)
            safetensors.torch.save_file(moments, beside / "optimizer.safetensors")
            groups = optimizer["param_groups"]
            torch.save({"step": step, "param_groups": groups}, beside / "trainer.pt")
            shutil.rmtree(target, ignore_errors=True)
            beside.rename(target)
            run.write_whole(folder / "latest", target.name)
        except (OSError, RuntimeError, safetensors.SafetensorError) as problem:
            # a full disk: each library raises another of these
            shutil.rmtree(beside, ignore_errors=True)
            raise RuntimeError(f"cannot save {target}: {problem}") from problem
        remove_old_checkpoints(folder, target, keep)

    def resume(self, saved: Path) -> int:
        """Loads the optimizer's state from a checkpoint, whatever the number of processes was;
        returns the step to go on with."""
        state = torch.load(saved / "trainer.pt", map_location="cpu", weights_only=True)
        moments = {}
        for key, value in checkpoints.read_file(saved / "optimizer.safetensors"):
            index, name = key.split(".", 1)
            values = moments.setdefault(int(index), {})
            values[name] = shard_like(value, self.parameters[int(index)])
        self.optimizer.load_state_dict({"state": moments, "param_groups": state["param_groups"]})
        return state["step"]


def remove_old_checkpoints(folder: Path, newest: Path, keep: int) -> None:
    """Leaves the last `keep` up to `newest`. Later ones go: a process that was killed wrote them
    and did not come to name them in `latest`."""
    found = sorted(folder.glob("step_*[0-9]"))
    kept = [path for path in found if path.name <= newest.name][-keep:]
    for path in found:
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)


# ------------------------------------------------------------------------------------------------
# From flags to an engine


def load_engine(
    config: TrainerConfig,
    device: torch.device,
    token_logps: Callable,
    base: str,
    saved: Path | None,
    **optimizer,
) -> Engine:
    """The engine that the flags describe. `base` is what training starts from, `saved` a checkpoint
    of this run to resume; `optimizer`: betas and weight_decay of AdamW. Raises OSError or
    ValueError."""
    source = base
    dtype = DTYPES["float32"]
    if config.lora:
        dtype = DTYPES[config.dtype]  # `Engine` puts the saved adapter on its base
    elif saved is not None:
        source = str(saved)
    model, tokenizer = checkpoints.load_policy(source, "cpu", dtype)
    return Engine(
        model,
        tokenizer,
        device,
        token_logps,
        base=base,
        saved=saved,
        lora=config.lora,
        dtype=config.dtype,
        gradient_checkpointing=config.gradient_checkpointing,
        **optimizer,
    )


def load_reference(engine: Engine, source: str) -> None:
    """Gives the engine a frozen reference: the policy `source`, in the precision of the forward
    pass."""
    model, _ = checkpoints.load_policy(source, "cpu", DTYPES["float32"])
    for parameter in model.parameters():  # not before: an adapter is merged in float32
        parameter.data = parameter.data.to(engine.dtype)
    engine.keep_reference(model)
