"""From a checkpoint to pictures to a table: GenEval, T2I-CompBench, and the toy's held-out prompts.

1) Pictures: the model draws each prompt a few times, in the folders that the official programs expect. What is there
   already is kept, so an interrupted run goes on; the same seed, prompt and sample give the same picture on any number
   of processes. `--generate_only` stops here, `--images FOLDER` starts from pictures that any model made.
2) Scores: a row a picture, with the reason in words. Rows are kept as long as picture and networks are the same.
3) Report: the official arithmetic, each number with the 95 % interval of a bootstrap over prompts (the samples of a
   prompt are not independent); `results.json` with everything that changes a score; sheets of right and wrong pictures.

    python eval.py --bench toy --model out/grpo/step_000110
    python eval.py --bench geneval --prompts evaluation_metadata.jsonl --model PATH --cfg 5 --max_chain 600 \\
        --detector mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth
    torchrun --nproc_per_node 8 eval.py --bench compbench --prompts color_val.txt --model PATH --cfg 5 --max_chain 600
    python eval.py --compare out/before/results.json out/after/results.json    # which differences are real?
"""

import dataclasses
import functools
import json
import re
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

import gotr1
import rewards
from benchmarks import compbench, geneval
from benchmarks import stats as report
from engine import run
from engine.checkpoints import DTYPES
from render_boxes import Box, parse_chain
from toy import world as toy


@dataclass
class Settings:
    # What is done
    bench: Literal["toy", "geneval", "compbench", "speed"] = (
        "toy"  # speed: pictures a second of the given networks
    )
    model: str = (
        ""  # `toy`, or a folder or hub id of a checkpoint; with --images only a name in the report
    )
    prompts: tuple[
        str, ...
    ] = ()  # evaluation_metadata.jsonl, or some of color_val.txt, ... spatial_val.txt, ...
    out: str = "out/eval"  # folder for pictures, scores, report and sheets; the same command continues there
    images: str = ""  # score the pictures in this folder, in the official layout; nothing is drawn
    generate_only: bool = False  # only draw, for the official programs
    compare: tuple[str, ...] = ()  # two files results.json: which differences between them are real
    # How pictures are made
    samples: int = 0  # pictures a prompt; 0: as in the official protocol, 4 for GenEval and 10 for T2I-CompBench
    chain: bool = True  # write a chain first; --no_chain draws from the prompt alone
    cfg: float = 1.0  # guidance: 5 for the released checkpoints (paper), 1 (none) for the toy
    temperature: float = 1.0  # of chain and image tokens
    max_chain: int = 96  # most chain tokens (Janus-Pro: 600)
    seed: int = 0  # of all samples
    draw_batch: int = 32  # pictures drawn at a time
    dtype: Literal["auto", "float32", "bfloat16"] = (
        "auto"  # of the model's weights; auto: bfloat16 on a GPU
    )
    # What scores them: folders or hub ids
    detector: str = "facebook/mask2former-swin-small-coco-instance"  # GenEval: the official .pth, or this stand-in
    clip: str = geneval.WEIGHTS["clip"][1]  # ViT-L/14: GenEval's colours
    clip_b32: str = geneval.WEIGHTS["clip_b32"][
        1
    ]  # ViT-B/32: T2I-CompBench's non_spatial and complex
    blip: str = "Salesforce/blip-vqa-capfilt-large"  # color, shape, texture, complex: the official .pth, or this
    blip_tokenizer: str = geneval.WEIGHTS["blip_tokenizer"][1]  # of a .pth, which has none
    gdino: str = geneval.WEIGHTS["gdino"][1]  # spatial-gdino and complex-gdino
    phrases: str = ""  # json of noun phrases: written where spaCy's en_core_web_sm is installed, read elsewhere
    complex_lists: tuple[
        str, ...
    ] = ()  # complex_val_spatial.txt and complex_val_action.txt, for complex prompts
    score_batch: int = 16  # pictures that a network takes at a time
    # The toy
    toy_prompts: int = 240  # held-out prompts
    toy_seeds: int = 3  # runs over them; their spread is reported


