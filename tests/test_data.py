"""Reading GoT data and its cache, against toy scenes whose prompts, boxes and pictures are known.
pytest tests/test_data.py"""

import copy
import dataclasses
import io
import json
import re
import tarfile
import threading
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import gotr1
import train_sft
from data import cache as token_cache
from data import got as got_data
from data.got import BadRecord, Source
from data.prompts import read_prompts
from render_boxes import Box, chain_problems, format_chain, parse_chain
from toy import world as toy

CHAIN_CAUSES = {"no box", "broken box", "box outside", "box format", "empty box", "no name"}
CHAIN_CAUSES |= {"other notation", "placeholder", "unused box"}
CAUSES = CHAIN_CAUSES | {"no text", "special token", "chain too long", "broken image"}
WRITTEN = re.compile(  # one object of a chain; not taken from the code, so that it can judge it
    r"<\|obj_start\|>(.*?)<\|obj_end\|> <\|box_start\|>\((\d+),(\d+)\),\((\d+),(\d+)\)<\|box_end\|>"
)
SIDE = 250  # of the pictures in pixels: four grid units each


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.getbasetemp() / "datasets"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)


def make_examples(n: int, seed: int = 0) -> list[toy.Example]:
    rng = np.random.default_rng(seed)
    return [toy.make_example(rng, faults={}) for _ in range(n)]


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.resize((SIDE, SIDE), Image.Resampling.NEAREST).save(file, "png")
    return file.getvalue()


def inline(example: toy.Example) -> dict:
    """Boxes in the words, no markers, as the GoT paper prints them."""
    return {
        "prompt": example.prompt,
        "chain": WRITTEN.sub(r"\1 (\2,\3),(\4,\5)", example.chain),
        "image": {"bytes": png(example.image), "path": None},
    }


def apart(example: toy.Example, name: str) -> dict:
    """Placeholders, with pixels in JSON elsewhere; the picture is a file."""
    coords = {}

    def take(found):
        edges = [int(edge) * SIDE / 1000 for edge in found.groups()[1:]]
        coords[f"<coord_{len(coords) + 1}>"] = edges
        return f"{found[1]} <coord_{len(coords)}>"

    got = WRITTEN.sub(take, example.chain)
    return {"caption": example.prompt, "got": got, "coord": json.dumps(coords), "file": name}


def write_parquet(folder: Path, rows: list[dict]) -> Source:
    """Two files, so that order and counting cross them."""
    folder.mkdir()
    words = datasets.Value("string")
    features = datasets.Features({"prompt": words, "chain": words, "image": datasets.Image()})
    middle = len(rows) // 2
    for part, half in enumerate([rows[:middle], rows[middle:]]):
        table = pa.Table.from_pylist(half, schema=features.arrow_schema)
        pa.parquet.write_table(table, folder / f"train-{part}.parquet")
    return Source(str(folder), box_format="0..999")


def write_lines(folder: Path, examples: list[toy.Example]) -> tuple[Source, list[dict]]:
    (folder / "pictures").mkdir(parents=True)
    rows = [apart(example, f"pictures/{k}.png") for k, example in enumerate(examples)]
    for row, example in zip(rows, examples, strict=True):
        (folder / row["file"]).write_bytes(png(example.image))
    return save_lines(folder, rows), rows


def save_lines(folder: Path, rows: list[dict]) -> Source:
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(
        str(folder / "data.jsonl"),
        prompt_field="caption",
        chain_field="got",
        image_field="file",
        coords_field="coord",
        box_format="pixels",
    )


def write_tar(folder: Path, examples: list[toy.Example]) -> Source:
    folder.mkdir()
    with tarfile.open(folder / "000.tar", "w") as tar:
        for k, example in enumerate(examples):
            row = inline(example)
            text = json.dumps({"prompt": row["prompt"], "got": row["chain"]}).encode()
            for suffix, content in (("png", row["image"]["bytes"]), ("json", text)):
                info = tarfile.TarInfo(f"{k:04d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return Source(
        str(folder),
        prompt_field="json.prompt",
        chain_field="json.got",
        image_field="png",
        box_format="0..999",
    )


def in_memory(n: int, seed: int = 0) -> list[dict]:
    return [example._asdict() for example in make_examples(n, seed)]


MEMORY = Source("toy, some scenes", box_format="0..999")


# -------------------------------------------------------------------------------------------------
# Rows


@pytest.mark.parametrize(
    ("style", "streaming"), [("parquet", True), ("lines", False), ("lines", True), ("tar", True)]
)
def test_every_style_gives_the_same_records(style, streaming, tmp_path):
    examples = make_examples(12)
    if style == "parquet":
        source = write_parquet(tmp_path / "set", [inline(example) for example in examples])
    elif style == "tar":
        source = write_tar(tmp_path / "set", examples)
    else:
        source, _ = write_lines(tmp_path / "set", examples)
    source.streaming = streaming
    rows = got_data.open_rows(source)
    assert hasattr(rows, "__len__") != streaming
    records = [got_data.read_record(row, source) for _, row in got_data.numbered(rows, source)]
    for record, example in zip(records, examples, strict=True):
        assert record[:2] == (example.prompt, example.chain)
        want = np.asarray(example.image.resize((SIDE, SIDE), Image.Resampling.NEAREST))
        assert (np.asarray(record[2]) == want).all()


