"""The toy's tiny Janus from nothing: text tokenizer, config, and a picture tokenizer (VQ), trained.

What comes out is an ordinary `JanusForConditionalGeneration` with an ordinary tokenizer: saved by
`save_pretrained`, loaded like any other. Its language model still has random weights; train_sft.py
trains them on `training_rows`.
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

from gotr1 import INSTRUCTION, SPECIAL_TOKENS
from render_boxes import BOX_END, BOX_START, MARKERS, OBJ_END, OBJ_START
from toy.world import CELL, GRID, NAMES, SIZE, draw_scene, ground, make_example

# -------------------------------------------------------------------------------------------------
# Text tokenizer and sizes


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the toy's sentences, with the special tokens of the
    published checkpoints and the markers.

    Any text can be written, byte by byte if it must be. A grid coordinate is one token: with one
    token per digit the small model learns what objects look like but not where they go. The
    instruction that opens every prompt is one token too."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,  # an upper bound: merging ends when every word is one token
        min_frequency=20,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(sample_texts(), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, **SPECIAL_TOKENS)
    # these markers have their ids from before MARKERS took the official order
    for text in (f"User: {INSTRUCTION}".strip(), OBJ_START, OBJ_END, BOX_START, BOX_END):
        tokenizer.add_tokens(AddedToken(text, normalized=False))
    return tokenizer


def sample_texts() -> list[str]:
    """Pieces of 2000 prompts and chains, cut at the markers, which are tokens of their own."""
    rng = np.random.default_rng(0)
    examples = [make_example(rng) for _ in range(2000)]
    texts = [f"{example.prompt}\n\nAssistant:" for example in examples]
    texts += [example.chain for example in examples]
    markers = re.compile("|".join(re.escape(marker) for marker in MARKERS))
    pieces = []
    for text in texts:
        pieces += markers.split(text)
    return pieces


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


# -------------------------------------------------------------------------------------------------
# Picture tokenizer: which code a patch has


def patches(image: Image.Image) -> list[tuple]:
    """What each cell of a clean picture shows, row by row: ("ground", number of the cell), or
    (colour, which of its pixels have it)."""
    rgb = np.asarray(image)
    painted = (rgb != ground()).any(axis=2)
    found = []
    for cell in range(GRID * GRID):
        row, column = divmod(cell, GRID)
        rows = slice(CELL * row, CELL * (row + 1))
        columns = slice(CELL * column, CELL * (column + 1))
        here = painted[rows, columns]
        if here.any():
            color = rgb[rows, columns][here][0]  # a clean cell has parts of one object only
            found.append((tuple(color), here.tobytes()))
        else:
            found.append(("ground", cell))
    return found


@functools.cache
def codebook() -> dict[tuple, int]:
    """Every distinct patch of the toy world and its image token: the cells of the ground first,
    then parts of objects."""
    codes = {}
    for cell in range(GRID * GRID):
        codes["ground", cell] = cell
    for name in NAMES:
        for size in (2, 3):
            picture = draw_scene([name], [(0, 0, size)])
            for patch in patches(picture):
                codes.setdefault(patch, len(codes))
    return codes


def image_codes(image: Image.Image) -> np.ndarray:
    """The image tokens that a perfect encoder gives to a picture of `draw_scene`:
    (GRID * GRID,) int64, row by row."""
    return np.array([codebook()[patch] for patch in patches(image)])


# -------------------------------------------------------------------------------------------------
# Picture tokenizer: its training


def spread_on_sphere(n: int, dim: int) -> torch.Tensor:
    """n unit vectors (n, dim) pushed away from each other: codes that are easy to tell apart."""
    points = torch.randn(n, dim).requires_grad_()
    optimizer = torch.optim.Adam([points], lr=0.02)
    for _ in range(400):
        unit = F.normalize(points, dim=-1)
        cosines = unit @ unit.T - 2 * torch.eye(n)  # with itself -1, as if it were far away
        loss = (20 * cosines).logsumexp(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return F.normalize(points.detach(), dim=-1)


def example_pixels(images: list[Image.Image]) -> torch.Tensor:
    """(N, 3, H, W) in [-1, 1]."""
    pixels = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1


def train_vq(vq, steps: int, seed: int) -> None:
    """Gives every distinct patch its own code, in place: the encoder learns to name the patch, the
    decoder to draw it.

    The usual end-to-end training fails here. Attention leaks the whole picture into every code, the
    plain ground alone takes up most of the codebook, and a language model cannot learn such codes.
    The result of this one is an ordinary JanusVQVAE."""
    for module in vq.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.reset_parameters()
    codes = spread_on_sphere(*vq.quantize.embedding.weight.shape)  # (K, 8)
    vq.quantize.embedding.weight.data.copy_(codes)
    trained = []
    for name, parameter in vq.named_parameters():
        if not name.startswith("quantize"):
            trained.append(parameter)
    optimizer = torch.optim.AdamW(trained, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2e-3, total_steps=steps, pct_start=0.1
    )
    rng = np.random.default_rng([seed, 1])
    vq.train().requires_grad_(True)
    bar = tqdm(range(steps), desc="picture tokenizer")
    for _ in bar:
        images = [make_example(rng).image for _ in range(16)]
        pixels = example_pixels(images)  # (16, 3, H, W)
        tokens = np.stack([image_codes(image) for image in images])
        tokens = torch.from_numpy(tokens)  # (16, I)

        # the encoder names the patch: its latent should point at the code of the patch
        latent = F.normalize(vq.quant_conv(vq.encoder(pixels)), dim=1)  # (16, 8, h, w)
        cosines = torch.einsum("bdhw,kd->bkhw", latent, codes).flatten(2)  # (16, K, I)
        naming = F.cross_entropy(15 * cosines, tokens)

        # the decoder draws the picture from the right codes
        right_codes = codes[tokens].transpose(1, 2).reshape_as(latent)
        drawn = vq.decoder(vq.post_quant_conv(right_codes))
        drawing = (drawn - pixels).abs().mean()

        optimizer.zero_grad()
        (naming + 2 * drawing).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        right = (cosines.argmax(1) == tokens).float().mean()
        bar.set_postfix_str(f"right codes {right:.3f}, pixel error {drawing:.3f}")
    vq.eval().requires_grad_(False)


# -------------------------------------------------------------------------------------------------
# The model, and what it is trained on


def new_model(vq_steps: int, seed: int):
    """(model, tokenizer): random language model, trained picture tokenizer."""
    tokenizer = build_tokenizer()
    model = JanusForConditionalGeneration(janus_config(len(tokenizer)))
    # transformers' initial weights (std 0.02) make image embeddings of 1e-5, below the epsilon of
    # the first RMSNorm: a small model needs hundreds of steps to grow out of that
    inner = model.model
    for part in (inner.generation_embeddings, inner.generation_aligner, inner.generation_head):
        for module in part.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    train_vq(inner.vqmodel, vq_steps, seed)
    return model, tokenizer


def save_new_model(folder: Path, vq_steps: int, seed: int) -> None:
    """`new_model` as a folder, if it is not there yet. It is written beside and renamed, so that
    what has the name is complete."""
    if folder.exists():
        return
    beside = folder.with_name(folder.name + ".tmp")
    torch.manual_seed(seed)
    model, tokenizer = new_model(vq_steps, seed)
    model.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    beside.rename(folder)


def training_rows(examples: int, seed: int) -> list[dict]:
    """The training set for train_sft.py, as records with the default field names."""
    rng = np.random.default_rng([seed, 2])
    rows = []
    for _ in tqdm(range(examples), desc="scenes"):
        example = make_example(rng)
        rows.append({"prompt": example.prompt, "chain": example.chain, "image": example.image})
    return rows
