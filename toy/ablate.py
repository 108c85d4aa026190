"""Many short trainings of the toy, and a table and a figure of what came of them.

    python -m toy.ablate                                # study `rewards` with three seeds
    python -m toy.ablate --study variety --seeds 1
    python -m toy.ablate --study all --no_train         # tables and figures of what is there

rewards  Which rewards does it take (paper tables 3 and 6)? A training per row and seed.

judge    How wrong may the judge be (paper table 7)? Trainings with a judge that gives a share p of
         wrong answers. Kendall's tau says how far such a judge agrees with the exact one.

variety  Why do plans become alike? Longer trainings: advantages divided by the standard deviation
         of the group, by that of the batch, or not divided; with other weights of the KL.

Every training is `python train_grpo.py` with other flags, in a process of its own on one CPU
thread; `--jobs` of them run at a time. Ctrl-C lets them save and stop, and the same command goes
on. What is finished stays, and a training that two studies share is done once.
"""

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

TRAINER = Path(__file__).parent.parent / "train_grpo.py"


@dataclass
class Config:
    study: Literal["rewards", "judge", "variety", "all"] = "rewards"  # see above
    out: str = "out/ablate"  # folder of the trainings, tables and figures
    seeds: int = 3  # trainings per row: their seeds are 0, 1, …
    rows: tuple[str, ...] = ()  # only these, by the names of their folders
    jobs: int = 0  # trainings at a time; 0: as many as there are cores
    steps: int = 0  # of each training; 0: 60, and 220 for study variety
    flags: str = ""  # for train_grpo.py, of all trainings: --flags="--model out/sft/step_001000"
    train: bool = True  # with --no_train only the tables and figures of what is there


# -------------------------------------------------------------------------------------------------
# The studies


@dataclass
class Row:
    """One kind of training, a line of a table."""

    key: str  # names its folders
    title: str  # names it in table and figure
    flags: str  # of train_grpo.py
    paper: tuple[float, ...] = ()  # its scores of T2I-CompBench: color, 2D-spatial, complex


@dataclass
class Study:
    question: str
    steps: int  # of each training
    flags: str  # of all trainings; those of a row come after these
    columns: list[str]  # of the table: measures of held-out prompts
    rows: list[Row]


BASELINE = Row("", "SFT model", "", paper=(0.6336, 0.2140, 0.3490))  # what all trainings start from
PICTURES = ["color: picture right", "spatial: picture right", "complex: picture right"]
# The paper does not say whether R_HPS takes part in the rows of its table 3, which has no column
# for it. So a row here is trained on what it names, and only "all" and its variants have R_HPS.
REWARDS = Study(
    question="Which rewards does it take?",
    steps=60,
    flags="--look_every 0 --advantage group_std",  # divided, as in the paper
    columns=[
        "total",
        "spa",
        "ri",
        "complex: plan right",
        *PICTURES,
        "follow: ri",
        "variety: layout",
    ],
    rows=[
        Row("pr", "R_PR", "--rewards sem spa", (0.7050, 0.2283, 0.3619)),
        Row("ri", "R_RI", "--rewards ri", (0.3340, 0.0076, 0.2488)),
        Row("pi", "R_PI", "--rewards pi", (0.7401, 0.2398, 0.3724)),
        Row("pr_pi", "R_PR + R_PI", "--rewards sem spa pi", (0.7289, 0.2557, 0.3653)),
        Row("pr_ri", "R_PR + R_RI", "--rewards sem spa ri", (0.7118, 0.2579, 0.3583)),
        Row("ri_pi", "R_RI + R_PI", "--rewards ri pi", (0.6507, 0.1797, 0.3452)),
        Row("sem_ri_pi", "R_sem + R_RI + R_PI", "--rewards sem ri pi", (0.7323, 0.2133, 0.3568)),
        Row("spa_ri_pi", "R_spa + R_RI + R_PI", "--rewards spa ri pi", (0.7067, 0.2419, 0.3648)),
        Row("all", "all", "", (0.7632, 0.2674, 0.3749)),
        Row("sum", "all, as a sum", "--combine sum", (0.7154, 0.2254, 0.3638)),
        # not in the paper for this model; what keeps pictures when only plans are rewarded; what
        # keeps plans different
        Row("hps", "R_HPS", "--rewards hps"),
        Row("pr_kl_0.1", "R_PR, KL 0.1", "--rewards sem spa --kl 0.1"),
        Row("pr_kl_0.5", "R_PR, KL 0.5", "--rewards sem spa --kl 0.5"),
        Row("mean", "all, not divided by std", "--advantage mean"),
    ],
)
JUDGE = Study(
    question="How wrong may the judge be?",
    steps=REWARDS.steps,
    flags=REWARDS.flags,
    columns=["tau", "total", *PICTURES],
    rows=[
        Row("all", "p = 0", ""),  # the same trainings as in REWARDS
        Row("toy_0.1", "p = 0.1", "--judge toy:0.1"),
        Row("toy_0.2", "p = 0.2", "--judge toy:0.2"),
        Row("toy_0.4", "p = 0.4", "--judge toy:0.4"),
    ],
)
VARIETY = Study(
    question="Why do plans become alike?",
    steps=220,
    flags="--look_every 55 --evaluate_looks",
    columns=[
        "total",
        "complex: picture right",
        "follow: ri",
        "variety: layout",
        "variety: place entropy",
    ],
    rows=[
        Row("mean", "mean", "--advantage mean"),
        Row("batch_std", "batch_std", "--advantage batch_std"),
        Row("group_std", "group_std", "--advantage group_std"),
        Row("group_std_kl0.1", "group_std, KL 0.1", "--advantage group_std --kl 0.1"),
        Row("group_std_kl0.3", "group_std, KL 0.3", "--advantage group_std --kl 0.3"),
        Row("mean_kl0.002", "mean, KL 0.002", "--advantage mean --kl 0.002"),
    ],
)
STUDIES = {"rewards": REWARDS, "judge": JUDGE, "variety": VARIETY}


