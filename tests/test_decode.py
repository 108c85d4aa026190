"""The decode step. Authorities: transformers' own layers, and a stand-in for CUDA graphs that
replays recorded tensor operations, so that a step which depends on a value of the host is caught
without a GPU. pytest tests/test_decode.py"""

import copy
import gc
import weakref
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import JanusForConditionalGeneration
from transformers.initialization import no_init_weights

import gotr1
from engine import checkpoints, decode
from engine.trainer import LINEAR, round_once, trainable_parameters

PROMPTS = [
    "a red ball left of a blue cube",
    "a green cone",
    "a cyan cube above a purple cone and left of a red ball",
]
FIELDS = ("chain_ids", "chain_lens", "image_tokens", "mask", "logp", "entropy", "forced")
# what makes a GPU wait, or copies a number from the host: neither can be captured
HOST = (
    "_local_scalar_dense",
    "lift_fresh",
    "scalar_tensor",
    "nonzero",
    "masked_select",
    "_unique",
    "index.Tensor",
)


class Tape(TorchDispatchMode):
    """Records tensor operations with their arguments. `replay` runs them again on the same memory,
    as a CUDA graph does: whatever Python computed while recording stays as it was."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert not any(name in str(function) for name in HOST), f"{function} needs the host"
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)]
        assert all(tensor.dim() for tensor in tensors), f"{function} takes a number of the host"
        result = function(*args, **kwargs)
        self.operations.append((function, args, kwargs, result))
        return result

    def replay(self):
        for function, args, kwargs, recorded in self.operations:
            result = function(*args, **kwargs)
            for old, new in zip(tree_leaves(recorded), tree_leaves(result), strict=True):
                # views and in-place operations are where they were
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def tapes(monkeypatch):
    """Rollouts on the CPU take the path of the GPU: buckets of 128, graphs, the question for the
    end seldom."""
    made = []

    def record(step, decoder):
        tape = Tape()
        with tape:
            step()
        made.append(tape)
        return tape.replay

    monkeypatch.setitem(decode.CAPTURE, "cpu", record)
    yield made
    decode.KEPT.clear()


def assert_same(one, other):
    assert one.chains == other.chains
    for name in FIELDS:
        gap = (getattr(one, name).float() - getattr(other, name).float()).abs()
        assert (gap <= (1e-4 if name in ("logp", "entropy") else 0)).all(), name


def both_ways(policy, monkeypatch, prompts, group, **settings):
    """The same rollout through recorded steps and through steps that run as they are, in buffers of
    their own."""
    recorded = gotr1.rollout(*policy, prompts, group, **settings)
    with monkeypatch.context() as context:
        context.setattr(decode, "CAPTURE", {})
        context.setattr(decode, "KEPT", weakref.WeakKeyDictionary())
        plain = gotr1.rollout(*policy, prompts, group, **settings)
        assert not decode.KEPT, "steps that run as they are keep nothing"
    return recorded, plain


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_layers_are_those_of_transformers(policy, dtype, tolerance):
    model = copy.deepcopy(policy[0]).to(dtype)
    rows = [gotr1.encode_prompt(policy[1], prompt) for prompt in PROMPTS]
    with torch.no_grad():
        hidden, cache, seen = decode.prefill(model, rows, pad=0)
        for k, ids in enumerate(rows):
            want = model.model.language_model(torch.tensor([ids]), use_cache=True)
            assert (hidden[k] - want.last_hidden_state[0, -1]).abs().max() < tolerance
            keys = want.past_key_values.layers[-1].keys[0]  # (heads, tokens, head_dim)
            assert (cache[0, -1, k, :, seen[k]] - keys).abs().max() < tolerance
    assert hidden.dtype == cache.dtype == dtype and torch.isfinite(cache).all()


@pytest.mark.parametrize(
    "cfg, temperature, mode", [(1.0, 1.0, "cond"), (3.0, 0.7, "cond"), (3.0, 0, "guided")]
)
def test_recorded_steps_give_the_same_tokens(policy, tapes, monkeypatch, cfg, temperature, mode):
    settings = {"cfg": cfg, "temperature": temperature, "logp_mode": mode, "max_chain": 80}
    recorded, plain = both_ways(policy, monkeypatch, PROMPTS, 2, seed=5, **settings)
    assert recorded.chain_lens.unique().numel() > 1
    assert len(recorded.chain_ids[0]) == recorded.chain_lens.max()
    assert_same(recorded, plain)
    steps = recorded.mask.shape[1]
    assert 2 <= len(tapes) <= 4 < steps, "one tape for text and image in each bucket of 128"
    columns = max(map(len, recorded.prompt_ids)) + steps - 1
    # columns that were filled after the last chain's end are used again
    assert decode.KEPT[policy[0]].used == columns


def test_tapes_serve_later_rollouts_and_their_weights(policy, tapes, monkeypatch):
    """Other prompts and numbers, and weights that an optimizer changed in place: nothing is
    recorded again, nothing of the rollout before shows, and nothing of it changes."""
    policy = copy.deepcopy(policy[0]), policy[1]
    settings = {"cfg": 2.0, "max_chain": 80}
    first = gotr1.rollout(*policy, PROMPTS, 2, seed=1, **settings)
    before, count = copy.deepcopy(first), len(tapes)
    decode.KEPT[policy[0]].cache.fill_(torch.nan)  # as a model that diverged would leave it
    with torch.no_grad():
        for parameter in trainable_parameters(policy[0]):
            parameter.mul_(1.02)
    recorded, plain = both_ways(policy, monkeypatch, [PROMPTS[1]] * 3, 2, seed=2, **settings)
    assert len(tapes) == count
    assert_same(recorded, plain)
    assert_same(first, before)


def test_new_weights_are_recorded_anew(policy, tapes, monkeypatch):
    """Weights at other addresses (as after `.to`, or a load), other settings, more room: the old
    graphs are void."""
    policy = copy.deepcopy(policy[0]), policy[1]
    gotr1.rollout(*policy, PROMPTS[:1], 2, max_chain=40)
    old = decode.KEPT[policy[0]]
    weight = policy[0].model.language_model.layers[2].mlp.up_proj.weight
    weight.data = weight.data * 0.5
    recorded, plain = both_ways(policy, monkeypatch, PROMPTS[:1], 2, max_chain=40)
    assert decode.KEPT[policy[0]] is not old
    assert_same(recorded, plain)
    for change in ({"temperature": 0.5}, {"cfg": 2.0}, {"max_chain": 300}):
        old = decode.KEPT[policy[0]]
        settings = {"max_chain": 40, **change}
        recorded, plain = both_ways(policy, monkeypatch, PROMPTS[:1], 2, **settings)
        assert decode.KEPT[policy[0]] is not old, change
        assert_same(recorded, plain)


def test_forced_given_and_undrawn_chains_on_tapes(policy, tapes, monkeypatch):
    recorded, plain = both_ways(policy, monkeypatch, PROMPTS, 2, max_chain=20, cfg=2.0)
    assert recorded.forced.any()
    assert_same(recorded, plain)
    chains = ["A red ball.", "A <|obj_start|>green cone<|obj_end|>", "Two things"]
    assert_same(*both_ways(policy, monkeypatch, PROMPTS, 2, chains=chains, cfg=2.0))
    recorded, plain = both_ways(policy, monkeypatch, PROMPTS, 2, max_chain=60, draw=False)
    assert recorded.image_tokens.shape == (6, 0)
    assert_same(recorded, plain)


def adapted(model, targets=LINEAR, rank=4, alpha=12.0, size=0.05, seed=0):
    """A copy of the model with a LoRA adapter that changes what it says -> the PeftModel."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)
    wrapped = get_peft_model(copy.deepcopy(model), config, autocast_adapter_dtype=True)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=size)
    return wrapped.eval()


