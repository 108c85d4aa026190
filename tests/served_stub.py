"""A server of the chat-completions protocol in this process, for tests: it answers with a function,
and can be told to misbehave.

    with Stub(answer) as stub:
        judge = ServedJudge(stub.url)
"""

import base64
import hashlib
import io
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from PIL import Image

from rewards import Question


class Stub:
    """answer   a function of a Row that gives (text, log-probabilities of the next token or None)
    faults      what is wrong with the next answers, one each; None: nothing. "cut", "half",
                "two choices", "no text", "silent", or a status such as 500
    closes      a begun turn is closed and a new one opened, as servers do that know no better
    logprobs    whether it gives any
    delay       seconds before each answer
    """

    def __init__(self, answer, models=("judge",)):
        self.answer = answer
        self.models = models
        self.lists = None  # what is sent as the list of models, if not those
        self.faults = []
        self.closes = False
        self.logprobs = True
        self.delay = 0.0
        self.silence = 30.0  # seconds
        self.rows = []  # all that was asked
        self.keys = set()  # all that authorised
        self.busy = 0  # requests at this moment
        self.most_busy = 0
        self.lock = threading.Lock()
        self.going_down = threading.Event()

    def __enter__(self):
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_GET(self):
                models = {"data": [{"id": name, "object": "model"} for name in stub.models]}
                self.send(200 if self.path.startswith("/v1/") else 404, stub.lists or models)

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stub.keys.add(self.headers["Authorization"])
                with stub.lock:
                    fault = stub.faults.pop(0) if stub.faults else None
                    stub.busy += 1
                    stub.most_busy = max(stub.busy, stub.most_busy)
                try:
                    self.reply(body, fault)
                finally:
                    with stub.lock:
                        stub.busy -= 1

            def reply(self, body, fault):
                if fault == "silent":
                    stub.going_down.wait(stub.silence)
                if fault in ("cut", "silent"):
                    self.close_connection = True
                    return
                if isinstance(fault, int):
                    told = f"status {fault} for {self.headers['Authorization']}"
                    self.send(fault, {"error": {"message": told}})
                    return
                if body["model"] not in stub.models:
                    told = f"The model `{body['model']}` does not exist."
                    self.send(404, {"error": {"message": told}})
                    return
                time.sleep(stub.delay)
                try:
                    completion = stub.completion(body, fault)
                except Exception as error:  # in a test's own function: shown, not repeated
                    self.send(400, {"error": {"message": f"the stub failed: {error!r}"}})
                    return
                self.send(200, completion, half=fault == "half")

            def send(self, status, content, half=False):
                data = json.dumps(content).encode()
                data = data[: len(data) // 2] if half else data
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        class Server(ThreadingHTTPServer):
            request_queue_size = 128  # connections that wait to be accepted; the default is 5
            daemon_threads = True

            def handle_error(self, request, client_address):
                pass  # the client has left

        self.http = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.going_down.set()
        self.http.shutdown()
        self.http.server_close()

    def completion(self, body: dict, fault) -> dict:
        row = Row(body)
        with self.lock:  # one model
            self.rows.append(row)
            text, logps = self.answer(row)
        ending = "stop"
        if text.endswith("…"):
            text, ending = text.removesuffix("…"), "length"
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": None if fault == "no text" else text},
            "finish_reason": ending,
        }
        if row.top and self.logprobs and logps:
            likeliest = sorted(logps, key=logps.get, reverse=True)[: row.top]
            top = [{"token": token, "logprob": logps[token]} for token in likeliest]
            token = {**top[0], "top_logprobs": top}
            choice["logprobs"] = {"content": [token]}
        # one token per character, and five for the marks that close a turn and open another
        length = len(row.text) + len(row.begun)
        length += 5 if row.begun and (self.closes or not row.continues) else 0
        return {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [choice] * (2 if fault == "two choices" else 1),
            "usage": {"prompt_tokens": length, "completion_tokens": 1, "total_tokens": length + 1},
        }


class Row:
    """What one request asks."""

    def __init__(self, body: dict):
        self.body = body
        user, *begun = body["messages"]
        self.begun = begun[0]["content"] if begun else ""
        self.continues = body.get("continue_final_message") and not body["add_generation_prompt"]
        self.top = body.get("top_logprobs", 0) if body.get("logprobs") else 0
        self.image = None
        self.text = user["content"]
        if isinstance(self.text, list):
            shown, told = user["content"]
            self.text = told["text"]
            png = shown["image_url"]["url"].removeprefix("data:image/png;base64,")
            self.image = Image.open(io.BytesIO(base64.b64decode(png)))
            assert self.image.format == "PNG"

    def question(self) -> Question:
        return Question(self.text, self.image, self.body["max_tokens"], self.begun)


def by_judge(judge):
    """The answers of a QwenJudge in this process."""
    texts = [judge.tokenizer.decode([k]) for k in range(len(judge.tokenizer))]

    def answer(row):
        if not row.begun:
            return judge.write([row.question()])[0].text, None
        inputs, _ = judge._inputs(judge._look([row.question()]))
        with torch.inference_mode():
            logps = judge.model(**inputs).logits[0, -1].double().log_softmax(0).tolist()
        return "", dict(zip(texts, logps, strict=True))

    return answer


def by_chance(row):
    """Readable answers to everything that rewards.py asks, from a hash of the row."""
    seen = row.image.tobytes() if row.image else b""
    digest = hashlib.sha256(row.text.encode() + seen).digest()
    if '"bbox_2d"' in row.text:
        x, y = digest[0] % 3, digest[1] % 3
        width, height = row.image.size
        box = [x * width // 4, y * height // 4, (x + 2) * width // 4, (y + 2) * height // 4]
        return json.dumps([{"bbox_2d": box, "label": "it"}]), None
    marks = {}
    for k, name in enumerate(("score", "completeness", "faithfulness", "consistency", "clarity")):
        marks[name] = digest[k] % 10 + 1
    return json.dumps(marks), {str(k): -3.0 for k in range(10)}
