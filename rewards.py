"""The rewards of GoT-R1 (paper, section 3.3): a judge's marks, a preference score, their product.

    R_total = R_PI * (R_sem + R_spa) / 2 * R_RI * R_HPS

    R_sem   prompt -> chain     does the plan, without its boxes, say what the prompt asks for?
    R_spa   prompt -> layout    are the objects in the right places? the judge sees the boxes drawn
    R_PI    prompt -> picture   does the picture show what was asked for, in the right places?
    R_RI    chain -> picture    is each planned object where the plan has it?
    R_HPS   prompt -> picture   would people like it? (HPS v2.1)

The judge is a vision-language model. R_sem, R_spa and R_PI are its marks out of ten, divided by 10;
R_sem is the mean of four marks, for completeness, faithfulness, consistency and clarity. For R_RI
the judge looks for each planned name in the picture; the reward is the mean IoU of planned and
found boxes. R_HPS is a cosine, near 0.3.

Not stated in the paper, decided here:
- Without a valid box in the chain R_spa = R_RI = 0. An object that is not found has IoU 0.
- A reply that cannot be read is worth 0 and is counted. When most replies of a batch cannot be
  read, the run stops: a judge that fails silently looks like a policy that learns nothing.
- The judge's instructions are our wording of the paper's (appendix, figures 8 to 11).

    python rewards.py --prompt "a red ball above a blue cube" --chain chain.txt --image picture.png
    python rewards.py … --judge Qwen/Qwen2.5-VL-7B-Instruct --hps HPS_v2.1_compressed.pt
    python rewards.py … --judge http://localhost:8000/v1    # the same judge on a server
"""

import json
import math
import operator
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from PIL import Image

from render_boxes import Box, draw_boxes, iou, parse_chain, strip_boxes

PARTS = ("sem", "spa", "ri", "pi", "hps")

# A judge is any object with these four calls. Each takes two lists with one entry per row, and
# answers with a list of the same length.
#   semantic(prompts, chains)    -> scores        the chain without its boxes, against the prompt
#   spatial(prompts, layouts)    -> scores        a list of Box, never empty, against the prompt
#   alignment(prompts, images)   -> scores        a PIL picture against the prompt
#   ground(images, names)        -> lists of Box  where that name is in that picture; [] if nowhere
# Scores are in [0, 1], boxes on the 0..1000 grid. None stands for a reply that cannot be read.
# Optional: `words`, a dict: part -> the judge's literal replies to its last call, one per row.
# Optional: `marks`, a dict: "sem" -> name -> one mark per row, where R_sem is a mean of marks.


def total_reward(parts: dict[str, float], combine: str = "product") -> float:
    """The product or sum of those of PARTS that are in the dict; other keys are ignored.

    `sem` and `spa` are one factor together, their mean.

    >>> parts = {"sem": 0.9, "spa": 0.7, "ri": 0.5, "pi": 0.8, "hps": 0.25}
    >>> round(total_reward(parts), 6)                   # 0.8 * (0.9 + 0.7) / 2 * 0.5 * 0.25
    0.08
    >>> round(total_reward(parts, combine="sum"), 6)    # 0.8 + (0.9 + 0.7) / 2 + 0.5 + 0.25
    2.35
    """
    factors = [parts[part] for part in ("pi", "ri", "hps") if part in parts]
    chain_scores = [parts[part] for part in ("sem", "spa") if part in parts]
    if chain_scores:
        factors.append(sum(chain_scores) / len(chain_scores))
    if not factors or combine not in ("product", "sum"):
        expected = f"expected some of {', '.join(PARTS)}, by product or sum"
        raise ValueError(f"{expected}: got {list(parts)} by {combine}")
    if combine == "sum":
        return sum(factors)
    return math.prod(factors)


# -------------------------------------------------------------------------------------------------
# The rewards of a batch


def score(
    judge,
    hps,
    prompts: list[str],
    chains: list[str],
    images: list[Image.Image],
    parts: tuple[str, ...] = PARTS,
    combine: str = "product",
) -> list[dict[str, float]]:
    """All rewards of a batch: one dict per sample with the parts, `judge_fail` and `total`.

    Where the judge gives four marks for R_sem they are there too: `sem_completeness`, …
    `judge_fail` counts the sample's replies that could not be read. `hps` is a callable
    (prompts, images) -> floats, or None. A part that is left out is not asked for, and is neither
    in the dict nor in the total.
    Raises ValueError for an unknown part and for a score outside [0, 1]; RuntimeError when most
    replies cannot be read (see stop_if_unreadable).
    """
    asked = ask(judge, prompts, chains, images, parts)
    return add_up(asked, hps, parts, combine)


