"""GenEval's and T2I-CompBench's networks with random weights: real classes, tiny or in full size.

python tests/random_networks.py FOLDER [tiny|full]    # writes them, for speed measurements
"""

import contextlib
import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from evaluation import geneval, networks  # noqa: E402

M2F = ROOT / "tests" / "golden_eval" / "mask2former"
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789."
STAGES = ["stage1", "stage2", "stage3", "stage4"]
SMALL_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def save_networks(folder, size: str = "tiny") -> None:
    """One folder per network, as eval.py wants them, named like its flags.

    The detector sees dogs everywhere, the rest sees noise."""
    folder = Path(folder)
    tiny = size == "tiny"
    torch.manual_seed(0)
    save_clip(folder / "clip", tiny, width=1024, layers=24, heads=16, patch=14)
    save_clip(folder / "clip_b32", tiny, width=768, layers=12, heads=12, patch=32)
    save_blip(folder / "blip", tiny)
    save_detector(folder / "detector", tiny)
    save_gdino(folder / "gdino", tiny)


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of letters, digits and a full stop; every other character is a space."""
    vocab = {"[PAD]": 0, "[CLS]": 101, "[SEP]": 102}
    for k, letter in enumerate(LETTERS):
        vocab[letter] = 1000 + k
    letters = Tokenizer(models.WordLevel(vocab, unk_token="[PAD]"))
    letters.normalizer = normalizers.Lowercase()
    spaces = pre_tokenizers.Split(Regex(r"[^a-z0-9.]"), "removed")
    letters.pre_tokenizer = pre_tokenizers.Sequence([spaces, pre_tokenizers.Split("", "isolated")])
    letters.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 101), ("[SEP]", 102)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=letters,
        cls_token="[CLS]",
        sep_token="[SEP]",
        eos_token="[SEP]",
        pad_token="[PAD]",
    )
    tokenizer.save_pretrained(folder)


def save_clip(folder: Path, tiny: bool, width: int, layers: int, heads: int, patch: int) -> None:
    text = SMALL_TEXT if tiny else {}
    vision = {**SMALL_TEXT, "patch_size": 32}
    if not tiny:
        vision = {
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "intermediate_size": 4 * width,
            "patch_size": patch,
        }
    words = {**text, "vocab_size": 2000, "bos_token_id": 101, "eos_token_id": 102}
    config = transformers.CLIPConfig(text_config=words, vision_config=vision)
    transformers.CLIPModel(config).save_pretrained(folder)
    save_tokenizer(folder)


def save_blip(folder: Path, tiny: bool) -> None:
    vision = {"image_size": 384}
    words = {"vocab_size": 30524}
    if tiny:
        vision = {**SMALL_TEXT, "image_size": 64}
        words = {**SMALL_TEXT, "encoder_hidden_size": 32, "vocab_size": 30524}
    config = transformers.BlipConfig(text_config=words, vision_config=vision)
    blip = transformers.BlipForQuestionAnswering(config)
    for parameter in blip.parameters():
        # transformers starts with weights so small that the model ignores its input
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.2)
    blip.save_pretrained(folder)
    save_tokenizer(folder)


def tiny_mask2former_config() -> transformers.Mask2FormerConfig:
    """The sizes of the golden detector."""
    size = json.loads((M2F / "config.json").read_text())["model"]
    swin = transformers.SwinConfig(
        embed_dim=size["embed_dim"],
        depths=size["depths"],
        num_heads=size["num_heads"],
        window_size=size["window_size"],
        out_features=STAGES,
    )
    return transformers.Mask2FormerConfig(
        backbone_config=swin,
        num_labels=80,
        num_queries=size["queries"],
        feature_size=size["feature"],
        mask_feature_size=size["feature"],
        hidden_dim=size["feature"],
        num_attention_heads=size["heads"],
        encoder_layers=size["enc_layers"],
        encoder_feedforward_dim=size["enc_ffn"],
        decoder_layers=size["dec_layers"] + 1,
        dim_feedforward=size["dec_ffn"],
    )


def save_detector(folder: Path, tiny: bool) -> None:
    if tiny:
        config = tiny_mask2former_config()
    else:
        swin = transformers.SwinConfig(depths=[2, 2, 18, 2], window_size=7, out_features=STAGES)
        config = transformers.Mask2FormerConfig(backbone_config=swin, num_labels=80)
    detector = transformers.Mask2FormerForUniversalSegmentation(config)
    detector.class_predictor.bias.data[geneval.CLASSES.index("dog")] = 9
    for name, parameter in detector.named_parameters():
        if name.endswith(("mask_projection.bias", "mask_embedder.2.0.bias")):
            parameter.data += 1  # no mask is empty
    detector.save_pretrained(folder)


def save_gdino(folder: Path, tiny: bool) -> None:
    if tiny:
        words = transformers.BertConfig(**SMALL_TEXT, vocab_size=2000)
        swin = transformers.SwinConfig(
            embed_dim=12, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8], out_indices=[2, 3, 4]
        )
        config = transformers.GroundingDinoConfig(
            backbone_config=swin,
            text_config=words,
            d_model=32,
            encoder_layers=1,
            decoder_layers=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            num_queries=20,
        )
    else:
        words = transformers.BertConfig(vocab_size=2000)
        swin = transformers.SwinConfig(window_size=7, out_indices=[2, 3, 4])
        config = transformers.GroundingDinoConfig(backbone_config=swin, text_config=words)
    transformers.GroundingDinoForObjectDetection(config).save_pretrained(folder)
    save_tokenizer(folder)


@contextlib.contextmanager
def small_networks(folder: Path):
    """Tiny networks in `folder`; within the context the detectors see smaller pictures."""
    official = networks.SIDES
    assert official == (1333, 800)
    save_networks(folder)
    networks.SIDES = (266, 160)
    try:
        yield folder
    finally:
        networks.SIDES = official


def noise(count: int, width: int = 64, height: int = 64, seed: int = 0) -> list[Image.Image]:
    """Pictures of random pixels."""
    array = np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8)
    return [Image.fromarray(one) for one in array]


if __name__ == "__main__":
    save_networks(sys.argv[1], *sys.argv[2:3])
    print(f"wrote {sys.argv[1]}: networks with random weights")
