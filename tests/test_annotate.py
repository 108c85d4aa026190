"""From a folder of pictures to chains: the toy's pictures, whose content is known, a model that
says what the test wants, and one with random weights.   pytest tests/test_annotate.py"""

import doctest
import json
import re
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from served_stub import Stub

import rewards
from data import annotate, got
from data import cache as token_cache
from render_boxes import Box, format_chain, iou, parse_chain, strip_boxes
from toy import world as toy


@pytest.fixture
def pictures(tmp_path):
    """A folder with 20 pictures of the toy's SFT data, some of them in a folder of their own."""
    toy.main([str(tmp_path / "pictures"), "--count", "20"])
    (tmp_path / "pictures" / "more").mkdir()
    for k in range(12, 20):
        path = tmp_path / "pictures" / f"{k:06d}.png"
        path.rename(path.parent / "more" / path.name)
    return tmp_path / "pictures"


def run(folder: Path, *flags: str) -> list[dict]:
    """What a run writes to mine.jsonl, beside the folder."""
    out = folder.parent / "mine.jsonl"
    annotate.main([str(folder), "--model", "toy", "--out", str(out), *flags])
    return annotate.read_lines(out)


def replies(folder: Path) -> list[dict]:
    return annotate.read_lines(folder.parent / "mine.replies.ndjson")


def dropped(folder: Path) -> list[dict]:
    return annotate.read_lines(folder.parent / "mine.dropped.ndjson")


class Scripted:
    """Says what the test wants, whatever is shown. Counts what it is asked."""

    def __init__(self, caption="A dog and a cat.", names=("dog", "cat"), boxes=None):
        self.caption = caption
        self.listed = list(names)
        self.found = boxes or {}
        self.asked = {"prompts": 0, "captions": 0, "names": 0, "boxes": 0}

    def prompts(self, records):
        self.asked["prompts"] += len(records)
        return [annotate.Answer("a prompt")] * len(records)

    def captions(self, records):
        self.asked["captions"] += len(records)
        self.prompt = records[0]["prompt"] if records else ""
        return [annotate.parse_text(self.caption)] * len(records)

    def names(self, records):
        self.asked["names"] += len(records)
        return [annotate.Answer(self.listed)] * len(records)

    def boxes(self, pictures, names):
        self.asked["boxes"] += len(pictures)
        answers = []
        for name in names:
            boxes = self.found.get(name, [(100, 100, 500, 600)])
            if boxes is None:
                answers.append(annotate.Answer(None, "well …", "no boxes"))
            else:
                answers.append(annotate.Answer([Box(name, *corners) for corners in boxes]))
        return answers


@pytest.fixture
def scripted(monkeypatch):
    """Puts a Scripted annotator in the place of the model; returns it."""

    def use(**script):
        annotator = Scripted(**script)
        monkeypatch.setattr(annotate, "load_annotator", lambda config: annotator)
        return annotator

    return use


# -------------------------------------------------------------------------------------------------
# Replies


def test_worked_examples():
    result = doctest.testmod(annotate)
    assert result.attempted == 3 and result.failed == 0


@pytest.mark.parametrize(
    ("reply", "names"),
    [
        ('["red ball", "blue cube"]', ["red ball", "blue cube"]),
        ("['red ball', 'blue cube']", ["red ball", "blue cube"]),
        ('```json\n[\n "red ball",\n "blue  cube",\n]\n```', ["red ball", "blue cube"]),
        ("[\"woman's hat\", 'man\\'s dog']", ["woman's hat", "man\\'s dog"]),
        ("[]", []),
        ("The list is empty: [ ].", []),
        ('["red ball", "blue cu…', ["red ball"]),
        ('["red b…', None),
        ("red ball, blue cube", None),
        ("[1, 2]", None),
        ("", None),
    ],
)
def test_parse_names(reply, names):
    answer = annotate.parse_names(reply)
    assert answer.value == names
    assert answer.reply == reply and bool(answer.reason) == (names is None)


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        ("A dog\nsleeps. ", "A dog sleeps."),
        ('"A dog sleeps."', "A dog sleeps."),
        ("Caption: a dog", "a dog"),
        ('A dog named "Rex"', 'A dog named "Rex"'),
        ("A dog sle…", None),  # cut off
        ("", None),
        ("12 — 7", None),
        ("A dog <|box_start|> there", None),
        ("A dog at [10, 20, 30, 40]", None),
    ],
)
def test_parse_text(reply, text):
    assert annotate.parse_text(reply).value == text


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.text(), st.text(alphabet="[]\"' ,…ab\n{}")))
def test_any_reply_is_survived(reply):
    for answer in (annotate.parse_names(reply), annotate.parse_text(reply)):
        assert (answer.value is None) == bool(answer.reason)
        json.dumps(answer)


