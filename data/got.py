"""Published GoT data, or somebody's own twenty pictures: from a folder or a hub id to prompt, chain and picture.

Rows come through the `datasets` library: parquet, JSON lines beside a folder of images, or webdataset tars; streamed or
not. Annotations come in two styles, and both become the chain format of render_boxes.py:

    boxes inline    a small red ball (125,250),(375,500) on ...     with or without markers around name and box
    placeholders    a small red ball <box_1> on ...                 and {"<box_1>": [125, 250, 375, 500]} elsewhere

A box directly follows the name of its object. A name without markers is found by rule: the words before the box, six at
most, back to the first punctuation mark, bracket or word of BREAKS. What coordinates count (`box_format`) is told, not
guessed. A record that cannot be used raises BadRecord with one of a few causes; token_cache.py skips and counts it.
"""

import functools
import io
import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from PIL import Image, ImageOps

import gotr1
from render_boxes import OBJ_END, OBJ_START, TEXT, WRITTEN, chain_problems

READERS = {
    ".parquet": "parquet",
    ".jsonl": "json",
    ".json": "json",
    ".tar": "webdataset",
}  # names in `datasets`
BREAKS = (  # no name goes on to the left of these; "of" is part of a name, but not behind a place
    "a an the this that these those its his her their my your our each every some any no all both in on at with by "
    "from to into onto over under above below behind beside near next between among against across along around "
    "through inside outside within beyond past for as like up down off out and or but while where which who there is "
    "are was were be been has have having features featuring shows showing depicts depicting includes including "
    "contains containing holds holding wears wearing carries carrying sits sitting stands standing lies lying rides "
    "riding"
).replace(
    " ", "|"
) + r"|(?:top|bottom|front|back|left|right|middle|cent(?:er|re)|sides?|edge|corner)\s+of"

# Linear time on any text: no quantifier repeats another one, or stands beside one for the same characters
NUMBER = r"[+-]?[0-9]+(?:\.[0-9]*)?(?:[eE]-?[0-9]{1,3})?"
PAIR = rf"\s{{0,3}}({NUMBER})\s{{0,3}},\s{{0,3}}({NUMBER})\s{{0,3}}"
BOX = re.compile(  # (x1,y1),(x2,y2) or [x1, y1, x2, y2], with or without markers
    rf"(?:<\|box_start\|>\s*)?[(\[]{{1,3}}{PAIR}[)\]]?\s{{0,3}},\s{{0,3}}[(\[]?{PAIR}[)\]]{{1,3}}(?:\s*<\|box_end\|>)?"
)
TORN = re.compile(
    rf"[(\[]{PAIR}(?:[)\],]|\Z)"
)  # coordinates that are left when all boxes were read
OBJECT = rf"<\|obj_start\|>({TEXT}*)<\|obj_end\|>"
WORD = rf"(?!(?:{BREAKS})(?!\S))[^\s.,;:!?()\[\]>]+"
NAME = re.compile(
    rf"(?<![^\s.,;:!?()\[\]>])(?!of\s)((?:{WORD}\s+){{0,5}}{WORD}(?<=[\w\"'”’]))[\s:,]*\Z", re.I
)


@dataclass
class Source:
    data: str = ""  # hub id (owner/name or owner/name:config), a folder of .parquet, .jsonl or .tar, or one such file
    split: str = "train"  # of a hub id
    streaming: bool = (
        False  # read records as they come; otherwise `datasets` makes a copy of the set first
    )
    prompt_field: str = (
        "prompt"  # what the user asks for; a dot goes into the JSON of a tar: json.prompt
    )
    chain_field: str = "chain"  # the annotation, with its boxes or with placeholders
    image_field: str = "image"  # the picture, or its path
    image_folder: str = ""  # where image paths start; empty: the folder of the data
    coords_field: str = (
        ""  # JSON or dict, placeholder -> coordinates; empty: the boxes stand in the chain
    )
    box_format: Literal["", "0..999", "0..1", "pixels"] = (
        ""  # what x1, y1, x2, y2 count; there is no default
    )
    max_chain: int = (
        600  # tokens; longer chains are skipped (the official code samples 600 at most)
    )
    max_records: int = 0  # read only the first ones; 0: all


class BadRecord(Exception):
    """A record that is skipped: the cause, one of a few fixed words to count by, and what it is here."""

    def __init__(self, cause: str, detail: str):
        self.cause, self.detail = cause, " ".join(detail.split())[:160]
        super().__init__(f"{cause}: {self.detail}")


class Record(NamedTuple):
    prompt: str
    chain: str  # in the format of render_boxes.py
    image: Image.Image


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def data_files(source: Source) -> list[str]:
    """The files of a local set; none for a hub id. Raises ValueError when it is neither."""
    path = Path(source.data).expanduser()
    if not path.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(:[\w.-]+)?", source.data):
        return []
    inside = set(READERS) - {
        ".json"
    }  # in a folder, .json describes the set more often than it is the set
    files = (
        [path]
        if path.is_file()
        else sorted(file for file in path.rglob("*") if file.suffix in inside)
    )
    kinds = {file.suffix for file in files}
    if len(kinds) != 1 or not kinds <= READERS.keys():
        raise ValueError(
            f"--data {source.data}: expected a hub id, or files of one kind: .parquet, .jsonl, .tar"
        )
    return [str(file) for file in files]


