"""T2I-CompBench without UniDet: the official arithmetic by hand, BLIP-VQA and CLIP in transformers.

    color, shape, texture   BLIP-VQA asks for each noun phrase; the product of P(yes)
    non_spatial             cosine of picture and prompt, CLIP ViT-B/32
    spatial                 two boxes and a relation. Published numbers are UniDet's; ours are Grounding DINO's, so this
                            is another measure with another name: spatial-gdino
    complex                 the mean of those that apply to the prompt ("3-in-1"); with ours in it: complex-gdino

Nine of the 46 objects of the official spatial prompts can never match one of UniDet's labels, so the best possible
official score is 0.667; ours has no such ceiling. For published columns, give the pictures to UniDet: `eval.py` writes
them in the official layout. Rules as in Karine-Huang/T2I-CompBench 1b70949 (2026-05-07).
"""

import json
import math
import re
from pathlib import Path

from PIL import Image

from benchmarks.geneval import (
    Clip,
    detector_pixels,
    fill,
    in_batches,
    load,
    load_tensors,
    normalised,
    read_lines,
)
from benchmarks.stats import on_grid
from engine import run
from render_boxes import Box, iou

CATEGORIES = ("color", "shape", "texture", "spatial", "non_spatial", "complex")

# ---------------------------------------------------------------------------------------------------------------------
# BLIP-VQA: one question a noun phrase

NO_PHRASES, MOST_PHRASES = ("top", "the side", "the left", "the right"), 8


def questions(chunks: list[str]) -> list[str]:
    """What BLIP is asked about a prompt with these noun phrases, in order: cleaned as its training data was."""
    phrases = [chunk for chunk in chunks if chunk not in NO_PHRASES][:MOST_PHRASES]
    cleaned = [re.sub(r'[.!"()*#:;~]', "", phrase.lower() + "?").rstrip(" ") for phrase in phrases]
    return [" ".join(question.split(" ")[:50]) for question in cleaned]


def phrase_score(yes: float, no: float) -> float:
    """P(yes) against P(no), from the two logits of the first answer token, to four places as in the result files."""
    return round(1 / (1 + math.exp(no - yes)), 4)


def product(scores: list[float]) -> float:
    """The score of a picture: the rounded phrases multiplied, and rounded; 1 when no phrase was asked."""
    return round(math.prod(scores), 4)


# ---------------------------------------------------------------------------------------------------------------------
# Spatial: two objects and a relation

RELATIONS = (  # the first that is part of the prompt counts, as letters: "linear" holds "near"
    "on side of", "next to", "near", "on the left of", "on the right of", "on the bottom of", "on the top of",
    "on top of",
)  # fmt: skip
COMPLEX_RELATIONS = (
    "on top of",
    "on bottom of",
    "on the left",
    "on the right",
    "next to",
    "on side of",
    "near",
)
PERSONS = ("girl", "boy", "man", "woman")  # UniDet knows one word for them
NEAR = 150  # pixels in a frame of 479


def relation_of(prompt: str) -> str | None:
    return next((words for words in RELATIONS if words in prompt), None)


def position_score(a, b, words: str | None) -> float:
    """How well box `a` lies to box `b` as `words` say, 0 to 1, in a frame of about 479 pixels. Beside each other: less
    with more than 150 pixels. A side: the main direction has to be right, and an IoU above 0.1 costs. "on top of" (33
    of 88 official complex prompts with a relation) has no rule there, so it is 0."""
    dx, dy = (b[0] + b[2] - a[0] - a[2]) / 2, (b[1] + b[3] - a[1] - a[3]) / 2
    if words in ("next to", "on side of", "near"):
        return 1.0 if min(abs(dx), abs(dy)) < NEAR else NEAR / max(abs(dx), abs(dy))
    sideways, upright = abs(dx) > abs(dy), abs(dy) > abs(dx)
    holds = {
        "on the left of": dx > 0 and sideways,
        "on the right of": dx < 0 and sideways,
        "on the top of": dy > 0 and upright,
        "on the bottom of": dy < 0 and upright,
    }
    if not holds.get(words, False):
        return 0.0
    shared = iou(Box("", *a), Box("", *b))
    return 1.0 if shared < 0.1 else 0.1 / shared


def spatial_score(objects, words: str | None, found: list[tuple]) -> tuple[float | None, float]:
    """(position, score) of a picture. `objects`: the two names, or None when the prompt has not exactly two; `found`:
    (label, score, box), best first. A quarter for the confidence of each object, a half for the position (None unless
    both are there), and nothing below 0.5: one object alone is worth 0."""
    if not objects:
        return None, 0.0
    names = ["person" if name in PERSONS else name for name in objects]
    best = [next((row for row in found if row[0] == name), None) for name in names]
    position = position_score(best[0][2], best[1][2], words) if all(best) else None
    score = sum(0.25 * row[1] for row in best if row) + 0.5 * (position or 0.0)
    return position, score if score >= 0.5 else 0.0


