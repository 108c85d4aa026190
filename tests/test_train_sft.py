"""SFT from data on disk: bad records counted, losses fall, resume and several processes change
nothing.   pytest tests/test_train_sft.py"""

import functools
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from test_checkpoints import without_markers
from test_engine import run_in_two_processes

import gotr1
import train_sft
from engine import checkpoints
from render_boxes import parse_chain
from toy import world as toy

ROOT = Path(__file__).parent.parent
GOOD = 60  # records; the bad ones are among them
BAD = {7: "no box", 20: "broken image", 33: "chain too long", 46: "box outside"}
SMALL = (
    "--steps 12 --batch_size 8 --micro_batch 4 --lr 1e-3 --look_every 12 --save_every 5 "
    "--max_chain 80"
).split()


def in_pixels(corner: re.Match) -> str:
    x, y = (int(number) * 128 / 1000 for number in corner.groups())
    return f"({x:g},{y:g})"


def write_data(folder: Path) -> list[str]:
    """JSON lines beside a folder of pictures, boxes in pixels of a picture four times as large;
    returns the chains of the good records. Other styles: tests/test_data.py."""
    folder.mkdir()
    (folder / "pictures").mkdir()
    rng = np.random.default_rng(11)
    chains, lines = [], []
    for k in range(GOOD + len(BAD)):
        scene = toy.make_example(rng)
        chains.append(scene.chain)
        # as in the GoT paper: red ball (125,250),(375,500)
        plain = re.sub(r"<\|(obj|box)_(start|end)\|>", "", scene.chain)
        text = re.sub(r"\((\d+),(\d+)\)", in_pixels, plain)
        file = io.BytesIO()
        scene.image.resize((128, 128), 0).save(file, "PNG")
        picture = file.getvalue()
        if BAD.get(k) == "no box":
            text = "just words"
        elif BAD.get(k) == "broken image":
            picture = picture[:100]
        elif BAD.get(k) == "chain too long":
            text = "very " * 200 + text
        elif BAD.get(k) == "box outside":
            text = "a red ball (10,10),(500,60)"
        name = f"pictures/{k}.png"
        (folder / name).write_bytes(picture)
        lines.append(json.dumps({"caption": scene.prompt, "annotation": text, "file": name}))
    (folder / "records.jsonl").write_text("\n".join(lines) + "\n")
    return [chain for k, chain in enumerate(chains) if k not in BAD]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """(flags, the chains of the good records) of a set on disk."""
    folder = tmp_path_factory.mktemp("data") / "set"
    chains = write_data(folder)
    fields = "--prompt_field caption --chain_field annotation --image_field file".split()
    return ["--data", str(folder / "records.jsonl"), *fields, "--box_format", "pixels"], chains


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
    through, cut = tmp_path / "through", tmp_path / "cut"
    loaded = []
    load_training = train_sft.load_training

    def loading(*args):
        loaded.append(load_training(*args))
        return loaded[-1]

    monkeypatch.setattr(train_sft, "load_training", loading)
    train_sft.main([*flags, *SMALL, "--out", str(through)])
    log = rows(through)
    assert log[-1]["held_out_chain"] > 0 and (through / "samples_000012.png").exists()
    assert log[-1]["forced"] == 0
    for loss in ("chain_loss", "image_loss"):  # the shipped model knows this world: little is left
        first, last = log[:3], log[-3:]
        assert np.mean([row[loss] for row in last]) < np.mean([row[loss] for row in first]), loss

    # what was skipped, and the first record of each cause
    printed = capsys.readouterr()
    assert f"{len(BAD)} of {GOOD + len(BAD)} records skipped" in printed.out
    for index, cause in BAD.items():
        assert f"record {index} is skipped: {cause}: " in printed.out + printed.err

    # what was trained on is what was meant: the same boxes, to a pixel of the large picture
    prepared = loaded[0].prepared
    assert len(prepared) == GOOD
    _, got_chains, tokens = prepared.batch(list(range(GOOD)))
    for mine, meant in zip(got_chains, chains, strict=True):
        for a, b in zip(parse_chain(mine), parse_chain(meant), strict=True):
            assert a.name == b.name and np.abs(np.subtract(a[1:], b[1:])).max() <= 1
    assert tokens.shape == (GOOD, 64)

    sft_loss, calls = train_sft.sft_loss, []

    def dying(*args, **settings):
        calls.append(1)
        # two micro-batches per step: in step 8, three after the checkpoint of step 5
        if len(calls) == 2 * 8:
            raise RuntimeError("power cut")
        return sft_loss(*args, **settings)

    # no picture is opened again, nor by the run that goes on
    monkeypatch.setattr(train_sft, "sft_loss", dying)
    flags = [*flags, *SMALL, "--cache", str(through / "cache"), "--out", str(cut)]
    monkeypatch.setattr(gotr1, "encode_images", None)
    with pytest.raises(RuntimeError, match="power cut"):
        train_sft.main(flags)
    assert (cut / "latest").read_text() == "step_000005"
    train_sft.main(flags)
    assert gap(weights(cut), weights(through)) == 0