def test_coordinates_may_be_a_dict_with_other_keys_in_each_row(tmp_path):
    """JSON lines become columns: each row gets the keys of all rows."""
    examples = make_examples(8)
    _, rows = write_lines(tmp_path / "set", examples)
    for k, row in enumerate(rows):
        row["got"] = row["got"].replace("coord_", f"row{k}_")
        row["coord"] = json.loads(row["coord"].replace("coord_", f"row{k}_"))
    source = save_lines(tmp_path / "set", rows)
    rows = got_data.open_rows(source)
    chains = [got_data.read_record(row, source)[1] for row in rows]
    assert chains == [example.chain for example in examples]


def test_image_folder_and_max_records(tmp_path):
    source, _ = write_lines(tmp_path / "set", make_examples(6))
    (tmp_path / "set" / "pictures").rename(tmp_path / "pictures")
    source.image_folder, source.max_records = str(tmp_path), 4
    for source.streaming in (False, True):
        rows = got_data.open_rows(source)
        pairs = list(got_data.numbered(rows, source))
        assert [index for index, _ in pairs] == [0, 1, 2, 3]
        got_data.read_record(pairs[3][1], source)


def test_errors_are_one_line(tmp_path):
    source, _ = write_lines(tmp_path / "set", make_examples(3))
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and then nothing")
    (tmp_path / "two").mkdir()
    for name in ("a.tar", "b.parquet"):
        (tmp_path / "two" / name).write_bytes(b"")
    messages = {
        str(tmp_path / "gone.jsonl"): "gone.jsonl: expected a hub id, or files",
        "gone": "expected a hub id",
        str(tmp_path / "set" / "pictures"): "files of one kind",
        str(tmp_path / "two"): "files of one kind",
        str(tmp_path / "torn.parquet"): "torn.parquet",
    }
    for data, words in messages.items():
        for streaming in (False, True):
            with pytest.raises(ValueError, match=re.escape(words)) as caught:
                got_data.open_rows(Source(data, streaming=streaming, box_format="0..1"))
            assert "\n" not in str(caught.value), caught.value
    for flag in ("prompt_field", "chain_field", "image_field", "coords_field"):
        message = f"--{flag} nothere: .* there are caption, got, coord, file"
        with pytest.raises(ValueError, match=message):
            got_data.open_rows(dataclasses.replace(source, **{flag: "nothere"}))
    with pytest.raises(ValueError, match="--box_format"):
        got_data.open_rows(dataclasses.replace(source, box_format=""))


def test_files_that_are_empty_or_cut_off_are_named(tmp_path):
    source = write_tar(tmp_path / "set", make_examples(5))
    path = tmp_path / "set" / "000.tar"
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        starts = [member.offset for member in tar]
        end = tar.offset  # where the end mark begins
    for source.streaming in (False, True):
        # at the border of each member, inside one, and inside the end mark
        for length in [*starts[1:], end, starts[3] + 700, end + 512]:
            path.write_bytes(whole[:length])
            with pytest.raises(ValueError, match="000.tar is cut off: it lacks the end mark"):
                got_data.open_rows(source)
        for length in (end + 1024, len(whole)):  # 1024 zeros are an end, more is filling
            path.write_bytes(whole[:length])
            assert len(list(got_data.numbered(got_data.open_rows(source), source))) == 5
        for name in ("data.jsonl", "data.parquet", "data.tar"):
            (tmp_path / name).write_bytes(b"")
            empty = dataclasses.replace(source, data=str(tmp_path / name))
            with pytest.raises(ValueError, match=f"{name} is empty .0 bytes."):
                got_data.open_rows(empty)


