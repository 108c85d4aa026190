"""What the benchmarks share: the record of a picture, and networks with their weights.

A network's weights are a folder or hub id that transformers loads, or GenEval's official .pth file.
No code that a .pth file names is ever run.
"""

import math
import pickle
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from transformers import AutoTokenizer, CLIPModel


class Picture(NamedTuple):
    """One picture of a benchmark, drawn or still to be drawn."""

    path: Path
    prompt: str
    group: str  # GenEval's tag, T2I-CompBench's category, GenEval 2's number of atoms
    index: int  # of the prompt
    sample: int
    metadata: dict  # the prompt's line of GenEval or GenEval 2; empty for T2I-CompBench


def read_lines(path: str | Path) -> list[str]:
    """The non-empty lines of a text file, stripped."""
    # not splitlines(): to it a line ends at U+2028 too, which may stand in a string of JSON
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    return [line.strip() for line in lines if line.strip()]


# -------------------------------------------------------------------------------------------------
# The folders of GenEval and GenEval 2: 00000/samples/0000.png is the first sample of the first
# prompt, beside it 00000/metadata.jsonl. `read(line, where)` makes (prompt, group, metadata) of a
# line, and raises ValueError, which begins with `where`, when it is something else


def plan_folders(file: str, folder: Path, samples: int, read) -> list[Picture]:
    """The pictures of the prompts of `file`, JSON lines. Raises ValueError on any other file."""
    pictures = []
    for index, line in enumerate(read_lines(file)):
        prompt, group, metadata = read(line, f"{file}, line {index + 1}")
        for sample in range(samples):
            path = folder / f"{index:05d}" / "samples" / f"{sample:04d}.png"
            pictures.append(Picture(path, prompt, group, index, sample, metadata))
    return pictures


def find_in_folders(folder: Path, read) -> list[Picture]:
    """The pictures that are in a folder."""
    pictures = []
    for path in sorted(folder.glob("*/samples/*.png")):
        number = path.parent.parent.name
        if not (path.stem.isdigit() and number.isdigit()):
            continue
        beside = path.parent.parent / "metadata.jsonl"
        first_line = "".join(read_lines(beside)[:1])
        prompt, group, metadata = read(first_line, str(beside))
        pictures.append(Picture(path, prompt, group, int(number), int(path.stem), metadata))
    return pictures


# -------------------------------------------------------------------------------------------------
# Weights


HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(?<!\.pth)")  # owner/name


def missing(path: str, flag: str) -> str:
    """The sentence for weights that are not there."""
    return f"--{flag} {path}: no weights there; docs/evaluation.md says where to get them"


def check_weights(path: str, flag: str) -> None:
    """Raises FileNotFoundError when `path` neither exists nor looks like a hub id."""
    if not Path(path).expanduser().exists() and not HUB_ID.fullmatch(path):
        raise FileNotFoundError(missing(path, flag))


def paths_of(settings, flags) -> dict[str, str]:
    """Flag -> folder, file or hub id of its network."""
    return {flag: getattr(settings, flag) for flag in flags}


def load(loader, path: str, flag: str, **settings):
    """`loader.from_pretrained` of a folder, which never asks the network, or of a hub id.

    Raises FileNotFoundError when `path` is neither."""
    try:
        return loader.from_pretrained(path, local_files_only=Path(path).exists(), **settings)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(missing(path, flag)) from error


class Metadata:
    """Stands in for every class that a .pth file names beside its tensors; it ignores its data."""

    def __init__(self, *_):
        pass

    __setstate__ = __init__


def load_tensors(path: str, flag: str) -> dict:
    """The state dict of a .pth file.

    Raises FileNotFoundError when the file is not there, ValueError when it is something else."""
    if not Path(path).is_file():
        raise FileNotFoundError(missing(path, flag))
    stand_ins = []  # (Metadata, name of a class) for each class that the file wants
    while True:
        try:
            with torch.serialization.safe_globals(stand_ins):
                content = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            # torch refuses a class that it does not know, and names one class at a time
            refused = re.search(r"Unsupported global: GLOBAL (\S+) was not", str(error))
            known = [name for _, name in stand_ins]
            if not refused or refused[1] in known:
                problem = "cannot be read without running its code, or is no .pth"
                raise ValueError(f"--{flag} {path}: {problem}") from error
            stand_ins.append((Metadata, refused[1]))
        else:
            return content.get("state_dict") or content.get("model") or content


def fill(model, state: dict, flag: str, path: str, unused: str | None = None) -> None:
    """Puts converted tensors into a model, each in its shape.

    Every tensor of the model has to be in `state`, except those whose names match the regular
    expression `unused`, on which no output depends. Raises ValueError otherwise."""
    wanted = {}
    for name, value in model.state_dict().items():
        if unused is None or not re.search(unused, name):
            wanted[name] = value.shape
    given = {name: value.shape for name, value in state.items()}
    if wanted != given:
        raise ValueError(f"--{flag} {path} is another network: its tensors do not fit")
    model.load_state_dict(state, strict=False)  # what is unused keeps its random weights


class NotFinite(ValueError):
    """A network, or a score, is nan or infinite. It must not pass for a number, nor for "nothing is
    there"."""


def check_finite(values, name: str):
    """The same values, a tensor or a float. Raises NotFinite, which begins with `name`."""
    finite = math.isfinite(values) if isinstance(values, float) else values.isfinite().all()
    if not finite:
        raise NotFinite(f"{name} is not finite (nan or inf)")
    return values


