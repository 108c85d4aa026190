"""Time and memory: the tables of evaluation/speed.py.   pytest tests/test_speed.py"""

import copy
from typing import NamedTuple

import pytest
import torch
from PIL import Image
from random_networks import small_networks
from test_rewards import random_judge
from transformers import JanusForConditionalGeneration

import gotr1
from engine import speed
from engine.checkpoints import janus_pro_config
from toy.world import ToyJudge


def refused(capsys, *words) -> str:
    """The one line with which a command line is refused."""
    with pytest.raises(SystemExit) as stop:
        speed.main([str(word) for word in words])
    assert stop.value.code == 2
    printed, message = capsys.readouterr()
    assert not printed, "no head of a table that never comes"
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


# A whole step


@pytest.fixture
def short_replies(monkeypatch):
    for name, call in list(speed.JUDGE_CALLS.items()):
        monkeypatch.setitem(speed.JUDGE_CALLS, name, call._replace(reply=2))


TINY = "step --size tiny --samples 2 --micro_batch 1 --judge_batch 4".split()


class Cells(NamedTuple):
    seconds: float
    floor: float | None
    peak: float
    planned: float


def table_of(printed: str) -> dict[str, Cells]:
    """Phase -> its numbers."""
    rows = {}
    lines = printed.split("table GiB\n")[1].splitlines()
    for line in lines[: lines.index(next(line for line in lines if "peak:" in line))]:
        phase, *cells = line.split()
        rows[phase] = Cells(*(None if cell == "-" else float(cell) for cell in cells))
    return rows


def test_a_step_prints_time_memory_and_floor_of_each_phase(short_replies, capsys):
    speed.main([*TINY, "--lora", "4"])
    printed = capsys.readouterr().out
    rows = table_of(printed)
    assert list(rows) == ["rollout", "decode", "judge", "hps", "update", "step"]
    step = rows.pop("step")
    assert step.seconds == pytest.approx(sum(row.seconds for row in rows.values()), abs=0.03)
    assert step.seconds > 0 and step.peak == max(row.peak for row in rows.values())
    assert rows["decode"].floor is None
    for name in ("rollout", "judge", "update"):
        assert rows[name].floor > 0
    for row in rows.values():
        assert 0.05 < row.peak < 50
    assert "each 8 + 1 chain and 64 image tokens, cfg 5.0" in printed and "ratio" in printed


def test_a_step_stands_beside_the_table_for_its_own_sizes(short_replies, capsys, monkeypatch):
    asked = {}

    def table(size, lora, **settings):
        asked.update(settings, size=size, lora=lora)
        gib = {"rollout": 3, "decode": 1, "judge": 2, "hps": 4, "update": 5}
        return {}, {phase: number * 2**30 for phase, number in gib.items()}

    monkeypatch.setattr(speed, "memory", table)
    speed.main([*TINY, "--lora", "4", "--cfg", "1", "--prompts", "2", "--no_plain"])
    planned = [row.planned for row in table_of(capsys.readouterr().out).values()]
    assert planned == [3, 1, 2, 4, 5, 5]
    assert 0.05 * 2**30 < asked.pop("context") < 50 * 2**30, "what Python held before"
    assert asked == {
        "size": "tiny",
        "lora": 4,
        "gpus": 1,
        "samples": 4,
        "cfg": False,
        "micro_batch": 1,
        "kl": True,
        "judge_batch": 4,
        "judge": "tiny",
        "hps": True,
        "tokens": (55, 8, 8, 64),
        "gpu": False,
    }


def test_a_step_without_a_judge_and_adapter_trains_all_weights(capsys, monkeypatch):
    engines = []
    make = speed.random_engine

    def kept(*args):
        engines.append(make(*args))
        return engines[0]

    monkeypatch.setattr(speed, "random_engine", kept)
    speed.main([*TINY, "--lora", "0", "--judge", "none", "--no_hps", "--no_plain"])
    printed = capsys.readouterr().out
    assert list(table_of(printed)) == ["rollout", "decode", "update", "step"]
    assert "ratio" not in printed and "5 passes" in printed
    assert engines[0].optimizer.state, "a step was taken"
    assert engines[0].reference is not None


