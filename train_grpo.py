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

import functools
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

import eval as evaluation
import gotr1
import rewards
from benchmarks import stats as report
from engine import run
from engine import trainer as engines
from render_boxes import parse_chain
from toy import world as toy


@dataclass
class Config:
    preset: Literal["toy", "paper"] = (
        "toy"  # the defaults of the flags below: the toy's, or the paper's recipe
    )
    # Model and data
    model: str = "toy"  # `toy`, or a folder or hub id of a checkpoint
    prompts: str = "toy"  # `toy`, or a text file with one prompt a line
    eval_file: str = (
        "toy"  # held-out prompts for evaluation: `toy`, or a text file with one prompt a line
    )
    out: str = "out/grpo"  # folder of this run; with the same flags again, the run continues from its last checkpoint
    # Rollout
    steps: int = 110  # rollouts in all (paper: 1000)
    batch_size: int = 8  # prompts a step, over all ranks (paper: 8)
    group: int = 16  # samples a prompt (paper: 16)
    temperature: float = 1.0  # of chain and image tokens (paper: 1)
    cfg: float = (
        1.0  # guidance in the rollout; 1 is none. The toy's unconditional half is too weak to help
    )
    max_chain: int = 96  # most chain tokens that are sampled (official code, for Janus-Pro: 600)
    rollout_batch: int = 8  # prompts that a rank draws at a time; fewer need a smaller cache
    # Rewards
    judge: str = "toy"  # `toy` (exact), or a folder or hub id of a Qwen2.5-VL or Qwen3-VL
    judge_device: str = ""  # where judge and HPS are; default: on the GPU of each rank
    scoring: Literal["reply", "expected"] = (
        "reply"  # the judge writes its mark; or it is read off its probabilities
    )
    spatial_as: Literal["boxes", "text"] = (
        "boxes"  # R_spa sees the boxes drawn; or it is told where they are
    )
    judge_batch: int = 16  # rows that the judge takes at a time; halved when memory runs out
    hps: str = "toy"  # `toy` (stand-in), or the HPS v2.1 checkpoint
    rewards: tuple[str, ...] = ("sem", "spa", "ri", "pi", "hps")  # the parts that take part
    combine: Literal["product", "sum"] = "product"  # how they become one number (paper: product)
    # Loss
    updates: int = 1  # optimizer steps a rollout, each over all of it
    clip_low: float = (
        0.2  # the ratio policy / policy that sampled is clipped to at least 1 - clip_low
    )
    clip_high: float = 0.2  # and to at most 1 + clip_high; idle with one update
    kl: float = 0.02  # weight of the KL to the reference; 0: no reference model
    loss_mean: Literal["token", "sequence"] = (
        "token"  # over all tokens of the step; or of each sample, then over these
    )
    advantage_std: bool = True  # divide by the standard deviation of the group
    logp: Literal["cond", "guided"] = (
        "cond"  # which distribution of an image token is scored when cfg is not 1
    )
    # Optimisation
    lr: float = (
        7e-4  # peak learning rate (paper: 1e-5 with LoRA; 1e-6 is common for a real model in full)
    )
    lr_floor: float = 0.1  # share of the peak at which the cosine ends
    warmup: float = 0.1  # share of the steps
    clip_grad: float = 1.0  # largest gradient norm
    lora: int = (
        0  # rank of the LoRA adapter (paper: 32); 0 trains all weights of the language model
    )
    lora_alpha: float = 32.0  # its scale: the adapter counts lora_alpha / lora times
    dtype: Literal["float32", "bfloat16"] = (
        "float32"  # of the forward pass; what AdamW changes is always float32
    )
    shard: Literal["auto", "yes", "no"] = (
        "auto"  # FSDP2; auto: in full over several processes, or in bfloat16
    )
    gradient_checkpointing: bool = (
        False  # keep one vector a token and layer, compute the rest again: less memory
    )
    micro_batch: int = (
        16  # samples a forward and backward pass; changes memory and speed, not the gradient
    )
    # Looking at it
    eval_prompts: int = 240  # held-out prompts before and after
    eval_every: int = 0  # steps between evaluations in between; 0: none
    sheet_every: int = 0  # steps between sheets of the first 12 held-out prompts; 0: none
    save_every: int = 20  # steps between checkpoints; also at the end, on SIGTERM and on Ctrl-C
    keep: int = 2  # checkpoints that stay
    wandb: str = ""  # name of a Weights & Biases project that gets the log too
    seed: int = 0  # of prompts and samples; fixes them on any number of ranks


