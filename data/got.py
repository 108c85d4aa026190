"""GoT data as it is published, or twenty pictures of your own -> prompt, chain and picture.

Rows come through the `datasets` library, streamed or not, from the hub or a folder: parquet, JSON
lines beside a folder of images, or webdataset tars. Annotations come in two styles, and both become
chains as render_boxes.py writes them:

    boxes inline    a small red ball (125,250),(375,500) on ...   with markers or without
    placeholders    a small red ball <box_1> on ...   beside {"<box_1>": [125, 250, 375, 500]}

A box directly follows the name of its object. A name without markers is found by rule: the words
before the box, six at most, back to the first punctuation mark, bracket or word of BREAKS. What the
coordinates count (`box_format`) must be given; it is never guessed. A record that cannot be used
raises BadRecord with one of a few causes.

To lift: this file and render_boxes.py, with PIL and `datasets`.

    source = Source("pictures.jsonl", box_format="pixels")
    for index, row in numbered(open_rows(source), source):
        prompt, chain, image = read_record(row, source)
"""

import io
import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image, ImageOps

from render_boxes import TEXT, Box, chain_problems, format_box, format_chain

READERS = {  # suffix of the files -> name of their reader in `datasets`
    ".parquet": "parquet",
    ".jsonl": "json",
    ".json": "json",
    ".tar": "webdataset",
}
END_OF_CHAIN = "<begin_of_image>"  # the token that ends a chain; some annotations write it out

# No name goes on to the left of these words. "of" is part of a name, but not behind a place.
BREAK_WORDS = (
    "a an the this that these those its his her their my your our each every some any no all both "
    "in on at with by from to into onto over under above below behind beside near next between "
    "among against across along around through inside outside within beyond past for as like up "
    "down off out and or but while where which who there is are was were be been has have having "
    "features featuring shows showing depicts depicting includes including contains containing "
    "holds holding wears wearing carries carrying sits sitting stands standing lies lying rides "
    "riding"
).split()
PLACES = r"(?:top|bottom|front|back|left|right|middle|cent(?:er|re)|sides?|edge|corner)"
BULLET = "[-*•–—]+"
BREAKS = "|".join([*BREAK_WORDS, rf"{PLACES}\s+of", BULLET])

# The expressions take linear time on any text: no quantifier repeats another one, or stands beside
# one for the same characters.
NUMBER = r"[+-]?[0-9]+(?:\.[0-9]*)?(?:[eE]-?[0-9]{1,3})?"
PAIR = rf"\s{{0,3}}({NUMBER})\s{{0,3}},\s{{0,3}}({NUMBER})\s{{0,3}}"
BOX = re.compile(  # (x1,y1),(x2,y2) or [x1, y1, x2, y2], with markers or without
    rf"(?:<\|box_start\|>\s*)?[(\[]{{1,3}}{PAIR}"
    rf"[)\]]?\s{{0,3}},\s{{0,3}}[(\[]?"
    rf"{PAIR}[)\]]{{1,3}}(?:\s*<\|box_end\|>)?"
)
TORN = re.compile(rf"[(\[]{PAIR}(?:[)\],]|\Z)")  # coordinates that no box has taken
# A box in another notation would stay among the words. Words may hold four numbers, too ("at 10:30
# on 12/25", "number 12, 14, 16, 18"): only those in brackets, behind a tag, in pairs without spaces
# or behind the name of an edge are a box. Possessive (++): linear time in a long row of digits.
COUNT = r"\d++(?:\.\d++)?+"
OTHER_NOTATION = re.compile(
    rf"[(\[{{<>（［｛＜]\s?{COUNT}(?:[^\w:/]{{1,5}}{COUNT}){{3}}"  # [10 20 30 40], <b>10,20,30,40
    rf"|(?<![\d.]){COUNT},{COUNT}\s?[,-]\s?{COUNT},{COUNT}"  # 10,20,30,40 or 10,20 - 30,40
    r"|\b[xy]_?(?:[12]|min|max)\b\W{1,4}\d"  # (x1=10, y1=20, …
)
OBJECT = rf"<\|obj_start\|>({TEXT}*)<\|obj_end\|>"
MARKED_NAME = re.compile(rf"{OBJECT}[\s:,]*\Z")
WORD = rf"(?!(?:{BREAKS})(?!\S))[^\s.,;:!?()\[\]>]+"
PLAIN_NAME = re.compile(
    r"(?<![^\s.,;:!?()\[\]>])(?!of\s)"  # begins at the beginning of a word
    rf"((?:{WORD}\s+){{0,5}}{WORD}(?<=[\w\"'”’]))[\s:,]*\Z",
    re.I,
)