# ---------------------------------------------------------------------------------------------------------------------
# The toy's evaluation, which the trainer uses as well

RELATION = re.compile(r"\b(left|right|above|below|top|bottom|under|over)\b")


def evaluate(
    policy,
    score,
    prompts: list[str],
    seed,
    cfg,
    temperature,
    max_chain,
    rank=0,
    world=1,
    label="eval",
    at_once=128,
) -> list[dict]:
    """One sample a prompt, as in training, with the same random numbers every time: rows of index, prompt, chain, image
    and scores. `policy` is (model, tokenizer), `score` a function of prompts, chains and images as `rewards.score`."""
    model, tokenizer = policy
    rows, mine = [], list(range(rank, len(prompts), world))
    for start in tqdm(range(0, len(mine), at_once), desc=label, disable=rank > 0, leave=False):
        indices = mine[start : start + at_once]
        batch = [prompts[i] for i in indices]
        numbers = (seed, 2**31)  # no training step has this number
        sampled = gotr1.rollout(
            model, tokenizer, batch, 1, cfg, temperature, numbers, max_chain, indices=indices
        )
        images = gotr1.decode_images(model, sampled.image_tokens)
        scores = score(batch, sampled.chains, images)
        for values in zip(indices, batch, sampled.chains, images, scores, strict=True):
            rows.append(
                dict(zip(("index", "prompt", "chain", "image", "scores"), values, strict=True))
            )
    return sorted(run.gather_list(rows), key=lambda row: row["index"])


def found_boxes(judge, rows: list[dict]) -> list[list]:
    """Where the judge sees the planned objects of each row, all boxes of all names."""
    plans, images = [parse_chain(row["chain"]) for row in rows], [row["image"] for row in rows]
    grounded = rewards.ground_plans(judge, plans, images)[0]
    return [[box for boxes in found.values() for box in boxes or []] for found in grounded]


def categories(prompt: str) -> list[str]:
    """The categories of a prompt, by how many places it names: none, one (and which), or several."""
    places = RELATION.findall(prompt)
    if len(places) == 1:
        return ["spatial", *(words for words in toy.RELATIONS if words in prompt)]
    return ["complex" if places else "color"] if places or toy.read_text(prompt)[0] else []


def measures(prompt: str, scores: dict[str, float]) -> dict[str, float]:
    """What one sample says about each number of the table: its rewards, and, for each category of its prompt, whether
    plan and picture are wholly right."""
    values = {
        part: scores[part] for part in ("total", *rewards.PARTS, "judge_fail") if part in scores
    }
    for category in categories(prompt):
        for what, part in (("plan", "spa"), ("picture", "pi")):
            if part in scores:
                values[f"{category}: {what} right"] = float(scores[part] > 0.999)
    return values


def summarise(rows: list[dict]) -> dict[str, float]:
    """The mean of each measure over the rows of `evaluate` that have it."""
    found = {}
    for row in rows:
        for name, value in measures(row["prompt"], row["scores"]).items():
            found.setdefault(name, []).append(value)
    return {name: float(np.mean(found[name])) for name in sorted(found, key=report.place)}


def toy_faults(prompt: str, boxes: list[Box]) -> str:
    """What is wrong with a toy picture, in words; empty when nothing is."""
    (names, relations), found = toy.read_text(prompt), [box.name for box in boxes]
    faults = [f"no {name}" for name in names if name not in found]
    faults += [
        f"{name} not asked for"
        for k, name in enumerate(found)
        if name not in names or name in found[:k]
    ]
    for i, words, j in relations:
        pairs = [(a, b) for a in boxes for b in boxes if (a.name, b.name) == (names[i], names[j])]
        if pairs and not any(toy.is_related(a, words, b) for a, b in pairs):
            faults.append(f"{names[i]} not {words} {names[j]}")
    return "; ".join(faults)


