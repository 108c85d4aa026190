"""What both trainers need of the machine: command line, processes, output folder, log, checkpoints, curves."""

import contextlib
import dataclasses
import io
import json
import math
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
import tyro
from matplotlib.figure import Figure
from transformers.utils import logging


def fail(message: str):
    """Bad input: one line on stderr, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def parse_args(config_class, description: str, argv: list[str] | None = None):
    """Command line -> dataclass; the fields' trailing comments are the help. Bad flags are answered in one line."""
    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown):
            return tyro.cli(config_class, args=argv, description=description, use_underscores=True)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
    lines = re.sub(r"\x1b\[[0-9;]*m", "", shown.getvalue()).splitlines()  # tyro draws a coloured box
    fail(" ".join(" ".join(line.strip("│ ") for line in lines if not line.startswith(("╭", "╰", "│ ──"))).split()))


def start_processes() -> tuple[int, int, torch.device]:
    """(rank, world size, device) under torchrun or alone: gloo on CPU, nccl on GPUs."""
    logging.disable_progress_bar()  # transformers' bars for loading and saving; ours are for long work
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return rank, world, device


def all_sum(values: torch.Tensor) -> torch.Tensor:
    """The sum over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


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


def cosine_lr(step: int, steps: int, peak: float, warmup: float, floor: float = 0.0) -> float:
    """Learning rate of a step: linear over the share `warmup` of the steps, then a cosine from peak to floor * peak."""
    warm = max(1, round(warmup * steps))
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))))


def open_run(out: str, config, rank: int) -> Path:
    """The folder of a run. A new one gets `config.json`; the same configuration goes on; another one is an error."""
    folder, wanted = Path(out), json.loads(json.dumps(dataclasses.asdict(config)))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if rank == 0 and (folder / "config.json").exists():
            found = json.loads((folder / "config.json").read_text())
            keys = [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
            changed = ", ".join(f"--{key} {found.get(key)} (now {wanted.get(key)})" for key in keys)
            if changed:
                fail(f"{folder} holds a run with {changed}: give the same flags to continue it, or another --out")
        elif rank == 0:
            (folder / "config.json").write_text(json.dumps(wanted, indent=2))
    except (OSError, ValueError) as problem:
        fail(f"cannot use {folder} as output folder: {problem}")
    if dist.is_initialized():
        dist.barrier()  # nobody reads what rank 0 is still writing; if it failed, torchrun ends the others
    return folder


def read_log(folder: Path, before: float = math.inf) -> list[dict]:
    """The rows of `log.jsonl` with a step below `before`; a killed run may have left half a line, which is skipped."""
    path = folder / "log.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = (json.loads(line) for line in lines if line.endswith("}\n"))
    return [row for row in rows if row["step"] < before]


def write_log(folder: Path, rows: list[dict], mode: str = "a") -> None:
    """Adds rows to `log.jsonl`; mode "w" starts it anew with them, as a run does that continues from a checkpoint."""
    with (folder / "log.jsonl").open(mode) as file:
        for row in rows:
            short = {key: round(value, 6) if isinstance(value, float) else value for key, value in row.items()}
            file.write(json.dumps(short) + "\n")


def save_checkpoint(folder: Path, step: int, model, tokenizer, state: dict, keep: int = 2) -> Path:
    """`folder/step_000100/`: model and tokenizer by `save_pretrained`, and `trainer.pt` with what resuming needs.

    Written beside and renamed, so that what has the name is whole; `latest` names it; all but the last `keep` go."""
    target, beside = folder / f"step_{step:06d}", folder / f"step_{step:06d}.tmp"
    shutil.rmtree(beside, ignore_errors=True)
    model.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    torch.save({"step": step, **state}, beside / "trainer.pt")
    shutil.rmtree(target, ignore_errors=True)
    beside.rename(target)
    (folder / "latest.tmp").write_text(target.name)
    (folder / "latest.tmp").replace(folder / "latest")
    for old in sorted(folder.glob("step_*[0-9]"))[:-keep]:
        shutil.rmtree(old)
    return target


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None."""
    return folder / (folder / "latest").read_text() if (folder / "latest").exists() else None


def load_checkpoint(folder: Path, model, optimizer) -> int:
    """Puts a checkpoint of ours into the given objects; returns the step to continue with."""
    model.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"))
    state = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True)
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


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
