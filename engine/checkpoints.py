"""Whatever is on disk becomes the policy: transformers folders, DeepSeek's own format, our checkpoints, LoRA adapters.

DeepSeek's format is that of deepseek-ai/Janus-Pro-1B and -7B and of the released GoT-R1-1B and -7B. Its tensors go one
by one into transformers' `JanusForConditionalGeneration`, every key used or dropped on purpose, every shape checked;
the files are mapped, so that host memory stays near the size of the checkpoint.

    python checkpoints.py out/grpo/step_001000 merged        # an adapter merged into its base, or DeepSeek's format
                                                             # converted: a folder in transformers' format
"""

import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import safetensors
import torch
import torch.nn.functional as F
import tyro
from transformers import (
    JanusConfig,
    JanusForConditionalGeneration,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)
from transformers.initialization import no_init_weights

from engine import run
from render_boxes import MARKERS

TOY = Path(__file__).parent.parent / "toy" / "weights"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# DeepSeek's names -> transformers' names, first match wins; a rule without a new name drops the tensor
VISION, VQ = r"^vision_model\.vision_tower\.", r"^gen_vision_model\."
RULES = [
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^gen_embed\.", "model.generation_embeddings."),
    (r"^gen_aligner\.layers\.0\.", "model.generation_aligner.fc1."),
    (r"^gen_aligner\.layers\.2\.", "model.generation_aligner.hidden_layers.0."),
    (r"^aligner\.layers\.0\.", "model.aligner.fc1."),
    (r"^aligner\.layers\.2\.", "model.aligner.hidden_layers.0."),
    (r"^gen_head\.output_mlp_projector\.", "model.generation_head.proj_out."),
    (r"^gen_head\.vision_head\.", "model.generation_head.vision_head."),
    (VISION + r"attn_pool\.", None),  # never used
    (VISION + r"pos_embed$", "model.vision_model.embeddings.position_embedding.weight"),
    (VISION + r"patch_embed\.proj\.", "model.vision_model.embeddings.patch_embedding."),
    (VISION + r"norm\.", "model.vision_model.post_layernorm."),
    (
        VISION + r"blocks\.(\d+)\.norm([12])\.",
        r"model.vision_model.encoder.layers.\1.layer_norm\2.",
    ),
    (
        VISION + r"blocks\.(\d+)\.attn\.proj\.",
        r"model.vision_model.encoder.layers.\1.self_attn.projection_layer.",
    ),
    (
        VISION + r"blocks\.(\d+)\.attn\.qkv\.",
        r"model.vision_model.encoder.layers.\1.self_attn.qkv_proj.",
    ),
    (VISION + r"blocks\.(\d+)\.mlp\.", r"model.vision_model.encoder.layers.\1.mlp."),
    (VQ + r"quantize\.codebook_used$", None),  # a counter of DeepSeek's training
    (VQ + r"(en|de)coder\.mid\.0\.", r"model.vqmodel.\1coder.mid.block_1."),
    (VQ + r"(en|de)coder\.mid\.1\.", r"model.vqmodel.\1coder.mid.attn_1."),
    (VQ + r"(en|de)coder\.mid\.2\.", r"model.vqmodel.\1coder.mid.block_2."),
    (VQ + r"encoder\.conv_blocks\.(\d+)\.res\.", r"model.vqmodel.encoder.down.\1.block."),
    (VQ + r"encoder\.conv_blocks\.", "model.vqmodel.encoder.down."),
    (VQ + r"decoder\.conv_blocks\.(\d+)\.res\.", r"model.vqmodel.decoder.up.\1.block."),
    (VQ + r"decoder\.conv_blocks\.", "model.vqmodel.decoder.up."),
    (VQ, "model.vqmodel."),
]