def score_with_boxes(
    judge, hps, prompts, chains, images, parts=PARTS, combine="product", strict=True
):
    """(what `score` returns, per sample where the judge found each planned object)."""
    asked = ask(judge, prompts, chains, images, parts)
    return add_up(asked, hps, parts, combine), asked.found


@dataclass
class Asked:
    """Samples, and what a judge answered about them."""

    prompts: list[str]
    images: list[Image.Image]
    layouts: list[list[Box]]  # the planned boxes
    answers: dict[str, list]  # part -> the judge's answers, one per row that it was asked
    found: list[dict[str, list[Box] | None]]  # see ground_plans; [] if that was not asked
    words: dict[str, list[str]]  # part -> its literal replies, one per row that it was asked
    marks: dict[str, list[float | None]]  # name of a mark of R_sem -> one per sample

    @classmethod
    def join(cls, several: list["Asked"]) -> "Asked":
        """What was asked in several calls, as if it had been one."""
        joined = cls([], [], [], {}, [], {}, {})
        for one in several:
            joined.prompts += one.prompts
            joined.images += one.images
            joined.layouts += one.layouts
            joined.found += one.found
            for name in ("answers", "words", "marks"):
                for key, values in getattr(one, name).items():
                    getattr(joined, name).setdefault(key, []).extend(values)
        return joined


def ask(judge, prompts, chains, images, parts=PARTS) -> Asked:
    """The first half of `score`: all that needs the judge."""
    if not set(parts) <= set(PARTS):
        expected = f"expected some of {' '.join(PARTS)}"
        raise ValueError(f"unknown rewards in {' '.join(parts)}: {expected}")
    layouts = [parse_chain(chain) for chain in chains]
    answers = {}
    found = []
    marks = {}
    if "sem" in parts:
        answers["sem"] = judge.semantic(prompts, [strip_boxes(chain) for chain in chains])
        marks = dict(getattr(judge, "marks", {}).get("sem", {}))
    planned = [i for i, layout in enumerate(layouts) if layout]
    if "spa" in parts and planned:
        planned_prompts = [prompts[i] for i in planned]
        planned_layouts = [layouts[i] for i in planned]
        answers["spa"] = judge.spatial(planned_prompts, planned_layouts)
    if "pi" in parts:
        answers["pi"] = judge.alignment(prompts, images)
    if "ri" in parts:
        found, answers["ri"] = ground_plans(judge, layouts, images)
    said = getattr(judge, "words", {})
    # a part that was not asked about, for want of boxes, has the words of an earlier call
    words = {part: list(said[part]) for part in answers if answers[part] and part in said}
    return Asked(list(prompts), list(images), layouts, answers, found, words, marks)


def add_up(asked: Asked, hps, parts=PARTS, combine="product") -> list[dict[str, float]]:
    """The second half of `score`: from the judge's answers, and hps, to rewards."""
    parts = [part for part in PARTS if part in parts and (part != "hps" or hps)]
    rows = []
    for _ in asked.prompts:
        row = dict.fromkeys(parts, 0.0)
        row["judge_fail"] = 0
        rows.append(row)
    all_samples = range(len(rows))
    planned = [i for i in all_samples if asked.layouts[i]]  # the others keep spa = ri = 0
    for part in ("sem", "spa", "pi"):
        if part in asked.answers:
            samples = planned if part == "spa" else all_samples
            _enter_scores(rows, part, samples, asked.answers[part])
    for name, marks in asked.marks.items():
        for row, mark in zip(rows, marks, strict=True):
            row[f"sem_{name}"] = mark or 0.0  # None: the reply could not be read
    if "ri" in parts:
        for i in planned:
            found = asked.found[i]
            overlaps = [overlap for overlap, _ in match_boxes(asked.layouts[i], found)]
            rows[i]["ri"] = sum(overlaps) / len(overlaps)
            rows[i]["judge_fail"] += list(found.values()).count(None)
    stop_if_unreadable(asked.answers, asked.words)

    if "hps" in parts:
        for row, cosine in zip(rows, hps(asked.prompts, asked.images), strict=True):
            row["hps"] = float(cosine)
    for row in rows:
        row["total"] = total_reward(row, combine)
    return rows


def _enter_scores(rows: list[dict], part: str, samples, answers: list[float | None]) -> None:
    """Writes the judge's answers about these samples into their rows."""
    for i, answer in zip(samples, answers, strict=True):
        if answer is None:
            rows[i]["judge_fail"] += 1
        elif 0 <= answer <= 1:
            rows[i][part] = float(answer)
        else:
            raise ValueError(
                f"the judge gave sample {i} {answer} for {part}: scores are in [0, 1], or None"
            )


