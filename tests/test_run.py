"""The folder of a run is readable whenever the run was killed.   pytest tests/test_run_folder.py"""

import dataclasses
import json
import sys
import types

import pytest
import torch

from engine import run


@dataclasses.dataclass
class Config:
    lr: float = 0.1
    parts: tuple[str, ...] = ("a", "b")


def test_log_drops_half_a_line_and_what_came_after_the_checkpoint(tmp_path):
    log = run.Log(tmp_path)
    for step in range(5):
        log.write({"step": step, "reward": step / 3})
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "rew')
    assert [row["step"] for row in run.read_log(tmp_path)] == [0, 1, 2, 3, 4]
    run.Log(tmp_path, start=3).write({"step": 3, "reward": 9.0})
    assert [(row["step"], row["reward"]) for row in run.read_log(tmp_path)][-2:] == [
        (2, 0.666667),
        (3, 9.0),
    ]


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
    run = types.SimpleNamespace(log=lambda row, step: logged.append((row["reward"], step)))
    stub = types.ModuleType("wandb")
    stub.init = lambda **settings: started.append(settings) or run
    folder = run.open_run(str(tmp_path / "run"), Config())
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    run.Log(folder)
    with pytest.raises(SystemExit) as stop:
        run.Log(folder, wandb="project")
    assert stop.value.code == 2 and "pip install wandb" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "wandb", stub)
    for _ in range(2):
        run.Log(folder, wandb="project").write({"step": 4, "reward": 1.0})
    assert (
        started[0] == started[1]
        and started[0]["project"] == "project"
        and started[0]["config"]["lr"] == 0.1
    )
    assert logged == [(1.0, 4)] * 2


@pytest.mark.parametrize("saved", [True, False])
def test_whatever_ends_a_run_its_last_line_says_what_is_left(tmp_path, capsys, saved):
    hook = sys.excepthook
    folder = run.open_run(str(tmp_path / "run"), Config())
    run.Log(folder)
    if saved:
        run.write_whole(folder / "latest", "step_000007")
    try:
        sys.excepthook(torch.OutOfMemoryError, torch.OutOfMemoryError("no memory"), None)
    finally:
        sys.excepthook = hook
    last = capsys.readouterr().err.strip().splitlines()[-1]
    left = f"{folder}/step_000007 is whole: the same command continues from it"
    assert (
        last.startswith(left if saved else "no checkpoint was written yet")
        and "--micro_batch" in last
    )


def test_curves_are_drawn_from_rows_that_lack_a_column(tmp_path):
    rows = [{"step": k, "a": k / 2} | ({"b": 1.0} if k == 3 else {}) for k in range(5)]
    run.plot_curves(rows, {"left": ["a", "b"], "right": ["c"]}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000
    assert json.loads(json.dumps(rows)) == rows