def open_rows(source: Source):
    """The raw rows, dicts with undecoded pictures: a `datasets.Dataset`, or an IterableDataset when streaming.

    Raises ValueError in one line: nothing there, not readable, empty, without one of the fields, or no box_format."""
    import datasets  # takes a second, and the toy goes without

    if not source.box_format:
        raise ValueError("say with --box_format what the coordinates count: 0..999, 0..1 or pixels")
    files, (name, _, config) = data_files(source), source.data.partition(":")
    where = {"path": name, "name": config or None}
    if files:
        where = {"path": READERS[Path(files[0]).suffix], "data_files": {source.split: files}}
    try:
        rows = datasets.load_dataset(**where, split=source.split, streaming=source.streaming)
        for name, feature in (rows.features or {}).items():
            if isinstance(
                feature, datasets.Image
            ):  # a broken picture is ours to count, and skipping must be cheap
                rows = rows.cast_column(name, datasets.Image(decode=False))
        first = next(iter(rows), None)
    except (
        Exception
    ) as problem:  # each reader has errors of its own kind: pyarrow's, tarfile's, the hub's
        raise ValueError(
            f"cannot read --data {source.data}: {problem.__cause__ or problem}"[:300]
        ) from problem
    if first is None:
        raise ValueError(f"--data {source.data} holds no records")
    for flag in ("prompt_field", "chain_field", "image_field", "coords_field"):
        if (name := getattr(source, flag)) and pick(first, name, missing := object()) is missing:
            raise ValueError(
                f"--{flag} {name}: no such field in {source.data}, there are {', '.join(first)}"
            )
    return rows


def pick(row: dict, name: str, default=None):
    """A field of a row; `json.prompt` is looked up in the dict `json` if no field has that whole name."""
    outer, _, inner = name.partition(".")
    return row.get(
        name, row[outer].get(inner, default) if isinstance(row.get(outer), dict) else default
    )


def numbered(rows, source: Source):
    """(index, function that gets the row): where rows have a length, only those are read that are got."""
    stop = source.max_records or None
    if hasattr(rows, "__len__"):
        yield from (
            (index, functools.partial(rows.__getitem__, index)) for index in range(len(rows))[:stop]
        )
        return
    index = -1
    try:
        for index, row in enumerate(itertools.islice(rows, stop)):
            yield index, functools.partial(dict, row)
    except Exception as problem:  # as in open_rows
        raise ValueError(
            f"cannot read --data {source.data} after record {index}: {problem}"[:300]
        ) from problem


# ---------------------------------------------------------------------------------------------------------------------
# One record


def fill_placeholders(text: str, coords) -> str:
    """Writes boxes into a text, as (x1,y1),(x2,y2). `coords`, or the dict in its JSON: placeholder -> four numbers a
    box, in any nesting, or as text. Raises BadRecord."""
    try:
        coords = json.loads(coords) if isinstance(coords, str | bytes) else coords
        boxes = {}
        for key, value in coords.items():
            value = value if isinstance(value, str) else json.dumps(value)
            found = re.findall(NUMBER, value)
            if len(found) % 4 or not re.fullmatch(r"[\s\d\[\](),.eE+-]+|null", value):
                raise ValueError(f"{value[:60]} is no box")
            if key and found:  # a column of dicts gives every row the keys of all rows, with null
                boxes[key] = " ".join(
                    "({},{}),({},{})".format(*found[i : i + 4]) for i in range(0, len(found), 4)
                )
    except (ValueError, AttributeError, TypeError, RecursionError) as problem:
        raise BadRecord("broken box", f"coordinates {str(coords)[:60]!r}: {problem}") from problem
    # with any number: box_1 is not a part of box_12, and box_12 must not pass as a word when it has no coordinates
    alike = {re.sub("[0-9]+", "[0-9]+", re.escape(key)) for key in boxes or ["no placeholder"]}
    placeholder = re.compile("|".join(sorted(alike, key=len, reverse=True)))
    if missing := set(placeholder.findall(text)) - boxes.keys():
        raise BadRecord("broken box", f"{min(missing)} has no coordinates")
    return placeholder.sub(lambda found: boxes[found[0]], text)


def on_grid(corners: list[float], box_format: str, size: tuple[int, int]) -> tuple[int, ...]:
    """x1, y1, x2, y2 of a picture of `size` pixels, as `box_format` counts -> integers; 1000 of 1000 is 999. Raises
    BadRecord when they cannot be what `box_format` says."""
    limits = {"0..999": (1000, 1000), "0..1": (1, 1), "pixels": size}[box_format] * 2
    told = "({:g},{:g}),({:g},{:g})".format(*corners)
    if not all(0 <= edge <= limit for edge, limit in zip(corners, limits, strict=True)):
        raise BadRecord(
            "box outside",
            f"{told} is not in {box_format}, in a picture of {size[0]} x {size[1]} pixels",
        )
    if (box_format == "0..999" and any(edge % 1 for edge in corners)) or max(corners) <= 1 < limits[
        0
    ]:
        raise BadRecord("box format", f"{told} does not look like {box_format}")
    x1, y1, x2, y2 = (
        min(round(1000 * edge / limit), 999) for edge, limit in zip(corners, limits, strict=True)
    )
    if x1 >= x2 or y1 >= y2:
        raise BadRecord("empty box", f"{told} ends before it starts")
    return x1, y1, x2, y2


