"""GenEval without mmdet: its rules by hand, its detector and its CLIP in transformers.

The rules (what counts as left of, which colour wins, where a score is cut) are functions of numbers and strings, held
against what the official program computed. The networks are classes that take PIL pictures and batch them:

    Mask2Former    the official .pth, converted when it is loaded, or a folder or hub id
    Clip           ViT-L/14 names the colour of an object (T2I-CompBench uses it as well, with ViT-B/32)

Boxes here are pixels, (x1, y1, x2, y2), y downwards, right and lower edge exclusive. Nothing imports torch before it is
needed. Rules as in djghosh13/geneval af4902f (2025-03-03): evaluation/evaluate_images.py and summary_scores.py.
"""

import functools
import json
import math
import pickle
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from benchmarks.stats import on_grid

MASK2FORMER = "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco"
WEIGHTS = {  # flag: (what it is, file or hub id, where to get it)
    "detector": (
        "Mask2Former of GenEval", f"{MASK2FORMER}_20220504_001756-743b7d99.pth",
        f"download.openmmlab.com/mmdetection/v2.0/mask2former/{MASK2FORMER}",
    ),
    "clip": ("CLIP ViT-L/14", "openai/clip-vit-large-patch14", "huggingface.co"),
    "clip_b32": ("CLIP ViT-B/32", "openai/clip-vit-base-patch32", "huggingface.co"),
    "blip": ("BLIP-VQA", "model_base_vqa_capfilt_large.pth", "github.com/salesforce/BLIP (VQA, ViT-B and CapFilt-L)"),
    "blip_tokenizer": ("BERT's tokenizer", "google-bert/bert-base-uncased", "huggingface.co"),
    "gdino": ("Grounding DINO", "IDEA-Research/grounding-dino-base", "huggingface.co"),
}  # fmt: skip


def missing(path: str, flag: str) -> str:
    return "no {} at {}: get {} from {}, then --{} PATH".format(
        WEIGHTS[flag][0], path, *WEIGHTS[flag][1:], flag
    )


def check_weights(path: str, flag: str) -> None:
    """Raises FileNotFoundError when `path` is neither there nor a hub id (owner/name)."""
    if not Path(path).expanduser().exists() and not re.fullmatch(
        r"[\w-][\w.-]*/[\w.-]+(?<!\.pth)", path
    ):
        raise FileNotFoundError(missing(path, flag))


def load(loader, path: str, flag: str, **settings):
    """`loader.from_pretrained` of a folder, which never asks the network, or of a hub id. Raises FileNotFoundError when
    it is neither."""
    try:
        return loader.from_pretrained(path, local_files_only=Path(path).exists(), **settings)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(missing(path, flag)) from error


def in_batches(function, rows: list, size: int, keys: list | None = None) -> list:
    """function(up to `size` rows) -> list of results, over all rows. With `keys`, a batch holds rows of one key only
    (one size, one length: no padding); the order of the results is that of the rows."""
    keys = keys or [0] * len(rows)
    places = sorted(range(len(rows)), key=lambda k: keys[k])
    results = [None] * len(rows)
    while places:
        equal = [k for k in places[:size] if keys[k] == keys[places[0]]]
        for k, result in zip(equal, function([rows[k] for k in equal]), strict=True):
            results[k] = result
        places = places[len(equal) :]
    return results


# ---------------------------------------------------------------------------------------------------------------------
# GenEval: the rules

COLORS = "red orange yellow green blue purple pink brown black white".split()
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
CLASSES = (  # COCO's 80 in their order, in GenEval's words: by number, since three names are not COCO's
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, "
    "parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, "
    "handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, "
    "surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, "
    "broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, "
    "computer mouse, tv remote, computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, "
    "clock, vase, scissors, teddy bear, hair drier, toothbrush"
).split(", ")
MOST_OBJECTS = 16  # of a class that are looked at, best first. There is no suppression of overlaps