# -------------------------------------------------------------------------------------------------
# Pictures to batches of pixels


def upright(image: Image.Image) -> Image.Image:
    """The picture as its EXIF data wants it shown.

    The official programs differ: GenEval and UniDet (through mmcv and detectron2) turn a picture
    before they look at it, BLIP-VQA and CLIP of T2I-CompBench do not."""
    return ImageOps.exif_transpose(image)


def in_batches(function, rows: list, size: int, keys: list | None = None) -> list:
    """The results of `function`, which takes up to `size` rows at a time, in the order of the rows.

    With `keys`, one per row, a batch holds rows of one key only: one picture size or one number of
    tokens, so nothing has to be padded."""
    keys = keys or [0] * len(rows)
    results = [None] * len(rows)
    waiting = sorted(range(len(rows)), key=lambda place: keys[place])
    while waiting:
        first_key = keys[waiting[0]]
        batch = [place for place in waiting[:size] if keys[place] == first_key]
        answers = function([rows[place] for place in batch])
        for place, answer in zip(batch, answers, strict=True):
            results[place] = answer
        waiting = waiting[len(batch) :]  # sorted by key, so the batch is what stands in front
    return results


IMAGENET_MEAN = (123.675, 116.28, 103.53)  # grey levels, RGB
IMAGENET_STD = (58.395, 57.12, 57.375)
SIDES = (1333, 800)  # pixels: a picture is enlarged until its longer or shorter side reaches these


def detector_pixels(image: Image.Image, pad: int = 32):
    """(3, H, W) network input of one picture, and the (h, w) of it that is not padding.

    H and W are multiples of `pad`. As in mmdet 2.x, the picture is resized to SIDES with bilinear
    weights that do not widen when shrinking, and rounded to whole grey levels."""
    x = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float()
    ratio = min(SIDES[0] / max(image.size), SIDES[1] / min(image.size))
    h = int(x.shape[1] * ratio + 0.5)
    w = int(x.shape[2] * ratio + 0.5)
    x = F.interpolate(x[None], (h, w), mode="bilinear", antialias=False)[0].round()
    x = F.pad(x, (0, -w % pad, 0, -h % pad), value=128)
    mean = x.new_tensor(IMAGENET_MEAN)[:, None, None]
    std = x.new_tensor(IMAGENET_STD)[:, None, None]
    return (x - mean) / std, (h, w)


CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def normalised(pixels):
    """(H, W, 3) uint8 -> (3, H, W) by CLIP's mean and standard deviation; BLIP uses them too."""
    x = pixels.permute(2, 0, 1) / 255
    mean = x.new_tensor(CLIP_MEAN)[:, None, None]
    std = x.new_tensor(CLIP_STD)[:, None, None]
    return (x - mean) / std


def clip_pixels(image: Image.Image):
    """(3, 224, 224): OpenAI's preprocessing of PIL pictures.

    The short side becomes 224 pixels (bicubic), then the middle square is cut out."""
    image = image.convert("RGB")
    short = min(image.size)
    width = 224 if image.width == short else int(224 * image.width / short)
    height = 224 if image.height == short else int(224 * image.height / short)
    left = round((width - 224) / 2)
    top = round((height - 224) / 2)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    square = image.crop((left, top, left + 224, top + 224))
    return normalised(torch.from_numpy(np.array(square)))


def pixels_to_grid(box, size: tuple[float, float]) -> list[float]:
    """A box in pixels of a picture of `size` (w, h) -> the 0..1000 grid of `draw_boxes`."""
    x1, y1, x2, y2 = box
    width, height = size
    on_grid = (1000 * x1 / width, 1000 * y1 / height, 1000 * x2 / width, 1000 * y2 / height)
    return [round(edge, 1) for edge in on_grid]


# -------------------------------------------------------------------------------------------------
# CLIP: GenEval's colours (ViT-L/14), T2I-CompBench's captions (ViT-B/32)


class Clip:
    """Features of unit length: clip.images(pictures) and clip.texts(strings).

    Both are (N, D) float32 on the CPU. `flag` is the one of eval.py that names the `path`."""

    def __init__(self, path: str, flag: str, device="cpu", batch_size: int = 16):
        self.device = device
        self.batch_size = batch_size
        self.model = load(CLIPModel, path, flag).to(device).eval().requires_grad_(False)
        self.tokenizer = load(AutoTokenizer, path, flag)

    def images(self, images: list[Image.Image]):
        with torch.inference_mode():
            features = in_batches(self._image_features, images, self.batch_size)
            return F.normalize(torch.stack(features), dim=-1)

    def _image_features(self, batch: list[Image.Image]) -> list:
        pixels = torch.stack([clip_pixels(image) for image in batch])
        out = self.model.get_image_features(pixels.to(self.device, self.model.dtype))
        return list(check_finite(out.pooler_output.float().cpu(), "CLIP's answer to a picture"))

    def texts(self, texts: list[str]):
        tokens = self.tokenizer(
            texts, padding=True, truncation=True, max_length=77, return_tensors="pt"
        )
        with torch.inference_mode():
            out = self.model.get_text_features(**tokens.to(self.device))
            features = check_finite(out.pooler_output.float().cpu(), f"CLIP's answer to {texts}")
            return F.normalize(features, dim=-1)
