"""The judge on a server: vLLM, SGLang, or any other of OpenAI's chat-completions protocol.

rewards.py says what a judge is asked; here is how a request survives a busy server, a lost
connection or a restart, and how the server judges while this process draws on. No torch; the
packages openai and tqdm.

The key, if the server wants one, is read from the environment (OPENAI_API_KEY) and never shown.
"""

import asyncio
import base64
import functools
import io
import math
import os
import sys
import threading
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import urlsplit

from PIL import Image, ImageDraw
from tqdm import tqdm

from render_boxes import Box, iou
from rewards import TASKS, Question, Reply, VlmJudge, ask_judge, parse_bboxes

ATTEMPT = 120.0  # seconds that one attempt may take, waiting its turn in the server included
PATIENCE = 600.0  # seconds for all attempts at one request; a server loads a 7B for minutes
MAY_PASS = (408, 409, 429)  # HTTP below 500: too slow, in conflict, too many requests
LIKELIEST = 20  # tokens whose probabilities are asked for: the most that servers give


@dataclass(frozen=True)
class Picture:
    """A picture, and how it is sent. Equal ones are equal: requests are compared."""

    pixels: bytes  # RGB
    size: tuple[int, int]  # width, height
    sent_size: tuple[int, int]

    @functools.cached_property
    def url(self) -> str:
        """The picture as text, without loss: a PNG in a data URL."""
        image = Image.frombytes("RGB", self.size, self.pixels)
        file = io.BytesIO()
        resized = image.resize(self.sent_size, Image.Resampling.BICUBIC)
        resized.save(file, "PNG", compress_level=1)  # twice as fast, an eighth larger
        return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


class Request(NamedTuple):
    text: str
    picture: Picture | None
    max_tokens: int
    likeliest: bool = False  # whether the probabilities of the first token are wanted


class Answer(NamedTuple):
    text: str
    is_cut: bool  # it ended because `max_tokens` were written
    likeliest: dict[str, float]  # of the first token: text -> probability; {} if not asked for