@dataclass
class Source:
    data: str = ""  # owner/name[:config] on the hub; or a folder or file: .parquet, .jsonl, .tar
    split: str = "train"  # of a hub id
    streaming: bool = False  # read records as they come; else `datasets` first makes a copy
    prompt_field: str = "prompt"  # what the user asks for; json.prompt looks into the JSON of a tar
    chain_field: str = "chain"  # the annotation, with its boxes or with placeholders
    image_field: str = "image"  # the picture, or its path
    image_folder: str = ""  # where image paths start; empty: the folder of the data
    follow_outside: bool = False  # read pictures whose path leaves that folder, too
    coords_field: str = ""  # dict or JSON, placeholder -> coordinates; empty: boxes in the chain
    box_format: Literal["", "0..999", "0..1", "pixels"] = ""  # what coordinates count; no default
    max_chain: int = 600  # tokens; longer chains are skipped (the official code samples up to 600)
    max_records: int = 0  # read only the first ones; 0: all


class BadRecord(Exception):
    """A record to skip: the cause, one of a few fixed words to count by, and its detail here."""

    def __init__(self, cause: str, detail: str):
        self.cause = cause
        self.detail = " ".join(detail.split())[:160]
        super().__init__(f"{cause}: {self.detail}")


# -------------------------------------------------------------------------------------------------
# Rows


def data_files(source: Source) -> list[str]:
    """The files of a local set; none for a hub id. Raises ValueError when it is neither."""
    path = Path(source.data).expanduser()
    if not path.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(:[\w.-]+)?", source.data):
        return []
    if path.is_file():
        files = [path]
    else:
        # In a folder, .json describes the set more often than it is the set.
        suffixes = READERS.keys() - {".json"}
        files = sorted(file for file in path.rglob("*") if file.suffix in suffixes)
    kinds = {file.suffix for file in files}
    if len(kinds) != 1 or not kinds <= READERS.keys():
        expected = "a hub id, or files of one kind: .parquet, .jsonl, .tar"
        raise ValueError(f"--data {source.data}: expected {expected}")
    return [str(file) for file in files]


def check_file(source: Source, file: Path) -> None:
    """Raises ValueError for a local file that is empty, or a tar that was cut off.

    A tar that ends between two members reads without an error: only the end mark is missing."""
    size = file.stat().st_size
    if size == 0:
        raise ValueError(f"--data {source.data}: {file.name} is empty (0 bytes)")
    if file.suffix == ".tar":
        with file.open("rb") as opened:
            opened.seek(-min(size, 1024), io.SEEK_END)
            if opened.read() != bytes(1024):
                cut = f"{file.name} is cut off: it lacks the end mark of a tar"
                raise ValueError(f"--data {source.data}: {cut}, fetch it again")


