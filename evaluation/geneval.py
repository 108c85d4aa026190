"""GenEval without mmdet: its rules by hand, its detector and its CLIP in transformers.

The rules (what counts as left of, which colour wins, where a score is cut) are functions of numbers
and strings, tested against what the official program computed. The networks are classes that take
PIL pictures and batch them:

    Mask2Former    the official .pth, converted when it is loaded, or a folder or hub id
    ClipColors     names the colour of an object by CLIP ViT-L/14
    GenEval        both, with the rules: pictures to verdicts
    Board          all of it, as eval.py wants it (see evaluation/run.py)

Boxes here are pixels, (x1, y1, x2, y2), y downwards, right and lower edge exclusive. Rules as in
djghosh13/geneval af4902f (2025-03-03): evaluation/evaluate_images.py and summary_scores.py.
"""

import functools
import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

from evaluation.networks import (
    Clip,
    Picture,
    check_finite,
    check_weights,
    detector_pixels,
    fill,
    find_in_folders,
    in_batches,
    load,
    load_tensors,
    paths_of,
    pixels_to_grid,
    plan_folders,
    upright,
)

# -------------------------------------------------------------------------------------------------
# The rules

COLORS = "red orange yellow green blue purple pink brown black white".split()
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
CLASSES = (  # COCO's 80 in their order, three of them by GenEval's names
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, "
    "fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, "
    "bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, "
    "sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, "
    "bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, "
    "carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, "
    "tv, laptop, computer mouse, tv remote, computer keyboard, cell phone, microwave, oven, "
    "toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear, hair drier, toothbrush"
).split(", ")
MOST_OBJECTS = 16  # of a class that are looked at, best first; overlapping ones are not suppressed


def kept(scores, tag: str) -> list[int]:
    """Which detections of one class count, best first: above 0.3, or 0.9 where things are counted.

    Compared in float32, as the detector's scores are: there 0.3 is not above 0.3."""
    threshold = np.float32(0.9 if tag == "counting" else 0.3)
    order = sorted(range(len(scores)), key=lambda k: -scores[k])
    above = [k for k in order if np.float32(scores[k]) > threshold]
    return above[:MOST_OBJECTS]


def relations(a, b) -> set[str]:
    """How box a lies to box b; two relations can hold at once, or none.

    Overlap plays no part: the distance of the centres is shortened by a tenth of both sizes, and
    the direction has to be within 60 degrees of the axis."""
    offset_x = (a[0] + a[2] - b[0] - b[2]) / 2
    offset_y = (a[1] + a[3] - b[1] - b[3]) / 2
    short_x = _shortened(offset_x, abs(a[2] - a[0]) + abs(b[2] - b[0]))
    short_y = _shortened(offset_y, abs(a[3] - a[1]) + abs(b[3] - b[1]))
    if max(abs(short_x), abs(short_y)) < 1e-3:
        return set()
    distance = math.hypot(offset_x, offset_y)  # before it was shortened
    dx = short_x / distance
    dy = short_y / distance
    holds = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {words for words, true in holds.items() if true}


def _shortened(offset: float, sizes: float) -> float:
    """An offset brought closer to 0 by a tenth of `sizes`, but not beyond 0."""
    return math.copysign(max(abs(offset) - 0.1 * sizes, 0), offset)


def judge_geneval(
    metadata: dict, boxes: dict[str, list], colors: dict[str, list[str]]
) -> list[tuple[str, str]]:
    """What is wrong with a picture: (kind, words) per failed clause; none when it is correct.

    `metadata` is a line of evaluation_metadata.jsonl; `boxes` has the kept boxes of each class,
    best first, `colors` the colour of each box. Kinds: too_few, color, position, no_target,
    too_many."""
    faults = []
    matched = []  # per clause: its boxes, or None when the clause failed
    for clause in metadata["include"]:
        name = clause["class"]
        count = clause["count"]
        found = boxes.get(name, [])[:count]
        fault = None
        if len(found) < count:
            fault = ("too_few", f"{name}: {len(found)} found, {count} wanted")
        elif "color" in clause:
            seen = colors[name][:count]
            if seen.count(clause["color"]) < count:
                fault = ("color", f"{name}: {' and '.join(seen)}, not {clause['color']}")
        if fault is None and "position" in clause:
            words, target = clause["position"]  # target: the number of an earlier clause
            other = metadata["include"][target]["class"]
            if matched[target] is None:
                fault = ("no_target", f"{name}: no {other} to be {words}")
            elif not all(words in relations(a, b) for a in found for b in matched[target]):
                fault = ("position", f"{name}: not {words} the {other}")  # every pair has to hold
        if fault:
            faults.append(fault)
        matched.append(None if fault else found)
    for clause in metadata.get("exclude", []):
        name = clause["class"]
        number = len(boxes.get(name, []))
        if number >= clause["count"]:
            words = f"{name}: {number} found, fewer than {clause['count']} wanted"
            faults.append(("too_many", words))
    return faults


