"""What stands behind the buttons of the page, without gradio.   pytest tests/test_demo.py"""

import ast
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import MagicMock, call

import pytest

import gotr1
import rewards
from demo import __main__ as demo
from gotr1 import rollout
from render_boxes import Box, format_chain, parse_chain, strip_boxes
from toy.world import ToyJudge

PROMPT = "a red ball left of a blue cube"
BALL = Box("red ball", 125, 250, 375, 500)
CUBE = Box("blue cube", 500, 250, 875, 625)
CONE = Box("green cone", 0, 750, 250, 999)
CHAIN = format_chain(["A", BALL, "left of a", CUBE])


@pytest.fixture
def studio(policy):
    return demo.Studio({"toy": policy}, ToyJudge())


def canvas_of(*boxes: Box) -> dict:
    """What the canvas hands over."""
    drawn = []
    for name, *edges in boxes:
        drawn.append(
            {"label": name, **dict(zip(("xmin", "ymin", "xmax", "ymax"), edges, strict=True))}
        )
    return {"boxes": drawn}


def test_gradio_is_imported_only_where_the_page_is_built():
    tree = ast.parse(Path(demo.__file__).read_text(encoding="utf-8"))
    top_level = [ast.unparse(node) for node in tree.body if "gradio" in ast.unparse(node)]
    assert not [line for line in top_level if line.startswith(("import", "from"))]


@pytest.fixture
def gradio(monkeypatch):
    """Stands for the package: takes whatever it is given."""
    gr = MagicMock()
    monkeypatch.setitem(sys.modules, "gradio", gr)
    monkeypatch.setitem(sys.modules, "gradio_image_annotation", MagicMock())
    return gr


def test_a_judge_that_is_lost_is_a_line_on_the_page(studio, gradio, monkeypatch):
    """Whatever button is pressed; and a page for everybody does not let everybody wait."""

    def lost(*_):
        raise ConnectionError("the server at http://x/v1\n  failed for 600 s")

    demo.build_page(studio)
    page = gradio.Blocks.return_value.__enter__.return_value
    assert page.queue.call_args.kwargs["max_size"] >= 1
    clicks = gradio.Button.return_value.click.call_args_list
    on_plan, on_draw = [click.args[0] for click in clicks]
    monkeypatch.setattr(ToyJudge, "semantic", lost)
    line = call("the server at http://x/v1 failed for 600 s", visible=True)
    assert len(on_plan("toy", PROMPT, 2, 0)) == 1  # only the message changes
    assert gradio.Textbox.call_args == line
    gradio.Textbox.reset_mock()
    assert len(on_draw("toy", PROMPT, CHAIN, 2, 0)) == 1
    assert gradio.Textbox.call_args == line


def test_guidance_and_length_come_from_the_model(policy, monkeypatch, tmp_path):
    """576 image tokens: Janus-Pro. A flag wins."""
    for tokens, cfg, max_chain in ((64, 1.0, 96), (576, 5.0, 600)):
        monkeypatch.setattr(gotr1, "image_token_count", lambda model, tokens=tokens: tokens)
        studio = demo.load_studio(demo.Config(), "cpu", tmp_path)
        assert (studio.cfg, studio.max_chain) == (cfg, max_chain)
    studio = demo.load_studio(demo.Config(cfg=2.0, max_chain=9), "cpu", tmp_path)
    assert (studio.cfg, studio.max_chain) == (2.0, 9)


def test_plans_come_with_their_scores_and_the_best_is_named(studio, policy):
    """Against the rollout and the judge, asked here."""
    chains, scores, best = demo.write_plans(studio, "toy", PROMPT, 4, 3)
    assert chains == rollout(*policy, [PROMPT], 4, seed=3, max_chain=96, draw=False).chains
    said = ToyJudge().semantic([PROMPT] * 4, [strip_boxes(chain) for chain in chains])
    assert [row["sem"] for row in scores] == said
    assert scores[best]["total"] == max(row["total"] for row in scores)
    assert "total" in demo.score_text(scores[0])


