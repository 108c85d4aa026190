"""GRPO for GoT-R1: reinforcement learning that teaches an image model to reason before it draws
(paper section 3).

The model reads a prompt, writes a chain that names each object and its box, then samples the image
tokens. For each prompt it does so `group` times; rewards compare prompt, chain and picture; what
did better than its group's mean becomes more likely.

    advantage = reward - mean of the group          (the paper divides it by the group's std + 1e-4)
    loss      = mean over all sampled tokens of
                -min(ratio * advantage, clip(ratio) * advantage) + kl * k3(policy, reference)

Departures from the paper, which leaves these open (equation 2, section 4.1):
1. One mean over all sampled tokens of the step on all ranks: neither micro-batches nor ranks change
   the gradient. Equation 2 is written for sequences (`--loss_mean sequence`).
2. Groups whose rewards are all equal carry no signal. They are left out of the mean and counted
   (`zero_var` in the log).
3. One optimizer step per rollout, so that ratio == 1 and nothing is clipped; `--updates` takes
   more. Clip 0.2 (`--clip_low`, `--clip_high`).
4. The KL weight is 0.02 (`--kl`; 0.01 in `--preset paper`). With 0 there is no reference model.
5. What was not sampled is not trained, a <begin_of_image> forced at `max_chain` included.
6. No guidance in the toy's rollout. With guidance, `--logp cond` scores the conditional
   distribution, as other trainers of this model do, and `--logp guided` the one that was sampled
   from.
7. The toy trains all language parameters at 7e-4; the paper uses LoRA (rank 32) at 1e-5.
8. The judge's instructions are our own wording of the paper's.
9. The toy does not divide advantages by the standard deviation of the group; `--advantage_std` and
   `--preset paper` do (equation 1). Divided, differences of a hundredth between good samples count
   as much as those between right and wrong, and all plans become one layout: docs/toy.md.

    torchrun train_grpo.py                          # the toy: two CPU cores, a few minutes
    python train_grpo.py --out out/again --seed 1   # the same without torchrun, another seed

The way of a prompt to its gradient: `main` below; rollout and token_logps in gotr1.py (what makes
the rollout fast: engine/decode.py); score in rewards.py; Engine in engine/trainer.py.
"""

import functools
import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import gotr1
import rewards
from data.prompts import join_prompts, read_prompts
from engine import run, speed, trainer
from engine.drift import Drifts, check_drift, drift_limits, self_test
from evaluation import held_out as held_out_prompts
from evaluation import stats, variety
from render_boxes import parse_chain
from toy.world import random_plan, read_text


@dataclass
class Config(rewards.JudgeConfig, trainer.TrainerConfig):
    """The flags: these, those of every trainer (TrainerConfig) and those of the judge
    (JudgeConfig)."""

    preset: Literal["toy", "paper"] = "toy"  # defaults of all flags: the toy's, or the paper's
    # Model and data
    model: str = "toy"  # `toy`, or a folder or hub id of a checkpoint
    prompts: tuple[str, ...] = ("toy",)  # `toy`; text files, one prompt per line; x.parquet:column
    eval_file: str = "toy"  # held-out prompts: `toy`, or a text file with one prompt per line
    out: str = "out/grpo"  # folder of this run; the same flags again continue where it stopped
    # Rollout
    steps: int = 110  # rollouts in all (paper: 1000)
    batch_size: int = 8  # prompts per step, over all ranks (paper: 8)
    group: int = 16  # samples per prompt (paper: 16)
    temperature: float = 1.0  # of chain and image tokens (paper: 1)
    cfg: float = 1.0  # guidance in the rollout; 1 is none: the toy's unconditional half is weak
    max_chain: int = 96  # most chain tokens that are sampled (official code, for Janus-Pro: 600)
    rollout_batch: int = 8  # prompts that a rank draws at a time; 0: what fits into the GPU
    # Borrowed plans, see `borrow_plans`
    borrow: float = 0.0  # share of the samples that draw a plan that is given to them
    borrow_from: Literal["toy", "reference"] = "toy"  # random layouts; or the reference's best plan
    # Loss
    updates: int = 1  # optimizer steps per rollout, each over all of it
    clip_low: float = 0.2  # the ratio policy / policy that sampled is clipped to 1 - clip_low
    clip_high: float = 0.2  # and to 1 + clip_high; idle with one update
    kl: float = 0.02  # weight of the KL to the reference; 0: no reference model
    loss_mean: Literal["token", "sequence"] = "token"  # over tokens; or per sample, then samples
    advantage_std: bool = False  # divide by the standard deviation of the group, as the paper does
    logp: Literal["cond", "guided"] = "cond"  # distribution of image tokens that is scored with cfg
    # Optimisation
    lr: float = 7e-4  # peak learning rate (paper: 1e-5 with LoRA; 1e-6 suits a full real model)
    lr_floor: float = 0.1  # share of the peak at which the cosine ends
    warmup: float = 0.1  # share of the steps over which the learning rate rises to its peak
    # Looking at it
    eval_prompts: int = 240  # held-out prompts before and after
    eval_plans: str = "toy"  # given plans, to see whether pictures follow: `toy`, a .jsonl, or none
    eval_every: int = 0  # steps between evaluations in between; 0: none
    sheet_every: int = 0  # steps between sheets of the first 12 held-out prompts; 0: none
    gif_every: int = 10  # steps between frames of learning.gif, 4 held-out prompts; 0: none