def kept(scores, tag: str) -> list[int]:
    """Which detections of one class count, best first: above 0.3, or 0.9 where things are counted. Compared in float32,
    as the detector's scores are: a score of 0.3 is not above 0.3."""
    threshold = np.float32(0.9 if tag == "counting" else 0.3)
    order = sorted(range(len(scores)), key=lambda k: -scores[k])
    return [k for k in order if np.float32(scores[k]) > threshold][:MOST_OBJECTS]


def relations(a, b) -> set[str]:
    """How box a lies to box b; two relations can hold at once, or none. Overlap plays no part: the distance of the
    centres is shortened by a tenth of both sizes, and the direction has to be within 60 degrees of the axis."""
    offset = [(a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1)]
    sizes = [abs(a[i + 2] - a[i]) + abs(b[i + 2] - b[i]) for i in (0, 1)]
    short = [
        math.copysign(max(abs(o) - 0.1 * size, 0), o) for o, size in zip(offset, sizes, strict=True)
    ]
    if max(map(abs, short)) < 1e-3:
        return set()
    dx, dy = (s / math.hypot(*offset) for s in short)  # by the length before it was shortened
    holds = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {words for words, true in holds.items() if true}


def judge_geneval(
    metadata: dict, boxes: dict[str, list], colors: dict[str, list[str]]
) -> list[tuple[str, str]]:
    """What is wrong with a picture: (kind, words) for each failed clause; the picture is correct when there is none.

    `metadata` is a line of evaluation_metadata.jsonl; `boxes` has the kept boxes of a class, best first, `colors` the
    colour of each. Kinds: too_few, color, position, no_target, too_many."""
    faults, matched = [], []
    for clause in metadata["include"]:
        name, count = clause["class"], clause["count"]
        found, before = boxes.get(name, [])[:count], len(faults)
        if len(found) < count:
            faults.append(("too_few", f"{name}: {len(found)} found, {count} wanted"))
        elif "color" in clause:
            seen = colors[name][:count]
            if seen.count(clause["color"]) < count:
                faults.append(("color", f"{name}: {' and '.join(seen)}, not {clause['color']}"))
        if "position" in clause and len(faults) == before:  # every pair has to hold
            words, target = clause["position"]
            other = metadata["include"][target]["class"]
            if matched[target] is None:
                faults.append(("no_target", f"{name}: no {other} to be {words}"))
            elif not all(words in relations(a, b) for a in found for b in matched[target]):
                faults.append(("position", f"{name}: not {words} the {other}"))
        matched.append(found if len(faults) == before else None)
    for clause in metadata.get("exclude", []):
        number = len(boxes.get(clause["class"], []))
        if number >= clause["count"]:
            faults.append(
                (
                    "too_many",
                    f"{clause['class']}: {number} found, fewer than {clause['count']} wanted",
                )
            )
    return faults


def colour_crop(image: Image.Image, box, mask: np.ndarray) -> Image.Image:
    """What CLIP sees of one object: its box, everything outside its mask (H, W) bool painted grey."""
    grey = Image.new("RGB", image.size, "#999")
    return Image.composite(image, grey, Image.fromarray(mask)).crop(tuple(box))


# ---------------------------------------------------------------------------------------------------------------------
# GenEval: the folders. A picture is (path, prompt, tag, prompt's number, sample, metadata)


def read_lines(path: str | Path) -> list[str]:
    return [
        line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()
    ]


def read_metadata(line: str, where: str) -> tuple[str, str, dict]:
    """A line of evaluation_metadata.jsonl -> (prompt, tag, all of it). Raises ValueError when it is none."""
    try:
        metadata = json.loads(line)
        prompt, tag = metadata["prompt"], metadata["tag"]
        names = [clause["class"] for clause in metadata["include"] + metadata.get("exclude", [])]
    except (ValueError, KeyError, TypeError) as problem:
        raise ValueError(f"{where}: no GenEval metadata ({problem})") from None
    if unknown := [name for name in names if name not in CLASSES] + [tag] * (tag not in TAGS):
        raise ValueError(f"{where}: GenEval knows no {unknown[0]}")
    return prompt, tag, metadata


