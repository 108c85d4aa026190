"""A sampler, a reference or a resumed policy that is not the policy which is trained stops the run.
pytest tests/test_drift.py"""

import json
import math
import shutil

import pytest
import torch
from test_decode import Tape

import gotr1
import train_grpo
from engine import checkpoints, decode, run, trainer

SMALL = "--batch_size 1 --group 4 --eval_prompts 2 --lr 1e-3 --warmup 0 --max_chain 70".split()


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Evaluations and curves take longer than the steps."""
    monkeypatch.setattr(train_grpo, "look", lambda *args, **kwargs: None)
    monkeypatch.setattr(train_grpo, "summarise_run", lambda training: None)
    monkeypatch.setattr(run.Log, "plot", lambda *args: None)


def start(tmp_path, steps: int, *flags) -> list[dict]:
    """A short run; the rows of its log."""
    folder = tmp_path / "run"
    train_grpo.main([*SMALL, "--steps", str(steps), "--out", str(folder), *flags])
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def logged(tmp_path) -> int:
    return len((tmp_path / "run" / "log.jsonl").read_text().splitlines())


# What is summed, and what is too much


def drift_of(gap, mask, n_images: int) -> list[float]:
    drifts = train_grpo.Drifts(torch.device("cpu"))
    for rows in (slice(0, 1), slice(1, 3)):
        logp = torch.zeros(3, 5)[rows]
        drifts.add(logp, gap[rows], None, mask[rows], n_images)
    return drifts.means()


def test_drift_is_a_mean_over_the_trained_tokens_of_each_kind():
    gap = torch.tensor([[0.1, -0.3, 9, 0.5, 0.5], [9, 9, 9, 9, 9], [0.2, 9, 9, -0.5, 0.1]])
    mask = torch.tensor([[1.0, 1, 0, 1, 1], [0, 0, 0, 0, 0], [1, 0, 0, 1, 1]])
    assert drift_of(gap, mask, 2) == pytest.approx([0.6 / 3, 1.6 / 4])
    assert drift_of(gap, torch.zeros(3, 5), 2) == [0, 0]


@pytest.mark.parametrize("drift", [0.3, math.nan, math.inf])
def test_too_much_names_the_kind(drift):
    train_grpo.check_drift(0.1, 0.2, 0.2, 0.2)
    with pytest.raises(RuntimeError, match="of text tokens"):
        train_grpo.check_drift(drift, 0.1, 0.2, 0.2)
    with pytest.raises(RuntimeError, match="of image tokens"):
        train_grpo.check_drift(0.1, drift, 0.2, 0.2)


def limits(**flags) -> tuple[float, float]:
    return train_grpo.drift_limits(train_grpo.Config(**flags))


def test_limits_know_precision_guidance_and_temperature():
    assert limits() == limits(logp="guided", cfg=5.0) == (1e-3, 1e-3)
    assert limits(dtype="bfloat16", cfg=5.0) == (0.2, 0.2)
    text, image = limits(dtype="bfloat16", cfg=5.0, logp="guided")
    assert text == 0.2 and image == pytest.approx(0.2 * math.sqrt(5**2 + 4**2))
    assert limits(dtype="bfloat16", temperature=0.5) == (0.4, 0.4)
    assert limits(dtype="bfloat16", temperature=2.0) == (0.2, 0.2)


def test_rounding_errors_grow_with_guidance_as_the_limit_says():
    """Two passes over the same logits, each rounded to bfloat16."""
    generator = torch.Generator().manual_seed(0)
    cond, uncond = 16 + 8 * torch.rand(2, 4000, 64, generator=generator)

    def error(cfg: float) -> float:
        exact = gotr1.guide(torch.cat([cond, uncond]), cfg)[1]
        halves = torch.cat([cond, uncond]).bfloat16().float()
        return (gotr1.guide(halves, cfg)[1] - exact).std().item()

    growth = error(5.0) / error(1.0)
    allowed = limits(dtype="bfloat16", cfg=5.0, logp="guided")[1] / 0.2
    assert growth == pytest.approx(allowed, rel=0.03)


# What it has to catch


def test_a_healthy_run_with_an_adapter_stays_far_below_the_limit(tmp_path):
    rows = start(tmp_path, 3, "--lora", "4", "--save_every", "2")
    drifts = [row[key] for row in rows for key in ("drift_text", "drift_image")]
    assert 0 <= max(drifts) < 5e-5
    assert (tmp_path / "run" / "step_000002" / "probe.pt").is_file()


def test_a_rollout_without_the_adapter_is_seen_at_step_5(tmp_path, monkeypatch):
    engines = []
    load, rollout = trainer.load_engine, gotr1.rollout

    def loading(*args, **kwargs):
        engines.append(load(*args, **kwargs))
        return engines[0]

    def forgetting(*args, seed, **kwargs):
        if seed != (0, 5):  # of the rollout in step 5
            return rollout(*args, seed=seed, **kwargs)
        with engines[0].lora.disable_adapter():
            return rollout(*args, seed=seed, **kwargs)

    monkeypatch.setattr(trainer, "load_engine", loading)
    monkeypatch.setattr(gotr1, "rollout", forgetting)
    with pytest.raises(RuntimeError, match="not the one that was recorded"):
        start(tmp_path, 7, "--lora", "4")
    assert logged(tmp_path) == 5


def test_a_reference_with_the_adapter_on_is_seen_after_the_first_update(tmp_path, monkeypatch):
    def with_adapter(self, batch, **settings):
        with torch.no_grad():
            return self.wrapped(self.token_logps, batch, **settings)

    monkeypatch.setattr(trainer.Engine, "score_reference", with_adapter)
    with pytest.raises(RuntimeError, match="the reference is the policy itself"):
        start(tmp_path, 3, "--lora", "4")
    assert logged(tmp_path) == 1


class Addresses(Tape):
    """A tape that, as a CUDA graph, knows addresses: a weight that moves elsewhere is still read
    where it was."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(function, types, args, kwargs)
        function, args, kwargs, result = self.operations.pop()

        def at(leaf):
            return leaf.detach() if torch.is_tensor(leaf) else leaf

        args, kwargs = torch.utils._pytree.tree_map(at, (args, kwargs))
        self.operations.append((function, args, kwargs, result))
        return result


