"""GRPO for GoT-R1: reinforcement learning that teaches an image model to reason before it draws
(paper section 3).

The model reads a prompt, writes a chain that names each object and its box, then samples the image
tokens: `group` times for each prompt. Rewards compare prompt, chain and picture. Samples that did
better than their group's mean become more likely:

    advantage = reward - mean of the group          (the paper divides it by the group's std + 1e-4)
    loss      = mean over all sampled tokens of
                -min(ratio * advantage, clip(ratio) * advantage) + kl * k3(policy, reference)

What differs from the paper, or is open there (equation 2, section 4.1):
1. One mean over all sampled tokens of the step; equation 2 is written per sample.
2. Groups whose rewards are all equal are left out of that mean, and counted.
3. One optimizer step per rollout, so ratio is 1 and nothing is clipped; --updates takes more.
4. The judge's questions are our wording of the paper's; R_sem is the mean of four marks.
5. The toy trains all language parameters, without guidance, and divides by no standard deviation.

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
    """The flags: these, those of both trainers (TrainerConfig) and those of the judge
    (JudgeConfig)."""

    preset: Literal["toy", "paper"] = "toy"  # defaults of all flags: the toy's, or the paper's
    # Model and data
    model: str = "toy"  # `toy`, or a folder or hub id of a checkpoint
    prompts: tuple[str, ...] = ("toy",)  # `toy`; text files, one prompt per line; x.parquet:column
    eval_file: str = "toy"  # held-out prompts: `toy`, or a text file with one prompt per line
    eval_prompts: int = 240  # held-out prompts that are drawn before and after
    out: str = "out/grpo"  # folder of this run; the same flags again continue where it stopped
    # Rollout
    steps: int = 110  # rollouts in all (paper: 1000)
    batch_size: int = 8  # prompts per step, over all ranks (paper: 8)
    group: int = 16  # samples per prompt (paper: 16)
    cfg: float | None = None  # guidance; default: 5 for Janus-Pro, 1 (none) for the toy
    max_chain: int | None = None  # most sampled chain tokens; default: 600 for Janus-Pro, toy 96
    rollout_batch: int = 8  # prompts that a rank draws at a time; changes memory, not the samples
    # Loss
    updates: int = 1  # optimizer steps per rollout, each over all of it
    clip: float = 0.2  # the ratio policy / policy that sampled counts from 1 - clip to 1 + clip
    kl: float = 0.02  # weight of the KL to the reference; 0: no reference model
    loss_mean: Literal["token", "sequence"] = "token"  # over tokens; or per sample, then samples
    advantage: Literal["mean", "group_std", "batch_std"] = "mean"  # scale: `step_advantages`
    logp: Literal["cond", "guided"] = "cond"  # distribution of image tokens that is scored with cfg
    # Optimisation
    lr: float = 7e-4  # peak learning rate (paper: 1e-5 with LoRA; 1e-6 suits a full real model)
    lr_floor: float = 0.1  # share of the peak at which the cosine ends
    warmup: float = 0.1  # share of the steps over which the learning rate rises to its peak
    # Looking at it
    look_every: int = 10  # steps between frames of learning.gif, 4 held-out prompts; 0: none
    evaluate_looks: bool = False  # each look draws and scores all held-out prompts as well


# Only what differs from the defaults above. Stated in section 4.1: batch, group and steps, learning
# rate and its cosine, LoRA 32, equation 1. Open there, and chosen as T2I-R1 did for the same model:
# guidance 5 in the rollout, scored on the conditional branch, KL 0.01, no warm-up. Sizes are those
# for 7B on 80 GB, see docs/gpu.md.
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
    # Equal rewards may have a rounded mean that differs from them: compare the rewards themselves
    equal = rewards.amax(dim=1, keepdim=True) == rewards.amin(dim=1, keepdim=True)
    return torch.where(equal, 0.0, centered / scale).flatten()


def step_advantages(rewards: torch.Tensor, group: int, kind: str) -> torch.Tensor:
    """Rewards (N,) -> advantages (N,): minus the mean of their group, and divided by
    nothing ("mean", Dr. GRPO);
    the standard deviation of the group ("group_std", the paper);
    the standard deviation of all advantages of the step, on all ranks ("batch_std")."""
    advantages = group_advantages(rewards, group, std=kind == "group_std")
    if kind == "batch_std":
        of_all_ranks = torch.tensor(run.gather_list(advantages.tolist()))
        advantages = advantages / (of_all_ranks.std().item() + 1e-4)
    return advantages


def grpo_loss(logp, logp_old, logp_ref, advantages, weight, clip: float = 0.2, kl: float = 0.01):
    """The clipped objective with the k3 estimator of the KL (joschu.net/blog/kl-approx.html; paper
    equation 2).

    logp, logp_old, logp_ref: (N, S); advantages: (N,). `logp_ref` may be None when kl is 0.
    weight: (N, S), how much each token counts: 1 / (sampled tokens of the whole step) for a mean
        over tokens, 0 for what was not sampled. Gradients of micro-batches and ranks then add up.

    Returns (loss, sums): a scalar, and (4,) sums over the tokens with weight, for the log: of
    ratio, clipped share, KL, and 1."""
    advantages = advantages[:, None]
    ratio = (logp - logp_old).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    per_token = -torch.minimum(ratio * advantages, clipped * advantages)
    k3 = torch.zeros_like(logp)
    if kl:
        gap = logp_ref - logp
        k3 = gap.exp() - gap - 1
    loss = ((per_token + kl * k3) * weight).sum()

    counts = (weight > 0).float()
    is_clipped = (clipped * advantages < ratio * advantages).float()
    sums = [(value.detach() * counts).sum() for value in (ratio, is_clipped, k3)]
    return loss, torch.stack([*sums, counts.sum()])


def token_weights(mask: torch.Tensor, kept: list[int], loss_mean: str) -> torch.Tensor:
    """Mask (N, S) -> the weight of each token in the loss; all ranks' weights add up to 1.

    kept: the samples that are trained. "token": one mean over all their tokens. "sequence": over
    the tokens of each, then over samples (paper equation 2)."""
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
    stopped = run.watch_signals(device)
    if engine.first_step == 0:
        evaluate(training, "before", step=0)

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
        order = trainer.order_of_step(len(training.prompts), step, config.batch_size, config.seed)
        places = list(range(rank * share, (rank + 1) * share))
        prompts = [training.prompts[order[place]] for place in places]

        # 2) Rollout: `group` chains and pictures for each prompt. Sample n belongs to prompt
        # n // group. Random numbers hang on seed, step and place: the same on any number of ranks
        early = EarlyQuestions(training, prompts)
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
                each=early.ask,
            )
        clock.append(time.time())

        # 3) Rewards: prompt to chain, chain to image, prompt to image, aesthetics
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
        micro_batches = split_evenly(kept, weights, config.micro_batch)

        # 5) Loss and gradient: one pass over whole sequences. Micro-batches and ranks add up to
        # one mean over all tokens, so neither changes the gradient
        lr = trainer.cosine_lr(step, config.steps, config.lr, config.warmup, config.lr_floor)
        drift = Drift(config.dtype, config.cfg, config.logp, device)
        ref_logps = reference_logps(training, rollouts, micro_batches)
        old_logps = {}  # micro-batch -> (n, S), of the policy that sampled
        for _ in range(config.updates):
            loss_sums = torch.zeros(4, device=device)  # over tokens: ratio, clip, kl, 1
            for k, (samples, mb_weight) in enumerate(micro_batches):
                mb = rollouts.select(samples)
                mb_logp, _ = engine.score(mb)
                old_logp = old_logps.setdefault(k, mb_logp.detach())  # from the first update
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

            # 6) Step: the gradient is summed over ranks, then clipped; none if it is not finite
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
        bar.set_postfix_str(f"reward {row['reward']:.3f}")
        log.write(row)
        run.say(log_line(row, config.steps))
        check_boxes(training, row)

        # 8) Look and save, now and then
        done = step + 1
        if is_due(done, config.look_every):
            look(training, done, row["reward"])
        stopping = stopped()
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
    hps: object  # a function of prompts and images, or None
    prompts: list[str]
    held_out: list[str]  # prompts
    given_plans: list[tuple[str, str]]  # (prompt, chain), held out as well
    folder: Path
    rank: int
    world: int  # processes

    @property
    def rehearsal(self) -> bool:
        """A run of one step shows that everything runs, and how fast. Random weights will do: what
        else would stop the run, unreadable replies and chains without boxes, is only reported."""
        return self.config.steps == 1


def load_training(config: Config, rank: int, world: int, device: torch.device) -> Training:
    """Everything that the flags name. Bad input ends the program here, in one line, and leaves
    nothing behind."""
    check_config(config, world)
    prompts = join_prompts(config.prompts)
    eval_prompts = read_prompts(config.eval_file, held_out=True, count=config.eval_prompts)
    check_toy_judge(config, prompts + eval_prompts)
    saved = run.checkpoint_to_resume(Path(config.out))
    if saved:
        run.open_run(config.out, config)  # with other flags the program ends here
    try:
        judge, hps = rewards.load_judge(config, device)  # first: a judge that fails, fails here
        engine = trainer.load_engine(config, device, gotr1.token_logps, config.model, saved)
        if config.kl and not config.lora:
            trainer.load_reference(engine, config.model)
        chosen = gotr1.with_defaults(config, engine.model)
        tokenized = [gotr1.encode_prompt(engine.tokenizer, prompt) for prompt in eval_prompts]
        gotr1.check_room(engine.model, tokenized, chosen.max_chain + 1)
        prompts = drop_too_long(prompts, engine.model, engine.tokenizer, chosen.max_chain)
    except (OSError, ValueError) as problem:
        run.fail(str(problem))
    given_plans = []
    if config.eval_file == "toy":  # all 180 beside 240 prompts, fewer beside fewer
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
    """Bad settings end the program here, in one line, before anything is loaded or written."""
    run.check_ranges(
        config,
        at_least_one="steps batch_size updates eval_prompts save_every rollout_batch micro_batch",
        above_zero="lr",
        not_negative="judge_batch kl warmup lr_floor clip lora look_every seed",
    )
    gotr1.check_sampling(config)
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
    is_toy = config.judge.split(":")[0] == "toy"  # toy:0.2 is one, too
    if not is_toy and not (config.hps == "toy" and "hps" in config.rewards):
        return
    for prompt in prompts:
        names, _ = read_text(prompt)
        if not names:
            run.fail(
                f"--judge toy and --hps toy know only the toy's world, not {prompt!r}: give others"
            )


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
# During a step


def repeat(prompts: list[str], group: int) -> list[str]:
    """The prompt of each sample."""
    return [prompt for prompt in prompts for _ in range(group)]


class EarlyQuestions:
    """Lets a judge on a server look at every finished part of a rollout while the next is drawn.
    For a judge in this process it does nothing."""

    def __init__(self, training: Training, prompts: list[str]):
        self.training = training
        self.prompts = prompts
        self.images = []  # of all parts, where there is such a judge

    def ask(self, first: int, part: gotr1.Rollout) -> None:
        """`first`: the place of the part's first prompt among the prompts of this rank."""
        judge = self.training.judge
        if not hasattr(judge, "ask_early"):
            return
        config = self.training.config
        prompts = self.prompts[first : first + len(part) // config.group]
        images = gotr1.decode_images(self.training.engine.model, part.image_tokens)
        judge.ask_early(repeat(prompts, config.group), part.chains, images, config.rewards)
        self.images += images


def split_evenly(kept: list[int], weights: torch.Tensor, micro_batch: int):
    """This rank's micro-batches, as many as the rank with the most samples has: with shards each
    pass is collective. [(samples, their weights (n, S))]; a rank that has none left scores sample 0
    with weights of zero."""
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
    """Log-probabilities under the reference, (n, S) per micro-batch; None without a KL."""
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
    """Raises RuntimeError when rewards differ in the first step and yet nothing would change."""
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


def is_due(done: int, every: int) -> bool:
    """Whether something that happens `every` so many steps (0: never) happens after step `done`."""
    return every > 0 and done % every == 0


# ------------------------------------------------------------------------------------------------
# Looking at held-out prompts


def score_all(training: Training, prompts, chains, images) -> tuple[list[dict], list[dict]]:
    """All parts and the product of them, whatever is trained on, and the boxes that the judge
    found; `trained` is what is trained on, where that is something else. `--judge toy:0.2` errs in
    training only."""
    config = training.config
    judge = getattr(training.judge, "exact", training.judge)
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
        gathered=training.engine.gathered,  # judging needs the room that gathered weights take
    )