def normalize_chain(text: str, box_format: str, size: tuple[int, int] = (1, 1)) -> str:
    """An annotation with inline boxes -> a chain in the repository's format; one that has it comes back as it is.

    Boxes side by side belong to one name; names without a box lose their markers. Raises BadRecord."""
    chain, end = "", 0
    for box in BOX.finditer(text):
        before, end = text[end : box.start()], box.end()
        corners = on_grid([float(edge) for edge in box.groups()], box_format, size)
        if chain and not before.strip(" \n,;"):
            chain += " " + (WRITTEN % ("", *corners)).removeprefix(f"{OBJ_START}{OBJ_END} ")
            continue
        name = re.search(OBJECT + r"[\s:,]*\Z", before) or NAME.search(before)
        if not name:
            raise BadRecord("no name", f"before {box[0]}: {before[-60:]!r}")
        chain += re.sub(OBJECT, r"\1", before[: name.start()]) + WRITTEN % (
            " ".join(name[1].split()),
            *corners,
        )
    if not chain:
        raise BadRecord("no box", repr(text[:60]))
    chain = (chain + re.sub(OBJECT, r"\1", text[end:])).strip()
    if problems := [
        f"{found[0]!r} is torn" for found in TORN.finditer(BOX.sub("", chain))
    ] or chain_problems(chain):
        raise BadRecord("broken box", problems[0])
    return chain


def read_words(row: dict, name: str) -> str:
    value = pick(row, name)
    text = value.decode(errors="replace") if isinstance(value, bytes) else value
    if not isinstance(text, str) or not text.strip():
        raise BadRecord("no text", f"{name} is {str(value)[:60]!r}")
    text = (
        text.encode(errors="replace")
        .decode()
        .strip()
        .removesuffix(gotr1.SPECIAL_TOKENS["boi_token"])
    )
    if found := [token for token in gotr1.SPECIAL_TOKENS.values() if token in text]:
        raise BadRecord(
            "special token", f"{name} holds {found[0]}"
        )  # it would end the chain, or the prompt
    return text


def read_text(
    row: dict, source: Source, tokenizer, size: tuple[int, int], room: float = 1e9
) -> tuple[str, str]:
    """(prompt, chain) of a row with a picture of `size` pixels; `room` is what prompt and chain may take together, in
    tokens. Raises BadRecord."""
    prompt, chain = (
        " ".join(read_words(row, source.prompt_field).split()),
        read_words(row, source.chain_field),
    )
    if source.coords_field:
        chain = fill_placeholders(chain, pick(row, source.coords_field))
    chain = normalize_chain(chain, source.box_format, size)
    # as gotr1.encode_prompt and encode_chain, which look up special tokens in the whole vocabulary every time
    texts = (gotr1.format_prompt(prompt), chain)
    given, written = (1 + len(tokenizer.encode(text, add_special_tokens=False)) for text in texts)
    if written > min(source.max_chain, room - given):
        raise BadRecord(
            "chain too long",
            f"{written} tokens after {given} of the prompt (--max_chain, or the context)",
        )
    return prompt, chain


def read_image(row: dict, source: Source, side: int = 0) -> tuple[Image.Image, tuple[int, int]]:
    """(the picture, RGB, `side` x `side` if given; its own width and height). Raises BadRecord."""
    value = pick(row, source.image_field)
    try:
        value = (value.get("bytes") or value.get("path")) if isinstance(value, dict) else value
        if isinstance(value, str):
            folder = Path(source.image_folder or source.data).expanduser()
            value = (folder.parent if folder.is_file() else folder) / value
        value = io.BytesIO(value) if isinstance(value, bytes) else value
        image = value if isinstance(value, Image.Image) else Image.open(value)
        image = ImageOps.exif_transpose(image)  # as people see it, and as they draw boxes on it
        if image.has_transparency_data:
            image = Image.alpha_composite(
                Image.new("RGBA", image.size, "white"), image.convert("RGBA")
            )
        image, size = image.convert("RGB"), image.size
        return image.resize((side, side), Image.Resampling.BICUBIC) if side else image, size
    except Exception as problem:  # PIL's decoders raise a dozen kinds of error on broken files
        raise BadRecord("broken image", f"{type(problem).__name__}: {problem}") from problem


def read_record(row: dict, source: Source, tokenizer, room: float = 1e9) -> Record:
    """A raw row -> prompt, chain in the repository's format, picture. Raises BadRecord."""
    image, size = read_image(row, source)
    return Record(*read_text(row, source, tokenizer, size, room), image)
