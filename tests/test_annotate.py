"""From a folder of pictures to chains: a model that says what the test wants, and one on a server
that says what is in the toy's pictures.   pytest tests/test_annotate.py"""

import doctest
import json
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
from render_boxes import Box, format_chain, iou, parse_chain, strip_boxes
from toy import world as toy


@pytest.fixture
def pictures(tmp_path):
    """A folder with 12 pictures of the toy's SFT data, some of them in a folder of their own."""
    toy.main([str(tmp_path / "pictures"), "--count", "12"])
    (tmp_path / "pictures" / "more").mkdir()
    for k in range(8, 12):
        path = tmp_path / "pictures" / f"{k:06d}.png"
        path.rename(path.parent / "more" / path.name)
    return tmp_path / "pictures"


def run(folder: Path, *flags: str) -> list[dict]:
    """What a run writes to mine.jsonl, beside the folder."""
    out = folder.parent / "mine.jsonl"
    annotate.main([str(folder), "--out", str(out), *flags])
    return [json.loads(line) for line in out.read_text().split("\n")[:-1]]


class Scripted(rewards.VlmJudge):
    """Says what the test wants, whatever is shown. Writes down what it is asked."""

    def __init__(self, caption="A dog and a cat.", names='["dog", "cat"]', boxes=None):
        super().__init__()
        self.caption = caption
        self.names = names
        self.found = boxes or {}
        self.questions = []
        self.looks = 0

    def asked(self, words: str) -> int:
        return sum(words in question.text for question in self.questions)

    def write(self, questions):
        self.questions += questions
        replies = []
        for question in questions:
            if "typed" in question.text:
                replies.append(rewards.Reply("a prompt"))
            elif "description of a picture" in question.text:
                replies.append(rewards.Reply(self.names))
            else:
                replies.append(rewards.Reply(self.caption))
        return replies

    def ground(self, pictures, names):
        self.looks += len(names)
        answers = []
        for name in names:
            boxes = self.found.get(name, [(100, 100, 500, 600)])
            answers.append(boxes and [Box(name, *corners) for corners in boxes])
        return answers


@pytest.fixture
def scripted(monkeypatch):
    """Puts a Scripted judge in the place of the model; returns it."""

    def use(**script):
        judge = Scripted(**script)
        monkeypatch.setattr(rewards, "load_judge", lambda flags, device: (judge, None))
        monkeypatch.setattr(annotate, "hf_hub_download", lambda name, file: f"revision/{file}")
        return judge

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
    if names is None:
        with pytest.raises(ValueError, match="no list of names"):
            annotate.parse_names(reply)
    else:
        assert annotate.parse_names(reply) == names


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
    if text is None:
        with pytest.raises(ValueError, match="cut off|no words|markers or coordinates"):
            annotate.parse_text(reply)
    else:
        assert annotate.parse_text(reply) == text


@settings(max_examples=100, deadline=None)
@given(st.one_of(st.text(), st.text(alphabet="[]\"' ,…ab\n{}")))
def test_any_reply_is_survived(reply):
    sample = annotate.Sample("a.png", "", Image.new("RGB", (9, 9)))
    annotate.annotate(Scripted(reply, reply), [sample])
    assert bool(sample.left_out) == bool(sample.detail) == (not sample.chain)


WORDS = st.lists(st.sampled_from("a red ball dog cat's (x) left. of, Ball".split()), min_size=1)


@settings(max_examples=100, deadline=None)
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
# Chains


def test_a_model_is_asked_in_four_steps():
    judge = Scripted()
    images = [Image.new("RGB", (40, 40), color) for color in ("red", "blue")]
    samples = [annotate.Sample("a", "mine <|im_start|>assistant", images[0])]
    samples.append(annotate.Sample("b", "", images[1]))
    annotate.annotate(judge, samples)
    prompt, caption, _, names, _ = judge.questions
    assert prompt.image is images[1] and caption.image is images[0] and names.image is None
    assert "mine" in caption.text and "<|" not in caption.text
    assert "A dog and a cat." in names.text
    assert [question.max_tokens for question in (prompt, caption, names)] == [60, 300, 300]
    assert samples[1].prompt == "a prompt"


CAPTION = "A red ball, a Cat, and a red ball near the sky."


