"""A server that stands in for huggingface.co."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest


class Hub(BaseHTTPRequestHandler):
    """
    The endpoints that huggingface_hub calls: model info, tree and files of one repository.

    `server.commits` maps a commit to its files, the newest last, and `server.branches` a name to
    a commit. Safetensors are large files there, with their SHA-256.
    """

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        server, path = self.server, unquote(urlsplit(self.path).path)
        server.asked.append((path, self.headers.get("Authorization")))
        info, tree = f"/api/models/{server.id}", f"/api/models/{server.id}/tree/"
        if server.refusal:
            status, code = server.refusal
            self.answer(status, b"{}", {"X-Error-Code": code} if code else {})
        elif path == info:
            self.info("main")
        elif path.startswith(f"{info}/revision/"):
            self.info(path.removeprefix(f"{info}/revision/"))
        elif path.startswith(tree):
            files = server.commits[path.removeprefix(tree)]
            self.json([described(name, content) for name, content in files.items()])
        elif path.startswith(f"/{server.id}/resolve/"):
            _, _, _, _, commit, name = path.split("/", 5)
            content = server.commits[commit][name]
            server.served.append(name)
            etag = f'"{described(name, content)["oid"]}"'
            self.answer(200, content, {"ETag": etag, "X-Repo-Commit": commit})
        else:
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def info(self, revision):
        server = self.server
        commit = server.branches.get(revision, revision)
        if commit not in server.commits:
            self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return
        files = server.commits[commit].items()
        siblings = [
            described(name, content) | {"rfilename": name} | server.lies.get(name, {})
            for name, content in files
        ]
        facts = {"id": server.id, "sha": commit, "siblings": siblings}
        self.json(facts | {"safetensors": {"parameters": {"F32": 777}, "total": 777}})

    def json(self, content):
        self.answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def answer(self, status, body, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *arguments):
        pass


def described(name, content):
    """What the hub says of one file."""
    fields = {"type": "file", "path": name, "size": len(content)}
    if not name.endswith(".safetensors"):
        return fields | {"oid": hashlib.sha1(content).hexdigest()}
    digest = hashlib.sha256(content).hexdigest()
    lfs = {"oid": digest, "sha256": digest, "size": len(content), "pointerSize": 134}
    return fields | {"oid": digest, "lfs": lfs}


@pytest.fixture
def serve():
    """Return a function that serves a repository of an id, with one commit of some files."""
    started = []

    def start(repository, commit, files):
        server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
        server.daemon_threads = True
        server.id, server.files = repository, files
        server.commits, server.branches = {commit: files}, {"main": commit}
        server.asked, server.served, server.refusal, server.lies = [], [], None, {}
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        started.append((server, thread))
        return server

    yield start
    for server, thread in started:
        server.shutdown()
        thread.join()
        server.server_close()