def three_in_one(
    prompt: str, attribute: float, spatial: float, action: float, spatial_list, action_list
) -> float:
    """The score of a complex prompt: attributes with the relation, with the action, or with both. The two lists are
    those of complex_val_spatial.txt and complex_val_action.txt; who is in both counts as spatial."""

    def listed(lines):
        return prompt.split(".")[0].lower() in {line.split(".")[0].lower() for line in lines}

    if listed(spatial_list):
        return (attribute + spatial) / 2
    if listed(action_list):
        return (attribute + action) / 2
    return (attribute + spatial + action) / 3


# ---------------------------------------------------------------------------------------------------------------------
# The folders. A picture is (path, prompt, category, prompt's number, sample, {}), as in geneval.py


def plan_pictures(file: str, folder: Path, samples: int = 10) -> list[tuple]:
    """The pictures of color_val.txt, ...: color/samples/{prompt}_{number:06d}.png, numbers running through the
    category. Raises ValueError on a file with another name and on prompts that no file name can hold."""
    category, pictures = Path(file).stem.removesuffix("_val"), []
    if category not in CATEGORIES:
        raise ValueError(
            f"{file}: expected one of {', '.join(f'{name}_val.txt' for name in CATEGORIES)}"
        )
    for index, prompt in enumerate(read_lines(file)):
        if "/" in prompt or "_" in prompt:
            raise ValueError(
                f"{file}, line {index + 1}: the layout has no place for / and _ in a prompt"
            )
        for sample in range(samples):
            path = folder / category / "samples" / f"{prompt}_{index * samples + sample:06d}.png"
            pictures.append((path, prompt, category, index, sample, {}))
    return pictures


def find_pictures(folder: Path) -> list[tuple]:
    """The pictures that are in a folder. Prompts are numbered as they come."""
    pictures = []
    for category in CATEGORIES:
        seen = {}  # prompt -> its number and how many pictures it has
        for path in sorted(
            folder.glob(f"{category}/samples/*.png"), key=lambda path: path.stem.rsplit("_", 1)[-1]
        ):
            prompt = path.stem.split("_")[0]
            place = seen.setdefault(prompt, [len(seen), 0])
            pictures.append((path, prompt, category, *place, {}))
            place[1] += 1
    return pictures


# ---------------------------------------------------------------------------------------------------------------------
# What a prompt says: noun phrases and parts of speech
# A parse is {"chunks": noun phrases, "tokens": words, "pos": their parts of speech}; a template knows no tokens.

WORD = r"(?!and\b|of\b|on\b|in\b|with\b|near\b|next\b|to\b|is\b|are\b)[a-z-]+"
TWO_THINGS = re.compile(
    rf"(an? (?:{WORD} ){{0,3}}{WORD}) and (an? (?:{WORD} ){{0,3}}{WORD})\.?", re.I
)
PLACED = re.compile(
    rf"(an? (?:{WORD} )?{WORD}) (?:{'|'.join(RELATIONS)}) (an? (?:{WORD} )?{WORD})\.?", re.I
)


def parse_prompts(
    prompts: list[str], path: str = "", in_full: tuple[str, ...] = ()
) -> tuple[dict[str, dict], str]:
    """A parse of each prompt, and who made them. spaCy's en_core_web_sm when it is installed (then `path`, when given,
    is written for others); else templates for "a X and a Y" and "a X on the left of a Y", unless the prompt is one of
    `in_full`, and `path` for the rest. Raises ValueError naming the first prompt that nobody can parse."""
    try:
        import spacy

        nlp = spacy.load("en_core_web_sm")
    except (ImportError, OSError):
        nlp = None
    cache = {"made by": "", "prompts": {}}
    if path and Path(path).exists():
        try:
            cache = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError:
            cache = None
    if not (isinstance(cache, dict) and {"made by", "prompts"} <= cache.keys()):
        raise ValueError(f"--phrases {path} is no file of noun phrases")
    if nlp:
        made, parses = f"spaCy {spacy.__version__} en_core_web_sm {nlp.meta['version']}", {}
        for prompt, doc in zip(prompts, nlp.pipe(prompts), strict=True):
            words = {"tokens": [token.text for token in doc], "pos": [token.pos_ for token in doc]}
            parses[prompt] = {"chunks": [chunk.text for chunk in doc.noun_chunks], **words}
        if path and run.rank() == 0:
            known = cache["prompts"] if cache["made by"] == made else {}
            content = {"made by": made, "prompts": known | parses}
            run.write_whole(Path(path), json.dumps(content, indent=1))
        return parses, made
    parses, sources = {}, {}
    for prompt in prompts:
        simple = "" if prompt in in_full else prompt.strip()
        if two := TWO_THINGS.fullmatch(simple):
            parses[prompt], source = {"chunks": list(two.groups())}, "templates"
        elif two := PLACED.fullmatch(simple):
            objects = [phrase.split(" ", 1)[1] for phrase in two.groups()]
            parses[prompt], source = {"chunks": list(two.groups()), "objects": objects}, "templates"
        elif prompt in cache["prompts"]:
            parses[prompt], source = cache["prompts"][prompt], f"{path} ({cache['made by']})"
        else:
            raise ValueError(
                f"nobody can say what the noun phrases of {prompt!r} are: install spaCy's en_core_web_sm, "
                f"or give --phrases a file that was written where it is installed"
            )
        sources[source] = sources.get(source, 0) + 1
    return parses, ", ".join(f"{source} {count}" for source, count in sources.items())


