"""Drawing from the command line: pictures, edited plans, settings by the model, bad input.
pytest tests/test_draw.py"""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import gotr1
from render_boxes import Box, format_chain, iou
from toy import world as toy

PROMPT = "a red ball left of a blue cube"


def test_a_prompt_becomes_pictures_plans_chains_and_a_sheet(tmp_path, capsys):
    gotr1.main([PROMPT, "--n", "3", "--out", str(tmp_path), "--judge", "toy"])
    names = {path.name for path in tmp_path.iterdir()}
    ends = (".png", ".txt", "_plan.png", "_boxes.png")
    assert names == {f"000_{k}{end}" for k in range(3) for end in ends} | {"sheet.png"}
    assert Image.open(tmp_path / "000_0.png").size == (32, 32)
    out = capsys.readouterr().out
    assert (
        "mean of 3: sem" in out
        and "wrote 3 pictures" in out
        and (tmp_path / "000_0.txt").read_text() in out
    )


def test_several_prompts_and_the_same_pictures_in_any_batch(tmp_path):
    (tmp_path / "prompts.txt").write_text("a red ball\n\na cyan cone and a red cube\n")
    for size in ("1", "64"):
        flags = ["--n", "2", "--batch_size", size, "--out", str(tmp_path / size)]
        gotr1.main([str(tmp_path / "prompts.txt"), *flags])
    for name in ("000_0", "000_1", "001_0", "001_1"):
        a, b = (np.array(Image.open(tmp_path / size / f"{name}.png")) for size in ("1", "64"))
        # pixels are cut off to whole numbers: sums in another order may end one below
        assert np.abs(a.astype(int) - b).max() <= 1
    assert (tmp_path / "1" / "000_0.png").read_bytes() != (
        tmp_path / "1" / "000_1.png"
    ).read_bytes()


def test_an_edited_plan_is_what_is_drawn(tmp_path):
    """The same words with the box moved: the pictures of 16 samples must follow each plan far more
    than the other."""
    plans = []
    for x in (0, 625):
        plans.append([Box("red ball", x, 125, min(x + 375, 999), 500)])
        (tmp_path / "plan.txt").write_text(format_chain(["A", *plans[-1]]) + "\n")
        flags = [
            "--n",
            "16",
            "--chain",
            str(tmp_path / "plan.txt"),
            "--out",
            str(tmp_path / str(x)),
        ]
        gotr1.main(["a red ball", *flags])

    def follows(x, plan):
        found = [
            toy.detect(Image.open(path)) for path in (tmp_path / str(x)).glob("000_*[0-9].png")
        ]
        return np.mean([max((iou(plan[0], box) for box in boxes), default=0) for boxes in found])

    assert follows(0, plans[0]) > 0.4 and follows(0, plans[0]) > 2 * follows(0, plans[1])
    assert follows(625, plans[1]) > 0.4 and follows(625, plans[1]) > 2 * follows(625, plans[0])


def test_stopping_after_the_chain_gives_the_same_chain(policy):
    model, tokenizer = policy
    drawn = gotr1.rollout(model, tokenizer, [PROMPT], 2, max_chain=96)
    planned = gotr1.rollout(model, tokenizer, [PROMPT], 2, max_chain=96, draw=False)
    assert planned.chains == drawn.chains and planned.image_tokens.shape == (2, 0)
    assert planned.logp.equal(drawn.logp[:, :-64])


def test_settings_come_from_the_model_and_flags_win(policy, capsys):
    janus = SimpleNamespace(config=SimpleNamespace(vq_config=SimpleNamespace(num_patches=24)))
    for model, cfg, max_chain in ((janus, 5, 600), (policy[0], 1, 96)):
        chosen = gotr1.with_defaults(gotr1.Config(prompt=PROMPT), model)
        assert (chosen.cfg, chosen.max_chain) == (cfg, max_chain)
        assert (
            f"--cfg {cfg} --max_chain {max_chain}: as suits this model" in capsys.readouterr().out
        )
        chosen = gotr1.with_defaults(gotr1.Config(prompt=PROMPT, cfg=2.0, max_chain=7), model)
        assert (chosen.cfg, chosen.max_chain) == (2, 7)
        assert not capsys.readouterr().out


def test_words_that_the_toy_does_not_know_and_chains_that_were_cut_off_are_named(tmp_path, capsys):
    gotr1.main(["a red dragon", "--n", "1", "--max_chain", "5", "--out", str(tmp_path)])
    output = capsys.readouterr().out
    assert "the toy does not know dragon in 'a red dragon'" in output
    assert "100% of the chains were cut at --max_chain 5" in output


CHAINS = {
    "A red ball.": "no object",
    "A <|obj_start|>red ball<|obj_end|>": "box",
    "<|obj_start|>red ball<|obj_end|> <|box_start|>(0,0),(1200,50)<|box_end|>": "999",
    "<|obj_start|>red ball<|obj_end|> <|box_start|>(300,0),(200,50)<|box_end|>": "x",
}


@pytest.mark.parametrize("chain, words", CHAINS.items())
def test_a_malformed_chain_is_refused_before_anything_is_written(tmp_path, capsys, chain, words):
    (tmp_path / "plan.txt").write_text(chain)
    with pytest.raises(SystemExit) as stop:
        gotr1.main([PROMPT, "--chain", str(tmp_path / "plan.txt"), "--out", str(tmp_path / "out")])
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and words in lines[0] and "plan.txt" in lines[0]
    assert not (tmp_path / "out").exists()


BAD = [
    ([""], "the prompt is empty"),
    (["red " * 600], "this model holds 512"),
    ([PROMPT, "--model", "/no/such"], "no folder /no/such"),
    ([PROMPT, "--n", "0"], "--n is 0"),
    ([PROMPT, "--cfg", "nan"], "--cfg"),
    ([PROMPT, "--chain", "/no/such.txt"], "/no/such.txt"),
    (["/no/such.txt"], "/no/such.txt"),
    ([PROMPT, "--colour", "red"], "--colour"),
    ([PROMPT, "--out", "/proc/nowhere"], "/proc/nowhere"),
]


@pytest.mark.parametrize("flags, words", BAD, ids=[words for _, words in BAD])
def test_bad_input_is_answered_in_one_line_with_exit_code_2(flags, words, tmp_path, capsys):
    out = [] if "--out" in flags else ["--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        gotr1.main([*flags, *out])
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and last.startswith("error: ") and words in last
    assert not list(tmp_path.glob("out/*"))
