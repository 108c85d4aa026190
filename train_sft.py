"""The paper's first stage: teach Janus-Pro to write a chain of objects and boxes, then to draw it (supervised
fine-tuning).

The loss is the negative log-probability, by the same `token_logps` that GRPO uses, of the chain's tokens (with the
<begin_of_image> that ends it) and of the image tokens; the prompt is given and not trained. One mean over all chain
tokens of the step, one over all its image tokens, on all ranks; added with weights.

The paper says 70,000 steps on LAHR-GoT, JourneyDB-GoT and FLUX-GoT (the last is not released), and no more. Chosen
here, after the same authors' GoT where it says something: AdamW (0.9, 0.95), cosine with warm-up, weights 1 : 1; and
10 % of the samples drawn without their condition, in the form that guidance uses when sampling (pads between bos and
<begin_of_image>).

    python train_sft.py --model toy --from_scratch              # the toy checkpoint from nothing -> out/sft/
    python train_sft.py --data pictures.jsonl --box_format pixels --model deepseek-community/Janus-Pro-1B --dry_run
"""

import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import gotr1
from benchmarks import stats as report
from data import cache as token_cache
from data import got as got_data
from engine import run
from engine import trainer as engines
from toy import model as toy_model
from toy import world as toy


@dataclass
class Config(got_data.Source):
    # Data, beside the flags above
    data: str = "toy"  # `toy`, a hub id, a folder of .parquet, .jsonl or .tar, or one such file
    cache: str = ""  # folder for texts and image tokens, made once; default: `cache` in the folder of the run
    dry_run: bool = (
        False  # only print 8 records and draw them with their boxes: look before training
    )
    # Model
    model: str = "toy"  # what to start from: `toy`, or a folder or hub id of a checkpoint
    from_scratch: bool = (
        False  # begin with random weights of the toy and train its picture tokenizer first
    )
    out: str = "out/sft"  # folder of this run; with the same flags again, the run continues from its last checkpoint
    # Training
    steps: int = 1500  # optimizer steps of the language model (paper: 70000)
    batch_size: int = 64  # sequences a step, over all ranks (GoT: 128)
    micro_batch: int = (
        64  # sequences a forward and backward pass; changes memory and speed, not the gradient
    )
    lr: float = 3e-3  # peak learning rate, reached after `warmup`, then a cosine to 0 (GoT: 1e-4)
    warmup: float = 0.05  # share of the steps
    weight_decay: float = 0.01  # AdamW's (GoT: 0.05)
    clip_grad: float = 1.0  # largest gradient norm
    chain_weight: float = 1.0  # of the mean loss over chain tokens
    image_weight: float = 1.0  # of the mean loss over image tokens
    condition_dropout: float = (
        0.1  # share of the samples that learn to draw without prompt and chain, for guidance
    )
    lora: int = 0  # rank of the LoRA adapter; 0 trains all weights of the language model
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
    # The toy
    examples: int = 40_000  # scenes in the training set
    vq_steps: int = 1500  # optimizer steps of the picture tokenizer
    # Looking at it
    eval_every: int = 250  # steps between looks: the toy's rewards; else the held-out loss and a sheet of pictures
    eval_prompts: int = (
        240  # held-out: the toy's prompts; or the last records of the data, at most a tenth of them
    )
    save_every: int = 250  # steps between checkpoints; also at the end, on SIGTERM and on Ctrl-C
    keep: int = 2  # checkpoints that stay
    wandb: str = ""  # name of a Weights & Biases project that gets the log too
    seed: int = 0  # of weights, data and order


CURVES = {
    "loss (nats a token)": ["chain_loss", "image_loss", "held_out_chain", "held_out_image"],
    "held-out rewards": ["sem", "spa", "ri", "pi", "total"],
}


def sft_loss(
    logp, mask, images: int, n_chain, n_image, chain_weight: float = 1.0, image_weight: float = 1.0
):
    """logp, mask (N, S), the last `images` columns the image; `n_chain`, `n_image`: trained tokens of the whole step.

    Returns (loss, chain, image): this call's share of the step's loss, and of the mean nats a chain and an image token;
    the shares of all calls and ranks add up."""
    nll = -logp * mask
    chain, image = nll[:, :-images].sum() / n_chain, nll[:, -images:].sum() / n_image
    return chain_weight * chain + image_weight * image, chain.detach(), image.detach()