# Stated in section 4.1: group, batch, steps, lr and its cosine, LoRA 32/32, temperatures, judge.
# Open there, and chosen as T2I-R1 did for the same base model: guidance 5 in the rollout (the
# paper's at evaluation), scored on the conditional branch, KL 0.01, one update per rollout, no
# warm-up. Chains of up to 600 tokens: the official inference code. LoRA is on every linear layer of
# the language model.
PRESETS = {
    "toy": {},
    "paper": {
        "steps": 1000,
        "batch_size": 8,
        "group": 16,
        "temperature": 1.0,
        "cfg": 5.0,
        "logp": "cond",
        "max_chain": 600,
        "rollout_batch": 0,
        "borrow_from": "reference",
        "kl": 0.01,
        "advantage_std": True,
        "lr": 1e-5,
        "lr_floor": 0.0,
        "warmup": 0.0,
        "lora": 32,
        "lora_alpha": 32.0,
        "dtype": "bfloat16",
        "gradient_checkpointing": True,
        "micro_batch": 0,
        "judge_batch": 0,
        "eval_plans": "",
        "gif_every": 50,
    },
}


# ------------------------------------------------------------------------------------------------
# The mathematics


def group_advantages(
    rewards: torch.Tensor, group: int, eps: float = 1e-4, std: bool = True
) -> torch.Tensor:
    """Rewards (N,), the `group` samples of a prompt next to each other -> advantages (N,) (paper
    equation 1).

    The standard deviation is the unbiased one, as torch's default; without `std` there is no
    division (Dr. GRPO). A group of equal rewards gets exactly 0.
    >>> group_advantages(torch.tensor([1.0, 0.0, 0.5, 0.5]), group=2)
    tensor([ 0.7070, -0.7070,  0.0000,  0.0000])
    """
    rewards = rewards.view(-1, group)
    centered = rewards - rewards.mean(dim=1, keepdim=True)
    scale = rewards.std(dim=1, keepdim=True) + eps if std else 1.0
    # asked of the rewards themselves: the rounded mean of equal numbers must not make a signal
    equal = rewards.amax(dim=1, keepdim=True) == rewards.amin(dim=1, keepdim=True)
    return torch.where(equal, 0.0, centered / scale).flatten()


def grpo_loss(
    logp,
    logp_old,
    logp_ref,
    advantages,
    mask,
    total,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl: float = 0.01,
    loss_mean: str = "token",
):
    """The clipped objective with the k3 estimator of the KL (joschu.net/blog/kl-approx.html; paper
    equation 2).

    logp, logp_old, logp_ref, mask: (N, S); advantages: (N,). `logp_ref` may be None when kl is 0.
    loss_mean: over tokens ("token"), or over those of each sample and then over samples
    ("sequence"). total: the count of tokens, or of samples, of the whole step: the gradients of
    calls and ranks add up.

    Returns (loss, sums): a scalar, and for the log the sums over tokens of ratio, clipped share and
    KL."""
    advantages = advantages[:, None]
    ratio = (logp - logp_old).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    per_token = -torch.minimum(ratio * advantages, clipped * advantages)
    k3 = torch.zeros_like(logp)
    if kl:
        gap = logp_ref - logp
        k3 = gap.exp() - gap - 1
    weight = mask
    if loss_mean == "sequence":
        weight = mask / mask.sum(dim=1, keepdim=True).clamp(min=1)
    loss = ((per_token + kl * k3) * weight).sum() / total

    is_cut = (clipped * advantages < ratio * advantages).float()
    sums = {
        "ratio": (ratio.detach() * mask).sum(),
        "clip": (is_cut * mask).sum(),
        "kl": (k3.detach() * mask).sum(),
    }
    return loss, sums


