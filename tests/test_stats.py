"""What a table may claim: intervals and the paired test; and the sheets behind the numbers."""

import numpy as np
import pytest
from PIL import Image

from evaluation import geneval, sheets, stats
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
    assert summary["overall"]["score"] == 0.5 and summary["overall"]["samples"] == 400
    assert list(summary) == ["counting", "colors", "overall"]
    assert "overall" not in stats.intervals(rows)
    uneven = rows_of([[1, 1, 1], [0]], "counting")  # over pictures, not over prompts
    assert stats.intervals(uneven)["counting"]["score"] == 0.75


def pairs_of(gaps):
    """Differences of prompts with one sample -> the strata that a paired test takes."""
    ones = np.ones(len(gaps))
    return [np.stack([np.zeros(len(gaps)), ones, gaps, ones], axis=1)]


def test_paired_test_is_exact_and_honest():
    """Three differences of one sign: 2 of 8 sign patterns are as extreme. And of runs that are the
    same but for luck, about one in twenty is called different."""
    assert stats.paired_p(pairs_of(np.array([0.1, 0.2, 0.4]))) == pytest.approx(2 / 8, abs=0.03)
    assert stats.paired_p(pairs_of(np.zeros(5))) == 1.0
    rng = np.random.default_rng(0)
    different = []
    for _ in range(200):
        gaps = (rng.random(60) < 0.5).astype(float) - (rng.random(60) < 0.5)
        different.append(stats.paired_p(pairs_of(gaps)) < 0.05)
    assert 0.01 <= np.mean(different) <= 0.1
    assert stats.holm([0.01, 0.04, 0.03, 0.9]) == [True, False, False, False]
    assert stats.holm([0.04, 0.03, 0.001]) == [False, False, True]
    assert stats.holm([0.02, 0.001]) == [True, True]


@pytest.mark.parametrize("prompts", [20, 80])
@pytest.mark.parametrize("samples", [1, 4])
def test_intervals_hold_what_they_promise(prompts, samples):
    """95 of 100 intervals hold the true share: where prompts are alike (a share for all), where
    some are hard, and where most are easy, as GenEval's single objects are."""
    rng = np.random.default_rng(0)
    for a, b in ((None, 0.5), (None, 0.9), (1, 1), (9, 1)):
        held = []
        true = b if a is None else a / (a + b)
        for _ in range(2000):
            shares = np.full(prompts, b) if a is None else rng.beta(a, b, prompts)
            right = rng.binomial(samples, shares)
            sums = np.stack([right, np.full(prompts, samples)], axis=1).astype(float)
            low, high = stats.wilson(sums)
            held.append(low <= true <= high)
        assert 0.93 <= np.mean(held) <= 0.97, (a, b)


def test_intervals_at_the_edges_have_a_width():
    """All right of 20 is no certainty: without Student's quantile, Wilson says 0.84."""
    all_right = stats.intervals(rows_of(np.ones((20, 4))), ("x",))
    for name in ("x", "overall"):
        assert all_right[name]["score"] == all_right[name]["high"] == 1
        assert all_right[name]["low"] == pytest.approx(0.82, abs=0.005)
    none_right = stats.intervals(rows_of(np.zeros((80, 1))))["x"]
    assert none_right["score"] == none_right["low"] == 0 and 0.04 < none_right["high"] < 0.05
    alone = stats.intervals(rows_of([[1.0]]))["x"]  # one prompt says next to nothing
    assert alone["low"] < 0.05
    beyond = stats.intervals(rows_of([[2.0], [3.0], [4.0]]))["x"]  # no share: mean and error
    assert beyond["low"] == pytest.approx(3 - 4.303 / np.sqrt(3), abs=0.01)
    shades = np.random.default_rng(0).normal(0.3, 0.02, (50, 1))  # cosines
    found = stats.intervals(rows_of(shades))["x"]
    half = 2.01 * shades.std(ddof=1) / np.sqrt(50)
    assert found["high"] - found["low"] == pytest.approx(2 * half, rel=0.02)


def test_overall_interval_is_put_together_from_the_tags():
    """Against a simulation of what it claims: the mean of a hard and an easy tag."""
    rng = np.random.default_rng(0)
    held = []
    for _ in range(300):
        hard = rng.binomial(1, 0.4, (40, 1))
        easy = rng.binomial(1, 0.95, (40, 1))
        rows = rows_of(hard, "counting") + rows_of(easy, "colors")
        line = stats.intervals(rows, geneval.TAGS)["overall"]
        held.append(line["low"] <= 0.675 <= line["high"])
    assert 0.92 <= np.mean(held) <= 0.98


def test_nan_is_no_result():
    with pytest.raises(ValueError, match="prompt 'p1', sample 0: x is nan"):
        stats.intervals(rows_of([[0.5], [float("nan")]]))
    good = {"rows": rows_of([[0.5], [0.5]])}
    with pytest.raises(ValueError, match="x is inf"):
        stats.compare(good, {"rows": rows_of([[0.5], [float("inf")]])})


def numbered(texts):
    """One row per prompt, numbered as they come: as for a folder of pictures."""
    rows = []
    for i, text in enumerate(texts):
        rows.append({"index": i, "prompt": text, "sample": 0, "measures": {"x": i / 100}})
    return {"rows": rows}


