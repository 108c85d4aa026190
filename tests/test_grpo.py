"""The mathematics of train_grpo.py against plain Python and hand-made numbers.   pytest
tests/test_grpo.py"""

import copy
import doctest
import math

import pyarrow
import pyarrow.parquet
import pytest
import torch

import gotr1
import train_grpo
from engine.trainer import trainable_parameters
from toy.world import toy_prompts
from train_grpo import group_advantages, grpo_loss

PROMPTS = [
    "a red ball left of a blue cube",
    "a green cone and a yellow ball",
    "a cyan cube above a purple cone",
]


def test_advantages_by_hand():
    # group [1, 0, 0, 0]: mean 1/4, unbiased std 1/2, so (3/4, -1/4, -1/4, -1/4) / (0.5 + 1e-4)
    got = group_advantages(torch.tensor([1.0, 0, 0, 0, 5, 5, 5, 5]), group=4)
    assert got[:4].tolist() == pytest.approx([0.75 / 0.5001] + [-0.25 / 0.5001] * 3, rel=1e-6)
    assert got[4:].tolist() == [0, 0, 0, 0]


def test_equal_rewards_give_exactly_zero_even_when_their_mean_is_rounded():
    rewards = torch.full((16,), 0.1)
    assert (
        rewards - rewards.mean()
    ).abs().max() >= 0  # the mean of sixteen 0.1 need not be 0.1 in float32
    assert group_advantages(torch.full((48,), 1 / 3), 16).tolist() == [0.0] * 48


def test_docstring_examples():
    assert doctest.testmod(train_grpo).failed == 0


def test_advantages_without_the_standard_deviation_are_differences_from_the_mean():
    got = group_advantages(torch.tensor([1.0, 0, 0, 0, 0.3, 0.3, 0.3, 0.3]), group=4, std=False)
    assert got.tolist() == [0.75, -0.25, -0.25, -0.25, 0, 0, 0, 0]


def plain_loss(logp, old, ref, advantages, mask, total, low, high, kl, loss_mean="token"):
    """The objective as two loops over floats, written from the formula."""
    loss = 0.0
    for n in range(len(logp)):
        row, tokens = 0.0, 0
        for s in range(len(logp[n])):
            if not mask[n][s]:
                continue
            ratio = math.exp(logp[n][s] - old[n][s])
            clipped = min(max(ratio, 1 - low), 1 + high)
            k3 = math.exp(ref[n][s] - logp[n][s]) - (ref[n][s] - logp[n][s]) - 1
            row += -min(ratio * advantages[n], clipped * advantages[n]) + kl * k3
            tokens += 1
        loss += row / tokens if loss_mean == "sequence" else row
    return loss / total


@pytest.mark.parametrize("loss_mean", ["token", "sequence"])
@pytest.mark.parametrize("low, high, kl", [(0.2, 0.2, 0.0), (0.2, 0.28, 0.04), (0.05, 0.1, 1.0)])
def test_loss_equals_a_double_loop(low, high, kl, loss_mean):
    torch.manual_seed(0)
    logp, old, ref = (-torch.rand(5, 7) * 2 for _ in range(3))
    advantages, mask = torch.randn(5), (torch.rand(5, 7) < 0.7).float()
    inputs = [t.clone() for t in (logp, old, ref, advantages, mask)]
    loss, sums = grpo_loss(logp, old, ref, advantages, mask, 23, low, high, kl, loss_mean)
    floats = [t.tolist() for t in (logp, old, ref, advantages, mask)]
    want = plain_loss(*floats, 23, low, high, kl, loss_mean)
    assert loss.item() == pytest.approx(want, rel=1e-5)
    ratios = (logp - old).exp()[mask.bool()]
    assert sums["ratio"].item() == pytest.approx(ratios.sum().item(), rel=1e-5)
    for tensor, before in zip((logp, old, ref, advantages, mask), inputs, strict=True):
        assert torch.equal(tensor, before), "an input was changed in place"


def test_clip_share_counts_tokens_whose_gradient_is_cut():
    logp = torch.log(torch.tensor([[1.5, 1.5, 0.5, 0.5, 1.0]])).requires_grad_()
    old, mask = torch.zeros(1, 5), torch.ones(1, 5)
    for advantage, cut in ((1.0, [0, 1]), (-1.0, [2, 3])):  # up is cut above 1.2, down below 0.8
        loss, sums = grpo_loss(logp, old, None, torch.tensor([advantage]), mask, 5, 0.2, 0.2, kl=0)
        (gradient,) = torch.autograd.grad(loss, logp)
        assert [s for s in range(5) if gradient[0, s] == 0] == cut
        assert sums["clip"].item() == len(cut)


