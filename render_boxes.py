"""From the text of a chain to its boxes and a drawing of them, and back. Only the command line
needs more than PIL: copy this file anywhere.

A chain names each object and gives the top left and the bottom right corner of its box, in whole
numbers 0..999 of the picture's width and height, origin top left:

    A <|obj_start|>red ball<|obj_end|> <|box_start|>(125,250),(375,500)<|box_end|> on grass.

A model's chain is read leniently: `parse_chain` leaves out what is not valid. A person's chain is
read strictly: `chain_problems` lists what is not valid. To draw a chain:

    python render_boxes.py chain.txt --out boxes.png
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

OBJ_START = "<|obj_start|>"
OBJ_END = "<|obj_end|>"
BOX_START = "<|box_start|>"
BOX_END = "<|box_end|>"
# In the order in which the official processor adds them to a tokenizer that lacks them
# (gogoduan/GoT-R1, src/processor/processor.py), so that they get the ids that released weights have
MARKERS = (BOX_START, BOX_END, OBJ_START, OBJ_END)
EXAMPLE = f"{OBJ_START}name{OBJ_END} {BOX_START}(x1,y1),(x2,y2){BOX_END}"

# A chain is a sequence of segments: names of objects, boxes, markers without their partner, and the
# text between. The expressions take linear time on any input: no quantifier stands inside another
# one, or beside one that takes the same characters.
MARKER = r"<\|(?:obj|box)_(?:start|end)\|>"
TEXT = rf"(?:(?!{MARKER})[\s\S])"  # one character that does not begin a marker
SEGMENT = re.compile(
    rf"(?:<\|obj_start\|>(?P<object>{TEXT}*)<\|obj_end\|>"
    rf"|<\|box_start\|>(?P<box>{TEXT}*)<\|box_end\|>"
    rf"|(?P<marker>{MARKER})"
    rf"|(?P<text>{TEXT}+))\s*"
)
NUMBER = r"\s*([0-9]{1,4})\s*"
POINTS = re.compile(rf"\s*\({NUMBER},{NUMBER}\)\s*,\s*\({NUMBER},{NUMBER}\)\s*")
REMAINS = re.compile(  # what is left of a box that was torn
    r"<\|box_start\|>[\s0-9(),.-]*"  # coordinates after a lone start marker
    r"|[\s0-9(),.-]{0,24}<\|box_end\|>"  # coordinates before a lone end marker
    r"|\([\s0-9.-]*,[\s0-9(),.-]*"  # "(12," anywhere
    r"|<?\|?(?:obj|box)_\w{0,5}\|?>?|<\|\w{0,9}|\|>"  # cut markers
)

COLOURS = (
    "#d62839 #1f6fd6 #23862c #d9730d #8a3fc7 #0e8a9c "
    "#d63fa4 #7a4a3c #8f7a00 #16307a #6b7280 #3d9a6a"
).split()


class Box(NamedTuple):
    name: str
    x1: float  # left, top, right and bottom edge on the 0..1000 grid of width and height
    y1: float
    x2: float
    y2: float


# -------------------------------------------------------------------------------------------------
# Reading


def parse_chain(text: str) -> list[Box]:
    """The valid boxes of a chain, in order: those with a name and an area, inside the picture.
    Never raises, whatever the text is."""
    boxes = []
    name = ""
    for segment in SEGMENT.finditer(text):
        if segment.lastgroup != "box":
            # Text or a stray marker clears the name: a box that comes next belongs to no object.
            name = " ".join((segment["object"] or "").split())
            continue
        points = POINTS.fullmatch(segment["box"])
        if name and points:
            x1, y1, x2, y2 = map(int, points.groups())
            if x1 < x2 <= 1000 and y1 < y2 <= 1000:
                boxes.append(Box(name, x1, y1, x2, y2))
    return boxes


def chain_problems(text: str) -> list[str]:
    """What is wrong with a chain, one sentence per fault; [] if it is valid."""
    segments = list(SEGMENT.finditer(text))
    kinds = [segment.lastgroup for segment in segments]
    problems = []
    for k, segment in enumerate(segments):
        kind = kinds[k]
        content = " ".join(segment[kind].split())
        before = kinds[k - 1] if k > 0 else "text"
        after = kinds[k + 1] if k + 1 < len(kinds) else "text"
        where = f'The {kind} "{content[:40]}" at character {segment.start() + 1}'
        for fault in segment_faults(kind, content, before, after):
            problems.append(f"{where} {fault}.")
    if not problems and "object" not in kinds:
        problems.append(f"The chain names no object: write {EXAMPLE}.")
    return problems


def segment_faults(kind: str, content: str, before: str, after: str) -> list[str]:
    """What is wrong with one segment that stands between segments of kinds `before` and `after`."""
    faults = []
    if kind == "marker":
        faults.append(f"has no partner: write {EXAMPLE}")
    if kind == "object" and not content:
        faults.append("has no name: write one between its markers")
    if kind == "object" and after in ("object", "text"):
        faults.append(f"has no box: write {EXAMPLE}")
    if kind == "box" and before == "text":
        faults.append(f"follows no object: write {EXAMPLE}")
    if kind == "box":
        faults += coordinate_faults(content)
    return faults


def coordinate_faults(content: str) -> list[str]:
    """What is wrong between the markers of a box."""
    points = POINTS.fullmatch(content)
    if not points:
        return ["cannot be read: write (x1,y1),(x2,y2) in whole numbers from 0 to 999"]
    x1, y1, x2, y2 = map(int, points.groups())
    faults = []
    if max(x1, y1, x2, y2) > 999:
        faults.append("leaves the picture: width and height run from 0 to 999")
    if x2 <= x1 or y2 <= y1:
        faults.append("ends before it starts: x2 must be more than x1, and y2 more than y1")
    return faults


def strip_boxes(text: str) -> str:
    """The text of a chain without boxes and markers, and without what is left of torn ones."""

    def without_box(segment: re.Match) -> str:
        # REMAINS removes lone markers later, together with the coordinates beside them
        return (segment["object"] or segment["marker"] or segment["text"] or "") + " "

    words = REMAINS.sub(" ", SEGMENT.sub(without_box, text)).split()
    return re.sub(r" (?=[,.;:!?])", "", " ".join(words))


# -------------------------------------------------------------------------------------------------
# Writing


def format_box(x1: int, y1: int, x2: int, y2: int) -> str:
    return f"{BOX_START}({x1},{y1}),({x2},{y2}){BOX_END}"


def format_chain(parts: list[str | Box]) -> str:
    """["A", Box("red ball", 125, 250, 375, 500), "on grass."] gives the chain shown at the top."""
    written = []
    for part in parts:
        if isinstance(part, Box):
            corners = [min(max(round(edge), 0), 999) for edge in part[1:]]
            part = f"{OBJ_START}{part.name}{OBJ_END} {format_box(*corners)}"
        written.append(part)
    return " ".join(written)


# -------------------------------------------------------------------------------------------------
# Overlap


def iou(a: Box, b: Box) -> float:
    """Shared area over joint area: 1 for equal boxes, 0 for boxes apart."""
    width = max(0, min(a.x2, b.x2) - max(a.x1, b.x1))
    height = max(0, min(a.y2, b.y2) - max(a.y1, b.y1))
    shared = width * height
    if not shared:  # also for boxes without area, where the division would be 0 / 0
        return 0.0
    area_a = (a.x2 - a.x1) * (a.y2 - a.y1)
    area_b = (b.x2 - b.x1) * (b.y2 - b.y1)
    return shared / (area_a + area_b - shared)


# -------------------------------------------------------------------------------------------------
# Drawing

LABEL_SCALES = (1.0, 0.8, 0.6, 0.4)  # of the letters and of the longest name; tried in this order


def draw_boxes(boxes, size=448, image=None, colours=COLOURS) -> Image.Image:
    """Draws boxes (on the 0..1000 grid) with their names on a white square of `size` pixels, or on
    a copy of `image` in its own size. Box k has colour k, and the colours repeat."""
    canvas = Image.new("RGB", (size, size), "white") if image is None else image.convert("RGB")
    boxes = in_pixels(boxes, canvas.size)
    pen = ImageDraw.Draw(canvas)
    line_width = canvas.width // 150 + 1
    for k, box in enumerate(boxes):
        outline = (box.x1, box.y1, box.x2 - 1, box.y2 - 1)  # PIL includes the last pixel
        pen.rectangle(outline, outline=colours[k % len(colours)], width=line_width)
    labels, font = place_labels(boxes, canvas.size)
    for k, label in enumerate(labels):
        # drawn on a tile first, so that no letter sticks out of its label
        tile_size = (label.x2 - label.x1, label.y2 - label.y1)
        tile = Image.new("RGB", tile_size, colours[k % len(colours)])
        ImageDraw.Draw(tile).text((3, 1), label.name, "white", font)
        canvas.paste(tile, (label.x1, label.y1))
    return canvas


def in_pixels(boxes, size: tuple[int, int]) -> list[Box]:
    """Boxes on the 0..1000 grid -> boxes in pixels of a canvas of this (width, height), at least 3
    pixels wide and high, so that one can see them."""
    width, height = size
    placed = []
    for box in boxes:
        x1 = int(box.x1 * width / 1000)
        y1 = int(box.y1 * height / 1000)
        x2 = int(box.x2 * width / 1000)
        y2 = int(box.y2 * height / 1000)
        placed.append(Box(box.name, x1, y1, max(x2, x1 + 3), max(y2, y1 + 3)))
    return placed


def place_labels(boxes: list[Box], size: tuple[int, int]):
    """Where to write the names: (labels, font), all in pixels from here on. A label is a Box; its
    name is the text to write.

    A label covers no other label and no small box. If there is no room for that, letters shrink and
    names are cut shorter. At the last scale labels may cover small boxes and, if there is no room
    at all, each other."""
    for scale in LABEL_SCALES:
        font = ImageFont.load_default(max(6, scale * max(11, min(size) / 28)))
        last_resort = scale == LABEL_SCALES[-1]
        labels = []
        for box in boxes:
            label = label_at_corner(box, font, longest=scale * size[0] - 6, size=size)
            taken = list(labels)
            if not last_resort:
                taken += small_boxes(boxes, label)
            spots = candidate_spots(label, box, taken, size)
            spot = first_free(spots, taken)
            if spot is None and not last_resort:
                break  # try the next scale
            labels.append(spot or spots[0])
        if len(labels) == len(boxes):
            return labels, font


def label_at_corner(box: Box, font, longest: float, size: tuple[int, int]) -> Box:
    """A label at the top left corner of a box: its name, cut to `longest` pixels, and a margin."""
    text = " ".join(box.name.split())[:200] or "?"
    while len(text) > 1 and font.getlength(text) > longest:
        text = text[:-2] + "…"
    width = min(round(font.getlength(text)) + 6, size[0])
    height = min(sum(font.getmetrics()) + 2, size[1])  # ascent and descent
    return Box(text, box.x1, box.y1, box.x1 + width, box.y1 + height)


def small_boxes(boxes: list[Box], label: Box) -> list[Box]:
    """The boxes that the label could hide: those with less than twice its area."""
    label_area = (label.x2 - label.x1) * (label.y2 - label.y1)
    return [box for box in boxes if (box.x2 - box.x1) * (box.y2 - box.y1) < 2 * label_area]


def candidate_spots(label: Box, box: Box, taken: list[Box], size: tuple[int, int]) -> list[Box]:
    """The places to try for a label, nearest to the top left corner of its box first.

    The nearest free place is one where the label touches something: an edge of the canvas, its box,
    or another label or box in the way. So only their edges need to be tried."""

    def distance(x: float, y: float) -> float:
        return abs(x - box.x1) + abs(y - box.y1)

    width = label.x2 - label.x1
    height = label.y2 - label.y1
    most_x = size[0] - width
    most_y = size[1] - height
    in_the_way = sorted(taken, key=lambda other: distance(other.x1, other.y1))
    xs = {0, most_x, box.x1}
    ys = {0, most_y, box.y1}
    for other in [box, *in_the_way[:20]]:  # the 20 nearest are enough, and bound the time
        xs |= {other.x1 - width, other.x2}  # the label to the left of it, to the right of it
        ys |= {other.y1 - height, other.y2}  # above it, below it
    places = []
    for x in xs:
        for y in ys:
            if 0 <= x <= most_x and 0 <= y <= most_y:
                places.append((distance(x, y), x, y))
    return [Box(label.name, x, y, x + width, y + height) for _, x, y in sorted(places)]


def first_free(spots: list[Box], taken: list[Box]) -> Box | None:
    """The first spot that overlaps nothing in `taken`."""
    for spot in spots:
        if not any(iou(spot, other) for other in taken):
            return spot
    return None


# -------------------------------------------------------------------------------------------------
# The command line


@dataclass
class Config:
    chain: str  # text file with a chain; - is standard input
    out: str = "boxes.png"  # picture to write
    size: int = 448  # side of the blank canvas, 64 to 4096 pixels
    image: str = ""  # picture to draw on, in its own size, instead of a blank canvas


def main(argv: list[str] | None = None) -> None:
    from engine import run  # not at the top: this file can be copied alone

    config = run.parse_args(Config, __doc__, argv)
    try:
        with open(0 if config.chain == "-" else config.chain, encoding="utf-8") as file:
            text = file.read()
        problems = chain_problems(text)
        if not 64 <= config.size <= 4096:
            problems.append("--size is 64 to 4096 pixels.")
        if problems:
            raise ValueError(" ".join(problems))
        boxes = parse_chain(text)
        image = Image.open(config.image) if config.image else None
        draw_boxes(boxes, config.size, image).save(config.out)
    except (OSError, ValueError) as error:
        run.fail(f"cannot draw {config.chain} to {config.out}: {error}")
    print(f"wrote {config.out}: {', '.join(box.name for box in boxes)}")


if __name__ == "__main__":
    main()
