"""Time and memory: the tables of benchmarks/speed.py.   pytest tests/test_speed.py"""

import copy

import pytest
import torch
from random_networks import small_networks
from test_rewards import random_judge
from transformers import JanusForConditionalGeneration

import gotr1
from benchmarks import speed
from engine.checkpoints import janus_pro_config
from toy.world import ToyJudge


def refused(capsys, *words) -> str:
    """The one line with which a command line is refused."""
    with pytest.raises(SystemExit) as stop:
        speed.main([str(word) for word in words])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message


# Rollout


def test_both_loops_are_timed_on_chains_of_the_length_asked_for(monkeypatch, capsys, policy):
    def toy_policy(size, device):
        return copy.deepcopy(policy[0]), policy[1]

    monkeypatch.setattr(speed, "random_policy", toy_policy)
    flags = ["--samples", "2", "--chain", "9", "--repeats", "2", "--cfg", "2"]
    speed.main(["rollout", *flags])
    printed = capsys.readouterr().out
    assert "each 9 + 1 chain and 64 image tokens, cfg 2.0" in printed and "median of 2" in printed
    assert "2 of 2 samples have the same tokens" in printed and "straightforward" in printed


def test_small_random_policy_is_the_one_promised():
    model, tokenizer = speed.random_policy("small", torch.device("cpu"))
    config = model.config.text_config
    assert config.num_hidden_layers == 8 and config.hidden_size == 512
    assert gotr1.image_token_count(model) == 144
    sampled = gotr1.rollout(model, tokenizer, ["a"], 1, cfg=2.0, max_chain=2)
    assert torch.isfinite(sampled.logp).all()
    assert sampled.entropy[0, 0] > 3, "a random model is unsure"


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


# Judge


class TimedJudge(ToyJudge):
    """Moves a clock: 2 s per batch; a fifth of it for expected marks, except for grounding."""

    def __init__(self):
        self.seconds = 0.0

    def clock(self) -> float:
        return self.seconds

    def answer(self, call, first, second):
        assert len(first) == len(second)
        batches = -(-len(first) // self.batch_size)
        quick = self.scoring == "expected" and call.__name__ != "ground"
        self.seconds += 2 * batches * (0.2 if quick else 1)
        answers = call(first, second)
        assert len(answers) == len(first)
        return answers

    def semantic(self, prompts, chains):
        return self.answer(super().semantic, prompts, chains)

    def spatial(self, prompts, layouts):
        return self.answer(super().spatial, prompts, layouts)

    def alignment(self, prompts, images):
        return self.answer(super().alignment, prompts, images)

    def ground(self, images, names):
        return self.answer(super().ground, images, names)


def test_each_call_of_the_judge_is_timed_in_both_ways(monkeypatch, capsys):
    judge = TimedJudge()
    monkeypatch.setattr(speed.time, "perf_counter", judge.clock)
    speed.time_judge(judge)
    table = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    marks = ["0.50", "8.00", "16.0", "2.50", "40.00", "16.0", "5.0"]
    boxes = ["0.50", "8.00", "16.0", "0.50", "8.00", "16.0", "1.0"]
    assert table == [
        ["semantic", "four", *marks],
        ["semantic", "one", *marks],
        ["spatial", *marks],
        ["alignment", *marks],
        ["ground", *boxes],
    ]


def test_the_tower_is_counted_and_replies_compared(monkeypatch, capsys, tmp_path):
    for part in random_judge():
        part.save_pretrained(tmp_path)
    monkeypatch.setattr(speed, "time_judge", lambda judge: None)
    speed.main(["judge", "--judge", str(tmp_path), "--pictures", "2", "--tokens", "4"])
    title, plain, ours, ratio = capsys.readouterr().out.strip().splitlines()
    assert "2 pictures, three names each: 8 rows" in title and "at most 4 tokens" in title
    assert "8 pictures through the vision tower" in plain
    assert "2 pictures through the vision tower" in ours
    assert "8 of 8 replies are equal" in ratio


def test_a_judge_that_is_not_there_is_refused_in_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "load the files" in refused(capsys, "judge", "--judge", "nowhere")


# Networks of the benchmarks


def test_each_network_that_is_given_is_timed(tmp_path, capsys):
    flags = []
    for name in ("clip", "clip_b32", "blip", "gdino", "detector"):
        flags += [f"--{name}", str(tmp_path / name)]
    with small_networks(tmp_path):
        speed.main(["networks", *flags])
    head, *table = capsys.readouterr().out.splitlines()
    assert "batch 1   batch 16" in head
    names = [line.split()[0] for line in table]
    assert names == ["detector", "clip", "clip_b32", "blip", "gdino"]
    for line in table:
        one, many, ratio = [float(cell) for cell in line.split()[1:]]
        assert one > 0 and ratio == pytest.approx(many / one, abs=0.02)


def test_networks_that_are_not_there_are_refused_in_one_line(capsys):
    assert "give the path" in refused(capsys, "networks")
    assert "no CLIP ViT-L/14 at /no/such" in refused(capsys, "networks", "--clip", "/no/such")


# Memory


def test_memory_counts_the_published_models():
    """By hand, from the published sizes: all parameters except image understanding (SigLIP and its
    aligner)."""
    table = {"samples": 16, "cfg": True, "micro_batch": 4}
    full = speed.memory("7b", 0, 1, kl=True, **table)
    shared = speed.memory("7b", 0, 8, kl=True, **table)
    blocks = 30 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 4096
    language_heads = 2 * 102400 * 4096  # embedding and lm_head
    image_in = 16384 * 8 + (8 * 4096 + 4096) + (4096**2 + 4096)
    image_out = (4096**2 + 4096) + (4096 * 16384 + 16384)
    trained = blocks + language_heads + image_in + image_out
    assert full["AdamW"] == 8 * trained == 8 * shared["AdamW"]
    assert full["cache"] == 2 * 30 * 32 * 1280 * 4096 * 2  # keys and values, 32 rows, two bytes
    assert full["judge"] == 2 * (8_292_166_656 + 986_109_441)  # Qwen2.5-VL-7B's published count
    assert full["reference"] > 0
    assert speed.memory("7b", 0, 1, kl=False, **table)["reference"] == 0
    # the update needs less than the rollout here
    parts = sum(full.values()) - full["most"]
    assert full["most"] == parts - full["activations"]

    lora = speed.memory("7b", 32, 1, kl=True, **table)
    adapter = 30 * 32 * (4 * 2 * 4096 + 3 * (4096 + 11008))
    assert lora["AdamW"] == 8 * adapter and lora["reference"] == 0
    # the cache stays for the next rollout
    assert lora["most"] == sum(lora.values()) - lora["most"]


def test_memory_table_shows_every_size(capsys):
    speed.main(["memory"])
    title, head, *rows = capsys.readouterr().out.splitlines()
    assert "16 samples at a time" in title and head.split()[:3] == ["size", "trained", "GPUs"]
    assert len(rows) == 7
    assert rows[0].split() == "1b full 1 6.6 3.2 6.3 12.6 3.2 7.5 1.5 17.3 56.6".split()
    assert rows[6].split() == "7b full 8 3.5 13.1 3.3 6.5 1.6 18.8 2.0 17.3 64.1".split()