def ground_plans(
    judge, plans: list[list[Box]], images: list[Image.Image]
) -> tuple[list[dict[str, list[Box] | None]], list[list[Box] | None]]:
    """Where each planned object is: per sample a dict name -> boxes; and the judge's raw answers.

    One question per picture and name, all in one call. Samples of a group often share both: a
    question that stands there twice is asked once.
    """
    pixels = [(image.mode, image.size, image.tobytes()) for image in images]
    questions = {}  # (pixels, name) -> picture
    for key, image, plan in zip(pixels, images, plans, strict=True):
        for box in plan:
            questions[key, box.name] = image
    answers = []
    if questions:
        names = [name for _, name in questions]
        answers = judge.ground(list(questions.values()), names)
    answer_to = dict(zip(questions, answers, strict=True))
    found = []
    for key, plan in zip(pixels, plans, strict=True):
        found.append({box.name: answer_to[key, box.name] for box in plan})
    return found, answers


def match_boxes(
    planned: list[Box], found: dict[str, list[Box] | None]
) -> list[tuple[float, Box | None]]:
    """(IoU, found box) per planned box, (0.0, None) if it has none; R_RI is the mean of the IoUs.

    Boxes of one name are matched one to one: one dog in the picture cannot stand for three in the
    plan. The pair with the highest IoU goes first. That needs no solver and is exact unless a name
    repeats; then it may miss the highest possible sum, and never exceeds it.
    """
    pairs = []  # (IoU, index of the planned box, index of the found box under that name)
    for i, box in enumerate(planned):
        for k, candidate in enumerate(found[box.name] or []):
            pairs.append((iou(box, candidate), i, k))
    pairs.sort(key=operator.itemgetter(0), reverse=True)
    matched = [(0.0, None)] * len(planned)
    taken = set()  # found boxes that have a partner, as (name, index)
    for overlap, i, k in pairs:
        name = planned[i].name
        is_free = matched[i][1] is None and (name, k) not in taken
        if overlap > 0 and is_free:
            matched[i] = (overlap, found[name][k])
            taken.add((name, k))
    return matched


def stop_if_unreadable(answers: dict[str, list], words: dict[str, list[str]]) -> None:
    """Raises RuntimeError, with three quotes, when more than half of the answers are None.

    That is of all answers; or of the answers to one part, if there are at least 8 of them: one
    broken part is enough to make every product 0.
    """
    unread = {}  # part -> positions of the replies that could not be read
    for part, replies in answers.items():
        unread[part] = [k for k, reply in enumerate(replies) if reply is None]
    asked_in_all = sum(map(len, answers.values()))
    unread_in_all = sum(map(len, unread.values()))
    too_many = 2 * unread_in_all > asked_in_all
    for part, replies in answers.items():
        if len(replies) >= 8 and 2 * len(unread[part]) > len(replies):
            too_many = True
    if not too_many:
        return
    counts = []
    quotes = []
    for part, positions in unread.items():
        counts.append(f"{part} {len(positions)} of {len(answers[part])}")
        if part in words:
            for k in positions:
                quotes.append(f"\n  {part}: {words[part][k][:300]!r}")
    raise RuntimeError(
        f"most of the judge's replies cannot be read: {', '.join(counts)}{''.join(quotes[:3])}"
    )


# -------------------------------------------------------------------------------------------------
# Reading what a judge wrote. Any text goes in; None comes out unless it holds one clear answer:
# never a guess, never an exception. All repetitions are bounded: linear time on any input.

# what a mark is written behind, with %s for its name: "score": or **Score:** or score =
NAMED = (
    r"""%s["'*\\]{0,3}\s{0,9}[:=][\s"'*\\]{0,9}"""
    r"""((?:[^,}\]\n"'*\\]|,(?=[0-9])){0,40})"""  # then all up to a comma, quote, star or bracket
)
# 8, 8.5, 8/10, 8 out of 10, with or without a sentence behind it
MARK = re.compile(r"([0-9]{1,2}(?:\.[0-9]{1,2})?)(?: ?(?:/|out of) ?10)?(?:\.(?: [^0-9].*)?)?")


def parse_score(reply: str, name: str = "score") -> float | None:
    """A mark out of ten, as mark / 10; None unless the reply holds exactly one of that name.

    Where the reply holds JSON, the outermost object that has the key decides, whatever is written
    in its sentences. Also reads fences, single quotes, trailing commas, prose around it, "8/10",
    8.5, Score: 8. Not readable: marks that differ, 7-8, 80/100, 11, -3, 0.8 (of ten, or of one?),
    and a number where the JSON was cut off (1, or the beginning of 10?).

    >>> fenced = '```json {"reasoning": "both are there", "score": "8/10",} ```'
    >>> parse_score(fenced), parse_score('{"score": 1')
    (0.8, None)
    >>> parse_score('{"reasoning": "score: unclear", "score": 2}')
    0.2
    """
    values, rest = _split_json(reply.strip(), name)
    is_cut_off = rest.count("{") > rest.count("}")
    marks = _marks_behind(name, rest, is_cut_off)
    for value in values:
        # numbers come as they are written; null, true, lists and objects are no marks
        marks += _marks_behind(name, f"{name}: {value}") if isinstance(value, str) else [None]
    if None in marks or len(set(marks)) != 1:
        return None
    mark = marks[0]
    return mark / 10 if mark == 0 or 1 <= mark <= 10 else None


