"""Chains, boxes and pictures against values by hand, properties and the pixels.
pytest tests/test_render_boxes.py"""

import itertools
import os
import random
import re
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageColor, ImageDraw

from render_boxes import (
    BOX_END,
    BOX_START,
    COLOURS,
    MARKERS,
    OBJ_END,
    OBJ_START,
    Box,
    candidate_spots,
    chain_problems,
    draw_boxes,
    first_free,
    format_chain,
    iou,
    main,
    parse_chain,
    place_labels,
    strip_boxes,
)

CHAIN = (
    "A <|obj_start|>red ball<|obj_end|> <|box_start|>(125,250),(375,500)<|box_end|> left of a "
    "<|obj_start|>blue dog<|obj_end|> <|box_start|>(560,300),(900,700)<|box_end|>, on grass."
)
RED_BALL, BLUE_DOG = Box("red ball", 125, 250, 375, 500), Box("blue dog", 560, 300, 900, 700)


def short(text):
    """<o>, </o>, <b>, </b> for the markers, so that the cases below can be read."""
    shorthands = {"<o>": OBJ_START, "</o>": OBJ_END, "<b>": BOX_START, "</b>": BOX_END}
    for mark, marker in shorthands.items():
        text = text.replace(mark, marker)
    return text


# -------------------------------------------------------------------------------------------------
# Reading and writing


def test_the_chain_of_the_docstring():
    assert parse_chain(CHAIN) == [RED_BALL, BLUE_DOG]
    assert chain_problems(CHAIN) == []
    assert strip_boxes(CHAIN) == "A red ball left of a blue dog, on grass."
    parts = ["A", RED_BALL, "left of a", BLUE_DOG]
    assert format_chain(parts) == CHAIN.removesuffix(", on grass.")


def test_markers_are_in_the_order_of_the_official_processor():
    """A tokenizer without them gives them ids in this order, and so the released checkpoints have
    them."""
    assert MARKERS == ("<|box_start|>", "<|box_end|>", "<|obj_start|>", "<|obj_end|>")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", []),
        ("no markers at all (1,2),(3,4)", []),
        ("<o>a</o><b>(1,2),(3,4)</b>", [("a", 1, 2, 3, 4)]),
        ("<o> a \n b </o>\n\t<b> ( 1 , 2 ) , ( 3 , 4 ) </b>", [("a b", 1, 2, 3, 4)]),
        ("<o>a</o> <b>(1,2),(3,4)</b> <b>(5,6),(7,8)</b>", [("a", 1, 2, 3, 4), ("a", 5, 6, 7, 8)]),
        ("<o>a</o> <b>(9,9),(3,4)</b> <b>(5,6),(7,8)</b>", [("a", 5, 6, 7, 8)]),
        ("<o>a</o> and <b>(1,2),(3,4)</b>", []),  # only white space between a name and its box
        ("<o>a</o> <o>b</o> <b>(1,2),(3,4)</b>", [("b", 1, 2, 3, 4)]),
        ("<o>a<o>b</o> <b>(1,2),(3,4)</b>", [("b", 1, 2, 3, 4)]),  # a name holds no marker
        ("<o>a</o> </o> <b>(1,2),(3,4)</b>", []),
        ("<o> </o> <b>(1,2),(3,4)</b>", []),
        ("<b>(1,2),(3,4)</b>", []),
        ("<o>a</o> <b>(1,2),(3,4)", []),
        ("<o>a</o> <b>(1,2),(1,4)</b> <b>(1,2),(3,2)</b>", []),
        ("<o>a</o> <b>(0,0),(1000,1000)</b>", [("a", 0, 0, 1000, 1000)]),
        ("<o>a</o> <b>(0,0),(1001,10)</b> <b>(0,0),(10,1001)</b>", []),
        ("<o>a</o> <b>(0,0),(00010,10)</b>", []),
        ("<o>a</o> <b>(0,0),(" + "9" * 5000 + ",10)</b>", []),
        ("<o>a</o> <b>(-1,0),(10,10)</b>", []),
        ("<o>a</o> <b>(0.5,0),(10,10)</b>", []),
        ("<o>a</o> <b>(٠,٠),(٣,٤)</b>", []),  # digits, but not ASCII
        ("<o>红球 \ud800</o> <b>(1,2),(3,4)</b>", [("红球 \ud800", 1, 2, 3, 4)]),
    ],
)
def test_lenient_reading(text, expected):
    assert parse_chain(short(text)) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", ["names no object"]),
        ("a red ball", ["names no object"]),
        ("<o>red ball</o>", ['"red ball"', "character 1 ", "has no box"]),
        (
            "<o>a</o> <b>(1,2),(3,4)</b> or <b>(5,6),(7,8)</b>",
            ["(5,6),(7,8)", "character 66 ", "follows no object"],
        ),
        ("<o> </o> <b>(1,2),(3,4)</b>", ["has no name"]),
        ("<o>a</o> <b>(1,2) (3,4)</b>", ['"(1,2) (3,4)"', "cannot be read"]),
        ("<o>a</o> <b>(1,2),(1000,4)</b>", ["leaves the picture", "999"]),
        ("<o>a</o> <b>(3,2),(3,4)</b>", ["ends before it starts", "x2"]),
        ("<o>a</o> <b>(1,4),(3,4)</b>", ["ends before it starts", "y2"]),
        ("<o>a</o> <b>(1,2),(3,4)", ["<|box_start|>", "character 27 ", "no partner"]),
        ("<o>a</o> <b>(1,2),(3,4)</b> </o>", ["<|obj_end|>", "no partner"]),
        ("the <o>ball <o>a</o> <b>(1,2),(3,4)</b>", ["character 5 ", "no partner"]),
    ],
)
def test_strict_reading_says_what_is_wrong_and_where(text, expected):
    (problem,) = chain_problems(short(text))
    assert all(words in problem for words in expected), problem
    assert problem.endswith(".") and "\n" not in problem