def evaluate(training: Training, label: str, step: int) -> None:
    """Draws and scores the held-out prompts, one sample each: eval_<label>.json, rows_<label>.json
    and samples_<label>.png, which shows the first 12."""
    how = drawing(training)
    score = functools.partial(score_all, training)
    is_exact = training.config.judge.split(":")[0] == "toy"
    rows = held_out.evaluate(how, score, training.held_out, label=label, exact=is_exact)
    rest = held_out.evaluate_rest(how, score, training.held_out, training.given_plans, label)
    if training.rank == 0:
        folder = training.folder
        held_out.write_evaluation(folder, label, step, training.config.seed, rows + rest)
        held_out.draw_sheet(rows[:12], folder / f"samples_{label}.png")


def look(training: Training, step: int, reward: float) -> None:
    """A frame of learning.gif: the first 4 held-out prompts after `step` steps. With
    --evaluate_looks all of them are drawn and scored, too."""
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
            cell["boxes"] = []  # the picture as it is
            cells.append(cell)
        path = frames / f"{step:06d}.png"
        sheets.draw_sheet(cells, path, columns=2, side=160, title=title)


def join_frames(training: Training) -> None:
    """learning.gif, of the frames so far."""
    frames = sorted((training.folder / "frames").glob("*.png"))
    if training.rank == 0 and frames:
        sheets.join_frames(frames, training.folder / "learning.gif")


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
        if (folder / name).exists():  # a film needs --look_every
            print(f"  {folder / name}")
    print(f"  {folder / f'step_{training.config.steps:06d}'}")


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


