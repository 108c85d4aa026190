"""Chat completions over HTTP: many at once, and none that fails becomes an answer.

rewards.py says what a judge is asked; here is how a request survives a busy server, a lost
connection or a restart. That is apart because neither the rewards nor any other part of engine/
needs a network. No torch; the packages openai and tqdm.

    server = Server("http://localhost:8000/v1")
    answers = server.complete([{"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8}])

The key, if the server wants one, is read from the environment (OPENAI_API_KEY) and never shown.
"""

import asyncio
import base64
import io
import json
import math
import os
import threading
import time
from typing import NamedTuple
from urllib.parse import urlsplit

from PIL import Image, ImageDraw
from tqdm import tqdm

from render_boxes import Box, iou
from rewards import ANSWER, TASKS, Reply, VlmJudge, parse_bboxes

# Sent with every request. vLLM would take a penalty on repetition from the folder of the model
# (Qwen2.5-VL's has 1.05), which bends the digits of boxes.
GREEDY = {"temperature": 0, "seed": 0, "extra_body": {"repetition_penalty": 1.0}}
BUSY = (408, 429)  # HTTP: the request came too slowly, too many requests. Later it may work
TIMEOUT = 120.0  # seconds that one request may take, waiting its turn in the server included
PATIENCE = 120.0  # seconds after its first failure during which a request is repeated
FIRST_PAUSE = 1.0  # seconds between the first two attempts; doubled for each further one, up to
LONGEST_PAUSE = 20.0


class Answer(NamedTuple):
    text: str
    is_cut: bool  # it ended because `max_tokens` were written
    prompt_tokens: int | None  # tokens that the server read; None: it does not say
    likeliest: list[dict[str, float]]  # per token: text -> log-probability; [] if not asked for


class Server:
    """A server of the /v1/chat/completions protocol, as vLLM and SGLang have it.

    model      its name there; "": the only one that there is
    in_flight  most requests at a time
    timeout, patience  see above

    Raises ValueError for what will not work later either: a refused request (4xx, with the words
    of the server) or an answer that is none. Raises ConnectionError when a request has failed for
    longer than `patience` otherwise.
    """

    def __init__(
        self,
        url: str,
        model: str = "",
        in_flight: int = 64,
        timeout: float = TIMEOUT,
        patience: float = PATIENCE,
    ):
        try:
            import openai
        except ImportError:
            raise ValueError("a judge on a server needs a package: pip install openai") from None
        parts = urlsplit(url)
        if not parts.hostname or parts.port == 0:  # reading a port that is no number: ValueError
            raise ValueError(f"{url} is no address of a server: expected http://host:8000/v1")
        if parts.username or parts.password or parts.query:
            # not quoted: the address of a judge is written into config.json
            raise ValueError("no key in the address of a judge: put it into OPENAI_API_KEY")
        self.url = url
        self.key = os.environ.get("OPENAI_API_KEY", "")
        self.free = asyncio.Semaphore(in_flight)
        self.timeout = timeout
        self.patience = patience
        # Requests run in a thread of their own, so that whoever asks may have an event loop of its
        # own (a notebook) or none, and connections are used again.
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.client = openai.AsyncOpenAI(
            base_url=url,
            api_key=self.key or "none",  # it wants some key
            timeout=timeout,
            max_retries=0,  # of its own, which nobody would see
        )
        self.model = model or self._only_model()

    def complete(self, requests: list[dict]) -> list[Answer]:
        """The answers to all requests, in their order. A request holds the arguments of OpenAI's
        chat.completions.create; the model, greedy decoding and the seed are added."""

        async def send(request):
            body = {"model": self.model, **GREEDY, **request}
            body["extra_body"] = {**GREEDY["extra_body"], **request.get("extra_body", {})}
            answer = await self.client.chat.completions.create(**body)
            return self._read(answer, wants_logprobs=bool(request.get("logprobs")))

        return self._wait_for(send, requests)

    def _only_model(self) -> str:
        async def send(_):
            return [model.id for model in (await self.client.models.list()).data]

        try:
            (names,) = self._wait_for(send, [None])
        except (AttributeError, TypeError):
            raise ValueError(f"{self.url} does not list its models: no OpenAI-like API") from None
        if len(names) != 1:
            raise ValueError(
                f"the server at {self.url} has the models {', '.join(names)}: "
                "choose one with --judge_model"
            )
        return names[0]

    def _wait_for(self, send, requests: list) -> list:
        """What `send` makes of each request, from the thread that runs them."""
        hidden = os.environ.get("RANK", "0") != "0"
        bar = tqdm(total=len(requests), desc="judge", delay=5, leave=False, disable=hidden)
        with bar:
            sending = self._send_all(send, requests, bar)
            return asyncio.run_coroutine_threadsafe(sending, self.loop).result()

    async def _send_all(self, send, requests: list, bar: tqdm) -> list:
        tasks = [asyncio.ensure_future(self._insist(send, request, bar)) for request in requests]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:  # after a failure the others are given up
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _insist(self, send, request, bar: tqdm):
        """One request, repeated after growing pauses while that can help."""
        import openai

        first_failure = None
        pause = FIRST_PAUSE
        while True:
            try:
                async with self.free:
                    answer = await send(request)
                bar.update()
                return answer
            except openai.APIStatusError as error:
                problem = f"HTTP {error.status_code}: {self._words_of(error)}"
                if error.status_code < 500 and error.status_code not in BUSY:
                    raise ValueError(f"the server at {self.url} refuses: {problem}") from None
            except openai.APITimeoutError:
                problem = f"no answer within {self.timeout:g} s"
            except openai.APIConnectionError as error:
                problem = f"connection lost: {error.__cause__ or error}"
            except (json.JSONDecodeError, UnicodeDecodeError):
                problem = "half an answer"
            now = time.monotonic()
            first_failure = first_failure or now
            if now + pause > first_failure + self.patience:
                raise ConnectionError(
                    f"the server at {self.url} failed for {self.patience:g} s, last with {problem}"
                )
            bar.set_postfix_str(f"{problem[:80]}; again in {pause:g} s")
            await asyncio.sleep(pause)
            bar.set_postfix_str("")
            pause = min(2 * pause, LONGEST_PAUSE)

    def _words_of(self, error) -> str:
        """What the server said about an error, in one line. Servers may quote the key."""
        said = error.response.text or error.message
        if self.key:
            said = said.replace(self.key, "***")
        return " ".join(said.split())[:500]

    def _read(self, completion, wants_logprobs: bool) -> Answer:
        """The one choice of a completion. The client does not check what it receives."""
        try:
            (choice,) = completion.choices
            text = choice.message.content
            ending = choice.finish_reason
            usage = completion.usage
            likeliest = []
            for token in choice.logprobs.content if wants_logprobs and choice.logprobs else []:
                likeliest.append({top.token: float(top.logprob) for top in token.top_logprobs})
            read = usage.prompt_tokens if usage else None
        except (AttributeError, TypeError, ValueError):
            text = None
        if not isinstance(text, str) or ending not in ("stop", "length"):
            said = " ".join(str(completion).split())[:300]
            raise ValueError(
                f"the server at {self.url} did not answer with one choice that has a text: {said}"
            )
        return Answer(text, ending == "length", read, likeliest)