WORDS = st.lists(st.sampled_from("a red ball dog cat's (x) left. of, Ball".split()), min_size=1)


@settings(max_examples=200, deadline=None)
@given(WORDS.map(" ".join), st.lists(WORDS.map(" ".join), max_size=4))
def test_names_stand_where_they_are_said_to(caption, names):
    spans = []
    for name, span in annotate.places(caption, names):
        if span:
            assert caption[slice(*span)].lower() == name.lower()
            spans.append(span)
    spans.sort()
    assert all(one[1] <= other[0] for one, other in zip(spans, spans[1:], strict=False))


# -------------------------------------------------------------------------------------------------
# The toy, end to end


def test_the_toy_is_annotated_exactly_and_training_reads_it(pictures, policy, capsys, tmp_path):
    rows = run(pictures)
    assert len(rows) == 20 and not dropped(pictures)
    assert "20 of 20 pictures have a chain" in capsys.readouterr().out
    source = got.Source(data=str(tmp_path / "mine.jsonl"), box_format="0..999")
    records = [got.read_record(row, source) for row in got.open_rows(source)]
    assert [record.chain for record in records] == [row["chain"] for row in rows]
    prompts = [record.prompt for record in records]
    chains = [record.chain for record in records]
    images = [record.image for record in records]
    for score in rewards.score(toy.ToyJudge(), None, prompts, chains, images):
        parts = {part: score[part] for part in ("sem", "spa", "pi")}
        assert parts == {"sem": 1, "spa": 1, "pi": 1} and score["ri"] > 0.99
    for row, image in zip(rows, images, strict=True):
        assert Path(tmp_path / row["image"]).is_file()
        seen = sorted((name, *map(round, edges)) for name, *edges in toy.detect(image))
        assert sorted(parse_chain(row["chain"])) == seen
    # both kinds of prompts of two objects: with a relation and without
    pairs = [prompt for prompt in prompts if prompt.count("a ") == 2 and " and " in prompt]
    assert pairs and any(words in " ".join(prompts) for words in toy.RELATIONS)
    prepared = token_cache.prepare(got.open_rows(source), *policy, source, tmp_path / "cache")
    assert len(prepared) == 20


def test_pictures_that_cannot_be_read_are_left_out_with_their_cause(pictures, capsys):
    (pictures / "000003.png").write_bytes(b"no picture")
    Image.fromarray(np.ones((9, 9), "int32")).save(pictures / "a.tif")
    Image.new("RGB", (32, 32), "white").save(pictures / "b.png")
    (pictures / "c.png").symlink_to(pictures / "gone.png")
    toy.draw_scene(["red ball"], [(1, 1, 3)]).save(pictures.parent / "outside.png")
    (pictures / "d.png").symlink_to(pictures.parent / "outside.png")
    rows = run(pictures)
    assert len(rows) == 20 - 1
    assert {(row["image"], row["left_out"]) for row in dropped(pictures)} == {
        ("pictures/000003.png", "broken image"),
        ("pictures/a.tif", "image depth"),
        ("pictures/b.png", "prompt cannot be read"),
        ("pictures/c.png", "broken image"),
        ("pictures/d.png", "path outside"),
    }
    printed = capsys.readouterr().out
    assert "19 of 24 pictures" in printed
    assert re.search(r"^ +2 picture left out: broken image$", printed, re.M)
    assert re.search(r"^ +1 reply cannot be read: prompt: no object is seen$", printed, re.M)
    assert len(run(pictures, "--follow_outside")) == 20


def test_elsewhere_means_image_folder(pictures, tmp_path, capsys):
    out = tmp_path / "other" / "mine.jsonl"
    annotate.main([str(pictures), "--model", "toy", "--out", str(out)])
    told = capsys.readouterr().out
    assert f"--image_folder {pictures}" in told
    source = got.Source(str(out), image_folder=str(pictures), box_format="0..999")
    rows = got.open_rows(source)
    assert len([got.read_record(row, source) for row in rows]) == 20
    # the other files beside it are no data
    folder = got.Source(str(out.parent), image_folder=str(pictures), box_format="0..999")
    assert len(got.open_rows(folder)) == 20


# -------------------------------------------------------------------------------------------------
# Filters


