"""One step of GRPO on one prompt, as a picture: the advantage of each sample, and how much more or
less likely the step made each of its tokens.

    python -m toy.explain "a red ball left of a blue cube" --out out/step.png
    python -m toy.explain "a dog on a bench" --model gogoduan/GoT-R1-1B --lr 1e-5 \\
        --judge Qwen/Qwen2.5-VL-7B-Instruct --hps xswu/HPSv2

All weights are trained, in float32: with gradients and AdamW that is 16 bytes per parameter.
"""

import io
import math
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import gotr1
import rewards
from engine import run
from render_boxes import MARKERS, Box, draw_boxes, parse_chain
from toy.world import read_text
from train_grpo import group_advantages, grpo_loss


@dataclass(kw_only=True)
class Config(rewards.JudgeConfig):
    prompt: str  # what the samples should show
    model: str = "toy"  # `toy`, or a folder or hub id of a checkpoint
    out: Path = Path("out/step.png")  # the picture to write
    group: int = 16  # samples
    lr: float = 7e-4  # learning rate of the step; 1e-5 suits a real model
    seed: int = 0  # of the samples


def main(argv: list[str] | None = None) -> None:
    config = run.parse_args(Config, __doc__, argv)
    run.check_ranges(config, above_zero="lr", not_negative="seed")
    if config.group < 2:
        run.fail(f"--group is {config.group}: a sample is compared with its group, so 2 or more")
    if config.judge.split(":")[0] == "toy" and not read_text(config.prompt)[0]:
        run.fail(f"--judge toy knows only the toy's world, not {config.prompt!r}: give another")
    _, _, device = run.start_processes()
    try:
        judge, hps = rewards.load_judge(config, device)
        model, tokenizer = gotr1.load_policy(config.model, device, torch.float32)
        step = take_step(config, judge, hps, model, tokenizer)
        config.out.parent.mkdir(parents=True, exist_ok=True)
        draw_step(step, tokenizer).save(config.out)
    except (OSError, ValueError) as problem:
        run.fail(str(problem))
    print(f"wrote {config.out}. {sentence(step)}")


# -------------------------------------------------------------------------------------------------
# The step


@dataclass
class Step:
    """N samples of one prompt, and what an optimizer step did to them."""

    prompt: str
    samples: gotr1.Rollout
    images: list[Image.Image]
    found: list[list[Box]]  # per sample: where the judge sees the planned objects
    scores: list[dict[str, float]]
    advantages: np.ndarray  # (N,)
    change: np.ndarray  # (N, S): of each sampled token's log-probability, in nats
    mask: np.ndarray  # (N, S) bool: was it sampled?
    means: np.ndarray  # (N,): mean change of a sample's tokens


def take_step(config: Config, judge, hps, model, tokenizer) -> Step:
    """Samples, scores, advantages and one step, which changes the model."""
    sampling = gotr1.default_sampling(model)
    samples = gotr1.rollout(
        model, tokenizer, [config.prompt], config.group, seed=config.seed, **sampling
    )
    images = gotr1.decode_images(model, samples.image_tokens)
    prompts = [config.prompt] * config.group
    scores = rewards.score(judge, hps, prompts, samples.chains, images)
    found = []
    for chain, image in zip(samples.chains, images, strict=True):
        names = [box.name for box in parse_chain(chain)]
        found.append([])
        for boxes in judge.ground([image] * len(names), names) if names else []:
            found[-1] += boxes or []  # None: the judge's reply could not be read
    totals = torch.tensor([row["total"] for row in scores], device=samples.mask.device)
    advantages = group_advantages(totals, config.group, std=False)
    change = optimize(model, samples, advantages, config.lr)
    tokens = samples.mask.sum(dim=1).clamp(min=1)
    return Step(
        prompt=config.prompt,
        samples=samples,
        images=images,
        found=found,
        scores=scores,
        advantages=advantages.cpu().numpy(),
        change=change.cpu().numpy(),
        mask=samples.mask.cpu().numpy() > 0,
        means=(change.sum(dim=1) / tokens).cpu().numpy(),
    )


