"""Held-out prompts: draw one sample per prompt, score it, and sum up how well the model does.

The trainers look at their model with this before, during and after the run; `eval.py --bench toy`
does the same with several seeds and intervals. The random numbers are the same every time, so two
looks differ by the model alone.

    drawing = Drawing(model, tokenizer, seed=0)
    rows = evaluate(drawing, score, prompts)
    means = summarise(rows)    # {"total": 0.41, "sem": 0.82, ..., "spatial: plan right": 0.37}
"""

import contextlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

import gotr1
import rewards
from engine import run
from evaluation import stats, variety
from render_boxes import Box, chain_problems, parse_chain
from toy.world import RELATIONS, ToyJudge, crispness, follow_plans, is_related, read_text

EVAL_STEP = 2**31  # random numbers are seeded by (seed, step), and no training step has this number
RELATION = re.compile(r"\b(left|right|above|below|top|bottom|under|over)\b")
VARIETY_PROMPTS = 32  # the first so many prompts get VARIETY_PLANS plans each
VARIETY_PLANS = 8


# -------------------------------------------------------------------------------------------------
# Draw and score


@dataclass
class Drawing:
    """Who draws, and how: the same for all that is compared."""

    model: object
    tokenizer: object
    seed: int = 0
    cfg: float = 1.0
    temperature: float = 1.0
    max_chain: int = 96
    rank: int = 0  # of `world` processes, which share the prompts
    world: int = 1
    at_once: int = 128  # samples that a process draws at a time
    gathered: Callable = contextlib.nullcontext  # a context in which the model can sample


def evaluate(
    drawing: Drawing, score, prompts: list[str], plans: list[str] | None = None, label="eval"
) -> list[dict]:
    """One sample per prompt, sampled as in training, with the same random numbers every time.

    `score(prompts, chains, images)` gives one dict of rewards per sample, see `rewards.score`.
    `plans`: chains that are drawn as they are, one per prompt, instead of the model's own.
    Returns, on every process, a row per prompt: index, prompt, chain, image (PIL), scores, and
    `measures`: what is averaged and compared. All is sampled in `drawing.gathered()`, and decoded
    and judged after it."""
    mine = list(range(drawing.rank, len(prompts), drawing.world))
    shares = [
        mine[start : start + drawing.at_once] for start in range(0, len(mine), drawing.at_once)
    ]
    drawn = []
    with drawing.gathered():
        for indices in tqdm(shares, desc=label, disable=drawing.rank > 0 or not label, leave=False):
            sampled = gotr1.rollout(
                drawing.model,
                drawing.tokenizer,
                [prompts[i] for i in indices],
                cfg=drawing.cfg,
                temperature=drawing.temperature,
                seed=(drawing.seed, EVAL_STEP),
                max_chain=drawing.max_chain,
                chains=[plans[i] for i in indices] if plans else None,
                indices=indices,  # a prompt's numbers do not depend on how prompts are shared
            )
            drawn.append(sampled)
    rows = []
    for indices, sampled in zip(shares, drawn, strict=True):
        batch = [prompts[i] for i in indices]
        images = gotr1.decode_images(drawing.model, sampled.image_tokens)
        scores = score(batch, sampled.chains, images)
        looks = [] if plans else variety.looks(images)
        for k, index in enumerate(indices):
            if plans:
                measures = follow_measures(batch[k], scores[k])
            else:
                measures = own_measures(batch[k], scores[k], looks[k])
            row = {
                "index": index,
                "prompt": batch[k],
                "chain": sampled.chains[k],
                "image": images[k],
                "scores": scores[k],
                "measures": measures,
            }
            rows.append(row)
    return sorted(run.gather_list(rows), key=lambda row: row["index"])