def test_the_judge_is_asked_as_often_and_about_as_much_as_by_a_step_with_three_boxes():
    batches = speed.judge_batches(samples=16, judge_batch=16, scoring="reply")
    assert [rows for rows, _, _ in batches] == [16] * 6
    expected = speed.judge_batches(samples=16, judge_batch=64, scoring="expected")
    assert [(rows, writes) for rows, _, writes in expected] == [
        (16, False),
        (16, False),
        (16, False),
        (48, True),
    ]
    call = speed.JUDGE_CALLS["alignment"]
    config = speed.random_judge("tiny", torch.device("meta")).config
    inputs = speed.judge_inputs(config, 2, call, torch.device("cpu"))
    assert inputs["image_grid_thw"].tolist() == [[1, 28, 28]] * 2  # 384 pixels
    assert int((inputs["input_ids"] == config.image_token_id).sum()) == 2 * 14 * 14
    assert inputs["pixel_values"].shape == (2 * 28 * 28, 1176)


def test_judge_and_hps_have_the_published_sizes():
    for size, parameters in (("3b", 3_754_622_976), ("7b", 8_292_166_656)):
        assert speed.count(speed.random_judge(size, torch.device("meta"))) == parameters
    hps = speed.RandomHPS(speed.hps_config("7b"), None, torch.device("meta"))
    assert speed.count(hps.model) == speed.HPS_PARAMETERS
    assert {weight.dtype for weight in hps.model.parameters()} == {torch.float32}


def test_a_written_reply_is_as_long_as_it_may_be():
    judge = speed.random_judge("tiny", torch.device("cpu"))
    passes = []
    judge.lm_head.register_forward_hook(lambda *_: passes.append(1))
    call = speed.JUDGE_CALLS["semantic"]._replace(question=4, reply=9)
    speed.ask_judge(judge, [(2, call, True), (2, call, False)], torch.device("cpu"))
    assert len(passes) == 9 + 1


def test_hps_with_random_weights_scores_pictures_as_hps_does(policy):
    hps = speed.RandomHPS(speed.hps_config("tiny"), policy[1], torch.device("cpu"))
    images = [Image.new("RGB", (48, 32), colour) for colour in ("red", "blue", "red")]
    seen = []
    hps.model.vision_model.encoder.register_forward_hook(
        lambda module, inputs, keywords, output: seen.append(keywords["inputs_embeds"].shape),
        with_kwargs=True,
    )
    first, second, third = hps(["a ball"] * 3, images)
    assert -1 <= first <= 1 and first == pytest.approx(third) and first != second
    assert [shape[:2] for shape in seen] == [(3, speed.HPS_TOKENS)]


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


def test_a_judge_on_a_server_is_refused_before_it_is_asked(capsys):
    message = refused(capsys, "judge", "--judge", "http://localhost:9/v1")
    assert "http://localhost:9/v1: a server's judge is not timed here" in message


