"""A judge over HTTP: against the judge in this process, and against servers that misbehave.

pytest tests/test_served.py
bash tests/make_vllm_env.sh FOLDER && GOTR1_VLLM=FOLDER/bin/python pytest -m server
python tests/test_served.py FOLDER    # writes a random judge that vLLM serves and whose marks
                                      # can be read
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

import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for the command above
sys.path.insert(0, str(Path(__file__).resolve().parent))

from served_stub import Stub, by_chance, by_judge
from test_rewards import LAYOUTS, PARTS_TEMPLATE, PROMPTS, ask_all, images, random_judge

import gotr1
import rewards
import train_grpo
from judges import served
from render_boxes import Box, format_chain
from rewards import JudgeConfig, QwenJudge, ServedJudge

ROOT = Path(__file__).resolve().parent.parent
HI = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Replies of 8 tokens, pauses that nobody notices, and no key."""
    for part, task in rewards.TASKS.items():
        monkeypatch.setitem(rewards.TASKS, part, task._replace(max_tokens=8))
    monkeypatch.setattr(served, "FIRST_PAUSE", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def echo(row):
    """Answers with the question; later rows come back first."""
    time.sleep(random.random() / 100)
    return row.text, {"7": -0.1}


@pytest.fixture
def stub():
    with Stub(echo) as one:
        yield one


# -------------------------------------------------------------------------------------------------
# The same judge


@pytest.fixture(scope="module")
def parts():
    """A random judge in float64 that likes digits, so that the 20 likeliest tokens hold all ten."""
    model, tokenizer, image_processor = random_judge(dtype=torch.float64)
    loud = torch.full((len(tokenizer),), -8.0)
    loud[tokenizer.convert_tokens_to_ids(list("0123456789"))] = 0.0
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits / 5 + loud)
    return model, tokenizer, image_processor


@pytest.mark.parametrize(
    "scoring, semantic_as, spatial_as",
    [("reply", "four", "boxes"), ("expected", "four", "boxes"), ("expected", "one", "text")],
)
def test_what_a_judge_says_does_not_depend_on_where_it_runs(
    parts, scoring, semantic_as, spatial_as
):
    settings = {"scoring": scoring, "semantic_as": semantic_as, "spatial_as": spatial_as}
    local = QwenJudge(parts, **settings)
    wanted, wanted_words = ask_all(local, range(5))
    with Stub(by_judge(QwenJudge(parts))) as stub:
        judge = ServedJudge(stub.url, frame="pixels", **settings)
        answers, words = ask_all(judge, range(5))
        sent = [row.body for row in stub.rows]
    assert words == wanted_words
    for calls, theirs in zip(answers, wanted, strict=True):
        assert calls == [pytest.approx(one, abs=1e-6) for one in theirs]
    if scoring == "expected":
        assert None not in answers[0] and len(set(answers[0])) == 5
        assert judge.marks.keys() == local.marks.keys()
    assert len(set(words["ri"])) > 1  # it looks at what it is given
    for body in sent:
        assert (body["temperature"], body["seed"], body["repetition_penalty"]) == (0, 0, 1.0)


def test_pictures_are_sent_as_qwen_resizes_them(parts, stub):
    """The processor makes the same pixels of what we send as of the original."""
    judge = ServedJudge(stub.url, frame="pixels")
    random.seed(0)
    for size in [(384, 384), (32, 32), (8, 300), (448, 448), *((k * 37, k * 23) for k in (1, 5))]:
        picture = images()[0].resize(size)
        sent = judge._resized(picture)
        ours = parts[2]([sent], return_tensors="pt")
        theirs = parts[2]([picture], return_tensors="pt")
        assert torch.equal(ours["image_grid_thw"], theirs["image_grid_thw"])
        assert torch.equal(ours["pixel_values"], theirs["pixel_values"])
        judge.alignment(["a dog"], [picture])
        assert stub.rows[-1].image.tobytes() == sent.tobytes()  # a PNG: without loss
    judge.frame = "grid"  # Qwen3-VL: 32 pixels per token, and 64 tokens or more
    sizes = [judge._resized(Image.new("RGB", size)).size for size in ((384, 200), (32, 32))]
    assert sizes == [(384, 192), (256, 256)]


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
            with pytest.raises(ValueError, match="does not find a red square.*--judge_frame"):
                ServedJudge(stub.url)
            # who knows better may say so
            assert ServedJudge(stub.url, frame="grid").frame == "grid"


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


