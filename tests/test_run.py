"""Command line of all scripts, and the folder of a run.   pytest tests/test_run.py"""

import json
import os
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from engine import run

# Command line


@dataclass
class Sizes:
    size: int = 3  # how large
    share: float = 0.5  # how much
    preset: str = "small"  # defaults


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


def refused(capsys, config_class, *words) -> str:
    """The one line with which a command line is refused."""
    with pytest.raises(SystemExit) as stop:
        run.parse_args(config_class, "", list(words))
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    return message


def test_presets_change_defaults_and_flags_still_win():
    presets = {"small": {}, "large": {"size": 30, "share": 0.1}}

    def parse(*words):
        return run.parse_args(Sizes, "", list(words), presets)

    assert parse() == Sizes()
    assert parse("--preset", "large") == parse("--preset=large") == Sizes(30, 0.1, "large")
    assert parse("--size", "4", "--preset", "large") == Sizes(4, 0.1, "large")


def test_fields_without_a_default_are_positional():
    assert run.parse_args(Copy, "", ["a", "b"]) == Copy("a", "b")
    assert run.parse_args(Copy, "", ["--size", "4", "a", "b"]) == Copy("a", "b", 4)


def test_a_union_of_dataclasses_has_subcommands(capsys):
    assert run.parse_args(Copy | Count, "", ["copy", "a", "b", "--size", "4"]) == Copy("a", "b", 4)
    assert run.parse_args(Copy | Count, "", ["count", "a", "b"]) == Count(["a", "b"])
    assert "Expected one of {copy, count}" in refused(capsys, Copy | Count)
    with pytest.raises(SystemExit) as stop:
        run.parse_args(Copy | Count, "What it is for.", ["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and "What it is for." in shown and "Counts files." in shown


def test_bad_flags_end_the_program_in_one_line(capsys):
    assert "--siz" in refused(capsys, Sizes, "--siz", "4")
    assert "four" in refused(capsys, Sizes, "--size", "four")
    assert "where to" in refused(capsys, Copy, "a")
    assert "bad" in refused(capsys, Copy | Count, "bad")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (Sizes(size=0), "--size is 0: expected 1 or more"),
        (Sizes(share=float("nan")), "--share is nan: expected a number above 0"),
        (Sizes(share=0.0), "--share is 0.0: expected a number above 0"),
    ],
)
def test_a_setting_out_of_its_range_ends_the_program_in_one_line(config, words, capsys):
    run.check_ranges(Sizes(), at_least_one="size", above_zero="share")
    with pytest.raises(SystemExit) as stop:
        run.check_ranges(config, at_least_one="size", above_zero="share")
    assert stop.value.code == 2 and capsys.readouterr().err.strip() == f"error: {words}"


def test_zero_may_be_allowed(capsys):
    run.check_ranges(Sizes(size=0), not_negative="size share")
    with pytest.raises(SystemExit):
        run.check_ranges(Sizes(size=-1), not_negative="size share")
    assert capsys.readouterr().err == "error: --size is -1: expected 0 or more\n"


def test_it_loads_without_libraries_that_only_one_of_its_functions_needs():
    code = (
        "import sys; from engine import run; print({'matplotlib', 'transformers'} & {*sys.modules})"
    )
    house = Path(__file__).parent.parent
    shown = subprocess.run([sys.executable, "-c", code], cwd=house, capture_output=True, text=True)
    assert shown.stdout.strip() == "set()", shown.stderr


# The folder of a run


@dataclass
class Config:
    lr: float = 0.1
    parts: tuple[str, ...] = ("a", "b")


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


def test_log_drops_half_a_line_and_what_came_after_the_checkpoint(tmp_path):
    log = run.Log(tmp_path)
    for step in range(5):
        log.write({"step": step, "reward": step / 3})
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "rew')
    assert [row["step"] for row in run.read_log(tmp_path)] == [0, 1, 2, 3, 4]
    run.Log(tmp_path, start=3).write({"step": 3, "reward": 9.0})
    rows = [(row["step"], row["reward"]) for row in run.read_log(tmp_path)]
    assert rows[-2:] == [(2, 0.666667), (3, 9.0)]


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
    run.open_run(str(tmp_path / "run"), Config())
    run.open_run(str(tmp_path / "run"), Config())
    with pytest.raises(SystemExit) as stop:
        run.open_run(str(tmp_path / "run"), Config(lr=0.2))
    assert stop.value.code == 2 and "--lr 0.1 (now 0.2)" in capsys.readouterr().err
    (tmp_path / "run" / "config.json").write_text("{")
    with pytest.raises(SystemExit):
        run.open_run(str(tmp_path / "run"), Config())
    assert "cannot use" in capsys.readouterr().err


def test_weights_and_biases_is_imported_only_when_asked_for_and_resumed_by_id(
    tmp_path, monkeypatch, capsys
):
    started, logged = [], []

    class StandIn(types.ModuleType):
        """The module and its run in one."""

        def init(self, **settings):
            started.append(settings)
            return self

        def log(self, row, step):
            logged.append((row["reward"], step))

    folder = run.open_run(str(tmp_path / "run"), Config())
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    run.Log(folder)
    with pytest.raises(SystemExit) as stop:
        run.Log(folder, wandb="project")
    assert stop.value.code == 2 and "pip install wandb" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "wandb", StandIn("wandb"))
    for _ in range(2):
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
    assert (tmp_path / "curves.png").stat().st_size > 1000
    assert json.dumps(rows) == before