def test_exactly_the_plan_is_drawn_and_scored(studio, policy, monkeypatch):
    """The judge looks for the objects once, for scores and for the boxes on the pictures."""
    looks = []
    ground = ToyJudge.ground
    monkeypatch.setattr(ToyJudge, "ground", lambda *inputs: looks.append(1) or ground(*inputs))
    studio.cfg = 2.0
    pictures, marked, scores = demo.draw_plan(studio, "toy", PROMPT, CHAIN, 3, 5)
    assert len(looks) == 1
    sampled = rollout(*policy, [PROMPT], 3, cfg=2.0, seed=5, chains=[CHAIN])
    drawn = demo.decode_images(policy[0], sampled.image_tokens)
    for picture, expected in zip(pictures, drawn, strict=True):
        assert picture.size == (448, 448)
        assert picture.resize((32, 32), 0).tobytes() == expected.tobytes()
    again = rewards.score(ToyJudge(), None, [PROMPT] * 3, [CHAIN] * 3, pictures)
    assert scores == again and len(marked) == 3
    assert marked[0].tobytes() != pictures[0].resize(marked[0].size).tobytes()


def test_without_a_judge_plans_and_pictures_come_without_scores(policy):
    studio = demo.Studio({"toy": policy})
    chains, _, best = demo.write_plans(studio, "toy", PROMPT, 2, 0)
    pictures, marked, rows = demo.draw_plan(studio, "toy", PROMPT, CHAIN, 2, 0)
    assert len(chains) == 2 and best == 0 and rows == [{}, {}] and len(pictures) == len(marked) == 2
    assert demo.score_text(rows[0]) == ""


def test_one_visitor_draws_at_a_time(studio, monkeypatch):
    """On a GPU a model has one set of buffers to sample with: two rollouts at once would mix."""
    busy = []

    def watched(*inputs, **settings):
        assert not busy
        busy.append(True)
        sampled = rollout(*inputs, **settings)
        busy.clear()
        return sampled

    monkeypatch.setattr(demo, "rollout", watched)
    with ThreadPoolExecutor(2) as visitors:
        tasks = [
            visitors.submit(demo.draw_plan, studio, "toy", PROMPT, CHAIN, 2, 0) for _ in range(2)
        ]
    assert tasks[0].result()[2] == tasks[1].result()[2]


LONG = "red " * 600
FAULTS = [
    ("", CHAIN, 0, "The prompt is empty"),
    ("a red ball on <script>", CHAIN, 0, "does not know on, <script>"),
    (LONG, CHAIN, 0, "this model holds 512"),
    (PROMPT, CHAIN, None, "The seed is empty"),
    (PROMPT, "", 0, "names no object"),
    (PROMPT, "A red ball", 0, "names no object"),
    (PROMPT, CHAIN.replace("(125,", "("), 0, "whole numbers from 0 to 999"),
    (PROMPT, CHAIN.replace("(875,", "(1875,"), 0, "leaves the picture"),
    (PROMPT, CHAIN.replace("blue cube", "blue dog"), 0, "cannot draw blue dog"),
]