def spatial_objects(parse: dict) -> list[str] | None:
    """The first and the last noun of a spatial prompt."""
    nouns = [
        word
        for word, pos in zip(parse.get("tokens", []), parse.get("pos", []), strict=True)
        if pos == "NOUN"
    ]
    return parse.get("objects") or ([nouns[0], nouns[-1]] if nouns else None)


def complex_objects(tokens: list[str], pos: list[str]) -> list[str] | None:
    """The two objects of a complex prompt: before and after each relation the nearest noun, where proper nouns count on
    the left, and on the right only if no noun follows (then the end of their first run). None unless that makes two."""
    objects = []
    for start in range(len(tokens)):
        length = next(
            (n for n in (3, 2, 1) if " ".join(tokens[start : start + n]) in COMPLEX_RELATIONS), 0
        )
        if not length:
            continue
        objects += [tokens[k] for k in range(start - 1, -1, -1) if pos[k] in ("NOUN", "PROPN")][:1]
        after = range(start + length, len(tokens))
        nouns = [tokens[k] for k in after if pos[k] == "NOUN"]
        ends = [tokens[k] for k in after[:-1] if pos[k] == "PROPN" != pos[k + 1]]
        objects += nouns[:1] or ends[:1]
    return objects if len(objects) == 2 else None


def without_adjectives(parse: dict) -> str:
    """The words that CLIP compares with a complex picture."""
    return " ".join(
        word for word, pos in zip(parse["tokens"], parse["pos"], strict=True) if pos != "ADJ"
    )


# ---------------------------------------------------------------------------------------------------------------------
# The networks

ENC, DEC, YES, NO = 30523, 30522, 2748, 2053  # ids in BLIP's vocabulary: two markers, two answers


def convert_blip(state_dict: dict) -> dict:
    """The tensors of Salesforce's BLIP-VQA by the names of transformers' `BlipForQuestionAnswering`: the vision half is
    renamed, the two BERTs are called the same."""
    names = [
        (r"^visual_encoder\.(cls_token)", "vision_model.embeddings.class_embedding"),
        (r"^visual_encoder\.pos_embed", "vision_model.embeddings.position_embedding"),
        (r"^visual_encoder\.patch_embed\.proj", "vision_model.embeddings.patch_embedding"),
        (r"^visual_encoder\.norm", "vision_model.post_layernorm"),
        (r"^visual_encoder\.blocks\.(\d+)\.norm", r"vision_model.encoder.layers.\1.layer_norm"),
        (
            r"^visual_encoder\.blocks\.(\d+)\.attn\.proj",
            r"vision_model.encoder.layers.\1.self_attn.projection",
        ),
        (r"^visual_encoder\.blocks\.(\d+)\.attn", r"vision_model.encoder.layers.\1.self_attn"),
        (r"^visual_encoder\.blocks", "vision_model.encoder.layers"),
    ]
    converted = {}
    for name, value in state_dict.items():
        for old, new in names:
            name = re.sub(old, new, name)
        if not name.endswith("position_ids"):
            converted[name] = value
    return converted


