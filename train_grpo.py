"""GRPO for GoT-R1: reinforcement learning that teaches an image model to reason before it draws (paper section 3).

The model reads a prompt, writes a chain that names each object and its box, then samples the image tokens. For each
prompt it does so `group` times; rewards compare prompt, chain and picture; what did better than its group's mean
becomes more likely.

    advantage = (reward - mean of the group) / (std of the group + 1e-4)
    loss      = mean over all sampled tokens of
                -min(ratio * advantage, clip(ratio) * advantage) + kl * k3(policy, reference)

Departures from the paper, which leaves these open (equation 2, section 4.1):
1. One mean over all sampled tokens of the step on all ranks: neither micro-batches nor ranks change the gradient.
2. Groups whose rewards are all equal carry no signal. They are left out of the mean and counted (`zero_var`).
3. One optimizer step a rollout by default, hence ratio == 1 and nothing is clipped; `--updates` takes more.
4. The KL weight is 0.02. With 0 there is no reference model at all.
5. What was not sampled is not trained, a <begin_of_image> forced at `max_chain` included.
6. With guidance, `--logp cond` scores the conditional distribution, `--logp guided` the one that was sampled from.

    torchrun train_grpo.py                          # the toy: two CPU cores, a few minutes
    python train_grpo.py --out out/again --seed 1   # the same without torchrun, another seed
"""

import copy
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

import gotr1
import rewards
import runtime
import toy
from render_boxes import parse_chain


@dataclass
class Config:
    # Model and data
    model: str = "toy"  # `toy`, or a folder or hub id of a checkpoint
    prompts: str = "toy"  # `toy`, or a text file with one prompt a line
    eval_file: str = "toy"  # held-out prompts for evaluation: `toy`, or a text file with one prompt a line
    out: str = "out/grpo"  # folder of this run; with the same flags again, the run continues from its last checkpoint
    # Rollout
    steps: int = 110  # rollouts in all (paper: 1000)
    batch_size: int = 8  # prompts a step, over all ranks (paper: 8)
    group: int = 16  # samples a prompt (paper: 16)
    temperature: float = 1.0  # of chain and image tokens (paper: 1)
    cfg: float = 1.0  # guidance in the rollout; 1 is none. The toy's unconditional half is too weak to help
    max_chain: int = 96  # most chain tokens that are sampled (official code, for Janus-Pro: 600)
    # Rewards
    judge: str = "toy"  # `toy` (exact), or a folder or hub id of a Qwen2.5-VL or Qwen3-VL
    scoring: Literal["reply", "expected"] = "reply"  # the judge writes its mark; or it is read off its probabilities
    spatial_as: Literal["boxes", "text"] = "boxes"  # R_spa sees the boxes drawn; or it is told where they are
    judge_batch: int = 16  # rows that the judge takes at a time; halved when memory runs out
    hps: str = "toy"  # `toy` (stand-in), or the HPS v2.1 checkpoint
    rewards: tuple[str, ...] = ("sem", "spa", "ri", "pi", "hps")  # the parts that take part
    combine: Literal["product", "sum"] = "product"  # how they become one number (paper: product)
    # Optimisation
    lr: float = 7e-4  # peak learning rate (paper: 1e-5 with LoRA; 1e-6 is common for a real model in full)
    warmup: float = 0.1  # share of the steps; then a cosine to a tenth
    updates: int = 1  # optimizer steps a rollout
    clip_low: float = 0.2  # the ratio policy / policy that sampled is clipped to at least 1 - clip_low
    clip_high: float = 0.2  # and to at most 1 + clip_high; idle with one update
    kl: float = 0.02  # weight of the KL to the reference; 0: no reference model
    logp: Literal["cond", "guided"] = "cond"  # which distribution of an image token is scored when cfg is not 1
    clip_grad: float = 1.0  # largest gradient norm
    micro_batch: int = 16  # samples a forward and backward pass; changes memory and speed, not the gradient
    # Looking at it
    eval_prompts: int = 240  # held-out prompts before and after
    eval_every: int = 0  # steps between evaluations in between; 0: none
    save_every: int = 20  # steps between checkpoints; also at the end, on SIGTERM and on Ctrl-C
    seed: int = 0  # of prompts and samples; fixes them on any number of ranks