# ------------------------------------------------------------------------------------------------
# The run


def main(argv: list[str] | None = None) -> None:
    config = run.parse_args(Config, __doc__, argv, PRESETS)
    rank, world, device = run.start_processes()
    training = load(config, rank, world, device)
    config = training.config  # with the sizes that fit into the GPU
    engine = training.engine
    prompts = training.prompts
    folder = training.folder
    share = config.batch_size // world  # prompts per rank and step
    run.explain_crashes(folder)
    log = run.Log(folder, engine.first_step, config.wandb)
    stopped = run.watch_signals(device)
    if engine.first_step == 0:
        look(training, "before", step=0, count=len(training.held_out))

    # a served judge leaves this process free to draw on
    asker = Asker(training) if isinstance(training.judge, rewards.ServedJudge) else None
    skipped = 0  # gradients in a row that were not finite
    bar = tqdm(
        range(engine.first_step, config.steps),
        initial=engine.first_step,
        total=config.steps,
        desc="GRPO",
        disable=rank > 0,
    )
    for step in bar:
        clock = [time.time()]

        # 1) Prompts: every rank takes its share of the step's
        chosen = trainer.order_of_step(len(prompts), step, config.batch_size, config.seed)
        indices = list(range(rank * share, (rank + 1) * share))
        batch = [prompts[chosen[index]] for index in indices]

        # 2) Rollout: `group` chains and pictures for each prompt; some of the plans are borrowed
        plans = borrow_plans(training, batch, indices, step)
        rollouts = []
        groups = []
        with engine.gathered() as model:
            for first in range(0, share, config.rollout_batch):
                part = slice(first, first + config.rollout_batch)
                for size, is_borrowed in group_sizes(config):
                    drawn = gotr1.rollout(
                        model,
                        engine.tokenizer,
                        batch[part],
                        group=size,
                        cfg=config.cfg,
                        temperature=config.temperature,
                        seed=(config.seed, step, 1) if is_borrowed else (config.seed, step),
                        max_chain=config.max_chain,
                        chains=plans[part] if is_borrowed else None,
                        indices=indices[part],
                        logp_mode=config.logp,
                    )
                    rollouts.append(drawn)
                    groups += [Group(prompt, size, is_borrowed) for prompt in batch[part]]
                    if asker:  # the judge looks at these while the next are drawn
                        images = gotr1.decode_images(model, drawn.image_tokens)
                        asker.ask(repeat(batch[part], size), drawn.chains, images)
        sampled = gotr1.Rollout.join(rollouts)
        clock.append(time.time())

        # 3) Rewards: prompt to chain, chain to image, prompt to image, aesthetics
        if asker:
            images = asker.images()
        else:
            images = gotr1.decode_images(engine.model, sampled.image_tokens)
        clock.append(time.time())
        if asker:
            scores = asker.scores()
        else:
            asked = [prompt for prompt, size, _ in groups for _ in range(size)]
            scores = score(training, asked, sampled.chains, images)
        clock.append(time.time())

        # 4) Advantages: within a group. From here on groups of equal rewards are left out
        totals = torch.tensor([row["total"] for row in scores], device=device)
        advantages = []
        kept = []  # samples
        first = 0
        for _, size, _ in groups:
            rewards_of_group = totals[first : first + size]
            advantages.append(group_advantages(rewards_of_group, size, std=config.advantage_std))
            if advantages[-1].any():
                kept += range(first, first + size)
            first += size
        advantages = torch.cat(advantages)
        n_images = sampled.image_tokens.shape[1]  # per sample
        n_tokens = run.all_sum(sampled.mask[kept].sum()).clamp(min=1)
        n_samples = run.all_sum(torch.tensor(float(len(kept)), device=device)).clamp(min=1)

        # 5) Loss and gradient: micro-batches and ranks add up to one mean over all tokens
        micro_batches = split_evenly(kept, config.micro_batch)
        old_logps = []  # one (n, S) per micro-batch: of the policy that sampled
        ref_logps = []  # and of the reference
        drifts = Drifts(device)
        limits = drift_limits(config.dtype, config.temperature, config.cfg, config.logp)
        lr = trainer.cosine_lr(step, config.steps, config.lr, config.warmup, config.lr_floor)
        for update in range(config.updates):
            loss_sums = torch.zeros(3, device=device)  # over tokens: ratio, clip, kl
            for k, (rows, is_dummy) in enumerate(micro_batches):
                mb = sampled.select(rows)
                mb_logp, mb_mask = engine.score(mb)
                if is_dummy:
                    mb_mask = torch.zeros_like(mb_mask)
                if update == 0:
                    old_logps.append(mb_logp.detach())
                    ref_logps.append(engine.score_reference(mb)[0] if config.kl else None)
                    drifts.add(old_logps[k], mb.logp, mb_mask, n_images)
                    if step == 0:
                        self_test(old_logps[k], mb.logp, ref_logps[k], mb_mask, max(limits))
                loss, sums = grpo_loss(
                    mb_logp,
                    old_logps[k],
                    ref_logps[k],
                    advantages[rows],
                    mb_mask,
                    total=n_tokens if config.loss_mean == "token" else n_samples,
                    clip_low=config.clip_low,
                    clip_high=config.clip_high,
                    kl=config.kl,
                    loss_mean=config.loss_mean,
                )
                engine.backward(loss)
                loss_sums += torch.stack([sums["ratio"], sums["clip"], sums["kl"]])

            if update == 0:
                drift_text, drift_image = drifts.means()
                check_drift(drift_text, drift_image, *limits)

            # 6) Step: the gradient is summed over ranks, then clipped; none if it is not finite
            norm = engine.step(lr, config.clip_grad)
            skipped = 0 if math.isfinite(norm) else skipped + 1
            if step == 0 and micro_batches and not norm > 0:
                raise RuntimeError(
                    f"self-test: the gradient norm is {norm} although rewards differ"
                )
            if skipped == 10:
                raise RuntimeError(
                    "ten gradients in a row were not finite: lower --lr, or look at the rewards"
                )
        clock.append(time.time())

        # 7) Log: means over all samples and tokens of all ranks
        row = {"step": step}
        sample_rows = run.gather_list(describe_samples(sampled, scores, images, groups))
        row.update(mean_row(sample_rows, config))
        row["drift_text"] = drift_text
        row["drift_image"] = drift_image
        row["ratio"], row["clip"], row["kl"] = (run.all_sum(loss_sums) / n_tokens).tolist()
        row.update({"grad_norm": norm, "skipped": skipped, "lr": lr})
        row.update(times(clock, asker.seconds if asker else clock[3] - clock[2], world, device))
        row["samples_s"] = config.batch_size * config.group / row["seconds"]
        row["peak_gib"] = run.peak_gib(device)
        bar.set_postfix_str(f"reward {row['reward']:.3f}")
        log.write(row)
        run.say(log_line(row, config.steps))
        if step == 0 and row["no_box"] == 1:
            raise RuntimeError(
                "no chain has a box: start from a model that writes chains, see train_sft.py"
            )

        # 8) Save and look, now and then
        done = step + 1
        if is_due(done, config.gif_every):
            draw_frame(training, done, row["reward"])
        if done < config.steps and is_due(done, config.eval_every):
            look(training, f"step_{done:06d}", done, count=len(training.held_out))
        elif done < config.steps and is_due(done, config.sheet_every):
            look(training, f"step_{done:06d}", done, count=12)
        stopping = stopped()
        if stopping or is_due(done, config.save_every) or done == config.steps:
            engine.save(folder, done, config.keep)
            log.plot(CURVES)
            join_frames(training)
        if stopping:
            run.say(f"stopped after step {done} of {config.steps}")
            run.say(f"the same command continues from {folder}")
            return

    # 9) After: the same held-out prompts with the same random numbers
    if not (folder / "eval_after.json").exists():
        look(training, "after", config.steps, count=len(training.held_out))
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
    hps: object  # a function of prompts and images, or None
    prompts: list[str]
    held_out: list[str]  # prompts
    given_plans: list[tuple[str, str]]  # (prompt, chain), held out as well
    folder: Path
    rank: int
    world: int  # processes