def data_url(image: Image.Image) -> str:
    """A picture as text, without loss: a PNG in a data URL."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


# -------------------------------------------------------------------------------------------------
# The judge

GRIDS = {  # what boxes count in -> (a side of a picture is a multiple of this, fewest pixels)
    "pixels": (28, 56 * 56),  # Qwen2.5-VL: tokens of 28 x 28 pixels
    "grid": (32, 256 * 256),  # Qwen3-VL: of 32 x 32
}
SHOWN = Box("red square", 500, 125, 875, 500)  # by which a served judge shows what boxes count in


class ServedJudge(VlmJudge):
    """A VlmJudge on a server of the chat-completions protocol: vLLM or SGLang, see docs/gpu.md.

    url        of the API: http://host:8000/v1
    model      its name there; "": the only one that there is
    in_flight  most rows at a time
    frame      what its boxes count in: "pixels" of the resized picture (Qwen2.5-VL), or the 0..1000
               "grid" (Qwen3-VL). "ask": it is asked for a square that is drawn for it
    scoring, spatial_as, semantic_as: see VlmJudge. "expected" needs a server that continues a begun
        reply (continue_final_message) and gives log-probabilities (top_logprobs). A digit that is
        not among the 20 likeliest tokens counts as impossible.

    Raises ValueError when the server cannot do what is needed, and what Server raises.
    """

    def __init__(
        self,
        url,
        model="",
        in_flight=64,
        frame="ask",
        scoring="reply",
        spatial_as="boxes",
        semantic_as="four",
    ):
        super().__init__(scoring, spatial_as, semantic_as)
        self.server = Server(url, model, in_flight)
        self.frame = frame if frame != "ask" else self._ask_for_frame()
        if scoring == "expected":
            self._check_begun_replies()

    def write(self, questions):
        requests = []
        frames = []
        for question in questions:
            picture = self._resized(question.image)
            request = self._request(question.text, picture)
            requests.append({**request, "max_tokens": question.max_tokens})
            frames.append(picture.size if picture and self.frame == "pixels" else (1000, 1000))
        replies = []
        for answer, frame in zip(self.server.complete(requests), frames, strict=True):
            replies.append(Reply(answer.text + "…" if answer.is_cut else answer.text, frame))
        return replies

    def digits(self, questions):
        first = self._digits_behind(questions, "")
        # The mark 10 is two tokens. Only where 1 is likely at all is it asked what follows it.
        may_be_ten = [k for k, chances in enumerate(first) if chances[1] > 0]
        after_one = [[0.0] * 10 for _ in questions]
        asked = self._digits_behind([questions[k] for k in may_be_ten], "1")
        for k, chances in zip(may_be_ten, asked, strict=True):
            after_one[k] = chances
        return list(zip(first, after_one, strict=True))

    def _digits_behind(self, questions, written):
        """Per question, the probability of each digit behind the begun reply and `written`."""
        requests = []
        for question in questions:
            picture = self._resized(question.image)
            requests.append(self._request(question.text, picture, question.begun + written))
        rows = []
        for answer in self.server.complete(requests):
            if not answer.likeliest:
                raise ValueError(self._cannot_expect("gives no log-probabilities (top_logprobs)"))
            logps = answer.likeliest[0]
            rows.append([math.exp(logps.get(digit, -math.inf)) for digit in "0123456789"])
        return rows

    def _request(self, text, picture, begun=""):
        """What is sent for one row. With `begun`, the reply is begun so, and one token is asked."""
        content = text
        if picture:
            shown = {"type": "image_url", "image_url": {"url": data_url(picture)}}
            content = [shown, {"type": "text", "text": text}]
        messages = [{"role": "user", "content": content}]
        if not begun:
            return {"messages": messages}
        messages.append({"role": "assistant", "content": begun})
        return {
            "messages": messages,
            "max_tokens": 1,
            "logprobs": True,
            "top_logprobs": 20,  # the most that servers give
            # else the server closes this turn and begins another one, without a word
            "extra_body": {"continue_final_message": True, "add_generation_prompt": False},
        }

    def _resized(self, image):
        """The picture in the size that the judge sees: the server then has nothing to resize.

        As the processors of Qwen-VL resize: both sides to the nearest multiple of a token's, and
        more when that is too small; with the same filter. Theirs also shrink what is above 12
        million pixels; our pictures are far from it."""
        if image is None:
            return None
        side, fewest = GRIDS[self.frame]
        wide = round(image.width / side) * side
        high = round(image.height / side) * side
        if wide * high < fewest:
            scale = math.sqrt(fewest / (image.width * image.height))
            wide = math.ceil(image.width * scale / side) * side
            high = math.ceil(image.height * scale / side) * side
        return image.convert("RGB").resize((wide, high), Image.Resampling.BICUBIC)

    # What a server has to show before it is believed

    def _ask_for_frame(self):
        """What the boxes of this judge count in, found out by a square that is drawn for it."""
        side = 448  # a multiple of 28 and of 32: no judge resizes it
        corners = [edge * side / 1000 for edge in SHOWN[1:]]
        picture = Image.new("RGB", (side, side), "white")
        ImageDraw.Draw(picture).rectangle(corners, fill="red")
        task = TASKS["ri"]
        text = self._question(task, name=SHOWN.name) + ANSWER % task.answer
        request = {**self._request(text, picture), "max_tokens": task.max_tokens}
        reply = self.server.complete([request])[0].text
        for frame, size in {"pixels": (side, side), "grid": (1000, 1000)}.items():
            boxes = parse_bboxes(reply, *size) or []
            if len(boxes) == 1 and iou(boxes[0], SHOWN) > 0.7:
                return frame
        pixels = [round(edge) for edge in corners]
        raise ValueError(
            f"the judge at {self.server.url} does not find a red square at {pixels} of {side} x "
            f"{side} pixels, {[*map(round, SHOWN[1:])]} of 1000: it replies {reply[:200]!r}. "
            "Expected a Qwen2.5-VL or Qwen3-VL (or say with --judge_frame what its boxes count in)"
        )

    def _check_begun_replies(self):
        """That the server continues a begun reply and gives log-probabilities."""
        plain = self._request("Hi", None)
        begun = self._request("Hi", None, begun="1")
        try:
            open_turn, answer = self.server.complete([{**plain, "max_tokens": 1}, begun])
        except ValueError as error:
            raise ValueError(self._cannot_expect(f"does not take a begun reply: {error}")) from None
        if not answer.likeliest:
            raise ValueError(self._cannot_expect("gives no log-probabilities (top_logprobs)"))
        # "1" is one token. A turn that is closed and opened anew has several more.
        if answer.prompt_tokens is None or answer.prompt_tokens != open_turn.prompt_tokens + 1:
            raise ValueError(
                self._cannot_expect("closes a begun reply (it needs continue_final_message)")
            )

    def _cannot_expect(self, what):
        return f"the server at {self.server.url} {what}: use --scoring reply"
