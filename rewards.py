"""The rewards of GoT-R1 (paper, section 3.3): a judge's marks, a preference score, their product.

    R_total = R_PI * (R_sem + R_spa) / 2 * R_RI * R_HPS

    R_sem   prompt -> chain     does the chain, without its boxes, say what the prompt says?
    R_spa   prompt -> layout    are the objects in the right places? the judge sees the boxes drawn
    R_PI    prompt -> picture   does the picture show what the prompt says, in the right places?
    R_RI    chain -> picture    is each planned object where the chain has it?
    R_HPS   prompt -> picture   would people like it? (HPS v2.1)

The judge is a vision-language model. R_sem, R_spa and R_PI are its marks out of ten, divided by 10;
R_sem is the mean of four marks, for completeness, faithfulness, consistency and clarity. For R_RI
the judge looks for each planned name in the picture; the reward is the mean IoU of planned and
found boxes. R_HPS is a cosine, near 0.3.

Open in the paper, chosen here:
- Without a valid box in the chain R_spa = R_RI = 0. An object that is not found has IoU 0.
- A judge's reply that cannot be read scores 0; their number is logged. When most replies of a batch
  cannot be read, the run stops: else a broken judge would look like a policy that learns nothing.
- The judge's instructions are our wording of the paper's (appendix, figures 8 to 11).

    python rewards.py --prompt "a red ball above a blue cube" --chain chain.txt --image picture.png
    python rewards.py … --judge Qwen/Qwen2.5-VL-7B-Instruct --hps HPS_v2.1_compressed.pt
    python rewards.py … --judge http://localhost:8000/v1    # the same judge on a server
"""

import importlib
import json
import math
import operator
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from PIL import Image

from render_boxes import Box, draw_boxes, iou, parse_chain, strip_boxes

PARTS = ("sem", "spa", "ri", "pi", "hps")

# The judge's contract: any object with these four methods. Each takes a batch as two lists of equal
# length, and returns a list of that length.
#   semantic(prompts, chains)    -> scores        the chain without its boxes, against the prompt
#   spatial(prompts, layouts)    -> scores        a list of Box, never empty, against the prompt
#   alignment(prompts, images)   -> scores        a PIL picture against the prompt
#   ground(images, names)        -> lists of Box  where that name is in that picture; [] if nowhere
# Scores are in [0, 1], boxes on the 0..1000 grid. None stands for a reply that cannot be read.
# Optional attributes:
#   words            part -> the judge's literal replies to its last call, in order
#   marks            "sem" -> name -> one mark per sample, if R_sem is a mean of marks
#   ask_early(prompts, chains, images, parts)   takes samples while others are drawn: ServedJudge
#   forget_early()   called at the end of `score`
#   exact            the judge of held-out prompts, where this one errs on purpose: ToyJudge