def test_a_hub_id_is_passed_on(monkeypatch):
    asked = []

    def load(**how):
        asked.append(how)
        return datasets.Dataset.from_list([{"prompt": "p", "chain": "c", "image": "i"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    got_data.open_rows(Source("owner/set:small", split="test", streaming=True, box_format="0..1"))
    assert asked == [{"path": "owner/set", "name": "small", "split": "test", "streaming": True}]


def test_a_prompt_may_hold_what_only_python_calls_the_end_of_a_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("a dog\u2028on a mat\r\n\n a cat \x85\n".encode())
    assert read_prompts(str(path), held_out=False, count=9) == ["a dog\u2028on a mat", "a cat"]


# -------------------------------------------------------------------------------------------------
# One record


def chain(*parts) -> str:
    return format_chain([Box(*part) if isinstance(part, tuple) else part for part in parts])


NAMES_FOUND = {  # annotation -> chain; BOX is a box, [name] a name with its markers and that box
    "A dog BOX sleeps.": "A [dog] sleeps.",
    "A dog: [1, 2, 30, 40] sleeps": "A [dog] sleeps",
    "A dog ((1, 2), (30, 40))": "A [dog]",
    "<|obj_start|>old dog<|obj_end|> BOX": "[old dog]",
    "an old dog <|box_start|>BOX<|box_end|>": "an [old dog]",
    "his dog BOX and <|obj_start|>fog<|obj_end|>": "his [dog] and fog",
    "a <|obj_start|>man in a hat<|obj_end|> BOX": "a [man in a hat]",
    "with a man in a red hat BOX": "with a man in a [red hat]",
    "a glass of wine BOX": "a [glass of wine]",
    "fog in front of trees BOX": "fog in front of [trees]",
    "a large, red ball BOX": "a large, [red ball]",
    "aa b2 cc dd ee f6 gg h8 BOX": "aa b2 [cc dd ee f6 gg h8]",
    "the woman's hand BOX": "the [woman's hand]",
    # emphasis and bullets are no part of a name
    "The **red ball** BOX lies": "The [red ball] lies",
    "- red ball BOX": "- [red ball]",
    "* **Red ball**: BOX": "* [Red ball]",
    # four numbers among the words are no box
    "at 10:30 on 12/25 a dog BOX": "at 10:30 on 12/25 a [dog]",
    "house number 12, 14, 16, 18 and a dog BOX": "house number 12, 14, 16, 18 and a [dog]",
    "0.5 or 0.25 of a pie BOX, (1990)": "0.5 or 0.25 of a [pie], (1990)",
}


@pytest.mark.parametrize("text", NAMES_FOUND)
def test_names_are_found(text):
    marked = r"<|obj_start|>\1<|obj_end|> <|box_start|>(1,2),(30,40)<|box_end|>"
    chain = re.sub(r"\[(.*?)\]", marked, NAMES_FOUND[text])
    assert got_data.normalize_chain(text.replace("BOX", "(1,2),(30,40)"), "0..999") == chain


def test_several_boxes_of_one_name():
    text = got_data.normalize_chain("two red balls (1,2),(30,40), (50,60),(70,80) fly", "0..999")
    assert parse_chain(text) == [
        Box("two red balls", 1, 2, 30, 40),
        Box("two red balls", 50, 60, 70, 80),
    ]
    assert text.endswith("<|box_end|> fly") and not chain_problems(text)


@pytest.mark.parametrize(
    ("text", "box_format", "result"),
    [
        ("(100,0),(250,125)", "0..999", (100, 0, 250, 125)),
        ("(0,0),(1000,999)", "0..999", (0, 0, 999, 999)),
        ("(0.1,0),(0.25,1)", "0..1", (100, 0, 250, 999)),
        ("(1e-1,0.0),(.5,1)", "0..1", "no box"),  # .5 is nothing that Python or JSON writes
        ("(20,0),(50,50)", "pixels", (100, 0, 250, 500)),  # of 200 x 100 pixels
        ("(0.1,0.2),(0.3,0.4)", "0..999", "box format"),
        ("(10.5,20),(30,40)", "0..999", "box format"),
        ("(100,200),(300,400)", "0..1", "box outside"),
        ("(-1,200),(300,400)", "0..999", "box outside"),
        ("(0,0),(50,101)", "pixels", "box outside"),
        ("(300,200),(100,400)", "0..999", "empty box"),
        ("(0.1,0.2),(0.1001,0.3)", "0..1", "empty box"),
        ("(1,2),(3", "0..999", "no box"),
        ("(10,20),(30,40) and cat (1,2),(3", "0..999", "broken box"),
        ("(10,20),(30,40) <|box_start|>", "0..999", "broken box"),
        ("(10,20),(30,40) and 3 cats, 2 of them aged 10", "0..999", (10, 20, 30, 40)),
    ],
)
def test_coordinates(text, box_format, result):
    if isinstance(result, tuple):
        written = got_data.normalize_chain("A dog " + text, box_format, (200, 100))
        assert parse_chain(written) == [Box("dog", *result)]
    else:
        with pytest.raises(BadRecord) as caught:
            got_data.normalize_chain("A dog " + text, box_format, (200, 100))
        assert caught.value.cause == result


SPANS = st.lists(st.integers(0, 999), min_size=2, max_size=2, unique=True).map(sorted)
BOXES = st.builds(lambda x, y: (x[0], y[0], x[1], y[1]), SPANS, SPANS)
NAMES = st.from_regex(r"[a-z]{3,9}( [a-z]{3,9}){0,2}[0-9]?", fullmatch=True)
OBJECTS = st.lists(st.tuples(NAMES, BOXES.filter(lambda box: max(box) > 1)), min_size=1)


@settings(max_examples=60, deadline=None)
@given(OBJECTS, st.integers(1, 4000), st.integers(1, 4000))
def test_any_layout_comes_back(objects, width, height):
    parts = []  # of the chain
    inline = []  # with shares of 1
    marked = []  # with placeholders
    coords = {}  # in pixels
    for k, (name, box) in enumerate(objects):
        parts += ["the", (name, *box)]
        x1, y1, x2, y2 = (edge / 1000 for edge in box)
        inline.append(f"the {name} ({x1},{y1}),({x2},{y2})")
        marked.append(f"the <|obj_start|>{name}<|obj_end|> {{{k}}}")
        coords[f"{{{k}}}"] = [x1 * width, y1 * height, x2 * width, y2 * height]
    whole = chain(*parts)
    assert got_data.normalize_chain(whole, "0..999") == whole
    words = " ".join(name for name, _ in objects).split()
    if not set(words) & set(got_data.BREAKS.split("|")):
        assert got_data.normalize_chain(" ".join(inline), "0..1") == whole
    if all(max(box) > 1 for box in coords.values()):
        filled = got_data.fill_placeholders(" ".join(marked), json.dumps(coords))
        assert got_data.normalize_chain(filled, "pixels", (width, height)) == whole


def other_notations(x1: str, y1: str, x2: str, y2: str) -> dict[str, str]:
    """Ways of writing a box that are not read."""
    wide = str.maketrans("0123456789", "０１２３４５６７８９")
    signs = f"（{x1}，{y1}），（{x2}，{y2}）"
    return {
        "semicolons": f"({x1};{y1}),({x2};{y2})",
        "spaces": f"[{x1} {y1} {x2} {y2}]",
        "braces": f"{{{x1}, {y1}, {x2}, {y2}}}",
        "angles": f"<{x1},{y1},{x2},{y2}>",
        "tags": f"<box>{x1},{y1},{x2},{y2}</box>",
        "tagged points": f"<box>({x1},{y1}),({x2},{y2})</box>",
        "keys": f"(x1={x1}, y1={y1}, x2={x2}, y2={y2})",
        "JSON": f'{{"x1": {x1}, "y1": {y1}, "x2": {x2}, "y2": {y2}}}',
        "full-width signs": signs,
        "full-width digits": signs.translate(wide),
        "bare": f"{x1},{y1},{x2},{y2}",
        "minus": f"{x1},{y1} - {x2},{y2}",
    }


@pytest.mark.parametrize("notation", other_notations("1", "2", "3", "4"))
def test_every_other_notation_is_caught(notation):
    whole = ("20", "30", "40", "50")
    shares = ("0.125", "0.25", "0.5", "0.75")
    for corners, read, box_format in [
        (whole, "(10,20),(500,600)", "0..999"),
        (shares, "(0.1,0.2),(0.5,0.6)", "0..1"),
    ]:
        other = other_notations(*corners)[notation]
        with pytest.raises(BadRecord, match="^(other notation|no name): "):
            got_data.normalize_chain(f"a dog {read} and a cat {other} sleep", box_format)
        with pytest.raises(BadRecord, match="^(no box|no name): "):
            got_data.normalize_chain(f"a cat {other}", box_format)  # alone, it was no box before


def test_looking_for_other_notations_takes_linear_time():
    for piece in ("7", "7,", "7 7 7 x ", "12345,12,,,,,,"):
        clock = time.perf_counter()
        with pytest.raises(BadRecord):
            got_data.normalize_chain("a dog (1,2),(30,40) " + piece * 100_000 + "(1,2", "0..999")
        assert time.perf_counter() - clock < 2  # quadratic: minutes


PIECES = [
    *"<|obj_start|> <|obj_end|> <|box_start|> <|box_end|> <begin_of_image> <|".split(),
    *"( ) [ ] , . :".split(),
    *"1 20 999 0.5 -3 1e-2 ١ (1,2),(30,40) (0.1,0.2),(0.3,0.4) of a dog red \ud800".split(),
    " ",
    "\n",
]
ROWS_OF_PIECES = st.lists(st.sampled_from(PIECES), max_size=30)
TEXTS = st.one_of(st.text(), ROWS_OF_PIECES.map("".join), ROWS_OF_PIECES.map(" ".join))


@settings(max_examples=300, deadline=None)
@given(TEXTS, st.sampled_from(["0..999", "0..1", "pixels"]))
def test_any_text_gives_a_sound_chain_or_a_cause(text, box_format):
    try:
        found = got_data.normalize_chain(text, box_format, (640, 480))
    except BadRecord as bad:
        assert bad.cause in CAUSES and "\n" not in str(bad)
    else:
        assert not chain_problems(found) and parse_chain(found)
        assert got_data.normalize_chain(found, "0..999") == found


ODD = [
    None,
    True,
    7,
    float("nan"),
    b"\xff",
    [1],
    {"a": {}},
    {"bytes": 3},
    {"path": [0]},
    "\ud800\0",
]


@pytest.mark.parametrize("field", ["prompt", "chain", "image", "coords"])
def test_any_value_of_a_field_is_survived(field, policy):
    row = in_memory(1)[0] | {"coords": {}}
    source = dataclasses.replace(MEMORY, coords_field="coords")
    for value in [*ODD, [[[]]] * 9, "[" * 100_000]:
        for read in (
            lambda row: got_data.read_record(row, source),
            lambda row: token_cache.texts_that_fit(row, source, policy[1], (9, 9)),
        ):
            try:
                read(row | {field: value})
            except BadRecord as bad:
                assert bad.cause in CAUSES and "\n" not in str(bad)


def test_placeholders():
    fill = got_data.fill_placeholders
    coords = {f"box_{k}": [k, 0, 100, 100] for k in (1, 12, 2)}
    twice = "box_2 and box_2"
    filled = fill(f"a box_12 b box_1 c {twice}", coords)
    assert filled.startswith("a (12,0),(100,100) b (1,0),(100,100) c (2,0),(100,100) and (2,")
    assert fill("a box_2", {"box_2": [[1, 2], [3, 4]], "box_3": None}) == "a (1,2),(3,4)"
    assert fill("a $x$", b'{"$x$": "(1,2),(3,4)"}') == "a (1,2),(3,4)"
    assert fill("a $x$", {"$x$": [[1, 2, 3, 4], [5, 6, 7, 8]]}) == "a (1,2),(3,4) (5,6),(7,8)"
    keyed = {"x": {"x1": 1, "y1": 2, "x2": 3, "y2": 4}}
    for wrong in ({"x": [1, 2, 3]}, keyed, '{"x": [NaN, 1, 2, 3]}', "[]", "{", 7):
        with pytest.raises(BadRecord, match="^broken box: coordinates"):
            fill("a x", wrong)
    for more in ({}, {"box_3": None}):
        with pytest.raises(BadRecord, match="box_3 has no coordinates"):
            fill("a box_1 and b box_3", coords | more)
    assert fill("a dog", {"": [1, 2, 3, 4]}) == "a dog"
    with pytest.raises(BadRecord, match="^unused box: box_12 has coordinates and is not in"):
        fill("a box_1 b box_2", coords)
    for key in ("1", " 12 ", "١"):
        with pytest.raises(BadRecord, match="^placeholder: .* is a bare number"):
            fill(f"2 dogs and a cat {key}", {key: [1, 2, 3, 4]})


def test_words_that_would_break_the_sequence(policy):
    row = in_memory(1)[0]

    def read(**changes):
        return token_cache.texts_that_fit({**row, **changes}, MEMORY, policy[1], (32, 32))

    for name in ("prompt", "chain"):
        for token in gotr1.SPECIAL_TOKENS.values():
            with pytest.raises(BadRecord, match="special token"):
                read(**{name: f"a {token} {row[name]}"})
    _, written = read(chain=row["chain"] + "<begin_of_image>")
    assert written == row["chain"]  # the end of a chain is no fault
    assert got_data.END_OF_CHAIN == gotr1.SPECIAL_TOKENS["boi_token"]
    said, _ = read(prompt="half a letter \ud800\n of\0it")
    assert said == "half a letter ? of\0it"  # JSON can say it, files and tokenizers cannot
    # of two faults, the one in the words comes before the one in the boxes
    with pytest.raises(BadRecord, match="special token"):
        read(chain="no box, but <end_of_image>")


def test_the_longest_chain(policy):
    row = in_memory(1)[0]
    tokenizer = policy[1]

    def read(max_chain, **room):
        source = Source("toy, some scenes", box_format="0..999", max_chain=max_chain)
        return token_cache.texts_that_fit(row, source, tokenizer, (32, 32), **room)

    tokens = len(gotr1.encode_chain(tokenizer, row["chain"]))
    assert read(tokens)[1] == row["chain"]
    with pytest.raises(BadRecord, match=f"chain too long: {tokens} tokens"):
        read(tokens - 1)
    prompt = len(gotr1.encode_prompt(tokenizer, row["prompt"]))
    read(tokens, room=tokens + prompt)
    with pytest.raises(BadRecord, match="chain too long"):
        read(tokens, room=tokens + prompt - 1)


def test_pictures_as_people_see_them(tmp_path):
    """A phone's picture is turned upright, what is transparent is white."""
    picture = Image.new("RGB", (40, 20), "blue")
    picture.paste("red", (0, 0, 10, 20))  # at the left; turned by 90 degrees clockwise, at the top
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "phone.png", exif=exif)
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("P", (8, 8), 3).save(tmp_path / "palette.png")
    source = Source(str(tmp_path), box_format="pixels")
    image, size = got_data.read_image({"image": "phone.png"}, source)
    assert size == image.size == (20, 40) and image.getpixel((10, 3)) == (255, 0, 0)
    clear, _ = got_data.read_image({"image": "clear.png"}, source)
    assert clear.getpixel((3, 3)) == (255, 255, 255)
    assert got_data.read_image({"image": "palette.png"}, source, side=4)[0].size == (4, 4)
    paths = ["gone.png", "https://example.org/a.png"]
    for wrong in (None, *paths, b"", b"GIF89a", {"bytes": None, "path": None}, 3):
        with pytest.raises(BadRecord, match="broken image"):
            got_data.read_image({"image": wrong}, source)


def test_pictures_that_would_be_white_or_too_large_are_refused(tmp_path, monkeypatch):
    """`convert` clips deep pictures: whatever is above 255 of 65535 would be white."""
    source = Source(str(tmp_path), box_format="pixels")
    greys = np.array([[0, 257, 128 * 257, 65535]], dtype="uint16")
    Image.fromarray(greys).save(tmp_path / "16.png")
    Image.fromarray(greys.astype(">u2")).save(tmp_path / "big_endian.tiff")
    Image.fromarray(greys.astype("int32")).save(tmp_path / "32.tiff")
    Image.fromarray(greys.astype("float32")).save(tmp_path / "float.tiff")
    for name in ("16.png", "big_endian.tiff", "32.tiff", "float.tiff"):
        with pytest.raises(BadRecord, match="^image depth: .* save it with 8 bits"):
            got_data.read_image({"image": name}, source)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    Image.new("1", (7, 3)).save(tmp_path / "large.png")
    with pytest.raises(BadRecord, match="^broken image: DecompressionBombError"):
        got_data.read_image({"image": "large.png"}, source)


def test_paths_do_not_leave_the_folder(tmp_path):
    """Data from elsewhere must not choose which files of this machine are read."""
    inside = tmp_path / "set"
    inside.mkdir()
    for folder in (inside, tmp_path):
        Image.new("RGB", (4, 4), "red").save(folder / "a.png")
    (inside / "link.png").symlink_to(tmp_path / "a.png")
    (inside / "data.jsonl").write_text("{}")
    leaving = ["../a.png", str(tmp_path / "a.png"), "link.png", "x/../../a.png"]
    for data in (inside, inside / "data.jsonl"):
        source = Source(str(data), box_format="pixels")
        for path in leaving:
            for value in (path, {"bytes": None, "path": path}):
                with pytest.raises(BadRecord, match="^path outside: .*--follow_outside"):
                    got_data.read_image({"image": value}, source)
        for path in ("a.png", "./a.png", str(inside / "a.png")):
            got_data.read_image({"image": path}, source)
        allowed = dataclasses.replace(source, follow_outside=True)
        named = dataclasses.replace(source, image_folder=str(tmp_path))
        for path in leaving[:3]:
            got_data.read_image({"image": path}, allowed)
        got_data.read_image({"image": "a.png"}, named)
    # a set of the hub has no folder here
    with pytest.raises(BadRecord, match="path outside"):
        got_data.read_image({"image": leaving[1]}, Source("owner/set", box_format="pixels"))


# -------------------------------------------------------------------------------------------------
# The cache


@pytest.fixture
def encoded(monkeypatch):
    """How many pictures each call of `encode_images` was given, from now on."""
    encode = gotr1.encode_images
    calls = []

    def count(model, images):
        calls.append(len(images))
        return encode(model, images)

    monkeypatch.setattr(gotr1, "encode_images", count)
    return calls


def content(prepared) -> tuple[list[str], list[str], list]:
    """All that training can read."""
    prompts, chains, tokens = prepared.batch(list(range(len(prepared))))
    return prompts, chains, tokens.tolist()


def never(*_, **__):
    raise AssertionError("data, pictures or files were touched")


PLANTED = {  # cause -> (field, bad value, the records that get it)
    "no box": ("chain", "a red ball and nothing else", [3, 90]),
    "no text": ("chain", None, [7]),
    "broken image": ("image", {"bytes": b"no picture", "path": None}, [20, 21]),
    "box outside": ("chain", "a ball (10,20),(3000,30)", [33]),
    "chain too long": ("chain", "a ball (30,20),(40,50) " + "very " * 300, [50]),
}


def test_planted_faults_are_counted_and_the_rest_is_prepared(tmp_path, policy, monkeypatch, capsys):
    """Over several files; tokens as `encode_images` gives them for the pictures one by one."""
    monkeypatch.setattr(token_cache, "BLOCK", 32)
    rows = in_memory(96)  # which fill the last file: an empty one ends the cache
    good = list(rows)
    for name, value, records in PLANTED.values():
        for k in records:
            good.remove(rows[k])
            rows[k] = rows[k] | {name: value}
    source = dataclasses.replace(MEMORY, max_chain=250)
    prepared = token_cache.prepare(rows, *policy, source, tmp_path, batch=8)
    causes = {cause: len(records) for cause, (_, _, records) in PLANTED.items()}
    assert prepared.counts == {"good": 89, **causes}
    printed = capsys.readouterr()
    assert "7 of 96 records skipped (7.3%): 1 box outside, 2 broken image, " in printed.out
    for cause, (_, _, records) in PLANTED.items():  # the first one is shown
        said = f"record {records[0]} is skipped: {cause}: "
        assert (printed.out + printed.err).count(said) == 1
    assert len(prepared) == len(good) == 89
    chosen = [88, 0, 31, 32, 5, 5, 60]
    prompts, chains, tokens = prepared.batch(chosen)
    assert prompts == [good[k]["prompt"] for k in chosen]
    assert chains == [good[k]["chain"] for k in chosen]
    alone = [gotr1.encode_images(policy[0], [good[k]["image"]]) for k in chosen]
    assert tokens.dtype == torch.int64 and torch.equal(tokens, torch.cat(alone))
    for outside in (-1, 89):
        with pytest.raises(IndexError):
            prepared.batch([outside])


@pytest.mark.parametrize("streaming", [False, True])
def test_processes_share_the_work_and_any_number_goes_on(
    streaming, tmp_path, policy, monkeypatch, encoded
):
    """One; three; three that are killed, continued by two: the same records in the same order, and
    no picture is encoded twice, but for those of the files that were not written to their end."""
    monkeypatch.setattr(token_cache, "BLOCK", 4)
    monkeypatch.setattr(token_cache.time, "sleep", lambda _, sleep=time.sleep: sleep(0.01))
    source = write_parquet(tmp_path / "set", [inline(example) for example in make_examples(40)])
    source.streaming = streaming

    def prepare(cache: str, world: int) -> list:
        results = []

        def work(rank):
            while rank and not list((tmp_path / cache).glob("*/cache.json")):
                time.sleep(0.01)  # as the barrier of torch.distributed does
            rows = got_data.open_rows(source)
            done = token_cache.prepare(rows, *policy, source, tmp_path / cache, rank, world, 2)
            results.append(content(done))

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        assert len(results) == world  # else one waits for files that nobody writes
        return results

    (one,) = prepare("one", 1)
    assert one[0] == [example.prompt for example in make_examples(40)] and sum(encoded) == 40
    encoded.clear()
    assert prepare("three", 3) == [one] * 3 and sum(encoded) == 40

    (folder,) = (tmp_path / "three").iterdir()
    (folder / "tokens_000003.safetensors").unlink()
    last = folder / "tokens_000009.safetensors"
    last.write_bytes(last.read_bytes()[:-7])  # as a power cut may leave it
    encoded.clear()
    assert prepare("three", 2) == [one] * 2
    assert sum(encoded) == 8


def test_a_kill_costs_one_file(tmp_path, policy, monkeypatch, encoded):
    """In the last moment, when a file is written and not yet in its place."""
    monkeypatch.setattr(token_cache, "BLOCK", 8)
    rows = in_memory(40)
    whole = content(token_cache.prepare(rows, *policy, MEMORY, tmp_path / "whole", batch=4))
    write = Path.replace

    def write_3(self, target):
        if str(target).endswith("000002.safetensors"):
            raise KeyboardInterrupt
        return write(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", write_3)
        with pytest.raises(KeyboardInterrupt):
            token_cache.prepare(rows, *policy, MEMORY, tmp_path / "cache", batch=4)
    encoded.clear()
    resumed = token_cache.prepare(rows, *policy, MEMORY, tmp_path / "cache", batch=4)
    assert sum(encoded) == 40 - 16
    assert content(resumed) == whole


def change_picture(folder, rows, source):
    (folder / rows[13]["file"]).write_bytes(png(make_examples(1, seed=9)[0].image))


def mend_picture(folder, rows, source):
    """One that could not be read before."""
    (folder / rows[3]["file"]).write_bytes(png(make_examples(1, seed=9)[0].image))


def change_prompt(folder, rows, source):
    rows[13]["caption"] = "something else"
    save_lines(folder, rows)


def change_flag(folder, rows, source):
    source.max_chain = 500


CHANGES = {  # change -> what is said, and how many pictures are encoded again
    change_picture: ("pictures/13.png has changed", 8),
    mend_picture: ("pictures/3.png has changed", 8),
    change_prompt: ("--data changed since", 19),
    change_flag: ("--max_chain changed since", 19),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_encoded_again(change, tmp_path, policy, monkeypatch, encoded, capsys):
    monkeypatch.setattr(token_cache, "BLOCK", 8)
    source, rows = write_lines(tmp_path / "set", make_examples(20))
    (tmp_path / "set" / rows[3]["file"]).write_bytes(b"no picture")

    def prepare(cache):
        def open_rows():
            return got_data.open_rows(source)

        return token_cache.prepare(open_rows, *policy, source, tmp_path / cache, batch=4)

    prepare("cache")
    change(tmp_path / "set", rows, source)
    capsys.readouterr()
    encoded.clear()
    again = prepare("cache")
    said, pictures = CHANGES[change]
    assert said in capsys.readouterr().out and sum(encoded) == pictures
    assert content(again) == content(prepare("from nothing"))
    with monkeypatch.context() as patch:  # nothing is touched: nothing is read, encoded or written
        patch.setattr(got_data, "open_rows", never)
        patch.setattr(got_data, "read_image", never)
        patch.setattr(token_cache.run, "write_whole", never)
        prepare("cache")
        source.streaming = True  # the same records in another way
        prepare("cache")


def test_another_picture_tokenizer_means_another_cache(tmp_path, policy, monkeypatch, encoded):
    """And so do other rules; a language model in training does not."""
    rows = in_memory(10)
    other = copy.deepcopy(policy[0])
    token_cache.prepare(rows, *policy, MEMORY, tmp_path)
    other.model.language_model.layers[0].mlp.up_proj.weight.data += 1
    token_cache.prepare(never, other, policy[1], MEMORY, tmp_path)
    assert sum(encoded) == 10
    other.model.vqmodel.encoder.conv_in.weight.data += 1
    prepared = token_cache.prepare(rows, other, policy[1], MEMORY, tmp_path)
    assert sum(encoded) == 20
    images = [row["image"] for row in rows]
    assert content(prepared)[2] == gotr1.encode_images(other, images).tolist()
    monkeypatch.setattr(token_cache, "RULES", token_cache.RULES + 1)
    token_cache.prepare(rows, *policy, MEMORY, tmp_path)
    assert sum(encoded) == 40


def test_other_toy_scenes_mean_another_cache():
    sources = []
    for changes in ({}, {"examples": 9}, {"seed": 1}):
        sources.append(train_sft.data_source(train_sft.Config(**changes)).data)
    assert len(set(sources)) == 3


def test_too_many_bad_records_stop_the_run(tmp_path, policy, monkeypatch):
    monkeypatch.setattr(token_cache, "BLOCK", 128)
    rows = in_memory(140)
    for row in rows[50:80]:
        row["chain"] = "nothing"
    rows[128:] = [None] * 12  # never looked at
    message = r"more than 20%.*30 of 128 records skipped .*: 30 no box"
    with pytest.raises(ValueError, match=message):
        token_cache.prepare(rows, *policy, MEMORY, tmp_path / "a")
    few = rows[:15] + rows[50:55]  # twenty pictures: 25 % at the end, although fewer than 100
    with pytest.raises(ValueError, match="5 of 20 records"):
        token_cache.prepare(few, *policy, MEMORY, tmp_path / "b")
    with pytest.raises(ValueError, match="0 of 0 records"):
        token_cache.prepare([], *policy, MEMORY, tmp_path / "c")
    assert len(token_cache.prepare(rows[:49] + rows[50:55], *policy, MEMORY, tmp_path / "d")) == 49


def test_no_file_stays_open(tmp_path, policy, monkeypatch):
    """Thousands of files must not meet the limit of open ones."""
    monkeypatch.setattr(token_cache, "BLOCK", 1)
    before = len(list(Path("/proc/self/fd").iterdir()))
    prepared = token_cache.prepare(in_memory(9), *policy, MEMORY, tmp_path)
    assert len(content(prepared)[0]) == 9
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_dry_run_shows_records_with_their_boxes(tmp_path, policy, capsys, monkeypatch):
    rows = in_memory(12)
    rows[1]["chain"] = "nothing"
    cells = []

    def draw_sheet(rows, path, **layout):
        cells.extend(rows)
        Image.new("RGB", (1, 1)).save(path)

    monkeypatch.setattr(token_cache.sheets, "draw_sheet", draw_sheet)
    path = token_cache.dry_run(rows, *policy, MEMORY, tmp_path / "new" / "folder")
    printed = capsys.readouterr().out
    assert path.is_file() and len(cells) == 2 * 8
    assert "record 1 is skipped: no box" in printed
    for row, before, after in zip(rows[:1] + rows[2:9], cells[::2], cells[1::2], strict=True):
        assert row["prompt"] in printed and row["chain"] in printed
        assert before["chain"] == after["chain"] == row["chain"]
        # the toy's picture tokenizer is nearly perfect
        pixels = [np.asarray(cell["image"].resize((32, 32)), int) for cell in (before, after)]
        assert np.abs(pixels[0] - pixels[1]).mean() < 6
    with pytest.raises(ValueError, match="none of the first 100"):
        token_cache.dry_run(rows[1:2], *policy, MEMORY, tmp_path)