def load(config: Config, rank: int, world: int, device: torch.device) -> Training:
    """Everything that the flags name. Bad input ends the program here, in one line, and leaves
    nothing behind."""
    check(config, world)
    prompts = join_prompts(config.prompts)
    held_out = read_prompts(config.eval_file, held_out=True, count=config.eval_prompts)
    check_toy_judge(config, prompts + held_out)
    saved = run.checkpoint_to_resume(Path(config.out))
    if saved:
        run.open_run(config.out, config)  # with other flags the program ends here
    try:
        judge, hps = rewards.load_judge(config, device)  # first: a judge that fails, fails here
        engine = trainer.load_engine(config, device, gotr1.token_logps, config.model, saved)
        if config.kl and not config.lora:
            trainer.load_reference(engine, config.model)
        judge_here = isinstance(judge, rewards.QwenJudge) and not config.judge_device
        sized = with_sizes(config, engine.model, judge_here, world, device)
        if judge_here and sized.judge_batch:
            judge.batch_size = sized.judge_batch
        asked = [gotr1.encode_prompt(engine.tokenizer, prompt) for prompt in held_out]
        gotr1.check_room(engine.model, asked, config.max_chain + 1)
        prompts = drop_too_long(prompts, engine.model, engine.tokenizer, config.max_chain)
        given_plans = read_given_plans(config, engine)
    except (OSError, ValueError) as problem:
        run.fail(str(problem))
    folder = run.open_run(config.out, config)
    return Training(sized, engine, judge, hps, prompts, held_out, given_plans, folder, rank, world)


