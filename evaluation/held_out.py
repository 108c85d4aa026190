"""Held-out prompts: draw one sample per prompt, score it, and sum up how well the model does.

The trainers look at their model with this before, during and after the run; `eval.py --bench toy`
does the same with several seeds and intervals. The random numbers are the same every time, so two
looks differ by the model alone.

    drawing = Drawing(model, tokenizer, seed=0)
    rows = evaluate(drawing, score, prompts)
    means = summarise(rows)    # {"total": 0.41, "sem": 0.82, "spatial: plan right": 0.37, ...}
"""

import contextlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

import gotr1
import rewards
from engine import run
from evaluation import sheets, stats, variety
from render_boxes import Box, chain_problems
from toy.world import RELATIONS, ToyJudge, crispness, is_related, read_text

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
    drawing: Drawing,
    score,
    prompts: list[str],
    plans: list[str] | None = None,
    label: str = "eval",
    exact: bool = False,
) -> list[dict]:
    """Draws one sample per prompt, as in training, and scores it.

    score   (prompts, chains, images) -> (rewards, found), see `rewards.score_with_boxes`
    plans   chains that are drawn as they are, one per prompt, instead of the model's own
    exact   the judge of `score` is never wrong: only then is a plan or picture called right

    Returns, on every process, a row per prompt: index, prompt, chain, forced (the chain was ended
    at `max_chain`), image (PIL), scores (rewards), found (the boxes in which the judge sees planned
    objects), and measures: what is averaged and compared.

    All is sampled inside `drawing.gathered()`, and decoded and judged after it: judging needs the
    room that gathered weights take."""
    rollouts = draw_share(drawing, prompts, plans, label)
    rows = []
    for indices, sampled in rollouts:
        batch = [prompts[index] for index in indices]
        images = gotr1.decode_images(drawing.model, sampled.image_tokens)
        scores, found = score(batch, sampled.chains, images)
        for k, index in enumerate(indices):
            if plans:
                measures = follow_measures(batch[k], scores[k])
            else:
                measures = own_measures(batch[k], scores[k], images[k], exact)
            row = {
                "index": index,
                "prompt": batch[k],
                "chain": sampled.chains[k],
                "forced": bool(sampled.forced[k]),
                "image": images[k],
                "scores": scores[k],
                "found": all_boxes(found[k]),
                "measures": measures,
            }
            rows.append(row)
    rows = sorted(run.gather_list(rows), key=lambda row: row["index"])
    if label and not plans:
        say_forced(label, [row["forced"] for row in rows], drawing.max_chain)
    return rows


def draw_share(
    drawing: Drawing, prompts: list[str], plans: list[str] | None, label: str
) -> list[tuple[list[int], gotr1.Rollout]]:
    """Samples the prompts of this process: (their indices, the rollout) per batch."""
    mine = list(range(drawing.rank, len(prompts), drawing.world))
    starts = range(0, len(mine), drawing.at_once)
    is_silent = drawing.rank > 0 or not label
    rollouts = []
    with drawing.gathered():
        for start in tqdm(starts, desc=label, disable=is_silent, leave=False):
            indices = mine[start : start + drawing.at_once]
            sampled = gotr1.rollout(
                drawing.model,
                drawing.tokenizer,
                [prompts[index] for index in indices],
                cfg=drawing.cfg,
                temperature=drawing.temperature,
                seed=(drawing.seed, EVAL_STEP),
                max_chain=drawing.max_chain,
                chains=[plans[index] for index in indices] if plans else None,
                indices=indices,  # a prompt's numbers do not depend on how prompts are shared
            )
            rollouts.append((indices, sampled))
    return rollouts


def all_boxes(found: dict[str, list[Box] | None]) -> list[Box]:
    """The boxes of all names; None, a reply that could not be read, has none."""
    joined = []
    for boxes in found.values():
        joined += boxes or []
    return joined


def say_forced(label: str, forced: list[bool], max_chain: int) -> None:
    """Prints how many chains were ended at `max_chain` tokens: what they had left to say, such as
    further boxes, is lost."""
    share = sum(forced) / len(forced)
    run.say(f"{label}: {share:.1%} of {len(forced)} chains were cut at --max_chain {max_chain}")