def main(argv: list[str] | None = None) -> None:
    config = run.parse_args(Config, __doc__, argv)
    names = list(STUDIES) if config.study == "all" else [config.study]
    check(config, names)
    trainings = {}  # folder -> training: what two studies share is there once
    for name in names:
        for training in plan(STUDIES[name], config):
            check_flags(training)
            trainings.setdefault(training.folder, training)
    waiting = [training for training in trainings.values() if not training.finished]
    print(f"{len(trainings) - len(waiting)} of {len(trainings)} trainings are finished")
    if config.train:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C
        try:
            train_all(waiting, config.jobs or os.cpu_count())
        except KeyboardInterrupt:
            print("\nstopped: the same command goes on from here", file=sys.stderr)
            sys.exit(128 + signal.SIGINT)
    for name in names:
        if plan(STUDIES[name], config):  # else --rows names none of it
            publish(name, plan(STUDIES[name], config), Path(config.out))


def check(config: Config, names: list[str]) -> None:
    """Bad settings end the program here, in one line."""
    run.check_ranges(config, at_least_one="seeds", not_negative="jobs steps")
    known = []
    for name in names:
        known += [row.key for row in STUDIES[name].rows]
    for key in config.rows:
        if key not in known:
            run.fail(f"--rows {key}: expected some of {' '.join(known)}")


# -------------------------------------------------------------------------------------------------
# The trainings


@dataclass
class Training:
    """A row with a seed."""

    row: Row
    seed: int
    folder: Path
    flags: str  # of train_grpo.py, but for --out

    @property
    def output(self) -> Path:
        """The file of its flags and, below them, what it prints; beside its folder."""
        return self.folder.with_name(f"{self.folder.name}.txt")

    @property
    def finished(self) -> bool:
        return (self.folder / "eval_after.json").exists()  # the last file that it writes


def plan(study: Study, config: Config) -> list[Training]:
    """The trainings of a study: seed 0 of every row, then seed 1, …"""
    steps = config.steps or study.steps
    trainings = []
    for seed in range(config.seeds):
        for row in study.rows:
            if config.rows and row.key not in config.rows:
                continue
            folder = Path(config.out) / f"{steps}_steps" / f"{row.key}_seed{seed}"
            flags = f"--seed {seed} --steps {steps} --keep 1 {study.flags} {row.flags}"
            trainings.append(Training(row, seed, folder, f"{flags} {config.flags}".strip()))
    return trainings


def check_flags(training: Training) -> None:
    """Ends the program in one line when the folder holds a training with other flags: numbers of
    both would stand in one table."""
    if training.output.exists():
        with training.output.open(encoding="utf-8") as file:
            found = file.readline().strip()
        if found != training.flags:
            run.fail(
                f"{training.folder} was trained with {found} (now {training.flags}): give the same "
                "flags, or another --out"
            )


