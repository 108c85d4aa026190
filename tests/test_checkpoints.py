"""Loading, against numbers computed with DeepSeek's reference implementation (tests/golden_janus: a tiny random model).
pytest tests/test_checkpoints.py"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import JanusConfig, JanusForConditionalGeneration, PreTrainedTokenizerFast

import gotr1
from engine import checkpoints

GOLDEN = Path(__file__).parent / "golden_janus"
FACTS = json.loads((GOLDEN / "expected.json").read_text())
CAPTIONS = [prompt["caption"] for prompt in FACTS["prompts"]]


@pytest.fixture(scope="module")
def expected():
    return load_file(GOLDEN / "expected.safetensors")


@pytest.fixture(scope="module")
def golden():
    config = JanusConfig(
        **{k: v for k, v in json.loads((GOLDEN / "hf_config.json").read_text()).items()}
    )
    model = JanusForConditionalGeneration(config).eval()
    model.load_state_dict(
        gotr1.convert_deepseek(load_file(GOLDEN / "deepseek.safetensors")), strict=True
    )
    return model, PreTrainedTokenizerFast.from_pretrained(GOLDEN)


def draw(golden, captions, mode="cond", **kwargs):
    return gotr1.rollout(
        *golden, captions, cfg=5.0, temperature=0, max_chain=40, logp_mode=mode, **kwargs
    )


@pytest.mark.parametrize("alone", [True, False], ids=["each alone", "as one batch"])
def test_greedy_rollout_is_the_official_one(golden, expected, alone):
    model, tokenizer = golden
    batches = [[caption] for caption in CAPTIONS] if alone else [CAPTIONS]
    k = 0
    for captions in batches:
        sampled, guided = draw(golden, captions), draw(golden, captions, "guided")
        text, cond = gotr1.hidden_states(model, sampled)
        uncond = gotr1.hidden_states(model, sampled, torch.ones(len(captions), dtype=torch.bool))[1]
        for n in range(len(captions)):
            want = {
                key.split(".")[1]: value
                for key, value in expected.items()
                if key.startswith(f"prompt{k}.")
            }
            steps, size = want["text_logits"].shape[0], len(want["chain_ids"])
            assert sampled.prompt_ids[n] == want["prompt_ids"].tolist()
            assert (
                sampled.chain_ids[n, : sampled.chain_lens[n]].tolist() == want["chain_ids"].tolist()
            )
            assert bool(sampled.forced[n]) == FACTS["prompts"][k]["forced"] == (size == steps + 1)
            assert sampled.chains[n] + "<begin_of_image>" == FACTS["prompts"][k]["chain_text"]
            assert torch.equal(sampled.image_tokens[n], want["image_tokens"])
            # the training pass: logits themselves
            assert (model.lm_head(text[n, :steps]) - want["text_logits"]).abs().max() < 2e-4
            c, u = model.model.generation_head(cond[n]), model.model.generation_head(uncond[n])
            assert (c - want["image_logits_cond"]).abs().max() < 2e-4
            assert (u + 5 * (c - u) - want["image_logits_guided"]).abs().max() < 2e-3
            # the sampling pass: the probabilities that it recorded
            chosen = want["chain_ids"][:steps, None]
            logp = want["text_logits"].log_softmax(-1).gather(1, chosen).squeeze(1)
            assert (sampled.logp[n, :steps] - logp).abs().max() < 1e-4
            images = len(want["image_tokens"])
            for run, logits in (
                (sampled, want["image_logits_cond"]),
                (guided, want["image_logits_guided"]),
            ):
                logp = logits.log_softmax(-1).gather(1, want["image_tokens"][:, None]).squeeze(1)
                assert (run.logp[n, -images:] - logp).abs().max() < 2e-3
            # pixels
            decoded = model.decode_image_tokens(sampled.image_tokens[n : n + 1])[0].permute(2, 0, 1)
            assert (decoded - want["decoded"]).abs().max() < 2e-4
            (image,) = gotr1.decode_images(model, sampled.image_tokens[n : n + 1])
            pixels = torch.from_numpy(np.array(image)).long()
            off = (pixels - want["pixels"].long()).abs()
            assert off.max() <= 1 and (off > 0).float().mean() < 0.01
            k += 1


@pytest.mark.parametrize("mode", ["cond", "guided"])
def test_token_logps_equal_what_was_recorded(golden, mode):
    sampled = draw(golden, CAPTIONS, mode)
    logp, mask = gotr1.token_logps(golden[0], sampled)
    assert ((logp - sampled.logp) * mask).abs().max() < 1e-4


def test_encode_images_gives_the_official_indices_also_from_a_codebook_of_any_length(
    golden, expected
):
    model = golden[0]
    assert torch.equal(
        gotr1.encode_images(model, expected["input_image"]), expected["input_image_tokens"]
    )
    weight = model.model.vqmodel.quantize.embedding.weight
    assert (weight.norm(dim=-1) - 1).abs().max() < 1e-6, (
        "the converter leaves code vectors at their length"
    )
    raw = load_file(GOLDEN / "deepseek.safetensors")["gen_vision_model.quantize.embedding.weight"]
    assert raw.norm(dim=-1).max() > 2, "unit vectors already: this test would prove nothing"
    unit = weight.data.clone()
    weight.data.copy_(raw)
    assert torch.equal(
        gotr1.encode_images(model, expected["input_image"]), expected["input_image_tokens"]
    )
    weight.data.copy_(unit)


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def deepseek_config() -> dict:
    """A config.json as Janus-Pro-1B has it."""
    return {
        "model_type": "multi_modality",
        "language_config": {
            "hidden_size": 2048, "intermediate_size": 5632, "max_position_embeddings": 16384, "model_type": "llama",
            "num_attention_heads": 16, "num_hidden_layers": 24, "num_key_value_heads": 16, "vocab_size": 102400,
        },
        "vision_config": {"params": {"image_size": 384, "model_name": "siglip_large_patch16_384"}},
        "gen_vision_config": {"params": {"image_token_size": 16384, "n_embed": 8}},
    }  # fmt: skip


def test_real_sizes_come_from_config_json():
    one = deepseek_config()
    seven = deepseek_config()
    seven["language_config"] = {
        "max_position_embeddings": 16384, "model_type": "llama", "num_hidden_layers": 30, "vocab_size": 102400
    }  # fmt: skip
    for settings, parameters in ((one, 2_076_636_811), (seven, 7_407_773_323)):
        with torch.device("meta"):
            model = JanusForConditionalGeneration(checkpoints.config_from_deepseek(settings))
        assert sum(p.numel() for p in model.parameters()) == parameters
        assert gotr1.image_token_count(model) == 576
    for size, settings in (("1b", one), ("7b", seven)):
        known, read = checkpoints.janus_pro_config(size), checkpoints.config_from_deepseek(settings)
        assert (
            known.text_config.to_dict() == read.text_config.to_dict()
            and known.vq_config == read.vq_config
        )


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The golden model as a folder in DeepSeek's format; its sizes are not SigLIP-L's, so they come from
    hf_config.json."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(GOLDEN / name, tmp_path / name)
    (tmp_path / "config.json").write_text(json.dumps(deepseek_config()))
    config = JanusConfig(**json.loads((GOLDEN / "hf_config.json").read_text()))
    monkeypatch.setattr(checkpoints, "config_from_deepseek", lambda settings: config)
    return tmp_path


def put_weights(folder, form, tensors=None):
    tensors = tensors or load_file(GOLDEN / "deepseek.safetensors")
    names = sorted(tensors)
    save = torch.save if "bin" in form else lambda part, path: save_file(part, path)
    stem, end = ("pytorch_model", "bin") if "bin" in form else ("model", "safetensors")
    if "shards" not in form:
        save(dict(tensors), folder / f"{stem}.{end}")
        return
    shards = {f"{stem}-{i + 1:05d}-of-00002.{end}": names[i::2] for i in range(2)}
    for file, part in shards.items():
        save({name: tensors[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (folder / f"{stem}.{end}.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("form", ["bin", "bin shards", "safetensors", "safetensors shards"])
def test_every_form_of_a_deepseek_folder_loads(folder, golden, form):
    put_weights(folder, form)
    model, tokenizer = gotr1.load_policy(str(folder))
    want = golden[0].state_dict()
    assert all(torch.equal(value, want[name]) for name, value in model.state_dict().items())
    assert draw((model, tokenizer), CAPTIONS[:1]).chains == draw(golden, CAPTIONS[:1]).chains


def test_what_we_save_loads_again_with_lm_head_apart_from_the_embedding(golden, tmp_path):
    model, tokenizer = golden
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["tie_word_embeddings"] = settings["text_config"]["tie_word_embeddings"] = (
        True  # transformers' default
    )
    (tmp_path / "config.json").write_text(json.dumps(settings))
    loaded, _ = gotr1.load_policy(str(tmp_path))
    loaded.tie_weights()  # as saving and resizing do
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert torch.equal(loaded.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert not torch.equal(loaded.lm_head.weight, loaded.get_input_embeddings().weight)


def test_a_lora_adapter_loads_on_its_base(golden, tmp_path):
    peft = pytest.importorskip("peft")
    base = tmp_path / "base"
    golden[0].save_pretrained(base)
    golden[1].save_pretrained(base)
    model, _ = gotr1.load_policy(str(base))
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    adapted.save_pretrained(tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(base)
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    loaded, _ = gotr1.load_policy(str(tmp_path / "adapter"))
    ids = torch.arange(20)[None]
    want = adapted.base_model.model.model.language_model(ids).last_hidden_state
    assert (loaded.model.language_model(ids).last_hidden_state - want).abs().max() < 1e-5
    assert (golden[0].model.language_model(ids).last_hidden_state - want).abs().max() > 1e-3


def test_the_tokenizer_keeps_spaces_and_bos_is_there_once(folder, golden):
    put_weights(folder, "safetensors")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**settings, "tokenizer_class": "LlamaTokenizerFast"})
    )
    model, tokenizer = gotr1.load_policy(str(folder))
    assert (
        tokenizer.decode(tokenizer.encode("a red cube", add_special_tokens=False)) == "a red cube"
    )
    bos, pad, boi = gotr1.special_ids(tokenizer)
    ids = FACTS["token_ids"]
    assert (bos, pad, boi) == (ids["bos"], ids["pad"], ids["begin_of_image"])
    for always in (True, False):
        tokenizer.add_bos_token = always
        assert gotr1.encode_prompt(tokenizer, "a red cube").count(bos) == 1
        assert bos not in gotr1.encode_chain(tokenizer, "A <|obj_start|>red cube<|obj_end|>")
    tokenizer.pad_token = tokenizer.eos_token  # as some checkpoints have it
    assert gotr1.special_ids(tokenizer)[1] == ids["pad"]


@pytest.mark.parametrize("spare", [0, 8], ids=["the embedding grows", "rows enough"])
def test_missing_markers_are_added(folder, golden, capsys, spare, monkeypatch):
    tensors = load_file(GOLDEN / "deepseek.safetensors")
    data = json.loads((folder / "tokenizer.json").read_text())
    markers = set(checkpoints.MARKERS)
    data["added_tokens"] = [
        token for token in data["added_tokens"] if token["content"] not in markers
    ]
    for token in markers & set(data["model"]["vocab"]):
        del data["model"]["vocab"][token]
    (folder / "tokenizer.json").write_text(json.dumps(data))
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "special_tokens_map.json").unlink()
    config = JanusConfig(**json.loads((GOLDEN / "hf_config.json").read_text()))
    rows = 414 + spare
    config.text_config.vocab_size = rows
    monkeypatch.setattr(checkpoints, "config_from_deepseek", lambda settings: config)
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], tensors[name]])[:rows].clone()
    put_weights(folder, "safetensors", tensors)
    model, tokenizer = gotr1.load_policy(str(folder))
    assert "4 markers added" in capsys.readouterr().err
    assert all(len(tokenizer.encode(marker, add_special_tokens=False)) == 1 for marker in markers)
    assert len(tokenizer) == 418 and model.get_input_embeddings().weight.shape[0] == max(418, rows)
    assert model.lm_head.weight.shape[0] == max(418, rows)
    assert not torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)


def test_whatever_does_not_fit_is_named(folder):
    tensors = load_file(GOLDEN / "deepseek.safetensors")
    put_weights(folder, "safetensors", {**tensors, "language_model.extra": torch.zeros(1)})
    with pytest.raises(ValueError, match="language_model.extra is no tensor"):
        gotr1.load_policy(str(folder))
    put_weights(
        folder, "safetensors", {k: v for k, v in tensors.items() if k != "gen_embed.weight"}
    )
    with pytest.raises(
        ValueError, match="lacks 1 tensors, for instance model.generation_embeddings.weight"
    ):
        gotr1.load_policy(str(folder))
    put_weights(folder, "safetensors", {**tensors, "gen_embed.weight": torch.zeros(3, 8)})
    with pytest.raises(
        ValueError, match=r"generation_embeddings.weight is \(3, 8\), config.json says \(64, 8\)"
    ):
        gotr1.load_policy(str(folder))
    put_weights(
        folder,
        "safetensors",
        {**tensors, "language_model.model.layers.9.mlp.up_proj.weight": torch.zeros(1)},
    )
    with pytest.raises(ValueError, match="layers.9.mlp.up_proj.weight has no place"):
        gotr1.load_policy(str(folder))


@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_a_truncated_file_is_named(folder, form):
    put_weights(folder, form)
    (file,) = [path for path in folder.iterdir() if path.suffix in (".bin", ".safetensors")]
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"cannot read .*{file.name} \(cut off while copying\?\)"):
        gotr1.load_policy(str(folder))


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder /no/such"):
        gotr1.load_policy("/no/such")
    with pytest.raises(ValueError, match="is no checkpoint"):
        gotr1.load_policy(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="holds a llama model: expected janus"):
        gotr1.load_policy(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(deepseek_config()))
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        checkpoints.read_tensors(tmp_path).__next__()