def test_strict_reading_says_everything_that_is_wrong():
    text = short("<o>a</o> <o></o> <b>(1,2),(0,1000)</b> x <b>oops</b> </b>")
    assert len(chain_problems(text)) == 7


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a <o>ball</o> <b>(12,", "a ball"),
        ("a <o>ball</o> (12,30),(40,50)</b> there", "a ball there"),
        ("a <o>ball</o> 30),(40,50)</b> there", "a ball there"),
        ("a <o>ball", "a ball"),
        ("a ball</o> <b>what?</b> there", "a ball there"),
        ("a <o>ball</o> <|box_sta", "a ball"),
        ("a <o>ball</o> box_start|>(12,30),(4", "a ball"),
        ("a <o>ball</o> <|bo", "a ball"),
        ("a ball (the red one), 3 dogs; (2 small).", "a ball (the red one), 3 dogs; (2 small)."),
    ],
)
def test_no_coordinates_and_markers_reach_the_judge(text, expected):
    assert strip_boxes(short(text)) == expected


def test_written_boxes_are_whole_numbers_on_the_grid():
    outside = [Box("a", -3.2, 0.4, 1000, 2000.7)]
    assert format_chain(outside) == short("<o>a</o> <b>(0,0),(999,999)</b>")
    assert format_chain([Box("a", 1.6, 2.4, 10, 20)]) == short("<o>a</o> <b>(2,2),(10,20)</b>")
    assert format_chain([]) == ""


words = st.lists(st.text("abcdeäß红", min_size=1, max_size=5), min_size=1, max_size=3).map(" ".join)
spans = st.tuples(st.integers(0, 999), st.integers(0, 999)).filter(lambda ends: ends[0] < ends[1])
boxes = st.builds(lambda name, x, y: Box(name, x[0], y[0], x[1], y[1]), words, spans, spans)
# Words, boxes, whole markers and pieces of all of them in any order: chains as a half-trained model
# writes them.
pieces = ["(1,2),(3,4)", "(1,", "0),(", "12", " ", "\n", ",", "<|", "|>", "box_end", "<"]
debris = st.lists(
    st.one_of(
        st.sampled_from(MARKERS),
        st.sampled_from(pieces),
        boxes.map(lambda box: format_chain([box])),
        words,
        st.text(max_size=3),
    ),
    max_size=12,
).map("".join)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.one_of(words, boxes), max_size=6))
def test_round_trip(parts):
    chain = format_chain(parts)
    planned = [part for part in parts if isinstance(part, Box)]
    assert parse_chain(chain) == planned
    said = [part.name if isinstance(part, Box) else part for part in parts]
    assert strip_boxes(chain) == " ".join(said)
    assert bool(chain_problems(chain)) == (not planned)