def test_prompts_are_paired_by_text_whatever_their_number():
    texts = [f"prompt {i}" for i in range(30)]
    row = stats.compare(numbered(texts), numbered(texts[:5] + texts[6:]))[0]
    assert (row["prompts"], row["of"]) == (29, 30)
    # a text that stands twice is two prompts: the first with the first
    row = stats.compare(numbered(["a", "b", "a"]), numbered(["a", "a", "c"]))[0]
    assert (row["prompts"], row["of"]) == (2, 4)
    assert row["difference"] == pytest.approx((0.01 - 0.02) / 2)  # 0 to 0, and 0.02 to 0.01


def test_a_comparison_weighs_samples_as_the_table_does():
    a = rows_of([[1, 1, 1], [0]])
    row = stats.compare({"rows": a}, {"rows": rows_of([[1, 1, 1], [1]])})[0]
    assert row["a"] == stats.intervals(a)["x"]["score"] == 0.75
    assert row["b"] == 1 and row["low"] <= row["difference"] <= row["high"]


def test_overall_is_compared_only_where_both_have_all_tags():
    full = []
    for tag in geneval.TAGS:
        full += rows_of(np.ones((4, 1)), tag)
    part = [row for row in full if "colors" not in row["measures"]]
    names = [row["name"] for row in stats.compare({"rows": full}, {"rows": part}, geneval.TAGS)]
    assert names == [tag for tag in geneval.TAGS if tag != "colors"]
    both = stats.compare({"rows": full}, {"rows": full}, geneval.TAGS)
    assert [row["of"] for row in both if row["name"] == "overall"] == [24]


def test_compare_finds_what_pairing_shows():
    """Prompts differ far more than runs: unpaired intervals overlap, the paired test sees it."""
    rng = np.random.default_rng(0)
    level = rng.random((100, 1)) * 0.8
    first = rows_of(level + 0.02 * rng.standard_normal((100, 4)))
    second = rows_of(level + 0.03 + 0.02 * rng.standard_normal((100, 4)))
    same = rows_of(level + 0.02 * rng.standard_normal((100, 4)), "same")
    assert stats.intervals(second)["x"]["low"] < stats.intervals(first)["x"]["high"]
    rows_b = second[40:] + rows_of(level, "same")
    found = {row["name"]: row for row in stats.compare({"rows": first + same}, {"rows": rows_b})}
    assert found["x"]["real"] and found["x"]["prompts"] == 90
    assert found["x"]["low"] < 0.03 < found["x"]["high"]
    assert found["x"]["high"] - found["x"]["low"] < 0.02, "unpaired it would be 0.13"
    assert found["x"]["difference"] == pytest.approx(0.03, abs=0.01)
    assert not found["same"]["real"] and found["same"]["low"] < 0 < found["same"]["high"]
    with pytest.raises(ValueError, match="no prompt"):
        stats.compare({"rows": first}, {"rows": rows_of(level, "y")})


# -------------------------------------------------------------------------------------------------
# Sheets


def test_a_sheet_gets_right_and_wrong_pictures_or_the_best_and_the_worst():
    rows = [{"score": float(k % 10 == 0), "k": k} for k in range(100)]
    chosen = sheets.right_and_wrong(rows)
    assert [row["k"] for row in chosen] == [0, 20, 50, 70, 1, 25, 51, 75]
    shades = [{"score": k / 20, "k": k} for k in range(20)]
    chosen = sheets.right_and_wrong(shades)
    assert [row["k"] for row in chosen] == [19, 18, 17, 16, 3, 2, 1, 0]
    assert len(sheets.right_and_wrong(rows[:2])) == 2


def test_what_a_row_has_is_what_is_drawn(tmp_path):
    """One panel for a picture, two with a plan, three with what a judge found."""
    scene = toy.Scene(["red ball"], [], [(0, 0, 3)])
    path = tmp_path / "sheet.png"

    def drawn(rows, **layout):
        sheets.draw_sheet(rows, path, side=100, **layout)
        return Image.open(path)

    def has_color(picture, color):
        return (np.array(picture) == color).all(-1).any()

    row = {"prompt": "a red ball " * 20, "image": toy.draw_scene(scene.names, scene.cells)}
    planned = {**row, "chain": toy.chain_of(scene), "note": "sem 1.00"}
    found = {**planned, "found": scene.boxes}
    judged = {**row, "score": 0.0, "reason": "nothing " * 40, "boxes": [["ball", 0, 0, 400, 400]]}
    gap = sheets.MARGIN
    assert drawn([row]).width == 100 + 2 * gap
    assert drawn([planned] * 5, columns=2).width == 2 * (200 + gap) + gap
    assert drawn([found], title="after 3 steps").height > drawn([found]).height
    assert drawn([found]).width == 300 + 2 * gap
    assert has_color(drawn([judged]), (0xD6, 0x28, 0x39))
    assert has_color(drawn([{**judged, "score": 1.0, "reason": ""}]), (0x23, 0x86, 0x2C))
    row["image"].save(tmp_path / "picture.png")
    assert drawn([{**judged, "image": tmp_path / "picture.png"}]).size == drawn([judged]).size


def test_a_long_film_has_frames_of_the_whole_run(tmp_path):
    paths = []
    for k in range(100):
        paths.append(tmp_path / f"{k:06d}.png")
        Image.new("RGB", (8, 8), (k, 0, 0)).save(paths[-1])
    sheets.join_frames(paths, tmp_path / "film.gif")
    with Image.open(tmp_path / "film.gif") as film:
        assert film.n_frames == sheets.MOST_FRAMES
        assert film.convert("RGB").getpixel((0, 0)) == (0, 0, 0)
        film.seek(film.n_frames - 1)
        assert film.convert("RGB").getpixel((0, 0))[0] == 99
