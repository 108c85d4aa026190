"""The paper's ablations in miniature: many short trainings of the toy, and tables of the outcome.

    python -m toy.ablate --dry_run                   # what there is, what is left, for how long
    python -m toy.ablate --out out/ablate            # study `rewards`
    python -m toy.ablate --study all                 # the three studies, in the same folder
    python -m toy.ablate --seeds 1 --rows ri pi all  # a part of it

Every training is `python train_grpo.py` with other flags, in a process of its own on one CPU
thread; `--jobs` of them run at a time. Ctrl-C saves and stops them, and the same command goes on. A
finished training is never repeated, and the studies share theirs.

rewards  Which rewards does it take (paper tables 3, 6 and 9)? One training per row of ROWS and
         seed, 45 with three seeds. `ablation.md` has the table and the differences to "all" and to
         the SFT model; `ablation.png` stands it beside the paper's gains.

judge    How wrong may the judge be (paper table 7)? Trainings with a judge that gives a share p of
         wrong answers, 9 with three seeds beside those of "all". `judge.md` and `judge.png` have
         the true reward after training against p, and against Kendall's tau between this judge and
         the exact one.

dense    How many objects can it plan and draw? No training: prompts of 1 to 5 objects, with one
         plan per picture and with the best of 8, for the SFT model and for the trained models of
         this folder, or those that `--model` names. `dense.md` has the tables.

What stays of a training: its checkpoint, its log, and what train_grpo.py says of its held-out
prompts before and after (`eval_*.json`, the means; `rows_*.json`, each sample). These held-out
prompts are judged exactly, whatever judge the training had.
"""

import functools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from engine import run
from evaluation import stats
from toy.world import KINDS, ToyJudge, chain_of, crispness, make_scene, toy_prompts

TRAINER = Path(__file__).parent.parent / "train_grpo.py"


@dataclass
class Config:
    study: Literal["rewards", "judge", "dense", "all"] = "rewards"  # see above
    out: str = "out/ablate"  # folder of the trainings, tables and figures; finished ones stay
    rows: tuple[str, ...] = ()  # of study rewards: only these, by the names of their folders
    seeds: int = 3  # trainings per row: their seeds are 0, 1, …
    jobs: int = 0  # trainings at a time, each with one thread; 0: as many as there are cores
    dry_run: bool = False  # say what there is and what is left, then stop
    # Of every training
    steps: int = 60  # rollouts
    batch_size: int = 8  # prompts per step
    group: int = 16  # samples per prompt
    eval_prompts: int = 240  # held-out prompts before and after; also those of the judge's tau
    # Of study dense
    model: tuple[str, ...] = ()  # checkpoints; default: toy, and `all` and `borrow` of this folder
    dense_prompts: int = 120  # per number of objects


# -------------------------------------------------------------------------------------------------
# The rows of the tables


@dataclass
class Row:
    """One kind of training."""

    key: str  # names its folders
    title: str  # names it in tables
    rewards: tuple[str, ...]
    combine: str = "product"
    kl: float = 0.02
    advantage_std: bool = True  # as in the paper's equation 1
    borrow: float = 0.0
    judge: str = "toy"
    study: str = "rewards"


