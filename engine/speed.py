"""How fast a rollout is, how much memory training takes, and random checkpoints to try a run with.

    python -m engine.speed rollout --size 1b          # our rollout beside the plain one
    python -m engine.speed memory                     # GiB per GPU, computed without loading
    python -m engine.speed checkpoints OUT --size 1b  # a policy and a judge for train_grpo.py

Rollout and checkpoints have random weights: how long they take does not depend on the values.
"""

import inspect
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from transformers import (
    JanusConfig,
    JanusForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
)
from transformers.initialization import no_init_weights

import gotr1
import rewards
from engine import run
from engine.checkpoints import TOY, janus_pro_config
from engine.trainer import add_lora, trainable_parameters


@dataclass
class Rollout:
    """Our rollout beside the plain one, with the same random weights, and the least it can take."""

    size: Literal["tiny", "small", "1b", "7b"] = "small"  # of the model
    samples: int = 16  # of one prompt
    cfg: float = 5.0  # guidance
    chain: int = 0  # tokens of every chain; 0: 250, for small 62, for tiny 8
    repeats: int = 3  # timed runs of each; on a GPU the plain one runs once


@dataclass
class Memory:
    """GiB on each GPU for the published sizes, with a judge of 7B here or elsewhere."""

    rollout_batch: int = 1  # prompts that a GPU draws at a time, 16 samples each
    micro_batch: int = 4  # samples per pass of the update
    judge_batch: int = 64  # queries that the judge takes at a time


@dataclass
class Checkpoints:
    """Random weights in the published formats: OUT/policy for --model, OUT/judge for --judge."""

    out: str  # new folder
    size: Literal["tiny", "small", "1b", "7b"] = "small"  # of the policy
    judge: Literal["small", "7b"] = "small"  # size of the judge


# ------------------------------------------------------------------------------------------------
# Random networks


def policy_config(size: str) -> JanusConfig:
    """Janus-Pro's "1b" or "7b"; "small", which has about the 1B's proportions; "tiny", the toy."""
    if size in ("1b", "7b"):
        return janus_pro_config(size)
    settings = json.loads((TOY / "config.json").read_text())
    settings["text_config"]["max_position_embeddings"] = 2048  # room for a chain of 600 tokens
    if size == "small":
        settings["text_config"].update(
            num_hidden_layers=8,
            hidden_size=512,
            intermediate_size=1408,
            num_attention_heads=8,
            num_key_value_heads=8,
            head_dim=64,
            vocab_size=8192,
        )
        settings["vision_config"].update(image_size=48, projection_dim=512)
        settings["vq_config"].update(
            num_embeddings=1024, image_token_embed_dim=512, projection_dim=512
        )
    return JanusConfig(**settings)


def judge_config(size: str) -> Qwen2_5_VLConfig:
    """The shape of Qwen2.5-VL, "7b" or "small"."""
    text = {
        "num_hidden_layers": 28,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    }
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
    rotary_pairs = [16, 24, 24]  # of a head, for time, height and width
    if size == "small":
        text = {
            "num_hidden_layers": 4,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": JUDGE_VOCABULARY,
        }
        vision = {"depth": 4, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4}
        rotary_pairs = [8, 12, 12]
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 1e6,
        "mrope_section": rotary_pairs,
    }
    # defaults that a small vocabulary does not have; the generation config names the ends
    text["bos_token_id"] = None
    text["eos_token_id"] = None
    vision["out_hidden_size"] = text["hidden_size"]
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)


def random_network(network_class, config, dtype: torch.dtype, device="cpu"):
    """A network with small random weights; those of norms are about 1."""
    torch.manual_seed(0)
    with torch.device(device), no_init_weights():  # memory is reserved, but not written to
        network = network_class(config).eval()
    for name, parameter in network.named_parameters():
        values = torch.randn(parameter.shape, dtype=dtype, device=device) * 0.02
        parameter.data = values + 1 if "norm" in name else values
    return network


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# ------------------------------------------------------------------------------------------------
# Rollout: beside the plain one on the same weights, and above the floor of the memory