def check(config: Config, world: int) -> None:
    """Bad settings end the program here, in one line, before anything is loaded or written."""
    run.check_ranges(
        config,
        at_least_one="steps batch_size updates max_chain eval_prompts save_every keep",
        above_zero="temperature lr clip_grad lora_alpha",
        not_negative="rollout_batch micro_batch judge_batch kl warmup lr_floor clip_low clip_high "
        "lora eval_every sheet_every seed cfg",
    )
    if not config.prompts:
        run.fail("--prompts is empty: give toy, or text files with one prompt per line")
    if config.group < 2:
        run.fail(f"--group is {config.group}: a sample is compared with its group, so 2 or more")
    check_borrow(config)
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
    trainer.check_trainer_config(config)


def check_borrow(config: Config) -> None:
    """Ends the program in one line when plans cannot be borrowed as the flags say."""
    if not 0 <= config.borrow <= 1:
        run.fail(f"--borrow is {config.borrow}: expected a share, 0 to 1")
    for size, is_borrowed in group_sizes(config):
        if size < 2:
            kind = "with a borrowed plan" if is_borrowed else "with plans of their own"
            run.fail(
                f"--borrow {config.borrow} of --group {config.group} leaves {size} sample {kind}: "
                "a sample is compared with others of its kind, so none, or 2 or more"
            )
    if not config.borrow:
        return
    if config.borrow_from == "toy" and config.prompts != ("toy",):
        run.fail("--borrow_from toy makes layouts for the toy's prompts only: give reference")
    if config.borrow_from == "reference" and not (config.kl or config.lora):
        run.fail("--borrow_from reference needs one: --kl above 0, or --lora")


def with_sizes(config: Config, model, judge_here: bool, world: int, device: torch.device) -> Config:
    """The flags with every size that is 0 chosen for the memory of the GPU, by the table of
    evaluation/speed.py; printed. These sizes change the speed and nothing else, so a run may be
    continued on another GPU."""
    sizes = {name: getattr(config, name) for name in speed.USUAL_SIZES}
    if config.rollout_batch and config.micro_batch:  # the judge knows its own usual size
        return config
    published = speed.size_of(model)
    total = speed.gpu_bytes(device)
    if published and total:
        sizes, planned = speed.choose_sizes(
            size=published,
            lora=config.lora,
            gpus=world,
            group=config.group,
            prompts=config.batch_size // world,
            judge_here=judge_here,
            total=total,
            given=sizes,
        )
        estimate = f"{planned / 2**30:.0f} of {total / 2**30:.0f} GiB by the table of memory"
        if planned > total:
            estimate += ", which is too much: see docs/gpu.md"
    else:
        for name, number in speed.USUAL_SIZES.items():
            sizes[name] = sizes[name] or number
        estimate = "not by memory, for want of a GPU or of a model of a published size"
    flags = " ".join(f"--{name} {number}" for name, number in sizes.items())
    run.say(f"{flags}: {estimate}")
    return replace(config, **sizes)


def check_toy_judge(config: Config, prompts: list[str]) -> None:
    """The toy's judge and stand-in for HPS understand the toy's sentences only."""
    is_toy = config.judge.split(":")[0] == "toy"  # toy:0.2 is one, too
    if not is_toy and not (config.hps == "toy" and "hps" in config.rewards):
        return
    for prompt in prompts:
        names, _ = read_text(prompt)
        if not names:
            run.fail(
                f"--judge toy and --hps toy know only the toy's world, not {prompt!r}: give others"
            )


def read_given_plans(config: Config, engine: trainer.Engine) -> list[tuple[str, str]]:
    """(prompt, chain) of each of `--eval_plans`; the toy's only beside the toy's prompts. Raises
    OSError or ValueError, also when one leaves no room for the image."""
    if config.eval_plans == "toy" and config.eval_file != "toy":
        return []
    plans = held_out_prompts.read_plans(config.eval_plans)
    given = []
    for prompt, chain in plans:
        ids = gotr1.encode_prompt(engine.tokenizer, prompt)
        given.append(ids + gotr1.encode_chain(engine.tokenizer, chain))
    if given:
        gotr1.check_room(engine.model, given, 0)
    return plans


