"""What a run needs besides the model: its command line, its processes, its signals and its folder.

The folder of a run holds `config.json` (the settings), `log.jsonl` (one row per step), `curves.png`
(the log as curves) and checkpoints. They can be read at any moment, also after a kill."""

import contextlib
import dataclasses
import datetime
import fcntl
import functools
import hashlib
import importlib.util
import io
import json
import math
import os
import re
import resource
import signal
import sys
import uuid
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import tyro
from tqdm import tqdm

# -------------------------------------------------------------------------------------------------
# The command line


def fail(message: str):
    """Bad input: one line on stderr, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def parse_args(
    config_class, description: str, argv: list[str] | None = None, presets: dict | None = None
):
    """Command line -> dataclass. Bad flags end the program with one line and exit code 2.

    Each field is a flag, and its trailing comment is the help text; a field without a default is
    positional. A Union of dataclasses gives one subcommand per class, with the class's docstring as
    its help. `presets` maps a name to the settings that become the defaults under `--preset NAME`;
    a flag on the command line still wins."""
    arguments = sys.argv[1:] if argv is None else argv
    default = tyro.MISSING_NONPROP  # tyro's word for "each field has the default of its class"
    if presets:
        settings = {}
        named = re.search(r"--preset[ =](\S+)", " ".join(arguments))
        if named:
            settings = presets.get(named[1], {})  # tyro itself complains about an unknown name
        default = config_class(**settings)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                config_class,
                args=arguments,
                description=description,
                default=default,
                use_underscores=True,
                config=(tyro.conf.PositionalRequiredArgs,),
            )
    except SystemExit as stop:
        if stop.code in (0, None):  # --help
            raise
    # tyro complains in a coloured box of several lines
    words = []
    for line in re.sub(r"\x1b\[[0-9;]*m", "", complaint.getvalue()).splitlines():
        if not line.startswith(("╭", "╰", "│ ──")):
            words += line.strip("│ ").split()
    fail(" ".join(words))


def check_ranges(
    config, at_least_one: str = "", above_zero: str = "", not_negative: str = ""
) -> None:
    """Ends the program in one line when a setting is out of its range; None, which stands for a
    default that comes from the model, is in every range.

    Each argument holds names of settings, separated by spaces. The conditions are written with
    `not`, so that nan, for which every comparison is false, is refused too."""
    for name in at_least_one.split():
        value = getattr(config, name)
        if value is not None and not value >= 1:
            fail(f"--{name} is {value}: expected 1 or more")
    for name in above_zero.split():
        value = getattr(config, name)
        if value is not None and not value > 0:
            fail(f"--{name} is {value}: expected a number above 0")
    for name in not_negative.split():
        value = getattr(config, name)
        if value is not None and not value >= 0:
            fail(f"--{name} is {value}: expected 0 or more")


# -------------------------------------------------------------------------------------------------
# Processes


def start_processes() -> tuple[int, int, torch.device]:
    """(rank, number of processes, device), under torchrun or alone. gloo on CPU, nccl on GPUs."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # of loading and saving: our bars are for work that takes longer
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        # the others wait while rank 0 writes a large checkpoint, or while one downloads a model
        patience = datetime.timedelta(hours=2)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=patience)
    return int(os.environ.get("RANK", 0)), world, device


def rank() -> int:
    """The number of this process, 0 when it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def all_sum(values: torch.Tensor) -> torch.Tensor:
    """The sum over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def gather_list(items: list) -> list:
    """The lists of all processes, one after the other, on every process."""
    if not dist.is_initialized():
        return items
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    joined = []
    for part in lists:
        joined += part
    return joined


def say(text: str) -> None:
    """A line above the progress bar, from rank 0."""
    if rank() == 0:
        tqdm.write(text)


def watch_signals(device: torch.device):
    """Returns a function that is True, on every process, after SIGTERM or Ctrl-C on one of them:
    time to save and leave. It is a collective: every process has to call it, every time. The second
    Ctrl-C ends the program at once: an evaluation, which does not look, may take long."""
    signals = []

    def remember(number, frame):
        signals.append(number)
        message = "stopping after this step"
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            message += "; Ctrl-C again ends the program at once"
        os.write(2, f"\n{message}\n".encode())  # it may interrupt a print, where print would fail

    def stopped() -> bool:
        count = torch.tensor(float(len(signals)), device=device)
        return bool(all_sum(count).item())

    signal.signal(signal.SIGTERM, remember)
    signal.signal(signal.SIGINT, remember)
    return stopped