CAPTION = "A red ball, a Cat, and a red ball near the sky."


def test_boxes_are_written_behind_their_names(pictures, scripted):
    scripted(
        caption=CAPTION,
        names=["cat", "red ball"],  # in the wrong order
        boxes={"cat": [(0, 0, 99.6, 300)], "red ball": [(0, 0, 99, 99), (100, 200, 1000, 900.4)]},
    )
    row = run(pictures)[0]
    ball = Box("red ball", 100, 200, 999, 900)  # the larger of two
    assert (
        row["chain"]
        == format_chain(["A", ball])
        + ", a "
        + format_chain([Box("Cat", 0, 0, 100, 300)])
        + ", and a red ball near the sky."
    )
    assert strip_boxes(row["chain"]) == CAPTION


def test_every_filter_drops_what_it_is_for_and_counts_it(pictures, scripted, capsys):
    annotator = scripted(
        caption="A dog, a cat, a flea, a room, a mouse, a ghost and a twin.",
        names=["dog", "cat", "flea", "room", "mouse", "ghost", "twin", "horse"],
        boxes={
            "dog": [(100, 100, 500, 600)],
            "cat": [(500, 500, 900, 900)],
            "flea": [(10, 10, 100, 120)],  # 0.99 %
            "room": [(0, 0, 1000, 951)],  # 95.1 %
            "mouse": None,
            "ghost": [],
            "twin": [(101, 100, 500, 600)],  # IoU with the dog's 0.9975
        },
    )
    row = run(pictures, "--max_pictures", "1")[0]
    assert [box.name for box in parse_chain(row["chain"])] == ["dog", "cat"]
    reasons = {
        "flea": "box too small",
        "room": "box too large",
        "mouse": "reply cannot be read",
        "ghost": "no box",
        "twin": "box of another name",
        "horse": "name not in the caption",
    }
    (told,) = dropped(pictures)
    assert {item["name"]: item["reason"] for item in told["objects"]} == reasons
    assert told["left_out"] == ""
    assert told["replies"] == [{"step": "box of mouse", "reason": "no boxes", "reply": "well …"}]
    printed = capsys.readouterr().out
    for reason in reasons.values():
        assert re.search(rf"^ +1 object dropped: {reason}$", printed, re.M)
    assert annotator.asked["boxes"] == 7  # nobody looks for what the caption does not name
    # other limits: the model need not be asked again
    flags = ["--smallest", "0.0098", "--largest", "0.952", "--same_box", "0.998"]
    row = run(pictures, "--max_pictures", "1", *flags)[0]
    names = [box.name for box in parse_chain(row["chain"])]
    assert names == ["dog", "cat", "flea", "room", "twin"]
    assert annotator.asked["captions"] == 1


def test_pictures_with_too_few_boxes_are_left_out(pictures, scripted, capsys):
    scripted(caption=CAPTION, names=["cat"])
    run(pictures)
    mine = (pictures.parent / "mine.jsonl").read_text()
    capsys.readouterr()  # the progress bar
    with pytest.raises(SystemExit) as stop:
        run(pictures, "--min_boxes", "2")
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert "      20 picture left out: too few boxes\n" in out
    assert err.startswith("error: no picture has a chain: ") and err.count("\n") == 1
    assert (pictures.parent / "mine.jsonl").read_text() == mine  # what was good stays
    assert {row["left_out"] for row in dropped(pictures)} == {"too few boxes"}


@pytest.mark.parametrize("caption", ["A cat <end_of_image>.", "A ball [7 7 7 7], cat", "…", "cat…"])
def test_captions_that_would_break_the_sequence_are_left_out(caption, pictures, scripted):
    scripted(caption=caption, names=["cat"])
    with pytest.raises(SystemExit):
        run(pictures)
    assert {row["left_out"] for row in dropped(pictures)} == {"caption cannot be read"}


# -------------------------------------------------------------------------------------------------
# Resuming