def rows_of_step(config: Config, count: int, step: int) -> tuple[list[int], np.ndarray]:
    """Which of `count` records a step takes, and which of them lose their condition: fixed by (seed, step)."""
    rng = np.random.default_rng([config.seed, 3, step])
    if config.data == "toy":  # drawn anew every time: the set is itself a draw from an endless one
        chosen = rng.integers(0, count, config.batch_size).tolist()
    else:
        chosen = run.order_of_step(count, step, config.batch_size, config.seed)
    return chosen, rng.random(config.batch_size) < config.condition_dropout


def make_batch(tokenizer, prepared, chosen: list[int], device) -> gotr1.Rollout:
    prompts, chains, image_tokens = prepared.batch(chosen)
    prompt_ids = [gotr1.encode_prompt(tokenizer, prompt) for prompt in prompts]
    chain_ids = [gotr1.encode_chain(tokenizer, chain) for chain in chains]
    return gotr1.Rollout.from_data(tokenizer, prompt_ids, chain_ids, image_tokens.to(device))


@torch.no_grad()
def look_at_data(
    engine, prepared, held_out: list[int], config: Config, path: Path
) -> dict[str, float]:
    """Mean nats a token of held-out records, and a sheet of what the model draws for the first six of their prompts."""
    sums, codes = torch.zeros(4), gotr1.image_token_count(engine.model)
    for first in range(0, len(held_out), config.micro_batch):
        batch = make_batch(
            engine.tokenizer, prepared, held_out[first : first + config.micro_batch], engine.device
        )
        logp, mask = engine.score(batch)
        parts = sft_loss(logp, mask, codes, 1, 1)[1:]
        sums += torch.stack([*parts, mask[:, :-codes].sum(), mask[:, -codes:].sum()]).cpu()
    prompts = prepared.batch(held_out[:6])[0]
    longest = max(len(gotr1.encode_prompt(engine.tokenizer, prompt)) for prompt in prompts)
    room = engine.model.config.text_config.max_position_embeddings - longest - codes - 1
    with engine.gathered() as model:
        how = {"seed": config.seed, "max_chain": min(config.max_chain, room)}
        sampled = gotr1.rollout(model, engine.tokenizer, prompts, **how)
    columns = zip(
        prompts,
        sampled.chains,
        gotr1.decode_images(engine.model, sampled.image_tokens),
        strict=True,
    )
    if run.rank() == 0:
        report.draw_plans(
            [{"prompt": p, "chain": c, "image": i, "note": ""} for p, c, i in columns], path
        )
    return {
        "held_out_chain": (sums[0] / sums[2]).item(),
        "held_out_image": (sums[1] / sums[3]).item(),
    }


def check(config: Config, world: int) -> None:
    run.check_ranges(
        config,
        at_least_one="steps batch_size micro_batch examples vq_steps eval_every eval_prompts save_every keep max_chain",
        above_zero="lr clip_grad lora_alpha",
        not_negative="warmup weight_decay chain_weight image_weight condition_dropout lora max_records seed",
    )
    if config.from_scratch and (config.model, config.data) != ("toy", "toy"):
        run.fail(
            "--from_scratch builds the toy model from the toy's data: leave out --model and --data, or itself"
        )
    if config.batch_size % world:
        run.fail(
            f"--batch_size {config.batch_size} sequences cannot be shared evenly by {world} processes"
        )
    engines.check(config)


def load(config: Config, device, folder: Path, saved: Path | None) -> engines.Engine:
    """What the run goes on with: its last checkpoint, what `--model` names, or a new toy model, which rank 0 makes."""
    source = config.model
    if config.from_scratch:
        source = str(folder / "from_scratch")
        if run.rank() == 0:
            toy_model.save_new_model(Path(source), config.vq_steps, config.seed)
        if dist.is_initialized():
            dist.barrier()
    return engines.load(
        config, device, saved, source, betas=(0.9, 0.95), weight_decay=config.weight_decay
    )


