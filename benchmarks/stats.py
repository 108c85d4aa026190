"""What a table of scores may claim: intervals, a paired test, and the pictures behind the numbers.

A row is one picture: {"index": prompt's number, "prompt", "sample", "measures": {name of a score: value}, ...}. The
samples of a prompt resemble each other, so prompts are what is drawn again (bootstrap) and what is compared (pairs).
"""

import importlib.metadata
import json
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from render_boxes import Box, draw_boxes, parse_chain

RESAMPLES = 4000
ALPHA = 0.05  # 95 % intervals; one false "real" in twenty tables
VERSIONS = ("torch", "transformers", "numpy", "pillow", "scipy", "spacy")
ORDER = (
    "color",
    "spatial",
    "left of",
    "right of",
    "above",
    "below",
    "complex",
)  # of the toy's categories


def place(measure: str) -> int:
    """Where a measure stands in the table: rewards as they come, then the toy's categories."""
    return ORDER.index(measure.split(":")[0]) if ":" in measure else -1


def by_prompt(rows: list[dict]) -> dict[str, dict[tuple, list[float]]]:
    """Measure -> prompt (number and text) -> the values of its samples."""
    found = {}
    for row in rows:
        for name, value in row["measures"].items():
            found.setdefault(name, {}).setdefault((row["index"], row["prompt"]), []).append(value)
    return found


def resample(strata: list[np.ndarray], seed: int = 0) -> np.ndarray:
    """Bootstrap: strata of (n, 2) sums and counts a prompt -> (RESAMPLES,) means over strata of means over samples."""
    rng, means = np.random.default_rng(seed), []
    for values in strata:
        drawn = values[rng.integers(0, len(values), (RESAMPLES, len(values)))].sum(
            axis=1
        )  # (RESAMPLES, 2)
        means.append(drawn[:, 0] / drawn[:, 1])
    return np.mean(means, axis=0)


def intervals(rows: list[dict], overall: tuple[str, ...] = ()) -> dict[str, dict]:
    """Of each measure: score (mean over samples), low and high of its 95 % interval, prompts, samples. With `overall`,
    names of measures, also "overall": the mean of those scores (not of the samples; GenEval's arithmetic)."""
    groups = {name: [prompts] for name, prompts in by_prompt(rows).items()}
    if parts := [groups[name][0] for name in overall if name in groups]:
        groups["overall"] = parts
    summary = {}
    for name, parts in groups.items():
        strata = [
            np.array([(sum(values), len(values)) for values in prompts.values()])
            for prompts in parts
        ]
        low, high = np.percentile(resample(strata), [100 * ALPHA / 2, 100 - 100 * ALPHA / 2])
        score = float(np.mean([values[:, 0].sum() / values[:, 1].sum() for values in strata]))
        counts = {
            "prompts": sum(map(len, strata)),
            "samples": int(sum(values[:, 1].sum() for values in strata)),
        }
        summary[name] = {"score": score, "low": float(low), "high": float(high), **counts}
    return summary


def table(summary: dict[str, dict]) -> str:
    """One line a measure."""
    lines = [f"{'':28}  score   95 % interval     prompts  samples"]
    for name, row in summary.items():
        line = f"{name:28} {row['score']:6.4f}  {row['low']:6.4f} to {row['high']:6.4f}  {row['prompts']:7d} "
        lines.append(
            line + f"{row['samples']:8d}" + "".join(f"  {note}" for note in row.get("notes", []))
        )
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Two runs


def before_after(before: dict, after: dict) -> str:
    """Two summaries beside each other, for the end of a training run."""
    lines = [
        f"{name:24} {value:6.3f}  {after[name]:6.3f}"
        for name, value in before.items()
        if name != "step"
    ]
    return "\n".join([f"{'':24} before   after", *lines])


def sign_flips(strata: list[np.ndarray], seed: int = 0) -> float:
    """p-value of a paired permutation test, two-sided: strata of (n,) differences, one a prompt. If the two runs were
    the same, each difference could as well have the other sign; how often is the mean then as far from 0 as it is?"""
    rng = np.random.default_rng(seed)
    seen = abs(np.mean([values.mean() for values in strata]))
    flipped = [
        rng.choice([-1.0, 1.0], (RESAMPLES, len(values))) @ values / len(values)
        for values in strata
    ]
    return float((1 + (np.abs(np.mean(flipped, axis=0)) >= seen - 1e-12).sum()) / (1 + RESAMPLES))


def holm(p_values: list[float]) -> list[bool]:
    """Which of several differences are real, with a chance of ALPHA that any such claim is false (Holm 1979): the
    smallest p has to be below ALPHA / m, the next below ALPHA / (m - 1), and so on; the first that fails ends it."""
    real, going = [False] * len(p_values), True
    for rank, k in enumerate(sorted(range(len(p_values)), key=lambda k: p_values[k])):
        going = going and p_values[k] <= ALPHA / (len(p_values) - rank)
        real[k] = going
    return real


