"""The policy: prompt, rollout, log-probs, pictures. Authorities: transformers' own forward pass and
counting. pytest tests/test_gotr1.py"""

import copy
import math

import numpy as np
import pytest
import torch

import gotr1
from toy import world as toy

PROMPTS = [
    "a red ball left of a blue cube",
    "a green cone",
    "a cyan cube above a purple cone and left of a red ball",
]


def plain_logits(model, ids, image_tokens):
    """(L - 1, V) and (N, V): logits of the text after its first token and of the picture, by one
    ordinary forward pass of the bare sequence: no cache, no padding, no mask."""
    picture = model.prepare_embeddings_for_image_generation(image_tokens[None])
    embeds = torch.cat([model.get_input_embeddings()(torch.tensor([ids])), picture], dim=1)
    hidden = model.model.language_model(inputs_embeds=embeds).last_hidden_state[0]
    text = model.lm_head(hidden[: len(ids) - 1])
    return text, model.model.generation_head(hidden[len(ids) - 1 : -1])


def logp_of(logits, tokens):
    """(N, V) and (N,) -> (N,)"""
    return logits.log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)


def text_of(sampled, n):
    """Token ids of prompt and chain of sample n."""
    return sampled.prompt_ids[n] + sampled.chain_ids[n, : sampled.chain_lens[n]].tolist()


def blank_text(tokenizer, size):
    """What the unconditional half reads in place of `size` tokens."""
    bos, pad, boi = gotr1.special_ids(tokenizer)
    return [bos] + [pad] * (size - 2) + [boi]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0])
def test_sampled_logps_equal_a_plain_forward_pass(policy, temperature):
    model, tokenizer = policy
    sampled = gotr1.rollout(
        model, tokenizer, PROMPTS, 2, temperature=temperature, max_chain=80, seed=5
    )
    scored, mask = gotr1.token_logps(model, sampled, chunk=50)
    images = sampled.image_tokens.shape[1]
    assert 6 * images > 7 * 50, "one chunk would not show where the next one begins"
    for n in range(6):
        size = int(sampled.chain_lens[n])
        ids = text_of(sampled, n)
        text, image = plain_logits(model, ids, sampled.image_tokens[n])
        text = logp_of(text / (temperature or 1.0), torch.tensor(ids[1:]))[-size:]
        image = logp_of(image / (temperature or 1.0), sampled.image_tokens[n])
        for logp in (sampled.logp, scored):
            assert (logp[n, -images:] - image).abs().max() < 1e-4
            assert ((logp[n, :size] - text) * mask[n, :size]).abs().max() < 1e-4
        assert mask[n].sum() == size + images - int(sampled.forced[n])


def test_guided_distribution_is_the_one_written_down(policy):
    """u + cfg * (c - u), computed from two plain passes: the conditional row and bos, pads,
    <begin_of_image>, image."""
    model, tokenizer = policy
    sampled = gotr1.rollout(
        model, tokenizer, PROMPTS[:1], 1, cfg=3.0, max_chain=80, logp_mode="guided"
    )
    ids = text_of(sampled, 0)
    (tokens,) = sampled.image_tokens
    _, cond = plain_logits(model, ids, tokens)
    _, uncond = plain_logits(model, blank_text(tokenizer, len(ids)), tokens)
    guided = logp_of(uncond + 3.0 * (cond - uncond), tokens)
    cond = logp_of(cond, tokens)
    images = len(tokens)
    assert (sampled.logp[0, -images:] - guided).abs().max() < 1e-4
    for mode, want in (("guided", guided), ("cond", cond)):
        scored, _ = gotr1.token_logps(model, sampled, mode)
        assert (scored[0, -images:] - want).abs().max() < 1e-4
    assert (cond - guided).abs().max() > 0.01, "guidance changed nothing: this proves nothing"