def total_reward(parts: dict[str, float], combine: str = "product") -> float:
    """The product or sum of those of PARTS that are in the dict, where `sem` and `spa` are replaced
    by their mean. Other keys are ignored.

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
    strict: bool = True,
) -> list[dict[str, float]]:
    """All rewards of a batch, per sample a dict:

    sem, spa, …         those of `parts`; no query is made for the others
    sem_completeness, … the marks whose mean is sem, if the judge gives several
    judge_fail          the number of its replies that could not be read
    total               the product or sum of the parts, see total_reward

    `hps` is a function (prompts, images) -> floats, or None. Raises ValueError for an unknown part,
    and for a score that is not finite or, of the judge, not in [0, 1]. When most replies cannot be
    read (see check_readable), raises RuntimeError or, without `strict`, prints a message, once.
    """
    scores, _ = score_with_boxes(judge, hps, prompts, chains, images, parts, combine, strict)
    return scores


def score_with_boxes(
    judge, hps, prompts, chains, images, parts=PARTS, combine="product", strict=True
) -> tuple[list[dict[str, float]], list[dict[str, list[Box] | None]]]:
    """(scores, found): what `score` returns, and where the judge found the planned objects, see
    ground_plans; [] when R_RI is not among the parts."""
    if not set(parts) <= set(PARTS):
        expected = f"expected some of {' '.join(PARTS)}"
        raise ValueError(f"unknown rewards in {' '.join(parts)}: {expected}")
    try:
        plans, answers, found = ask_judge(judge, prompts, chains, images, parts)
    finally:
        if hasattr(judge, "forget_early"):
            judge.forget_early()

    present = [part for part in PARTS if part in parts and (part != "hps" or hps)]
    scores = []
    for _ in prompts:
        sample = dict.fromkeys(present, 0.0)
        sample["judge_fail"] = 0
        scores.append(sample)
    for part in ("sem", "spa", "pi"):
        for i, answer in answers.get(part, {}).items():
            if answer is None:
                scores[i]["judge_fail"] += 1
            elif 0 <= answer <= 1:
                scores[i][part] = float(answer)
            else:
                raise ValueError(
                    f"the judge's {part} for {prompts[i]!r} is {answer}: scores are in [0, 1], "
                    "or None where a reply cannot be read"
                )
    if "sem" in present:
        for name, marks in getattr(judge, "marks", {}).get("sem", {}).items():
            for sample, mark in zip(scores, marks, strict=True):
                sample[f"sem_{name}"] = mark or 0.0  # None: the reply cannot be read
    if "ri" in present:
        for sample, plan, boxes in zip(scores, plans, found, strict=True):
            if plan:
                overlaps = [overlap for overlap, _ in match_boxes(plan, boxes)]
                sample["ri"] = sum(overlaps) / len(overlaps)
                sample["judge_fail"] += list(boxes.values()).count(None)
    check_readable(answers, getattr(judge, "words", {}), strict)

    if "hps" in present:
        for sample, cosine in zip(scores, hps(prompts, images), strict=True):
            sample["hps"] = float(cosine)
    for prompt, sample in zip(prompts, scores, strict=True):
        for part in present:
            if not math.isfinite(sample[part]):
                raise ValueError(f"{part} for {prompt!r} is {sample[part]}: not a finite number")
        sample["total"] = total_reward(sample, combine)
    return scores, found


def ask_judge(judge, prompts, chains, images, parts):
    """Sends all queries of `score` to the judge: (plans, answers, found).

    plans    per sample the boxes of its chain
    answers  part -> index of the sample -> its score, or None; without "spa" for samples that have
             no box. "ri" has the boxes instead, by index of the query, see ground_plans
    found    see ground_plans; [] without "ri" in parts
    """
    samples = range(len(prompts))
    plans = [parse_chain(chain) for chain in chains]
    answers = {}
    found = []
    if "sem" in parts:
        texts = [strip_boxes(chain) for chain in chains]
        answers["sem"] = dict(zip(samples, judge.semantic(prompts, texts), strict=True))
    with_boxes = [i for i in samples if plans[i]]
    if "spa" in parts and with_boxes:
        layouts = [plans[i] for i in with_boxes]
        marks = judge.spatial([prompts[i] for i in with_boxes], layouts)
        answers["spa"] = dict(zip(with_boxes, marks, strict=True))
    if "pi" in parts:
        answers["pi"] = dict(zip(samples, judge.alignment(prompts, images), strict=True))
    if "ri" in parts:
        found, boxes = ground_plans(judge, plans, images)
        answers["ri"] = dict(enumerate(boxes))
    return plans, answers, found


def ground_plans(
    judge, plans: list[list[Box]], images: list[Image.Image]
) -> tuple[list[dict[str, list[Box] | None]], list[list[Box] | None]]:
    """Where the judge finds the planned objects: (found, answers).

    found    per sample a dict name -> boxes, or None where the reply cannot be read
    answers  the same per query. There is one per picture and name, all in one call; samples with
             equal pictures share theirs
    """
    pixels = [(image.mode, image.size, image.tobytes()) for image in images]
    queries = {}  # (pixels, name) -> picture
    for key, image, plan in zip(pixels, images, plans, strict=True):
        for box in plan:
            queries[key, box.name] = image
    answers = []
    if queries:
        names = [name for _, name in queries]
        answers = judge.ground(list(queries.values()), names)
    boxes_of = dict(zip(queries, answers, strict=True))
    found = []
    for key, plan in zip(pixels, plans, strict=True):
        found.append({box.name: boxes_of[key, box.name] for box in plan})
    return found, answers


def match_boxes(
    planned: list[Box], found: dict[str, list[Box] | None]
) -> list[tuple[float, Box | None]]:
    """Per planned box (IoU, its found box), or (0.0, None). R_RI is the mean of the IoUs.

    Boxes of one name are matched one to one, so that one dog in the picture cannot stand for three
    in the plan: first the pair with the highest IoU, then the best of the remaining ones, and so
    on. Where a name repeats, another matching may have a higher sum.
    """
    pairs = []  # (IoU, index of the planned box, index of the found box under that name)
    for i, box in enumerate(planned):
        for k, candidate in enumerate(found[box.name] or []):
            pairs.append((iou(box, candidate), i, k))
    pairs.sort(key=operator.itemgetter(0), reverse=True)
    matched = [(0.0, None)] * len(planned)
    taken = set()  # found boxes that are matched, as (name, index)
    for overlap, i, k in pairs:
        name = planned[i].name
        is_free = matched[i][1] is None and (name, k) not in taken
        if overlap > 0 and is_free:
            matched[i] = (overlap, found[name][k])
            taken.add((name, k))
    return matched


has_warned = False  # set when check_readable has printed its message


def check_readable(answers: dict[str, dict], words: dict[str, list[str]], strict: bool) -> None:
    """Raises RuntimeError, with three quotes from `words`, when more than half of all answers are
    None. Also when more than half of a part's are, if it has at least 8: one broken part is enough
    to make every product 0. Without `strict` prints the message instead, the first time only.
    """
    global has_warned
    total = 0
    total_unread = 0
    too_many = False
    counts = []
    quotes = []
    for part, answers_of_part in answers.items():
        count = len(answers_of_part)
        unread = [k for k, answer in enumerate(answers_of_part.values()) if answer is None]
        total += count
        total_unread += len(unread)
        if count >= 8 and 2 * len(unread) > count:
            too_many = True
        counts.append(f"{part} {len(unread)} of {count}")
        if part in words:
            quotes += [f"\n  {part}: {words[part][k][:300]!r}" for k in unread]
    if not too_many and 2 * total_unread <= total:
        return
    message = f"most of the judge's replies cannot be read: {', '.join(counts)}"
    message += "".join(quotes[:3])
    if strict:
        raise RuntimeError(message)
    if not has_warned:
        print(f"judge: {message}", file=sys.stderr)
    has_warned = True


# -------------------------------------------------------------------------------------------------
# Reading a judge's reply. Any text goes in; None comes out unless it holds one clear answer: never
# a guess, never an exception.

# Where a reply names a mark (%s): "score": or **Score:** or score = ; then what follows, up to a
# comma, quote, star or bracket
NAMED = (
    r"""%s["'*\\]{0,3}\s{0,9}[:=][\s"'*\\]{0,9}"""
    r"""((?:[^,}\]\n"'*\\]|,(?=[0-9])){0,40})"""
)
# 8, 8.5, 8/10, 8 out of 10; a sentence may follow
MARK = re.compile(r"([0-9]{1,2}(?:\.[0-9]{1,2})?)(?: ?(?:/|out of) ?10)?(?:\.(?: [^0-9].*)?)?")
# Numbers stay text. An object becomes a tuple of (key, value), so that no key gets lost when it
# stands there twice
JSON = json.JSONDecoder(object_pairs_hook=tuple, parse_int=str, parse_float=str)