def time_rollout(settings: Rollout, device: torch.device) -> None:
    """Times both rollouts of one prompt and prints what was measured.

    With random weights a chain could end anywhere. So <begin_of_image> is taken out of the logits:
    in both rollouts all chains have the same number of tokens and are then ended."""
    gpu = device.type == "cuda"
    chain = settings.chain or {"tiny": 8, "small": 62}.get(settings.size, 250)
    prompt = "a red ball left of a blue cube " * 6
    dtype = torch.bfloat16 if gpu else torch.float32
    config = policy_config(settings.size)
    model = random_network(JanusForConditionalGeneration, config, dtype, device)
    tokenizer = gotr1.load_policy("toy")[1]
    forbid_token(model.lm_head, gotr1.special_ids(tokenizer)[2])
    images = gotr1.image_token_count(model)
    given = len(gotr1.encode_prompt(tokenizer, prompt))
    u = gotr1.uniforms(0, [0], settings.samples, images + chain).to(device)

    # both end with a copy to the host: a GPU has finished by then
    def plain() -> torch.Tensor:
        drawn = gotr1.plain_rollout(model, tokenizer, prompt, settings.cfg, u, chain)
        return torch.cat([drawn["chain_ids"], drawn["image_tokens"]], dim=1).cpu()

    def ours() -> torch.Tensor:
        drawn = gotr1.rollout(
            model, tokenizer, [prompt], settings.samples, settings.cfg, max_chain=chain
        )
        return torch.cat([drawn.chain_ids, drawn.image_tokens], dim=1).cpu()

    name = torch.cuda.get_device_name(device) if gpu else f"{torch.get_num_threads()} CPU threads"
    text = config.text_config
    shape = f"{text.num_hidden_layers} layers of width {text.hidden_size}"
    print(f"{settings.size}: {shape}, random weights, on {name}")
    tokens = f"each {chain} + 1 chain and {images} image tokens"
    print(f"{settings.samples} samples of a prompt of {given} tokens, {tokens}, cfg {settings.cfg}")

    first_seconds, _ = time_median(ours, repeats=1)
    print(f"first {first_seconds:8.2f} s, graphs are recorded on a GPU")
    # the plain one takes minutes for the real sizes
    plain_seconds, plain_tokens = time_median(plain, repeats=1 if gpu else settings.repeats)
    print(f"plain {plain_seconds:8.2f} s")
    our_seconds, our_tokens = time_median(ours, repeats=settings.repeats)
    print(f"ours  {our_seconds:8.2f} s, {settings.samples / our_seconds:.2f} samples per second")
    same = int((plain_tokens == our_tokens).all(dim=1).sum())
    equal = f"{same} of {settings.samples} samples have the same tokens"
    print(f"ratio {plain_seconds / our_seconds:8.1f}; {equal}")

    bandwidth = measure_bandwidth(device)
    print(f"floor, at {bandwidth / 1e12:.3f} TB/s as measured by large copies:")
    floor = rollout_floor(model, settings.samples, settings.cfg, given, chain, bandwidth)
    print(f"  {floor:.2f} s in all: {floor / our_seconds:.0%} of what ours takes")


