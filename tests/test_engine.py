"""What is trained and where it lies: every mode learns the same, resumes bitwise, and its
checkpoints are models.   pytest tests/test_engine.py"""

import json
import math
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch.distributed.tensor import DTensor

import gotr1
from engine import checkpoints, run, trainer
from evaluation import held_out
from toy.world import toy_prompts

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
PROMPTS = ["a red ball left of a blue cube", "a green cone and a yellow ball"]
MODES = {
    "plain": {},
    "checkpointing": {"gradient_checkpointing": True},
    "shards, checkpointing": {"gradient_checkpointing": True},
    "bfloat16": {"dtype": "bfloat16"},
    "lora": {"lora": 4},
    "lora, bfloat16": {"lora": 4, "dtype": "bfloat16", "gradient_checkpointing": True},
}


def make(name: str, saved: Path | None = None) -> trainer.Engine:
    """An engine on the toy, with its reference; or one that resumes from `saved`."""
    config = trainer.TrainerConfig(**MODES[name])
    with pytest.MonkeyPatch.context() as context:
        if name.startswith("shards"):  # as with several processes
            context.setattr(trainer, "is_sharded", lambda lora, dtype: True)
        engine = trainer.load_engine(config, CPU, gotr1.token_logps, "toy", saved)
    if not config.lora:
        trainer.load_reference(engine, "toy")
    return engine


@pytest.fixture(scope="module")
def sampled(policy):
    return gotr1.rollout(*policy, PROMPTS, group=3, max_chain=70, seed=1)


def train(engine, sampled, steps: int) -> list[float]:
    """Steps that make the samples 0 and 2 more likely and the others less; the norms."""
    signs = torch.tensor([1.0, -1, 1, -1, -1, -1])
    norms = []
    for _ in range(steps):
        for rows in ([0, 1, 2], [3, 4, 5]):
            logp, mask = engine.score(sampled.select(rows))
            engine.backward(-(logp * mask * signs[rows][:, None]).sum() / sampled.mask.sum())
        norms.append(engine.step(1e-3))
    return norms


def weights_of(engine) -> dict:
    return trainer.gather_on_rank_0(engine.model.state_dict())


def copy_of(engine) -> dict:
    return {name: value.clone() for name, value in weights_of(engine).items()}


def largest_gap(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)


@pytest.mark.parametrize("name", ["checkpointing", "shards, checkpointing"])
def test_shards_and_checkpointing_take_the_same_steps_as_the_plain_model(policy, sampled, name):
    plain, other = make("plain"), make(name)
    assert any(isinstance(p, DTensor) for p in other.parameters) == ("shards" in name)
    norms = train(plain, sampled, 3)
    assert train(other, sampled, 3) == pytest.approx(norms, rel=1e-5) and norms[0] > 0
    assert largest_gap(weights_of(plain), weights_of(other)) < 1e-6
    moved = largest_gap(weights_of(plain), policy[0].state_dict())
    assert moved > 1e-4, "nothing was trained"


def test_bfloat16_computes_in_bfloat16_and_keeps_float32(policy, sampled):
    """A step of 1e-6 is far below bfloat16's resolution; float32 masters remember it. The reference
    is rounded."""
    engine = make("bfloat16")
    before = copy_of(engine)
    loaded = policy[0].state_dict()
    assert largest_gap(before, loaded) == 0
    assert all(isinstance(p, DTensor) and p.dtype == torch.float32 for p in engine.parameters)
    for name, value in engine.reference.model.state_dict().items():
        if "vqmodel" not in name:  # nobody draws with the reference
            assert torch.equal(trainer.full(value), loaded[name].bfloat16()), name
    with engine.gathered() as model:
        weight = model.lm_head.weight
        assert weight.dtype == torch.bfloat16 and not isinstance(weight, DTensor)
    logp, mask = engine.score(sampled)
    engine.backward(-(logp * mask).mean())
    engine.step(1e-6, 1.0)
    moved = (weights_of(engine)["lm_head.weight"] - before["lm_head.weight"]).abs().max().item()
    assert 0 < moved < 2e-6
    gap = ((logp - gotr1.token_logps(policy[0], sampled)[0]) * mask).abs()
    assert 0 < gap.max() < 0.5 and gap.mean() < 0.02