def parse_score(reply: str, name: str = "score") -> float | None:
    """The mark `name` of a reply, out of ten, divided by 10. None unless there is exactly one.

    Read: JSON, of which the outermost object with the key counts and its sentences do not; also in
    fences, with single quotes or trailing commas, or amid prose; "8/10", 8.5, Score: 8.
    Not read: two marks that differ, 7-8, 80/100, 11, -3, 0.8 (out of ten, or of one?), and a number
    at which the JSON was cut off (is 1 the beginning of 10?).

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
        # null, true, lists and objects are no marks
        marks += _marks_behind(name, f"{name}: {value}") if isinstance(value, str) else [None]
    if None in marks or len(set(marks)) != 1:
        return None
    mark = marks[0]
    return mark / 10 if mark == 0 or 1 <= mark <= 10 else None


def _marks_behind(name: str, text: str, is_cut_off: bool = False) -> list[float | None]:
    """All marks of this name in a text; None for what stands in place of one but is no mark."""
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
    end = 0  # of what has been read
    start = text.find("{")
    while start >= 0:
        rest += text[end:start]
        try:
            decoded, end = JSON.raw_decode(text, start)
            found = _values_under(key, decoded)
        except (ValueError, RecursionError):  # no JSON begins at this brace
            end = start + 1
            found = []
        values += found
        rest += "]" if found else text[start:end]  # "]": NAMED must not read on behind the object
        start = text.find("{", end)
    return values, rest + text[end:]


def _values_under(key: str, decoded) -> list:
    """The values under a key in the outermost objects that have it, level by level."""
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
IN_PICTURE = r"in (?:the|this) (?:picture|image|photo|scene)"
NO_BBOX = re.compile(
    r"(?<!\w)\[\s{0,9}\](?!\w)"
    r"|\b(?:null|none)\b"
    r"|\bthere(?:['’]s| is| are) no\b|\bthere (?:is|are)(?:n['’]t| not)\b"
    rf"|\bnot (?:be )?(?:visible|found|there|present|shown|seen|{IN_PICTURE})\b"
    r"|\b(?:do|does|did)(?: not|n['’]t) (?:contain|show|include|have|depict|appear|see|find)\b"
    r"|\b(?:cannot|can['’]t|could(?: not|n['’]t)|unable to) (?:find|locate|see|detect|identify)\b"
    # "No red ball is visible", "no such thing in this picture"; and the reply "No ball."
    rf"|\bno\b[^.,:\n]{{1,60}}\b(?:visible|found|present|{IN_PICTURE})\b"
    r"|\A\W{0,9}no\b[^.,:\n]{0,40}\W{0,9}\Z",
    re.IGNORECASE,
)


def parse_bboxes(reply: str, width: float, height: float) -> list[Box] | None:
    """The boxes of a grounding reply, on the 0..1000 grid, with the name "". [] when the reply says
    that there is none, in words or by [0, 0, 0, 0].

    `width` and `height`: the size of the picture in the units of the reply. For Qwen2.5-VL these
    are pixels of the picture *after* its processor resized it, for example from 384 to 392
    (QwenLM/Qwen3-VL issues 676 and 866); for Qwen3-VL the size is 1000 by 1000.
    Reads a box or a list, written in any way that parse_score reads; of a reply that was cut off
    the complete boxes. Labels are ignored: the query has one name. Boxes are clipped to the
    picture, those without area left out.
    None when the reply cannot be read: no box is left; or a box reaches out of the picture by more
    than 10 %, so that its units, and those of all boxes, must be others.

    >>> cut_off = '[{"bbox_2d": [98, 49, 196, 98], "label": "ball"}, {"bbox_2d": [0, 0, 39'
    >>> parse_bboxes(cut_off, width=392, height=392)
    [Box(name='', x1=250.0, y1=125.0, x2=500.0, y2=250.0)]
    """
    boxes = []
    says_there_is_none = bool(NO_BBOX.search(reply)) and not BBOX_BEGINS.search(reply)
    for corners in BBOX.findall(reply):
        left, top, right, bottom = map(float, corners)
        if left == top == right == bottom == 0:
            says_there_is_none = True
        edges = (
            1000 * left / width,
            1000 * top / height,
            1000 * right / width,
            1000 * bottom / height,
        )
        if min(edges) < -100 or max(edges) > 1100:
            return None
        x1, y1, x2, y2 = [min(max(edge, 0.0), 1000.0) for edge in edges]
        if x1 < x2 and y1 < y2:
            boxes.append(Box("", x1, y1, x2, y2))
    return boxes if boxes or says_there_is_none else None


# -------------------------------------------------------------------------------------------------
# The judge's queries


class Task(NamedTuple):
    """The query of a part: intro, then question and answer, or one of yes_or_no."""

    intro: str  # what to check
    max_tokens: int  # most tokens of a reply
    question: str = ""  # with scoring="reply": how to mark it
    answer: str = ""  # the JSON to reply with, without its braces: reasons before the mark
    marks: tuple[str, ...] = ("score",)  # the keys of the marks in it; the score is their mean
    yes_or_no: tuple[str, ...] = ()  # with scoring="yes": one question per mark


# The four marks of R_sem (paper, appendix, figure 8)
CRITERIA = ("completeness", "faithfulness", "consistency", "clarity")

SEMANTIC_INTRO = """\
You check the plan for a picture against the request. The plan is text; nothing is drawn yet.
Request: {prompt}
Plan: {chain}
"""
SEMANTIC = """\
There are four criteria, each with a mark from 0 to 10. completeness: everything requested is in the
plan, each thing with its own colour, number and other properties. faithfulness: nothing in the plan
contradicts the request, and what it adds suits the request. consistency: no part of the plan
contradicts another. clarity: it is one clear, well-formed scene. 9-10: nothing is wrong. 7-8: a
slip in a detail. 5-6: clear gaps. 3-4: much is wrong. 1-2: hardly anything is right. 0: no
meaningful text."""

SPATIAL_INTRO = """\
You check the layout of a picture against the request: a rectangle for each object, {layout}
Request: {prompt}
"""
LAYOUT_DRAWN = "drawn with its name at a corner."
LAYOUT_AS_TEXT = "given by its left, top, right and bottom edge, 0 to 1000, y downwards:"
SPATIAL = """\
Does each requested object have its own rectangle? Do the rectangles agree, in place and size, with
the relations that the request states or implies? Give a mark from 1 to 10. 8-10: all objects, and
their places agree. 5-7: partly, or it can be read either way (5: on the edge). 4: one object is
missing. 3: a relation is plainly contradicted. 2: several objects or relations are wrong. 1:
nothing agrees."""

ALIGNMENT_INTRO = """\
You check a picture against the request that it was made for: only its composition, not its beauty.
Request: {prompt}
"""
ALIGNMENT = """\
Is each requested object there, with its own properties? Does each spatial relation hold, taken
strictly? (Left of: further left, side by side. On top of: right above and touching.) Give a mark
from 0 to 10. 8-10: all objects, all relations. 5-7: all objects, a relation is slightly off. 0-4: a
relation is wrong or an important object is missing."""

# The paper's figure 11, to which we add an example, and the reply when there is nothing to report
GROUND = """\
Locate every "{name}" in the picture, report the bbox coordinates in JSON format: a list like this
and nothing else: [{{"bbox_2d": [x1, y1, x2, y2], "label": "{name}"}}, ...]
If there is none, answer with an empty list: []"""

TASKS = {
    "sem": Task(
        SEMANTIC_INTRO,
        max_tokens=80,
        question=SEMANTIC,
        answer=", ".join(f'"{name}": mark' for name in CRITERIA),
        marks=CRITERIA,
        yes_or_no=(
            "Is everything requested in the plan, each thing with its own properties?",
            "Does the plan agree with the request, without adding what does not suit it?",
            "Do all parts of the plan agree with each other?",
            "Does the plan describe one clear, well-formed scene?",
        ),
    ),
    "spa": Task(
        SPATIAL_INTRO,
        max_tokens=200,
        question=SPATIAL,
        answer='"reasoning": "two sentences", "score": mark',
        yes_or_no=(
            "Does each requested object have its own rectangle, where the request places it?",
        ),
    ),
    "pi": Task(
        ALIGNMENT_INTRO,
        max_tokens=200,
        question=ALIGNMENT,
        answer='"description": "what is seen, one sentence", '
        '"reasoning": "one sentence", "score": mark',
        yes_or_no=(
            "Is each requested object there, as it was requested, and where the request places it?",
        ),
    ),
    "ri": Task(GROUND, max_tokens=300),  # a box takes 30 to 45
}
ANSWER = "\nAnswer with JSON like this and nothing else: {%s}"
YES_OR_NO = "\nAnswer with Yes or No."

# How a reply to YES_OR_NO may begin. Each is one token of Qwen's tokenizer
YES = ("Yes", "yes", "YES")
NO = ("No", "no", "NO")
LEAST_YES_OR_NO = 0.5  # least probability of these six together, else the reply is unreadable


# -------------------------------------------------------------------------------------------------
# A vision-language model as the judge, in this process or on a server


class Question(NamedTuple):
    text: str  # stands after the picture
    image: Image.Image | None
    max_tokens: int  # most tokens of the reply


class Reply(NamedTuple):
    text: str  # ends in "…" if it was cut off, so that half a number is not read as a number
    frame: tuple[float, float] = (1000, 1000)  # width and height of the picture in units of a box


# What separates the turns of a chat, in Qwen's notation
CHAT_MARKERS = re.compile(r"<\|[^<>|\s]{1,40}\|>|</?(?:tool_call|tool_response|think)>")


class VlmJudge:
    """The judge's contract for a vision-language model. Subclasses run the model.

    scoring="reply"     (the paper) The judge writes reasons and a mark, up to 200 tokens.
    scoring="yes"       The judge writes nothing. Each criterion is a yes-no question; its mark is
                        P(Yes) / (P(Yes) + P(No)) of the first token of the reply (VQAScore, arXiv
                        2404.01291). There is no reasoning, but marks are smooth: fewer groups have
                        equal rewards, from which nothing is learned.
    spatial_as="boxes"  (the paper) For R_spa the judge sees the boxes drawn.
    spatial_as="text"   It reads their coordinates (the paper's table 6).
    """

    markers = CHAT_MARKERS

    def __init__(self, scoring="reply", spatial_as="boxes"):
        if scoring not in ("reply", "yes") or spatial_as not in ("boxes", "text"):
            expected = "scoring is reply or yes, spatial_as boxes or text"
            raise ValueError(f"{expected}: got {scoring} and {spatial_as}")
        self.scoring = scoring
        self.spatial_as = spatial_as
        self.words = {}  # part -> the replies of the last call
        self.marks = {}  # part -> name -> per sample a mark in [0, 1], or None: see `_score`

    # For subclasses: run the model

    def write(self, questions: list[Question]) -> list[Reply]:
        """The reply to each question, decoded greedily."""
        raise NotImplementedError

    def probabilities(self, questions: list[Question], words: list[str]) -> list[list[float]]:
        """Per question and word: the probability that the reply begins with this word, which should
        be one token."""
        raise NotImplementedError

    # The four methods of the contract

    def semantic(self, prompts, chains):
        intros = []
        for prompt, chain in zip(prompts, chains, strict=True):
            intros.append(self._intro("sem", prompt=prompt, chain=chain))
        return self._score("sem", intros)

    def spatial(self, prompts, layouts):
        intros = []
        for prompt, layout in zip(prompts, layouts, strict=True):
            layout_text = LAYOUT_DRAWN
            if self.spatial_as == "text":
                layout_text = LAYOUT_AS_TEXT
                for name, x1, y1, x2, y2 in layout:
                    layout_text += f"\n{name}: {x1:.0f} {y1:.0f} {x2:.0f} {y2:.0f}"
            intros.append(self._intro("spa", prompt=prompt, layout=layout_text))
        if self.spatial_as == "text":
            return self._score("spa", intros)
        # in black: another colour could contradict a name ("blue ball" in a red rectangle)
        sketches = [draw_boxes(layout, size=448, colours=("black",)) for layout in layouts]
        return self._score("spa", intros, sketches)

    def alignment(self, prompts, images):
        intros = [self._intro("pi", prompt=prompt) for prompt in prompts]
        return self._score("pi", intros, images)

    def ground(self, images, names):
        texts = [self._intro("ri", name=name) for name in names]
        replies = self.write(self._questions(texts, images, TASKS["ri"].max_tokens))
        self.words["ri"] = [reply.text for reply in replies]
        answers = []
        for reply, name in zip(replies, names, strict=True):
            boxes = parse_bboxes(reply.text, *reply.frame)
            if boxes is not None:
                boxes = [box._replace(name=name) for box in boxes]
            answers.append(boxes)
        return answers

    def try_out(self):
        """Sends a query without and one with a picture. Raises ValueError when that fails, most
        likely because of the judge's chat template."""
        for image in (None, Image.new("RGB", (112, 112), "white")):
            question = Question("Is this a red ball?" + YES_OR_NO, image, max_tokens=4)
            try:
                self.write([question])
                if self.scoring == "yes":
                    self.probabilities([question], [*YES, *NO])
            except Exception as error:  # a template may raise anything
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                kind = "a question with a picture" if image else "a question"
                raise ValueError(f"this judge cannot be asked: {kind} ended in {reason}") from error

    # From queries to scores

    def _intro(self, part, **fields):
        """The beginning of a query. Chat markers are removed from its fields: the policy, which
        wrote some of them, could end the query there and go on in the judge's name."""
        clean = {}
        for name, text in fields.items():
            clean[name] = self.markers.sub(" ", text)
        return TASKS[part].intro.format(**clean)

    def _questions(self, texts, images, max_tokens):
        """A Question per text; `images` may be None."""
        questions = []
        for text, image in zip(texts, images or [None] * len(texts), strict=True):
            questions.append(Question(text, image, max_tokens))
        return questions

    def _score(self, part, intros, images=None):
        """Per sample the score, the mean of its marks; None where a mark is missing."""
        if self.scoring == "yes":
            marks = self._marks_by_yes(part, intros, images)
        else:
            marks = self._written_marks(part, intros, images)
        scores = []
        for of_sample in zip(*marks.values(), strict=True):
            scores.append(None if None in of_sample else sum(of_sample) / len(of_sample))
        self.marks[part] = {}
        if len(marks) > 1:
            for name, column in marks.items():
                pairs = zip(column, scores, strict=True)
                # without a score the sample has no marks, either: their mean is that of the scores
                self.marks[part][name] = [None if score is None else mark for mark, score in pairs]
        return scores

    def _written_marks(self, part, intros, images):
        """scoring="reply": name of a mark -> per sample that mark in [0, 1], or None."""
        task = TASKS[part]
        texts = [intro + task.question + ANSWER % task.answer for intro in intros]
        replies = self.write(self._questions(texts, images, task.max_tokens))
        self.words[part] = [reply.text for reply in replies]
        marks = {}
        for name in task.marks:
            marks[name] = [parse_score(reply.text, name) for reply in replies]
        return marks

    def _marks_by_yes(self, part, intros, images):
        """scoring="yes": the same, by one question per mark."""
        task = TASKS[part]
        questions = []
        for criterion in task.yes_or_no:
            texts = [intro + criterion + YES_OR_NO for intro in intros]
            questions += self._questions(texts, images, max_tokens=1)
        probabilities = self.probabilities(questions, [*YES, *NO])
        words = [[] for _ in intros]
        marks = {}
        for k, name in enumerate(task.marks):
            marks[name] = []
            for i in range(len(intros)):
                of_words = probabilities[k * len(intros) + i]
                yes = sum(of_words[: len(YES)])
                yes_or_no = sum(of_words)
                mark = yes / yes_or_no if yes_or_no >= LEAST_YES_OR_NO else None
                marks[name].append(mark)
                words[i].append(f"{name}: yes {yes:.3f}, no {yes_or_no - yes:.3f}")
        self.words[part] = [", ".join(of_sample) for of_sample in words]
        return marks


# -------------------------------------------------------------------------------------------------
# Flags, and the command line


@dataclass
class JudgeConfig:
    """The flags of judge and rewards, which other configurations inherit."""

    judge: str = "toy"  # `toy`, toy:0.2 (errs), http://…, folder or hub id of a Qwen2.5-VL or 3-VL
    judge_model: str = ""  # its name on the server of http://…/v1; default: the only one there
    judge_device: str = ""  # where judge and HPS are; default: on the GPU of each rank
    scoring: Literal["reply", "yes"] = "reply"  # the judge writes marks; or P(Yes) is the mark
    spatial_as: Literal["boxes", "text"] = "boxes"  # R_spa: boxes are drawn; or given as numbers
    judge_batch: int = 0  # queries that the judge takes at a time; 0: 16, or 64 on a server
    hps: str = "toy"  # `toy` (stand-in), or file or hub id of HPS v2.1
    rewards: tuple[str, ...] = PARTS  # the parts of the total reward
    combine: Literal["product", "sum"] = "product"  # how the total comes from them (paper: product)


LAZY = {"QwenJudge": "judges.qwen", "ServedJudge": "judges.served", "HPS": "judges.hps"}


def __getattr__(name: str):
    """Loads QwenJudge, ServedJudge or HPS when it is first used: their packages are large."""
    if name not in LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(LAZY[name]), name)


