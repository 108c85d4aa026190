"""GenEval: rules against the official program, the detector against mmdet, pictures to verdicts."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import random_networks
import torch
from PIL import Image
from random_networks import noise
from safetensors.torch import load_file

from evaluation import geneval, networks
from toy import world as toy

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden_eval"
M2F = GOLDEN / "mask2former"
RULES = json.loads((GOLDEN / "geneval_rules.json").read_text())


# -------------------------------------------------------------------------------------------------
# The rules, against the official program


def test_geneval_verdicts():
    all_kinds = set()
    for case in RULES["cases"]:
        tag = case["metadata"]["tag"]
        kept = {}
        boxes = {}
        colors = {}
        for name, rows in case["detections"].items():
            places = geneval.kept([row[4] for row in rows], tag)
            if places:
                kept[name] = places
                boxes[name] = [rows[k][:4] for k in places]
                colors[name] = [case["colors"][name][k] for k in places]
        assert kept == case["expected"]["kept"], case["id"]
        faults = geneval.judge_geneval(case["metadata"], boxes, colors)
        kinds = {kind for kind, _ in faults}
        assert (not faults) == case["expected"]["correct"], case["id"]
        assert kinds == set(case["expected"]["fail"]), case["id"]
        all_kinds |= kinds
    assert len(RULES["cases"]) == 355 and len(all_kinds) == 5


def test_geneval_relations():
    for pair in RULES["pairs"]:
        assert sorted(geneval.relations(pair["a"], pair["b"])) == pair["relations"], pair
    assert len(RULES["pairs"]) == 250


def test_geneval_names():
    assert geneval.COLORS == RULES["colors"]
    assert {case["metadata"]["tag"] for case in RULES["cases"]} == set(geneval.TAGS)
    assert len(set(geneval.CLASSES)) == 80
    # COCO's numbers of the three that have other names there, and of the first and the last
    numbers = {0: "person", 64: "computer mouse", 65: "tv remote", 66: "computer keyboard"}
    for number, name in {**numbers, 79: "toothbrush"}.items():
        assert geneval.CLASSES[number] == name


# -------------------------------------------------------------------------------------------------
# The detector, against mmdet


def mmdet_state():
    state = load_file(M2F / "state_dict.safetensors")
    return {name: value.float() for name, value in state.items()}


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """The golden detector, from a .pth as mmdet publishes them: an old format, and more in it than
    tensors."""
    path = tmp_path_factory.mktemp("weights") / "mask2former.pth"
    extra = {"epoch": 50, "loss": np.float64(1.5), "time": np.zeros(2), "args": Path("config.py")}
    file = {"meta": extra, "state_dict": mmdet_state()}
    torch.save(file, path, _use_new_zipfile_serialization=False)
    return geneval.Mask2Former(str(path), config=random_networks.tiny_mask2former_config())


def test_both_generations_of_names():
    """mmdet 3.x, in which the official weights were saved again, calls attentions otherwise."""
    state = mmdet_state()
    state3 = {}
    for name, value in state.items():
        name = name.replace("ffns.0.", "ffn.")
        first = "cross_attn" if "transformer_decoder" in name else "self_attn"
        name = name.replace("attentions.0", first).replace("attentions.1", "self_attn")
        state3[name] = value
    assert state.keys() != state3.keys()
    converted = geneval.convert_mmdet(state)
    converted3 = geneval.convert_mmdet(state3)
    assert converted.keys() == converted3.keys()
    assert all(torch.equal(converted[name], converted3[name]) for name in converted)


@pytest.mark.parametrize("case", ["a", "b"])
def test_detector_is_mmdets(detector, case):
    golden = load_file(M2F / "expected.safetensors")
    sizes = json.loads((M2F / "config.json").read_text())["geometry"][case]
    pixels = golden[f"{case}.pixels_q"].float() / 32
    with torch.inference_mode():
        out = detector.model(pixel_values=pixels[None])
    classes = out.class_queries_logits[0]
    masks = out.masks_queries_logits[0]
    assert (classes - golden[f"{case}.class_logits"]).abs().max() < 1e-4
    assert (masks - golden[f"{case}.mask_logits"]).abs().max() < 5e-4
    found = geneval.fuse_masks(classes, masks, sizes["input"], sizes["valid"], sizes["original"])
    compare_instances(found, golden, case, box=1, area=2, score=1e-4)


def compare_instances(found, golden, case, box, area, score):
    """Equal scores may come in any order: compare by query and class."""
    queries = golden[f"{case}.queries"].tolist()
    labels = golden[f"{case}.labels"].tolist()
    wanted = {pair: k for k, pair in enumerate(zip(queries, labels, strict=True))}
    assert len(found) == len(wanted) == 100
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    for one in found:
        k = wanted.pop((one.query, geneval.CLASSES.index(one.name)))
        assert np.abs(np.array(one.box) - golden[f"{case}.boxes"][k].numpy()).max() <= box
        assert abs(int(one.mask.sum()) - int(golden[f"{case}.areas"][k])) <= area
        assert abs(one.score - float(golden[f"{case}.scores"][k])) <= score
    assert not wanted


@pytest.mark.parametrize("case", ["p0", "p1", "p2"])
def test_fusion_of_masks_is_mmdets(case):
    golden = load_file(M2F / "postprocess.safetensors")
    geometry = json.loads((M2F / "config.json").read_text())["geometry"][case]
    sizes = [geometry[key] for key in ("input", "valid", "original")]
    classes = golden[f"{case}.class_logits"]
    masks = golden[f"{case}.mask_logits"]
    found = geneval.fuse_masks(classes, masks, *sizes)
    compare_instances(found, golden, case, box=0, area=0, score=1e-6)
    packed = golden[f"{case}.masks_packed"].numpy()
    for one in found:
        mask = np.unpackbits(packed[one.query])[: one.mask.size].reshape(one.mask.shape)
        assert (one.mask == mask).all()
    few = geneval.fuse_masks(classes, masks, *sizes, threshold=0.3)
    above = [one[:3] for one in found if one.score > 0.3]
    assert above and [one[:3] for one in few if one.score > 0.3] == above


def test_nothing_is_found_where_no_class_is_likely():
    classes = torch.zeros(5, 81)  # 1 / 81 for each class
    assert geneval.fuse_masks(classes, torch.ones(5, 8, 8), (32, 32), (32, 32), (32, 32)) != []
    sizes = {"padded": (32, 32), "valid": (32, 32), "original": (32, 32)}
    assert geneval.fuse_masks(classes, torch.ones(5, 8, 8), **sizes, threshold=0.3) == []
    assert geneval.mask_box(torch.zeros(4, 6, dtype=torch.bool)) == (0, 0, 0, 0)


def test_network_input_is_mmdets(monkeypatch):
    golden = load_file(M2F / "preprocess.safetensors")
    spec = json.loads((M2F / "preprocess.json").read_text())
    monkeypatch.setattr(networks, "SIDES", tuple(spec["scale"]))
    std = torch.tensor(spec["std"])[:, None, None]
    for case in spec["images"]:
        path = ROOT / "tests" / "golden_hps" / Path(case["image"]["file"]).name
        tile = case["image"]["tile"]
        pixels = np.tile(np.array(Image.open(path).convert("RGB")), (tile, tile, 1))
        pixels, valid = networks.detector_pixels(Image.fromarray(pixels))
        assert [*pixels.shape[1:]] == case["input"] and [*valid] == case["valid"]
        sparse = pixels[:, :: spec["stride"], :: spec["stride"]]
        levels = (sparse - golden[case["name"] + ".uint8"]).abs() * std
        assert levels.max() < 1.01 and levels.mean() < 0.2  # one grey level, one pixel in eight


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_no_code_of_a_file_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for new_format in (False, True):
        file = {"meta": Bomb(), "state_dict": {}}
        torch.save(file, "bomb.pth", _use_new_zipfile_serialization=new_format)
        with pytest.raises(ValueError, match="--detector"):
            networks.load_tensors("bomb.pth", "detector")
    Path("text.pth").write_text("no weights")
    with pytest.raises(ValueError, match="--detector"):
        networks.load_tensors("text.pth", "detector")
    assert not Path("exploded").exists()


# -------------------------------------------------------------------------------------------------
# The networks: tiny random models of the real classes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with random_networks.small_networks(tmp_path_factory.mktemp("networks")) as folder:
        yield folder


def test_detector_batches_change_nothing(folder):
    pictures = [*noise(1), *noise(1, 96, 64, seed=1), *noise(1, seed=2)]
    detector = geneval.Mask2Former(str(folder / "detector"), batch_size=4)
    together = detector(pictures)
    for found, picture in zip(together, pictures, strict=True):
        assert len(found) > 0 and {one.name for one in found} == {"dog"}
        alone = [one.score for one in detector([picture])[0]]
        assert [one.score for one in found] == pytest.approx(alone, abs=1e-5)
        assert all(one.mask.shape == picture.size[::-1] and one.score > 0.3 for one in found)


def test_clip_is_transformers_clip(folder):
    """Preprocessing against transformers' own processor; the colour of a crop by hand."""
    from transformers import CLIPImageProcessorPil

    clip = networks.Clip(str(folder / "clip"), "clip", batch_size=2)
    processor = CLIPImageProcessorPil()
    for picture in [*noise(1, 300, 200), *noise(1, 61, 97)]:
        wanted = processor(picture, return_tensors="pt").pixel_values[0]
        assert (networks.clip_pixels(picture) - wanted).abs().max() < 1e-5
    crops = noise(5)
    names = ["dog", "dog", "cat", "dog", "cat"]
    found = geneval.ClipColors(clip)(crops, names)
    for crop, name, color in zip(crops, names, found, strict=True):
        scores = []
        for candidate in geneval.COLORS:
            said = [
                f"a photo of a {candidate} {name}",
                f"a photo of a {candidate}-colored {name}",
                f"a photo of a {candidate} object",
            ]
            text = clip.texts(said).mean(0)
            scores.append(float(clip.images([crop])[0] @ text / text.norm()))
        assert color == geneval.COLORS[int(np.argmax(scores))]


