"""The rewards of GoT-R1 (paper, section 3.3): a judge's marks, a preference score, their product.

    R_total = R_PI * (R_sem + R_spa) / 2 * R_RI * R_HPS

    R_sem   prompt -> chain     does the plan, without its boxes, say what the prompt asks for?
    R_spa   prompt -> layout    are the objects in the right places? the judge sees the boxes drawn
    R_PI    prompt -> picture   does the picture show what was asked for, in the right places?
    R_RI    chain -> picture    is each planned object where the plan has it?
    R_HPS   prompt -> picture   would people like it? (HPS v2.1)

The judge is a vision-language model. R_sem, R_spa and R_PI are its marks out of ten, divided by 10.
For R_RI it looks for each planned name in the picture; the reward is the mean IoU of planned and
found boxes. R_HPS is a cosine, near 0.3.

Not stated in the paper, decided here:
- Without a valid box in the chain R_spa = R_RI = 0. An object that is not found has IoU 0.
- A reply that cannot be read is worth 0 and is counted. When most replies of a batch cannot be
  read, the run stops: a judge that fails silently looks like a policy that learns nothing.
- The judge's instructions are our wording of the paper's (appendix, figures 8 to 11).

    python rewards.py --prompt "a red ball above a blue cube" --chain chain.txt --image picture.png
    python rewards.py … --judge Qwen/Qwen2.5-VL-7B-Instruct --hps HPS_v2.1_compressed.pt
"""

import functools
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

# A judge is any object with these four calls. Each takes two lists with one entry per row, and
# answers with a list of the same length.
#   semantic(prompts, chains)    -> scores        the chain without its boxes, against the prompt
#   spatial(prompts, layouts)    -> scores        a list of Box, never empty, against the prompt
#   alignment(prompts, images)   -> scores        a PIL picture against the prompt
#   ground(images, names)        -> lists of Box  where that name is in that picture; [] if nowhere
# Scores are in [0, 1], boxes on the 0..1000 grid. None stands for a reply that cannot be read.
# Optional: `words`, a dict: part -> the judge's literal replies to its last call, one per row.


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

    `judge_fail` counts the sample's replies that could not be read. `hps` is a callable
    (prompts, images) -> floats, or None. A part that is left out is not asked for, and is neither
    in the dict nor in the total.
    Raises ValueError for an unknown part and for a score outside [0, 1]; RuntimeError when most
    replies cannot be read (see stop_if_unreadable).
    """
    if not set(parts) <= set(PARTS):
        expected = f"expected some of {' '.join(PARTS)}"
        raise ValueError(f"unknown rewards in {' '.join(parts)}: {expected}")
    parts = [part for part in PARTS if part in parts and (part != "hps" or hps)]
    rows = []
    for _ in prompts:
        row = dict.fromkeys(parts, 0.0)
        row["judge_fail"] = 0
        rows.append(row)

    layouts = [parse_chain(chain) for chain in chains]
    all_samples = range(len(rows))
    planned = [i for i in all_samples if layouts[i]]  # the others keep spa = ri = 0
    answers = {}  # part -> the judge's answers, one per row that it was asked
    if "sem" in parts:
        answers["sem"] = judge.semantic(prompts, [strip_boxes(chain) for chain in chains])
        _enter_scores(rows, "sem", all_samples, answers["sem"])
    if "spa" in parts and planned:
        planned_prompts = [prompts[i] for i in planned]
        planned_layouts = [layouts[i] for i in planned]
        answers["spa"] = judge.spatial(planned_prompts, planned_layouts)
        _enter_scores(rows, "spa", planned, answers["spa"])
    if "pi" in parts:
        answers["pi"] = judge.alignment(prompts, images)
        _enter_scores(rows, "pi", all_samples, answers["pi"])
    if "ri" in parts:
        found, answers["ri"] = ground_plans(judge, layouts, images)
        for i in planned:
            overlaps = [overlap for overlap, _ in match_boxes(layouts[i], found[i])]
            rows[i]["ri"] = sum(overlaps) / len(overlaps)
            rows[i]["judge_fail"] += list(found[i].values()).count(None)
    stop_if_unreadable(answers, getattr(judge, "words", {}))

    if "hps" in parts:
        for row, cosine in zip(rows, hps(prompts, images), strict=True):
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

SCORE = re.compile(
    r"""score["'*\\]{0,3}\s{0,9}[:=][\s"'*\\]{0,9}"""  # "score": or **Score:** or score =
    r"""((?:[^,}\]\n"'*\\]|,(?=[0-9])){0,40})""",  # then all up to a comma, quote, star or bracket
    re.IGNORECASE,
)
# 8, 8.5, 8/10, 8 out of 10, with or without a sentence behind it
MARK = re.compile(r"([0-9]{1,2}(?:\.[0-9]{1,2})?)(?: ?(?:/|out of) ?10)?(?:\.(?: [^0-9].*)?)?")


