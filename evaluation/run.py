"""From a benchmark's prompts to pictures, and from pictures to scores; used by eval.py.

Drawing may be interrupted at any time and continues where it was, with any number of processes.
What is drawn is kept as long as it would come out the same: while the settings and the files of the
model are the same. Scores are computed each time.
"""

import io
import json
import sys
import types
import zlib
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

import gotr1
from engine import run
from engine.checkpoints import DTYPES, policy_files, read_config
from evaluation.held_out import say_forced
from evaluation.networks import NotFinite, Picture, check_finite

# A board is what is a benchmark's own on the way from prompts to a table: the class `Board` of
# geneval.py, compbench.py and geneval2.py, made from the settings of eval.py and a device.
#   samples                         pictures per prompt in the official protocol
#   groups                          tags or categories, in the order of the report
#   overall                         the measures whose mean is the headline, if any
#   plan_pictures(folder)           the pictures of --prompts
#   find_pictures(folder)           the pictures that are in a folder
#   prepare(pictures)               raises OSError or ValueError when they could not be scored
#   score(group, images, pictures)  a dict per picture: score, reason, boxes, measures
#   describe(pictures)              (what scores were made with, notes) for the report
# A network is loaded when the first picture needs it.


# -------------------------------------------------------------------------------------------------
# 1) Pictures


@dataclass
class Generation:
    """What a folder of pictures was made with (its config.json); it takes no other pictures."""

    model: str
    prompts: tuple[str, ...]
    prompts_crc: int  # of the files' content: pictures must not be scored with other prompts
    samples: int
    chain: bool
    cfg: float
    temperature: float
    max_chain: int
    seed: int
    dtype: str


def generation_of(settings, dtype: str) -> Generation:
    contents = b"".join(Path(file).read_bytes() for file in settings.prompts)
    return Generation(
        model=settings.model,
        prompts=settings.prompts,
        prompts_crc=zlib.crc32(contents),
        samples=settings.samples,
        chain=settings.chain,
        cfg=settings.cfg,
        temperature=settings.temperature,
        max_chain=settings.max_chain,
        seed=settings.seed,
        dtype=dtype,
    )


def with_model_defaults(settings):
    """The settings, with the guidance and the chain length that suit the model where they were left
    out. Reads the model's config.json only: if all is drawn, its weights are never loaded."""
    folder = policy_files(settings.model)[-1].parent  # of an adapter, that of its base
    config, _ = read_config(folder)
    return gotr1.with_defaults(settings, types.SimpleNamespace(config=config))


def is_readable(path: Path) -> bool:
    """Whether a picture is there and can be read to its end."""
    try:
        with Image.open(path) as image:
            image.load()
    except FileNotFoundError:
        return False
    except (OSError, SyntaxError, ValueError):
        print(f"{path} cannot be read", file=sys.stderr)
        return False
    return True


def generate(
    settings, pictures: list[Picture], folder: Path, dtype: str, rank: int, world: int, device
) -> None:
    """Draws every picture that is not there, or is there and cannot be read.

    `dtype`: of the model's weights, a name of DTYPES. Returns when all processes have drawn."""
    run.open_run(str(folder), generation_of(settings, dtype))
    if rank == 0:
        claim_weights(folder, settings.model, pictures)
    run.gather_list([])  # nobody draws into a folder that is refused
    for picture in pictures[rank::world]:
        make_place(picture)
    missing = [k for k in range(rank, len(pictures), world) if not is_readable(pictures[k].path)]
    all_missing = sorted(run.gather_list(missing))
    mine = [pictures[k] for k in all_missing[rank::world]]
    forced = []
    if mine:
        forced = draw(settings, mine, dtype, rank, device)
    forced = run.gather_list(forced)  # nobody looks before all have drawn
    if forced and settings.chain:
        say_forced("pictures", forced, settings.max_chain)


def draw(settings, pictures: list[Picture], dtype: str, rank: int, device) -> list[bool]:
    """Draws these pictures; per picture, whether its chain was ended at `max_chain`."""
    model, tokenizer = gotr1.load_policy(settings.model, device, DTYPES[dtype])
    forced = []
    with tqdm(total=len(pictures), desc="pictures", disable=rank > 0) as bar:
        for start in range(0, len(pictures), settings.draw_batch):
            batch = pictures[start : start + settings.draw_batch]
            sampled = gotr1.rollout(
                model,
                tokenizer,
                [picture.prompt for picture in batch],
                cfg=settings.cfg,
                temperature=settings.temperature,
                seed=settings.seed,
                max_chain=settings.max_chain,
                chains=None if settings.chain else [""] * len(batch),
                # the same prompt and sample give the same picture in any batch, on any process
                indices=[picture.sample * 10**6 + picture.index for picture in batch],
            )
            images = gotr1.decode_images(model, sampled.image_tokens)
            for picture, chain, image in zip(batch, sampled.chains, images, strict=True):
                save_picture(picture, chain, image)
            forced += sampled.forced.tolist()
            bar.update(len(batch))
    return forced