@pytest.mark.parametrize("name", [name for name in MODES if name != "checkpointing"])
def test_a_checkpoint_continues_bitwise_and_is_a_model_beside_a_reference_that_stays(
    policy, sampled, name, tmp_path
):
    through = make(name)
    start = through.score(sampled)[0].detach()
    reference = through.score_reference(sampled)[0]
    assert torch.equal(start, reference) and not reference.requires_grad
    train(through, sampled, 2)
    through.save(tmp_path, 2)
    continued = make(name, tmp_path / "step_000002")
    assert continued.first_step == 2
    train(through, sampled, 2)
    train(continued, sampled, 2)
    assert largest_gap(weights_of(through), weights_of(continued)) == 0
    assert torch.equal(continued.score_reference(sampled)[0], reference)
    assert (continued.score(sampled)[0] - reference).abs().max() > 1e-3

    with continued.gathered() as model:
        trained = gotr1.token_logps(model, sampled)[0].detach()
    continued.save(tmp_path, 4)
    loaded = gotr1.load_policy(str(tmp_path / "step_000004"))[0]
    gap = (gotr1.token_logps(loaded, sampled)[0] - trained).abs()
    assert gap.max() < (0.5 if "bfloat16" in name else 1e-4)
    moved = (gotr1.token_logps(policy[0], sampled)[0] - trained).abs()
    assert gap.mean() < 0.2 * moved.mean(), "what was loaded is not what was trained"


