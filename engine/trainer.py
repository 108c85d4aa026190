"""What is trained and where it lies: in full or as LoRA, in which precision, whole on each process or in shards; its
optimizer, its frozen reference, its checkpoints. Nothing of the algorithm.

    trained     | forward pass in             | AdamW changes   | processes
    full        | float32                     | the same        | one: plain
    full        | float32 or bfloat16         | float32 shards  | several, or one in bfloat16: FSDP2 (`fully_shard`)
    LoRA (peft) | float32 or bfloat16, frozen | float32 adapter | any: replicated, gradients are summed

Only the language model, its heads and what embeds tokens are trained; of these LoRA adapts the layers. Image
understanding (SigLIP) is never used and stays on the host; the picture tokenizer is on the device, frozen. A rollout
takes thousands of steps, so sharded weights are gathered once for all of it (`gathered`), not at every token.

    python engine.py                          # bytes a GPU for the published sizes: weights, optimizer, cache, judge
"""

import contextlib
import math
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import JanusForConditionalGeneration

import gotr1
from engine import checkpoints, decode, run
from engine.checkpoints import DTYPES

# the name that transformers 6 has for it is not in the oldest version that works here; peft asks by the old name too
warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing", FutureWarning)

LINEAR = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"  # what LoRA adapts


def is_sharded(lora: int, dtype: str, shard: str) -> bool:
    """`--shard auto`: weights that are trained in full, by several processes or in bfloat16, whose float32 masters live
    in the shards."""
    several = dist.is_initialized() and dist.get_world_size() > 1
    return not lora and (shard == "yes" or (shard == "auto" and (several or dtype == "bfloat16")))


