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
import rewards
import train_grpo
from data.prompts import join_prompts
from engine import run, trainer
from engine.trainer import trainable_parameters
from toy.world import toy_prompts
from train_grpo import group_advantages, grpo_loss, step_advantages, token_weights

PROMPTS = [
    "a red ball left of a blue cube",
    "a green cone and a yellow ball",
    "a cyan cube above a purple cone",
]
SHORT = "--steps 1 --batch_size 1 --group 4 --eval_prompts 2".split()


def test_docstring_examples():
    assert doctest.testmod(train_grpo).failed == 0


# Advantages


def test_advantages_by_hand():
    # group [1, 0, 0, 0]: mean 1/4, unbiased std 1/2, so (3/4, -1/4, -1/4, -1/4) / (0.5 + 1e-4)
    rewards = torch.tensor([1.0, 0, 0, 0, 5, 5, 5, 5])
    got = group_advantages(rewards, group=4)
    assert got[:4].tolist() == pytest.approx([0.75 / 0.5001] + [-0.25 / 0.5001] * 3, rel=1e-6)
    assert got[4:].tolist() == [0, 0, 0, 0]
    got = group_advantages(rewards, group=4, std=False)
    assert got.tolist() == [0.75, -0.25, -0.25, -0.25, 0, 0, 0, 0]


def test_three_ways_to_scale_advantages_by_hand():
    # minus the means: 3/4, -1/4 (three times), 1, -1, 0, 0; sum of squares 2.75, n - 1 = 7
    rewards = torch.tensor([1.0, 0, 0, 0, 2, 0, 1, 1])
    centered = [0.75, -0.25, -0.25, -0.25, 1, -1, 0, 0]
    assert step_advantages(rewards, 4, "mean").tolist() == centered
    by_group = step_advantages(rewards, 4, "group_std")
    assert torch.equal(by_group, group_advantages(rewards, 4))
    by_batch = step_advantages(rewards, 4, "batch_std").tolist()
    scale = math.sqrt(2.75 / 7) + 1e-4
    assert by_batch == pytest.approx([value / scale for value in centered], rel=1e-5)


def test_equal_rewards_give_exactly_zero_even_when_their_mean_is_rounded():
    assert group_advantages(torch.full((48,), 1 / 3), 16).tolist() == [0.0] * 48


# The loss


def plain_loss(logp, old, ref, advantages, weight, clip, kl):
    """The objective as two loops over floats, written from the formula."""
    loss = 0.0
    for n in range(len(logp)):
        for s in range(len(logp[n])):
            ratio = math.exp(logp[n][s] - old[n][s])
            clipped = min(max(ratio, 1 - clip), 1 + clip)
            k3 = math.exp(ref[n][s] - logp[n][s]) - (ref[n][s] - logp[n][s]) - 1
            surrogate = min(ratio * advantages[n], clipped * advantages[n])
            loss += weight[n][s] * (kl * ratio * k3 - surrogate)
    return loss


@pytest.mark.parametrize("clip, kl", [(0.2, 0.0), (0.3, 0.04), (0.05, 1.0)])
def test_loss_equals_a_double_loop(clip, kl):
    torch.manual_seed(0)
    logp, old, ref = (-torch.rand(5, 7) * 2 for _ in range(3))
    advantages = torch.randn(5)
    weight = (torch.rand(5, 7) < 0.7) * torch.rand(5, 7)
    inputs = [logp, old, ref, advantages, weight]
    before = [tensor.clone() for tensor in inputs]
    loss, sums = grpo_loss(*inputs, clip=clip, kl=kl)
    want = plain_loss(*[tensor.tolist() for tensor in inputs], clip, kl)
    assert loss.item() == pytest.approx(want, rel=1e-5)
    ratios = (logp - old).exp()[weight > 0]
    assert sums[0].item() == pytest.approx(ratios.sum().item(), rel=1e-5)
    assert sums[3].item() == len(ratios)
    for tensor, copied in zip(inputs, before, strict=True):
        assert torch.equal(tensor, copied), "an input was changed in place"


def test_clip_share_counts_tokens_whose_gradient_is_cut():
    logp = torch.log(torch.tensor([[1.5, 1.5, 0.5, 0.5, 1.0]])).requires_grad_()
    old, weight = torch.zeros(1, 5), torch.full((1, 5), 0.2)
    for advantage, cut in ((1.0, [0, 1]), (-1.0, [2, 3])):  # up is cut above 1.2, down below 0.8
        loss, sums = grpo_loss(logp, old, None, torch.tensor([advantage]), weight, clip=0.2, kl=0)
        (gradient,) = torch.autograd.grad(loss, logp)
        assert [s for s in range(5) if gradient[0, s] == 0] == cut
        assert sums[1].item() == len(cut)
        assert sums[2].item() == 0, "a KL without a reference"