def load_judge(config: JudgeConfig, device):
    """(judge, hps) that the flags name. hps is loaded for evaluations even when --rewards lacks it;
    None with an empty --hps, or where the toy's stand-in would be of no use.

    Raises OSError or ValueError when there is no such judge, or it does not work."""
    device = config.judge_device or device
    is_toy = config.judge.split(":")[0] == "toy"  # also toy:0.2, which errs
    if is_toy:
        from toy.world import ToyJudge

        judge = ToyJudge.from_flag(config.judge)
    elif config.judge.startswith(("http://", "https://")):
        from judges.served import ServedJudge

        judge = ServedJudge(
            config.judge,
            model=config.judge_model,
            in_flight=config.judge_batch or 64,
            scoring=config.scoring,
            spatial_as=config.spatial_as,
        )
    else:
        from judges.qwen import QwenJudge

        judge = QwenJudge(
            config.judge,
            device=device,
            batch_size=config.judge_batch or 16,
            scoring=config.scoring,
            spatial_as=config.spatial_as,
        )
    if isinstance(judge, VlmJudge):
        judge.try_out()
    hps = None
    if config.hps and config.hps != "toy":
        from judges.hps import HPS

        hps = HPS(config.hps, device=device)
    elif config.hps and (is_toy or "hps" in config.rewards):
        from toy.world import crispness

        hps = crispness
    return judge, hps


