"""Whether samples still differ, and whether pictures still look like pictures, in a few numbers.

GRPO's reward can rise while something that nobody rewards is lost: all plans of a prompt become one
layout, or the pictures turn into what the judge likes and a person does not (dark, flat, garish).
It happens: where the reward only read the text in a picture, the background went black while the
reward rose (https://github.com/Tencent-Hunyuan/UniRL/pull/407). None of these numbers is a score:
what tells is how far they drift from those at the start of the run. Then look at the pictures.

    number             what it is                                   sign of trouble
    layout_variety     how far the boxes of a prompt's samples      falls towards 0: one layout per
                       lie apart, 0..1                              prompt
    place_entropy      over how many places the first objects of    falls towards 0: one place for
                       all samples spread, bits                     all prompts
    different_chains   how many wordings a prompt's samples have    falls to 1: one text per prompt
    brightness         mean luma, 0..1                              goes far to either side
    saturation         mean of HSV's S, 0..1                        rises: garish
    edges              mean step between neighbouring pixels, 0..1  falls: flat; rises: noise
    color_entropy      how many colours are in use, bits            falls: few colours

Samples come in the order of a rollout: those of one prompt are `group` consecutive ones.
"""

import itertools
from collections import Counter

import numpy as np
from PIL import Image

from render_boxes import Box, iou, parse_chain, strip_boxes

# -------------------------------------------------------------------------------------------------
# Plans


def plan_variety(chains: list[str], group: int) -> list[dict[str, float]]:
    """How different the plans of each prompt are: a dict per group of `group` chains.

    layout_variety, which is left out where no two plans of the group share a name;
    different_chains; and place_entropy, that of all chains together: the same in each group.
    Raises ValueError unless the chains are whole groups."""
    layouts = [parse_chain(chain) for chain in chains]
    varieties = layout_variety(layouts, group)
    counts = different_chains(chains, group)
    entropy = place_entropy(layouts)
    rows = []
    for layout, count in zip(varieties, counts, strict=True):
        row = {"different_chains": count, "place_entropy": entropy}
        if layout is not None:
            row["layout_variety"] = layout
        rows.append(row)
    return rows


def mean_variety(chains: list[str], group: int) -> dict[str, float]:
    """The mean of each number of `plan_variety` over the groups that have it."""
    values = {}
    for row in plan_variety(chains, group):
        for name, value in row.items():
            values.setdefault(name, []).append(value)
    return {name: float(np.mean(some)) for name, some in values.items()}


def layout_variety(layouts: list[list[Box]], group: int) -> list[float | None]:
    """Per group: mean of 1 - IoU between the boxes that two of its samples have under one name,
    over all pairs of samples. 0: all layouts are equal. 1: no two boxes of a name overlap.

    None where no two samples share a name, as in a group of one. A box whose name the other sample
    lacks does not count. Raises ValueError unless the layouts are whole groups."""
    varieties = []
    for samples in in_groups(layouts, group):
        differences = []
        for namesakes in boxes_by_name(samples).values():
            for a, b in itertools.combinations(namesakes, 2):
                differences.append(1 - iou(a, b))
        varieties.append(sum(differences) / len(differences) if differences else None)
    return varieties


def boxes_by_name(samples: list[list[Box]]) -> dict[tuple[str, int], list[Box]]:
    """(name, k) -> the k-th box of that name of each sample that has one."""
    found = {}
    for boxes in samples:
        seen = Counter()  # name -> how many boxes of this sample had it so far
        for box in boxes:
            seen[box.name] += 1
            found.setdefault((box.name, seen[box.name]), []).append(box)
    return found


def place_entropy(layouts: list[list[Box]], cells: int = 4) -> float:
    """Entropy, in bits, of where the first boxes are: of the cell that holds a box's centre, in a
    grid of cells x cells over the picture. Over all layouts that have a box; 0 if none has.

    At most log2(cells * cells), 4 bits for 16 cells, and at most log2(n) with n layouts: compare
    only numbers that come from equally many layouts. The prompts count too: where each has a place
    of its own, the entropy is high although the layouts of one prompt are equal."""
    counts = np.zeros((cells, cells))
    for boxes in layouts:
        if boxes:
            first = boxes[0]
            column = int((first.x1 + first.x2) / 2 * cells / 1000)
            row = int((first.y1 + first.y2) / 2 * cells / 1000)
            # a centre on the far edge of the picture belongs to the last cell
            counts[min(row, cells - 1), min(column, cells - 1)] += 1
    return entropy_in_bits(counts)