def test_kl_is_not_needed_when_its_weight_is_zero():
    loss, sums = grpo_loss(
        torch.zeros(1, 2), torch.zeros(1, 2), None, torch.ones(1), torch.ones(1, 2), 2, kl=0
    )
    assert loss.item() == -1 and sums["kl"].item() == 0


def gradients(model, sampled, advantages, micro_batch, loss_mean):
    model.zero_grad()
    total = sampled.mask.sum() if loss_mean == "token" else len(sampled)
    for first in range(0, len(sampled), micro_batch):
        rows = list(range(first, min(first + micro_batch, len(sampled))))
        logp, mask = gotr1.token_logps(model, sampled.select(rows))
        inputs = (logp, logp.detach(), logp.detach() - 0.1, advantages[rows], mask)
        loss, _ = grpo_loss(*inputs, total, loss_mean=loss_mean)
        loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("loss_mean", ["token", "sequence"])
def test_gradient_does_not_depend_on_the_micro_batches(policy, loss_mean):
    model, tokenizer = copy.deepcopy(policy[0]).double(), policy[1]
    trainable_parameters(model)
    sampled = gotr1.rollout(model, tokenizer, PROMPTS, group=3, max_chain=70, seed=1)
    assert sampled.chain_lens.unique().numel() > 1, (
        "chains of one length would hide a normaliser that is local"
    )
    advantages = torch.randn(9, generator=torch.Generator().manual_seed(0))
    whole = gradients(model, sampled, advantages, 9, loss_mean)
    for micro_batch in (1, 2, 4):
        parts = gradients(model, sampled, advantages, micro_batch, loss_mean)
        assert (parts - whole).abs().max() < 1e-10


@pytest.mark.parametrize("mode", ["cond", "guided"])
def test_at_step_0_ratio_is_1_and_kl_is_0_with_guidance_and_temperature(policy, mode):
    model, tokenizer = policy
    sampled = gotr1.rollout(
        model, tokenizer, PROMPTS, 2, cfg=3.0, temperature=0.8, max_chain=60, logp_mode=mode
    )
    logp, mask = gotr1.token_logps(model, sampled)
    _, sums = grpo_loss(
        logp.detach(), sampled.logp, logp.detach(), torch.ones(6), mask, mask.sum(), kl=0.1
    )
    assert sums["ratio"].item() / mask.sum().item() == pytest.approx(1, abs=1e-4)
    assert ((logp - sampled.logp) * mask).abs().max() < 1e-4
    assert sums["kl"].item() == 0 and sums["clip"].item() == 0


def test_only_one_update_needs_no_second_scoring_and_several_keep_the_first_ones(
    tmp_path, monkeypatch
):
    """With one update a micro-batch is scored once; with three, three times, against the
    log-probabilities of the first: later ratios are not 1."""
    from engine import trainer as engine

    score, loss, calls, ratios = engine.Engine.score, train_grpo.grpo_loss, [], []

    def counting(*args, **kwargs):
        if torch.is_grad_enabled():  # else it is what is written beside a checkpoint
            calls.append(1)
        return score(*args, **kwargs)

    def looking(logp, logp_old, *rest, **settings):
        ratios.append((logp - logp_old).abs().max().item())
        return loss(logp, logp_old, *rest, **settings)

    monkeypatch.setattr(engine.Engine, "score", counting)
    monkeypatch.setattr(train_grpo, "grpo_loss", looking)
    flags = "--steps 1 --batch_size 1 --group 4 --micro_batch 2 --eval_prompts 2".split()
    for updates in (1, 3):
        calls.clear(), ratios.clear()
        train_grpo.main([*flags, "--updates", str(updates), "--out", str(tmp_path / str(updates))])
        assert len(calls) == 2 * updates
        assert ratios[:2] == [0, 0] and all(gap > 1e-4 for gap in ratios[2:])


def test_no_kl_needs_no_reference(tmp_path, monkeypatch):
    from engine import trainer as engine

    monkeypatch.setattr(engine.Engine, "score_reference", None)
    monkeypatch.setattr(engine.Engine, "keep_reference", None)
    flags = "--steps 1 --batch_size 1 --group 4 --eval_prompts 2 --kl 0".split()
    train_grpo.main([*flags, "--out", str(tmp_path)])


# The prompts


