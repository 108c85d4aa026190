"""The two trainers as they are run, with small numbers: they learn, they resume bitwise, they
refuse bad input in one line. pytest tests/test_end_to_end.py"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from test_rewards import random_judge

import rewards
import train_grpo
import train_sft
from toy.world import ToyJudge, crispness

ROOT = Path(__file__).parent.parent
GRPO = "--steps 10 --batch_size 2 --group 4 --eval_prompts 8 --save_every 4".split()
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
    lines = (folder / "log.jsonl").read_text().splitlines(keepends=True)
    return [
        json.loads(line) for line in lines if line.endswith("\n")
    ]  # a killed run may leave half a line


@pytest.fixture(scope="module")
def grpo_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grpo")
    train_grpo.main([*GRPO, "--out", str(folder)])
    return folder


def test_ten_grpo_steps_leave_what_the_readme_promises(grpo_run):
    for name in (
        "samples_before.png",
        "samples_after.png",
        "curves.png",
        "log.jsonl",
        "config.json",
        "step_000010",
    ):
        assert (grpo_run / name).exists(), name
    assert [row["step"] for row in rows(grpo_run)] == list(range(10))
    assert (
        rows(grpo_run)[0]["ratio"] == 1 and rows(grpo_run)[0]["kl"] == 0 < rows(grpo_run)[5]["kl"]
    )
    assert len(list(grpo_run.glob("step_*"))) == 2, "old checkpoints stay"


def test_a_grpo_run_that_died_continues_bitwise(grpo_run, tmp_path, monkeypatch):
    """It dies in step 7, between the checkpoints of steps 4 and 8: three steps are done again, from
    the same numbers."""
    calls, score = [], train_grpo.score

    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) == 7:
            raise RuntimeError("power cut")
        return score(*args, **kwargs)

    monkeypatch.setattr(train_grpo, "score", dying)
    with pytest.raises(RuntimeError, match="power cut"):
        train_grpo.main([*GRPO, "--out", str(tmp_path)])
    assert (tmp_path / "latest").read_text() == "step_000004" and len(rows(tmp_path)) == 6
    train_grpo.main([*GRPO, "--out", str(tmp_path)])
    assert same(weights(tmp_path), weights(grpo_run))
    clocked = {"seconds", "samples_s", "peak_gib", "judge_s", *train_grpo.PHASES}
    timeless = [{k: v for k, v in row.items() if k not in clocked} for row in rows(tmp_path)]
    assert timeless == [
        {k: v for k, v in row.items() if k in timeless[0]} for row in rows(grpo_run)
    ]


def test_sft_from_scratch_learns_and_resumes_bitwise(tmp_path, monkeypatch):
    train_sft.main([*SFT, "--out", str(tmp_path / "whole")])
    log = rows(tmp_path / "whole")
    for loss, share in (
        ("chain_loss", 0.7),
        ("image_loss", 0.85),
    ):  # the picture tokenizer is as good as untrained
        assert sum(row[loss] for row in log[-5:]) < share * sum(row[loss] for row in log[:5]), loss
    assert "ri" in log[-1] and (tmp_path / "whole" / "curves.png").exists()

    sft_loss, calls = train_sft.sft_loss, []

    def dying(*args, **settings):
        calls.append(1)
        if len(calls) == 25:
            raise RuntimeError("power cut")
        return sft_loss(*args, **settings)

    monkeypatch.setattr(train_sft, "sft_loss", dying)
    with pytest.raises(RuntimeError, match="power cut"):
        train_sft.main([*SFT, "--out", str(tmp_path / "cut")])
    train_sft.main([*SFT, "--out", str(tmp_path / "cut")])
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


def test_without_hps_that_part_is_left_out_everywhere(tmp_path):
    flags = ["--steps", "1", "--batch_size", "1", "--group", "2", "--eval_prompts", "2"]
    train_grpo.main([*flags, "--hps", "", "--out", str(tmp_path)])
    assert "hps" not in rows(tmp_path)[0] and (tmp_path / "samples_after.png").exists()


def test_a_grpo_checkpoint_is_a_model_like_any_other(grpo_run):
    import gotr1

    model, tokenizer = gotr1.load_policy(str(grpo_run / "step_000010"))
    assert gotr1.rollout(model, tokenizer, ["a red ball"], max_chain=60).image_tokens.shape == (
        1,
        64,
    )


BAD = [
    (["--grup", "3"], "--grup"),
    (["--steps", "many"], "--steps"),
    (["--group", "1"], "--group is 1"),
    (["--lr", "-1"], "--lr is -1.0: expected a number above 0"),
    (["--kl", "-0.1"], "--kl is -0.1: expected 0 or more"),
    (["--steps", "0"], "--steps is 0: expected 1 or more"),
    (["--temperature", "nan"], "--temperature is nan"),
    (["--rewards", "sem", "beauty"], "expected some of sem spa ri pi hps"),
    (["--combine", "median"], "median"),
    (["--model", "/no/such/model"], "/no/such/model"),
    (["--prompts"], "--prompts is empty"),
    (["--prompts", "/no/such/file"], "cannot read prompts from /no/such/file"),
    (
        ["--max_chain", "600"],
        "tokens but this model holds 512: shorten the prompt or lower max_chain (600)",
    ),
    (["--lora", "4", "--shard", "yes"], "--shard yes is for all weights"),
    (["--dtype", "bfloat16", "--shard", "no"], "trains all weights through float32 shards"),
    (["--out", "/proc/nowhere"], "cannot use /proc/nowhere as output folder"),
]


@pytest.mark.parametrize("flags, words", BAD, ids=[" ".join(flags) for flags, _ in BAD])
def test_bad_input_is_answered_in_one_line_with_exit_code_2(flags, words, tmp_path, capsys):
    out = [] if "--out" in flags else ["--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as stop:
        train_grpo.main([*flags, *out])
    message = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and message[-1].startswith("error: ") and words in message[-1]
    assert not (tmp_path / "run").exists(), "a refused run left something behind"


def test_a_folder_with_another_configuration_is_refused_and_untouched(grpo_run, capsys):
    before = (grpo_run / "config.json").read_text()
    with pytest.raises(SystemExit) as stop:
        train_grpo.main([*GRPO, "--out", str(grpo_run), "--lr", "5e-4", "--kl", "0"])
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and "--lr 0.0007 (now 0.0005), --kl 0.02 (now 0.0)" in message
    assert (grpo_run / "config.json").read_text() == before


def test_the_toys_judge_refuses_prompts_that_it_cannot_understand(tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a red ball\na photo of a cat\n")
    for flags in ([], ["--judge", "/some/judge"]):
        with pytest.raises(SystemExit) as stop:
            prompts = ["--prompts", str(tmp_path / "prompts.txt")]
            train_grpo.main([*prompts, *flags, "--out", str(tmp_path / "run")])
        assert (
            stop.value.code == 2
            and "know only the toy's world, not 'a photo of a cat'" in capsys.readouterr().err
        )


def test_a_judge_that_cannot_be_asked_is_refused_before_the_policy_is_loaded(
    tmp_path, monkeypatch, capsys
):
    for part in random_judge(template="{{ messages[0].content.parts }}{{ 1 + 'a' }}"):
        part.save_pretrained(tmp_path / "judge")
    monkeypatch.setattr(train_grpo.trainer, "load_engine", None)  # would fail in another way
    with pytest.raises(SystemExit) as stop:
        flags = ["--judge", str(tmp_path / "judge"), "--out", str(tmp_path / "run")]
        train_grpo.main([*GRPO, *flags])
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and message.startswith("error: this judge cannot be asked")
    assert not (tmp_path / "run").exists()


def test_the_four_marks_of_a_plan_are_in_the_log(tmp_path, monkeypatch):
    """Their means over the samples of the step; the mean of the four is `sem`."""

    class MarkingJudge(ToyJudge):
        def semantic(self, prompts, chains):
            scores = super().semantic(prompts, chains)
            self.marks = {"sem": {name: scores for name in rewards.CRITERIA[:3]}}
            self.marks["sem"]["clarity"] = [score / 2 for score in scores]
            return scores

    monkeypatch.setattr(rewards, "load_judge", lambda flags, device: (MarkingJudge(), crispness))
    flags = ["--steps", "1", "--batch_size", "1", "--group", "2", "--eval_prompts", "2"]
    train_grpo.main([*flags, "--out", str(tmp_path)])
    row = json.loads((tmp_path / "log.jsonl").read_text())
    assert row["sem_completeness"] == row["sem"] > 0
    assert row["sem_clarity"] == pytest.approx(row["sem"] / 2)


def test_a_model_that_writes_no_boxes_is_told_so_after_one_step(tmp_path):
    """Every reward would be 0, every group equal, and a thousand steps would learn nothing in
    silence."""
    with pytest.raises(
        RuntimeError, match="no chain has a box: start from a model that writes chains"
    ):
        train_grpo.main([*GRPO, "--max_chain", "1", "--out", str(tmp_path)])


def test_an_empty_prompt_file_is_refused(tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("\n \n")
    with pytest.raises(SystemExit) as stop:
        train_grpo.main(
            ["--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "run")]
        )
    assert (
        stop.value.code == 2 and "holds no prompt: expected one per line" in capsys.readouterr().err
    )


def kill_and_restart(folder: Path, flags: list[str], moments: list) -> int:
    """Starts the run again and again; kills it (SIGKILL) when `moments` in turn say so; returns the
    number of kills."""
    command, kills = [sys.executable, "train_grpo.py", *flags, "--out", str(folder)], 0
    one = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
    }  # as here: another number of threads adds in another order
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


KILLED = "--steps 5 --batch_size 2 --group 4 --eval_prompts 4 --save_every 1".split()


def test_a_run_that_is_killed_while_it_saves_ends_with_the_same_weights(tmp_path):
    def saving(_):
        return list((tmp_path / "killed").glob("step_*.tmp"))

    train_grpo.main([*KILLED, "--out", str(tmp_path / "whole")])
    assert kill_and_restart(tmp_path / "killed", KILLED, [saving]) == 1
    assert same(weights(tmp_path / "killed"), weights(tmp_path / "whole"))
    assert [row["step"] for row in rows(tmp_path / "killed")] == list(range(5))


@pytest.mark.slow
def test_a_run_that_is_killed_at_ten_random_moments_ends_with_the_same_weights(tmp_path):
    flags, rng = [*KILLED[2:], "--steps", "60"], random.Random(0)

    def some_time_after(step):  # a step takes less than a second, saving included
        reached, delay = [], rng.random()

        def now(seconds):
            if (tmp_path / "killed" / "log.jsonl").exists() and len(
                rows(tmp_path / "killed")
            ) > step:
                reached.append(seconds)
            return bool(reached) and seconds > reached[0] + delay

        return now

    train_grpo.main([*flags, "--out", str(tmp_path / "whole")])
    assert (
        kill_and_restart(tmp_path / "killed", flags, [some_time_after(5 * k) for k in range(10)])
        == 10
    )
    assert same(weights(tmp_path / "killed"), weights(tmp_path / "whole"))


def test_gradients_that_are_not_finite_are_skipped_and_counted_and_ten_in_a_row_stop_the_run(
    tmp_path, monkeypatch
):
    loss, calls = train_grpo.grpo_loss, []

    def broken(*args, **kwargs):
        calls.append(1)
        value, sums = loss(*args, **kwargs)
        return (value if len(calls) in (1, 4) else value * float("nan")), sums

    monkeypatch.setattr(train_grpo, "grpo_loss", broken)
    flags = [*GRPO[2:], "--steps", "30", "--save_every", "3", "--out", str(tmp_path)]
    with pytest.raises(RuntimeError, match="ten gradients in a row were not finite"):
        train_grpo.main(flags)
    assert [row["skipped"] for row in rows(tmp_path)] == [0, 1, 2, 0, *range(1, 10)]
    assert all(value.isfinite().all() for value in weights(tmp_path).values())


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_run_that_is_told_to_stop_saves_and_leaves_with_exit_code_0(tmp_path, name):
    command = [
        sys.executable,
        "train_grpo.py",
        *GRPO[2:],
        "--steps",
        "1000",
        "--out",
        str(tmp_path),
    ]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.time() + 120
    while (
        not ((tmp_path / "log.jsonl").exists() and len(rows(tmp_path)) >= 2)
        and time.time() < deadline
    ):
        time.sleep(0.2)
    process.send_signal(getattr(signal, name))
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    done = len(rows(tmp_path))
    assert done >= 2 and (tmp_path / "latest").read_text() == f"step_{done:06d}"
    assert f"stopped after step {done} of 1000" in output
    assert f"the same command continues from {tmp_path}" in output


def test_groups_of_equal_rewards_teach_nothing_and_are_counted(tmp_path, monkeypatch):
    """With the same reward for every sample the weights must not move, not even by the KL term or
    by weight decay."""
    score = rewards.score

    def all_equal(*args, **kwargs):
        return [row | {"total": 0.3} for row in score(*args, **kwargs)]

    monkeypatch.setattr(rewards, "score", all_equal)
    train_grpo.main([*GRPO[2:], "--steps", "2", "--out", str(tmp_path)])
    assert all(
        row["zero_var"] == 1 and row["grad_norm"] == 0 and row["reward_std"] == 0
        for row in rows(tmp_path)
    )
    toy_weights = safetensors.torch.load_file(ROOT / "toy" / "weights" / "model.safetensors")
    assert same(weights(tmp_path), toy_weights)
