"""GRPO for GoT-R1: reinforcement learning that teaches an image model to reason before it draws.

The model reads a prompt, writes a chain that names each object and its box, then samples the image
tokens. It does so `group` times per prompt. Rewards compare prompt, chain and picture. Samples
with a reward above the mean of their group become more likely:

    advantage = reward - mean of the group      (the paper also divides by the group's std + 1e-4)
    loss      = mean over all sampled tokens of
                -min(ratio * advantage, clip(ratio) * advantage) + kl * k3(policy, reference)

Where this code departs from the paper (sections 3 and 4.1), or fills in what it leaves open:
1. The loss is one mean over all sampled tokens of the step. The paper's equation 2 takes the mean
   of each sample first (--loss_mean sequence).
2. Groups whose rewards are all equal are left out of that mean, and counted.
3. One optimizer step per rollout, so ratio is 1 and nothing is clipped; --updates takes more, and
   then the KL has the ratio as its weight, see `grpo_loss`.
4. The judge's queries are our wording of the paper's. R_sem is the mean of four marks (its figure 8
   prints one), layouts are drawn in black, and the query for boxes shows a list as its example.
5. The toy trains all language parameters, not LoRA; samples without guidance; and its advantages
   are not divided by a standard deviation.

    torchrun train_grpo.py                          # the toy: two CPU cores, a few minutes
    python train_grpo.py --out out/again --seed 1   # the same without torchrun, another seed
    python train_grpo.py --preset paper --model …   # Janus-Pro: docs/gpu.md

From a prompt to its gradient: `main` below; rollout and token_logps in gotr1.py; score in
rewards.py; Engine in engine/trainer.py.
"""

import functools
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

import gotr1
import rewards
from data.prompts import join_prompts, read_prompts
from engine import run, trainer
from engine.drift import Drift
from evaluation import held_out, sheets, stats, variety
from render_boxes import parse_chain
from toy.world import follow_plans, read_text


@dataclass
class Config(rewards.JudgeConfig, trainer.TrainerConfig):
    """The flags: these, and what is inherited, those of the judge and those of both trainers."""

    preset: Literal["toy", "paper"] = "toy"  # which defaults the other flags have, see PRESETS
    # Model and data
    model: str = "toy"  # `toy`, or a folder or hub id of a checkpoint
    prompts: tuple[str, ...] = ("toy",)  # `toy`; text files, one prompt per line; x.parquet:column
    eval_file: str = "toy"  # held-out prompts: `toy`, or a text file with one prompt per line
    eval_prompts: int = 240  # held-out prompts to draw before and after training
    out: str = "out/grpo"  # folder of this run; the same flags again continue where it stopped
    # Rollout
    steps: int = 110  # rollouts in all (paper: 1000)
    batch_size: int = 8  # prompts per step, over all ranks (paper: 8)
    group: int = 16  # samples per prompt (paper: 16)
    cfg: float | None = None  # guidance; default: 5 for Janus-Pro, 1 (none) for the toy
    max_chain: int | None = None  # most tokens of a chain; default: 600 for Janus-Pro, toy 96
    rollout_batch: int = 8  # prompts that a rank draws at a time; changes memory, not the samples
    # Loss
    updates: int = 1  # optimizer steps per rollout, each over all of it
    clip: float = 0.2  # the loss clips the ratio to 1 - clip .. 1 + clip
    kl: float = 0.02  # weight of the KL to the reference; 0: no reference model is loaded
    loss_mean: Literal["token", "sequence"] = "token"  # what counts equally, see `token_weights`
    advantage: Literal["mean", "group_std", "batch_std"] = "mean"  # see `step_advantages`
    logp: Literal["cond", "guided"] = "cond"  # image tokens are scored without or with guidance
    # Optimisation
    lr: float = 7e-4  # peak learning rate (paper: 1e-5 with LoRA; 1e-6 suits a full real model)
    lr_floor: float = 0.1  # share of the peak at which the cosine ends
    warmup: float = 0.1  # share of the steps over which the learning rate rises to its peak
    # Looking at it
    look_every: int = 10  # steps between frames of learning.gif, 4 held-out prompts; 0: none
    evaluate_looks: bool = False  # each look draws and scores all held-out prompts as well