@pytest.mark.parametrize("stale", [False, True])
def test_a_graph_that_reads_weights_where_they_were_is_seen(tmp_path, monkeypatch, stale):
    """Weights move before each update, and the graphs are not recorded anew. With `stale` False
    they stay: the same graphs serve, and nothing is wrong."""

    def record(step, decoder):
        tape = Addresses()
        with tape:
            step()
        return tape.replay

    step = trainer.Engine.step

    def moving(self, *args):
        if stale:
            for parameter in self.parameters:
                parameter.data = parameter.data.clone()
        return step(self, *args)

    monkeypatch.setitem(decode.CAPTURE, "cpu", record)
    monkeypatch.setattr(decode, "fingerprint", lambda model: "always the same")
    monkeypatch.setattr(trainer.Engine, "step", moving)
    if stale:
        with pytest.raises(RuntimeError, match="not the one that was recorded"):
            start(tmp_path, 3)
        assert logged(tmp_path) == 1, "it is seen as soon as there has been an update"
    else:
        assert len(start(tmp_path, 2)) == 2
    decode.KEPT.clear()


def test_a_resumed_run_that_loaded_other_weights_is_seen(tmp_path):
    start(tmp_path, 2)
    saved = tmp_path / "run" / "step_000002"
    start(tmp_path, 2)  # nothing is left to do, and the weights are right
    shutil.copy(checkpoints.TOY / "model.safetensors", saved)
    with pytest.raises(RuntimeError, match="step_000002 was not loaded as it was saved"):
        start(tmp_path, 2)
    (saved / "probe.pt").unlink()  # as of a run that was killed just before
    start(tmp_path, 2)
