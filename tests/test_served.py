"""A judge over HTTP: against the judge in this process, and against servers that misbehave.

pytest tests/test_served.py
bash tests/make_vllm_env.sh FOLDER && GOTR1_VLLM=FOLDER/bin/python pytest -m server
"""

import json
import math
import os
import random
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import openai
import pytest
import torch
from PIL import Image
from random_networks import PARTS_TEMPLATE, random_judge
from served_stub import Stub, by_chance, by_judge, wait_until
from test_rewards import LAYOUTS, PROMPTS, ask_all, images
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

import gotr1
import rewards
import train_grpo
from judges import served
from judges.qwen import QwenJudge
from judges.served import Request, ServedJudge
from render_boxes import Box, format_chain
from rewards import JudgeConfig

ROOT = Path(__file__).resolve().parent.parent
HI = Request("Hi", None, 3)
CHAINS = [format_chain(["A", *layout]) for layout in LAYOUTS]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Replies of 8 tokens, pauses that nobody notices, and no key."""
    for part, task in rewards.TASKS.items():
        monkeypatch.setitem(rewards.TASKS, part, task._replace(max_tokens=8))
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def echo(row):
    """Answers with the question; later requests come back first."""
    time.sleep(random.random() / 100)
    return row.text, {"Yes": -0.1}


@pytest.fixture
def stub():
    with Stub(echo) as one:
        yield one


@pytest.fixture
def readable():
    with Stub(by_chance) as one:
        yield one


# -------------------------------------------------------------------------------------------------
# The same judge


@pytest.mark.parametrize("scoring, spatial_as", [("reply", "text"), ("yes", "boxes")])
def test_what_a_judge_says_does_not_depend_on_where_it_runs(scoring, spatial_as, monkeypatch):
    """A random judge in float64; for "yes" some of its likely first tokens are the words."""
    parts = random_judge(dtype=torch.float64)
    monkeypatch.setattr(rewards, "YES", ("the", "a"))
    monkeypatch.setattr(rewards, "NO", ("is", "in"))
    loud = torch.full((len(parts[1]),), -8.0)
    loud[parts[1].convert_tokens_to_ids([*rewards.YES, *rewards.NO])] = 0.0
    if scoring == "yes":
        parts[0].lm_head.register_forward_hook(lambda module, inputs, logits: logits / 5 + loud)
    local = QwenJudge(parts, scoring=scoring, spatial_as=spatial_as)
    wanted, wanted_words = ask_all(local, range(4))
    with Stub(by_judge(QwenJudge(parts))) as stub:
        judge = ServedJudge(stub.url, frame="pixels", scoring=scoring, spatial_as=spatial_as)
        answers, words = ask_all(judge, range(4))
        sent = [row.body for row in stub.rows]
    assert words == wanted_words
    for calls, theirs in zip(answers, wanted, strict=True):
        assert calls == [pytest.approx(one, abs=1e-6) for one in theirs]
    if scoring == "yes":
        assert None not in answers[0] and len(set(answers[0])) == 4
        assert judge.marks["sem"].keys() == local.marks["sem"].keys()
    assert len(set(words["ri"])) > 1  # it looks at what it is given
    for body in sent:
        assert (body["temperature"], body["seed"], body["repetition_penalty"]) == (0, 0, 1.0)


def test_pictures_are_sent_as_qwen_resizes_them(stub):
    """The processor makes the same pixels of what we send as of the original."""
    processor = random_judge()[2]
    judge = ServedJudge(stub.url, frame="pixels")
    for size in [(384, 384), (32, 32), (8, 300), (448, 448), (37, 23), (185, 115)]:
        picture = images()[0].resize(size)
        judge.alignment(["a dog"], [picture])
        ours = processor([stub.rows[-1].image], return_tensors="pt")
        theirs = processor([picture], return_tensors="pt")
        assert torch.equal(ours["image_grid_thw"], theirs["image_grid_thw"])
        assert torch.equal(ours["pixel_values"], theirs["pixel_values"])
        height, width = stub.rows[-1].image.height, stub.rows[-1].image.width
        assert theirs["image_grid_thw"].tolist() == [[1, height // 14, width // 14]]


@pytest.mark.parametrize(
    "frame, patch, fewest, most",  # as in the published preprocessor_config.json of the two
    [("pixels", 14, 56 * 56, 12845056), ("grid", 16, 65536, 16777216)],
)
def test_sizes_are_those_of_qwen_from_tiny_to_huge(frame, patch, fewest, most):
    """Their rule is transformers' smart_resize; 8000 x 6000 is more than they look at."""
    sizes = [(8000, 6000), (3584, 3584), (4096, 4096), (12000, 200), (384, 200), (32, 32), (9, 300)]
    for width, height in sizes:
        high, wide = smart_resize(height, width, 2 * patch, fewest, most)
        assert served.sent_size((width, height), frame) == (wide, high), (width, height)