def drop_too_long(prompts: list[str], model, tokenizer, max_chain: int) -> list[str]:
    """The prompts that leave room for a chain and the image; says how many do not. Raises
    ValueError when none does."""
    context = model.config.text_config.max_position_embeddings
    room = context - (max_chain + 1) - gotr1.image_token_count(model)
    kept = []
    for prompt in prompts:
        # a token is a byte or more: most prompts need not be encoded to see that they fit
        surely = len(gotr1.format_prompt(prompt).encode()) < room
        if surely or len(gotr1.encode_prompt(tokenizer, prompt)) <= room:
            kept.append(prompt)
    if not kept:
        gotr1.check_room(model, [gotr1.encode_prompt(tokenizer, prompts[0])], max_chain + 1)
    if len(kept) < len(prompts):
        run.say(f"{len(prompts) - len(kept)} prompts of more than {room} tokens are left out")
    return kept


# ------------------------------------------------------------------------------------------------
# During the run


class Group(NamedTuple):
    """Samples that are compared with each other: they follow one another in the rollout."""

    prompt: str  # of all of them
    size: int  # how many they are
    is_borrowed: bool  # they draw a given plan, else plans of their own


def group_sizes(config: Config) -> list[tuple[int, bool]]:
    """(size, is_borrowed) of the groups that a prompt has: one, or with `--borrow` two."""
    borrowed = round(config.group * config.borrow)
    sizes = [(config.group - borrowed, False), (borrowed, True)]
    return [(size, is_borrowed) for size, is_borrowed in sizes if size]


def borrow_plans(training: Training, prompts: list[str], indices: list[int], step: int):
    """For each prompt a chain that the policy did not write; [] without `--borrow`.

    A policy only ever draws the plans that it writes, and in a long run these become alike. Then it
    forgets how to draw others, such as those that a person edits. So a part of each prompt's
    samples draw a given plan. Its text is not trained, their image tokens are, by the same reward,
    with advantages among themselves.

    The toy has random layouts that do what the prompt says. For other prompts the frozen reference
    writes 8 plans, and the judge chooses by R_sem + R_spa."""
    config = training.config
    if not config.borrow:
        return []
    if config.borrow_from == "toy":
        plans = []
        for prompt, index in zip(prompts, indices, strict=True):
            rng = np.random.default_rng([config.seed, step, index, 2])
            plans.append(random_plan(rng, prompt))
        return plans
    with training.engine.gathered(reference=True) as reference:
        return gotr1.best_plans(
            reference,
            training.engine.tokenizer,
            training.judge,
            prompts,
            plans=8,
            temperature=config.temperature,
            seed=(config.seed, step, 2),
            max_chain=config.max_chain,
            indices=indices,
        )


def score(training: Training, prompts, chains, images) -> list[dict]:
    """`rewards.score` by the judge and the flags of this run."""
    return rewards.score(
        training.judge,
        training.hps,
        prompts,
        chains,
        images,
        parts=training.config.rewards,
        combine=training.config.combine,
    )


def repeat(prompts: list[str], group: int) -> list[str]:
    """The prompt of each sample."""
    return [prompt for prompt in prompts for _ in range(group)]


class Asker:
    """Asks the judge of a run in a thread of its own, while the run goes on.

    The rewards are those of `score`: the same questions in the same order, and whether most replies
    can be read is asked of the whole step. One thread: what is drawn first is asked first."""

    def __init__(self, training: Training):
        self.training = training
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.asked = []  # Futures of rewards.Asked and the seconds that it took
        self.drawn = []  # the images that were asked about
        self.seconds = 0.0  # that the judge was busy with the last step

    def ask(self, prompts, chains, images) -> None:
        """Samples to be judged; returns at once."""
        self.drawn += images
        self.asked.append(self.thread.submit(self._ask, prompts, chains, images))

    def _ask(self, prompts, chains, images):
        begin = time.time()
        parts = self.training.config.rewards
        asked = rewards.ask(self.training.judge, prompts, chains, images, parts)
        return asked, time.time() - begin

    def images(self) -> list:
        """All that was asked about since the last call."""
        images, self.drawn = self.drawn, []
        return images

    def scores(self) -> list[dict]:
        """The rewards of all samples since the last call, in the order in which they were asked.
        Raises what the judge raised."""
        try:
            results = [future.result() for future in self.asked]
        except Exception:
            self.thread.shutdown(wait=False, cancel_futures=True)  # the rest would fail as well
            raise
        self.asked = []
        self.seconds = sum(seconds for _, seconds in results)
        config = self.training.config
        asked = rewards.Asked.join([one for one, _ in results])
        return rewards.add_up(asked, self.training.hps, config.rewards, config.combine)


