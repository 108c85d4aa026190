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

from PIL import Image

from rewards import Question


class Stub:
    """answer   a function of a Row that gives (text, log-probabilities of its first token or None)
    faults      what is wrong with the next answers, one each; None: nothing. "cut", "half", "no
                json", "two choices", "no text", "silent", or a status such as 500
    retry_ms    what a status is sent with: when to come again, in milliseconds
    delay       seconds before each answer
    port, after  where it listens, and from when on (seconds)
    """

    def __init__(self, answer, models=("judge",), port=0, after=0.0):
        self.answer = answer
        self.port = port
        self.after = after
        self.models = models
        self.lists = None  # what is sent as the list of models, if not those
        self.faults = []
        self.retry_ms = 10
        self.delay = 0.0
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
                    stub.going_down.wait(30)
                if fault in ("cut", "silent"):
                    self.close_connection = True
                    return
                if isinstance(fault, int):
                    words = f"status {fault} for {self.headers['Authorization']}"
                    self.send(fault, {"error": {"message": words}})
                    return
                stub.going_down.wait(stub.delay)
                try:
                    completion = stub.completion(body, fault)
                except Exception as error:  # in a test's own function: shown, not repeated
                    self.send(400, {"error": {"message": f"the stub failed: {error!r}"}})
                    return
                self.send(200, completion, fault)

            def send(self, status, content, fault=None):
                data = b"<html>" if fault == "no json" else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                if status != 200:
                    self.send_header("Retry-After-Ms", str(stub.retry_ms))
                self.end_headers()
                self.wfile.write(data[: len(data) // 2] if fault == "half" else data)
                self.close_connection |= fault == "half"

        class Server(ThreadingHTTPServer):
            request_queue_size = 128  # connections that wait to be accepted; the default is 5
            daemon_threads = True

            def handle_error(self, request, client_address):
                pass  # the client has left

        self.http = Server(("127.0.0.1", self.port), Handler, bind_and_activate=False)
        self.http.server_bind()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        if self.after:
            threading.Timer(self.after, self.http.server_activate).start()
        else:
            self.http.server_activate()
        serve = threading.Thread(target=self.http.serve_forever, args=[0.01], daemon=True)
        serve.start()
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
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": None if fault == "no text" else text},
            "finish_reason": "stop",
        }
        if text.endswith("…"):
            choice["message"]["content"] = text.removesuffix("…")
            choice["finish_reason"] = "length"
        if row.top and logps:
            likeliest = sorted(logps, key=logps.get, reverse=True)[: row.top]
            top = [{"token": token, "logprob": logps[token]} for token in likeliest]
            choice["logprobs"] = {"content": [{**top[0], "top_logprobs": top}]}
        return {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [choice] * (2 if fault == "two choices" else 1),
        }


class Row:
    """What one request asks."""

    def __init__(self, body: dict):
        self.body = body
        (user,) = body["messages"]
        self.top = body.get("top_logprobs", 0) if body.get("logprobs") else 0
        self.image = None
        self.text = user["content"]
        if isinstance(self.text, list):
            shown, written = user["content"]
            self.text = written["text"]
            png = shown["image_url"]["url"].removeprefix("data:image/png;base64,")
            self.image = Image.open(io.BytesIO(base64.b64decode(png)))
            assert self.image.format == "PNG"

    def question(self) -> Question:
        return Question(self.text, self.image, self.body["max_tokens"])


def by_judge(judge):
    """The answers of a QwenJudge in this process."""
    texts = [judge.tokenizer.decode([k]) for k in range(len(judge.tokenizer))]

    def answer(row):
        question = row.question()
        if not row.top:
            return judge.write([question])[0].text, None
        inputs, _ = judge._inputs([question])
        output = judge._generate([question], inputs, max_new_tokens=1, output_logits=True)
        logps = output.logits[0][0].double().log_softmax(0).tolist()
        return "", dict(zip(texts, logps, strict=True))

    return answer


def by_chance(row):
    """Readable answers to all that rewards.py asks, from a hash of the row. Boxes count in
    pixels: it finds the red square."""
    if '"red square"' in row.text:
        return json.dumps({"bbox_2d": [224, 56, 392, 224]}), None
    pixels = row.image.tobytes() if row.image else b""
    digest = hashlib.sha256(row.text.encode() + pixels).digest()
    if '"bbox_2d"' in row.text:
        x, y = digest[0] % 3, digest[1] % 3
        width, height = row.image.size
        box = [x * width // 4, y * height // 4, (x + 2) * width // 4, (y + 2) * height // 4]
        return json.dumps([{"bbox_2d": box, "label": "it"}]), None
    marks = {}
    for k, name in enumerate(("score", "completeness", "faithfulness", "consistency", "clarity")):
        marks[name] = digest[k] % 10 + 1
    return json.dumps(marks), {"Yes": -1.0 - digest[0] / 255, "No": -1.0}


def wait_until(condition, seconds=20.0):
    """Raises TimeoutError if the condition does not come true."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("waited in vain")
        time.sleep(0.01)