def test_no_gradient_through_the_unconditional_half(policy, monkeypatch):
    """That of the head is the one with the unconditional logits as constants; and no graph of that
    half is kept, which would take as much memory again."""
    model, tokenizer = copy.deepcopy(policy[0]), policy[1]
    sampled = gotr1.rollout(
        model, tokenizer, PROMPTS[:1], 1, cfg=3.0, max_chain=60, logp_mode="guided"
    )
    states = []
    hidden_states = gotr1.hidden_states

    def remember(*args, **settings):
        states.append(hidden_states(*args, **settings))
        return states[-1]

    monkeypatch.setattr(gotr1, "hidden_states", remember)
    logp, _ = gotr1.token_logps(model, sampled)
    (_, cond), (_, uncond) = states
    assert cond.requires_grad
    assert not uncond.requires_grad
    images = sampled.image_tokens.shape[1]
    head = model.model.generation_head
    weights = list(head.parameters())
    found = torch.autograd.grad(logp[:, -images:].sum(), weights)
    constant = head(uncond).detach()
    guided = constant + 3.0 * (head(cond.detach()) - constant)
    picked = guided.log_softmax(-1).gather(2, sampled.image_tokens[..., None])
    for a, b in zip(found, torch.autograd.grad(picked.sum(), weights), strict=True):
        assert (a - b).abs().max() < 1e-4 * b.abs().max()


def test_rows_without_condition_are_scored_on_pads_and_their_text_is_masked(policy):
    """Condition dropout in SFT: row 0 is [bos, pads, <begin_of_image>, image] to the model."""
    model, tokenizer = policy
    sampled = gotr1.rollout(model, tokenizer, PROMPTS[:2], 1, max_chain=60, seed=5)
    images = sampled.image_tokens.shape[1]
    before = copy.deepcopy(sampled)
    with torch.no_grad():
        logp, mask = gotr1.token_logps(model, sampled, blank=torch.tensor([True, False]))
        text = blank_text(tokenizer, size=len(text_of(sampled, 0)))
        _, logits = plain_logits(model, text, sampled.image_tokens[0])
    want = logp_of(logits, sampled.image_tokens[0])
    assert (logp[0, -images:] - want).abs().max() < 1e-4
    assert not mask[0, :-images].any(), "a row without condition learns its text"
    assert not logp[0, :-images].any()
    for name, value in vars(before).items():  # the rollout itself is not changed
        assert not torch.is_tensor(value) or torch.equal(value, getattr(sampled, name)), name
    assert torch.equal(mask[1], sampled.mask[1])
    assert ((logp[1] - sampled.logp[1]) * mask[1]).abs().max() < 1e-4


def test_given_samples_are_trained_to_the_end_of_their_chain_and_no_further(policy):
    batch = gotr1.Rollout.from_data(
        policy[1], [[1], [1, 2]], [[5, 6, 7], [5, 7]], torch.zeros(2, 2, dtype=torch.long)
    )
    assert batch.mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 1, 1]]


def test_parts_are_joined_as_if_all_had_been_drawn_together(policy):
    """`at_once` changes memory, not samples; `each` sees every part."""
    model, tokenizer = copy.deepcopy(policy[0]).double(), policy[1]
    together = gotr1.rollout(model, tokenizer, PROMPTS, 2, cfg=2.0, max_chain=80, seed=(3, 1))
    seen = []

    def each(first, part):
        seen.append((first, part.chains))

    parts = gotr1.rollout(
        model, tokenizer, PROMPTS, 2, cfg=2.0, max_chain=80, seed=(3, 1), at_once=2, each=each
    )
    assert parts.chains == together.chains
    assert seen == [(0, together.chains[:4]), (2, together.chains[4:])]
    for name in ("chain_ids", "chain_lens", "image_tokens", "mask", "forced"):
        assert torch.equal(getattr(parts, name), getattr(together, name)), name
    assert (parts.logp - together.logp).abs().max() < 1e-5


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_a_batch_equals_single_runs(policy, cfg):
    """Prompts and chains of different lengths: left padding, waiting rows and the shared prompt
    must not show. In float64: in float32, two nearly equal candidates may change places."""
    model, tokenizer = copy.deepcopy(policy[0]).double(), policy[1]
    together = gotr1.rollout(model, tokenizer, PROMPTS, 2, cfg=cfg, max_chain=80, seed=(3, 1))
    assert together.chain_lens.unique().numel() > 1
    for b, prompt in enumerate(PROMPTS):
        alone = gotr1.rollout(
            model, tokenizer, [prompt], 2, cfg=cfg, max_chain=80, seed=(3, 1), indices=[b]
        )
        rows = together.select([2 * b, 2 * b + 1])
        assert alone.chains == rows.chains
        assert torch.equal(alone.image_tokens, rows.image_tokens)
        images = rows.image_tokens.shape[1]
        assert (alone.logp[:, -images:] - rows.logp[:, -images:]).abs().max() < 1e-5