def split_evenly(kept: list[int], micro_batch: int) -> list[tuple[list[int], bool]]:
    """The samples `kept` in micro-batches: (samples, is it a dummy?).

    Each pass is a collective under FSDP, so every rank makes as many passes as the one with most
    samples: a rank that has none left scores sample 0, and its mask is set to zeros."""
    mine = -(-len(kept) // micro_batch)
    passes = max(run.gather_list([mine]))
    batches = []
    for k in range(passes):
        rows = kept[k * micro_batch : (k + 1) * micro_batch]
        batches.append((rows, False) if rows else ([0], True))
    return batches


def is_due(done: int, every: int) -> bool:
    """Whether something that happens `every` so many steps (0: never) happens after step `done`."""
    return every > 0 and done % every == 0


def without_errors(judge):
    """The judge of evaluations: `--judge toy:0.2` errs in training only."""
    return getattr(judge, "exact", judge)


def score_all(training: Training, prompts, chains, images) -> list[dict]:
    """All parts and the product of them, whatever is trained on; `trained` is what is, where that
    is something else."""
    config = training.config
    judge = without_errors(training.judge)
    rows = rewards.score(judge, training.hps, prompts, chains, images)
    if set(config.rewards) < set(rewards.PARTS) or config.combine != "product":
        for row in rows:
            trained = {part: row[part] for part in config.rewards if part in row}
            row["trained"] = rewards.total_reward(trained, config.combine)
    return rows


def drawing(training: Training) -> held_out_prompts.Drawing:
    """The policy as it is now, and how it draws held-out prompts."""
    config = training.config
    return held_out_prompts.Drawing(
        training.engine.model,
        training.engine.tokenizer,
        seed=config.seed,
        cfg=config.cfg,
        temperature=config.temperature,
        max_chain=config.max_chain,
        rank=training.rank,
        world=training.world,
        at_once=config.rollout_batch * config.group,
        gathered=training.engine.gathered,  # judging needs the room that gathered weights take
    )


def look(training: Training, label: str, step: int, count: int) -> None:
    """Draws the first `count` held-out prompts: samples_<label>.png shows 12 of them. When it is
    all of them: eval_<label>.json and rows_<label>.json, see `held_out.write_evaluation`."""
    how = drawing(training)
    score = functools.partial(score_all, training)
    prompts = training.held_out[:count]
    rows = held_out_prompts.evaluate(how, score, prompts, label=label)
    if count == len(training.held_out):
        rest = held_out_prompts.evaluate_rest(how, score, prompts, training.given_plans, label)
        if training.rank == 0:
            held_out_prompts.write_evaluation(
                training.folder, label, step, training.config.seed, rows + rest
            )
    if training.rank == 0:
        judge = without_errors(training.judge)
        held_out_prompts.draw_sheet(rows[:12], judge, training.folder / f"samples_{label}.png")


def draw_frame(training: Training, step: int, reward: float) -> None:
    """A frame of learning.gif: the first 4 held-out prompts after `step` steps."""

    def no_score(prompts, chains, images):
        return [{}] * len(images)

    rows = held_out_prompts.evaluate(drawing(training), no_score, training.held_out[:4], label="")
    if training.rank == 0:
        frames = training.folder / "frames"
        frames.mkdir(exist_ok=True)
        caption = f"after {step} steps of GRPO: reward {reward:.2f}"
        stats.draw_frame(rows, caption, frames / f"{step:06d}.png")


def join_frames(training: Training) -> None:
    """learning.gif, of the frames so far."""
    frames = sorted((training.folder / "frames").glob("*.png"))
    if training.rank == 0 and frames:
        stats.join_frames(frames, training.folder / "learning.gif")


def summarise_run(training: Training) -> None:
    """Prints the table of before and after, and where everything is."""
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
        if (folder / name).exists():  # a film needs --gif_every
            print(f"  {folder / name}")
    print(f"  {folder / f'step_{training.config.steps:06d}'}")


# ------------------------------------------------------------------------------------------------
# ------------------------------------------------------------------------------------------------
# The log


CURVES = {  # title of a panel of curves.png -> keys of the log
    "total reward": ["reward"],
    "its parts": ["sem", "spa", "ri", "pi", "hps"],
    "entropy (nats per token)": ["entropy_text", "entropy_image"],
    "KL to the reference": ["kl"],
    "variety of plans": ["layout_variety", "place_entropy"],
    "looks of pictures": ["brightness", "saturation", "edges"],
}
PHASES = ("rollout_s", "decode_s", "judge_wait_s", "update_s")


def describe_samples(
    sampled: gotr1.Rollout, scores: list[dict], images: list, groups: list[Group]
) -> list[dict]:
    """What the log wants to know of each sample; `group_std` and `zero_var` of a sample are those
    of its group."""
    n_images = sampled.image_tokens.shape[1]
    text_tokens = sampled.mask[:, :-n_images].sum(dim=1).clamp(min=1)
    entropy_text = sampled.entropy[:, :-n_images].sum(dim=1) / text_tokens
    entropy_image = sampled.entropy[:, -n_images:].mean(dim=1)
    looks = variety.looks(images)
    rows = []
    for group in groups:
        members = range(len(rows), len(rows) + group.size)
        totals = np.array([scores[k]["total"] for k in members])
        for k in members:
            row = {"reward": scores[k]["total"]}
            for part, value in scores[k].items():
                if part != "total":
                    row[part] = value
            row["group_std"] = float(totals.std(ddof=1))
            row["zero_var"] = float(totals.max() == totals.min())
            row["no_box"] = float(not parse_chain(sampled.chains[k]))
            row["forced"] = float(sampled.forced[k])
            row["chain_len"] = float(sampled.chain_lens[k])
            row["entropy_text"] = float(entropy_text[k])
            row["entropy_image"] = float(entropy_image[k])
            row.update(looks[k])
            row["chain"] = sampled.chains[k]
            row["is_borrowed"] = group.is_borrowed
            rows.append(row)
    return rows


def mean_row(rows: list[dict], config: Config) -> dict[str, float]:
    """Means over all samples with plans of their own; standard deviations of their rewards:
    `reward_std`, `sem_std`, …; how different their plans are; and the mean rewards of samples with
    a borrowed plan: `borrowed_reward`, …"""
    own = [row for row in rows if not row["is_borrowed"]]
    borrowed = [row for row in rows if row["is_borrowed"]]
    means = {}
    for key in rows[0]:
        if key not in ("chain", "is_borrowed"):
            means[key] = float(np.mean([row[key] for row in own or rows]))
    for key in ("reward", *rewards.PARTS):
        if key in rows[0]:
            means[f"{key}_std"] = float(np.std([row[key] for row in own or rows]))
            if borrowed:
                means[f"borrowed_{key}"] = float(np.mean([row[key] for row in borrowed]))
    if own:
        size = group_sizes(config)[0][0]
        means.update(plan_variety([row["chain"] for row in own], size))
    return means


def plan_variety(chains: list[str], group: int) -> dict[str, float]:
    """How different the plans of a step are, see evaluation/variety.py."""
    plans = [parse_chain(chain) for chain in chains]
    found = {
        "layout_variety": variety.layout_variety(plans, group),
        "different_chains": variety.different_chains(chains, group),
    }
    means = {}
    for name, values in found.items():
        known = [value for value in values if value is not None]
        if known:
            means[name] = float(np.mean(known))
    means["place_entropy"] = variety.place_entropy(plans)
    return means


def times(clock: list[float], judge_s: float, world: int, device: torch.device) -> dict[str, float]:
    """Seconds of each phase, of the step, and of the judge's work, which may overlap with the
    rollout. Means over the ranks. `clock`: when each phase began, and the end."""
    mine = [*np.diff(clock), judge_s]
    *seconds, judge_s = (run.all_sum(torch.tensor(mine, device=device)) / world).tolist()
    row = dict(zip(PHASES, seconds, strict=True))
    row["judge_s"] = judge_s
    row["seconds"] = sum(seconds)
    return row


def log_line(row: dict, steps: int) -> str:
    """One line for the terminal."""
    parts = " ".join(f"{part} {row[part]:.2f}" for part in rewards.PARTS if part in row)
    shares = " ".join(
        f"{phase.split('_')[0]} {row[phase] / row['seconds']:.0%}" for phase in PHASES
    )
    return (
        f"step {row['step'] + 1:4d}/{steps} | reward {row['reward']:.3f} ({parts}) | "
        f"zero_var {row['zero_var']:.2f} | kl {row['kl']:.4f} | grad {row['grad_norm']:6.2f} | "
        f"chain {row['chain_len']:3.0f} | {row['seconds']:.2f} s ({shares})"
    )


if __name__ == "__main__":
    main()
