"""How fast the parts are on this machine, and how much memory training takes on a GPU.

    python -m benchmarks.speed rollout --size 1b         # our rollout beside a straightforward one
    python -m benchmarks.speed judge --judge FOLDER      # rows per second of the judge's four calls
    python -m benchmarks.speed networks --detector FILE  # pictures per second of a scoring network
    python -m benchmarks.speed memory                    # GiB per GPU, computed without loading

The rollout is timed with random weights: how long a step takes does not depend on their values.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from transformers import GenerationConfig, JanusConfig, JanusForConditionalGeneration
from transformers.initialization import no_init_weights

import gotr1
from engine import run
from engine.checkpoints import TOY, janus_pro_config, load_policy
from engine.trainer import add_lora, trainable_parameters
from render_boxes import Box, draw_boxes
from rewards import QwenJudge, Reply, Row, Seen

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
    """(model, the toy's tokenizer) with random weights: Janus-Pro's "1b" or "7b", or "small", which
    has about the 1B's proportions. bfloat16 on GPUs, float32 elsewhere."""
    config = small_config() if size == "small" else janus_pro_config(size)
    with device, no_init_weights():
        model = JanusForConditionalGeneration(config).eval()
    # only the parameters are cast: the model's buffers (rotary frequencies) stay float32
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.data = torch.randn(parameter.shape, dtype=dtype, device=device) * 0.02
        if "norm" in name:
            parameter.data += 1
    return model, load_policy("toy")[1]


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
    """Bytes per second that the GPU's memory reads or writes while it copies 4 GiB 10 times."""
    source, target = torch.zeros(2, 2**32, dtype=torch.uint8, device=device)
    torch.cuda.synchronize(device)  # the zeros are written
    start = time.perf_counter()
    for _ in range(10):
        target.copy_(source)
    torch.cuda.synchronize(device)
    copied = 10 * 2 * 2**32  # each byte is read and written
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


class PlainJudge(QwenJudge):
    """The straightforward way to write replies, to be timed and to be tested against.

    Each row sends its picture through the vision tower, rows come in the order of the questions,
    and transformers' `generate` sees all rows of a batch to the end of its longest reply."""

    def write(self, questions):
        return self._in_batches(self._generate, questions)

    def _generate(self, questions):
        inputs = {}
        rows = [Row(question, None) for question in questions]
        if questions[0].image is not None:
            rgb = [question.image.convert("RGB") for question in questions]
            inputs.update(self.image_processor(rgb, return_tensors="pt"))
            patches_per_token = self.image_processor.merge_size**2
            for i, grid in enumerate(inputs["image_grid_thw"].tolist()):
                count = grid[1] * grid[2] // patches_per_token
                rows[i] = Row(questions[i], Seen(tuple(grid), range(count), []))
        texts, frames = self._inputs(rows)
        for name in ("input_ids", "attention_mask"):
            inputs[name] = texts[name]
        inputs["mm_token_type_ids"] = (
            inputs["input_ids"] == self.model.config.image_token_id
        ).int()
        for name, tensor in inputs.items():
            inputs[name] = tensor.to(self.model.device)
        settings = GenerationConfig(
            do_sample=False,
            eos_token_id=self.ends,
            pad_token_id=self.tokenizer.pad_token_id,
            max_new_tokens=questions[0].max_tokens,
        )
        with torch.inference_mode():
            self.model.generation_config = settings
            ids = self.model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
        ended = torch.isin(ids, torch.tensor(self.ends, device=ids.device)).any(dim=1).tolist()
        replies = []
        for row, is_whole, frame in zip(ids, ended, frames, strict=True):
            text = self.tokenizer.decode(row, skip_special_tokens=True)
            replies.append(Reply(text if is_whole else text + "…", frame))
        return replies


def time_pictures(judge: QwenJudge, pictures: int, tokens: int) -> None:
    """Alignment and grounding of pictures with three names each, straightforward and ours.

    A judge with random weights ends no reply by itself: all have as many tokens as are allowed."""
    noise = np.random.default_rng(0).integers(0, 256, (pictures, 384, 384, 3), np.uint8)
    images = [Image.fromarray(array) for array in noise]
    names = ["red ball", "blue cube", "green cup"]
    rows = pictures * (1 + len(names))
    through_tower = 0

    def count(module, inputs, keywords, output):
        nonlocal through_tower
        through_tower += len(keywords["grid_thw"])

    hook = judge.model.model.visual.register_forward_hook(count, with_kwargs=True)
    loaded = (judge.model, judge.tokenizer, judge.image_processor)
    words = []
    seconds = []
    asked_for = f"{rows} rows of alignment and grounding, at most {tokens} tokens each"
    print(f"\n{pictures} pictures, three names each: {asked_for}")
    for title, kind in (("straightforward", PlainJudge), ("ours", QwenJudge)):
        asked = kind(loaded, device=judge.model.device)
        asked.most_tokens = tokens
        asked.alignment(names[:1], images[:1])  # the first call pays for what later ones reuse
        asked.seen.clear()
        through_tower = 0
        start = time.perf_counter()
        asked.alignment(["a red ball, a blue cube, a green cup"] * pictures, images)
        asked.ground([image for image in images for _ in names], names * pictures)
        seconds.append(time.perf_counter() - start)
        words.append(asked.words["pi"] + asked.words["ri"])
        tower = f"{through_tower} pictures through the vision tower"
        print(f"{title:16} {seconds[-1]:7.2f} s, {rows / seconds[-1]:6.2f} rows/s, {tower}")
    hook.remove()
    equal = sum(one == other for one, other in zip(*words, strict=True))
    print(f"ratio {seconds[0] / seconds[1]:.2f}; {equal} of {rows} replies are equal")


# -------------------------------------------------------------------------------------------------
# Networks of the benchmarks


def time_networks(settings: Networks, device: torch.device) -> None:
    """Pictures per second of each network that is given, one picture at a time and 16.

    Raises FileNotFoundError or ValueError when one of the paths is not such a network."""
    flags = ("detector", "clip", "clip_b32", "blip", "gdino")
    given = [flag for flag in flags if getattr(settings, flag)]
    if not given:
        raise ValueError(f"give the path of a network: --{', --'.join(flags)}")
    noise = np.random.default_rng(0).integers(0, 256, (16, 512, 512, 3), np.uint8)
    images = [Image.fromarray(array) for array in noise]
    print(f"pictures/s of 512 x 512 on {device}    batch 1   batch 16   ratio")
    for flag in given:
        one = pictures_per_second(load_network(settings, flag, device, batch_size=1), images)
        many = pictures_per_second(load_network(settings, flag, device, batch_size=16), images)
        print(f"{flag:34} {one:8.2f}   {many:8.2f}   {many / one:5.2f}")


def load_network(
    settings: Networks, flag: str, device: torch.device, batch_size: int
) -> Callable[[list[Image.Image]], list]:
    """The network of a flag, as a function of pictures."""
    from benchmarks.compbench import BlipVQA, GroundingDino
    from benchmarks.geneval import Mask2Former
    from benchmarks.networks import Clip

    path = getattr(settings, flag)
    if flag == "detector":
        return Mask2Former(path, device, batch_size)
    if flag == "blip":
        blip = BlipVQA(path, device, batch_size, settings.blip_tokenizer)
        return lambda images: blip(images, [["a red ball?"]] * len(images))
    if flag == "gdino":
        gdino = GroundingDino(path, device, batch_size)
        return lambda images: gdino(images, [["cat", "tree"]] * len(images))
    return Clip(path, flag, device, batch_size).images


def pictures_per_second(network: Callable, images: list[Image.Image]) -> float:
    network(images)  # the first call pays for what later ones reuse
    start = time.perf_counter()
    network(images)
    return len(images) / (time.perf_counter() - start)


# -------------------------------------------------------------------------------------------------
# Memory, computed from the published configurations

HPS_PARAMETERS = 986_109_441  # HPS v2.1 is a CLIP ViT-H/14


def memory(
    size: str, lora: int, gpus: int, samples: int, cfg: bool, micro_batch: int, kl: bool
) -> dict[str, float]:
    """Bytes on each GPU, by what they are for: bfloat16 training of a published size with gradient
    checkpointing. `lora` is the adapter's rank, 0 trains all weights.

    `samples` are drawn at a time on each GPU, each with 60 prompt, 250 chain and 576 image tokens;
    the cache has room for chains of 600 tokens. "most" is the most that is held at one time."""
    with torch.device("meta"):  # shapes only
        model = JanusForConditionalGeneration(janus_pro_config(size))
        trained = sum(parameter.numel() for parameter in trainable_parameters(model))
        adapter = 0
        if lora:
            add_lora(model, lora, alpha=32.0, adapter=None, base="toy")
            adapter = sum(part.numel() for part in model.parameters() if part.requires_grad)
    vq = count(model.model.vqmodel)
    parts = lora_bytes(trained, adapter, vq) if lora else full_bytes(trained, vq, gpus, kl)
    parts["cache"] = cache_bytes(model.config.text_config, samples, cfg)
    parts["activations"] = activation_bytes(model.config.text_config, micro_batch)
    parts["judge"] = 2 * judge_parameters() + 2 * HPS_PARAMETERS  # bfloat16

    # rollout and update take turns: what was gathered is gone during the update, and so is the
    # cache, except under LoRA, which keeps it for the next rollout
    rollout = parts["gathered"] + parts["cache"]
    update = parts["activations"]
    if lora:
        update += parts["cache"]
    always = sum(parts.values()) - parts["gathered"] - parts["cache"] - parts["activations"]
    parts["most"] = always + max(rollout, update)
    return parts


def lora_bytes(trained: int, adapter: int, vq: int) -> dict[str, float]:
    """What an adapter needs, the same on every GPU. `trained` are the weights it is added to."""
    return {
        "weights": 2 * trained + 4 * (vq + adapter),  # bfloat16; what is small is float32
        "gathered": 0,  # nothing is sharded
        "gradients": 4 * adapter,  # float32
        "AdamW": 8 * adapter,  # two float32 moments
        "reference": 0,  # the same weights with the adapter switched off
    }


def full_bytes(trained: int, vq: int, gpus: int, kl: bool) -> dict[str, float]:
    """What training all weights needs on each of the GPUs that share it."""
    return {
        "weights": 4 * trained / gpus + 4 * vq,  # float32 shards; the picture tokenizer is whole
        "gathered": 2 * trained,  # bfloat16, whole for the rollout; the update takes one layer
        "gradients": 4 * trained / gpus,  # float32
        "AdamW": 8 * trained / gpus,  # two float32 moments
        "reference": 2 * trained / gpus if kl else 0,  # bfloat16
    }


def cache_bytes(config, samples: int, cfg: bool) -> int:
    """Keys and values in bfloat16, for a prompt of 60 tokens, a chain of 600 with its end, and a
    picture, rounded up to columns of 128. `config` is the language model's."""
    columns = -(-(60 + 601 + 576) // 128) * 128
    rows = 2 * samples if cfg else samples  # guidance: conditional and unconditional
    return 2 * config.num_hidden_layers * rows * columns * config.hidden_size * 2


def activation_bytes(config, micro_batch: int) -> int:
    """What gradient checkpointing keeps, one bfloat16 vector (D,) per token and layer; and the
    float32 logits of a chunk of 1024 tokens three times."""
    tokens = 60 + 250 + 576
    kept = micro_batch * tokens * config.hidden_size * config.num_hidden_layers * 2
    return kept + 3 * 1024 * config.vocab_size * 4


def judge_parameters() -> int:
    """Of Qwen2.5-VL-7B-Instruct, from the numbers of its config.json."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    }
    vision = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
    }
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    with torch.device("meta"):
        return count(Qwen2_5_VLForConditionalGeneration(config))


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
        parts = memory(
            size,
            lora,
            gpus,
            samples=settings.samples,
            cfg=True,
            micro_batch=settings.micro_batch,
            kl=True,
        )
        if k == 0:
            titles = "".join(f"{name:>13}" for name in parts)
            print(f"{'size':5}{'trained':9}{'GPUs':>4} {titles}")
        mode = f"LoRA {lora}" if lora else "full"
        cells = "".join(f"{value / 2**30:13.1f}" for value in parts.values())
        print(f"{size:5}{mode:9}{gpus:4} {cells}")


# -------------------------------------------------------------------------------------------------
# Command line


def load_judge(settings: Judge):
    if settings.judge == "toy":
        from toy.world import ToyJudge

        return ToyJudge()
    judge = QwenJudge(settings.judge, settings.device)
    judge.try_out()
    return judge


def main(argv: list[str] | None = None) -> None:
    settings = run.parse_args(Rollout | Judge | Networks | Memory, __doc__, argv)
    try:
        if isinstance(settings, Rollout):
            run.check_ranges(settings, at_least_one="samples repeats", not_negative="cfg chain")
            time_rollout(settings, run.start_processes()[2])
        elif isinstance(settings, Judge):
            run.check_ranges(settings, at_least_one="pictures tokens")
            judge = load_judge(settings)
            time_judge(judge)
            if settings.judge != "toy":
                time_pictures(judge, settings.pictures, settings.tokens)
        elif isinstance(settings, Networks):
            time_networks(settings, run.start_processes()[2])
        else:
            run.check_ranges(settings, at_least_one="samples micro_batch")
            print_memory(settings)
    except (OSError, ValueError, RuntimeError) as problem:
        run.fail(" ".join(str(problem).split()))


if __name__ == "__main__":
    main()