def run_toy(settings: Settings, rank: int, world: int, device) -> tuple[list[dict], list[dict]]:
    """(rows for results.json, cells for the sheets) of all seeds."""
    policy = gotr1.load_policy(settings.model or "toy", device, DTYPES[precision(settings, device)])
    prompts = toy.toy_prompts(settings.toy_prompts, seed=7, held_out=True)
    rows, cells = [], []
    for seed in range(settings.seed, settings.seed + settings.toy_seeds):
        judge = functools.partial(rewards.score, toy.ToyJudge(), toy.crispness)
        how = (seed, settings.cfg, settings.temperature, settings.max_chain)
        for row in evaluate(policy, judge, prompts, *how, rank, world, f"seed {seed}"):
            boxes, values = toy.detect(row["image"]), measures(row["prompt"], row["scores"])
            reason = toy_faults(row["prompt"], boxes)
            about = {
                "index": row["index"],
                "sample": seed,
                "prompt": row["prompt"],
                "reason": reason,
            }
            rows.append(about | {"chain": row["chain"], "measures": values})
            for group in categories(row["prompt"])[-1:]:
                score = values[f"{group}: picture right"]
                cells.append(
                    about | {"group": group, "score": score, "image": row["image"], "boxes": boxes}
                )
    return rows, cells


# ---------------------------------------------------------------------------------------------------------------------
# 1) Pictures


class Picture(NamedTuple):
    path: Path
    prompt: str
    group: str  # GenEval's tag, T2I-CompBench's category
    index: int  # of the prompt
    sample: int
    metadata: dict


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


@dataclass
class Generation:
    """What a folder of pictures was made with; another set of these is refused there."""

    model: str
    prompts: tuple[str, ...]
    prompts_crc: int  # of the files' content: other prompts in the same place must not be scored with these pictures
    samples: int
    chain: bool
    cfg: float
    temperature: float
    max_chain: int
    seed: int
    dtype: str


def precision(settings: Settings, device) -> str:
    """The precision that `--dtype` stands for on this device."""
    return settings.dtype.replace("auto", "bfloat16" if device.type == "cuda" else "float32")


def generate(
    settings: Settings, pictures: list[Picture], folder: Path, rank: int, world: int, device
) -> None:
    """Draws every picture that is not there, or is there and cannot be read. A picture has its name only when it is
    whole."""
    wanted = {
        field.name: getattr(settings, field.name, None) for field in dataclasses.fields(Generation)
    }
    wanted["dtype"] = precision(settings, device)
    wanted["prompts_crc"] = zlib.crc32(
        b"".join(Path(file).read_bytes() for file in settings.prompts)
    )
    run.open_run(str(folder), Generation(**wanted))
    for picture in pictures[rank::world]:
        picture.path.parent.mkdir(parents=True, exist_ok=True)
        (picture.path.parent.parent / "chains").mkdir(exist_ok=True)
        if picture.metadata and picture.sample == 0:
            run.write_whole(
                picture.path.parent.parent / "metadata.jsonl", json.dumps(picture.metadata) + "\n"
            )
    missing = [k for k in range(rank, len(pictures), world) if not is_whole(pictures[k].path)]
    mine = [pictures[k] for k in sorted(run.gather_list(missing))][rank::world]
    if not mine:
        return
    model, tokenizer = gotr1.load_policy(settings.model, device, DTYPES[wanted["dtype"]])
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
                indices=[picture.sample * 10**6 + picture.index for picture in batch],
            )
            images = gotr1.decode_images(model, sampled.image_tokens)
            for picture, chain, image in zip(batch, sampled.chains, images, strict=True):
                place, beside = (
                    picture.path.parent.parent / "chains",
                    picture.path.with_suffix(".tmp"),
                )
                (place / f"{picture.path.stem}.txt").write_text(chain, encoding="utf-8")
                image.save(beside, "png")
                beside.replace(picture.path)
            bar.update(len(batch))


# ---------------------------------------------------------------------------------------------------------------------
# 2) Scores


@functools.cache
def network(flag: str, path: str, device, batch_size: int, blip_tokenizer: str):
    """A network of a benchmark, loaded once."""
    if flag == "detector":
        return geneval.Mask2Former(path, device, batch_size)
    if flag == "blip":
        return compbench.BlipVQA(path, device, batch_size, blip_tokenizer)
    if flag == "gdino":
        return compbench.GroundingDino(path, device, batch_size)
    return geneval.Clip(path, flag, device, batch_size)