def test_each_distinct_picture_is_encoded_once_per_call(readable, monkeypatch):
    saved = []
    save = Image.Image.save

    def counted(image, *args, **settings):
        saved.append(image.size)
        save(image, *args, **settings)

    judge = ServedJudge(readable.url, frame="pixels")
    monkeypatch.setattr(Image.Image, "save", counted)
    first, second = images()[:2]
    judge.ground([first, first, second, first.copy()], ["dog", "cat", "dog", "cow"])
    assert saved == [(56, 56), (112, 56)] or saved == [(112, 56), (56, 56)]
    judge.alignment(["a", "b"], [second, second])
    assert len(saved) == 3


# -------------------------------------------------------------------------------------------------
# What boxes count in


SQUARES = {
    "pixels": [224, 56, 392, 224],  # of 448 x 448
    "grid": [500, 125, 875, 500],
    "cm": [5, 1, 9, 5],
    "mirrored": [56, 224, 224, 392],
}


@pytest.mark.parametrize("kind", SQUARES)
def test_a_drawn_square_tells_what_boxes_count_in(kind):
    def answer(row):
        assert row.image.size == (448, 448)
        assert row.image.getpixel((300, 100)) == (255, 0, 0)
        assert row.image.getpixel((100, 300)) == (255, 255, 255)
        return json.dumps([{"bbox_2d": SQUARES[kind], "label": "red square"}]), None

    with Stub(answer) as stub:
        if kind in ("pixels", "grid"):
            assert ServedJudge(stub.url).frame == kind
        else:
            with pytest.raises(ValueError, match="does not find a red square.*Expected a Qwen"):
                ServedJudge(stub.url)


@pytest.mark.parametrize(
    "frame, box", [("pixels", [98, 0, 196, 196]), ("grid", [250, 0, 500, 1000])]
)
def test_boxes_come_back_in_the_frame_of_the_picture(frame, box):
    """384 x 200 pixels: Qwen2.5-VL sees 392 x 196."""
    with Stub(lambda row: (json.dumps({"bbox_2d": box}), None)) as stub:
        judge = ServedJudge(stub.url, frame=frame)
        found = judge.ground([Image.new("RGB", (384, 200))], ["dog"])
    assert found == [[Box("dog", 250, 0, 500, 1000)]]


# -------------------------------------------------------------------------------------------------
# Many at once, and none is lost


def test_requests_are_in_flight_together_and_come_back_in_order(stub):
    stub.answer = lambda row: (row.text, None)
    stub.delay = 0.02
    server = served.Server(stub.url, in_flight=8)
    requests = [Request(str(k), None, 3) for k in range(40)]
    assert [answer.text for answer in server.complete(requests)] == [str(k) for k in range(40)]
    assert 4 <= stub.most_busy <= 8 and len(stub.rows) == 40
    assert server.complete([]) == []
    assert [answer.text for answer in server.complete([HI] * 3)] == ["Hi"] * 3
    assert len(stub.rows) == 41  # equal requests are sent once


@pytest.mark.parametrize("fault", ["cut", "half", 408, 429, 500, 503])
def test_what_may_pass_is_tried_again(stub, fault):
    server = served.Server(stub.url)
    stub.faults = [fault, None, fault, fault]
    requests = [Request(text, None, 3) for text in "abc"]
    assert [answer.text for answer in server.complete(requests)] == ["a", "b", "c"]
    assert not stub.faults


