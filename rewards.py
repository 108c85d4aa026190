"""The rewards of GoT-R1 (paper, section 3.3): four answers of a vision-language judge, one preference score, a product.

    R_total = R_PI * (R_sem + R_spa) / 2 * R_RI * R_HPS
    R_sem   prompt -> chain    does the plan, without its boxes, say what the prompt asks for?        judge's mark / 10
    R_spa   prompt -> layout   are the objects in the right places? It sees the boxes drawn           judge's mark / 10
    R_RI    chain -> picture   IoU of each planned box with the one the judge finds for its name      mean IoU
    R_PI    prompt -> picture  does the picture show what was asked for, in the right places?         judge's mark / 10
    R_HPS   prompt -> picture  would people like it? (HPS v2.1)                                       cosine, near 0.3

Not stated in the paper, decided here: without a valid box R_spa = R_RI = 0; an object that is not found has IoU 0; a
reply that cannot be read is worth 0 and counted, and when most of a batch cannot be read the run stops: silent zeros
look like a healthy run. The judge's instructions are our wording of the paper's (appendix, figures 8 to 11).

    python rewards.py --prompt "a red ball above a blue cube" --chain chain.txt --image picture.png --judge toy
    python rewards.py … --judge Qwen/Qwen2.5-VL-7B-Instruct --hps HPS_v2.1_compressed.pt
    python rewards.py --bench --judge FOLDER    # rows a second of each call
"""

import math
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from render_boxes import Box, draw_boxes, iou, parse_chain, strip_boxes

PARTS = ("sem", "spa", "ri", "pi", "hps")
# A judge is any object with these four calls. Each takes lists, one entry a row, and answers with a list as long.
#   semantic(prompts, chains)    -> scores        the chain with its boxes removed, against the prompt
#   spatial(prompts, layouts)    -> scores        a list of Box, never empty, against the prompt
#   alignment(prompts, images)   -> scores        a PIL picture against the prompt
#   ground(images, names)        -> lists of Box  where that name is in that picture; [] when it is not there
# Scores are in [0, 1], boxes on the 0..1000 grid, and None stands for a reply that nobody can read.
# Optional: `words`, a dict of part to what the judge literally answered in its last call, row by row.


def total_reward(parts: dict[str, float], combine: str = "product") -> float:
    """The total of those of PARTS that are in the dict, by product or sum; `sem` and `spa` are one factor, their mean.

    >>> parts = {"sem": 0.9, "spa": 0.7, "ri": 0.5, "pi": 0.8, "hps": 0.25}
    >>> round(total_reward(parts), 6)                   # 0.8 * (0.9 + 0.7) / 2 * 0.5 * 0.25
    0.08
    >>> round(total_reward(parts, combine="sum"), 6)    # 0.8 + (0.9 + 0.7) / 2 + 0.5 + 0.25
    2.35
    """
    plan = [parts[part] for part in ("sem", "spa") if part in parts]
    factors = [parts[part] for part in ("pi", "ri", "hps") if part in parts]
    factors += [sum(plan) / len(plan)] if plan else []
    if not factors or combine not in ("product", "sum"):
        raise ValueError(
            f"expected some of {', '.join(PARTS)}, by product or sum: got {list(parts)} by {combine}"
        )
    return sum(factors) if combine == "sum" else math.prod(factors)


def match_boxes(
    planned: list[Box], found: dict[str, list[Box] | None]
) -> list[tuple[float, Box | None]]:
    """(IoU, box) for each planned box; `found` holds what was grounded under each name. R_RI is the mean of the IoUs.
    Boxes of one name are matched one to one, so that one dog in the picture cannot stand for three in the plan. Best
    pair first: needs no solver; exact unless a name repeats, and then it can only miss the best sum, not exceed it.
    """
    pairs = [
        (iou(box, other), i, j)
        for i, box in enumerate(planned)
        for j, other in enumerate(found[box.name] or [])
    ]
    matched, taken = {}, set()
    for overlap, i, j in sorted(pairs, key=lambda pair: -pair[0]):
        if overlap > 0 and i not in matched and (planned[i].name, j) not in taken:
            matched[i] = (overlap, found[planned[i].name][j])
            taken.add((planned[i].name, j))
    return [matched.get(i, (0.0, None)) for i in range(len(planned))]


