"""The toy world: its split, its faults, and the exact judge on pictures whose content is known.
pytest tests/test_toy.py"""

import zlib
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

import gotr1
import rewards
from render_boxes import Box, parse_chain, strip_boxes
from toy import model as toy_model
from toy import world as toy

JUDGE = toy.ToyJudge()


def parts(prompt, chain, image):
    return rewards.score(JUDGE, toy.crispness, [prompt], [chain], [image])[0]


def clean_examples(n, seed=0):
    rng = np.random.default_rng(seed)
    return [toy.make_example(rng, faults={}) for _ in range(n)]


# -------------------------------------------------------------------------------------------------
# The exact judge


def test_the_judge_is_exact_on_200_clean_scenes():
    for example in clean_examples(200):
        row = parts(example.prompt, example.chain, example.image)
        assert row.pop("judge_fail") == 0
        assert row == dict.fromkeys(("sem", "spa", "ri", "pi", "hps", "total"), 1)


def test_detected_boxes_are_the_drawn_ones():
    rng = np.random.default_rng(3)
    for kind in toy.KINDS:
        for _ in range(25):
            scene = toy.make_scene(rng, kind)
            picture = toy.draw_scene(scene.names, scene.cells)
            assert sorted(toy.detect(picture)) == sorted(scene.boxes)
    large = picture.resize((384, 384), Image.Resampling.NEAREST)
    assert toy.detect(large) == toy.detect(picture), "a picture of another size"


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


# -------------------------------------------------------------------------------------------------
# Prompts, examples, plans


def test_held_out_pairs_never_occur_in_training():
    """Counted over prompts as they are read, not by the function that makes the split."""

    def pairs(prompts):
        found = set()
        for prompt in prompts:
            found |= {frozenset(pair) for pair in combinations(toy.read_text(prompt)[0], 2)}
        return found

    rng = np.random.default_rng(0)
    trained = pairs(toy.toy_prompts(1500, 7))
    trained |= pairs(toy.make_example(rng).prompt for _ in range(1500))
    tested = toy.toy_prompts(300, 7, held_out=True)
    tested += [prompt for prompt, _ in toy.follow_plans()]
    for prompt in tested:
        assert pairs([prompt]) - trained, f"training shows all pairs of {prompt}"
    new = pairs(tested) - trained
    assert 0.1 < len(new) / (len(new) + len(trained)) < 0.3


def test_faults_come_at_their_rates():
    rng = np.random.default_rng(0)
    examples = [toy.make_example(rng, "spatial") for _ in range(2000)]
    for fault, rate in toy.FAULTS.items():
        share = np.mean([fault in example.faults for example in examples])
        # below the rate: a fault that would not fit or not show is left out
        assert rate * 0.6 < share < rate + 0.04, (fault, share)


# crc32 of 200 scenes, by (kind, held out): the shipped model's data and the prompts of its
# evaluation are drawn like this
STREAMS = {
    ("single", False): 4000111022,
    ("color", False): 1827464373,
    ("color", True): 2023372547,
    ("spatial", False): 2635409615,
    ("spatial", True): 1626209894,
    ("complex", False): 183368857,
    ("complex", True): 3750556755,
}
PROMPTS = {False: 440781983, True: 1009090886}  # the same of 240 prompts, by held out
FOLLOW_PLANS = 398283493  # and of the given plans


def test_scenes_prompts_and_given_plans_are_what_they_always_were():
    for (kind, held_out), want in STREAMS.items():
        rng = np.random.default_rng(3)
        scenes = [tuple(toy.make_scene(rng, kind, held_out)) for _ in range(200)]
        assert zlib.crc32(repr(scenes).encode()) == want, (kind, held_out)
    for held_out, want in PROMPTS.items():
        prompts = toy.toy_prompts(240, 7, held_out)
        assert zlib.crc32(repr(prompts).encode()) == want
    assert zlib.crc32(repr(toy.follow_plans()).encode()) == FOLLOW_PLANS


def test_given_plans_do_what_their_prompts_say():
    """By the judge, and by the picture of them; 60 of each kind."""
    kinds = []
    for prompt, chain in toy.follow_plans():
        boxes = parse_chain(chain)
        cells = []
        for box in boxes:
            x, y, right, _ = (round(edge * toy.GRID / 1000) for edge in box[1:])
            cells.append((x, y, right - x))
        picture = toy.draw_scene([box.name for box in boxes], cells)
        assert parts(prompt, chain, picture)["total"] == 1, chain
        names, relations = toy.read_text(prompt)
        kinds.append((len(names), len(relations)))
    assert kinds == 60 * [(2, 0)] + 60 * [(2, 1)] + 60 * [(3, 2)]
    assert toy.follow_plans(1) == toy.follow_plans()[::60]