def optimize(model, samples, advantages, lr: float) -> torch.Tensor:
    """One step, in place -> (N, S): by how much the log-probability of each sampled token changed,
    0 where none was sampled.

    Without a reference: before its first step the policy is the reference, where the gradient of
    the KL is 0."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    singles = [samples.select([k]) for k in range(len(samples))]  # one at a time: little memory
    before = []
    for single, advantage in zip(singles, advantages.split(1), strict=True):
        logp, mask = gotr1.token_logps(model, single)
        weight = mask / samples.mask.sum()
        loss, _ = grpo_loss(logp, logp.detach(), None, advantage, weight, kl=0.0)
        loss.backward()
        before.append(logp.detach())
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    with torch.no_grad():
        after = [gotr1.token_logps(model, single)[0] for single in singles]
    return torch.cat(after) - torch.cat(before)


def sentence(step: Step) -> str:
    """What there is to see, in words."""
    if not step.advantages.any():
        return "All rewards are equal: no sample has an advantage, and the step changes nothing."
    better = step.means[step.advantages > 0]
    worse = step.means[step.advantages < 0]
    correlation = np.corrcoef(step.advantages, step.means)[0, 1]
    sizes = np.abs(step.change[step.mask])
    most_changed = sizes >= np.quantile(sizes, 0.95)
    share = sizes[most_changed].sum() / sizes.sum()
    chances = np.exp(step.samples.logp.cpu().numpy()[step.mask])  # when they were sampled
    return (
        f"The tokens of the {len(better)} samples above the mean reward changed by "
        f"{better.mean():+.3f} nats on average, those of the {len(worse)} below it by "
        f"{worse.mean():+.3f}; the correlation of advantage and change is {correlation:.2f}. One "
        f"token in twenty carries {share:.0%} of all change: such tokens had a probability of "
        f"{chances[most_changed].mean():.2f} on average, the others of "
        f"{chances[~most_changed].mean():.2f}."
    )


# -------------------------------------------------------------------------------------------------
# The picture: a head, a block per sample, a foot

WIDTH = 1000
SIDE = 128  # of plan, picture and map of tokens
GAP = 10
TEXT_X = 3 * (SIDE + GAP) + GAP  # where the text beside them begins
SHOWN = 6  # samples
MORE = np.array([0, 114, 178])  # blue and orange of Okabe and Ito: the colour-blind see them apart
LESS = np.array([230, 130, 0])
SHORT = dict(zip(MARKERS, ("<obj>", "</obj>", "<box>", "</box>"), strict=True))
SHORT[gotr1.SPECIAL_TOKENS["boi_token"]] = "<image>"
FONT = {size: ImageFont.load_default(size) for size in (12, 13, 14, 15, 22)}


def draw_step(step: Step, tokenizer) -> Image.Image:
    page = Image.new("RGB", (WIDTH, 10_000), "white")
    totals = np.array([row["total"] for row in step.scores])
    best_first = np.argsort(-totals, kind="stable")
    places = np.linspace(0, len(totals) - 1, min(SHOWN, len(totals))).round().astype(int)
    # few tokens change a lot: the scale ends where three tokens in a hundred lie beyond it
    limit = float(np.quantile(np.abs(step.change[step.mask]), 0.97))
    y = draw_head(page, step.prompt, f"{len(places)} of {len(totals)} samples", limit)
    for place in places:
        label = f"{place + 1} of {len(totals)}:"
        y = draw_sample(page, y, step, best_first[place], label, limit, tokenizer)
    return page.crop((0, 0, WIDTH, draw_foot(page, y, step)))


def color_of(change, limit: float) -> np.ndarray:
    """Changes (...) -> colours (..., 3) uint8: white at 0, full colour at `limit` and beyond."""
    strength = np.clip(np.asarray(change) / (limit or 1.0), -1, 1)[..., None]
    full = np.where(strength > 0, MORE, LESS)
    return (255 + np.abs(strength) * 0.85 * (full - 255)).round().astype(np.uint8)


def draw_head(page: Image.Image, prompt: str, shown: str, limit: float) -> int:
    """Title, scale of the colours, names of the columns -> where they end."""
    pen = ImageDraw.Draw(page)
    title = textwrap.shorten(f'One step of GRPO on "{prompt}"', 80, placeholder="…")
    pen.text((GAP, 8), title, "black", FONT[22])
    pen.text((GAP, 46), f"{shown}, best to worst. Tokens became", "black", FONT[14])
    x = 470
    ramp = color_of(np.linspace(-limit, limit, 220), limit)[None]
    page.paste(Image.fromarray(ramp).resize((220, 14)), (x, 48))
    pen.rectangle((x, 48, x + 220, 62), outline="gray")
    pen.text((x - 8, 46), f"less likely ({-limit:.2f})", "black", FONT[14], anchor="ra")
    more = f"more likely ({limit:+.2f} nats of log-probability)"
    pen.text((x + 228, 46), more, "black", FONT[14])
    for k, name in enumerate(("plan", "found boxes", "image tokens", "rewards and chain")):
        pen.text((GAP + k * (SIDE + GAP), 74), name, "gray", FONT[13])
    return 92


def draw_sample(page, y: int, step: Step, k: int, label: str, limit: float, tokenizer) -> int:
    """A sample below `y` -> where it ends."""
    pen = ImageDraw.Draw(page)
    pen.line((GAP, y, WIDTH - GAP, y), "lightgray")
    y += GAP
    count = step.samples.image_tokens.shape[1]
    cells = color_of(step.change[k, -count:], limit).reshape(math.isqrt(count), -1, 3)
    nearest = Image.Resampling.NEAREST
    small = step.images[k].width < SIDE
    picture = step.images[k].resize((SIDE, SIDE), nearest if small else None)
    panels = (
        draw_boxes(parse_chain(step.samples.chains[k]), size=SIDE),
        draw_boxes(step.found[k], image=picture),
        Image.fromarray(cells).resize((SIDE, SIDE), nearest),
    )
    for number, panel in enumerate(panels):
        x = GAP + number * (SIDE + GAP)
        page.paste(panel, (x, y))
        pen.rectangle((x - 1, y - 1, x + SIDE, y + SIDE), outline="gray")

    row = step.scores[k]
    outcome = f"total {row['total']:.2f}, advantage {step.advantages[k]:+.2f}"
    outcome += f", mean change {step.means[k]:+.3f}"
    parts = "   ".join(f"{part} {row[part]:.2f}" for part in rewards.PARTS if part in row)
    pen.text((TEXT_X, y - 4), f"{label} {outcome}", "black", FONT[15])
    pen.text((TEXT_X, y + 18), parts, "black", FONT[13])
    bottom = draw_chain(pen, y + 44, step, k, limit, tokenizer)
    return max(bottom, y + SIDE) + GAP


def draw_chain(pen, y: int, step: Step, k: int, limit: float, tokenizer) -> int:
    """The chain below `y`, each token on its colour -> where it ends."""
    x = TEXT_X
    for t, token in enumerate(step.samples.chain_ids[k, : step.samples.chain_lens[k]].tolist()):
        text = tokenizer.decode([token])
        text = SHORT.get(text, text.strip())
        width = FONT[13].getlength(text) + 6
        if x + width > WIDTH - GAP:
            x = TEXT_X
            y += 22
        fill = tuple(color_of(step.change[k, t], limit).tolist())
        pen.rectangle((x, y, x + width - 1, y + 19), fill=fill)
        pen.text((x + 3, y + 2), text, "black" if step.mask[k, t] else "gray", FONT[13])
        x += width
    return y + 20


def draw_foot(page: Image.Image, y: int, step: Step) -> int:
    """Advantage against mean change of all samples, and a sentence -> where they end."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 2.6), dpi=100, layout="constrained")
    axis = figure.subplots()
    axis.axhline(0, color="lightgray", linewidth=1)
    axis.axvline(0, color="lightgray", linewidth=1)
    axis.scatter(step.advantages, step.means, c=color_of(np.sign(step.means), 1.0) / 255)
    axis.set(xlabel="advantage", ylabel="mean change, nats per token")
    buffer = io.BytesIO()
    figure.savefig(buffer)
    page.paste(Image.open(buffer).convert("RGB"), (0, y))
    text = "\n".join(textwrap.wrap(f"All {len(step.means)} samples. {sentence(step)}", 66))
    ImageDraw.Draw(page).multiline_text((490, y + 40), text, "black", FONT[15], spacing=7)
    return y + 270


if __name__ == "__main__":
    main()