def test_a_kill_loses_one_batch_and_nothing_is_asked_twice(pictures, scripted, capsys, monkeypatch):
    annotator = scripted()
    captions = annotator.captions

    def stop_at_third(records):
        if annotator.asked["captions"] == 8:
            raise KeyboardInterrupt
        return captions(records)

    annotator.captions = stop_at_third
    with pytest.raises(SystemExit) as stop:
        run(pictures, "--batch", "4")
    assert stop.value.code == 2
    assert "the same command continues from" in capsys.readouterr().err
    path = pictures.parent / "mine.replies.ndjson"
    with path.open("a") as file:
        file.write('{"image": "0000')  # as a kill leaves it
    annotator.captions = captions
    assert len(run(pictures, "--batch", "4")) == 20
    assert annotator.asked["captions"] == 20
    assert len(replies(pictures)) == 20

    def never(config):
        raise AssertionError("the model was loaded")

    with monkeypatch.context() as patch:  # nothing is touched: nothing is asked
        patch.setattr(annotate, "load_annotator", never)
        run(pictures)
    # one picture is another: one is asked about
    toy.draw_scene(["red ball"], [(1, 1, 3)]).save(pictures / "000002.png")
    run(pictures)
    assert annotator.asked["captions"] == 21
    assert "1 of 20 pictures are asked about again" in capsys.readouterr().out
    # what was said about the picture as it was is not lost
    run(pictures, "--longest_side", "100")
    assert annotator.asked["captions"] == 41
    run(pictures)
    assert annotator.asked["captions"] == 41


def test_another_model_under_the_same_name_is_asked_again(
    pictures, scripted, monkeypatch, tmp_path
):
    """In a folder, of a hub id, and on a server."""
    annotator = scripted()

    def asked(model: str) -> int:
        before = annotator.asked["captions"]
        run(pictures, "--model", model)
        return annotator.asked["captions"] - before

    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"one")
    assert [asked(str(folder)), asked(str(folder))] == [20, 0]
    (folder / "model.safetensors").write_bytes(b"other")
    assert asked(str(folder)) == 20

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    cached = tmp_path / "hub" / "models--owner--name"
    for revision in ("0" * 40, "1" * 40):
        (cached / "snapshots" / revision).mkdir(parents=True)
        (cached / "snapshots" / revision / "config.json").write_text("{}")
        (cached / "refs").mkdir(exist_ok=True)
        (cached / "refs" / "main").write_text(revision)
        assert [asked("owner/name"), asked("owner/name")] == [20, 0]

    with Stub(None, models=("a 7B",)) as stub:
        assert [asked(stub.url), asked(stub.url)] == [20, 0]
        stub.models = ("a 72B",)
        assert asked(stub.url) == 20
        stub.lists = {"data": [{"id": "a 72B", "root": "/weights/of/another"}]}
        assert [asked(stub.url), asked(stub.url)] == [20, 0]


def test_prompts_of_ones_own(pictures, scripted, tmp_path):
    annotator = scripted()
    path = tmp_path / "prompts.jsonl"
    lines = [
        {"image": "000000.png", "prompt": "my \n own"},
        {"image": "more/000012.png", "prompt": "x", "note": "\u2028 ends no line of a file"},
    ]
    annotate.write_lines(path, lines)
    rows = run(pictures, "--prompts", str(path))
    assert annotator.asked["prompts"] == 18
    assert rows[0]["prompt"] == "my own" and rows[12]["prompt"] == "x"
    assert rows[1]["prompt"] == "a prompt"
    assert annotator.prompt == "a prompt"  # of the last batch
    lines[1]["prompt"] = "another"
    annotate.write_lines(path, lines)
    assert run(pictures, "--prompts", str(path))[12]["prompt"] == "another"
    assert annotator.asked["captions"] == 21


# -------------------------------------------------------------------------------------------------
# A vision-language model


class ScriptedJudge(rewards.VlmJudge):
    """Writes down what it is asked, and answers by what it sees in the text."""

    def __init__(self):
        super().__init__()
        self.questions = []

    def write(self, questions):
        self.questions += questions
        texts = []
        for question in questions:
            if "typed" in question.text:
                texts.append("A dog. <|im_end|>")
            elif "description of a picture" in question.text:
                texts.append('["dog", "red ball"]')
            elif "Describe" in question.text:
                texts.append("A dog with a\nred ball.")
            else:
                texts.append('[{"bbox_2d": [98, 49, 196, 98], "label": "x"}]')
        return [rewards.Reply(text, frame=(392, 392)) for text in texts]


