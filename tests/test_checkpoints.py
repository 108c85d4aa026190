"""Loading, against numbers computed with DeepSeek's reference implementation (tests/golden_janus, a
tiny random model).   pytest tests/test_checkpoints.py"""

import copy
import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import JanusConfig, JanusForConditionalGeneration, PreTrainedTokenizerFast

import gotr1
from engine import checkpoints, decode, trainer
from render_boxes import MARKERS
from toy import model as toy_model

GOLDEN = Path(__file__).parent / "golden_janus"
FACTS = json.loads((GOLDEN / "expected.json").read_text())
CAPTIONS = [prompt["caption"] for prompt in FACTS["prompts"]]


def golden_config() -> JanusConfig:
    return JanusConfig(**json.loads((GOLDEN / "hf_config.json").read_text()))


def golden_weights() -> dict[str, torch.Tensor]:
    """The model's weights under DeepSeek's names."""
    return load_file(GOLDEN / "deepseek.safetensors")


@pytest.fixture(scope="module")
def expected():
    return load_file(GOLDEN / "expected.safetensors")


@pytest.fixture(scope="module")
def golden():
    model = JanusForConditionalGeneration(golden_config()).eval()
    model.load_state_dict(gotr1.convert_deepseek(golden_weights()), strict=True)
    return model, PreTrainedTokenizerFast.from_pretrained(GOLDEN)


def draw(golden, captions, mode="cond"):
    """The most likely chains and pictures, guided as the official code does it."""
    return gotr1.rollout(*golden, captions, cfg=5.0, temperature=0, max_chain=40, logp_mode=mode)


def logp_of(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """(I, V) and (I,) -> (I,)."""
    return logits.log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)


@pytest.mark.parametrize("alone", [True, False], ids=["each alone", "as one batch"])
def test_greedy_rollout_is_the_official_one(golden, expected, alone):
    model, tokenizer = golden
    batches = [[caption] for caption in CAPTIONS] if alone else [CAPTIONS]
    k = 0
    for captions in batches:
        sampled = draw(golden, captions)
        guided = draw(golden, captions, "guided")
        text, cond = gotr1.hidden_states(model, sampled)
        everywhere = torch.ones(len(captions), dtype=torch.bool)
        _, uncond = gotr1.hidden_states(model, sampled, everywhere)
        for recorded in (sampled, guided):
            logp, mask = gotr1.token_logps(model, recorded)
            assert ((logp - recorded.logp) * mask).abs().max() < 1e-4
        for n in range(len(captions)):
            facts = FACTS["prompts"][k]
            want = {}
            for key, value in expected.items():
                if key.startswith(f"prompt{k}."):
                    want[key.split(".")[1]] = value
            steps = len(want["text_logits"])
            chain_ids = sampled.chain_ids[n, : sampled.chain_lens[n]]
            assert sampled.prompt_ids[n] == want["prompt_ids"].tolist()
            assert chain_ids.tolist() == want["chain_ids"].tolist()
            assert bool(sampled.forced[n]) == facts["forced"] == (len(chain_ids) == steps + 1)
            assert sampled.chains[n] + "<begin_of_image>" == facts["chain_text"]
            assert torch.equal(sampled.image_tokens[n], want["image_tokens"])

            # the training pass: logits themselves
            cond_logits = model.model.generation_head(cond[n])
            uncond_logits = model.model.generation_head(uncond[n])
            guided_logits = uncond_logits + 5 * (cond_logits - uncond_logits)
            assert (model.lm_head(text[n, :steps]) - want["text_logits"]).abs().max() < 2e-4
            assert (cond_logits - want["image_logits_cond"]).abs().max() < 2e-4
            assert (guided_logits - want["image_logits_guided"]).abs().max() < 2e-3

            # the sampling pass: the probabilities that it recorded
            images = len(want["image_tokens"])
            logp = logp_of(want["text_logits"], want["chain_ids"][:steps])
            assert (sampled.logp[n, :steps] - logp).abs().max() < 1e-4
            logp = logp_of(want["image_logits_cond"], want["image_tokens"])
            assert (sampled.logp[n, -images:] - logp).abs().max() < 2e-3
            logp = logp_of(want["image_logits_guided"], want["image_tokens"])
            assert (guided.logp[n, -images:] - logp).abs().max() < 2e-3

            # pixels
            tokens = sampled.image_tokens[n : n + 1]
            decoded = model.decode_image_tokens(tokens)[0].permute(2, 0, 1)
            assert (decoded - want["decoded"]).abs().max() < 2e-4
            (image,) = gotr1.decode_images(model, tokens)
            off = (torch.from_numpy(np.array(image)).long() - want["pixels"].long()).abs()
            assert off.max() <= 1 and (off > 0).float().mean() < 0.01
            k += 1


