"""What a table may claim: intervals, the paired test, and the sheets behind the numbers."""

import numpy as np
import pytest
from PIL import Image

from benchmarks import geneval, stats
from toy import world as toy


def rows_of(values, name="x"):
    """values (prompts, samples) -> rows."""
    rows = []
    for i, some in enumerate(values):
        for k, value in enumerate(some):
            measures = {name: float(value)}
            rows.append({"index": i, "prompt": f"p{i}", "sample": k, "measures": measures})
    return rows


def test_interval_of_independent_and_of_equal_samples():
    """One sample per prompt: the binomial standard error. Four equal ones say no more than one."""
    hits = np.arange(200)[:, None] % 5 == 0
    one = stats.intervals(rows_of(hits))["x"]
    four = stats.intervals(rows_of(np.repeat(hits, 4, axis=1)))["x"]
    error = 1.96 * np.sqrt(0.2 * 0.8 / 200)
    assert one["score"] == four["score"] == pytest.approx(0.2)
    assert one["high"] - one["low"] == pytest.approx(2 * error, rel=0.1)
    assert four["high"] - four["low"] == pytest.approx(2 * error, rel=0.1)
    assert (one["prompts"], one["samples"], four["samples"]) == (200, 200, 800)


def test_overall_is_the_mean_of_the_tags():
    """Not of the pictures: a tag with few prompts weighs as much as one with many."""
    rows = rows_of(np.ones((10, 4)), "counting") + rows_of(np.zeros((90, 4)), "colors")
    summary = stats.intervals(rows, geneval.TAGS)
    assert summary["overall"]["score"] == 0.5
    assert summary["overall"]["samples"] == 400
    assert list(summary) == ["counting", "colors", "overall"]
    assert "overall" not in stats.intervals(rows)
    uneven = rows_of([[1, 1, 1], [0]], "counting")  # over pictures, not over prompts
    assert stats.intervals(uneven)["counting"]["score"] == 0.75


def test_paired_test_is_exact_and_honest():
    """Three differences of one sign: 2 of 8 sign patterns are as extreme. And of runs that are the
    same but for luck, about one in twenty is called different."""
    assert stats.sign_flips([np.array([0.1, 0.2, 0.4])]) == pytest.approx(2 / 8, abs=0.03)
    assert stats.sign_flips([np.zeros(5)]) == 1.0
    rng = np.random.default_rng(0)
    different = []
    for _ in range(200):
        gaps = (rng.random(60) < 0.5).astype(float) - (rng.random(60) < 0.5)
        different.append(stats.sign_flips([gaps]) < 0.05)
    assert 0.01 <= np.mean(different) <= 0.1
    assert stats.holm([0.01, 0.04, 0.03, 0.9]) == [True, False, False, False]
    assert stats.holm([0.04, 0.03, 0.001]) == [False, False, True]
    assert stats.holm([0.02, 0.001]) == [True, True]


def test_compare_finds_what_pairing_shows():
    """Prompts differ far more than runs: unpaired intervals overlap, the paired test sees it."""
    rng = np.random.default_rng(0)
    level = rng.random((100, 1)) * 0.8
    a = level + 0.02 * rng.standard_normal((100, 4))
    b = level + 0.03 + 0.02 * rng.standard_normal((100, 4))
    same = rows_of(level + 0.02 * rng.standard_normal((100, 4)), "same")
    first = rows_of(a)
    second = rows_of(b)
    assert stats.intervals(second)["x"]["low"] < stats.intervals(first)["x"]["high"]
    rows_a = first + same
    rows_b = second[40:] + rows_of(level, "same")
    found = {row["name"]: row for row in stats.compare({"rows": rows_a}, {"rows": rows_b})}
    assert found["x"]["real"] and found["x"]["prompts"] == 90
    assert found["x"]["low"] < 0.03 < found["x"]["high"]
    assert found["x"]["difference"] == pytest.approx(0.03, abs=0.01)
    assert not found["same"]["real"] and found["same"]["low"] < 0 < found["same"]["high"]
    with pytest.raises(ValueError, match="no prompt"):
        stats.compare({"rows": first}, {"rows": rows_of(b, "y")})


def test_cells_of_a_sheet_are_right_and_wrong_ones():
    cells = [{"score": float(k % 10 == 0), "k": k} for k in range(100)]
    assert [cell["k"] for cell in stats.choose(cells)] == [0, 20, 50, 70, 1, 25, 51, 75]
    shades = [{"score": k / 20, "k": k} for k in range(20)]
    assert [cell["k"] for cell in stats.choose(shades)] == [19, 18, 17, 16, 3, 2, 1, 0]
    assert len(stats.choose(cells[:2])) == 2


def test_sheets_show_right_and_wrong(tmp_path):
    wrong = {
        "prompt": "a red ball " * 12,
        "score": 0.0,
        "reason": "nothing " * 40,
        "boxes": [["red ball", 0, 0, 400, 400]],
        "image": toy.draw_scene(["red ball", "blue cube"], [(0, 0, 3), (5, 4, 3)]),
    }
    right = {**wrong, "score": 1.0, "reason": ""}
    stats.draw_sheet([wrong, right], tmp_path / "sheet.png")
    pixels = np.array(Image.open(tmp_path / "sheet.png"))
    assert (pixels == (0xD6, 0x28, 0x39)).all(-1).any()
    assert (pixels == (0x23, 0x86, 0x2C)).all(-1).any()