def plan_pictures(file: str, folder: Path, samples: int = 4) -> list[tuple]:
    """The pictures of evaluation_metadata.jsonl: 00000/samples/0000.png. Raises ValueError on any other file."""
    pictures = []
    for index, line in enumerate(read_lines(file)):
        prompt, tag, metadata = read_metadata(line, f"{file}, line {index + 1}")
        for sample in range(samples):
            path = folder / f"{index:05d}" / "samples" / f"{sample:04d}.png"
            pictures.append((path, prompt, tag, index, sample, metadata))
    return pictures


def find_pictures(folder: Path) -> list[tuple]:
    """The pictures that are in a folder, with the metadata.jsonl beside them."""
    pictures = []
    for path in sorted(folder.glob("*/samples/*.png")):
        if path.stem.isdigit() and path.parts[-3].isdigit():
            beside = path.parent.parent / "metadata.jsonl"
            prompt, tag, metadata = read_metadata("".join(read_lines(beside)[:1]), str(beside))
            pictures.append((path, prompt, tag, int(path.parts[-3]), int(path.stem), metadata))
    return pictures


# ---------------------------------------------------------------------------------------------------------------------
# GenEval: the detector

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of ImageNet, in grey levels, RGB
SIDES = (1333, 800)  # pixels: the longer and the shorter side are made as large as these allow

# mmdet's names -> transformers' names. 2.x calls a layer's attentions by number, 3.x by what they attend to
SWIN, PIXEL = "model.pixel_level_module.encoder.", "model.pixel_level_module.decoder."
QUERIES, MASKS = "model.transformer_module.", "decoder.mask_predictor.mask_embedder"
MMDET_NAMES = [
    (r"^backbone\.patch_embed\.projection", SWIN + "swin.embeddings.patch_embeddings.projection"),
    (r"^backbone\.patch_embed\.norm", SWIN + "swin.embeddings.norm"),
    (r"^backbone\.norm([0-3])\.", lambda m: f"{SWIN}hidden_states_norms.stage{int(m[1]) + 1}."),
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
    (r"^panoptic_head\.mask_embed\.([024])", lambda m: f"{QUERIES}{MASKS}.{int(m[1]) // 2}.0"),
    (r"^panoptic_head\.transformer_decoder\.post_norm", QUERIES + "decoder.layernorm"),
    (r"^panoptic_head\.transformer_decoder", QUERIES + "decoder"),
    (r"^panoptic_head\.query_embed", QUERIES + "queries_embedder"),
    (r"^panoptic_head\.query_feat", QUERIES + "queries_features"),
    (r"^panoptic_head\.", QUERIES),
]
UNUSED = r"swin\.layernorm\.|^criterion\."  # what transformers has and no output depends on


def convert_mmdet(state_dict: dict) -> dict:
    """The tensors of an mmdet 2.x or 3.x Mask2Former with a Swin backbone, by the names of transformers'
    `Mask2FormerForUniversalSegmentation`. Three things are not renames: packed q, k, v of the backbone; those of the
    decoder's self-attention (its cross-attention stays packed); the order in which patches are merged, where mmdet
    counts channel, row, column and transformers column, row, channel."""
    converted = {}
    for name, value in state_dict.items():
        for old, new in MMDET_NAMES:
            name = re.sub(old, new, name)
        if name.endswith("relative_position_index"):
            continue  # computed, not learnt
        if ".downsample." in name:
            merged = value.unflatten(-1, (-1, 4)).transpose(-1, -2)  # (..., 4, C)
            converted[name] = merged[..., [0, 2, 1, 3], :].flatten(-2)
        elif packed := re.search(r"attention\.(qkv\.)|self_attn\.(in_proj_)", name):
            for letter, third in zip("qkv", value.chunk(3), strict=True):
                converted[name.replace(packed[1] or packed[2], f"{letter}_proj.")] = third
        else:
            converted[name] = value
    return converted


