"""Whatever is on disk becomes the policy: a folder in transformers' format, one in DeepSeek's own
format, a checkpoint of ours, a LoRA adapter.

DeepSeek's format is that of deepseek-ai/Janus-Pro-1B and -7B and of the released GoT-R1-1B and -7B.
Its tensors go one by one into transformers' `JanusForConditionalGeneration`: every key is used or
dropped on purpose, every shape is checked. The files are mapped: host memory stays near their size.

    python -m engine.checkpoints out/grpo/step_001000 merged     # an adapter, merged into its base
    python -m engine.checkpoints deepseek-ai/Janus-Pro-1B janus  # DeepSeek's format, converted

writes the complete model into one folder in transformers' format.
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
from transformers import (
    JanusConfig,
    JanusForConditionalGeneration,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)
from transformers.initialization import no_init_weights

from engine import decode, run
from render_boxes import MARKERS

TOY = Path(__file__).parent.parent / "toy" / "weights"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# -------------------------------------------------------------------------------------------------
# DeepSeek's format: names, values, sizes, files

# parts of names that occur often, first DeepSeek's, then transformers'
VISION = r"^vision_model\.vision_tower\."
VISION_LAYER = VISION + r"blocks\.(\d+)\."
VQ = r"^gen_vision_model\."
NEW_VISION = "model.vision_model."
NEW_VISION_LAYER = r"model.vision_model.encoder.layers.\1."

# (DeepSeek's names, transformers' names): the first match counts; None drops the tensor
RULES = [
    # language model
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
    # image tokens: in and out
    (r"^gen_embed\.", "model.generation_embeddings."),
    (r"^gen_aligner\.layers\.0\.", "model.generation_aligner.fc1."),
    (r"^gen_aligner\.layers\.2\.", "model.generation_aligner.hidden_layers.0."),
    (r"^gen_head\.output_mlp_projector\.", "model.generation_head.proj_out."),
    (r"^gen_head\.vision_head\.", "model.generation_head.vision_head."),
    # image understanding (SigLIP), which text-to-image never uses
    (r"^aligner\.layers\.0\.", "model.aligner.fc1."),
    (r"^aligner\.layers\.2\.", "model.aligner.hidden_layers.0."),
    (VISION + r"attn_pool\.", None),  # DeepSeek does not use it either
    (VISION + r"pos_embed$", NEW_VISION + "embeddings.position_embedding.weight"),
    (VISION + r"patch_embed\.proj\.", NEW_VISION + "embeddings.patch_embedding."),
    (VISION + r"norm\.", NEW_VISION + "post_layernorm."),
    (VISION_LAYER + r"norm([12])\.", NEW_VISION_LAYER + r"layer_norm\2."),
    (VISION_LAYER + r"attn\.proj\.", NEW_VISION_LAYER + "self_attn.projection_layer."),
    (VISION_LAYER + r"attn\.qkv\.", NEW_VISION_LAYER + "self_attn.qkv_proj."),
    (VISION_LAYER + r"mlp\.", NEW_VISION_LAYER + "mlp."),
    # picture tokenizer (VQ): pixels to image tokens and back
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


def new_name(name: str) -> str | None:
    """DeepSeek's name of a tensor -> transformers' name; None for a tensor that is dropped."""
    for pattern, replacement in RULES:
        if re.search(pattern, name):
            if replacement is None:
                return None
            return re.sub(pattern, replacement, name, count=1)
    raise ValueError(f"{name} is no tensor of a Janus-Pro checkpoint")


def convert_tensors(
    tensors: Iterable[tuple[str, torch.Tensor]],
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) pairs with DeepSeek's names -> pairs with transformers' names. Raises
    ValueError on an unknown name.

    Values change in one place: code vectors get unit length. DeepSeek normalises a code vector
    whenever it looks one up; transformers does when it decodes but not when it encodes."""
    for name, value in tensors:
        new = new_name(name)
        if new is None:
            continue
        if "qkv_proj" in new:  # one matrix there, three here
            queries, keys, values = value.chunk(3)
            yield new.replace("qkv_proj", "q_proj"), queries
            yield new.replace("qkv_proj", "k_proj"), keys
            yield new.replace("qkv_proj", "v_proj"), values
        elif new.endswith("position_embedding.weight"):
            yield new, value.squeeze(0)
        elif new.endswith("quantize.embedding.weight"):
            yield new, F.normalize(value.float(), dim=-1).to(value.dtype)
        else:
            yield new, value


