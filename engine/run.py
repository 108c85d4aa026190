"""What a run needs of the machine: command line, processes and what they tell each other, signals; its folder with
config.json, log.jsonl (and Weights & Biases, if asked for) and curves.png. Whatever is killed and when, it can be read
again."""

import contextlib
import dataclasses
import datetime
import functools
import hashlib
import io
import json
import math
import os
import re
import resource
import signal
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import tyro
from matplotlib.figure import Figure
from tqdm import tqdm
from transformers.utils import logging


def fail(message: str):
    """Bad input: one line on stderr, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def parse_args(
    config_class, description: str, argv: list[str] | None = None, presets: dict | None = None
):
    """Command line -> dataclass; the fields' trailing comments are the help. Bad flags are answered in one line.
    `presets`: name -> settings that become the defaults under `--preset NAME`; other flags still win."""
    words, default = sys.argv[1:] if argv is None else argv, None
    if presets:
        named = re.search(r"--preset[ =](\S+)", " ".join(words))
        default = config_class(**presets.get(named[1], {}) if named else {})
    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown):
            return tyro.cli(
                config_class,
                args=words,
                description=description,
                use_underscores=True,
                default=default,
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
    lines = re.sub(
        r"\x1b\[[0-9;]*m", "", shown.getvalue()
    ).splitlines()  # tyro draws a coloured box
    fail(
        " ".join(
            " ".join(
                line.strip("│ ") for line in lines if not line.startswith(("╭", "╰", "│ ──"))
            ).split()
        )
    )


def check_ranges(
    config, at_least_one: str = "", above_zero: str = "", not_negative: str = ""
) -> None:
    """Ends the program in one line when one of the named settings (words in a string) is out of its range."""
    ranges = (
        (at_least_one, 1, "1 or more"),
        (above_zero, 5e-324, "a number above 0"),
        (not_negative, 0, "0 or more"),
    )
    for names, lowest, expected in ranges:
        for name in names.split():
            if not getattr(config, name) >= lowest:  # nan is not
                fail(f"--{name} is {getattr(config, name)}: expected {expected}")


def start_processes() -> tuple[int, int, torch.device]:
    """(rank, world size, device) under torchrun or alone: gloo on CPU, nccl on GPUs."""
    logging.disable_progress_bar()  # transformers' bars for loading and saving; ours are for long work
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        patience = datetime.timedelta(
            hours=2
        )  # while rank 0 writes a large checkpoint, or another one downloads
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
    return rank, world, device


def rank() -> int:
    """Which of the processes this is."""
    return dist.get_rank() if dist.is_initialized() else 0


def all_sum(values: torch.Tensor) -> torch.Tensor:
    """The sum over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def say(text: str) -> None:
    """A line above the progress bar, from rank 0."""
    if rank() == 0:
        tqdm.write(text)


def gather_list(rows: list) -> list:
    """The lists of all processes, one after the other, on every process."""
    if not dist.is_initialized():
        return rows
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


def sum_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Adds up the gradients of all processes; a process without a gradient of its own takes part with zeros."""
    if not dist.is_initialized():
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)


def watch_signals(device: torch.device):
    """The function returned answers True, on every process, after SIGTERM or Ctrl-C on one: time to save and leave.
    It is a collective: every process has to ask, every time."""
    asked = []

    def ask(*_):
        asked.append(True)
        print("\nstopping after this step", file=sys.stderr)

    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, ask)
    return lambda: bool(all_sum(torch.tensor(float(len(asked)), device=device)).item())


def peak_gib(device: torch.device) -> float:
    """Most memory that this process has held so far: on the GPU, or of the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB


@functools.lru_cache(maxsize=2)
def permutation(count: int, epoch: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def order_of_step(count: int, step: int, batch_size: int, seed: int) -> list[int]:
    """Which of `count` prompts or records a step takes: each once an epoch, in an order fixed by (seed, epoch). A batch
    may begin in one epoch and end in the next. Nothing to save or replay: a run that resumes needs its step only."""
    places = (divmod(place, count) for place in range(step * batch_size, (step + 1) * batch_size))
    return [int(permutation(count, epoch, seed)[place]) for epoch, place in places]


def cosine_lr(step: int, steps: int, peak: float, warmup: float, floor: float = 0.0) -> float:
    """Learning rate of a step: linear over the share `warmup` of the steps, then a cosine from peak to floor * peak."""
    warm = max(1, round(warmup * steps))
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (
        floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
    )


# -------------------------------------------------------------------------------------------------
# The folder of a run


def open_run(out: str, config) -> Path:
    """The folder of a run. A new one gets `config.json`; the same configuration goes on; another one is an error."""
    folder, wanted = Path(out), json.loads(json.dumps(dataclasses.asdict(config)))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if rank() == 0 and (folder / "config.json").exists():
            found = json.loads((folder / "config.json").read_text())
            keys = [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
            changed = ", ".join(f"--{key} {found.get(key)} (now {wanted.get(key)})" for key in keys)
            if changed:
                fail(
                    f"{folder} holds a run with {changed}: give the same flags to continue it, or another --out"
                )
        elif rank() == 0:
            write_whole(folder / "config.json", json.dumps(wanted, indent=2))
    except (OSError, ValueError) as problem:
        fail(f"cannot use {folder} as output folder: {problem}")
    if dist.is_initialized():
        dist.barrier()  # nobody reads what rank 0 is still writing; if it failed, torchrun ends the others
    return folder


def write_whole(path: Path, text: str) -> None:
    """A small file that is either the old one or the new one, whenever the process is killed."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def _last_words(folder: Path, kind, problem, trace) -> None:
    """After the traceback of whatever ends a run, in one line: what is left, and what to do."""
    sys.__excepthook__(kind, problem, trace)
    saved = latest_checkpoint(folder)
    left = (
        f"{saved} is whole: the same command continues from it"
        if saved
        else "no checkpoint was written yet"
    )
    smaller = (
        ", with less in memory at a time (--micro_batch)"
        if isinstance(problem, torch.OutOfMemoryError)
        else ""
    )
    print(f"the run in {folder} ended: {problem}\n{left}{smaller}", file=sys.stderr)


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None."""
    return folder / (folder / "latest").read_text() if (folder / "latest").exists() else None


def read_log(folder: Path, before: float = math.inf) -> list[dict]:
    """The rows of `log.jsonl` with a step below `before`; a killed run may have left half a line, which is skipped."""
    path = folder / "log.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = (json.loads(line) for line in lines if line.endswith("}\n"))
    return [row for row in rows if row["step"] < before]


class Log:
    """`log.jsonl` of a run that goes on with step `start`, and a Weights & Biases project if one is named. Only rank 0
    writes."""

    def __init__(self, folder: Path, start: int = 0, wandb: str = ""):
        self.folder, self.wandb = folder, None
        sys.excepthook = functools.partial(_last_words, folder)
        if rank() > 0:
            return
        write_whole(folder / "log.jsonl", "".join(map(self.line, read_log(folder, before=start))))
        if wandb:
            try:
                import wandb as weights_and_biases
            except ImportError:
                fail("--wandb needs its package: pip install wandb")
            name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[
                :16
            ]  # resumed: the same curves go on
            settings = json.loads((folder / "config.json").read_text())
            self.wandb = weights_and_biases.init(
                project=wandb, id=name, resume="allow", config=settings
            )

    @staticmethod
    def line(row: dict) -> str:
        return (
            json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()})
            + "\n"
        )

    def write(self, row: dict) -> None:
        if rank() == 0:
            with (self.folder / "log.jsonl").open("a") as file:
                file.write(self.line(row))
            if self.wandb:
                self.wandb.log(row, step=row["step"])

    def plot(self, panels: dict[str, list[str]]) -> None:
        """Draws `curves.png` anew, see `plot_curves`."""
        if rank() == 0:
            plot_curves(read_log(self.folder), panels, self.folder / "curves.png")


def plot_curves(rows: list[dict], panels: dict[str, list[str]], path: Path) -> None:
    """One panel for each title of `panels`: the named columns of the log over the step, pale, and running means."""
    figure = Figure(figsize=(5 * len(panels), 3.6), layout="tight")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, keys) in zip(axes, panels.items(), strict=True):
        for key in keys:
            steps = [row["step"] + 1 for row in rows if key in row]
            values = np.array([row[key] for row in rows if key in row])
            width = max(1, len(values) // 12)
            means = [values[max(0, k - width + 1) : k + 1].mean() for k in range(len(values))]
            (line,) = axis.plot(steps, means, label=key)
            axis.plot(steps, values, color=line.get_color(), alpha=0.25, linewidth=1)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