@pytest.mark.parametrize("targets", [LINEAR, ["q_proj", "v_proj", "up_proj"], ["down_proj"]])
def test_shared_products_of_adapters_are_peft_s_own_forward(policy, targets):
    """Hidden states, and with them keys and values, to 1e-6 of their size; some layers without an
    adapter."""
    rows = [gotr1.encode_prompt(policy[1], prompt) for prompt in PROMPTS]
    model = adapted(policy[0], targets).base_model.model
    with torch.no_grad():
        base = decode.prefill(policy[0], rows, pad=0)[0]
        hidden, _, _ = decode.prefill(model, rows, pad=0)
        for k, ids in enumerate(rows):
            want = model.model.language_model(torch.tensor([ids])).last_hidden_state[0, -1]
            assert (hidden[k] - want).norm() < 1e-6 * want.norm()
            assert (hidden[k] - base[k]).norm() > 0.01 * want.norm(), "the adapter does nothing"
    layer = model.model.language_model.layers[0]
    layers = [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]
    x = torch.randn(3, 1, layers[0].in_features)
    with torch.no_grad():
        ours = decode.project(layers, x, decode.low_rank(layers))
        for module, given in zip(layers, ours, strict=True):
            assert (given - module(x)).norm() < 1e-6 * given.norm()


