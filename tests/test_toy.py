"""The toy world: its split, its faults, and the exact judge on pictures whose content is known.
pytest tests/test_toy.py"""

from itertools import combinations

import numpy as np
import pytest
from PIL import Image

import gotr1
import rewards
from render_boxes import Box, iou, parse_chain, strip_boxes
from toy import model as toy_model
from toy import world as toy

JUDGE = toy.ToyJudge()


def parts(prompt, chain, image):
    return rewards.score(JUDGE, toy.crispness, [prompt], [chain], [image])[0]


def clean_examples(n, seed=0):
    rng = np.random.default_rng(seed)
    return [toy.make_example(rng, faults={}) for _ in range(n)]


def test_the_judge_is_exact_on_500_clean_scenes():
    for example in clean_examples(500):
        row = parts(example.prompt, example.chain, example.image)
        assert row.pop("judge_fail") == 0
        assert row == dict.fromkeys(("sem", "spa", "ri", "pi", "hps", "total"), 1)


def test_detected_boxes_are_the_drawn_ones():
    rng = np.random.default_rng(3)
    for kind in toy.KINDS:
        for _ in range(50):
            scene = toy.make_scene(rng, kind)
            found = toy.detect(toy.draw_scene(scene.names, scene.cells))
            assert sorted(found) == sorted(scene.boxes)


def example_with(fault, n=40):
    """Examples that have this fault and no other."""
    rng = np.random.default_rng(11)
    found = []
    while len(found) < n:
        example = toy.make_example(rng, "spatial", {fault: 1.0})
        if example.faults == [fault]:
            found.append(example)
    return found


@pytest.mark.parametrize(
    "fault, hurt", [("flip", {"spa", "pi"}), ("swap", {"sem", "spa", "pi"}), ("drift", {"ri"})]
)
def test_each_planned_fault_lowers_the_parts_that_it_should(fault, hurt):
    spared = {"sem", "spa", "ri", "pi", "hps"} - hurt
    if fault == "drift":  # the object may still stand on the right side: its R_PI is open
        spared.remove("pi")
    for example in example_with(fault):
        got = parts(example.prompt, example.chain, example.image)
        for part in hurt:
            assert got[part] < 1, (part, example)
        for part in spared:
            assert got[part] == 1, (part, example)


def test_other_ways_to_be_wrong():
    prompt, chain, image, _ = example_with("flip", 1)[0]
    scene = clean_examples(1)[0]
    blank = Image.fromarray(toy.ground())
    got = parts(scene.prompt, scene.chain, blank)
    assert got["ri"] == got["pi"] == got["total"] == 0 and got["sem"] == got["spa"] == 1
    got = parts(scene.prompt, "A <|obj_start|>red", scene.image)
    assert got["spa"] == got["ri"] == got["total"] == 0 and got["pi"] == 1
    black = Image.new("RGB", (32, 32))
    assert toy.detect(black) == [] and toy.crispness([""], [black]) == [0]


def test_an_extra_object_counts_against_plan_and_picture():
    names, cells = ["red ball", "blue cube"], [(0, 0, 2), (4, 4, 3)]
    boxes = toy.Scene(names, [], cells).boxes
    assert toy.faithfulness("a red ball and a blue cube", boxes) == 1
    assert toy.faithfulness("a red ball", boxes) == 0.5
    assert JUDGE.alignment(["a red ball"], [toy.draw_scene(names, cells)]) == [0.5]


def test_the_judge_survives_anything():
    images = [
        Image.effect_noise((40, 30), 90).convert("RGB"),
        Image.new("L", (1, 1)),
        Image.new("RGBA", (300, 9)),
    ]
    assert JUDGE.alignment(["", "a red ball", "nothing known"], images) == [0, 0, 0]
    assert JUDGE.ground(images, ["", "red ball", "\x00"]) == [[], [], []]
    assert JUDGE.semantic(["", "left of"], ["", "a red ball"]) == [0, 0]
    assert JUDGE.spatial(["a red ball"], [[Box("", 0, 0, 1, 1)]]) == [0]


def test_a_picture_of_another_size_is_read_too():
    example = clean_examples(1)[0]
    large = example.image.resize((384, 384), Image.Resampling.NEAREST)
    assert toy.detect(large) == toy.detect(example.image)


def test_held_out_pairs_never_occur_in_training():
    """Counted over prompts as they are read, not by the function that makes the split."""

    def pairs(prompts):
        found = set()
        for prompt in prompts:
            found |= {frozenset(pair) for pair in combinations(toy.read_text(prompt)[0], 2)}
        return found

    rng = np.random.default_rng(0)
    trained = pairs(toy.toy_prompts(3000, 7))
    trained |= pairs(toy.make_example(rng).prompt for _ in range(6000))
    tested = toy.toy_prompts(500, 7, held_out=True)
    for prompt in tested:
        assert pairs([prompt]) - trained, f"training shows all pairs of {prompt}"
    new = pairs(tested) - trained
    assert 0.1 < len(new) / (len(new) + len(trained)) < 0.3


def test_swapped_names_of_the_sft_data_stay_in_their_half_or_are_a_fault():
    """SFT chains with swapped colours may name a pair that is held out; prompts never do."""
    rng = np.random.default_rng(0)
    for _ in range(2000):
        prompt = toy.make_example(rng).prompt
        assert not toy.is_held_out(toy.read_text(prompt)[0])


def test_prompts_are_of_the_papers_kinds_and_reproducible():
    prompts = toy.toy_prompts(400, 1)
    assert prompts == toy.toy_prompts(400, 1) != toy.toy_prompts(400, 2)
    for words in toy.RELATIONS:
        assert sum(words in prompt for prompt in prompts) > 40
    three = [prompt for prompt in prompts if len(toy.read_text(prompt)[0]) == 3]
    assert 60 < len(three) < 140 and all(len(toy.read_text(prompt)[1]) == 2 for prompt in three)


def test_faults_come_at_their_rates():
    rng = np.random.default_rng(0)
    examples = [toy.make_example(rng, "spatial") for _ in range(4000)]
    for fault, rate in toy.FAULTS.items():
        share = np.mean([fault in example.faults for example in examples])
        # below the rate: a fault that would not fit or not show is left out
        assert rate * 0.6 < share < rate + 0.03, (fault, share)


def test_make_scene_refuses_an_unknown_kind():
    message = "unknown kind of scene 'galaxy': expected one of single, color"
    with pytest.raises(ValueError, match=message):
        toy.make_scene(np.random.default_rng(0), "galaxy")


def test_chains_read_back_as_the_boxes_they_were_made_from():
    for example in clean_examples(100, seed=5):
        boxes = parse_chain(example.chain)
        assert [box.name for box in boxes] == toy.read_text(strip_boxes(example.chain))[0]
        for box in boxes:
            assert max(iou(box, found) for found in toy.detect(example.image)) > 0.99


def test_image_codes_name_every_patch(policy):
    """The trained encoder agrees with the codes that the world was given."""
    images = [example.image for example in clean_examples(100)]
    want = np.stack([toy_model.image_codes(image) for image in images])
    got = gotr1.encode_images(policy[0], images).numpy()
    assert want.max() < len(toy_model.codebook()) and (got == want).mean() > 0.999