def _marks_behind(name: str, text: str, is_cut_off: bool = False) -> list[float | None]:
    """What stands wherever a mark of this name is given, None where that is no mark."""
    marks = []
    for found in re.finditer(NAMED % name, text, re.IGNORECASE):
        mark = MARK.fullmatch(found[1].strip())
        if not mark or (is_cut_off and found.end() == len(text)):
            marks.append(None)
        else:
            marks.append(float(mark[1]))
    return marks


def _split_json(text: str, key: str) -> tuple[list, str]:
    """The values under a key in the JSON objects of a text, and the text without these objects."""
    values = []
    rest = ""
    end = 0  # of the last object that has the key
    for start, stop in _braces(text):
        found = []
        if key in text[start:stop].lower():
            try:
                # numbers stay text; an object becomes a tuple of (key, value), a list is a list
                decoded = json.loads(
                    text[start:stop], object_pairs_hook=tuple, parse_int=str, parse_float=str
                )
                found = _values_under(key, decoded)
            except (ValueError, RecursionError):
                pass  # not JSON: stays in the text
        if found:
            values += found
            rest += text[end:start]
            end = stop
    return values, rest + text[end:]


def _braces(text: str) -> list[tuple[int, int]]:
    """Where the outermost { } of a text begin and end; braces in strings within them count not."""
    spans = []
    depth = 0
    in_string = False
    for found in re.finditer(r'\\.|["{}]', text, re.DOTALL):
        character = found[0]
        if character == '"' and depth:
            in_string = not in_string
        elif character == "{" and not in_string:
            if depth == 0:
                start = found.start()
            depth += 1
        elif character == "}" and depth and not in_string:
            depth -= 1
            if depth == 0:
                spans.append((start, found.end()))
    return spans


def _values_under(key: str, decoded) -> list:
    """The values under a key in the outermost objects that have it."""
    level = [decoded]
    while level:
        values = []
        below = []
        for item in level:
            if isinstance(item, tuple):
                values += [value for name, value in item if name.strip().lower() == key]
                below += [value for _, value in item]
            elif isinstance(item, list):
                below += item
        if values:
            return values
        level = below
    return []


NUMBER = r"""["']?(-?[0-9]{1,5}(?:\.[0-9]{1,6})?)["']?\s{0,9}"""
COMMA = r",\s{0,9}"
FOUR_NUMBERS = COMMA.join([NUMBER] * 4)
BBOX = re.compile(rf"\[\s{{0,9}}{FOUR_NUMBERS}(?:{COMMA})?\]")  # [x1, y1, x2, y2]
BBOX_BEGINS = re.compile(r"""[\[(]\s{0,9}["']?-?[0-9]""")
NO_BBOX = re.compile(
    r"(?<!\w)\[\s{0,9}\](?!\w)|\b(null|none|there (is|are) no|not (visible|found|there))\b",
    re.IGNORECASE,
)


def parse_bboxes(reply: str, width: float, height: float) -> list[Box] | None:
    """The boxes of a grounding reply on the 0..1000 grid, named ""; [] when it says there is none.

    `width` and `height` are the frame in which the reply counts. For Qwen2.5-VL that is the picture
    as its processor *resized* it, in pixels, 384 to 392 for example (QwenLM/Qwen3-VL issues 676 and
    866); for Qwen3-VL it is 1000 by 1000.
    Reads one box or a list, in all the ways of writing that parse_score reads; of a reply that was
    cut off, the complete boxes. Labels are not compared: one name was asked for.
    None when it cannot be read: corners in the wrong order, or a box more than 5 % outside the
    frame, hence not meant in this frame (less than that is clipped).

    >>> cut_off = '[{"bbox_2d": [98, 49, 196, 98], "label": "ball"}, {"bbox_2d": [0, 0, 39'
    >>> parse_bboxes(cut_off, width=392, height=392)
    [Box(name='', x1=250.0, y1=125.0, x2=500.0, y2=250.0)]
    """
    boxes = []
    for corners in BBOX.findall(reply):
        left, top, right, bottom = map(float, corners)
        edges = (
            1000 * left / width,
            1000 * top / height,
            1000 * right / width,
            1000 * bottom / height,
        )
        x1, y1, x2, y2 = [min(max(edge, 0.0), 1000.0) for edge in edges]
        if min(edges) < -50 or max(edges) > 1050 or x1 >= x2 or y1 >= y2:
            return None
        boxes.append(Box("", x1, y1, x2, y2))
    if boxes:
        return boxes
    says_there_is_none = NO_BBOX.search(reply) and not BBOX_BEGINS.search(reply)
    return [] if says_there_is_none else None