@settings(max_examples=200, deadline=None)
@given(st.one_of(debris, st.text()))
def test_any_text_can_be_read(text):
    found = parse_chain(text)
    assert all(isinstance(problem, str) for problem in chain_problems(text))
    stripped = strip_boxes(text)
    assert not any(marker in stripped for marker in MARKERS)
    assert not re.search(r"\(\s*[0-9]+\s*,", stripped)
    assert stripped == " ".join(stripped.split())
    if not chain_problems(text):  # then every box counts, and none leaves the strict reader's grid
        assert len(found) == text.count(BOX_START) == text.count(BOX_END)
        assert len(found) >= text.count(OBJ_START) > 0
        assert all(0 <= box.x1 < box.x2 <= 999 and 0 <= box.y1 < box.y2 <= 999 for box in found)


PIECES = ["(1,1),(", "a", " ", "9", "1,", "(", "<|", "obj_", "|>", ".", OBJ_START + "a"]
PIECES += [*MARKERS, BOX_START + "(", CHAIN]


def test_reading_takes_linear_time():
    """About 0.05 s per text; a quadratic expression would take minutes."""
    for lead in ("", "<|obj_start|>a<|obj_end|> <|box_start|>("):
        for piece in PIECES:
            text = lead + piece * (100_000 // len(piece))
            start = time.process_time()
            for read in (parse_chain, strip_boxes, chain_problems):
                read(text)
            assert time.process_time() - start < 1.0, (lead, piece)


# -------------------------------------------------------------------------------------------------
# Overlap


def test_iou_by_hand():
    cases = [
        ((0, 0, 10, 10), (0, 0, 10, 10), 1),
        ((0, 0, 10, 10), (5, 5, 15, 15), 25 / 175),
        ((0, 0, 100, 100), (25, 25, 75, 75), 1 / 4),
        ((0, 0, 10, 10), (10, 0, 20, 10), 0),  # they touch
        ((5, 5, 5, 5), (5, 5, 5, 5), 0),
        ((10, 10, 0, 0), (0, 0, 10, 10), 0),  # upside down
        ((0.5, 0, 1, 1), (0, 0, 1, 1), 0.5),
    ]
    for a, b, expected in cases:
        assert iou(Box("a", *a), Box("b", *b)) == pytest.approx(expected)
        assert iou(Box("b", *b), Box("a", *a)) == pytest.approx(expected)


def coarse(box):
    return Box("", box.x1 // 50, box.y1 // 50, box.x2 // 50 + 1, box.y2 // 50 + 1)


def cells(box):
    return set(itertools.product(range(box.x1, box.x2), range(box.y1, box.y2)))


@settings(max_examples=50, deadline=None)
@given(boxes, boxes)
def test_iou_by_counting_cells(a, b):
    a, b = coarse(a), coarse(b)
    both = len(cells(a) & cells(b))
    assert iou(a, b) == pytest.approx(both / len(cells(a) | cells(b)))


# -------------------------------------------------------------------------------------------------
# Drawing


NAMES = ("red ball", "sky", "teal vase", "colourful tablecloth", "a man")


def random_boxes(count, seed, names=NAMES):
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        x, y = rng.randint(0, 950), rng.randint(0, 950)
        made.append(Box(rng.choice(names), x, y, rng.randint(x + 1, 999), rng.randint(y + 1, 999)))
    return made


def scaled(planned, size):
    return [Box(name, *(int(edge * size / 1000) for edge in edges)) for name, *edges in planned]


def on_canvas(label, width, height):
    return 0 <= label.x1 < label.x2 <= width and 0 <= label.y1 < label.y2 <= height


def apart(a, b):
    return a.x2 <= b.x1 or b.x2 <= a.x1 or a.y2 <= b.y1 or b.y2 <= a.y1


@pytest.mark.parametrize("size, count", [(64, 3), (448, 15), (1024, 30), (64, 30)])
def test_labels_stay_apart_and_on_the_canvas(size, count):
    labels, _ = place_labels(scaled(random_boxes(count, seed=0), size), (size, size))
    assert len(labels) == count
    assert all(on_canvas(label, size, size) for label in labels)
    if (size, count) != (64, 30):  # too many for so small a picture
        assert all(apart(a, b) for a, b in itertools.combinations(labels, 2))


def test_a_label_is_at_its_box_if_nothing_is_in_the_way():
    ball = Box("red ball", 100, 120, 300, 300)
    (label,), _ = place_labels([ball], (448, 448))
    assert (label.name, label.x1, label.y1) == ("red ball", 100, 120)
    fly = Box("a fly", 100, 120, 105, 125)  # so small that a label inside would hide it
    (label, fly_label), _ = place_labels([ball, fly], (448, 448))
    assert apart(label, fly) and apart(fly_label, fly)
    assert abs(fly_label.x1 - 100) + abs(fly_label.y1 - 120) < 80
    (label,), _ = place_labels([Box("red ball", 440, 430, 448, 448)], (448, 448))
    assert on_canvas(label, 448, 448)


def test_long_names_are_shortened_to_the_canvas():
    for size in (64, 256, 1024):
        (label,), font = place_labels([Box("wooden table " * 5000, 0, 0, size, size)], (size, size))
        assert on_canvas(label, size, size)
        assert label.name.startswith("wood") and label.name.endswith("…")
        # The letters that are left are whole.
        assert font.getlength(label.name) <= label.x2 - label.x1


strange_names = st.text(max_size=20) | st.sampled_from(
    ["", " ", "红球", "\ud800", "a\nb\x00", "\u202eabc", "W" * 500]
)
edges = st.floats(-20, 1020)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.builds(Box, strange_names, edges, edges, edges, edges), max_size=6),
    st.sampled_from([64, 150, 448]),
)
def test_anything_can_be_drawn(planned, size):
    assert draw_boxes(planned, size).size == (size, size)
    labels, _ = place_labels(scaled(planned, size), (size, size))
    assert all(on_canvas(label, size, size) for label in labels)


