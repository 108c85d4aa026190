"""Held-out prompts: draw one sample per prompt, score it, and sum up how well the model does.

The trainers look at their model with this before, during and after the run; `eval.py --bench toy`
does the same with several seeds and intervals. The random numbers are the same every time, so two
looks differ by the model alone.

    rows = evaluate(model, tokenizer, score, prompts, seed=0, cfg=1, temperature=1, max_chain=96)
    means = summarise(rows)    # {"total": 0.41, "sem": 0.82, ..., "spatial: plan right": 0.37}
"""

import contextlib
import re

import numpy as np
from tqdm import tqdm

import gotr1
import rewards
from benchmarks import stats
from engine import run
from render_boxes import Box, chain_problems, parse_chain
from toy.world import RELATIONS, ToyJudge, crispness, is_related, read_text

EVAL_STEP = 2**31  # random numbers are seeded by (seed, step), and no training step has this number
RELATION = re.compile(r"\b(left|right|above|below|top|bottom|under|over)\b")


# -------------------------------------------------------------------------------------------------
# Draw and score


def evaluate(
    model,
    tokenizer,
    score,
    prompts: list[str],
    *,
    seed: int,
    cfg: float,
    temperature: float,
    max_chain: int,
    rank: int = 0,
    world: int = 1,
    label: str = "eval",
    at_once: int = 128,
    gathered=contextlib.nullcontext,
) -> list[dict]:
    """One sample per prompt, sampled as in training, with the same random numbers every time.

    `score(prompts, chains, images)` gives one dict of rewards per sample, see `rewards.score`.
    Returns, on every process, a row per prompt: index, prompt, chain, image (PIL), scores. The
    `world` processes share the prompts; `at_once` of them are drawn at a time. `gathered()` is a
    context in which the model can sample: all is sampled in it, and decoded and judged after it."""
    mine = list(range(rank, len(prompts), world))
    shares = [mine[start : start + at_once] for start in range(0, len(mine), at_once)]
    drawn = []
    with gathered():
        for indices in tqdm(shares, desc=label, disable=rank > 0, leave=False):
            sampled = gotr1.rollout(
                model,
                tokenizer,
                [prompts[i] for i in indices],
                group=1,
                cfg=cfg,
                temperature=temperature,
                seed=(seed, EVAL_STEP),
                max_chain=max_chain,
                indices=indices,  # a prompt's numbers do not depend on how prompts are shared
            )
            drawn.append(sampled)
    rows = []
    for indices, sampled in zip(shares, drawn, strict=True):
        batch = [prompts[i] for i in indices]
        images = gotr1.decode_images(model, sampled.image_tokens)
        scores = score(batch, sampled.chains, images)
        for k, index in enumerate(indices):
            row = {
                "index": index,
                "prompt": batch[k],
                "chain": sampled.chains[k],
                "image": images[k],
                "scores": scores[k],
            }
            rows.append(row)
    return sorted(run.gather_list(rows), key=lambda row: row["index"])


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


def measures(prompt: str, scores: dict[str, float]) -> dict[str, float]:
    """What one sample says about each number of the table.

    These are its rewards and, for each category of its prompt, whether plan and picture are wholly
    right (1.0 or 0.0)."""
    values = {}
    for part in ("total", *rewards.PARTS, "judge_fail"):
        if part in scores:
            values[part] = scores[part]
    for category in categories(prompt):
        for what, part in (("plan", "spa"), ("picture", "pi")):
            if part in scores:
                values[f"{category}: {what} right"] = float(scores[part] > 0.999)
    return values


def summarise(rows: list[dict]) -> dict[str, float]:
    """The mean of each measure over the rows of `evaluate` that have it, in the table's order."""
    found = {}
    for row in rows:
        for name, value in measures(row["prompt"], row["scores"]).items():
            found.setdefault(name, []).append(value)
    return {name: float(np.mean(found[name])) for name in sorted(found, key=stats.place)}


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