@pytest.mark.parametrize("prompt, chain, seed, words", FAULTS, ids=[row[3] for row in FAULTS])
def test_bad_input_is_said_in_a_sentence(studio, prompt, chain, seed, words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(")) as problem:
        demo.draw_plan(studio, "toy", prompt, chain, 2, seed)
    assert "\n" not in str(problem.value) and len(str(problem.value)) < 500


def test_only_the_toy_is_asked_for_toy_words(policy):
    """Another model may know any word."""
    studio = demo.Studio({"model": policy}, is_toy=False)
    chain = format_chain(["A", Box("dog", 0, 0, 500, 500)])
    pictures, _, _ = demo.draw_plan(studio, "model", "a dog", chain, 1, 0)
    assert len(pictures) == 1


# -------------------------------------------------------------------------------------------------
# Canvas and text


def test_the_canvas_and_the_text_say_the_same(studio):
    canvas = demo.to_canvas(studio, CHAIN)
    assert demo.from_canvas(canvas) == [BALL, CUBE]
    assert canvas["image"].size == (1000, 1000)
    assert demo.to_canvas(studio, "no plan")["boxes"] == []


def test_a_box_of_the_canvas_stays_inside_and_has_a_name_of_words():
    outside = canvas_of(Box("red  <|box_end|> ball", -20, 5, 1000, 1200))
    assert demo.from_canvas(outside) == [Box("red box_end ball", 0, 5, 999, 999)]
    with pytest.raises(ValueError, match="no name"):
        demo.from_canvas(canvas_of(Box("", 0, 0, 9, 9)))


def test_boxes_snap_to_the_cells_of_the_toy():
    assert demo.snapped(Box("a", 130, 240, 380, 505)) == Box("a", 125, 250, 375, 500)
    assert demo.snapped(Box("a", 900, 990, 999, 999)) == Box("a", 875, 875, 999, 999)
    assert demo.snapped(Box("a", 10, 10, 20, 20)) == Box("a", 0, 0, 125, 125)


MOVED = BALL._replace(x1=0, x2=250)
RENAMED = CUBE._replace(name="red cone")
SENTENCES = {  # boxes of the canvas, in any order -> the chain as a person would write it
    "moved": ([MOVED, CUBE], ["A", MOVED, "left of a", CUBE]),
    "in another order": ([CUBE, MOVED], ["A", MOVED, "left of a", CUBE]),
    "renamed": ([BALL, RENAMED], ["A", BALL, "left of a", RENAMED]),
    "first deleted": ([CUBE], ["A", CUBE]),
    "second deleted": ([BALL], ["A", BALL]),
    "added": ([CONE, BALL, CUBE], ["A", BALL, "left of a", CUBE, "and a", CONE]),
    "all deleted": ([], ["A"]),
    "the same": ([BALL, CUBE], ["A", BALL, "left of a", CUBE]),
}


@pytest.mark.parametrize("boxes, parts", SENTENCES.values(), ids=SENTENCES)
def test_a_change_of_the_canvas_becomes_a_change_of_the_text(boxes, parts):
    assert demo.with_boxes(CHAIN + " on grass.", boxes) == format_chain(parts) + " on grass."


def test_the_text_around_a_changed_box_keeps_every_character():
    chain = CHAIN.replace("<|obj_end|> <|box", "<|obj_end|><|box").replace(" left", ",\n left")
    changed = demo.with_boxes(chain, [BALL, CUBE._replace(x2=999)])
    words, _, rest = chain.partition("<|obj_start|>blue")
    assert rest and changed.startswith(words) and parse_chain(changed)[1].x2 == 999


def test_the_first_box_of_an_empty_plan_and_snapping():
    assert demo.with_boxes("", [BALL]) == format_chain(["A", BALL])
    assert demo.with_boxes("A", [BALL, CUBE]) == format_chain(["A", BALL, "and a", CUBE])
    moved = demo.with_boxes(CHAIN, [BALL, CUBE._replace(x1=560, x2=930)], snap=True)
    assert parse_chain(moved) == [BALL, CUBE._replace(x1=500, x2=875)]


def test_boxes_do_not_overwrite_a_text_that_cannot_be_read():
    torn = CHAIN.replace("(125,250),", "")
    with pytest.raises(ValueError, match="cannot be read"):
        demo.with_boxes(torn, [CUBE])


# -------------------------------------------------------------------------------------------------
# Start


def test_the_newest_toy_run_stands_beside_the_shipped_model(tmp_path):
    assert demo.newest_toy_run(tmp_path) is None
    for name, model in (("grpo", "toy"), ("7b", "gogoduan/GoT-R1-7B"), ("empty", "toy")):
        (tmp_path / name / "step_000110").mkdir(parents=True)
        (tmp_path / name / "config.json").write_text(json.dumps({"model": model}))
        if name != "empty":
            (tmp_path / name / "latest").write_text("step_000110")
    assert demo.newest_toy_run(tmp_path) == tmp_path / "grpo" / "step_000110"
    (tmp_path / "grpo" / "latest").unlink()
    studio = demo.load_studio(demo.Config(), "cpu", tmp_path)
    assert list(studio.policies) == ["toy"] and studio.is_toy
    assert isinstance(studio.judge, ToyJudge)


BAD_FLAGS = [["--port", "0"], ["--model", "/no/such"], ["--colour", "x"], ["--max_chain", "0"]]


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags_are_answered_in_one_line_with_exit_code_2(flags, capsys, monkeypatch):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: True)
    with pytest.raises(SystemExit) as stop:
        demo.main(flags)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and last.startswith("error: ") and flags[-1] in last


def test_a_missing_package_is_named_with_its_install_line(capsys, monkeypatch):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        demo.main([])
    assert stop.value.code == 2 and f"pip install {demo.PACKAGES}" in capsys.readouterr().err