class BlipVQA:
    """blip(images, lists of questions) -> for each picture the score of each question. `path`: the official .pth, made
    for 480 x 480, or a folder or hub id (the hub's weights were made smaller, for 384, and are stretched again). The
    official ViT's layer norms add 1e-6; transformers' default is 1e-5."""

    def __init__(
        self, path: str, device="cpu", batch_size: int = 16, tokenizer: str = "", config=None
    ):
        from transformers import AutoConfig, AutoTokenizer, BlipConfig, BlipForQuestionAnswering

        self.device, self.batch_size = device, batch_size
        if str(path).endswith(".pth"):
            config = config or BlipConfig(vision_config={"image_size": 480, "layer_norm_eps": 1e-6})
            self.model = BlipForQuestionAnswering(config)
            fill(self.model, convert_blip(load_tensors(path, "blip")), "blip", path)
            self.tokenizer = load(AutoTokenizer, tokenizer, "blip_tokenizer")
        else:
            config = load(AutoConfig, path, "blip")
            config.vision_config.layer_norm_eps = 1e-6
            self.model = load(BlipForQuestionAnswering, path, "blip", config=config)
            self.tokenizer = load(AutoTokenizer, path, "blip")
        self.model.to(device).eval().requires_grad_(False)

    def __call__(self, images: list[Image.Image], asked: list[list[str]]) -> list[list[float]]:
        import torch

        scores = []
        for start in range(0, len(images), self.batch_size):
            now = slice(start, start + self.batch_size)
            with torch.inference_mode():
                seen = self._see(images[now])
                rows = [(k, question) for k, some in enumerate(asked[now]) for question in some]
                ids = [
                    self.tokenizer(question, truncation=True, max_length=35).input_ids
                    for _, question in rows
                ]
                rows = [(k, tokens) for (k, _), tokens in zip(rows, ids, strict=True)]
                # only questions of one length together: transformers does not mask padding in the answer's attention
                lengths = [len(tokens) for tokens in ids]
                answers = in_batches(
                    lambda part, seen=seen: self._answer(part, seen), rows, 64, lengths
                )
            answers = iter(answers)
            scores += [[next(answers) for _ in some] for some in asked[now]]
        return scores

    def _see(self, images):
        """(n, patches + 1, D): squashed to 480 x 480."""
        import numpy as np
        import torch

        squashed = [
            image.convert("RGB").resize((480, 480), Image.Resampling.BICUBIC) for image in images
        ]
        pixels = torch.stack([normalised(torch.from_numpy(np.array(image))) for image in squashed])
        stretch = self.model.config.vision_config.image_size != 480
        pixels = pixels.to(self.device, self.model.dtype)
        return self.model.vision_model(pixels, interpolate_pos_encoding=stretch).last_hidden_state

    def _answer(self, rows, seen):
        import torch

        ids = torch.tensor([tokens for _, tokens in rows], device=self.device)  # (rows, length)
        ids[:, 0] = ENC
        patches = seen[[k for k, _ in rows]]
        question = self.model.text_encoder(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            encoder_hidden_states=patches,
            encoder_attention_mask=torch.ones(
                patches.shape[:2], device=self.device, dtype=torch.long
            ),
        ).last_hidden_state
        begun = torch.full((len(rows), 1), DEC, device=self.device)
        logits = (
            self.model.text_decoder(input_ids=begun, encoder_hidden_states=question)
            .logits[:, -1]
            .float()
        )
        return [phrase_score(yes, no) for yes, no in logits[:, [YES, NO]].tolist()]


class GroundingDino:
    """gdino(images, pairs of names) -> for each picture (label, score, box) of what it finds, best first; boxes in the
    frame of the official rules, short side 479."""

    THRESHOLD = 0.35  # of its authors' demo

    def __init__(self, path: str, device="cpu", batch_size: int = 16):
        from transformers import AutoTokenizer, GroundingDinoForObjectDetection

        self.device, self.batch_size = device, batch_size
        self.model = (
            load(GroundingDinoForObjectDetection, path, "gdino")
            .to(device)
            .eval()
            .requires_grad_(False)
        )
        self.tokenizer = load(AutoTokenizer, path, "gdino")

    def __call__(self, images: list[Image.Image], names: list[list[str]]) -> list[list[tuple]]:
        rows = list(zip(images, names, strict=True))
        keys = [(" . ".join(pair), image.size) for image, pair in rows]
        return in_batches(self._find, rows, self.batch_size, keys)

    def _find(self, rows):
        import torch

        names = rows[0][1]
        ids, spans = [self.tokenizer.cls_token_id], []
        for name in names:
            tokens = self.tokenizer(f"{name} .", add_special_tokens=False).input_ids
            spans.append(slice(len(ids), len(ids) + len(tokens) - 1))
            ids += tokens
        ids = torch.tensor([[*ids, self.tokenizer.sep_token_id]] * len(rows), device=self.device)
        pixels = torch.stack([detector_pixels(image, pad=1)[0] for image, _ in rows])
        with torch.inference_mode():
            pixels = pixels.to(self.device, self.model.dtype)
            out = self.model(
                pixel_values=pixels, input_ids=ids, attention_mask=torch.ones_like(ids)
            )
        results = []
        for (image, _), logits, boxes in zip(
            rows, out.logits.float().sigmoid(), out.pred_boxes.float(), strict=True
        ):
            scale, found = min(479 / min(image.size), 480 / max(image.size)), []
            wide, high = (side * scale for side in image.size)
            for name, span in zip(names, spans, strict=True):
                scores = logits[:, span].max(-1).values
                for k in (scores > self.THRESHOLD).nonzero().flatten().tolist():
                    x, y, w, h = boxes[k].tolist()  # centre and size, as shares of the picture
                    box = (
                        (x - w / 2) * wide,
                        (y - h / 2) * high,
                        (x + w / 2) * wide,
                        (y + h / 2) * high,
                    )
                    found.append((name, float(scores[k]), box))
            results.append(sorted(found, key=lambda row: -row[1]))
        return results