# The paper does not say whether R_HPS takes part in the rows of its table 3. That table has a
# column for each of R_sem, R_spa, R_RI and R_PI, and none for R_HPS: so a row here is trained on
# what it names, and only the whole reward of equation 3 ("all" and its variants) has R_HPS too.
ALL_PARTS = ("sem", "spa", "ri", "pi", "hps")
ROWS = [
    Row("pr", "R_PR", ("sem", "spa")),
    Row("ri", "R_RI", ("ri",)),
    Row("pi", "R_PI", ("pi",)),
    Row("pr_pi", "R_PR + R_PI", ("sem", "spa", "pi")),
    Row("pr_ri", "R_PR + R_RI", ("sem", "spa", "ri")),
    Row("ri_pi", "R_RI + R_PI", ("ri", "pi")),
    Row("sem_ri_pi", "R_sem + R_RI + R_PI", ("sem", "ri", "pi")),
    Row("spa_ri_pi", "R_spa + R_RI + R_PI", ("spa", "ri", "pi")),
    Row("all", "all", ALL_PARTS),
    Row("sum", "all, as a sum", ALL_PARTS, combine="sum"),
    Row("hps", "R_HPS", ("hps",)),
    # not in the paper: what keeps pictures when only plans are rewarded, what keeps plans different
    Row("pr_kl_0.1", "R_PR, KL 0.1", ("sem", "spa"), kl=0.1),
    Row("pr_kl_0.5", "R_PR, KL 0.5", ("sem", "spa"), kl=0.5),
    Row("mean", "all, not divided by std", ALL_PARTS, advantage_std=False),
    Row("borrow", "all, borrowed plans", ALL_PARTS, borrow=0.5),
]
BY_KEY = {row.key: row for row in ROWS}
JUDGE_ROWS = {0.0: BY_KEY["all"]}  # share of wrong answers -> row
for error in (0.1, 0.2, 0.4):
    JUDGE_ROWS[error] = Row(
        f"toy_{error}", f"p = {error}", ALL_PARTS, judge=f"toy:{error}", study="judge"
    )
BASELINE = "SFT model"  # the title of what every training starts from

# The paper's T2I-CompBench scores: color, 2D-spatial, complex. Janus-Pro-1B: table 3, and table 6
# for the sum. R_HPS alone is in table 9 only, for Janus-Pro-7B and without color; its baseline is
# Janus-Pro-7B-GoT of table 1.
PAPER_1B = {
    BASELINE: (0.6336, 0.2140, 0.3490),
    "R_PR": (0.7050, 0.2283, 0.3619),
    "R_RI": (0.3340, 0.0076, 0.2488),
    "R_PI": (0.7401, 0.2398, 0.3724),
    "R_PR + R_PI": (0.7289, 0.2557, 0.3653),
    "R_PR + R_RI": (0.7118, 0.2579, 0.3583),
    "R_RI + R_PI": (0.6507, 0.1797, 0.3452),
    "R_sem + R_RI + R_PI": (0.7323, 0.2133, 0.3568),
    "R_spa + R_RI + R_PI": (0.7067, 0.2419, 0.3648),
    "all": (0.7632, 0.2674, 0.3749),
    "all, as a sum": (0.7154, 0.2254, 0.3638),
}
PAPER_7B = {
    BASELINE: (0.6551, 0.2457, 0.3754),
    "R_HPS": (None, 0.1891, 0.2847),
}
PAPER_TAUS = {"CLIP": 0.1810, "Qwen2.5-VL-7B": 0.3147}  # table 7

COLUMNS = {  # of the table -> the measures that it is the mean of
    "total": ("total",),
    "sem": ("sem",),
    "spa": ("spa",),
    "ri": ("ri",),
    "pi": ("pi",),
    "hps": ("hps",),
    "color: picture": ("color: picture right",),
    "spatial: plan": ("spatial: plan right",),
    "spatial: picture": ("spatial: picture right",),
    "complex: plan": ("complex: plan right",),
    "complex: picture": ("complex: picture right",),
    "given plan of 2 objects: ri": ("follow color: ri", "follow spatial: ri"),  # 60 plans each
    "given plan of 3 objects: ri": ("follow complex: ri",),
    "layout variety": ("variety: layout",),
}
PICTURES = ("color: picture right", "spatial: picture right", "complex: picture right")
COMPARED = ("total", *PICTURES)
COLORS = ("#2a6fbb", "#e08a1e", "#3f9b4f")  # of PICTURES


# -------------------------------------------------------------------------------------------------
# The studies