def test_the_server_says_when_to_come_again(stub):
    """Retry-After, here in milliseconds."""
    server = served.Server(stub.url)
    stub.faults = [503]
    stub.retry_ms = 700
    begin = time.monotonic()
    assert server.complete([HI])[0].text == "Hi"
    assert time.monotonic() - begin > 0.7


def test_a_server_that_is_still_loading_is_waited_for(capsys):
    """Nobody listens at first; by default for ten minutes, which a 7B needs to load."""
    assert served.PATIENCE == 600
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with Stub(echo, port=port, after=0.5):
        server = served.Server(f"http://127.0.0.1:{port}/v1")
        assert server.model == "judge" and server.complete([HI])[0].text == "Hi"
    assert f"waiting up to 600 s for http://127.0.0.1:{port}" in capsys.readouterr().err


def test_silence_is_not_waited_for_for_ever(stub, monkeypatch):
    monkeypatch.setattr(served, "ATTEMPT", 0.3)
    server = served.Server(stub.url)
    stub.faults = ["silent"]
    begin = time.time()
    assert server.complete([HI])[0].text == "Hi"
    assert time.time() - begin < 5


@pytest.mark.parametrize(
    "fault, message",
    [("cut", "disconnected"), (500, "500 Internal Server Error"), ("silent", "no answer")],
)
def test_what_does_not_pass_stops_the_run(stub, fault, message, monkeypatch):
    judge = ServedJudge(stub.url, frame="grid", patience=1.5)
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 5.0)
    stub.retry_ms = 5000
    stub.faults = [fault] * 200
    with pytest.raises(ConnectionError, match=f"no answer from .* within 1.5 s: .*{message}"):
        rewards.score(judge, None, ["a dog"], ["A dog."], images()[:1])  # never a reward


@pytest.mark.parametrize("fault", [400, 401, 403, 404, 422])
def test_a_refused_request_stops_at_once_with_the_words_of_the_server(stub, fault):
    server = served.Server(stub.url)
    stub.faults = [fault]
    with pytest.raises(ValueError, match=f"refuses: HTTP {fault}: .*status {fault} for Bearer"):
        server.complete([HI])
    assert not stub.rows


@pytest.mark.parametrize(
    "fault, request_, message",
    [
        ("two choices", HI, "did not answer with one choice that has a text:"),
        ("no text", HI, "did not answer with one choice that has a text:"),
        ("no json", HI, "sends no JSON"),
        (None, HI._replace(likeliest=True), r"a text and log-probabilities \(top_logprobs\)"),
    ],
)
def test_an_answer_of_another_shape_stops_at_once(stub, fault, request_, message):
    server = served.Server(stub.url)
    stub.answer = lambda row: ("Hi", None)  # and no log-probabilities
    stub.faults = [fault]
    with pytest.raises(ValueError, match=message):
        server.complete([request_])
    assert len(stub.rows) == 1


def test_the_key_comes_from_the_environment_and_is_not_shown(stub, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    server = served.Server(stub.url)
    stub.faults = [500, 401]  # both quote what they were sent
    with pytest.raises(ValueError, match=r"Bearer \*\*\*") as problem:
        server.complete([HI])
    assert "sk-secret" not in str(problem.value) + capsys.readouterr().err
    assert stub.keys == {"Bearer sk-secret"}
    for url in ("http://me:sk-secret@host/v1", "http://host/v1?key=sk-secret"):
        with pytest.raises(ValueError, match="put it into OPENAI_API_KEY") as problem:
            served.Server(url)
        assert "secret" not in str(problem.value)


def test_what_is_no_server_is_refused_in_one_line(stub, monkeypatch, capsys):
    for url in ("http://", "http://host:eighty/v1"):
        with pytest.raises(ValueError):
            served.Server(url)
    with pytest.raises(ValueError, match="refuses: HTTP 404"):
        served.Server(stub.url.removesuffix("/v1"))
    stub.lists = "a page"
    with pytest.raises(ValueError, match="does not list its models"):
        served.Server(stub.url)
    with pytest.raises(ConnectionError, match="127.0.0.1:9/v1 within 0.1 s: .*attempts failed"):
        served.Server("http://127.0.0.1:9/v1", patience=0.1)
    assert "waiting up to 0.1 s for http://127.0.0.1:9/v1" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ValueError, match="pip install openai"):
        served.Server(stub.url)