def convert_deepseek(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A complete state dict with DeepSeek's names -> one for
    `JanusForConditionalGeneration.load_state_dict(strict=True)`."""
    return dict(convert_tensors(state_dict.items()))


def config_from_deepseek(deepseek: dict) -> JanusConfig:
    """DeepSeek's `config.json` (a dict, model_type multi_modality) -> JanusConfig. No size is
    guessed from the name of a model."""
    language = deepseek["language_config"]
    vision = deepseek["vision_config"]["params"]
    codes = deepseek["gen_vision_config"]["params"]
    if vision["model_name"] != "siglip_large_patch16_384":
        expected = "expected siglip_large_patch16_384, as in Janus-Pro"
        raise ValueError(f"vision tower {vision['model_name']} is not known: {expected}")
    # What a file leaves out has LLaMA-7B's value: DeepSeek's 7B names neither its width nor its
    # intermediate size. The vocabulary and the last two are DeepSeek's.
    width = language.get("hidden_size", 4096)
    text = LlamaConfig(
        hidden_size=width,
        intermediate_size=language.get("intermediate_size", 11008),
        num_hidden_layers=language.get("num_hidden_layers", 32),
        num_attention_heads=language.get("num_attention_heads", 32),
        num_key_value_heads=language.get("num_key_value_heads"),  # None: as many
        rope_theta=language.get("rope_theta", 10000.0),
        vocab_size=language.get("vocab_size", 102400),
        max_position_embeddings=language.get("max_position_embeddings", 16384),
        rms_norm_eps=language.get("rms_norm_eps", 1e-6),
        tie_word_embeddings=False,
    )
    return JanusConfig(
        text_config=text,
        vision_config=JanusVisionConfig(projection_dim=width, image_size=vision["image_size"]),
        vq_config=JanusVQVAEConfig(
            num_embeddings=codes["image_token_size"],
            embed_dim=codes["n_embed"],
            projection_dim=width,
            image_token_embed_dim=width,
            num_patches=vision["image_size"] // 16,  # per side
        ),
        # by default transformers ties lm_head to the embedding and silently loses one of them
        tie_word_embeddings=False,
    )


def janus_pro_config(size: str) -> JanusConfig:
    """The published sizes, "1b" or "7b", as config.json of deepseek-ai/Janus-Pro-1B and -7B has
    them: for models with random weights, in evaluation and memory tables."""
    sizes = {
        "1b": {
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "num_hidden_layers": 24,
        },
        "7b": {"num_key_value_heads": 32, "num_hidden_layers": 30},
    }
    vision = {"image_size": 384, "model_name": "siglip_large_patch16_384"}
    return config_from_deepseek(
        {
            "language_config": sizes[size],
            "vision_config": {"params": vision},
            "gen_vision_config": {"params": {"image_token_size": 16384, "n_embed": 8}},
        }
    )


def weight_files(folder: Path) -> list[Path]:
    """The files with a folder's weights: safetensors if it has them, else .bin; one or shards."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if index.exists():
            shards = json.loads(index.read_text())["weight_map"].values()
            return [folder / shard for shard in sorted(set(shards))]
        if (folder / name).exists():
            return [folder / name]
    expected = "expected safetensors or pytorch_model.bin, or shards"
    raise FileNotFoundError(f"{folder} holds no weights: {expected}")


def read_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """All (name, tensor) of a folder, see `read_file`."""
    for file in weight_files(folder):
        yield from read_file(file)


def read_file(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """All (name, tensor) of a file, which is mapped: what is not used is not read. Raises
    ValueError when the file cannot be read."""
    try:
        if file.suffix == ".safetensors":
            with safetensors.safe_open(file, "pt") as opened:
                for name in opened.keys():
                    yield name, opened.get_tensor(name)
        else:
            shard = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
            yield from shard.items()
    except (OSError, RuntimeError, EOFError, safetensors.SafetensorError) as problem:
        reason = str(problem).splitlines()[0]
        raise ValueError(f"cannot read {file} (cut off while copying?): {reason}") from problem


def empty_model(config: JanusConfig, dtype: torch.dtype) -> JanusForConditionalGeneration:
    """A model without weights: memory is reserved, but not written to. Its buffers are there."""
    # a saved config names a dtype for each part, which wins over the default
    for part in (config, config.text_config, config.vision_config, config.vq_config):
        part.dtype = dtype
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with no_init_weights():
            return JanusForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)


def load_deepseek(
    folder: Path, config: JanusConfig, dtype: torch.dtype
) -> JanusForConditionalGeneration:
    """A folder in DeepSeek's format -> the model. Raises ValueError naming what is missing, unknown
    or of another shape."""
    model = empty_model(config, dtype)
    empty = dict(model.named_parameters())
    for name, value in convert_tensors(read_tensors(folder)):
        parameter = empty.pop(name, None)
        if parameter is None:
            raise ValueError(f"{folder}: {name} has no place in the model of config.json")
        if parameter.shape != value.shape:
            found, expected = tuple(value.shape), tuple(parameter.shape)
            raise ValueError(f"{folder}: {name} is {found}, config.json says {expected}")
        # in the file's own dtype this copies nothing: the weights stay where the file is mapped
        parameter.data = value.to(dtype)
    if empty:
        some = ", ".join(list(empty)[:3])
        raise ValueError(f"{folder} lacks {len(empty)} tensors, for instance {some}")
    return model


# -------------------------------------------------------------------------------------------------
# Any format


def load_policy(name_or_path: str, device="cpu", dtype: torch.dtype | None = None):
    """(model, tokenizer) from `toy`, a folder, or a hub id: transformers' format, DeepSeek's, or a
    LoRA adapter of either. Without a `dtype`: bfloat16 on GPUs, float32 elsewhere.

    An adapter is merged into its base in float32. In bfloat16 it stays beside the weights, in
    float32: merged, most of a small change would be rounded away (`kept_by_bfloat16`).

    The model is in eval mode. Markers that the tokenizer lacks are added. Raises OSError or
    ValueError with a message of one line."""
    if dtype is None:
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    folder = find_folder(name_or_path)
    if (folder / "adapter_config.json").exists():
        return load_adapter(folder, device, dtype)
    config, is_deepseek = read_config(folder)
    if is_deepseek:
        model = load_deepseek(folder, config, dtype)
    else:
        model = load_transformers(folder, config, dtype)
    tokenizer = load_tokenizer(str(folder))
    add_markers(model, tokenizer, name_or_path)
    return model.to(device).eval(), tokenizer


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a checkpoint as its files have it; of an adapter without one, its base's."""
    folder = find_folder(name_or_path)
    if (folder / "adapter_config.json").exists() and not (folder / "tokenizer.json").exists():
        return load_tokenizer(base_of(folder))
    # not LlamaTokenizerFast, which config files name: it drops the spaces of a byte-level tokenizer
    return PreTrainedTokenizerFast.from_pretrained(folder)


def read_config(folder: Path) -> tuple[JanusConfig, bool]:
    """(config, whether the folder is in DeepSeek's format)."""
    try:
        settings = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as problem:
        raise ValueError(f"{folder} is no checkpoint: {problem}") from problem
    kind = settings.get("model_type")
    if kind == "multi_modality":
        return config_from_deepseek(settings), True
    if kind != "janus":
        expected = "expected janus (transformers) or multi_modality (DeepSeek)"
        raise ValueError(f"{folder} holds a {kind} model: {expected}")
    config = JanusConfig.from_pretrained(folder)
    config.tie_word_embeddings = False
    config.text_config.tie_word_embeddings = False
    return config, False


def find_folder(name_or_path: str) -> Path:
    """The folder with the files of `toy`, of a path, or of a hub id, which is downloaded."""
    folder = TOY if name_or_path == "toy" else Path(name_or_path).expanduser()
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(name_or_path)):
        expected = "expected a checkpoint, a hub id (owner/name), or toy"
        raise FileNotFoundError(f"no folder {name_or_path}: {expected}")
    from huggingface_hub import snapshot_download

    needed = ["*.json", "*.safetensors", "*.bin"]
    return Path(snapshot_download(name_or_path, allow_patterns=needed))