# -------------------------------------------------------------------------------------------------
# What the judge is asked


class Task(NamedTuple):
    question: str
    answer: str  # what is inside the braces of the JSON to answer with; reasons before the mark
    max_tokens: int  # most tokens of a reply
    marks: tuple[str, ...] = ("score",)  # the keys of the marks in it; the score is their mean


# What a plan is marked for, one mark each (paper, appendix, figure 8)
CRITERIA = ("completeness", "faithfulness", "consistency", "clarity")

SEMANTIC = """\
You check the plan for a picture against the request. The plan is text; nothing is drawn yet.
Request: {prompt}
Plan: {chain}
There are four criteria, each with a mark from 0 to 10. completeness: everything requested is in the
plan, each thing with its own colour, number and other properties. faithfulness: nothing in the plan
contradicts the request, and what it adds suits the request. consistency: no part of the plan
contradicts another. clarity: it is one clear, well-formed scene. 9-10: nothing is wrong. 7-8: a
slip in a detail. 5-6: clear gaps. 3-4: much is wrong. 1-2: hardly anything is right. 0: no
meaningful text."""

SEMANTIC_ONE = """\
You check the plan for a picture against the request. The plan is text; nothing is drawn yet.
Request: {prompt}
Plan: {chain}
Is everything requested in the plan, each thing with its own colour, number and other properties?
Does anything in it contradict the request, or the rest of the plan? Is it one clear scene? Give a
mark from 0 to 10. 9-10: complete, no contradiction, what it adds suits the request. 7-8: good, a
slip in a detail. 5-6: the main idea, with clear gaps. 3-4: much is missing or contradicted. 1-2:
hardly about the request. 0: no meaningful text."""

SPATIAL = """\
You check the layout of a picture against the request: a rectangle for each object, {layout}
Request: {prompt}
Does each requested object have its own rectangle? Do the rectangles agree, in place and size, with
the relations that the request states or implies? Give a mark from 1 to 10. 8-10: all objects, and
their places agree. 5-7: partly, or it can be read either way (5: on the edge). 4: one object is
missing. 3: a relation is plainly contradicted. 2: several objects or relations are wrong. 1:
nothing agrees."""

ALIGNMENT = """\
You check a picture against the request that it was made for: only its composition, not its beauty.
Request: {prompt}
Is each requested object there, with its own properties? Does each spatial relation hold, taken
strictly? (Left of: further left, side by side. On top of: right above and touching.) Give a mark
from 0 to 10. 8-10: all objects, all relations. 5-7: all objects, a relation is slightly off. 0-4: a
relation is wrong or an important object is missing."""

GROUND = """\
Find each "{name}" in the picture. The answer is a list of them, [] if there is none."""

TASKS = {
    "sem": Task(
        SEMANTIC,
        answer=", ".join(f'"{name}": mark' for name in CRITERIA),
        max_tokens=80,
        marks=CRITERIA,
    ),
    "sem_one": Task(SEMANTIC_ONE, answer='"score": mark', max_tokens=32),
    "spa": Task(SPATIAL, answer='"reasoning": "two sentences", "score": mark', max_tokens=200),
    "pi": Task(
        ALIGNMENT,
        answer='"description": "what is seen, one sentence", '
        '"reasoning": "one sentence", "score": mark',
        max_tokens=200,
    ),
    "ri": Task(
        GROUND,
        answer='"bbox_2d": [x1, y1, x2, y2], "label": "name"',
        max_tokens=128,  # a box is about 30: what is cut off behind three boxes costs no box
        marks=(),
    ),
}
ANSWER = "\nAnswer with JSON like this and nothing else: {%s}"
LAYOUT_DRAWN = "drawn with its name at a corner."
LAYOUT_TOLD = "given by its left, top, right and bottom edge, 0 to 1000, y downwards:"


# -------------------------------------------------------------------------------------------------
# A vision-language model as the judge: what is asked and how replies are read, wherever it runs


class Question(NamedTuple):
    """One row of a call: what the judge is asked at one time."""

    text: str  # all that it reads, after the picture
    image: Image.Image | None
    max_tokens: int  # most tokens of its reply
    begun: str = ""  # how its reply begins: written for it


class Reply(NamedTuple):
    text: str  # ends in "…" if it was cut off: half a number must not pass for a number
    frame: tuple[float, float] = (1000, 1000)  # (width, height) that the boxes in it count in