def compare(a: dict, b: dict, overall: tuple[str, ...] = ()) -> list[dict]:
    """Two contents of results.json -> for each measure that both have, on the prompts that both have: a, b, difference,
    low, high (95 % interval of the difference), p, prompts, real. Raises ValueError when they share no prompt."""
    pairs = {}
    for name, prompts in by_prompt(a["rows"]).items():
        others = by_prompt(b["rows"]).get(name, {})
        both = [
            (np.mean(values), np.mean(others[key]))
            for key, values in prompts.items()
            if key in others
        ]
        if both:
            pairs[name] = [np.array(both)]
    if not pairs:
        raise ValueError(
            "the two results share no prompt: were they made with the same benchmark and prompts?"
        )
    if parts := [pairs[name][0] for name in overall if name in pairs]:
        pairs["overall"] = parts
    rows = []
    for name, strata in pairs.items():
        gaps = [values[:, 1] - values[:, 0] for values in strata]
        drawn = resample([np.stack([gap, np.ones_like(gap)], axis=1) for gap in gaps])
        low, high = np.percentile(drawn, [100 * ALPHA / 2, 100 - 100 * ALPHA / 2])
        first, second = (float(np.mean([values[:, k].mean() for values in strata])) for k in (0, 1))
        row = {
            "name": name,
            "a": first,
            "b": second,
            "difference": second - first,
            "low": low,
            "high": high,
        }
        rows.append(row | {"p": sign_flips(gaps), "prompts": sum(map(len, gaps))})
    rows = [
        row | {"real": real}
        for row, real in zip(rows, holm([row["p"] for row in rows]), strict=True)
    ]
    return sorted(rows, key=lambda row: place(row["name"]))


def compare_files(paths: tuple[str, ...], overall: tuple[str, ...] = ()) -> str:
    """The table of two results.json, below it what else differs between them. Raises ValueError on other files."""
    try:
        a, b = (json.loads(Path(path).read_text(encoding="utf-8")) for path in paths)
        if a["bench"] != b["bench"]:
            raise ValueError(f"{a['bench']} cannot be compared with {b['bench']}")
        rows = compare(a, b, overall)
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise ValueError(
            f"--compare {' '.join(paths)}: no two results.json of one benchmark: {problem}"
        ) from None
    lines = [f"{'':28}       a       b  difference  95 % interval          p       prompts"]
    for row in rows:
        span = f"{row['low']:+.4f} to {row['high']:+.4f}"
        line = f"{row['name']:28} {row['a']:7.4f} {row['b']:7.4f}  {row['difference']:+10.4f}  {span}  {row['p']:.4f}"
        lines.append(f"{line}  {row['prompts']:7d}  {'real' if row['real'] else 'may be chance'}")
    lines.append(
        f"paired by prompt; real: Holm over {len(rows)} rows at {ALPHA}, {RESAMPLES} sign flips"
    )
    for part in ("generation", "scoring", "versions"):
        for key in {**a[part], **b[part]}:
            if a[part].get(key) != b[part].get(key):
                lines.append(
                    f"they differ in {part}: {key} {a[part].get(key)} and {b[part].get(key)}"
                )
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def on_grid(box, size) -> list[float]:
    """A box in pixels of a picture of `size` (w, h) -> the 0..1000 grid that draw_boxes wants."""
    return [round(1000 * edge / side, 1) for edge, side in zip(box, (*size, *size), strict=True)]