# Only what differs from the defaults above. From the paper (section 4.1): batch_size, group, steps,
# lr and its cosine, lora, advantage. Not in the paper, taken from T2I-R1, which trains the same
# model: cfg 5, logp cond, kl 0.01, no warm-up. dtype, rollout_batch and so on suit a 7B on 80 GB,
# see docs/gpu.md.
PRESETS = {
    "toy": {},
    "paper": {
        "steps": 1000,
        "kl": 0.01,
        "advantage": "group_std",
        "lr": 1e-5,
        "lr_floor": 0.0,
        "warmup": 0.0,
        "lora": 32,
        "dtype": "bfloat16",
        "gradient_checkpointing": True,
        "rollout_batch": 1,
        "micro_batch": 4,
        "judge_batch": 64,
        "look_every": 50,
    },
}


# ------------------------------------------------------------------------------------------------
# The mathematics


def group_advantages(
    rewards: torch.Tensor, group: int, eps: float = 1e-4, std: bool = True
) -> torch.Tensor:
    """Rewards (N,) -> advantages (N,), paper equation 1. The `group` samples of a prompt stand next
    to each other.

    The standard deviation is the unbiased one, torch's default. std=False divides by nothing, as
    Dr. GRPO does. A group of equal rewards gets exactly 0.
    >>> group_advantages(torch.tensor([1.0, 0.0, 0.5, 0.5]), group=2)
    tensor([ 0.7070, -0.7070,  0.0000,  0.0000])
    """
    rewards = rewards.view(-1, group)
    centered = rewards - rewards.mean(dim=1, keepdim=True)
    scale = rewards.std(dim=1, keepdim=True) + eps if std else 1.0
    # The mean of equal rewards may be rounded, and centered then is not 0: compare the rewards
    equal = rewards.amax(dim=1, keepdim=True) == rewards.amin(dim=1, keepdim=True)
    return torch.where(equal, 0.0, centered / scale).flatten()


def step_advantages(rewards: torch.Tensor, group: int, kind: str) -> torch.Tensor:
    """Rewards (N,) -> advantages (N,): minus the mean of the group, then divided by

    "mean"       nothing (Dr. GRPO)
    "group_std"  the standard deviation of the group (the paper)
    "batch_std"  the standard deviation of all advantages of the step, on all ranks
    """
    advantages = group_advantages(rewards, group, std=kind == "group_std")
    if kind == "batch_std":
        of_all_ranks = torch.tensor(run.gather_list(advantages.tolist()))
        advantages = advantages / (of_all_ranks.std().item() + 1e-4)
    return advantages


def grpo_loss(logp, logp_old, logp_ref, advantages, weight, clip: float = 0.2, kl: float = 0.01):
    """The clipped objective with the k3 estimator of the KL (joschu.net/blog/kl-approx.html; paper
    equation 2).

    logp, logp_old, logp_ref: (N, S); advantages: (N,). `logp_ref` may be None when kl is 0.
    weight: (N, S), see `token_weights`. Weights of all micro-batches and ranks add up to 1, so the
        sum of their losses is the loss of the step.

    Returns the loss, a scalar, and for the log (4,): the sum of ratio, of is_clipped and of k3 over
    the tokens with a weight, and the number of these tokens."""
    advantages = advantages[:, None]
    ratio = (logp - logp_old).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    per_token = -torch.minimum(ratio * advantages, clipped * advantages)
    k3 = torch.zeros_like(logp)
    if kl:
        gap = logp_ref - logp
        # An expectation over what the policy samples now, from samples of the old one: hence the
        # ratio. Without it a token that an update made unlikely has a gradient without bounds
        k3 = ratio.detach() * (gap.exp() - gap - 1)
    loss = ((per_token + kl * k3) * weight).sum()

    counts = (weight > 0).float()
    is_clipped = (clipped * advantages < ratio * advantages).float()
    sums = [(value.detach() * counts).sum() for value in (ratio, is_clipped, k3)]  # for the log
    return loss, torch.stack([*sums, counts.sum()])