def peak_gib(device: torch.device) -> float:
    """Most memory that this process has held so far, in GiB: on the GPU, or of the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB


# -------------------------------------------------------------------------------------------------
# The folder of a run


# Settings that may change when a run goes on: they change memory, speed, and what is kept or seen
FREE = (
    "out",  # a folder may be moved
    "micro_batch",
    "rollout_batch",
    "judge_batch",
    "judge_device",
    "gradient_checkpointing",
    "cache",
    "look_every",
    "evaluate_looks",
    "save_every",
    "keep",
    "wandb",
)
LOCKS = {}  # number of a folder on its disk -> its lock, a file that is open until the process ends


def open_run(out: str, config) -> Path:
    """The folder of a run, which this process alone may use. A new folder gets `config.json`; a
    folder with the same settings is continued; with others, but for FREE ones, the program ends in
    one line that names the differences."""
    folder = Path(out)
    wanted = json.loads(json.dumps(dataclasses.asdict(config)))  # tuples become lists, as on disk
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if rank() == 0:
            lock_run(folder)
            if (folder / "config.json").exists():
                found = json.loads((folder / "config.json").read_text())
                check_same(folder, found, wanted)
            write_whole(folder / "config.json", json.dumps(wanted, indent=2))
    except (OSError, ValueError) as problem:
        fail(f"cannot use {folder} as output folder: {problem}")
    if dist.is_initialized():
        # nobody reads what rank 0 is still writing; if rank 0 failed, torchrun ends the others
        dist.barrier()
    return folder


def lock_run(folder: Path) -> None:
    """Ends the program when another process uses the folder: two of them would delete each other's
    checkpoints. However a process ends, its lock ends with it."""
    number = folder.stat().st_ino  # it stays when the folder is moved
    if number in LOCKS:
        return
    file = (folder / "lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"{folder} is in use by another process: wait for it, or give another --out")
    except OSError:
        pass  # some network file systems have no locks
    LOCKS[number] = file


def check_same(folder: Path, found: dict, wanted: dict) -> None:
    """Ends the program when the settings that a run was started with are not the wanted ones."""
    changes = []
    for name in found | wanted:  # the names of both
        if name not in FREE and found.get(name) != wanted.get(name):
            changes.append(f"--{name} {found.get(name)} (now {wanted.get(name)})")
    if changes:
        advice = "give the same flags to continue it, or another --out"
        fail(f"{folder} holds a run with {', '.join(changes)}: {advice}")


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a small file: whenever the process is killed, the old file is there or the new one.

    It is written beside, under a name that no other process uses, and renamed when it is complete.
    Raises OSError."""
    beside = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        if isinstance(content, str):
            beside.write_text(content, encoding="utf-8")
        else:
            beside.write_bytes(content)
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)  # a full disk leaves half a file
        raise


def file_stamps(files: Iterable[Path]) -> list[list]:
    """[folder/name, size, time of its last change] of each file, sorted.

    They are saved beside a result that was made from these files; the result is out of date when
    `changed_files` finds a difference later. Only the last folder is named, so that all of it may
    be moved. In the hub's cache the file's name, a hash of its content, stands in place of the
    time: each machine downloads the same file at another time. Raises OSError."""
    stamps = []
    for file in set(files):
        real = file.resolve()
        facts = real.stat()
        in_hub_cache = real.parent.name == "blobs"
        when = real.name if in_hub_cache else facts.st_mtime_ns
        stamps.append([f"{file.absolute().parent.name}/{file.name}", facts.st_size, when])
    return sorted(stamps)


def changed_files(before: list[list], now: list[list]) -> list[str]:
    """The names of the files that are not the same in two `file_stamps`."""
    old = {tuple(stamp) for stamp in before}
    new = {tuple(stamp) for stamp in now}
    return sorted({name for name, _, _ in old ^ new})


def digest(value) -> str:
    """Eight hexadecimal digits that stand for a value of JSON, in a table or as a key."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None. A file, `latest`, holds its name."""
    if not (folder / "latest").exists():
        return None
    return folder / (folder / "latest").read_text()


def checkpoint_to_resume(folder: Path) -> Path | None:
    """`latest_checkpoint`, the same on every process. Where they see different ones, the program
    ends: they would wait for each other forever. Every process has to call it."""
    saved = latest_checkpoint(folder)
    names = gather_list([saved.name if saved else "none"])
    if len(set(names)) > 1:
        seen = ", ".join(sorted(set(names)))
        fail(f"--out {folder} must be one folder that all machines see: they see {seen}")
    return saved


