"""How fast the parts are on this machine, and how much memory training takes on a GPU.

    python -m engine.speed rollout --size 1b         # our rollout beside a straightforward one
    python -m engine.speed step --size 7b            # a whole GRPO step: does it fit, how long
    python -m engine.speed judge --judge FOLDER      # rows per second of the judge's four calls
    python -m engine.speed networks --detector FILE  # pictures per second of a scoring network
    python -m engine.speed memory                    # GiB per GPU, computed without loading

Rollout and step run with random weights: how long they take does not depend on the values.
"""

import copy
import functools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPModel,
    JanusConfig,
    JanusForConditionalGeneration,
)
from transformers.initialization import no_init_weights

import gotr1
import rewards
from engine import run, trainer
from engine.checkpoints import TOY, janus_pro_config, load_policy
from engine.trainer import add_lora, trainable_parameters
from judges.hps import HPS
from render_boxes import Box, draw_boxes

# -------------------------------------------------------------------------------------------------
# One dataclass per subcommand


@dataclass
class Rollout:
    """Our rollout beside a straightforward loop, with the same random weights."""

    size: Literal["", "small", "1b", "7b"] = ""  # of the model; empty: 1b on a GPU, small elsewhere
    samples: int = 16  # of one prompt
    cfg: float = 5.0  # guidance
    chain: int = 0  # tokens of every chain; 0: 250, for small 62
    repeats: int = 3  # timed runs of each loop; on a GPU the straightforward one runs once


@dataclass
class Step:
    """A whole GRPO step with random weights: seconds, floor, memory and what the table of memory
    says, of each phase."""

    size: Literal["", "tiny", "small", "1b", "7b"] = ""  # empty: 1b on a GPU, small elsewhere
    lora: int = 32  # rank of the adapter; 0 trains all weights
    judge: Literal["", "none", "tiny", "small", "3b", "7b"] = ""  # size; empty: 7b, or the model's
    scoring: Literal["reply", "expected"] = "reply"  # the judge writes; or one pass per row
    hps: bool = True  # HPS takes part: in its real size for 1b and 7b, else a tiny one
    prompts: int = 1  # drawn at a time, as --rollout_batch
    samples: int = 16  # of each prompt
    cfg: float = 5.0  # guidance
    chain: int = 0  # tokens of every chain; 0: 250, for small 62, for tiny 8
    micro_batch: int = 4  # samples per pass of the update
    judge_batch: int = 16  # rows that the judge takes at a time
    plain: bool = True  # also time the straightforward rollout, as `rollout` does


@dataclass
class Judge:
    """The judge's four calls, with batch size 1 and 16, its marks written and read off; R_sem in
    four marks and in one; and pictures with several names beside a straightforward way."""

    judge: str = "toy"  # folder or hub id of a Qwen2.5-VL or Qwen3-VL; `toy` shows the table only
    device: str = "cpu"  # or cuda
    pictures: int = 16  # that are asked about in the last part, each with three names
    tokens: int = 48  # most tokens of a reply in the last part; a list of one box has about 40


@dataclass
class Networks:
    """The networks of GenEval and T2I-CompBench that are given, with batch size 1 and 16."""

    detector: str = ""  # GenEval's Mask2Former: the official .pth, or a folder
    clip: str = ""  # folder of CLIP ViT-L/14
    clip_b32: str = ""  # folder of CLIP ViT-B/32
    blip: str = ""  # BLIP-VQA: the official .pth, or a folder
    blip_tokenizer: str = "google-bert/bert-base-uncased"  # of a .pth, which has none
    gdino: str = ""  # folder of Grounding DINO


@dataclass
class Memory:
    """GiB on each GPU for the published sizes, by what the memory is for."""

    samples: int = 16  # drawn at a time, with guidance
    micro_batch: int = 4  # samples that the update takes at a time
    judge_batch: int = 16  # rows that the judge takes at a time


# -------------------------------------------------------------------------------------------------
# Rollout: beside a straightforward loop on the same weights, and above the floor of the memory


def time_rollout(settings: Rollout, device: torch.device) -> None:
    """Times both loops on one prompt and prints what was measured.

    With random weights a chain could end anywhere. So <begin_of_image> is taken out of the logits:
    for both loops all chains have the same number of tokens and are then ended."""
    gpu = device.type == "cuda"
    size = settings.size or ("1b" if gpu else "small")
    chain = settings.chain or (62 if size == "small" else 250)
    prompt = "a red ball left of a blue cube " * 6
    model, tokenizer = random_policy(size, device)
    forbid_token(model.lm_head, gotr1.special_ids(tokenizer)[2])
    config = model.config.text_config
    images = gotr1.image_token_count(model)
    given = len(gotr1.encode_prompt(tokenizer, prompt))
    u = gotr1.uniforms(0, [0], settings.samples, images + chain).to(device)

    # both end with a copy to the host: a GPU has finished by then
    def straightforward() -> torch.Tensor:
        drawn = gotr1.plain_rollout(model, tokenizer, prompt, settings.cfg, u, chain)
        return torch.cat([drawn["chain_ids"], drawn["image_tokens"]], dim=1).cpu()

    def ours() -> torch.Tensor:
        drawn = gotr1.rollout(
            model, tokenizer, [prompt], settings.samples, settings.cfg, max_chain=chain
        )
        return torch.cat([drawn.chain_ids, drawn.image_tokens], dim=1).cpu()

    name = torch.cuda.get_device_name(device) if gpu else f"{torch.get_num_threads()} CPU threads"
    shape = f"{config.num_hidden_layers} layers of width {config.hidden_size}"
    print(f"{size}: {shape}, random weights, on {name}")
    tokens = f"each {chain} + 1 chain and {images} image tokens"
    print(f"{settings.samples} samples of a prompt of {given} tokens, {tokens}, cfg {settings.cfg}")

    first = time_once(ours)[0]  # records the CUDA graphs
    # the straightforward loop takes minutes for the real sizes
    old_seconds, old = time_median(
        "straightforward", straightforward, 1 if gpu else settings.repeats
    )
    new_seconds, new = time_median("rollout", ours, settings.repeats)
    same = int((old == new).all(dim=1).sum())
    equal = f"{same} of {settings.samples} samples have the same tokens"
    print(f"ratio {old_seconds / new_seconds:.1f}; {equal}; first rollout (graphs) {first:.2f} s")
    if gpu:
        bandwidth = measure_bandwidth(device)
        print(f"floor at {bandwidth / 1e12:.2f} TB/s, as measured by copying 4 GiB 10 times:")
        floor = rollout_floor(model, settings.samples, settings.cfg, given, chain, bandwidth)
        print(f"  {floor:.2f} s in all: {floor / new_seconds:.0%} of what the rollout takes")


