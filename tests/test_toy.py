"""The toy world: its split, its faults, and the exact judge on pictures whose content is known.
pytest tests/test_toy.py"""

import zlib
from collections import Counter
from itertools import combinations, product

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


def test_scenes_and_prompts_are_what_they_always_were():
    for (kind, held_out), want in STREAMS.items():
        rng = np.random.default_rng(3)
        scenes = [tuple(toy.make_scene(rng, kind, held_out)) for _ in range(200)]
        assert zlib.crc32(repr(scenes).encode()) == want, (kind, held_out)
    for held_out, want in PROMPTS.items():
        prompts = toy.toy_prompts(240, 7, held_out)
        assert zlib.crc32(repr(prompts).encode()) == want


@pytest.mark.parametrize("kind", toy.KINDS)
@pytest.mark.parametrize("held_out", [False, True])
def test_prompts_of_one_kind(kind, held_out):
    prompts = toy.toy_prompts(60, 1, held_out, kind)
    assert prompts == toy.toy_prompts(60, 1, held_out, kind)
    assert prompts != toy.toy_prompts(60, 2, held_out, kind)
    assert len(set(prompts)) > 15  # of 18 single objects
    for prompt in prompts:
        names, relations = toy.read_text(prompt)
        assert len(names) == len({name.split()[0] for name in names}) == toy.KINDS[kind]
        others = [] if kind in ("single", "color") else list(range(1, len(names)))
        assert [(i, j) for i, _, j in relations] == [(0, j) for j in others]
        assert toy.is_held_out(names) == (held_out and kind != "single")


def test_dense_scenes_are_never_trained():
    dense = {kind for kind, count in toy.KINDS.items() if count > 3}
    assert dense == {"four", "five"}
    assert not dense & {*toy.SFT_MIX, *toy.PROMPT_MIX}


@pytest.mark.parametrize("kind, longest", [("four", 81), ("five", 102)])
def test_dense_scenes_satisfy_their_prompts(kind, longest, policy):
    """Five objects do not fit into the default --max_chain 96: their chains need 102 tokens."""
    rng = np.random.default_rng(2)
    lengths = []
    seen = Counter()
    for _ in range(100):
        example = toy.make_example(rng, kind, faults={})
        row = parts(example.prompt, example.chain, example.image)
        assert row["total"] == 1, example.prompt
        lengths.append(len(gotr1.encode_chain(policy[1], example.chain)))
        seen.update(words for _, words, _ in toy.read_text(example.prompt)[1])
    assert len(seen) == 4 and min(seen.values()) > 50  # of 300 or 400 relations
    assert max(lengths) == longest  # with the <begin_of_image>


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


# -------------------------------------------------------------------------------------------------
# Plans that no model wrote


def test_random_plans_are_right_for_every_prompt():
    """In the words of the SFT data, and satisfied: by the judge, and by the picture of them."""
    rng = np.random.default_rng(0)
    for kind in toy.KINDS:
        for _ in range(30):
            example = toy.make_example(rng, kind, faults={})
            chain = toy.random_plan(rng, example.prompt)
            assert strip_boxes(chain) == strip_boxes(example.chain)
            boxes = parse_chain(chain)
            cells = [cells_of(box) for box in boxes]
            picture = toy.draw_scene([box.name for box in boxes], cells)
            assert parts(example.prompt, chain, picture)["total"] == 1, chain


def cells_of(box):
    """Column, row, size."""
    x, y, right, bottom = (round(edge * toy.GRID / 1000) for edge in box[1:])
    assert right - x == bottom - y
    return x, y, right - x


def test_every_combination_of_relations_has_a_layout():
    """Also such as no scene has, with relations of some objects only."""
    rng = np.random.default_rng(0)
    tried = 0
    for count in range(1, 6):
        for chosen in product([None, *toy.RELATIONS], repeat=count - 1):
            relations = [(0, words, j) for j, words in enumerate(chosen, start=1) if words]
            cells = toy.random_layout(rng, relations, count)
            assert toy.is_laid_out(toy.Scene([""] * count, relations, cells))
            for a, b in combinations(cells, 2):
                assert not toy.is_touching(a, b)
            tried += 1
    assert tried == 1 + 5 + 25 + 125 + 625


