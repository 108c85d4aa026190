"""Variety of plans and looks of pictures: values worked out by hand."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation import variety
from render_boxes import Box, format_chain

LEFT = Box("ball", 0, 0, 200, 200)
HALF_RIGHT = Box("ball", 100, 0, 300, 200)  # shares 100 x 200 of 300 x 200 with LEFT: IoU 1/3
FAR = Box("ball", 500, 500, 700, 700)


def picture(pixels) -> Image.Image:
    return Image.fromarray(np.array(pixels, dtype=np.uint8))


# -------------------------------------------------------------------------------------------------
# Plans


def test_layouts_that_are_equal_shifted_and_disjoint():
    assert variety.layout_variety([[LEFT], [LEFT]], group=2) == [0.0]
    assert variety.layout_variety([[LEFT], [HALF_RIGHT]], group=2) == pytest.approx([2 / 3])
    assert variety.layout_variety([[LEFT], [FAR]], group=2) == [1.0]


def test_each_group_is_measured_by_itself():
    layouts = [[LEFT], [LEFT], [FAR], [FAR], [LEFT], [FAR]]
    assert variety.layout_variety(layouts, group=2) == [0.0, 0.0, 1.0]
    # three pairs in the first group: 0, 1, 1; three in the second: 0, 1, 1
    assert variety.layout_variety(layouts, group=3) == pytest.approx([2 / 3, 2 / 3])


def test_all_pairs_of_samples_and_all_shared_names_count():
    """Pairs of "ball": 1 (samples 1 and 2), 2/3 (1 and 3), 1 (2 and 3). Of "cube": 0 (1 and 3)."""
    cube = Box("cube", 600, 0, 900, 300)
    layouts = [[LEFT, cube], [FAR], [cube, HALF_RIGHT]]
    want = (1 + 2 / 3 + 1 + 0) / 4
    assert variety.layout_variety(layouts, group=3) == pytest.approx([want])


def test_no_shared_name_is_none():
    cube = Box("cube", *LEFT[1:])
    assert variety.layout_variety([[LEFT], [cube]], group=2) == [None]
    assert variety.layout_variety([[], []], group=2) == [None]
    assert variety.layout_variety([[LEFT], []], group=2) == [None]
    assert variety.layout_variety([[LEFT], [FAR]], group=1) == [None, None]


def test_a_plan_is_not_compared_with_itself():
    """Two boxes of one name in one plan, and a plan without that name."""
    assert variety.layout_variety([[LEFT, FAR], []], group=2) == [None]


def test_repeated_names_are_matched_in_order():
    equal = [[LEFT, FAR], [LEFT, FAR]]
    assert variety.layout_variety(equal, group=2) == [0.0]
    exchanged = [[LEFT, FAR], [FAR, LEFT]]
    assert variety.layout_variety(exchanged, group=2) == [1.0]
    one_more = [[LEFT, FAR], [HALF_RIGHT]]  # FAR has no partner
    assert variety.layout_variety(one_more, group=2) == pytest.approx([2 / 3])


def centred(x, y):
    return [Box("ball", x - 50, y - 50, x + 50, y + 50)]


def test_place_entropy_of_quarters():
    quarters = [centred(125, 125), centred(875, 125), centred(125, 875), centred(875, 875)]
    assert variety.place_entropy(quarters) == pytest.approx(2)
    assert variety.place_entropy(5 * quarters, cells=2) == pytest.approx(2)
    assert variety.place_entropy(5 * quarters, cells=1) == 0
    uneven = quarters[:1] * 3 + quarters[1:2]
    want = 0.75 * math.log2(4 / 3) + 0.25 * 2
    assert variety.place_entropy(uneven) == pytest.approx(want)


def test_place_entropy_is_largest_on_the_full_grid():
    everywhere = []
    for x in (125, 375, 625, 875):
        for y in (125, 375, 625, 875):
            everywhere.append(centred(x, y))
    assert variety.place_entropy(everywhere) == pytest.approx(4)


def test_place_entropy_takes_the_first_box_of_layouts_that_have_one():
    layouts = [[LEFT, FAR], [LEFT], [], [LEFT, HALF_RIGHT]]
    assert variety.place_entropy(layouts) == 0
    assert variety.place_entropy([[LEFT], [FAR, LEFT], []]) == pytest.approx(1)


def test_a_centre_on_the_far_edge_is_in_the_last_cell():
    corner = [Box("ball", 1000, 1000, 1000, 1000)]
    assert variety.place_entropy([corner, centred(900, 900)]) == 0
    assert variety.place_entropy([corner, centred(700, 900)]) == pytest.approx(1)


def test_chains_that_differ_in_boxes_only_are_one_text():
    here = format_chain(["A", LEFT, "on grass."])
    there = format_chain(["A", FAR, "on grass."])
    other = format_chain(["A", LEFT, "on snow."])
    assert variety.different_chains([here, there, here, other], group=2) == [1.0, 2.0]
    assert variety.different_chains([here, there, here, other], group=4) == [2.0]
    assert variety.different_chains([here, there, here, other], group=1) == [1.0] * 4
    assert variety.different_chains(["", ""], group=2) == [1.0]


@pytest.mark.parametrize("group", [0, 2, 4])
def test_samples_that_are_not_whole_groups(group):
    with pytest.raises(ValueError, match=f"3 samples are not whole groups of {group}"):
        variety.layout_variety([[LEFT]] * 3, group)
    with pytest.raises(ValueError, match=f"3 samples are not whole groups of {group}"):
        variety.different_chains(["A ball."] * 3, group)


def test_nothing_to_measure():
    assert variety.layout_variety([], group=4) == []
    assert variety.place_entropy([]) == 0.0
    assert variety.place_entropy([[], []]) == 0.0
    assert variety.different_chains([], group=4) == []
    assert variety.looks([]) == []


# -------------------------------------------------------------------------------------------------
# Pictures


def looks_of(image: Image.Image) -> list[float]:
    """[brightness, saturation, edges, color_entropy]"""
    (row,) = variety.looks([image])
    assert list(row) == ["brightness", "saturation", "edges", "color_entropy"]
    assert all(type(value) is float for value in row.values()), "the log writes JSON"
    return list(row.values())


def test_plain_pictures():
    assert looks_of(Image.new("RGB", (8, 8), "black")) == [0, 0, 0, 0]
    assert looks_of(Image.new("RGB", (8, 8), "white")) == [1, 0, 0, 0]
    red = looks_of(Image.new("RGB", (8, 8), (255, 0, 0)))
    assert red == pytest.approx([0.299, 1, 0, 0], abs=1 / 255)  # luma is a whole number


@pytest.mark.parametrize("color", [(50, 200, 150), (200, 150, 50), (150, 50, 200)])
def test_saturation_of_one_color(color):
    """(200 - 50) / 200, whichever channel is which. Black has none."""
    assert looks_of(picture([[color]]))[1] == pytest.approx(0.75)
    assert looks_of(picture([[color, (0, 0, 0)]]))[1] == pytest.approx(0.375)


def test_saturation_is_that_of_pil():
    noise = picture(np.random.default_rng(0).integers(0, 256, (32, 32, 3)))
    want = np.asarray(noise.convert("HSV"))[:, :, 1].mean() / 255  # cut to whole numbers
    assert looks_of(noise)[1] == pytest.approx(want, abs=1 / 255)


def test_stripes():
    """Columns black, white, black, white. Of a row's neighbours across all differ, 4 x 3 of them,
    of those down none, 2 x 4 being 3 x 4: half of all."""
    columns = np.zeros((4, 4, 3))
    columns[:, 1::2] = 255
    assert looks_of(picture(columns)) == pytest.approx([0.5, 0, 0.5, 1])
    rows = columns.transpose(1, 0, 2)
    assert looks_of(picture(rows)) == pytest.approx([0.5, 0, 0.5, 1])
    wide = np.tile(columns, (1, 2, 1))  # 4 x 7 of 4 x 7 differ across, 0 of 3 x 8 down
    assert looks_of(picture(wide))[2] == pytest.approx(28 / 52)


def test_a_chessboard_has_the_sharpest_edges():
    squares = np.indices((6, 6)).sum(axis=0) % 2 * 255
    assert looks_of(picture(squares)) == pytest.approx([0.5, 0, 1, 1])
    faint = squares // 255 * 51  # steps of 0.2
    assert looks_of(picture(faint)) == pytest.approx([0.1, 0, 0.2, 0])


def test_colors_are_counted_in_64_bins():
    levels = (10, 70, 140, 250)  # one in each quarter of 0..255
    every = []
    for red in levels:
        for green in levels:
            for blue in levels:
                every.append((red, green, blue))
    assert looks_of(picture([every]))[3] == pytest.approx(6)
    near = [[(0, 0, 0), (63, 63, 63), (64, 0, 0), (0, 0, 64)]]  # shares 1/2, 1/4, 1/4
    assert looks_of(picture(near))[3] == pytest.approx(1.5)


def test_pictures_of_other_sizes_and_modes():
    images = [
        Image.new("L", (5, 3), 255),
        Image.new("RGBA", (3, 5), (255, 255, 255, 0)),
        Image.new("RGB", (1, 1), "white"),
    ]
    for row in variety.looks(images):
        assert list(row.values()) == [1, 0, 0, 0]


def test_comes_without_torch():
    code = "import sys, evaluation.variety; print('torch' in sys.modules, 'numpy' in sys.modules)"
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "True"], done.stderr