def test_pixels_of_a_box():
    assert draw_boxes([], 100).getcolors() == [(100 * 100, (255, 255, 255))]
    picture = draw_boxes([Box("a", 250, 250, 750, 750), Box("b", 0, 800, 1000, 1000)], 400)
    colours = [ImageColor.getrgb(colour) for colour in COLOURS]
    assert picture.mode == "RGB" and picture.size == (400, 400)
    # The frame lies inside the box, pixels 100 to 299.
    for point in ((100, 200), (299, 200), (200, 299), (299, 299), (100, 100), (102, 200)):
        assert picture.getpixel(point) == colours[0], point
    for point in ((0, 0), (99, 200), (300, 200), (200, 200), (200, 300), (296, 200)):
        assert picture.getpixel(point) == (255, 255, 255), point
    for point in ((0, 399), (399, 399), (399, 320), (200, 320)):
        assert picture.getpixel(point) == colours[1], point


def test_a_layout_in_one_colour_has_no_other():
    """The judge sees layouts in black: a colour could contradict the names."""
    picture = draw_boxes(random_boxes(15, seed=0), 448, colours=("black",))
    colours = [colour for _, colour in picture.getcolors(448 * 448)]
    assert all(red == green == blue for red, green, blue in colours)
    assert {(0, 0, 0), (255, 255, 255)} < set(colours)


def test_labels_are_drawn_where_they_are_placed():
    planned = [RED_BALL, BLUE_DOG, Box("sky", 0, 0, 999, 200)]
    picture = draw_boxes(planned, 448)
    labels, _ = place_labels(scaled(planned, 448), (448, 448))
    for label, colour in zip(labels, COLOURS, strict=False):
        background = ImageColor.getrgb(colour)
        tile = picture.crop(label[1:])
        assert tile.getpixel((0, 0)) == background
        counts = {value: count for count, value in tile.getcolors(tile.width * tile.height)}
        assert (255, 255, 255) in counts
        assert counts[background] > tile.width * tile.height / 2


def test_colours_can_be_told_apart_and_read():
    def linear(value):
        share = value / 255
        return share / 12.92 if share <= 0.03928 else ((share + 0.055) / 1.055) ** 2.4

    def luminance(colour):  # WCAG 2
        red, green, blue = map(linear, colour)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    rgb = [ImageColor.getrgb(colour) for colour in COLOURS]
    assert len(rgb) == 12
    for a, b in itertools.combinations(rgb, 2):
        assert sum((p - q) ** 2 for p, q in zip(a, b, strict=True)) > 60**2
    # WCAG's contrast for large white letters
    assert all(1.05 / (luminance(colour) + 0.05) > 3 for colour in rgb)


def test_drawing_over_a_picture_leaves_it_as_it_was():
    kinds = {"RGB": (300, 200), "RGBA": (99, 99), "P": (90, 400)}
    for mode, size in kinds.items():
        picture = Image.new(mode, size, 5)
        ImageDraw.Draw(picture).ellipse((10, 10, 50, 50), 99)
        before = picture.tobytes()
        drawn = draw_boxes([RED_BALL, BLUE_DOG], image=picture)
        assert picture.tobytes() == before and picture.mode == mode
        assert drawn.size == size and drawn.mode == "RGB"
        assert drawn.tobytes() != picture.convert("RGB").tobytes()
        untouched = draw_boxes([], image=picture)
        assert untouched is not picture and untouched.tobytes() == picture.convert("RGB").tobytes()


