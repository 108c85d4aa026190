"""Contact sheets of prompts, plans and pictures, and a GIF of several of them.

A row of a sheet is a dict with `prompt` and `image` (PIL, or the path of a file). What else it has
decides what is drawn:

    note     a grey line under the prompt
    chain    the plan, on a blank canvas, stands in front of the picture
    boxes    what is drawn into the picture; without it, the boxes of `chain`
    found    one more copy of the picture, with the boxes that a judge found
    score    the frame is green above 0.5, else red; below it stand the score and the `reason`

Boxes are `Box`, or lists (name, x1, y1, x2, y2), on the 0..1000 grid. All rows of a sheet have the
same keys.
"""

import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from render_boxes import Box, draw_boxes, parse_chain

MARGIN = 12  # pixels between the cells of a sheet
RIGHT = "#23862c"
WRONG = "#d62839"
MOST_FRAMES = 40  # of a GIF


def draw_sheet(
    rows: list[dict],
    path: Path,
    columns: int = 3,
    side: int = 224,
    title: str = "",
    text_size: int = 13,
) -> None:
    """Draws rows into one picture file, `columns` of them beside each other. Sizes in pixels:
    `side` of each square panel, `text_size` of the letters."""
    cells = [draw_cell(row, side, text_size) for row in rows]
    width, height = cells[0].size
    columns = min(columns, len(cells))
    lines = -(-len(cells) // columns)  # rounded up
    top = MARGIN
    if title:
        top += 2 * text_size
    size = (
        MARGIN + columns * (width + MARGIN),
        top + lines * (height + MARGIN),
    )
    sheet = Image.new("RGB", size, "white")
    if title:
        font = ImageFont.load_default(size=text_size + 3)
        ImageDraw.Draw(sheet).text((MARGIN, MARGIN), title, "black", font)
    for k, cell in enumerate(cells):
        x = MARGIN + k % columns * (width + MARGIN)
        y = top + k // columns * (height + MARGIN)
        sheet.paste(cell, (x, y))
    sheet.save(path)


def draw_cell(row: dict, side: int, text_size: int) -> Image.Image:
    """One row: the prompt, the panels beside each other, and of a scored one the verdict."""
    font = ImageFont.load_default(size=text_size)
    line = round(1.4 * text_size)  # from one line of text to the next
    panels = draw_panels(row, side)
    width = side * len(panels)
    letters = 2 * width // text_size  # per line: a letter is about half as wide as it is high
    head = 2 * line + 6
    foot = 3 * line + 4 if "score" in row else 0
    cell = Image.new("RGB", (width, head + side + foot), "white")
    pen = ImageDraw.Draw(cell)

    note = row.get("note", "")
    prompt = shortened(row["prompt"], letters, most_lines=1 if note else 2)
    pen.text((0, 0), prompt, "black", font)
    pen.text((0, line), note, "gray", font)
    for k, panel in enumerate(panels):
        cell.paste(panel, (k * side, head))
    color = "lightgray"
    if "score" in row:
        color = RIGHT if row["score"] > 0.5 else WRONG
        verdict = f"{row['score']:.2f}  {row['reason'] or 'right'}"
        pen.text((0, head + side + 4), shortened(verdict, letters, most_lines=3), color, font)
    frame = (0, head, width - 1, head + side - 1)
    pen.rectangle(frame, outline=color, width=2 if "score" in row else 1)
    return cell


def draw_panels(row: dict, side: int) -> list[Image.Image]:
    """The squares of one row: its plan, its picture, and what a judge found in the picture."""
    image = row["image"]
    if not isinstance(image, Image.Image):
        image = ImageOps.exif_transpose(Image.open(image))
    # a small picture is enlarged without blurring its pixels
    filter = Image.Resampling.NEAREST if image.width < side else None
    picture = image.convert("RGB").resize((side, side), filter)

    panels = []
    planned = []
    if "chain" in row:
        planned = parse_chain(row["chain"])
        panels.append(draw_boxes(planned, size=side))
    boxes = [Box(*box) for box in row.get("boxes", planned)]
    panels.append(draw_boxes(boxes, image=picture))
    if "found" in row:
        panels.append(draw_boxes(row["found"], image=picture))
    return panels


def shortened(text: str, letters: int, most_lines: int) -> str:
    """At most `most_lines` lines of so many letters."""
    lines = textwrap.wrap(text, letters)
    if len(lines) > most_lines:
        last = lines[most_lines - 1]
        lines = [*lines[: most_lines - 1], last[: letters - 3] + "..."]
    return "\n".join(lines)


def right_and_wrong(rows: list[dict], count: int = 4) -> list[dict]:
    """`count` right and `count` wrong rows, evenly from the run.

    Where scores are shades, not only 0 and 1: the best and the worst."""
    if not {row["score"] for row in rows} <= {0.0, 1.0}:
        ordered = sorted(rows, key=lambda row: -row["score"])
        return ordered[:count] + ordered[count:][-count:]
    chosen = []
    for wanted in (1.0, 0.0):
        some = [row for row in rows if row["score"] == wanted]
        if len(some) > count:
            some = [some[k * len(some) // count] for k in range(count)]
        chosen += some
    return chosen


def join_frames(paths: list[Path], target: Path, seconds: float = 0.6) -> None:
    """A GIF of picture files, which plays forever and stays on the last one for a while. At most
    MOST_FRAMES, evenly from the run, so that the file stays small."""
    if len(paths) > MOST_FRAMES:
        chosen = np.linspace(0, len(paths) - 1, MOST_FRAMES).round().astype(int)
        paths = [paths[k] for k in chosen]
    frames = []
    for path in paths:
        with Image.open(path) as frame:
            frames.append(frame.quantize(64))
    milliseconds = [round(1000 * seconds)] * len(frames)
    milliseconds[-1] *= 4
    frames[0].save(target, save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)
