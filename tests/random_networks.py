"""Small networks of transformers' own classes with random weights: a Qwen-VL as the judge, and what
GenEval and T2I-CompBench look with."""

import contextlib
import functools
import json
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import (
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

import rewards
from evaluation import geneval, networks

M2F = Path(__file__).parent / "golden_eval" / "mask2former"
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789."
STAGES = ["stage1", "stage2", "stage3", "stage4"]
SMALL_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


# -------------------------------------------------------------------------------------------------
# Networks of the evaluation


def save_networks(folder) -> None:
    """One folder per network, as eval.py wants them, named like its flags.

    The detector sees dogs everywhere, the rest sees noise."""
    folder = Path(folder)
    torch.manual_seed(0)
    save_clip(folder / "clip")
    save_clip(folder / "clip_b32")
    save_blip(folder / "blip")
    save_detector(folder / "detector")
    save_gdino(folder / "gdino")


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


def save_clip(folder: Path) -> None:
    words = {**SMALL_TEXT, "vocab_size": 2000, "bos_token_id": 101, "eos_token_id": 102}
    vision = {**SMALL_TEXT, "patch_size": 32}
    config = transformers.CLIPConfig(text_config=words, vision_config=vision)
    transformers.CLIPModel(config).save_pretrained(folder)
    save_tokenizer(folder)


def save_blip(folder: Path) -> None:
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


def save_detector(folder: Path) -> None:
    config = tiny_mask2former_config()
    detector = transformers.Mask2FormerForUniversalSegmentation(config)
    detector.class_predictor.bias.data[geneval.CLASSES.index("dog")] = 9
    for name, parameter in detector.named_parameters():
        if name.endswith(("mask_projection.bias", "mask_embedder.2.0.bias")):
            parameter.data += 1  # no mask is empty
    detector.save_pretrained(folder)


def save_gdino(folder: Path) -> None:
    swin = transformers.SwinConfig(
        embed_dim=12, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8], out_indices=[2, 3, 4]
    )
    config = transformers.GroundingDinoConfig(
        backbone_config=swin,
        text_config=transformers.BertConfig(**SMALL_TEXT, vocab_size=2000),
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        num_queries=20,
    )
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


# -------------------------------------------------------------------------------------------------
# A judge

QWEN_TOKENS = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
]
# Chat templates of the two kinds that the real judges have, written for these tests. The one that
# the tokenizer of Qwen2.5-VL brings along is for text and tools only: it concatenates, and a list
# of parts is a TypeError. Its processor's, and those of Qwen3-VL, take strings and lists.
TEXT_TEMPLATE = """{% if tools %}{{ raise_exception('no tools here') }}{% endif %}\
{{ '<|im_start|>system\nYou are a judge.<|im_end|>\n' }}\
{% for message in messages %}\
{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
PARTS_TEMPLATE = """{% for message in messages %}\
{% if loop.first and message.role != 'system' %}\
{{ '<|im_start|>system\nYou judge pictures.<|im_end|>\n' }}{% endif %}\
{{ '<|im_start|>' + message.role + '\n' }}\
{% if message.content is string %}{{ message.content }}{% else %}\
{% for part in message.content %}\
{% if part.type == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}\
{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
JUDGE_SIZES = {  # width, attention heads, key-value heads, width of the MLP
    "tiny": (32, 4, 2, 64),
    "served": (128, 2, 1, 256),  # the smallest that vLLM takes
}


def small_tokenizer(template):
    """Qwen2's class with merges of our own instructions: prompts are about as long as with Qwen's.

    Every byte is there, so that any text can be written."""
    vocab, merges = small_vocabulary()
    return qwen_tokenizer(vocab, merges, QWEN_TOKENS, template)


@functools.cache
def small_vocabulary():
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = transformers.Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    texts = [task.intro + task.question for task in rewards.TASKS.values()]
    bpe.train_from_iterator(texts * 3, trainer)
    state = json.loads(bpe.to_str())["model"]
    return state["vocab"], [tuple(pair) for pair in state["merges"]]


def qwen_tokenizer(vocab, merges, special_tokens, template):
    vocab = dict(vocab)
    for token in special_tokens:
        vocab[token] = len(vocab)
    return transformers.Qwen2Tokenizer(
        vocab=vocab,
        merges=merges,
        extra_special_tokens=list(special_tokens),
        chat_template=template,
        padding_side="right",
    )


def random_judge(
    size="tiny",
    family="qwen2_5_vl",
    dtype=torch.float32,
    template=TEXT_TEMPLATE,
    tokenizer=None,
):
    """(model, tokenizer, image processor) of transformers' own classes with random weights."""
    tokenizer = tokenizer or small_tokenizer(template)
    ids = dict(zip(QWEN_TOKENS, tokenizer.convert_tokens_to_ids(QWEN_TOKENS), strict=True))
    width, heads, kv_heads, mlp = JUDGE_SIZES[size]
    half = width // heads // 2
    side = half * 3 // 8
    text = {
        "hidden_size": width,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": mlp,
        "vocab_size": len(tokenizer),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [half - 2 * side, side, side],  # pairs for time, height, width
        },
        "eos_token_id": ids["<|im_end|>"],
        "bos_token_id": ids["<|endoftext|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }
    patch = 14 if family == "qwen2_5_vl" else 16
    tower = {
        "depth": 2,
        "hidden_size": width,
        "num_heads": 2,
        "intermediate_size": mlp,
        "out_hidden_size": width,
        "patch_size": patch,
    }
    if family == "qwen2_5_vl":
        tower["fullatt_block_indexes"] = [1]
    else:
        text["head_dim"] = width // heads
        tower["deepstack_visual_indexes"] = [0]
        tower["num_position_embeddings"] = 64
    config = transformers.AutoConfig.for_model(
        family,
        text_config=text,
        vision_config=tower,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=dtype)
    for weight in model.parameters():
        if weight.ndim > 1:  # at the usual scale so small a model hardly looks at what it is given
            weight.data.normal_(std=1.5 * weight[0].numel() ** -0.5)
    model.generation_config.eos_token_id = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    return model, tokenizer, transformers.Qwen2VLImageProcessorPil(patch_size=patch)
