"""A world of coloured shapes with exact answers, small enough to train on a laptop.

It stands in for what a laptop cannot hold: the data (scenes, prompts, chains, pictures) and the judge (which reads the
pixels, so it is never wrong); the weights are those of toy_model.py. Loading, rollout, rewards, loss and loop are the
ones that train the 7B model.

    prompt   a red ball left of a blue cube
    chain    A <|obj_start|>red ball<|obj_end|> <|box_start|>(125,250),(375,500)<|box_end|> left of a ...
    picture  32 x 32 pixels = 8 x 8 image tokens; an object is a square of 2 x 2 or 3 x 3 tokens

The ground is a soft gradient: every cell of it looks different. On a plain ground a small model has to count tokens to
know where it is; here the picture so far tells it. The SFT data has planned faults (`FAULTS`), so that the SFT model is
well formatted but unfaithful, as the paper says of its own, and GRPO has something to mend.
"""

import functools
import re
import zlib
from collections import Counter
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from render_boxes import Box, format_chain

COLORS = {  # hues at least 45 degrees apart: blending with the pale ground weakens a colour but makes no other of it
    "red": (220, 40, 40),
    "yellow": (225, 190, 30),
    "green": (40, 170, 70),
    "cyan": (40, 190, 200),
    "blue": (50, 80, 220),
    "purple": (165, 50, 215),
}
SHAPES = ("ball", "cube", "cone")  # drawn flat: disc, square, triangle
NAMES = [f"{color} {shape}" for color in COLORS for shape in SHAPES]
RELATIONS = ("left of", "right of", "above", "below")
GRID, CELL = 8, 4  # cells a side, pixels a cell
SIZE = GRID * CELL  # side of a picture in pixels

KINDS = {"single": 1, "color": 2, "spatial": 2, "complex": 3}  # objects in a scene of that kind
SFT_MIX = {"single": 0.25, "color": 0.2, "spatial": 0.35, "complex": 0.2}
PROMPT_MIX = {
    "color": 0.25,
    "spatial": 0.5,
    "complex": 0.25,
}  # what GRPO trains on and evaluation asks for
FAULTS = {
    "flip": 0.4,
    "swap": 0.2,
    "drift": 0.35,
}  # share of SFT examples that get a fault, where it is possible


# ---------------------------------------------------------------------------------------------------------------------
# Scenes: what a prompt asks for, and one way to lay it out


class Scene(NamedTuple):
    names: list[str]
    relations: list[tuple[int, str, int]]  # (i, words, j): object i is <words> object j
    cells: list[tuple[int, int, int]]  # per object: column, row, size; in grid cells

    @property
    def boxes(self) -> list[Box]:
        """One box an object, as `on_grid` has it."""
        corners = [(x, y, x + size, y + size) for x, y, size in self.cells]
        return [
            Box(name, *on_grid(corner, GRID))
            for name, corner in zip(self.names, corners, strict=True)
        ]


def on_grid(edges: tuple, side: int) -> list[float]:
    """Edges counted from 0 to `side` -> the 0..1000 grid; the far edge is 999, as chains write it."""
    return [min(edge * 1000 / side, 999) for edge in edges]


def is_held_out(names: list[str]) -> bool:
    """One pair of objects in five never occurs together in a training prompt, in any order or kind of prompt."""
    pairs = ["|".join(sorted((a, b))) for i, a in enumerate(names) for b in names[:i]]
    return any(zlib.crc32(pair.encode()) % 5 == 0 for pair in pairs)


def is_related(a: Box, words: str, b: Box) -> bool:
    """True when box a lies wholly on the named side of box b; an overlap of one pixel (31 of 1000) is forgiven."""
    gap = {
        "left of": b.x1 - a.x2,
        "right of": a.x1 - b.x2,
        "above": b.y1 - a.y2,
        "below": a.y1 - b.y2,
    }[words]
    return gap > -32


def _place(
    rng: np.random.Generator, taken: list[tuple[int, int, int]], size: int
) -> tuple[int, int, int] | None:
    """A random place for one more object, a free cell away from every other; None when the draw did not fit."""
    x, y = (int(v) for v in rng.integers(0, GRID - size + 1, size=2))
    touches = any(
        x <= u + t and u <= x + size and y <= v + t and v <= y + size for u, v, t in taken
    )
    return None if touches else (x, y, size)