def test_the_kl_is_that_of_the_policy_now_although_an_older_one_has_sampled():
    """Over all tokens of a vocabulary, each as often as the old policy samples it, the estimate is
    the KL of the new policy, and its gradient has a bound for a token that became unlikely."""
    torch.manual_seed(0)
    old, ref = (torch.randn(1, 50).log_softmax(dim=1) for _ in range(2))
    new = (old * 2).log_softmax(dim=1).requires_grad_()  # far from the old one
    kl = (new.exp() * (new - ref)).sum().item()
    no_advantage = torch.zeros(1)
    loss, sums = grpo_loss(new, old, ref, no_advantage, old.exp(), kl=1.0)
    assert loss.item() == pytest.approx(kl, rel=1e-4)
    assert sums[3] == 50

    logp = torch.tensor([[-1.0, -20.0]]).requires_grad_()
    half = torch.full((1, 2), 0.5).log()
    loss, _ = grpo_loss(logp, half, half, no_advantage, torch.ones(1, 2), kl=1.0)
    (gradient,) = torch.autograd.grad(loss, logp)
    ratios = (logp - half).exp().detach()
    assert gradient.tolist() == [pytest.approx((ratios - 1).tolist()[0], rel=1e-5)]


def test_where_advantage_and_kl_balance():
    """policy = kl * reference / (c - advantage), as docs/toy.md says: there the gradient over all
    samples, each as often as the policy draws it, is 0. Somewhere else it is not."""
    advantages = torch.tensor([0.0, 0.01, 0.03, 0.1], dtype=torch.float64)
    ref = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    kl = 0.05
    low, high = advantages.max().item(), advantages.max().item() + kl
    for _ in range(60):  # the c with which the probabilities add up to 1
        c = (low + high) / 2
        policy = kl * ref / (c - advantages)
        low, high = (c, high) if policy.sum() > 1 else (low, c)

    def gradient(policy):
        logits = policy.log().requires_grad_()
        logp = logits.log_softmax(dim=0)[:, None]
        now = logp.detach()
        loss, _ = grpo_loss(logp, now, ref.log()[:, None], advantages, now.exp(), kl=kl)
        return torch.autograd.grad(loss, logits)[0].abs().max().item()

    assert gradient(policy) < 1e-10
    tilted = ref * (advantages / kl).exp()  # the optimum under KL(policy || reference)
    assert gradient(tilted / tilted.sum()) > 1e-3


def test_weights_by_hand():
    mask = torch.tensor([[1.0, 1, 0, 1], [1, 1, 1, 1], [1, 0, 0, 0]])
    tokens = token_weights(mask, kept=[0, 2], loss_mean="token")
    assert tokens.tolist() == [[0.25, 0.25, 0, 0.25], [0] * 4, [0.25, 0, 0, 0]]
    per_sample = token_weights(mask, kept=[0, 2], loss_mean="sequence")
    third = pytest.approx(1 / 6)
    assert per_sample.tolist() == [[third, third, 0, third], [0] * 4, [0.5, 0, 0, 0]]
    assert not token_weights(mask, kept=[], loss_mean="token").any()


def gradients(model, sampled, advantages, micro_batch, loss_mean):
    model.zero_grad()
    weights = token_weights(sampled.mask, list(range(len(sampled))), loss_mean)
    for first in range(0, len(sampled), micro_batch):
        rows = list(range(first, min(first + micro_batch, len(sampled))))
        logp, _ = gotr1.token_logps(model, sampled.select(rows))
        loss, _ = grpo_loss(
            logp, logp.detach(), logp.detach() - 0.1, advantages[rows], weights[rows]
        )
        loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("loss_mean", ["token", "sequence"])
def test_gradient_does_not_depend_on_the_micro_batches(policy, loss_mean):
    model, tokenizer = copy.deepcopy(policy[0]).double(), policy[1]
    trainable_parameters(model)
    sampled = gotr1.rollout(model, tokenizer, PROMPTS, group=3, max_chain=70, seed=1)
    assert sampled.chain_lens.unique().numel() > 1, "equal lengths would hide a local normaliser"
    advantages = torch.randn(9, generator=torch.Generator().manual_seed(0))
    whole = gradients(model, sampled, advantages, 9, loss_mean)
    for micro_batch in (2, 4):
        parts = gradients(model, sampled, advantages, micro_batch, loss_mean)
        assert (parts - whole).abs().max() < 1e-10