def train_all(waiting: list[Training], jobs: int) -> None:
    """Runs trainings, `jobs` at a time. When one fails, and on Ctrl-C, the others save and stop."""
    running = []  # (training, process)
    bar = tqdm(total=len(waiting), desc="trainings", disable=not waiting)
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                training = waiting.pop(0)
                running.append((training, start(training)))
            bar.set_postfix_str(", ".join(training.folder.name for training, _ in running))
            time.sleep(0.2)
            for training, process in list(running):
                if process.poll() is None:
                    continue
                running.remove((training, process))
                if not training.finished:
                    run.fail(f"{training.folder} ended early: see {training.output}")
                bar.update()
    finally:
        for _, process in running:
            process.terminate()
        for _, process in running:
            process.wait()
        bar.close()


def start(training: Training) -> subprocess.Popen:
    """One thread, or the digits would depend on the number of cores. A session of its own, or a
    Ctrl-C in the terminal would reach the training, too: with the SIGTERM of `train_all` it would
    be its second signal, which ends it before it has saved."""
    command = [sys.executable, TRAINER, "--out", training.folder, *shlex.split(training.flags)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    training.output.parent.mkdir(parents=True, exist_ok=True)
    if not training.output.exists():
        run.write_whole(training.output, f"{training.flags}\n")
    with training.output.open("a", encoding="utf-8") as output:
        return subprocess.Popen(
            command, stdout=output, stderr=output, env=environment, start_new_session=True
        )


# -------------------------------------------------------------------------------------------------
# The tables


def publish(name: str, trainings: list[Training], out: Path) -> None:
    """Writes the table and the figure of a study, of the trainings that are finished."""
    study = STUDIES[name]
    table = read_results(trainings)
    if name == "judge":
        add_taus(table)
    text = report(study, trainings, table)
    out.mkdir(parents=True, exist_ok=True)
    run.write_whole(out / f"{name}.md", text)
    figure = draw_steps(trainings) if name == "variety" else draw_rows(study, table)
    figure.savefig(out / f"{name}.png", dpi=110)
    print(f"\n{text}\nwritten to {out / name}.md and {out / name}.png")


@dataclass
class Line:
    """A line of a table."""

    row: Row
    by_seed: dict[int, dict | None]  # measures of held-out prompts; None: not finished

    def values(self, measure: str) -> list[float]:
        """One per finished training; [] when it was not measured."""
        return [found[measure] for found in self.by_seed.values() if found and measure in found]


def read_results(trainings: list[Training]) -> list[Line]:
    """The first line is the model before any training."""
    before = Line(BASELINE, {})
    lines = {}  # by key
    for training in trainings:
        if (training.folder / "eval_before.json").exists():
            before.by_seed[training.seed] = read_json(training.folder / "eval_before.json")
        found = None
        if training.finished:
            found = read_json(training.folder / "eval_after.json")
        line = lines.setdefault(training.row.key, Line(training.row, {}))
        line.by_seed[training.seed] = found
    return [before, *lines.values()]


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def report(study: Study, trainings: list[Training], table: list[Line]) -> str:
    """The table in Markdown."""
    import torch

    head = ["", *study.columns, "seeds"]
    texts = [head, ["---"] * len(head)]
    for line in table:
        cells = [line.row.title]
        for measure in study.columns:
            cells.append(mean_and_range(line.values(measure)))
        finished = [str(seed) for seed, found in line.by_seed.items() if found]
        missing = [str(seed) for seed, found in line.by_seed.items() if not found]
        seeds = ", ".join(finished)
        if missing:
            seeds += f" (missing: {', '.join(missing)})"
        texts.append([*cells, seeds.strip()])
    rows = "\n".join(f"| {' | '.join(cells)} |" for cells in texts)
    return (
        f"# {study.question}\n\n"
        "Mean over training seeds, with the lowest and the highest in brackets. The first training "
        f"was\n`train_grpo.py {trainings[0].flags}`;\nothers differ in the seed and the flags of "
        f"their row. One CPU thread, torch {torch.__version__}.\n\n{rows}\n"
    )


def mean_and_range(values: list[float]) -> str:
    """A cell of the table; the range only where two digits show one.
    >>> mean_and_range([0.5, 0.75]), mean_and_range([0.501, 0.502]), mean_and_range([])
    ('0.62 (0.50 to 0.75)', '0.50', '–')
    """
    if not values:
        return "–"
    mean = f"{np.mean(values):.2f}"
    lowest, highest = f"{min(values):.2f}", f"{max(values):.2f}"
    return mean if lowest == highest else f"{mean} ({lowest} to {highest})"


def add_taus(table: list[Line], prompts: int = 240, samples: int = 2) -> None:
    """Adds the measure `tau` to every row of study judge: Kendall's tau-b between the total rewards
    of its judge and the exact ones, over samples of the SFT model for held-out prompts."""
    import torch
    from scipy.stats import kendalltau

    import gotr1
    import rewards
    from toy.world import ToyJudge, crispness, toy_prompts

    torch.set_num_threads(1)  # so that digits do not depend on the number of cores
    model, tokenizer = gotr1.load_policy("toy")
    held_out = toy_prompts(prompts, seed=7, held_out=True)
    sampled = gotr1.rollout(model, tokenizer, held_out, group=samples, max_chain=96)
    images = gotr1.decode_images(model, sampled.image_tokens)
    repeated = [prompt for prompt in held_out for _ in range(samples)]

    def totals_by(judge: ToyJudge) -> list[float]:
        scores = rewards.score(judge, crispness, repeated, sampled.chains, images)
        return [score["total"] for score in scores]

    exact = totals_by(ToyJudge())
    for line in table[1:]:
        judge = ToyJudge.from_flag(line.row.flags.removeprefix("--judge ") or "toy")
        tau = float(kendalltau(totals_by(judge), exact).statistic)
        for found in line.by_seed.values():
            if found:
                found["tau"] = tau


# -------------------------------------------------------------------------------------------------
# The figures

COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9")  # Okabe and Ito


def draw_rows(study: Study, table: list[Line]):
    """The share of right pictures of each row. The paper's scores are beside the rows of REWARDS
    only: `paper` of the SFT model belongs to that table."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 1.2 + 0.4 * len(table)), layout="constrained")
    title = "bar: mean over seeds, dot: a seed"
    if study is REWARDS:
        title += ", diamond: the paper's score (T2I-CompBench)"
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(1, len(PICTURES), sharey=True)
    for k, (axis, measure) in enumerate(zip(axes, PICTURES, strict=True)):
        for y, line in enumerate(table):
            values = line.values(measure)
            if values:
                axis.barh(y, np.mean(values), color=COLORS[0], alpha=0.4)
                axis.plot(values, [y] * len(values), "o", color=COLORS[0], markersize=4)
            if line.row.paper and study is REWARDS:
                axis.plot(line.row.paper[k], y, "D", color=COLORS[4], markersize=6)
        axis.set(title=measure, xlim=(0, 1), ylim=(len(table) - 0.4, -0.6))  # downwards
        axis.set_yticks(range(len(table)), [line.row.title for line in table])
    return figure


def draw_steps(trainings: list[Training]):
    """Total reward and variety of layouts of held-out prompts over the steps; and, from the log,
    this variety against the standard deviation of the groups' rewards. A line per training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.8), layout="constrained")
    total, layout, spread = figure.subplots(1, 3)
    colors = {}  # by row
    for training in trainings:
        title = training.row.title
        is_first = title not in colors
        color = colors.setdefault(title, COLORS[len(colors) % len(COLORS)])
        looks = [read_json(path) for path in training.folder.glob("eval_*.json")]
        looks.sort(key=lambda found: found["step"])
        steps = [found["step"] for found in looks]
        total.plot(steps, [found["total"] for found in looks], ".-", color=color)
        layout.plot(steps, [found["variety: layout"] for found in looks], ".-", color=color)
        rows = run.read_log(training.folder)
        spreads = running_mean([row["group_std"] for row in rows])
        varieties = running_mean([row["layout_variety"] for row in rows])
        spread.plot(spreads, varieties, color=color, label=title if is_first else None)
    for axis in (total, layout, spread):
        axis.set_ylim(0, 1)
    total.set(title="held-out prompts: total reward", xlabel="step")
    layout.set(title="held-out prompts: variety of layouts", xlabel="step")
    spread.set(title="training prompts, running means over 20 steps", ylabel="variety of layouts")
    spread.set_xlabel("standard deviation of the rewards within a group")
    spread.invert_xaxis()  # it falls as a training goes on
    figure.legend(loc="outside lower center", ncols=len(COLORS))
    return figure


def running_mean(values: list[float], width: int = 20) -> np.ndarray:
    """Means of each `width` neighbours."""
    if len(values) < width:
        return np.zeros(0)
    return np.convolve(values, np.ones(width) / width, mode="valid")


if __name__ == "__main__":
    main()
