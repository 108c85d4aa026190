"""Command line of all scripts, and the folder of a run.   pytest tests/test_run.py"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import train_grpo
import train_sft
from engine import run

# Command line


@dataclass
class Sizes:
    size: int = 3  # how large
    share: float = 0.5  # how much
    preset: str = "small"  # defaults
    loss: float = 0.0  # which may be zero


@dataclass
class Copy:
    """Copies a file."""

    source: str  # what to copy
    target: str  # where to
    size: int = 3  # how large


@dataclass
class Count:
    """Counts files."""

    files: list[str]  # what to count


def test_presets_change_defaults_and_flags_still_win():
    presets = {"small": {}, "large": {"size": 30, "share": 0.1}}

    def parse(*words):
        return run.parse_args(Sizes, "", list(words), presets)

    assert parse() == Sizes()
    run.check_ranges(Sizes(), at_least_one="size", above_zero="share", not_negative="loss")
    assert parse("--preset", "large") == parse("--preset=large") == Sizes(30, 0.1, "large")
    assert parse("--size", "4", "--preset", "large") == Sizes(4, 0.1, "large")


def test_fields_without_a_default_are_positional_and_a_union_has_subcommands(capsys):
    assert run.parse_args(Copy, "", ["--size", "4", "a", "b"]) == Copy("a", "b", 4)
    assert run.parse_args(Copy | Count, "", ["copy", "a", "b", "--size", "4"]) == Copy("a", "b", 4)
    assert run.parse_args(Copy | Count, "", ["count", "a", "b"]) == Count(["a", "b"])
    with pytest.raises(SystemExit) as stop:
        run.parse_args(Copy | Count, "What it is for.", ["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and "What it is for." in shown and "Counts files." in shown


@pytest.mark.parametrize(
    ("config_class", "flags", "words"),
    [
        (Sizes, "--siz 4", "--siz"),
        (Sizes, "--size four", "four"),
        (Copy, "a", "where to"),
        (Copy | Count, "bad", "bad"),
        (Copy | Count, "", "Expected one of {copy, count}"),
        (Sizes, "--size 0", "--size is 0: expected 1 or more"),
        (Sizes, "--share nan", "--share is nan: expected a number above 0"),
        (Sizes, "--share 0", "--share is 0.0: expected a number above 0"),
        (Sizes, "--loss -1", "--loss is -1.0: expected 0 or more"),
    ],
)
def test_bad_flags_end_the_program_in_one_line(config_class, flags, words, capsys):
    with pytest.raises(SystemExit) as stop:
        config = run.parse_args(config_class, "", flags.split())
        run.check_ranges(config, at_least_one="size", above_zero="share", not_negative="loss")
    message = capsys.readouterr().err
    assert stop.value.code == 2 and words in message
    assert message.startswith("error: ") and message.count("\n") == 1


RUNNING = """
import sys, time
from pathlib import Path

import torch

from engine import run

print({"matplotlib", "transformers"} & {*sys.modules}, flush=True)
run.open_run(sys.argv[1], run.dataclasses.make_dataclass("Config", [])())
stopped = run.watch_signals(torch.device("cpu"))
print("open", flush=True)
while True:  # as long as an evaluation, which does not look at `stopped`
    time.sleep(0.01)