def policy_files(name_or_path: str) -> list[Path]:
    """Every file that `load_policy` reads: weights, settings and tokenizer; of an adapter also
    those of its base. Raises OSError or ValueError, as `load_policy` does."""
    folder = find_folder(name_or_path)
    files = sorted(folder.glob("*.json"))
    if not (folder / "adapter_config.json").exists():
        return files + weight_files(folder)
    files += sorted(folder.glob("adapter_model.*"))
    return files + policy_files(base_of(folder))


def base_of(folder: Path) -> str:
    """What the adapter in a folder starts from."""
    settings = json.loads((folder / "adapter_config.json").read_text())
    return settings["base_model_name_or_path"]


def load_adapter(folder: Path, device, dtype: torch.dtype):
    """(model, tokenizer): the adapter on its base, merged in float32, apart in bfloat16."""
    adapted, tokenizer = open_adapter(folder, device, dtype)
    if dtype == torch.bfloat16:
        model = keep_apart(adapted, folder)
    else:
        model = adapted.merge_and_unload()
    return model.eval(), tokenizer


def open_adapter(folder: Path, device, dtype: torch.dtype):
    """(PeftModel, tokenizer): the adapter, in float32, on its base, in `dtype`."""
    from peft import PeftModel

    model, _ = load_policy(base_of(folder), device, dtype)
    tokenizer = load_tokenizer(str(folder))  # its own: with the ids that it was trained with
    add_markers(model, tokenizer, str(folder))
    return PeftModel.from_pretrained(model, str(folder), autocast_adapter_dtype=True), tokenizer


