"""GenEval 2: a vision-language model answers questions about each part of a prompt (Soft-TIFA).

A prompt of the official geneval2_data.jsonl has 3 to 10 atoms and a question for each: how many,
is it there, is it red, is it left of the other. The score of a question is the probability that the
judge's reply begins with the right word, in any of its spellings; of a prompt the geometric mean
(GM) or the arithmetic mean (AM) of its questions; of the benchmark the mean over prompts, published
times 100. By skill all questions are averaged, by number of atoms the GMs of prompts.

Rules as in facebookresearch/GenEval2 a6e82d2 (2026-01-07). The data is CC BY-NC 4.0: download it,
it is not shipped.
"""

import functools
import json
import math
import re
from pathlib import Path, PurePath

from evaluation.networks import (
    Picture,
    check_finite,
    check_weights,
    find_in_folders,
    plan_folders,
)
from rewards import JudgeConfig, Question, load_judge
from toy.world import detect, holds, read_text, toy_prompts

SKILLS = ("object", "attribute", "count", "position", "verb")
COUNTS = ("one", "two", "three", "four", "five", "six", "seven")
OFFICIAL_JUDGE = "Qwen3-VL-8B-Instruct"

# -------------------------------------------------------------------------------------------------
# The rules


def spellings(answer: str) -> list[str]:
    """The words that count as this answer, "Yes" or one of COUNTS. The probability of each is that
    of its first token, and they are added."""
    lower = answer.lower()
    upper = answer.capitalize()
    words = [lower, upper, f" {lower}", f" {upper}"]
    if answer in COUNTS:
        digit = str(COUNTS.index(answer) + 1)
        # The last one is " 4" in the official program. No token of Qwen's begins with a blank and
        # goes on with a digit, so that its first token is the blank alone
        words += [digit, " "]
    return words


def read_questions(line: str, where: str) -> tuple[str, str, dict]:
    """A line of geneval2_data.jsonl -> (prompt, group, all of it).

    Raises ValueError, which begins with `where`, when the line is something else."""
    try:
        metadata = json.loads(line)
        prompt = metadata["prompt"]
        group = f"{metadata['atom_count']} atoms"
        answers = [answer for _, answer in metadata["vqa_list"]]
        skills = [str(skill) for skill in metadata["skills"]]
    except (ValueError, KeyError, TypeError) as problem:
        raise ValueError(f"{where}: no line of geneval2_data.jsonl ({problem})") from None
    for answer in answers:
        if answer not in ("Yes", *COUNTS):
            raise ValueError(f"{where}: GenEval 2 knows no answer {answer!r}")
    if not answers or len(skills) != len(answers) or not set(skills) <= set(SKILLS):
        raise ValueError(f"{where}: expected a skill per question, of {', '.join(SKILLS)}")
    if group not in Board.groups:
        raise ValueError(f"{where}: expected 3 to 10 atoms, not {group}")
    return prompt, group, metadata


def ask(judge, images: list, lines: list[dict]) -> list[list[float]]:
    """Per picture, for each question of its line, the probability of the right answer. All
    questions of all pictures go to the judge together; see `rewards.VlmJudge.probabilities`."""
    questions = []
    wanted = []  # per question
    for image, line in zip(images, lines, strict=True):
        for text, answer in line["vqa_list"]:
            questions.append(Question(f"{text} Answer in one word.", image, max_tokens=1))
            wanted.append(spellings(answer))
    words = sorted(set().union(*wanted))
    chances = []  # per question
    for row, some in zip(judge.probabilities(questions, words), wanted, strict=True):
        of_word = dict(zip(words, row, strict=True))
        total = sum(of_word[word] for word in some)
        chances.append(min(1.0, check_finite(total, "the judge's answer")))
    of_picture = []
    for line in lines:
        count = len(line["vqa_list"])
        of_picture.append(chances[:count])
        chances = chances[count:]
    return of_picture


def verdict(line: dict, chances: list[float]) -> dict:
    """The row of one picture: score (GM), reason, boxes (none), measures, and its questions."""
    score = math.prod(chances) ** (1 / len(chances))  # the geometric mean
    measures = {"Soft-TIFA GM": score, "Soft-TIFA AM": sum(chances) / len(chances)}
    questions = []
    doubtful = []
    for k, chance in enumerate(chances):
        measures.setdefault(f"skill: {line['skills'][k]}", []).append(chance)
        text, answer = line["vqa_list"][k]
        questions.append([text, answer, chance])
        if chance < 0.5:
            doubtful.append(f"{text} {answer} {chance:.2f}")
    measures[f"atoms: {line['atom_count']}"] = score
    return {
        "score": score,
        "reason": "; ".join(doubtful),
        "boxes": [],
        "measures": measures,
        "questions": questions,
    }