def main(argv: list[str] | None = None) -> None:
    config = run.parse_args(Config, __doc__, argv)
    rank, world, device = run.start_processes()
    check(config, world)
    source = got_data.Source(
        **{field.name: getattr(config, field.name) for field in fields(got_data.Source)}
    )
    began, folder, toys = time.time(), Path(config.out), config.data == "toy"
    source = replace(source, box_format="0..999") if toys else source

    def rows():
        return (
            toy_model.training_rows(config.examples, config.seed)
            if toys
            else got_data.open_rows(source)
        )

    try:
        if config.dry_run:
            token_cache.dry_run(rows(), *gotr1.load_policy(config.model, device), source, folder)
            return
        saved = run.latest_checkpoint(folder)
        opened = rows if toys or saved else rows()  # bad flags are found before anything is written
        if config.from_scratch or saved:
            run.open_run(config.out, config)  # with other flags it ends here
        engine = load(config, device, folder, saved)
        folder, start = run.open_run(config.out, config), engine.first_step
        cache = config.cache or folder / "cache"
        prepared = token_cache.prepare(
            opened, engine.model, engine.tokenizer, source, cache, rank, world
        )
    except (OSError, ValueError) as problem:
        run.fail(str(problem))
    log, stopped = run.Log(folder, start, config.wandb), run.watch_signals(device)
    count, held_out = len(prepared), toy.toy_prompts(config.eval_prompts, seed=7, held_out=True)
    if not toys:
        count -= max(1, min(config.eval_prompts, count // 10))
        if count < 1:
            run.fail(f"--data {config.data} holds one good record: expected 2 or more")
        held_out = list(range(count, len(prepared)))
    images, share = gotr1.image_token_count(engine.model), config.batch_size // world
    chunk = min(8192, 2**27 // len(engine.tokenizer))  # rows of logits at a time: half a gigabyte

    bar = tqdm(
        range(start, config.steps), initial=start, total=config.steps, desc="SFT", disable=rank > 0
    )
    for step in bar:
        clock = time.time()

        # 1) A batch, fixed by (seed, step), of which every rank takes its share; some of it without its condition
        chosen, blank = rows_of_step(config, count, step)
        chosen, blank = (
            chosen[rank * share :][:share],
            torch.from_numpy(blank[rank * share :][:share]).to(device),
        )
        batch = make_batch(engine.tokenizer, prepared, chosen, device)
        n_chain = run.all_sum(batch.mask[~blank][:, :-images].sum()).clamp(min=1)
        n_image = torch.tensor(float(config.batch_size * images), device=device)

        # 2) Loss and gradient: micro-batches and ranks add up to one mean a modality
        sums = torch.zeros(2, device=device)
        for first in range(0, share, config.micro_batch):
            rows_here = list(range(first, min(first + config.micro_batch, share)))
            logp, mask = engine.score(batch.select(rows_here), blank=blank[rows_here], chunk=chunk)
            loss, *parts = sft_loss(
                logp, mask, images, n_chain, n_image, config.chain_weight, config.image_weight
            )
            engine.backward(loss)
            sums += torch.stack(parts)

        # 3) Step: the gradient is summed over ranks, then clipped
        lr = run.cosine_lr(step, config.steps, config.lr, config.warmup)
        norm = engine.step(lr, config.clip_grad)
        if not np.isfinite(norm):
            raise RuntimeError(
                f"the gradient is not finite at step {step}: lower --lr, look at the data (--dry_run)"
            )

        # 4) Log, look at sampled pictures, save
        chain, image = run.all_sum(sums).tolist()
        seconds = time.time() - clock
        row = {
            "step": step,
            "chain_loss": chain,
            "image_loss": image,
            "grad_norm": norm,
            "lr": lr,
            "seconds": seconds,
        }
        row |= {"samples_s": config.batch_size / seconds, "peak_gib": run.peak_gib(device)}
        bar.set_postfix_str(f"chain {chain:.3f} image {image:.3f}")
        done = step + 1
        if done % config.eval_every == 0 or done == config.steps:
            if toys:
                with engine.gathered() as model:
                    means = toy_model.look(model, engine.tokenizer, held_out, config.seed)
            else:
                means = look_at_data(
                    engine, prepared, held_out, config, folder / f"samples_{done:06d}.png"
                )
            row |= means
            run.say(
                f"step {done:5d}  "
                + "  ".join(f"{key} {value:.3f}" for key, value in means.items())
            )
        log.write(row)
        if not toys and done * config.batch_size // count > step * config.batch_size // count:
            run.say(f"epoch {done * config.batch_size // count}: {prepared.report}")
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
    if rank == 0:
        minutes, newest = (time.time() - began) / 60, run.latest_checkpoint(folder)
        print(
            f"wrote {newest}, {folder / 'curves.png'} and {folder / 'log.jsonl'} in {minutes:.1f} minutes"
        )


if __name__ == "__main__":
    main()