def ground_plans(judge, plans: list[list[Box]], images: list) -> tuple[list[dict], list]:
    """Where each planned object is, per sample a dict of name to boxes; and the judge's answers, row by row. All rows,
    one a (picture, name), go to it in one call; equal rows are asked once."""
    pixels = [(image.mode, image.size, image.tobytes()) for image in images]
    asked = {
        (key, box.name): image
        for key, image, plan in zip(pixels, images, plans, strict=True)
        for box in plan
    }
    answers = judge.ground(list(asked.values()), [name for _, name in asked]) if asked else []
    found = dict(zip(asked, answers, strict=True))
    return [
        {box.name: found[key, box.name] for box in plan}
        for key, plan in zip(pixels, plans, strict=True)
    ], answers


def score(
    judge, hps, prompts, chains, images, parts=PARTS, combine="product"
) -> list[dict[str, float]]:
    """All rewards of a batch: per sample the parts, their `total`, and `judge_fail`, how many replies were unreadable.
    `hps` is a callable (prompts, images) -> floats, or None. A part that is left out is not asked, not in the dict and
    not in the total. Raises RuntimeError, quoting three, when more than half of the replies cannot be read: of all, or
    of 8 and more to one part (one broken part is enough to make every product 0).
    """
    if not set(parts) <= set(PARTS):
        raise ValueError(
            f"unknown rewards in {' '.join(parts)}: expected some of {' '.join(PARTS)}"
        )
    parts = [part for part in PARTS if part in parts and (part != "hps" or hps)]
    plans = [parse_chain(chain) for chain in chains]
    drawn = [
        i for i, plan in enumerate(plans) if plan
    ]  # samples with a layout; the others keep spa = ri = 0
    rows = [dict.fromkeys(parts, 0.0) | {"judge_fail": 0} for _ in prompts]
    answers = {}
    if "sem" in parts:
        answers["sem"] = judge.semantic(prompts, [strip_boxes(chain) for chain in chains])
    if "spa" in parts and drawn:
        answers["spa"] = judge.spatial([prompts[i] for i in drawn], [plans[i] for i in drawn])
    if "pi" in parts:
        answers["pi"] = judge.alignment(prompts, images)
    for part, values in answers.items():
        for i, value in zip(drawn if part == "spa" else range(len(rows)), values, strict=True):
            if value is not None and not 0 <= value <= 1:
                raise ValueError(
                    f"the judge gave sample {i} {value} for {part}: scores are in [0, 1], or None"
                )
            rows[i][part] = float(value or 0)
            rows[i]["judge_fail"] += value is None
    if "ri" in parts:
        found, answers["ri"] = ground_plans(judge, plans, images)
        for i in drawn:
            rows[i]["ri"] = sum(overlap for overlap, _ in match_boxes(plans[i], found[i])) / len(
                plans[i]
            )
            rows[i]["judge_fail"] += sum(boxes is None for boxes in found[i].values())
    _stop_if_unreadable(answers, getattr(judge, "words", {}))
    if "hps" in parts:
        for row, value in zip(rows, hps(prompts, images), strict=True):
            row["hps"] = float(value)
    return [row | {"total": total_reward(row, combine)} for row in rows]


def _stop_if_unreadable(answers, words):
    failed = {
        part: [k for k, value in enumerate(values) if value is None]
        for part, values in answers.items()
    }
    too_many = 2 * sum(map(len, failed.values())) > sum(map(len, answers.values()))
    if too_many or any(
        2 * len(failed[part]) > len(values) >= 8 for part, values in answers.items()
    ):
        quotes = [
            f"\n  {part}: {words[part][k][:300]!r}"
            for part in failed
            if part in words
            for k in failed[part]
        ]
        tally = ", ".join(f"{part} {len(failed[part])} of {len(answers[part])}" for part in answers)
        raise RuntimeError(
            f"most of the judge's replies cannot be read: {tally}{''.join(quotes[:3])}"
        )


# Reading what a judge wrote: any text goes in; None comes out unless it holds one clear answer. Never a guess, never an
# exception. Every repetition is bounded: linear time on any input.
SCORE = re.compile(
    r"""score["'*\\]{0,3}\s{0,9}[:=][\s"'*\\]{0,9}((?:[^,}\]\n"'*\\]|,(?=[0-9])){0,40})""", re.I
)
MARK = re.compile(r"([0-9]{1,2}(?:\.[0-9]{1,2})?)(?: ?(?:/|out of) ?10)?(?:\.(?: [^0-9].*)?)?")


