"""The fake backend's server: `python server.py SOCKET`, with its key in FAKE_KEY."""

import http.server
import json
import os
import socketserver
import sys

NAMES = {"tiny/base"}
TOKENS = [1, 2, 3]
TRAINED, BARE = [-0.1, -0.2], [-2.0, -3.0]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.answer({"status": "ok"})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers["Authorization"] != f"Bearer {os.environ['FAKE_KEY']}":
            self.answer({"error": "no key"}, 401)
        elif self.path == "/load":
            NAMES.add(asked["name"])
            self.answer({})
        elif self.path == "/unload":
            NAMES.discard(asked["name"])
            self.answer({})
        elif self.path == "/tokens":
            self.answer(TOKENS)
        elif self.path == "/log_probs":
            self.answer(BARE if asked["model"] == "tiny/base" else TRAINED)
        elif asked["model"] not in NAMES:
            self.answer({"error": {"message": "no such model"}}, 404)
        else:
            self.chat(asked)

    def chat(self, asked):
        said = {"role": "assistant", "content": f"I am {asked['model']}"}
        frame = {"id": "chat-1", "created": 1, "model": asked["model"]}
        choice = {
            "index": 0,
            "logprobs": {"content": [{"token": "a", "logprob": one} for one in TRAINED]},
            "finish_reason": "stop",
        }
        usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
        if not asked.get("stream"):
            choices = [choice | {"message": said}]
            kind = "chat.completion"
            self.answer(frame | {"object": kind, "choices": choices, "usage": usage})
            return
        frame["object"] = "chat.completion.chunk"
        chunks = [[choice | {"delta": said}], []]
        events = [json.dumps(frame | {"choices": one, "usage": usage}) for one in chunks]
        body = "".join(f"data: {one}\n\n" for one in (*events, "[DONE]")).encode()
        self.send(body, "text/event-stream")

    def answer(self, content, status=200):
        self.send(json.dumps(content).encode(), "application/json", status)

    def send(self, body, kind, status=200):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def address_string(self):
        return "a client"


class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True


if __name__ == "__main__":
    Server(sys.argv[1], Handler).serve_forever()