def test_image_codes_name_every_patch(policy):
    """The trained encoder agrees with the codes that the world was given."""
    images = [example.image for example in clean_examples(60)]
    want = np.stack([toy_model.image_codes(image) for image in images])
    got = gotr1.encode_images(policy[0], images).numpy()
    assert want.max() < len(toy_model.codebook()) and (got == want).mean() > 0.999


# -------------------------------------------------------------------------------------------------
# A judge that errs


def calls(n, seed=0):
    """Name of a call -> its two lists, about n scenes, many of them with a fault."""
    rng = np.random.default_rng(seed)
    examples = [toy.make_example(rng, "complex", {"flip": 0.5, "swap": 0.5}) for _ in range(n)]
    prompts = [example.prompt for example in examples]
    chains = [strip_boxes(example.chain) for example in examples]
    layouts = [parse_chain(example.chain) for example in examples]
    images = [example.image for example in examples]
    first_names = [boxes[0].name for boxes in layouts]
    return {
        "semantic": (prompts, chains),
        "spatial": (prompts, layouts),
        "alignment": (prompts, images),
        "ground": (images, first_names),
    }


def edges(boxes):
    return [box[1:] for box in boxes]


def test_errors_come_at_their_rate_and_are_answers_of_the_batch():
    """Where each object is differs between nearly all scenes, so nearly every error shows."""
    inputs = calls(200)
    images, names = inputs["ground"]
    right = JUDGE.ground(images, names)
    given = toy.ToyJudge(0.2).ground(images, names)
    assert toy.ToyJudge(0.2).exact.ground(images, names) == right
    wrong = [edges(a) != edges(b) for a, b in zip(right, given, strict=True)]
    assert 0.13 < np.mean(wrong) < 0.27
    known = [edges(boxes) for boxes in right]
    for boxes, name in zip(given, names, strict=True):
        assert edges(boxes) in known
        assert {box.name for box in boxes} == {name}
    for call in ("semantic", "spatial", "alignment"):
        right = getattr(JUDGE, call)(*inputs[call])
        given = getattr(toy.ToyJudge(0.5), call)(*inputs[call])
        assert set(given) <= set(right), call
        # half of the answers are drawn again from those of the others: the mean stays
        assert abs(np.mean(given) - np.mean(right)) < 0.1, call
        wrong = [a != b for a, b in zip(right, given, strict=True)]
        assert 0.1 < np.mean(wrong) < 0.6, call


def test_with_error_1_no_sample_keeps_its_own_answer_unless_it_is_alone():
    names = ["red ball"] * 3
    images = [toy.draw_scene(["red ball"], [(x, x, 2)]) for x in (0, 2, 5)]
    right = JUDGE.ground(images, names)
    for seed in range(20):
        given = toy.ToyJudge(1.0, seed).ground(images, names)
        for own, boxes in zip(right, given, strict=True):
            assert boxes != own and boxes in right
    for call, inputs in calls(1).items():
        assert getattr(toy.ToyJudge(1.0), call)(*inputs) == getattr(JUDGE, call)(*inputs)
        assert getattr(toy.ToyJudge(1.0), call)([], []) == []


def test_errors_depend_on_seed_and_content_and_on_nothing_else():
    """A judge that has answered before gives the same answers as a new one; one other pixel, one
    other word, or another call is enough for other errors."""
    old = toy.ToyJudge(0.3)
    inputs = calls(60)
    old.semantic(*inputs["semantic"])
    for call, lists in inputs.items():
        given = getattr(toy.ToyJudge(0.3), call)(*lists)
        assert given == getattr(old, call)(*lists)
        assert given != getattr(toy.ToyJudge(0.3, seed=1), call)(*lists)

    images, names = inputs["ground"]
    changed = [*images[:-1], images[-1].copy()]
    corner = changed[-1].getpixel((0, 0))
    changed[-1].putpixel((0, 0), (corner[0] ^ 1, *corner[1:]))
    assert JUDGE.ground(changed, names) == JUDGE.ground(images, names)
    assert old.ground(changed, names) != old.ground(images, names)
    prompts, chains = inputs["semantic"]
    other_words = [*chains[:-1], chains[-1] + " indeed"]
    assert JUDGE.semantic(prompts, other_words) == JUDGE.semantic(prompts, chains)
    assert old.semantic(prompts, other_words) != old.semantic(prompts, chains)
    numbers = list(range(60))
    assert old._with_errors(numbers, "semantic", prompts) != old._with_errors(
        numbers, "spatial", prompts
    )


@pytest.mark.parametrize("error", [-0.1, 1.1, float("nan"), float("inf")])
def test_an_error_is_a_probability(error):
    with pytest.raises(ValueError, match="expected a probability from 0 to 1"):
        toy.ToyJudge(error)
