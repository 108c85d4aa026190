"""What a run tells of itself besides the reward: evaluation of all parts, given plans, variety,
learning.gif.    pytest tests/test_look.py"""

import json
from types import SimpleNamespace

import pytest
from PIL import Image

import rewards
import train_grpo
from evaluation import held_out, sheets
from toy import world

TINY = "--batch_size 1 --group 4 --borrow 0.5 --eval_prompts 4".split()


def start(folder, *flags) -> dict:
    """A short run; what it says of itself at the end."""
    train_grpo.main([*TINY, *flags, "--out", str(folder)])
    return json.loads((folder / "eval_after.json").read_text())


def test_all_parts_are_evaluated_whatever_is_trained_on(tmp_path):
    after = start(tmp_path / "ri", "--steps", "1", "--rewards", "ri")
    rows = json.loads((tmp_path / "ri" / "rows_after.json").read_text())
    own = [row["measures"] for row in rows if "total" in row["measures"]]
    assert len(own) == 4
    for measures in own:
        assert measures["total"] == pytest.approx(rewards.total_reward(measures))
        assert measures["trained"] == measures["ri"]
    assert set(rewards.PARTS) < set(after)
    log = json.loads((tmp_path / "ri" / "log.jsonl").read_text())
    assert "pi" not in log, "a step asks only for what it is trained on"
    assert "trained" not in start(tmp_path / "all", "--steps", "1")


def training_with(**flags):
    config = train_grpo.Config(**flags)
    judge = world.ToyJudge(error=1.0)
    return SimpleNamespace(config=config, judge=judge, hps=world.crispness)


def test_an_evaluation_is_judged_without_errors():
    scene = world.Scene(["red ball"], [], [(0, 0, 2)])
    prompts = ["a red ball", "a blue cube"]
    chains = [world.chain_of(scene)] * 2
    images = [world.draw_scene(scene.names, scene.cells)] * 2
    rows, _ = train_grpo.score_all(training_with(judge="toy:1.0"), prompts, chains, images)
    assert [row["total"] > 0.9 for row in rows] == [True, False]
    assert "trained" not in rows[0]
    summed, _ = train_grpo.score_all(training_with(combine="sum"), prompts, chains, images)
    assert summed[0]["trained"] == pytest.approx(4) and summed[0]["total"] == pytest.approx(1)


def test_given_plans_are_counted_for_each_kind():
    scores = {"ri": 0.5, "pi": 1.0}
    assert held_out.follow_measures("a red ball above a blue cube", scores) == {
        "follow: ri": 0.5,
        "follow: pi": 1.0,
        "follow spatial: ri": 0.5,
        "follow spatial: pi": 1.0,
    }
    assert set(held_out.follow_measures("a photo of a cat", scores)) == {"follow: ri", "follow: pi"}


def test_plans_are_read_from_a_file_or_refused_by_line(tmp_path):
    assert held_out.read_plans("") == []
    assert len(held_out.read_plans("toy")) == 180
    path = tmp_path / "plans.jsonl"
    plan = "A <|obj_start|>cat<|obj_end|> <|box_start|>(1,2),(300,400)<|box_end|>"
    path.write_text(json.dumps({"prompt": "a cat", "chain": plan}) + "\n\n")
    assert held_out.read_plans(str(path)) == [("a cat", plan)]
    for line in ("a cat", '{"prompt": "a cat"}', json.dumps({"prompt": "a", "chain": "no box"})):
        path.write_text(json.dumps({"prompt": "a cat", "chain": plan}) + "\n" + line)
        with pytest.raises(ValueError, match="line 2"):
            held_out.read_plans(str(path))


def test_plans_that_cannot_be_drawn_end_the_program_before_it_begins(tmp_path, capsys):
    plan = world.chain_of(world.Scene(["red ball"], [], [(0, 0, 2)]))
    path = tmp_path / "plans.jsonl"
    cases = (plan * 60, "this model holds 512"), ("A red ball", "line 1")
    for chain, words in cases:
        path.write_text(json.dumps({"prompt": "a red ball", "chain": chain}))
        with pytest.raises(SystemExit) as stop:
            train_grpo.main([*TINY, "--eval_plans", str(path), "--out", str(tmp_path / "run")])
        assert stop.value.code == 2 and words in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


def test_the_toys_plans_are_left_out_beside_other_prompts(policy):
    engine = SimpleNamespace(model=policy[0], tokenizer=policy[1])
    assert len(train_grpo.read_given_plans(train_grpo.Config(), engine)) == 180
    other = train_grpo.Config(eval_file="held_out.txt")
    assert train_grpo.read_given_plans(other, engine) == []


def test_the_log_and_the_evaluation_have_measures_of_variety(tmp_path):
    after = start(tmp_path, "--steps", "1")
    row = json.loads((tmp_path / "log.jsonl").read_text())
    for key in ("layout_variety", "different_chains", "place_entropy", "brightness", "edges"):
        assert row[key] >= 0
    assert 0 < after["variety: layout"] <= 1 <= after["variety: chains"] <= 8
    assert 0 < after["follow complex: ri"] < 1 and 0 < after["variety: place entropy"] <= 4


def test_equal_plans_have_no_variety_and_an_empty_one_no_layout():
    chain = world.chain_of(world.Scene(["red ball"], [], [(0, 0, 2)]))
    means = train_grpo.plan_variety([chain] * 4, group=2)
    assert means == {"layout_variety": 0, "different_chains": 1, "place_entropy": 0}
    other = world.chain_of(world.Scene(["red ball"], [], [(6, 6, 2)]))
    means = train_grpo.plan_variety([chain, other], group=2)
    assert means == {"layout_variety": 1, "different_chains": 1, "place_entropy": 1}
    assert "layout_variety" not in train_grpo.plan_variety(["", ""], group=2)


def test_a_run_leaves_a_film_of_what_it_learns(tmp_path, monkeypatch):
    start(tmp_path, "--steps", "3", "--gif_every", "1")
    assert len(list((tmp_path / "frames").glob("*.png"))) == 3
    with Image.open(tmp_path / "learning.gif") as film:
        assert film.n_frames == 3
    assert (tmp_path / "learning.gif").stat().st_size < 2_000_000


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