def colour_crop(image: Image.Image, box, mask: np.ndarray) -> Image.Image:
    """What CLIP sees of one object: its box, all outside its mask (H, W) bool painted grey."""
    grey = Image.new("RGB", image.size, "#999")
    return Image.composite(image, grey, Image.fromarray(mask)).crop(tuple(box))


def read_metadata(line: str, where: str) -> tuple[str, str, dict]:
    """A line of evaluation_metadata.jsonl -> (prompt, tag, all of it).

    Raises ValueError, which begins with `where`, when the line is something else."""
    try:
        metadata = json.loads(line)
        prompt = metadata["prompt"]
        tag = metadata["tag"]
        names = [clause["class"] for clause in metadata["include"] + metadata.get("exclude", [])]
    except (ValueError, KeyError, TypeError) as problem:
        raise ValueError(f"{where}: no GenEval metadata ({problem})") from None
    for name in names:
        if name not in CLASSES:
            raise ValueError(f"{where}: GenEval knows no {name}")
    if tag not in TAGS:
        raise ValueError(f"{where}: GenEval knows no {tag}")
    return prompt, tag, metadata


# -------------------------------------------------------------------------------------------------
# The detector: weights

# mmdet's names -> transformers' names, regular expressions that are replaced in this order.
# mmdet 2.x calls a layer's attentions by number, 3.x by what they attend to.
SWIN = "model.pixel_level_module.encoder."
PIXEL = "model.pixel_level_module.decoder."
QUERIES = "model.transformer_module."
MASKS = QUERIES + "decoder.mask_predictor.mask_embedder"
MMDET_NAMES = [
    (r"^backbone\.patch_embed\.projection", SWIN + "swin.embeddings.patch_embeddings.projection"),
    (r"^backbone\.patch_embed\.norm", SWIN + "swin.embeddings.norm"),
    (r"^backbone\.norm0\.", SWIN + "hidden_states_norms.stage1."),
    (r"^backbone\.norm1\.", SWIN + "hidden_states_norms.stage2."),
    (r"^backbone\.norm2\.", SWIN + "hidden_states_norms.stage3."),
    (r"^backbone\.norm3\.", SWIN + "hidden_states_norms.stage4."),
    (r"^backbone\.stages", SWIN + "swin.encoder.layers"),
    (r"attn\.w_msa\.proj", "attention.o_proj"),
    (r"attn\.w_msa\.relative", "attention.relative_position_bias.relative"),
    (r"attn\.w_msa\.", "attention."),
    (r"(blocks\.\d+)\.norm1", r"\1.layernorm_before"),
    (r"(blocks\.\d+)\.norm2", r"\1.layernorm_after"),
    (r"(blocks\.\d+)\.ffn\.layers\.0\.0", r"\1.mlp.fc1"),
    (r"(blocks\.\d+)\.ffn\.layers\.1", r"\1.mlp.fc2"),
    (r"(decoder\.encoder\.layers\.\d+)\.attentions\.0", r"\1.self_attn"),
    (r"(decoder\.encoder\.layers\.\d+)\.norms\.0", r"\1.self_attn_layer_norm"),
    (r"(decoder\.encoder\.layers\.\d+)\.norms\.1", r"\1.final_layer_norm"),
    (r"(transformer_decoder\.layers\.\d+)\.(?:attentions\.0|cross_attn)\.attn", r"\1.cross_attn"),
    (r"(transformer_decoder\.layers\.\d+)\.(?:attentions\.1|self_attn)\.attn", r"\1.self_attn"),
    (r"(transformer_decoder\.layers\.\d+)\.norms\.0", r"\1.cross_attn_layer_norm"),
    (r"(transformer_decoder\.layers\.\d+)\.norms\.1", r"\1.self_attn_layer_norm"),
    (r"(transformer_decoder\.layers\.\d+)\.norms\.2", r"\1.final_layer_norm"),
    (r"ffns?(?:\.0)?\.layers\.0\.0", "fc1"),
    (r"ffns?(?:\.0)?\.layers\.1", "fc2"),
    (r"^panoptic_head\.pixel_decoder\.", PIXEL),
    (r"input_convs", "input_projections"),
    (r"lateral_convs\.0", "adapter_1"),
    (r"output_convs\.0", "layer_1"),
    (r"\.conv\.", ".0."),
    (r"\.gn\.", ".1."),
    (r"mask_feature", "mask_projection"),
    (r"level_encoding\.weight", "level_embed"),
    (r"^panoptic_head\.cls_embed", "class_predictor"),
    (r"^panoptic_head\.mask_embed\.0", MASKS + ".0.0"),
    (r"^panoptic_head\.mask_embed\.2", MASKS + ".1.0"),
    (r"^panoptic_head\.mask_embed\.4", MASKS + ".2.0"),
    (r"^panoptic_head\.transformer_decoder\.post_norm", QUERIES + "decoder.layernorm"),
    (r"^panoptic_head\.transformer_decoder", QUERIES + "decoder"),
    (r"^panoptic_head\.query_embed", QUERIES + "queries_embedder"),
    (r"^panoptic_head\.query_feat", QUERIES + "queries_features"),
    (r"^panoptic_head\.", QUERIES),
]
UNUSED = r"swin\.layernorm\.|^criterion\."  # what transformers has and no output depends on


