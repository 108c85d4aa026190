"""Chain text to boxes to picture, and back. Needs PIL only: copy this file anywhere.

A chain names each object and gives the top left and bottom right corner of its box, in integers 0..999 of the picture's
width and height, origin top left: `A <|obj_start|>red ball<|obj_end|> <|box_start|>(125,250),(375,500)<|box_end|> …`
What a model wrote is read leniently (parse_chain keeps what is sound), what a person wrote strictly (chain_problems).
To see a chain: `python render_boxes.py chain.txt out.png`
"""

import argparse
import re
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

MARKERS = OBJ_START, OBJ_END, BOX_START, BOX_END = (
    "<|obj_start|>",
    "<|obj_end|>",
    "<|box_start|>",
    "<|box_end|>",
)
WRITTEN = f"{OBJ_START}%s{OBJ_END} {BOX_START}(%s,%s),(%s,%s){BOX_END}"
EXAMPLE = WRITTEN % ("name", "x1", "y1", "x2", "y2")
# A chain is a row of objects' names, boxes, markers without their partner, and the text between. These expressions take
# linear time on any input: no quantifier repeats another one, or stands beside one for the same characters.
TEXT = r"(?:(?!<\|(?:obj|box)_(?:start|end)\|>)[\s\S])"
SEGMENT = re.compile(
    rf"(?:<\|obj_start\|>(?P<object>{TEXT}*)<\|obj_end\|>|<\|box_start\|>(?P<box>{TEXT}*)<\|box_end\|>"
    rf"|(?P<marker><\|(?:obj|box)_(?:start|end)\|>)|(?P<text>{TEXT}+))\s*"
)
POINTS = re.compile(
    r"\s*\(\s*([0-9]{1,4})\s*,\s*([0-9]{1,4})\s*\)\s*,\s*\(\s*([0-9]{1,4})\s*,\s*([0-9]{1,4})\s*\)\s*"
)
# Torn boxes: coordinates after a lone start marker or before a lone end marker, "(12," anywhere; and cut markers.
REMAINS = re.compile(
    r"<\|box_start\|>[\s0-9(),.-]*|[\s0-9(),.-]{0,24}<\|box_end\|>|\([\s0-9.-]*,[\s0-9(),.-]*"
    r"|<?\|?(?:obj|box)_\w{0,5}\|?>?|<\|\w{0,9}|\|>"
)
COLOURS = "#d62839 #1f6fd6 #23862c #d9730d #8a3fc7 #0e8a9c #d63fa4 #7a4a3c #8f7a00 #16307a #6b7280 #3d9a6a".split()


class Box(NamedTuple):
    name: str
    x1: float  # left, top, right and bottom edge on the 0..1000 grid of width and height
    y1: float
    x2: float
    y2: float


def parse_chain(text: str) -> list[Box]:
    """The sound boxes of a chain, in order; torn, empty and outlying ones are left out. Never raises."""
    boxes, name = [], ""
    for found in SEGMENT.finditer(text):
        if found.lastgroup != "box":  # after text or a stray marker the next box is nobody's
            name = " ".join((found["object"] or "").split())
        elif name and (points := POINTS.fullmatch(found["box"])):
            x1, y1, x2, y2 = map(int, points.groups())
            if x1 < x2 <= 1000 and y1 < y2 <= 1000:
                boxes.append(Box(name, x1, y1, x2, y2))
    return boxes


def chain_problems(text: str) -> list[str]:
    """What is wrong with a chain that a person wrote, one sentence for each fault; an empty list when nothing is."""
    row, problems = list(SEGMENT.finditer(text)), []
    kinds = [
        "text",
        *(found.lastgroup for found in row),
        "text",
    ]  # kinds[n] comes before row[n], kinds[n + 2] after
    for n, found in enumerate(row):
        content = " ".join(found[found.lastgroup].split())
        points = POINTS.fullmatch(content)
        x1, y1, x2, y2 = map(int, points.groups()) if points else (0, 0, 1, 1)
        faults = (
            ("marker", True, f"has no partner: write {EXAMPLE}"),
            ("object", not content, "has no name: write one between its markers"),
            ("object", kinds[n + 2] in ("object", "text"), f"has no box: write {EXAMPLE}"),
            ("box", kinds[n] == "text", f"follows no object: write {EXAMPLE}"),
            (
                "box",
                not points,
                "cannot be read: write (x1,y1),(x2,y2) in whole numbers from 0 to 999",
            ),
            (
                "box",
                max(x1, y1, x2, y2) > 999,
                "leaves the picture: width and height run from 0 to 999",
            ),
            (
                "box",
                x2 <= x1 or y2 <= y1,
                "ends before it starts: x2 must be more than x1, and y2 more than y1",
            ),
        )
        problems += [
            f'The {kind} "{content[:40]}" at character {found.start() + 1} {why}.'
            for kind, wrong, why in faults
            if kind == found.lastgroup and wrong
        ]
    return (
        problems
        if problems or "object" in kinds
        else [f"The chain names no object: write {EXAMPLE}."]
    )


def strip_boxes(text: str) -> str:
    """The words of a chain without boxes and markers, torn ones included: what a language judge reads."""
    text = SEGMENT.sub(
        lambda found: (found["object"] or found["marker"] or found["text"] or "") + " ", text
    )
    return re.sub(r" (?=[,.;:!?])", "", " ".join(REMAINS.sub(" ", text).split()))