NETWORKS = {  # of each group of pictures
    **dict.fromkeys(geneval.TAGS, ("detector", "clip")),
    **dict.fromkeys(("color", "shape", "texture"), ("blip",)),
    "spatial": ("gdino",),
    "non_spatial": ("clip_b32",),
    "complex": ("blip", "clip_b32", "gdino"),
}
PARSED = (
    "color",
    "shape",
    "texture",
    "spatial",
    "complex",
)  # categories that need to know what a prompt says


def make_scorer(settings: Settings, group: str, parses: dict, device):
    """A function of images and pictures to rows, for a tag or category."""
    about = (device, settings.score_batch, settings.blip_tokenizer)
    networks = {flag: network(flag, getattr(settings, flag), *about) for flag in NETWORKS[group]}
    if settings.bench == "geneval":
        judge = geneval.GenEval(networks["detector"], networks["clip"])
        return lambda images, pictures: judge(images, [picture.metadata for picture in pictures])
    lists = [geneval.read_lines(path) for path in settings.complex_lists]
    judge = compbench.CompBench(
        group, parses, lists, *(networks.get(flag) for flag in ("blip", "clip_b32", "gdino"))
    )
    return lambda images, pictures: judge(images, [picture.prompt for picture in pictures])


def read_rows(folder: Path) -> dict[tuple, dict]:
    """The rows that earlier runs wrote, by picture and networks; half a line of a killed run is left out."""
    lines = [
        line
        for path in sorted(folder.glob("scores_*.jsonl"))
        for line in path.read_text().splitlines(True)
    ]
    rows = (json.loads(line) for line in lines if line.startswith("{") and line.endswith("}\n"))
    return {(row["path"], row["crc"], row["by"]): row for row in rows}


def score_pictures(
    settings: Settings, pictures: list[Picture], parses: dict, folder: Path, rank, world, device
):
    """A row a picture; those are kept whose picture (by its checksum), networks and parse have not changed."""
    if broken := run.gather_list([p.path for p in pictures[rank::world] if not is_whole(p.path)]):
        raise ValueError(
            f"{len(broken)} of {len(pictures)} pictures cannot be read, draw or delete them: {broken[0]}"
        )
    keys, out = [], Path(settings.out)
    for picture in pictures:
        by = {flag: getattr(settings, flag) for flag in NETWORKS[picture.group]} | parses.get(
            picture.prompt, {}
        )
        by |= {"blip_tokenizer": settings.blip_tokenizer} if "blip" in by else {}
        about = (
            picture.path.read_bytes(),
            json.dumps([by, settings.complex_lists, picture.metadata]).encode(),
        )
        keys.append((str(picture.path.relative_to(folder)), *map(zlib.crc32, about)))
    done = read_rows(out)
    run.gather_list([])  # nobody writes while another one reads
    if rank == 0:
        run.write_whole(
            out / "scores_0.jsonl", "".join(json.dumps(row) + "\n" for row in done.values())
        )
        for path in {*out.glob("scores_*.jsonl")} - {out / "scores_0.jsonl"}:
            path.unlink()
    run.gather_list([])
    todo = [k for k, key in enumerate(keys) if key not in done][rank::world]
    rows, groups = [done[key] for key in keys if key in done] if rank == 0 else [], {}
    for k in todo:
        groups.setdefault(pictures[k].group, []).append(k)
    bar = tqdm(total=len(todo), desc="scores", disable=rank > 0)
    with (out / f"scores_{rank}.jsonl").open("a") as file, bar:
        for group, places in groups.items():
            scorer = make_scorer(settings, group, parses, device)
            for start in range(0, len(places), settings.score_batch):
                part = places[start : start + settings.score_batch]
                images = [Image.open(pictures[k].path).convert("RGB") for k in part]
                for k, image, row in zip(
                    part, images, scorer(images, [pictures[k] for k in part]), strict=True
                ):
                    about = dict(zip(("path", "crc", "by"), keys[k], strict=True)) | {
                        "size": image.size
                    }
                    about |= {
                        name: getattr(pictures[k], name)
                        for name in ("prompt", "group", "index", "sample")
                    }
                    rows.append(about | row)
                    file.write(json.dumps(rows[-1]) + "\n")
                file.flush()
                bar.update(len(part))
    order = list(NETWORKS)  # the official order of tags and categories
    return sorted(
        run.gather_list(rows),
        key=lambda row: (order.index(row["group"]), row["index"], row["sample"]),
    )