class Whole(torch.nn.Module):
    """Calls a function of the model as a forward pass: FSDP2 gathers weights when a module's forward is called, and the
    functions of gotr1.py use parts of the model, not its forward."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, function, *args, **kwargs):
        return function(self.model, *args, **kwargs)


def add_lora(model, rank: int, alpha: float, adapter: Path | None, base: str):
    """Puts LoRA layers into the language model, in place -> the PeftModel around it, which saves and switches them.

    The adapter is float32, whatever the model is; `adapter` is a folder to go on with. `base` is what loading it later
    starts from."""
    from peft import LoraConfig, PeftModel, get_peft_model

    if adapter is not None:
        return PeftModel.from_pretrained(
            model, str(adapter), is_trainable=True, autocast_adapter_dtype=True
        )
    torch.manual_seed(0)  # the adapter starts with random numbers: the same on every process
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=LINEAR, lora_dropout=0.0, bias="none"
    )
    wrapped = get_peft_model(model, config, autocast_adapter_dtype=True)
    base = str(Path(base).resolve()) if base != "toy" and Path(base).is_dir() else base
    wrapped.peft_config["default"].base_model_name_or_path = base
    return wrapped


def shard_model(model, device: torch.device, dtype: torch.dtype) -> Whole:
    """Shards over all processes in the precision that the weights have, gathered in `dtype` a layer at a time.
    Gradients are summed in float32."""
    # inputs are not cast: a Rollout's masks and log-probabilities stay float32
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    mesh = torch.distributed.init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in model.model.language_model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    whole = Whole(model)
    frozen = (model.model.vqmodel, model.model.vision_model, model.model.aligner)
    kept = {parameter for part in frozen for parameter in part.parameters()}
    return fully_shard(whole, mesh=mesh, mp_policy=policy, ignored_params=kept)


def to_device(model, device: torch.device, dtype: torch.dtype, sharded: bool) -> Whole:
    """Everything but image understanding, which is never used, goes to the device; shards go there a layer at a time.
    The picture tokenizer, which is frozen, stays float32: rounded, it would often name another code."""
    inner = model.model
    inner.vqmodel.to(device, torch.float32)
    if sharded:
        return shard_model(model, device, dtype)
    used = (
        inner.language_model,
        inner.generation_embeddings,
        inner.generation_aligner,
        inner.generation_head,
    )
    for part in (*used, model.lm_head):
        part.to(device)
    return Whole(model)


class Engine:
    """A model that is trained, with its optimizer. Sizes, flags and names as in the trainers' settings.

    `model` and `tokenizer` are what `checkpoints.load_policy` gives on the CPU: float32 when all weights are trained,
    the forward pass's precision under LoRA. `saved` is a checkpoint of this run to go on from; when all weights are
    trained, `model` has to be loaded from it."""

    def __init__(
        self,
        model,
        tokenizer,
        device: torch.device,
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
        self.model, self.tokenizer, self.device, self.dtype = (
            model,
            tokenizer,
            device,
            DTYPES[dtype],
        )
        self.sharded = is_sharded(lora, dtype, shard)
        if (
            self.sharded and not dist.is_initialized()
        ):  # one process: for the float32 shards under bfloat16
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        gotr1.trainable_parameters(model)
        self.lora = add_lora(model, lora, lora_alpha, saved, base) if lora else None
        self.gradient_checkpointing = gradient_checkpointing
        if gradient_checkpointing:
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        self.whole = to_device(model, device, self.dtype, self.sharded)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=0.0, betas=betas, weight_decay=weight_decay
        )
        self.reference = None
        self.first_step = self.resume(saved) if saved else 0

    def keep_reference(self, model) -> None:
        """The frozen policy that the KL compares with: `model`, loaded anew in the precision of the forward pass. LoRA
        needs none: its adapter is switched off."""
        self.reference = to_device(
            model.requires_grad_(False), self.device, self.dtype, self.sharded
        )

    @contextlib.contextmanager
    def gathered(self):
        """The model with all its weights whole on this process, for sampling: one gathering for the whole rollout."""
        shards = [module for module in self.whole.modules() if isinstance(module, FSDPModule)]
        for module in shards:
            module.unshard()
        try:
            yield self.model
        finally:
            for module in shards:
                module.reshard()
            if shards:
                decode.KEPT.pop(
                    self.model, None
                )  # its graphs point at weights that are no longer there

    def score(self, batch, **settings):
        """`gotr1.token_logps` of the policy, with gradients unless they are switched off."""
        self.model.train(
            self.gradient_checkpointing
        )  # transformers checkpoints in training mode only; no dropout here
        result = self.whole(gotr1.token_logps, batch, **settings)
        self.model.eval()
        if self.sharded and not torch.is_grad_enabled():
            self.whole.reshard()  # a backward pass does it; weights left gathered would miss the next step
        return result

    @torch.no_grad()
    def score_reference(self, batch, **settings):
        """`gotr1.token_logps` of the reference, the adapter switched off or the frozen copy."""
        if self.lora is None:
            result = self.reference(gotr1.token_logps, batch, **settings)
            if self.sharded:
                self.reference.reshard()
            return result
        with self.lora.disable_adapter():
            return self.whole(gotr1.token_logps, batch, **settings)

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of this process's share of the loss; over all calls and processes the shares add up."""
        # fully_shard takes the mean over processes
        (loss * dist.get_world_size() if self.sharded else loss).backward()

    def step(self, lr: float, clip_grad: float) -> float:
        """Sums the gradients over processes, clips, takes an AdamW step; returns the norm before clipping, the same on
        every process. A gradient that is zero or not finite changes nothing."""
        if not self.sharded:
            run.sum_gradients(self.parameters)
        norm = full(torch.nn.utils.clip_grad_norm_(self.parameters, clip_grad)).item()
        if 0 < norm < math.inf:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    # Checkpoints

    def save(self, folder: Path, step: int, keep: int = 2) -> None:
        """`folder/step_000100/`: what `--model` takes (all weights, or an adapter in peft's format), its tokenizer, and
        `trainer.pt` with what resuming needs. Every process has to call it.

        Written beside and renamed, so that what has the name is whole; `latest` names it; all but the last `keep` go.
        Raises RuntimeError when it cannot be written; then the last checkpoint stays as it was."""
        weights = (
            {}
            if self.lora
            else {name: gather(value) for name, value in self.model.state_dict().items()}
        )
        state = self.optimizer.state_dict()
        state["state"] = {
            k: {name: gather(value) for name, value in row.items()}
            for k, row in state["state"].items()
        }
        if run.rank() > 0:
            return
        target, beside = folder / f"step_{step:06d}", folder / f"step_{step:06d}.tmp"
        try:
            shutil.rmtree(beside, ignore_errors=True)
            if self.lora:
                self.lora.save_pretrained(
                    beside, save_embedding_layers=False
                )  # else it asks the hub
            else:
                self.model.save_pretrained(beside, state_dict=weights)
            self.tokenizer.save_pretrained(beside)
            torch.save({"step": step, "optimizer": state}, beside / "trainer.pt")
            shutil.rmtree(target, ignore_errors=True)
            beside.rename(target)
            run.write_whole(folder / "latest", target.name)
        except (
            OSError,
            RuntimeError,
            SafetensorError,
        ) as problem:  # a full disk: each library has its own word for it
            shutil.rmtree(beside, ignore_errors=True)
            raise RuntimeError(f"cannot save {target}: {problem}") from problem
        steps = sorted(folder.glob("step_*[0-9]"))
        kept = [path for path in steps if path.name <= target.name][-keep:]
        for path in {*steps} - {
            *kept
        }:  # later ones are from before a kill: written, but never named
            shutil.rmtree(path, ignore_errors=True)

    def resume(self, saved: Path) -> int:
        """The optimizer's state from a checkpoint, whatever the number of processes; returns the step to go on with."""
        state = torch.load(saved / "trainer.pt", map_location="cpu", mmap=True, weights_only=True)
        for k, row in state["optimizer"]["state"].items():
            for name, value in row.items():
                row[name] = place(value, self.parameters[k])
        self.optimizer.load_state_dict(state["optimizer"])
        return state["step"]


