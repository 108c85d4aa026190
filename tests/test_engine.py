"""What is trained and where it lies: every mode learns the same, resumes bitwise, and its
checkpoints are models. pytest tests/test_engine.py"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch.distributed.tensor import DTensor

import gotr1
import train_grpo
from engine import checkpoints
from engine import trainer as engines
from toy.world import ToyJudge, crispness, toy_prompts

ROOT = Path(__file__).parent.parent
PROMPTS = ["a red ball left of a blue cube", "a green cone and a yellow ball"]
SMALL = "--batch_size 2 --group 4 --eval_prompts 4 --lr 1e-4 --save_every 100".split()
MODES = {
    "plain": {},
    "checkpointing": {"gradient_checkpointing": True},
    "shards": {"shard": "yes"},
    "shards, checkpointing": {"shard": "yes", "gradient_checkpointing": True},
    "bfloat16": {"dtype": "bfloat16"},
    "lora": {"lora": 4},
    "lora, bfloat16": {"lora": 4, "dtype": "bfloat16", "gradient_checkpointing": True},
}


def make(mode: dict, saved: Path | None = None) -> engines.Engine:
    dtype = engines.DTYPES[mode.get("dtype", "float32")] if "lora" in mode else torch.float32
    source = str(saved) if saved and "lora" not in mode else "toy"
    torch.manual_seed(0)  # LoRA's initial weights
    model, tokenizer = gotr1.load_policy(source, "cpu", dtype)
    engine = engines.Engine(
        model, tokenizer, torch.device("cpu"), gotr1.token_logps, saved=saved, **mode
    )
    if "lora" not in mode:
        engine.keep_reference(gotr1.load_policy("toy")[0])
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
        norms.append(engine.step(1e-3, 1.0))
    return norms


def whole(engine) -> dict:
    return {
        name: engines.full(value.detach()).clone()
        for name, value in engine.model.state_dict().items()
    }


def largest_gap(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)


@pytest.mark.parametrize("name", ["checkpointing", "shards", "shards, checkpointing"])
def test_shards_and_checkpointing_take_the_same_steps_as_the_plain_model(sampled, name):
    plain, other = make({}), make(MODES[name])
    assert any(isinstance(p, DTensor) for p in other.parameters) == ("shard" in MODES[name])
    norms = train(plain, sampled, 3)
    assert train(other, sampled, 3) == pytest.approx(norms, rel=1e-5) and norms[0] > 0
    assert largest_gap(whole(plain), whole(other)) < 1e-6
    assert largest_gap(whole(plain), dict(gotr1.load_policy("toy")[0].state_dict())) > 1e-4, (
        "nothing was trained"
    )


def test_bfloat16_computes_in_bfloat16_and_keeps_float32(sampled):
    """A step of 1e-6 is far below bfloat16's resolution; float32 masters remember it."""
    engine = make(MODES["bfloat16"])
    before = whole(engine)
    assert all(p.dtype == torch.float32 for p in engine.parameters)
    with engine.gathered() as model:
        assert model.lm_head.weight.dtype == torch.bfloat16 and not isinstance(
            model.lm_head.weight, DTensor
        )
    logp, mask = engine.score(sampled)
    engine.backward(-(logp * mask).mean())
    engine.step(1e-6, 1.0)
    moved = (whole(engine)["lm_head.weight"] - before["lm_head.weight"]).abs().max().item()
    assert 0 < moved < 2e-6
    exact = gotr1.token_logps(gotr1.load_policy("toy")[0], sampled)[0]
    assert (
        0 < ((logp - exact) * mask).abs().max() < 0.5
        and ((logp - exact) * mask).abs().mean() < 0.02
    )


@pytest.mark.parametrize("name", MODES)
def test_the_reference_is_where_training_starts_and_stays_there(sampled, name):
    engine = make(MODES[name])
    start = engine.score(sampled)[0].detach()
    reference = engine.score_reference(sampled)[0]
    assert torch.equal(start, reference) and not reference.requires_grad
    train(engine, sampled, 2)
    assert torch.equal(engine.score_reference(sampled)[0], reference)
    assert (engine.score(sampled)[0] - reference).abs().max() > 1e-3