def test_rows_are_in_flight_together_and_come_back_in_order(stub):
    stub.answer = lambda row: (row.text, None)
    stub.delay = 0.02
    server = served.Server(stub.url, in_flight=8)
    requests = [{**HI, "messages": [{"role": "user", "content": str(k)}]} for k in range(40)]
    assert [answer.text for answer in server.complete(requests)] == [str(k) for k in range(40)]
    assert 4 <= stub.most_busy <= 8
    assert server.complete([]) == []


@pytest.mark.parametrize("fault", ["cut", "half", 408, 429, 500, 503])
def test_what_may_pass_is_tried_again(stub, fault, capsys):
    server = served.Server(stub.url)
    stub.faults = [fault, None, fault, fault]
    answers = server.complete([HI] * 3)
    assert [answer.text for answer in answers] == ["Hi"] * 3 and not stub.faults
    assert "again in" in capsys.readouterr().err  # in the bar


def test_silence_is_not_waited_for_for_ever(stub):
    stub.faults = ["silent"]
    server = served.Server(stub.url, timeout=0.3)
    begin = time.time()
    assert server.complete([HI])[0].text == "Hi"
    assert time.time() - begin < 5


@pytest.mark.parametrize(
    "fault, message",
    [("cut", "connection lost"), (500, "HTTP 500: .*status 500"), ("silent", "no answer within")],
)
def test_what_does_not_pass_stops_the_run(stub, fault, message):
    server = served.Server(stub.url, timeout=0.1, patience=0.3)
    stub.faults = [fault] * 200
    with pytest.raises(ConnectionError, match=f"failed for 0.3 s, last with {message}"):
        server.complete([HI] * 3)
    stub.faults = [fault] * 200
    judge = ServedJudge(stub.url, "judge", frame="grid")
    judge.server = server
    with pytest.raises(ConnectionError):  # never a score
        rewards.score(judge, None, ["a dog"], ["A dog."], images()[:1])


def test_pauses_grow(stub, monkeypatch):
    monkeypatch.setattr(served, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(served, "LONGEST_PAUSE", 0.08)
    server = served.Server(stub.url)
    pauses = []
    sleep = served.asyncio.sleep

    async def sleeping(seconds, *more):
        if seconds:
            pauses.append(seconds)
        return await sleep(seconds, *more)

    monkeypatch.setattr(served.asyncio, "sleep", sleeping)
    stub.faults = [500] * 5
    server.complete([HI])
    assert [pause for pause in pauses if pause in (0.02, 0.04, 0.08)] == [
        0.02,
        0.04,
        0.08,
        0.08,
        0.08,
    ]


@pytest.mark.parametrize("fault", [400, 401, 403, 404, 422])
def test_a_refused_request_stops_at_once_with_the_words_of_the_server(stub, fault):
    server = served.Server(stub.url)
    stub.faults = [fault]
    with pytest.raises(ValueError, match=f"refuses: HTTP {fault}: .*status {fault} for Bearer"):
        server.complete([HI])
    assert not stub.rows


@pytest.mark.parametrize("fault", ["two choices", "no text"])
def test_an_answer_of_another_shape_stops_at_once(stub, fault):
    server = served.Server(stub.url)
    stub.faults = [fault]
    with pytest.raises(ValueError, match="did not answer with one choice that has a text"):
        server.complete([HI])
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


def test_what_is_no_server_is_refused_in_one_line(stub, monkeypatch):
    for url in ("http://", "http://host:eighty/v1"):
        with pytest.raises(ValueError):
            served.Server(url)
    with pytest.raises(ValueError, match="refuses: HTTP 404"):
        served.Server(stub.url.removesuffix("/v1"))
    stub.lists = "a page"
    with pytest.raises(ValueError, match="does not list its models"):
        served.Server(stub.url)
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ValueError, match="pip install openai"):
        served.Server(stub.url)


def test_the_model_is_the_only_one_or_named(stub):
    assert served.Server(stub.url).model == "judge"
    stub.models = ("judge", "other")
    with pytest.raises(ValueError, match="has the models judge, other: choose .* --judge_model"):
        served.Server(stub.url)
    assert served.Server(stub.url, "other").complete([HI])[0].text == "Hi"
    with pytest.raises(ValueError, match="The model `third` does not exist"):
        served.Server(stub.url, "third").complete([HI])


# -------------------------------------------------------------------------------------------------
# Expected marks