# Networks of the evaluation


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
    full, phases = speed.memory("7b", 0, 1, kl=True, **table)
    shared, _ = speed.memory("7b", 0, 8, kl=True, **table)
    blocks = 30 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 4096
    language_heads = 2 * 102400 * 4096  # embedding and lm_head
    image_in = 16384 * 8 + (8 * 4096 + 4096) + (4096**2 + 4096)
    image_out = (4096**2 + 4096) + (4096 * 16384 + 16384)
    trained = blocks + language_heads + image_in + image_out
    assert full["AdamW"] == 8 * trained == 8 * shared["AdamW"]
    assert full["cache"] == 2 * 30 * 32 * 1280 * 4096 * 2  # keys and values, 32 rows, two bytes
    # Qwen2.5-VL-7B's published count in bfloat16, HPS in float32
    assert full["judge"] == 2 * 8_292_166_656 + 4 * 986_109_441
    # 16 rows of 700 tokens with 4 heads of 128; and of 500 tokens gate, up and their product
    assert full["judging"] == 16 * (700 * 2 * 28 * 4 * 128 * 2 + 500 * 3 * 18944 * 2)
    assert full["prefill"] == 2 * 30 * 16 * 660 * 4096 * 2  # 16 rows, the longest chain
    assert full["pictures"] == 8 * 3 * 384 * 384 * 128 * 4  # 227 MB each
    assert full["scoring"] == 16 * 257 * 2 * 5120 * 4  # 16 pictures, before and after a GELU
    assert full["reference"] > 0
    assert speed.memory("7b", 0, 1, kl=False, **table)[0]["reference"] == 0
    # every other phase needs less than the rollout here
    parts = sum(full.values()) - full["most"]
    others = full["activations"] + full["pictures"] + full["judging"] + full["scoring"]
    assert full["most"] == phases["rollout"] == pytest.approx(parts - others)
    assert phases["rollout"] - phases["update"] == pytest.approx(
        full["gathered"] + full["cache"] + full["prefill"] - full["activations"]
    )

    lora, phases = speed.memory("7b", 32, 1, kl=True, **table)
    adapter = 30 * 32 * (4 * 2 * 4096 + 3 * (4096 + 11008))
    assert lora["AdamW"] == 8 * adapter and lora["reference"] == 0
    copies = 30 * 32 * (6 * 4096 + 11008)  # of A, for the decoding step
    assert lora["weights"] - copies * 4 - adapter * 4 == 2 * trained + (
        full["weights"] - 4 * trained
    )
    # the cache stays for the next rollout: the phases differ by what each takes beside it
    held = phases["rollout"] - lora["prefill"]
    for phase, part in (
        ("decode", "pictures"),
        ("judge", "judging"),
        ("hps", "scoring"),
        ("update", "activations"),
    ):
        assert phases[phase] == pytest.approx(held + lora[part])
    more, phases = speed.memory("7b", 32, 1, kl=True, **{**table, "micro_batch": 32})
    assert more["activations"] > more["prefill"] and more["most"] == phases["update"]


def test_memory_of_a_step_on_the_host(policy):
    """float32: the forward pass takes the weights themselves, and no cache stays."""
    settings = {
        "samples": 3,
        "cfg": True,
        "micro_batch": 2,
        "kl": True,
        "judge_batch": 4,
        "judge": "none",
        "hps": False,
        "tokens": speed.Lengths(prompt=20, chain=5, longest_chain=10, image=64),
        "gpu": False,
        "context": 1000,
    }
    parts, phases = speed.memory("tiny", 0, 1, **settings)
    assert parts["weights"] == 4 * speed.count(policy[0])
    assert parts["gathered"] == parts["judge"] == parts["judging"] == parts["scoring"] == 0
    token = 2 * 4 * 128 * 4  # keys and values, layers, width, bytes
    assert parts["cache"] == 2 * 3 * (20 + 10 + 1 + 64) * token
    assert parts["pictures"] == 3 * 3 * 32 * 32 * 32 * 4  # three pictures, three tensors of 32
    kept = 2 * (20 + 5 + 64) * 4 * 128 * 4  # samples, tokens, layers, width, bytes
    assert parts["activations"] == kept + 3 * 1024 * 345 * 4
    trained = parts["AdamW"] / 8
    held = parts["weights"] + (4 + 8 + 4) * trained + 1000
    assert phases["decode"] == held + parts["pictures"]
    assert phases["rollout"] == held + parts["cache"] + parts["prefill"]

    adapted, phases = speed.memory("tiny", 4, 1, **settings)
    assert adapted["reference"] == 0 < adapted["gradients"] < parts["gradients"]
    held = adapted["weights"] + adapted["gradients"] + adapted["AdamW"] + 1000
    assert phases["update"] == held + parts["activations"]


def test_memory_table_shows_every_size(capsys):
    speed.main(["memory"])
    title, head, *rows = capsys.readouterr().out.splitlines()
    assert "16 samples at a time" in title and head.split()[:3] == ["size", "trained", "GPUs"]
    assert len(rows) == 7
    assert (
        rows[0].split()
        == "1b full 1 6.6 3.2 6.3 12.6 3.2 7.5 1.9 1.7 1.5 19.1 1.4 0.2 0.6 61.0".split()
    )
    assert (
        rows[6].split()
        == "7b full 8 3.5 13.1 3.3 6.5 1.6 18.8 4.8 1.7 2.0 19.1 1.4 0.2 0.6 71.3".split()
    )