def claim_weights(folder: Path, model: str, pictures: list[Picture]) -> None:
    """Writes `weights.json`, the stamps of the model's files. Raises ValueError when the pictures
    that are there are those of other files."""
    path = folder / "weights.json"
    now = run.file_stamps(policy_files(model))
    advice = f"delete {folder} to draw again, or give another --out"
    if path.exists():
        changed = run.changed_files(json.loads(path.read_text()), now)
        if changed:
            names = ", ".join(changed)
            raise ValueError(f"{folder} holds pictures of other weights, {names} differ: {advice}")
    elif any(picture.path.exists() for picture in pictures):
        raise ValueError(f"{folder} does not say which weights drew its pictures: {advice}")
    else:
        run.write_whole(path, json.dumps(now))


def make_place(picture: Picture) -> None:
    """The folders of a picture and of its chain, and for GenEval the metadata beside them."""
    parent = picture.path.parent.parent
    picture.path.parent.mkdir(parents=True, exist_ok=True)
    (parent / "chains").mkdir(exist_ok=True)
    if picture.metadata and picture.sample == 0:
        run.write_whole(parent / "metadata.jsonl", json.dumps(picture.metadata) + "\n")


def save_picture(picture: Picture, chain: str, image: Image.Image) -> None:
    """The chain first: a picture has its name only when all of it is there."""
    chains = picture.path.parent.parent / "chains"
    (chains / f"{picture.path.stem}.txt").write_text(chain, encoding="utf-8")
    content = io.BytesIO()
    image.save(content, "png")
    run.write_whole(picture.path, content.getvalue())


# -------------------------------------------------------------------------------------------------
# 2) Scores


def score_pictures(
    board, pictures: list[Picture], folder: Path, batch_size: int, rank: int, world: int
) -> list[dict]:
    """A row per picture, on every process, in the order of the report.

    Each process reads and scores its share of the pictures. Raises ValueError when a picture cannot
    be read, before any is scored."""
    mine = pictures[rank::world]
    unreadable = [picture.path for picture in mine if not is_readable(picture.path)]
    broken = run.gather_list(unreadable)
    if broken:
        count = f"{len(broken)} of {len(pictures)} pictures"
        raise ValueError(f"{count} cannot be read, draw or delete them: {broken[0]}")
    rows = []
    with tqdm(total=len(mine), desc="scores", disable=rank > 0) as bar:
        for group in board.groups:
            of_group = [picture for picture in mine if picture.group == group]
            for start in range(0, len(of_group), batch_size):
                batch = of_group[start : start + batch_size]
                rows += score_batch(board, batch, folder)
                bar.update(len(batch))

    def report_order(row: dict) -> tuple:
        return (board.groups.index(row["group"]), row["index"], row["sample"])

    return sorted(run.gather_list(rows), key=report_order)


def score_batch(board, pictures: list[Picture], folder: Path) -> list[dict]:
    """The rows of some pictures of one group. Raises NotFinite with the name of a picture."""
    images = [Image.open(picture.path).convert("RGB") for picture in pictures]
    try:
        verdicts = board.score(pictures[0].group, images, pictures)
        for verdict in verdicts:
            check_finite(verdict["score"], "the score")
    except NotFinite as problem:
        if len(pictures) > 1:  # which one is it?
            for picture in pictures:
                score_batch(board, [picture], folder)
        last = pictures[-1]
        raise NotFinite(f"{last.path}, {last.prompt!r}: {problem}") from None
    rows = []
    for picture, image, verdict in zip(pictures, images, verdicts, strict=True):
        row = {
            "path": str(picture.path.relative_to(folder)),
            "size": image.size,
            "prompt": picture.prompt,
            "group": picture.group,
            "index": picture.index,
            "sample": picture.sample,
            **verdict,
        }
        rows.append(row)
    return rows


# -------------------------------------------------------------------------------------------------
# 3) Report


def describe(board, pictures: list[Picture], rows: list[dict], folder: Path) -> dict:
    """What made the pictures and what scored them: everything that changes a score."""
    generation = {"model": board.settings.model or "not named"}
    if (folder / "config.json").exists():
        generation = json.loads((folder / "config.json").read_text())
    sizes = sorted({tuple(row["size"]) for row in rows})
    if (folder / "weights.json").exists():
        generation["weights"] = run.digest(json.loads((folder / "weights.json").read_text()))
    generation["images"] = str(folder)
    generation["size"] = ", ".join(f"{width} x {height}" for width, height in sizes)
    scoring, notes = board.describe(pictures)
    return {"generation": generation, "scoring": scoring, "notes": notes}