def parse_score(reply: str) -> float | None:
    """A mark out of ten as mark / 10; None unless the reply holds exactly one.
    Reads plain and fenced JSON, single quotes, trailing commas, prose around it, "8/10", 8.5, Score: 8. Not readable:
    marks that differ, 7-8, 80/100, 11, -3, 0.8 (of ten, or of one?), and a number where JSON was cut off (1, or 10?).
    >>> parse_score('```json {"reasoning": "both are there", "score": "8/10",} ```'), parse_score('{"score": 1')
    (0.8, None)
    """
    reply, marks = reply.strip(), set()
    is_cut = reply.count("{") > reply.count("}")
    for said in SCORE.finditer(reply):
        mark = MARK.fullmatch(said[1].strip())
        marks.add(
            float(mark[1]) if mark and not (is_cut and said.end() == len(reply)) else math.nan
        )
    mark = marks.pop() if len(marks) == 1 else math.nan
    return mark / 10 if mark == 0 or 1 <= mark <= 10 else None


_N, _COMMA = r"""["']?(-?[0-9]{1,5}(?:\.[0-9]{1,6})?)["']?\s{0,9}""", r",\s{0,9}"
BBOX = re.compile(rf"\[\s{{0,9}}{_COMMA.join([_N] * 4)}(?:{_COMMA})?\]")  # [x1, y1, x2, y2]
BBOX_BEGINS = re.compile(r"""[\[(]\s{0,9}["']?-?[0-9]""")
NO_BBOX = re.compile(
    r"(?<!\w)\[\s{0,9}\](?!\w)|\b(null|none|there (is|are) no|not (visible|found|there))\b", re.I
)


def parse_bboxes(reply: str, width: float, height: float) -> list[Box] | None:
    """The boxes of a grounding reply on the 0..1000 grid, named ""; [] when it says there is none; None: unreadable.
    `width` and `height` are the frame it answers in. Qwen2.5-VL: pixels of the picture as its processor *resized* it,
    384 to 392 (QwenLM/Qwen3-VL issues 676, 866); Qwen3-VL: 1000 both. Reads what parse_score reads, one or a list; of a
    reply that was cut off, the boxes that are complete. Labels are not compared: one name was asked for. Not readable:
    corners in the wrong order, boxes more than 5 % outside the frame (so not meant in it; less is clipped).
    >>> parse_bboxes('[{"bbox_2d": [98, 49, 196, 98], "label": "ball"}, {"bbox_2d": [0, 0, 39', width=392, height=392)
    [Box(name='', x1=250.0, y1=125.0, x2=500.0, y2=250.0)]
    """
    boxes = []
    for corners in BBOX.findall(reply):
        box = [
            1000 * float(edge) / side
            for edge, side in zip(corners, (width, height, width, height), strict=True)
        ]
        x1, y1, x2, y2 = (min(max(edge, 0.0), 1000.0) for edge in box)
        if min(box) < -50 or max(box) > 1050 or x1 >= x2 or y1 >= y2:
            return None
        boxes.append(Box("", x1, y1, x2, y2))
    says_none = NO_BBOX.search(reply) and not BBOX_BEGINS.search(reply)
    return boxes if boxes or says_none else None