class Metadata:
    """Stands in for what an mmdet file pickles beside its tensors. No code that a file names is ever run."""

    def __init__(self, *_):
        pass

    __setstate__ = __init__


def load_tensors(path: str, flag: str) -> dict:
    """The state dict of a .pth file. Raises FileNotFoundError when it is not there, ValueError when it is something
    else."""
    import torch

    if not Path(path).is_file():
        raise FileNotFoundError(missing(path, flag))
    foreign = []  # (stand-in, name) of each class that the file wants; torch names one at a time
    while True:
        try:
            with torch.serialization.safe_globals(foreign):
                file = torch.load(path, map_location="cpu", weights_only=True)
            return file.get("state_dict") or file.get("model") or file
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            name = re.search(r"Unsupported global: GLOBAL (\S+) was not", str(error))
            if not name or name[1] in [known for _, known in foreign]:
                raise ValueError(
                    f"--{flag} {path}: cannot be read without running its code, or is no .pth"
                ) from error
            foreign.append((Metadata, name[1]))


def fill(model, state: dict, flag: str, path: str) -> None:
    """Puts converted tensors into a model: every one that an output depends on, and no other, in its shape."""
    wanted = {
        name: value.shape
        for name, value in model.state_dict().items()
        if not re.search(UNUSED, name)
    }
    if wanted != {name: value.shape for name, value in state.items()}:
        raise ValueError(f"--{flag} {path} is no {WEIGHTS[flag][0]}: its tensors do not fit")
    model.load_state_dict(state, strict=False)


class Instance(NamedTuple):
    name: str
    score: float
    box: tuple[int, int, int, int]
    mask: np.ndarray  # (H, W) bool
    query: int


def detector_pixels(image: Image.Image, pad: int = 32):
    """(3, H, W) network input of one picture and the (h, w) of it that is not padding. Resized to SIDES with bilinear
    weights that do not widen when shrinking, and rounded to whole grey levels, as mmdet 2.x does."""
    import torch
    import torch.nn.functional as F

    x = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float()
    ratio = min(SIDES[0] / max(image.size), SIDES[1] / min(image.size))
    h, w = (int(side * ratio + 0.5) for side in x.shape[1:])
    x = F.interpolate(x[None], (h, w), mode="bilinear", antialias=False)[0].round()
    x = F.pad(x, (0, -w % pad, 0, -h % pad), value=128)
    return (x - x.new_tensor(MEAN)[:, None, None]) / x.new_tensor(STD)[:, None, None], (h, w)


def fuse_masks(
    class_logits, mask_logits, padded, valid, original, most: int = 100, threshold: float = 0.0
):
    """Queries to instances, as mmdet does it: class_logits (Q, 81) and mask_logits (Q, H/4, W/4) of one picture; sizes
    (h, w) of the network's input, of what is not padding in it, and of the picture. Returns at most `most` instances,
    best first. A query can be several: the `most` best pairs of query and class count. The score is the class's
    probability times the mean of the mask inside itself, so nothing with a probability of `threshold` or less is
    followed up. transformers' own function makes masks at 384 x 384 and enlarges them: boxes move by up to 10 pixels.
    """
    import torch.nn.functional as F

    probs, places = (
        class_logits.float().softmax(-1)[:, :-1].flatten().topk(min(most, 80 * len(class_logits)))
    )
    places = places[probs > threshold]
    queries, labels = places // 80, places % 80
    used, place = queries.unique(return_inverse=True)
    if not len(used):
        return []
    logits = F.interpolate(mask_logits[used][None].float(), tuple(padded), mode="bilinear")
    logits = F.interpolate(logits[:, :, : valid[0], : valid[1]], tuple(original), mode="bilinear")[
        0
    ]  # (U, H, W)
    binary = logits > 0
    inside = (logits.sigmoid() * binary).sum((1, 2)) / (binary.sum((1, 2)) + 1e-6)
    edges = []
    for mask in binary:
        (x1, x2), (y1, y2) = (_span(mask.any(axis)) for axis in (0, 1))
        edges.append((x1, y1, x2, y2))
    scores, binary = (probs[: len(places)] * inside[place]).tolist(), binary.cpu().numpy()
    rows = zip(scores, labels.tolist(), queries.tolist(), place.tolist(), strict=True)
    instances = [
        Instance(CLASSES[label], score, edges[k], binary[k], query)
        for score, label, query, k in rows
    ]
    return sorted(instances, key=lambda found: -found.score)


