"""The paper's first stage: teach Janus-Pro to write a chain of objects and boxes, then to draw it
(supervised fine-tuning).

The loss is the mean negative log-probability of the chain's tokens, with the <begin_of_image> that
ends it, plus that of the image tokens; each mean is over the whole step, all ranks included. The
prompt is not trained. Log-probabilities come from the function that GRPO uses, gotr1.token_logps.

10 % of the samples are trained on the image without prompt and chain: between bos and
<begin_of_image> stand pads, as guidance has them when it samples.

The paper states 70,000 steps on LAHR-GoT, JourneyDB-GoT and FLUX-GoT (the last is not released).
It does not state the optimizer. AdamW with betas 0.9 and 0.95, a cosine with warm-up, and equal
weights of both means are our choice; "GoT" below is an earlier paper of the same authors.

    python train_sft.py --model toy --from_scratch      # makes a new toy checkpoint
    python train_sft.py --data pictures.jsonl --box_format pixels \\
        --model deepseek-community/Janus-Pro-1B --dry_run
"""

import functools
import math
import time
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import gotr1
from data import cache as token_cache
from data import got
from engine import checkpoints, run, trainer
from evaluation import held_out as held_out_prompts
from evaluation import sheets
from toy import model as toy_model
from toy.world import toy_prompts


@dataclass
class Config(got.Source, trainer.TrainerConfig):
    """The flags: these, and what is inherited, those of the data and those of both trainers."""

    # Data
    data: str = "toy"  # `toy`, a hub id, a folder of .parquet, .jsonl or .tar, or one such file
    cache: str = ""  # folder for the encoded data, which later runs use again; default: in `out`
    dry_run: bool = False  # print 8 records, draw them with their boxes, and stop
    # Model
    model: str = "toy"  # what to start from: `toy`, or a folder or hub id of a checkpoint
    from_scratch: bool = False  # a new toy model; its picture tokenizer is trained first
    out: str = "out/sft"  # folder of this run; the same flags again continue where it stopped
    # Training
    steps: int = 2400  # optimizer steps of the language model (paper: 70000)
    batch_size: int = 64  # sequences per step, over all ranks (GoT: 128)
    micro_batch: int = 64  # sequences per pass; changes memory and speed, not the gradient
    lr: float = 3e-3  # peak learning rate; rises over `warmup`, then a cosine to 0 (GoT: 1e-4)
    weight_decay: float = 0.01  # AdamW's (GoT: 0.05)
    chain_weight: float = 1.0  # weight of the mean over chain tokens
    image_weight: float = 1.0  # weight of the mean over image tokens
    condition_dropout: float = 0.1  # share of samples without prompt and chain, for guidance
    # The toy
    examples: int = 40_000  # scenes in the training set
    vq_steps: int = 1500  # optimizer steps of the picture tokenizer
    # Looking at it
    look_every: int = 250  # steps between evaluations, see `look`
    eval_prompts: int = 240  # held-out toy prompts, or last records of the data, at most 10 %
    save_every: int = 250  # steps between checkpoints; also at the end, on SIGTERM and on Ctrl-C


# ------------------------------------------------------------------------------------------------
# The mathematics


def sft_loss(logp, mask, image_len: int, n_chain, n_image):
    """The sums of -logp over chain tokens and over image tokens, divided by n_chain and n_image,
    the numbers of such tokens in the step, on all ranks. Over all micro-batches and ranks the
    results add up to the two means.

    logp, mask: (N, S), of which the last `image_len` columns are the image."""
    nll = -logp * mask
    return nll[:, :-image_len].sum() / n_chain, nll[:, -image_len:].sum() / n_image


def records_of_step(config: Config, count: int, step: int) -> tuple[list[int], np.ndarray]:
    """Which of `count` records a step takes, and which of these are trained without prompt and
    chain, (batch_size,) bool. Depends on seed and step alone."""
    rng = np.random.default_rng(
        [config.seed, 3, step]
    )  # 3: not the numbers that other uses of the seed draw
    if config.data == "toy":  # with replacement
        chosen = rng.integers(0, count, config.batch_size).tolist()
    else:
        chosen = trainer.order_of_step(count, step, config.batch_size, config.seed)
    return chosen, rng.random(config.batch_size) < config.condition_dropout