# ---------------------------------------------------------------------------------------------------------------------
# The mathematics


def group_advantages(rewards: torch.Tensor, group: int, eps: float = 1e-4) -> torch.Tensor:
    """Rewards (N,), the `group` samples of a prompt next to each other -> advantages (N,) (paper equation 1).

    The standard deviation is the unbiased one, as torch's default. A group of equal rewards gets exactly 0.
    >>> group_advantages(torch.tensor([1.0, 0.0, 0.5, 0.5]), group=2)
    tensor([ 0.7070, -0.7070,  0.0000,  0.0000])
    """
    rewards = rewards.view(-1, group)
    centered = rewards - rewards.mean(dim=1, keepdim=True)
    equal = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)  # a rounded mean must not make a signal
    return torch.where(equal, 0.0, centered / (rewards.std(dim=1, keepdim=True) + eps)).flatten()


def grpo_loss(logp, logp_old, logp_ref, advantages, mask, n_tokens, clip_low=0.2, clip_high=0.2, kl=0.01):
    """The clipped objective with the k3 estimator of the KL (joschu.net/blog/kl-approx.html; paper equation 2).

    logp, logp_old, logp_ref, mask: (N, S); advantages: (N,). `logp_ref` may be None when kl is 0. The sum over the
    tokens of this call is divided by `n_tokens`, the count of the whole step over all calls and ranks: gradients of the
    calls then add up. Returns (loss, sums): scalars, `sums` being those over tokens of ratio, clipped share and KL, for
    the log."""
    ratio = (logp - logp_old).exp()
    advantages = advantages[:, None]
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    per_token = -torch.minimum(ratio * advantages, clipped * advantages)
    k3 = torch.zeros_like(logp)
    if kl:
        gap = logp_ref - logp
        k3 = gap.exp() - gap - 1
    loss = ((per_token + kl * k3) * mask).sum() / n_tokens
    cut = (clipped * advantages < ratio * advantages).float()
    sums = {name: (value.detach() * mask).sum() for name, value in {"ratio": ratio, "clip": cut, "kl": k3}.items()}
    return loss, sums


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation and pictures

RELATION = re.compile(r"\b(left|right|above|below|top|bottom|under|over)\b")


def evaluate(policy, score, prompts: list[str], config: Config, rank: int, world: int, label: str) -> list[dict]:
    """One sample a prompt, as in training, with the same random numbers every time: prompt, chain, image, rewards."""
    model, tokenizer = policy
    rows, mine = [], list(range(rank, len(prompts), world))
    for start in tqdm(range(0, len(mine), 128), desc=label, disable=rank > 0, leave=False):
        indices = mine[start : start + 128]
        batch = [prompts[i] for i in indices]
        seed = (config.seed, 2**31)  # no training step has this number
        sampled = gotr1.rollout(
            model, tokenizer, batch, 1, config.cfg, config.temperature, seed, config.max_chain, indices=indices
        )
        images = gotr1.decode_images(model, sampled.image_tokens)
        scores = score(batch, sampled.chains, images)
        for values in zip(indices, batch, sampled.chains, images, scores, strict=True):
            rows.append(dict(zip(("index", "prompt", "chain", "image", "scores"), values, strict=True)))
    return sorted(runtime.gather_list(rows), key=lambda row: row["index"])


def summarise(rows: list[dict]) -> dict[str, float]:
    """Mean rewards, and how often plan and picture are wholly right where prompts name one place, or several."""
    parts = ["total", *(part for part in rewards.PARTS if part in rows[0]["scores"]), "judge_fail"]
    means = {part: float(np.mean([row["scores"][part] for row in rows])) for part in parts}
    for kind, counts in (("spatial", (1,)), ("complex", (2, 3, 4))):
        placed = [row["scores"] for row in rows if len(RELATION.findall(row["prompt"])) in counts]
        for what, part in (("plan", "spa"), ("picture", "pi")):
            if placed and part in parts:
                means[f"{kind}: {what} right"] = float(np.mean([scores[part] > 0.999 for scores in placed]))
    return means


