"""The paper's first stage: teach Janus-Pro to write a chain of objects and boxes, then to draw it (supervised
fine-tuning).

Here it makes the toy checkpoint from nothing, in two parts: the picture tokenizer (VQ), then the language model. The
loss is the negative log-probability, by the same `token_logps` that GRPO uses, of the chain's tokens (with the
<begin_of_image> that ends it) and of the image tokens; the prompt is given and not trained. One mean over all chain
tokens of the batch, one over all image tokens, added with weights. What the paper does not state and is chosen here:
AdamW (0.9, 0.95), cosine with warm-up, weights 1 : 1, and 10 % of the samples drawn without their condition, in the
form that guidance uses when sampling (pads between bos and <begin_of_image>).

    python train_sft.py --model toy --from_scratch              # everything from nothing -> out/sft/
"""

import time
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

import gotr1
import rewards
import runtime
import toy
import toy_model
from render_boxes import chain_problems


@dataclass
class Config:
    # Model
    model: str = "toy"  # what to start from; only the toy's data can be made here
    from_scratch: bool = False  # begin with random weights and train the picture tokenizer first
    out: str = "out/sft"  # folder for the checkpoint, the log and the curves; must not hold another run
    # Training
    steps: int = 1500  # optimizer steps of the language model
    batch_size: int = 64  # sequences a step
    lr: float = 3e-3  # peak learning rate, reached after `warmup`, then a cosine to 0
    warmup: float = 0.05  # share of the steps
    weight_decay: float = 0.01  # AdamW's
    clip_grad: float = 1.0  # largest gradient norm
    chain_weight: float = 1.0  # of the mean loss over chain tokens
    image_weight: float = 1.0  # of the mean loss over image tokens
    condition_dropout: float = 0.1  # share of the samples that learn to draw without prompt and chain, for guidance
    # Toy data and picture tokenizer
    examples: int = 40_000  # scenes in the training set
    vq_steps: int = 1500  # optimizer steps of the picture tokenizer
    # Looking at it
    eval_every: int = 250  # steps between looks at sampled pictures: the loss does not tell if they follow the plan
    eval_prompts: int = 240  # held-out prompts for it
    save_every: int = 250  # steps between checkpoints
    seed: int = 0  # of weights, data and order

CURVES = {"loss (nats a token)": ["chain_loss", "image_loss"], "held-out rewards": ["sem", "spa", "ri", "pi", "total"]}


# ---------------------------------------------------------------------------------------------------------------------
# The language model


def encode_data(model, tokenizer, examples: list[toy.Example]) -> tuple[list, list, torch.Tensor]:
    """Examples -> prompt ids, chain ids (lists of lists) and image tokens (len, I); each picture is encoded once."""
    prompt_ids = [gotr1.encode_prompt(tokenizer, example.prompt) for example in examples]
    chain_ids = [gotr1.encode_chain(tokenizer, example.chain) for example in examples]
    parts = [examples[i : i + 256] for i in range(0, len(examples), 256)]
    images = [gotr1.encode_images(model, [example.image for example in part]) for part in tqdm(parts, desc="encoding")]
    return prompt_ids, chain_ids, torch.cat(images)


def sft_loss(logp, mask, images: int, chain_weight: float = 1.0, image_weight: float = 1.0):
    """logp, mask (N, S), the last `images` columns the image -> (loss, mean nats a chain token, mean nats an image
    token)."""
    nll = -logp * mask
    chain = nll[:, :-images].sum() / mask[:, :-images].sum().clamp(min=1)
    image = nll[:, -images:].sum() / mask[:, -images:].sum().clamp(min=1)
    return chain_weight * chain + image_weight * image, chain.detach(), image.detach()


def look(model, tokenizer, prompts: list[str], seed: int) -> dict[str, float]:
    """Rewards of one sample for each prompt, judged exactly; and the share of chains with a readable box."""
    model.eval()
    sampled = gotr1.rollout(model, tokenizer, prompts, seed=seed, max_chain=96)
    images = gotr1.decode_images(model, sampled.image_tokens)
    rows = rewards.score(toy.ToyJudge(), toy.crispness, prompts, sampled.chains, images)
    model.train()
    means = {key: float(np.mean([row[key] for row in rows])) for key in rows[0] if key != "judge_fail"}
    return {"well_formed": float(np.mean([not chain_problems(chain) for chain in sampled.chains])), **means}