# -------------------------------------------------------------------------------------------------
# Pictures to verdicts, with a detector and colours that are read off the pixels of the toy


class ExactDetector:
    """Toy objects under COCO's names, the confidence as asked for."""

    NAMES = {"ball": "sports ball", "cube": "book", "cone": "kite"}

    def __init__(self, score=0.95):
        self.score = score

    def __call__(self, images):
        return [self.instances(image) for image in images]

    def instances(self, image):
        found = []
        for name, *edges in toy.detect(image):
            x1, y1, x2, y2 = (round(edge * toy.SIZE / 1000) for edge in edges)
            mask = np.zeros((toy.SIZE, toy.SIZE), bool)
            mask[y1:y2, x1:x2] = True
            name = self.NAMES[name.split()[1]]
            found.append(geneval.Instance(name, self.score, (x1, y1, x2, y2), mask, query=0))
        return found


def exact_colors(crops, names):
    """The palette's colour that is nearest to the middle of each crop."""
    palette = {}
    for name, color in toy.COLORS.items():
        if name in geneval.COLORS:
            palette[name] = np.array(color)
    colors = []
    for crop in crops:
        rgb = np.array(crop.getpixel((crop.width // 2, crop.height // 2)))
        distance = {name: np.abs(color - rgb).sum() for name, color in palette.items()}
        colors.append(min(distance, key=distance.get))
    return colors


SCENE = toy.draw_scene(["red ball", "blue cube"], [(0, 0, 3), (5, 4, 3)])


def clause(name, count=1, **more):
    return {"class": name, "count": count, **more}


def look(scene, include, exclude=(), score=0.95, tag="two_object"):
    """The row of one picture."""
    judge = geneval.GenEval(ExactDetector(score), exact_colors)
    line = {"include": include, "exclude": list(exclude), "tag": tag}
    (row,) = judge([scene], [line])
    assert row["score"] == float(not row["reason"])
    assert all(0 <= min(box[1:]) and max(box[1:]) <= 1000 for box in row["boxes"])
    return row


def test_pictures_to_verdicts():
    ball = "sports ball"
    book = clause("book")
    cases = [  # included clauses, excluded ones, what is wrong
        ([book], [], ""),
        ([clause("kite"), book], [], "kite: 0 found, 1 wanted"),
        ([clause(ball, color="red"), clause("book", color="blue")], [], ""),
        ([clause(ball, color="blue")], [], "sports ball: red, not blue"),
        ([book, clause(ball, position=["above", 0])], [], ""),
        (
            [book, clause(ball, position=["right of", 0])],
            [],
            "sports ball: not right of the book",
        ),
        ([book], [clause(ball)], "sports ball: 1 found, fewer than 1 wanted"),
    ]
    for include, exclude, wrong in cases:
        assert look(SCENE, include, exclude)["reason"] == wrong
    # counting needs more confidence
    assert look(SCENE, [book], score=0.8)["boxes"][0][0] == "book 0.80"
    assert look(SCENE, [book], score=0.8, tag="counting")["score"] == 0


def test_colours_come_back_to_their_pictures():
    """Pictures that ask for colours between others that do not: one call, no mix-up."""
    other = toy.draw_scene(["green ball", "yellow cube"], [(0, 0, 3), (5, 4, 3)])
    colored = {"include": [clause("sports ball", color="green")], "tag": "colors"}
    plain = {"include": [clause("book")], "tag": "single_object"}
    judge = geneval.GenEval(ExactDetector(), exact_colors)
    rows = judge([SCENE, SCENE, other], [colored, plain, colored])
    assert [row["score"] for row in rows] == [0.0, 1.0, 1.0]
    labels = [row["boxes"][0][0] for row in rows]
    assert labels == ["red sports ball 0.95", "book 0.95", "green sports ball 0.95"]


def test_what_clip_sees():
    mask = np.zeros((32, 32), bool)
    mask[4:8, 4:8] = True
    crop = geneval.colour_crop(SCENE, (2, 2, 12, 10), mask)
    assert crop.size == (10, 8)
    assert crop.getpixel((0, 0)) == crop.getpixel((9, 7)) == (0x99,) * 3
    assert crop.getpixel((3, 3)) == SCENE.getpixel((5, 5))
