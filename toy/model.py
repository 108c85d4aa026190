"""The toy's tiny Janus, from nothing: text tokenizer, config, and the picture tokenizer (VQ) with its training.

What comes out is an ordinary `JanusForConditionalGeneration` with an ordinary tokenizer, to be saved by
`save_pretrained` and loaded like any other; its language model has random weights still, and train_sft.py trains them.
"""

import functools
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    JanusConfig,
    JanusForConditionalGeneration,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

import rewards
from gotr1 import INSTRUCTION, SPECIAL_TOKENS, decode_images, rollout
from render_boxes import MARKERS, chain_problems
from toy import world as toy
from toy.world import CELL, GRID, SIZE


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the toy's sentences, with the checkpoints' special tokens and the markers.

    Any text can be written, byte by byte if it must be. A grid coordinate is one token (with one token a digit the
    small model learns what objects look like but not where they go), and so is the instruction that opens every
    prompt."""
    rng = np.random.default_rng(0)
    examples = [toy.make_example(rng) for _ in range(2000)]
    texts = [f"{example.prompt}\n\nAssistant:" for example in examples] + [
        example.chain for example in examples
    ]
    markers = re.compile("|".join(re.escape(marker) for marker in MARKERS))
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,  # an upper bound: merging ends when every word is one token
        min_frequency=20,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((piece for text in texts for piece in markers.split(text)), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, **SPECIAL_TOKENS)
    whole = (f"User: {INSTRUCTION}".strip(), *MARKERS)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in whole])
    return tokenizer


def janus_config(vocab_size: int) -> JanusConfig:
    """About 1 M language parameters, 8 x 8 image tokens of `len(codebook())` codes."""
    text = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    vision = JanusVisionConfig(  # image understanding: unused here, and as small as it can be
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=SIZE,
        patch_size=CELL,
        projection_dim=128,
        num_image_tokens=GRID * GRID,
        depth=1,
    )
    vq = JanusVQVAEConfig(
        embed_dim=8,
        num_embeddings=len(codebook()),
        latent_channels=32,
        base_channels=32,  # a multiple of 32 (GroupNorm)
        channel_multiplier=[1, 1, 1],  # 2 ** (levels - 1) must be the patch size
        num_res_blocks=1,
        num_patches=GRID,
        projection_dim=128,
        image_token_embed_dim=128,
    )
    return JanusConfig(
        text_config=text, vision_config=vision, vq_config=vq, tie_word_embeddings=False
    )


# ---------------------------------------------------------------------------------------------------------------------
# The picture tokenizer


def _patches(image: Image.Image) -> list[tuple]:
    """What stands in each cell of a clean picture: ("ground", cell number) or (colour, which of its pixels have it)."""
    rgb, patches = np.asarray(image), []
    painted = (rgb != toy.ground()).any(axis=2)
    for cell in range(GRID * GRID):
        y, x = (CELL * v for v in divmod(cell, GRID))
        here = painted[y : y + CELL, x : x + CELL]
        color = tuple(rgb[y : y + CELL, x : x + CELL][here][0]) if here.any() else "ground"
        patches.append((color, here.tobytes()) if here.any() else ("ground", cell))
    return patches


@functools.cache
def codebook() -> dict[tuple, int]:
    """Every distinct patch of the toy world and its image token: the cells of the ground first, then parts of
    objects."""
    codes = {("ground", cell): cell for cell in range(GRID * GRID)}
    for name in toy.NAMES:
        for size in (2, 3):
            for patch in _patches(toy.draw_scene([name], [(0, 0, size)])):
                codes.setdefault(patch, len(codes))
    return codes


def image_codes(image: Image.Image) -> np.ndarray:
    """The image tokens that a perfect encoder gives to a picture of `toy.draw_scene`: (GRID * GRID,) int64, row by
    row."""
    return np.array([codebook()[patch] for patch in _patches(image)])


def spread_on_sphere(n: int, dim: int) -> torch.Tensor:
    """n unit vectors (n, dim) pushed away from each other: codes that are easy to tell apart."""
    points = torch.randn(n, dim).requires_grad_()
    optimizer = torch.optim.Adam([points], lr=0.02)
    for _ in range(400):
        unit = F.normalize(points, dim=-1)
        loss = (20 * (unit @ unit.T - 2 * torch.eye(n))).logsumexp(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return F.normalize(points.detach(), dim=-1)


def train_vq(vq, steps: int, seed: int) -> None:
    """Gives every distinct patch its own code, in place: the encoder learns to name the patch, the decoder to draw it.

    Trained end to end in the usual way, attention leaks the whole picture into every code, the plain ground alone takes
    up most of the codebook, and a language model cannot learn such codes. The result is an ordinary JanusVQVAE."""
    for module in vq.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.reset_parameters()
    codes = spread_on_sphere(*vq.quantize.embedding.weight.shape)  # (K, 8)
    vq.quantize.embedding.weight.data.copy_(codes)
    trained = [p for name, p in vq.named_parameters() if not name.startswith("quantize")]
    optimizer = torch.optim.AdamW(trained, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2e-3, total_steps=steps, pct_start=0.1
    )
    rng = np.random.default_rng([seed, 1])
    vq.train().requires_grad_(True)
    bar = tqdm(range(steps), desc="picture tokenizer")
    for _ in bar:
        images = [toy.make_example(rng).image for _ in range(16)]
        pixels = (
            torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
            / 127.5
            - 1
        )
        tokens = torch.from_numpy(
            np.stack([image_codes(image) for image in images])
        )  # (16, I); pixels (16, 3, H, W)
        latent = F.normalize(vq.quant_conv(vq.encoder(pixels)), dim=1)  # (16, 8, h, w)
        cosines = torch.einsum("bdhw,kd->bkhw", latent, codes).flatten(2)  # (16, K, I)
        drawn = vq.decoder(vq.post_quant_conv(codes[tokens].transpose(1, 2).reshape_as(latent)))
        naming, drawing = F.cross_entropy(15 * cosines, tokens), (drawn - pixels).abs().mean()
        optimizer.zero_grad()
        (naming + 2 * drawing).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        right = (cosines.argmax(1) == tokens).float().mean()
        bar.set_postfix_str(f"right codes {right:.3f}, pixel error {drawing:.3f}")
    vq.eval().requires_grad_(False)


def new_model(vq_steps: int, seed: int):
    """(model, tokenizer): random language model, trained picture tokenizer."""
    tokenizer = build_tokenizer()
    model = JanusForConditionalGeneration(janus_config(len(tokenizer)))
    # transformers' initial weights (std 0.02) make image embeddings of 1e-5, below the epsilon of the first RMSNorm: a
    # small model needs hundreds of steps to grow out of that
    for part in (
        model.model.generation_embeddings,
        model.model.generation_aligner,
        model.model.generation_head,
    ):
        for module in part.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    train_vq(model.model.vqmodel, vq_steps, seed)
    return model, tokenizer


def save_new_model(folder: Path, vq_steps: int, seed: int) -> None:
    """`new_model` as a folder, if it is not there yet; written beside and renamed."""
    beside = folder.with_name(folder.name + ".tmp")
    if not folder.exists():
        torch.manual_seed(seed)
        for part in new_model(vq_steps, seed):
            part.save_pretrained(beside)
        beside.rename(folder)


# ---------------------------------------------------------------------------------------------------------------------
# What it is trained on, and how well it does


def training_rows(examples: int, seed: int) -> list[dict]:
    """The training set for train_sft.py, as records with the default field names."""
    rng = np.random.default_rng([seed, 2])
    scenes = (toy.make_example(rng) for _ in tqdm(range(examples), desc="scenes"))
    return [
        {"prompt": scene.prompt, "chain": scene.chain, "image": scene.image} for scene in scenes
    ]


def look(model, tokenizer, prompts: list[str], seed: int) -> dict[str, float]:
    """Rewards of one sample for each prompt, judged exactly; and the share of chains with a readable box."""
    sampled = rollout(model, tokenizer, prompts, seed=seed, max_chain=96)
    images = decode_images(model, sampled.image_tokens)
    rows = rewards.score(toy.ToyJudge(), toy.crispness, prompts, sampled.chains, images)
    means = {
        key: float(np.mean([row[key] for row in rows])) for key in rows[0] if key != "judge_fail"
    }
    return {
        "well_formed": float(np.mean([not chain_problems(chain) for chain in sampled.chains])),
        **means,
    }