def test_the_model_is_the_only_one_or_named(stub):
    assert served.Server(stub.url).model == "judge"
    stub.models = ("judge", "other")
    with pytest.raises(ValueError, match="has the models judge, other: choose .* --judge_model$"):
        served.Server(stub.url)
    assert served.Server(stub.url, "other").complete([HI])[0].text == "Hi"
    with pytest.raises(ValueError, match="judge, other: .* --judge_model, not third"):
        served.Server(stub.url, "third")


def test_probabilities_are_those_of_the_likeliest_tokens(stub):
    """A word that is not among them counts as impossible, also one that is two tokens."""
    stub.answer = lambda row: ("", {"Yes": math.log(0.5), " ": math.log(0.25), "3": -3.0})
    judge = ServedJudge(stub.url, frame="grid", scoring="yes")
    question = rewards.Question("Is it?", None, 9)
    chances = judge.probabilities([question], ["Yes", "No", " 3"])
    assert chances == [[pytest.approx(0.5), 0.0, 0.0]]
    assert stub.rows[-1].body["max_tokens"] == 1 and stub.rows[-1].top == 20
    assert judge.semantic(["a"], ["c"]) == [pytest.approx(1.0)] and len(stub.rows) == 5


# -------------------------------------------------------------------------------------------------
# Questions sent before the rewards are needed


def hps(prompts, pictures):
    return [len(prompt) + picture.width for prompt, picture in zip(prompts, pictures, strict=True)]


@pytest.mark.parametrize("scoring", ["reply", "yes"])
def test_rewards_do_not_depend_on_what_was_asked_early(readable, scoring):
    """Prompt by prompt, all of them; then some, and others that are not needed after all."""
    judge = ServedJudge(readable.url, frame="pixels", scoring=scoring)
    chains = [CHAINS[0], "no box", *CHAINS[2:]]
    samples = (PROMPTS, chains, images())
    wanted = rewards.score(judge, hps, *samples, combine="sum")
    sent = len(readable.rows)
    assert len({row["total"] for row in wanted}) > 2 and wanted[1]["ri"] == 0 < wanted[0]["sem"]
    for part in (slice(0, 1), slice(1, 2), slice(2, 5)):
        judge.ask_early(*(column[part] for column in samples), rewards.PARTS)
    wait_until(lambda: len(readable.rows) == 2 * sent)
    assert rewards.score(judge, hps, *samples, combine="sum") == wanted
    assert len(readable.rows) == 2 * sent  # nothing was asked again

    readable.rows.clear()
    judge.ask_early(PROMPTS[:2], chains[:2], images()[:2], ("sem", "pi"))
    judge.ask_early(["of another"], ["step"], images()[:1], ("sem",))
    assert rewards.score(judge, hps, *samples, combine="sum") == wanted
    others = [row for row in readable.rows if "of another" in row.text]
    assert len(readable.rows) - len(others) == sent
    assert rewards.score(judge, hps, *samples, combine="sum") == wanted
    assert len(readable.rows) - len(others) == 2 * sent  # replies are not kept any longer


def test_the_judge_works_while_this_process_draws_on(readable):
    """Four questions one after the other take 0.4 s; when the rewards are wanted they are there."""
    judge = ServedJudge(readable.url, in_flight=1, frame="pixels")
    readable.delay = 0.1
    begin = time.monotonic()
    judge.ask_early(PROMPTS[:1], CHAINS[:1], images()[:1], rewards.PARTS)
    assert time.monotonic() - begin < 0.05
    wait_until(lambda: len(readable.rows) == 4 and not readable.busy)
    begin = time.monotonic()
    rewards.score(judge, None, PROMPTS[:1], CHAINS[:1], images()[:1])
    assert time.monotonic() - begin < 0.1 and len(readable.rows) == 4


