"""Evaluation: official numbers for every rule, the networks as tiny random models of the real classes, the command end
to end.

    python -m pytest tests/test_eval.py
    python tests/test_eval.py FOLDER [tiny|full]    # networks with random weights, for eval.py --bench speed
"""

import dataclasses
import inspect
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import eval as evaluation  # noqa: E402
import gotr1  # noqa: E402
import rewards  # noqa: E402
from benchmarks import (
    compbench,  # noqa: E402
    geneval,  # noqa: E402
)
from benchmarks import stats as report  # noqa: E402
from toy import world as toy  # noqa: E402

GOLDEN = ROOT / "tests" / "golden_eval"
M2F = GOLDEN / "mask2former"
RULES = json.loads((GOLDEN / "geneval_rules.json").read_text())
COMP = json.loads((GOLDEN / "compbench.json").read_text())

# ---------------------------------------------------------------------------------------------------------------------
# GenEval's rules, against the official program


def test_geneval_verdicts():
    kinds = set()
    for case in RULES["cases"]:
        tag, found = case["metadata"]["tag"], case["detections"]
        kept = {name: geneval.kept([row[4] for row in rows], tag) for name, rows in found.items()}
        kept = {name: places for name, places in kept.items() if places}
        assert kept == case["expected"]["kept"], case["id"]
        boxes = {name: [found[name][k][:4] for k in places] for name, places in kept.items()}
        colors = {name: [case["colors"][name][k] for k in places] for name, places in kept.items()}
        faults = geneval.judge_geneval(case["metadata"], boxes, colors)
        assert (not faults) == case["expected"]["correct"], case["id"]
        assert {kind for kind, _ in faults} == set(case["expected"]["fail"]), case["id"]
        kinds |= {kind for kind, _ in faults}
    assert len(RULES["cases"]) == 355 and len(kinds) == 5


def test_geneval_relations():
    for pair in RULES["pairs"]:
        assert sorted(geneval.relations(pair["a"], pair["b"])) == pair["relations"], pair
    assert len(RULES["pairs"]) == 250


def test_geneval_names():
    assert geneval.COLORS == RULES["colors"]
    assert len(set(geneval.CLASSES)) == 80
    assert {name for case in RULES["cases"] for name in case["detections"]} <= set(geneval.CLASSES)
    assert {case["metadata"]["tag"] for case in RULES["cases"]} == set(geneval.TAGS)
    # COCO's numbers of the three that have other names there, and of the first and the last
    numbers = {
        "person": 0,
        "computer mouse": 64,
        "tv remote": 65,
        "computer keyboard": 66,
        "toothbrush": 79,
    }
    assert {name: geneval.CLASSES.index(name) for name in numbers} == numbers


# ---------------------------------------------------------------------------------------------------------------------
# GenEval's detector, against mmdet


def tiny_mask2former_config():
    from transformers import Mask2FormerConfig, SwinConfig

    size = json.loads((M2F / "config.json").read_text())["model"]
    keys = ("embed_dim", "depths", "num_heads", "window_size")
    stages = ["stage1", "stage2", "stage3", "stage4"]
    swin = SwinConfig(**{key: size[key] for key in keys}, out_features=stages)
    return Mask2FormerConfig(
        backbone_config=swin,
        num_labels=80,
        num_queries=size["queries"],
        feature_size=size["feature"],
        mask_feature_size=size["feature"],
        hidden_dim=size["feature"],
        num_attention_heads=size["heads"],
        encoder_layers=size["enc_layers"],
        encoder_feedforward_dim=size["enc_ffn"],
        decoder_layers=size["dec_layers"] + 1,
        dim_feedforward=size["dec_ffn"],
    )


def mmdet_state():
    return {
        name: value.float() for name, value in load_file(M2F / "state_dict.safetensors").items()
    }


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """The golden detector, from a .pth as mmdet publishes them: an old format, and more in it than tensors."""
    path = tmp_path_factory.mktemp("weights") / "mask2former.pth"
    extra = {"epoch": 50, "loss": np.float64(1.5), "time": np.zeros(2), "args": Path("config.py")}
    file = {"meta": extra, "state_dict": mmdet_state()}
    torch.save(file, path, _use_new_zipfile_serialization=False)
    return geneval.Mask2Former(str(path), config=tiny_mask2former_config())


def as_mmdet3(name):
    """The name of the same tensor in mmdet 3.x."""
    name = name.replace("ffns.0.", "ffn.")
    if "transformer_decoder" in name:
        return name.replace("attentions.0", "cross_attn").replace("attentions.1", "self_attn")
    return name.replace("attentions.0", "self_attn")


def test_both_generations_of_names():
    old, new = mmdet_state(), {as_mmdet3(name): value for name, value in mmdet_state().items()}
    assert old.keys() != new.keys()
    old, new = geneval.convert_mmdet(old), geneval.convert_mmdet(new)
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)


@pytest.mark.parametrize("case", ["a", "b"])
def test_detector_is_mmdets(detector, case):
    golden, sizes = (
        load_file(M2F / "expected.safetensors"),
        json.loads((M2F / "config.json").read_text())["geometry"],
    )
    pixels = golden[f"{case}.pixels_q"].float() / 32
    with torch.inference_mode():
        out = detector.model(pixel_values=pixels[None])
    classes, masks = out.class_queries_logits[0], out.masks_queries_logits[0]
    assert (classes - golden[f"{case}.class_logits"]).abs().max() < 1e-4
    assert (masks - golden[f"{case}.mask_logits"]).abs().max() < 5e-4
    sizes = sizes[case]
    found = geneval.fuse_masks(classes, masks, sizes["input"], sizes["valid"], sizes["original"])
    compare_instances(found, golden, case, box=1, area=2, score=1e-4)


def compare_instances(found, golden, case, box, area, score):
    """Equal scores may come in any order: compare by query and class."""
    wanted = zip(*(golden[f"{case}.{key}"].tolist() for key in ("queries", "labels")), strict=True)
    wanted = {pair: k for k, pair in enumerate(wanted)}
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
    sizes = json.loads((M2F / "config.json").read_text())["geometry"]
    sizes = [sizes[case][key] for key in ("input", "valid", "original")]
    found = geneval.fuse_masks(
        golden[f"{case}.class_logits"], golden[f"{case}.mask_logits"], *sizes
    )
    compare_instances(found, golden, case, box=0, area=0, score=1e-6)
    packed = golden[f"{case}.masks_packed"].numpy()
    for one in found:
        mask = np.unpackbits(packed[one.query])[: one.mask.size].reshape(one.mask.shape)
        assert (one.mask == mask).all()
    few = geneval.fuse_masks(
        golden[f"{case}.class_logits"], golden[f"{case}.mask_logits"], *sizes, threshold=0.3
    )
    above = [one for one in found if one.score > 0.3]
    assert above and [one[:3] for one in few if one.score > 0.3] == [one[:3] for one in above]