def test_boxes_are_written_behind_their_names(pictures, scripted):
    scripted(
        caption=CAPTION,
        names='["cat", "red ball"]',  # in the wrong order
        boxes={"cat": [(0, 0, 99.6, 300)], "red ball": [(0, 0, 99, 99), (100, 200, 1000, 900.4)]},
    )
    row = run(pictures)[0]
    ball = Box("red ball", 100, 200, 999, 900)  # the larger of two
    cat = format_chain([Box("Cat", 0, 0, 100, 300)])
    words = format_chain(["A", ball])
    assert row["chain"] == f"{words}, a {cat}, and a red ball near the sky."
    assert strip_boxes(row["chain"]) == CAPTION


def test_every_filter_drops_what_it_is_for_and_counts_it(pictures, scripted, capsys):
    judge = scripted(
        caption="A dog, a cat, a flea, a room, a mouse, a ghost and a twin.",
        names=json.dumps("dog cat flea room mouse ghost twin horse".split()),
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
    printed = capsys.readouterr().out
    for reason in (
        "box too small",
        "box too large",
        "reply cannot be read",
        "no box",
        "box of another name",
        "name not in the caption",
    ):
        assert f"       1 object dropped: {reason}\n" in printed
    assert judge.looks == 7  # nobody looks for what the caption does not name


@pytest.mark.parametrize("caption", ["A cat <end_of_image>.", "A ball [7 7 7 7], cat", "…", "cat…"])
def test_captions_that_would_break_the_sequence_are_left_out(caption, pictures, scripted, capsys):
    scripted(caption=caption, names='["cat"]')
    with pytest.raises(SystemExit) as stop:
        run(pictures)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and err.endswith("error: no picture has a chain\n")
    assert "      12 picture left out: caption cannot be read\n" in out


def test_pictures_that_cannot_be_read_are_left_out_with_their_cause(pictures, scripted, capsys):
    scripted()
    (pictures / "000003.png").write_bytes(b"no picture")
    Image.fromarray(np.ones((9, 9), "int32")).save(pictures / "a.tif")
    toy.draw_scene(["red ball"], [(1, 1, 3)]).save(pictures.parent / "outside.png")
    (pictures / "d.png").symlink_to(pictures.parent / "outside.png")
    assert len(run(pictures)) == 12 - 1
    printed = capsys.readouterr()
    for image, cause in (
        ("000003.png", "broken image"),
        ("a.tif", "image depth"),
        ("d.png", "path outside"),
    ):
        assert f"{image}: {cause}: " in printed.out + printed.err
        assert f"       1 picture left out: {cause}\n" in printed.out
    assert len(run(pictures, "--follow_outside")) == 12


# -------------------------------------------------------------------------------------------------
# Resuming


def test_a_kill_loses_one_batch_and_nothing_is_asked_twice(pictures, scripted, capsys, monkeypatch):
    judge = scripted()
    ground = judge.ground

    def stop_at_third(*inputs):
        if judge.looks == 2 * 8:
            raise KeyboardInterrupt
        return ground(*inputs)

    judge.ground = stop_at_third
    with pytest.raises(SystemExit) as stop:
        run(pictures, "--batch", "4")
    assert stop.value.code == 2
    assert "the same command continues" in capsys.readouterr().err
    with (pictures.parent / "mine.jsonl").open("a") as file:
        file.write('{"image": "0000')  # as a kill leaves it
    judge.ground = ground
    assert len(run(pictures, "--batch", "4")) == 12 and judge.looks == 2 * 12
    run(pictures)  # nothing has changed: nothing is asked
    assert judge.looks == 2 * 12
    # one picture is another, and one has gone
    toy.draw_scene(["red ball"], [(1, 1, 3)]).save(pictures / "000002.png")
    (pictures / "000004.png").unlink()
    images = [row["image"] for row in run(pictures)]
    assert len(images) == len(set(images)) == 11 and "000004.png" not in images
    assert judge.looks == 2 * 13


def test_other_records_are_not_touched(pictures, scripted, tmp_path, capsys, monkeypatch):
    """Of one's own; or of another model under the same name: in a folder, of a hub id, and on a
    server."""
    scripted()
    out = tmp_path / "mine.jsonl"

    def is_refused(model: str) -> bool:
        before = out.read_text() if out.exists() else ""
        try:
            run(pictures, "--model", model, "--max_pictures", "1")
        except SystemExit:
            error = capsys.readouterr().err
            assert "give another --out" in error and out.read_text() == before
            return True
        return False

    for line in ('{"prompt": "p", "chain": "c"}', "7", "no JSON"):
        out.write_text(line + "\n")
        assert is_refused("x/y")
    out.unlink()

    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"one")
    assert not is_refused(str(folder)) and not is_refused(str(folder))
    (folder / "model.safetensors").write_bytes(b"other")
    assert is_refused(str(folder))
    out.unlink()

    monkeypatch.setattr(annotate, "hf_hub_download", huggingface_hub.hf_hub_download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    cached = tmp_path / "hub" / "models--owner--name"
    for revision in ("0" * 40, "1" * 40):
        (cached / "snapshots" / revision).mkdir(parents=True)
        (cached / "snapshots" / revision / "config.json").write_text("{}")
        (cached / "refs").mkdir(exist_ok=True)
        (cached / "refs" / "main").write_text(revision)
        assert is_refused("owner/name") == (revision[0] == "1")
    out.unlink()

    with Stub(None, models=("a 7B",)) as stub:
        assert not is_refused(stub.url) and not is_refused(stub.url)
        stub.models = ("a 72B",)
        assert is_refused(stub.url)
        stub.lists = {"data": [{"id": "a 7B", "root": "/weights/of/another"}]}
        assert is_refused(stub.url)


def test_prompts_of_ones_own(pictures, scripted, tmp_path):
    judge = scripted()
    path = tmp_path / "prompts.jsonl"
    first = {"image": "000000.png", "prompt": "my \n own"}
    last = {"image": "more/000011.png", "prompt": "x", "note": "\u2028 ends no line of a file"}
    for prompt in ("x", "another"):
        last["prompt"] = prompt
        lines = [json.dumps(line, ensure_ascii=False) for line in (first, last)]
        path.write_text("\n".join(lines), encoding="utf-8")
        rows = run(pictures, "--prompts", str(path))
        assert rows[0]["prompt"] == "my own" and rows[11]["prompt"] == prompt
        assert rows[1]["prompt"] == "a prompt"
    assert judge.asked("typed") == 10 and judge.asked("Describe") == 13


# -------------------------------------------------------------------------------------------------
# A model on a server


def test_a_model_on_a_server_annotates_the_toy_and_training_reads_it(pictures, monkeypatch):
    """It replies with text, as Qwen does, about the pictures that it is sent."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def answer(row):
        if "description of a picture" in row.text:
            caption = row.text.split("picture: ")[1].split("\n")[0]
            return json.dumps(toy.read_text(caption)[0]), None
        if row.image is None:  # the judge is tried out when it is loaded
            return "hello", None
        if "typed" in row.text or "Describe" in row.text:
            return "A " + " and a ".join(box.name for box in toy.detect(row.image)), None
        if '"red square"' in row.text:  # by which a judge shows what its boxes count in
            return '[{"bbox_2d": [500, 125, 875, 500], "label": "red square"}]', None
        found = []
        for box in toy.detect(row.image):
            if f'"{box.name}"' in row.text:
                found.append({"bbox_2d": [round(edge) for edge in box[1:]], "label": box.name})
        return json.dumps(found), None

    with Stub(answer) as stub:
        rows = run(pictures, "--model", stub.url)
    out = pictures.parent / "mine.jsonl"
    source = got.Source(str(out), image_folder=str(pictures), box_format="0..999")
    records = [got.read_record(row, source) for row in got.open_rows(source)]
    assert [chain for _, chain, _ in records] == [row["chain"] for row in rows]
    assert len(records) == 12
    for _, chain, picture in records:
        detected = toy.detect(picture)
        boxes = parse_chain(chain)
        assert [box.name for box in boxes] == [box.name for box in detected]
        for box in boxes:
            same = [other for other in detected if other.name == box.name]
            assert max(iou(box, other) for other in same) > 0.99


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["nowhere"], "nowhere: expected a folder with pictures"),
        (["PICTURES", "--out", "mine.json"], "mine.json: expected a name that ends in .jsonl"),
        (["PICTURES", "--longest_side", "0"], "--longest_side is 0"),
        (["PICTURES", "--prompts", "nowhere"], "nowhere"),
        (["PICTURES", "--prompts", "torn"], "torn, line 2: expected {"),
        (["PICTURES", "--prompts", "unknown"], "1 pictures that are not in the folder, first x."),
        (["PICTURES", "--model", "nowhere"], "no model at --model nowhere"),
        (["PICTURES", "--model", "owner/name"], "no model at --model owner/name"),
        (["PICTURES", "--model", "toy"], "toy"),
    ],
)
def test_errors_are_one_line(flags, message, pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("torn").write_text('{"image": "000000.png", "prompt": "x"}\n{"image": "000001.png"}')
    Path("unknown").write_text('{"image": "x.png", "prompt": "x"}')
    flags = [str(pictures) if flag == "PICTURES" else flag for flag in flags]
    with pytest.raises(SystemExit) as stop:
        annotate.main(flags)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: ") and message in error and error.count("\n") == 1, error
