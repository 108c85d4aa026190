"""From a benchmark's prompts to pictures, and from pictures to scores; used by eval.py.

Both steps may be killed at any time and go on where they were, with any number of processes. What
is there is kept as long as it would come out the same: pictures while the settings and the model's
files are the same, a score while its picture, the files of its networks, the rules, the lists and
the parse of its prompt are the same.
"""

import functools
import io
import json
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from tqdm import tqdm

import gotr1
from engine import run
from engine.checkpoints import DTYPES, policy_files
from evaluation import compbench, geneval
from evaluation.networks import (
    Clip,
    NotFinite,
    Picture,
    check_finite,
    check_weights,
    network_stamps,
    read_lines,
)

# -------------------------------------------------------------------------------------------------
# The two evaluation: what is their own on the way from prompts to a table. Both have
#   groups                          tags or categories, in the order of the report
#   overall                         the groups whose scores are averaged for the headline, if any
#   plan_pictures(folder)           the pictures of --prompts
#   find_pictures(folder)           the pictures that are in a folder
#   flags(group)                    flags that name the networks that score a group
#   prepare(pictures)               raises OSError or ValueError when they could not be scored
#   made_from(group)                name -> what scores of a group are made from, besides the
#                                   picture and its prompt: networks (file stamps), lists, rules
#   asked(picture)                  what the networks are asked about it; both as JSON
#   score(group, images, pictures)  a dict per picture: score, reason, boxes
#   column(group)                   its name in the table
#   describe(flags)                 (what scores were made with, notes) for the report
# `settings` are those of eval.py. A network is loaded when the first picture needs it.


class GenEvalRunner:
    groups = geneval.TAGS
    overall = geneval.TAGS

    def __init__(self, settings, device):
        self.settings = settings
        self.device = device

    def plan_pictures(self, folder: Path) -> list[Picture]:
        samples = self.settings.samples or geneval.SAMPLES
        return geneval.plan_pictures(self.settings.prompts[0], folder, samples)

    def find_pictures(self, folder: Path) -> list[Picture]:
        return geneval.find_pictures(folder)

    def flags(self, group: str) -> tuple[str, ...]:
        return ("detector", "clip")

    def prepare(self, pictures: list[Picture]) -> None:
        check_weights(self.settings.detector, "detector")
        check_weights(self.settings.clip, "clip")

    @functools.cached_property
    def judge(self) -> geneval.GenEval:
        batch_size = self.settings.score_batch
        detector = geneval.Mask2Former(self.settings.detector, self.device, batch_size)
        clip = Clip(self.settings.clip, "clip", self.device, batch_size)
        return geneval.GenEval(detector, geneval.ClipColors(clip))

    def made_from(self, group: str) -> dict:
        return {**stamps_of(self.settings, self.flags(group)), "rules": geneval.RULES}

    def asked(self, picture: Picture) -> dict:
        return {"metadata": picture.metadata}

    def score(self, group: str, images: list, pictures: list[Picture]) -> list[dict]:
        return self.judge(images, [picture.metadata for picture in pictures])

    def column(self, group: str) -> str:
        return group

    def describe(self, flags: list[str]) -> tuple[dict, list[str]]:
        detector = self.settings.detector
        scoring = {**weights_of(self.settings, flags), "rules": geneval.RULES}
        notes = []
        if not geneval.is_official(detector):
            notes.append(
                f"detector {detector} is not GenEval's own: scores differ from published ones"
            )
        return scoring, notes