def test_a_failed_early_question_fails_when_its_reply_is_needed(stub, capsys):
    judge = ServedJudge(stub.url, frame="pixels")
    stub.faults = [400]
    judge.ask_early(["a dog"], ["A dog."], [], ("sem",))
    wait_until(lambda: not stub.faults)
    with pytest.raises(ValueError, match="HTTP 400"):
        rewards.score(judge, None, ["a dog"], ["A dog."], [], parts=("sem",))
    stub.answer = by_chance
    assert rewards.score(judge, None, ["a dog"], ["A dog."], [], parts=("sem",))[0]["sem"] > 0
    assert capsys.readouterr().err == ""


RAISES = """
import sys, time
from judges.served import ServedJudge

judge = ServedJudge(sys.argv[1], frame="pixels")
judge.ask_early(["a dog"] * 99, [str(k) for k in range(99)], [], ("sem",))
time.sleep(4)  # the questions are on their way
raise SystemExit(7)
"""


def test_a_program_that_ends_waits_for_no_reply(readable):
    """Questions that a server never answers used to keep a process alive that had raised."""
    readable.delay = 60.0
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", RAISES, readable.url], cwd=ROOT, timeout=50)
    assert done.returncode == 7 and time.monotonic() - begin < 40 and readable.busy


# -------------------------------------------------------------------------------------------------
# The programs


def test_flags_name_a_served_judge(readable):
    flags = {"judge": readable.url, "hps": ""}
    judge, _ = rewards.load_judge(JudgeConfig(**flags), "cpu")
    assert isinstance(judge, ServedJudge)
    assert (judge.server.free._value, judge.frame, judge.scoring) == (64, "pixels", "reply")
    settings = {"scoring": "yes", "spatial_as": "text", "judge_batch": 3, "judge_model": "judge"}
    judge, _ = rewards.load_judge(JudgeConfig(**settings, **flags), "cpu")
    assert (judge.server.free._value, judge.scoring, judge.spatial_as) == (3, "yes", "text")