def plan_variety(drawing: Drawing, prompts: list[str]) -> list[dict]:
    """How different VARIETY_PLANS plans of each of the first VARIETY_PROMPTS prompts are: rows as
    those of `evaluate`, without pictures. See evaluation/variety.py."""
    mine = list(range(drawing.rank, min(len(prompts), VARIETY_PROMPTS), drawing.world))
    at_once = max(1, drawing.at_once // VARIETY_PLANS)
    drawn = []  # (index of a prompt, its chains)
    with drawing.gathered():
        for start in range(0, len(mine), at_once):
            indices = mine[start : start + at_once]
            chains = gotr1.rollout(
                drawing.model,
                drawing.tokenizer,
                [prompts[index] for index in indices],
                group=VARIETY_PLANS,
                temperature=drawing.temperature,
                seed=(drawing.seed, EVAL_STEP),
                max_chain=drawing.max_chain,
                indices=indices,
                draw=False,
            ).chains
            for k, index in enumerate(indices):
                drawn.append((index, chains[k * VARIETY_PLANS : (k + 1) * VARIETY_PLANS]))
    indices = []
    chains = []
    for index, chains_of_prompt in sorted(run.gather_list(drawn)):
        indices.append(index)
        chains += chains_of_prompt
    rows = []
    for index, found in zip(indices, variety.plan_variety(chains, VARIETY_PLANS), strict=True):
        measures = {"variety: chains": found["different_chains"]}
        if "layout_variety" in found:
            measures["variety: layout"] = found["layout_variety"]
        measures["variety: place entropy"] = found["place_entropy"]
        rows.append({"index": index, "prompt": prompts[index], "measures": measures})
    return rows


def evaluate_rest(
    drawing: Drawing, score, prompts: list[str], given: list[tuple[str, str]], label: str
) -> list[dict]:
    """Rows of what is measured besides the rewards: how well plans are drawn that the model did not
    write (`given`: prompt and chain of each), and how different its plans of one prompt are."""
    followed = []
    if given:
        given_prompts = [prompt for prompt, _ in given]
        plans = [chain for _, chain in given]
        followed = evaluate(drawing, score, given_prompts, plans, label=f"{label}, given plans")
    return followed + plan_variety(drawing, prompts)


def write_evaluation(folder: Path, label: str, step: int, seed: int, rows: list[dict]) -> None:
    """eval_<label>.json, the mean of each measure, and rows_<label>.json, the measures of each row,
    as `stats.compare` takes them: the `sample` of a row is the seed of the run."""
    kept = []
    for row in rows:
        values = {name: row[name] for name in ("index", "prompt", "measures")}
        kept.append({**values, "sample": seed})
    run.write_whole(folder / f"rows_{label}.json", json.dumps(kept))
    means = {"step": step, **summarise(rows)}
    run.write_whole(folder / f"eval_{label}.json", json.dumps(means, indent=2))


def draw_sheet(rows: list[dict], path: Path) -> None:
    """The sheet of some rows of `evaluate`: plan, picture, and the boxes that the judge found."""
    cells = []
    for row in rows:
        shown = []
        for part in (*rewards.PARTS, "total"):
            if part in row["scores"]:  # without a --hps that part is not there
                shown.append(f"{part} {row['scores'][part]:.2f}")
        cell = {name: row[name] for name in ("prompt", "chain", "image", "found")}
        cells.append({**cell, "note": "  ".join(shown)})
    sheets.draw_sheet(cells, path, side=160)


# -------------------------------------------------------------------------------------------------
# What the scores say


def categories(prompt: str) -> list[str]:
    """The categories of a prompt, by how many places it names.

    One place is "spatial" and, of the toy's prompts, the place itself; several are "complex". None
    is "color", if the prompt names objects of the toy, else no category."""
    places = RELATION.findall(prompt)
    if len(places) == 1:
        named = [words for words in RELATIONS if words in prompt]
        return ["spatial", *named]
    if places:
        return ["complex"]
    names, _ = read_text(prompt)
    return ["color"] if names else []


def own_measures(
    prompt: str, scores: dict[str, float], image: Image.Image, exact: bool
) -> dict[str, float]:
    """What a sample with a plan of its own says about each number of the table.

    These are its rewards; by an exact judge, for each category of its prompt, whether plan and
    picture are fully right (1.0 or 0.0); and what the picture looks like."""
    values = {}
    for part in ("total", "trained", *rewards.PARTS, "judge_fail"):
        if part in scores:
            values[part] = scores[part]
    if exact:  # a vision-language model gives 8 of 10 to what is right
        for category in categories(prompt):
            for what, part in (("plan", "spa"), ("picture", "pi")):
                if part in scores:
                    values[f"{category}: {what} right"] = float(scores[part] > 0.999)
    (look,) = variety.looks([image])
    for name, value in look.items():
        values[f"pictures: {name.replace('_', ' ')}"] = value
    return values


def follow_measures(prompt: str, scores: dict[str, float]) -> dict[str, float]:
    """What a picture of a given plan says: how well it follows the plan and the prompt, for all
    prompts and for each kind."""
    values = {}
    kinds = ["follow"]
    for category in categories(prompt)[:1]:
        kinds.append(f"follow {category}")
    for kind in kinds:
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


# -------------------------------------------------------------------------------------------------
# The toy only


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