def check(config) -> None:
    """Ends the program in one line when a trainer's settings contradict each other."""
    if config.dtype == "bfloat16" and config.shard == "no" and not config.lora:
        run.fail(
            "--dtype bfloat16 trains all weights through float32 shards: leave --shard out, or give --lora"
        )
    if config.lora and config.shard == "yes":
        run.fail(
            "--shard yes is for all weights; an adapter is replicated: leave one of --lora and --shard out"
        )


def load(config, device: torch.device, saved: Path | None, base: str, **optimizer) -> Engine:
    """The engine that a trainer's settings describe. `base` is what training starts from, `saved` this run's checkpoint
    to go on with."""
    source = (
        base if config.lora or saved is None else str(saved)
    )  # an adapter goes on top of its base
    model, tokenizer = checkpoints.load_policy(
        source, "cpu", DTYPES[config.dtype] if config.lora else torch.float32
    )
    names = ("lora", "lora_alpha", "dtype", "shard", "gradient_checkpointing")
    settings = {name: getattr(config, name) for name in names}
    engine = Engine(model, tokenizer, device, base, saved, **settings, **optimizer)
    if len(set(run.gather_list([engine.first_step]))) > 1:
        raise ValueError(
            "--out must be one folder that all machines see: some found a checkpoint there, some did not"
        )
    return engine


