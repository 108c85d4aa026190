"""The two trainers as they are run, with small numbers: they learn, they resume bitwise, they
refuse bad input in one line. pytest tests/test_end_to_end.py"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from PIL import Image
from random_networks import random_judge
from test_engine import run_in_two_processes

import gotr1
import rewards
import train_grpo
import train_sft
from toy import world
from toy.world import ToyJudge, crispness

ROOT = Path(__file__).parent.parent
GRPO = "--steps 7 --batch_size 2 --group 4 --eval_prompts 8 --save_every 3 --look_every 3".split()
SHORT = "--steps 2 --batch_size 1 --group 2 --eval_prompts 2".split()
SFT = (
    "--from_scratch --vq_steps 3 --examples 300 --steps 40 --batch_size 16 "
    "--look_every 40 --eval_prompts 8 --save_every 15"
).split()


def weights(folder: Path) -> dict:
    return safetensors.torch.load_file(
        folder / (folder / "latest").read_text() / "model.safetensors"
    )


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def rows(folder: Path) -> list[dict]:
    """The log; a killed run may leave half a line."""
    lines = (folder / "log.jsonl").read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def timeless(folder: Path) -> list[dict]:
    """The log without what a clock says."""
    clocked = {"seconds", "samples_s", "peak_gib", *train_grpo.PHASES}
    return [{k: v for k, v in row.items() if k not in clocked} for row in rows(folder)]


@pytest.fixture(scope="module")
def grpo_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grpo")
    train_grpo.main([*GRPO, "--out", str(folder)])
    return folder


@pytest.fixture
def quick(monkeypatch):
    """Without evaluations, which take longer than the steps and change no weight."""
    monkeypatch.setattr(train_grpo, "evaluate", lambda *args, **kwargs: None)
    monkeypatch.setattr(train_grpo, "look", lambda *args, **kwargs: None)
    monkeypatch.setattr(train_grpo, "summarise_run", lambda training: None)


# A run


def test_a_grpo_run_leaves_what_the_readme_promises(grpo_run):
    names = "samples_before.png samples_after.png curves.png log.jsonl config.json step_000007"
    for name in names.split():
        assert (grpo_run / name).exists(), name
    log = rows(grpo_run)
    assert [row["step"] for row in log] == list(range(7))
    assert log[0]["ratio"] == 1
    assert log[0]["kl"] == 0 < log[5]["kl"]
    for key in ("layout_variety", "different_chains", "place_entropy", "brightness", "edges"):
        assert log[0][key] >= 0
    assert 0 <= max(row["drift_text"] + row["drift_image"] for row in log) < 1e-4
    assert len(list(grpo_run.glob("step_*"))) == 2, "old checkpoints stay"
    with Image.open(grpo_run / "learning.gif") as film:
        assert film.n_frames == 2
    after = json.loads((grpo_run / "eval_after.json").read_text())
    assert set(rewards.PARTS) < set(after)
    assert 0 < after["variety: layout"] <= 1 <= after["variety: chains"] <= 8
    assert 0 < after["follow complex: ri"] < 1
    assert 0 < after["variety: place entropy"] <= 4

    model, tokenizer = gotr1.load_policy(str(grpo_run / "step_000007"))
    sampled = gotr1.rollout(model, tokenizer, ["a red ball"], max_chain=60)
    assert sampled.image_tokens.shape == (1, 64)


def test_a_part_that_is_not_trained_is_evaluated_and_without_hps_it_is_left_out(tmp_path):
    """With --evaluate_looks there is an evaluation between before and after as well."""
    flags = "--rewards ri --hps".split() + ["", "--look_every", "1", "--evaluate_looks"]
    train_grpo.main([*SHORT, *flags, "--out", str(tmp_path)])
    log = rows(tmp_path)[0]
    assert "hps" not in log
    assert "pi" not in log, "a step computes only what it is trained on"
    for label in ("before", "step_000001", "after"):
        found = json.loads((tmp_path / f"rows_{label}.json").read_text())
        measures = [row["measures"] for row in found if "total" in row["measures"]]
        assert len(measures) == 2
        for values in measures:
            assert values["total"] == pytest.approx(rewards.total_reward(values))
            assert values["trained"] == values["ri"]
    assert (tmp_path / "samples_after.png").exists()


def test_the_four_marks_of_a_plan_are_in_the_log(policy):
    """Their means over the samples of the step; the mean of the four is `sem`."""

    class MarkingJudge(ToyJudge):
        def semantic(self, prompts, chains):
            scores = super().semantic(prompts, chains)
            self.marks = {"sem": {name: scores for name in rewards.CRITERIA[:3]}}
            self.marks["sem"]["clarity"] = [score / 2 for score in scores]
            return scores

    sampled = gotr1.rollout(*policy, ["a red ball"], group=2, max_chain=60)
    images = gotr1.decode_images(policy[0], sampled.image_tokens)
    scores = rewards.score(MarkingJudge(), crispness, ["a red ball"] * 2, sampled.chains, images)
    row = train_grpo.mean_of_samples(sampled, scores, images, group=2)
    assert row["sem_completeness"] == row["sem"] > 0
    assert row["sem_clarity"] == pytest.approx(row["sem"] / 2)


def test_a_model_that_writes_no_boxes_is_refused_but_for_a_rehearsal_of_one_step(
    quick, tmp_path, capsys
):
    """Every reward would be 0, every group equal, and a thousand steps would learn nothing in
    silence. A rehearsal goes on: with a sum its rewards differ."""
    with pytest.raises(RuntimeError, match="no chain has a box: start from a model that writes"):
        train_grpo.main([*SHORT, "--max_chain", "1", "--out", str(tmp_path / "run")])
    flags = ["--max_chain", "1", "--steps", "1", "--combine", "sum"]
    train_grpo.main([*SHORT, *flags, "--out", str(tmp_path / "rehearsal")])
    assert "a rehearsal of one step: no chain has a box" in capsys.readouterr().out
    assert rows(tmp_path / "rehearsal")[0]["grad_norm"] > 0


def test_gradients_that_are_not_finite_change_no_weight(quick, tmp_path, monkeypatch):
    loss, calls = train_grpo.grpo_loss, []

    def broken(*args, **kwargs):
        calls.append(1)
        value, sums = loss(*args, **kwargs)
        return (value if len(calls) == 1 else value * float("nan")), sums

    monkeypatch.setattr(train_grpo, "grpo_loss", broken)
    flags = ["--group", "4", "--steps", "3", "--save_every", "1"]
    train_grpo.main([*SHORT, *flags, "--out", str(tmp_path)])
    assert [row["skipped"] for row in rows(tmp_path)] == [0, 1, 2]
    assert all(value.isfinite().all() for value in weights(tmp_path).values())


def test_groups_of_equal_rewards_teach_nothing_and_are_counted(quick, tmp_path, monkeypatch):
    """With the same reward for every sample the weights must not move, not even by the KL term or
    by weight decay."""
    score = rewards.score

    def all_equal(*args, **kwargs):
        return [row | {"total": 0.3} for row in score(*args, **kwargs)]

    monkeypatch.setattr(rewards, "score", all_equal)
    train_grpo.main([*SHORT, "--out", str(tmp_path)])
    for row in rows(tmp_path):
        assert row["zero_var"] == 1
        assert row["grad_norm"] == row["reward_std"] == 0
        assert "ratio" not in row, "no token was trained: there is no mean of them"
    toy_weights = safetensors.torch.load_file(ROOT / "toy" / "weights" / "model.safetensors")
    assert same(weights(tmp_path), toy_weights)


def test_an_evaluation_is_judged_without_errors():
    """--judge toy:1.0 is always wrong, in training only."""
    scene = world.Scene(["red ball"], [], [(0, 0, 2)])
    chains = [world.chain_of(scene)] * 2
    images = [world.draw_scene(scene.names, scene.cells)] * 2
    training = SimpleNamespace(
        config=train_grpo.Config(judge="toy:1.0"),
        judge=ToyJudge(error=1.0),
        hps=crispness,
        rehearsal=False,
    )
    scores, found = train_grpo.score_all(training, ["a red ball", "a blue cube"], chains, images)
    assert [row["total"] > 0.9 for row in scores] == [True, False]
    assert len(found[0]["red ball"]) == 1
    assert "trained" not in scores[0]


# Stopped and continued


def dying_at(call: int, function):
    """The function, which raises at its n-th call."""
    calls = []

    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise RuntimeError("power cut")
        return function(*args, **kwargs)

    return dying


def test_a_grpo_run_that_died_continues_bitwise(grpo_run, quick, tmp_path, monkeypatch):
    """It dies in step 6, after the checkpoint of step 3: two steps are done again, from the same
    numbers."""
    monkeypatch.setattr(train_grpo, "token_weights", dying_at(6, train_grpo.token_weights))
    with pytest.raises(RuntimeError, match="power cut"):
        train_grpo.main([*GRPO, "--out", str(tmp_path)])
    assert (tmp_path / "latest").read_text() == "step_000003"
    assert len(rows(tmp_path)) == 5
    train_grpo.main([*GRPO, "--out", str(tmp_path)])
    assert same(weights(tmp_path), weights(grpo_run))
    assert timeless(tmp_path) == timeless(grpo_run)


def test_sft_from_scratch_learns(tmp_path):
    train_sft.main([*SFT, "--out", str(tmp_path / "whole")])
    log = rows(tmp_path / "whole")
    # the picture tokenizer is as good as untrained
    for loss, share in (("chain_loss", 0.7), ("image_loss", 0.85)):
        first = sum(row[loss] for row in log[:5])
        assert sum(row[loss] for row in log[-5:]) < share * first, loss
    assert "ri" in log[-1]
    assert (tmp_path / "whole" / "curves.png").exists()


def kill_and_restart(folder: Path, flags: list[str], moments: list) -> int:
    """Starts the run again and again; kills it (SIGKILL) when `moments` in turn say so; returns the
    number of kills. One thread, as here: another number of threads adds in another order."""
    command = [sys.executable, "train_grpo.py", *flags, "--out", str(folder)]
    one = {**os.environ, "OMP_NUM_THREADS": "1"}
    kills = 0
    for moment in moments:
        process = subprocess.Popen(
            command, cwd=ROOT, env=one, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        begun = time.time()
        while process.poll() is None and not moment(time.time() - begun):
            time.sleep(0.001)
        kills += process.poll() is None
        process.kill()
        process.wait()
    subprocess.run(command, cwd=ROOT, env=one, check=True, capture_output=True)
    return kills


def test_a_run_that_is_killed_while_it_saves_ends_with_the_same_weights(grpo_run, tmp_path):
    def saving(_):
        return list((tmp_path / "killed").glob("step_*.tmp"))

    assert kill_and_restart(tmp_path / "killed", GRPO, [saving]) == 1
    assert same(weights(tmp_path / "killed"), weights(grpo_run))
    assert [row["step"] for row in rows(tmp_path / "killed")] == list(range(7))


@pytest.mark.slow
def test_a_run_that_is_killed_at_ten_random_moments_ends_with_the_same_weights(tmp_path):
    flags, rng = [*GRPO, "--steps", "60", "--save_every", "1"], random.Random(0)

    def some_time_after(step):  # a step takes less than a second, saving included
        reached, delay = [], rng.random()

        def now(seconds):
            log = tmp_path / "killed" / "log.jsonl"
            if log.exists() and len(rows(tmp_path / "killed")) > step:
                reached.append(seconds)
            return bool(reached) and seconds > reached[0] + delay

        return now

    train_grpo.main([*flags, "--out", str(tmp_path / "whole")])
    moments = [some_time_after(5 * k) for k in range(10)]
    assert kill_and_restart(tmp_path / "killed", flags, moments) == 10
    assert same(weights(tmp_path / "killed"), weights(tmp_path / "whole"))


def test_a_run_that_gets_sigterm_saves_and_leaves_with_exit_code_0(tmp_path):
    flags = [*SHORT, "--steps", "1000", "--out", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "train_grpo.py", *flags],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.time() + 120
    while time.time() < deadline:
        if (tmp_path / "log.jsonl").exists() and len(rows(tmp_path)) >= 2:
            break
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    done = len(rows(tmp_path))
    assert done >= 2
    assert (tmp_path / "latest").read_text() == f"step_{done:06d}"
    assert f"stopped after step {done} of 1000" in output
    assert f"the same command continues from {tmp_path}" in output


@pytest.mark.slow
def test_a_run_that_collapses_says_so_once(tmp_path, capsys):
    """Without a KL, at three times the learning rate, plans become alike."""
    flags = "--batch_size 4 --group 8 --advantage group_std --kl 0 --lr 2e-3".split()
    flags += "--eval_prompts 2 --look_every 0 --out".split() + [str(tmp_path)]
    train_grpo.main([*flags, "--steps", "80"])
    said = re.findall("warning: layout_variety.*", capsys.readouterr().out)
    varieties = [row["layout_variety"] for row in rows(tmp_path)]
    start = sum(varieties[:10]) / 10
    fallen = [value for value in varieties[10:] if value < start / 2]
    assert len(fallen) > 1  # it goes on, and nothing more is said
    assert len(said) == 1 and f"is {fallen[0]:.2g}" in said[0] and "--advantage mean" in said[0]


# One process and two


IN_TWO = """
import rewards, train_grpo
from data.prompts import join_prompts
from engine import trainer