@pytest.mark.parametrize("mode", ["cond", "guided"])
def test_at_step_0_ratio_is_1_and_kl_is_0_with_guidance_and_temperature(policy, mode):
    sampled = gotr1.rollout(
        *policy, PROMPTS, 2, cfg=3.0, temperature=0.8, max_chain=60, logp_mode=mode
    )
    logp, mask = gotr1.token_logps(policy[0], sampled)
    logp = logp.detach()
    _, sums = grpo_loss(logp, sampled.logp, logp, torch.ones(6), mask, kl=0.1)
    ratio, clipped, kl, tokens = sums.tolist()
    assert ratio / tokens == pytest.approx(1, abs=1e-4)
    assert ((logp - sampled.logp) * mask).abs().max() < 1e-4
    assert clipped == kl == 0


def test_one_update_scores_once_and_several_compare_with_the_first(tmp_path, monkeypatch):
    """With three updates a micro-batch is scored three times, against the log-probabilities of the
    first: later ratios are not 1. Without a KL nothing asks for a reference."""
    score, loss = trainer.Engine.score, train_grpo.grpo_loss
    calls, ratios = [], []

    def counting(*args, **kwargs):
        calls.append(1)
        return score(*args, **kwargs)

    def looking(logp, logp_old, *rest, **settings):
        ratios.append((logp - logp_old).abs().max().item())
        return loss(logp, logp_old, *rest, **settings)

    monkeypatch.setattr(trainer.Engine, "score", counting)
    monkeypatch.setattr(trainer.Engine, "score_reference", None)
    monkeypatch.setattr(trainer.Engine, "keep_reference", None)
    monkeypatch.setattr(train_grpo, "grpo_loss", looking)
    for updates in (1, 3):
        calls.clear()
        ratios.clear()
        flags = f"--micro_batch 2 --kl 0 --updates {updates} --out {tmp_path / str(updates)}"
        train_grpo.main([*SHORT, *flags.split()])
        assert len(calls) == 2 * updates
        assert ratios[:2] == [0, 0]
        assert all(gap > 1e-4 for gap in ratios[2:])