@pytest.mark.parametrize("name", MODES)
def test_a_checkpoint_continues_bitwise_and_is_a_model(sampled, name, tmp_path):
    through, cut = make(MODES[name]), make(MODES[name])
    train(through, sampled, 4)
    train(cut, sampled, 2)
    cut.save(tmp_path, 2)
    continued = make(MODES[name], tmp_path / "step_000002")
    assert continued.first_step == 2
    train(continued, sampled, 2)
    assert largest_gap(whole(through), whole(continued)) == 0
    with continued.gathered() as model:
        trained = gotr1.token_logps(model, sampled)[0]
    continued.save(tmp_path, 4)
    loaded = gotr1.load_policy(str(tmp_path / "step_000004"))[0]
    gap = (gotr1.token_logps(loaded, sampled)[0] - trained).abs()
    assert gap.max() < (0.5 if "bfloat16" in name else 1e-4)
    base = gotr1.token_logps(gotr1.load_policy("toy")[0], sampled)[0]
    assert gap.mean() < 0.2 * (base - trained).abs().mean(), (
        "what was loaded is not what was trained"
    )


def test_only_the_adapter_is_trained_and_saved_in_peft_s_format(sampled, tmp_path):
    engine = make(MODES["lora"])
    base = {
        name: value.clone()
        for name, value in engine.model.state_dict().items()
        if "lora_" not in name
    }
    train(engine, sampled, 2)
    after = engine.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in base.items())
    assert len(engine.parameters) == 4 * 7 * 2  # 4 layers, 7 linear maps, A and B
    engine.save(tmp_path, 2)
    settings = json.loads((tmp_path / "step_000002" / "adapter_config.json").read_text())
    assert (
        settings["peft_type"] == "LORA"
        and settings["r"] == 4
        and settings["base_model_name_or_path"] == "toy"
    )
    assert (
        len(safetensors.torch.load_file(tmp_path / "step_000002" / "adapter_model.safetensors"))
        == 56
    )


def test_an_adapter_is_merged_by_one_command(sampled, tmp_path, capsys):
    engine = make(MODES["lora"])
    train(engine, sampled, 3)
    engine.save(tmp_path, 3)
    checkpoints.main(
        [str(tmp_path / "step_000003"), str(tmp_path / "merged"), "--dtype", "float32"]
    )
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    merged = gotr1.load_policy(str(tmp_path / "merged"))[0]
    trained = engine.score(sampled)[0].detach()
    assert (gotr1.token_logps(merged, sampled)[0] - trained).abs().max() < 1e-4
    with pytest.raises(SystemExit) as stop:
        checkpoints.main(["toy", str(tmp_path / "merged")])
    assert stop.value.code == 2 and "exists: name a new folder" in capsys.readouterr().err


def test_logits_exist_only_where_they_are_needed_and_only_in_chunks(sampled):
    """Every tensor that any operation makes, forward and backward: none with a vocabulary as its
    last dimension has more rows than a chunk."""
    from torch.utils._python_dispatch import TorchDispatchMode

    engine = make({})
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
    engine = make({})
    train(engine, sampled, 1)
    before = whole(engine)
    for factor in (0.0, float("nan"), float("inf")):
        logp, mask = engine.score(sampled)
        engine.backward((logp * mask).mean() * factor)
        assert not 0 < engine.step(1e-3, 1.0) < float("inf")
        assert largest_gap(whole(engine), before) == 0
    assert train(engine, sampled, 1)[0] > 0 and largest_gap(whole(engine), before) > 0


def test_image_understanding_stays_on_the_host_and_out_of_the_optimizer():
    model = gotr1.load_policy("toy")[0]
    engines.to_device(
        model, torch.device("meta"), torch.float32, sharded=False
    )  # meta stands for a GPU
    hosts = {name.split(".")[1] for name, p in model.named_parameters() if p.device.type == "cpu"}
    assert hosts == {"vision_model", "aligner"}
    engine = make({})
    understanding = {id(p) for part in ("vision_model", "aligner", "vqmodel")
                     for p in getattr(engine.model.model, part).parameters()}  # fmt: skip
    assert engine.parameters and not understanding & {id(p) for p in engine.parameters}


def test_checkpoints_are_pruned_and_a_later_one_from_before_a_kill_is_not_taken_for_news(tmp_path):
    engine = make({})
    for step in (5, 10, 15):
        engine.save(tmp_path, step, keep=2)
    assert sorted(p.name for p in tmp_path.glob("step_*")) == ["step_000010", "step_000015"]
    (tmp_path / "step_000099").mkdir()  # written, but the process died before it was named
    engine.save(tmp_path, 20, keep=1)
    assert [p.name for p in tmp_path.glob("step_*")] == ["step_000020"]
    assert (tmp_path / "latest").read_text() == "step_000020"