def main(argv: list[str] | None = None) -> None:
    config = run.parse_args(Config, __doc__, argv)
    check(config)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C
    try:
        run_studies(config)
    except KeyboardInterrupt:
        print("\nstopped: the same command goes on from here", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def run_studies(config: Config) -> None:
    trials = plan(config)
    jobs = config.jobs or os.cpu_count()
    check_settings(trials, config)
    if trials:
        print(listing(trials, config, jobs))
    if config.study == "dense":
        print(f"models: {', '.join(dense_models(config).values())}")
    if config.dry_run:
        return
    Path(config.out).mkdir(parents=True, exist_ok=True)
    train_all(trials, config, jobs)
    if config.study in ("rewards", "all"):
        study_rewards(config)
    if config.study in ("judge", "all"):
        study_judge(config)
    if config.study in ("dense", "all"):
        study_dense(config)


def check(config: Config) -> None:
    """Bad settings end the program here, in one line."""
    run.check_ranges(
        config,
        at_least_one="seeds steps batch_size group eval_prompts dense_prompts",
        not_negative="jobs",
    )
    for key in config.rows:
        if key not in BY_KEY:
            run.fail(f"--rows {key}: expected some of {' '.join(BY_KEY)}")


def publish(config: Config, name: str, text: str) -> None:
    """Writes a report and prints it."""
    path = Path(config.out) / name
    run.write_whole(path, text)
    print(f"\n{text}\nwritten to {path}")


# -------------------------------------------------------------------------------------------------
# Which trainings


@dataclass
class Trial:
    """One training: a row with a seed."""

    row: Row
    seed: int
    folder: Path

    @property
    def output(self) -> Path:
        """The file with what it prints, beside its folder."""
        return self.folder.with_name(f"{self.folder.name}.txt")

    @property
    def state(self) -> str:
        if (self.folder / "eval_after.json").exists():  # the last file that it writes
            return "finished"
        return "begun" if self.folder.exists() else "to do"

    def settings(self, config: Config) -> dict:
        """The flags that make it what it is."""
        return {
            "seed": self.seed,
            "steps": config.steps,
            "batch_size": config.batch_size,
            "group": config.group,
            "eval_prompts": config.eval_prompts,
            "rewards": list(self.row.rewards),
            "combine": self.row.combine,
            "kl": self.row.kl,
            "advantage_std": self.row.advantage_std,
            "borrow": self.row.borrow,
            "judge": self.row.judge,
            "gif_every": 0,
            "keep": 1,  # checkpoints
        }

    def command(self, config: Config) -> list[str]:
        words = [sys.executable, str(TRAINER), "--out", str(self.folder)]
        for flag, value in self.settings(config).items():
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no_{flag}")
                continue
            values = value if isinstance(value, list) else [value]
            words += [f"--{flag}", *map(str, values)]
        return words


def trials_of(row: Row, config: Config) -> list[Trial]:
    """The trainings of a row."""
    room = Path(config.out) / row.study
    return [Trial(row, seed, room / f"{row.key}_seed{seed}") for seed in range(config.seeds)]


def rows_of(config: Config) -> list[Row]:
    """The rows of study rewards that are asked for, in the table's order."""
    return [row for row in ROWS if not config.rows or row.key in config.rows]


def plan(config: Config) -> list[Trial]:
    """All trainings that the study needs, each once: seed 0 of every row, then seed 1, …"""
    rows = []
    if config.study in ("rewards", "all"):
        rows += rows_of(config)
    if config.study in ("judge", "all"):
        rows += [row for row in JUDGE_ROWS.values() if row not in rows]
    trials = []
    for seed in range(config.seeds):
        trials += [trials_of(row, config)[seed] for row in rows]
    return trials


def check_settings(trials: list[Trial], config: Config) -> None:
    """Ends the program in one line when the folder holds a training with other flags: numbers of
    both would stand in one table."""
    for trial in trials:
        path = trial.folder / "config.json"
        if path.exists():
            wanted = trial.settings(config)
            written = json.loads(path.read_text(encoding="utf-8"))
            found = {name: written.get(name) for name in wanted}
            run.check_same(trial.folder, found, wanted)


def listing(trials: list[Trial], config: Config, jobs: int) -> str:
    """What there is and what is left, a line per row, and how long it takes."""
    lines = []
    rows = {trial.row.key: trial.row for trial in trials}
    for key, row in rows.items():
        states = [f"seed {trial.seed} {trial.state}" for trial in trials if trial.row is row]
        lines.append(f"{key:12} {row.title:22} {', '.join(states)}")
    finished = [trial for trial in trials if trial.state == "finished"]
    left = len(trials) - len(finished)
    lines.append(
        f"{len(trials)} trainings of {config.steps} steps, {left} left, {jobs} at a time: "
        f"{duration(finished, left, config, jobs)}"
    )
    return "\n".join(lines)


def duration(finished: list[Trial], left: int, config: Config, jobs: int) -> str:
    """How long the trainings that are left take, in words, by the logs of finished ones."""
    if not left:
        return "nothing to train"
    if not finished:
        return "how long it takes can be said once one of them has finished"
    seconds = []  # of each step
    for trial in finished:
        seconds += [row["seconds"] for row in run.read_log(trial.folder)]
    rounds = -(-left // jobs)  # rounded up
    minutes = rounds * config.steps * float(np.median(seconds)) / 60
    return f"about {minutes:.0f} minutes of steps, and the evaluations before and after them"


# -------------------------------------------------------------------------------------------------
# Train


def train_all(trials: list[Trial], config: Config, jobs: int) -> None:
    """Runs the trainings that are not finished, `jobs` at a time. One that fails ends the program;
    then, and on Ctrl-C, the others save and stop."""
    waiting = [trial for trial in trials if trial.state != "finished"]
    if not waiting:
        return
    bar = tqdm(total=len(trials), initial=len(trials) - len(waiting), desc="trainings")
    running = []  # (trial, process)
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                trial = waiting.pop(0)
                running.append((trial, start(trial, config)))
            bar.set_postfix_str(", ".join(trial.folder.name for trial, _ in running))
            time.sleep(0.2)
            for trial, process in list(running):
                if process.poll() is not None:
                    running.remove((trial, process))
                    check_ended(trial, process.returncode)
                    bar.update()
    finally:
        stop([process for _, process in running])
        bar.close()


def start(trial: Trial, config: Config) -> subprocess.Popen:
    """One training, on one CPU thread: with other sums in another order, its digits would be
    others. What it prints goes behind what is in its file of output."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = trial.command(config)
    trial.output.parent.mkdir(parents=True, exist_ok=True)
    with trial.output.open("a", encoding="utf-8") as output:
        output.write(f"$ {shlex.join(command)}\n")
        output.flush()
        return subprocess.Popen(command, stdout=output, stderr=output, env=environment)


def stop(processes: list[subprocess.Popen]) -> None:
    """Lets trainings save after their step, and waits for it."""
    if processes:
        print(f"\n{len(processes)} trainings save and stop after their step", file=sys.stderr)
    for process in processes:
        process.terminate()
    for process in processes:
        process.wait()


def check_ended(trial: Trial, code: int) -> None:
    """Ends the program, with the last that the training printed, when it did not come to its
    end."""
    if trial.state == "finished":
        return
    text = trial.output.read_text(encoding="utf-8", errors="replace")
    lines = [line for line in text.replace("\r", "\n").splitlines() if line.strip()]
    print("\n" + "\n".join(lines[-12:]), file=sys.stderr)
    run.fail(f"the training in {trial.folder} ended early (exit code {code}): see {trial.output}")


# -------------------------------------------------------------------------------------------------
# Read what they wrote


@dataclass
class Result:
    """What the trainings of a row say of held-out prompts."""

    title: str
    means: list[dict[str, float]]  # one per seed: the mean of each measure
    rows: list[dict]  # one per seed and sample, see evaluation/stats.py


def read_result(title: str, trials: list[Trial], when: str) -> Result:
    """`when`: `after` the trainings or `before` them."""
    means = []
    rows = []
    for trial in trials:
        means.append(read_json(trial.folder / f"eval_{when}.json"))
        rows += read_json(trial.folder / f"rows_{when}.json")
    return Result(title, means, rows)


def read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def read_results(rows: list[Row], config: Config) -> list[Result]:
    """The SFT model, which is what the first row's trainings began with, then the rows."""
    results = [read_result(BASELINE, trials_of(rows[0], config), "before")]
    for row in rows:
        results.append(read_result(row.title, trials_of(row, config), "after"))
    return results


def started_otherwise(rows: list[Row], config: Config) -> list[str]:
    """Folders of trainings that began with another model than those of the first row. Before the
    first step all trainings of a seed draw the same pictures."""
    totals = {}  # seed -> that of the first row
    found = []
    for row in rows:
        for trial in trials_of(row, config):
            total = read_json(trial.folder / "eval_before.json")["total"]
            if total != totals.setdefault(trial.seed, total):
                found.append(trial.folder.name)
    return found


def not_comparable(folders: list[str]) -> str:
    names = ", ".join(folders)
    return f"Not comparable, since they began with another model, or on another machine: {names}."


def values_of(result: Result, measures: tuple[str, ...]) -> list[float]:
    """For each seed the mean of the measures; [] when one of them was not measured."""
    values = []
    for means in result.means:
        if not all(name in means for name in measures):
            return []
        values.append(float(np.mean([means[name] for name in measures])))
    return values


def cell(values: list[float]) -> str:
    """Mean over seeds, and from the lowest to the highest."""
    if not values:
        return "–"
    mean = f"{np.mean(values):.2f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):.2f} to {max(values):.2f})"


def markdown(head: list[str], lines: list[list[str]]) -> str:
    """A table."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def only(rows: list[dict], measures: tuple[str, ...]) -> list[dict]:
    """The rows with these measures and no others."""
    kept = []
    for row in rows:
        values = {name: row["measures"][name] for name in measures if name in row["measures"]}
        if values:
            kept.append({**row, "measures": values})
    return kept


def difference_table(results: list[Result], base: Result) -> str:
    """Each result against `base`, on the same prompts: difference, 95 % interval, and whether it is
    real, by Holm over all cells of the table."""
    cells = {}  # (title, measure) -> a row of stats.compare
    for result in results:
        if result is not base:
            a = {"rows": only(base.rows, COMPARED)}
            b = {"rows": only(result.rows, COMPARED)}
            for found in stats.compare(a, b):
                cells[result.title, found["name"]] = found
    real = stats.holm([found["p"] for found in cells.values()])
    texts = {}
    for (place, found), is_real in zip(cells.items(), real, strict=True):
        interval = f"({found['low']:+.2f} to {found['high']:+.2f})"
        verdict = "real" if is_real else "may be chance"
        texts[place] = f"{found['difference']:+.2f} {interval}, {verdict}"
    lines = []
    for result in results:
        if result is not base:
            values = [texts.get((result.title, name), "–") for name in COMPARED]
            lines.append([result.title, *values])
    return markdown([f"minus {base.title}", *COMPARED], lines)


ABOUT_INTERVALS = (
    "Mean over training seeds, with the lowest and the highest in brackets where there are "
    "several.\nDifferences are paired by prompt. Their 95 % intervals, and what is called real "
    "(Holm at 0.05 over the\ncells of a table), are about other prompts, for these training seeds: "
    "other seeds may differ more."
)


def conditions(config: Config) -> str:
    """How the numbers of a report were made."""
    seeds = ", ".join(map(str, range(config.seeds)))
    versions = stats.versions()
    return (
        f"{config.steps} steps of {config.batch_size} prompts with {config.group} samples, "
        f"training seeds {seeds}, {config.eval_prompts} held-out prompts.\n"
        f"One CPU thread, torch {versions['torch']}, numpy {versions['numpy']}."
    )


# -------------------------------------------------------------------------------------------------
# Study rewards


def study_rewards(config: Config) -> None:
    rows = rows_of(config)
    results = read_results(rows, config)
    publish(config, "ablation.md", rewards_report(results, config, started_otherwise(rows, config)))
    picture = Path(config.out) / "ablation.png"
    draw_ablation(results, picture)
    print(f"written to {picture}")


def rewards_report(results: list[Result], config: Config, others: list[str]) -> str:
    lines = []
    for result in results:
        cells = [cell(values_of(result, measures)) for measures in COLUMNS.values()]
        lines.append([result.title, *cells])
    pieces = [
        "# Which rewards does it take?",
        conditions(config),
        "A row is trained on the rewards that it names; `total` is always the product of all five, "
        "as the exact\njudge sees them.",
        markdown(["trained on", *COLUMNS], lines),
        ABOUT_INTERVALS,
    ]
    if others:
        pieces.append(not_comparable(others))
    by_title = {result.title: result for result in results}
    for title in ("all", BASELINE):
        if title in by_title and len(results) > 1:
            pieces.append(f"## Differences to: {title}")
            pieces.append(difference_table(results, by_title[title]))
    return "\n\n".join(pieces) + "\n"


def paper_gain(title: str) -> list[float | None]:
    """The paper's scores of a row minus those of its baseline, for PICTURES; None where it has
    none."""
    for table in (PAPER_1B, PAPER_7B):
        if title in table:
            pairs = zip(table[title], table[BASELINE], strict=True)
            return [None if score is None else score - base for score, base in pairs]
    return [None] * len(PICTURES)


def draw_ablation(results: list[Result], path: Path) -> None:
    """Left: the share of right pictures, with 95 % intervals. Right: the paper's gains. A line per
    result, the same in both panels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 1.6 + 0.55 * len(results)), layout="constrained")
    toy, paper = figure.subplots(1, 2, sharey=True)
    height = 0.26  # of a bar; the distance of two lines is 1
    for k, (name, color) in enumerate(zip(PICTURES, COLORS, strict=True)):
        kind = name.split(":")[0]
        for line, result in enumerate(results):
            y = line + (k - 1) * height
            found = stats.intervals(only(result.rows, (name,))).get(name)
            if found:
                toy.barh(y, found["score"], height, color=color)
                toy.plot([found["low"], found["high"]], [y, y], color="black", linewidth=1)
            gain = paper_gain(result.title)[k]
            if gain is not None:
                paper.barh(y, gain, height, color=color)
        toy.barh(0, 0, color=color, label=kind)  # for the legend
    for line, result in enumerate(results):
        if paper_gain(result.title) == [None] * len(PICTURES):
            note = "not in the paper"
        elif result.title == BASELINE:
            note = "0 by definition"
        elif result.title in PAPER_7B:
            note = "7B; no color"
        else:
            continue
        place = {"xytext": (5, 0), "textcoords": "offset points", "va": "center"}
        paper.annotate(note, (0, line), **place, fontsize=8, color="gray")
    toy.set(title="the toy: share of right pictures, 95 % interval over prompts", xlim=(0, 1))
    paper.set(title="the paper: T2I-CompBench score minus its baseline's (other scale)")
    paper.axvline(0, color="black", linewidth=0.8)
    toy.set_yticks(range(len(results)), [result.title for result in results])
    toy.set_ylim(len(results) - 0.4, -0.6)  # downwards; of both, which share it
    for axis in (toy, paper):
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
    figure.legend(*toy.get_legend_handles_labels(), loc="outside lower center", ncols=len(PICTURES))
    figure.savefig(path, dpi=110)