def open_rows(source: Source):
    """The raw rows, dicts with undecoded pictures: a Dataset, or an IterableDataset when streaming.

    Raises ValueError in one line: nothing there, not readable, cut off, empty, without one of the
    fields, or no box_format."""
    if not source.box_format:
        raise ValueError("say with --box_format what the coordinates count: 0..999, 0..1 or pixels")
    files = data_files(source)
    for file in files:
        check_file(source, Path(file))
    try:
        rows = load_rows(source, files)
        first = next(iter(rows), None)
    except Exception as problem:  # the readers raise errors of their own: pyarrow's, tarfile's, ...
        reason = problem.__cause__ or problem
        raise ValueError(f"cannot read --data {source.data}: {reason}"[:300]) from problem
    if first is None:
        raise ValueError(f"--data {source.data} holds no records")
    check_fields(first, source)
    return rows


def load_rows(source: Source, files: list[str]):
    """What `datasets` makes of the files, or of a hub id if there are none."""
    import datasets  # here: it takes a second to import, and the toy world does without

    if files:
        rows = datasets.load_dataset(
            path=READERS[Path(files[0]).suffix],
            data_files={source.split: files},
            split=source.split,
            streaming=source.streaming,
        )
    else:
        name, _, config = source.data.partition(":")
        rows = datasets.load_dataset(
            path=name,
            name=config or None,
            split=source.split,
            streaming=source.streaming,
        )
    for name, feature in (rows.features or {}).items():
        if isinstance(feature, datasets.Image):
            # `read_image` decodes: it counts broken pictures, and skipped rows cost nothing.
            rows = rows.cast_column(name, datasets.Image(decode=False))
    return rows


def check_fields(first: dict, source: Source) -> None:
    """Raises ValueError when the first row lacks a field that a flag names."""
    missing = object()  # not None, which a row may hold
    for flag in ("prompt_field", "chain_field", "image_field", "coords_field"):
        name = getattr(source, flag)
        if name and pick(first, name, default=missing) is missing:
            there = f"no such field in {source.data}, there are {', '.join(first)}"
            raise ValueError(f"--{flag} {name}: {there}")


def pick(row: dict, name: str, default=None):
    """A field of a row. `json.prompt` looks into the dict `json` if no field has the whole name."""
    if name in row:
        return row[name]
    outer, _, inner = name.partition(".")
    if isinstance(row.get(outer), dict):
        return row[outer].get(inner, default)
    return default


def numbered(rows, source: Source, start: int = 0, stop: int | None = None):
    """Yields (index, row) from `start` up to `stop`, or up to `max_records`.

    Of rows that have a length only these are read; of a stream also the ones before them."""
    if stop is None:
        stop = source.max_records or None
    if hasattr(rows, "__len__"):
        for index in range(len(rows))[start:stop]:
            yield index, rows[index]
        return
    index = start - 1
    try:
        for index, row in enumerate(itertools.islice(rows, start, stop), start):
            yield index, row
    except Exception as problem:  # as in open_rows
        message = f"cannot read --data {source.data} after record {index}: {problem}"
        raise ValueError(message[:300]) from problem


# -------------------------------------------------------------------------------------------------
# Boxes and chains


def read_coordinates(coords) -> dict[str, str]:
    """Placeholder -> its boxes, written as (x1,y1),(x2,y2).

    `coords` is a dict or its JSON; a value holds four numbers per box, in any nesting or as text.
    Raises BadRecord."""
    boxes = {}
    try:
        table = json.loads(coords) if isinstance(coords, str | bytes) else coords
        for key, value in table.items():
            text = value if isinstance(value, str) else json.dumps(value)
            numbers = re.findall(NUMBER, text)
            if len(numbers) % 4 or not re.fullmatch(r"[\s\d\[\](),.eE+-]+|null", text):
                raise ValueError(f"{text[:60]} is no box")
            if not key or not numbers:
                continue  # a column of dicts gives every row the keys of all rows, with null
            written = []
            for first in range(0, len(numbers), 4):
                written.append("({},{}),({},{})".format(*numbers[first : first + 4]))
            boxes[key] = " ".join(written)
    except (ValueError, AttributeError, TypeError, RecursionError) as problem:
        raise BadRecord("broken box", f"coordinates {str(coords)[:60]!r}: {problem}") from problem
    return boxes


