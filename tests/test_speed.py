"""Speed, memory and random checkpoints: the tables of docs/gpu.md.   pytest tests/test_speed.py"""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, JanusForConditionalGeneration

import gotr1
from engine import speed
from engine.checkpoints import janus_pro_config
from judges.qwen import QwenJudge

PAGE = Path(__file__).parent.parent / "docs" / "gpu.md"
MANUAL = " ".join(PAGE.read_text(encoding="utf-8").split())  # a sentence may go on in the next line

# Rollout


def test_both_rollouts_are_timed_and_draw_the_same_tokens(capsys):
    flags = "--size tiny --samples 2 --chain 9 --repeats 1 --cfg 2".split()
    speed.main(["rollout", *flags])
    printed = capsys.readouterr().out
    assert "each 9 + 1 chain and 64 image tokens, cfg 2.0" in printed
    assert "2 of 2 samples have the same tokens" in printed
    plain, ours = [
        float(re.search(rf"{name} +([\d.]+) s", printed)[1]) for name in ("plain", "ours")
    ]
    floor = float(re.search(r"([\d.]+) s in all", printed)[1])
    assert plain > 0 and 0 < floor < ours


@pytest.mark.parametrize(
    ("size", "seconds", "weights"), [("1b", 1.05, "2.89 GB"), ("7b", 3.75, "12.98 GB")]
)
def test_floor_of_the_published_sizes(capsys, size, seconds, weights):
    """16 samples, prompt 60, chain 250, guidance: the arithmetic by hand, at 4.3 TB/s."""
    with torch.device("meta"):
        model = JanusForConditionalGeneration(janus_pro_config(size)).to(torch.bfloat16)
    floor = speed.rollout_floor(model, 16, 5.0, prompt=60, chain=250, bandwidth=4.3e12)
    assert floor == pytest.approx(seconds, rel=0.02)
    assert weights in capsys.readouterr().out


# Memory


def test_memory_of_the_published_policies():
    """By hand, from the published sizes: all parameters except image understanding (SigLIP and its
    aligner)."""
    settings = speed.Memory()
    full = speed.memory("7b", 0, 1, settings)
    shared = speed.memory("7b", 0, 8, settings)
    blocks = 30 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 4096
    language_heads = 2 * 102400 * 4096  # embedding and lm_head
    image_in = 16384 * 8 + (8 * 4096 + 4096) + (4096**2 + 4096)
    image_out = (4096**2 + 4096) + (4096 * 16384 + 16384)
    trained = blocks + language_heads + image_in + image_out
    assert full["AdamW"] == 8 * trained == 8 * shared["AdamW"]
    assert full["gradients"] == 4 * trained and full["gathered"] == 2 * trained
    vq = full["weights"] - 4 * trained
    assert shared["weights"] == 4 * trained / 8 + vq and shared["gathered"] == full["gathered"]
    assert shared["reference"] == 2 * trained / 8
    assert full["cache"] == 2 * 30 * 32 * 1280 * 4096 * 2  # keys and values, 32 rows, two bytes
    assert full["prefill"] == 2 * 30 * 16 * 660 * 4096 * 2  # 16 rows, the longest chain
    assert full["pictures"] == 8 * 3 * 384 * 384 * 128 * 4  # 227 MB each
    kept = 4 * (60 + 600 + 576) * 30 * 4096 * 2  # samples, tokens, layers, width, bytes
    assert full["activations"] == kept + 3 * 1024 * 102400 * 4

    lora = speed.memory("7b", 32, 1, settings)
    adapter = 30 * 32 * (4 * 2 * 4096 + 3 * (4096 + 11008))
    copies = 30 * 32 * (6 * 4096 + 11008)  # of A, for the decoding step
    assert lora["AdamW"] == 8 * adapter and lora["reference"] == lora["gathered"] == 0
    assert lora["weights"] == 2 * trained + vq + 4 * (adapter + copies)


def test_memory_of_judge_and_hps():
    parts = speed.memory("1b", 32, 1, speed.Memory(judge_batch=5))
    assert parts["judge"] == 2 * 8_292_166_656  # Qwen2.5-VL-7B's published count in bfloat16
    # 5 queries of 800 tokens with 4 heads of 128; of 500 tokens gate, up and their product
    assert parts["judging"] == 5 * (800 * 2 * 28 * 4 * 128 * 2 + 500 * 3 * 18944 * 2)
    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32}
    vision.update(patch_size=14, num_attention_heads=16)
    config = CLIPConfig(projection_dim=1024, text_config=text, vision_config=vision)
    with torch.device("meta"):
        assert parts["HPS"] == 4 * speed.count(CLIPModel(config))  # ViT-H/14 in float32
    assert parts["scoring"] == 128 * 257 * 2 * 5120 * 4  # 128 pictures, before and after a GELU