# With scoring="expected" the judge's reply is begun, {"score": , and we look at the digit to come.
BEGUN = '{"%s": '
DIGIT_MASS = (
    0.5  # least probability of a digit there; below it the judge was not about to give a mark
)
# What separates the turns of a chat, in Qwen's notation
CHAT_MARKERS = re.compile(r"<\|[^<>|\s]{1,40}\|>|</?(?:tool_call|tool_response|think)>")


class VlmJudge:
    """The judge's contract, met by a vision-language model; a class that inherits runs the model.

    scoring="reply"     (the paper's) The judge writes its reasons, then a mark: up to 200 tokens.
    scoring="expected"  Nothing is written. The reply is begun for it, {"score": , and the reward is
                        the mean of the marks 0 to 10 under its probabilities of what comes next.
                        It marks without having reasoned. In return rewards are smooth: fewer
                        groups have equal rewards only, which teach nothing.
    spatial_as="boxes"  (the paper's) R_spa sees the boxes drawn.
    spatial_as="text"   It reads their coordinates (the paper's table 6).
    semantic_as="four"  R_sem is the mean of four marks, one for each of CRITERIA.
    semantic_as="one"   (the paper's figure 8) One mark, with the four as considerations.
    """

    markers = CHAT_MARKERS

    def __init__(self, scoring="reply", spatial_as="boxes", semantic_as="four"):
        if scoring not in ("reply", "expected") or spatial_as not in ("boxes", "text"):
            expected = "scoring is reply or expected, spatial_as boxes or text"
            raise ValueError(f"{expected}: got {scoring} and {spatial_as}")
        if semantic_as not in ("four", "one"):
            raise ValueError(f"semantic_as is four or one: got {semantic_as}")
        self.scoring = scoring
        self.spatial_as = spatial_as
        self.semantic_as = semantic_as
        self.most_tokens = None  # a limit for all replies, where it is below that of the task
        self.words = {}  # part -> the replies of the last call
        self.marks = {}  # part -> name of a mark -> that mark / 10 per row, None if unreadable

    # What runs the model. A call hands over all its rows at once, in order.

    def write(self, questions: list[Question]) -> list[Reply]:
        """What the judge replies to each question, decoded greedily."""
        raise NotImplementedError

    def digits(self, questions: list[Question]) -> list[tuple[list[float], list[float]]]:
        """Per question (first, after_one), ten probabilities each: that the begun reply goes on
        with this digit; and, were a 1 written there, that it goes on with this digit after it."""
        raise NotImplementedError

    # The four calls of the contract

    def semantic(self, prompts, chains):
        task = TASKS["sem"] if self.semantic_as == "four" else TASKS["sem_one"]
        texts = []
        for prompt, chain in zip(prompts, chains, strict=True):
            texts.append(self._question(task, prompt=prompt, chain=chain))
        return self._score("sem", task, texts)

    def spatial(self, prompts, layouts):
        texts = []
        for prompt, layout in zip(prompts, layouts, strict=True):
            told = LAYOUT_DRAWN
            if self.spatial_as == "text":
                told = LAYOUT_TOLD
                for name, x1, y1, x2, y2 in layout:
                    told += f"\n{name}: {x1:.0f} {y1:.0f} {x2:.0f} {y2:.0f}"
            texts.append(self._question(TASKS["spa"], prompt=prompt, layout=told))
        if self.spatial_as == "text":
            return self._score("spa", TASKS["spa"], texts)
        sketches = [draw_boxes(layout, size=448) for layout in layouts]
        return self._score("spa", TASKS["spa"], texts, sketches)

    def alignment(self, prompts, images):
        texts = [self._question(TASKS["pi"], prompt=prompt) for prompt in prompts]
        return self._score("pi", TASKS["pi"], texts, images)

    def ground(self, images, names):
        task = TASKS["ri"]
        texts = [self._question(task, name=name) for name in names]
        replies = self.write(self._rows(task, task.answer, texts, images))
        self.words["ri"] = [reply.text for reply in replies]
        answers = []
        for reply, name in zip(replies, names, strict=True):
            boxes = parse_bboxes(reply.text, *reply.frame)
            if boxes is not None:
                boxes = [box._replace(name=name) for box in boxes]
            answers.append(boxes)
        return answers

    def try_out(self):
        """Asks one made-up row per call, of which a few tokens are answered.

        Raises ValueError, in one line, when the judge cannot be asked: most likely its chat
        template does not take what we hand over."""
        box = Box("red ball", 100, 100, 500, 500)
        picture = draw_boxes([box], size=112)
        rows = {
            "semantic": ("a red ball", "A red ball."),
            "spatial": ("a red ball", [box]),
            "alignment": ("a red ball", picture),
            "ground": (picture, "red ball"),
        }
        self.most_tokens = 4
        for call, (first, second) in rows.items():
            try:
                getattr(self, call)([first], [second])
            except Exception as error:  # templates raise whatever they like
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                raise ValueError(
                    f"this judge cannot be asked; its call {call} ended in {reason}"
                ) from error
        self.most_tokens = None
        self.words.clear()
        self.marks.clear()

    # From questions to answers

    def _question(self, task, **fields):
        """The question of one row.

        The policy wrote some of the fields. With chat markers of its own it could end the question
        there and answer in the judge's name, so markers are taken out.
        """
        clean = {}
        for name, text in fields.items():
            clean[name] = self.markers.sub(" ", text)
        return task.question.format(**clean)

    def _rows(self, task, answer, texts, images, begun=""):
        """Questions with this form of answer; `images` is None for a call without pictures."""
        limit = min(task.max_tokens, self.most_tokens or task.max_tokens)
        rows = []
        for text, image in zip(texts, images or [None] * len(texts), strict=True):
            rows.append(Question(text + ANSWER % answer, image, limit, begun))
        return rows

    def _score(self, part, task, texts, images=None):
        """Scores in [0, 1], the mean of the marks / 10; None where one of them is missing."""
        if self.scoring == "expected":
            words, marks = self._expected_marks(task, texts, images)
        else:
            words, marks = self._written_marks(task, texts, images)
        self.words[part] = words
        scores = []
        for row_marks in zip(*marks.values(), strict=True):
            scores.append(None if None in row_marks else sum(row_marks) / len(row_marks))
        self.marks[part] = {}
        if len(marks) > 1:
            for name, column in marks.items():
                kept = zip(column, scores, strict=True)
                self.marks[part][name] = [None if score is None else mark for mark, score in kept]
        return scores

    def _written_marks(self, task, texts, images):
        """scoring="reply": (words per row, {name of a mark: mark / 10 or None per row})."""
        replies = self.write(self._rows(task, task.answer, texts, images))
        words = [reply.text for reply in replies]
        marks = {}
        for name in task.marks:
            marks[name] = [parse_score(reply, name) for reply in words]
        return words, marks

    def _expected_marks(self, task, texts, images):
        """scoring="expected": the same. Each mark has a question and a begun reply of its own."""
        rows = []
        for name in task.marks:
            rows += self._rows(task, f'"{name}": mark', texts, images, BEGUN % name)
        digits = self.digits(rows)
        words = [[] for _ in texts]
        marks = {}
        for k, name in enumerate(task.marks):
            marks[name] = []
            for i in range(len(texts)):
                mean, mass = expected_mark(*digits[k * len(texts) + i])
                marks[name].append(mean / 10 if mass >= DIGIT_MASS else None)
                label = f"{name} " if len(task.marks) > 1 else ""
                words[i].append(f"{label}{mean:.2f} on average ({mass:.0%} on digits)")
        return [", ".join(said) for said in words], marks