class Server:
    """A server of the /v1/chat/completions protocol, as vLLM and SGLang have it.

    model      its name there; "": the only one that there is
    in_flight  most requests at a time
    patience   seconds during which a request is repeated: after a lost connection, no answer within
               ATTEMPT seconds, HTTP 408, 409, 429 or 5xx. The openai client does that, with pauses
               that grow to 8 s, or as long as the server says (Retry-After).

    Raises ValueError for what will not work later either: a refused request (4xx, with the words
    of the server) or an answer that is none. Raises ConnectionError when patience has run out.
    """

    def __init__(self, url: str, model: str = "", in_flight: int = 64, patience: float = PATIENCE):
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
        self.patience = patience
        self.free = asyncio.Semaphore(in_flight)
        self.early = {}  # Request -> asyncio.Task: what was sent before its answer is needed
        self.client = openai.AsyncOpenAI(
            base_url=url,
            api_key=self.key or "none",  # it wants some key
            timeout=ATTEMPT,
            max_retries=1000,  # `patience` ends sooner
        )
        # Requests run in a thread of their own, so that the caller may have an event loop of its
        # own (a notebook) or none. A daemon: a program that ends waits for no answer.
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        names = self._model_names()
        if not model and len(names) == 1:
            model = names[0]
        if model not in names:
            raise ValueError(
                f"the server at {url} has the models {', '.join(names)}: "
                f"choose one with --judge_model{f', not {model}' if model else ''}"
            )
        self.model = model

    def complete(self, requests: list[Request]) -> list[Answer]:
        """The answers to all requests, in their order."""
        hidden = os.environ.get("RANK", "0") != "0"
        with tqdm(total=len(requests), desc="judge", delay=5, leave=False, disable=hidden) as bar:
            return self._wait_for(self._complete(requests, bar))

    def send_early(self, make_requests) -> None:
        """Sends the requests that `make_requests()` returns, and keeps the answers for `complete`,
        until `forget_early`. Returns at once: the requests, too, are made in the other thread."""

        def send():
            for request, task in self._tasks(make_requests()).items():
                self.early[request] = task
                task.add_done_callback(look_at_error)

        self.loop.call_soon_threadsafe(send)

    def forget_early(self) -> None:
        def forget():
            for task in self.early.values():
                task.cancel()
            self.early.clear()

        self.loop.call_soon_threadsafe(forget)

    # In the thread of the requests

    def _wait_for(self, coroutine):
        """What the coroutine returns; from any other thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()

    def _tasks(self, requests) -> dict[Request, asyncio.Task]:
        """The task of each request: sent early, or begun now. Equal requests share one."""
        tasks = {}
        for request in requests:
            if request not in tasks:
                tasks[request] = self.early.get(request) or self.loop.create_task(
                    self._send(request)
                )
        return tasks

    async def _complete(self, requests, bar) -> list[Answer]:
        tasks = self._tasks(requests)
        for task in tasks.values():
            task.add_done_callback(lambda _: bar.update())
        try:
            await asyncio.gather(*tasks.values())
        finally:
            for task in tasks.values():  # after a failure the others are given up
                task.cancel()
            await asyncio.gather(*tasks.values(), return_exceptions=True)
        return [tasks[request].result() for request in requests]

    async def _send(self, request: Request) -> Answer:
        async with self.free:
            content = request.text
            if request.picture:
                shown = {"type": "image_url", "image_url": {"url": request.picture.url}}
                content = [shown, {"type": "text", "text": request.text}]
            body = {
                "model": self.model,
                "messages": [{"role": "user", "content": content}],
                "max_tokens": request.max_tokens,
                "temperature": 0,
                "seed": 0,
                # vLLM would take a penalty on repetition from the folder of the model (Qwen2.5-VL's
                # has 1.05), which bends the digits of boxes
                "extra_body": {"repetition_penalty": 1.0},
            }
            if request.likeliest:
                body.update(logprobs=True, top_logprobs=LIKELIEST)
            answer = await self._insist(lambda: self.client.chat.completions.create(**body))
            return self._read(answer, request)

    async def _insist(self, send):
        """What `send()` returns: one call of the openai client, which repeats what can be."""
        import openai

        try:
            async with asyncio.timeout(self.patience):
                return await send()
        except openai.APIStatusError as error:
            words = " ".join((error.response.text or error.message).split())[:500]
            if self.key:  # servers may quote it
                words = words.replace(self.key, "***")
            problem = f"HTTP {error.status_code}: {words}"
            if error.status_code < 500 and error.status_code not in MAY_PASS:
                raise ValueError(f"the server at {self.url} refuses: {problem}") from None
        except openai.APIConnectionError as error:
            problem = f"{error.__cause__ or error}"
        except TimeoutError as error:
            # what was cancelled is a pause, which stands in the handler of the last failure
            problem = getattr(error.__cause__, "__context__", None) or "no answer"
        except ValueError as error:  # no JSON, or not in UTF-8
            raise ValueError(f"the server at {self.url} sends no JSON: {error}") from None
        raise ConnectionError(f"no answer from {self.url} within {self.patience:g} s: {problem}")

    def _model_names(self) -> list[str]:
        """The models of the server. One that is not there yet is waited for, with a message."""

        async def ask(client):
            return await self._insist(client.models.list)

        try:
            try:
                models = self._wait_for(ask(self.client.with_options(max_retries=0)))
            except ConnectionError:
                print(f"judge: waiting up to {self.patience:g} s for {self.url}", file=sys.stderr)
                models = self._wait_for(ask(self.client))
            return [model.id for model in models.data]
        except (AttributeError, TypeError):
            raise ValueError(f"{self.url} does not list its models: no OpenAI-like API") from None

    def _read(self, completion, request: Request) -> Answer:
        """The one choice of a completion. The client does not check what it receives."""
        likeliest = {}
        try:
            (choice,) = completion.choices
            text = choice.message.content
            ending = choice.finish_reason
            if request.likeliest:
                for token in choice.logprobs.content[0].top_logprobs:
                    likeliest[token.token] = math.exp(token.logprob)
        except (AttributeError, TypeError, ValueError, IndexError):
            text = None
        if not isinstance(text, str) or ending not in ("stop", "length"):
            wanted = "one choice that has a text"
            if request.likeliest:
                wanted += " and log-probabilities (top_logprobs)"
            received = " ".join(str(completion).split())[:300]
            raise ValueError(f"the server at {self.url} did not answer with {wanted}: {received}")
        return Answer(text, ending == "length", likeliest)


def look_at_error(task: asyncio.Task) -> None:
    """asyncio prints the error of a task that nobody has looked at."""
    if not task.cancelled():
        task.exception()


# -------------------------------------------------------------------------------------------------
# The judge

GRIDS = {  # what boxes count in -> (side of a token in pixels, fewest tokens of a picture)
    "pixels": (28, 4),  # Qwen2.5-VL
    "grid": (32, 64),  # Qwen3-VL
}
MOST_TOKENS = 16384  # of a picture, for both
RED_SQUARE = Box("red square", 500, 125, 875, 500)


class ServedJudge(VlmJudge):
    """A VlmJudge on a server of the chat-completions protocol: vLLM or SGLang, see docs/gpu.md.

    url                  of the API: http://host:8000/v1
    model                its name there; "": the only one that there is
    in_flight            most requests at a time
    frame                what its boxes count in: "pixels" of the resized picture (Qwen2.5-VL), or
                         the 0..1000 "grid" (Qwen3-VL). "ask": the judge locates a red square, and
                         its reply tells
    scoring, spatial_as  see VlmJudge. "yes" needs a server that gives log-probabilities.

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
        patience=PATIENCE,
    ):
        super().__init__(scoring, spatial_as)
        self.server = Server(url, model, in_flight, patience)
        self.frame = frame if frame != "ask" else self._find_frame()

    def write(self, questions):
        requests = self.requests(questions)
        replies = []
        for request, answer in zip(requests, self.server.complete(requests), strict=True):
            text = answer.text + "…" if answer.is_cut else answer.text
            in_pixels = request.picture and self.frame == "pixels"
            replies.append(Reply(text, request.picture.sent_size if in_pixels else (1000, 1000)))
        return replies

    def probabilities(self, questions, words):
        """See VlmJudge. A word that is not among the 20 likeliest tokens has probability 0; so has
        one that is several tokens: the server names tokens by their text only."""
        requests = self.requests(questions, likeliest=True)
        chances = []
        for answer in self.server.complete(requests):
            chances.append([answer.likeliest.get(word, 0.0) for word in words])
        return chances

    def ask_early(self, prompts, chains, images, parts):
        """Sends the questions of `score` for these samples, and returns at once. The next call of
        `score` finds the replies, sends what is missing, and forgets the rest. Rewards do not
        depend on it."""

        def make_requests():
            recorder = Recorder(self)
            ask_judge(recorder, prompts, chains, images, parts)
            return recorder.requests

        self.server.send_early(make_requests)

    def forget_early(self):
        self.server.forget_early()

    def requests(self, questions: list[Question], likeliest: bool = False) -> list[Request]:
        """What is sent for these questions. Each distinct picture is resized and encoded once."""
        pictures = {}
        requests = []
        for question in questions:
            picture = None
            if question.image is not None:
                rgb = question.image.convert("RGB")
                picture = Picture(rgb.tobytes(), rgb.size, sent_size(rgb.size, self.frame))
                picture = pictures.setdefault(picture, picture)
            max_tokens = 1 if likeliest else question.max_tokens
            requests.append(Request(question.text, picture, max_tokens, likeliest))
        return requests

    def _find_frame(self):
        """What the boxes of this judge count in: it is shown a red square and asked where it is."""
        side = 448  # a multiple of 28 and of 32: no judge resizes it
        corners = [edge * side / 1000 for edge in RED_SQUARE[1:]]
        image = Image.new("RGB", (side, side), "white")
        ImageDraw.Draw(image).rectangle(corners, fill="red")
        text = self._intro("ri", name=RED_SQUARE.name)
        picture = Picture(image.tobytes(), image.size, image.size)
        request = Request(text, picture, TASKS["ri"].max_tokens)
        reply = self.server.complete([request])[0].text
        for frame, size in {"pixels": (side, side), "grid": (1000, 1000)}.items():
            boxes = parse_bboxes(reply, *size) or []
            if len(boxes) == 1 and iou(boxes[0], RED_SQUARE) > 0.7:
                return frame
        pixels = [round(edge) for edge in corners]
        raise ValueError(
            f"the judge at {self.server.url} does not find a red square at {pixels} of {side} x "
            f"{side} pixels, {[*map(round, RED_SQUARE[1:])]} of 1000: it replies {reply[:200]!r}. "
            "Expected a Qwen2.5-VL or Qwen3-VL"
        )