def token_weights(mask: torch.Tensor, kept: list[int], loss_mean: str) -> torch.Tensor:
    """Mask (N, S) -> the weight of each token in the loss; the weights of all ranks add up to 1.
    Samples that are not in `kept` have weight 0.

    "token"     every sampled token of the step counts the same
    "sequence"  every sample counts the same, and every token within it (paper equation 2)
    """
    weights = torch.zeros_like(mask)
    weights[kept] = mask[kept]
    if loss_mean == "sequence":
        weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1)
    return weights / run.all_sum(weights.sum()).clamp(min=1)


# ------------------------------------------------------------------------------------------------
# The run


def main(argv: list[str] | None = None) -> None:
    config = run.parse_args(Config, __doc__, argv, PRESETS)
    rank, world, device = run.start_processes()
    training = load_training(config, rank, world, device)
    config = training.config  # with the guidance and chain length that suit the model
    engine = training.engine
    share = config.batch_size // world  # prompts per rank and step
    log = run.Log(training.folder, engine.first_step, config.wandb)
    run.explain_crashes(training.folder)
    stop_requested = run.watch_signals(device)  # a function: has SIGTERM or Ctrl-C come?
    if engine.first_step == 0:
        evaluate(training, "before", step=0)

    skipped = 0  # gradients in a row that were not finite
    steps = tqdm(
        range(engine.first_step, config.steps),
        initial=engine.first_step,
        total=config.steps,
        desc="GRPO",
        disable=rank > 0,
    )
    for step in steps:
        clock = [time.time()]  # when each phase began

        # 1) Prompts: the step has `batch_size` of them, in an order; each rank takes some places
        order = trainer.order_of_step(len(training.prompts), step, config.batch_size, config.seed)
        places = list(range(rank * share, (rank + 1) * share))
        prompts = [training.prompts[order[place]] for place in places]

        # 2) Rollout: `group` chains and pictures per prompt. Sample n belongs to prompt n // group.
        # Seed, step and place fix the random numbers: they are the same on any number of ranks
        early = EarlyJudging(training, prompts)
        with engine.gathered() as model:
            rollouts = gotr1.rollout(
                model,
                engine.tokenizer,
                prompts,
                group=config.group,
                cfg=config.cfg,
                seed=(config.seed, step),
                max_chain=config.max_chain,
                indices=places,
                logp_mode=config.logp,
                at_once=config.rollout_batch,
                each=early.start,
            )
        clock.append(time.time())

        # 3) Rewards: prompt to chain, chain to image, prompt to image, aesthetics. A judge on a
        # server has seen the images during the rollout: they are decoded already
        images = early.images or gotr1.decode_images(engine.model, rollouts.image_tokens)
        clock.append(time.time())
        scores = rewards.score(
            training.judge,
            training.hps,
            repeat(prompts, config.group),
            rollouts.chains,
            images,
            parts=config.rewards,
            combine=config.combine,
            strict=not training.rehearsal,
        )
        clock.append(time.time())

        # 4) Advantages: within a group. Groups of equal rewards carry no signal and are left out
        totals = torch.tensor([row["total"] for row in scores], device=device)
        advantages = step_advantages(totals, config.group, config.advantage)
        has_signal = advantages.view(-1, config.group).any(dim=1)  # (prompts,)
        kept = has_signal.repeat_interleave(config.group).nonzero().flatten().tolist()
        weights = token_weights(rollouts.mask, kept, config.loss_mean)
        micro_batches = split_micro_batches(kept, weights, config.micro_batch)

        # 5) Loss and gradient: one pass over complete sequences. The losses of micro-batches and
        # ranks add up to one mean over all tokens, so neither changes the gradient
        lr = trainer.cosine_lr(step, config.steps, config.lr, config.warmup, config.lr_floor)
        drift = Drift(config.dtype, config.cfg, config.logp, device)  # of training from the sampler
        ref_logps = reference_logps(training, rollouts, micro_batches)
        old_logps = {}  # micro-batch -> (n, S), under the policy that sampled
        for _ in range(config.updates):
            loss_sums = torch.zeros(4, device=device)  # for the log, see `grpo_loss`
            for k, (samples, mb_weight) in enumerate(micro_batches):
                mb = rollouts.select(samples)
                mb_logp, _ = engine.score(mb)
                old_logp = old_logps.setdefault(k, mb_logp.detach())  # set by the first update
                drift.add(old_logp, mb.logp, ref_logps[k], mb_weight > 0, mb.image_tokens.shape[1])
                loss, sums = grpo_loss(
                    mb_logp,
                    old_logp,
                    ref_logps[k],
                    advantages[samples],
                    mb_weight,
                    clip=config.clip,
                    kl=config.kl,
                )
                engine.backward(loss)
                loss_sums += sums

            # 6) Step: the gradient is summed over ranks, then clipped; not finite: no step
            grad_norm = engine.step(lr)
            skipped = count_skipped(grad_norm, skipped)
        drift.check(is_first_step=step == 0)
        check_gradient(grad_norm, step, kept)
        clock.append(time.time())

        # 7) Log: means over all samples and tokens of all ranks
        row = {"step": step}
        row.update(mean_of_samples(rollouts, scores, images, config.group))
        row.update(drift.row())
        row.update(mean_of_tokens(loss_sums))
        row.update({"grad_norm": grad_norm, "skipped": skipped, "lr": lr})
        row.update(seconds_of_phases(clock, world, device))
        row["samples_s"] = config.batch_size * config.group / row["seconds"]
        row["peak_gib"] = run.peak_gib(device)
        log.write(row)
        run.say(log_line(row, config.steps))
        check_boxes(training, row)
        warn_of_collapse(log.rows)

        # 8) Look and save, now and then
        done = step + 1
        if is_due(done, config.look_every):
            look(training, done, row["reward"])
        stopping = stop_requested()
        if stopping or is_due(done, config.save_every) or done == config.steps:
            engine.save(training.folder, done, config.keep)
            log.plot(CURVES)
            join_frames(training)
        if stopping:
            run.say(f"stopped after step {done} of {config.steps}")
            run.say(f"the same command continues from {training.folder}")
            return

    # 9) After: the same held-out prompts with the same random numbers
    if not (training.folder / "eval_after.json").exists():
        evaluate(training, "after", config.steps)
    if rank == 0:
        summarise_run(training)