def test_encode_images_gives_the_official_indices_also_from_a_codebook_of_any_length(
    golden, expected
):
    model = copy.deepcopy(golden[0])
    tokens = gotr1.encode_images(model, expected["input_image"])
    assert torch.equal(tokens, expected["input_image_tokens"])
    weight = model.model.vqmodel.quantize.embedding.weight
    unit = (weight.norm(dim=-1) - 1).abs().max() < 1e-6
    assert unit, "the converter leaves code vectors at their length"
    raw = golden_weights()["gen_vision_model.quantize.embedding.weight"]
    assert raw.norm(dim=-1).max() > 2, "unit vectors already: this test would prove nothing"
    weight.data.copy_(raw)
    tokens = gotr1.encode_images(model, expected["input_image"])
    assert torch.equal(tokens, expected["input_image_tokens"])


# -------------------------------------------------------------------------------------------------
# Folders


@pytest.mark.parametrize(("size", "parameters"), [("1b", 2_076_636_811), ("7b", 7_407_773_323)])
def test_real_sizes_come_from_what_the_published_config_json_says(size, parameters):
    """The 7B's names neither width nor intermediate size."""
    with torch.device("meta"):
        model = JanusForConditionalGeneration(checkpoints.janus_pro_config(size))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert gotr1.image_token_count(model) == 576


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The golden model as a folder in DeepSeek's format, without its weights. Its sizes are not
    SigLIP-L's, so they come from hf_config.json."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(GOLDEN / name, tmp_path / name)
    (tmp_path / "config.json").write_text('{"model_type": "multi_modality"}')
    use_config(monkeypatch, golden_config())
    return tmp_path


def use_config(monkeypatch, config):
    monkeypatch.setattr(checkpoints, "config_from_deepseek", lambda settings: config)


def put_weights(folder, form, tensors):
    """Writes weights in one of the forms that are published."""
    save, stem, end = save_file, "model", "safetensors"
    if "bin" in form:
        save, stem, end = torch.save, "pytorch_model", "bin"
    if "shards" not in form:
        save(tensors, folder / f"{stem}.{end}")
        return
    names = sorted(tensors)
    weight_map = {}
    for i in range(2):
        file = f"{stem}-{i + 1:05d}-of-00002.{end}"
        part = {name: tensors[name] for name in names[i::2]}
        save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = json.dumps({"weight_map": weight_map})
    (folder / f"{stem}.{end}.index.json").write_text(index)


@pytest.mark.parametrize("form", ["bin", "bin shards", "safetensors shards"])
def test_every_form_of_a_deepseek_folder_loads(folder, golden, form):
    put_weights(folder, form, golden_weights())
    model, tokenizer = gotr1.load_policy(str(folder))
    want = golden[0].state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, want[name]), name
    assert draw((model, tokenizer), CAPTIONS[:1]).chains == draw(golden, CAPTIONS[:1]).chains