def test_dry_run_shows_records_and_writes_only_a_sheet(data, tmp_path, capsys):
    train_sft.main([*data[0], "--dry_run", "--max_chain", "80", "--out", str(tmp_path / "look")])
    printed = capsys.readouterr().out
    assert data[1][0] in printed
    assert [path.suffix for path in (tmp_path / "look").iterdir()] == [".png"]


def test_neither_micro_batches_nor_checkpointing_nor_two_processes_change_the_steps(
    tmp_path, float64
):
    """With micro-batches of one sequence, some of which are unconditional and have no chain to
    train on. In float64: see conftest.py."""
    small = (
        "--examples 64 --steps 4 --batch_size 8 --lr 1e-4 --condition_dropout 0.5 --eval_prompts 2"
    ).split()
    one = tmp_path / "one"
    train_sft.main([*small, "--micro_batch", "1", "--out", str(one)])
    start = safetensors.torch.load_file(ROOT / "toy" / "weights" / "model.safetensors")
    assert gap(weights(one), start) > 1e-4
    checkpointing = ["--micro_batch", "3", "--gradient_checkpointing"]
    train_sft.main([*small, *checkpointing, "--out", str(tmp_path / "checkpointing")])

    flags = [*small, "--micro_batch", "1", "--out", str(tmp_path / "two processes")]
    run_in_two_processes(f"import train_sft\ntrain_sft.main({flags})", tmp_path)
    for name in ("checkpointing", "two processes"):
        assert gap(weights(one), weights(tmp_path / name)) < 1e-10, name
        for a, b in zip(rows(one), rows(tmp_path / name), strict=True):
            assert a["chain_loss"] == pytest.approx(b["chain_loss"], abs=2e-6)  # six decimals
            assert a["image_loss"] == pytest.approx(b["image_loss"], abs=2e-6)


def test_an_adapter_is_trained_and_is_a_model(tmp_path):
    flags = "--examples 64 --steps 2 --batch_size 8 --lr 1e-3 --eval_prompts 2".split()
    train_sft.main([*flags, "--lora", "4", "--dtype", "bfloat16", "--out", str(tmp_path)])
    assert (tmp_path / "step_000002" / "adapter_model.safetensors").exists()
    model, tokenizer = gotr1.load_policy(str(tmp_path / "step_000002"))
    sampled = gotr1.rollout(model, tokenizer, ["a red ball"], max_chain=60)
    assert sampled.image_tokens.shape == (1, 64)


def test_loss_is_one_mean_over_all_tokens_of_each_kind():
    """Against loops; the shares of two calls add up to the step's."""
    torch.manual_seed(0)
    logp, mask = -torch.rand(4, 9), (torch.rand(4, 9) < 0.6).float()
    mask[:, -5:] = 1
    counts = mask[:, :-5].sum(), mask[:, -5:].sum()
    chain = sum(-logp[n, s] for n in range(4) for s in range(4) if mask[n, s]) / counts[0]
    image = sum(-logp[n, s] for n in range(4) for s in range(4, 9)) / 20
    step = torch.stack(train_sft.sft_loss(logp, mask, 5, *counts))
    assert step.tolist() == pytest.approx([chain.item(), image.item()], rel=1e-6)
    shares = torch.zeros(2)
    for part in (slice(1), slice(1, 4)):
        shares += torch.stack(train_sft.sft_loss(logp[part], mask[part], 5, *counts))
    assert shares.tolist() == pytest.approx(step.tolist(), rel=1e-6)


