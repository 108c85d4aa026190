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
import os
import threading
import time
from typing import NamedTuple
from urllib.parse import urlsplit

from PIL import Image
from tqdm import tqdm

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