# -------------------------------------------------------------------------------------------------
# Study judge


def study_judge(config: Config) -> None:
    rows = list(JUDGE_ROWS.values())
    sft, *results = read_results(rows, config)
    results[0].title = "p = 0"  # that of study rewards is "all"
    taus = judge_taus(list(JUDGE_ROWS), config.eval_prompts)
    by_error = dict(zip(JUDGE_ROWS, results, strict=True))
    others = started_otherwise(rows, config)
    publish(config, "judge.md", judge_report(sft, by_error, taus, config, others))
    picture = Path(config.out) / "judge.png"
    draw_judge(sft, by_error, taus, picture)
    print(f"written to {picture}")


def judge_taus(errors: list[float], prompts: int, samples: int = 2) -> dict[float, float]:
    """Kendall's tau-b between the total rewards that the erring judge gives and the exact ones, for
    each share of wrong answers, over `samples` samples of the SFT model per held-out prompt."""
    from scipy.stats import kendalltau

    import gotr1
    import rewards

    asked = []
    chains = []
    images = []
    model, tokenizer = load_on_one_thread("toy")
    held_out = toy_prompts(prompts, seed=7, held_out=True)
    for first in tqdm(range(0, prompts, 64), desc="samples to judge", leave=False):
        indices = list(range(prompts))[first : first + 64]
        batch = [held_out[index] for index in indices]
        sampled = gotr1.rollout(
            model, tokenizer, batch, group=samples, max_chain=96, indices=indices
        )
        asked += [prompt for prompt in batch for _ in range(samples)]
        chains += sampled.chains
        images += gotr1.decode_images(model, sampled.image_tokens)
    totals = {}
    for error in {0.0, *errors}:
        judge = ToyJudge(error=error, seed=0)
        scores = rewards.score(judge, crispness, asked, chains, images)
        totals[error] = [row["total"] for row in scores]
    return {error: float(kendalltau(totals[error], totals[0.0]).statistic) for error in errors}