def table(before: dict, after: dict) -> str:
    lines = [f"{name:24} {value:6.3f}  {after[name]:6.3f}" for name, value in before.items() if name != "step"]
    return "\n".join([f"{'':24} before   after", *lines])


CURVES = {
    "total reward": ["reward"],
    "its parts": ["sem", "spa", "ri", "pi", "hps"],
    "entropy (nats a token)": ["entropy_text", "entropy_image"],
    "KL to the reference": ["kl"],
}


# ---------------------------------------------------------------------------------------------------------------------
# The run


def check(config: Config, world: int) -> None:
    """Bad settings end the program here, in one line, before anything is loaded or written."""
    counts = ("steps", "batch_size", "micro_batch", "updates", "max_chain", "judge_batch", "eval_prompts", "save_every")
    for name in counts:
        if getattr(config, name) < 1:
            runtime.fail(f"--{name} is {getattr(config, name)}: expected 1 or more")
    for name in ("temperature", "lr", "clip_grad"):
        if not getattr(config, name) > 0:
            runtime.fail(f"--{name} is {getattr(config, name)}: expected a number above 0")
    for name in ("kl", "warmup", "clip_low", "clip_high", "eval_every", "seed", "cfg"):
        if not getattr(config, name) >= 0:
            runtime.fail(f"--{name} is {getattr(config, name)}: expected 0 or more")
    if config.group < 2:
        runtime.fail(f"--group is {config.group}: a sample is compared with its group, so 2 or more")
    if config.batch_size % world:
        runtime.fail(f"--batch_size {config.batch_size} prompts cannot be shared evenly by {world} processes")
    if not config.rewards or set(config.rewards) - set(rewards.PARTS):
        runtime.fail(f"--rewards {' '.join(config.rewards)}: expected some of {' '.join(rewards.PARTS)}")