def convert_tensors(
    tensors: Iterable[tuple[str, torch.Tensor]],
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) pairs in DeepSeek's names -> pairs in transformers' names. Raises ValueError on an unknown name.

    Values change in one place: code vectors get unit length. DeepSeek normalises them whenever it looks one up;
    transformers does when it decodes but not when it encodes."""
    for name, value in tensors:
        rule = next(((pattern, new) for pattern, new in RULES if re.search(pattern, name)), None)
        if rule is None:
            raise ValueError(f"{name} is no tensor of a Janus-Pro checkpoint")
        if rule[1] is None:
            continue
        new = re.sub(*rule, name, count=1)
        if "qkv_proj" in new:
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                yield new.replace("qkv_proj", f"{letter}_proj"), part
        elif new.endswith("position_embedding.weight"):
            yield new, value.squeeze(0)
        elif new.endswith("quantize.embedding.weight"):
            yield new, F.normalize(value.float(), dim=-1).to(value.dtype)
        else:
            yield new, value


def convert_deepseek(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A whole state dict in DeepSeek's names -> one for
    `JanusForConditionalGeneration.load_state_dict(strict=True)`."""
    return dict(convert_tensors(state_dict.items()))


def config_from_deepseek(deepseek: dict) -> JanusConfig:
    """DeepSeek's `config.json` (a dict, model_type multi_modality) -> JanusConfig; no size is guessed from a name."""
    language = dict(deepseek["language_config"])
    vision, codes = deepseek["vision_config"]["params"], deepseek["gen_vision_config"]["params"]
    if (name := vision["model_name"]) != "siglip_large_patch16_384":
        raise ValueError(
            f"vision tower {name} is not known: expected siglip_large_patch16_384, as in Janus-Pro"
        )
    keys = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
    )
    keys += ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_theta")
    # what a config leaves out has LLaMA-7B's value: DeepSeek's 7B names neither its intermediate size nor its width
    text = {"vocab_size": 102400, "max_position_embeddings": 16384, "rms_norm_eps": 1e-6}
    text |= {key: language[key] for key in keys if key in language}
    width, side = text.get("hidden_size", 4096), vision["image_size"]
    return JanusConfig(
        text_config=LlamaConfig(**text, tie_word_embeddings=False),
        vision_config=JanusVisionConfig(projection_dim=width, image_size=side),
        vq_config=JanusVQVAEConfig(
            num_embeddings=codes["image_token_size"],
            embed_dim=codes["n_embed"],
            projection_dim=width,
            image_token_embed_dim=width,
            num_patches=side // 16,
        ),
        tie_word_embeddings=False,  # transformers' default ties lm_head to the embedding and silently loses one of them
    )


def janus_pro_config(size: str) -> JanusConfig:
    """The published sizes, "1b" or "7b" (what config.json of deepseek-ai/Janus-Pro-1B and -7B says), for models with
    random weights: benchmarks and memory tables."""
    language = {
        "1b": {
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
        },
        "7b": {"num_hidden_layers": 30},
    }[size]
    return config_from_deepseek({
        "language_config": {**language, "num_key_value_heads": language.get("num_attention_heads", 32)},
        "vision_config": {"params": {"image_size": 384, "model_name": "siglip_large_patch16_384"}},
        "gen_vision_config": {"params": {"image_token_size": 16384, "n_embed": 8}},
    })  # fmt: skip


def read_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """All (name, tensor) of a folder's safetensors or .bin shards, one file open at a time, nothing read before its
    turn."""
    for stem in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{stem}.index.json"
        names = (
            sorted(set(json.loads(index.read_text())["weight_map"].values()))
            if index.exists()
            else [stem]
        )
        files = [folder / name for name in names]
        if index.exists() or files[0].exists():
            break
    else:
        raise FileNotFoundError(
            f"{folder} holds no weights: expected safetensors or pytorch_model.bin, or shards"
        )
    for file in files:
        try:
            if file.suffix == ".safetensors":
                with safetensors.safe_open(file, "pt") as shard:
                    for name in shard.keys():  # noqa: SIM118 - not a dict
                        yield name, shard.get_tensor(name)
            else:
                yield from torch.load(
                    file, map_location="cpu", mmap=True, weights_only=True
                ).items()
        except (OSError, RuntimeError, EOFError, safetensors.SafetensorError) as problem:
            reason = str(problem).splitlines()[0]
            raise ValueError(f"cannot read {file} (cut off while copying?): {reason}") from problem