def load_on_one_thread(name: str):
    """(model, tokenizer), on the CPU. From here on there is one thread, so that digits do not
    depend on the number of cores."""
    import torch

    import gotr1

    torch.set_num_threads(1)
    try:
        return gotr1.load_policy(name)
    except (OSError, ValueError) as problem:
        run.fail(f"cannot load {name}: {problem}")


def judge_report(
    sft: Result, by_error: dict[float, Result], taus: dict, config: Config, others: list[str]
) -> str:
    lines = []
    for error, result in [(None, sft), *by_error.items()]:
        cells = [cell(values_of(result, (name,))) for name in COMPARED]
        if error is None:
            lines.append(["not trained", "", *cells])
        else:
            lines.append([f"{error}", f"{taus[error]:.2f}", *cells])
    paper_taus = ", ".join(f"{tau:.2f} of {name}" for name, tau in PAPER_TAUS.items())
    pieces = [
        "# How wrong may the judge be?",
        conditions(config),
        "With probability p the judge's answer to a question is the answer to another row's. "
        "`tau` is Kendall's\ntau-b between this judge's total reward and the exact one, over two "
        "samples of the SFT model for each\nheld-out prompt. All else is judged exactly, after "
        "training with the erring judge.",
        markdown(["p", "tau", *COMPARED], lines),
        "Such errors are noise: which answers are wrong does not depend on the picture, and next "
        "step's are others.\nA real judge errs in the same way each time, and a policy learns to "
        "exploit that. Nothing is said of that\nhere. What the paper measured, on other pairs "
        f"(table 7): tau {paper_taus}.",
        ABOUT_INTERVALS,
    ]
    if others:
        pieces.append(not_comparable(others))
    pieces.append(f"## Differences to: {by_error[0.0].title}")
    pieces.append(difference_table(list(by_error.values()), by_error[0.0]))
    return "\n\n".join(pieces) + "\n"