def test_network_input_is_mmdets(monkeypatch):
    golden, spec = (
        load_file(M2F / "preprocess.safetensors"),
        json.loads((M2F / "preprocess.json").read_text()),
    )
    monkeypatch.setattr(geneval, "SIDES", tuple(spec["scale"]))
    for case in spec["images"]:
        image = Image.open(
            ROOT / "tests" / "golden_hps" / Path(case["image"]["file"]).name
        ).convert("RGB")
        image = Image.fromarray(np.tile(np.array(image), (case["image"]["tile"],) * 2 + (1,)))
        pixels, valid = geneval.detector_pixels(image)
        assert [*pixels.shape[1:]] == case["input"] and [*valid] == case["valid"]
        gap = (
            pixels[:, :: spec["stride"], :: spec["stride"]] - golden[case["name"] + ".uint8"]
        ).abs()
        levels = gap * torch.tensor(spec["std"])[:, None, None]
        assert levels.max() < 1.01 and levels.mean() < 0.2  # one grey level, one pixel in eight


# ---------------------------------------------------------------------------------------------------------------------
# T2I-CompBench's rules, against the official programs


def test_blip_arithmetic():
    for case in COMP["blip_vqa"]["cases"]:
        assert compbench.questions(case["chunks"]) == case["questions"]
        phrases = [compbench.phrase_score(*pair) for pair in case["logits"]]
        assert [f"{score:.4f}" for score in phrases] == case["phrase_scores"]
        assert compbench.product(phrases) == float(case["score"])
    assert len(COMP["blip_vqa"]["cases"]) == 32
    for case in COMP["blip_vqa"]["questions"]:
        assert compbench.questions([case["phrase"]]) == [case["question"]]
    assert set(compbench.NO_PHRASES) == set(COMP["blip_vqa"]["dropped_phrases"])


def test_spatial_arithmetic():
    for case in COMP["spatial_2d"]["cases"]:
        assert compbench.relation_of(case["prompt"]) == case["relation"]
        found = [(row["label"], row["score"], row["box"]) for row in case["detections"]]
        position, score = compbench.spatial_score(case["objects"], case["relation"], found)
        assert (position is None) == (case["position"] is None)
        assert position is None or position == pytest.approx(case["position"], abs=1e-6)
        assert score == pytest.approx(case["score"], abs=1e-6), case
    for case in COMP["spatial_2d"]["relations"]:
        assert compbench.relation_of(case["prompt"]) == case["relation"]
    for case in COMP["spatial_2d"]["complex_objects"]:
        assert compbench.complex_objects(case["tokens"], case["pos"]) == case["objects"]
    for tagged, objects in (  # by hand, from the official loop
        ("cup/NOUN on/ADP the/DET left/ADJ side/NOUN of/ADP the/DET plate/NOUN", ["cup", "side"]),
        (
            "dog/NOUN near/ADP the/DET tree/NOUN and/CCONJ next/ADV to/ADP the/DET house/NOUN",
            None,
        ),  # four objects
        ("cat/NOUN near/ADP the/DET Teddy/PROPN Bear/PROPN ./PUNCT", ["cat", "Bear"]),
        ("cat/NOUN near/ADP the/DET Teddy/PROPN Bear/PROPN", None),  # nothing follows the run
        ("Tom/PROPN near/ADP the/DET Eiffel/PROPN tower/NOUN", ["Tom", "tower"]),
    ):
        words, pos = zip(*(pair.rsplit("/", 1) for pair in tagged.split()), strict=True)
        assert compbench.complex_objects(list(words), list(pos)) == objects, tagged
    assert len(COMP["spatial_2d"]["cases"]) == 141