prompts = join_prompts(("toy",))
flat_prompt = prompts[trainer.order_of_step(len(prompts), 1, 2, seed=0)[1]]
score = rewards.score

def some_flat(judge, hps, batch, *rest, **settings):
    rows = score(judge, hps, batch, *rest, **settings)
    for row, prompt in zip(rows, batch, strict=True):
        if prompt == flat_prompt:
            row["total"] = 0.5
    return rows

rewards.score = some_flat
train_grpo.evaluate = train_grpo.look = train_grpo.summarise_run = lambda *args, **kwargs: None
for name, flags in FLAGS.items():
    train_grpo.main([*flags, "--out", f"OUT/{name}"])
"""
KINDS = {"shards": [], "lora": ["--lora", "4"]}


def test_two_processes_take_the_steps_of_one(quick, float64, tmp_path, monkeypatch):
    """In shards and with an adapter. In the second step the group of one process has equal rewards:
    it trains nothing, and must not be waited for."""
    short = "--steps 3 --batch_size 2 --group 4 --micro_batch 2 --eval_prompts 2".split()
    flags = {name: [*short, *more] for name, more in KINDS.items()}
    program = IN_TWO.replace("FLAGS", repr(flags))
    run_in_two_processes(program.replace("OUT", str(tmp_path / "two")), tmp_path)
    monkeypatch.setattr(rewards, "score", rewards.score)  # set back after this test
    exec(program.replace("OUT", str(tmp_path / "one")), {})
    for name in KINDS:
        one, two = tmp_path / "one" / name, tmp_path / "two" / name
        file = "model.safetensors" if name == "shards" else "adapter_model.safetensors"
        a = safetensors.torch.load_file(one / "step_000003" / file)
        b = safetensors.torch.load_file(two / "step_000003" / file)
        assert a.keys() == b.keys()
        for key in a:
            assert (a[key] - b[key]).abs().max() < 1e-6, key
        assert [row["zero_var"] for row in rows(one)] == [row["zero_var"] for row in rows(two)]
        assert rows(one)[1]["zero_var"] >= 0.5


# Bad input: one line, exit code 2, nothing left behind


BAD = [
    ("--grup 3", "--grup"),
    ("--steps many", "--steps"),
    ("--group 1", "--group is 1"),
    ("--lr -1", "--lr is -1.0: expected a number above 0"),
    ("--kl -0.1", "--kl is -0.1: expected 0 or more"),
    ("--steps 0", "--steps is 0: expected 1 or more"),
    ("--cfg nan", "--cfg is nan: expected 0 or more"),
    ("--rewards sem beauty", "expected some of sem spa ri pi hps"),
    ("--combine median", "median"),
    ("--model /no/such/model", "/no/such/model"),
    ("--prompts", "--prompts is empty"),
    ("--prompts /no/such/file", "cannot read prompts from /no/such/file"),
    ("--prompts EMPTY", "holds no prompt: expected one per line"),
    ("--prompts CATS", "know only the toy's world, not 'a photo of a cat'"),
    ("--prompts CATS --judge /some/judge", "know only the toy's world, not 'a photo of a cat'"),
    ("--judge JUDGE", "this judge cannot be asked"),
    ("--max_chain 600", "this model holds 512: shorten the prompt or lower max_chain (600)"),
    ("--out /proc/nowhere", "cannot use /proc/nowhere as output folder"),
]


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory):
    """Words of the table -> files: prompts that are none, prompts of another world, a judge whose
    template takes nothing."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty.txt").write_text("\n \n")
    (folder / "cats.txt").write_text("a red ball\na photo of a cat\n")
    for part in random_judge(template="{{ messages[0].content.parts }}{{ 1 + 'a' }}"):
        part.save_pretrained(folder / "judge")
    return {
        "EMPTY": str(folder / "empty.txt"),
        "CATS": str(folder / "cats.txt"),
        "JUDGE": str(folder / "judge"),
    }


@pytest.mark.parametrize("flags, words", BAD, ids=[flags for flags, _ in BAD])
def test_bad_input_is_refused_in_one_line(flags, words, bad_files, tmp_path, capsys):
    flags = [bad_files.get(flag, flag) for flag in flags.split()]
    out = [] if "--out" in flags else ["--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as stop:
        train_grpo.main([*flags, *out])
    message = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    assert message[-1].startswith("error: ")
    assert words in message[-1]
    assert not (tmp_path / "run").exists(), "a refused run left something behind"


def test_a_folder_with_another_configuration_is_refused_and_untouched(grpo_run, capsys):
    before = (grpo_run / "config.json").read_text()
    with pytest.raises(SystemExit) as stop:
        train_grpo.main([*GRPO, "--out", str(grpo_run), "--lr", "5e-4", "--kl", "0"])
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2
    assert "--lr 0.0007 (now 0.0005), --kl 0.02 (now 0.0)" in message
    assert (grpo_run / "config.json").read_text() == before