def choose(cells: list[dict], count: int = 4) -> list[dict]:
    """`count` right and `count` wrong ones, evenly from the whole run; where scores are shades, the best and worst."""
    if not {cell["score"] for cell in cells} <= {0.0, 1.0}:
        ordered = sorted(cells, key=lambda cell: -cell["score"])
        return ordered[:count] + ordered[count:][-count:]
    chosen = []
    for wanted in (1.0, 0.0):
        some = [cell for cell in cells if cell["score"] == wanted]
        chosen += (
            [some[k * len(some) // count] for k in range(count)] if len(some) > count else some
        )
    return chosen


def draw_sheet(cells: list[dict], path: Path, side: int = 256, columns: int = 4) -> None:
    """For each cell (prompt, score, reason, boxes, image: PIL or a path): the picture with what was found in it, a
    green frame when it is right (more than half right, where there are shades), else a red one and why it is not."""
    font, margin, head, foot = ImageFont.load_default(size=12), 10, 36, 52
    size = (
        columns * (side + margin) + margin,
        -(-len(cells) // columns) * (side + head + foot + margin) + margin,
    )
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for k, cell in enumerate(cells):
        x, y = (
            margin + k % columns * (side + margin),
            margin + k // columns * (side + head + foot + margin),
        )
        image = (
            cell["image"] if isinstance(cell["image"], Image.Image) else Image.open(cell["image"])
        )
        large = image.convert("RGB").resize(
            (side, side), Image.Resampling.NEAREST if image.width < side else None
        )
        sheet.paste(draw_boxes([Box(*box) for box in cell["boxes"]], image=large), (x, y + head))
        color = "#23862c" if cell["score"] > 0.5 else "#d62839"
        pen.rectangle(
            (x - 2, y + head - 2, x + side + 1, y + head + side + 1), outline=color, width=2
        )
        said = (
            f"{cell['score']:.2f}  {cell['reason']}"
            if cell["reason"]
            else f"{cell['score']:.2f}  right"
        )
        for text, top, most, ink in (
            (cell["prompt"], y, 2, "black"),
            (said, y + head + side + 4, 3, color),
        ):
            short = textwrap.wrap(text, side // 6)
            short = (
                short[:most]
                if len(short) <= most
                else [*short[: most - 1], short[most - 1][:-3] + "..."]
            )
            pen.text((x, top), "\n".join(short), ink, font)
    sheet.save(path)


def draw_plans(rows: list[dict], path: Path, side: int = 224, columns: int = 3) -> None:
    """For each row (prompt, note, chain, image): the plan on a blank canvas, beside it the picture with the planned
    boxes, and the picture with the boxes that a judge `found`, if the rows have them."""
    panels = 3 if "found" in rows[0] else 2
    font, margin, head = ImageFont.load_default(size=13), 12, 42
    width, height = panels * side + margin, side + head + margin
    columns = min(columns, len(rows))
    sheet = Image.new(
        "RGB",
        (columns * (width + margin) + margin, -(-len(rows) // columns) * height + margin),
        "white",
    )
    pen = ImageDraw.Draw(sheet)
    for k, row in enumerate(rows):
        x, y = margin + k % columns * (width + margin), margin + k // columns * height
        boxes = parse_chain(row["chain"])
        picture = row["image"].resize(
            (side, side), Image.Resampling.NEAREST if row["image"].width < side else None
        )
        prompt = row["prompt"] if len(row["prompt"]) < 66 else row["prompt"][:63] + "..."
        pen.text((x, y), prompt, "black", font)
        pen.text((x, y + 18), row["note"], "gray", font)
        drawn = (draw_boxes(boxes, size=side), draw_boxes(boxes, image=picture))
        drawn += (draw_boxes(row["found"], image=picture),) if panels == 3 else ()
        for panel, picture in enumerate(drawn):
            sheet.paste(picture, (x + panel * side, y + head))
        pen.rectangle((x, y + head, x + panels * side, y + head + side), outline="lightgray")
    sheet.save(path)


# ---------------------------------------------------------------------------------------------------------------------
# The whole report


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def by_seed(rows: list[dict], name: str) -> list[float]:
    """The mean of a measure in each run over the prompts; a row's `sample` is then its seed."""
    values = {}
    for row in rows:
        if name in row["measures"]:
            values.setdefault(row["sample"], []).append(row["measures"][name])
    return [float(np.mean(some)) for some in values.values()]


def write(
    bench: str,
    about: dict,
    rows: list[dict],
    cells: list[dict],
    out: Path,
    overall: tuple[str, ...],
) -> None:
    """Prints the table and what it was made with (`about`: generation, scoring, notes); writes results.json, in one
    piece, and for each group of `cells` a sheet of right and wrong pictures."""
    summary = dict(sorted(intervals(rows, overall).items(), key=lambda item: place(item[0])))
    for name, line in summary.items() if bench == "toy" else ():
        line["seeds"] = by_seed(rows, name)
        line["notes"] = [
            f"{min(line['seeds']):.3f} to {max(line['seeds']):.3f} over {len(line['seeds'])} seeds"
        ]
    about = about | {"versions": {package: version(package) for package in VERSIONS}}
    (out / "results.tmp").write_text(
        json.dumps({"bench": bench, "summary": summary, **about, "rows": rows})
    )
    (out / "results.tmp").replace(out / "results.json")
    for group in sorted({cell["group"] for cell in cells}):
        chosen = choose([cell for cell in cells if cell["group"] == group])
        draw_sheet(chosen, out / f"sheet_{group.replace(' ', '_')}.png")
    print(table(summary))
    if overall:
        print(f"{'mean over all pictures':28} {np.mean([cell['score'] for cell in cells]):6.4f}")
    for part in ("generation", "scoring"):
        print(f"{part}: " + ", ".join(f"{name} {value}" for name, value in about[part].items()))
    for note in about["notes"]:
        print(f"note: {note}")
    print(
        f"wrote {out / 'results.json'} and sheets of right and wrong pictures, {out / 'sheet_*.png'}"
    )
