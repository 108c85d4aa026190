"""Variety of plans and looks of pictures: values worked out by hand."""

import math

import numpy as np
import pytest
from PIL import Image

from evaluation import variety
from render_boxes import Box, format_chain

LEFT = Box("ball", 0, 0, 200, 200)
HALF_RIGHT = Box("ball", 100, 0, 300, 200)  # shares 100 x 200 of 300 x 200 with LEFT: IoU 1/3
FAR = Box("ball", 500, 500, 700, 700)
CUBE = Box("cube", 600, 0, 900, 300)

LAYOUTS = [  # samples, group, layout_variety per group
    # each group by itself
    ([[LEFT], [LEFT], [LEFT], [HALF_RIGHT], [LEFT], [FAR]], 2, [0.0, 2 / 3, 1.0]),
    # three pairs in each group: 0, 1, 1
    ([[LEFT], [LEFT], [FAR], [FAR], [LEFT], [FAR]], 3, [2 / 3, 2 / 3]),
    # pairs of "ball": 1 (samples 1 and 2), 2/3 (1 and 3), 1 (2 and 3); of "cube": 0 (1 and 3)
    ([[LEFT, CUBE], [FAR], [CUBE, HALF_RIGHT]], 3, [(1 + 2 / 3 + 1 + 0) / 4]),
    # no two samples share a name
    ([[LEFT], [CUBE]], 2, [None]),
    ([[LEFT], [FAR]], 1, [None, None]),
    # a plan is not compared with itself
    ([[LEFT, FAR], []], 2, [None]),
    # repeated names are matched in order, and one too many has no partner
    ([[LEFT, FAR], [FAR, LEFT]], 2, [1.0]),
    ([[LEFT, FAR], [HALF_RIGHT]], 2, [2 / 3]),
    ([], 4, []),
]


def test_layouts():
    for layouts, group, wanted in LAYOUTS:
        assert variety.layout_variety(layouts, group) == pytest.approx(wanted)


def centred(x, y):
    return [Box("ball", x - 50, y - 50, x + 50, y + 50)]


def test_place_entropy():
    quarters = [centred(125, 125), centred(875, 125), centred(125, 875), centred(875, 875)]
    assert variety.place_entropy(quarters) == pytest.approx(2)
    assert variety.place_entropy(5 * quarters, cells=1) == 0
    uneven = quarters[:1] * 3 + quarters[1:2]
    wanted = 0.75 * math.log2(4 / 3) + 0.25 * 2
    assert variety.place_entropy(uneven) == pytest.approx(wanted)
    # the first box of layouts that have one
    assert variety.place_entropy([[LEFT, FAR], [LEFT], [], [LEFT, HALF_RIGHT]]) == 0
    assert variety.place_entropy([[LEFT], [FAR, LEFT], []]) == pytest.approx(1)
    assert variety.place_entropy([[], []]) == 0.0
    corner = [Box("ball", 1000, 1000, 1000, 1000)]  # on the far edge: in the last cell
    assert variety.place_entropy([corner, centred(900, 900)]) == 0
    assert variety.place_entropy([corner, centred(700, 900)]) == pytest.approx(1)


def test_chains_that_differ_in_boxes_only_are_one_text():
    here = format_chain(["A", LEFT, "on grass."])
    there = format_chain(["A", FAR, "on grass."])
    other = format_chain(["A", LEFT, "on snow."])
    assert variety.different_chains([here, there, here, other], group=2) == [1.0, 2.0]
    assert variety.different_chains([here, there, here, other], group=4) == [2.0]
    assert variety.different_chains(["", ""], group=2) == [1.0]
    for group in (0, 2, 4):
        with pytest.raises(ValueError, match=f"3 samples are not whole groups of {group}"):
            variety.different_chains([here] * 3, group)


def test_all_three_together():
    here, there = (format_chain(["A", box]) for box in (LEFT, FAR))
    empty = ["", ""]
    rows = variety.plan_variety([here, there, *empty], group=2)
    assert rows == [
        {"different_chains": 1, "place_entropy": 1, "layout_variety": 1},
        {"different_chains": 1, "place_entropy": 1},
    ]
    wanted = {"different_chains": 1, "place_entropy": 1, "layout_variety": 0.5}
    assert variety.mean_variety([here, here, here, there, *empty], group=2) == pytest.approx(
        {**wanted, "place_entropy": 0.25 * math.log2(4) + 0.75 * math.log2(4 / 3)}
    )
    assert variety.mean_variety(empty, group=2) == {"different_chains": 1, "place_entropy": 0}


# -------------------------------------------------------------------------------------------------
# Pictures


def looks_of(pixels) -> list[float]:
    """[brightness, saturation, edges, color_entropy]"""
    image = pixels
    if not isinstance(image, Image.Image):
        image = Image.fromarray(np.array(pixels, dtype=np.uint8))
    (row,) = variety.looks([image])
    assert list(row) == ["brightness", "saturation", "edges", "color_entropy"]
    assert all(type(value) is float for value in row.values()), "the log writes JSON"
    return list(row.values())