def test_a_rollout_with_an_adapter_has_the_tokens_of_peft_s_forward(policy, monkeypatch):
    model = adapted(policy[0]).base_model.model
    ours = gotr1.rollout(model, policy[1], PROMPTS, 2, cfg=2.0, max_chain=60)
    with monkeypatch.context() as context:
        context.setattr(decode, "low_rank", lambda layers: None)  # every layer's own forward
        theirs = gotr1.rollout(model, policy[1], PROMPTS, 2, cfg=2.0, max_chain=60)
    assert_same(ours, theirs)
    assert ours.chains != gotr1.rollout(*policy, PROMPTS, 2, cfg=2.0, max_chain=60).chains


def test_tapes_see_what_the_optimizer_does_to_an_adapter(policy, tapes, monkeypatch):
    """The A of several layers lie in one copy, which has to follow them; here on top of an adapter
    that stays beside its base, so that B is a copy as well."""
    wrapped = round_once(adapted(frozen_copy(policy[0])))
    model = wrapped.base_model.model
    gotr1.rollout(model, policy[1], PROMPTS, 2, max_chain=40)
    count = len(tapes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.3)
    recorded, plain = both_ways((model, policy[1]), monkeypatch, PROMPTS, 2, max_chain=40)
    assert len(tapes) == count, "recorded anew: this test proves nothing"
    assert_same(recorded, plain)
    with wrapped.disable_adapter():  # what is left is the loaded one
        off, plain = both_ways((model, policy[1]), monkeypatch, PROMPTS, 2, max_chain=40)
        assert_same(off, plain)
    assert_same(off, gotr1.rollout(frozen_copy(policy[0]), policy[1], PROMPTS, 2, max_chain=40))
    assert off.chains != recorded.chains


def frozen_copy(model):
    return checkpoints.keep_apart(adapted(model, seed=1), folder="")


class Kernels(TorchDispatchMode):
    """Counts the operations that compute something: views of memory that is there are free."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        is_view = False
        for returned in function._schema.returns:
            if returned.alias_info is not None and not returned.alias_info.is_write:
                is_view = True
        name = str(function)
        if not is_view and "_unsafe_view" not in name and "empty" not in name:
            self.count += 1
        return function(*args, **(kwargs or {}))


def test_kernels_of_a_decoding_step(policy, monkeypatch, capsys):
    """As docs/gpu.md has them: 30 layers like Janus-Pro-7B's, bfloat16, one image step."""
    config = copy.deepcopy(policy[0].config)
    config.text_config.num_hidden_layers = 30
    with no_init_weights():
        base = JanusForConditionalGeneration(config).eval().to(torch.bfloat16)
    counts = {}
    for name in ("base", "adapter, peft's forward", "adapter"):
        model = base
        if name != "base":
            model = adapted(base, alpha=4.0).base_model.model
        with monkeypatch.context() as context, torch.no_grad():
            if name == "adapter, peft's forward":
                context.setattr(decode, "low_rank", lambda layers: None)
            # one kernel on a GPU, seven operations on a CPU
            context.setattr(decode.F, "rms_norm", lambda x, *rest, **settings: x * 1)
            how = gotr1.Sampling(cfg=5.0, temperature=1.0, logp_mode="cond", pad=0, boi=1)
            decoder = decode.Decoder(model, 2, rows=4, columns=8, images=8, settings=how)
            with Kernels() as kernels:
                gotr1.image_step(model, decoder, width=4)
        counts[name] = kernels.count
    with capsys.disabled():
        print(f"\nkernels per image step, 30 layers: {counts}", end="")
    text = (Path(__file__).parent.parent / "docs" / "gpu.md").read_text(encoding="utf-8")
    for name, count in counts.items():
        assert f"| {name} | {count:,} |" in text
    assert counts["adapter"] < 0.8 * counts["adapter, peft's forward"]