# ------------------------------------------------------------------------------------------------
# Before the run


@dataclass
class Training:
    """What a run has loaded."""

    config: Config
    engine: trainer.Engine
    judge: object  # the contract at the top of rewards.py
    hps: object  # a function (prompts, images) -> scores, or None
    prompts: list[str]  # to train on
    held_out: list[str]  # prompts to evaluate on
    given_plans: list[tuple[str, str]]  # (prompt, chain) to draw and evaluate, see held_out.py
    folder: Path
    rank: int
    world: int  # number of ranks

    @property
    def rehearsal(self) -> bool:
        """Whether this is a run of one step, to see that everything works, and how fast. Random
        weights will do: unreadable replies and chains without boxes do not stop it."""
        return self.config.steps == 1


def load_training(config: Config, rank: int, world: int, device: torch.device) -> Training:
    """Loads everything that the flags name. Bad input ends the program here with a message, before
    anything is written."""
    check_config(config, world)
    prompts = join_prompts(config.prompts)
    eval_prompts = read_prompts(config.eval_file, held_out=True, count=config.eval_prompts)
    check_toy_judge(config, prompts + eval_prompts)
    saved = run.checkpoint_to_resume(Path(config.out))
    if saved:
        run.open_run(config.out, config)  # with other flags the program ends here
    try:
        judge, hps = rewards.load_judge(config, device)  # first: it fails sooner than a large model
        engine = trainer.load_engine(config, device, gotr1.token_logps, config.model, saved)
        if config.kl and not config.lora:
            trainer.load_reference(engine, config.model)
        chosen = gotr1.with_defaults(config, engine.model)
        eval_ids = [gotr1.encode_prompt(engine.tokenizer, prompt) for prompt in eval_prompts]
        gotr1.check_room(engine.model, eval_ids, chosen.max_chain + 1)
        prompts = drop_too_long(prompts, engine.model, engine.tokenizer, chosen.max_chain)
    except (OSError, ValueError) as problem:
        run.fail(str(problem))
    given_plans = []
    if config.eval_file == "toy":  # of each of three kinds a fourth of --eval_prompts, at most 60
        given_plans = follow_plans(math.ceil(config.eval_prompts / 4))
    folder = run.open_run(config.out, config)
    return Training(
        config=chosen,
        engine=engine,
        judge=judge,
        hps=hps,
        prompts=prompts,
        held_out=eval_prompts,
        given_plans=given_plans,
        folder=folder,
        rank=rank,
        world=world,
    )


