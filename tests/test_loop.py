"""The loop that stands in the README, and the picture of one step.   pytest tests/test_loop.py"""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import gotr1
import rewards
from engine import trainer
from toy import explain
from toy.world import ToyJudge, crispness
from train_grpo import grpo_loss

LOOP = Path(__file__).parent.parent / "toy" / "loop.py"
PROMPT = "a red ball left of a blue cube"


def test_three_steps_of_the_loop_and_its_first_step_is_that_of_the_engine(monkeypatch, capsys):
    """Loss and norm of the gradient for the same samples, in float64; and KL 0. With 2 prompts per
    step instead of 8."""
    text = LOOP.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 40
    for number, fewer in (("range(30)", "range(3)"), ("toy_prompts(8,", "toy_prompts(2,")):
        assert text.count(number) == 1
        text = text.replace(number, fewer)
    load_policy = gotr1.load_policy
    monkeypatch.setattr(gotr1, "load_policy", lambda name: load_policy(name, dtype=torch.float64))
    names = {}  # all that the script names
    first = {}  # what these were in its first step
    clip = torch.nn.utils.clip_grad_norm_

    def clip_and_remember(*arguments):
        norm = clip(*arguments)
        if not first:
            first.update(names, norm=norm.item())

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", clip_and_remember)
        exec(compile(text, str(LOOP), "exec"), names)
    shown = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in shown] == ["step  1", "step  2", "step  3"]
    changed = 0
    for old, new in zip(names["reference"].parameters(), names["policy"].parameters(), strict=True):
        changed += not torch.equal(old, new)
    assert changed > 30

    samples = first["samples"]
    engine = trainer.Engine(*gotr1.load_policy("toy"), torch.device("cpu"), gotr1.token_logps)
    loss = 0.0
    for start in range(0, 16, 4):  # micro-batches, which the engine adds up
        rows = list(range(start, start + 4))
        logp, mask = engine.score(samples.select(rows))
        with torch.no_grad():
            logp_ref, _ = gotr1.token_logps(names["reference"], samples.select(rows))
        weight = mask / samples.mask.sum()
        advantages = first["advantages"][rows]
        assert torch.equal(logp, logp_ref), "the KL is 0"
        part, _ = grpo_loss(logp, logp.detach(), logp_ref, advantages, weight, kl=0.02)
        engine.backward(part)
        loss += part.item()
    assert loss == pytest.approx(first["loss"].item(), abs=1e-9, rel=1e-6)
    assert engine.step(lr=5e-4) == pytest.approx(first["norm"], rel=1e-6)


# -------------------------------------------------------------------------------------------------
# One step as a picture


def test_the_changes_are_those_of_two_calls_of_token_logps(policy):
    model = copy.deepcopy(policy[0])
    config = explain.Config(prompt=PROMPT, group=6)
    step = explain.take_step(config, ToyJudge(), crispness, model, policy[1])
    scores = rewards.score(ToyJudge(), crispness, [PROMPT] * 6, step.samples.chains, step.images)
    totals = np.array([row["total"] for row in scores])
    assert step.advantages == pytest.approx(totals - totals.mean(), abs=1e-6)
    with torch.no_grad():
        before, mask = gotr1.token_logps(policy[0], step.samples)
        after, _ = gotr1.token_logps(model, step.samples)
    assert step.change == pytest.approx((after - before).numpy(), abs=1e-4)
    assert np.abs(step.change).max() > 0.01
    mean = ((after - before).sum(dim=1) / mask.sum(dim=1)).numpy()
    assert step.means == pytest.approx(mean, abs=1e-5)
    assert np.corrcoef(step.advantages, mean)[0, 1] > 0.3
    assert f"{np.corrcoef(step.advantages, mean)[0, 1]:.2f}" in explain.sentence(step)


def is_grey(page: Image.Image, box: tuple[int, int, int, int]) -> bool:
    pixels = np.asarray(page.crop(box)).astype(int)
    return bool((pixels.max(axis=2) == pixels.min(axis=2)).all())


def test_without_advantages_nothing_is_coloured(policy):
    """A judge that finds everything equally bad; the same page with advantages is coloured."""

    def nothing_is_good(prompts, images):
        return [0.0] * len(prompts)

    model = copy.deepcopy(policy[0])
    config = explain.Config(prompt=PROMPT, group=3)
    step = explain.take_step(config, ToyJudge(), nothing_is_good, model, policy[1])
    assert not step.change.any() and "changes nothing" in explain.sentence(step)
    page = explain.draw_step(step, policy[1])
    foot = page.height - 270
    chains = (explain.TEXT_X, 0, explain.WIDTH, foot)
    last_map = explain.TEXT_X - explain.SIDE - 2 * explain.GAP
    maps = (last_map, 0, explain.TEXT_X, foot)
    assert is_grey(page, chains) and is_grey(page, maps)
    step.change[:] = 0.1 * step.mask
    page = explain.draw_step(step, policy[1])
    assert not is_grey(page, chains) and not is_grey(page, maps)


def test_a_map_of_24_by_24_tokens(policy):
    """Of Janus-Pro; each token has its place on the map, row by row."""
    model, tokenizer = policy
    samples = gotr1.rollout(model, tokenizer, [PROMPT], group=2, max_chain=96)
    n, text = samples.chain_ids.shape
    samples.image_tokens = torch.zeros(n, 576, dtype=torch.long)
    samples.logp = torch.zeros(n, text + 576)
    change = np.zeros((n, text + 576))
    change[:, :text] = [[1.0], [-1.0]]
    change[0, text + 24 * 23] = 1.0  # the first token of the last row: bottom left
    step = explain.Step(
        prompt=PROMPT,
        samples=samples,
        images=[Image.new("RGB", (384, 384), "white")] * n,
        found=[[]] * n,
        scores=[{"total": 1.0}, {"total": 0.0}],
        advantages=np.array([0.5, -0.5]),
        change=change,
        mask=np.ones((n, text + 576), bool),
        means=change.mean(axis=1),
    )
    page = explain.draw_step(step, tokenizer)
    left = explain.GAP + 2 * (explain.SIDE + explain.GAP)
    bottom = 92 + explain.GAP + explain.SIDE
    red, _, blue = page.getpixel((left + 2, bottom - 2))
    assert blue > red + 100
    assert min(page.getpixel((left + 20, bottom - 2))) > 250


@pytest.mark.parametrize(
    "words, complaint",
    [
        (["a red ball", "--group", "1"], "--group is 1"),
        (["a red ball", "--lr", "0"], "--lr is 0"),
        (["a photo of a dog"], "--judge toy knows only the toy's world, not 'a photo of a dog'"),
    ],
)
def test_bad_settings_are_one_line(words, complaint, capsys):
    with pytest.raises(SystemExit) as stop:
        explain.main(words)
    assert stop.value.code == 2 and complaint in capsys.readouterr().err


def test_the_command_line(tmp_path, capsys):
    explain.main([PROMPT, "--group", "4", "--out", str(tmp_path / "new" / "step.png")])
    with Image.open(tmp_path / "new" / "step.png") as page:
        assert page.width == 1000 and page.height > 700
    assert "wrote" in capsys.readouterr().out