class CompBenchRunner:
    groups = compbench.CATEGORIES
    overall = ()

    FLAGS = {
        "color": ("blip",),
        "shape": ("blip",),
        "texture": ("blip",),
        "spatial": ("gdino",),
        "non_spatial": ("clip_b32",),
        "complex": ("blip", "clip_b32", "gdino"),
    }

    def __init__(self, settings, device):
        self.settings = settings
        self.device = device
        self.parses = {}  # prompt -> what it says, see compbench.parse_prompts
        self.parsed_by = ""
        self.complex_lists = []  # lines of the spatial list, lines of the action list

    def plan_pictures(self, folder: Path) -> list[Picture]:
        samples = self.settings.samples or compbench.SAMPLES
        pictures = []
        for file in self.settings.prompts:
            pictures += compbench.plan_pictures(file, folder, samples)
        return pictures

    def find_pictures(self, folder: Path) -> list[Picture]:
        return compbench.find_pictures(folder)

    def flags(self, group: str) -> tuple[str, ...]:
        return self.FLAGS[group]

    def prepare(self, pictures: list[Picture]) -> None:
        self.complex_lists = [read_lines(path) for path in self.settings.complex_lists]
        in_full = [picture.prompt for picture in pictures if picture.group == "complex"]
        if in_full and len(self.complex_lists) != 2:
            names = "complex_val_spatial.txt and complex_val_action.txt"
            raise ValueError(f"--complex_lists: give {names}")
        for flag in needed_flags(self, pictures):
            check_weights(getattr(self.settings, flag), flag)
        # CLIP takes the prompt as it is; every other network is asked for parts of it
        to_parse = {picture.prompt for picture in pictures if picture.group != "non_spatial"}
        if to_parse:
            self.parses, self.parsed_by = compbench.parse_prompts(
                sorted(to_parse), self.settings.phrases, tuple(in_full)
            )

    @functools.cached_property
    def blip(self) -> compbench.BlipVQA:
        return compbench.BlipVQA(
            self.settings.blip,
            self.device,
            self.settings.score_batch,
            tokenizer=self.settings.blip_tokenizer,
        )

    @functools.cached_property
    def clip(self) -> Clip:
        return Clip(self.settings.clip_b32, "clip_b32", self.device, self.settings.score_batch)

    @functools.cached_property
    def gdino(self) -> compbench.GroundingDino:
        return compbench.GroundingDino(self.settings.gdino, self.device, self.settings.score_batch)

    def made_from(self, group: str) -> dict:
        flags = self.flags(group)
        if "blip" in flags and self.settings.blip.endswith(".pth"):  # others have a tokenizer
            flags += ("blip_tokenizer",)
        parts = {**stamps_of(self.settings, flags), "rules": compbench.RULES}
        if "gdino" in flags:
            parts["threshold"] = compbench.GroundingDino.THRESHOLD
        if group == "complex":
            parts["complex_lists"] = self.complex_lists  # their lines
        return parts

    def asked(self, picture: Picture) -> dict:
        if picture.group == "non_spatial":
            return {"prompt": picture.prompt}
        return {"prompt": picture.prompt, "parse": self.parses[picture.prompt]}

    def score(self, group: str, images: list, pictures: list[Picture]) -> list[dict]:
        prompts = [picture.prompt for picture in pictures]
        if group == "non_spatial":
            return compbench.score_captions(self.clip, images, prompts)
        parses = [self.parses[prompt] for prompt in prompts]
        if group == "spatial":
            objects = [compbench.spatial_objects(parse) for parse in parses]
            return compbench.score_places(self.gdino, images, prompts, objects)
        if group == "complex":
            return compbench.score_complex(
                self.blip,
                self.clip,
                self.gdino,
                images,
                prompts,
                parses,
                spatial_list=self.complex_lists[0],
                action_list=self.complex_lists[1],
            )
        return compbench.score_attributes(self.blip, images, parses)

    def column(self, group: str) -> str:
        """Scores that are not UniDet's have another name, never beside published numbers."""
        return f"{group}-gdino" if "gdino" in self.flags(group) else group

    def describe(self, flags: list[str]) -> tuple[dict, list[str]]:
        scoring = {**weights_of(self.settings, flags), "rules": compbench.RULES}
        notes = []
        if "gdino" in flags:
            scoring["gdino_threshold"] = compbench.GroundingDino.THRESHOLD
            published = "the published 2D-spatial and complex (UniDet)"
            notes.append(f"spatial-gdino and complex-gdino are not {published}")
        if "blip" in flags:
            scoring["blip_tokenizer"] = self.settings.blip_tokenizer
            scoring["complex_lists"] = self.settings.complex_lists
        if self.parsed_by:
            scoring["phrases"] = self.parsed_by
        return scoring, notes


RUNNERS = {"geneval": GenEvalRunner, "compbench": CompBenchRunner}  # by --bench