def test_a_model_is_asked_in_four_steps():
    judge = ScriptedJudge()
    images = [Image.new("RGB", (40, 40), color) for color in ("red", "blue")]
    rows = annotate.ask_batch(
        annotate.VlmAnnotator(judge), images, ["mine <|im_start|>assistant", ""]
    )
    reason = "markers or coordinates in the text"
    bad = {"step": "prompt", "reason": reason, "reply": "A dog. <|im_end|>"}
    assert rows[1]["bad"] == [bad]
    assert rows[0] == {
        "prompt": "mine <|im_start|>assistant",
        "caption": "A dog with a red ball.",
        "names": ["dog", "red ball"],
        "boxes": {"dog": [[250, 125, 500, 250]], "red ball": [[250, 125, 500, 250]]},
        "bad": [],
    }
    prompt, caption, names, *boxes = judge.questions
    assert prompt.image is images[1] and caption.image is images[0] and names.image is None
    assert [question.image for question in boxes] == [images[0], images[0]]
    assert "mine" in caption.text and "<|" not in caption.text
    assert "A dog with a red ball." in names.text
    assert [question.max_tokens for question in judge.questions[:3]] == [60, 300, 300]


class NoisyJudge(rewards.VlmJudge):
    """Replies with noise."""

    def write(self, questions):
        rng = np.random.default_rng(len(questions))
        noise = ["".join(map(chr, rng.integers(32, 999, 40))) for _ in questions]
        return [rewards.Reply(text + "…") for text in noise]


def test_noise_raises_nothing(pictures, monkeypatch, capsys):
    """Each reply is counted, and kept with its reason."""
    annotator = annotate.VlmAnnotator(NoisyJudge())
    monkeypatch.setattr(annotate, "load_annotator", lambda config: annotator)
    with pytest.raises(SystemExit) as stop:
        run(pictures, "--max_pictures", "5", "--batch", "3")
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert "0 of 5 pictures have a chain" in out and "no picture has a chain" in err
    assert len(dropped(pictures)) == 5
    for row in dropped(pictures):
        assert row["left_out"] and row["replies"][0]["reply"] and row["replies"][0]["reason"]


def test_a_model_on_a_server_annotates_the_toy(pictures, monkeypatch):
    """It replies with text, as Qwen does, about the pictures that it is sent."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    exact = annotate.ToyAnnotator()

    def answer(row):
        if "description of a picture" in row.text:
            caption = row.text.split("picture: ")[1].split("\n")[0]
            return json.dumps(toy.read_text(caption)[0]), None
        if row.image is None:  # the judge is tried out when it is loaded
            return "hello", None
        if "typed" in row.text:
            return exact.describe(row.image, "a").value, None
        if "Describe" in row.text:
            return exact.describe(row.image, "A").value + ".", None
        if '"red square"' in row.text:  # by which a judge shows what its boxes count in
            return '[{"bbox_2d": [500, 125, 875, 500], "label": "red square"}]', None
        found = []
        for box in toy.detect(row.image):
            if f'"{box.name}"' in row.text:
                found.append({"bbox_2d": [round(edge) for edge in box[1:]], "label": box.name})
        return json.dumps(found), None

    with Stub(answer) as stub:
        rows = run(pictures, "--model", stub.url)
    assert len(rows) == 20
    for row in rows:
        picture = Image.open(pictures.parent / row["image"])
        overlaps = []
        for box in parse_chain(row["chain"]):
            same = [other for other in toy.detect(picture) if other.name == box.name]
            overlaps.append(max(iou(box, other) for other in same))
        assert len(overlaps) == len(toy.detect(picture)) and min(overlaps) > 0.99


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["nowhere"], "nowhere: expected a folder with pictures"),
        (
            ["PICTURES", "--out", "mine.json"],
            "--out mine.json: expected a name that ends in .jsonl",
        ),
        (["PICTURES", "--min_boxes", "0"], "--min_boxes is 0"),
        (["PICTURES", "--longest_side", "9"], "--longest_side is 9"),
        (["PICTURES", "--prompts", "nowhere"], "nowhere"),
        (["PICTURES", "--prompts", "torn"], "torn, line 2: expected {"),
        (
            ["PICTURES", "--prompts", "unknown"],
            "1 pictures that are not in the folder, first x.png",
        ),
        (["PICTURES", "--model", "nowhere"], "no model at --model nowhere"),
        (["PICTURES", "--model", "owner/name"], "no model at --model owner/name"),
    ],
)
def test_errors_are_one_line(flags, message, pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("torn").write_text('{"image": "000000.png", "prompt": "x"}\n{"image": "000001.png"}')
    Path("unknown").write_text('{"image": "x.png", "prompt": "x"}')
    flags = [str(pictures) if flag == "PICTURES" else flag for flag in flags]
    if "--model" not in flags:
        flags += ["--model", "toy"]
    with pytest.raises(SystemExit) as stop:
        annotate.main(flags)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: ") and message in error and error.count("\n") == 1, error