def test_weights_that_are_read_by_their_owner_are_those_of_a_whole_model():
    """For the policy and, rounded, for the reference."""
    flags = engines.TrainerConfig(shard="yes", dtype="bfloat16")
    engine = engines.load(flags, torch.device("cpu"), gotr1.token_logps, "toy", None)
    engines.load_reference(engine, "toy")
    assert all(isinstance(parameter, DTensor) for parameter in engine.parameters)
    want = gotr1.load_policy("toy")[0].state_dict()
    assert largest_gap(whole(engine), dict(want)) == 0
    for name, value in engine.reference.model.state_dict().items():
        rounded = want[name].float() if "vqmodel" in name else want[name].bfloat16()
        assert torch.equal(engines.full(value), rounded), name
    buffers = dict(gotr1.load_policy("toy")[0].named_buffers())
    for name, value in engine.model.named_buffers():
        assert torch.equal(value, buffers[name]), name


def test_a_checkpoint_whose_optimizer_is_in_one_file_still_resumes(sampled, tmp_path):
    engine = make({})
    train(engine, sampled, 2)
    engine.save(tmp_path, 2)
    saved = tmp_path / "step_000002"
    torch.save({"step": 2, "optimizer": engine.optimizer.state_dict()}, saved / "trainer.pt")
    (saved / "optimizer.safetensors").unlink()
    older = make({}, saved)
    assert older.first_step == 2
    train(engine, sampled, 1)
    train(older, sampled, 1)
    assert largest_gap(whole(engine), whole(older)) == 0


def test_held_out_prompts_are_judged_without_gathered_weights(tmp_path):
    engine = make(MODES["shards"])
    seen = []

    class Judge(ToyJudge):
        def semantic(self, prompts, chains):
            seen.append(isinstance(engine.model.lm_head.weight, DTensor))
            return super().semantic(prompts, chains)

    config = train_grpo.Config(rollout_batch=1, group=2)
    held_out = toy_prompts(3, seed=7, held_out=True)
    training = train_grpo.Training(
        config, engine, Judge(), crispness, [], held_out, [], tmp_path, rank=0, world=1
    )
    train_grpo.look(training, "before", step=0, count=3)
    assert seen == [True, True], "two rollouts of at most two prompts, both judged in shards"


def test_a_full_disk_leaves_the_last_checkpoint_and_says_so(tmp_path):
    """Real: the operating system refuses files of more than 1 MB to a process that has already
    saved once."""
    program = f"""
import resource, sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, {str(ROOT)!r})
import train_grpo, signal
from engine import trainer
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
save = trainer.Engine.save
def saving(self, folder, step, keep):
    if step > 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
    save(self, folder, step, keep)
trainer.Engine.save = saving
train_grpo.main({[*SMALL[:-2], "--steps", "3", "--save_every", "1", "--out", str(tmp_path)]!r})
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert f"cannot save {tmp_path}/step_000002" in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last == f"{tmp_path}/step_000001 is whole: the same command continues from it"
    assert sorted(p.name for p in tmp_path.glob("step_*")) == ["step_000001"]
    safetensors.torch.load_file(tmp_path / "step_000001" / "model.safetensors")


def launch(count: int, program: str, tmp_path: Path) -> None:
    script = tmp_path / f"run_{count}.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{program}")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(count),
        script,
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


TWO_PROCESSES = """
import rewards, torch, train_grpo
from engine import checkpoints, trainer

checkpoints.DTYPES["float32"] = torch.float64  # as the fixture of that name
prompts = train_grpo.read_prompts("toy", False, 2000)
second = prompts[trainer.order_of_step(len(prompts), 1, 2, seed=3)[1]]
score, steps = train_grpo.score, []

def flat(training, batch, chains, images):
    rows = score(training, batch, chains, images)
    steps.append(1)
    for row, prompt in zip(rows, batch, strict=True):
        if len(steps) == 3 or (len(steps) == 2 and prompt == second):
            row["total"] = 0.5
    return rows

train_grpo.score = flat
for flags in FLAGS:
    steps.clear()
    train_grpo.main(flags)
"""


def test_two_processes_take_the_same_steps_as_one_whatever_their_groups_look_like(tmp_path):
    """All rewards of rank 1's prompt are equal in step 1, and of both in step 2: no gradient there,
    no deadlock. In shards (auto), replicated, and with an adapter. In float64: see conftest.py."""
    modes = {
        "shards": ["--shard", "auto"],
        "replicated": ["--shard", "no"],
        "adapter": ["--lora", "4"],
    }
    small = "--batch_size 2 --group 4 --eval_prompts 2 --lr 1e-4 --micro_batch 3".split()
    small += ["--steps", "5", "--seed", "3"]  # with this seed no group is all equal by itself
    for count in (1, 2):
        flags = []
        for name, mode in modes.items():
            flags.append([*small, *mode, "--out", str(tmp_path / name / str(count))])
        launch(count, TWO_PROCESSES.replace("FLAGS", repr(flags)), tmp_path)

    def loaded(source) -> dict:
        return gotr1.load_policy(str(source), dtype=torch.float64)[0].state_dict()

    for name in modes:
        one, two = tmp_path / name / "1", tmp_path / name / "2"
        weights = loaded(one / "step_000005")
        assert largest_gap(weights, loaded(two / "step_000005")) < 1e-10, name
        assert largest_gap(weights, loaded("toy")) > 1e-5, name
        log_one, log_two = log_of(one), log_of(two)
        assert [row["zero_var"] for row in log_one][1:3] == [0.5, 1.0]
        assert log_one[2]["grad_norm"] == 0
        for a, b in zip(log_one, log_two, strict=True):
            assert a["reward"] == b["reward"] and a["zero_var"] == b["zero_var"], name
            assert a["kl"] == pytest.approx(b["kl"], abs=2e-6)  # the log has six decimals
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], abs=2e-6)


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


HOST_MEMORY = """
import json, os, sys, torch
import gotr1
from engine import checkpoints, run, trainer
from pathlib import Path