@dataclass
class Config(JudgeConfig):
    judge_device: str = "cpu"  # where judge and HPS are: cpu or cuda
    hps: str = ""  # file or hub id of HPS v2.1, or `toy` (stand-in); empty: no R_HPS
    prompt: str = ""  # what the picture should show
    chain: Path = Path("chain.txt")  # text file with the plan
    image: Path = Path("picture.png")  # the picture that was drawn from it
    out: Path = Path("rewards.png")  # planned and found boxes over the picture


def draw_matches(
    plan: list[Box], found: dict[str, list[Box] | None], image: Image.Image
) -> Image.Image:
    """The picture with planned boxes, each with its IoU, and the found boxes that match them."""
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
        scores, found = score_with_boxes(
            judge,
            hps,
            prompts=[config.prompt],
            chains=[chain],
            images=[image],
            parts=config.rewards,
            combine=config.combine,
        )
        plan = parse_chain(chain)
        if not found:  # --rewards without ri
            found, _ = ground_plans(judge, [plan], [image])
        draw_matches(plan, found[0], image).save(config.out)
    except (OSError, ValueError, RuntimeError) as error:
        run.fail(" ".join(str(error).split()))  # in one line
    words = getattr(judge, "words", {})
    width = max(10, *map(len, scores[0]))
    for part, value in scores[0].items():
        replies = " ".join(words.get(part, [])).split()
        print(f"{part:{width}} {value:6.3f}", *replies)
    print(f"wrote {config.out}: planned and found boxes over the picture")


if __name__ == "__main__":
    main()