def convert_mmdet(state_dict: dict) -> dict:
    """The tensors of an mmdet 2.x or 3.x Mask2Former with a Swin backbone, by the names of
    transformers' `Mask2FormerForUniversalSegmentation`.

    Besides the names, two things differ. Queries, keys and values are packed in mmdet, except in
    the decoder's cross-attention, where transformers packs them too. And where patches are merged,
    mmdet counts (channel, row, column), transformers (column, row, channel)."""
    converted = {}
    for name, value in state_dict.items():
        for old, new in MMDET_NAMES:
            name = re.sub(old, new, name)
        if name.endswith("relative_position_index"):
            continue  # computed, not learnt
        packed = re.search(r"attention\.(qkv\.)|self_attn\.(in_proj_)", name)
        if ".downsample." in name:
            merged = value.unflatten(-1, (-1, 4)).transpose(-1, -2)  # (..., 4, C)
            converted[name] = merged[..., [0, 2, 1, 3], :].flatten(-2)
        elif packed:
            word = packed[1] or packed[2]
            for letter, third in zip("qkv", value.chunk(3), strict=True):
                converted[name.replace(word, f"{letter}_proj.")] = third
        else:
            converted[name] = value
    return converted


def official_config() -> Mask2FormerConfig:
    """Sizes of GenEval's detector: Swin-S, 100 queries, COCO's 80 classes."""
    swin = SwinConfig(
        embed_dim=96,
        depths=[2, 2, 18, 2],
        num_heads=[3, 6, 12, 24],
        window_size=7,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    return Mask2FormerConfig(backbone_config=swin, num_labels=len(CLASSES), num_queries=100)


# -------------------------------------------------------------------------------------------------
# The detector: queries to instances


class Instance(NamedTuple):
    name: str
    score: float
    box: tuple[int, int, int, int]
    mask: np.ndarray  # (H, W) bool
    query: int


def fuse_masks(
    class_logits,
    mask_logits,
    padded: tuple[int, int],
    valid: tuple[int, int],
    original: tuple[int, int],
    most: int = 100,
    threshold: float = 0.0,
) -> list[Instance]:
    """Queries to instances, as mmdet does it: at most `most` of one picture, best first.

    class_logits (Q, 81), the last class being "nothing"; mask_logits (Q, H/4, W/4). Sizes (h, w):
    `padded` of the network's input, `valid` of what is not padding in it, `original` of the
    picture. One query can become several instances: the `most` best pairs of query and class count.
    The score is the class's probability times the mean of the mask inside itself, so a probability
    of `threshold` or less cannot become a score above `threshold`, and is dropped at once.

    transformers' own function makes masks at 384 x 384 and enlarges them: boxes move by up to 10
    pixels."""
    classes = class_logits.shape[1] - 1
    pairs = class_logits.float().softmax(-1)[:, :-1].flatten()  # (Q * classes,)
    probs, places = pairs.topk(min(most, len(pairs)))
    count = int((probs > threshold).sum())  # best first, so these stand in front
    if count == 0:
        return []
    probs = probs[:count]
    queries = places[:count] // classes
    labels = places[:count] % classes

    # The mask of each query that is used: enlarged, freed of padding, brought to the picture's size
    used, place_in_used = queries.unique(return_inverse=True)
    logits = mask_logits[used][None].float()  # (1, U, H/4, W/4)
    logits = F.interpolate(logits, tuple(padded), mode="bilinear")
    logits = logits[:, :, : valid[0], : valid[1]]
    logits = F.interpolate(logits, tuple(original), mode="bilinear")[0]  # (U, height, width)
    masks = logits > 0
    inside = (logits.sigmoid() * masks).sum((1, 2)) / (masks.sum((1, 2)) + 1e-6)
    boxes = [mask_box(mask) for mask in masks]

    scores = (probs * inside[place_in_used]).tolist()
    masks = masks.cpu().numpy()
    instances = []
    for k, score in enumerate(scores):
        place = int(place_in_used[k])
        name = CLASSES[int(labels[k])]
        instances.append(Instance(name, score, boxes[place], masks[place], int(queries[k])))
    return sorted(instances, key=lambda found: -found.score)


def mask_box(mask) -> tuple[int, int, int, int]:
    """The smallest box around a mask (H, W) bool; zeros when the mask is empty."""
    x1, x2 = _span(mask.any(0))
    y1, y2 = _span(mask.any(1))
    return x1, y1, x2, y2


def _span(used) -> tuple[int, int]:
    """(L,) bool -> where it begins and, exclusive, ends; (0, 0) when nothing is set."""
    places = used.nonzero().flatten().tolist()
    return (places[0], places[-1] + 1) if places else (0, 0)


class Mask2Former:
    """detector(images) -> the instances of each picture.

    `path`: the official .pth (Swin-S; `config` for other sizes), or a folder or hub id. The hub's
    facebook/mask2former-swin-small-coco-instance is another training run."""

    def __init__(self, path: str, device="cpu", batch_size: int = 16, config=None):
        self.device = device
        self.batch_size = batch_size
        if str(path).endswith(".pth"):
            self.model = Mask2FormerForUniversalSegmentation(config or official_config())
            state = convert_mmdet(load_tensors(path, "detector"))
            fill(self.model, state, "detector", path, unused=UNUSED)
        else:
            self.model = load(Mask2FormerForUniversalSegmentation, path, "detector")
        labels = self.model.config.num_labels
        if labels != len(CLASSES):
            raise ValueError(f"--detector {path} knows {labels} classes, not COCO's 80")
        self.model.to(device).eval().requires_grad_(False)

    def __call__(self, images: list[Image.Image], threshold: float = 0.3) -> list[list[Instance]]:
        detect = functools.partial(self._detect, threshold=threshold)
        sizes = [image.size for image in images]
        return in_batches(detect, images, self.batch_size, keys=sizes)

    def _detect(self, images: list[Image.Image], threshold: float) -> list[list[Instance]]:
        """Pictures of one size -> the instances of each."""
        inputs = []
        for image in images:
            pixels, valid = detector_pixels(image)  # `valid` is the same for all
            inputs.append(pixels)
        pixels = torch.stack(inputs).to(self.device, self.model.dtype)
        with torch.inference_mode():
            out = self.model(pixel_values=pixels)
        for logits in (out.class_queries_logits, out.masks_queries_logits):
            check_finite(logits, "the detector's answer")
        found = []
        for k, image in enumerate(images):
            instances = fuse_masks(
                out.class_queries_logits[k],
                out.masks_queries_logits[k],
                padded=pixels.shape[2:],
                valid=valid,
                original=(image.height, image.width),
                threshold=threshold,
            )
            found.append(instances)
        return found


# -------------------------------------------------------------------------------------------------
# The colour of an object

SENTENCES = ("a photo of a {0} {1}", "a photo of a {0}-colored {1}", "a photo of a {0} object")


class ClipColors:
    """colors(crops, names) -> the colour of each crop, which shows an object of that name."""

    def __init__(self, clip: Clip):
        self.clip = clip
        self.vectors = {}  # name of an object -> (10, D)

    def __call__(self, crops: list[Image.Image], names: list[str]) -> list[str]:
        if not crops:
            return []
        colors = []
        for features, name in zip(self.clip.images(crops), names, strict=True):
            if name not in self.vectors:
                self.vectors[name] = self._color_vectors(name)
            cosines = self.vectors[name] @ features  # (10,)
            colors.append(COLORS[int(cosines.argmax())])
        return colors

    def _color_vectors(self, name: str):
        """(10, D): per colour, the mean over three sentences about a `name` of that colour."""
        texts = []
        for color in COLORS:
            texts += [sentence.format(color, name) for sentence in SENTENCES]
        features = self.clip.texts(texts).unflatten(0, (len(COLORS), len(SENTENCES)))
        mean = features.mean(1)
        return mean / mean.norm(dim=-1, keepdim=True)


# -------------------------------------------------------------------------------------------------
# Pictures to verdicts


class GenEval:
    """geneval(images, lines of evaluation_metadata.jsonl) -> a dict per picture.

    `score`: 1.0 when correct, else 0.0; `reason`: what is wrong, in words; `boxes`: [label, x1, y1,
    x2, y2] on the 0..1000 grid, of the classes that the prompt asks for. `detector` is called as a
    Mask2Former, `colors` as a ClipColors."""

    def __init__(self, detector, colors):
        self.detector = detector
        self.colors = colors

    def __call__(self, images: list[Image.Image], metadata: list[dict]) -> list[dict]:
        images = [upright(image) for image in images]
        found = []
        for instances, line in zip(self.detector(images), metadata, strict=True):
            found.append(wanted_instances(instances, line))
        colors = self._colors(images, found, metadata)
        rows = []
        for k, image in enumerate(images):
            rows.append(verdict(metadata[k], found[k], colors[k], image.size))
        return rows

    def _colors(self, images, found, metadata) -> list[dict[str, list[str]]]:
        """Per picture: class -> the colour of each instance; empty where no colour is asked for.

        The objects of all pictures go to CLIP together."""
        crops = []
        names = []
        for image, instances_of, line in zip(images, found, metadata, strict=True):
            if not names_color(line):
                continue
            for name, instances in instances_of.items():
                for one in instances:
                    crops.append(colour_crop(image.convert("RGB"), one.box, one.mask))
                    names.append(name)
        answers = iter(self.colors(crops, names))
        colors = []
        for instances_of, line in zip(found, metadata, strict=True):
            seen = {}
            if names_color(line):
                for name, instances in instances_of.items():
                    seen[name] = [next(answers) for _ in instances]
            colors.append(seen)
        return colors


def names_color(line: dict) -> bool:
    """Whether a prompt, given by its metadata, says what colour something has."""
    return any("color" in clause for clause in line["include"])


def wanted_instances(instances: list[Instance], line: dict) -> dict[str, list[Instance]]:
    """The instances that count, by class, of the classes that the metadata `line` speaks of."""
    found = {}
    for clause in line["include"] + line.get("exclude", []):
        name = clause["class"]
        of_class = [instance for instance in instances if instance.name == name]
        places = kept([instance.score for instance in of_class], line["tag"])
        found[name] = [of_class[k] for k in places]
    return found


def verdict(line: dict, found: dict, colors: dict, size: tuple[int, int]) -> dict:
    """The row of one picture of `size` (w, h): score, reason, boxes."""
    boxes = {name: [one.box for one in instances] for name, instances in found.items()}
    faults = judge_geneval(line, boxes, colors)
    labelled = []
    for name, instances in found.items():
        for k, one in enumerate(instances):
            color = f"{colors[name][k]} " if colors else ""
            label = f"{color}{name} {one.score:.2f}"
            labelled.append([label, *pixels_to_grid(one.box, size)])
    reason = "; ".join(words for _, words in faults)
    return {"score": float(not faults), "reason": reason, "boxes": labelled}


# -------------------------------------------------------------------------------------------------
# The benchmark


class Board:
    """See evaluation/run.py."""

    samples = 4
    groups = TAGS
    overall = TAGS

    def __init__(self, settings, device):
        self.settings = settings
        self.device = device

    def plan_pictures(self, folder: Path) -> list[Picture]:
        samples = self.settings.samples or self.samples
        return plan_folders(self.settings.prompts[0], folder, samples, read_metadata)

    def find_pictures(self, folder: Path) -> list[Picture]:
        return find_in_folders(folder, read_metadata)

    def prepare(self, pictures: list[Picture]) -> None:
        check_weights(self.settings.detector, "detector")
        check_weights(self.settings.clip, "clip")

    @functools.cached_property
    def judge(self) -> GenEval:
        batch_size = self.settings.score_batch
        detector = Mask2Former(self.settings.detector, self.device, batch_size)
        clip = Clip(self.settings.clip, "clip", self.device, batch_size)
        return GenEval(detector, ClipColors(clip))

    def score(self, group: str, images: list, pictures: list[Picture]) -> list[dict]:
        verdicts = self.judge(images, [picture.metadata for picture in pictures])
        for one in verdicts:
            one["measures"] = {group: one["score"]}
        return verdicts

    def describe(self, pictures: list[Picture]) -> tuple[dict, list[str]]:
        detector = self.settings.detector
        notes = []
        if not detector.endswith(".pth"):  # no other .pth of COCO's instances has these sizes
            notes.append(
                f"detector {detector} is not GenEval's own: scores differ from published ones"
            )
        return paths_of(self.settings, ("detector", "clip")), notes