def test_what_we_save_loads_again_with_lm_head_apart_from_the_embedding(golden, tmp_path):
    model, tokenizer = golden
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["tie_word_embeddings"] = True  # transformers' default
    settings["text_config"]["tie_word_embeddings"] = True
    (tmp_path / "config.json").write_text(json.dumps(settings))
    loaded, _ = gotr1.load_policy(str(tmp_path))
    loaded.tie_weights()  # as saving and resizing do
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert torch.equal(loaded.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert not torch.equal(loaded.lm_head.weight, loaded.get_input_embeddings().weight)


def small_adapter(tmp_path, base="toy", seed=0, size=1e-4, rank=8):
    """A LoRA adapter of the toy's q_proj and up_proj as it is after a few steps at a learning rate
    of 1e-5: rms(B) is `size`. Saved as peft saves it."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    targets = ["q_proj", "up_proj"]
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)
    adapted = peft.get_peft_model(gotr1.load_policy(base)[0], config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=size)
    adapted.peft_config["default"].base_model_name_or_path = base
    folder = tmp_path / f"adapter_{seed}"
    adapted.save_pretrained(folder)
    return folder


def test_a_lora_adapter_is_merged_as_peft_computes_it(tmp_path):
    folder = small_adapter(tmp_path, size=0.05)
    adapted, _ = checkpoints.open_adapter(folder, "cpu", torch.float32)
    ids = torch.arange(20)[None]
    want = adapted.base_model.model.model.language_model(ids).last_hidden_state
    for source, is_it in ((str(folder), True), ("toy", False)):
        states = gotr1.load_policy(source)[0].model.language_model(ids).last_hidden_state
        assert ((states - want).abs().max() < 1e-4) == is_it


def kept_share(layer, weight, change) -> float:
    """How much of an adapter's change arrives in what a layer gives: 1 is all of it. The change is
    small beside rounding, so it is looked for in the mean over a quarter of a million numbers."""
    x = torch.randn(4096, weight.shape[1], generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.no_grad():
        given = layer(x)
    assert given.dtype == torch.bfloat16
    exact = x.double() @ weight.double().T
    wanted = x.double() @ change.double().T
    return (((given.double() - exact) * wanted).sum() / (wanted * wanted).sum()).item()


def first_up_proj(model):
    return model.model.language_model.layers[0].mlp.up_proj


def test_a_small_adapter_is_kept_in_bfloat16(tmp_path):
    """In what is loaded, in what is trained, and in a decoding step; merged in bfloat16, or added
    by peft's own forward to what is rounded already, most of it is lost."""
    from peft import PeftModel

    folder = small_adapter(tmp_path)
    weight = first_up_proj(gotr1.load_policy("toy", dtype=torch.bfloat16)[0]).weight.float()
    adapted, _ = checkpoints.open_adapter(folder, "cpu", torch.float32)
    change = first_up_proj(adapted.base_model.model).get_delta_weight("default")

    shares = {}  # what arrives, and the ways in which it should or should not
    loaded = first_up_proj(gotr1.load_policy(str(folder), dtype=torch.bfloat16)[0])
    shares["as loaded"] = kept_share(loaded, weight, change)
    decoded = functools.partial(one_projection, loaded)
    shares["as loaded, decoding"] = kept_share(decoded, weight, change)
    base, _ = gotr1.load_policy("toy", dtype=torch.bfloat16)
    wrapped = PeftModel.from_pretrained(base, str(folder), autocast_adapter_dtype=True)
    by_peft = kept_share(first_up_proj(base), weight, change)
    trainer.round_once(wrapped)
    shares["in training"] = kept_share(first_up_proj(base), weight, change)
    decoded = functools.partial(one_projection, first_up_proj(base))
    shares["in training, decoding"] = kept_share(decoded, weight, change)
    rounded = (weight + change).bfloat16()
    merged = kept_share(lambda x: torch.nn.functional.linear(x, rounded), weight, change)
    for name, share in {**shares, "by peft": by_peft, "merged in bfloat16": merged}.items():
        print(f"{name}: {share:.3f} of a small adapter's change is kept")  # docs/gpu.md has these
    for name, share in shares.items():
        assert share == pytest.approx(1, abs=0.05), name
    assert by_peft < 0.5 and merged < 0.5


def one_projection(layer, x):
    return decode.project([layer], x, decode.low_rank([layer]))[0]


def test_an_adapter_on_an_adapter_in_bfloat16(tmp_path):
    """As a GRPO adapter on an SFT adapter: both are there; so are they merged in float32."""
    first = small_adapter(tmp_path, size=0.05)
    second = small_adapter(tmp_path, base=str(first), seed=1, size=0.05)
    ids = torch.arange(20)[None]
    states = {}
    for name, dtype in (("merged", torch.float32), ("apart", torch.bfloat16)):
        for source in ("toy", str(first), str(second)):
            model, _ = gotr1.load_policy(source, dtype=dtype)
            assert model.lm_head.weight.dtype == dtype and not model.training
            with torch.no_grad():
                out = model.model.language_model(ids).last_hidden_state
            states[name, source] = out.float()
    assert isinstance(first_up_proj(model), decode.AdaptedLinear)
    assert first_up_proj(model).down.dtype == torch.float32
    for k, source in enumerate(("toy", str(first), str(second))):
        gap = (states["apart", source] - states["merged", source]).abs().mean()
        for other in ("toy", str(first), str(second))[:k]:
            moved = (states["merged", source] - states["merged", other]).abs().mean()
            assert gap < 0.2 * moved, (source, other)


def test_a_merge_says_what_bfloat16_loses(tmp_path, capsys):
    folder = small_adapter(tmp_path)
    checkpoints.main([str(folder), str(tmp_path / "whole")])
    assert "keeps" not in capsys.readouterr().err
    weights = load_file(tmp_path / "whole" / "model.safetensors")
    assert weights["lm_head.weight"].dtype == torch.float32
    checkpoints.main([str(folder), str(tmp_path / "half"), "--dtype", "bfloat16"])
    said = capsys.readouterr().err
    rounded = load_file(tmp_path / "half" / "model.safetensors")
    assert rounded["lm_head.weight"].dtype == torch.bfloat16

    # the same by hand, from the three files
    base = gotr1.load_policy("toy")[0].state_dict()
    kept, whole = 0.0, 0.0
    for name, value in base.items():
        if "q_proj" in name and "language" in name or "up_proj" in name:
            change = (weights[name] - value).double()
            kept += (change * (rounded[name].double() - value.bfloat16().double())).sum()
            whole += (change * change).sum()
    share = (kept / whole).item()
    assert f"bfloat16 keeps {share:.0%} of what the adapter changed" in said
    # a model that is no adapter is written as it always was
    checkpoints.main(["toy", str(tmp_path / "toy")])
    weights = load_file(tmp_path / "toy" / "model.safetensors")
    assert weights["lm_head.weight"].dtype == torch.bfloat16


def test_an_adapter_of_another_kind_is_merged_or_refused(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
    adapted = peft.get_peft_model(gotr1.load_policy("toy")[0], config)
    adapted.peft_config["default"].base_model_name_or_path = "toy"
    adapted.save_pretrained(tmp_path / "dora")
    assert gotr1.load_policy(str(tmp_path / "dora"))[0].lm_head.weight.dtype == torch.float32
    with pytest.raises(ValueError, match="merge it first: python -m engine.checkpoints"):
        gotr1.load_policy(str(tmp_path / "dora"), dtype=torch.bfloat16)


def test_the_tokenizer_keeps_spaces_and_bos_is_there_once(folder):
    put_weights(folder, "safetensors", golden_weights())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "LlamaTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    model, tokenizer = gotr1.load_policy(str(folder))
    tokens = tokenizer.encode("a red cube", add_special_tokens=False)
    assert tokenizer.decode(tokens) == "a red cube"
    bos, pad, boi = gotr1.special_ids(tokenizer)
    ids = FACTS["token_ids"]
    assert (bos, pad, boi) == (ids["bos"], ids["pad"], ids["begin_of_image"])
    for always in (True, False):
        tokenizer.add_bos_token = always
        assert gotr1.encode_prompt(tokenizer, "a red cube").count(bos) == 1
        assert bos not in gotr1.encode_chain(tokenizer, "A <|obj_start|>red cube<|obj_end|>")
    tokenizer.pad_token = tokenizer.eos_token  # as some checkpoints have it
    assert gotr1.special_ids(tokenizer)[1] == ids["pad"]


def without_markers(folder: Path) -> None:
    """Takes the markers out of a folder's tokenizer, as a base model has it."""
    data = json.loads((folder / "tokenizer.json").read_text())
    data["added_tokens"] = [t for t in data["added_tokens"] if t["content"] not in MARKERS]
    for token in set(MARKERS) & set(data["model"]["vocab"]):
        del data["model"]["vocab"][token]
    (folder / "tokenizer.json").write_text(json.dumps(data))
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "special_tokens_map.json").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("form", "spare"), [("deepseek", 0), ("transformers", 8)], ids=["it grows", "rows enough"]
)
def test_missing_markers_are_added_in_the_official_order(folder, capsys, form, spare, monkeypatch):
    """As the official processor adds them (gogoduan/GoT-R1, src/processor/processor.py): with other
    ids the chains of released weights could not be read."""
    without_markers(folder)
    config = golden_config()
    rows = 414 + spare
    config.text_config.vocab_size = rows
    use_config(monkeypatch, config)
    tensors = golden_weights()
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], tensors[name]])[:rows].clone()
    if form == "deepseek":
        put_weights(folder, "safetensors", tensors)
    else:
        model = JanusForConditionalGeneration(config)
        model.load_state_dict(gotr1.convert_deepseek(tensors), strict=True)
        model.save_pretrained(folder)
    model, tokenizer = gotr1.load_policy(str(folder))
    assert "4 markers added" in capsys.readouterr().err
    official = ["<|box_start|>", "<|box_end|>", "<|obj_start|>", "<|obj_end|>"]
    for token_id, marker in enumerate(official, start=414):
        assert tokenizer.encode(marker, add_special_tokens=False) == [token_id]
    assert len(tokenizer) == 418 and model.get_input_embeddings().weight.shape[0] == max(418, rows)
    assert model.lm_head.weight.shape[0] == max(418, rows)
    assert not torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)