def test_same_seed_same_samples_other_seed_others(policy):
    model, tokenizer = policy
    runs = []
    for seed in (1, 1, 2):
        runs.append(gotr1.rollout(model, tokenizer, PROMPTS[:1], 4, max_chain=60, seed=seed))
    assert runs[0].chains == runs[1].chains
    assert torch.equal(runs[0].image_tokens, runs[1].image_tokens)
    assert not torch.equal(runs[0].image_tokens, runs[2].image_tokens)
    numbers = gotr1.uniforms((0, 5), [3, 9], 4, 50)
    assert torch.equal(gotr1.uniforms((0, 5), [9], 4, 50), numbers[4:])
    assert numbers.unique().numel() > 390, "samples share random numbers"


def test_sampling_frequencies_match_the_probabilities():
    """Chi-square over 50,000 draws from 12 tokens, one impossible. A true sampler fails with
    probability 1e-4."""
    logits = torch.linspace(-3, 2, 12)
    logits[4] = -math.inf
    u = gotr1.uniforms(0, [0], 1, 50_000)[0]
    tokens, logp, entropy = gotr1.sample_token(logits.expand(len(u), -1), u, 0.8)
    probs = (logits / 0.8).softmax(0)
    counts = tokens.bincount(minlength=12).double()
    assert counts[4] == 0
    seen = probs > 0
    chi2 = ((counts[seen] - len(u) * probs[seen]) ** 2 / (len(u) * probs[seen])).sum()
    assert chi2 < 33.1  # 10 degrees of freedom... the 1 - 2.6e-4 quantile
    assert torch.allclose(logp, probs.log()[tokens], atol=1e-5)
    want = -(probs[seen] * probs[seen].log()).sum()
    assert entropy[0].item() == pytest.approx(want.item(), rel=1e-5)


@pytest.mark.parametrize("u, token", [(0.0, 1), (0.4999, 1), (0.5001, 3), (1 - 2**-24, 3)])
def test_sampling_at_the_edges_never_takes_an_impossible_token(u, token):
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]])
    assert gotr1.sample_token(logits, torch.tensor([u]), 1.0)[0].item() == token


def chain_without_end(model, tokenizer):
    """A copy of the model that can never sample <begin_of_image>."""
    model = copy.deepcopy(model)
    boi = gotr1.special_ids(tokenizer)[2]
    hidden = model.lm_head.register_forward_hook(
        lambda _, __, out: out.index_fill(-1, torch.tensor([boi]), -1e9)
    )
    return model, hidden


def test_a_forced_begin_of_image_is_not_trained(policy):
    model, tokenizer = policy
    endless, _ = chain_without_end(model, tokenizer)
    boi = gotr1.special_ids(tokenizer)[2]
    sampled = gotr1.rollout(endless, tokenizer, PROMPTS[:1], 2, max_chain=7)
    assert sampled.forced.all() and (sampled.chain_lens == 8).all()
    assert (sampled.chain_ids[:, 7] == boi).all()
    assert sampled.mask[:, :8].tolist() == [[1.0] * 7 + [0.0]] * 2
    logp, mask = gotr1.token_logps(endless, sampled)
    assert (logp[:, 7] == 0).all() and (mask[:, 7] == 0).all()


