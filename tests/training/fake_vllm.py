"""
A stand-in for vLLM's API server: the routes, answers and refusals that Flash relies on.

`fake_vllm.py FOLDER -m vllm.… --uds SOCKET …` listens on the socket and writes one line a request
to FOLDER/record, the first about the process itself. It draws nothing: the completion is the
prompt's last two tokens and the first stop token. FOLDER/trouble holds what goes wrong.
"""

import json
import os
import socketserver
import sys
from http.server import BaseHTTPRequestHandler
from pathlib import Path

folder, arguments = Path(sys.argv[1]), sys.argv[2:]
adapters = set()


def note(**what):
    with (folder / "record").open("a") as file:
        file.write(json.dumps(what) + "\n")


def trouble():
    return (folder / "trouble").read_text()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(200 if self.path == "/health" else 404, "")

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        note(path=self.path, **request)
        if self.headers["Authorization"] != f"Bearer {os.environ['VLLM_API_KEY']}":
            self.answer(401, {"error": "Unauthorized"})
        elif self.path == "/v1/load_lora_adapter":
            adapters.add(request["lora_name"])
            self.answer(200, "Success")
        elif self.path == "/v1/unload_lora_adapter":
            adapters.remove(request["lora_name"])
            self.answer(200, "Success")
        else:
            self.complete(request)

    def complete(self, request):
        if request["model"] not in adapters:
            self.answer(
                404, {"error": {"message": f"The model `{request['model']}` does not exist."}}
            )
        elif trouble() == "dies":
            sys.stderr.write("(EngineCore) ERROR RuntimeError: the kernel is not there\n")
            sys.stderr.flush()
            os._exit(1)
        elif trouble() == "busy":
            (folder / "trouble").write_text("none")
            self.answer(503, {"error": {"message": "busy"}})
        else:
            tokens = [*request["prompt"][-2:], request["stop_token_ids"][0]]
            ends = len(tokens) <= request["max_tokens"]
            tokens = tokens[: request["max_tokens"]]
            numbers = [-0.5 * at for at in range(len(tokens))]
            if trouble() == "nonsense":
                numbers[-1] = None
            choice = {
                "token_ids": tokens,
                "text": "not what the trainer's tokenizer says",
                "logprobs": {"token_logprobs": numbers},
                "finish_reason": "stop" if ends else "length",
            }
            self.answer(200, {"choices": [choice]})

    def answer(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def address_string(self):
        return "a socket has no address"

    def log_message(self, *_):
        pass


class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True


if trouble() == "ends":
    sys.stderr.write("(APIServer) WARNING this can cause errors like `OSError: too many files`\n")
    sys.exit("ValueError: Head size 8 is not supported by CPU_ATTN.")
note(arguments=arguments, variables=dict(os.environ), pid=os.getpid())
Server(arguments[arguments.index("--uds") + 1], Handler).serve_forever()