def _span(used) -> tuple[int, int]:
    """(L,) bool -> where it begins and, exclusive, ends; (0, 0) when nothing is set."""
    places = used.nonzero().flatten().tolist()
    return (places[0], places[-1] + 1) if places else (0, 0)


class Mask2Former:
    """detector(images) -> the instances of each picture. `path`: the official .pth (Swin-S; `config` for other sizes),
    or a folder or hub id. The hub's facebook/mask2former-swin-small-coco-instance is another training run."""

    def __init__(self, path: str, device="cpu", batch_size: int = 16, config=None):
        from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

        self.device, self.batch_size = device, batch_size
        if not str(path).endswith(".pth"):
            self.model = load(Mask2FormerForUniversalSegmentation, path, "detector")
        else:
            sizes = {
                "embed_dim": 96,
                "depths": [2, 2, 18, 2],
                "num_heads": [3, 6, 12, 24],
                "window_size": 7,
            }
            swin = SwinConfig(**sizes, out_features=["stage1", "stage2", "stage3", "stage4"])
            config = config or Mask2FormerConfig(
                backbone_config=swin, num_labels=80, num_queries=100
            )
            self.model = Mask2FormerForUniversalSegmentation(config)
            fill(self.model, convert_mmdet(load_tensors(path, "detector")), "detector", path)
        if self.model.config.num_labels != len(CLASSES):
            raise ValueError(
                f"--detector {path} knows {self.model.config.num_labels} classes, not COCO's 80"
            )
        self.model.to(device).eval().requires_grad_(False)

    def __call__(self, images: list[Image.Image], threshold: float = 0.3) -> list[list[Instance]]:
        sizes = [image.size for image in images]
        return in_batches(
            lambda batch: self._detect(batch, threshold), images, self.batch_size, sizes
        )

    def _detect(self, images, threshold):
        import torch

        inputs = [detector_pixels(image) for image in images]
        pixels = torch.stack([x for x, _ in inputs])
        with torch.inference_mode():
            out = self.model(pixel_values=pixels.to(self.device, self.model.dtype))
        sizes = [
            (pixels.shape[2:], valid, image.size[::-1])
            for (_, valid), image in zip(inputs, images, strict=True)
        ]
        logits = zip(out.class_queries_logits, out.masks_queries_logits, sizes, strict=True)
        return [
            fuse_masks(classes, masks, *size, threshold=threshold)
            for classes, masks, size in logits
        ]


# ---------------------------------------------------------------------------------------------------------------------
# CLIP


def clip_pixels(image: Image.Image):
    """(3, 224, 224): short side to 224, bicubic, the middle square; OpenAI's preprocessing of PIL pictures."""
    import torch

    image = image.convert("RGB")
    sides = [
        224 if side == min(image.size) else int(224 * side / min(image.size)) for side in image.size
    ]
    left, top = (round((side - 224) / 2) for side in sides)
    image = image.resize(sides, Image.Resampling.BICUBIC).crop((left, top, left + 224, top + 224))
    return normalised(torch.from_numpy(np.array(image)))


def normalised(pixels):
    """(H, W, 3) uint8 -> (3, H, W) by CLIP's mean and standard deviation; BLIP uses them too."""
    x = pixels.permute(2, 0, 1) / 255
    mean, std = x.new_tensor(
        [[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]]
    )
    return (x - mean[:, None, None]) / std[:, None, None]