def time_median(function: Callable, repeats: int) -> tuple[float, torch.Tensor]:
    """(median of the seconds, last result)."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds)), result


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
    target[0].item()  # waits until a GPU has copied
    start = time.perf_counter()
    for _ in range(10):
        target.copy_(source)
    target[0].item()
    return 10 * 2 * size / (time.perf_counter() - start)  # each byte is read and written


def rollout_floor(
    model, samples: int, cfg: float, prompt: int, chain: int, bandwidth: float
) -> float:
    """Seconds that a rollout takes at least: every token reads the weights that it uses, and the
    keys and values of what its rows have seen so far. Prints the arithmetic.

    `prompt` and `chain` are counts of tokens, `bandwidth` is in bytes per second."""
    lm = model.model.language_model
    images = gotr1.image_token_count(model)
    number_bytes = model.lm_head.weight.element_size()
    kv_bytes = number_bytes * kv_numbers(model.config.text_config)
    rows = samples if cfg == 1.0 else 2 * samples  # guidance: conditional and unconditional

    # bytes per token; a row has seen half of the chain, or of the image, on average
    layers = count(lm.layers) + count(lm.norm)
    image_heads = count(model.model.generation_head) + count(model.model.generation_aligner)
    chain_weights = number_bytes * (layers + count(model.lm_head))
    chain_cache = samples * (prompt + chain / 2) * kv_bytes
    image_weights = number_bytes * (layers + image_heads)
    image_cache = rows * (prompt + chain + images / 2) * kv_bytes

    chain_seconds = chain * (chain_weights + chain_cache) / bandwidth
    image_seconds = images * (image_weights + image_cache) / bandwidth
    sizes = f"{chain_weights / 1e9:.2f} GB of weights + {chain_cache / 1e9:.2f} GB of cache"
    print(f"  chain: {chain} tokens x ({sizes}): {chain_seconds:.2f} s")
    sizes = f"{image_weights / 1e9:.2f} GB of weights + {image_cache / 1e9:.2f} GB of cache"
    print(f"  image: {images} tokens x ({sizes}): {image_seconds:.2f} s")
    return chain_seconds + image_seconds


def kv_numbers(config) -> int:
    """Keys and values of one token; `config` is a language model's."""
    head_dim = config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim


# ------------------------------------------------------------------------------------------------
# Memory, computed from the published configurations

PROMPTS = 8  # of a step, over all GPUs
GROUP = 16  # samples per prompt
PROMPT_TOKENS = 60
CHAIN_TOKENS = 600  # of the longest chain in `--preset paper`
QUERY_TOKENS = 500  # that the judge reads, the picture's included
REPLY_TOKENS = 300  # of the judge's longest reply
HPS_WEIGHTS = 986_109_441  # HPS v2.1 is a CLIP ViT-H/14
HPS_WIDEST = 257 * 5120  # numbers in its widest activation of one picture: tokens, width
CONTEXT = 0.6 * 2**30  # bytes of CUDA and its libraries: assumed, not computed