def weights_of(settings, flags) -> dict[str, str]:
    """Flag -> folder, file or hub id of its network."""
    return {flag: getattr(settings, flag) for flag in flags}


def stamps_of(settings, flags) -> dict[str, list]:
    """Flag -> the stamps of all files of its network."""
    return {flag: network_stamps(getattr(settings, flag), flag) for flag in flags}


def needed_flags(bench, pictures: list) -> list[str]:
    """The flags of all networks that score these pictures, sorted."""
    flags = set()
    for group in {picture.group for picture in pictures}:
        flags.update(bench.flags(group))
    return sorted(flags)


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


def is_whole(path: Path) -> bool:
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

    `dtype`: of the model's weights, a name of DTYPES."""
    run.open_run(str(folder), generation_of(settings, dtype))
    if rank == 0:
        claim_weights(folder, settings.model, pictures)
    run.gather_list([])  # nobody draws into a folder that is refused
    for picture in pictures[rank::world]:
        make_place(picture)
    missing = [k for k in range(rank, len(pictures), world) if not is_whole(pictures[k].path)]
    all_missing = sorted(run.gather_list(missing))
    mine = [pictures[k] for k in all_missing[rank::world]]  # shared out anew
    if not mine:
        return
    model, tokenizer = gotr1.load_policy(settings.model, device, DTYPES[dtype])
    with tqdm(total=len(mine), desc="pictures", disable=rank > 0) as bar:
        for start in range(0, len(mine), settings.draw_batch):
            batch = mine[start : start + settings.draw_batch]
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
            bar.update(len(batch))


def claim_weights(folder: Path, model: str, pictures: list[Picture]) -> None:
    """Writes `weights.json`, the stamps of the model's files. Raises ValueError when the pictures
    that are there are those of other files."""
    path = folder / "weights.json"
    now = run.file_stamps(policy_files(model))
    advice = f"delete {folder} to draw anew, or give another --out"
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


class ScoreKey(NamedTuple):
    """A score is kept as long as these are the same."""

    path: str  # of the picture, inside its folder
    crc: int  # of the picture's file
    by: str  # digest of what the score was made from, and of what was asked


def score_key(bench, picture: Picture, folder: Path, made_from: dict) -> ScoreKey:
    return ScoreKey(
        path=str(picture.path.relative_to(folder)),
        crc=zlib.crc32(picture.path.read_bytes()),
        by=run.digest([made_from, bench.asked(picture)]),
    )


class ScoreCache:
    """The rows that earlier runs wrote, and a file for new ones: scores_{rank}.jsonl in `folder`.

    Collective: every process has to open it."""

    def __init__(self, folder: Path, rank: int):
        self.path = folder / f"scores_{rank}.jsonl"
        self.rows = {}  # ScoreKey -> row
        self.seen = set()  # (path, crc) of the pictures that have a row of whatever networks
        for path in sorted(folder.glob("scores_*.jsonl")):
            for line in path.read_text().splitlines(keepends=True):
                if line.startswith("{") and line.endswith("}\n"):  # a killed run leaves half a line
                    row = json.loads(line)
                    self.rows[ScoreKey(row["path"], row["crc"], row["by"])] = row
                    self.seen.add((row["path"], row["crc"]))
        run.gather_list([])  # nobody writes while another process reads
        if rank == 0:
            self._gather_files(folder)
        run.gather_list([])

    def _gather_files(self, folder: Path) -> None:
        """One file in place of those of all earlier processes."""
        run.write_whole(self.path, "".join(json.dumps(row) + "\n" for row in self.rows.values()))
        for path in folder.glob("scores_*.jsonl"):
            if path != self.path:
                path.unlink()

    def add(self, rows: list[dict]) -> None:
        with self.path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def score_pictures(
    bench, pictures: list[Picture], folder: Path, out: Path, batch_size: int, rank: int, world: int
) -> list[dict]:
    """A row per picture, on every process, in the order of the report.

    Raises ValueError when a picture cannot be read."""
    unreadable = [picture.path for picture in pictures[rank::world] if not is_whole(picture.path)]
    broken = run.gather_list(unreadable)
    if broken:
        count = f"{len(broken)} of {len(pictures)} pictures"
        raise ValueError(f"{count} cannot be read, draw or delete them: {broken[0]}")
    cache = ScoreCache(out, rank)
    made_from = {}
    if rank == 0:
        made_from = {group: bench.made_from(group) for group in {one.group for one in pictures}}
    # one answer for all: on two machines the same file may have been written at two times
    made_from = run.gather_list([made_from])[0]
    keys = [score_key(bench, one, folder, made_from[one.group]) for one in pictures]
    stale = [key for key in keys if key not in cache.rows and key[:2] in cache.seen]
    if rank == 0:
        explain_new_scores(out, made_from, len(stale))
    rows = []
    if rank == 0:
        rows = [cache.rows[key] for key in keys if key in cache.rows]
    waiting = [k for k, key in enumerate(keys) if key not in cache.rows]
    mine = waiting[rank::world]
    with tqdm(total=len(mine), desc="scores", disable=rank > 0) as bar:
        for group in bench.groups:
            places = [k for k in mine if pictures[k].group == group]
            for start in range(0, len(places), batch_size):
                batch = places[start : start + batch_size]
                new = score_batch(bench, [pictures[k] for k in batch], [keys[k] for k in batch])
                cache.add(new)
                rows += new
                bar.update(len(batch))

    def report_order(row: dict) -> tuple:
        return (bench.groups.index(row["group"]), row["index"], row["sample"])

    return sorted(run.gather_list(rows), key=report_order)