def test_an_adapter_keeps_the_ids_that_it_was_trained_with(tmp_path):
    """Here in the order that we once added them in, on a base that has none."""
    shutil.copytree(checkpoints.TOY, tmp_path / "base")
    without_markers(tmp_path / "base")
    adapter = small_adapter(tmp_path, base=str(tmp_path / "base"))
    assert gotr1.load_policy(str(adapter))[1].convert_tokens_to_ids("<|box_start|>") == 341
    gotr1.load_policy("toy")[1].save_pretrained(adapter)
    assert gotr1.load_policy(str(adapter))[1].convert_tokens_to_ids("<|obj_start|>") == 341


def test_the_toys_tokenizer_made_from_nothing_has_the_ids_of_the_shipped_one(policy):
    assert toy_model.build_tokenizer().get_vocab() == policy[1].get_vocab()


LAYER = "language_model.model.layers.9.mlp.up_proj.weight"
EMBEDDING = "model.generation_embeddings.weight"


def test_whatever_does_not_fit_is_named(folder):
    shape = r"generation_embeddings.weight is \(3, 8\), config.json says \(64, 8\)"
    cases = [
        ("language_model.extra", torch.zeros(1), "language_model.extra is no tensor"),
        ("gen_embed.weight", None, f"lacks 1 tensors, for instance {EMBEDDING}"),
        ("gen_embed.weight", torch.zeros(3, 8), shape),
        (LAYER, torch.zeros(1), "layers.9.mlp.up_proj.weight has no place"),
    ]
    for name, value, message in cases:
        tensors = golden_weights()
        tensors[name] = value
        if value is None:
            del tensors[name]
        put_weights(folder, "safetensors", tensors)
        with pytest.raises(ValueError, match=message):
            gotr1.load_policy(str(folder))


def test_a_folder_of_transformers_that_does_not_fit_is_named(golden, tmp_path):
    """transformers itself would warn and go on with random weights."""
    model, tokenizer = golden
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[EMBEDDING]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"does not fit its config.json: {EMBEDDING}"):
        gotr1.load_policy(str(tmp_path))


@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_a_truncated_file_is_named(folder, form):
    put_weights(folder, form, golden_weights())
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
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        next(checkpoints.read_tensors(tmp_path))