def expected_mark(first: list[float], after_one: list[float]) -> tuple[float, float]:
    """The mean of the marks 0 to 10, and the probability that a mark comes at all.

    first      ten probabilities: of each digit where the mark begins
    after_one  ten probabilities: of each digit where a 1 has just been written
    """
    marks = [*first, first[1] * after_one[0]]  # marks[n]: the probability of the mark n
    marks[1] = first[1] * (1 - after_one[0])
    mass = sum(marks)
    mean = sum(n * chance for n, chance in enumerate(marks)) / max(mass, 1e-30)
    return mean, mass


def check_finite(questions: list[str], logits, network: str = "the judge") -> None:
    """Raises ValueError with the first question whose row of the logits (rows, V) holds nan or inf:
    greedy decoding would make words of it."""
    import torch

    broken = (~torch.isfinite(logits)).any(dim=-1).nonzero().flatten().tolist()
    if broken:
        message = f"{network}'s answer about row {broken[0] + 1} of its batch is not finite"
        raise ValueError(f"{message} (nan or inf): {questions[broken[0]]!r}")


# -------------------------------------------------------------------------------------------------
# Flags, and the command line


@dataclass
class JudgeConfig:
    """The flags of everything that asks for rewards: the configurations inherit them."""

    judge: str = "toy"  # `toy`, toy:0.2 (errs), folder or hub id of a Qwen2.5-VL or 3-VL, http://…
    judge_model: str = ""  # its name on the server of http://…/v1; default: the only one there
    judge_frame: Literal["ask", "pixels", "grid"] = "ask"  # what a served judge's boxes count in
    judge_device: str = ""  # where judge and HPS are; default: on the GPU of each rank
    scoring: Literal["reply", "expected"] = "reply"  # marks are written; or read off probabilities
    semantic: Literal["four", "one"] = "four"  # R_sem is the mean of four marks; or one (figure 8)
    spatial_as: Literal["boxes", "text"] = "boxes"  # R_spa sees the boxes drawn; or reads numbers
    judge_batch: int = 0  # rows that the judge takes at a time; 0: 16, or 64 on a server
    hps: str = "toy"  # `toy` (stand-in), or file or hub id of HPS v2.1
    rewards: tuple[str, ...] = PARTS  # the parts that take part
    combine: Literal["product", "sum"] = "product"  # how they become one number (paper: product)