def test_the_tokens_that_are_trained_are_those_of_the_normaliser(tmp_path, monkeypatch):
    """Also where half of the samples have lost their condition, and their chain with it."""
    sft_loss, seen = train_sft.sft_loss, []

    def counting(logp, mask, images, n_chain, n_image):
        trained = [mask[:, :-images].sum().item(), mask[:, -images:].sum().item()]
        seen.append((trained, [n_chain.item(), n_image.item()], len(mask)))
        return sft_loss(logp, mask, images, n_chain, n_image)

    def stop(*_):
        raise InterruptedError

    monkeypatch.setattr(train_sft, "sft_loss", counting)
    monkeypatch.setattr(train_sft.trainer.Engine, "step", stop)
    flags = "--examples 16 --batch_size 8 --micro_batch 3 --condition_dropout 0.5".split()
    with pytest.raises(InterruptedError):
        train_sft.main([*flags, "--eval_prompts", "1", "--out", str(tmp_path)])
    assert [size for _, _, size in seen] == [3, 3, 2]
    trained = np.sum([counts for counts, _, _ in seen], axis=0).tolist()
    assert 0 < trained[0]
    assert trained[1] == 8 * 64
    for _, normaliser, _ in seen:
        assert normaliser == trained


BAD_FLAGS = [
    (["--data", "/no/such/set", "--box_format", "pixels"], "/no/such/set"),
    (["--from_scratch", "--model", "other/model"], "--from_scratch is for the toy"),
    (["--batch_size", "0"], "--batch_size is 0: expected 1 or more"),
    (["--lr", "nan"], "--lr is nan"),
    (["--condition_dropout", "1.5"], "--condition_dropout is 1.5: expected a share, 0 to 1"),
    (["--model", "/no/such/model"], "/no/such/model"),
    (["DATA", "--box_format", ""], "--box_format"),
    (["DATA", "--prompt_field", "name"], "--prompt_field"),
]


@pytest.mark.parametrize("flags, words", BAD_FLAGS, ids=[" ".join(flags) for flags, _ in BAD_FLAGS])
def test_bad_input_is_answered_in_one_line_and_leaves_nothing(flags, words, data, tmp_path, capsys):
    if flags[0] == "DATA":
        flags = [*data[0], *flags[1:]]
    with pytest.raises(SystemExit) as stop:
        train_sft.main([*flags, "--out", str(tmp_path / "run")])
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and message.startswith("error: ") and words in message
    assert not (tmp_path / "run").exists()


def test_an_adapter_is_refused_where_the_markers_would_need_new_embeddings(tmp_path, capsys):
    """An adapter trains none: they would stay random."""
    shutil.copytree(checkpoints.TOY, tmp_path / "base")
    without_markers(tmp_path / "base")
    flags = ["--model", str(tmp_path / "base"), "--lora", "4", "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as stop:
        train_sft.main([*flags, "--examples", "64", "--steps", "1"])
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and "knows no <|box_start|>, <|box_end|>, " in message
    assert message.endswith("train all weights first (without --lora)")
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_a_number_stops_the_run_and_leaves_the_last_checkpoint(
    tmp_path, monkeypatch
):
    sft_loss, calls = train_sft.sft_loss, []

    def broken(*args, **settings):
        calls.append(1)
        chain, image = sft_loss(*args, **settings)
        return chain * (float("nan") if len(calls) == 4 else 1), image

    monkeypatch.setattr(train_sft, "sft_loss", broken)
    flags = "--examples 64 --steps 9 --batch_size 4 --eval_prompts 2 --save_every 2".split()
    with pytest.raises(RuntimeError, match="not finite at step 3: lower --lr, look at the data"):
        train_sft.main([*flags, "--out", str(tmp_path)])
    assert (tmp_path / "latest").read_text() == "step_000002"
    assert all(value.isfinite().all() for value in weights(tmp_path).values())


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_weights(tmp_path):
    """From nothing: also while the picture tokenizer trains and while pictures are encoded."""
    flags = (
        "--from_scratch --vq_steps 20 --examples 3000 --steps 30 --batch_size 8 "
        "--eval_prompts 4 --save_every 1 --look_every 30"
    ).split()
    train_sft.main([*flags, "--out", str(tmp_path / "through")])
    command = [sys.executable, "train_sft.py", *flags, "--out", str(tmp_path / "killed")]
    start = functools.partial(
        subprocess.run,
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    rng = random.Random(0)
    kills = 0
    for k in range(10):
        try:
            start(timeout=5 + 1.5 * k + 3 * rng.random())
        except subprocess.TimeoutExpired:  # then it was killed, by SIGKILL
            kills += 1
    start(check=True)
    assert kills >= 4
    assert gap(weights(tmp_path / "killed"), weights(tmp_path / "through")) == 0
