"""A real local server that speaks the OpenAI chat API, and says what a test wants."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def completion(text="out", reason="stop", **message):
    return {
        "choices": [{"message": {"content": text, **message}, "finish_reason": reason}],
        "usage": {"completion_tokens": 3},
    }


def chunk(text="", reason=None, **delta):
    """One event of a stream; with a reason it is the answer's last."""
    choice = {"delta": {"content": text, **delta}, "finish_reason": reason}
    usage = {"prompt_tokens": 5, "completion_tokens": 3} if reason else None
    return {"choices": [choice], "usage": usage}


def streamed(*events, done=True):
    """A body that comes event by event; what is callable is called between two of them."""
    for event in events:
        if callable(event):
            event()
            continue
        yield f"data: {json.dumps(event)}\n\n".encode()
    if done:
        yield b"data: [DONE]\n\n"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.reply(200, {"data": [{"id": name} for name in self.server.of.models]}, {})

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.of.requests.append((self.path, dict(self.headers), request))
        status, body, headers = self.server.of.answer(request)
        (self.stream if isinstance(body, Iterator) else self.reply)(status, body, headers)

    def reply(self, status, body, headers):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.head(status, {"Content-Length": str(len(content)), **headers})
        self.wfile.write(content)

    def stream(self, status, body, headers):
        self.head(status, {"Transfer-Encoding": "chunked", **headers})
        try:
            for piece in itertools.chain(body, [b""]):
                self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        except OSError:
            self.server.of.left.set()

    def head(self, status, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_):
        pass


class Server:
    """
    Answers each request with what `answer(request)` returns: (status, body, headers).

    A body that is an iterator of bytes is sent in chunks, each when it is there. `left` is set
    once a client has gone before the end of one.
    """

    def __init__(self):
        self.requests = []
        self.answer = lambda request: (200, completion(), {})
        self.models = ["tiny"]
        self.left = threading.Event()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.of = self
        self.http.daemon_threads = True
        self.http.handle_error = lambda *_: None  # clients that leave early are part of the tests
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()