class Recorder(VlmJudge):
    """Takes the questions for a judge, makes requests of them, and answers nothing."""

    def __init__(self, judge: ServedJudge):
        super().__init__(judge.scoring, judge.spatial_as)
        self.judge = judge
        self.requests = []

    def write(self, questions):
        self.requests += self.judge.requests(questions)
        return [Reply("")] * len(questions)

    def probabilities(self, questions, words):
        self.requests += self.judge.requests(questions, likeliest=True)
        return [[0.0] * len(words) for _ in questions]


def sent_size(size: tuple[int, int], frame: str) -> tuple[int, int]:
    """(width, height) in which a judge sees a picture: the server then has nothing to resize.

    As the processors of Qwen-VL resize: both sides to the nearest multiple of a token's, unless
    those are too few or too many tokens."""
    width, height = size
    side, fewest_tokens = GRIDS[frame]
    wide = round(width / side)  # tokens
    high = round(height / side)
    if wide * high > MOST_TOKENS:
        scale = math.sqrt(MOST_TOKENS * side**2 / (width * height))
        wide = max(1, math.floor(width * scale / side))
        high = max(1, math.floor(height * scale / side))
    elif wide * high < fewest_tokens:
        scale = math.sqrt(fewest_tokens * side**2 / (width * height))
        wide = math.ceil(width * scale / side)
        high = math.ceil(height * scale / side)
    return wide * side, high * side