@torch.no_grad()
def keep_apart(adapted, folder: Path):
    """A PeftModel -> its model, in which plain layers hold base and adapter beside each other: what
    is trained on top of it is an adapter of its own. Raises ValueError for adapters of a kind that
    such layers cannot compute."""
    model = adapted.base_model.model
    for name, layer in list(model.named_modules()):
        if not hasattr(layer, "lora_A"):
            continue
        adapters = decode.adapters_of(layer)
        if not adapters:
            expected = f"merge it first: python -m engine.checkpoints {folder} NEW_FOLDER"
            raise ValueError(f"{folder} is no plain LoRA adapter of linear layers: {expected}")
        down = torch.cat([down * scale for down, _, scale in adapters])
        up = torch.cat([up for _, up, _ in adapters], dim=1)
        base = layer.get_base_layer()
        model.set_submodule(name, decode.AdaptedLinear(base, down, up))
    return adapted.unload()


@torch.no_grad()
def kept_by_bfloat16(adapted) -> float:
    """The share of an adapter's change that is left when the merged weights are rounded to
    bfloat16: 1 keeps all of it (rounding errors that are not in its direction do not count)."""
    kept = 0.0
    wanted = 0.0
    for layer in adapted.modules():
        if not hasattr(layer, "lora_A"):
            continue
        before = layer.get_base_layer().weight.float()
        change = layer.get_delta_weight(layer.active_adapters[0]).float()
        rounded = (before + change).bfloat16().double() - before.bfloat16().double()
        kept += (rounded * change).sum().item()
        wanted += change.double().square().sum().item()
    return kept / wanted if wanted else 1.0