def explain_new_scores(out: Path, made_from: dict[str, dict], count: int) -> None:
    """Says why `count` pictures that have a score get another, and notes in `made_from.json` what
    the scores of each group are made from now."""
    path = out / "made_from.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    now = json.loads(json.dumps(made_from))  # tuples become lists, as on disk
    changed = set()
    for group, parts in now.items():
        for name, value in parts.items():
            if group in before and before[group].get(name) != value:
                changed.add(name)
    if count:
        reason = ", ".join(sorted(changed)) or "what the networks are asked"
        run.say(f"{count} scores are made anew: {reason} changed")
    run.write_whole(path, json.dumps({**before, **now}))


def score_batch(bench, pictures: list[Picture], keys: list[ScoreKey]) -> list[dict]:
    """The rows of some pictures of one group."""
    images = [Image.open(picture.path).convert("RGB") for picture in pictures]
    try:
        verdicts = bench.score(pictures[0].group, images, pictures)
        for verdict in verdicts:
            check_finite(verdict["score"], "the score")
    except NotFinite as problem:
        if len(pictures) > 1:  # which one is it?
            for picture, key in zip(pictures, keys, strict=True):
                score_batch(bench, [picture], [key])
        last = pictures[-1]
        raise NotFinite(f"{last.path}, {last.prompt!r}: {problem}") from None
    rows = []
    for k, verdict in enumerate(verdicts):
        picture = pictures[k]
        row = {
            "path": keys[k].path,
            "crc": keys[k].crc,
            "by": keys[k].by,
            "size": images[k].size,
            "prompt": picture.prompt,
            "group": picture.group,
            "index": picture.index,
            "sample": picture.sample,
            "score": verdict["score"],
            "reason": verdict["reason"],
            "boxes": verdict["boxes"],
        }
        rows.append(row)
    return rows


# -------------------------------------------------------------------------------------------------
# 3) Report


def describe(bench, pictures: list[Picture], rows: list[dict], folder: Path) -> dict:
    """What made the pictures and what scored them: everything that changes a score."""
    generation = {"model": bench.settings.model or "not told"}
    if (folder / "config.json").exists():
        generation = json.loads((folder / "config.json").read_text())
    sizes = sorted({tuple(row["size"]) for row in rows})
    if (folder / "weights.json").exists():
        generation["weights"] = run.digest(json.loads((folder / "weights.json").read_text()))
    generation["images"] = str(folder)
    generation["size"] = ", ".join(f"{width} x {height}" for width, height in sizes)
    scoring, notes = bench.describe(needed_flags(bench, pictures))
    return {"generation": generation, "scoring": scoring, "notes": notes}