def check_config(config: Config, world: int) -> None:
    """Bad settings end the program here with a message, before anything is loaded or written."""
    run.check_ranges(
        config,
        at_least_one="steps batch_size updates eval_prompts save_every rollout_batch micro_batch "
        "max_chain",
        above_zero="lr",
        not_negative="judge_batch kl warmup lr_floor clip lora look_every seed cfg",
    )
    if not config.prompts:
        run.fail("--prompts is empty: give toy, or text files with one prompt per line")
    if config.group < 2:
        run.fail(f"--group is {config.group}: a sample is compared with its group, so 2 or more")
    if config.batch_size % world:
        run.fail(
            f"--batch_size {config.batch_size} prompts cannot be shared evenly by {world} processes"
        )
    if not config.rewards or set(config.rewards) - set(rewards.PARTS):
        expected = " ".join(rewards.PARTS)
        run.fail(f"--rewards {' '.join(config.rewards)}: expected some of {expected}")
    if world > 1 and ":" in config.judge_device:
        run.fail(
            f"--judge_device {config.judge_device} would hold the judges of all {world} processes"
        )
    run.check_wandb(config.wandb)


def check_toy_judge(config: Config, prompts: list[str]) -> None:
    """The toy's judge and stand-in for HPS understand the toy's sentences only."""
    is_toy = config.judge.split(":")[0] == "toy"  # also toy:0.2, which errs
    if not is_toy and not (config.hps == "toy" and "hps" in config.rewards):
        return
    for prompt in prompts:
        names, _ = read_text(prompt)
        if not names:
            run.fail(
                f"--judge toy and --hps toy know only the toy's world, not {prompt!r}: give others"
            )


def drop_too_long(prompts: list[str], model, tokenizer, max_chain: int) -> list[str]:
    """The prompts that leave room in the context for a chain and the image; prints how many do not.
    Raises ValueError when none does."""
    context = model.config.text_config.max_position_embeddings
    room = context - (max_chain + 1) - gotr1.image_token_count(model)
    kept = []
    for prompt in prompts:
        # of millions of captions most need not be encoded: a token is at least a byte
        is_short = len(gotr1.format_prompt(prompt).encode()) < room
        if is_short or len(gotr1.encode_prompt(tokenizer, prompt)) <= room:
            kept.append(prompt)
    if not kept:  # this raises the ValueError
        gotr1.check_room(model, [gotr1.encode_prompt(tokenizer, prompts[0])], max_chain + 1)
    if len(kept) < len(prompts):
        run.say(f"{len(prompts) - len(kept)} prompts of more than {room} tokens are left out")
    return kept


# ------------------------------------------------------------------------------------------------
# During a step