@pytest.mark.parametrize(
    "prompt",
    [
        "a red ball and a blue cube",
        "a red ball left of a blue cube",
        "a red ball left of a blue cube and left of a green cone",
        "a red ball left of a blue cube and above a green cone",
    ],
)
def test_random_plans_are_as_varied_as_the_layouts_of_scenes(prompt):
    """Two ways to draw a layout: the one of make_scene, which repeats whole draws, and the one of
    random_plan. How often each object has each size, column and row is the same."""
    rng = np.random.default_rng(1)
    names, relations = toy.read_text(prompt)
    n = 1000
    drawn = []
    while len(drawn) < n:
        cells = toy.random_cells(rng, len(names))
        if toy.is_laid_out(toy.Scene(names, relations, cells)):
            drawn.append(cells)
    plans = []
    for _ in range(n):
        boxes = parse_chain(toy.random_plan(rng, prompt))
        plans.append([cells_of(box) for box in boxes])
    assert np.abs(shares(drawn) - shares(plans)).max() < 0.09  # 4 standard deviations of a share


def shares(layouts):
    """(objects, 3, GRID): share of layouts in which that object has that column, row or size."""
    layouts = np.array(layouts)  # (layouts, objects, 3)
    return (layouts[..., None] == np.arange(toy.GRID)).mean(axis=0)


def test_draws_follow_their_weights():
    rng = np.random.default_rng(0)
    weights = np.tile([0.0, 1.0, 0.0, 3.0, 0.0], (4000, 1))
    columns = Counter(toy.draw_columns(rng, weights).tolist())
    assert columns.keys() == {1, 3} and 0.71 < columns[3] / 4000 < 0.79


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "a photo of a dog",
        "a red ball left of a dog",
        "two red balls",
        " and ".join(f"a {color} ball" for color in toy.COLORS),  # six objects
    ],
)
def test_random_plan_refuses_what_is_no_toy_prompt(prompt):
    with pytest.raises(ValueError, match="is not a prompt of the toy's world") as wrong:
        toy.random_plan(np.random.default_rng(0), prompt)
    assert repr(prompt) in str(wrong.value) and len(str(wrong.value).splitlines()) == 1


def test_plans_to_follow_are_held_out_and_right():
    plans = toy.follow_plans(20, 7)
    assert plans == toy.follow_plans(20, 7) != toy.follow_plans(20, 8)
    assert [len(parse_chain(chain)) for _, chain in plans] == [2] * 40 + [3] * 20
    prompts = [prompt for prompt, _ in plans]
    for k, prompt in enumerate(prompts):
        names, relations = toy.read_text(prompt)
        assert len(relations) == k // 20  # color, spatial, complex
        assert toy.is_held_out(names)
    chains = [chain for _, chain in plans]
    assert JUDGE.semantic(prompts, chains) == [1] * 60
    assert JUDGE.spatial(prompts, [parse_chain(chain) for chain in chains]) == [1] * 60
    dense = toy.follow_plans(3, 7, kinds=("four", "five"))
    assert [len(parse_chain(chain)) for _, chain in dense] == [4] * 3 + [5] * 3


# -------------------------------------------------------------------------------------------------
# A judge that errs


def calls(n, seed=0):
    """name of a call -> (its two lists) about n scenes, many of them with a fault."""
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


def test_a_judge_without_errors_is_the_exact_one():
    for judge in (toy.ToyJudge(0.0, seed=5), toy.ToyJudge(0.4).exact, toy.ToyJudge().exact):
        assert judge.error == 0
        for call, asked in calls(40).items():
            assert getattr(judge, call)(*asked) == getattr(JUDGE, call)(*asked)