"""


def test_a_folder_has_one_process_and_the_second_ctrl_c_ends_it_at_once(tmp_path, capsys):
    """Also: it loads without libraries that only one of its functions needs."""
    process = subprocess.Popen(
        [sys.executable, "-c", RUNNING, str(tmp_path)],
        cwd=Path(__file__).parent.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline().strip() == "set()"
        assert process.stdout.readline().strip() == "open"
        with pytest.raises(SystemExit) as stop:
            run.open_run(str(tmp_path), Nothing())
        expected = (
            f"error: {tmp_path} is in use by another process: wait for it, or give another --out"
        )
        assert stop.value.code == 2 and capsys.readouterr().err.strip() == expected

        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == "\n"
        assert process.stderr.readline().strip() == (
            "stopping after this step; Ctrl-C again ends the program at once"
        )
        time.sleep(0.1)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == -signal.SIGINT
    finally:
        process.kill()
    run.open_run(str(tmp_path), Nothing())  # the lock is gone with the process
    run.open_run(str(tmp_path), Nothing())  # and a process does not lock itself out


# The folder of a run


@dataclass
class Nothing:
    pass


@dataclass
class Config:
    lr: float = 0.1
    parts: tuple[str, ...] = ("a", "b")
    out: str = "out/run"
    micro_batch: int = 4
    wandb: str = ""


def test_a_file_is_replaced_whole_and_nothing_is_left_beside(tmp_path, monkeypatch):
    path = tmp_path / "file"
    run.write_whole(path, "old")
    run.write_whole(path, b"\x00new")
    assert path.read_bytes() == b"\x00new"

    def full_disk(self, content):
        self.touch()
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="no space left"):
        run.write_whole(path, b"newer")
    assert path.read_bytes() == b"\x00new" and os.listdir(tmp_path) == ["file"]


def test_log_has_six_digits_and_drops_half_a_line_and_what_came_after_the_checkpoint(tmp_path):
    log = run.Log(tmp_path)
    for step in range(5):
        log.write({"step": step, "lr": step * 1e-6 / 3})
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "l')
    assert [row["step"] for row in run.read_log(tmp_path)] == [0, 1, 2, 3, 4]
    log = run.Log(tmp_path, start=3)
    log.write({"step": 3, "lr": 1234567.8})
    assert [row["step"] for row in log.rows] == [0, 1, 2, 3], "what the guard against collapse sees"
    rows = [(row["step"], row["lr"]) for row in run.read_log(tmp_path)]
    assert rows[-2:] == [(2, 6.66667e-07), (3, 1234570.0)]


def test_processes_that_see_different_checkpoints_are_told_so(tmp_path, monkeypatch, capsys):
    """As on two machines whose --out is not one folder."""
    assert run.checkpoint_to_resume(tmp_path) is None
    run.write_whole(tmp_path / "latest", "step_000007")
    assert run.checkpoint_to_resume(tmp_path) == tmp_path / "step_000007"
    monkeypatch.setattr(run, "gather_list", lambda names: [*names, "none"])
    with pytest.raises(SystemExit) as stop:
        run.checkpoint_to_resume(tmp_path)
    assert stop.value.code == 2 and "none, step_000007" in capsys.readouterr().err


def test_the_same_settings_go_on_and_others_are_named(tmp_path, capsys):
    """Only what changes the result is compared: a run goes on in a folder that was moved, with
    other sizes."""
    trainers = {field.name for field in dataclasses.fields(train_grpo.Config)}
    trainers |= {field.name for field in dataclasses.fields(train_sft.Config)}
    assert set(run.FREE) <= trainers, "no such setting"
    run.open_run(str(tmp_path / "run"), Config())
    (tmp_path / "run").rename(tmp_path / "moved")
    moved = Config(out=str(tmp_path / "moved"), micro_batch=1, wandb="project")
    run.open_run(moved.out, moved)
    assert json.loads((tmp_path / "moved" / "config.json").read_text())["micro_batch"] == 1
    with pytest.raises(SystemExit) as stop:
        run.open_run(moved.out, Config(lr=0.2, micro_batch=2))
    message = capsys.readouterr().err
    assert stop.value.code == 2 and "--lr 0.1 (now 0.2): give" in message
    (tmp_path / "moved" / "config.json").write_text("{")
    with pytest.raises(SystemExit):
        run.open_run(moved.out, Config())
    assert "cannot use" in capsys.readouterr().err


def test_weights_and_biases_is_looked_for_at_once_and_resumed_by_id(tmp_path, monkeypatch, capsys):
    started, logged = [], []

    class StandIn(types.ModuleType):
        """The module and its run in one."""

        def init(self, **settings):
            started.append(settings)
            return self

        def log(self, row, step):
            logged.append((row["reward"], step))

    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    run.check_wandb("")
    for main in (train_grpo.main, train_sft.main):
        with pytest.raises(SystemExit) as stop:
            main(["--wandb", "project", "--out", str(tmp_path / "run"), "--model", "not looked at"])
        assert stop.value.code == 2 and "pip install wandb" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()

    folder = run.open_run(str(tmp_path / "run"), Config())
    monkeypatch.setitem(sys.modules, "wandb", StandIn("wandb"))
    for name in ("run", "moved"):
        folder = folder.rename(tmp_path / name)
        run.Log(folder, wandb="project").write({"step": 4, "reward": 1.0})
    assert started[0] == started[1]
    assert started[0]["project"] == "project" and started[0]["config"]["lr"] == 0.1
    assert logged == [(1.0, 4)] * 2


@pytest.mark.parametrize("saved", [True, False])
def test_whatever_ends_a_run_its_last_line_says_what_is_left(tmp_path, capsys, monkeypatch, saved):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # put back after the test
    folder = run.open_run(str(tmp_path / "run"), Config())
    run.explain_crashes(folder)
    if saved:
        run.write_whole(folder / "latest", "step_000007")
    sys.excepthook(torch.OutOfMemoryError, torch.OutOfMemoryError("no memory"), None)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    expected = "no checkpoint was written yet"
    if saved:
        expected = f"{folder}/step_000007 is whole: the same command continues from it"
    assert last.startswith(expected) and "--micro_batch" in last


def test_curves_are_drawn_from_rows_that_lack_a_column(tmp_path):
    rows = [{"step": k, "a": k / 2} for k in range(5)]
    rows[3]["b"] = 1.0
    before = json.dumps(rows)
    run.plot_curves(rows, {"left": ["a", "b"], "right": ["c"]}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000 and json.dumps(rows) == before