def test_a_merged_adapter_is_not_replayed_as_an_unmerged_one(policy):
    wrapped = adapted(policy[0])
    model = wrapped.base_model.model
    prints = {decode.fingerprint(model)}
    with wrapped.disable_adapter():
        prints.add(decode.fingerprint(model))
    wrapped.merge_adapter()
    prints.add(decode.fingerprint(model))
    assert len(prints) == 3


def test_buffers_go_with_their_model(policy, tapes):
    decode.KEPT.clear()
    model = copy.deepcopy(policy[0])
    gotr1.rollout(model, policy[1], PROMPTS[:1], 2, max_chain=20)
    assert len(decode.KEPT) == 1
    del model
    tapes.clear()
    gc.collect()
    assert len(decode.KEPT) == 0


def test_the_stand_in_refuses_what_a_gpu_would_wait_for():
    values = torch.arange(3.0)
    asks = [
        lambda: values.sum().item(),
        lambda: values * torch.tensor([2.0]),
        lambda: values[values > 1],
        lambda: torch.where(values > 1, 0.0, values),
        lambda: values * values.sum(),
    ]
    for ask in asks:
        with pytest.raises(AssertionError), Tape():
            ask()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_cuda_graphs_give_the_tokens_of_eager_steps(policy, monkeypatch, cfg):
    policy = copy.deepcopy(policy[0]).cuda(), policy[1]
    for seed in (1, 2):  # the second time the graphs are there already
        assert_same(*both_ways(policy, monkeypatch, PROMPTS, 2, cfg=cfg, max_chain=80, seed=seed))
        assert len(decode.KEPT[policy[0]].graphs) >= 2


def test_bfloat16(policy):
    """Sampled in bfloat16, scored in bfloat16 by the training pass: what was recorded is near what
    is trained."""
    model = copy.deepcopy(policy[0]).to(torch.bfloat16)
    for mode in ("cond", "guided"):
        sampled = gotr1.rollout(model, policy[1], PROMPTS, 2, cfg=2.0, max_chain=80, logp_mode=mode)
        with torch.no_grad():
            gap = (gotr1.token_logps(model, sampled)[0] - sampled.logp).abs() * sampled.mask
        assert torch.isfinite(gap).all() and gap.sum() / sampled.mask.sum() < 0.05
        assert gotr1.decode_images(model, sampled.image_tokens)[0].size == (32, 32)


def test_training_mode_and_gradient_checkpointing_stay_out(policy):
    """transformers' layers drop the cache when they are called under gradient checkpointing."""
    model = copy.deepcopy(policy[0])
    want = gotr1.rollout(model, policy[1], PROMPTS[:1], 2, max_chain=40)
    model.gradient_checkpointing_enable()
    assert_same(gotr1.rollout(model.train(), policy[1], PROMPTS[:1], 2, max_chain=40), want)


def test_unused_parts_may_live_elsewhere(policy):
    """Image understanding without memory, the picture tokenizer in another dtype: only the language
    model's count."""
    model = copy.deepcopy(policy[0])
    want = gotr1.rollout(model, policy[1], PROMPTS[:1], 2, max_chain=40)
    model.model.vision_model.to("meta")
    model.model.aligner.to("meta")
    model.model.vqmodel.to(torch.bfloat16)
    sampled = gotr1.rollout(model, policy[1], PROMPTS[:1], 2, max_chain=40)
    assert_same(sampled, want)
    images = gotr1.decode_images(model, sampled.image_tokens)
    assert gotr1.encode_images(model, images).shape == sampled.image_tokens.shape


@pytest.mark.parametrize("cfg, max_chain", [(3.0, 80), (1.0, 20)])
def test_the_straightforward_loop_gives_the_same_tokens(policy, cfg, max_chain):
    """Both sides of the benchmark draw the same samples from the same random numbers."""
    sampled = gotr1.rollout(*policy, PROMPTS[:1], 3, cfg=cfg, max_chain=max_chain, seed=4)
    images = sampled.image_tokens.shape[1]
    u = gotr1.uniforms(4, [0], 3, images + max_chain)
    for k in range(3):
        plain = gotr1.plain_rollout(*policy, PROMPTS[0], cfg, u[k : k + 1], max_chain)
        chain_ids = sampled.chain_ids[k, : sampled.chain_lens[k]]
        assert torch.equal(plain["chain_ids"][0], chain_ids)
        assert torch.equal(plain["image_tokens"][0], sampled.image_tokens[k])