def memory(size: str, lora: int, gpus: int, settings: Memory) -> dict[str, float]:
    """Bytes on each GPU that training takes, by what they are for, in bfloat16 with guidance, KL
    and gradient checkpointing; and the most that a step takes at once.

    size: of the policy, "1b" or "7b". lora: rank of the adapter; 0 trains all weights, in shards
    over the GPUs."""
    config = policy_config(size)
    text = config.text_config
    with torch.device("meta"):  # shapes only
        model = JanusForConditionalGeneration(config)
        vlm = Qwen2_5_VLForConditionalGeneration(judge_config("7b"))
    parts = weight_bytes(model, lora, gpus)

    # Rollout. The unconditional rows are computed apart (prefill), then copied into the cache
    samples = settings.rollout_batch * GROUP
    token_bytes = 2 * kv_numbers(text)
    images = gotr1.image_token_count(model)
    columns = PROMPT_TOKENS + CHAIN_TOKENS + 1 + images
    columns = 128 * math.ceil(columns / 128)  # whole buckets, see decode.Decoder
    parts["cache"] = 2 * samples * columns * token_bytes
    parts["prefill"] = samples * (PROMPT_TOKENS + CHAIN_TOKENS) * token_bytes

    # Pictures, 8 at a time: in the last block are three float32 tensors of all pixels and channels
    pixels = config.vision_config.image_size**2
    parts["pictures"] = 8 * 3 * pixels * config.vq_config.base_channels * 4

    # Rewards. A query of the judge needs keys and values of all its tokens, and the widest
    # activation of what it reads three times: gate, up and their product
    query_bytes = 2 * (QUERY_TOKENS + REPLY_TOKENS) * kv_numbers(vlm.config.text_config)
    query_bytes += 2 * 3 * QUERY_TOKENS * vlm.config.text_config.intermediate_size
    parts["judge"] = 2 * count(vlm)
    parts["judging"] = settings.judge_batch * query_bytes
    # HPS gets all pictures of a step at once: activations before and after a nonlinearity
    parts["HPS"] = 4 * HPS_WEIGHTS
    parts["scoring"] = 4 * 2 * HPS_WIDEST * PROMPTS * GROUP / gpus

    # Update. Checkpointing keeps one vector per token and layer; the float32 logits of a chunk of
    # 1024 tokens are there three times
    tokens = settings.micro_batch * (PROMPT_TOKENS + CHAIN_TOKENS + images)
    parts["activations"] = 2 * tokens * text.hidden_size * text.num_hidden_layers
    parts["activations"] += 4 * 3 * 1024 * text.vocab_size
    parts["context"] = CONTEXT

    # The phases of a step take turns. What was gathered is gone after the rollout, and so is the
    # cache, except under LoRA, which keeps it for the next rollout
    always = sum(parts[name] for name in ("weights", "gradients", "AdamW", "reference", "context"))
    kept = parts["cache"] if lora else 0
    rollout = parts["gathered"] + parts["cache"] + parts["prefill"]
    policy = max(rollout, kept + parts["pictures"], kept + parts["activations"])
    hps = max(policy, kept + parts["scoring"])
    judge = max(hps, kept + parts["judging"])
    parts["most, judge and HPS here"] = always + parts["judge"] + parts["HPS"] + judge
    parts["most, judge elsewhere"] = always + parts["HPS"] + hps
    parts["most, both elsewhere"] = always + policy
    return parts


def weight_bytes(model, lora: int, gpus: int) -> dict[str, float]:
    """What the weights need, and all that has their shape. Image understanding is on the host."""
    trained = sum(parameter.numel() for parameter in trainable_parameters(model))
    frozen = 4 * count(model.model.vqmodel)  # float32
    if not lora:
        return {
            "weights": 4 * trained / gpus + frozen,  # float32 shards
            "gathered": 2 * trained,  # in bfloat16 for the rollout; the update takes one layer
            "gradients": 4 * trained / gpus,
            "AdamW": 8 * trained / gpus,  # two moments
            "reference": 2 * trained / gpus,
        }
    with torch.device("meta"):
        add_lora(model, lora, adapter=None, base="toy")
    adapter = sum(part.numel() for part in model.parameters() if part.requires_grad)
    # the rollout has the A of layers with the same input in one matrix, see decode.low_rank
    copies = sum(part.numel() for name, part in model.named_parameters() if "lora_A" in name)
    return {
        "weights": 2 * trained + frozen + 4 * (adapter + copies),
        "gathered": 0,  # each GPU has all weights
        "gradients": 4 * adapter,
        "AdamW": 8 * adapter,
        "reference": 0,  # the same weights with the adapter switched off
    }


def print_memory(settings: Memory) -> None:
    """The table of docs/gpu.md."""
    print("GiB on each GPU, in bfloat16")
    print(f"at a time: prompts drawn {settings.rollout_batch}, {GROUP} samples each")
    print(f"samples trained {settings.micro_batch}, queries of the judge {settings.judge_batch}")
    titles = [["size"], ["trained"], ["GPUs"]]
    columns = []
    for size in ("1b", "7b"):
        for lora in (32, 0):
            for gpus in (1, 8):
                titles[0].append(size)
                titles[1].append(f"LoRA {lora}" if lora else "full")
                titles[2].append(str(gpus))
                columns.append(memory(size, lora, gpus, settings))
    rows = titles
    for name in columns[0]:
        rows.append([name, *[f"{column[name] / 2**30:.1f}" for column in columns]])
    for name, *cells in rows:
        print(f"{name:24}" + "".join(f"{cell:>9}" for cell in cells))