def test_errors_come_at_their_rate_from_other_rows():
    """Where each object is differs between nearly all scenes, so nearly every error shows."""
    images, names = calls(500)["ground"]
    right = JUDGE.ground(images, names)
    given = toy.ToyJudge(0.2).ground(images, names)
    wrong = [edges(a) != edges(b) for a, b in zip(right, given, strict=True)]
    assert 0.15 < np.mean(wrong) < 0.24
    known = [edges(boxes) for boxes in right]
    for boxes, name in zip(given, names, strict=True):
        assert edges(boxes) in known
        assert {box.name for box in boxes} == {name}


def test_every_call_errs_and_gives_answers_of_its_batch():
    judge = toy.ToyJudge(0.5)
    for call, asked in calls(200).items():
        right = getattr(JUDGE, call)(*asked)
        given = getattr(judge, call)(*asked)
        if call != "ground":
            assert set(given) <= set(right), call
            # half of the answers are drawn anew from those of the others: the mean stays
            assert abs(np.mean(given) - np.mean(right)) < 0.1, call
        wrong = [a != b for a, b in zip(right, given, strict=True)]
        assert 0.1 < np.mean(wrong) < 0.6, call


def test_with_error_1_no_row_keeps_its_own_answer():
    """Three pictures with boxes of their own each."""
    names = ["red ball"] * 3
    images = [toy.draw_scene(["red ball"], [(x, x, 2)]) for x in (0, 2, 5)]
    right = JUDGE.ground(images, names)
    for seed in range(20):
        given = toy.ToyJudge(1.0, seed).ground(images, names)
        for own, boxes in zip(right, given, strict=True):
            assert boxes != own and boxes in right


def test_a_single_row_has_no_other_whose_answer_it_could_get():
    for call, asked in calls(1).items():
        assert getattr(toy.ToyJudge(1.0), call)(*asked) == getattr(JUDGE, call)(*asked)
        assert getattr(toy.ToyJudge(1.0), call)([], []) == []


def test_errors_depend_on_seed_and_content_and_on_nothing_else():
    """A judge that has answered much before gives the same answers as a new one."""
    old = toy.ToyJudge(0.3)
    for call, asked in calls(30, seed=1).items():
        getattr(old, call)(*asked)
    for call, asked in calls(60).items():
        given = getattr(toy.ToyJudge(0.3), call)(*asked)
        assert given == getattr(old, call)(*asked)
        assert given != getattr(toy.ToyJudge(0.3, seed=1), call)(*asked)


def test_other_content_gets_other_errors():
    """One pixel, or one word, is enough."""
    images, names = calls(60)["ground"]
    right = JUDGE.ground(images, names)
    changed = [*images[:-1], images[-1].copy()]
    corner = changed[-1].getpixel((0, 0))
    changed[-1].putpixel((0, 0), (corner[0] ^ 1, *corner[1:]))
    assert JUDGE.ground(changed, names) == right
    assert toy.ToyJudge(0.3).ground(changed, names) != toy.ToyJudge(0.3).ground(images, names)
    prompts, chains = calls(60)["semantic"]
    other_words = [*chains[:-1], chains[-1] + " indeed"]
    assert JUDGE.semantic(prompts, other_words) == JUDGE.semantic(prompts, chains)
    erring = toy.ToyJudge(0.3)
    assert erring.semantic(prompts, other_words) != erring.semantic(prompts, chains)
    # and so is another call
    as_semantic = erring._with_errors(list(range(60)), "semantic", prompts)
    assert as_semantic != erring._with_errors(list(range(60)), "spatial", prompts)


@pytest.mark.parametrize("error", [-0.1, 1.1, float("nan"), float("inf")])
def test_an_error_is_a_probability(error):
    with pytest.raises(ValueError, match="expected a probability from 0 to 1"):
        toy.ToyJudge(error)