def fill_placeholders(text: str, coords) -> str:
    """Puts the boxes of `coords` (see `read_coordinates`) into a text. Raises BadRecord."""
    boxes = read_coordinates(coords)
    for key in boxes:
        if key.strip().isdecimal():  # it would take the place of every number of the text
            raise BadRecord("placeholder", f"{key!r} is a bare number: write it as <box_{key}>")
    # Each placeholder is looked for with any number in it: box_1 is not a part of box_12, and a
    # box_12 that has no coordinates must not pass as a word.
    patterns = set()
    for key in boxes or ["no placeholder"]:
        patterns.add(re.sub("[0-9]+", "[0-9]+", re.escape(key)))
    placeholder = re.compile("|".join(sorted(patterns, key=len, reverse=True)))
    found = set(placeholder.findall(text))
    missing = found - boxes.keys()
    if missing:
        raise BadRecord("broken box", f"{min(missing)} has no coordinates")
    unused = boxes.keys() - found
    if unused:
        raise BadRecord("unused box", f"{min(unused)} has coordinates and is not in the text")
    return placeholder.sub(lambda found: boxes[found[0]], text)


def corners_to_grid(corners: list[float], box_format: str, size: tuple[int, int]) -> list[int]:
    """x1, y1, x2, y2 of a picture of `size` pixels, as `box_format` counts -> whole numbers 0..999.

    Raises BadRecord when the corners cannot be what `box_format` says."""
    width, height = {"0..999": (1000, 1000), "0..1": (1, 1), "pixels": size}[box_format]
    limits = (width, height, width, height)
    written = "({:g},{:g}),({:g},{:g})".format(*corners)
    for edge, limit in zip(corners, limits, strict=True):
        if not 0 <= edge <= limit:
            where = f"{box_format}, in a picture of {size[0]} x {size[1]} pixels"
            raise BadRecord("box outside", f"{written} is not in {where}")
    fractions = any(edge % 1 for edge in corners)
    too_small = max(corners) <= 1 < width  # shares of 1 where pixels or thousandths were promised
    if too_small or (fractions and box_format == "0..999"):
        raise BadRecord("box format", f"{written} does not look like {box_format}")
    grid = []
    for edge, limit in zip(corners, limits, strict=True):
        grid.append(min(round(1000 * edge / limit), 999))  # the last line is 999, not 1000
    x1, y1, x2, y2 = grid
    if x1 >= x2 or y1 >= y2:
        raise BadRecord("empty box", f"{written} ends before it starts")
    return grid


def normalize_chain(text: str, box_format: str, size: tuple[int, int] = (1, 1)) -> str:
    """An annotation with inline boxes -> a chain; a chain comes back as it is, but for any **.

    Boxes side by side belong to one name, and a name without a box loses its markers.
    Raises BadRecord."""
    text = text.replace("**", "")  # **emphasis** would come between a name and its box
    chain = ""
    end = 0  # of the box before
    for box in BOX.finditer(text):
        before = text[end : box.start()]
        end = box.end()
        corners = corners_to_grid([float(edge) for edge in box.groups()], box_format, size)
        if chain and not before.strip(" \n,;"):  # one more box of the same name
            chain += " " + format_box(*corners)
            continue
        name = MARKED_NAME.search(before) or PLAIN_NAME.search(before)
        if not name:
            raise BadRecord("no name", f"before {box[0]}: {before[-60:]!r}")
        chain += without_markers(before[: name.start()])
        chain += format_chain([Box(" ".join(name[1].split()), *corners)])
    if not chain:
        raise BadRecord("no box", repr(text[:60]))
    chain = (chain + without_markers(text[end:])).strip()
    words = BOX.split(chain)[:: 1 + BOX.groups]  # what stands between the boxes
    for text in words:
        torn = TORN.search(text)
        if torn:
            raise BadRecord("broken box", f"{torn[0]!r} is torn")
        other = OTHER_NOTATION.search(text)
        if other:
            raise BadRecord("other notation", f"{other[0]!r} looks like a box, and is not read")
    problems = chain_problems(chain)
    if problems:
        raise BadRecord("broken box", problems[0])
    return chain