CHECKPOINT, OUT, MODE = ARGUMENTS
torch.set_num_threads(1)

def resting():
    # from now on the peak is counted anew
    Path("/proc/self/clear_refs").write_text("5")
    return field("VmRSS")

def field(name):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return 1024 * int(line.split()[1])

rank, _, device = run.start_processes()
if MODE == "whole":
    checkpoints.open_policy = lambda *arguments: None
flags = trainer.TrainerConfig(shard="yes")
before = resting()
engine = trainer.load(flags, device, gotr1.token_logps, CHECKPOINT, None)
measured = {"loading": field("VmHWM") - before, "loaded": field("VmRSS") - before}
if MODE == "slices":
    for parameter in engine.parameters:
        parameter.grad = torch.full_like(parameter, 0.1)
    engine.step(1e-3, 1.0)
    before = resting()
    engine.save(Path(OUT), 1)
    measured["saving"] = field("VmHWM") - before
    run.gather_list([])  # rank 0 has saved
    before = resting()
    again = trainer.load(flags, device, gotr1.token_logps, CHECKPOINT, Path(OUT) / "step_000001")
    measured["resuming"] = field("VmHWM") - before
    for mine, theirs in zip(engine.parameters, again.parameters, strict=True):
        assert torch.equal(mine.to_local(), theirs.to_local())
        loaded = again.optimizer.state[theirs]
        for name, value in engine.optimizer.state[mine].items():
            assert torch.equal(trainer.full(value), trainer.full(loaded[name]))
Path(f"{OUT}.{MODE}.{rank}.json").write_text(json.dumps(measured))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="asks Linux for its peaks")
def test_host_memory_of_two_processes(tmp_path, capsys):
    """A checkpoint of 1.2 GB, in shards on two processes: each reads its half, and rank 0 saves
    without ever holding a whole tensor of the other's. Prints the numbers of docs/gpu.md."""
    from engine.speed import small_config

    config = small_config()
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 18}
    config.text_config.update({**sizes, "head_dim": 128, "vocab_size": 32768})
    config.vision_config.projection_dim = 1024
    config.vq_config.update({"projection_dim": 1024, "image_token_embed_dim": 1024})
    model = checkpoints.empty_model(config, torch.float32)
    for parameter in model.parameters():
        parameter.data.fill_(0.01)
    largest = max(p.numel() for p in model.parameters()) * 4
    model.save_pretrained(tmp_path / "large")
    gotr1.load_policy("toy")[1].save_pretrained(tmp_path / "large")
    size = (tmp_path / "large" / "model.safetensors").stat().st_size
    assert size > 1e9
    del model

    peaks = {}
    for mode in ("whole", "slices"):
        out = tmp_path / "out"
        arguments = (str(tmp_path / "large"), str(out), mode)
        launch(2, HOST_MEMORY.replace("ARGUMENTS", repr(arguments)), tmp_path)
        peaks[mode] = [json.loads(Path(f"{out}.{mode}.{rank}.json").read_text()) for rank in (0, 1)]
    with capsys.disabled():
        print(
            f"\ncheckpoint {size / 1e9:.2f} GB, largest tensor {largest / 1e9:.2f} GB; 2 processes"
        )
        for mode, ranks in peaks.items():
            for rank, measured in enumerate(ranks):
                cells = [f"{what} {value / 1e9:.2f} GB" for what, value in measured.items()]
                print(f"{mode}, rank {rank}: " + ", ".join(cells))
    for measured in peaks["slices"]:
        assert measured["loading"] < 0.7 * size
        assert measured["saving"] < 1.3 * largest
        assert measured["resuming"] < 3 * 0.7 * size
    assert peaks["whole"][0]["loading"] > 0.9 * size, "this test would not see the whole model"