def test_expected_marks_with_hand_numbers(stub):
    """P(8) = P(1) = 0.4, P(0 behind a 1) = 0.25: as in the same test of QwenJudge, 5.625."""

    def answer(row):
        if row.begun.endswith("1"):
            return "", {"0": math.log(0.25), "x": math.log(0.75)}
        return "", {"8": math.log(0.4), "1": math.log(0.4), "x": math.log(0.2)}

    stub.answer = answer
    judge = ServedJudge(stub.url, frame="grid", scoring="expected", semantic_as="one")
    stub.rows.clear()
    assert judge.semantic(["a", "b"], ["c", "d"]) == pytest.approx([0.5625] * 2)
    assert [row.begun for row in stub.rows].count('{"score": 1') == 2 and len(stub.rows) == 4
    stub.answer = lambda row: ("", {"8": math.log(0.7)})  # nothing to ask behind a 1
    stub.rows.clear()
    assert judge.semantic(["a"], ["c"]) == [pytest.approx(0.8)] and len(stub.rows) == 1


@pytest.mark.parametrize(
    "cannot, message",
    [
        ({"logprobs": False}, "gives no log-probabilities"),
        ({"closes": True}, "closes a begun reply"),
        ({"faults": [None, None, 400]}, "does not take a begun reply: .* HTTP 400"),
    ],
)
def test_a_server_that_cannot_expect_is_refused_in_one_line(stub, cannot, message):
    server = ServedJudge(stub.url, frame="grid").server
    for name, value in cannot.items():
        setattr(stub, name, value[1:] if name == "faults" else value)
    if "faults" in cannot:  # whichever of the two requests comes first
        stub.faults = [400, 400]
    with pytest.raises(ValueError, match=message + ".*: use --scoring reply") as problem:
        ServedJudge(stub.url, "judge", frame="grid", scoring="expected")
    assert "\n" not in str(problem.value) and server.model == "judge"
    stub.faults = []
    ServedJudge(stub.url, frame="grid")  # replies need neither


# -------------------------------------------------------------------------------------------------
# The programs


@pytest.fixture
def readable():
    with Stub(by_chance) as one:
        yield one


def test_flags_name_a_served_judge(readable):
    flags = {"judge": readable.url, "hps": ""}
    judge, _ = rewards.load_judge(JudgeConfig(judge_frame="grid", **flags), "cpu")
    assert isinstance(judge, ServedJudge)
    assert (judge.server.free._value, judge.frame, judge.scoring) == (64, "grid", "reply")
    assert judge.server.model == "judge"
    settings = {"scoring": "expected", "spatial_as": "text", "semantic": "one", "judge_batch": 3}
    flags = JudgeConfig(judge_frame="pixels", judge_model="judge", **settings, **flags)
    judge, _ = rewards.load_judge(flags, "cpu")
    assert (judge.server.free._value, judge.scoring, judge.spatial_as) == (3, "expected", "text")
    assert judge.semantic_as == "one"


