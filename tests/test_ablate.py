"""The studies of the toy: which trainings, how they are run and resumed, and what is made of their
files.   pytest tests/test_ablate.py"""

import doctest
import json
import shlex
import signal
from pathlib import Path

import pytest

import train_grpo
from engine import run
from toy import ablate

STUB = """
import os, pathlib, signal, sys, time

folder = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
folder.mkdir(exist_ok=True)

def save(number, frame):
    (folder / "saved").touch()
    sys.exit(0)

signal.signal(signal.SIGTERM, save)
print("threads", os.environ["OMP_NUM_THREADS"], flush=True)
WHAT_HAPPENS
(folder / "eval_after.json").write_text("{}")
"""
FAILS = """
if folder.name == "ri_seed0":  # once the other has begun
    while not (folder.parent / "pi_seed0").exists():
        time.sleep(0.05)
    time.sleep(0.3)
    sys.exit(3)
time.sleep(30)
"""
INTERRUPTS = """
os.kill(os.getppid(), signal.SIGINT)  # what Ctrl-C does to the study
time.sleep(30)
"""


@pytest.fixture(autouse=True)
def signals():
    """`main` changes what SIGTERM does, and a training that ran in this process before, what Ctrl-C
    does."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def stub(monkeypatch, tmp_path):
    """A function that puts a script in place of train_grpo.py, and the folder of the study."""

    def put(what_happens: str = "") -> Path:
        script = tmp_path / "stub.py"
        script.write_text(STUB.replace("WHAT_HAPPENS", what_happens))
        monkeypatch.setattr(ablate, "TRAINER", script)
        return tmp_path / "out"

    return put


def plan_of(name: str, out, **flags) -> list[ablate.Training]:
    return ablate.plan(ablate.STUDIES[name], ablate.Config(out=str(out), **flags))


def measures(value: float) -> dict:
    names = set()
    for study in ablate.STUDIES.values():
        names |= set(study.columns)
    return dict.fromkeys(names - {"tau"}, value)


def finish(training: ablate.Training, before: float, after: float, steps: int = 60) -> None:
    """The files of a finished training: all measures have the same value."""
    training.folder.mkdir(parents=True)
    for name, step, value in (("before", 0, before), ("after", steps, after)):
        content = json.dumps({"step": step, **measures(value)})
        (training.folder / f"eval_{name}.json").write_text(content)
    log = []
    for step in range(steps):
        log.append(f'{{"step": {step}, "group_std": 0.1, "layout_variety": {after}}}\n')
    (training.folder / "log.jsonl").write_text("".join(log))


def row_of(report: str, title: str) -> dict[str, str]:
    """The cells of a row of the table, by the names of the columns."""
    table = [line[1:-1] for line in report.splitlines() if line.startswith("|")]
    head = [cell.strip() for cell in table[0].split("|")]
    for line in table[1:]:
        cells = [cell.strip() for cell in line.split("|")]
        if cells[0] == title:
            return dict(zip(head, cells, strict=True))
    raise AssertionError(f"no row {title} in\n{report}")


# Which trainings


def test_the_plan_of_three_seeds(tmp_path):
    folders = {name: [t.folder for t in plan_of(name, tmp_path)] for name in ablate.STUDIES}
    assert [len(folders[name]) for name in ("rewards", "judge", "variety")] == [42, 12, 18]
    shared = set(folders["rewards"]) & set(folders["judge"])
    assert shared == {tmp_path / "60_steps" / f"all_seed{seed}" for seed in range(3)}
    assert tmp_path / "220_steps" / "group_std_kl0.1_seed2" in folders["variety"]
    assert [t.seed for t in plan_of("judge", tmp_path)] == 4 * [0] + 4 * [1] + 4 * [2]


def test_train_grpo_understands_the_flags(tmp_path):
    found = {}
    for name in ablate.STUDIES:
        for training in plan_of(name, tmp_path, seeds=2, flags="--group 8"):
            words = shlex.split(training.flags)
            flags = run.parse_args(train_grpo.Config, "", words, train_grpo.PRESETS)
            assert (flags.seed, flags.group) == (training.seed, 8)
            found[name, training.row.key] = flags
    everything = ("sem", "spa", "ri", "pi", "hps")
    assert found["rewards", "sem_ri_pi"].rewards == ("sem", "ri", "pi")
    assert found["rewards", "all"].rewards == everything == found["rewards", "sum"].rewards
    assert found["rewards", "all"].advantage == "group_std"
    assert found["rewards", "mean"].advantage == "mean"
    assert (found["rewards", "sum"].combine, found["rewards", "pr_kl_0.1"].kl) == ("sum", 0.1)
    assert found["judge", "toy_0.4"].judge == "toy:0.4"
    varied = found["variety", "group_std_kl0.3"]
    assert (varied.advantage, varied.kl, varied.steps) == ("group_std", 0.3, 220)
    assert varied.look_every == 55 and varied.evaluate_looks
    unlike = {str(flags) for flags in found.values()}
    assert len(unlike) == len(found) - 1, "the judge without errors is the row `all` of rewards"


@pytest.mark.parametrize(
    "words, complaint",
    [
        (["--rows", "ri", "pie"], "--rows pie: expected some of pr ri"),
        (["--seeds", "0"], "--seeds is 0"),
        (["--rows", "ri", "--steps", "6"], "(now --seed 0 --steps 6"),
    ],
)
def test_bad_settings_are_one_line(words, complaint, capsys, tmp_path):
    (training,) = plan_of("rewards", tmp_path, rows=("ri",), seeds=1, steps=6)
    training.output.parent.mkdir()
    training.output.write_text("--seed 0 --steps 5\n")
    with pytest.raises(SystemExit) as stop:
        ablate.main(["--out", str(tmp_path), *words])
    errors = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(errors) == 1 and complaint in errors[0]


# Train


def test_each_training_is_run_once_on_one_thread(stub, capsys):
    out = stub()
    trainings = plan_of("rewards", out, rows=("ri", "pi", "all"), seeds=2)
    finish(trainings[0], before=0.2, after=0.5)
    words = ["--out", str(out), "--rows", "ri", "pi", "all", "--seeds", "2", "--jobs", "2"]
    for _ in range(2):
        ablate.main(words)
    first, *others = trainings
    assert not first.output.exists()
    for training in others:
        assert training.output.read_text() == f"{training.flags}\nthreads 1\n"
    shown = capsys.readouterr().out
    assert "1 of 6 trainings are finished" in shown and "6 of 6 trainings are finished" in shown


def test_a_failed_training_stops_the_study(stub, capsys):
    out = stub(FAILS)
    words = ["--out", str(out), "--rows", "ri", "pi", "all", "--seeds", "1", "--jobs", "2"]
    with pytest.raises(SystemExit) as stop:
        ablate.main(words)
    assert stop.value.code == 2
    assert "ri_seed0 ended early" in capsys.readouterr().err
    assert (out / "60_steps" / "pi_seed0" / "saved").exists()
    assert not (out / "60_steps" / "all_seed0").exists()


def test_ctrl_c_lets_the_trainings_save(stub, capsys):
    out = stub(INTERRUPTS)
    with pytest.raises(SystemExit) as stop:
        ablate.main(["--out", str(out), "--rows", "ri", "pi", "--seeds", "1", "--jobs", "1"])
    assert stop.value.code == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert (out / "60_steps" / "ri_seed0" / "saved").exists()
    assert not (out / "60_steps" / "pi_seed0").exists()


# Tables and figures


def test_mean_and_range():
    assert doctest.testmod(ablate).failed == 0


def test_study_rewards_of_made_up_trainings(monkeypatch, capsys, tmp_path):
    from matplotlib import figure

    figures = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *a, **k: figures.append(self))
    ri_0, all_0, ri_1, all_1 = plan_of("rewards", tmp_path, rows=("ri", "all"), seeds=2)
    finish(ri_0, before=0.25, after=0.5)
    finish(ri_1, before=0.75, after=0.75)
    finish(all_1, before=0.75, after=0.875)
    words = ["--out", str(tmp_path), "--rows", "ri", "all", "--seeds", "2", "--no_train"]
    ablate.main(words)
    report = (tmp_path / "rewards.md").read_text()
    assert report in capsys.readouterr().out
    assert row_of(report, "SFT model")["total"] == "0.50 (0.25 to 0.75)"
    assert row_of(report, "R_RI")["complex: picture right"] == "0.62 (0.50 to 0.75)"
    assert row_of(report, "R_RI")["seeds"] == "0, 1"
    assert row_of(report, "all")["total"] == "0.88"
    assert row_of(report, "all")["seeds"] == "1 (missing: 0)"

    complex_axis = figures[0].axes[2]
    bars = [bar.get_width() for bar in complex_axis.patches]
    assert bars == [0.5, 0.625, 0.875]
    diamonds = []
    for line in complex_axis.lines:
        if line.get_marker() == "D":
            diamonds += list(line.get_xdata())
    assert diamonds == [0.3490, 0.2488, 0.3749]  # table 3: the base, R_RI, all


def test_study_judge_and_its_taus(tmp_path, policy):
    """A judge that errs agrees less with the exact one; a row without trainings is shown."""
    exact, a_little, much = plan_of("judge", tmp_path, rows=("all", "toy_0.1", "toy_0.4"), seeds=1)
    finish(exact, before=0.25, after=0.9)
    finish(a_little, before=0.25, after=0.8)
    table = ablate.read_results([exact, a_little, much])
    ablate.add_taus(table, prompts=24)
    taus = [line.values("tau") for line in table]
    assert taus[0] == taus[3] == [] and taus[1] == [1]
    assert 0 < taus[2][0] < 1
    report = ablate.report(ablate.JUDGE, [exact, a_little, much], table)
    assert row_of(report, "p = 0")["tau"] == "1.00"
    missing = row_of(report, "p = 0.4")
    assert (missing["total"], missing["seeds"].strip()) == ("–", "(missing: 0)")


def test_study_variety_of_made_up_trainings(tmp_path):
    mean, group_std = plan_of("variety", tmp_path, rows=("mean", "group_std"), seeds=1)
    finish(mean, before=0.9, after=0.8, steps=220)
    group_std.folder.mkdir(parents=True)  # it has just begun
    words = ["--study", "variety", "--out", str(tmp_path), "--seeds", "1", "--no_train"]
    ablate.main(words)
    report = (tmp_path / "variety.md").read_text()
    assert row_of(report, "mean")["variety: layout"] == "0.80"
    assert row_of(report, "group_std")["seeds"].strip() == "(missing: 0)"
    assert (tmp_path / "variety.png").stat().st_size > 10_000
    figure = ablate.draw_steps([mean, group_std])
    total, layout, spread = (axis.lines[0] for axis in figure.axes)
    assert list(layout.get_xdata()) == [0, 220] and list(layout.get_ydata()) == [0.9, 0.8]
    assert len(spread.get_xdata()) == 201 and spread.get_ydata()[0] == pytest.approx(0.8)


def test_one_real_training(capsys, tmp_path):
    """Through train_grpo.py, its files, the table and the figure."""
    words = ["--rows", "all", "--seeds", "1", "--steps", "1", "--out", str(tmp_path)]
    words += ["--flags=--batch_size 2 --group 4 --eval_prompts 4"]
    ablate.main(words)
    report = (tmp_path / "rewards.md").read_text()
    after = json.loads((tmp_path / "1_steps" / "all_seed0" / "eval_after.json").read_text())
    assert row_of(report, "all")["total"] == f"{after['total']:.2f}"
    assert row_of(report, "all")["variety: layout"] != "–"
    assert "0 of 1 trainings are finished" in capsys.readouterr().out
    ablate.main(words)
    assert "1 of 1 trainings are finished" in capsys.readouterr().out