def load_deepseek(
    folder: Path, config: JanusConfig, dtype: torch.dtype
) -> JanusForConditionalGeneration:
    """A folder in DeepSeek's format -> the model. Raises ValueError naming what is missing, unknown or of another
    shape."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with no_init_weights():
            model = JanusForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    wanted = dict(model.named_parameters())
    for name, value in convert_tensors(read_tensors(folder)):
        place = wanted.pop(name, None)
        if place is None:
            raise ValueError(f"{folder}: {name} has no place in the model of config.json")
        if place.shape != value.shape:
            raise ValueError(
                f"{folder}: {name} is {tuple(value.shape)}, config.json says {tuple(place.shape)}"
            )
        place.data = value.to(
            dtype
        )  # in the file's own dtype the weights stay where the file is mapped: no copy
    if wanted:
        raise ValueError(
            f"{folder} lacks {len(wanted)} tensors, for instance {', '.join(list(wanted)[:3])}"
        )
    return model


def load_policy(name_or_path: str, device="cpu", dtype: torch.dtype | None = None):
    """(model, tokenizer) from `toy`, a folder, or a hub id: transformers' format, DeepSeek's, or a LoRA adapter of
    either. Without a `dtype`: bfloat16 on GPUs, float32 elsewhere.

    The model is in eval mode. Markers that the tokenizer lacks are added. Raises OSError or ValueError, in one line."""
    dtype = dtype or (torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32)
    folder = TOY if name_or_path == "toy" else Path(name_or_path).expanduser()
    if not folder.is_dir():
        if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(name_or_path)):
            raise FileNotFoundError(
                f"no folder {name_or_path}: expected a checkpoint, a hub id (owner/name), or toy"
            )
        from huggingface_hub import snapshot_download

        folder = Path(
            snapshot_download(name_or_path, allow_patterns=["*.json", "*.safetensors", "*.bin"])
        )
    if (folder / "adapter_config.json").exists():
        from peft import PeftModel

        base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        model, tokenizer = load_policy(base, device, dtype)
        return PeftModel.from_pretrained(model, str(folder)).merge_and_unload().eval(), tokenizer
    try:
        settings = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as problem:
        raise ValueError(f"{folder} is no checkpoint: {problem}") from problem
    kind = settings.get("model_type")
    if kind == "multi_modality":
        model = load_deepseek(folder, config_from_deepseek(settings), dtype)
    elif kind == "janus":
        config = JanusConfig.from_pretrained(folder)
        config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
        model, report = JanusForConditionalGeneration.from_pretrained(
            folder, config=config, dtype=dtype, output_loading_info=True
        )
        if problems := [
            key
            for part in ("missing_keys", "mismatched_keys", "unexpected_keys")
            for key in report[part]
        ]:
            raise ValueError(
                f"{folder} does not fit its config.json: {', '.join(map(str, problems[:3]))}"
            )
    else:
        raise ValueError(
            f"{folder} holds a {kind} model: expected janus (transformers) or multi_modality (DeepSeek)"
        )
    # not LlamaTokenizerFast, which config files name: it drops the spaces of a byte-level tokenizer
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    added = tokenizer.add_tokens(
        [marker for marker in MARKERS if marker not in tokenizer.get_vocab()]
    )
    rows = model.get_input_embeddings().weight.shape[0]
    if added:
        print(
            f"{name_or_path}: {added} markers added, {len(tokenizer)} tokens for {rows} rows",
            file=sys.stderr,
        )
    if len(tokenizer) > rows:
        torch.manual_seed(0)  # new rows are random, and an adapter has to find the same ones again
        model.resize_token_embeddings(len(tokenizer))
    return model.to(device).eval(), tokenizer


@dataclass
class Args:
    source: tyro.conf.Positional[str]  # an adapter, a folder or a hub id: whatever `--model` takes
    out: tyro.conf.Positional[
        str
    ]  # new folder for the whole model, in transformers' format, with its tokenizer
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of the weights that are written


def main(argv: list[str] | None = None) -> None:
    args = run.parse_args(Args, __doc__, argv)
    if Path(args.out).exists():
        run.fail(f"{args.out} exists: name a new folder")
    try:
        model, tokenizer = load_policy(args.source, dtype=DTYPES[args.dtype])
        model.save_pretrained(args.out)
        tokenizer.save_pretrained(args.out)
    except (OSError, ValueError) as problem:
        run.fail(str(problem))
    print(f"wrote {args.out}: --model {args.out} uses it")


if __name__ == "__main__":
    main()