PRESETS = {
    "toy": {},
    # Stated in section 4.1: group, batch, steps, lr and its cosine, LoRA 32/32, temperatures, judge. Open there, and
    # chosen as T2I-R1 did for the same base model: guidance 5 in the rollout (the paper's at evaluation), scored on the
    # conditional branch, KL 0.01, one update a rollout, no warm-up. Chains of up to 600 tokens: the official inference
    # code. LoRA is on every linear layer of the language model.
    "paper": {
        "steps": 1000, "batch_size": 8, "group": 16, "temperature": 1.0, "lr": 1e-5, "lr_floor": 0.0, "warmup": 0.0,
        "lora": 32, "lora_alpha": 32.0, "cfg": 5.0, "logp": "cond", "kl": 0.01, "max_chain": 600, "rollout_batch": 1,
        "dtype": "bfloat16", "gradient_checkpointing": True, "micro_batch": 4,
    },
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The mathematics


def group_advantages(
    rewards: torch.Tensor, group: int, eps: float = 1e-4, std: bool = True
) -> torch.Tensor:
    """Rewards (N,), the `group` samples of a prompt next to each other -> advantages (N,) (paper equation 1).

    The standard deviation is the unbiased one, as torch's default; without `std` there is no division (Dr. GRPO). A
    group of equal rewards gets exactly 0.
    >>> group_advantages(torch.tensor([1.0, 0.0, 0.5, 0.5]), group=2)
    tensor([ 0.7070, -0.7070,  0.0000,  0.0000])
    """
    rewards = rewards.view(-1, group)
    centered = rewards - rewards.mean(dim=1, keepdim=True)
    equal = rewards.amax(1, keepdim=True) == rewards.amin(
        1, keepdim=True
    )  # a rounded mean must not make a signal
    scale = rewards.std(dim=1, keepdim=True) + eps if std else 1.0
    return torch.where(equal, 0.0, centered / scale).flatten()


def grpo_loss(
    logp,
    logp_old,
    logp_ref,
    advantages,
    mask,
    total,
    clip_low=0.2,
    clip_high=0.2,
    kl=0.01,
    loss_mean="token",
):
    """The clipped objective with the k3 estimator of the KL (joschu.net/blog/kl-approx.html; paper equation 2).

    logp, logp_old, logp_ref, mask: (N, S); advantages: (N,). `logp_ref` may be None when kl is 0. The mean is over
    tokens, or over those of each sample and then over samples ("sequence"); `total` is the count of tokens, or of
    samples, of the whole step: the gradients of calls and ranks add up. Returns (loss, sums): scalars, `sums` being
    those over tokens of ratio, clipped share and KL, for the log."""
    ratio = (logp - logp_old).exp()
    advantages = advantages[:, None]
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    per_token = -torch.minimum(ratio * advantages, clipped * advantages)
    k3 = torch.zeros_like(logp)
    if kl:
        gap = logp_ref - logp
        k3 = gap.exp() - gap - 1
    weight = mask if loss_mean == "token" else mask / mask.sum(dim=1, keepdim=True).clamp(min=1)
    loss = ((per_token + kl * k3) * weight).sum() / total
    cut = (clipped * advantages < ratio * advantages).float()
    return loss, {
        name: (value.detach() * mask).sum()
        for name, value in (("ratio", ratio), ("clip", cut), ("kl", k3))
    }


# ---------------------------------------------------------------------------------------------------------------------
# Looking at it


CURVES = {
    "total reward": ["reward"],
    "its parts": ["sem", "spa", "ri", "pi", "hps"],
    "entropy (nats a token)": ["entropy_text", "entropy_image"],
    "KL to the reference": ["kl"],
}
PHASES = ("rollout_s", "decode_s", "judge_s", "update_s")


# ---------------------------------------------------------------------------------------------------------------------
# The run


def check(config: Config, world: int) -> None:
    """Bad settings end the program here, in one line, before anything is loaded or written."""
    run.check_ranges(
        config,
        at_least_one="steps batch_size rollout_batch micro_batch updates max_chain judge_batch eval_prompts save_every "
        "keep",
        above_zero="temperature lr clip_grad lora_alpha",
        not_negative="kl warmup lr_floor clip_low clip_high lora eval_every sheet_every seed cfg",
    )
    if config.group < 2:
        run.fail(f"--group is {config.group}: a sample is compared with its group, so 2 or more")
    if config.batch_size % world:
        run.fail(
            f"--batch_size {config.batch_size} prompts cannot be shared evenly by {world} processes"
        )
    if not config.rewards or set(config.rewards) - set(rewards.PARTS):
        run.fail(
            f"--rewards {' '.join(config.rewards)}: expected some of {' '.join(rewards.PARTS)}"
        )
    if world > 1 and ":" in config.judge_device:
        run.fail(
            f"--judge_device {config.judge_device} would hold the judges of all {world} processes"
        )
    engines.check(config)


def read_prompts(source: str, held_out: bool, count: int) -> list[str]:
    """The toy's prompts, or the non-empty lines of a text file."""
    if source == "toy":
        return toy.toy_prompts(count, seed=7, held_out=held_out)
    try:
        lines = [line.strip() for line in Path(source).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as problem:
        run.fail(f"cannot read prompts from {source}: {problem}")
    prompts = [line for line in lines if line]
    if not prompts:
        run.fail(f"{source} holds no prompt: expected one a line")
    return prompts[:count] if held_out else prompts


def sample_rows(sampled, scores: list[dict], group: int) -> list[dict]:
    """What the log wants to know of each sample; `group_std` and `zero_var` of a sample are those of its group."""
    rows, images = [], sampled.image_tokens.shape[1]
    for k, values in enumerate(scores):
        totals = [row["total"] for row in scores[k // group * group : (k // group + 1) * group]]
        rows.append({
            "reward": values["total"], **{part: values[part] for part in values if part != "total"},
            "group_std": float(np.std(totals, ddof=1)), "zero_var": float(max(totals) == min(totals)),
            "no_box": float(not parse_chain(sampled.chains[k])), "forced": float(sampled.forced[k]),
            "chain_len": float(sampled.chain_lens[k]),
            "entropy_text": float(sampled.entropy[k, :-images].sum() / sampled.mask[k, :-images].sum().clamp(min=1)),
            "entropy_image": float(sampled.entropy[k, -images:].mean()),
        })  # fmt: skip
    return rows


def mean_row(rows: list[dict]) -> dict[str, float]:
    """Means over all samples, and the standard deviations of the rewards: `reward_std`, `sem_std` and so on."""
    row = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
    spread = [key for key in ("reward", *rewards.PARTS) if key in row]
    return row | {f"{key}_std": float(np.std([row[key] for row in rows])) for key in spread}


def log_line(row: dict, steps: int) -> str:
    parts = " ".join(f"{part} {row[part]:.2f}" for part in rewards.PARTS if part in row)
    shares = " ".join(f"{phase[:-2]} {row[phase] / row['seconds']:.0%}" for phase in PHASES)
    return (
        f"step {row['step'] + 1:4d}/{steps} | reward {row['reward']:.3f} ({parts}) | zero_var {row['zero_var']:.2f} | "
        f"kl {row['kl']:.4f} | grad {row['grad_norm']:6.2f} | chain {row['chain_len']:3.0f} | "
        f"{row['seconds']:.2f} s ({shares})"
    )


def self_test(logp, recorded, logp_ref, mask, exact: bool) -> None:
    """At step 0 the policy that is trained is the one that sampled, and it is the reference. Anything else is a bug,
    and stops the run. In bfloat16 sampling and scoring round differently: then the mean over tokens counts."""
    gap = ((logp - recorded) * mask).abs()
    gap, allowed = (gap.max(), 1e-3) if exact else (gap.sum() / mask.sum().clamp(min=1), 0.2)
    if not gap < allowed:
        raise RuntimeError(
            f"self-test: log-probabilities differ by {gap:.2g} between rollout and training"
        )
    if logp_ref is not None and not ((logp - logp_ref) * mask).abs().max() <= (
        1e-5 if exact else 1e-2
    ):
        raise RuntimeError("self-test: the reference is not the model that training starts from")


def load(config: Config, device: torch.device, saved: Path | None):
    """What `config` names -> (engine, judge, hps)."""
    engine = engines.load(config, device, saved, config.model)
    if config.kl and not config.lora:
        engine.keep_reference(
            gotr1.load_policy(config.model, "cpu", engines.DTYPES[config.dtype])[0]
        )
    judge, hps, where = toy.ToyJudge(), toy.crispness, config.judge_device or device
    if config.judge != "toy":
        how = {
            "batch_size": config.judge_batch,
            "scoring": config.scoring,
            "spatial_as": config.spatial_as,
        }
        judge = rewards.QwenJudge(config.judge, where, **how)
    if config.hps != "toy" and "hps" in config.rewards:
        hps = rewards.HPS(config.hps, where)
    return engine, judge, hps


def main(argv: list[str] | None = None) -> None:
    config = run.parse_args(Config, __doc__, argv, PRESETS)
    rank, world, device = run.start_processes()
    check(config, world)
    prompts = read_prompts(config.prompts, False, 2000)
    held_out = read_prompts(config.eval_file, True, config.eval_prompts)
    strange = [prompt for prompt in prompts + held_out if not toy.read_text(prompt)[0]]
    if strange and "toy" in (config.judge, config.hps if "hps" in config.rewards else ""):
        run.fail(
            f"--judge toy and --hps toy know only the toy's world, not {strange[0]!r}: give others"
        )
    if saved := run.latest_checkpoint(Path(config.out)):
        run.open_run(config.out, config)  # with other flags it ends here
    try:
        engine, judge, hps = load(config, device, saved)
        longest = [gotr1.encode_prompt(engine.tokenizer, max(prompts + held_out, key=len))]
        gotr1.check_room(engine.model, longest, config.max_chain + 1)
    except (OSError, ValueError) as problem:
        run.fail(str(problem))
    folder, start = run.open_run(config.out, config), engine.first_step
    log, stopped = run.Log(folder, start, config.wandb), run.watch_signals(device)

    def score(prompts, chains, images):
        return rewards.score(judge, hps, prompts, chains, images, config.rewards, config.combine)

    def look(label, step, count):
        """The first `count` held-out prompts, their mean rewards, and a sheet of the first 12 with the boxes found."""
        at_once = config.rollout_batch * config.group
        with engine.gathered() as model:
            how = (
                config.seed,
                config.cfg,
                config.temperature,
                config.max_chain,
                rank,
                world,
                label,
                at_once,
            )
            rows = evaluation.evaluate((model, engine.tokenizer), score, held_out[:count], *how)
        if rank == 0:
            for row, found in zip(rows[:12], evaluation.found_boxes(judge, rows[:12]), strict=True):
                row["note"] = "  ".join(
                    f"{part} {row['scores'][part]:.2f}" for part in (*config.rewards, "total")
                )
                row["found"] = found
            report.draw_plans(rows[:12], folder / f"samples_{label}.png", side=160)
            if count == len(held_out):
                means = json.dumps({"step": step, **evaluation.summarise(rows)}, indent=2)
                run.write_whole(folder / f"eval_{label}.json", means)

    if start == 0:
        look("before", 0, len(held_out))
    skipped = 0
    bar = tqdm(
        range(start, config.steps), initial=start, total=config.steps, desc="GRPO", disable=rank > 0
    )
    for step in bar:
        clock = [time.time()]

        # 1) Prompts: every rank takes its share of the step's
        chosen = run.order_of_step(len(prompts), step, config.batch_size, config.seed)
        share = config.batch_size // world
        indices = list(range(rank * share, (rank + 1) * share))
        batch = [prompts[chosen[i]] for i in indices]

        # 2) Rollout: `group` chains and pictures for each prompt
        with engine.gathered() as model:
            sample = functools.partial(
                gotr1.rollout,
                model,
                engine.tokenizer,
                group=config.group,
                cfg=config.cfg,
                temperature=config.temperature,
                seed=(config.seed, step),
                max_chain=config.max_chain,
                logp_mode=config.logp,
            )
            few = config.rollout_batch
            parts = [
                sample(batch[k : k + few], indices=indices[k : k + few])
                for k in range(0, share, few)
            ]
        sampled = gotr1.Rollout.join(parts)
        clock.append(time.time())

        # 3) Rewards: prompt to chain, chain to image, prompt to image, aesthetics
        images = gotr1.decode_images(engine.model, sampled.image_tokens)
        clock.append(time.time())
        scores = score(
            [prompt for prompt in batch for _ in range(config.group)], sampled.chains, images
        )
        clock.append(time.time())

        # 4) Advantages: within the group of a prompt. Groups of equal rewards are left out from here on
        totals = torch.tensor([row["total"] for row in scores], device=device)
        advantages = group_advantages(totals, config.group, std=config.advantage_std)
        live = [
            g for g in range(share) if advantages[g * config.group : (g + 1) * config.group].any()
        ]
        kept = [g * config.group + k for g in live for k in range(config.group)]
        n_tokens = run.all_sum(sampled.mask[kept].sum()).clamp(min=1)
        n_samples = run.all_sum(torch.tensor(float(len(kept)), device=device)).clamp(min=1)

        # 5) Loss and gradient: micro-batches and ranks add up to one mean over all tokens. All ranks make as many
        # passes, each a collective under FSDP; one that has no sample left makes them with a mask of zeros
        lr = run.cosine_lr(step, config.steps, config.lr, config.warmup, config.lr_floor)
        passes = max(run.gather_list([-(-len(kept) // config.micro_batch)]))
        old, ref = {}, {}
        for update in range(config.updates):
            sums = torch.zeros(3, device=device)
            for k in range(passes):
                rows = kept[k * config.micro_batch : (k + 1) * config.micro_batch]
                mb = sampled.select(rows or [0])
                logp, mask = engine.score(mb)
                mask = mask if rows else 0 * mask
                if update == 0:
                    old[k] = logp.detach()
                    ref[k] = engine.score_reference(mb)[0] if config.kl else None
                    if step == 0:
                        self_test(
                            logp.detach(), mb.logp, ref[k], mask, exact=config.dtype == "float32"
                        )
                total = n_tokens if config.loss_mean == "token" else n_samples
                settings = (total, config.clip_low, config.clip_high, config.kl, config.loss_mean)
                loss, parts = grpo_loss(
                    logp, old[k], ref[k], advantages[rows or [0]], mask, *settings
                )
                engine.backward(loss)
                sums += torch.stack([*parts.values()])

            # 6) Step: the gradient is summed over ranks, then clipped. One that is not finite is not taken
            norm = engine.step(lr, config.clip_grad)
            skipped = 0 if np.isfinite(norm) else skipped + 1
            if step == 0 and passes and not norm > 0:
                raise RuntimeError(
                    f"self-test: the gradient norm is {norm} although rewards differ"
                )
            if skipped == 10:
                raise RuntimeError(
                    "ten gradients in a row were not finite: lower --lr, or look at the rewards"
                )
        clock.append(time.time())

        # 7) Log: means over all samples and tokens of all ranks
        ratio, clip, kl = (run.all_sum(sums) / n_tokens).tolist()
        row = {
            "step": step,
            **mean_row(run.gather_list(sample_rows(sampled, scores, config.group))),
        }
        row |= {
            "ratio": ratio,
            "clip": clip,
            "kl": kl,
            "grad_norm": norm,
            "skipped": skipped,
            "lr": lr,
        }
        seconds = run.all_sum(torch.tensor(np.diff(clock), device=device)) / world
        row |= dict(zip(PHASES, seconds.tolist(), strict=True)) | {"seconds": seconds.sum().item()}
        row |= {
            "samples_s": config.batch_size * config.group / row["seconds"],
            "peak_gib": run.peak_gib(device),
        }
        bar.set_postfix_str(f"reward {row['reward']:.3f}")
        log.write(row)
        run.say(log_line(row, config.steps))
        if step == 0 and row["no_box"] == 1:
            raise RuntimeError(
                "no chain has a box: start from a model that writes chains, see train_sft.py"
            )

        # 8) Save and look, now and then
        done = step + 1
        if config.eval_every and done % config.eval_every == 0 and done < config.steps:
            look(f"step_{done:06d}", done, len(held_out))
        elif config.sheet_every and done % config.sheet_every == 0 and done < config.steps:
            look(f"step_{done:06d}", done, 12)
        stopping = stopped()
        if stopping or done % config.save_every == 0 or done == config.steps:
            engine.save(folder, done, config.keep)
            log.plot(CURVES)
        if stopping:
            if rank == 0:
                print(
                    f"stopped after step {done} of {config.steps}; the same command continues from {folder}"
                )
            return

    # 9) After: the same held-out prompts with the same random numbers
    before_path, after_path = folder / "eval_before.json", folder / "eval_after.json"
    if not after_path.exists():
        look("after", config.steps, len(held_out))
    if rank == 0:
        print(
            report.before_after(
                json.loads(before_path.read_text()), json.loads(after_path.read_text())
            )
        )
        print(f"\n{len(held_out)} held-out prompts, one sample each. Written to {folder}:")
        for name in (
            "samples_before.png",
            "samples_after.png",
            "curves.png",
            "log.jsonl",
            f"step_{config.steps:06d}",
        ):
            print(f"  {folder / name}")


if __name__ == "__main__":
    main()
