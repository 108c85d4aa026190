"""The studies of the toy: which trainings, how they are run and resumed, and what is made of their
files.   pytest tests/test_ablate.py"""

import json
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import gotr1
import train_grpo
from engine import run
from toy import ablate
from toy.world import Scene, chain_of, random_layout, read_text, toy_prompts

STUB = """
import json, os, pathlib, signal, sys, time

flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
with open(folder.parent / "calls.txt", "a") as calls:
    calls.write(f"{folder.name} {os.environ['OMP_NUM_THREADS']}\\n")
folder.mkdir(exist_ok=True)

def save(number, frame):
    (folder / "saved").touch()
    sys.exit(0)

signal.signal(signal.SIGTERM, save)
WHAT_HAPPENS
(folder / "eval_after.json").write_text("{}")
"""
FAILS = """
if folder.name == "ri_seed0":  # once the other has begun
    while "pi_seed0" not in (folder.parent / "calls.txt").read_text():
        time.sleep(0.05)
    time.sleep(0.3)
    print("the cat is on the keyboard")
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


def config_of(out: Path, **flags) -> ablate.Config:
    return ablate.Config(out=str(out), **flags)


def made_up(trial: ablate.Trial, config: ablate.Config, before: dict, after: dict) -> None:
    """The files of a finished training. `before`, `after`: measure -> its values, one per prompt.
    Each prompt has its index and the measures that have a value for it."""
    trial.folder.mkdir(parents=True)
    settings = json.dumps(trial.settings(config))
    (trial.folder / "config.json").write_text(settings)
    (trial.folder / "log.jsonl").write_text('{"step": 0, "seconds": 2.0}\n')
    for when, measures in (("before", before), ("after", after)):
        means = {name: float(np.mean(values)) for name, values in measures.items()}
        rows = []
        for index in range(max(map(len, measures.values()))):
            having = {}
            for name, values in measures.items():
                if index < len(values):
                    having[name] = values[index]
            row = {"index": index, "prompt": f"prompt {index}", "sample": trial.seed}
            rows.append({**row, "measures": having})
        (trial.folder / f"eval_{when}.json").write_text(json.dumps(means))
        (trial.folder / f"rows_{when}.json").write_text(json.dumps(rows))


def scores(total: float, right: float, prompts: int = 40) -> dict:
    """Measures of `prompts` prompts: the same total for all, and a share of right pictures."""
    count = round(right * prompts)
    shares = [1.0] * count + [0.0] * (prompts - count)
    measures = {name: shares for name in ablate.PICTURES}
    follow = {"follow color: ri": [0.2], "follow spatial: ri": [0.6], "follow complex: ri": [0.1]}
    return {"total": [total] * prompts, **measures, **follow}


def finish(config: ablate.Config, after: dict[str, dict]) -> None:
    """Finishes every training of these rows: by row, what it says afterwards of its seeds."""
    for trial in ablate.plan(config):
        made_up(trial, config, scores(0.25, right=0.25), after[trial.row.key][trial.seed])


# Which trainings


def test_the_plan_of_three_seeds(tmp_path):
    rewards = ablate.plan(config_of(tmp_path))
    judge = ablate.plan(config_of(tmp_path, study="judge"))
    both = ablate.plan(config_of(tmp_path, study="all"))
    assert len(rewards) == len({trial.folder for trial in rewards}) == 15 * 3
    assert len(judge) == 4 * 3
    shared = {str(trial.folder.relative_to(tmp_path)) for trial in rewards + judge}
    assert len(shared) == len(both) == 15 * 3 + 3 * 3, "the judge without errors is that of `all`"
    assert {"rewards/all_seed2", "judge/toy_0.1_seed0"} <= shared
    assert [trial.seed for trial in both] == 18 * [0] + 18 * [1] + 18 * [2]
    assert ablate.plan(config_of(tmp_path, study="dense")) == []


def test_train_grpo_understands_the_flags(tmp_path):
    found = {}
    for trial in ablate.plan(config_of(tmp_path, study="all", seeds=2, steps=7, group=8)):
        command = trial.command(config_of(tmp_path, steps=7, group=8))
        assert command[:2] == [sys.executable, str(ablate.TRAINER)]
        flags = run.parse_args(train_grpo.Config, "", command[2:], train_grpo.PRESETS)
        train_grpo.check(flags, world=1)
        assert (flags.out, flags.seed, flags.steps) == (str(trial.folder), trial.seed, 7)
        assert flags.kl == trial.row.kl and flags.advantage_std == trial.row.advantage_std
        what = (flags.rewards, flags.combine, flags.borrow, flags.judge)
        found[trial.row.key] = what
    everything = ("sem", "spa", "ri", "pi", "hps")
    assert found["pr"] == (("sem", "spa"), "product", 0, "toy")
    assert found["sem_ri_pi"] == (("sem", "ri", "pi"), "product", 0, "toy")
    assert found["all"] == (everything, "product", 0, "toy")
    assert found["sum"] == (everything, "sum", 0, "toy")
    assert found["borrow"] == (everything, "product", 0.5, "toy")
    assert found["toy_0.4"] == (everything, "product", 0, "toy:0.4")
    # two rows with another KL and the one without std have the rewards of another row
    assert len(set(found.values())) == len(found) - 3 == 15


def test_bad_settings_are_one_line(capsys, tmp_path):
    for words, expected in (
        (["--rows", "ri", "pie"], "--rows pie"),
        (["--seeds", "0"], "--seeds is 0"),
        (["--study", "dense", "--model", str(tmp_path / "none")], "cannot load"),
    ):
        with pytest.raises(SystemExit) as stop:
            ablate.main(["--out", str(tmp_path / "out"), *words])
        assert stop.value.code == 2
        errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
        assert len(errors) == 1 and expected in errors[0]


def test_a_folder_of_other_settings_is_refused(capsys, tmp_path):
    config = config_of(tmp_path, rows=("ri",), seeds=1, steps=5)
    finish(config, {"ri": [scores(0.5, right=0.5)]})
    with pytest.raises(SystemExit):
        ablate.main(["--out", str(tmp_path), "--rows", "ri", "--seeds", "1", "--steps", "6"])
    assert "--steps 5 (now 6)" in capsys.readouterr().err


def test_what_is_left_and_for_how_long(capsys, tmp_path):
    config = config_of(tmp_path, rows=("ri", "all"), seeds=3, steps=60)
    trials = ablate.plan(config)
    assert "once one of them has finished" in ablate.listing(trials, config, jobs=2)
    made_up(trials[0], config, scores(0.2, 0), scores(0.5, 0))
    rows = "".join(f'{{"step": {step}, "seconds": {2.0 * step}}}\n' for step in (1, 2, 3))
    (trials[0].folder / "log.jsonl").write_text(rows)  # 2, 4 and 6 seconds
    trials[1].folder.mkdir()
    ablate.main(["--out", str(tmp_path), "--rows", "ri", "all", "--jobs", "2", "--dry_run"])
    shown = capsys.readouterr().out
    assert "seed 0 finished, seed 1 to do, seed 2 to do" in shown
    assert "seed 0 begun" in shown
    # 5 trainings, 2 at a time: 3 rounds of 60 steps of 4 seconds
    assert "6 trainings of 60 steps, 5 left, 2 at a time: about 12 minutes" in shown


# Train


def test_each_training_is_run_once_on_one_thread(stub, capsys):
    out = stub()
    config = config_of(out, rows=("ri", "pi", "all"), seeds=2)
    trials = ablate.plan(config)
    trials[0].folder.mkdir(parents=True)
    (trials[0].folder / "eval_after.json").write_text("{}")
    ablate.train_all(trials, config, jobs=2)
    calls = (out / "rewards" / "calls.txt").read_text().split("\n")[:-1]
    assert sorted(calls) == sorted(f"{trial.folder.name} 1" for trial in trials[1:])
    assert {trial.state for trial in trials} == {"finished"}
    printed = trials[1].output
    assert printed.name == "pi_seed0.txt" and "--rewards pi" in printed.read_text()
    ablate.train_all(trials, config, jobs=2)
    assert len((out / "rewards" / "calls.txt").read_text().split("\n")[:-1]) == len(calls)


def test_a_failed_training_stops_the_study(stub, capsys):
    out = stub(FAILS)
    words = ["--out", str(out), "--rows", "ri", "pi", "all", "--seeds", "1", "--jobs", "2"]
    with pytest.raises(SystemExit) as stop:
        ablate.main(words)
    complaint = capsys.readouterr().err
    assert stop.value.code == 2
    assert "the cat is on the keyboard\n" in complaint
    assert "ri_seed0 ended early (exit code 3)" in complaint and "ri_seed0.txt" in complaint
    assert (out / "rewards" / "pi_seed0" / "saved").exists()
    assert not (out / "rewards" / "all_seed0").exists()


def test_ctrl_c_lets_the_trainings_save(stub, capsys):
    out = stub(INTERRUPTS)
    with pytest.raises(SystemExit) as stop:
        ablate.main(["--out", str(out), "--rows", "ri", "pi", "--seeds", "1", "--jobs", "1"])
    assert stop.value.code == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert (out / "rewards" / "ri_seed0" / "saved").exists()
    assert not (out / "rewards" / "pi_seed0").exists()


# Tables and figures


def row_of(report: str, title: str, number: int = 0) -> list[str]:
    """The cells of a row of the `number`th table with such a row."""
    lines = [line for line in report.splitlines() if line.startswith(f"| {title} |")]
    return lines[number].strip("| ").split(" | ")


def test_study_rewards_of_made_up_trainings(stub, capsys):
    out = stub("raise SystemExit('nothing is left to train')")
    config = config_of(out, rows=("ri", "pi", "all"), seeds=2)
    finish(
        config,
        {
            "ri": [scores(0.1, right=0), scores(0.3, right=0)],
            "pi": [scores(0.7, right=0.9), scores(0.7, right=1)],
            "all": [scores(0.6, right=1), scores(0.8, right=0.9)],
        },
    )
    ablate.main(["--out", str(out), "--rows", "ri", "pi", "all", "--seeds", "2"])
    report = (out / "ablation.md").read_text()
    assert report in capsys.readouterr().out
    head = row_of(report, "trained on")
    cells = dict(zip(head, row_of(report, "R_RI"), strict=True))
    assert cells["total"] == "0.20 (0.10 to 0.30)"
    assert cells["color: picture"] == "0.00 (0.00 to 0.00)"
    assert cells["given plan of 2 objects: ri"] == "0.40 (0.40 to 0.40)"  # of 0.2 and 0.6
    assert cells["given plan of 3 objects: ri"] == "0.10 (0.10 to 0.10)"
    assert cells["layout variety"] == "–"
    cells = dict(zip(head, row_of(report, "all"), strict=True))
    assert cells["total"] == "0.70 (0.60 to 0.80)"
    assert cells["complex: picture"] == "0.95 (0.90 to 1.00)"
    cells = dict(zip(head, row_of(report, "SFT model"), strict=True))
    assert cells["total"] == "0.25 (0.25 to 0.25)"

    to_all, to_sft = report.split("## Differences to: ")[1:]
    assert to_all.startswith("all\n") and to_sft.startswith("SFT model\n")
    assert row_of(to_all, "minus all") == ["minus all", "total", *ablate.PICTURES]
    assert row_of(to_all, "R_RI")[1] == "-0.50 (-0.50 to -0.50), real"
    assert row_of(to_all, "R_RI")[2].startswith("-0.95 (") and "real" in row_of(to_all, "R_RI")[2]
    assert row_of(to_all, "R_PI")[1] == "+0.00 (+0.00 to +0.00), may be chance"
    assert row_of(to_all, "R_PI")[3] == "+0.00 (+0.00 to +0.00), may be chance"
    assert row_of(to_sft, "all")[1] == "+0.45 (+0.45 to +0.45), real"
    assert "Not comparable" not in report
    with Image.open(out / "ablation.png") as picture:
        assert picture.width > 1000 and len(np.unique(np.asarray(picture))) > 50


def test_the_picture_has_the_numbers(monkeypatch, tmp_path):
    """The lengths of the bars, as matplotlib has them: the toy left, the paper right."""
    from matplotlib import figure

    kept = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *a, **k: kept.append(self))
    config = config_of(tmp_path, rows=("all", "borrow"), seeds=1)
    finish(config, {"all": [scores(0.6, right=0.5)], "borrow": [scores(0.6, right=0.75)]})
    results = ablate.read_results(ablate.rows_of(config), config)
    ablate.draw_ablation(results, tmp_path / "a.png")
    toy, paper = kept[0].axes
    lengths = [round(bar.get_width(), 4) for bar in toy.patches if bar.get_width()]
    assert lengths == 3 * [0.25, 0.5, 0.75]
    gains = [round(bar.get_width(), 4) for bar in paper.patches if bar.get_width()]
    assert gains == [0.1296, 0.0534, 0.0259]  # GoT-R1-1B: .7632 - .6336, and so on
    assert [label.get_text() for label in toy.get_yticklabels()] == [
        "SFT model",
        "all",
        "all, borrowed plans",
    ]


def test_gains_of_the_paper():
    assert ablate.paper_gain("R_PI") == pytest.approx([0.1065, 0.0258, 0.0234])
    color, spatial, complex_ = ablate.paper_gain("R_HPS")  # 7B, which has no color
    assert color is None and (spatial, complex_) == pytest.approx((-0.0566, -0.0907))
    assert ablate.paper_gain("all, borrowed plans") == [None, None, None]
    titles = {row.title for row in ablate.ROWS} | {ablate.BASELINE}
    ours = {"all, borrowed plans", "all, not divided by std", "R_PR, KL 0.1", "R_PR, KL 0.5"}
    assert ablate.PAPER_1B.keys() | ablate.PAPER_7B.keys() == titles - ours


def test_trainings_that_began_with_another_model_are_named(tmp_path):
    config = config_of(tmp_path, rows=("ri", "all"), seeds=2)
    for trial in ablate.plan(config):
        is_other = trial.row.key == "all" and trial.seed == 1
        before = scores(0.3 if is_other else 0.2, right=0)
        made_up(trial, config, before, scores(0.5, right=0.5))
    ablate.study_rewards(config)
    report = (tmp_path / "ablation.md").read_text()
    named = report.split("another machine: ")[1].split("\n")[0]
    assert named == "all_seed1."


def test_study_judge_of_made_up_trainings(monkeypatch, tmp_path):
    taus = {0.0: 1.0, 0.1: 0.5, 0.2: 0.25, 0.4: 0.126}
    monkeypatch.setattr(ablate, "judge_taus", lambda errors, prompts: taus)
    config = config_of(tmp_path, study="judge", seeds=1)
    after = {"all": 0.8, "toy_0.1": 0.7, "toy_0.2": 0.6, "toy_0.4": 0.3}
    finish(config, {key: [scores(total, right=total)] for key, total in after.items()})
    ablate.study_judge(config)
    report = (tmp_path / "judge.md").read_text()
    assert row_of(report, "p") == ["p", "tau", "total", *ablate.PICTURES]
    assert row_of(report, "not trained")[:3] == ["not trained", "", "0.25"]
    assert row_of(report, "0.0")[:4] == ["0.0", "1.00", "0.80", "0.80"]
    assert row_of(report, "0.4")[:4] == ["0.4", "0.13", "0.30", "0.30"]
    assert row_of(report, "p = 0.1")[1] == "-0.10 (-0.10 to -0.10), real"
    assert (tmp_path / "judge.png").exists()


# With the model


def test_a_judge_that_errs_agrees_less_with_the_exact_one():
    taus = ablate.judge_taus([0.0, 0.1, 0.4], prompts=24)
    assert taus[0.0] == pytest.approx(1)
    assert 0 < taus[0.4] < taus[0.1] < 1


def test_dense_takes_the_best_plans(policy, monkeypatch):
    """Where all plans are faultless, every plan is right; and chains of five objects have room."""
    prompts = toy_prompts(3, seed=7, held_out=True, kind="five")
    asked = {}

    def faultless(model, tokenizer, judge, prompts, plans, **sampling):
        asked.update(sampling, plans=plans)
        rng = np.random.default_rng(1)
        chains = []
        for prompt in prompts:
            names, relations = read_text(prompt)
            cells = random_layout(rng, relations, count=5)
            chains.append(chain_of(Scene(names, relations, cells)))
        return chains

    monkeypatch.setattr(gotr1, "best_plans", faultless)
    room = ablate.longest_chain(policy[1], "five")
    rows = ablate.draw_dense(*policy, prompts, plans=8, max_chain=room)
    assert [row["measures"]["plan right"] for row in rows] == [1, 1, 1]
    assert asked["plans"] == 8 and asked["max_chain"] == room
    own = ablate.draw_dense(*policy, prompts, plans=1, max_chain=room)
    assert [row["prompt"] for row in own] == prompts
    assert all(0 <= row["measures"]["ri"] <= 1 for row in own)


def test_dense_report(policy, capsys, tmp_path):
    ablate.main(
        ["--study", "dense", "--model", "toy", "--dense_prompts", "2", "--out", str(tmp_path)]
    )
    report = (tmp_path / "dense.md").read_text()
    assert report in capsys.readouterr().out
    for objects in "12345":
        assert len(row_of(report, objects)) == 1 + 3 + 3


def test_one_real_training(capsys, tmp_path):
    """The whole way: train_grpo.py, its files, the table and the picture."""
    words = "--rows all --seeds 1 --steps 1 --batch_size 2 --group 4 --eval_prompts 8".split()
    ablate.main(["--out", str(tmp_path), *words])
    shown = capsys.readouterr().out
    report = (tmp_path / "ablation.md").read_text()
    assert "1 trainings of 1 steps, 1 left" in shown and report in shown
    cells = dict(zip(row_of(report, "trained on"), row_of(report, "all"), strict=True))
    after = json.loads((tmp_path / "rewards" / "all_seed0" / "eval_after.json").read_text())
    assert cells["total"] == f"{after['total']:.2f}" and cells["layout variety"] != "–"
    assert ablate.dense_models(config_of(tmp_path)) == {
        "SFT model": "toy",
        "all, all_seed0": str(tmp_path / "rewards" / "all_seed0" / "step_000001"),
    }
    ablate.main(["--out", str(tmp_path), *words])
    assert "0 left" in capsys.readouterr().out