def without_markers(text: str) -> str:
    return re.sub(OBJECT, r"\1", text)


# -------------------------------------------------------------------------------------------------
# One record


def read_words(row: dict, name: str) -> str:
    """The text of a field. Raises BadRecord when there is none."""
    value = pick(row, name)
    text = value.decode(errors="replace") if isinstance(value, bytes) else value
    if not isinstance(text, str) or not text.strip():
        raise BadRecord("no text", f"{name} is {str(value)[:60]!r}")
    # JSON can hold half a letter (a lone surrogate); files and tokenizers cannot.
    text = text.encode(errors="replace").decode()
    return text.strip().removesuffix(END_OF_CHAIN)


def read_prompt_and_chain(row: dict, source: Source, size: tuple[int, int]) -> tuple[str, str]:
    """(prompt, chain) of a row with a picture of `size` pixels. Raises BadRecord."""
    prompt = " ".join(read_words(row, source.prompt_field).split())
    chain = read_words(row, source.chain_field)
    if source.coords_field:
        chain = fill_placeholders(chain, pick(row, source.coords_field))
    return prompt, normalize_chain(chain, source.box_format, size)


def read_image(row: dict, source: Source, side: int = 0) -> tuple[Image.Image, tuple[int, int]]:
    """(picture, its own width and height) of a row. The picture becomes RGB, and `side` x `side`
    pixels if that is given. Raises BadRecord."""
    try:
        image = open_image(pick(row, source.image_field), source)
        image = ImageOps.exif_transpose(image)  # as people see it, and as they draw boxes on it
        if image.mode.startswith("I") or image.mode == "F":  # `convert` would clip it to white
            raise BadRecord("image depth", f"mode {image.mode}: save it with 8 bits per channel")
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        image = image.convert("RGB")
        size = image.size
        if side:
            image = image.resize((side, side), Image.Resampling.BICUBIC)
    except BadRecord:
        raise
    except Exception as problem:  # PIL's decoders raise a dozen kinds of error on broken files
        raise BadRecord("broken image", f"{type(problem).__name__}: {problem}") from problem
    return image, size


def written_path(value) -> str | None:
    """The path that an entry of the image field holds; None where it holds the picture itself."""
    if isinstance(value, dict):
        value = None if value.get("bytes") else value.get("path")
    return value if isinstance(value, str) else None


def image_path(value: str, source: Source) -> Path:
    """Where the picture with this path in its row lies.

    Raises BadRecord when the path leaves the folder that paths start from: data from elsewhere
    could otherwise name any file of this machine."""
    folder = Path(source.image_folder or source.data).expanduser()
    if folder.is_file():
        folder = folder.parent
    path = folder / value
    if not source.follow_outside and not path.resolve().is_relative_to(folder.resolve()):
        advice = "give --image_folder or --follow_outside"
        raise BadRecord("path outside", f"{advice}: {value} is not in {folder}")
    return path


def open_image(value, source: Source) -> Image.Image:
    """`value` is a PIL image, the bytes of a file, a path, or a dict of bytes and path."""
    path = written_path(value)
    if path is not None:
        return Image.open(image_path(path, source))
    if isinstance(value, dict):
        value = value.get("bytes")
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, bytes):
        return Image.open(io.BytesIO(value))
    raise ValueError(f"expected a picture, its bytes or its path, got {value!r:.40}")


def read_record(row: dict, source: Source) -> tuple[str, str, Image.Image]:
    """A raw row -> prompt, chain as render_boxes.py writes it, and picture. Raises BadRecord."""
    image, size = read_image(row, source)
    prompt, chain = read_prompt_and_chain(row, source, size)
    return prompt, chain, image