# What the judge is asked, in our words; the JSON to answer with, its reasons before its mark; the tokens this may take.
TASKS = {
    "sem": (
        """You check the plan for a picture against the request. The plan is text; nothing is drawn yet.
Request: {prompt}
Plan: {chain}
Is everything requested in the plan, each thing with its own colour, number and other properties? Does anything in it
contradict the request, or the rest of the plan? Is it one clear scene? Give a mark from 0 to 10. 9-10: complete, no
contradiction, what it adds suits the request. 7-8: good, a slip in a detail. 5-6: the main idea, with clear gaps. 3-4:
much is missing or contradicted. 1-2: hardly about the request. 0: no meaningful text.""",
        '"score": mark',
        32,
    ),
    "spa": (
        """You check the layout of a picture against the request: a rectangle for each object, {layout}
Request: {prompt}
Does each requested object have its own rectangle? Do the rectangles agree, in place and size, with the relations that
the request states or implies? Give a mark from 1 to 10. 8-10: all objects, and their places agree. 5-7: partly, or it
can be read either way (5: on the edge). 4: one object is missing. 3: a relation is plainly contradicted. 2: several
objects or relations are wrong. 1: nothing agrees.""",
        '"reasoning": "two sentences", "score": mark',
        200,
    ),
    "pi": (
        """You check a picture against the request that it was made for: only its composition, not its beauty.
Request: {prompt}
Is each requested object there, with its own properties? Does each spatial relation hold, taken strictly? (Left of:
further left, side by side. On top of: right above and touching.) Give a mark from 0 to 10. 8-10: all objects, all
relations. 5-7: all objects, a relation is slightly off. 0-4: a relation is wrong or an important object is missing.""",
        '"description": "what is seen, one sentence", "reasoning": "one sentence", "score": mark',
        200,
    ),
    "ri": (
        """Find each "{name}" in the picture. The answer is a list of them, [] if there is none.""",
        '"bbox_2d": [x1, y1, x2, y2], "label": "name"',
        200,
    ),
}
ANSWER = "\nAnswer with JSON like this and nothing else: {%s}"
PREFIX = '{"score": '  # scoring="expected" puts these words into the judge's mouth and looks at the digit to come
DIGIT_MASS = 0.5  # with less than this on the ten digits, something else was to come: unreadable
FRAMES = {
    "qwen2_5_vl": "pixels",
    "qwen3_vl": "grid",
    "qwen3_vl_moe": "grid",
}  # what the boxes of a judge count in