def test_scripts_with_a_served_judge(readable, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("chain.txt").write_text(CHAINS[0])
    images()[0].save("picture.png")
    rewards.main(["--prompt", "a dog", "--judge", readable.url])
    printed = capsys.readouterr().out
    assert "sem" in printed and "bbox_2d" in printed and Path("rewards.png").exists()
    gotr1.main(["a red ball", "--judge", readable.url, "--n", "1", "--out", str(tmp_path)])
    assert len(list(tmp_path.glob("000_0.png"))) == 1
    readable.answer = lambda row: ("I see nothing", None)
    with pytest.raises(SystemExit) as stop:
        rewards.main(["--prompt", "a dog", "--judge", readable.url])
    (line,) = [one for one in capsys.readouterr().err.splitlines() if one.startswith("error: ")]
    assert stop.value.code == 2 and line.startswith("error: the judge at http")


def test_training_with_a_served_judge_and_without_it(readable, tmp_path, monkeypatch):
    """A step whose questions are asked prompt by prompt; then the server goes away, and the run
    ends with its last checkpoint whole."""
    score, ask_early = rewards.score, ServedJudge.ask_early
    early = []

    def asking(judge, *samples):
        early.append(len(samples[0]))
        ask_early(judge, *samples)

    def scoring(judge, *samples, **settings):
        judge.server.patience = 4.0
        scores = score(judge, *samples, **settings)
        if sum(early) == 4:  # after the rewards of the first step
            readable.faults = [500] * 10_000
            readable.retry_ms = 9000
        return scores

    monkeypatch.setattr(ServedJudge, "ask_early", asking)
    monkeypatch.setattr(rewards, "score", scoring)
    monkeypatch.setattr(train_grpo, "look", lambda *_, **__: None)  # no evaluation
    flags = ["--steps", "2", "--save_every", "1", "--batch_size", "2", "--group", "2"]
    flags += ["--rollout_batch", "1", "--eval_prompts", "1", "--judge", readable.url]
    with pytest.raises(ConnectionError, match="within 4 s: .*500 Internal Server Error"):
        train_grpo.main([*flags, "--out", str(tmp_path)])
    assert early[:2] == [2, 2]
    assert (tmp_path / "latest").read_text() == "step_000001"
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1


# -------------------------------------------------------------------------------------------------
# vLLM itself


def plain_judge():
    """(model, tokenizer, image processor): a random Qwen2.5-VL of a size that vLLM serves, which
    writes nothing but ASCII: pieces of other characters are decoded in different ways."""
    model, tokenizer, image_processor = random_judge(size="served")
    tokenizer.chat_template = PARTS_TEMPLATE  # as Qwen2.5-VL's processor, from which vLLM takes it
    for k in range(len(tokenizer)):
        text = tokenizer.decode([k])
        if not text.isascii() or not text.isprintable() or k in tokenizer.all_special_ids:
            model.lm_head.weight.data[k] = 0  # never the likeliest
    return model, tokenizer, image_processor


@pytest.fixture(scope="module")
def vllm(tmp_path_factory):
    """(address of the API, folder of the judge) of vLLM, started for these tests."""
    python = os.environ.get("GOTR1_VLLM")
    assert python, "GOTR1_VLLM names the Python of an environment by tests/make_vllm_env.sh"
    folder = tmp_path_factory.mktemp("judge")
    for part in plain_judge():
        part.save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", "judge", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "2048"]
    command += ["--limit-mm-per-prompt", '{"image":1}']
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    environment.pop("PYTHONPATH", None)  # its packages are its own
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            wait_for(f"http://127.0.0.1:{port}/health", server, folder / "server.log")
            yield f"http://127.0.0.1:{port}/v1", folder
        finally:
            server.terminate()
            server.wait(30)


def wait_for(address, server, log, seconds=300):
    deadline = time.time() + seconds
    while time.time() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(1)
    raise RuntimeError(f"vLLM does not serve:\n{log.read_text()[-3000:]}")


@pytest.mark.server
@pytest.mark.parametrize("spatial_as", ["boxes", "text"])
def test_vllm_replies_as_the_same_weights_do_here(vllm, spatial_as):
    url, folder = vllm
    local = QwenJudge(str(folder), dtype=torch.float32, batch_size=1, spatial_as=spatial_as)
    judge = ServedJudge(url, frame="pixels", spatial_as=spatial_as)
    assert ask_all(judge, range(5)) == ask_all(local, range(5))
    assert len(set(judge.words["pi"])) > 1


@pytest.mark.server
def test_vllm_gives_the_probabilities_of_the_same_weights_here(vllm):
    url, folder = vllm
    local = QwenJudge(str(folder), dtype=torch.float32, batch_size=1)
    questions = [rewards.Question(*pair, 1) for pair in zip(PROMPTS, images(), strict=True)]
    words = [local.tokenizer.decode([k]) for k in range(32, 127)]
    wanted = local.probabilities(questions, words)
    chances = ServedJudge(url, frame="pixels").probabilities(questions, words)
    known = 0
    for ours, theirs in zip(chances, wanted, strict=True):
        for chance, exact in zip(ours, theirs, strict=True):
            assert chance in (0, pytest.approx(exact, abs=1e-4))  # 0: not among the 20 likeliest
            known += chance > 0
    assert known > 5


@pytest.mark.server
def test_vllm_with_32_questions_in_flight(vllm):
    url, _ = vllm
    prompts = [f"{k} dogs" for k in range(32)]
    pictures = [images()[k % 5] for k in range(32)]
    one_by_one = ServedJudge(url, in_flight=1, frame="pixels")
    together = ServedJudge(url, in_flight=32, frame="pixels")
    assert together.alignment(prompts, pictures) == one_by_one.alignment(prompts, pictures)
    assert together.words == one_by_one.words


@pytest.mark.server
def test_vllm_refuses_in_its_own_words(vllm):
    url, _ = vllm
    with pytest.raises(ValueError, match="has the models judge: choose one .*, not other"):
        ServedJudge(url, "other")
    with pytest.raises(ValueError, match="does not find a red square"):
        ServedJudge(url)  # a random judge sees nothing
    with pytest.raises(ValueError, match="HTTP 400: .*2048"):  # too long
        ServedJudge(url, frame="pixels").semantic(["a dog"], ["A dog. " * 2000])