def read_prompts(source: str, held_out: bool, count: int) -> list[str]:
    """The toy's prompts, or the non-empty lines of a text file."""
    if source == "toy":
        return toy.toy_prompts(count, seed=7, held_out=held_out)
    try:
        lines = [line.strip() for line in Path(source).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as problem:
        runtime.fail(f"cannot read prompts from {source}: {problem}")
    prompts = [line for line in lines if line]
    if not prompts:
        runtime.fail(f"{source} holds no prompt: expected one a line")
    return prompts[:count] if held_out else prompts


def prompts_of_step(count: int, step: int, batch_size: int, seed: int) -> list[int]:
    """Which prompts step `step` takes: every prompt once an epoch, in an order fixed by (seed, epoch). Nothing to save
    or replay."""
    places = range(step * batch_size, (step + 1) * batch_size)
    return [int(np.random.default_rng([seed, place // count]).permutation(count)[place % count]) for place in places]


def sample_rows(sampled, scores: list[dict], group: int) -> list[dict]:
    """What the log wants to know of each sample; `zero_var` of a sample is that of its group."""
    text, image = sampled.mask.clone(), sampled.mask.clone()
    image_tokens = sampled.image_tokens.shape[1]
    text[:, -image_tokens:], image[:, :-image_tokens] = 0, 0
    rows = []
    for k, values in enumerate(scores):
        totals = [row["total"] for row in scores[k // group * group : (k // group + 1) * group]]
        rows.append({
            "reward": values["total"], **{part: values[part] for part in values if part != "total"},
            "reward_std": float(np.std(totals, ddof=1)), "zero_var": float(max(totals) == min(totals)),
            "no_box": float(not parse_chain(sampled.chains[k])), "forced": float(sampled.forced[k]),
            "chain_len": float(sampled.chain_lens[k]),
            "entropy_text": float((sampled.entropy[k] * text[k]).sum() / text[k].sum().clamp(min=1)),
            "entropy_image": float((sampled.entropy[k] * image[k]).sum() / image_tokens),
        })  # fmt: skip
    return rows


def log_line(row: dict, steps: int) -> str:
    parts = " ".join(f"{part} {row[part]:.2f}" for part in rewards.PARTS if part in row)
    return (
        f"step {row['step'] + 1:4d}/{steps} | reward {row['reward']:.3f} ({parts}) | zero_var {row['zero_var']:.2f} | "
        f"kl {row['kl']:.4f} | grad {row['grad_norm']:6.2f} | chain {row['chain_len']:.0f} | {row['seconds']:.2f} s"
    )


def self_test(logp, recorded, logp_ref, mask, tolerance: float) -> None:
    """At step 0 the policy that is trained is the one that sampled, and it is the reference. Anything else is a bug,
    and stops the run."""
    gap = ((logp - recorded) * mask).abs().max().item()
    if not gap < tolerance:
        raise RuntimeError(f"self-test: a log-probability differs by {gap:.2g} between rollout and training")
    if logp_ref is not None and ((logp - logp_ref) * mask).abs().max().item() > 0:
        raise RuntimeError("self-test: the reference is not the model that training starts from")


def main(argv: list[str] | None = None) -> None:
    config = runtime.parse_args(Config, __doc__, argv)
    rank, world, device = runtime.start_processes()
    check(config, world)
    prompts = read_prompts(config.prompts, False, 2000)
    held_out = read_prompts(config.eval_file, True, config.eval_prompts)
    strange = [prompt for prompt in prompts + held_out if not toy.read_text(prompt)[0]]
    if strange and "toy" in (config.judge, config.hps if "hps" in config.rewards else ""):
        runtime.fail(f"--judge toy and --hps toy know only the toy's world, not {strange[0]!r}: give others")
    try:
        model, tokenizer = gotr1.load_policy(config.model, device)
        reference = copy.deepcopy(model).requires_grad_(False) if config.kl else None
        judge, hps = toy.ToyJudge(), toy.crispness
        if config.judge != "toy":
            settings = (config.judge_batch, config.scoring, config.spatial_as)
            judge = rewards.QwenJudge(config.judge, device, "auto", *settings)
        if config.hps != "toy" and "hps" in config.rewards:
            hps = rewards.HPS(config.hps, device)
    except (OSError, ValueError) as problem:
        runtime.fail(str(problem))
    folder = runtime.open_run(config.out, config, rank)
    parameters = gotr1.trainable_parameters(model)
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=(0.9, 0.99), weight_decay=0.0)
    saved = runtime.latest_checkpoint(folder)
    start = runtime.load_checkpoint(saved, model, optimizer) if saved else 0
    if rank == 0:
        runtime.write_log(folder, runtime.read_log(folder, before=start), "w")
    stopped = runtime.watch_signals(device)

    def score(prompts, chains, images):
        return rewards.score(judge, hps, prompts, chains, images, config.rewards, config.combine)

    def save(step):
        if rank == 0:
            runtime.save_checkpoint(folder, step, model, tokenizer, {"optimizer": optimizer.state_dict()})

    def look(label, step):
        """Evaluation with its sheet of the first 12 held-out prompts."""
        rows = evaluate((model, tokenizer), score, held_out, config, rank, world, label)
        if rank == 0:
            for row in rows[:12]:
                row["note"] = "  ".join(f"{part} {row['scores'][part]:.2f}" for part in (*config.rewards, "total"))
            gotr1.draw_sheet(rows[:12], folder / f"samples_{label}.png")
            (folder / f"eval_{label}.json").write_text(json.dumps({"step": step, **summarise(rows)}, indent=2))

    before_path = folder / "eval_before.json"
    if start == 0:
        look("before", 0)
    bar = tqdm(range(start, config.steps), initial=start, total=config.steps, desc="GRPO", disable=rank > 0)
    for step in bar:
        clock = [time.time()]

        # 1) Prompts: every rank takes its share of the step's
        chosen = prompts_of_step(len(prompts), step, config.batch_size, config.seed)
        share = config.batch_size // world
        indices = range(rank * share, (rank + 1) * share)
        batch = [prompts[chosen[i]] for i in indices]

        # 2) Rollout: `group` chains and pictures for each prompt
        sampled = gotr1.rollout(
            model,
            tokenizer,
            batch,
            group=config.group,
            cfg=config.cfg,
            temperature=config.temperature,
            seed=(config.seed, step),
            max_chain=config.max_chain,
            indices=list(indices),
            logp_mode=config.logp,
        )
        clock.append(time.time())

        # 3) Rewards: prompt to chain, chain to image, prompt to image, aesthetics
        images = gotr1.decode_images(model, sampled.image_tokens)
        scores = score([prompt for prompt in batch for _ in range(config.group)], sampled.chains, images)
        clock.append(time.time())

        # 4) Advantages: within the group of a prompt. Groups of equal rewards are left out from here on
        total = torch.tensor([row["total"] for row in scores], device=device)
        advantages = group_advantages(total, config.group)
        live = [g for g in range(share) if advantages[g * config.group : (g + 1) * config.group].any()]
        kept = [g * config.group + k for g in live for k in range(config.group)]
        n_tokens = runtime.all_sum(sampled.mask[kept].sum()).clamp(min=1)

        # 5) Loss and gradient: micro-batches and ranks add up to one mean over all tokens
        lr = runtime.cosine_lr(step, config.steps, config.lr, config.warmup, floor=0.1)
        for parameter_group in optimizer.param_groups:
            parameter_group["lr"] = lr
        old, ref = {}, {}
        for update in range(config.updates):
            optimizer.zero_grad()
            sums = torch.zeros(3, device=device)
            for first in range(0, len(kept), config.micro_batch):
                rows = kept[first : first + config.micro_batch]
                mb = sampled.select(rows)
                logp, mask = gotr1.token_logps(model, mb)
                if update == 0:
                    old[first] = logp.detach()
                    with torch.no_grad():
                        ref[first] = gotr1.token_logps(reference, mb)[0] if config.kl else None
                    if step == 0:
                        self_test(logp.detach(), mb.logp, ref[first], mask, tolerance=1e-3)
                settings = (config.clip_low, config.clip_high, config.kl)
                loss, parts = grpo_loss(logp, old[first], ref[first], advantages[rows], mask, n_tokens, *settings)
                loss.backward()
                sums += torch.stack([parts["ratio"], parts["clip"], parts["kl"]])

            # 6) Step: the gradient is summed over ranks, then clipped
            runtime.sum_gradients(parameters)
            norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip_grad).item()
            if step == 0 and n_tokens > 1 and not norm > 0:
                raise RuntimeError(f"self-test: the gradient norm is {norm} although rewards differ")
            if not np.isfinite(norm):
                raise RuntimeError(f"the gradient is not finite at step {step}: lower --lr. {folder}/latest is good")
            if n_tokens > 1:
                optimizer.step()
        clock.append(time.time())

        # 7) Log: means over all samples and tokens of all ranks
        ratio, clip, kl = (runtime.all_sum(sums) / n_tokens).tolist()
        rows = runtime.gather_list(sample_rows(sampled, scores, config.group))
        means = {key: float(np.mean([r[key] for r in rows])) for key in rows[0]}
        row = {"step": step, **means, "ratio": ratio, "clip": clip, "kl": kl, "grad_norm": norm, "lr": lr}
        row |= {"seconds": clock[-1] - clock[0]}
        row |= dict(zip(("rollout_s", "reward_s", "update_s"), np.diff(clock).tolist(), strict=True))
        bar.set_postfix_str(f"reward {row['reward']:.3f}")
        if rank == 0:
            runtime.write_log(folder, [row])
            bar.write(log_line(row, config.steps))
        if config.eval_every and (step + 1) % config.eval_every == 0 and step + 1 < config.steps:
            look(f"step_{step + 1:06d}", step + 1)
        stopping = stopped()
        if stopping or (step + 1) % config.save_every == 0 or step + 1 == config.steps:
            save(step + 1)
        if stopping:
            if rank == 0:
                print(f"stopped after step {step + 1} of {config.steps}; the same command continues from {folder}")
            return

    # 8) After: the same held-out prompts with the same random numbers
    after_path = folder / "eval_after.json"
    if not after_path.exists():
        look("after", config.steps)
    if rank == 0:
        runtime.plot_curves(runtime.read_log(folder), CURVES, folder / "curves.png")
        print(table(json.loads(before_path.read_text()), json.loads(after_path.read_text())))
        print(f"\n{len(held_out)} held-out prompts, one sample each. Written to {folder}:")
        newest = (folder / "latest").read_text()
        for name in ("samples_before.png", "samples_after.png", "curves.png", "log.jsonl", newest):
            print(f"  {folder / name}")


if __name__ == "__main__":
    main()
