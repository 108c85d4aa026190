"""What a table of scores may claim: intervals, and a paired test of two runs.

A row is one picture: {"index": number of its prompt, "prompt", "sample", "measures": {name:
value}, ...}; a list of values counts as so many samples. The samples of a prompt resemble each
other, so intervals count prompts, and prompts are what is compared (pairs). A score is a mean over
samples, in a table as in a comparison.

A measure is a list of strata, and its score the mean over strata. All have one stratum but
"overall", which has one per part: GenEval's headline is the mean of its six tags' scores, not the
mean of all pictures.
"""

import json
import math
from pathlib import Path

import numpy as np
from scipy.special import stdtrit

RESAMPLES = 4000
ALPHA = 0.05  # 95 % intervals; of twenty tables one holds a false "real"
ORDER = (  # of categories, those of the toy first
    "color",
    "spatial",
    "left of",
    "right of",
    "above",
    "below",
    "complex",
    "follow",
    "follow color",
    "follow spatial",
    "follow complex",
    "variety",
    "pictures",
    "skill",  # of GenEval 2
    "atoms",
)


def place(measure: str) -> int:
    """Where a measure stands in the table: those without a category as they come, then by ORDER."""
    if ":" not in measure:
        return -1
    category = measure.split(":")[0]
    return ORDER.index(category)


def by_prompt(rows: list[dict]) -> dict[str, dict[tuple, list[float]]]:
    """Measure -> prompt (its text, and which occurrence of this text it is) -> the values of its
    samples. The number of a prompt is not used: in a folder with fewer prompts it is another one.

    Raises ValueError at a value that is not finite: nan is no result."""
    indices = {}  # (measure, text) -> the numbers of the prompts with this text
    for row in rows:
        for name in row["measures"]:
            indices.setdefault((name, row["prompt"]), set()).add(row["index"])
    found = {}
    for row in rows:
        text = row["prompt"]
        for name, values in row["measures"].items():
            occurrence = sorted(indices[name, text]).index(row["index"])
            samples = found.setdefault(name, {}).setdefault((text, occurrence), [])
            for value in values if isinstance(values, list) else [values]:
                if not math.isfinite(value):
                    where = f"prompt {text!r}, sample {row['sample']}"
                    raise ValueError(f"{where}: {name} is {value}, which is no score")
                samples.append(value)
    return found


def with_overall(strata: dict[str, list], overall: tuple[str, ...]) -> dict[str, list]:
    """Adds the measure "overall", whose strata are those of the measures named, if any is there."""
    parts = [strata[name][0] for name in overall if name in strata]
    return {**strata, "overall": parts} if parts else strata


def ratio(totals: np.ndarray) -> np.ndarray:
    """(..., 2) sums over samples and how many samples they are -> (...,) means."""
    return totals[..., 0] / totals[..., 1]