def explain_crashes(folder: Path) -> None:
    """From now on, an exception that ends the program is followed by a line that says what is left
    of the run in `folder` and what to do."""
    sys.excepthook = functools.partial(explain_crash, folder)


def explain_crash(folder: Path, kind, problem, trace) -> None:
    """Prints the traceback, then what is left and what to do: a sys.excepthook for one folder."""
    sys.__excepthook__(kind, problem, trace)
    saved = latest_checkpoint(folder)
    if saved:
        advice = f"{saved} is whole: the same command continues from it"
    else:
        advice = "no checkpoint was written yet"
    if isinstance(problem, torch.OutOfMemoryError):
        advice += ", with less in memory at a time (--micro_batch, --rollout_batch)"
    print(f"the run in {folder} ended: {problem}\n{advice}", file=sys.stderr)


# -------------------------------------------------------------------------------------------------
# Its log


def read_log(folder: Path, before: float = math.inf) -> list[dict]:
    """The rows of `log.jsonl` with a step below `before`. A killed run may have left half a line,
    which is skipped."""
    path = folder / "log.jsonl"
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("}\n"):
            row = json.loads(line)
            if row["step"] < before:
                rows.append(row)
    return rows


def log_line(row: dict) -> str:
    """A row of the log as JSON, its numbers rounded to six significant digits."""
    rounded = {}
    for name, value in row.items():
        rounded[name] = float(f"{value:.6g}") if isinstance(value, float) else value
    return json.dumps(rounded) + "\n"


class Log:
    """`log.jsonl` of a run that goes on with step `start`. If a Weights & Biases project is named,
    `wandb`, it gets the same rows. Only rank 0 writes."""

    def __init__(self, folder: Path, start: int = 0, wandb: str = ""):
        self.folder = folder
        self.wandb_run = None
        self.rows = []  # all of them, those of an earlier process included; empty on other ranks
        if rank() > 0:
            return
        # the steps after the last checkpoint are done again, and logged again
        self.rows = read_log(folder, before=start)
        write_whole(folder / "log.jsonl", "".join(log_line(row) for row in self.rows))
        if wandb:
            self.wandb_run = start_wandb(folder, wandb)

    def write(self, row: dict) -> None:
        """Appends a row, which has to have a `step`."""
        if rank() > 0:
            return
        self.rows.append(row)
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(log_line(row))
        if self.wandb_run:
            self.wandb_run.log(row, step=row["step"])

    def plot(self, panels: dict[str, list[str]]) -> None:
        """Draws `curves.png` of the log so far, see `plot_curves`."""
        if rank() == 0:
            plot_curves(self.rows, panels, self.folder / "curves.png")


def check_wandb(project: str) -> None:
    """Ends the program in one line when a Weights & Biases project is named without its package."""
    if project and importlib.util.find_spec("wandb") is None:
        fail("--wandb needs its package: pip install wandb")


def start_wandb(folder: Path, project: str):
    """The Weights & Biases run of this folder: started again, it continues the same curves."""
    import wandb

    name = folder / "wandb_id"
    if not name.exists():
        write_whole(name, uuid.uuid4().hex)
    settings = json.loads((folder / "config.json").read_text())
    return wandb.init(project=project, id=name.read_text(), resume="allow", config=settings)


def plot_curves(rows: list[dict], panels: dict[str, list[str]], path: Path) -> None:
    """One panel per title of `panels`, three side by side, with its columns of the log over the
    step: the values pale, their running means strong. A column may be missing from some rows, or
    from all."""
    from matplotlib.figure import Figure

    across = min(3, len(panels))
    down = -(-len(panels) // across)  # rounded up
    figure = Figure(figsize=(5 * across, 3.6 * down), layout="tight")
    axes = figure.subplots(down, across, squeeze=False).flatten()
    for axis in axes[len(panels) :]:
        axis.remove()
    for axis, (title, columns) in zip(axes, panels.items(), strict=False):
        for column in columns:
            having = [row for row in rows if column in row]
            steps = [row["step"] + 1 for row in having]
            values = np.array([row[column] for row in having])
            width = max(1, len(values) // 12)  # of the running mean
            means = []
            for end in range(1, len(values) + 1):
                means.append(values[max(0, end - width) : end].mean())
            (line,) = axis.plot(steps, means, label=column)
            axis.plot(steps, values, color=line.get_color(), alpha=0.25, linewidth=1)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