def mean_of_samples(
    rollouts: gotr1.Rollout, scores: list[dict], images: list, group: int
) -> dict[str, float]:
    """Means over the samples of all ranks; standard deviations of their rewards: `reward_std`,
    `sem_std`, …; and how different the plans of a prompt are."""
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
    """What the log needs of each sample; `group_std` and `zero_var` of a sample are those of its
    group."""
    n_images = rollouts.image_tokens.shape[1]
    text_tokens = rollouts.mask[:, :-n_images].sum(dim=1).clamp(min=1)
    entropy_text = rollouts.entropy[:, :-n_images].sum(dim=1) / text_tokens
    entropy_image = rollouts.entropy[:, -n_images:].mean(dim=1)
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
    """From a rank's sums of `grpo_loss` to means over the trained tokens of all ranks; nothing
    where no token was trained."""
    *sums, tokens = run.all_sum(loss_sums).tolist()
    if tokens == 0:
        return {}
    return {name: value / tokens for name, value in zip(("ratio", "clip", "kl"), sums, strict=True)}


def seconds_of_phases(clock: list[float], world: int, device: torch.device) -> dict[str, float]:
    """Seconds of each phase and of the step, means over the ranks. `clock`: when each phase began,
    and the end."""
    mine = torch.tensor(np.diff(clock), device=device)
    row = dict(zip(PHASES, (run.all_sum(mine) / world).tolist(), strict=True))
    row["seconds"] = sum(row.values())
    return row


def log_line(row: dict, steps: int) -> str:
    """One line for the terminal."""
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