def test_three_in_one_arithmetic():
    case, scores = COMP["three_in_one"], []
    for k, wanted in enumerate(case["score"]):
        parts = (case[part][k] for part in ("attribute", "spatial", "action"))
        prompt = case["prompts"][k // case["images_per_prompt"]]
        score = compbench.three_in_one(
            prompt, *parts, case["spatial_prompts"], case["action_prompts"]
        )
        assert score == pytest.approx(wanted, abs=1e-6), prompt
        scores.append(score)
    assert len(scores) == 70 and np.mean(scores) == pytest.approx(case["mean"])


# ---------------------------------------------------------------------------------------------------------------------
# The networks: tiny random models of the real classes


def save_tokenizer(folder, start, end):
    """A tokenizer of letters, digits and a full stop; every other character is a space."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {
        "[PAD]": 0,
        start: 101,
        end: 102,
        **{letter: 1000 + k for k, letter in enumerate(LETTERS)},
    }
    letters = Tokenizer(models.WordLevel(vocab, unk_token="[PAD]"))
    letters.normalizer = normalizers.Lowercase()
    spaces = pre_tokenizers.Split(Regex(r"[^a-z0-9.]"), "removed")
    letters.pre_tokenizer = pre_tokenizers.Sequence([spaces, pre_tokenizers.Split("", "isolated")])
    ends = [(start, 101), (end, 102)]
    letters.post_processor = processors.TemplateProcessing(f"{start} $A {end}", special_tokens=ends)
    names = {"cls_token": start, "sep_token": end, "eos_token": end, "pad_token": "[PAD]"}
    PreTrainedTokenizerFast(tokenizer_object=letters, **names).save_pretrained(folder)


LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789."


def save_networks(folder, size="tiny"):
    """One folder a network, as eval.py wants them. The detector sees dogs everywhere and the rest sees noise."""
    import transformers as tf

    tiny, folder = size == "tiny", Path(folder)
    torch.manual_seed(0)
    text = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    text = text if tiny else {}
    full = {"clip": (1024, 24, 16, 14), "clip_b32": (768, 12, 12, 32)}
    for name, (width, layers, heads, patch) in full.items():
        wide = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
        vision = (text if tiny else wide | {"intermediate_size": 4 * width}) | {
            "patch_size": 32 if tiny else patch
        }
        words = text | {"vocab_size": 2000, "bos_token_id": 101, "eos_token_id": 102}
        config = tf.CLIPConfig(text_config=words, vision_config=vision)
        tf.CLIPModel(config).save_pretrained(folder / name)
        save_tokenizer(folder / name, "[CLS]", "[SEP]")
    vision = text | {"image_size": 64} if tiny else {"image_size": 384}
    words = (text | {"encoder_hidden_size": 32} if tiny else {}) | {"vocab_size": 30524}
    config = tf.BlipConfig(text_config=words, vision_config=vision)
    blip = tf.BlipForQuestionAnswering(config)
    for parameter in (
        blip.parameters()
    ):  # transformers starts a model with weights so small that it ignores its input
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.2)
    blip.save_pretrained(folder / "blip")
    save_tokenizer(folder / "blip", "[CLS]", "[SEP]")
    if tiny:
        config = tiny_mask2former_config()
    else:
        stages = ["stage1", "stage2", "stage3", "stage4"]
        config = tf.SwinConfig(depths=[2, 2, 18, 2], window_size=7, out_features=stages)
        config = tf.Mask2FormerConfig(backbone_config=config, num_labels=80)
    detector = tf.Mask2FormerForUniversalSegmentation(config)
    detector.class_predictor.bias.data[geneval.CLASSES.index("dog")] = 9
    for name, parameter in detector.named_parameters():
        if name.endswith(("mask_projection.bias", "mask_embedder.2.0.bias")):
            parameter.data += 1  # no mask is empty
    detector.save_pretrained(folder / "detector")
    small = {
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
    }
    small |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_queries": 20}
    words = tf.BertConfig(**(text if tiny else {}), vocab_size=2000)
    swin = (
        {"embed_dim": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8]}
        if tiny
        else {"window_size": 7}
    )
    swin = tf.SwinConfig(**swin, out_indices=[2, 3, 4])
    config = tf.GroundingDinoConfig(
        backbone_config=swin, text_config=words, **(small if tiny else {})
    )
    tf.GroundingDinoForObjectDetection(config).save_pretrained(folder / "gdino")
    save_tokenizer(folder / "gdino", "[CLS]", "[SEP]")


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """The folders; and from here on the detectors see smaller pictures, for speed."""
    folder, official = tmp_path_factory.mktemp("networks"), geneval.SIDES
    assert official == (1333, 800)
    save_networks(folder)
    geneval.SIDES = (266, 160)
    yield folder
    geneval.SIDES = official


def noise(count, width=64, height=64, seed=0):
    array = np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8)
    return [Image.fromarray(one) for one in array]


def test_detector_batches_change_nothing(networks):
    pictures = [*noise(1), *noise(1, 96, 64, seed=1), *noise(1, seed=2)]
    detector = geneval.Mask2Former(str(networks / "detector"), batch_size=4)
    together, alone = detector(pictures), [detector([picture])[0] for picture in pictures]
    assert all(len(found) > 0 and {one.name for one in found} == {"dog"} for found in together)
    for some, others, picture in zip(together, alone, pictures, strict=True):
        assert [one.score for one in some] == pytest.approx([one.score for one in others], abs=1e-5)
        assert all(one.mask.shape == picture.size[::-1] and one.score > 0.3 for one in some)


def test_clip_is_transformers_clip(networks):
    """Preprocessing against transformers' own processor; features of unit length; the colour of a crop by hand."""
    from transformers import CLIPImageProcessorPil

    clip = geneval.Clip(str(networks / "clip"), "clip", batch_size=2)
    processor = CLIPImageProcessorPil()
    for picture in [*noise(1, 300, 200), *noise(1, 61, 97)]:
        wanted = processor(picture, return_tensors="pt").pixel_values[0]
        assert (geneval.clip_pixels(picture) - wanted).abs().max() < 1e-5
    crops, names = noise(5), ["dog", "dog", "cat", "dog", "cat"]
    found = clip.colors(crops, names)
    for crop, name, color in zip(crops, names, found, strict=True):
        scores = []
        for candidate in geneval.COLORS:
            said = [f"a photo of a {candidate} {name}", f"a photo of a {candidate}-colored {name}"]
            text = clip.texts([*said, f"a photo of a {candidate} object"]).mean(0)
            scores.append(float(clip.images([crop])[0] @ text / text.norm()))
        assert color == geneval.COLORS[int(np.argmax(scores))]
    cosines = compbench.cosines(clip, crops, names)
    assert cosines[2] == pytest.approx(
        float(clip.images([crops[2]])[0] @ clip.texts(["cat"])[0]), abs=1e-5
    )


def test_blip_pads_nothing(networks):
    """Questions of several lengths in one call get what each gets alone. With padding they would not: transformers
    lets the answer look at it (the last assertion fails the day that is mended)."""
    blip = compbench.BlipVQA(str(networks / "blip"), batch_size=3)
    pictures = noise(4)
    asked = [
        ["a red ball?", "cat?"],
        [],
        ["a dog?", "a very long question about dogs?", "cat?"],
        ["cat?"],
    ]
    together = blip(pictures, asked)
    assert [len(some) for some in together] == [2, 0, 3, 1] and len(
        {s for some in together for s in some}
    ) > 3
    for picture, some, scores in zip(pictures, asked, together, strict=True):
        for question, score in zip(some, scores, strict=True):
            assert blip([picture], [[question]])[0][0] == pytest.approx(score, abs=1.1e-4)
    seen = blip._see(pictures[:1])
    ids = blip.tokenizer("cat?").input_ids
    with torch.inference_mode():
        padded = blip._answer([(0, [*ids, *[0] * 20])], seen)
        assert abs(padded[0] - blip._answer([(0, ids)], seen)[0]) > 1e-3


def test_blip_from_the_official_file(networks, tmp_path):
    """The same weights under the names of salesforce/BLIP give the same answers; a tensor too few is refused."""
    blip = compbench.BlipVQA(str(networks / "blip"))
    names = {
        "vision_model.embeddings.class_embedding": "visual_encoder.cls_token",
        "vision_model.embeddings.position_embedding": "visual_encoder.pos_embed",
        "vision_model.embeddings.patch_embedding.": "visual_encoder.patch_embed.proj.",
        "vision_model.post_layernorm.": "visual_encoder.norm.",
        "vision_model.encoder.layers.": "visual_encoder.blocks.",
        ".self_attn.projection.": ".attn.proj.",
        ".self_attn.qkv.": ".attn.qkv.",
        ".layer_norm1.": ".norm1.",
        ".layer_norm2.": ".norm2.",
    }
    state = {"text_encoder.embeddings.position_ids": torch.arange(512)[None]}
    for name, value in blip.model.state_dict().items():
        for new, old in names.items():
            name = name.replace(new, old)
        state[name] = value
    torch.save({"model": state, "epoch": 9}, tmp_path / "blip.pth")
    arguments = {"tokenizer": str(networks / "blip"), "config": blip.model.config}
    official = compbench.BlipVQA(str(tmp_path / "blip.pth"), **arguments)
    assert "visual_encoder.blocks.1.attn.qkv.weight" in state
    assert official(noise(2), [["a dog?"]] * 2) == blip(noise(2), [["a dog?"]] * 2)
    del state["visual_encoder.norm.bias"]
    torch.save({"model": state}, tmp_path / "blip.pth")
    with pytest.raises(ValueError, match="do not fit"):
        compbench.BlipVQA(str(tmp_path / "blip.pth"), **arguments)


def test_blip_is_transformers_generate(networks):
    """The first answer token that transformers would generate has the probabilities that the score is made of."""
    blip = compbench.BlipVQA(str(networks / "blip"))
    assert (
        blip.model.vision_model.post_layernorm.eps == 1e-6
    )  # the official one, whatever the folder says
    picture, ids = noise(1)[0], blip.tokenizer("a red ball?", return_tensors="pt").input_ids
    ids[:, 0] = 30523
    small = np.array(picture.resize((480, 480), Image.Resampling.BICUBIC))
    out = blip.model.generate(
        input_ids=ids,
        pixel_values=geneval.normalised(torch.from_numpy(small))[None],
        attention_mask=torch.ones_like(ids),
        interpolate_pos_encoding=True,
        bos_token_id=30522,
        max_new_tokens=1,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    yes, no = out.logits[0][0, [2748, 2053]].tolist()
    assert blip([picture], [["a red ball?"]]) == [[compbench.phrase_score(yes, no)]]


def test_grounding_dino_frame_and_names(networks, monkeypatch):
    """Boxes in a frame of 479 pixels, best first, labels from the two names only; batched or alone the same."""
    monkeypatch.setattr(compbench.GroundingDino, "THRESHOLD", 0.0)
    gdino = compbench.GroundingDino(str(networks / "gdino"), batch_size=4)
    pictures, names = (
        [*noise(2, 96, 64), *noise(1)],
        [["cat", "tree"], ["cat", "tree"], ["dog", "car"]],
    )
    together = gdino(pictures, names)
    for found, picture, pair in zip(together, pictures, names, strict=True):
        assert {label for label, _, _ in found} == set(pair) and len(found) == 40
        assert [row[1] for row in found] == sorted((row[1] for row in found), reverse=True)
        alone = gdino([picture], [pair])[0]
        assert [row[1] for row in alone] == pytest.approx([row[1] for row in found], abs=1e-4)
    centres = [((x1 + x2) / 2, (y1 + y2) / 2) for _, _, (x1, y1, x2, y2) in together[0]]
    assert 320 < max(x for x, _ in centres) < 480 and max(y for _, y in centres) < 480 * 64 / 96


# ---------------------------------------------------------------------------------------------------------------------
# GenEval's pictures to verdicts, with a detector and a CLIP that read the pixels of the toy


class ExactDetector:
    """Toy objects under COCO's names, the confidence as asked for."""

    def __init__(self, score=0.95):
        self.score = score

    def __call__(self, images):
        names, found = {"ball": "sports ball", "cube": "book", "cone": "kite"}, []
        for image in images:
            found.append([])
            for name, *edges in toy.detect(image):
                x1, y1, x2, y2 = (round(edge * toy.SIZE / 1000) for edge in edges)
                mask = np.zeros((toy.SIZE, toy.SIZE), bool)
                mask[y1:y2, x1:x2] = True
                found[-1].append(
                    geneval.Instance(names[name.split()[1]], self.score, (x1, y1, x2, y2), mask, 0)
                )
        return found


class ExactClip:
    def colors(self, crops, names):
        palette = {
            name: np.array(color) for name, color in toy.COLORS.items() if name in geneval.COLORS
        }
        centres = [np.array(crop.getpixel((crop.width // 2, crop.height // 2))) for crop in crops]
        return [min(palette, key=lambda name: np.abs(palette[name] - rgb).sum()) for rgb in centres]


def clause(name, count=1, **more):
    return {"class": name, "count": count, **more}


SCENE = toy.draw_scene(["red ball", "blue cube"], [(0, 0, 3), (5, 4, 3)])
VERDICTS = {  # clauses -> what is wrong
    "one": ({"include": [clause("book")]}, ""),
    "missing": ({"include": [clause("kite"), clause("book")]}, "kite: 0 found, 1 wanted"),
    "colours": (
        {"include": [clause("sports ball", color="red"), clause("book", color="blue")]},
        "",
    ),
    "swapped": (
        {"include": [clause("sports ball", color="blue"), clause("book", color="red")]},
        "sports ball: red, not blue; book: blue, not red",
    ),
    "place": ({"include": [clause("book"), clause("sports ball", position=["above", 0])]}, ""),
    "wrong place": (
        {"include": [clause("book"), clause("sports ball", position=["right of", 0])]},
        "sports ball: not right of the book",
    ),
    "too many": (
        {"include": [clause("book")], "exclude": [clause("sports ball", 1)]},
        "sports ball: 1 found, fewer than 1 wanted",
    ),
}


@pytest.mark.parametrize("case", VERDICTS)
def test_pictures_to_verdicts(case):
    line, wrong = VERDICTS[case]
    judge = geneval.GenEval(ExactDetector(), ExactClip())
    row = judge([SCENE], [line | {"tag": "two_object"}])[0]
    assert row["reason"] == wrong and row["score"] == float(not wrong)
    assert all(0 <= min(box[1:]) and max(box[1:]) <= 1000 for box in row["boxes"])


def test_counting_needs_more_confidence():
    judge = geneval.GenEval(ExactDetector(0.8), ExactClip())
    line = {"include": [clause("book")]}
    rows = judge([SCENE] * 2, [line | {"tag": tag} for tag in ("counting", "two_object")])
    assert [row["score"] for row in rows] == [0.0, 1.0]
    assert [box[0] for box in rows[1]["boxes"]] == ["book 0.80"]


def test_what_clip_sees():
    mask = np.zeros((32, 32), bool)
    mask[4:8, 4:8] = True
    crop = geneval.colour_crop(SCENE, (2, 2, 12, 10), mask)
    assert crop.size == (10, 8)
    assert crop.getpixel((0, 0)) == crop.getpixel((9, 7)) == (0x99,) * 3
    assert crop.getpixel((3, 3)) == SCENE.getpixel((5, 5))


# ---------------------------------------------------------------------------------------------------------------------
# The phrases of a prompt

CACHE = {
    "made by": "spaCy test",
    "prompts": {
        "The red book is next to the kite.": {
            "chunks": ["The red book", "the kite"],
            "tokens": ["The", "red", "book", "is", "next", "to", "the", "kite", "."],
            "pos": ["DET", "ADJ", "NOUN", "AUX", "ADV", "ADP", "DET", "NOUN", "PUNCT"],
        }
    },
}


def test_templates_then_cache_then_an_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", None)
    path, long = tmp_path / "phrases.json", "The red book is next to the kite."
    path.write_text(json.dumps(CACHE))
    simple, placed = (
        "a red apple and a metal-framed green bench.",
        "a dog on the left of a wine glass",
    )
    parses, source = compbench.parse_prompts([simple, placed, long], str(path))
    assert parses[simple]["chunks"] == ["a red apple", "a metal-framed green bench"]
    assert compbench.spatial_objects(parses[placed]) == ["dog", "wine glass"]
    assert compbench.questions(parses[placed]["chunks"]) == ["a dog?", "a wine glass?"]
    assert (
        parses[long] == CACHE["prompts"][long] and source == f"templates 2, {path} (spaCy test) 1"
    )
    assert compbench.without_adjectives(parses[long]) == "The book is next to the kite ."
    with pytest.raises(ValueError, match="en_core_web_sm"):  # a template knows no parts of speech
        compbench.parse_prompts([simple], str(path), in_full=(simple,))
    (tmp_path / "other.json").write_text('["a list"]')
    with pytest.raises(ValueError, match="no file of noun phrases"):
        compbench.parse_prompts([simple], str(tmp_path / "other.json"))
    for hard in (
        "a dog and a cat and a bird",
        "a cup of tea and a spoon",
        "the dog",
        "a red apple on a table",
    ):
        with pytest.raises(ValueError, match="en_core_web_sm"):
            compbench.parse_prompts([simple, hard])


def test_spacy_comes_first_and_fills_the_cache(tmp_path, monkeypatch):
    """A stand-in with spaCy's interface: the model itself cannot be had from a package index."""
    token = types.SimpleNamespace

    class Doc(list):
        noun_chunks = [token(text="a red apple"), token(text="a bench")]

    words = [
        ("a", "DET"),
        ("red", "ADJ"),
        ("apple", "NOUN"),
        ("and", "CCONJ"),
        ("a", "DET"),
        ("bench", "NOUN"),
    ]
    doc = Doc(token(text=text, pos_=pos) for text, pos in words)
    nlp = token(meta={"version": "3.8.0"}, pipe=lambda prompts: [doc for _ in prompts])
    monkeypatch.setitem(sys.modules, "spacy", token(__version__="3.8.18", load=lambda name: nlp))
    path, prompt = tmp_path / "phrases.json", "A red apple & a bench"
    parses, source = compbench.parse_prompts([prompt], str(path))
    assert source == "spaCy 3.8.18 en_core_web_sm 3.8.0" and parses[prompt]["pos"][1] == "ADJ"
    assert compbench.questions(parses[prompt]["chunks"]) == ["a red apple?", "a bench?"]
    assert compbench.spatial_objects(parses[prompt]) == ["apple", "bench"]
    compbench.parse_prompts(["another category's prompt"], str(path))  # is added to the file
    monkeypatch.setitem(sys.modules, "spacy", None)
    again, source = compbench.parse_prompts([prompt], str(path))
    assert again == parses and "spaCy 3.8.18" in source


# ---------------------------------------------------------------------------------------------------------------------
# What a table may claim


def rows_of(values, name="x"):
    """values (prompts, samples) -> rows."""
    return [
        {"index": i, "prompt": f"p{i}", "sample": k, "measures": {name: float(value)}}
        for i, some in enumerate(values) for k, value in enumerate(some)
    ]  # fmt: skip


def test_interval_of_independent_and_of_equal_samples():
    """One sample a prompt: the binomial standard error. Four equal ones say no more than one: the interval stays."""
    hits = np.arange(200)[:, None] % 5 == 0
    one, four = (
        report.intervals(rows_of(values))["x"] for values in (hits, np.repeat(hits, 4, axis=1))
    )
    error = 1.96 * np.sqrt(0.2 * 0.8 / 200)
    assert one["score"] == four["score"] == pytest.approx(0.2)
    assert one["high"] - one["low"] == pytest.approx(2 * error, rel=0.1)
    assert four["high"] - four["low"] == pytest.approx(2 * error, rel=0.1)
    assert (one["prompts"], one["samples"], four["samples"]) == (200, 200, 800)


def test_overall_is_the_mean_of_the_tags():
    """Not of the pictures: a tag with few prompts weighs as much as one with many."""
    rows = rows_of(np.ones((10, 4)), "counting") + rows_of(np.zeros((90, 4)), "colors")
    summary = report.intervals(rows, geneval.TAGS)
    assert summary["overall"]["score"] == 0.5 and summary["overall"]["samples"] == 400
    assert list(summary) == ["counting", "colors", "overall"] and "overall" not in report.intervals(
        rows
    )
    uneven = rows_of([[1, 1, 1], [0]], "counting")  # over pictures, not over prompts
    assert report.intervals(uneven)["counting"]["score"] == 0.75


def test_paired_test_is_exact_and_honest():
    """Three differences of one sign: 2 of 8 sign patterns are as extreme. And of runs that are the same but for luck,
    about one in twenty is called different."""
    assert report.sign_flips([np.array([0.1, 0.2, 0.4])]) == pytest.approx(2 / 8, abs=0.03)
    assert report.sign_flips([np.zeros(5)]) == 1.0
    rng = np.random.default_rng(0)
    gaps = [(rng.random(60) < 0.5).astype(float) - (rng.random(60) < 0.5) for _ in range(200)]
    assert 0.01 <= np.mean([report.sign_flips([gap]) < 0.05 for gap in gaps]) <= 0.1
    assert report.holm([0.01, 0.04, 0.03, 0.9]) == [True, False, False, False]
    assert report.holm([0.04, 0.03, 0.001]) == [False, False, True]
    assert report.holm([0.02, 0.001]) == [True, True]


def test_compare_finds_what_pairing_shows():
    """Prompts differ far more than runs: unpaired intervals overlap, the paired test sees the difference."""
    rng = np.random.default_rng(0)
    level = rng.random((100, 1)) * 0.8
    a = level + 0.02 * rng.standard_normal((100, 4))
    b = level + 0.03 + 0.02 * rng.standard_normal((100, 4))
    same = rows_of(level + 0.02 * rng.standard_normal((100, 4)), "same")
    first, second = (rows_of(values) for values in (a, b))
    alone = [report.intervals(rows)["x"] for rows in (first, second)]
    assert alone[1]["low"] < alone[0]["high"]
    found = {row["name"]: row for row in report.compare(
        {"rows": first + same}, {"rows": second[40:] + rows_of(level, "same")})}  # fmt: skip
    assert found["x"]["real"] and found["x"]["prompts"] == 90
    assert found["x"]["low"] < 0.03 < found["x"]["high"] and found["x"][
        "difference"
    ] == pytest.approx(0.03, abs=0.01)
    assert not found["same"]["real"] and found["same"]["low"] < 0 < found["same"]["high"]
    with pytest.raises(ValueError, match="no prompt"):
        report.compare({"rows": first}, {"rows": rows_of(b, "y")})


def test_sheets_show_right_and_wrong(tmp_path):
    cells = [{"score": float(k % 10 == 0), "k": k} for k in range(100)]
    assert [cell["k"] for cell in report.choose(cells)] == [0, 20, 50, 70, 1, 25, 51, 75]
    shades = [{"score": k / 20, "k": k} for k in range(20)]
    assert [cell["k"] for cell in report.choose(shades)] == [19, 18, 17, 16, 3, 2, 1, 0]
    assert len(report.choose(cells[:2])) == 2
    box = ["red ball", 0, 0, 400, 400]
    row = {
        "prompt": "a red ball " * 12,
        "score": 0.0,
        "reason": "nothing " * 40,
        "boxes": [box],
        "image": SCENE,
    }
    report.draw_sheet([row, row | {"score": 1.0, "reason": ""}], tmp_path / "sheet.png")
    pixels = np.array(Image.open(tmp_path / "sheet.png"))
    assert (pixels == (0xD6, 0x28, 0x39)).all(-1).any() and (pixels == (0x23, 0x86, 0x2C)).all(
        -1
    ).any()


# ---------------------------------------------------------------------------------------------------------------------
# The command, end to end


def run(*argv):
    evaluation.main([str(arg) for arg in argv])


def refused(capsys, *argv):
    """The one line that bad input gets, with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        run(*argv)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and line.startswith("error: ")
    return line


def test_the_toys_evaluation_does_not_depend_on_the_number_of_processes(policy):
    """What train_grpo.py and `--bench toy` share."""

    def score(*rows):
        return rewards.score(toy.ToyJudge(), toy.crispness, *rows)

    prompts = toy.toy_prompts(24, seed=7, held_out=True)
    ours = evaluation.evaluate(policy, score, prompts, 3, 1.0, 1.0, 96)
    drawn = gotr1.rollout(*policy, prompts, 1, 1.0, 1.0, (3, 2**31), 96)
    assert [row["chain"] for row in ours] == drawn.chains
    pictures = gotr1.decode_images(policy[0], drawn.image_tokens)
    assert all(
        np.array_equal(row["image"], image) for row, image in zip(ours, pictures, strict=True)
    )
    assert [row["prompt"] for row in ours] == prompts and len({row["chain"] for row in ours}) > 12
    halves = [
        evaluation.evaluate(policy, score, prompts, 3, 1.0, 1.0, 96, rank, 2) for rank in (0, 1)
    ]
    for rank in (0, 1):
        assert [row["chain"] for row in ours[rank::2]] == [row["chain"] for row in halves[rank]]
        assert [row["scores"] for row in ours[rank::2]] == [row["scores"] for row in halves[rank]]
    summary = evaluation.summarise(ours)
    assert summary["total"] == pytest.approx(np.mean([row["scores"]["total"] for row in ours]))
    assert {
        "color: picture right",
        "spatial: plan right",
        "complex: picture right",
    } <= summary.keys()


def test_categories_and_faults():
    prompt = "a red ball left of a blue cube"
    assert evaluation.categories(prompt) == ["spatial", "left of"]
    assert evaluation.categories(prompt + " and above a green cone") == ["complex"]
    assert evaluation.categories("a red ball and a blue cube") == ["color"]
    assert evaluation.categories("a photo of a dog") == []
    boxes = toy.detect(SCENE)  # the ball left of and above the cube
    assert evaluation.toy_faults(prompt, boxes) == ""
    assert (
        evaluation.toy_faults("a red ball below a blue cube", boxes)
        == "red ball not below blue cube"
    )
    wrong = "no green cone; red ball not asked for; blue cube not asked for"
    assert evaluation.toy_faults("a green cone", boxes) == wrong
    for kind in toy.PROMPT_MIX:  # the words agree with the exact judge
        for seed in range(20):
            example = toy.make_example(np.random.default_rng(seed), kind)
            right = toy.ToyJudge().alignment([example.prompt], [example.image]) == [1.0]
            assert right == (evaluation.toy_faults(example.prompt, toy.detect(example.image)) == "")


def test_toy_benchmark(tmp_path, capsys):
    """The table against a count by hand from the rows; two runs compared; a second seed set differs."""
    for name, seed in (("a", 0), ("b", 5)):
        run("--out", tmp_path / name, "--toy_prompts", 30, "--toy_seeds", 2, "--seed", seed)
    shown = capsys.readouterr().out
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    assert len(results["rows"]) == 60
    one_place = [
        row
        for row in results["rows"]
        if len(re.findall("left|right|above|below", row["prompt"])) == 1
    ]
    right = np.mean([row["measures"]["pi"] == 1 for row in one_place])
    line = results["summary"]["spatial: picture right"]
    assert line["score"] == pytest.approx(right) and line["low"] < right < line["high"]
    assert min(line["seeds"]) <= right <= max(line["seeds"]) and len(line["seeds"]) == 2
    assert f"spatial: picture right       {right:.4f}" in shown
    assert all((row["reason"] == "") == (row["measures"]["pi"] == 1) for row in results["rows"])
    assert {"torch", "transformers"} <= results["versions"].keys() and results["generation"][
        "cfg"
    ] == 1.0
    for sheet in ("color", "left_of", "complex"):
        assert (tmp_path / "a" / f"sheet_{sheet}.png").is_file()
    run("--compare", tmp_path / "a" / "results.json", tmp_path / "b" / "results.json")
    shown = capsys.readouterr().out
    assert "seed 0 and 5" in shown and "may be chance" in shown and " real\n" not in shown


METADATA = [
    {"tag": "single_object", "include": [clause("dog")], "prompt": "a photo of a dog"},
    {
        "tag": "two_object",
        "include": [clause("dog"), clause("cat")],
        "prompt": "a photo of a dog and a cat",
    },
    {"tag": "colors", "include": [clause("dog", color="red")], "prompt": "a photo of a red dog"},
]


@pytest.fixture(scope="module")
def geneval_run(networks, tmp_path_factory):
    """(folder, flags) of a finished run: two samples of three prompts by the toy, scored by tiny networks."""
    folder = tmp_path_factory.mktemp("geneval")
    prompts = folder / "evaluation_metadata.jsonl"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in METADATA))
    flags = ["--bench", "geneval", "--detector", networks / "detector", "--clip", networks / "clip"]
    draw = ["--prompts", prompts, "--model", "toy", "--samples", 2]
    run(*flags, *draw, "--out", folder / "run")
    return folder, flags, draw


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.png")}


def test_geneval_layout_and_report(geneval_run, capsys):
    folder, flags, _ = geneval_run
    images = folder / "run" / "images"
    wanted = {f"{p:05d}/samples/{s:04d}.png" for p in range(3) for s in range(2)}
    assert set(files(images)) == wanted and len(set(files(images).values())) == 6
    for p, line in enumerate(METADATA):
        assert json.loads((images / f"{p:05d}" / "metadata.jsonl").read_text()) == line
        assert "<|box_start|>" in (images / f"{p:05d}" / "chains" / "0000.txt").read_text()
    results = json.loads((folder / "run" / "results.json").read_text())
    summary = results["summary"]
    assert (
        summary["single_object"]["score"] == 1 and summary["two_object"]["score"] == 0
    )  # a detector of dogs only
    means = [summary[line["tag"]]["score"] for line in METADATA]
    assert list(summary) == ["single_object", "two_object", "colors", "overall"]
    assert (
        summary["overall"]["score"] == pytest.approx(np.mean(means)) and len(results["rows"]) == 6
    )
    assert results["generation"]["size"] == "32 x 32" and results["generation"]["chain"] is True
    assert "not GenEval's own" in results["notes"][0] and "scoring" in results
    assert {row["reason"] for row in results["rows"] if row["group"] == "two_object"} == {
        "cat: 0 found, 1 wanted"
    }
    assert (folder / "run" / "sheet_colors.png").is_file()
    # the same pictures, as if another model had made them
    run(*flags, "--images", images, "--out", folder / "again", "--model", "someone's")
    again = json.loads((folder / "again" / "results.json").read_text())
    assert again["summary"] == summary and "overall" in capsys.readouterr().out


def interrupted(detect, seen, calls):
    """A detector that notes what it has seen, and is stopped after so many calls."""
    left = iter(range(calls))

    def call(self, images):
        if next(left, None) is None:
            raise KeyboardInterrupt
        seen.extend(images)
        return detect(self, images)

    return call


def test_geneval_goes_on_where_it_was(geneval_run, tmp_path, capsys, monkeypatch):
    """A lost picture and a broken one are made again, bit by bit; the others keep their files and scores."""
    folder, flags, draw = geneval_run
    shutil.copytree(folder / "run", tmp_path / "run")
    images, before = tmp_path / "run" / "images", files(folder / "run" / "images")
    lost, broken = images / "00000/samples/0001.png", images / "00002/samples/0000.png"
    lost.unlink()
    broken.write_bytes(broken.read_bytes()[:200])
    with (tmp_path / "run" / "scores_0.jsonl").open("a") as file:
        file.write('{"path": "half a li')
    seen, detect = [], geneval.Mask2Former.__call__
    monkeypatch.setattr(
        geneval.Mask2Former, "__call__", lambda self, x: seen.extend(x) or detect(self, x)
    )
    run(*flags, *draw, "--out", tmp_path / "run")
    shown = capsys.readouterr()
    assert f"{broken} cannot be read" in shown.err and files(images) == before
    assert seen == []  # the checksums are those of the rows that are there
    summary = [
        json.loads((where / "run" / "results.json").read_text())["summary"]
        for where in (folder, tmp_path)
    ]
    assert summary[0] == summary[1]
    noise(1, 32, 32)[0].save(lost)  # another picture: its row, and only its, is made anew
    run(*flags, *draw, "--out", tmp_path / "run")
    assert len(seen) == 1
    seen.clear()
    shutil.copytree(
        geneval_run[1][3], tmp_path / "detector"
    )  # other weights: all rows are made anew
    monkeypatch.setattr(geneval.Mask2Former, "__call__", interrupted(detect, seen, 2))
    other = [
        *flags,
        *draw,
        "--out",
        tmp_path / "run",
        "--detector",
        tmp_path / "detector",
        "--score_batch",
        2,
    ]
    with pytest.raises(KeyboardInterrupt):
        run(*other)
    monkeypatch.setattr(geneval.Mask2Former, "__call__", interrupted(detect, seen, 99))
    run(*other)
    assert len(seen) == 6  # of three batches two were scored before the interruption, one after it
    assert "--cfg 1.0 (now 3.0)" in refused(
        capsys, *flags, *draw, "--out", tmp_path / "run", "--cfg", 3
    )
    shutil.copy(M2F / "config.json", broken)
    line = refused(capsys, *flags, "--images", images, "--out", tmp_path / "other")
    assert "1 of 6 pictures cannot be read" in line and str(broken) in line


def test_pictures_only_and_without_a_chain(geneval_run, tmp_path, capsys):
    _, _, draw = geneval_run
    run("--bench", "geneval", *draw, "--out", tmp_path, "--generate_only", "--no_chain")
    assert "6 pictures" in capsys.readouterr().out and not (tmp_path / "results.json").exists()
    assert {path.read_text() for path in tmp_path.rglob("chains/*.txt")} == {""}
    assert files(tmp_path / "images") != files(geneval_run[0] / "run" / "images")


COLOR = ["a red ball and a blue cube", "a green cone and a red cube"]


@pytest.fixture(scope="module")
def compbench_run(networks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compbench")
    long = next(iter(CACHE["prompts"]))
    lines = {
        "color": COLOR,
        "spatial": ["a dog on the left of a cat"],
        "non_spatial": [long],
        "complex": [long],
    }
    lines |= {"complex_val_spatial": [long], "complex_val_action": ["The dog runs."]}
    for name, prompts in lines.items():
        (folder / f"{name.removesuffix('_val')}{'' if '_val_' in name else '_val'}.txt").write_text(
            "\n".join(prompts)
        )
    (folder / "phrases.json").write_text(json.dumps(CACHE))
    flags = ["--bench", "compbench", "--phrases", folder / "phrases.json"]
    flags += [
        part for name in ("blip", "gdino", "clip_b32") for part in (f"--{name}", networks / name)
    ]
    flags += [
        "--complex_lists",
        folder / "complex_val_spatial.txt",
        folder / "complex_val_action.txt",
    ]
    prompts = [
        folder / f"{name}_val.txt" for name in ("color", "spatial", "non_spatial", "complex")
    ]
    run(*flags, "--prompts", *prompts, "--model", "toy", "--samples", 2, "--out", folder / "run")
    return folder, flags


def test_compbench_layout_and_report(compbench_run, networks):
    folder, flags = compbench_run
    images = folder / "run" / "images"
    wanted = {f"color/samples/{COLOR[k // 2]}_{k:06d}.png" for k in range(4)}
    assert {name for name in files(images) if name.startswith("color")} == wanted and len(
        files(images)
    ) == 10
    results = json.loads((folder / "run" / "results.json").read_text())
    assert set(results["summary"]) == {"color", "spatial-gdino", "non_spatial", "complex-gdino"}
    assert (
        "not the published" in results["notes"][0] and "spaCy test" in results["scoring"]["phrases"]
    )
    # colour by hand: the product of the phrases, asked alone
    blip = compbench.BlipVQA(str(networks / "blip"))
    for row in [row for row in results["rows"] if row["group"] == "color"]:
        picture, phrases = Image.open(images / row["path"]), row["prompt"].split(" and ")
        scores = [blip([picture], [[f"{phrase}?"]])[0][0] for phrase in phrases]
        assert row["score"] == pytest.approx(np.prod(scores), abs=3e-4)
    # complex: of a spatial prompt, the mean of attributes and place; the cosine plays no part
    clip = geneval.Clip(str(networks / "clip_b32"), "clip_b32")
    gdino = compbench.GroundingDino(str(networks / "gdino"))
    for row in [row for row in results["rows"] if row["group"] == "complex"]:
        picture = Image.open(images / row["path"])
        scores = blip([picture], [["the red book?", "the kite?"]])[0]
        found = gdino([picture], [["book", "kite"]])[0]
        place = compbench.spatial_score(["book", "kite"], "next to", found)[1]
        assert row["score"] == pytest.approx((np.prod(scores) + place) / 2, abs=3e-4)
    row = next(row for row in results["rows"] if row["group"] == "non_spatial")
    cosine = compbench.cosines(clip, [Image.open(images / row["path"])], [row["prompt"]])[0]
    assert row["score"] == pytest.approx(cosine, abs=1e-5)
    run(*flags, "--images", images, "--out", folder / "again")
    again = json.loads((folder / "again" / "results.json").read_text())
    assert again["summary"] == results["summary"]


def test_processes_change_nothing(compbench_run, tmp_path):
    """Two processes draw and score what one does."""
    folder, flags = compbench_run
    argv = [*flags, "--prompts", folder / "color_val.txt", "--model", "toy", "--samples", 2]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "eval.py",
    ]
    command = list(map(str, [*command, *argv, "--out", tmp_path / "two"]))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    run(*argv, "--out", tmp_path / "one")
    assert files(tmp_path / "one" / "images") == files(tmp_path / "two" / "images")
    one, two = (
        json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two")
    )
    assert one["summary"] == two["summary"] and len(two["rows"]) == 4
    rows = [path.read_text().splitlines() for path in (tmp_path / "two").glob("scores_*.jsonl")]
    assert [len(some) for some in rows] == [2, 2]

    # what is missing is shared out anew: nobody may look before all have drawn
    pictures = sorted((tmp_path / "two" / "images").glob("*/samples/*.png"))
    kept = files(tmp_path / "two" / "images")
    pictures[1].unlink()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "two" / "images") == kept


def test_other_prompts_in_the_same_file_are_not_scored_with_the_pictures_of_the_first(
    compbench_run, tmp_path, capsys
):
    folder, flags = compbench_run
    prompts = tmp_path / "color_val.txt"
    prompts.write_text((folder / "color_val.txt").read_text())
    argv = [*flags, "--prompts", prompts, "--model", "toy", "--samples", 1, "--generate_only"]
    argv += ["--out", tmp_path / "run"]
    run(*argv)
    prompts.write_text("a blue cup and a red car\n")
    assert "--prompts_crc" in refused(capsys, *argv)


def test_scoring_never_touches_the_network(geneval_run, compbench_run, tmp_path, monkeypatch):
    """With paths given, and with the hub's offline switch off; with a hub id it would be asked."""
    import huggingface_hub.constants

    asked = []

    class Asked(BaseException):
        """Nothing on the way up takes this for an ordinary failure, to try again or to hide it."""

    def refuse(*address, **_):
        asked.append(address)
        raise Asked

    evaluation.network.cache_clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    for k, (folder, flags, *_) in enumerate((geneval_run, compbench_run)):
        run(*flags, "--images", folder / "run" / "images", "--out", tmp_path / str(k))
        assert (tmp_path / str(k) / "results.json").is_file()
    assert asked == []
    folder, flags, _ = geneval_run
    with pytest.raises(Asked):
        run(
            *flags,
            "--images",
            folder / "run" / "images",
            "--out",
            tmp_path,
            "--clip",
            "nobody/nothing",
        )


def test_bad_input_is_one_line(geneval_run, tmp_path, capsys):
    folder, flags, draw = geneval_run
    images, out = folder / "run" / "images", tmp_path / "out"
    official = "743b7d99.pth from download.openmmlab.com"
    missing = refused(
        capsys, *flags, "--images", images, "--out", out, "--detector", tmp_path / "m2f.pth"
    )
    assert (
        official in missing
        and "--detector PATH" in missing
        and str(tmp_path / "m2f.pth") in missing
    )
    missing = refused(
        capsys, *flags, "--images", images, "--out", out, "--clip", tmp_path / "nothing"
    )
    assert "openai/clip-vit-large-patch14" in missing and "--clip PATH" in missing
    torch.save({"state_dict": {"backbone.norm0.weight": torch.ones(2)}}, tmp_path / "other.pth")
    other = ["--images", images, "--out", out, "--detector", tmp_path / "other.pth"]
    assert "do not fit" in refused(capsys, *flags, *other)
    assert "nothing for geneval" in refused(
        capsys, *flags, "--images", tmp_path / "empty", "--out", out
    )
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a dog", "tag": "colors"}')
    assert "line 1" in refused(
        capsys, *flags, "--prompts", tmp_path / "bad.jsonl", "--model", "toy", "--out", out
    )
    unknown = METADATA[0] | {"include": [clause("dragon")]}
    (tmp_path / "bad.jsonl").write_text(json.dumps(unknown))
    assert "dragon" in refused(
        capsys, *flags, "--prompts", tmp_path / "bad.jsonl", "--model", "toy", "--out", out
    )
    assert "--model is missing" in refused(capsys, *flags, *draw[:2])
    assert "--images" in refused(capsys, *flags)
    assert "--samples is -1" in refused(capsys, "--samples", -1)
    assert "no --no_chain" in refused(capsys, "--no_chain")
    (tmp_path / "names.txt").write_text("a dog")
    names = ["--bench", "compbench", "--model", "toy", "--out", out, "--prompts"]
    assert "color_val.txt" in refused(capsys, *names, tmp_path / "names.txt")
    (tmp_path / "color_val.txt").write_text("a snake_case dog")
    assert "line 1" in refused(capsys, *names, tmp_path / "color_val.txt")
    (tmp_path / "complex_val.txt").write_text("The red book is next to the kite.")
    assert "--complex_lists" in refused(capsys, *names, tmp_path / "complex_val.txt")
    assert "en_core_web_sm" in refused(
        capsys,
        *names,
        tmp_path / "complex_val.txt",
        "--complex_lists",
        *[tmp_path / "complex_val.txt"] * 2,
    )
    assert not list((out / "images").glob("complex"))  # what cannot be scored is not drawn
    assert "results.json" in refused(
        capsys, "--compare", tmp_path / "names.txt", tmp_path / "names.txt"
    )
    assert "give two" in refused(capsys, "--compare", tmp_path / "names.txt")
    assert "give the path" in refused(capsys, "--bench", "speed")


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_no_code_of_a_file_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for legacy in (True, False):
        torch.save(
            {"meta": Bomb(), "state_dict": {}},
            "bomb.pth",
            _use_new_zipfile_serialization=not legacy,
        )
        with pytest.raises(ValueError, match="--detector"):
            geneval.load_tensors("bomb.pth", "detector")
    Path("text.pth").write_text("no weights")
    with pytest.raises(ValueError, match="--detector"):
        geneval.load_tensors("text.pth", "detector")
    assert not Path("exploded").exists()


def test_speed_table(networks, capsys):
    flags = [part for name in ("clip", "clip_b32") for part in (f"--{name}", networks / name)]
    run("--bench", "speed", *flags)
    lines = capsys.readouterr().out.splitlines()
    assert "batch 1   batch 16" in lines[0] and [line.split()[0] for line in lines[1:]] == [
        "clip",
        "clip_b32",
    ]
    one, many, ratio = map(float, lines[1].split()[1:])
    assert one > 0 and ratio == pytest.approx(many / one, abs=0.02)


def test_every_setting_is_explained():
    for settings in (evaluation.Settings,):
        lines = [
            line
            for line in inspect.getsource(settings).splitlines()
            if re.match(r"    \w+: ", line)
        ]
        assert len(lines) == len(dataclasses.fields(settings)) and all(
            "  # " in line for line in lines
        )


if __name__ == "__main__":
    save_networks(sys.argv[1], *sys.argv[2:3])
    print(f"wrote {sys.argv[1]}: networks with random weights")
