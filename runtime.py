"""What the scripts need of the machine: command line, processes and what they tell each other, signals."""

import contextlib
import datetime
import functools
import io
import math
import os
import re
import resource
import signal
import sys

import numpy as np
import torch
import torch.distributed as dist
import tyro
from tqdm import tqdm
from transformers.utils import logging


def fail(message: str):
    """Bad input: one line on stderr, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def parse_args(config_class, description: str, argv: list[str] | None = None, presets: dict | None = None):
    """Command line -> dataclass; the fields' trailing comments are the help. Bad flags are answered in one line.
    `presets`: name -> settings that become the defaults under `--preset NAME`; other flags still win."""
    words, default = sys.argv[1:] if argv is None else argv, None
    if presets:
        named = re.search(r"--preset[ =](\S+)", " ".join(words))
        default = config_class(**presets.get(named[1], {}) if named else {})
    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown):
            return tyro.cli(config_class, args=words, description=description, use_underscores=True, default=default)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
    lines = re.sub(r"\x1b\[[0-9;]*m", "", shown.getvalue()).splitlines()  # tyro draws a coloured box
    fail(" ".join(" ".join(line.strip("│ ") for line in lines if not line.startswith(("╭", "╰", "│ ──"))).split()))


def check_ranges(config, at_least_one: str = "", above_zero: str = "", not_negative: str = "") -> None:
    """Ends the program in one line when one of the named settings (words in a string) is out of its range."""
    ranges = ((at_least_one, 1, "1 or more"), (above_zero, 5e-324, "a number above 0"), (not_negative, 0, "0 or more"))
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
        patience = datetime.timedelta(hours=2)  # while rank 0 writes a large checkpoint, or another one downloads
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
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))))
