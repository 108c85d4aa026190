"""Borrowed plans: which samples draw them, what is trained of them, and what they are compared
with.    pytest tests/test_borrow.py"""

import json

import pytest
import torch

import gotr1
import rewards
import train_grpo
from engine import trainer
from render_boxes import parse_chain
from toy.world import ToyJudge, random_plan, toy_prompts

SMALL = "--batch_size 2 --group 6 --eval_prompts 2 --gif_every 0".split()


def settings(*flags) -> train_grpo.Config:
    return train_grpo.run.parse_args(train_grpo.Config, "", list(flags), train_grpo.PRESETS)


def logged(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "borrow, sizes",
    [
        ("0", [(16, False)]),
        ("0.5", [(8, False), (8, True)]),
        ("0.25", [(12, False), (4, True)]),
        ("1", [(16, True)]),
    ],
)
def test_a_share_of_each_group_is_borrowed(borrow, sizes):
    assert train_grpo.group_sizes(settings("--borrow", borrow)) == sizes


BAD = [
    (["--borrow", "1.5"], "--borrow is 1.5: expected a share, 0 to 1"),
    (["--borrow", "nan"], "expected a share"),
    (["--group", "2", "--borrow", "0.5"], "leaves 1 sample with plans of their own"),
    (["--borrow", "0.06"], "leaves 1 sample with a borrowed plan"),
    (["--borrow", "0.5", "--borrow_from", "reference", "--kl", "0"], "--kl above 0, or --lora"),
    (["--borrow", "0.5", "--prompts", "x.txt"], "for the toy's prompts only: give reference"),
]


@pytest.mark.parametrize("flags, words", BAD, ids=[" ".join(flags) for flags, _ in BAD])
def test_what_cannot_be_borrowed_is_refused_in_one_line(flags, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train_grpo.main([*flags, "--out", str(tmp_path / "run")])
    assert stop.value.code == 2 and words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_samples_with_a_given_plan_are_compared_among_themselves_and_their_text_is_not_trained(
    tmp_path, monkeypatch
):
    """Rewards are replaced by numbers, so that the advantages are known: within the 3 samples with
    plans of their own, and within the 3 with the borrowed one."""
    batches = []
    loss = train_grpo.grpo_loss

    def looking(logp, logp_old, logp_ref, advantages, mask, **rest):
        batches.append((advantages, mask))
        return loss(logp, logp_old, logp_ref, advantages, mask, **rest)

    score = rewards.score

    def numbered(judge, hps, prompts, chains, images, **rest):
        rows = score(judge, hps, prompts, chains, images, **rest)
        given = [1.0, 0, 0, 5, 5, 8] if len(rows) == 6 else [row["total"] for row in rows]
        return [row | {"total": total} for row, total in zip(rows, given, strict=True)]

    monkeypatch.setattr(train_grpo, "grpo_loss", looking)
    monkeypatch.setattr(rewards, "score", numbered)
    flags = "--steps 1 --batch_size 1 --group 6 --borrow 0.5 --eval_prompts 2 --gif_every 0".split()
    train_grpo.main([*flags, "--out", str(tmp_path)])
    (advantages, mask) = batches[0]
    own = [2 / 3, -1 / 3, -1 / 3]
    borrowed = [-1, -1, 2]
    assert advantages.tolist() == pytest.approx(own + borrowed)
    text, image = mask[:, :-64], mask[:, -64:]
    assert (text.sum(dim=1)[:3] > 0).all() and (text[3:] == 0).all() and (image == 1).all()
    row = logged(tmp_path)[0]
    assert row["reward"] == pytest.approx(1 / 3) and row["borrowed_reward"] == pytest.approx(6)


def test_the_log_tells_both_kinds_apart_and_processes_of_one_seed_agree(tmp_path):
    for name in ("once", "again"):
        train_grpo.main([*SMALL, "--steps", "2", "--borrow", "0.5", "--out", str(tmp_path / name)])
    once, again = logged(tmp_path / "once"), logged(tmp_path / "again")
    for key in ("reward", "ri", "borrowed_reward", "borrowed_ri", "layout_variety", "grad_norm"):
        assert [row[key] for row in once] == [row[key] for row in again]
    assert all(row["borrowed_spa"] == 1 for row in once), "the toy's layouts do what prompts say"
    train_grpo.main([*SMALL, "--steps", "1", "--borrow", "0", "--out", str(tmp_path / "none")])
    assert not [key for key in logged(tmp_path / "none")[0] if key.startswith("borrowed")]


@pytest.mark.parametrize(
    "mode", [[], ["--lora", "4"], ["--shard", "yes"]], ids=["full", "lora", "shards"]
)
def test_the_reference_writes_the_plans_and_the_judge_chooses(tmp_path, monkeypatch, mode):
    """The policy is made unable to write plans after the first step: the borrowed ones stay
    good."""
    asked = []
    best_plans = gotr1.best_plans

    def watching(model, tokenizer, judge, prompts, **rest):
        plans = best_plans(model, tokenizer, judge, prompts, **rest)
        asked.append((prompts, plans))
        return plans

    step = trainer.Engine.step

    def ruining(self, lr, clip_grad):
        norm = step(self, lr, clip_grad)
        with torch.no_grad():
            for parameter in self.parameters:
                parameter.add_(0.3 * torch.randn_like(parameter))
        return norm

    monkeypatch.setattr(gotr1, "best_plans", watching)
    monkeypatch.setattr(trainer.Engine, "step", ruining)
    flags = [*SMALL, "--steps", "2", "--borrow", "0.5", "--borrow_from", "reference", *mode]
    train_grpo.main([*flags, "--out", str(tmp_path)])
    assert len(asked) == 2
    for prompts, plans in asked:
        marks = ToyJudge().spatial(prompts, [parse_chain(plan) for plan in plans])
        assert sum(marks) / len(marks) >= 0.5
    rows = logged(tmp_path)
    assert rows[1]["spa"] < 0.2 < rows[1]["borrowed_spa"]


def test_random_plans_do_what_the_prompt_says():
    import numpy as np

    rng = np.random.default_rng(0)
    for prompt in toy_prompts(60, seed=3):
        plan = random_plan(rng, prompt)
        assert ToyJudge().spatial([prompt], [parse_chain(plan)]) == [1]