def full(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def gather(value: torch.Tensor) -> torch.Tensor:
    """A shard -> the whole tensor, on the host of rank 0 (elsewhere nothing is kept). Every process has to call it."""
    value = full(value.detach())
    return value.cpu() if run.rank() == 0 else value.new_empty(0)


def place(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The part of a whole tensor that this process holds, laid out as the parameter `like`; AdamW's counter is whole
    everywhere."""
    if isinstance(like, DTensor) and value.dim():
        return distribute_tensor(
            value.to(like.device), like.device_mesh, like.placements, src_data_rank=None
        )
    return value.clone()


# ---------------------------------------------------------------------------------------------------------------------
# How much memory


def count(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def judge_parameters() -> int:
    """Of Qwen2.5-VL-7B-Instruct, from the numbers of its config.json."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
            "num_key_value_heads": 4, "vocab_size": 152064}  # fmt: skip
    vision = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
    }
    with torch.device("meta"):
        return count(
            Qwen2_5_VLForConditionalGeneration(
                Qwen2_5_VLConfig(text_config=text, vision_config=vision)
            )
        )


def memory(
    size: str, lora: int, gpus: int, samples: int, cfg: bool, micro_batch: int, kl: bool
) -> dict[str, float]:
    """Bytes on each GPU, by what they are for, of bfloat16 training of a published size with gradient checkpointing.

    `samples` are drawn at a time on each GPU, each 60 prompt, 250 chain and 576 image tokens long; the cache has room
    for chains of 600 tokens. `activations` are what checkpointing keeps, one (D,) vector a token and layer of a
    micro-batch, and the logits of one chunk."""
    with torch.device("meta"):
        model = JanusForConditionalGeneration(checkpoints.janus_pro_config(size))
        trained = sum(parameter.numel() for parameter in gotr1.trainable_parameters(model))
        if lora:
            add_lora(model, lora, 32.0, None, "toy")
    text = model.config.text_config
    tokens, columns, vq = (
        60 + 250 + 576,
        -(-(60 + 601 + 576) // 128) * 128,
        count(model.model.vqmodel),
    )
    cache = (
        2 * text.num_hidden_layers * samples * (2 if cfg else 1) * columns * text.hidden_size * 2
    )
    activations = (
        micro_batch * tokens * text.hidden_size * text.num_hidden_layers * 2
        + 3 * 1024 * text.vocab_size * 4
    )
    adapter = (
        sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        if lora
        else 0
    )
    parts = {
        "weights": 2 * trained + 4 * (vq + adapter) if lora else 4 * trained / gpus + 4 * vq,
        "gathered": 0
        if lora
        else 2 * trained,  # for the rollout; during the update one layer at a time
        "gradients": 4 * (adapter or trained / gpus),
        "AdamW": 8 * (adapter or trained / gpus),
        "reference": 2 * trained / gpus if kl and not lora else 0,
        "cache": cache,
        "activations": activations,
        "judge": 2 * judge_parameters()
        + 2 * 986_109_441,  # HPS v2.1 is a CLIP ViT-H/14 of that many weights
    }
    # rollout and update take turns: what was gathered is gone then, and the cache, but for the one that decode.KEPT has
    rollout, update = parts["gathered"] + cache, activations + (cache if lora else 0)
    always = sum(parts.values()) - parts["gathered"] - cache - activations
    return parts | {"most": always + max(rollout, update)}


def main(argv: list[str] | None = None) -> None:
    """GiB on each GPU for the published sizes, by what they are for; 16 samples with guidance in the rollout."""
    rows = [
        ("1b", 0, 1),
        ("1b", 0, 8),
        ("1b", 32, 1),
        ("7b", 32, 1),
        ("7b", 32, 8),
        ("7b", 0, 1),
        ("7b", 0, 8),
    ]
    print(
        "GiB on each GPU, bfloat16, 16 samples at a time with guidance, update in micro-batches of 4"
    )
    for k, (size, lora, gpus) in enumerate(rows):
        parts = memory(size, lora, gpus, samples=16, cfg=True, micro_batch=4, kl=True)
        if k == 0:
            print(f"{'size':5}{'trained':9}{'GPUs':>4} " + "".join(f"{name:>13}" for name in parts))
        mode = f"LoRA {lora}" if lora else "full"
        cells = "".join(f"{value / 2**30:13.1f}" for value in parts.values())
        print(f"{size:5}{mode:9}{gpus:4} {cells}")


if __name__ == "__main__":
    main()