class Clip:
    """Features of unit length: clip.images(pictures) and clip.texts(strings), both (N, D) float32 on the CPU."""

    def __init__(self, path: str, flag: str, device="cpu", batch_size: int = 16):
        from transformers import AutoTokenizer, CLIPModel

        self.device, self.batch_size = device, batch_size
        self.model = load(CLIPModel, path, flag).to(device).eval().requires_grad_(False)
        self.tokenizer = load(AutoTokenizer, path, flag)

    def images(self, images: list[Image.Image]):
        import torch

        def features(batch):
            pixels = torch.stack([clip_pixels(image) for image in batch])
            found = self.model.get_image_features(pixels.to(self.device, self.model.dtype))
            return [*found.pooler_output.float().cpu()]

        with torch.inference_mode():
            return torch.nn.functional.normalize(
                torch.stack(in_batches(features, images, self.batch_size)), dim=-1
            )

    def texts(self, texts: list[str]):
        import torch

        tokens = self.tokenizer(
            texts, padding=True, truncation=True, max_length=77, return_tensors="pt"
        )
        with torch.inference_mode():
            found = self.model.get_text_features(**tokens.to(self.device)).pooler_output
            return torch.nn.functional.normalize(found.float().cpu(), dim=-1)

    @functools.cache  # noqa: B019 - one object a run
    def _color_vectors(self, name: str):
        """(10, D): for each colour, the mean over three sentences about a `name` of that colour."""
        sentences = (
            "a photo of a {0} {1}",
            "a photo of a {0}-colored {1}",
            "a photo of a {0} object",
        )
        texts = self.texts(
            [sentence.format(color, name) for color in COLORS for sentence in sentences]
        )
        mean = texts.unflatten(0, (len(COLORS), len(sentences))).mean(1)
        return mean / mean.norm(dim=-1, keepdim=True)

    def colors(self, crops: list[Image.Image], names: list[str]) -> list[str]:
        """The colour of each crop, as a `name`."""
        if not crops:
            return []
        rows = zip(self.images(crops), names, strict=True)
        return [COLORS[int((self._color_vectors(name) @ image).argmax())] for image, name in rows]


# ---------------------------------------------------------------------------------------------------------------------
# GenEval: pictures to verdicts


class GenEval:
    """geneval(images, lines of evaluation_metadata.jsonl) -> a dict a picture: `score` (1.0 correct, 0.0 not), `reason`
    (what is wrong, in words) and `boxes` ([label, x1, y1, x2, y2] on the 0..1000 grid) of the classes it asks for."""

    def __init__(self, detector: Mask2Former, clip: Clip):
        self.detector, self.clip = detector, clip

    def __call__(self, images: list[Image.Image], metadata: list[dict]) -> list[dict]:
        found, crops, names = [], [], []
        for image, instances, line in zip(images, self.detector(images), metadata, strict=True):
            classes = {clause["class"]: [] for clause in line["include"] + line.get("exclude", [])}
            for name in classes:
                ones = [instance for instance in instances if instance.name == name]
                classes[name] = [ones[k] for k in kept([one.score for one in ones], line["tag"])]
                if any("color" in clause for clause in line["include"]):
                    crops += [
                        colour_crop(image.convert("RGB"), one.box, one.mask)
                        for one in classes[name]
                    ]
                    names += [name] * len(classes[name])
            found.append(classes)
        colors, rows = iter(self.clip.colors(crops, names)), []
        for image, classes, line in zip(images, found, metadata, strict=True):
            seen = {}
            if any("color" in clause for clause in line["include"]):
                seen = {name: [next(colors) for _ in ones] for name, ones in classes.items()}
            faults = judge_geneval(
                line, {name: [one.box for one in ones] for name, ones in classes.items()}, seen
            )
            boxes = []
            for name, ones in classes.items():
                for color, one in zip(seen.get(name, [""] * len(ones)), ones, strict=True):
                    boxes.append(
                        [f"{color} {name} {one.score:.2f}".strip(), *on_grid(one.box, image.size)]
                    )
            reason = "; ".join(words for _, words in faults)
            rows.append({"score": float(not faults), "reason": reason, "boxes": boxes})
        return rows