def format_chain(parts: list[str | Box]) -> str:
    """["A", Box("red ball", 125, 250, 375, 500)] gives the chain at the top of this file."""
    return " ".join(
        part
        if isinstance(part, str)
        else WRITTEN % (part.name, *(min(max(round(edge), 0), 999) for edge in part[1:]))
        for part in parts
    )


def iou(a: Box, b: Box) -> float:
    """Shared area over joint area: 1 for equal boxes, 0 for boxes apart."""
    shared = max(0, min(a.x2, b.x2) - max(a.x1, b.x1)) * max(0, min(a.y2, b.y2) - max(a.y1, b.y1))
    return (
        shared / ((a.x2 - a.x1) * (a.y2 - a.y1) + (b.x2 - b.x1) * (b.y2 - b.y1) - shared)
        if shared
        else 0.0
    )


def place_labels(boxes, size, shrink=1.0):
    """Where the names go, in pixels: (labels, font). A label is a box on the canvas, clear of the other labels: of the
    places where it leans on the canvas's edge, its object or what is in the way, the free one nearest its corner.
    """
    font, labels = ImageFont.load_default(max(6, shrink * max(11, min(size) / 28))), []
    for box in boxes:
        text = " ".join(box.name.split())[:200] or "?"
        while len(text) > 1 and font.getlength(text) > size[0] * shrink - 6:
            text = text[:-2] + "…"
        w, h = (
            min(round(font.getlength(text)) + 6, size[0]),
            min(sum(font.getmetrics()) + 2, size[1]),
        )
        small = [
            b for b in boxes if (b.x2 - b.x1) * (b.y2 - b.y1) < 2 * w * h
        ]  # a label could hide these
        taken = sorted(
            labels + small * (shrink > 0.5), key=lambda b: abs(b.x1 - box.x1) + abs(b.y1 - box.y1)
        )
        edges = [
            *taken[:20],
            box,
            Box("its corner", *box[1:3], *box[1:3]),
            Box("canvas, inside out", *size, 0, 0),
        ]
        xs = {x for edge in edges for x in (edge.x1 - w, edge.x2) if 0 <= x <= size[0] - w}
        ys = {y for edge in edges for y in (edge.y1 - h, edge.y2) if 0 <= y <= size[1] - h}
        spots = sorted((abs(x - box.x1) + abs(y - box.y1), x, y) for x in xs for y in ys)
        places = [Box(text, x, y, x + w, y + h) for _, x, y in spots]
        free = next(
            (place for place in places if not any(iou(place, other) for other in taken)), None
        )
        if not free and shrink > 0.5:  # crowded: again with smaller letters and shorter names
            return place_labels(boxes, size, shrink - 0.2)
        labels.append(free or places[0])
    return labels, font


def draw_boxes(boxes, size=448, image=None) -> Image.Image:
    """The boxes with their names on a white square of `size` pixels, or on a copy of `image` in its own size."""
    canvas = Image.new("RGB", (size, size), "white") if image is None else image.convert("RGB")
    edges = [
        [int(edge * side / 1000) for edge, side in zip(box[1:], canvas.size * 2, strict=True)]
        for box in boxes
    ]
    boxes = [
        Box(
            box.name, x1, y1, max(x2, x1 + 3), max(y2, y1 + 3)
        )  # 3 pixels at least, or nobody sees it
        for box, (x1, y1, x2, y2) in zip(boxes, edges, strict=True)
    ]
    for k, (_, x1, y1, x2, y2) in enumerate(boxes):
        ImageDraw.Draw(canvas).rectangle(
            (x1, y1, x2 - 1, y2 - 1), None, COLOURS[k % 12], canvas.width // 150 + 1
        )
    labels, font = place_labels(boxes, canvas.size)
    for k, (text, x1, y1, x2, y2) in enumerate(labels):
        label = Image.new(
            "RGB", (x2 - x1, y2 - y1), COLOURS[k % 12]
        )  # apart, so that no letter sticks out
        ImageDraw.Draw(label).text((3, 1), text, "white", font)
        canvas.paste(label, (x1, y1))
    return canvas


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("chain", help="text file that holds a chain; - reads standard input")
    parser.add_argument("out", nargs="?", default="boxes.png", help="picture to write (boxes.png)")
    parser.add_argument(
        "--size", type=int, default=448, help="side of the blank canvas, 64 to 4096 pixels (448)"
    )
    parser.add_argument(
        "--image", help="draw over this picture, in its own size, instead of on a blank canvas"
    )
    parser.error = lambda message: parser.exit(
        2, f"render_boxes.py: {message}\n"
    )  # one line, without the usage
    args = parser.parse_args()
    try:
        with open(0 if args.chain == "-" else args.chain, encoding="utf-8") as file:
            text = file.read()
        if problems := chain_problems(text) + ["--size is 64 to 4096 pixels."] * (
            not 64 <= args.size <= 4096
        ):
            raise ValueError(" ".join(problems))
        draw_boxes(
            parse_chain(text), args.size, Image.open(args.image) if args.image else None
        ).save(args.out)
    except (OSError, ValueError) as error:
        parser.error(f"cannot draw {args.chain} to {args.out}: {error}")
    print(f"wrote {args.out}: {', '.join(box.name for box in parse_chain(text))}")


if __name__ == "__main__":
    main()