# ---------------------------------------------------------------------------------------------------------------------
# 3) Report

NAMES = {
    "spatial": "spatial-gdino",
    "complex": "complex-gdino",
}  # not UniDet's: never beside published numbers


def describe(settings: Settings, rows: list[dict], folder: Path, parsed_by: str) -> dict:
    """What made the pictures and what scored them: everything that changes a score."""
    made = {"model": settings.model or "not told"}
    if (folder / "config.json").exists():
        made = json.loads((folder / "config.json").read_text())
    made["images"] = str(folder)
    flags = sorted({flag for row in rows for flag in NETWORKS[row["group"]]})
    scoring, notes = {flag: getattr(settings, flag) for flag in flags}, []
    if "detector" in flags and "20220504_001756" not in settings.detector:
        notes.append(
            f"detector {settings.detector} is not GenEval's own: scores differ from published ones"
        )
    if "gdino" in flags:
        scoring["gdino_threshold"] = compbench.GroundingDino.THRESHOLD
        notes.append(
            "spatial-gdino and complex-gdino are not the published 2D-spatial and complex (UniDet)"
        )
    if "blip" in flags:
        scoring |= {
            "blip_tokenizer": settings.blip_tokenizer,
            "complex_lists": settings.complex_lists,
        }
    if parsed_by:
        scoring["phrases"] = parsed_by
    sizes = sorted({tuple(row["size"]) for row in rows})
    made["size"] = ", ".join(f"{width} x {height}" for width, height in sizes)
    return {"generation": made, "scoring": scoring, "notes": notes}


def measure_speed(settings: Settings, device) -> None:
    """Pictures a second of each network whose weights are given as a path, one at a time and 16 at a time."""
    flags = ("detector", "clip", "clip_b32", "blip", "gdino")
    given = [flag for flag in flags if Path(getattr(settings, flag)).exists()]
    if not given:
        raise ValueError(
            "--bench speed: give the path of a --detector, --clip, --clip_b32, --blip or --gdino"
        )
    noise = np.random.default_rng(0).integers(0, 256, (16, 512, 512, 3), np.uint8)
    images = [Image.fromarray(array) for array in noise]
    print(f"pictures/s of 512 x 512 on {device}    batch 1   batch 16   ratio")
    for flag in given:
        rates = []
        for size in (1, 16):
            judge = network(flag, getattr(settings, flag), device, size, settings.blip_tokenizer)
            call, rest = getattr(judge, "images", judge), []
            if flag in ("blip", "gdino"):  # what they are asked
                rest = [[["a red ball?"] if flag == "blip" else ["cat", "tree"]] * len(images)]
            call(
                images[:size], *(values[:size] for values in rest)
            )  # the first call pays for what the others do not
            start = time.perf_counter()
            call(images, *rest)
            rates.append(len(images) / (time.perf_counter() - start))
        print(f"{flag:34} {rates[0]:8.2f}   {rates[1]:8.2f}   {rates[1] / rates[0]:5.2f}")


# ---------------------------------------------------------------------------------------------------------------------
# The run