def test_samples_are_scored_with_their_prompt_and_steps_have_other_random_numbers(
    policy, tmp_path, monkeypatch
):
    rollout, uniforms, score = gotr1.rollout, gotr1.uniforms, rewards.score
    drawn, numbers = [], []

    def drawing(*args, **settings):
        drawn.append(rollout(*args, **settings))
        return drawn[-1]

    def counting(*args):
        numbers.append(uniforms(*args))
        return numbers[-1]

    def scoring(judge, hps, prompts, chains, images, **settings):
        given = [gotr1.encode_prompt(policy[1], prompt) for prompt in prompts]
        assert given == drawn[-1].prompt_ids
        assert chains == drawn[-1].chains
        if len(drawn) == 2:
            raise InterruptedError  # enough was seen
        return score(judge, hps, prompts, chains, images, **settings)

    monkeypatch.setattr(gotr1, "rollout", drawing)
    monkeypatch.setattr(gotr1, "uniforms", counting)
    monkeypatch.setattr(rewards, "score", scoring)
    monkeypatch.setattr(train_grpo, "evaluate", lambda *_, **__: None)
    (tmp_path / "prompts.txt").write_text("a red ball\na blue cube\n")
    flags = "--batch_size 2 --group 2 --eval_prompts 1 --kl 0".split()
    files = ["--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "run")]
    with pytest.raises(InterruptedError):
        train_grpo.main([*flags, *files])
    assert len(drawn) == len(numbers) == 2
    assert (numbers[0] != numbers[1]).float().mean() > 0.99


# Several processes, as each of them sees it


def test_processes_share_the_prompts_and_random_numbers_of_one(tmp_path, monkeypatch):
    drawn = {}  # (rank, processes) -> (prompt, place) of the first step

    def drawing(model, tokenizer, prompts, seed, indices, **settings):
        assert seed == (0, 0)
        drawn[who] = list(zip(prompts, indices, strict=True))
        raise InterruptedError

    monkeypatch.setattr(gotr1, "rollout", drawing)
    monkeypatch.setattr(train_grpo, "evaluate", lambda *_, **__: None)
    (tmp_path / "prompts.txt").write_text("a red ball\na blue cube\na green cone\n")
    flags = "--batch_size 4 --group 2 --eval_prompts 1 --kl 0".split()
    files = ["--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "run")]
    for who in ((0, 1), (0, 2), (1, 2)):
        monkeypatch.setattr(run, "start_processes", lambda who=who: (*who, torch.device("cpu")))
        with pytest.raises(InterruptedError):
            train_grpo.main([*flags, *files])
    assert [place for _, place in drawn[0, 1]] == [0, 1, 2, 3]
    assert len({prompt for prompt, _ in drawn[0, 1]}) > 1
    assert drawn[0, 2] + drawn[1, 2] == drawn[0, 1]


def test_weights_of_a_process_are_shares_of_the_tokens_of_all(monkeypatch):
    mask = torch.tensor([[1.0, 1, 0], [1, 1, 1]])
    monkeypatch.setattr(run, "all_sum", lambda tokens: tokens + 5)  # of another process
    assert token_weights(mask, [0, 1], "token").sum().item() == pytest.approx(5 / 10)


def test_a_process_without_samples_takes_part_in_every_pass_with_weights_of_zero(monkeypatch):
    monkeypatch.setattr(run, "gather_list", lambda passes: [*passes, 2])  # of another process
    weights = torch.ones(4, 3)
    for kept, trained in (([], 0), ([3], 1)):
        batches = train_grpo.split_micro_batches(kept, weights, micro_batch=2)
        assert len(batches) == 2
        assert all(len(samples) == len(weight) > 0 for samples, weight in batches)
        assert sum(weight.sum().item() for _, weight in batches) == 3 * trained


def test_gradients_that_are_not_finite_are_counted_and_ten_end_the_run():
    skipped = 0
    for _ in range(9):
        skipped = train_grpo.count_skipped(math.nan, skipped)
    assert skipped == 9
    assert train_grpo.count_skipped(0.5, skipped) == 0
    with pytest.raises(RuntimeError, match="ten gradients in a row"):
        train_grpo.count_skipped(math.inf, skipped)


def test_a_first_step_without_a_gradient_is_an_error():
    for norm in (0.0, math.nan):
        with pytest.raises(RuntimeError, match="although rewards differ"):
            train_grpo.check_gradient(norm, step=0, kept=[0, 1])
    train_grpo.check_gradient(0.0, step=0, kept=[])
    train_grpo.check_gradient(0.0, step=1, kept=[0])


# The prompts


def test_prompts_of_several_files_are_counted_and_each_is_there_once(tmp_path, capsys):
    color, caption = tmp_path / "color_train.txt", tmp_path / "laion.parquet"
    color.write_text("a green bench and a blue bowl\n\na red ball\n a red ball \n")
    texts = ["two\nlines", None, "a red ball", "  "]
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2, 3, 4], "TEXT": texts}), caption)
    prompts = join_prompts((str(color), f"{caption}:TEXT"))
    assert prompts == ["a green bench and a blue bowl", "a red ball", "two lines"]
    output = capsys.readouterr().out
    assert f"{color}: 3 prompts, 1 of them again\n" in output
    assert f"{caption}:TEXT: 2 prompts, 1 of them again\n" in output
    for column in ("", ":id", ":text"):
        with pytest.raises(SystemExit) as stop:
            join_prompts((f"{caption}{column}",))
        assert stop.value.code == 2
        assert "behind a colon, one of TEXT" in capsys.readouterr().err
    assert join_prompts(("toy",)) == toy_prompts(2000, seed=7, held_out=False)
    flags = ["--prompts", "a.txt", "b.parquet:TEXT", "--steps", "3"]
    config = run.parse_args(train_grpo.Config, "", flags, train_grpo.PRESETS)
    assert config.prompts == ("a.txt", "b.parquet:TEXT")
    assert config.steps == 3


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


def test_the_paper_preset_says_only_what_differs():
    """Every one of its settings is another one than the toy's; the rest is shared."""
    plain = train_grpo.Config()
    for name, value in train_grpo.PRESETS["paper"].items():
        assert getattr(plain, name) != value, name
    flags = ["--preset", "paper", "--micro_batch", "3"]
    config = run.parse_args(train_grpo.Config, "", flags, train_grpo.PRESETS)
    assert (config.rollout_batch, config.micro_batch, config.judge_batch) == (1, 3, 64)
    assert (config.lora, config.lr, config.kl, config.advantage) == (32, 1e-5, 0.01, "group_std")
