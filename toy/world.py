"""A world of coloured shapes with exact answers, small enough to train on a laptop.

It stands in for what a laptop cannot hold: the data (scenes, prompts, chains, pictures) and the
judge, which reads the pixels and so is never wrong. The weights are those of toy/model.py. Loading,
rollout, rewards, loss and loop are the ones that train the 7B model.

    prompt   a red ball left of a blue cube
    chain    A <|obj_start|>red ball<|obj_end|> <|box_start|>(125,250),(375,500)<|box_end|> left of
             a <|obj_start|>blue cube<|obj_end|> <|box_start|>(500,250),(875,625)<|box_end|>
    picture  32 x 32 pixels = 8 x 8 image tokens; an object is a square of 2 x 2 or 3 x 3 tokens

The ground is a soft gradient: every cell of it looks different. On a plain ground a small model has
to count tokens to know where it is; here the picture so far tells it. The SFT data has planned
faults (`FAULTS`), so that the SFT model is well formatted but unfaithful, as the paper says of its
own, and GRPO has something to mend.
"""

import functools
import json
import re
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from render_boxes import Box, format_chain

# Hues at least 45 degrees apart: blending with the pale ground weakens a colour but makes no other
# of it.
COLORS = {
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
GRID = 8  # cells per side; a cell is an image token
CELL = 4  # pixels per side of a cell
SIZE = GRID * CELL  # pixels per side of a picture

KINDS = {"single": 1, "color": 2, "spatial": 2, "complex": 3}  # kind of scene -> objects in it
SFT_MIX = {"single": 0.2, "color": 0.1, "spatial": 0.3, "complex": 0.4}
PROMPT_MIX = {"color": 0.25, "spatial": 0.5, "complex": 0.25}  # of GRPO's and evaluation's prompts
FAULTS = {"flip": 0.4, "swap": 0.2, "drift": 0.35}  # share of SFT examples that are to get a fault
GIVEN_PLANS = Path(__file__).with_name("given_plans.jsonl")


# -------------------------------------------------------------------------------------------------
# Scenes: what a prompt asks for, and one way to lay it out


class Scene(NamedTuple):
    names: list[str]
    relations: list[tuple[int, str, int]]  # (i, words, j): object i is <words> object j
    cells: list[tuple[int, int, int]]  # per object: column, row, size; counted in cells

    @property
    def boxes(self) -> list[Box]:
        """One box per object, on the 0..1000 grid."""
        boxes = []
        for name, (x, y, size) in zip(self.names, self.cells, strict=True):
            boxes.append(Box(name, *scaled((x, y, x + size, y + size), GRID)))
        return boxes


def scaled(edges: tuple[int, ...], side: int) -> list[float]:
    """Edges counted from 0 to `side` -> the 0..1000 grid; the far edge is 999, as in chains."""
    return [min(edge * 1000 / side, 999) for edge in edges]


def is_held_out(names: list[str]) -> bool:
    """Whether two of the objects never occur together in a training prompt. That is so for one pair
    of objects in five, in any order and kind of prompt."""
    for i, name in enumerate(names):
        for other in names[:i]:
            pair = "|".join(sorted((name, other)))
            if zlib.crc32(pair.encode()) % 5 == 0:
                return True
    return False


def is_related(a: Box, words: str, b: Box) -> bool:
    """Whether box a lies wholly on the named side of box b. An overlap of one pixel (31 of 1000) is
    forgiven."""
    gaps = {
        "left of": b.x1 - a.x2,
        "right of": a.x1 - b.x2,
        "above": b.y1 - a.y2,
        "below": a.y1 - b.y2,
    }
    return gaps[words] > -32


def random_place(
    rng: np.random.Generator, taken: list[tuple[int, int, int]], size: int
) -> tuple[int, int, int] | None:
    """One draw of a place for one more object: (column, row, size), or None when it is not a free
    cell away from every other object."""
    x, y = (int(value) for value in rng.integers(0, GRID - size + 1, size=2))
    for other in taken:
        if is_touching((x, y, size), other):
            return None
    return x, y, size


def is_touching(a: tuple[int, int, int], b: tuple[int, int, int]) -> bool:
    """Whether no cell is free between two objects, each (column, row, size)."""
    x, y, size = a
    other_x, other_y, other_size = b
    touches_in_x = x <= other_x + other_size and other_x <= x + size
    touches_in_y = y <= other_y + other_size and other_y <= y + size
    return touches_in_x and touches_in_y


def make_scene(rng: np.random.Generator, kind: str, held_out: bool = False) -> Scene:
    """A scene of a `kind` (a key of KINDS), its colours all different, with a layout that satisfies
    its relations. With `held_out`, two of its objects never occur together in training (a single
    object cannot be held out)."""
    count = KINDS[kind]
    names = random_names(rng, count)
    while count > 1 and is_held_out(names) != held_out:
        names = random_names(rng, count)
    relations = []
    if kind not in ("single", "color"):
        for j in range(1, count):
            relations.append((0, str(rng.choice(RELATIONS)), j))
    scene = Scene(names, relations, random_cells(rng, count))
    while not is_laid_out(scene):
        scene = Scene(names, relations, random_cells(rng, count))
    return scene


def random_names(rng: np.random.Generator, count: int) -> list[str]:
    """Objects of different colours."""
    colors = rng.choice(list(COLORS), size=count, replace=False)
    return [f"{color} {rng.choice(SHAPES)}" for color in colors]


def random_cells(rng: np.random.Generator, count: int) -> list[tuple[int, int, int]]:
    """Places for `count` objects; fewer when a draw did not fit."""
    cells = []
    for _ in range(count):
        size = int(rng.integers(2, 4))
        place = random_place(rng, cells, size)
        if place:
            cells.append(place)
    return cells


def is_laid_out(scene: Scene) -> bool:
    """Whether every object has a place and every relation holds."""
    if len(scene.cells) < len(scene.names):
        return False
    boxes = scene.boxes
    return all(is_related(boxes[i], words, boxes[j]) for i, words, j in scene.relations)


def sentence(scene: Scene, things: list) -> list:
    """The scene in words, in pieces: "a", thing, "left of a", thing, "and above a", thing. `things`
    are its objects, as names or as boxes."""
    relation = {j: words for _, words, j in scene.relations}
    pieces = ["a", things[0]]
    for j in range(1, len(things)):
        words = relation.get(j)
        if words is None:
            joint = "and"
        elif j == 1:
            joint = words
        else:
            joint = f"and {words}"
        pieces += [f"{joint} a", things[j]]
    return pieces


def chain_of(scene: Scene) -> str:
    """The chain that says what the scene says, with the scene's boxes."""
    return format_chain(["A", *sentence(scene, scene.boxes)[1:]])


def toy_prompts(n: int, seed: int, held_out: bool = False) -> list[str]:
    """`n` prompts of PROMPT_MIX. Held-out ones each contain a pair of objects that training never
    shows together."""
    rng = np.random.default_rng([seed, held_out])
    kinds = rng.choice(list(PROMPT_MIX), size=n, p=list(PROMPT_MIX.values()))
    prompts = []
    for kind in kinds:
        scene = make_scene(rng, kind, held_out)
        prompts.append(" ".join(sentence(scene, scene.names)))
    return prompts


def follow_plans(count: int = 60) -> list[tuple[str, str]]:
    """Held-out prompts, `count` (at most 60) of each kind of PROMPT_MIX, with a plan each: (prompt,
    chain). A plan satisfies its prompt by a random layout that no model wrote. Pictures of these
    plans show how well a model follows a plan."""
    lines = GIVEN_PLANS.read_text(encoding="utf-8").splitlines()
    plans = []
    for first in range(0, len(lines), 60):  # of a kind
        for line in lines[first : first + min(count, 60)]:
            row = json.loads(line)
            plans.append((row["prompt"], row["chain"]))
    return plans


# -------------------------------------------------------------------------------------------------
# Pictures


@functools.cache
def shape_mask(shape: str, width: int, height: int) -> np.ndarray:
    """Pixels of a shape that fills a box: (height, width) bool."""
    mask = Image.new("1", (width, height))
    draw = ImageDraw.Draw(mask)
    right = width - 1
    bottom = height - 1
    if shape == "ball":
        draw.ellipse((0, 0, right, bottom), fill=1)
    elif shape == "cube":
        draw.rectangle((0, 0, right, bottom), fill=1)
    else:
        draw.polygon([(0, bottom), (right, bottom), (width // 2, 0), (right // 2, 0)], fill=1)
    return np.array(mask)


@functools.cache
def ground() -> np.ndarray:
    """(SIZE, SIZE, 3) uint8: red grows from cell to cell to the right, blue downwards. It is too
    pale to be an object."""
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


# -------------------------------------------------------------------------------------------------
# Training examples


class Example(NamedTuple):
    prompt: str
    chain: str
    image: Image.Image
    faults: list[str]


def make_example(
    rng: np.random.Generator, kind: str | None = None, faults: dict[str, float] = FAULTS
) -> Example:
    """One SFT example, of a kind of SFT_MIX unless one is named. Each fault is tried with the
    probability that `faults` gives it. It leaves the format right and makes the content wrong:

    flip   the plan is turned by 180 degrees: relations are the wrong way round (prompt, boxes)
    swap   two objects of the chain exchange their colours (prompt, words)
    drift  one object of the picture is not where the plan has it (plan, picture)"""
    if kind is None:
        kind = str(rng.choice(list(SFT_MIX), p=list(SFT_MIX.values())))
    scene = make_scene(rng, kind)
    names = list(scene.names)  # of the chain and the picture
    cells = list(scene.cells)
    # all three are drawn, whatever becomes of them
    flip = rng.random() < faults.get("flip", 0)
    swap = rng.random() < faults.get("swap", 0)
    drift = rng.random() < faults.get("drift", 0)
    made = []
    if flip and scene.relations:
        cells = [(GRID - x - size, GRID - y - size, size) for x, y, size in cells]
        made.append("flip")
    if swap and len(names) > 1:
        color_a, shape_a = names[0].split()
        color_b, shape_b = names[1].split()
        if shape_a != shape_b:  # else the swap would only change their order
            names[0] = f"{color_b} {shape_a}"
            names[1] = f"{color_a} {shape_b}"
            made.append("swap")
    chain = chain_of(Scene(names, scene.relations, cells))
    if drift:
        j = int(rng.integers(len(cells)))
        moved = drifted(rng, cells, j)
        if moved:
            cells[j] = moved
            made.append("drift")
    prompt = " ".join(sentence(scene, scene.names))
    return Example(prompt, chain, draw_scene(names, cells), made)


def drifted(
    rng: np.random.Generator, cells: list[tuple[int, int, int]], j: int
) -> tuple[int, int, int] | None:
    """Another place for object j, at least two cells away: the first that fits among 20 draws, or
    None. All 20 are drawn, so that the random numbers of later examples do not depend on it."""
    x, y, size = cells[j]
    others = cells[:j] + cells[j + 1 :]
    moved = None
    for _ in range(20):
        place = random_place(rng, others, size)
        if moved is None and place and max(abs(place[0] - x), abs(place[1] - y)) > 1:
            moved = place
    return moved


# -------------------------------------------------------------------------------------------------
# What a picture shows


def pixels(image: Image.Image) -> np.ndarray:
    """(SIZE, SIZE, 3) float32, whatever the size of the picture was."""
    small = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX)
    return np.asarray(small, np.float32)


def detect(image: Image.Image) -> list[Box]:
    """Every object in a picture, with its box on the 0..1000 grid. Touching pixels of one colour
    are one object. Colour without a shape is called `<colour> blob`."""
    colors = color_of_pixels(pixels(image))
    found = []
    for c, color in enumerate(COLORS):
        labels, _ = ndimage.label(colors == c)
        for k, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
            mask = labels[rows, columns] == k
            if mask.sum() < 8:  # specks; the smallest object has 36 pixels
                continue
            edges = (columns.start, rows.start, columns.stop, rows.stop)
            found.append(Box(f"{color} {shape_of(mask)}", *scaled(edges, SIZE)))
    return found


def color_of_pixels(rgb: np.ndarray) -> np.ndarray:
    """(SIZE, SIZE, 3) -> (SIZE, SIZE): the place of each pixel's colour in COLORS, -1 for ground.

    A pixel belongs to the palette colour nearest in hue if it has at least half of that colour's
    strength. Both are measured on what is left of a colour without its grey part."""
    palette = np.array(list(COLORS.values()), np.float32)
    palette -= palette.min(axis=1, keepdims=True)
    strength = np.linalg.norm(palette, axis=1)
    hues = palette / strength[:, None]
    along = (rgb - rgb.min(axis=2, keepdims=True)) @ hues.T  # (SIZE, SIZE, colours)
    colors = along.argmax(axis=2)
    colors[along.max(axis=2) < strength[colors] / 2] = -1
    return colors


def shape_of(mask: np.ndarray) -> str:
    """The shape that overlaps best with an object's pixels, (height, width) bool, when it fills the
    same box; `blob` when the IoU is below 0.8."""
    height, width = mask.shape
    fits = {}
    for shape in SHAPES:
        full = shape_mask(shape, width, height)
        fits[shape] = (mask & full).sum() / (mask | full).sum()
    best = max(fits, key=fits.get)
    return best if fits[best] >= 0.8 else "blob"


# -------------------------------------------------------------------------------------------------
# The exact judge

WORDS = re.compile(rf"\b(?:({'|'.join(COLORS)}) ({'|'.join(SHAPES)})|({'|'.join(RELATIONS)}))\b")


def read_text(text: str) -> tuple[list[str], list[tuple[int, str, int]]]:
    """(names, relations) of a prompt or of a chain without boxes, as in a Scene. A relation binds
    the first object and the next one named."""
    names = []
    relations = []
    pending = None
    for color, shape, words in WORDS.findall(text.lower()):
        if words:
            pending = words
            continue
        names.append(f"{color} {shape}")
        if pending and len(names) > 1:
            relations.append((0, pending, len(names) - 1))
        pending = None
    return names, relations


def unknown_words(prompt: str) -> list[str]:
    """The words of a prompt that mean nothing in the toy's world."""
    known = {"a", "and", *COLORS, *SHAPES, *" ".join(RELATIONS).split()}
    return [word for word in prompt.lower().split() if word not in known]


def agreement(wanted: list[str], found: list[str]) -> float:
    """Share of objects that are right; missing ones and extra ones both count against it."""
    shared = (Counter(wanted) & Counter(found)).total()
    return shared / max(len(wanted), len(found), 1)


def faithfulness(prompt: str, boxes: list[Box]) -> float:
    """How well boxes (planned or detected) do what the prompt says: the share of objects that are
    right times the share of relations that hold."""
    names, relations = read_text(prompt)
    score = agreement(names, [box.name for box in boxes])
    if not relations:
        return score
    held = 0
    for i, words, j in relations:
        held += holds(names[i], words, names[j], boxes)
    return score * (held / len(relations))


def holds(name: str, words: str, other_name: str, boxes: list[Box]) -> bool:
    """Whether some box with the first name is <words> some other box with the second."""
    for a in boxes:
        for b in boxes:
            named = a.name == name and b.name == other_name
            if named and a is not b and is_related(a, words, b):
                return True
    return False


def said_relations(text: str) -> list[tuple[str, str, str]]:
    """The relations of a text, with the names of their objects."""
    names, relations = read_text(text)
    return [(names[i], words, names[j]) for i, words, j in relations]


@dataclass
class ToyJudge:
    """The judge's contract of rewards.py, answered exactly: text by its grammar, plans by boxes,
    pictures by pixels.

    error   probability, 0 to 1, that an answer is replaced by that of another sample of the call
    seed    of these errors, which depend on it and on the content of the call and nothing else: a
            resumed run gets the same ones

    Such errors are noise: they do not depend on what the picture shows, so a policy cannot learn to
    cause them. A real judge errs in the same way each time, and a policy can learn to exploit that:
    that a training stands these errors does not say that it stands those.

    Raises ValueError when `error` is not a probability."""

    error: float = 0.0
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.error <= 1:  # nan is not
            raise ValueError(f"error is {self.error}: expected a probability from 0 to 1")

    @classmethod
    def from_flag(cls, flag: str) -> "ToyJudge":
        """The judge that `--judge toy`, which is exact, or `--judge toy:0.2` names. Raises
        ValueError for anything else."""
        name, colon, number = flag.partition(":")
        try:
            if name == "toy":
                return cls(error=float(number) if colon else 0.0)
        except ValueError:
            pass
        raise ValueError(
            f"no judge {flag!r}: expected toy, or toy:P where P, from 0 to 1, is the probability "
            "that an answer is wrong"
        )

    @property
    def exact(self) -> "ToyJudge":
        """This judge without errors, for evaluation."""
        return ToyJudge() if self.error else self

    def semantic(self, prompts: list[str], chains: list[str]) -> list[float]:
        scores = []
        for prompt, chain in zip(prompts, chains, strict=True):
            score = agreement(read_text(prompt)[0], read_text(chain)[0])
            wanted = said_relations(prompt)
            if wanted:
                kept = (Counter(wanted) & Counter(said_relations(chain))).total()
                score *= kept / len(wanted)
            scores.append(score)
        return self._with_errors(scores, "semantic", prompts, chains)

    def spatial(self, prompts: list[str], layouts: list[list[Box]]) -> list[float]:
        scores = []
        for prompt, boxes in zip(prompts, layouts, strict=True):
            scores.append(faithfulness(prompt, boxes))
        return self._with_errors(scores, "spatial", prompts, layouts)

    def alignment(self, prompts: list[str], images: list[Image.Image]) -> list[float]:
        scores = []
        for prompt, image in zip(prompts, images, strict=True):
            scores.append(faithfulness(prompt, detect(image)))
        return self._with_errors(scores, "alignment", prompts, images)

    def ground(self, images: list[Image.Image], names: list[str]) -> list[list[Box]]:
        detected = {}  # a picture comes once for each of its planned objects: look at it once
        answers = []
        for image, name in zip(images, names, strict=True):
            if id(image) not in detected:
                detected[id(image)] = detect(image)
            answers.append([box for box in detected[id(image)] if box.name == name])
        answers = self._with_errors(answers, "ground", images, names)
        for k, name in enumerate(names):  # an error is to say that it found this name
            answers[k] = [box._replace(name=name) for box in answers[k]]
        return answers

    def _with_errors(self, answers: list, call: str, *inputs: list) -> list:
        """The answers to a call, a share `error` of them replaced by another sample's answer."""
        count = len(answers)
        if not self.error or count < 2:  # a single sample has no other
            return answers
        content = 0
        for items in inputs:
            for item in items:
                is_image = isinstance(item, Image.Image)
                data = item.tobytes() if is_image else repr(item).encode()
                content = zlib.crc32(data, content)
        rng = np.random.default_rng([self.seed, zlib.crc32(call.encode()), content])
        is_wrong = rng.random(count) < self.error
        other = (np.arange(count) + rng.integers(1, count, size=count)) % count  # never itself
        given = list(answers)
        for k in np.flatnonzero(is_wrong):
            given[k] = answers[other[k]]
        return given


def crispness(prompts: list[str], images: list[Image.Image]) -> list[float]:
    """Stand-in for the aesthetic score (HPS): share of pixels close to a palette colour or to the
    ground."""
    palette = np.array(list(COLORS.values()), np.float32)
    scores = []
    for image in images:
        rgb = pixels(image)
        to_palette = np.abs(rgb[:, :, None] - palette).max(axis=-1).min(axis=-1)
        to_ground = np.abs(rgb - ground()).max(axis=-1)
        distance = np.minimum(to_palette, to_ground)  # (SIZE, SIZE), in grey levels
        scores.append(float((distance < 40).mean()))
    return scores


# -------------------------------------------------------------------------------------------------
# The command line


@dataclass
class Config:
    """Writes pictures of the SFT data, without their prompts and chains."""

    folder: str  # folder to write them to
    count: int = 2000  # how many
    seed: int = 0  # of the scenes


def main(argv: list[str] | None = None) -> None:
    from engine import run  # here, so that this file needs render_boxes.py only

    config = run.parse_args(Config, Config.__doc__, argv)
    run.check_ranges(config, at_least_one="count", not_negative="seed")
    rng = np.random.default_rng([config.seed, 5])  # not the scenes of the shipped checkpoint
    folder = Path(config.folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for k in range(config.count):
            make_example(rng).image.save(folder / f"{k:06d}.png")
    except OSError as problem:
        run.fail(f"cannot write pictures to {folder}: {problem}")
    print(f"wrote {config.count} pictures to {folder}")


if __name__ == "__main__":
    main()