def time_once(function: Callable) -> tuple[float, torch.Tensor]:
    """(seconds, result) of one call."""
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def time_median(name: str, function: Callable, repeats: int) -> tuple[float, torch.Tensor]:
    """(median of the seconds, last result); prints the rate. A result has one row per sample."""
    seconds = []
    for _ in range(repeats):
        taken, result = time_once(function)
        seconds.append(taken)
    median = float(np.median(seconds))
    rate = f"{len(result) / median:.2f} samples per second"
    print(f"{name:16}{median:8.2f} s, {rate}, median of {repeats}")
    return median, result


def random_policy(size: str, device: torch.device):
    """(model, the toy's tokenizer) with random weights: Janus-Pro's "1b" or "7b"; "small", which
    has about the 1B's proportions; "tiny", the toy. bfloat16 on GPUs, float32 elsewhere."""
    with device, no_init_weights():
        model = JanusForConditionalGeneration(policy_config(size)).eval()
    torch.manual_seed(0)
    fill_randomly(model, usual_dtype(device), device)
    return model, load_policy("toy")[1]


def usual_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def fill_randomly(network: torch.nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Small random weights; those of norms are about 1. Only parameters are cast: a network's
    buffers (rotary frequencies) stay as they are."""
    for name, parameter in network.named_parameters():
        values = torch.randn(parameter.shape, dtype=dtype, device=device) * 0.02
        parameter.data = values + 1 if "norm" in name else values


def policy_config(size: str) -> JanusConfig:
    """See `random_policy`."""
    if size == "tiny":
        return JanusConfig.from_pretrained(TOY)
    if size == "small":
        return small_config()
    return janus_pro_config(size)


def small_config() -> JanusConfig:
    """The toy's configuration with 8 layers of width 512 and 12 x 12 image tokens."""
    settings = json.loads((TOY / "config.json").read_text())
    settings["text_config"].update(
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=8192,
    )
    settings["vision_config"].update(image_size=48, projection_dim=512)
    settings["vq_config"].update(num_embeddings=1024, projection_dim=512, image_token_embed_dim=512)
    return JanusConfig(**settings)


def forbid_token(head: torch.nn.Module, token: int) -> None:
    """From now on the head gives this token probability 0."""

    # made here: inside a step that is recorded as a CUDA graph, nothing may come from the host
    forbidden = torch.tensor([token], device=head.weight.device)

    def forbid(module, inputs, logits):
        return logits.index_fill(-1, forbidden, -torch.inf)

    head.register_forward_hook(forbid)


def measure_bandwidth(device: torch.device) -> float:
    """Bytes per second that the memory reads or writes in 10 large copies: of 4 GiB on a GPU, of a
    quarter of one elsewhere."""
    size = 2**32 if device.type == "cuda" else 2**28
    source, target = torch.zeros(2, size, dtype=torch.uint8, device=device)
    target.copy_(source)
    wait(device)
    start = time.perf_counter()
    for _ in range(10):
        target.copy_(source)
    wait(device)
    copied = 10 * 2 * size  # each byte is read and written
    return copied / (time.perf_counter() - start)


def rollout_floor(
    model, samples: int, cfg: float, prompt: int, chain: int, bandwidth: float
) -> float:
    """Seconds that a rollout takes at least: every step reads the weights that it uses, and the
    keys and values of what its rows have seen so far. Prints the arithmetic.

    `prompt` and `chain` are counts of tokens, `bandwidth` is in bytes per second."""
    lm = model.model.language_model
    config = model.config.text_config
    images = gotr1.image_token_count(model)
    # keys and values of one token, in bytes
    kv_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    kv_bytes *= model.lm_head.weight.element_size()

    def phase(name: str, steps: int, rows: int, tokens: float, parts: list) -> float:
        """`tokens` are what a row has seen, on average over the steps."""
        weights = sum(parameter_bytes(part) for part in parts)
        total = steps * (weights + rows * tokens * kv_bytes)
        cache = f"{rows} rows x {tokens:.0f} tokens x {kv_bytes / 1e3:.0f} kB"
        sizes = f"{weights / 1e9:.2f} GB of weights + {cache}"
        seconds = total / bandwidth
        print(f"  {name} {steps} x ({sizes}) = {total / 1e12:.2f} TB: {seconds:.2f} s")
        return seconds

    chain_seconds = phase(
        name="chain",
        steps=chain,
        rows=samples,
        tokens=prompt + chain / 2,
        parts=[lm.layers, lm.norm, model.lm_head],
    )
    image_seconds = phase(
        name="image",
        steps=images,
        rows=samples if cfg == 1.0 else 2 * samples,  # guidance: conditional and unconditional
        tokens=prompt + chain + images / 2,
        parts=[
            lm.layers,
            lm.norm,
            model.model.generation_head,
            model.model.generation_aligner,
        ],
    )
    return chain_seconds + image_seconds


def parameter_bytes(module: torch.nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


# -------------------------------------------------------------------------------------------------
# A whole step


class JudgeCall(NamedTuple):
    """What the judge is asked about a sample whose chain has three boxes."""

    rows: int  # per sample
    side: int  # of the picture in pixels; 0: none
    question: int  # tokens of text, about
    reply: int  # most tokens of the reply

    @property
    def patches(self) -> int:
        """Per side: 14 pixels each, 2 x 2 of them per image token."""
        return round(self.side / 28) * 2


JUDGE_CALLS = {
    "semantic": JudgeCall(rows=1, side=0, question=500, reply=32),
    "spatial": JudgeCall(rows=1, side=448, question=250, reply=200),
    "alignment": JudgeCall(rows=1, side=384, question=250, reply=200),
    "grounding": JudgeCall(rows=3, side=384, question=80, reply=200),
}


class JudgeSize(NamedTuple):
    """The shape of a Qwen2.5-VL, whose eye is its vision tower."""

    layers: int
    width: int
    inner_width: int
    heads: int
    kv_heads: int
    vocabulary: int
    eye_layers: int
    eye_width: int
    eye_heads: int


JUDGES = {
    "tiny": JudgeSize(
        layers=2,
        width=64,
        inner_width=128,
        heads=4,
        kv_heads=2,
        vocabulary=8192,
        eye_layers=2,
        eye_width=32,
        eye_heads=4,
    ),
    "small": JudgeSize(
        layers=4,
        width=256,
        inner_width=512,
        heads=8,
        kv_heads=2,
        vocabulary=8192,
        eye_layers=4,
        eye_width=128,
        eye_heads=4,
    ),
    "3b": JudgeSize(
        layers=36,
        width=2048,
        inner_width=11008,
        heads=16,
        kv_heads=2,
        vocabulary=151936,
        eye_layers=32,
        eye_width=1280,
        eye_heads=16,
    ),
    "7b": JudgeSize(
        layers=28,
        width=3584,
        inner_width=18944,
        heads=28,
        kv_heads=4,
        vocabulary=152064,
        eye_layers=32,
        eye_width=1280,
        eye_heads=16,
    ),
}


@dataclass
class Measured:
    seconds: float
    gib: float  # most memory that was held: of the GPU in this phase, of the host so far


def time_step(settings: Step, device: torch.device) -> None:
    """One step as train_grpo.py takes it, with random weights, and prints what was measured.

    On a GPU a step before it records the graphs. The chains are of random tokens, so the judge's
    rows are made to measure instead: as many, with pictures as large and texts as long, as for
    chains with three boxes."""
    gpu = device.type == "cuda"
    size = settings.size or ("1b" if gpu else "small")
    judge_size = settings.judge or ("7b" if size in ("1b", "7b") else size)
    chain = settings.chain or {"tiny": 8, "small": 62}.get(size, 250)
    held_before = 0.0 if gpu else run.peak_gib(device)  # by Python and its libraries
    rates = measure_rates(device) if gpu else None  # before memory is taken
    engine = random_engine(size, settings.lora, device)
    judge = None if judge_size == "none" else random_judge(judge_size, device)
    hps = RandomHPS(hps_config(size), engine.tokenizer, device) if settings.hps else None

    config = engine.model.config.text_config
    images = gotr1.image_token_count(engine.model)
    prompt = "a red ball left of a blue cube " * 6
    given = len(gotr1.encode_prompt(engine.tokenizer, prompt))
    name = torch.cuda.get_device_name(device) if gpu else f"{torch.get_num_threads()} CPU threads"
    trained = f"LoRA {settings.lora}" if settings.lora else "all weights"
    print(f"{size}: {config.num_hidden_layers} layers of width {config.hidden_size}, {trained},")
    print(f"random weights, on {name}; judge {judge_size}, {settings.scoring}")
    samples = settings.prompts * settings.samples
    tokens = f"{given} prompt, {chain} + 1 chain and {images} image tokens"
    print(f"{samples} samples, prompts {settings.prompts}: {tokens}, cfg {settings.cfg}")
    batches = judge_batches(samples, settings.judge_batch, settings.scoring)

    def step() -> dict[str, Measured]:
        phases = {}

        def measure(phase: str, function: Callable):
            wait(device)
            if gpu:
                torch.cuda.reset_peak_memory_stats(device)
            start = time.perf_counter()
            result = function()
            wait(device)
            phases[phase] = Measured(time.perf_counter() - start, run.peak_gib(device))
            return result

        def draw() -> gotr1.Rollout:
            with engine.gathered() as model:
                return gotr1.rollout(
                    model,
                    engine.tokenizer,
                    [prompt] * settings.prompts,
                    settings.samples,
                    settings.cfg,
                    max_chain=chain,
                )

        sampled = measure("rollout", draw)
        pictures = measure(
            "decode", lambda: gotr1.decode_images(engine.model, sampled.image_tokens)
        )
        if judge:
            measure("judge", lambda: ask_judge(judge, batches, device))
        if hps:
            measure("hps", lambda: hps([prompt] * samples, pictures))
        measure("update", lambda: update(engine, sampled, settings.micro_batch))
        return phases

    if gpu:
        step()
    phases = step()
    if rates is None:  # only now: what this holds would count as the step's peak
        rates = measure_rates(device)

    print(f"floors at {rates.memory / 1e12:.3f} TB/s, as measured by large copies,")
    print(f"and {rates.arithmetic / 1e12:.2f} TFLOP/s, as measured by a large multiplication:")
    floors = {
        "rollout": rollout_floor(engine.model, samples, settings.cfg, given, chain, rates.memory),
        "update": update_floor(
            engine, samples, given + chain + 1 + images, settings.lora, rates.arithmetic
        ),
    }
    if judge:
        floors["judge"] = judge_floor(judge, batches, rates.arithmetic, rates.memory)
    if hps:
        floors["hps"] = hps_floor(hps, samples, rates.float32)
    _, table = memory(
        size,
        settings.lora,
        gpus=1,
        samples=samples,
        cfg=settings.cfg != 1.0,
        micro_batch=settings.micro_batch,
        kl=True,
        judge_batch=settings.judge_batch,
        judge=judge_size,
        hps=settings.hps,
        tokens=Lengths(given, chain, longest_chain=chain, image=images),
        gpu=gpu,
        # PyTorch does not count the context of CUDA
        context=held_before * 2**30,
    )
    print_phases(phases, floors, table)
    if gpu:
        print(f"peak, table: without the context of CUDA, about {CONTEXT / 2**30:.1f} GiB more")
    else:
        print("peak: most memory of this process so far, of the phases before as well;")
        print(f"table: with {held_before:.2f} GiB that it held before the step")
    if settings.plain:
        engine, judge, hps = None, None, None  # their memory is needed
        time_rollout(Rollout(size, settings.samples, settings.cfg, chain, repeats=1), device)


def print_phases(
    phases: dict[str, Measured], floors: dict[str, float], table: dict[str, float]
) -> None:
    """A line per phase, and one of the step. `floors` are seconds, `table` bytes; a phase without a
    floor shows a dash."""
    print("phase      seconds     floor   peak GiB   table GiB")
    for phase, measured in phases.items():
        floor = f"{floors[phase]:.3f}" if phase in floors else "-"
        planned = table[phase] / 2**30
        print(f"{phase:8} {measured.seconds:9.2f} {floor:>9} {measured.gib:10.2f} {planned:11.2f}")
    seconds = sum(measured.seconds for measured in phases.values())
    most = max(measured.gib for measured in phases.values())
    planned = max(table[phase] for phase in phases) / 2**30
    floor = sum(floors.values())
    print(f"{'step':8} {seconds:9.2f} {floor:9.3f} {most:10.2f} {planned:11.2f}")


def random_engine(size: str, lora: int, device: torch.device) -> trainer.Engine:
    """An engine as train_grpo.py makes it, around random weights. No chain ends before its time."""
    model, tokenizer = random_policy(size, device)
    model.model.vision_model.cpu()  # image understanding stays on the host
    model.model.aligner.cpu()
    forbid_token(model.lm_head, gotr1.special_ids(tokenizer)[2])
    reference = None if lora else copy.deepcopy(model)
    engine = trainer.Engine(
        model if lora else model.float(),
        tokenizer,
        device,
        gotr1.token_logps,
        lora=lora,
        dtype="bfloat16" if device.type == "cuda" else "float32",
        gradient_checkpointing=True,
    )
    if reference is not None:
        engine.keep_reference(reference)
    return engine


def update(engine: trainer.Engine, sampled: gotr1.Rollout, micro_batch: int) -> None:
    """Loss, gradient and optimizer step. Half of the samples are better than the rest."""
    n_tokens = sampled.mask.sum()
    for first in range(0, len(sampled), micro_batch):
        rows = list(range(first, min(first + micro_batch, len(sampled))))
        part = sampled.select(rows)
        logp, mask = engine.score(part)
        gap = engine.score_reference(part)[0] - logp
        advantages = torch.tensor([[1.0 if row % 2 else -1.0] for row in rows], device=mask.device)
        per_token = -(logp - logp.detach()).exp() * advantages + 0.01 * (gap.exp() - gap - 1)
        engine.backward((per_token * mask).sum() / n_tokens)
    engine.step(lr=1e-6, clip_grad=1.0)


def random_judge(size: str, device: torch.device):
    """A Qwen2.5-VL with random weights; 3b and 7b have the published shape."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    shape = JUDGES[size]
    half = shape.width // shape.heads // 2  # of a head
    sides = 3 * half // 8  # a head is split over time, height and width, as 16, 24, 24
    text = {
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.width,
        "intermediate_size": shape.inner_width,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocabulary,
        "rope_scaling": {"type": "default", "mrope_section": [half - 2 * sides, sides, sides]},
        "tie_word_embeddings": size != "7b",
        # no token ends a reply before its time, and the usual ones may be outside the vocabulary
        "bos_token_id": None,
        "eos_token_id": None,
    }
    vision = {
        "depth": shape.eye_layers,
        "hidden_size": shape.eye_width,
        "intermediate_size": 3420 * shape.eye_width // 1280,
        "num_heads": shape.eye_heads,
        "out_hidden_size": shape.width,
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=size != "7b",
        # any four tokens, which a small vocabulary has, too
        image_token_id=1,
        video_token_id=2,
        vision_start_token_id=3,
        vision_end_token_id=4,
    )
    with device, no_init_weights():
        judge = Qwen2_5_VLForConditionalGeneration(config).eval().requires_grad_(False)
    judge.tie_weights()
    fill_randomly(judge, usual_dtype(device), device)
    return judge


def judge_batches(samples: int, judge_batch: int, scoring: str) -> list[tuple]:
    """(rows, call, whether the reply is written) of each batch. With "expected" a mark is read off
    in one pass; boxes are always written."""
    batches = []
    for name, call in JUDGE_CALLS.items():
        is_written = scoring == "reply" or name == "grounding"
        rows = samples * call.rows
        for first in range(0, rows, judge_batch):
            batches.append((min(judge_batch, rows - first), call, is_written))
    return batches


def judge_inputs(config, rows: int, call: JudgeCall, device: torch.device) -> dict:
    """A batch: the picture of each row, then its question."""
    ids = torch.full((rows, call.question), 100, device=device)  # any word
    inputs = {}
    if call.patches:
        image_tokens = call.patches**2 // 4
        picture = torch.full((rows, image_tokens + 2), config.image_token_id, device=device)
        picture[:, 0] = config.vision_start_token_id
        picture[:, -1] = config.vision_end_token_id
        ids = torch.cat([picture, ids], dim=1)
        values = 3 * 2 * 14 * 14  # of a patch: colours, frames, pixels
        inputs["pixel_values"] = torch.randn(rows * call.patches**2, values, device=device)
        grid = [[1, call.patches, call.patches]] * rows
        inputs["image_grid_thw"] = torch.tensor(grid, device=device)
    inputs["input_ids"] = ids
    inputs["attention_mask"] = torch.ones_like(ids)
    inputs["mm_token_type_ids"] = (ids == config.image_token_id).int()
    return inputs


@torch.inference_mode()
def ask_judge(judge, batches: list[tuple], device: torch.device) -> None:
    """A written reply is as long as it may be."""
    from transformers import GenerationConfig

    for rows, call, is_written in batches:
        inputs = judge_inputs(judge.config, rows, call, device)
        if is_written:
            how = GenerationConfig(do_sample=False, max_new_tokens=call.reply, pad_token_id=0)
            judge.generate(**inputs, generation_config=how)
        else:
            judge(**inputs, logits_to_keep=2, use_cache=False)


def hps_config(size: str) -> CLIPConfig:
    """The HPS that goes with a policy: as large as HPS v2.1 (ViT-H/14) for the published sizes,
    tiny for others. A picture has 257 tokens in both."""
    if size in ("1b", "7b"):
        eye = {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16}
        text = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
    else:
        eye = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        text = dict(eye)
    eye["patch_size"] = 14
    for tower in (eye, text):
        tower["intermediate_size"] = 4 * tower["hidden_size"]
        tower["hidden_act"] = "gelu"
    return CLIPConfig(projection_dim=text["hidden_size"], text_config=text, vision_config=eye)


class RandomHPS(HPS):
    """HPS with random weights: no file is read, and all that is timed is HPS's own.

    In float32 on a GPU, too, as training has it. The toy's tokenizer stands for CLIP's: it makes
    about as many tokens of our prompt."""

    def __init__(self, config: CLIPConfig, tokenizer, device: torch.device):
        with device, no_init_weights():
            self.model = CLIPModel(config).eval().requires_grad_(False)
        fill_randomly(self.model, torch.float32, device)
        self.tokenizer = tokenizer
        self.antialias = True


HPS_TOKENS = (224 // 14) ** 2 + 1  # of a picture


def hps_floor(hps: HPS, samples: int, rate: float) -> float:
    """Seconds of the multiplications by the weights of the layers that see the pictures, at `rate`
    per second. Prints the arithmetic. The text, once per prompt, is left out."""
    weights = count(hps.model.vision_model.encoder)
    seconds = 2 * weights * samples * HPS_TOKENS / rate
    terms = f"2 x {weights / 1e6:.1f}e6 weights x {samples} x {HPS_TOKENS} tokens"
    print(f"  hps {terms}, at {rate / 1e12:.2f} TFLOP/s in float32: {seconds:.2f} s")
    return seconds


def update_floor(engine, samples: int, tokens: int, lora: int, rate: float) -> float:
    """Seconds of the multiplications by the layers' weights, `tokens` per sample, at `rate` per
    second. Prints the arithmetic."""
    weights = count(engine.model.model.language_model.layers)
    # forward, again for the backward pass, reference, gradients of what comes in; and of weights
    passes = 4 if lora else 5
    seconds = 2 * passes * weights * samples * tokens / rate
    terms = f"2 x {passes} passes x {weights / 1e6:.1f}e6 weights x {samples} x {tokens} tokens"
    print(f"  update {terms}: {seconds:.2f} s")
    return seconds


def judge_floor(judge, batches: list[tuple], rate: float, bandwidth: float) -> float:
    """Seconds of the multiplications for what is read, and of reading all weights once for each
    token that a batch writes. Prints the arithmetic."""
    text_weights = count(judge.model.language_model.layers)
    eye_weights = count(judge.model.visual.blocks)
    read = parameter_bytes(judge.model.language_model.layers) + parameter_bytes(judge.lm_head)
    work = 0
    written = 0  # tokens
    for rows, call, is_written in batches:
        text = call.question + call.patches**2 // 4
        work += 2 * rows * (text_weights * text + eye_weights * call.patches**2)
        written += call.reply if is_written else 0
    seconds = work / rate + written * read / bandwidth
    print(f"  judge {work / 1e12:.2f} TFLOP + {written} x {read / 1e9:.3f} GB: {seconds:.2f} s")
    return seconds


class Rates(NamedTuple):
    """What this machine does per second."""

    memory: float  # bytes that are read or written in large copies
    arithmetic: float  # operations of a large matrix multiplication, in the step's precision
    float32: float  # the same in float32


def measure_rates(device: torch.device) -> Rates:
    return Rates(
        memory=measure_bandwidth(device),
        arithmetic=measure_arithmetic(device, usual_dtype(device)),
        float32=measure_arithmetic(device, torch.float32),
    )


def measure_arithmetic(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large matrix multiplication."""
    side = 8192 if device.type == "cuda" else 1024
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    matrix @ matrix  # the first one sets the library up
    wait(device)
    start = time.perf_counter()
    for _ in range(10):
        matrix @ matrix
    wait(device)
    return 10 * 2 * side**3 / (time.perf_counter() - start)


def wait(device: torch.device) -> None:
    """Until the GPU has done what it was told to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# -------------------------------------------------------------------------------------------------
# Judge


def time_judge(judge) -> None:
    """Rows per second of each call: one row at a time and 16, with the mark written ("reply") and
    read off the judge's probabilities ("expected"). R_sem is asked for in four marks and in one."""
    boxes = [Box("red ball", 100, 100, 500, 500), Box("blue cube", 500, 500, 900, 900)]
    prompts = ["a red ball above a blue cube"] * 16
    layouts = [boxes] * 16
    images = [draw_boxes(boxes, 384)] * 16
    calls = [
        ("semantic four", prompts, prompts),
        ("semantic one", prompts, prompts),
        ("spatial", prompts, layouts),
        ("alignment", prompts, images),
        ("ground", images, prompts),
    ]
    columns = "reply: 1     16   ratio   expected: 1     16   ratio   expected / reply at 16"
    print(f"rows/s         {columns}")
    for title, first, second in calls:
        name, _, judge.semantic_as = title.partition(" ")
        reply_1 = rows_per_second(judge, name, first, second, scoring="reply", batch_size=1)
        reply_16 = rows_per_second(judge, name, first, second, scoring="reply", batch_size=16)
        mark_1 = rows_per_second(judge, name, first, second, scoring="expected", batch_size=1)
        mark_16 = rows_per_second(judge, name, first, second, scoring="expected", batch_size=16)
        reply = f"{reply_1:9.2f} {reply_16:6.2f} {reply_16 / reply_1:7.1f}"
        mark = f"{mark_1:13.2f} {mark_16:6.2f} {mark_16 / mark_1:7.1f}"
        print(f"{title:13} {reply} {mark} {mark_16 / reply_16:16.1f}")


def rows_per_second(
    judge, name: str, first: list, second: list, *, scoring: str, batch_size: int
) -> float:
    """How fast judge.name(first, second) is with these settings."""
    judge.scoring = scoring
    judge.batch_size = batch_size
    call = getattr(judge, name)
    call(first[:1], second[:1])  # the first call of a kind pays for what later ones reuse
    rows = min(16, 4 * batch_size)
    start = time.perf_counter()
    call(first[:rows], second[:rows])
    return rows / (time.perf_counter() - start)


# -------------------------------------------------------------------------------------------------
# Networks of the evaluation


def time_networks(settings: Networks, device: torch.device) -> None:
    """Pictures per second of each network that is given, one picture at a time and 16.

    Raises FileNotFoundError or ValueError when one of the paths is not such a network."""
    flags = ("detector", "clip", "clip_b32", "blip", "gdino")
    given = [flag for flag in flags if getattr(settings, flag)]
    if not given:
        raise ValueError(f"give the path of a network: --{', --'.join(flags)}")
    noise = np.random.default_rng(0).integers(0, 256, (16, 512, 512, 3), np.uint8)
    images = [Image.fromarray(array) for array in noise]
    # all are loaded before the first is timed: a wrong path is found at once
    networks = {flag: load_network(settings, flag, device) for flag in given}
    print(f"pictures/s of 512 x 512 on {device}    batch 1   batch 16   ratio")
    for flag, (network, look) in networks.items():
        network.batch_size = 1
        one = pictures_per_second(look, images)
        network.batch_size = 16
        many = pictures_per_second(look, images)
        print(f"{flag:34} {one:8.2f}   {many:8.2f}   {many / one:5.2f}")


def load_network(settings: Networks, flag: str, device: torch.device) -> tuple:
    """(network, function): the network of a flag, and how it looks at a list of pictures."""
    from evaluation.compbench import BlipVQA, GroundingDino
    from evaluation.geneval import Mask2Former
    from evaluation.networks import Clip

    path = getattr(settings, flag)
    if flag == "detector":
        detector = Mask2Former(path, device)
        return detector, detector
    if flag == "blip":
        blip = BlipVQA(path, device, tokenizer=settings.blip_tokenizer)
        return blip, lambda images: blip(images, [["a red ball?"]] * len(images))
    if flag == "gdino":
        gdino = GroundingDino(path, device)
        return gdino, lambda images: gdino(images, [["cat", "tree"]] * len(images))
    clip = Clip(path, flag, device)
    return clip, clip.images


def pictures_per_second(look: Callable, images: list[Image.Image]) -> float:
    look(images)  # the first call pays for what later ones reuse
    start = time.perf_counter()
    look(images)
    return len(images) / (time.perf_counter() - start)


# -------------------------------------------------------------------------------------------------
# Memory, computed from the published configurations

HPS_PARAMETERS = 986_109_441  # HPS v2.1 is a CLIP ViT-H/14
CONTEXT = 0.6 * 2**30  # of CUDA and its libraries on each GPU: assumed, not computed


class Lengths(NamedTuple):
    """Tokens of a sample."""

    prompt: int
    chain: int
    longest_chain: int  # that the cache has room for
    image: int


USUAL_LENGTHS = Lengths(prompt=60, chain=250, longest_chain=600, image=576)


def memory(
    size: str,
    lora: int,
    gpus: int,
    samples: int,
    cfg: bool,
    micro_batch: int,
    kl: bool,
    judge_batch: int = 16,
    judge: str = "7b",
    hps: bool = True,
    tokens: Lengths = USUAL_LENGTHS,
    gpu: bool = True,
    context: float = CONTEXT,
) -> tuple[dict[str, float], dict[str, float]]:
    """(by what they are for, by phase of a step with all that is always held): bytes on each GPU
    that training with gradient checkpointing takes.

    size: of the policy, see `policy_config`. judge: one of JUDGES, or "none".
    lora: the adapter's rank; 0 trains all weights.
    samples: drawn at a time on each GPU, of so many `tokens`.
    judge_batch: rows that are judged at a time.
    gpu: in bfloat16; False: in float32 on the host, where all of Janus lies, and no cache stays.

    The entry "most" of the first is the largest of the second."""
    config = policy_config(size)
    number_bytes = 2 if gpu else 4
    with torch.device("meta"):  # shapes only
        model = JanusForConditionalGeneration(config)
        trained = sum(parameter.numel() for parameter in trainable_parameters(model))
        frozen = count(model.model.vqmodel) if gpu else count(model) - trained
        adapter = 0
        shared = 0  # copies of the adapter's A, see engine/decode.py
        if lora:
            add_lora(model, lora, alpha=32.0, adapter=None, base="toy")
            adapter = sum(part.numel() for part in model.parameters() if part.requires_grad)
            for name, part in model.named_parameters():
                shared += part.numel() if "lora_A" in name else 0
    if lora:
        parts = lora_bytes(trained, adapter, frozen, number_bytes)
    else:
        parts = full_bytes(trained, frozen, gpus, kl, number_bytes)
    text = config.text_config
    parts["weights"] += 4 * shared
    bucket = 128 if gpu else 1  # see `decode.Decoder`
    parts["cache"] = cache_bytes(text, samples, cfg, tokens, number_bytes, bucket)
    parts["prefill"] = prefill_bytes(text, samples, tokens, number_bytes) if cfg else 0
    parts["pictures"] = picture_bytes(config, samples, tokens)
    parts["activations"] = activation_bytes(text, micro_batch, tokens, number_bytes)
    judge_weights, judging = judge_bytes(judge, judge_batch, number_bytes)
    hps_weights, scoring = hps_bytes(size, samples) if hps else (0, 0)
    parts["judge"] = judge_weights + hps_weights
    parts["judging"] = judging
    parts["scoring"] = scoring
    parts["context"] = context

    # The phases of a step take turns: what was gathered is gone after the rollout, and so is the
    # cache, except under LoRA on a GPU, which keeps it for the next rollout
    kept = parts["cache"] if lora and gpu else 0
    always = ("weights", "gradients", "AdamW", "reference", "judge", "context")
    held = sum(parts[name] for name in always)
    phases = {
        "rollout": held + parts["gathered"] + parts["cache"] + parts["prefill"],
        "decode": held + kept + parts["pictures"],
        "judge": held + kept + parts["judging"],
        "hps": held + kept + parts["scoring"],
        "update": held + kept + parts["activations"],
    }
    parts["most"] = max(phases.values())
    return parts, phases


def lora_bytes(trained: int, adapter: int, frozen: int, number_bytes: int) -> dict[str, float]:
    """What an adapter needs, the same on every GPU. `trained` are the weights it is added to, of
    `number_bytes` each."""
    return {
        "weights": number_bytes * trained + 4 * (frozen + adapter),  # what is small is float32
        "gathered": 0,  # nothing is sharded
        "gradients": 4 * adapter,  # float32
        "AdamW": 8 * adapter,  # two float32 moments
        "reference": 0,  # the same weights with the adapter switched off
    }


def full_bytes(
    trained: int, frozen: int, gpus: int, kl: bool, number_bytes: int
) -> dict[str, float]:
    """What training all weights needs on each of the GPUs that share it. The forward pass takes
    numbers of `number_bytes`: those of 2 are a copy, those of 4 the weights themselves."""
    return {
        "weights": 4 * trained / gpus + 4 * frozen,  # float32 shards; what is frozen is whole
        # whole for the rollout; the update takes one layer
        "gathered": number_bytes * trained if number_bytes == 2 else 0,
        "gradients": 4 * trained / gpus,  # float32
        "AdamW": 8 * trained / gpus,  # two float32 moments
        "reference": number_bytes * trained / gpus if kl else 0,
    }


def token_bytes(config, number_bytes: int) -> int:
    """Keys and values of one token; `config` is a language model's."""
    head_dim = config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * number_bytes


def cache_bytes(
    config, samples: int, cfg: bool, tokens: Lengths, number_bytes: int, bucket: int
) -> int:
    """The cache for a prompt, the longest chain with its end, and a picture, rounded up to whole
    buckets of columns."""
    columns = tokens.prompt + tokens.longest_chain + 1 + tokens.image
    columns = -(-columns // bucket) * bucket
    rows = 2 * samples if cfg else samples  # guidance: conditional and unconditional
    return rows * columns * token_bytes(config, number_bytes)


def prefill_bytes(config, samples: int, tokens: Lengths, number_bytes: int) -> int:
    """Keys and values of the unconditional rows, before they are copied into the cache: when all
    chains are of other lengths, up to the longest."""
    return samples * (tokens.prompt + tokens.longest_chain) * token_bytes(config, number_bytes)


def picture_bytes(config, samples: int, tokens: Lengths) -> int:
    """Pictures that are decoded at a time (see `gotr1.decode_images`): in the last block three
    float32 tensors of all pixels and `base_channels` are there at once."""
    pixels = config.vision_config.image_size**2
    at_once = min(samples, 32, max(1, 8 * 576 // tokens.image))
    return at_once * 3 * pixels * config.vq_config.base_channels * 4


def activation_bytes(config, micro_batch: int, tokens: Lengths, number_bytes: int) -> int:
    """What gradient checkpointing keeps, one vector (D,) per token and layer; and the float32
    logits of a chunk of 1024 tokens three times."""
    length = tokens.prompt + tokens.chain + tokens.image
    kept = micro_batch * length * config.hidden_size * config.num_hidden_layers * number_bytes
    return kept + 3 * 1024 * config.vocab_size * 4


def judge_bytes(size: str, rows: int, number_bytes: int) -> tuple[int, int]:
    """(weights, what `rows` rows take while they are judged) of one of JUDGES; nothing of "none".

    A row has about 500 tokens of question and picture and writes 200. It needs keys and values of
    all, and three times the widest activation of the question: gate, up and their product."""
    if size == "none":
        return 0, 0
    judge = random_judge(size, torch.device("meta"))  # shapes only
    config = judge.config.text_config
    question, reply = 500, 200
    cache = rows * (question + reply) * token_bytes(config, number_bytes)
    activations = 3 * rows * question * config.intermediate_size * number_bytes
    return number_bytes * count(judge), cache + activations


def hps_bytes(size: str, pictures: int) -> tuple[int, int]:
    """(weights, what so many pictures take at once) of the HPS that goes with a policy: float32,
    with the widest activation twice, before and after its nonlinearity."""
    config = hps_config(size)
    with torch.device("meta"):  # shapes only
        weights = 4 * count(CLIPModel(config))
    return weights, 2 * pictures * HPS_TOKENS * config.vision_config.intermediate_size * 4


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def print_memory(settings: Memory) -> None:
    """The table of docs/gpu.md."""
    rows = [  # size, rank of the adapter (0: all weights), GPUs
        ("1b", 0, 1),
        ("1b", 0, 8),
        ("1b", 32, 1),
        ("7b", 32, 1),
        ("7b", 32, 8),
        ("7b", 0, 1),
        ("7b", 0, 8),
    ]
    drawn = f"{settings.samples} samples at a time with guidance"
    print(f"GiB on each GPU, bfloat16, {drawn}, update in micro-batches of {settings.micro_batch}")
    for k, (size, lora, gpus) in enumerate(rows):
        parts, _ = memory(
            size,
            lora,
            gpus,
            samples=settings.samples,
            cfg=True,
            micro_batch=settings.micro_batch,
            kl=True,
            judge_batch=settings.judge_batch,
        )
        if k == 0:
            titles = "".join(f"{name:>12}" for name in parts)
            print(f"{'size':5}{'trained':9}{'GPUs':>4} {titles}")
        mode = f"LoRA {lora}" if lora else "full"
        cells = "".join(f"{value / 2**30:12.1f}" for value in parts.values())
        print(f"{size:5}{mode:9}{gpus:4} {cells}")


# -------------------------------------------------------------------------------------------------
# What fits into a GPU: how much is taken at a time, by the table above

HEADROOM = 0.9  # share of a GPU that is planned: fragmentation, libraries


# What is taken at a time when there is no table to ask: prompts, samples, rows
USUAL_SIZES = {"rollout_batch": 1, "micro_batch": 4, "judge_batch": 16}


@functools.cache
def most_bytes(
    size: str, lora: int, gpus: int, samples: int, micro_batch: int, judge_batch: int
) -> dict:
    """`memory` with guidance and KL; a row of the table takes a second."""
    return memory(size, lora, gpus, samples, True, micro_batch, True, judge_batch)[0]


def size_of(model) -> str:
    """ "1b" or "7b" for a model of a published shape, else ""."""
    for size in ("1b", "7b"):
        published = janus_pro_config(size).text_config
        config = model.config.text_config
        if (config.hidden_size, config.num_hidden_layers) == (
            published.hidden_size,
            published.num_hidden_layers,
        ):
            return size
    return ""


def gpu_bytes(device: torch.device) -> int:
    """Memory of a GPU; 0 for anything else."""
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).total_memory


def choose_sizes(
    size: str,
    lora: int,
    gpus: int,
    group: int,
    prompts: int,
    judge_here: bool,
    total: float,
    given: dict[str, int],
) -> tuple[dict[str, int], float]:
    """The largest sizes that the table allows on GPUs of `total` bytes, and the bytes that they
    take. `prompts` prompts of `group` samples are drawn per step and GPU; the names in `given` are
    those of USUAL_SIZES, and what is not 0 there stays.

    Decoding is paid per token, not per sample, so prompts at a time come first; then rows of the
    judge, then samples of the update. When nothing fits, sizes are 1, and the bytes are more than
    `total`."""

    def planned(sizes: dict[str, int]) -> float:
        samples = sizes["rollout_batch"] * group
        rows = sizes["judge_batch"] if judge_here else 0
        parts = most_bytes(size, lora, gpus, samples, sizes["micro_batch"], rows)
        elsewhere = 0 if judge_here else parts["judge"] - 4 * HPS_PARAMETERS  # HPS stays
        return parts["most"] - elsewhere

    ladders = {
        "rollout_batch": [number for number in (8, 4, 2) if number <= prompts],
        "judge_batch": [64, 32, 16, 8, 4, 2],
        "micro_batch": [16, 8, 4, 2],
    }
    chosen = {name: number or 1 for name, number in given.items()}
    for name, ladder in ladders.items():
        if given[name]:
            continue
        for number in ladder:
            if planned(chosen | {name: number}) <= HEADROOM * total:
                chosen[name] = number
                break
    return chosen, planned(chosen)


# -------------------------------------------------------------------------------------------------
# Command line


def load_judge(settings: Judge):
    """The judge, in this process.

    Raises ValueError for the address of a server, whose speed depends on who else asks it, and
    OSError or ValueError when there is no such judge."""
    if settings.judge.startswith(("http://", "https://")):
        problem = "a server's judge is not timed here: give a folder or hub id"
        raise ValueError(f"--judge {settings.judge}: {problem}")
    flags = rewards.JudgeConfig(judge=settings.judge, hps="")
    return rewards.load_judge(flags, settings.device)[0]


def main(argv: list[str] | None = None) -> None:
    settings = run.parse_args(Rollout | Step | Judge | Networks | Memory, __doc__, argv)
    try:
        if isinstance(settings, Rollout):
            run.check_ranges(settings, at_least_one="samples repeats", not_negative="cfg chain")
            time_rollout(settings, run.start_processes()[2])
        elif isinstance(settings, Step):
            run.check_ranges(
                settings,
                at_least_one="prompts samples micro_batch judge_batch",
                not_negative="lora cfg chain",
            )
            time_step(settings, run.start_processes()[2])
        elif isinstance(settings, Judge):
            run.check_ranges(settings, at_least_one="pictures tokens")
            judge = load_judge(settings)
            time_judge(judge)
        elif isinstance(settings, Networks):
            time_networks(settings, run.start_processes()[2])
        else:
            run.check_ranges(settings, at_least_one="samples micro_batch judge_batch")
            print_memory(settings)
    except (OSError, ValueError, RuntimeError) as problem:
        run.fail(" ".join(str(problem).split()))


if __name__ == "__main__":
    main()