def test_the_stop_token_is_trained_and_what_follows_is_not_also_when_pad_is_eos(policy):
    """Masks go by place, not by token: with pad set to another token's id nothing may change."""
    model, tokenizer = policy
    sampled = gotr1.rollout(model, tokenizer, PROMPTS, 2, max_chain=80, seed=5)
    boi = gotr1.special_ids(tokenizer)[2]
    images = sampled.image_tokens.shape[1]
    text_mask = sampled.mask[:, :-images]
    for n, size in enumerate(sampled.chain_lens.tolist()):
        assert sampled.chain_ids[n, size - 1] == boi
        assert text_mask[n, size - 1] == 1, "the stop token learns nothing"
        assert text_mask[n, :size].all() and not text_mask[n, size:].any()
    scored, _ = gotr1.token_logps(model, sampled)
    for other in (tokenizer.eos_token_id, boi):
        swapped = gotr1.Rollout(**{**vars(sampled), "pad_id": other})
        assert torch.equal(gotr1.token_logps(model, swapped)[0], scored)


def test_given_chains_are_drawn_as_they_are_and_not_trained(policy):
    model, tokenizer = policy
    rng = np.random.default_rng(0)
    examples = [toy.make_example(rng, faults={}) for _ in range(2)]
    prompts, chains = [e.prompt for e in examples], [e.chain for e in examples]
    sampled = gotr1.rollout(model, tokenizer, prompts, 2, chains=chains, cfg=2.0)
    assert sampled.chains == [chains[0]] * 2 + [chains[1]] * 2
    images = sampled.image_tokens.shape[1]
    assert not sampled.mask[:, :-images].any() and sampled.mask[:, -images:].all()
    bos = gotr1.special_ids(tokenizer)[0]
    assert not (sampled.chain_ids == bos).any()
    assert [ids.count(bos) for ids in sampled.prompt_ids] == [1] * 4
    assert ((gotr1.token_logps(model, sampled)[0] - sampled.logp) * sampled.mask).abs().max() < 1e-4
    ended = [chain + "<begin_of_image>" for chain in chains]
    with_end = gotr1.rollout(model, tokenizer, prompts, 2, chains=ended, cfg=2.0)
    assert torch.equal(with_end.image_tokens, sampled.image_tokens)
    with pytest.raises(ValueError, match="a chain ends with <begin_of_image>, not before"):
        gotr1.encode_chain(tokenizer, "A red ball<begin_of_image> and more")


def test_a_prompt_that_does_not_fit_is_refused(policy):
    with pytest.raises(ValueError, match="tokens but this model holds 512"):
        gotr1.rollout(*policy, ["red " * 400], 1, max_chain=96)


def test_the_prompt_is_the_official_turn(policy):
    text = gotr1.format_prompt("a cat")
    task = "Follow the caption to generate an image through a chain of thought process"
    assert text == f"User: {task}: a cat\n\nAssistant:"
    ids = gotr1.encode_prompt(policy[1], "a cat")
    assert policy[1].decode(ids) == "<｜begin▁of▁sentence｜>" + text


def test_pictures_survive_encoding_and_decoding(policy):
    model, _ = policy
    rng = np.random.default_rng(1)
    examples = [toy.make_example(rng, faults={}) for _ in range(50)]
    tokens = gotr1.encode_images(model, [e.image for e in examples])
    images = gotr1.decode_images(model, tokens)
    assert tokens.shape == (50, 64) and images[0].size == (32, 32)
    right = [
        toy.faithfulness(e.prompt, toy.detect(image)) == 1
        for e, image in zip(examples, images, strict=True)
    ]
    assert sum(right) >= 48
    pixels = torch.stack([torch.from_numpy(np.array(e.image)).permute(2, 0, 1) for e in examples])
    assert torch.equal(gotr1.encode_images(model, pixels / 127.5 - 1), tokens)


def test_pixels_are_cut_off_not_rounded(policy):
    model = copy.copy(policy[0])
    model.decode_image_tokens = lambda tokens: torch.tensor([0.999, -1.2, 1.5]).expand(
        len(tokens), 2, 2, 3
    )
    (image,) = gotr1.decode_images(model, torch.zeros(1, 4, dtype=torch.long))
    assert image.getpixel((0, 0)) == (254, 0, 255)  # 254.87 becomes 254