def test_only_the_adapter_is_trained_it_is_saved_in_peft_s_format_and_merged_by_one_command(
    sampled, tmp_path, capsys
):
    engine = make("lora")
    before = copy_of(engine)
    train(engine, sampled, 2)
    after = weights_of(engine)
    assert all("lora_" in name or torch.equal(after[name], before[name]) for name in before)
    assert len(engine.parameters) == 4 * 7 * 2  # 4 layers, 7 linear maps, A and B
    engine.save(tmp_path, 2)
    saved = tmp_path / "step_000002"
    settings = json.loads((saved / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA" and settings["r"] == 4
    assert settings["base_model_name_or_path"] == "toy"
    assert len(safetensors.torch.load_file(saved / "adapter_model.safetensors")) == 56

    checkpoints.main([str(saved), str(tmp_path / "merged"), "--dtype", "float32"])
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    merged = gotr1.load_policy(str(tmp_path / "merged"))[0]
    gap = gotr1.token_logps(merged, sampled)[0] - engine.score(sampled)[0]
    assert gap.abs().max() < 1e-4
    with pytest.raises(SystemExit) as stop:
        checkpoints.main(["toy", str(tmp_path / "merged")])
    assert stop.value.code == 2 and "exists: name a new folder" in capsys.readouterr().err


def test_logits_exist_only_where_they_are_needed_and_only_in_chunks(sampled):
    """Every tensor that any operation makes, forward and backward: none with a vocabulary as its
    last dimension has more rows than a chunk."""
    from torch.utils._python_dispatch import TorchDispatchMode

    engine = make("plain")
    chunk = 16
    made = []  # shapes
    weights = set()
    for parameter in engine.parameters:
        weights.add(tuple(parameter.shape))
        weights.add(tuple(reversed(parameter.shape)))

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(result):
                if torch.is_tensor(tensor) and tensor.dim() > 1:
                    made.append(tuple(tensor.shape))
            return result

    with Recorder():
        logp, mask = engine.score(sampled, chunk=chunk)
        engine.backward((logp * mask).mean())
    vocabularies = (engine.model.lm_head.out_features, engine.model.config.vq_config.num_embeddings)
    logits = [shape for shape in made if shape[-1] in vocabularies and shape not in weights]
    rows = [math.prod(shape[:-1]) for shape in logits]
    assert len(rows) > 10 and max(rows) == chunk
    assert math.prod(logp.shape) > 10 * chunk


def test_a_gradient_that_is_zero_or_not_finite_changes_nothing(sampled):
    engine = make("plain")
    train(engine, sampled, 1)
    before = copy_of(engine)
    for factor in (0.0, float("nan"), float("inf")):
        logp, mask = engine.score(sampled)
        engine.backward((logp * mask).mean() * factor)
        assert not 0 < engine.step(1e-3) < float("inf")
        assert largest_gap(weights_of(engine), before) == 0
    assert train(engine, sampled, 1)[0] > 0 and largest_gap(weights_of(engine), before) > 0


def test_the_optimizer_gets_a_gradient_of_norm_1_at_most(sampled, monkeypatch):
    engine = make("plain")
    norms = []

    def look():
        gradients = [p.grad for p in engine.parameters if p.grad is not None]
        norms.append(torch.nn.utils.get_total_norm(gradients).item())

    monkeypatch.setattr(engine.optimizer, "step", look)
    for scale in (1.0, 1e-6):
        logp, mask = engine.score(sampled)
        engine.backward((logp * mask).sum() * scale)
        before = engine.step(1e-3)
        assert norms[-1] == pytest.approx(min(before, 1.0), rel=1e-4)
    assert norms[0] > 0.99 and norms[1] < 0.5


def test_image_understanding_stays_on_the_host_and_out_of_the_optimizer():
    model = gotr1.load_policy("toy")[0]
    meta = torch.device("meta")  # stands for a GPU
    trainer.to_device(model, meta, torch.float32, sharded=False)
    hosts = {name.split(".")[1] for name, p in model.named_parameters() if p.device.type == "cpu"}
    assert hosts == {"vision_model", "aligner"}
    engine = make("plain")
    trained = {id(parameter) for parameter in engine.parameters}
    for name, parameter in engine.model.named_parameters():
        frozen = name.startswith(("model.vision_model", "model.aligner", "model.vqmodel"))
        assert (id(parameter) in trained) != frozen, name


def test_checkpoints_are_pruned_and_one_that_was_never_named_is_not_taken_for_news(tmp_path):
    engine = make("lora")
    for step in (5, 10, 15):
        engine.save(tmp_path, step, keep=2)
    assert sorted(p.name for p in tmp_path.glob("step_*")) == ["step_000010", "step_000015"]
    (tmp_path / "step_000099").mkdir()  # written, but the process died before it was named
    engine.save(tmp_path, 20, keep=1)
    assert [p.name for p in tmp_path.glob("step_*")] == ["step_000020"]
    assert (tmp_path / "latest").read_text() == "step_000020"


def test_latest_names_a_checkpoint_that_is_there(tmp_path, monkeypatch):
    """At every moment: the process may be killed between the two."""
    write_whole, named = run.write_whole, []

    def looking(path, content):
        assert (path.parent / content / "trainer.pt").exists()
        named.append(content)
        write_whole(path, content)

    monkeypatch.setattr(run, "write_whole", looking)
    make("lora").save(tmp_path, 1)
    assert named == ["step_000001"]


def test_a_full_disk_leaves_the_last_checkpoint_and_says_so(tmp_path, sampled):
    """Real: the operating system refuses files of more than 1 MB."""
    engine = make("plain")
    train(engine, sampled, 1)
    engine.save(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        with pytest.raises(RuntimeError, match=f"cannot save {tmp_path}/step_000002"):
            engine.save(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert [p.name for p in tmp_path.glob("step_*")] == ["step_000001"]
    assert (tmp_path / "latest").read_text() == "step_000001"
    make("plain", tmp_path / "step_000001")


def test_held_out_prompts_are_judged_without_gathered_weights():
    engine = make("shards, checkpointing")
    seen = []

    def score(prompts, chains, images):
        seen.append(isinstance(engine.model.lm_head.weight, DTensor))
        return [{"total": 1.0}] * len(prompts), [{}] * len(prompts)

    drawing = held_out.Drawing(engine.model, engine.tokenizer, at_once=2, gathered=engine.gathered)
    held_out.evaluate(drawing, score, toy_prompts(3, seed=7, held_out=True))
    assert seen == [True, True], "two rollouts of at most two prompts, both judged in shards"


# -------------------------------------------------------------------------------------------------
# One process and two

AMONG_PROCESSES = {"shards": {}, "lora": {"lora": 4}}
IN_FLOAT64 = f"""
import sys
from pathlib import Path

import torch

sys.path += {[str(ROOT), str(ROOT / "tests")]}
from engine import checkpoints, run

torch.set_num_threads(1)
checkpoints.DTYPES["float32"] = torch.float64  # as the fixture of that name
"""
TWO_PROCESSES = """
import test_engine

run.start_processes()
folder = Path(FOLDER)
sampled = test_engine.four_samples()
for name in test_engine.AMONG_PROCESSES:
    test_engine.four_steps(folder, name, sampled, world=2, saved_by=2)
    test_engine.four_steps(folder, name, sampled, world=2, saved_by=1)
"""


def run_in_two_processes(program: str, tmp_path: Path) -> None:
    (tmp_path / "two.py").write_text(IN_FLOAT64 + program)
    launch = "-m torch.distributed.run --standalone --nproc_per_node 2".split()
    done = subprocess.run(
        [sys.executable, *launch, tmp_path / "two.py"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def four_samples():
    model, tokenizer = gotr1.load_policy("toy", dtype=torch.float64)
    return gotr1.rollout(model, tokenizer, ["a red ball"], group=4, max_chain=60)


def four_steps(folder: Path, name: str, sampled, world: int, saved_by: int) -> None:
    """Four steps with four samples, shared by `world` processes: all of them, with a checkpoint
    after two; or, when another number of processes has saved that one, the two after it."""
    config = trainer.TrainerConfig(**AMONG_PROCESSES[name])
    saved = None
    if saved_by != world:
        saved = folder / name / f"{saved_by}, then {saved_by}" / "step_000002"
    engine = trainer.load_engine(config, CPU, gotr1.token_logps, "toy", saved)
    for value in engine.optimizer.state[engine.parameters[0]].values():
        local = value.to_local() if isinstance(value, DTensor) else value
        assert local.untyped_storage().nbytes() == local.nbytes, "more than its own shard is kept"
    share = 4 // world
    for step in range(engine.first_step, 4):
        # in the first step the last two samples, all that the second process has, teach nothing
        signs = [1.0, -1.0, float(step > 0), -float(step > 0)]
        for row in range(run.rank() * share, (run.rank() + 1) * share):
            logp, mask = engine.score(sampled.select([row]))
            engine.backward(signs[row] * (logp * mask).sum() / 100)
        engine.step(1e-4, 1.0)
        if step in (1, 3):
            engine.save(folder / name / f"{saved_by}, then {world}", step + 1)


def test_two_processes_take_the_steps_of_one_and_each_resumes_from_the_other(tmp_path, float64):
    """In shards (auto), replicated, and with an adapter. In float64: see conftest.py."""
    sampled = four_samples()
    for name in AMONG_PROCESSES:
        four_steps(tmp_path, name, sampled, world=1, saved_by=1)
    run_in_two_processes(TWO_PROCESSES.replace("FOLDER", repr(str(tmp_path))), tmp_path)
    for name in AMONG_PROCESSES:
        four_steps(tmp_path, name, sampled, world=1, saved_by=2)

    def loaded(source) -> dict:
        return gotr1.load_policy(str(source), dtype=torch.float64)[0].state_dict()

    start = loaded("toy")
    for name in AMONG_PROCESSES:
        one = loaded(tmp_path / name / "1, then 1" / "step_000004")
        assert largest_gap(one, start) > 1e-5, name
        for who in ("2, then 2", "2, then 1", "1, then 2"):
            other = loaded(tmp_path / name / who / "step_000004")
            assert largest_gap(one, other) < 1e-10, (name, who)
