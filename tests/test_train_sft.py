"""SFT from data on disk: both record styles, bad records counted, losses fall, resume and several
processes change nothing.   pytest tests/test_train_sft.py"""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import gotr1
import train_sft
from render_boxes import parse_chain
from toy import world as toy

ROOT = Path(__file__).parent.parent
GOOD = 60  # records; the bad ones are among them
BAD = {7: "no box", 20: "broken image", 33: "chain too long", 46: "box outside"}
SMALL = (
    "--steps 12 --batch_size 8 --micro_batch 4 --lr 1e-3 --eval_every 12 --save_every 5 "
    "--max_chain 80"
).split()


def png(image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def scenes(count: int) -> list[toy.Example]:
    rng = np.random.default_rng(11)
    return [toy.make_example(rng) for _ in range(count)]


def plain_text(chain: str) -> str:
    """As in the GoT paper: red ball (125,250),(375,500)."""
    return re.sub(r"<\|(obj|box)_(start|end)\|>", "", chain)


def in_pixels(corner: re.Match) -> str:
    x, y = (int(number) * 128 / 1000 for number in corner.groups())
    return f"({x:g},{y:g})"


def write_jsonl(folder: Path) -> list[str]:
    """JSON lines beside a folder of pictures, boxes inline in pixels of a picture four times as
    large."""
    folder.mkdir()
    (folder / "pictures").mkdir()
    chains, lines = [], []
    for k, scene in enumerate(scenes(GOOD + len(BAD))):
        chains.append(scene.chain)
        text = re.sub(r"\((\d+),(\d+)\)", in_pixels, plain_text(scene.chain))
        large, name = scene.image.resize((128, 128), 0), f"pictures/{k}.png"
        large.save(folder / name)
        if BAD.get(k) == "no box":
            text = "just words"
        elif BAD.get(k) == "broken image":
            (folder / name).write_bytes(png(large)[:100])
        elif BAD.get(k) == "chain too long":
            text = "very " * 200 + text
        elif BAD.get(k) == "box outside":
            text = "a red ball (10,10),(500,60)"
        lines.append(json.dumps({"caption": scene.prompt, "annotation": text, "file": name}))
    (folder / "records.jsonl").write_text("\n".join(lines) + "\n")
    return [chain for k, chain in enumerate(chains) if k not in BAD]


def write_parquet(folder: Path) -> list[str]:
    """Parquet with placeholders in the text and their coordinates, 0..1, as JSON in a field of its
    own."""
    import datasets

    folder.mkdir()
    chains, rows = [], []
    for k, scene in enumerate(scenes(GOOD + len(BAD))):
        chains.append(scene.chain)
        coords, text = {}, scene.chain
        for box in re.findall(r"<\|box_start\|>.*?<\|box_end\|>", scene.chain):
            key = f"<box_{len(coords)}>"
            coords[key] = [int(n) / 1000 for n in re.findall(r"\d+", box)]
            text = text.replace(box, key, 1)
        image = png(scene.image)
        if BAD.get(k) == "no box":
            text, coords = "just words", {}
        elif BAD.get(k) == "broken image":
            image = b"no picture"
        elif BAD.get(k) == "chain too long":
            text = "very " * 200 + text
        elif BAD.get(k) == "box outside":
            coords["<box_0>"] = [0.5, 0.5, 1.5, 0.9]
        row = {"prompt": scene.prompt, "got": text, "coord": json.dumps(coords)}
        rows.append(row | {"picture": {"bytes": image, "path": None}})
    datasets.Dataset.from_list(rows).to_parquet(str(folder / "train.parquet"))
    return [chain for k, chain in enumerate(chains) if k not in BAD]


def jsonl_flags(folder: Path) -> list[str]:
    fields = "--prompt_field caption --chain_field annotation --image_field file".split()
    return ["--data", str(folder / "records.jsonl"), *fields, "--box_format", "pixels"]


@pytest.fixture(scope="module", params=["jsonl", "parquet"])
def data(request, tmp_path_factory):
    """(flags, the chains of the good records) of a set on disk."""
    folder = tmp_path_factory.mktemp("data") / request.param
    if request.param == "jsonl":
        chains = write_jsonl(folder)
        flags = jsonl_flags(folder)
    else:
        chains = write_parquet(folder)
        fields = "--chain_field got --coords_field coord --image_field picture".split()
        flags = ["--data", str(folder), *fields, "--box_format", "0..1"]
    return flags, chains


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict:
    return safetensors.torch.load_file(
        folder / (folder / "latest").read_text() / "model.safetensors"
    )


def gap(a: dict, b: dict) -> float:
    return max((a[key] - b[key]).abs().max().item() for key in a)


def test_a_set_on_disk_is_trained_on_and_a_run_that_died_continues_bitwise(
    data, tmp_path, monkeypatch, capsys
):
    flags, chains = data
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train_sft.main([*flags, *SMALL, "--out", str(whole)])
    log = rows(whole)
    assert log[-1]["held_out_chain"] > 0 and (whole / "samples_000012.png").exists()
    for loss in (
        "chain_loss",
        "image_loss",
    ):  # the shipped model knows this world already: what is left is small
        assert np.mean([row[loss] for row in log[-3:]]) < np.mean([row[loss] for row in log[:3]]), (
            loss
        )

    # the report at the end of the epoch: exact counts, and the first of each
    printed = capsys.readouterr()
    report = (printed.out + printed.err).split("epoch 1:")[1]
    assert f"{len(BAD)} of {GOOD + len(BAD)} records skipped" in report
    for index, cause in BAD.items():
        line = next(line for line in report.splitlines() if cause in line)
        assert line.split()[0] == "1" and f"record {index}" in line

    # what was trained on is what was meant: the same boxes, to a pixel of the large picture
    from data import cache as token_cache

    (folder,) = (whole / "cache").iterdir()
    cached = token_cache.Prepared(folder)
    assert len(cached) == GOOD
    prompts, got, tokens = cached.batch(list(range(GOOD)))
    for mine, meant in zip(got, chains, strict=True):
        for a, b in zip(parse_chain(mine), parse_chain(meant), strict=True):
            assert (
                a.name == b.name and max(abs(p - q) for p, q in zip(a[1:], b[1:], strict=True)) <= 1
            )
    assert tokens.shape == (GOOD, 64)

    sft_loss, calls = train_sft.sft_loss, []

    def dying(*args, **settings):
        calls.append(1)
        if (
            len(calls) == 2 * 8
        ):  # two micro-batches a step: in step 8, three after the checkpoint of step 5
            raise RuntimeError("power cut")
        return sft_loss(*args, **settings)

    monkeypatch.setattr(train_sft, "sft_loss", dying)
    with pytest.raises(RuntimeError, match="power cut"):
        train_sft.main([*flags, *SMALL, "--out", str(cut)])
    assert (cut / "latest").read_text() == "step_000005"
    train_sft.main([*flags, *SMALL, "--out", str(cut)])
    assert gap(weights(cut), weights(whole)) == 0


def test_later_epochs_and_runs_never_open_a_picture(data, tmp_path, monkeypatch):
    flags = [*data[0], *SMALL, "--cache", str(tmp_path / "cache")]
    train_sft.main([*flags, "--out", str(tmp_path / "first")])
    monkeypatch.setattr(gotr1, "encode_images", None)
    monkeypatch.setattr("PIL.Image.open", None)
    train_sft.main([*flags, "--out", str(tmp_path / "second")])
    assert gap(weights(tmp_path / "first"), weights(tmp_path / "second")) == 0


def test_dry_run_shows_records_and_writes_only_a_sheet(data, tmp_path, capsys):
    train_sft.main([*data[0], "--dry_run", "--max_chain", "80", "--out", str(tmp_path / "look")])
    printed = capsys.readouterr().out
    assert data[1][0] in printed and "tokens" in printed
    assert [path.suffix for path in (tmp_path / "look").iterdir()] == [".png"]


def test_micro_batches_and_checkpointing_change_nothing(tmp_path, float64):
    flags = "--examples 64 --steps 5 --batch_size 8 --lr 1e-4 --eval_prompts 2".split()
    train_sft.main([*flags, "--micro_batch", "1", "--out", str(tmp_path / "one")])
    changes = (["--micro_batch", "3"], ["--micro_batch", "8"], ["--gradient_checkpointing"])
    for change in changes:
        other = tmp_path / " ".join(change)
        train_sft.main([*flags, *change, "--out", str(other)])
        assert gap(weights(tmp_path / "one"), weights(other)) < 1e-10, change
        for a, b in zip(rows(tmp_path / "one"), rows(other), strict=True):
            assert a["chain_loss"] == pytest.approx(b["chain_loss"], abs=2e-6)  # six decimals
            assert a["image_loss"] == pytest.approx(b["image_loss"], abs=2e-6)


TWO_PROCESSES = """
import sys

import torch

sys.path.insert(0, ROOT)
import train_sft
from engine import checkpoints

checkpoints.DTYPES["float32"] = torch.float64  # as the fixture of that name
for flags in FLAGS:
    train_sft.main(flags)
"""


def test_two_processes_take_the_same_steps_as_one(tmp_path):
    """With micro-batches of one sequence, some of which are unconditional and have no chain to
    train on. In float64: see conftest.py."""
    small = (
        "--examples 64 --steps 5 --batch_size 8 --micro_batch 1 --lr 1e-4 "
        "--condition_dropout 0.5 --eval_prompts 2"
    ).split()
    script = tmp_path / "run.py"
    for count in ("1", "2"):
        flags = []
        for shard in ("auto", "no"):
            flags.append([*small, "--shard", shard, "--out", str(tmp_path / shard / count)])
        program = TWO_PROCESSES.replace("ROOT", repr(str(ROOT))).replace("FLAGS", repr(flags))
        script.write_text(program)
        launcher = f"-m torch.distributed.run --standalone --nproc_per_node {count}".split()
        done = subprocess.run(
            [sys.executable, *launcher, str(script)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    start = safetensors.torch.load_file(ROOT / "toy" / "weights" / "model.safetensors")
    for shard in ("auto", "no"):
        one, two = tmp_path / shard / "1", tmp_path / shard / "2"
        assert gap(weights(one), weights(two)) < 1e-10 and gap(weights(one), start) > 1e-4
        for a, b in zip(rows(one), rows(two), strict=True):
            assert a["chain_loss"] == pytest.approx(b["chain_loss"], abs=2e-6)


def test_an_adapter_is_trained_and_is_a_model(tmp_path):
    flags = "--examples 64 --steps 4 --batch_size 8 --lr 1e-3 --eval_prompts 2".split()
    train_sft.main([*flags, "--lora", "4", "--dtype", "bfloat16", "--out", str(tmp_path)])
    assert (tmp_path / "step_000004" / "adapter_model.safetensors").exists()
    model, tokenizer = gotr1.load_policy(str(tmp_path / "step_000004"))
    sampled = gotr1.rollout(model, tokenizer, ["a red ball"], max_chain=60)
    assert sampled.image_tokens.shape == (1, 64)


def test_loss_is_one_mean_over_all_tokens_of_each_kind():
    """Against loops; the shares of two calls add up to the whole."""
    torch.manual_seed(0)
    logp, mask = -torch.rand(4, 9), (torch.rand(4, 9) < 0.6).float()
    mask[:, -5:] = 1
    n_chain, n_image = mask[:, :-5].sum(), mask[:, -5:].sum()
    chain = sum(-logp[n, s] for n in range(4) for s in range(4) if mask[n, s]) / n_chain
    image = sum(-logp[n, s] for n in range(4) for s in range(4, 9)) / 20
    whole = train_sft.sft_loss(logp, mask, 5, n_chain, n_image, 0.5, 2.0)
    assert whole[0].item() == pytest.approx((0.5 * chain + 2 * image).item(), rel=1e-6)
    assert [part.item() for part in whole[1:]] == pytest.approx(
        [chain.item(), image.item()], rel=1e-6
    )
    halves = [
        train_sft.sft_loss(logp[r], mask[r], 5, n_chain, n_image, 0.5, 2.0)
        for r in (slice(1), slice(1, 4))
    ]
    assert (halves[0][0] + halves[1][0]).item() == pytest.approx(whole[0].item(), rel=1e-6)


BAD_FLAGS = [
    (["--data", "/no/such/set", "--box_format", "pixels"], "/no/such/set"),
    (["--from_scratch", "--model", "other/model"], "--from_scratch builds the toy model"),
    (["--batch_size", "0"], "--batch_size is 0: expected 1 or more"),
    (["--lr", "nan"], "--lr is nan"),
    (["--condition_dropout", "1.5"], "--condition_dropout is 1.5: expected a share, 0 to 1"),
    (["--model", "/no/such/model"], "/no/such/model"),
    (["--dtype", "bfloat16", "--shard", "no"], "float32 shards"),
]


@pytest.mark.parametrize("flags, words", BAD_FLAGS, ids=[" ".join(flags) for flags, _ in BAD_FLAGS])
def test_bad_input_is_answered_in_one_line_and_leaves_nothing(flags, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train_sft.main([*flags, "--out", str(tmp_path / "run")])
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and message.startswith("error: ") and words in message
    assert not (tmp_path / "run").exists()


def test_data_flags_are_checked_before_anything_is_loaded(tmp_path, capsys):
    write_jsonl(tmp_path / "set")
    data = [
        "--data",
        str(tmp_path / "set" / "records.jsonl"),
        "--chain_field",
        "annotation",
        "--image_field",
        "file",
    ]
    wrong = {
        "--prompt_field": ["--box_format", "pixels"],
        "--box_format": ["--prompt_field", "caption"],
    }
    for flag, more in wrong.items():
        with pytest.raises(SystemExit) as stop:
            train_sft.main([*data, *more, "--out", str(tmp_path / "run")])
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert stop.value.code == 2 and flag in message, message
        assert not (tmp_path / "run").exists()


def test_too_many_bad_records_stop_the_run_with_the_report(tmp_path, capsys):
    write_jsonl(tmp_path / "set")
    lines = (tmp_path / "set" / "records.jsonl").read_text().splitlines()
    chosen = [lines[k] for k in (*BAD, *range(12))]  # 5 of 16: record 7 is bad as well
    (tmp_path / "set" / "records.jsonl").write_text("\n".join(chosen) + "\n")
    flags = [*jsonl_flags(tmp_path / "set"), "--max_chain", "80"]
    with pytest.raises(SystemExit) as stop:
        train_sft.main([*flags, *SMALL[:-2], "--out", str(tmp_path / "run")])
    message = capsys.readouterr().err
    assert (
        stop.value.code == 2 and "5 of 16 records skipped" in message and "broken image" in message
    )


def test_a_loss_that_is_not_a_number_stops_the_run_and_leaves_the_last_checkpoint(
    tmp_path, monkeypatch
):
    sft_loss, calls = train_sft.sft_loss, []

    def broken(*args, **settings):
        calls.append(1)
        loss, *parts = sft_loss(*args, **settings)
        return loss * (float("nan") if len(calls) == 5 else 1), *parts

    monkeypatch.setattr(train_sft, "sft_loss", broken)
    flags = "--examples 64 --steps 9 --batch_size 4 --eval_prompts 2 --save_every 2".split()
    with pytest.raises(RuntimeError, match="not finite at step 4: lower --lr, look at the data"):
        train_sft.main([*flags, "--out", str(tmp_path)])
    assert (tmp_path / "latest").read_text() == "step_000004"
    assert all(value.isfinite().all() for value in weights(tmp_path).values())


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_weights(tmp_path):
    """From nothing: also while the picture tokenizer trains and while pictures are encoded."""
    import random
    import time

    flags = (
        "--from_scratch --vq_steps 20 --examples 3000 --steps 30 --batch_size 8 "
        "--eval_prompts 4 --save_every 1 --eval_every 30"
    ).split()
    train_sft.main([*flags, "--out", str(tmp_path / "whole")])
    command = [sys.executable, "train_sft.py", *flags, "--out", str(tmp_path / "killed")]
    one, rng, kills = {**os.environ, "OMP_NUM_THREADS": "1"}, random.Random(0), 0
    for k in range(10):
        process = subprocess.Popen(
            command, cwd=ROOT, env=one, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        end = time.time() + 5 + 1.5 * k + 3 * rng.random()
        while process.poll() is None and time.time() < end:
            time.sleep(0.01)
        kills += process.poll() is None
        process.kill()
        process.wait()
    subprocess.run(command, cwd=ROOT, env=one, check=True, capture_output=True)
    assert kills >= 4
    assert gap(weights(tmp_path / "killed"), weights(tmp_path / "whole")) == 0