# ------------------------------------------------------------------------------------------------
# Random checkpoints

JUDGE_VOCABULARY = 2000
JUDGE_TOKENS = [
    *("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|image_pad|>", "<|video_pad|>"),
]
# A message is a string, or a list of parts: texts and pictures
CHAT_TEMPLATE = """{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}\
{% if message.content is string %}{{ message.content }}{% else %}\
{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% else %}\
{{ '<|vision_start|><|image_pad|><|vision_end|>' }}{% endif %}{% endfor %}{% endif %}\
{{ '<|im_end|>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def write_checkpoints(settings: Checkpoints) -> None:
    """Writes both folders, the published sizes in bfloat16. Raises OSError, or FileExistsError when
    one of them is there."""
    policy_folder = Path(settings.out) / "policy"
    judge_folder = Path(settings.out) / "judge"
    for folder in (policy_folder, judge_folder):
        if folder.exists():
            raise FileExistsError(f"{folder} exists: name a new folder")

    dtype = torch.bfloat16 if settings.size in ("1b", "7b") else torch.float32
    config = policy_config(settings.size)
    policy = random_network(JanusForConditionalGeneration, config, dtype)
    save(policy, gotr1.load_policy("toy")[1], policy_folder)
    del policy  # it and the judge together may take 32 GB
    judge, tokenizer = random_judge(settings.judge)
    save(judge, tokenizer, judge_folder)
    Qwen2VLImageProcessorPil().save_pretrained(judge_folder)


def save(network, tokenizer, folder: Path) -> None:
    """Writes a network, in files of at most 2 GB: each is copied in memory before it is written."""
    network.save_pretrained(folder, max_shard_size="2GB")
    tokenizer.save_pretrained(folder)
    print(f"wrote {folder}: {count(network):,} random weights, {network.dtype}")


def random_judge(size: str):
    """(Qwen2.5-VL, its tokenizer). The tokenizer knows every byte, and the words of our questions,
    which stand in rewards.py: for it they are about as long as for Qwen's own."""
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        [inspect.getsource(rewards)],
        vocab_size=JUDGE_VOCABULARY,
        new_special_tokens=JUDGE_TOKENS,
        show_progress=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    id_of = tokenizer.convert_tokens_to_ids
    config = judge_config(size)
    config.image_token_id = id_of("<|image_pad|>")
    config.video_token_id = id_of("<|video_pad|>")
    config.vision_start_token_id = id_of("<|vision_start|>")
    config.vision_end_token_id = id_of("<|vision_end|>")
    dtype = torch.bfloat16 if size == "7b" else torch.float32
    judge = random_network(Qwen2_5_VLForConditionalGeneration, config, dtype)
    judge.generation_config.pad_token_id = tokenizer.pad_token_id
    judge.generation_config.eos_token_id = [id_of("<|im_end|>"), tokenizer.eos_token_id]
    return judge, tokenizer


# ------------------------------------------------------------------------------------------------
# Command line


def main(argv: list[str] | None = None) -> None:
    settings = run.parse_args(Rollout | Memory | Checkpoints, __doc__, argv)
    _, _, device = run.start_processes()
    try:
        if isinstance(settings, Rollout):
            run.check_ranges(settings, at_least_one="samples repeats", not_negative="cfg chain")
            time_rollout(settings, device)
        elif isinstance(settings, Memory):
            run.check_ranges(settings, at_least_one="rollout_batch micro_batch judge_batch")
            print_memory(settings)
        else:
            write_checkpoints(settings)
    except (OSError, ValueError, RuntimeError) as problem:
        run.fail(" ".join(str(problem).split()))


if __name__ == "__main__":
    main()
