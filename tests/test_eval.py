"""Evaluation: official numbers for every rule, the networks as tiny random models of the real classes, the command end
to end.

    python -m pytest tests/test_eval.py
    python tests/test_eval.py FOLDER [tiny|full]    # networks with random weights, for eval.py --bench speed
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import compbench  # noqa: E402
import geneval  # noqa: E402

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
    numbers = {"person": 0, "computer mouse": 64, "tv remote": 65, "computer keyboard": 66, "toothbrush": 79}
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
    return {name: value.float() for name, value in load_file(M2F / "state_dict.safetensors").items()}


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
    golden, sizes = load_file(M2F / "expected.safetensors"), json.loads((M2F / "config.json").read_text())["geometry"]
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
    golden, sizes = load_file(M2F / "postprocess.safetensors"), json.loads((M2F / "config.json").read_text())["geometry"]
    sizes = [sizes[case][key] for key in ("input", "valid", "original")]
    found = geneval.fuse_masks(golden[f"{case}.class_logits"], golden[f"{case}.mask_logits"], *sizes)
    compare_instances(found, golden, case, box=0, area=0, score=1e-6)
    packed = golden[f"{case}.masks_packed"].numpy()
    for one in found:
        mask = np.unpackbits(packed[one.query])[: one.mask.size].reshape(one.mask.shape)
        assert (one.mask == mask).all()
    few = geneval.fuse_masks(golden[f"{case}.class_logits"], golden[f"{case}.mask_logits"], *sizes, threshold=0.3)
    above = [one for one in found if one.score > 0.3]
    assert above and [one[:3] for one in few if one.score > 0.3] == [one[:3] for one in above]


def test_network_input_is_mmdets():
    golden, spec = load_file(M2F / "preprocess.safetensors"), json.loads((M2F / "preprocess.json").read_text())
    for case in spec["images"]:
        image = Image.open(ROOT / "tests" / "golden_hps" / Path(case["image"]["file"]).name).convert("RGB")
        image = Image.fromarray(np.tile(np.array(image), (case["image"]["tile"],) * 2 + (1,)))
        pixels, valid = geneval.detector_pixels(image)
        assert [*pixels.shape[1:]] == case["input"] and [*valid] == case["valid"]
        gap = (pixels[:, :: spec["stride"], :: spec["stride"]] - golden[case["name"] + ".uint8"]).abs()
        levels = gap * torch.tensor(spec["std"])[:, None, None]
        assert levels.max() < 1.01 and levels.mean() < 0.2  # one grey level, one pixel in eight


# ---------------------------------------------------------------------------------------------------------------------
# T2I-CompBench's rules, against the official programs


def test_blip_arithmetic():
    for case in COMP["blip_vqa"]["cases"]:
        assert compbench.questions(case["chunks"]) == case["questions"]
        phrases = [compbench.phrase_score(*pair) for pair in case["logits"]]
        assert [f"{score:.4f}" for score in phrases] == case["phrase_scores"]
        assert f"{compbench.product(phrases):.4f}" == case["score"]
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
    assert len(COMP["spatial_2d"]["cases"]) == 141


def test_three_in_one_arithmetic():
    case, scores = COMP["three_in_one"], []
    for k, wanted in enumerate(case["score"]):
        parts = (case[part][k] for part in ("attribute", "spatial", "action"))
        prompt = case["prompts"][k // case["images_per_prompt"]]
        score = compbench.three_in_one(prompt, *parts, case["spatial_prompts"], case["action_prompts"])
        assert score == pytest.approx(wanted, abs=1e-6), prompt
        scores.append(score)
    assert len(scores) == 70 and np.mean(scores) == pytest.approx(case["mean"])