def __getattr__(name: str):
    """`rewards.QwenJudge`, `rewards.ServedJudge` and `rewards.HPS`: loaded when they are named."""
    if name == "QwenJudge":
        from judges.qwen import QwenJudge

        return QwenJudge
    if name == "ServedJudge":
        from judges.served import ServedJudge

        return ServedJudge
    if name == "HPS":
        from judges.hps import HPS

        return HPS
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def load_judge(flags: JudgeConfig, device):
    """(judge, hps) that the flags name. hps is there for evaluations even when it has no part in
    the reward; None without a --hps, or when the stand-in cannot judge these pictures.

    Raises OSError or ValueError when there is no such judge, or when it cannot be asked."""
    where = flags.judge_device or device
    is_toy = flags.judge.split(":")[0] == "toy"  # toy:0.2 is one, too
    if is_toy:
        from toy.world import ToyJudge

        judge = ToyJudge.from_flag(flags.judge)
    elif flags.judge.startswith(("http://", "https://")):
        from judges.served import ServedJudge

        judge = ServedJudge(
            flags.judge,
            model=flags.judge_model,
            in_flight=flags.judge_batch or 64,
            frame=flags.judge_frame,
            scoring=flags.scoring,
            spatial_as=flags.spatial_as,
            semantic_as=flags.semantic,
        )
    else:
        from judges.qwen import QwenJudge

        judge = QwenJudge(
            flags.judge,
            device=where,
            batch_size=flags.judge_batch or 16,
            scoring=flags.scoring,
            spatial_as=flags.spatial_as,
            semantic_as=flags.semantic,
        )
    if isinstance(judge, VlmJudge):
        judge.try_out()
    hps = None
    if flags.hps and flags.hps != "toy":
        from judges.hps import HPS

        hps = HPS(flags.hps, device=where)
    elif flags.hps and (is_toy or "hps" in flags.rewards):
        from toy.world import crispness

        hps = crispness
    return judge, hps


@dataclass
class Config(JudgeConfig):
    judge_device: str = "cpu"  # where judge and HPS are: cpu or cuda
    hps: str = ""  # file or hub id of HPS v2.1, or `toy` (stand-in); without one, it is left out
    prompt: str = ""  # what the picture should show
    chain: Path = Path("chain.txt")  # text file with the plan
    image: Path = Path("picture.png")  # the picture that was drawn from it
    out: Path = Path("rewards.png")  # planned and found boxes over the picture


def draw_matches(plan: list[Box], found: dict, image: Image.Image) -> Image.Image:
    """The picture with the planned boxes, each with its IoU, and the boxes that the judge found."""
    planned_boxes = []
    found_boxes = []
    for box, (overlap, partner) in zip(plan, match_boxes(plan, found), strict=True):
        planned_boxes.append(box._replace(name=f"{box.name}: IoU {overlap:.2f}"))
        if partner:
            found_boxes.append(partner._replace(name=f"found {partner.name}"))
    large = image.resize((768, 768 * image.height // image.width))
    return draw_boxes(planned_boxes + found_boxes, image=large)


def main(argv: list[str] | None = None) -> None:
    from engine import run

    config = run.parse_args(Config, __doc__, argv)
    run.check_ranges(config, not_negative="judge_batch")
    if not config.prompt.strip():
        run.fail("--prompt is empty: say what the picture should show")
    try:
        judge, hps = load_judge(config, config.judge_device)
        chain = config.chain.read_text("utf-8")
        image = Image.open(config.image).convert("RGB")
        row = score(
            judge,
            hps,
            prompts=[config.prompt],
            chains=[chain],
            images=[image],
            parts=config.rewards,
            combine=config.combine,
        )[0]
        plan = parse_chain(chain)
        found, _ = ground_plans(judge, [plan], [image])
        draw_matches(plan, found[0], image).save(config.out)
    except (OSError, ValueError, RuntimeError) as error:
        run.fail(" ".join(str(error).split()))  # in one line
    words = getattr(judge, "words", {})
    width = max(10, *map(len, row))
    for part, value in row.items():
        said = " ".join(words.get(part, [])).split()
        print(f"{part:{width}} {value:6.3f}", *said)
    print(f"wrote {config.out}: planned and found boxes over the picture")


if __name__ == "__main__":
    main()