def test_prompts_of_several_files_are_counted_and_each_is_there_once(tmp_path, capsys):
    color, caption = tmp_path / "color_train.txt", tmp_path / "laion.parquet"
    color.write_text("a green bench and a blue bowl\n\na red ball\n a red ball \n")
    texts = ["two\nlines", None, "a red ball", "  "]
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2, 3, 4], "TEXT": texts}), caption)
    prompts = train_grpo.join_prompts((str(color), f"{caption}:TEXT"))
    assert prompts == ["a green bench and a blue bowl", "a red ball", "two lines"]
    told = capsys.readouterr().out
    assert f"{color}: 3 prompts, 1 of them again\n" in told
    assert f"{caption}:TEXT: 2 prompts, 1 of them again\n" in told
    for column in ("", ":id", ":text"):
        with pytest.raises(SystemExit) as stop:
            train_grpo.join_prompts((f"{caption}{column}",))
        assert stop.value.code == 2
        assert "behind a colon, one of TEXT" in capsys.readouterr().err


def test_the_toys_prompts_are_as_they_were():
    assert train_grpo.join_prompts(("toy",)) == toy_prompts(2000, seed=7, held_out=False)


def test_prompts_that_leave_no_room_are_left_out_and_counted(policy, capsys):
    room = 512 - 97 - 64  # of the toy's context
    around = len(gotr1.encode_prompt(policy[1], "")) - 1
    word = policy[1].encode(" ball", add_special_tokens=False)
    fits = "a" + " ball" * ((room - around - 2) // len(word))
    long = "a" + " ball" * room
    assert len(gotr1.encode_prompt(policy[1], fits)) <= room
    assert len(gotr1.encode_prompt(policy[1], fits + " ball" * 3)) > room
    prompts = ["a red ball", long, fits, fits + " ball" * 3]
    assert train_grpo.drop_too_long(prompts, *policy, max_chain=96) == ["a red ball", fits]
    assert f"2 prompts of more than {room} tokens are left out" in capsys.readouterr().out
    with pytest.raises(ValueError, match="shorten the prompt or lower max_chain"):
        train_grpo.drop_too_long([long], *policy, max_chain=96)


def test_several_files_on_the_command_line():
    flags = ["--prompts", "a.txt", "b.parquet:TEXT", "--steps", "3"]
    config = train_grpo.run.parse_args(train_grpo.Config, "", flags, train_grpo.PRESETS)
    assert config.prompts == ("a.txt", "b.parquet:TEXT") and config.steps == 3


# Sizes that fit


def test_the_paper_preset_takes_what_fits_and_flags_win(policy, monkeypatch, capsys):
    gpu = torch.device("cuda", 0)  # only its name is used
    monkeypatch.setattr(train_grpo.speed, "gpu_bytes", lambda device: 80 * 2**30)
    monkeypatch.setattr(train_grpo.speed, "size_of", lambda model: "7b")
    parts = {"most": 50 * 2**30, "judge": 17 * 2**30}  # whatever is asked
    monkeypatch.setattr(train_grpo.speed, "most_bytes", lambda *asked: parts)
    config = train_grpo.run.parse_args(
        train_grpo.Config,
        "",
        ["--preset", "paper", "--judge", "some/judge", "--micro_batch", "3"],
        train_grpo.PRESETS,
    )
    assert (config.rollout_batch, config.micro_batch, config.judge_batch) == (0, 3, 0)
    sized = train_grpo.with_sizes(config, None, True, 1, gpu)
    assert (sized.rollout_batch, sized.micro_batch, sized.judge_batch) == (8, 3, 64)
    told = capsys.readouterr().out
    assert f"--rollout_batch {sized.rollout_batch} --micro_batch 3 --judge_batch" in told
    assert "of 80 GiB by the table of memory" in told
    assert config.rollout_batch == 0, "what config.json says is what was asked for"
    monkeypatch.setattr(train_grpo.speed, "gpu_bytes", lambda device: 24 * 2**30)
    train_grpo.with_sizes(config, None, True, 1, gpu)
    assert "which is too much" in capsys.readouterr().out


def test_without_a_gpu_the_usual_sizes_are_taken_and_given_ones_are_left_alone(policy, capsys):
    config = train_grpo.Config(rollout_batch=0, micro_batch=0, judge_batch=7)
    sized = train_grpo.with_sizes(config, policy[0], True, 1, torch.device("cpu"))
    assert (sized.rollout_batch, sized.micro_batch, sized.judge_batch) == (1, 4, 7)
    assert "not by memory" in capsys.readouterr().out
    config = train_grpo.Config()
    assert train_grpo.with_sizes(config, policy[0], True, 1, torch.device("cpu")) is config
    assert not capsys.readouterr().out
