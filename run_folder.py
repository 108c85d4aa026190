"""The folder of a run: config.json, log.jsonl (and Weights & Biases, if asked for), curves.png. Whatever is killed and
when, it can be read again."""

import dataclasses
import functools
import hashlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from matplotlib.figure import Figure

from runtime import fail, rank


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
                fail(f"{folder} holds a run with {changed}: give the same flags to continue it, or another --out")
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
    left = f"{saved} is whole: the same command continues from it" if saved else "no checkpoint was written yet"
    smaller = ", with less in memory at a time (--micro_batch)" if isinstance(problem, torch.OutOfMemoryError) else ""
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
            name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]  # resumed: the same curves go on
            settings = json.loads((folder / "config.json").read_text())
            self.wandb = weights_and_biases.init(project=wandb, id=name, resume="allow", config=settings)

    @staticmethod
    def line(row: dict) -> str:
        return json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}) + "\n"

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