def repeat(prompts: list[str], group: int) -> list[str]:
    """The prompt of each sample."""
    return [prompt for prompt in prompts for _ in range(group)]


class EarlyJudging:
    """Sends every finished part of a rollout to a judge on a server while the next part is drawn.
    Does nothing for a judge in this process."""

    def __init__(self, training: Training, prompts: list[str]):
        self.training = training
        self.prompts = prompts
        self.images = []  # of all parts; stays empty for a judge in this process

    def start(self, first: int, part: gotr1.Rollout) -> None:
        """`first`: index of the part's first prompt among the prompts of this rank."""
        judge = self.training.judge
        if not hasattr(judge, "ask_early"):
            return
        config = self.training.config
        prompts = self.prompts[first : first + len(part) // config.group]
        images = gotr1.decode_images(self.training.engine.model, part.image_tokens)
        judge.ask_early(repeat(prompts, config.group), part.chains, images, config.rewards)
        self.images += images


def split_micro_batches(kept: list[int], weights: torch.Tensor, micro_batch: int):
    """The micro-batches of this rank, a list of (samples, their weights (n, S)).

    Every rank gets as many as the rank with the most samples, because with weights in shards all
    ranks take part in each pass. A rank without samples left scores sample 0 with weights of 0."""
    passes = max(run.gather_list([math.ceil(len(kept) / micro_batch)]))
    batches = []
    for k in range(passes):
        samples = kept[k * micro_batch : (k + 1) * micro_batch]
        if samples:
            batches.append((samples, weights[samples]))
        else:
            batches.append(([0], torch.zeros_like(weights[:1])))
    return batches


def reference_logps(training: Training, rollouts: gotr1.Rollout, micro_batches) -> list:
    """Per micro-batch the log-probabilities under the reference, (n, S); None when --kl is 0."""
    logps = []
    for samples, _ in micro_batches:
        logp = None
        if training.config.kl:
            logp, _ = training.engine.score_reference(rollouts.select(samples))
        logps.append(logp)
    return logps


def count_skipped(grad_norm: float, skipped: int) -> int:
    """How many gradients in a row were not finite. Raises RuntimeError at ten."""
    if math.isfinite(grad_norm):
        return 0
    if skipped == 9:
        raise RuntimeError(
            "ten gradients in a row were not finite: lower --lr, or look at the rewards"
        )
    return skipped + 1


def check_gradient(grad_norm: float, step: int, kept: list[int]) -> None:
    """Raises RuntimeError when the first step has differing rewards but no gradient."""
    if step == 0 and kept and not grad_norm > 0:
        raise RuntimeError(f"self-test: the gradient norm is {grad_norm} although rewards differ")


def check_boxes(training: Training, row: dict) -> None:
    """Raises RuntimeError when no chain of the first step has a box: nothing could be learned."""
    if row["step"] > 0 or row["no_box"] < 1:
        return
    problem = "no chain has a box: start from a model that writes chains, see train_sft.py"
    if not training.rehearsal:
        raise RuntimeError(problem)
    run.say(f"a rehearsal of one step: {problem}")


def warn_of_collapse(rows: list[dict]) -> None:
    """Prints, once in a run, that plans or texts have become alike; rows: the log up to now."""
    for warning in variety.collapse_warnings(rows):
        run.say(warning)


def is_due(done: int, every: int) -> bool:
    """Whether what happens every `every` steps (0: never) happens after `done` steps."""
    return every > 0 and done % every == 0


# ------------------------------------------------------------------------------------------------
# Looking at held-out prompts


def score_all(training: Training, prompts, chains, images) -> tuple[list[dict], list[dict]]:
    """The rewards of held-out samples, always all parts and their product as `total`, and the boxes
    that the judge found. Where --rewards or --combine train on something else, that is `trained`.
    """
    config = training.config
    judge = getattr(training.judge, "exact", training.judge)  # toy:0.2 errs in training only
    rows, found = rewards.score_with_boxes(
        judge, training.hps, prompts, chains, images, strict=not training.rehearsal
    )
    if set(config.rewards) < set(rewards.PARTS) or config.combine != "product":
        for row in rows:
            trained = {part: row[part] for part in config.rewards if part in row}
            row["trained"] = rewards.total_reward(trained, config.combine)
    return rows, found


def drawing(training: Training) -> held_out.Drawing:
    """The policy as it is now, and how it draws held-out prompts."""
    config = training.config
    return held_out.Drawing(
        training.engine.model,
        training.engine.tokenizer,
        seed=config.seed,
        cfg=config.cfg,
        max_chain=config.max_chain,
        rank=training.rank,
        world=training.world,
        at_once=config.rollout_batch * config.group,
        gathered=training.engine.gathered,
    )


def evaluate(training: Training, label: str, step: int) -> None:
    """Draws and scores the held-out prompts, one sample each, then the given plans; then measures
    how different the plans of one prompt are.

    Writes eval_<label>.json (means), rows_<label>.json (each sample) and samples_<label>.png (the
    first 12)."""
    policy = drawing(training)
    score = functools.partial(score_all, training)
    is_exact = training.config.judge.split(":")[0] == "toy"
    rows = held_out.evaluate(policy, score, training.held_out, label=label, exact=is_exact)
    rest = held_out.evaluate_rest(policy, score, training.held_out, training.given_plans, label)
    if training.rank == 0:
        folder = training.folder
        held_out.write_evaluation(folder, label, step, training.config.seed, rows + rest)
        held_out.draw_sheet(rows[:12], folder / f"samples_{label}.png")


def look(training: Training, step: int, reward: float) -> None:
    """Draws a frame of learning.gif: the first 4 held-out prompts after `step` steps. With
    --evaluate_looks also draws and scores all held-out prompts."""
    if training.config.evaluate_looks and step < training.config.steps:
        evaluate(training, f"step_{step:06d}", step)

    def no_score(prompts, chains, images):
        return [{}] * len(images), [{}] * len(images)

    rows = held_out.evaluate(drawing(training), no_score, training.held_out[:4], label="")
    if training.rank == 0:
        frames = training.folder / "frames"
        frames.mkdir(exist_ok=True)
        title = f"after {step} steps of GRPO: reward {reward:.2f}"
        cells = []
        for row in rows:
            cell = {"prompt": row["prompt"], "chain": row["chain"], "image": row["image"]}
            cell["boxes"] = []  # none over the picture
            cells.append(cell)
        path = frames / f"{step:06d}.png"
        sheets.draw_sheet(cells, path, columns=2, side=160, title=title)


def join_frames(training: Training) -> None:
    """Writes learning.gif from the frames so far."""
    frames = sorted((training.folder / "frames").glob("*.png"))
    if training.rank == 0 and frames:
        sheets.join_frames(frames, training.folder / "learning.gif")


def summarise_run(training: Training) -> None:
    """Prints the table of before and after, and the files that were written."""
    folder = training.folder
    before = json.loads((folder / "eval_before.json").read_text())
    after = json.loads((folder / "eval_after.json").read_text())
    print(stats.before_after(before, after))
    print(f"\n{len(training.held_out)} held-out prompts, one sample each. Written to {folder}:")
    for name in (
        "samples_before.png",
        "samples_after.png",
        "learning.gif",
        "curves.png",
        "log.jsonl",
    ):
        if (folder / name).exists():  # no learning.gif with --look_every 0
            print(f"  {folder / name}")
    print(f"  {folder / f'step_{training.config.steps:06d}'}")


# ------------------------------------------------------------------------------------------------
# The log


CURVES = {  # title of a panel of curves.png -> keys of the log that it shows
    "total reward": ["reward"],
    "its parts": ["sem", "spa", "ri", "pi", "hps"],
    "entropy (nats per token)": ["entropy_text", "entropy_image"],
    "KL to the reference": ["kl"],
    "variety of plans": ["layout_variety", "place_entropy"],
    "looks of pictures": ["brightness", "saturation", "edges"],
}
PHASES = ("rollout_s", "decode_s", "judge_wait_s", "update_s")


def mean_of_samples(
    rollouts: gotr1.Rollout, scores: list[dict], images: list, group: int
) -> dict[str, float]:
    """Over the samples of all ranks: means, standard deviations of the rewards (`reward_std`,
    `sem_std`, …), and how different the plans of one prompt are."""
    rows = run.gather_list(describe_samples(rollouts, scores, images, group))
    means = {}
    for key in rows[0]:
        if key != "chain":
            means[key] = float(np.mean([row[key] for row in rows]))
    for key in ("reward", *rewards.PARTS):
        if key in rows[0]:
            means[f"{key}_std"] = float(np.std([row[key] for row in rows]))
    means.update(variety.mean_variety([row["chain"] for row in rows], group))
    return means


def describe_samples(
    rollouts: gotr1.Rollout, scores: list[dict], images: list, group: int
) -> list[dict]:
    """What the log needs of each sample of this rank. `group_std` and `zero_var` belong to a group:
    each of its samples carries them."""
    image_len = rollouts.image_tokens.shape[1]
    text_tokens = rollouts.mask[:, :-image_len].sum(dim=1).clamp(min=1)
    entropy_text = rollouts.entropy[:, :-image_len].sum(dim=1) / text_tokens
    entropy_image = rollouts.entropy[:, -image_len:].mean(dim=1)
    looks = variety.looks(images)
    totals = np.array([row["total"] for row in scores])
    rows = []
    for k, parts in enumerate(scores):
        first = k // group * group
        totals_of_group = totals[first : first + group]
        row = {"reward": parts["total"], **parts}
        del row["total"]
        row["group_std"] = float(totals_of_group.std(ddof=1))
        row["zero_var"] = float(totals_of_group.max() == totals_of_group.min())
        row["no_box"] = float(not parse_chain(rollouts.chains[k]))
        row["forced"] = float(rollouts.forced[k])
        row["chain_len"] = float(rollouts.chain_lens[k])
        row["entropy_text"] = float(entropy_text[k])
        row["entropy_image"] = float(entropy_image[k])
        row.update(looks[k])
        row["chain"] = rollouts.chains[k]
        rows.append(row)
    return rows


def mean_of_tokens(loss_sums: torch.Tensor) -> dict[str, float]:
    """This rank's sums from `grpo_loss` -> means over the trained tokens of all ranks; {} when no
    token was trained."""
    *sums, tokens = run.all_sum(loss_sums).tolist()
    if tokens == 0:
        return {}
    return {name: value / tokens for name, value in zip(("ratio", "clip", "kl"), sums, strict=True)}


def seconds_of_phases(clock: list[float], world: int, device: torch.device) -> dict[str, float]:
    """Seconds of each phase and of the step, means over the ranks. `clock`: the times at which the
    phases began, and the end of the last one."""
    seconds = torch.tensor(np.diff(clock), device=device)
    row = dict(zip(PHASES, (run.all_sum(seconds) / world).tolist(), strict=True))
    row["seconds"] = sum(row.values())
    return row


def log_line(row: dict, steps: int) -> str:
    """A line for the terminal."""
    parts = " ".join(f"{part} {row[part]:.2f}" for part in rewards.PARTS if part in row)
    shares = " ".join(
        f"{phase.split('_')[0]} {row[phase] / row['seconds']:.0%}" for phase in PHASES
    )
    return (
        f"step {row['step'] + 1:4d}/{steps} | reward {row['reward']:.3f} ({parts}) | "
        f"zero_var {row['zero_var']:.2f} | kl {row.get('kl', 0):.4f} | "
        f"grad {row['grad_norm']:6.2f} | "
        f"chain {row['chain_len']:3.0f} | {row['seconds']:.2f} s ({shares})"
    )


if __name__ == "__main__":
    main()