# -------------------------------------------------------------------------------------------------
# The benchmark


class Board:
    """See evaluation/run.py."""

    samples = 1
    groups = tuple(f"{atoms} atoms" for atoms in range(3, 11))
    overall = ()

    def __init__(self, settings, device):
        self.settings = settings
        self.device = device

    def plan_pictures(self, folder: Path) -> list[Picture]:
        samples = self.settings.samples or self.samples
        return plan_folders(self.settings.prompts[0], folder, samples, read_questions)

    def find_pictures(self, folder: Path) -> list[Picture]:
        return find_in_folders(folder, read_questions)

    def prepare(self, pictures: list[Picture]) -> None:
        if self.settings.judge.startswith("http"):
            self.judge.try_out()  # now: drawing may take hours
        elif self.settings.judge != "toy":
            check_weights(self.settings.judge, "judge")

    @functools.cached_property
    def judge(self):
        if self.settings.judge == "toy":
            return ExactAnswers()
        flags = JudgeConfig(
            judge=self.settings.judge,
            judge_model=self.settings.judge_model,
            judge_batch=self.settings.score_batch,
            hps="",
        )
        return load_judge(flags, self.device)[0]

    def score(self, group: str, images: list, pictures: list[Picture]) -> list[dict]:
        lines = [picture.metadata for picture in pictures]
        chances = ask(self.judge, images, lines)
        return list(map(verdict, lines, chances))

    def describe(self, pictures: list[Picture]) -> tuple[dict, list[str]]:
        judge = self.settings.judge
        name = self.settings.judge_model or judge
        notes = ["published numbers are these times 100"]
        if PurePath(name).name != OFFICIAL_JUDGE:
            notes.append(f"judge {name} is not {OFFICIAL_JUDGE}: scores differ from published ones")
        if judge.startswith("http"):
            notes.append("a server tells the 20 likeliest tokens: all others count as 0")
        return {"judge": judge, "judge_model": self.settings.judge_model}, notes


# -------------------------------------------------------------------------------------------------
# The toy: its prompts as questions, and a judge that is never wrong
#   write_toy_questions("questions.jsonl")
#   python eval.py --bench geneval2 --prompts questions.jsonl --model toy --judge toy


def toy_line(prompt: str) -> dict:
    """A toy prompt as a line of geneval2_data.jsonl. As there, "a" is a question, but no atom."""
    names, relations = read_text(prompt)
    questions = []
    skills = []
    for name in names:
        shape = name.split()[1]
        questions.append([f"How many {name}s are in the image?", "one"])
        questions.append([f"Is there a {shape} in the image?", "Yes"])
        questions.append([f"Is there a {name} in the image?", "Yes"])
        skills += ["count", "object", "attribute"]
    for i, words, j in relations:
        questions.append([f"Is the {names[i]} {words} the {names[j]}?", "Yes"])
        skills.append("position")
    atoms = len(questions) - len(names)
    return {"prompt": prompt, "atom_count": atoms, "vqa_list": questions, "skills": skills}


class ExactAnswers:
    """Answers the questions of `toy_line` by the pixels: the right word has probability 1."""

    def probabilities(self, questions: list[Question], words: list[str]) -> list[list[float]]:
        rows = []
        for question in questions:
            reply = self.reply(question.text, detect(question.image))
            rows.append([float(word == reply) for word in words])
        return rows

    def reply(self, question: str, boxes: list) -> str:
        found = [box.name for box in boxes]
        counted = re.match(r"How many (\w+ \w+)s are", question)
        placed = re.match(r"Is the (\w+ \w+) (.+) the (\w+ \w+)\?", question)
        there = re.match(r"Is there a (.+) in the", question)
        if counted:
            return ("zero", *COUNTS)[min(found.count(counted[1]), 7)]
        if placed:
            is_so = holds(*placed.groups(), boxes)
        elif there:
            is_so = any(name.endswith(there[1]) for name in found)
        else:
            raise ValueError(f"--judge toy knows only the questions about the toy, not {question}")
        return "Yes" if is_so else "No"


def write_toy_questions(path: str, count: int = 240) -> None:
    """The questions about the toy's held-out prompts, in the format of geneval2_data.jsonl."""
    with open(path, "w", encoding="utf-8") as file:
        for prompt in toy_prompts(count, seed=7, held_out=True):
            file.write(json.dumps(toy_line(prompt)) + "\n")