def different_chains(chains: list[str], group: int) -> list[float]:
    """Per group: how many different texts its chains are once their boxes are removed, 1..group.

    A count, not a share of the group: 1 means one text for all, whatever the size of the group.
    Compare only numbers from groups of one size. Raises ValueError unless the chains are whole
    groups."""
    counts = []
    for samples in in_groups(chains, group):
        texts = {strip_boxes(chain) for chain in samples}
        counts.append(float(len(texts)))
    return counts


def in_groups(samples: list, group: int) -> list[list]:
    """The samples of each prompt. Raises ValueError if the last prompt has too few."""
    if group < 1 or len(samples) % group != 0:
        raise ValueError(f"{len(samples)} samples are not whole groups of {group}")
    return [samples[k : k + group] for k in range(0, len(samples), group)]


# -------------------------------------------------------------------------------------------------
# Collapse

FIRST_STEPS = 10  # their mean is what a run began with
COLLAPSED = {  # number of the log -> below which share of it the run has collapsed, and its meaning
    "layout_variety": (0.5, "the plans of a prompt become alike"),
    "entropy_text": (0.1, "the text is nearly certain: nothing new is tried"),
}


def collapse_warnings(rows: list[dict]) -> list[str]:
    """A line for each number of COLLAPSED whose limit the last row is the first to fall below.
    rows: a log, one row per step; a number may be missing from some rows, or from all."""
    warnings = []
    for name, (share, meaning) in COLLAPSED.items():
        values = [row[name] for row in rows if name in row]
        if len(values) <= FIRST_STEPS or name not in rows[-1]:
            continue
        start = np.mean(values[:FIRST_STEPS])
        limit = share * start
        earlier = values[FIRST_STEPS:-1]
        if values[-1] < limit and not any(value < limit for value in earlier):
            warnings.append(
                f"warning: {name} is {values[-1]:.2g}, less than {share} of the {start:.2g} of the "
                f"first {FIRST_STEPS} steps: {meaning}. What helps: --advantage mean, a larger --kl"
            )
    return warnings


# -------------------------------------------------------------------------------------------------
# Pictures


def looks(images: list[Image.Image]) -> list[dict[str, float]]:
    """Per picture its brightness, saturation, edges and color_entropy: see the functions below.
    Pictures may differ in size and mode; what is transparent counts as opaque."""
    rows = []
    for image in images:
        image = image.convert("RGB")
        pixels = np.asarray(image)  # (H, W, 3) uint8
        luma = np.asarray(image.convert("L"))  # (H, W) uint8: 0.299 R + 0.587 G + 0.114 B
        row = {
            "brightness": float(luma.mean() / 255),
            "saturation": saturation(pixels),
            "edges": edges(luma),
            "color_entropy": color_entropy(pixels),
        }
        rows.append(row)
    return rows


def saturation(pixels: np.ndarray) -> float:
    """Mean over the pixels of HSV's S, (max - min) / max of red, green and blue: 0 is grey, black
    included, 1 a pure colour. pixels: (H, W, 3) uint8."""
    red, green, blue = np.moveaxis(pixels, 2, 0)
    # in pairs, because pixels.max(axis=2) is many times slower
    highest = np.maximum(np.maximum(red, green), blue)  # (H, W)
    lowest = np.minimum(np.minimum(red, green), blue)
    return float(((highest - lowest) / np.maximum(highest, 1)).mean())


def edges(luma: np.ndarray) -> float:
    """Mean absolute difference between a pixel and the next one to the right or below. luma: (H, W)
    uint8. 0: one plain grey; 1: a chessboard of black and white pixels.

    It depends on the resolution: compare only pictures of one size."""
    luma = luma.astype(np.int16)  # differences of uint8 wrap around
    across = np.abs(np.diff(luma, axis=1))  # (H, W-1)
    down = np.abs(np.diff(luma, axis=0))  # (H-1, W)
    neighbours = across.size + down.size
    if neighbours == 0:  # a picture of one pixel
        return 0.0
    return float((across.sum() + down.sum()) / neighbours / 255)


def color_entropy(pixels: np.ndarray) -> float:
    """Entropy, in bits, of the colours, with 4 levels per channel: 64 colours, 6 bits at most.
    pixels: (H, W, 3) uint8."""
    levels = pixels // 64  # 0..3
    colors = levels[:, :, 0] * 16 + levels[:, :, 1] * 4 + levels[:, :, 2]  # 0..63: fits in uint8
    return entropy_in_bits(np.bincount(colors.ravel(), minlength=64))


def entropy_in_bits(counts: np.ndarray) -> float:
    """Of a histogram of any shape: 0 if all is in one bin or nothing was counted, log2(bins) if all
    bins are equally full."""
    shares = counts[counts > 0] / counts.sum()
    return float((shares * np.log2(1 / shares)).sum())