# What fits


def made_up(
    size: str, lora: int, gpus: int, samples: int, micro_batch: int, judge_batch: int
) -> dict[str, float]:
    """About what the table says of LoRA; the table itself takes a second per row."""
    weights, cache, activations = {"1b": (4, 0.5, 0.3), "7b": (15, 1.2, 0.4)}[size]
    most = 17 + weights + samples * cache + micro_batch * activations + judge_batch / 16
    return {"most": most * 2**30, "judge": 17 * 2**30}


@pytest.fixture
def table(monkeypatch):
    monkeypatch.setattr(speed, "most_bytes", made_up)


def test_what_fits_is_asked_of_the_table():
    parts = speed.most_bytes("1b", 32, 1, 32, 2, 8)
    settings = {"samples": 32, "cfg": True, "micro_batch": 2, "kl": True, "judge_batch": 8}
    assert parts == speed.memory("1b", 32, 1, **settings)[0]


def sizes_for(size: str, gib: int, lora: int = 32, gpus: int = 1, judge_here=True, **given):
    asked = {"rollout_batch": 0, "micro_batch": 0, "judge_batch": 0} | given
    return speed.choose_sizes(
        size=size,
        lora=lora,
        gpus=gpus,
        group=16,
        prompts=8 // gpus,
        judge_here=judge_here,
        total=gib * 2**30,
        given=asked,
    )


@pytest.mark.parametrize("size", ["1b", "7b"])
def test_sizes_fit_and_grow_with_the_gpu(size, table):
    before = (0, 0, 0)
    for gib in (24, 48, 80, 141):
        chosen, planned = sizes_for(size, gib)
        one, least = sizes_for(size, 0)
        assert one == {"rollout_batch": 1, "micro_batch": 1, "judge_batch": 1}
        if least > 0.9 * gib * 2**30:  # nothing fits, and the number says so
            assert (chosen, planned) == (one, least)
            continue
        assert planned <= 0.9 * gib * 2**30
        now = (chosen["rollout_batch"], chosen["judge_batch"], chosen["micro_batch"])
        assert now >= before, "in order of importance"
        before = now
        more = sizes_for(size, 0, **(chosen | {"rollout_batch": 2 * chosen["rollout_batch"]}))
        assert more[1] > 0.9 * gib * 2**30 or chosen["rollout_batch"] == 8
    assert before[0] >= 4 and before[1:] == (64, 16), "141 GiB are plenty"


def test_flags_win_over_what_fits_and_a_judge_elsewhere_leaves_room(table):
    chosen, planned = sizes_for("7b", 80, micro_batch=3, judge_batch=5)
    assert (chosen["micro_batch"], chosen["judge_batch"]) == (3, 5)
    # 2 prompts of 16: 17 + 15 + 32 * 1.2 + 3 * 0.4 GiB is just below 72, the judge's rows included
    assert chosen["rollout_batch"] == 2
    assert planned == pytest.approx((71.6 + 5 / 16) * 2**30)
    elsewhere, less = sizes_for("7b", 96, judge_here=False, micro_batch=3, judge_batch=5)
    assert elsewhere["rollout_batch"] == 2 and less == pytest.approx(
        54.6 * 2**30 + 4 * speed.HPS_PARAMETERS
    )
    assert sizes_for("7b", 110, judge_here=False)[0]["rollout_batch"] == 4
    assert sizes_for("7b", 110, judge_here=True)[0]["rollout_batch"] == 2
    assert sizes_for("1b", 141, gpus=8)[0]["rollout_batch"] == 1, "a rank has one prompt per step"


def test_published_sizes_are_recognised(policy):
    assert speed.size_of(policy[0]) == ""
    for size in ("1b", "7b"):
        with torch.device("meta"):
            assert speed.size_of(JanusForConditionalGeneration(janus_pro_config(size))) == size