def draw_judge(sft: Result, by_error: dict[float, Result], taus: dict, path: Path) -> None:
    """The true total after training over tau: the mean over seeds, and each seed as a small dot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axis = figure.subplots()
    means = []
    for error, result in by_error.items():
        totals = values_of(result, ("total",))
        means.append(np.mean(totals))
        axis.plot([taus[error]] * len(totals), totals, ".", color="gray", markersize=5, zorder=3)
        axis.annotate(
            f"p = {error:g}", (taus[error], means[-1]), (8, -12), textcoords="offset points"
        )
    axis.plot([taus[error] for error in by_error], means, "o-", color=COLORS[0], zorder=2)
    before = np.mean(values_of(sft, ("total",)))
    axis.axhline(before, color="black", linestyle="--", linewidth=1)
    note = f"{BASELINE} {before:.2f}"
    axis.annotate(note, (1.13, before), (0, 4), textcoords="offset points", ha="right")
    for name, tau in PAPER_TAUS.items():
        axis.axvline(tau, color=COLORS[1], linestyle=":", linewidth=1.5)
        axis.annotate(
            f"{name}, paper",
            (tau, 0.98),
            (4, 0),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            rotation=90,
            va="top",
            fontsize=8,
            color=COLORS[1],
        )
    axis.set(
        xlim=(0, 1.14),
        ylim=(0, 1),
        xlabel="Kendall's tau between the judge's total and the exact one",
        ylabel="true total after training",
        title="trained with a judge that gives a share p of wrong answers",
    )
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


# -------------------------------------------------------------------------------------------------
# Study dense

DENSE_KINDS = ("single", "spatial", "complex", "four", "five")
DENSE_PLANS = 8
DENSE_COLUMNS = ("plan right", "picture right", "ri")


def study_dense(config: Config) -> None:
    pieces = [
        "# How many objects can it plan and draw?",
        f"{config.dense_prompts} prompts per number of objects, one picture each, with 95 % "
        "intervals over prompts. They are\nheld out, but for single objects: of these there are "
        "18, which come again and again. No training\nshows four or five objects.\n"
        f"*Best of {DENSE_PLANS}*: the exact judge chooses the plan by R_sem and R_spa, so that "
        "`plan right` is then what it\ncan find among them; `ri` is that of the plan drawn.",
    ]
    for name, source in dense_models(config).items():
        table = dense_table(*load_on_one_thread(source), config.dense_prompts)
        pieces += [f"## {name}", table]
    publish(config, "dense.md", "\n\n".join(pieces) + "\n")


def dense_models(config: Config) -> dict[str, str]:
    """Name -> what to load: the models asked for, or the SFT model and the newest checkpoints of
    seed 0 of two rows, as far as these are trained."""
    if config.model:
        return {name: name for name in config.model}
    models = {BASELINE: "toy"}
    for key in ("all", "borrow"):
        trial = trials_of(BY_KEY[key], config)[0]
        if trial.state == "finished":
            title = f"{trial.row.title}, {trial.folder.name}"
            models[title] = str(run.latest_checkpoint(trial.folder))
    return models


def dense_table(model, tokenizer, count: int) -> str:
    """A line per number of objects: `count` prompts each."""
    best = [f"best of {DENSE_PLANS}: {name}" for name in DENSE_COLUMNS]
    lines = []
    for kind in tqdm(DENSE_KINDS, desc="objects", leave=False):
        prompts = toy_prompts(count, seed=7, held_out=KINDS[kind] > 1, kind=kind)
        line = [str(KINDS[kind])]
        for plans in (1, DENSE_PLANS):
            rows = draw_dense(model, tokenizer, prompts, plans, longest_chain(tokenizer, kind))
            found = stats.intervals(rows)
            for name in DENSE_COLUMNS:
                numbers = found[name]
                line.append(
                    f"{numbers['score']:.2f} ({numbers['low']:.2f} to {numbers['high']:.2f})"
                )
        lines.append(line)
    return markdown(["objects", *DENSE_COLUMNS, *best], lines)


def longest_chain(tokenizer, kind: str) -> int:
    """Chain tokens that are enough for a kind of scene: a quarter more than the longest of 100
    faultless chains."""
    import gotr1

    rng = np.random.default_rng(0)
    lengths = []
    for _ in range(100):
        lengths.append(len(gotr1.encode_chain(tokenizer, chain_of(make_scene(rng, kind)))))
    return round(1.25 * max(lengths))


def draw_dense(model, tokenizer, prompts: list[str], plans: int, max_chain: int) -> list[dict]:
    """One picture per prompt, of its own plan or of the best of several: rows for stats."""
    import gotr1
    import rewards
    from evaluation import held_out

    chosen = None
    if plans > 1:
        chosen = []
        for first in range(0, len(prompts), 16):  # few at a time: each is `plans` sequences
            indices = list(range(len(prompts)))[first : first + 16]
            chosen += gotr1.best_plans(
                model,
                tokenizer,
                ToyJudge(),
                [prompts[index] for index in indices],
                plans,
                max_chain=max_chain,
                indices=indices,
            )
    drawing = held_out.Drawing(model, tokenizer, max_chain=max_chain, at_once=64)
    score = functools.partial(rewards.score_with_boxes, ToyJudge(), crispness)
    rows = []
    for drawn in held_out.evaluate(drawing, score, prompts, chosen, label="drawing"):
        scores = drawn["scores"]
        measures = {
            "plan right": float(scores["spa"] > 0.999),  # spa and pi are fractions
            "picture right": float(scores["pi"] > 0.999),
            "ri": scores["ri"],
        }
        rows.append(
            {"index": drawn["index"], "prompt": drawn["prompt"], "sample": 0, "measures": measures}
        )
    return rows


if __name__ == "__main__":
    main()