def cosines(clip: Clip, images: list[Image.Image], texts: list[str]) -> list[float]:
    """The cosine of each picture with its text: raw, not times 100, not cut off at 0."""
    return (clip.images(images) * clip.texts(texts)).sum(-1).tolist()


class CompBench:
    """compbench(images, prompts) -> a dict a picture, as GenEval's: `score` in [0, 1], `reason`, `boxes`. `parses` and
    `lists` (spatial and action prompts) are those of the category's prompts; networks it does not use can be None."""

    def __init__(
        self,
        category: str,
        parses: dict,
        lists: tuple,
        blip: BlipVQA | None,
        clip: Clip | None,
        gdino,
    ):
        self.category, self.parses, self.lists = category, parses, lists
        self.blip, self.clip, self.gdino = blip, clip, gdino

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> list[dict]:
        if self.category == "spatial":
            return self._spatial(
                images, prompts, [spatial_objects(self.parses[prompt]) for prompt in prompts]
            )
        if self.category == "non_spatial":
            return [
                _row(cosine, f"cosine {cosine:.3f}")
                for cosine in cosines(self.clip, images, prompts)
            ]
        attributes = self._attributes(images, prompts)
        if self.category != "complex":
            return attributes
        parses = [self.parses[prompt] for prompt in prompts]
        objects = [complex_objects(parse["tokens"], parse["pos"]) for parse in parses]
        places = self._spatial(images, prompts, objects)
        actions = cosines(self.clip, images, [without_adjectives(parse) for parse in parses])
        rows = []
        for prompt, attribute, place, cosine in zip(
            prompts, attributes, places, actions, strict=True
        ):
            score = three_in_one(prompt, attribute["score"], place["score"], cosine, *self.lists)
            rows.append(
                _row(
                    score,
                    f"{attribute['reason']}; {place['reason']}; cosine {cosine:.3f}",
                    place["boxes"],
                )
            )
        return rows

    def _attributes(self, images, prompts):
        asked = [questions(self.parses[prompt]["chunks"]) for prompt in prompts]
        answers, rows = self.blip(images, asked), []
        for some, scores in zip(asked, answers, strict=True):
            said = ", ".join(
                f"{question} {score:.2f}" for question, score in zip(some, scores, strict=True)
            )
            rows.append(_row(product(scores), said))
        return rows

    def _spatial(self, images, prompts, objects):
        asked = [["person" if name in PERSONS else name for name in pair or ()] for pair in objects]
        some = [k for k, pair in enumerate(asked) if pair]
        answers = self.gdino([images[k] for k in some], [asked[k] for k in some])
        found = dict(zip(some, answers, strict=True))
        rows = []
        for k, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
            position, score = spatial_score(objects[k], relation_of(prompt), found.get(k, []))
            labels = [label for label, _, _ in found.get(k, [])]
            missing = [name for name in asked[k] if name not in labels]
            reason = (
                f"no {' and no '.join(missing)}" if missing else f"position {position or 0:.2f}"
            )
            frame = [
                side * min(479 / min(image.size), 480 / max(image.size)) for side in image.size
            ]
            best = [
                next(row for row in found[k] if row[0] == name) for name in dict.fromkeys(labels)
            ]
            boxes = [[f"{label} {value:.2f}", *on_grid(box, frame)] for label, value, box in best]
            rows.append(_row(score, reason, boxes))
        return rows


def _row(score: float, reason: str, boxes: tuple | list = ()) -> dict:
    return {"score": score, "reason": reason, "boxes": list(boxes)}