class QwenJudge:
    """The judge's contract, met by Qwen2.5-VL (the paper's: 7B) or Qwen3-VL, decoding greedily.
    scoring="reply"     (the paper's) It gives its reasons, then a mark: up to 200 decoded tokens a call.
    scoring="expected"  One forward pass, nothing decoded: its reply is begun for it, {"score": , and the reward is the
                        mean of the marks 0 to 10 under its probabilities of what comes next. It marks without having
                        reasoned; in return rewards are smooth, so fewer groups are all equal (those teach nothing).
    spatial_as="boxes"  (the paper's) R_spa sees the boxes drawn; "text": it is told the coordinates (table 6).
    batch_size          halved, with a message, when memory runs out. Replies do not depend on it, but for near ties in
                        bfloat16. `name_or_path` may also be a loaded (model, tokenizer, image processor).
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
        from transformers import (
            AutoModelForImageTextToText,
            AutoTokenizer,
            GenerationConfig,
            Qwen2VLImageProcessorPil,
        )

        if scoring not in ("reply", "expected") or spatial_as not in ("boxes", "text"):
            raise ValueError(
                f"scoring is reply or expected, spatial_as boxes or text: got {scoring} and {spatial_as}"
            )
        if isinstance(name_or_path, str | Path):
            model = AutoModelForImageTextToText.from_pretrained(name_or_path, dtype=dtype)
            # not AutoProcessor: it wants torchvision. The two halves we need, the same for Qwen2.5-VL and Qwen3-VL:
            name_or_path = (
                model,
                *(
                    c.from_pretrained(name_or_path)
                    for c in (AutoTokenizer, Qwen2VLImageProcessorPil)
                ),
            )
        self.model, self.tokenizer, self.image_processor = name_or_path
        self.model.to(device).eval().requires_grad_(False)
        if (kind := self.model.config.model_type) not in FRAMES:
            raise ValueError(f"no judge of type {kind}: expected one of {', '.join(FRAMES)}")
        self.batch_size, self.scoring, self.spatial_as, self.words = (
            batch_size,
            scoring,
            spatial_as,
            {},
        )
        self.tokenizer.padding_side = (
            "left"  # Qwen ships "right": it would go on after padding (transformers#36100)
        )
        self.markers = re.compile("|".join(map(re.escape, self.tokenizer.get_added_vocab())))
        self.image_marker = self.tokenizer.convert_ids_to_tokens(self.model.config.image_token_id)
        self.digits = self.tokenizer.convert_tokens_to_ids([*"0123456789"])
        if self.tokenizer(PREFIX + "1").input_ids != [
            *self.tokenizer(PREFIX).input_ids,
            self.digits[1],
        ]:
            raise ValueError("this judge's tokenizer does not write numbers digit by digit")
        self.ends, pad = self.model.generation_config.eos_token_id, self.tokenizer.pad_token_id
        # in place of what the checkpoint ships: Qwen's repetition penalty would bend the digits of boxes
        self.model.generation_config = GenerationConfig(
            do_sample=False, eos_token_id=self.ends, pad_token_id=pad
        )

    def semantic(self, prompts, chains):
        return self._ask("sem", None, prompt=prompts, chain=chains)

    def spatial(self, prompts, layouts):
        if self.spatial_as == "boxes":
            sketches, told = (
                [draw_boxes(boxes, size=448) for boxes in layouts],
                "drawn with its name at a corner.",
            )
            return self._ask("spa", sketches, prompt=prompts, layout=[told] * len(layouts))
        rows = [
            "".join(f"\n{name}: {a:.0f} {b:.0f} {c:.0f} {d:.0f}" for name, a, b, c, d in plan)
            for plan in layouts
        ]
        told = "given by its left, top, right and bottom edge, 0 to 1000, y downwards:"
        return self._ask("spa", None, prompt=prompts, layout=[told + row for row in rows])

    def alignment(self, prompts, images):
        return self._ask("pi", images, prompt=prompts)

    def ground(self, images, names):
        found = self._ask("ri", images, name=names)
        return [
            boxes and [box._replace(name=name) for box in boxes]
            for boxes, name in zip(found, names, strict=True)
        ]

    def _ask(self, part, images, **fields):
        """What the judge answers to each row, `batch_size` rows at a time; `words` keeps how it said it."""
        import torch

        run = self._expect if self.scoring == "expected" and part != "ri" else self._reply
        texts, rows = [], []
        for values in zip(*fields.values(), strict=True):
            # the policy wrote some of this: with chat markers of its own it could answer in the judge's name
            clean = {
                field: self.markers.sub(" ", text)
                for field, text in zip(fields, values, strict=True)
            }
            texts.append(TASKS[part][0].format(**clean))
        while len(rows) < len(texts):
            now = slice(len(rows), len(rows) + self.batch_size)
            try:
                rows += run(part, texts[now], images and images[now])
                continue
            except torch.OutOfMemoryError:
                if self.batch_size == 1:
                    raise
            self.batch_size //= (
                2  # after `except`, not in it: the error holds the tensors of the batch that failed
            )
            torch.cuda.empty_cache()
            print(
                f"judge: out of memory, going on with {self.batch_size} rows at a time",
                file=sys.stderr,
            )
        self.words[part] = [said for said, _ in rows]
        return [answer for _, answer in rows]

    def _inputs(self, texts, images, begun=""):
        """Left-padded model inputs of one batch; and per row the (width, height) that the judge's boxes count in."""
        content = [{"type": "image"}] if images else []
        chats = [
            [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]
            for text in texts
        ]
        chats = self.tokenizer.apply_chat_template(
            chats, tokenize=False, add_generation_prompt=True
        )
        inputs, frames = {}, [(1000, 1000)] * len(texts)
        if images:
            inputs = self.image_processor(
                [image.convert("RGB") for image in images], return_tensors="pt"
            ).data
            grid = inputs["image_grid_thw"].tolist()  # a row: 1, height, width, counted in patches
            merged, patch = self.image_processor.merge_size**2, self.image_processor.patch_size
            if FRAMES[self.model.config.model_type] == "pixels":
                frames = [(w * patch, h * patch) for _, h, w in grid]
            for i, (_, h, w) in enumerate(grid):  # one marker for each image token
                chats[i] = chats[i].replace(
                    self.image_marker, self.image_marker * (h * w // merged)
                )
        inputs |= self.tokenizer(
            [chat + begun for chat in chats], padding=True, return_tensors="pt"
        )
        inputs["mm_token_type_ids"] = (
            inputs["input_ids"] == self.model.config.image_token_id
        ).int()
        return {name: tensor.to(self.model.device) for name, tensor in inputs.items()}, frames

    def _reply(self, part, texts, images):
        """[(reply, score or boxes)]; cut at the limit it gets a "…", or half a number would be read as a number."""
        import torch

        _, answer, limit = TASKS[part]
        inputs, frames = self._inputs([text + ANSWER % answer for text in texts], images)
        with torch.inference_mode():
            ids = self.model.generate(**inputs, max_new_tokens=limit)[
                :, inputs["input_ids"].shape[1] :
            ]  # (rows, new)
        ended = torch.isin(ids, torch.tensor(self.ends, device=ids.device)).any(dim=1).tolist()
        replies = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        replies = [reply + "…" * (not end) for reply, end in zip(replies, ended, strict=True)]
        reads = [
            parse_score(r) if part != "ri" else parse_bboxes(r, *f)
            for r, f in zip(replies, frames, strict=True)
        ]
        return list(zip(replies, reads, strict=True))

    def _expect(self, part, texts, images):
        """[(words, expected mark / 10)]. "10" is two tokens: rows are fed with a 1 already written, so that one pass
        gives both the first digit's probabilities and that of a 0 after the 1."""
        import torch

        inputs, _ = self._inputs(
            [text + ANSWER % '"score": mark' for text in texts], images, PREFIX + "1"
        )
        with torch.inference_mode():
            logits = self.model(
                **inputs, logits_to_keep=2, use_cache=False
            ).logits.float()  # (rows, 2, vocabulary)
        first, second = logits.softmax(dim=-1)[..., self.digits].unbind(dim=1)  # (rows, 10) each
        mass, ten = (
            first.sum(dim=1),
            first[:, 1] * second[:, 0],
        )  # `ten` is in the sum below as a 1: 9 more
        mean = (first @ torch.arange(10.0, device=first.device) + 9 * ten) / mass / 10
        return [
            (f"{10 * m:.2f} on average ({p:.0%} on digits)", m if p >= DIGIT_MASS else None)
            for m, p in zip(mean.tolist(), mass.tolist(), strict=True)
        ]


CLIP_NAMES = {  # open_clip's names to those of transformers' CLIPModel: regular expressions, replaced in this order
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


class HPS:
    """HPS v2.1: hps(prompts, images) -> the cosine of each picture with its prompt, not times 100.
    `path_or_id`: the published file, or the Hub id that has it (xswu/HPSv2); `base`: the CLIP it was trained from, of
    which only the sizes and the tokenizer are taken. Preprocessing is the original's: longest side to 224, bicubic, on
    the float tensor, zero-padded. With and without `antialias` are two different measures: today's hpsv2 has it,
    published tables seem to be without (HPSv2 issue 43).
    """

    FILE, BASE = "HPS_v2.1_compressed.pt", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

    def __init__(self, path_or_id, device="cpu", dtype=None, antialias=True, base=BASE):
        import torch
        from huggingface_hub import hf_hub_download
        from transformers import AutoTokenizer, CLIPConfig, CLIPModel

        try:
            path = (
                path_or_id
                if Path(path_or_id).is_file()
                else hf_hub_download(str(path_or_id), self.FILE)
            )
        except (OSError, ValueError) as error:
            where = (
                f"fetch {self.FILE} from huggingface.co/xswu/HPSv2, or leave hps out of --rewards"
            )
            raise FileNotFoundError(f"no HPS v2.1 checkpoint at {path_or_id}: {where}") from error
        state = {}
        for name, tensor in torch.load(path, map_location="cpu", weights_only=True, mmap=True)[
            "state_dict"
        ].items():
            for old, new in CLIP_NAMES.items():
                name = re.sub(old, new, name)
            if "in_proj_" in name:
                for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                    state[name.replace("in_proj_", f"{letter}_proj.")] = third
            else:
                state[name] = tensor.T if "_projection" in name else tensor
        with torch.device(device):
            self.model = (
                CLIPModel(CLIPConfig.from_pretrained(base)).to(dtype).eval().requires_grad_(False)
            )
        self.model.load_state_dict(state)  # strict: every weight is there, and no other
        self.tokenizer, self.antialias = AutoTokenizer.from_pretrained(base), antialias

    def __call__(self, prompts, images):
        import torch

        place = {
            prompt: k for k, prompt in enumerate(dict.fromkeys(prompts))
        }  # a group's prompt is read once
        tokens = self.tokenizer(
            [*place], padding=True, truncation=True, max_length=77, return_tensors="pt"
        )
        with torch.inference_mode():
            text = self.model.get_text_features(
                **tokens.to(self.model.device)
            ).pooler_output  # (unique prompts, D)
            image = self.model.get_image_features(
                torch.stack([*map(self.pixels, images)])
            ).pooler_output  # (rows, D)
        return torch.cosine_similarity(
            image.float(), text[[place[prompt] for prompt in prompts]].float()
        ).tolist()

    def pixels(self, image):
        """(3, 224, 224) network input of one picture."""
        import numpy as np
        import torch

        x = (
            torch.from_numpy(np.array(image.convert("RGB"))).to(self.model.device).permute(2, 0, 1)
            / 255
        )
        high, wide = (round(side * 224 / max(image.size)) for side in x.shape[1:])
        x = torch.nn.functional.interpolate(
            x[None], (high, wide), mode="bicubic", antialias=self.antialias
        )[0]
        left, top = (224 - wide) // 2, (224 - high) // 2
        x = torch.nn.functional.pad(x, (left, 224 - wide - left, top, 224 - high - top))
        mean, std = x.new_tensor(
            [[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]]
        )
        return ((x - mean[:, None, None]) / std[:, None, None]).to(self.model.dtype)


@dataclass
class Settings:
    prompt: str = ""  # what the picture should show
    chain: Path = Path("chain.txt")  # text file with the plan
    image: Path = Path("picture.png")  # the picture that was drawn from it
    judge: str = "toy"  # folder or Hub id of a Qwen-VL; toy: exact, for the pictures of toy.py
    hps: str = ""  # file or Hub id of HPS v2.1; without one, it is left out
    rewards: tuple[str, ...] = PARTS  # the parts that count
    scoring: str = "reply"  # the judge writes its mark; expected: it is read off its probabilities
    spatial_as: str = "boxes"  # the judge sees the boxes; text: it is told where they are
    batch_size: int = 16  # rows that the judge takes at a time
    device: str = "cpu"  # or cuda
    out: Path = Path("rewards.png")  # planned and found boxes over the picture
    bench: bool = False  # only measure: rows a second of each call


def main():
    import tyro

    args = tyro.cli(Settings, description=__doc__)
    try:
        from toy.world import ToyJudge

        judge = (
            ToyJudge()
            if args.judge == "toy"
            else QwenJudge(
                args.judge, args.device, "auto", args.batch_size, args.scoring, args.spatial_as
            )
        )
        if args.bench:
            return bench(judge)
        if not args.prompt.strip():
            raise ValueError("--prompt is empty: say what the picture should show")
        hps = HPS(args.hps, args.device) if args.hps else None
        chain, image = args.chain.read_text("utf-8"), Image.open(args.image).convert("RGB")
        row = score(judge, hps, [args.prompt], [chain], [image], args.rewards)[0]
        planned = parse_chain(chain)
        matched = match_boxes(planned, ground_plans(judge, [planned], [image])[0][0])
        boxes = [
            a._replace(name=f"{a.name}: IoU {value:.2f}")
            for a, (value, _) in zip(planned, matched, strict=True)
        ]
        boxes += [box._replace(name=f"found {box.name}") for _, box in matched if box]
        draw_boxes(boxes, image=image.resize((768, 768 * image.height // image.width))).save(
            args.out
        )
    except (OSError, ValueError, RuntimeError) as error:
        print("rewards.py:", *str(error).split(), file=sys.stderr)
        sys.exit(2)
    for part, value in row.items():
        print(
            f"{part:10} {value:6.3f}", *" ".join(getattr(judge, "words", {}).get(part, [])).split()
        )
    print(f"wrote {args.out}: planned and found boxes over the picture")


def bench(judge):
    """Rows a second of each call, one row at a time and 16, with the reply written and with the mark expected."""
    boxes = [Box("red ball", 100, 100, 500, 500), Box("blue cube", 500, 500, 900, 900)]
    prompts, layouts, images = (
        ["a red ball above a blue cube"] * 16,
        [boxes] * 16,
        [draw_boxes(boxes, 384)] * 16,
    )
    calls = {
        judge.semantic: (prompts, prompts),
        judge.spatial: (prompts, layouts),
        judge.alignment: (prompts, images),
        judge.ground: (images, prompts),
    }
    print(
        "rows/s      reply: 1     16   ratio   expected: 1     16   ratio   expected / reply at 16"
    )
    for call, (first, second) in calls.items():
        rates = []
        for judge.scoring, judge.batch_size in (
            ("reply", 1),
            ("reply", 16),
            ("expected", 1),
            ("expected", 16),
        ):
            call(
                first[:1], second[:1]
            )  # the first call of a kind pays for things that the others do not
            rows, start = min(16, 4 * judge.batch_size), time.perf_counter()
            call(first[:rows], second[:rows])
            rates.append(rows / (time.perf_counter() - start))
        a, b, c, d = rates
        print(
            f"{call.__name__:10} {a:9.2f} {b:6.2f} {b / a:7.1f} {c:13.2f} {d:6.2f} {d / c:7.1f} {d / b:16.1f}"
        )


if __name__ == "__main__":
    main()