def spots_by_definition(label, box, taken, size):
    """Yields how far each free place is from the corner of the box, pixel by pixel."""
    width = label.x2 - label.x1
    height = label.y2 - label.y1
    for x, y in itertools.product(range(size[0] - width + 1), range(size[1] - height + 1)):
        place = Box("", x, y, x + width, y + height)
        if all(apart(place, other) for other in taken):
            yield abs(x - box.x1) + abs(y - box.y1)


@pytest.mark.parametrize("seed", range(6))
def test_the_first_free_spot_is_the_nearest_of_all_places(seed):
    """With fewer obstacles than are looked at: no pixel of the canvas would be nearer."""
    rng = random.Random(seed)
    size = (60, 50)
    taken = []
    for _ in range(rng.randint(0, 9)):
        x, y = rng.randint(0, 50), rng.randint(0, 40)
        taken.append(Box("taken", x, y, x + rng.randint(1, 25), y + rng.randint(1, 12)))
    x, y = rng.randint(0, 59), rng.randint(0, 49)
    box = Box("box", x, y, x + rng.randint(3, 20), y + rng.randint(3, 20))
    label = Box("label", x, y, x + 22, y + 9)
    spot = first_free(candidate_spots(label, box, taken, size), taken)
    nearest = min(spots_by_definition(label, box, taken, size), default=None)
    if nearest is None:
        assert spot is None
    else:
        assert abs(spot.x1 - x) + abs(spot.y1 - y) == nearest


# -------------------------------------------------------------------------------------------------
# The script


def draw(*arguments):
    """The command line, in this process."""
    main([str(argument) for argument in arguments])


def test_command_draws_a_chain(tmp_path, capsys, monkeypatch):
    """From a file on a blank canvas; from standard input over a picture."""
    monkeypatch.chdir(tmp_path)
    chain = Path("chain.txt")
    chain.write_text(CHAIN, encoding="utf-8")
    draw(chain, "--out", "out.png", "--size", 200)
    said = capsys.readouterr()
    assert said.err == "" and "out.png" in said.out and "blue dog" in said.out
    drawn = Image.open("out.png").convert("RGB")
    assert drawn.tobytes() == draw_boxes([RED_BALL, BLUE_DOG], 200).tobytes()

    Image.new("RGB", (200, 200), "green").save("under.png")
    before = os.dup(0)
    with chain.open() as file:
        os.dup2(file.fileno(), 0)
    try:
        draw("-", "--image", "under.png")
    finally:
        os.dup2(before, 0)
    drawn = draw_boxes([RED_BALL, BLUE_DOG], image=Image.open("under.png"))
    assert Image.open("boxes.png").tobytes() == drawn.tobytes()


def test_command_says_in_one_line_what_is_wrong(tmp_path, capsys):
    chain = tmp_path / "chain.txt"
    binary = tmp_path / "binary.txt"
    torn = tmp_path / "torn.txt"
    out = tmp_path / "out.png"
    chain.write_text(CHAIN, encoding="utf-8")
    binary.write_bytes(b"\xff\xfe\x00")
    half = "a\n<o>ball\n</o> there and a <o>cube</o> <b>(1,2),(3</b>"
    torn.write_text(short(half), encoding="utf-8")
    nowhere = tmp_path / "none" / "out.png"
    cases = [
        ([tmp_path / "none.txt"], ["No such file", "none.txt"]),
        ([tmp_path], ["directory"]),
        ([binary], ["binary.txt", "utf-8"]),
        ([torn], ['"ball" at character 3 has no box', "cannot be read"]),
        ([chain, "--out", nowhere], ["No such file", str(tmp_path / "none")]),
        ([chain, "--out", tmp_path / "out.xyz"], ["unknown file extension"]),
        ([chain, "--size", 0], ["--size", "64 to 4096"]),
        ([chain, "--size", "big"], ["--size", "big"]),
        ([chain, "--image", binary], ["cannot identify image file"]),
        ([], ["chain"]),
    ]
    for arguments, words in cases:
        with pytest.raises(SystemExit) as stopped:
            draw("--out", out, *arguments)
        assert stopped.value.code == 2, arguments
        said = capsys.readouterr()
        assert said.out == "", arguments
        assert said.err.startswith("error: ") and len(said.err.splitlines()) == 1, said.err
        assert all(word in said.err for word in words), said.err
    assert not out.exists()


def test_help_explains(capsys):
    with pytest.raises(SystemExit) as stopped:
        draw("--help")
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert all(word in said for word in (OBJ_START, "--size", "--image", "standard input"))