def test_most_is_the_largest_phase_with_all_that_is_always_held():
    full = speed.memory("7b", 0, 8, speed.Memory())
    held = sum(full[name] for name in ("weights", "gradients", "AdamW", "reference", "context"))
    rollout = held + full["gathered"] + full["cache"] + full["prefill"]
    assert full["most, both elsewhere"] == pytest.approx(rollout)
    assert full["most, judge elsewhere"] == pytest.approx(rollout + full["HPS"])
    both = full["HPS"] + full["judge"]
    assert full["most, judge and HPS here"] == pytest.approx(rollout + both)
    # under LoRA the cache stays, and judging takes more beside it than the rollout's prefill
    lora = speed.memory("1b", 32, 1, speed.Memory(micro_batch=32))
    held = sum(lora[name] for name in ("weights", "gradients", "AdamW", "context", "cache"))
    update = held + lora["activations"]  # of so many samples: more than the prefill
    assert lora["most, both elsewhere"] == pytest.approx(update)
    here = held + lora["HPS"] + lora["judge"]
    assert lora["most, judge and HPS here"] == pytest.approx(here + lora["judging"])


def test_the_manual_quotes_the_command(capsys):
    speed.main(["memory"])
    _, _, _, *rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 20
    for row in rows:
        name, *cells = re.split(r"  +", row)
        assert f"| {name} | {' | '.join(cells)} |" in MANUAL, row
    small = speed.memory("1b", 32, 1, speed.Memory(rollout_batch=4))["most, judge and HPS here"]
    assert f"| `--rollout_batch 4` | {small / 2**30:.1f} |" in MANUAL
    large = speed.memory("7b", 32, 1, speed.Memory(rollout_batch=4))["most, judge elsewhere"]
    assert f"141 GB ({large / 2**30:.1f})" in MANUAL
    for size in ("1b", "7b"):
        parts = speed.memory(size, 32, 1, speed.Memory())
        expected = parts["most, judge and HPS here"] - parts["HPS"] - parts["context"]
        assert f"| {size.upper()}, LoRA 32 | {expected / 2**30:.1f} |" in MANUAL
    for queries in (16, 64):
        parts = speed.memory("1b", 0, 1, speed.Memory(judge_batch=queries))
        second = parts["judge"] + parts["HPS"] + parts["context"] + parts["judging"]
        assert f"second {second / 2**30:.1f} |" in MANUAL


# Checkpoints


def test_random_checkpoints_are_loaded_as_published_ones_are(tmp_path, capsys):
    speed.main(["checkpoints", str(tmp_path), "--size", "tiny"])
    printed = capsys.readouterr().out
    model, tokenizer = gotr1.load_policy(str(tmp_path / "policy"))
    assert f"{speed.count(model):,} random weights" in printed
    sampled = gotr1.rollout(model, tokenizer, ["a red ball"], group=2, cfg=5.0, max_chain=3)
    assert (
        sampled.image_tokens.shape == (2, 64)
        and len(gotr1.decode_images(model, sampled.image_tokens)) == 2
    )
    assert sampled.entropy[0, 0] > 3, "a random model is unsure"

    judge = QwenJudge(tmp_path / "judge", device="cpu", batch_size=2)
    pictures = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    scores = judge.alignment(["a red ball", "a blue ball"], pictures)
    assert len(scores) == 2


@pytest.mark.parametrize("size", ["tiny", "small", "1b", "7b"])
def test_every_random_policy_has_room_for_the_longest_chain(size):
    with torch.device("meta"):
        model = JanusForConditionalGeneration(speed.policy_config(size))
    gotr1.check_room(model, [[0] * 60], chain=601)
    images = {"tiny": 64, "small": 144, "1b": 576, "7b": 576}
    assert gotr1.image_token_count(model) == images[size]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("memory --rollout_batch 0", "--rollout_batch is 0: expected 1 or more"),
        ("rollout --samples 0", "--samples is 0: expected 1 or more"),
        ("rollout --size 3b", "size"),
        ("checkpoints OUT", "OUT/policy exists: name a new folder"),
        ("step", "step"),
    ],
)
def test_bad_input_is_refused_in_one_line(command, message, capsys, tmp_path):
    (tmp_path / "policy").mkdir()
    words = command.replace("OUT", str(tmp_path)).split()
    with pytest.raises(SystemExit) as stop:
        speed.main(words)
    assert stop.value.code == 2
    printed, error = capsys.readouterr()
    assert not printed and error.count("\n") == 1
    assert message.replace("OUT", str(tmp_path)) in error