def check(settings: Settings) -> None:
    """Bad settings end the program here, in one line, before anything is loaded or written."""
    whole = "max_chain draw_batch score_batch toy_prompts toy_seeds"
    run.check_ranges(settings, at_least_one=whole, not_negative="samples cfg temperature seed")
    no_toy = [name for name in ("images", "prompts", "generate_only") if getattr(settings, name)]
    if settings.bench == "toy" and (no_toy or not settings.chain):
        run.fail(
            f"--bench toy has its own prompts and scores chains: no --{(*no_toy, 'no_chain')[0]}"
        )
    if settings.bench in ("geneval", "compbench"):
        if bool(settings.images) == bool(settings.prompts):
            run.fail(
                f"--bench {settings.bench}: give --prompts and --model to draw, or --images to score"
            )
        if settings.images and settings.generate_only:
            run.fail("--generate_only draws, --images does not")
        if settings.prompts and not settings.model:
            run.fail("--model is missing: a folder or hub id of the checkpoint that draws, or toy")
        if settings.bench == "geneval" and len(settings.prompts) > 1:
            run.fail("--prompts: GenEval has one file, evaluation_metadata.jsonl")


def main(argv: list[str] | None = None) -> None:
    settings = run.parse_args(Settings, __doc__, argv)
    check(settings)
    try:
        if settings.compare:
            if len(settings.compare) != 2:
                raise ValueError("--compare: give two files results.json")
            return print(report.compare_files(settings.compare, geneval.TAGS))
        rank, world, device = run.start_processes()
        run_bench(settings, rank, world, device)
    except (OSError, ValueError) as problem:
        run.fail(" ".join(str(problem).split()))


def run_bench(settings: Settings, rank: int, world: int, device) -> None:
    out = Path(settings.out)
    if settings.bench == "speed":
        return measure_speed(settings, device)
    out.mkdir(parents=True, exist_ok=True)
    if settings.bench == "toy":
        rows, cells = run_toy(settings, rank, world, device)
        names = ("model", "cfg", "temperature", "max_chain", "seed", "toy_seeds", "toy_prompts")
        made = {name: getattr(settings, name) for name in names} | {
            "model": settings.model or "toy"
        }
        made["dtype"] = precision(settings, device)
        about = {"generation": made, "scoring": {"judge": "toy (exact)"}, "notes": []}
    else:
        kind, folder = (
            geneval if settings.bench == "geneval" else compbench,
            Path(settings.images or out / "images"),
        )
        if settings.images:
            pictures = kind.find_pictures(folder)
        else:
            samples = {"samples": settings.samples} if settings.samples else {}
            pictures = [
                row
                for file in settings.prompts
                for row in kind.plan_pictures(file, folder, **samples)
            ]
        pictures = [Picture(*row) for row in pictures]
        if not pictures:
            raise ValueError(
                f"{settings.images or settings.prompts[0]} holds nothing for {settings.bench} to look at"
            )
        parses, parsed_by = {}, ""
        if not settings.generate_only:  # what cannot be scored is not drawn either
            in_full = [picture.prompt for picture in pictures if picture.group == "complex"]
            lists = [geneval.read_lines(path) for path in settings.complex_lists]
            if in_full and len(lists) != 2:
                raise ValueError(
                    "--complex_lists: give complex_val_spatial.txt and complex_val_action.txt"
                )
            for flag in sorted({flag for picture in pictures for flag in NETWORKS[picture.group]}):
                geneval.check_weights(getattr(settings, flag), flag)
            prompts = sorted({picture.prompt for picture in pictures if picture.group in PARSED})
            if prompts:
                parses, parsed_by = compbench.parse_prompts(
                    prompts, settings.phrases, tuple(in_full)
                )
        # 1) Pictures
        if not settings.images:
            generate(settings, pictures, folder, rank, world, device)
            run.gather_list([])  # nobody looks before all have drawn
        if settings.generate_only:
            if rank == 0:
                print(
                    f"{folder}: {len(pictures)} pictures in the official layout of {settings.bench}"
                )
            return
        # 2) Scores
        rows = score_pictures(settings, pictures, parses, folder, rank, world, device)
        cells = [row | {"image": folder / row["path"]} for row in rows]
        rows = [
            row | {"measures": {NAMES.get(row["group"], row["group"]): row["score"]}}
            for row in rows
        ]
        about = describe(settings, rows, folder, parsed_by)
    # 3) Report
    if rank == 0:
        report.write(
            settings.bench,
            about,
            rows,
            cells,
            out,
            geneval.TAGS if settings.bench == "geneval" else (),
        )


if __name__ == "__main__":
    main()