def plan_variety(drawing: Drawing, prompts: list[str]) -> list[dict]:
    """How different VARIETY_PLANS plans of each of the first VARIETY_PROMPTS prompts are: rows as
    those of `evaluate`, without pictures. See evaluation/variety.py."""
    mine = list(range(drawing.rank, min(len(prompts), VARIETY_PROMPTS), drawing.world))
    at_once = max(1, drawing.at_once // VARIETY_PLANS)
    found = []  # (index, chains)
    with drawing.gathered():
        for start in range(0, len(mine), at_once):
            indices = mine[start : start + at_once]
            chains = gotr1.rollout(
                drawing.model,
                drawing.tokenizer,
                [prompts[i] for i in indices],
                group=VARIETY_PLANS,
                temperature=drawing.temperature,
                seed=(drawing.seed, EVAL_STEP),
                max_chain=drawing.max_chain,
                indices=indices,
                draw=False,
            ).chains
            for k, index in enumerate(indices):
                found.append((index, chains[k * VARIETY_PLANS : (k + 1) * VARIETY_PLANS]))
    indices = []
    chains = []
    for index, chains_of_prompt in sorted(run.gather_list(found)):
        indices.append(index)
        chains += chains_of_prompt
    layouts = [parse_chain(chain) for chain in chains]
    counts = variety.different_chains(chains, VARIETY_PLANS)
    varieties = variety.layout_variety(layouts, VARIETY_PLANS)
    entropy = variety.place_entropy(layouts)  # of all prompts together: the same in each row
    rows = []
    for index, count, layout in zip(indices, counts, varieties, strict=True):
        measures = {"variety: chains": count}
        if layout is not None:
            measures["variety: layout"] = layout
        measures["variety: place entropy"] = entropy
        rows.append({"index": index, "prompt": prompts[index], "measures": measures})
    return rows


def evaluate_rest(
    drawing: Drawing, score, prompts: list[str], given: list[tuple[str, str]], label: str
) -> list[dict]:
    """Rows of what is asked besides the rewards: how well plans are drawn that the model did not
    write (`given`: prompt and chain of each), and how different its plans of one prompt are."""
    followed = []
    if given:
        given_prompts = [prompt for prompt, _ in given]
        plans = [chain for _, chain in given]
        followed = evaluate(drawing, score, given_prompts, plans, label=f"{label}, given plans")
    return followed + plan_variety(drawing, prompts)


def write_evaluation(folder: Path, label: str, step: int, seed: int, rows: list[dict]) -> None:
    """eval_<label>.json, the mean of each measure, and rows_<label>.json, the measures of each row,
    as `stats.compare` takes them: its samples are seeds."""
    kept = []
    for row in rows:
        values = {name: row[name] for name in ("index", "prompt", "measures")}
        kept.append({**values, "sample": seed})
    run.write_whole(folder / f"rows_{label}.json", json.dumps(kept))
    means = {"step": step, **summarise(rows)}
    run.write_whole(folder / f"eval_{label}.json", json.dumps(means, indent=2))


def draw_sheet(rows: list[dict], judge, path: Path) -> None:
    """The sheet of some rows of `evaluate`, with the boxes that the judge found."""
    for row, boxes in zip(rows, found_boxes(judge, rows), strict=True):
        said = []
        for part in (*rewards.PARTS, "total"):
            if part in row["scores"]:  # without a --hps that part is not there
                said.append(f"{part} {row['scores'][part]:.2f}")
        row["note"] = "  ".join(said)
        row["found"] = boxes
    stats.draw_plans(rows, path, side=160)


def found_boxes(judge, rows: list[dict]) -> list[list[Box]]:
    """Per row of `evaluate`: where the judge sees the planned objects, all boxes of all names."""
    plans = [parse_chain(row["chain"]) for row in rows]
    images = [row["image"] for row in rows]
    grounded, _ = rewards.ground_plans(judge, plans, images)
    found = []
    for boxes_of_name in grounded:
        seen = []
        for boxes in boxes_of_name.values():
            seen += boxes or []  # None: the judge's reply could not be read
        found.append(seen)
    return found


# -------------------------------------------------------------------------------------------------
# What the scores say


def categories(prompt: str) -> list[str]:
    """The categories of a prompt, by how many places it names.

    One place is "spatial" and the place itself, several are "complex". None is "color", if the
    prompt names objects of the toy, else no category."""
    places = RELATION.findall(prompt)
    if len(places) == 1:
        return ["spatial", *(words for words in RELATIONS if words in prompt)]
    if places:
        return ["complex"]
    names, _ = read_text(prompt)
    return ["color"] if names else []


def own_measures(prompt: str, scores: dict[str, float], look: dict[str, float]) -> dict[str, float]:
    """What a sample with a plan of its own says about each number of the table.

    These are its rewards; for each category of its prompt, whether plan and picture are wholly
    right (1.0 or 0.0); and what the picture looks like."""
    values = {}
    for part in ("total", "trained", *rewards.PARTS, "judge_fail"):
        if part in scores:
            values[part] = scores[part]
    for category in categories(prompt):
        for what, part in (("plan", "spa"), ("picture", "pi")):
            if part in scores:
                values[f"{category}: {what} right"] = float(scores[part] > 0.999)
    for name, value in look.items():
        values[f"pictures: {name.replace('_', ' ')}"] = value
    return values


def follow_measures(prompt: str, scores: dict[str, float]) -> dict[str, float]:
    """What a picture of a given plan says: how well it follows the plan and the prompt, for all
    prompts and for each kind."""
    values = {}
    for kind in ("follow", *(f"follow {category}" for category in categories(prompt)[:1])):
        for part in ("ri", "pi"):
            if part in scores:
                values[f"{kind}: {part}"] = scores[part]
    return values


def summarise(rows: list[dict]) -> dict[str, float]:
    """The mean of each measure over the rows that have it, in the table's order."""
    found = {}
    for row in rows:
        for name, value in row["measures"].items():
            found.setdefault(name, []).append(value)
    return {name: float(np.mean(found[name])) for name in sorted(found, key=stats.place)}


def read_plans(source: str) -> list[tuple[str, str]]:
    """Plans that are given to be drawn: [(prompt, chain)].

    `toy`: 60 held-out scenes each of two objects, of two with a relation and of three, with random
    valid layouts. Else a file with one {"prompt": …, "chain": …} per line, or "" for none. Raises
    OSError or ValueError."""
    if source == "toy":
        return follow_plans()
    if not source:
        return []
    plans = []
    for number, line in enumerate(Path(source).read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompt, chain = row["prompt"], row["chain"]
        except (ValueError, KeyError, TypeError):
            wanted = 'expected {"prompt": "…", "chain": "…"}'
            raise ValueError(f"{source}, line {number}: {wanted}") from None
        problems = chain_problems(chain)
        if problems:
            raise ValueError(f"{source}, line {number}: {'; '.join(problems)}")
        plans.append((prompt, chain))
    return plans


# -------------------------------------------------------------------------------------------------
# The toy


def toy_look(model, tokenizer, prompts: list[str], seed: int) -> dict[str, float]:
    """The mean rewards of one sample per toy prompt, judged exactly.

    `well_formed` is the share of chains in which every box can be read."""
    sampled = gotr1.rollout(model, tokenizer, prompts, seed=seed, max_chain=96)
    images = gotr1.decode_images(model, sampled.image_tokens)
    rows = rewards.score(ToyJudge(), crispness, prompts, sampled.chains, images)
    well_formed = [not chain_problems(chain) for chain in sampled.chains]
    means = {"well_formed": float(np.mean(well_formed))}
    for key in rows[0]:
        if key != "judge_fail":  # the exact judge never fails
            means[key] = float(np.mean([row[key] for row in rows]))
    return means


def toy_faults(prompt: str, boxes: list[Box]) -> str:
    """What is wrong with a toy picture, in words; empty when nothing is. `boxes`: its objects."""
    names, relations = read_text(prompt)
    found = [box.name for box in boxes]
    faults = [f"no {name}" for name in names if name not in found]
    for k, name in enumerate(found):
        if name not in names or name in found[:k]:
            faults.append(f"{name} not asked for")
    for i, words, j in relations:
        firsts = [box for box in boxes if box.name == names[i]]
        seconds = [box for box in boxes if box.name == names[j]]
        if not firsts or not seconds:
            continue  # what is missing was already said
        if not any(is_related(a, words, b) for a in firsts for b in seconds):
            faults.append(f"{names[i]} not {words} {names[j]}")
    return "; ".join(faults)