def load_transformers(
    folder: Path, config: JanusConfig, dtype: torch.dtype
) -> JanusForConditionalGeneration:
    """A folder in transformers' format -> the model. Raises ValueError where transformers only
    warns: at a tensor that is missing, unknown or of another shape."""
    model, report = JanusForConditionalGeneration.from_pretrained(
        folder, config=config, dtype=dtype, output_loading_info=True
    )
    problems = [
        *report["missing_keys"],
        *report["mismatched_keys"],
        *report["unexpected_keys"],
    ]
    if problems:
        some = ", ".join(str(key) for key in problems[:3])
        raise ValueError(f"{folder} does not fit its config.json: {some}")
    return model


def missing_markers(tokenizer) -> list[str]:
    """The markers of a chain that a tokenizer lacks, in the order in which they are added."""
    known = tokenizer.get_vocab()
    return [marker for marker in MARKERS if marker not in known]


def add_markers(model, tokenizer, label: str) -> None:
    """Adds the missing markers, and rows for them to the embedding and to lm_head where those have
    no spare ones. `label` names the model in the message on stderr."""
    rows = model.get_input_embeddings().weight.shape[0]
    added = tokenizer.add_tokens(missing_markers(tokenizer))
    if added:
        sizes = f"{len(tokenizer)} tokens for {rows} rows"
        print(f"{label}: {added} markers added, {sizes}", file=sys.stderr)
    if len(tokenizer) > rows:
        torch.manual_seed(0)  # new rows are random, and an adapter has to find the same ones again
        model.resize_token_embeddings(len(tokenizer))


def check_markers_for_lora(name_or_path: str) -> None:
    """Raises ValueError when an adapter could not learn to write chains: a model that has never
    seen the markers needs new embeddings for them, which an adapter does not train."""
    missing = missing_markers(load_tokenizer(name_or_path))
    if missing:
        raise ValueError(
            f"{name_or_path} knows no {', '.join(missing)}, and an adapter (--lora) would leave "
            "their embeddings random: train all weights first (without --lora)"
        )


# -------------------------------------------------------------------------------------------------
# Command line


def merge(folder: Path, dtype: str):
    """(model, tokenizer): an adapter merged into its base in float32, then rounded if `dtype` asks
    for it; says on stderr what that loses."""
    adapted, tokenizer = open_adapter(folder, "cpu", torch.float32)
    kept = kept_by_bfloat16(adapted)
    model = adapted.merge_and_unload().eval()
    if dtype == "bfloat16":
        advice = "--dtype float32, or the adapter itself as --model, keeps all of it"
        print(f"bfloat16 keeps {kept:.0%} of what the adapter changed: {advice}", file=sys.stderr)
        model.to(torch.bfloat16)
    return model, tokenizer


@dataclass
class Config:
    source: str  # an adapter, a folder or a hub id: whatever `--model` takes
    out: str  # new folder for the complete model and its tokenizer, in transformers' format
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: float32 with an adapter


def main(argv: list[str] | None = None) -> None:
    config = run.parse_args(Config, __doc__, argv)
    if Path(config.out).exists():
        run.fail(f"{config.out} exists: name a new folder")
    try:
        folder = find_folder(config.source)
        if (folder / "adapter_config.json").exists():
            model, tokenizer = merge(folder, config.dtype)
        else:
            dtype = "bfloat16" if config.dtype == "auto" else config.dtype
            model, tokenizer = load_policy(config.source, dtype=DTYPES[dtype])
        model.save_pretrained(config.out)
        tokenizer.save_pretrained(config.out)
    except (OSError, ValueError) as problem:
        run.fail(str(problem))
    print(f"wrote {config.out}: --model {config.out} uses it")


if __name__ == "__main__":
    main()