def test_plain_pictures_of_any_size_and_mode():
    assert looks_of(Image.new("RGB", (8, 8), "black")) == [0, 0, 0, 0]
    red = looks_of(Image.new("RGB", (8, 8), (255, 0, 0)))
    assert red == pytest.approx([0.299, 1, 0, 0], abs=1 / 255)  # luma is a whole number
    assert looks_of(Image.new("L", (5, 3), 255)) == [1, 0, 0, 0]
    assert looks_of(Image.new("RGBA", (3, 5), (255, 255, 255, 0))) == [1, 0, 0, 0]
    assert looks_of(Image.new("RGB", (1, 1), "white")) == [1, 0, 0, 0]
    assert variety.looks([]) == []


def test_saturation():
    """(200 - 50) / 200, whichever channel is which. Black has none."""
    for color in ((50, 200, 150), (200, 150, 50), (150, 50, 200)):
        assert looks_of([[color]])[1] == pytest.approx(0.75)
    assert looks_of([[(50, 200, 150), (0, 0, 0)]])[1] == pytest.approx(0.375)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    wanted = np.asarray(noise.convert("HSV"))[:, :, 1].mean() / 255  # PIL cuts to whole numbers
    assert looks_of(noise)[1] == pytest.approx(wanted, abs=1 / 255)


def test_edges_and_colors():
    """Columns black, white, black, white. Of a row's neighbours across all differ, 4 x 3 of them,
    of those down none, 2 x 4 being 3 x 4: half of all."""
    columns = np.zeros((4, 4, 3))
    columns[:, 1::2] = 255
    assert looks_of(columns) == pytest.approx([0.5, 0, 0.5, 1])
    wide = np.tile(columns, (1, 2, 1))  # 4 x 7 of 4 x 7 differ across, 0 of 3 x 8 down
    assert looks_of(wide)[2] == pytest.approx(28 / 52)
    assert looks_of(wide.transpose(1, 0, 2))[2] == pytest.approx(28 / 52)
    chessboard = np.indices((6, 6)).sum(axis=0) % 2 * 255
    assert looks_of(chessboard) == pytest.approx([0.5, 0, 1, 1])
    assert looks_of(chessboard // 255 * 51) == pytest.approx([0.1, 0, 0.2, 0])  # steps of 0.2
    levels = np.array([10, 70, 140, 250])  # one in each quarter of 0..255
    every = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, 64, 3)
    assert looks_of(every)[3] == pytest.approx(6)
    near = [[(0, 0, 0), (63, 63, 63), (64, 0, 0), (0, 0, 64)]]  # shares 1/2, 1/4, 1/4
    assert looks_of(near)[3] == pytest.approx(1.5)


# -------------------------------------------------------------------------------------------------
# Collapse


def warnings_of(values: list[dict]) -> list[tuple[int, str]]:
    """(step, name) of each warning of a run whose log gets these rows, one after the other."""
    found = []
    for step in range(len(values)):
        for warning in variety.collapse_warnings(values[: step + 1]):
            found.append((step, warning.split()[1]))
    return found


def test_a_collapse_is_said_once_when_the_limit_is_passed():
    layouts = [0.8] * 5 + [1.0] * 5  # 0.9 on average: the limit is 0.45
    layouts += [0.7, 0.46, 0.44, 0.5, 0.3, 0.1]
    assert warnings_of([{"layout_variety": value} for value in layouts]) == [(12, "layout_variety")]
    texts = [0.5] * 10 + [0.2, 0.051, 0.049, 0.0]  # the limit is 0.05
    assert warnings_of([{"entropy_text": value} for value in texts]) == [(12, "entropy_text")]
    both = [{"layout_variety": 0.9, "entropy_text": 0.5}] * 10
    both += [{"layout_variety": 0.4, "entropy_text": 0.04}]
    assert warnings_of(both) == [(10, "layout_variety"), (10, "entropy_text")]
    (line, _) = variety.collapse_warnings(both)
    assert line == (
        "warning: layout_variety is 0.4, less than 0.5 of the 0.9 of the first 10 steps: the plans "
        "of a prompt become alike. What helps: --advantage mean, a larger --kl"
    )


def test_no_collapse_is_said_of_what_fell_at_first_or_was_not_measured():
    falling = [{"layout_variety": value} for value in (0.9, *[0.2] * 9, 0.19, 0.18)]
    assert warnings_of(falling) == []  # half of the first ten steps, not of the first one
    rows = [{"step": step} for step in range(5)] + [{"layout_variety": 0.9}] * 10
    assert warnings_of([*rows, {"layout_variety": 0.1}, {"step": 16}]) == [(15, "layout_variety")]
    assert warnings_of([{"entropy_text": 0.0}] * 30) == []