def check(config: Config) -> None:
    for name in ("steps", "batch_size", "examples", "vq_steps", "eval_every", "eval_prompts", "save_every"):
        if getattr(config, name) < 1:
            runtime.fail(f"--{name} is {getattr(config, name)}: expected 1 or more")
    for name in ("lr", "clip_grad"):
        if not getattr(config, name) > 0:
            runtime.fail(f"--{name} is {getattr(config, name)}: expected a number above 0")
    for name in ("warmup", "weight_decay", "chain_weight", "image_weight", "condition_dropout", "seed"):
        if not getattr(config, name) >= 0:
            runtime.fail(f"--{name} is {getattr(config, name)}: expected 0 or more")
    if config.from_scratch and config.model != "toy":
        runtime.fail(f"--from_scratch builds the toy model, but --model is {config.model}: leave one of them out")


def main(argv: list[str] | None = None) -> None:
    config = runtime.parse_args(Config, __doc__, argv)
    check(config)
    rank, world, device = runtime.start_processes()
    if world > 1:
        runtime.fail("train_sft.py runs in one process: start it with python")
    began = time.time()
    torch.manual_seed(config.seed)
    if not config.from_scratch:
        try:
            model, tokenizer = gotr1.load_policy(config.model, device)
        except (OSError, ValueError) as problem:
            runtime.fail(str(problem))
    folder = runtime.open_run(config.out, config, rank)
    saved = runtime.latest_checkpoint(folder)
    if saved:
        model, tokenizer = gotr1.load_policy(str(saved), device)
    elif config.from_scratch:
        model, tokenizer = toy_model.new_model(config.vq_steps, config.seed)
        model.to(device)
    parameters = gotr1.trainable_parameters(model)
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=(0.9, 0.95), weight_decay=config.weight_decay)
    start = runtime.load_checkpoint(saved, model, optimizer) if saved else 0
    runtime.write_log(folder, runtime.read_log(folder, before=start), "w")
    stopped = runtime.watch_signals(device)

    def save(step):
        runtime.save_checkpoint(folder, step, model, tokenizer, {"optimizer": optimizer.state_dict()})

    if not saved:
        save(0)  # the picture tokenizer took minutes
    rng = np.random.default_rng([config.seed, 2])
    examples = [toy.make_example(rng) for _ in tqdm(range(config.examples), desc="scenes")]
    prompt_ids, chain_ids, image_tokens = encode_data(model, tokenizer, examples)
    held_out = toy.toy_prompts(config.eval_prompts, seed=7, held_out=True)
    images = image_tokens.shape[1]

    model.train()
    bar = tqdm(range(start, config.steps), initial=start, total=config.steps, desc="SFT")
    for step in bar:
        # 1) A batch, fixed by (seed, step); some of it without its condition
        rng = np.random.default_rng([config.seed, 3, step])
        chosen = rng.integers(0, len(examples), config.batch_size)
        blank = torch.from_numpy(rng.random(config.batch_size) < config.condition_dropout).to(device)
        batch = gotr1.Rollout.from_data(
            tokenizer, [prompt_ids[i] for i in chosen], [chain_ids[i] for i in chosen], image_tokens[chosen].to(device)
        )

        # 2) Loss, gradient, step
        logp, mask = gotr1.token_logps(model, batch, blank=blank, chunk=8192)
        loss, chain, image = sft_loss(logp, mask, images, config.chain_weight, config.image_weight)
        for group in optimizer.param_groups:
            group["lr"] = runtime.cosine_lr(step, config.steps, config.lr, config.warmup)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip_grad)
        if not torch.isfinite(norm):
            raise RuntimeError(f"the gradient is not finite at step {step}: lower --lr. {folder}/latest is good")
        optimizer.step()

        # 3) Log, look at sampled pictures, save
        row = {"step": step, "chain_loss": chain.item(), "image_loss": image.item(), "grad_norm": norm.item()}
        bar.set_postfix_str(f"chain {row['chain_loss']:.3f} image {row['image_loss']:.3f}")
        if (step + 1) % config.eval_every == 0 or step + 1 == config.steps:
            means = look(model, tokenizer, held_out, config.seed)
            row |= means
            bar.write(f"step {step + 1:5d}  " + "  ".join(f"{key} {value:.3f}" for key, value in means.items()))
        runtime.write_log(folder, [row])
        stopping = stopped()
        if stopping or (step + 1) % config.save_every == 0 or step + 1 == config.steps:
            save(step + 1)
        if stopping:
            print(f"stopped after step {step + 1} of {config.steps}; the same command continues from {folder}")
            return
    runtime.plot_curves(runtime.read_log(folder), CURVES, folder / "curves.png")
    minutes = (time.time() - began) / 60
    newest = runtime.latest_checkpoint(folder)
    print(f"wrote {newest}, {folder / 'curves.png'} and {folder / 'log.jsonl'} in {minutes:.1f} minutes")


if __name__ == "__main__":
    main()