def wilson(prompts: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of the mean over samples; `prompts` is (n, 2), per prompt the sum over its
    samples, and how many they are.

    Wilson's interval for a share, which has a width at 0 and at 1 too, with two changes. The number
    of trials is not the number of samples, but the one that explains how far the prompts scatter:
    score * (1 - score) / variance. And few prompts say little about their own scatter, hence
    Student's quantile in place of 1.96. Values outside [0, 1] (sums of rewards, counts) get the
    plain interval of a mean."""
    n = len(prompts)
    score = float(ratio(prompts.sum(axis=0)))
    samples = prompts[:, 1]
    gaps = prompts[:, 0] - score * samples  # (n,)
    variance = 0.0
    if n > 1:
        variance = float((gaps**2).sum() / samples.sum() ** 2 * n / (n - 1))
    quantile = float(stdtrit(max(1, n - 1), 1 - ALPHA / 2))
    means = ratio(prompts)
    if means.min() < 0 or means.max() > 1:
        half = quantile * math.sqrt(variance)
        return score - half, score + half
    spread = score * (1 - score)
    trials = spread / variance if variance > 0 else n
    squared = quantile**2
    middle = (score + squared / (2 * trials)) / (1 + squared / trials)
    half = (
        quantile * math.sqrt(spread / trials + squared / (4 * trials**2)) / (1 + squared / trials)
    )
    return middle - half, middle + half


def intervals(rows: list[dict], overall: tuple[str, ...] = ()) -> dict[str, dict]:
    """Of each measure: score (mean over samples), low and high of its 95 % interval, and how many
    prompts and samples it has.

    With `overall`, names of measures, there is also "overall": the mean of those scores, whatever
    the number of their samples (GenEval's arithmetic). Its interval is put together from theirs:
    the distances from score to edge add up as squares (Zou and Donner 2008)."""
    strata = {}
    for name, prompts in by_prompt(rows).items():
        sums = [(sum(values), len(values)) for values in prompts.values()]
        strata[name] = [np.array(sums, dtype=float)]  # (n, 2)
    summary = {}
    for name, parts in with_overall(strata, overall).items():
        means = [float(ratio(part.sum(axis=0))) for part in parts]
        edges = [wilson(part) for part in parts]
        score = float(np.mean(means))
        below = [mean - low for mean, (low, _) in zip(means, edges, strict=True)]
        above = [high - mean for mean, (_, high) in zip(means, edges, strict=True)]
        summary[name] = {
            "score": score,
            "low": score - math.hypot(*below) / len(parts),
            "high": score + math.hypot(*above) / len(parts),
            "prompts": sum(len(part) for part in parts),
            "samples": int(sum(part[:, 1].sum() for part in parts)),
        }
    return summary


def table(summary: dict[str, dict]) -> str:
    """One line per measure."""
    lines = [f"{'':28}  score   95 % interval     prompts  samples"]
    for name, row in summary.items():
        interval = f"{row['low']:6.4f} to {row['high']:6.4f}"
        counts = f"{row['prompts']:7d} {row['samples']:8d}"
        lines.append(f"{name:28} {row['score']:6.4f}  {interval}  {counts}")
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------
# Two runs


def before_after(before: dict, after: dict) -> str:
    """Two summaries beside each other, for the end of a training run."""
    lines = [f"{'':24} before   after"]
    for name, value in before.items():
        if name == "step":
            continue
        later = f"{after[name]:6.3f}" if name in after else "     -"  # say, no plan has a box
        lines.append(f"{name:24} {value:6.3f}  {later}")
    return "\n".join(lines)


def differences(pairs: np.ndarray) -> np.ndarray:
    """(..., 4) sums and numbers of samples of run a, then of run b -> (...,) b's mean minus a's."""
    return ratio(pairs[..., 2:]) - ratio(pairs[..., :2])


def paired_p(strata: list[np.ndarray], seed: int = 0) -> float:
    """p-value of a paired permutation test, two-sided. Strata are (n, 4), one row per prompt.

    If the two runs were the same, a prompt's two results could as well be exchanged, which flips
    the sign of its difference. How often is the whole difference then as far from 0 as it is?"""
    rng = np.random.default_rng(seed)
    seen = abs(np.mean([differences(pairs.sum(axis=0)) for pairs in strata]))
    flipped = []
    for pairs in strata:
        exchanged = rng.integers(0, 2, (RESAMPLES, len(pairs)))
        swap = pairs[:, [2, 3, 0, 1]] - pairs  # (n, 4): what an exchange adds
        flipped.append(differences(pairs.sum(axis=0) + exchanged @ swap))  # (RESAMPLES,)
    as_far = np.abs(np.mean(flipped, axis=0)) >= seen - 1e-12
    return float((1 + as_far.sum()) / (1 + RESAMPLES))


def holm(p_values: list[float]) -> list[bool]:
    """Which of several differences are real, with a chance of ALPHA that any such claim is false.

    Holm 1979: the smallest p has to be below ALPHA / m, the next below ALPHA / (m - 1), and so on;
    the first that fails ends it."""
    real = [False] * len(p_values)
    order = sorted(range(len(p_values)), key=lambda k: p_values[k])
    for rank, k in enumerate(order):
        if p_values[k] > ALPHA / (len(p_values) - rank):
            break
        real[k] = True
    return real


def compare(a: dict, b: dict, overall: tuple[str, ...] = ()) -> list[dict]:
    """Two contents of results.json -> a row per measure that both have.

    On the prompts that both have: a, b, difference, p, prompts, of (how many prompts one of them
    has), real. "overall" only where both have all of its parts. Raises ValueError when they share
    no prompt."""
    strata = {}
    counts = {}  # measure -> the prompts that one of the two has
    others = by_prompt(b["rows"])
    for name, prompts in by_prompt(a["rows"]).items():
        pairs = []
        for prompt, values in prompts.items():
            if prompt in others.get(name, {}):
                partners = others[name][prompt]
                pairs.append((sum(values), len(values), sum(partners), len(partners)))
        if pairs:
            strata[name] = [np.array(pairs, dtype=float)]  # (n, 4)
            counts[name] = len(prompts.keys() | others[name].keys())
    if not strata:
        question = "were they made with the same benchmark and prompts?"
        raise ValueError(f"the two results share no prompt: {question}")
    if overall and strata.keys() >= set(overall):
        strata = with_overall(strata, overall)
        counts["overall"] = sum(counts[name] for name in overall)
    rows = []
    for name, parts in strata.items():
        score_a = float(np.mean([ratio(part[:, :2].sum(axis=0)) for part in parts]))
        score_b = float(np.mean([ratio(part[:, 2:].sum(axis=0)) for part in parts]))
        row = {
            "name": name,
            "a": score_a,
            "b": score_b,
            "difference": score_b - score_a,
            "p": paired_p(parts),
            "prompts": sum(len(part) for part in parts),
            "of": counts[name],
        }
        rows.append(row)
    for row, real in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["real"] = real
    return sorted(rows, key=lambda row: place(row["name"]))


def compare_files(paths: tuple[str, ...], overall: tuple[str, ...] = ()) -> str:
    """The table of two results.json, and below it what else differs between them.

    Raises ValueError on other files."""
    try:
        a = json.loads(Path(paths[0]).read_text(encoding="utf-8"))
        b = json.loads(Path(paths[1]).read_text(encoding="utf-8"))
        if a["bench"] != b["bench"]:
            raise ValueError(f"{a['bench']} cannot be compared with {b['bench']}")
        rows = compare(a, b, overall)
    except (OSError, ValueError, KeyError, TypeError) as problem:
        wanted = "no two results.json of one benchmark"
        raise ValueError(f"--compare {' '.join(paths)}: {wanted}: {problem}") from None
    lines = [f"{'':28}       a       b  difference  p         prompts"]
    for row in rows:
        scores = f"{row['a']:7.4f} {row['b']:7.4f}  {row['difference']:+10.4f}"
        verdict = "real" if row["real"] else "may be chance"
        counts = f"{row['p']:.4f}  {row['prompts']:4d} of {row['of']:4d}"
        lines.append(f"{row['name']:28} {scores}  {counts}  {verdict}")
    test = f"Holm over {len(rows)} rows at {ALPHA}, {RESAMPLES} sign flips"
    lines.append(
        f"paired by prompt (text and occurrence), n of m that one of them has; real: {test}"
    )
    for part in ("generation", "scoring"):
        for key in {**a[part], **b[part]}:
            value_a = a[part].get(key)
            value_b = b[part].get(key)
            if value_a != value_b:
                lines.append(f"they differ in {part}: {key} {value_a} and {value_b}")
    return "\n".join(lines)