def parse_score(reply: str) -> float | None:
    """A mark out of ten, as mark / 10; None unless the reply holds exactly one.

    Reads plain and fenced JSON, single quotes, trailing commas, prose around it, "8/10", 8.5,
    Score: 8. Not readable: marks that differ, 7-8, 80/100, 11, -3, 0.8 (of ten, or of one?), and a
    number where the JSON was cut off (1, or the beginning of 10?).

    >>> fenced = '```json {"reasoning": "both are there", "score": "8/10",} ```'
    >>> parse_score(fenced), parse_score('{"score": 1')
    (0.8, None)
    """
    reply = reply.strip()
    is_cut_off = reply.count("{") > reply.count("}")
    marks = set()
    for found in SCORE.finditer(reply):
        mark = MARK.fullmatch(found[1].strip())
        if not mark or (is_cut_off and found.end() == len(reply)):
            return None
        marks.add(float(mark[1]))
    if len(marks) != 1:
        return None
    mark = marks.pop()
    return mark / 10 if mark == 0 or 1 <= mark <= 10 else None


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


SEMANTIC = """\
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
    "sem": Task(SEMANTIC, answer='"score": mark', max_tokens=32),
    "spa": Task(SPATIAL, answer='"reasoning": "two sentences", "score": mark', max_tokens=200),
    "pi": Task(
        ALIGNMENT,
        answer='"description": "what is seen, one sentence", '
        '"reasoning": "one sentence", "score": mark',
        max_tokens=200,
    ),
    "ri": Task(GROUND, answer='"bbox_2d": [x1, y1, x2, y2], "label": "name"', max_tokens=200),
}
ANSWER = "\nAnswer with JSON like this and nothing else: {%s}"
LAYOUT_DRAWN = "drawn with its name at a corner."
LAYOUT_TOLD = "given by its left, top, right and bottom edge, 0 to 1000, y downwards:"


# -------------------------------------------------------------------------------------------------
# The judge of the paper

FRAMES = {  # what the boxes of a judge count in: pixels of the resized picture, or the 0..1000 grid
    "qwen2_5_vl": "pixels",
    "qwen3_vl": "grid",
    "qwen3_vl_moe": "grid",
}
# With scoring="expected" the judge's reply begins with PREFIX, and we look at the digit to come.
PREFIX = '{"score": '
DIGIT_MASS = (
    0.5  # least probability of a digit there; below it the judge was not about to give a mark
)


class QwenJudge:
    """The judge's contract, met by Qwen2.5-VL (the paper's: 7B) or Qwen3-VL, decoding greedily.

    name_or_path        folder or hub id; or a loaded (model, tokenizer, image processor)
    batch_size          rows at a time; halved, with a message, when memory runs out. Replies do not
                        depend on it, except for near ties in bfloat16.
    scoring="reply"     (the paper's) The judge writes its reasons, then a mark: up to 200 tokens.
    scoring="expected"  One forward pass, no decoding. The reply is begun for it, {"score": , and
                        the reward is the mean of the marks 0 to 10 under its probabilities of
                        what comes next. It marks without having reasoned. In return rewards are
                        smooth: fewer groups have equal rewards only, which teach nothing.
    spatial_as="boxes"  (the paper's) R_spa sees the boxes drawn.
    spatial_as="text"   It reads their coordinates (the paper's table 6).
    """

    def __init__(
        self,
        name_or_path,
        device="cpu",
        dtype="auto",
        batch_size=16,
        scoring="reply",
        spatial_as="boxes",
    ):
        from transformers import GenerationConfig

        if scoring not in ("reply", "expected") or spatial_as not in ("boxes", "text"):
            expected = "scoring is reply or expected, spatial_as boxes or text"
            raise ValueError(f"{expected}: got {scoring} and {spatial_as}")
        loaded = name_or_path
        if isinstance(name_or_path, str | Path):
            loaded = self._load(name_or_path, dtype)
        self.model, self.tokenizer, self.image_processor = loaded
        self.model.to(device).eval().requires_grad_(False)
        kind = self.model.config.model_type
        if kind not in FRAMES:
            raise ValueError(f"no judge of type {kind}: expected one of {', '.join(FRAMES)}")
        self.batch_size = batch_size
        self.scoring = scoring
        self.spatial_as = spatial_as
        self.words = {}  # part -> the replies of the last call

        # Qwen ships "right": generation would go on after the padding (transformers#36100)
        self.tokenizer.padding_side = "left"
        chat_markers = map(re.escape, self.tokenizer.get_added_vocab())
        self.markers = re.compile("|".join(chat_markers))
        self.image_marker = self.tokenizer.convert_ids_to_tokens(self.model.config.image_token_id)
        self.digits = self.tokenizer.convert_tokens_to_ids(list("0123456789"))
        prefix_ids = self.tokenizer(PREFIX).input_ids
        if self.tokenizer(PREFIX + "1").input_ids != [*prefix_ids, self.digits[1]]:
            raise ValueError("this judge's tokenizer does not write numbers digit by digit")
        self.ends = self.model.generation_config.eos_token_id
        # in place of what the checkpoint ships: its repetition penalty would bend digits of boxes
        self.model.generation_config = GenerationConfig(
            do_sample=False,
            eos_token_id=self.ends,
            pad_token_id=self.tokenizer.pad_token_id,
        )

    @staticmethod
    def _load(name_or_path, dtype):
        """(model, tokenizer, image processor) of a folder or hub id."""
        from transformers import (
            AutoModelForImageTextToText,
            AutoTokenizer,
            Qwen2VLImageProcessorPil,
        )

        # Not AutoProcessor, which wants torchvision. It would hold the same tokenizer and the same
        # image processor, for Qwen2.5-VL and for Qwen3-VL.
        model = AutoModelForImageTextToText.from_pretrained(name_or_path, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(name_or_path)
        return model, tokenizer, image_processor

    # The four calls of the contract

    def semantic(self, prompts, chains):
        texts = []
        for prompt, chain in zip(prompts, chains, strict=True):
            texts.append(self._question("sem", prompt=prompt, chain=chain))
        return self._ask("sem", texts)

    def spatial(self, prompts, layouts):
        texts = []
        for prompt, layout in zip(prompts, layouts, strict=True):
            told = LAYOUT_DRAWN
            if self.spatial_as == "text":
                told = LAYOUT_TOLD
                for name, x1, y1, x2, y2 in layout:
                    told += f"\n{name}: {x1:.0f} {y1:.0f} {x2:.0f} {y2:.0f}"
            texts.append(self._question("spa", prompt=prompt, layout=told))
        if self.spatial_as == "text":
            return self._ask("spa", texts)
        sketches = [draw_boxes(layout, size=448) for layout in layouts]
        return self._ask("spa", texts, sketches)

    def alignment(self, prompts, images):
        texts = [self._question("pi", prompt=prompt) for prompt in prompts]
        return self._ask("pi", texts, images)

    def ground(self, images, names):
        texts = [self._question("ri", name=name) for name in names]
        answers = []
        for boxes, name in zip(self._ask("ri", texts, images), names, strict=True):
            if boxes is not None:
                boxes = [box._replace(name=name) for box in boxes]
            answers.append(boxes)
        return answers

    # From questions to answers

    def _question(self, part, **fields):
        """The question of one row.

        The policy wrote some of the fields. With chat markers of its own it could end the question
        there and answer in the judge's name, so markers are taken out.
        """
        clean = {}
        for name, text in fields.items():
            clean[name] = self.markers.sub(" ", text)
        return TASKS[part].question.format(**clean)

    def _ask(self, part, texts, images=None):
        """The answers to the questions, `batch_size` at a time; `words` keeps what was said."""
        import torch

        answer_batch = self._reply
        if self.scoring == "expected" and part != "ri":
            answer_batch = self._expect
        rows = []  # (what the judge said, what was read in it)
        while len(rows) < len(texts):
            batch = slice(len(rows), len(rows) + self.batch_size)
            batch_images = images[batch] if images else None
            out_of_memory = False
            try:
                rows += answer_batch(part, texts[batch], batch_images)
            except torch.OutOfMemoryError:
                if self.batch_size == 1:
                    raise
                out_of_memory = True
            if out_of_memory:  # not inside `except`: there the error holds the tensors that failed
                self._halve_batch()
        self.words[part] = [said for said, _ in rows]
        return [answer for _, answer in rows]

    def _halve_batch(self):
        import torch

        self.batch_size //= 2
        torch.cuda.empty_cache()
        message = f"judge: out of memory, going on with {self.batch_size} rows at a time"
        print(message, file=sys.stderr)

    def _inputs(self, texts, images, begun=""):
        """Left-padded model inputs of one batch; and per row the frame that its boxes count in.

        A frame is (width, height). `begun` is how the judge's reply begins.
        """
        chats = []
        for text in texts:
            content = [{"type": "text", "text": text}]
            if images:
                content.insert(0, {"type": "image"})
            chats.append([{"role": "user", "content": content}])
        chats = self.tokenizer.apply_chat_template(
            chats, tokenize=False, add_generation_prompt=True
        )
        inputs = {}
        frames = [(1000, 1000)] * len(texts)
        if images:
            rgb = [image.convert("RGB") for image in images]
            inputs.update(self.image_processor(rgb, return_tensors="pt"))
            patch = self.image_processor.patch_size  # side of a patch in pixels
            patches_per_token = self.image_processor.merge_size**2
            for i, (_, high, wide) in enumerate(inputs["image_grid_thw"].tolist()):  # in patches
                if FRAMES[self.model.config.model_type] == "pixels":
                    frames[i] = (wide * patch, high * patch)
                # the template writes one marker per picture, the model wants one per image token
                markers = self.image_marker * (high * wide // patches_per_token)
                chats[i] = chats[i].replace(self.image_marker, markers)
        begun_chats = [chat + begun for chat in chats]
        inputs.update(self.tokenizer(begun_chats, padding=True, return_tensors="pt"))
        is_image = inputs["input_ids"] == self.model.config.image_token_id
        inputs["mm_token_type_ids"] = is_image.int()
        for name, tensor in inputs.items():
            inputs[name] = tensor.to(self.model.device)
        return inputs, frames

    def _reply(self, part, texts, images):
        """scoring="reply": per row (reply, score or boxes)."""
        import torch

        task = TASKS[part]
        whole_texts = [text + ANSWER % task.answer for text in texts]
        inputs, frames = self._inputs(whole_texts, images)
        given = inputs["input_ids"].shape[1]
        with torch.inference_mode():
            check = [functools.partial(check_finite, texts)]  # called with the logits of each step
            ids = self.model.generate(
                **inputs, max_new_tokens=task.max_tokens, logits_processor=check
            )
        ids = ids[:, given:]  # (rows, new tokens)
        ends = torch.tensor(self.ends, device=ids.device)
        has_ended = torch.isin(ids, ends).any(dim=1).tolist()
        replies = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        rows = []
        for reply, ended, (width, height) in zip(replies, has_ended, frames, strict=True):
            if not ended:
                reply += "…"  # cut at the limit: half a number must not pass for a number
            if part == "ri":
                rows.append((reply, parse_bboxes(reply, width, height)))
            else:
                rows.append((reply, parse_score(reply)))
        return rows

    def _expect(self, part, texts, images):
        """scoring="expected": per row (words for the log, expected mark / 10 or None).

        The mark 10 is two tokens, so rows are fed with a 1 already written. One pass then gives the
        probabilities of the first digit (position -2) and of a digit after a 1 (position -1).
        """
        import torch

        whole_texts = [text + ANSWER % '"score": mark' for text in texts]
        inputs, _ = self._inputs(whole_texts, images, begun=PREFIX + "1")
        with torch.inference_mode():
            logits = self.model(**inputs, logits_to_keep=2, use_cache=False).logits
            check_finite(texts, None, logits[:, -1])
            digits = logits.float().softmax(dim=-1)[..., self.digits]  # (rows, 2, 10)
            means, masses = expected_marks(first=digits[:, 0], after_one=digits[:, 1])
        rows = []
        for mean, mass in zip(means.tolist(), masses.tolist(), strict=True):
            said = f"{mean:.2f} on average ({mass:.0%} on digits)"
            rows.append((said, mean / 10 if mass >= DIGIT_MASS else None))
        return rows


def check_finite(questions, ids, logits, network="the judge"):
    """The logits (rows, V) as they are. Raises ValueError with the question whose row holds nan or
    inf: greedy decoding would make words of it. `ids` is what `generate` hands over besides."""
    import torch

    broken = (~torch.isfinite(logits)).any(dim=-1).nonzero().flatten().tolist()
    if broken:
        message = f"{network}'s answer about row {broken[0] + 1} of its batch is not finite"
        raise ValueError(f"{message} (nan or inf): {questions[broken[0]]!r}")
    return logits


def expected_marks(first, after_one):
    """The mean of the marks 0 to 10 (rows,), and the probability (rows,) that a mark comes at all.

    first      (rows, 10)  probability of each digit where the mark begins
    after_one  (rows, 10)  probability of each digit where a 1 has just been written
    """
    import torch

    zero_follows = after_one[:, 0]
    marks = first.new_zeros(len(first), 11)  # marks[:, n]: the probability of the mark n
    marks[:, :10] = first
    marks[:, 1] = first[:, 1] * (1 - zero_follows)
    marks[:, 10] = first[:, 1] * zero_follows
    mass = marks.sum(dim=1)
    mean = marks @ torch.arange(11.0, device=marks.device) / mass
    return mean, mass


# -------------------------------------------------------------------------------------------------
# The preference score

# open_clip's names of weights -> transformers': regular expressions, applied in this order
CLIP_NAMES = {
    "^(token_|positional_)": r"text_model.embeddings.\1",
    "positional_embedding": "position_embedding.weight",
    r"^visual\.transformer.resblocks": "vision_model.encoder.layers",
    r"^visual\.conv1": "visual.patch_embedding",
    r"^visual\.ln_pre": "vision_model.pre_layrnorm",
    r"^visual\.ln_post": "vision_model.post_layernorm",
    r"^visual\.proj": "visual_projection.weight",
    r"^visual\.": "vision_model.embeddings.",
    "attn": "self_attn",
    "^transformer.resblocks": "text_model.encoder.layers",
    "^ln_final": "text_model.final_layer_norm",
    "c_fc": "fc1",
    "^text_projection": "text_projection.weight",
    "ln_": "layer_norm",
    "c_proj": "fc2",
}
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def clip_from_open_clip(weights: dict) -> dict:
    """The weights of an open_clip checkpoint under the names of transformers' CLIPModel."""
    renamed = {}
    for name, tensor in weights.items():
        for old, new in CLIP_NAMES.items():
            name = re.sub(old, new, name)
        if "in_proj_" in name:  # query, key and value are one matrix in open_clip
            query, key, value = tensor.chunk(3)
            renamed[name.replace("in_proj_", "q_proj.")] = query
            renamed[name.replace("in_proj_", "k_proj.")] = key
            renamed[name.replace("in_proj_", "v_proj.")] = value
        elif "_projection" in name:  # open_clip multiplies from the other side
            renamed[name] = tensor.T
        else:
            renamed[name] = tensor
    return renamed


class HPS:
    """HPS v2.1: hps(prompts, images) -> the cosine of each picture with its prompt, not times 100.

    path_or_id  the published file, or the hub id that has it (xswu/HPSv2)
    antialias   of the resizing. With and without it are two different measures: today's hpsv2
                package has it, published tables seem to be without (HPSv2 issue 43).
    base        the CLIP that HPS was trained from; only its sizes and its tokenizer are taken

    Raises FileNotFoundError when there is no such checkpoint.
    """

    FILE = "HPS_v2.1_compressed.pt"
    BASE = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

    def __init__(self, path_or_id, device="cpu", dtype=None, antialias=True, base=BASE):
        import torch
        from transformers import AutoTokenizer, CLIPConfig, CLIPModel

        path = self._find(path_or_id)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        config = CLIPConfig.from_pretrained(base)
        with torch.device(device):
            self.model = CLIPModel(config).to(dtype).eval().requires_grad_(False)
        # strict: every weight is there, and no other
        self.model.load_state_dict(clip_from_open_clip(checkpoint["state_dict"]))
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.antialias = antialias

    def _find(self, path_or_id):
        from huggingface_hub import hf_hub_download

        try:
            if Path(path_or_id).is_file():
                return path_or_id
            return hf_hub_download(str(path_or_id), self.FILE)
        except (OSError, ValueError) as error:
            source = f"fetch {self.FILE} from huggingface.co/xswu/HPSv2"
            raise FileNotFoundError(
                f"no HPS v2.1 checkpoint at {path_or_id}: {source}, or leave hps out of --rewards"
            ) from error

    def __call__(self, prompts, images):
        import torch

        unique = list(dict.fromkeys(prompts))  # the samples of a group share their prompt
        tokens = self.tokenizer(
            unique, padding=True, truncation=True, max_length=77, return_tensors="pt"
        ).to(self.model.device)
        pixels = torch.stack([self.pixels(image) for image in images])
        with torch.inference_mode():
            text = self.model.get_text_features(**tokens).pooler_output  # (unique prompts, D)
            image = self.model.get_image_features(pixels).pooler_output  # (rows, D)
        text = text[[unique.index(prompt) for prompt in prompts]]  # (rows, D)
        cosines = torch.cosine_similarity(image.float(), text.float())
        check_finite(prompts, None, cosines[:, None], network="HPS")
        return cosines.tolist()

    def pixels(self, image):
        """(3, 224, 224) network input of one picture, prepared as HPS was trained.

        The longest side becomes 224, bicubic on the float tensor; zeros fill up the square.
        """
        import numpy as np
        import torch

        rgb = torch.from_numpy(np.array(image.convert("RGB"))).to(self.model.device)
        rgb = rgb.permute(2, 0, 1) / 255  # (3, height, width)
        high = round(image.height * 224 / max(image.size))
        wide = round(image.width * 224 / max(image.size))
        resized = torch.nn.functional.interpolate(
            rgb[None], (high, wide), mode="bicubic", antialias=self.antialias
        )[0]
        top = (224 - high) // 2
        left = (224 - wide) // 2
        margins = (left, 224 - wide - left, top, 224 - high - top)
        square = torch.nn.functional.pad(resized, margins)
        mean = square.new_tensor(CLIP_MEAN)[:, None, None]
        std = square.new_tensor(CLIP_STD)[:, None, None]
        return ((square - mean) / std).to(self.model.dtype)


# -------------------------------------------------------------------------------------------------
# Flags, and the command line


@dataclass
class JudgeFlags:
    """The flags of everything that asks for rewards: the configurations inherit them."""

    judge: str = "toy"  # `toy` (exact), or a folder or hub id of a Qwen2.5-VL or Qwen3-VL
    judge_device: str = ""  # where judge and HPS are; default: on the GPU of each rank
    scoring: Literal["reply", "expected"] = "reply"  # marks are written; or read off probabilities
    spatial_as: Literal["boxes", "text"] = "boxes"  # R_spa sees the boxes drawn; or reads numbers
    judge_batch: int = 16  # rows that the judge takes at a time; halved when memory runs out
    hps: str = "toy"  # `toy` (stand-in), or file or hub id of HPS v2.1
    rewards: tuple[str, ...] = PARTS  # the parts that take part
    combine: Literal["product", "sum"] = "product"  # how they become one number (paper: product)


def load_judge(flags: JudgeFlags, device):
    """(judge, hps) that the flags name; hps is None when it has no part in the reward."""
    where = flags.judge_device or device
    if flags.judge == "toy":
        from toy.world import ToyJudge

        judge = ToyJudge()
    else:
        judge = QwenJudge(
            flags.judge,
            device=where,
            batch_size=flags.judge_batch,
            scoring=flags.scoring,
            spatial_as=flags.spatial_as,
        )
    if not flags.hps or "hps" not in flags.rewards:
        hps = None
    elif flags.hps == "toy":
        from toy.world import crispness

        hps = crispness
    else:
        hps = HPS(flags.hps, device=where)
    return judge, hps


@dataclass
class Settings(JudgeFlags):
    judge_device: str = "cpu"  # where judge and HPS are: cpu or cuda
    hps: str = ""  # file or hub id of HPS v2.1, or `toy` (stand-in); without one, it is left out
    prompt: str = ""  # what the picture should show
    chain: Path = Path("chain.txt")  # text file with the plan
    image: Path = Path("picture.png")  # the picture that was drawn from it
    out: Path = Path("rewards.png")  # planned and found boxes over the picture


def draw_matches(judge, plan: list[Box], image: Image.Image) -> Image.Image:
    """The picture with the planned boxes, each with its IoU, and the boxes that the judge found."""
    found, _ = ground_plans(judge, [plan], [image])
    planned_boxes = []
    found_boxes = []
    for box, (overlap, partner) in zip(plan, match_boxes(plan, found[0]), strict=True):
        planned_boxes.append(box._replace(name=f"{box.name}: IoU {overlap:.2f}"))
        if partner:
            found_boxes.append(partner._replace(name=f"found {partner.name}"))
    large = image.resize((768, 768 * image.height // image.width))
    return draw_boxes(planned_boxes + found_boxes, image=large)


def main(argv: list[str] | None = None) -> None:
    from engine import run

    args = run.parse_args(Settings, __doc__, argv)
    run.check_ranges(args, at_least_one="judge_batch")
    if not args.prompt.strip():
        run.fail("--prompt is empty: say what the picture should show")
    try:
        judge, hps = load_judge(args, args.judge_device)
        chain = args.chain.read_text("utf-8")
        image = Image.open(args.image).convert("RGB")
        row = score(
            judge,
            hps,
            prompts=[args.prompt],
            chains=[chain],
            images=[image],
            parts=args.rewards,
            combine=args.combine,
        )[0]
        draw_matches(judge, parse_chain(chain), image).save(args.out)
    except (OSError, ValueError, RuntimeError) as error:
        run.fail(" ".join(str(error).split()))  # in one line
    words = getattr(judge, "words", {})
    for part, value in row.items():
        said = " ".join(words.get(part, [])).split()
        print(f"{part:10} {value:6.3f}", *said)
    print(f"wrote {args.out}: planned and found boxes over the picture")


if __name__ == "__main__":
    main()