def test_script_with_a_served_judge(readable, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("chain.txt").write_text(format_chain(["A", *LAYOUTS[0]]))
    images()[0].save("picture.png")
    command = ["--prompt", "a dog", "--judge", readable.url]
    rewards.main([*command, "--judge_frame", "pixels", "--semantic", "one"])
    printed = capsys.readouterr().out
    assert "sem" in printed and "bbox_2d" in printed and Path("rewards.png").exists()
    with pytest.raises(SystemExit) as stop:  # this judge does not find the square
        rewards.main(command)
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and printed.startswith("error: the judge at http")
    assert printed.count("\n") == 1


def test_plans_are_chosen_by_a_served_judge(readable, tmp_path, monkeypatch):
    asked = {}

    def load_judge(flags, device):
        asked.update(judge=flags.judge, model=flags.judge_model)
        return ServedJudge(flags.judge, flags.judge_model, frame="pixels"), None

    monkeypatch.setattr(rewards, "load_judge", load_judge)
    flags = ["--judge", readable.url, "--judge_model", "judge", "--plans", "2"]
    gotr1.main(["a red ball", *flags, "--out", str(tmp_path)])
    assert asked == {"judge": readable.url, "model": "judge"}
    assert len(list(tmp_path.glob("000_0.png"))) == 1


GRPO = [
    *("--steps", "1", "--batch_size", "4", "--group", "2", "--eval_prompts", "1"),
    *("--judge_frame", "pixels"),
]


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_rewards_of_parts_are_those_of_the_whole(readable):
    judge = ServedJudge(readable.url, frame="pixels")
    chains = [format_chain(["A", *layout]) for layout in LAYOUTS]
    chains[1] = "no box"

    def hps(prompts, pictures):
        return [
            len(prompt) + picture.width for prompt, picture in zip(prompts, pictures, strict=True)
        ]

    wanted = rewards.score(judge, hps, PROMPTS, chains, images(), combine="sum")
    asked = []
    for rows in (slice(0, 1), slice(1, 2), slice(2, 5)):
        asked.append(rewards.ask(judge, PROMPTS[rows], chains[rows], images()[rows]))
    assert rewards.add_up(rewards.Asked.join(asked), hps, combine="sum") == wanted
    assert len({row["total"] for row in wanted}) > 2 and wanted[1]["ri"] == 0 < wanted[0]["sem"]
    # what most replies are is asked of all: three unreadable ones of eleven are few
    readable.answer = lambda row: ("hm", None)
    asked.append(rewards.ask(judge, ["p"], ["no box"], images()[:1], parts=("sem", "pi")))
    assert len(rewards.add_up(rewards.Asked.join(asked), hps)) == 6
    with pytest.raises(RuntimeError, match="cannot be read"):
        rewards.add_up(asked[-1], hps, parts=("sem", "pi"))


def test_rewards_are_asked_for_while_the_rank_draws_on(readable, tmp_path, monkeypatch):
    """Prompt by prompt: the rewards of all samples asked at once, and less time of waiting."""
    ask, scores = train_grpo.Asker.ask, train_grpo.Asker.scores
    handed_over, waited = [], []

    def asking(asker, *samples):
        handed_over.append(samples)
        time.sleep(0.5)  # as long as the judge needs; the next prompt takes as long to draw
        ask(asker, *samples)

    def checked(asker):
        begin = time.time()
        rows = scores(asker)
        waited.append((time.time() - begin) / asker.seconds)
        assert [len(prompts) for prompts, _, _ in handed_over] == [2] * 4
        whole = [sum(lists, []) for lists in zip(*handed_over, strict=True)]
        assert rows == rewards.score(asker.training.judge, asker.training.hps, *whole)
        assert len({row["total"] for row in rows}) > 1
        return rows

    monkeypatch.setattr(train_grpo.Asker, "ask", asking)
    monkeypatch.setattr(train_grpo.Asker, "scores", checked)
    readable.delay = 0.1  # four calls, one after the other
    flags = [*GRPO, "--rollout_batch", "1", "--judge", readable.url, "--out", str(tmp_path)]
    train_grpo.main(flags)
    (row,) = rows_of(tmp_path)
    assert waited[0] < 0.7  # it would be 1 if all were asked in the end
    assert row["judge_s"] > 1.6  # four times four calls


def test_a_server_that_goes_away_leaves_the_last_checkpoint_whole(readable, tmp_path, monkeypatch):
    load_judge, scores = rewards.load_judge, train_grpo.Asker.scores

    def impatient(flags, device):
        judge, hps = load_judge(flags, device)
        judge.server.patience = 0.2
        return judge, hps

    def unplugged(asker):
        rows = scores(asker)
        readable.faults = [500] * 10_000  # after the rewards of the first step
        return rows

    monkeypatch.setattr(rewards, "load_judge", impatient)
    monkeypatch.setattr(train_grpo.Asker, "scores", unplugged)
    flags = [*GRPO, "--steps", "3", "--save_every", "1", "--judge", readable.url]
    with pytest.raises(ConnectionError, match="failed for 0.2 s, last with HTTP 500"):
        train_grpo.main([*flags, "--out", str(tmp_path)])
    assert (tmp_path / "latest").read_text() == "step_000001" and len(rows_of(tmp_path)) == 1


# -------------------------------------------------------------------------------------------------
# vLLM itself

REPLY = "[]\tScore: "  # then a digit: a mark that can be read, and no box


def readable_judge():
    """(model, tokenizer, image processor): a random Qwen2.5-VL of a size that vLLM serves, which
    writes REPLY, a digit that depends on what it is given, and its end.

    One channel of the hidden state is set aside for what comes next: each token of REPLY has it
    point at the token after it, by a large weight in the last layer. The rest is random."""
    model, tokenizer, image_processor = random_judge(size="served")
    tokenizer.chat_template = PARTS_TEMPLATE  # as Qwen2.5-VL's processor, from which vLLM takes it
    digits = tokenizer.convert_tokens_to_ids(list("0123456789"))
    chain = tokenizer("\n" + REPLY).input_ids
    follows = {}  # token -> those that may come next
    for token, following in zip(chain, [*chain[1:], digits], strict=True):
        assert token not in follows, "a token that stands twice has two successors"
        follows[token] = following if isinstance(following, list) else [following]
    begun = tokenizer(rewards.BEGUN % "score").input_ids[-1]
    follows[begun] = digits
    for digit in digits:
        follows[digit] = [model.generation_config.eos_token_id[0]]
    language = model.model.language_model
    states = {}  # a channel per list of successors
    for following in follows.values():
        states.setdefault(tuple(following), len(states))
    first = language.config.hidden_size - len(states)
    with torch.no_grad():
        language.embed_tokens.weight[:, first:] = 0
        model.model.visual.merger.mlp[2].weight[first:] = 0
        model.model.visual.merger.mlp[2].bias[first:] = 0
        model.lm_head.weight[:, first:] = 0
        for layer in language.layers:  # no layer writes into these channels
            layer.self_attn.o_proj.weight[first:] = 0
            layer.mlp.down_proj.weight[first:] = 0
        for token, following in follows.items():
            channel = first + states[tuple(following)]
            language.embed_tokens.weight[token, channel] = 10
            model.lm_head.weight[list(following), channel] = 10
    return model, tokenizer, image_processor


@pytest.fixture(scope="module")
def vllm(tmp_path_factory):
    """(address of the API, folder of the judge) of vLLM, started for these tests."""
    python = os.environ.get("GOTR1_VLLM")
    assert python, "GOTR1_VLLM names the Python of an environment by tests/make_vllm_env.sh"
    folder = tmp_path_factory.mktemp("judge")
    for part in readable_judge():
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
@pytest.mark.parametrize("scoring", ["reply", "expected"])
@pytest.mark.parametrize("spatial_as", ["boxes", "text"])
def test_vllm_gives_the_rewards_of_the_same_weights_here(vllm, scoring, spatial_as, monkeypatch):
    monkeypatch.undo()  # whole replies
    url, folder = vllm
    # what it writes is one mark; its four expected marks are read off four begun replies
    semantic_as = "one" if scoring == "reply" else "four"
    settings = {"scoring": scoring, "spatial_as": spatial_as, "semantic_as": semantic_as}
    local = QwenJudge(str(folder), dtype=torch.float32, batch_size=1, **settings)
    judge = ServedJudge(url, frame="pixels", **settings)
    wanted, wanted_words = ask_all(local, range(5))
    answers, words = ask_all(judge, range(5))
    assert words == wanted_words
    for calls, theirs in zip(answers, wanted, strict=True):
        assert None not in calls
        assert calls == [pytest.approx(one, abs=1e-4) for one in theirs]
    assert len(set(words["pi"])) > 1

    chains = [format_chain(["A", *layout]) for layout in LAYOUTS]
    wanted = rewards.score(local, None, PROMPTS, chains, images(), combine="sum")
    for ours, theirs in zip(
        rewards.score(judge, None, PROMPTS, chains, images(), combine="sum"), wanted, strict=True
    ):
        assert ours == pytest.approx(theirs, abs=1e-4)


@pytest.mark.server
def test_vllm_with_32_rows_in_flight(vllm):
    url, _ = vllm
    prompts = [f"{k} dogs" for k in range(32)]
    pictures = [images()[k % 5] for k in range(32)]
    one_by_one = ServedJudge(url, in_flight=1, frame="pixels")
    together = ServedJudge(url, in_flight=32, frame="pixels")
    begin = time.time()
    wanted = one_by_one.alignment(prompts, pictures)
    between = time.time()
    assert together.alignment(prompts, pictures) == wanted
    print(f"32 rows: {between - begin:.1f} s one by one, {time.time() - between:.1f} s together")
    assert together.words == one_by_one.words


@pytest.mark.server
def test_vllm_refuses_in_its_own_words(vllm):
    url, _ = vllm
    with pytest.raises(ValueError, match="HTTP 404: .*other.* does not exist"):
        ServedJudge(url, "other")
    with pytest.raises(ValueError, match="does not find a red square"):
        ServedJudge(url)  # a random judge sees nothing
    with pytest.raises(ValueError, match="HTTP 400: .*2048"):  # too long
        ServedJudge(url, frame="pixels").semantic(["a dog"], ["A dog. " * 2000])


if __name__ == "__main__":
    for part in readable_judge():
        part.save_pretrained(sys.argv[1])
    print(f"wrote {sys.argv[1]}: a judge with random weights that writes readable marks")