# ------------------------------------------------------------------------------------------------
# The run


def main(argv: list[str] | None = None) -> None:
    config = run.parse_args(Config, __doc__, argv)
    rank, world, device = run.start_processes()
    check_config(config, world)
    if config.dry_run:
        show_data(config, device)
        return
    run_began = time.time()
    training = load_training(config, rank, world, device)
    engine = training.engine
    folder = training.folder
    run.explain_crashes(folder)
    log = run.Log(folder, engine.first_step, config.wandb)
    stop_requested = run.watch_signals(device)  # a function: has SIGTERM or Ctrl-C come?
    image_len = gotr1.image_token_count(engine.model)
    share = config.batch_size // world  # sequences per rank and step
    mine = slice(rank * share, (rank + 1) * share)
    chunk = min(8192, 2**27 // len(engine.tokenizer))  # tokens whose logits take half a gigabyte

    bar = tqdm(
        range(engine.first_step, config.steps),
        initial=engine.first_step,
        total=config.steps,
        desc="SFT",
        disable=rank > 0,
    )
    for step in bar:
        step_began = time.time()

        # 1) A batch, of which every rank takes its share; `blank` samples lose prompt and chain
        chosen, blank = records_of_step(config, training.count, step)
        blank = torch.from_numpy(blank[mine]).to(device)
        batch = make_batch(training, chosen[mine])
        n_chain = run.all_sum(batch.mask[~blank][:, :-image_len].sum()).clamp(min=1)
        n_image = torch.tensor(float(config.batch_size * image_len), device=device)

        # 2) Loss and gradient: micro-batches and ranks add up to a mean over chain tokens and one
        # over image tokens
        loss_sums = torch.zeros(2, device=device)  # nats per chain token, per image token
        for first in range(0, share, config.micro_batch):
            samples = list(range(first, min(first + config.micro_batch, share)))
            mb = batch.select(samples)
            mb_logp, mb_mask = engine.score(mb, blank=blank[samples], chunk=chunk)
            chain, image = sft_loss(mb_logp, mb_mask, image_len, n_chain, n_image)
            engine.backward(config.chain_weight * chain + config.image_weight * image)
            loss_sums += torch.stack([chain.detach(), image.detach()])

        # 3) Step: the gradient is summed over ranks, then clipped
        lr = trainer.cosine_lr(step, config.steps, config.lr, config.warmup)
        grad_norm = engine.step(lr)
        if not math.isfinite(grad_norm):
            raise RuntimeError(
                f"the gradient is not finite at step {step}: "
                "lower --lr, look at the data (--dry_run)"
            )

        # 4) Log, look at sampled pictures, save
        chain_loss, image_loss = run.all_sum(loss_sums).tolist()
        seconds = time.time() - step_began
        row = {
            "step": step,
            "chain_loss": chain_loss,
            "image_loss": image_loss,
            "grad_norm": grad_norm,
            "lr": lr,
            "seconds": seconds,
            "samples_s": config.batch_size / seconds,
            "peak_gib": run.peak_gib(device),
        }
        bar.set_postfix_str(f"chain {chain_loss:.3f} image {image_loss:.3f}")
        done = step + 1
        if done % config.look_every == 0 or done == config.steps:
            means = look(training, done)
            row.update(means)
            numbers = [f"{name} {value:.3f}" for name, value in means.items()]
            run.say(f"step {done:5d}  " + "  ".join(numbers))
        log.write(row)
        stopping = stop_requested()
        if stopping or done % config.save_every == 0 or done == config.steps:
            engine.save(folder, done, config.keep)
            log.plot(CURVES)
        if stopping:
            run.say(f"stopped after step {done} of {config.steps}")
            run.say(f"the same command continues from {folder}")
            return
    minutes = (time.time() - run_began) / 60
    run.say(f"wrote {run.latest_checkpoint(folder)}, {folder / 'curves.png'}")
    run.say(f"and {folder / 'log.jsonl'} in {minutes:.1f} minutes")


# ------------------------------------------------------------------------------------------------
# Before the run


@dataclass
class Training:
    """What a run has loaded."""

    config: Config
    engine: trainer.Engine
    prepared: token_cache.Prepared  # all records, as texts and image tokens
    count: int  # the first so many records are trained on
    held_out: list  # prompts of the toy, or the indices of the other records
    folder: Path


def check_config(config: Config, world: int) -> None:
    """Bad settings end the program here with a message, before anything is loaded or written."""
    run.check_ranges(
        config,
        at_least_one="steps batch_size micro_batch examples vq_steps look_every eval_prompts "
        "save_every keep max_chain",
        above_zero="lr",
        not_negative="warmup weight_decay chain_weight image_weight condition_dropout lora "
        "max_records seed",
    )
    if config.from_scratch and (config.model, config.data) != ("toy", "toy"):
        run.fail("--from_scratch is for the toy: leave it out, or leave out --model and --data")
    if config.condition_dropout > 1:
        run.fail(f"--condition_dropout is {config.condition_dropout}: expected a share, 0 to 1")
    if config.batch_size % world:
        run.fail(
            f"--batch_size {config.batch_size} sequences cannot be shared evenly "
            f"by {world} processes"
        )
    run.check_wandb(config.wandb)


def data_source(config: Config) -> got.Source:
    """The flags that say how records are read; of the toy, what its scenes depend on."""
    values = {field.name: getattr(config, field.name) for field in fields(got.Source)}
    if config.data == "toy":
        values["box_format"] = "0..999"
        values["data"] = f"toy, {config.examples} scenes of seed {config.seed}"
    return got.Source(**values)


def read_records(config: Config):
    """Raw records, see `got.open_rows`."""
    if config.data == "toy":
        return toy_model.training_rows(config.examples, config.seed)
    return got.open_rows(data_source(config))


def show_data(config: Config, device) -> None:
    """`--dry_run`: prints records and draws them, see `token_cache.dry_run`."""
    try:
        records = read_records(config)
        model, tokenizer = gotr1.load_policy(config.model, device)
        token_cache.dry_run(records, model, tokenizer, data_source(config), Path(config.out))
    except (OSError, ValueError) as problem:
        run.fail(str(problem))


def load_training(config: Config, rank: int, world: int, device) -> Training:
    """Loads everything that the flags name. Bad input ends the program here with a message."""
    folder = Path(config.out)
    saved = run.checkpoint_to_resume(folder)
    try:
        if config.lora:
            checkpoints.check_markers_for_lora(config.model)
        records = functools.partial(read_records, config)  # called if the cache is not complete
        if config.data != "toy" and not saved:
            records = read_records(config)  # now: bad flags end the program before it writes
        if config.from_scratch or saved:
            run.open_run(config.out, config)  # with other flags the program ends here
        engine = trainer.load_engine(
            config,
            device,
            gotr1.token_logps,
            first_model(config, folder),
            saved,
            betas=(0.9, 0.95),
            weight_decay=config.weight_decay,
        )
        folder = run.open_run(config.out, config)
        prepared = token_cache.prepare(
            records,
            engine.model,
            engine.tokenizer,
            data_source(config),
            config.cache or folder / "cache",
            rank,
            world,
        )
    except (OSError, ValueError) as problem:
        run.fail(str(problem))

    count = len(prepared)
    if config.data == "toy":
        held_out = toy_prompts(config.eval_prompts, seed=7, held_out=True)
    else:
        count -= max(1, min(config.eval_prompts, count // 10))
        held_out = list(range(count, len(prepared)))
    if count < 1:
        run.fail(f"--data {config.data} holds one good record: expected 2 or more")
    return Training(config, engine, prepared, count, held_out, folder)


def first_model(config: Config, folder: Path) -> str:
    """What training starts from: `--model`; with --from_scratch a new toy model, made by rank 0."""
    if not config.from_scratch:
        return config.model
    new_model = folder / "from_scratch"
    if run.rank() == 0:
        toy_model.save_new_model(new_model, config.vq_steps, config.seed)
    if dist.is_initialized():
        dist.barrier()
    return str(new_model)


# ------------------------------------------------------------------------------------------------
# During the run


CURVES = {  # title of a panel of curves.png -> keys of the log
    "loss (nats per token)": ["chain_loss", "image_loss", "held_out_chain", "held_out_image"],
    "held-out rewards": ["sem", "spa", "ri", "pi", "total"],
}


def make_batch(training: Training, records: list[int]) -> gotr1.Rollout:
    """Records, by index, as samples."""
    tokenizer = training.engine.tokenizer
    prompts, chains, image_tokens = training.prepared.batch(records)
    image_tokens = image_tokens.to(training.engine.device)
    prompt_ids = [gotr1.encode_prompt(tokenizer, prompt) for prompt in prompts]
    chain_ids = [gotr1.encode_chain(tokenizer, chain) for chain in chains]
    return gotr1.Rollout.from_data(tokenizer, prompt_ids, chain_ids, image_tokens)


def look(training: Training, done: int) -> dict[str, float]:
    """How good the model is after `done` steps. The toy: its rewards on held-out prompts. Else the
    loss on held-out records; and a sheet of drawings for their prompts, with the share of chains
    that were cut."""
    if training.config.data == "toy":
        tokenizer = training.engine.tokenizer
        with training.engine.gathered() as model:
            return held_out_prompts.toy_look(
                model, tokenizer, training.held_out, training.config.seed
            )
    forced = draw_held_out(training, training.folder / f"samples_{done:06d}.png")
    return {**held_out_loss(training), "forced": forced}


@torch.no_grad()
def held_out_loss(training: Training) -> dict[str, float]:
    """Mean nats per token of the held-out records."""
    engine = training.engine
    image_len = gotr1.image_token_count(engine.model)
    micro_batch = training.config.micro_batch
    nats = torch.zeros(2)  # of chain tokens, of image tokens
    tokens = torch.zeros(2)
    for first in range(0, len(training.held_out), micro_batch):
        batch = make_batch(training, training.held_out[first : first + micro_batch])
        logp, mask = engine.score(batch)
        nats += torch.stack(sft_loss(logp, mask, image_len, n_chain=1, n_image=1)).cpu()
        tokens += torch.stack([mask[:, :-image_len].sum(), mask[:, -image_len:].sum()]).cpu()
    chain, image = (nats / tokens).tolist()
    return {"held_out_chain": chain, "held_out_image": image}


def draw_held_out(training: Training, path: Path) -> float:
    """Writes a sheet of drawings for the first six held-out prompts, with the default guidance and
    chain length; returns the share of chains that were cut at that length."""
    engine = training.engine
    prompts, _, _ = training.prepared.batch(training.held_out[:6])
    longest = max(len(gotr1.encode_prompt(engine.tokenizer, prompt)) for prompt in prompts)
    image_len = gotr1.image_token_count(engine.model)
    room = engine.model.config.text_config.max_position_embeddings - longest - image_len - 1
    sampling = gotr1.default_sampling(engine.model)
    with engine.gathered() as model:
        sampled = gotr1.rollout(
            model,
            engine.tokenizer,
            prompts,
            seed=training.config.seed,
            cfg=sampling["cfg"],
            max_chain=min(sampling["max_chain"], room),
        )
    if run.rank() == 0:
        pictures = gotr1.decode_images(engine.model, sampled.image_tokens)
        cells = []
        for prompt, chain, picture in zip(prompts, sampled.chains, pictures, strict=True):
            cells.append({"prompt": prompt, "chain": chain, "image": picture})
        sheets.draw_sheet(cells, path)
    return sampled.forced.float().mean().item()


if __name__ == "__main__":
    main()