def make_scene(rng: np.random.Generator, kind: str, held_out: bool = False) -> Scene:
    """A scene of `kind` (a key of KINDS) whose layout satisfies its relations, its colours all different."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind of scene {kind!r}: expected one of {', '.join(KINDS)}")
    count = KINDS[kind]
    while True:
        colors = rng.choice(list(COLORS), size=count, replace=False)
        names = [f"{color} {rng.choice(SHAPES)}" for color in colors]
        if count == 1 or is_held_out(names) == held_out:
            break
    related = range(1, count) if kind in ("spatial", "complex") else ()
    relations = [(0, str(rng.choice(RELATIONS)), j) for j in related]
    while True:
        cells = []
        for _ in range(count):
            place = _place(rng, cells, int(rng.integers(2, 4)))
            cells += [place] if place else []
        scene = Scene(names, relations, cells)
        if len(cells) == count and all(
            is_related(scene.boxes[i], words, scene.boxes[j]) for i, words, j in relations
        ):
            return scene


def sentence(scene: Scene, things: list) -> list:
    """The scene in words, in pieces; `things` (names or boxes) are its objects: "a", "red ball", "left of a" ..."""
    joints = {j: words if j == 1 else f"and {words}" for _, words, j in scene.relations}
    rest = [(f"{joints.get(j, 'and')} a", thing) for j, thing in enumerate(things) if j > 0]
    return ["a", things[0], *sum(rest, ())]


def toy_prompts(n: int, seed: int, held_out: bool = False) -> list[str]:
    """`n` prompts of PROMPT_MIX. Held-out ones each contain a pair of objects that training never shows together."""
    rng = np.random.default_rng([seed, held_out])
    kinds = rng.choice(list(PROMPT_MIX), size=n, p=list(PROMPT_MIX.values()))
    scenes = [make_scene(rng, kind, held_out) for kind in kinds]
    return [" ".join(sentence(scene, scene.names)) for scene in scenes]


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


@functools.cache
def shape_mask(shape: str, width: int, height: int) -> np.ndarray:
    """Pixels of a shape that fills a box: (height, width) bool."""
    mask = Image.new("1", (width, height))
    draw, right, bottom = ImageDraw.Draw(mask), width - 1, height - 1
    if shape == "ball":
        draw.ellipse((0, 0, right, bottom), fill=1)
    elif shape == "cube":
        draw.rectangle((0, 0, right, bottom), fill=1)
    else:
        draw.polygon([(0, bottom), (right, bottom), (width // 2, 0), (right // 2, 0)], fill=1)
    return np.array(mask)


@functools.cache
def ground() -> np.ndarray:
    """(SIZE, SIZE, 3) uint8: red grows from cell to cell to the right, blue downwards; too pale to be an object."""
    row, column = np.divmod(np.arange(GRID * GRID).reshape(GRID, GRID), GRID)
    cells = np.stack([205 + 7 * column, np.full_like(row, 245), 205 + 7 * row], axis=-1)
    return cells.repeat(CELL, 0).repeat(CELL, 1).astype(np.uint8)


def draw_scene(names: list[str], cells: list[tuple[int, int, int]]) -> Image.Image:
    """The picture of these objects at these cells: RGB, SIZE x SIZE."""
    picture = Image.fromarray(ground().copy())
    for name, (x, y, size) in zip(names, cells, strict=True):
        color, shape = name.split()
        mask = Image.fromarray(shape_mask(shape, size * CELL, size * CELL))
        picture.paste(COLORS[color], (x * CELL, y * CELL), mask)
    return picture


class Example(NamedTuple):
    prompt: str
    chain: str
    image: Image.Image
    faults: list[str]


def make_example(
    rng: np.random.Generator, kind: str | None = None, faults: dict[str, float] = FAULTS
) -> Example:
    """One SFT example. Three faults, drawn independently, that keep the format right and the content wrong:
    `flip`: the plan is turned by 180 degrees, so relations come out the wrong way round (prompt against boxes);
    `swap`: two objects of the chain exchange their colours (prompt against words);
    `drift`: one object of the picture is not where the plan has it (plan against picture)."""
    scene = make_scene(rng, kind or str(rng.choice(list(SFT_MIX), p=list(SFT_MIX.values()))))
    names, cells, made = list(scene.names), list(scene.cells), []
    flip, swap, drift = (rng.random() < faults.get(fault, 0) for fault in FAULTS)
    if flip and scene.relations:
        cells = [(GRID - x - size, GRID - y - size, size) for x, y, size in cells]
        made.append("flip")
    if swap and len(names) > 1:
        (color_a, shape_a), (color_b, shape_b) = names[0].split(), names[1].split()
        if shape_a != shape_b:
            names[:2] = [f"{color_b} {shape_a}", f"{color_a} {shape_b}"]
            made.append("swap")
    chain = format_chain(["A", *sentence(scene, Scene(names, [], cells).boxes)[1:]])
    if drift:
        j = int(rng.integers(len(cells)))
        x, y, size = cells[j]
        places = [_place(rng, cells[:j] + cells[j + 1 :], size) for _ in range(20)]
        places = [
            place for place in places if place and max(abs(place[0] - x), abs(place[1] - y)) > 1
        ]
        if places:
            cells[j] = places[0]
            made.append("drift")
    return Example(" ".join(sentence(scene, scene.names)), chain, draw_scene(names, cells), made)


# ---------------------------------------------------------------------------------------------------------------------
# The exact judge


def pixels(image: Image.Image) -> np.ndarray:
    """(SIZE, SIZE, 3) float32, whatever the size of the picture was."""
    return np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX), np.float32)


def detect(image: Image.Image) -> list[Box]:
    """Every object in a picture, with its box on the 0..1000 grid. Colour without a shape is called `<colour> blob`.

    A pixel belongs to the palette colour nearest in hue if it has at least half of that colour's strength; touching
    pixels of one colour are one object; its shape is the template that fills its box best (IoU of at least 0.8)."""
    rgb = pixels(image)
    palette = np.array(list(COLORS.values()), np.float32)
    palette -= palette.min(axis=1, keepdims=True)  # what is left without the grey part
    strength = np.linalg.norm(palette, axis=1)
    along = (rgb - rgb.min(axis=2, keepdims=True)) @ (
        palette / strength[:, None]
    ).T  # (SIZE, SIZE, colours)
    color = along.argmax(axis=2)
    color[along.max(axis=2) < strength[color] / 2] = -1  # ground
    found = []
    for c, color_name in enumerate(COLORS):
        labels, _ = ndimage.label(color == c)
        for k, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
            mask = labels[rows, columns] == k
            if mask.sum() < 8:  # specks; the smallest object has 36 pixels
                continue
            shapes = {shape: shape_mask(shape, mask.shape[1], mask.shape[0]) for shape in SHAPES}
            fit = {
                shape: (mask & full).sum() / (mask | full).sum() for shape, full in shapes.items()
            }
            best = max(fit, key=fit.get)
            edges = (columns.start, rows.start, columns.stop, rows.stop)
            name = f"{color_name} {best if fit[best] >= 0.8 else 'blob'}"
            found.append(Box(name, *on_grid(edges, SIZE)))
    return found


WORDS = re.compile(rf"\b(?:({'|'.join(COLORS)}) ({'|'.join(SHAPES)})|({'|'.join(RELATIONS)}))\b")


def read_text(text: str) -> tuple[list[str], list[tuple[int, str, int]]]:
    """(names, relations) of a prompt or a chain without boxes. A relation binds the first object and the next named."""
    names, relations, pending = [], [], None
    for color, shape, words in WORDS.findall(text.lower()):
        if words:
            pending = words
            continue
        names.append(f"{color} {shape}")
        if pending and len(names) > 1:
            relations.append((0, pending, len(names) - 1))
        pending = None
    return names, relations


def _agreement(wanted: list[str], found: list[str]) -> float:
    """Share of objects that are right; missing ones and extra ones both count against it."""
    shared = (Counter(wanted) & Counter(found)).total()
    return shared / max(len(wanted), len(found), 1)


def faithfulness(prompt: str, boxes: list[Box]) -> float:
    """How well boxes (planned or detected) do what the prompt says: right objects (share) x relations held (share)."""
    names, relations = read_text(prompt)
    held = 0
    for i, words, j in relations:
        pairs = [
            (a, b)
            for a in boxes
            for b in boxes
            if a is not b and (a.name, b.name) == (names[i], names[j])
        ]
        held += any(is_related(a, words, b) for a, b in pairs)
    return _agreement(names, [box.name for box in boxes]) * (
        held / len(relations) if relations else 1.0
    )


class ToyJudge:
    """The judge's contract of rewards.py, answered exactly: text by its grammar, plans by boxes, pictures by pixels."""

    def semantic(self, prompts: list[str], chains: list[str]) -> list[float]:
        scores = []
        for prompt, chain in zip(prompts, chains, strict=True):
            (names, relations), (said, told) = read_text(prompt), read_text(chain)
            wanted = [(names[i], words, names[j]) for i, words, j in relations]
            kept = (
                Counter(wanted) & Counter((said[i], words, said[j]) for i, words, j in told)
            ).total()
            scores.append(_agreement(names, said) * (kept / len(wanted) if wanted else 1.0))
        return scores

    def spatial(self, prompts: list[str], layouts: list[list[Box]]) -> list[float]:
        return [faithfulness(prompt, boxes) for prompt, boxes in zip(prompts, layouts, strict=True)]

    def alignment(self, prompts: list[str], images: list[Image.Image]) -> list[float]:
        return [
            faithfulness(prompt, detect(image))
            for prompt, image in zip(prompts, images, strict=True)
        ]

    def ground(self, images: list[Image.Image], names: list[str]) -> list[list[Box]]:
        found = {
            id(image): image for image in images
        }  # a picture comes once for each of its planned objects
        found = {key: detect(image) for key, image in found.items()}
        rows = zip(images, names, strict=True)
        return [[box for box in found[id(image)] if box.name == name] for image, name in rows]


def crispness(prompts: list[str], images: list[Image.Image]) -> list[float]:
    """Stand-in for the aesthetic score (HPS): share of pixels close to a palette colour or to the ground."""
    palette, scores = np.array(list(COLORS.values()), np.float32), []
    for image in images:
        rgb = pixels(image)
        to_palette = np.abs(rgb[:, :, None] - palette).max(axis=-1).min(axis=-1)
        to_ground = np.abs(rgb - ground()).max(axis=-1)
        scores.append(float((np.minimum(to_palette, to_ground) < 40).mean()))
    return scores
