"""`flash export`: files for elsewhere, that are what was trained or are not there."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from flash.cli.export import Place, _stage
from flash.environments import folder_digest
from flash.errors import UsageError
from flash.home import FlashHome
from flash.job import Job
from flash.plane.ids import new_run_id
from flash.plane.plane import Plane
from flash.testing.adapters import make_adapter
from flash.testing.models import make_tiny_model
from flash.worker.checkpoints import CheckpointStore

pytestmark = pytest.mark.slow

TOKEN = "hf_" + "a1B2c3D4e5F6" * 3


class Shell:
    """A home with runs that have an adapter each, without the training."""

    def __init__(self, folder):
        self.folder = folder
        self.home = FlashHome(folder / "home")
        self.environ = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("FLASH", "HF_"))
        } | {"FLASH_HOME": str(self.home.root), "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}

    def start(self, *words, **environ):
        return subprocess.Popen(
            [sys.executable, "-m", "flash", "export", *map(str, words)],
            cwd=self.folder,
            env=self.environ | environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def export(self, *words, **environ):
        process = self.start(*words, **environ)
        out, err = process.communicate(timeout=240)
        assert "Traceback" not in err
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def json(self, *words, **environ):
        done = self.export(*words, "--json", **environ)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def run(self, model, save):
        environment = self.folder / "environment"
        environment.mkdir(exist_ok=True)
        (environment / "environment.py").write_text("")
        job = Job(
            run=new_run_id(),
            spec={
                "thinking": False,
                "worker_env": {},
                "reward": {},
                "environment": {"params": {}, "pip": [], "secrets": [], "split": "train"},
            },
            plugins={},
            algorithm="nothing:trains",
            environment={
                "plugin": "freesolo",
                "reference": ".",
                "digest": folder_digest(environment),
            },
            model={"id": str(model), "plugin": "hub"},
            provider=("local",),
            sinks=(),
            steps=None,
            memory_gib=0.0,
            secrets=(),
            warm_start=None,
        )
        plane = Plane(self.home, supervisor=[sys.executable, "-c", "pass"])
        run = plane.submit(job, environment=environment, secrets={}).id
        checkpoints = CheckpointStore(plane.store(run))
        checkpoints.save(2, lambda folder: save(folder / "adapter"), metrics={})
        checkpoints.save_final(save)
        return run

    def left(self):
        """What is in the folder beside home and environment."""
        return sorted({path.name for path in self.folder.iterdir()} - {"home", "environment"})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory):
    return make_adapter(tiny, tmp_path_factory.mktemp("adapter"), seed=5)


def copy_of(adapter):
    return lambda folder: shutil.copytree(adapter, folder, dirs_exist_ok=True)


@pytest.fixture
def shell(tmp_path):
    return Shell(tmp_path)


@pytest.fixture
def run(shell, tiny, adapter):
    return shell.run(tiny, copy_of(adapter))


def test_the_adapter_is_copied_as_it_was_saved(shell, run, adapter):
    found = shell.json(run)

    folder = shell.folder / f"{run}-peft"
    assert found["path"] == str(folder)
    assert (found["run"], found["step"], found["format"]) == (run, None, "peft")
    content = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert content == {path.name: path.read_bytes() for path in adapter.iterdir()}
    assert found["files"] == {name: len(data) for name, data in content.items()}
    assert shell.left() == [folder.name]


def test_a_checkpoint_is_exported_by_its_step(shell, run):
    done = shell.export(f"{run}/step-2", "--to", "out")

    assert done.returncode == 0, done.stderr
    assert "golden.json" in {path.name for path in (shell.folder / "out").iterdir()}

    assert "/step-2" in shell.export(f"{run}/step-3").stderr


def other_scale(adapter):
    def save(folder):
        copy_of(adapter)(folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        config["lora_alpha"] *= 2
        (folder / "adapter_config.json").write_text(json.dumps(config))

    return save


def test_what_is_not_what_was_trained_is_left_nowhere(shell, tiny, adapter):
    run = shell.run(tiny, other_scale(adapter))

    done = shell.export(run, "--format", "merged")

    assert done.returncode == 1
    assert "what was exported is not what was trained" in done.stderr
    assert "--allow-drift" in done.stderr
    assert not shell.left()


def test_a_file_that_was_changed_since_it_was_saved_is_refused(shell, run):
    victim = Plane(shell.home).store(run) / "adapter" / "adapter_model.safetensors"
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(bytes(content))

    done = shell.export(run)

    assert done.returncode != 0
    assert "is not what was saved" in done.stderr or "damaged" in done.stderr
    assert not shell.left()


def test_nothing_is_overwritten(shell, run):
    (shell.folder / "full").mkdir()
    (shell.folder / "full" / "mine").write_text("mine")
    (shell.folder / "empty").mkdir()

    full = shell.export(run, "--to", "full")
    nowhere = shell.export(run, "--to", "no/where")
    file = shell.export(run, "--to", "full/mine")
    empty = shell.export(run, "--to", "empty")

    assert [done.returncode for done in (full, nowhere, file, empty)] == [2, 2, 2, 0]
    assert "nothing is overwritten" in full.stderr
    assert "nothing is overwritten" in file.stderr
    assert "there is no folder" in nowhere.stderr
    assert [path.name for path in (shell.folder / "full").iterdir()] == ["mine"]
    assert (shell.folder / "empty" / "adapter_config.json").exists()


def test_a_base_model_is_no_adapter(shell, tiny):
    done = shell.export(tiny)

    assert "is a base model, and what is exported is a run's adapter" in done.stderr


def test_ctrl_c_leaves_nothing(shell, run):
    process = shell.start(run, "--format", "merged")
    deadline = time.monotonic() + 120
    while not shell.left() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert shell.left()

    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)

    assert process.returncode == 130, err
    assert not shell.left()


def test_what_a_killed_export_left_goes_with_the_next_one_to_the_same_place(shell, run):
    process = shell.start(run, "--format", "merged", "--to", "there")
    deadline = time.monotonic() + 120
    while not shell.left() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.communicate(timeout=60)
    (left,) = shell.left()
    alive = f".there.{os.getpid()}.partial"
    others = [alive, f".elsewhere.{process.pid}.partial", f".there.x{process.pid}.partial"]
    for name in others:
        (shell.folder / name).mkdir()

    assert shell.export(run, "--to", "there").returncode == 0
    assert left == f".there.{process.pid}.partial"
    assert shell.left() == sorted([*others, "there"])


def test_what_another_holds_is_not_swept_though_its_process_is_not_of_this_machine(tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    held, stage = (tmp_path / f".there.{pid}.partial" for pid in (ended.pid, os.getpid()))
    with _stage(held), _stage(stage):
        assert held.is_dir()
    held.mkdir()
    with _stage(stage):
        assert not held.exists()


class Hub(BaseHTTPRequestHandler):
    """The endpoints of a hub that `huggingface_hub` makes a repository and a commit with."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server, path = self.server, unquote(urlsplit(self.path).path)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer(401, {"error": "Invalid credentials"})
        elif path == "/api/whoami-v2":
            self.answer(200, {"name": "owner", "auth": {"accessToken": {"role": "write"}}})
        elif path.startswith("/api/models/") and server.files is None:
            self.answer(404, {"error": "not found"}, {"X-Error-Code": "RepoNotFound"})
        elif path.startswith("/api/models/"):
            siblings = [{"rfilename": name} for name in server.files]
            facts = {"id": "owner/name", "sha": "0" * 40, "private": server.private}
            self.answer(200, facts | {"siblings": siblings})
        else:
            self.answer(404, {"error": path})

    def do_POST(self):
        server, path = self.server, unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path == "/api/repos/create":
            server.created = json.loads(body)
            server.files = {}
            self.answer(200, {"url": f"{server.url}/owner/name", "name": "owner/name", "id": "1"})
        elif "/preupload/" in path:
            asked = json.loads(body)["files"]
            modes = [
                {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                for one in asked
            ]
            self.answer(200, {"files": modes})
        elif "/commit/" in path:
            lines = [json.loads(line) for line in body.splitlines()]
            server.commit = lines[0]["value"]["summary"]
            import base64

            server.files = {
                one["value"]["path"]: base64.b64decode(one["value"]["content"]) for one in lines[1:]
            }
            self.answer(
                200,
                {
                    "success": True,
                    "commitOid": "1" * 40,
                    "commitUrl": f"{server.url}/owner/name/commit/{'1' * 40}",
                },
            )
        else:
            self.answer(404, {"error": path})

    def answer(self, status, content, headers=None):
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.files, server.created, server.commit, server.private = None, None, None, True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def on(hub, token=TOKEN):
    return {"HF_ENDPOINT": hub.url, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1"}


@pytest.mark.parametrize("public", [False, True])
def test_a_repository_is_made_and_written_in_one_commit(shell, run, adapter, hub, public):
    words = ["--public"] if public else []
    found = shell.json(run, "--to", "hf:owner/name", *words, **on(hub))

    assert hub.created["visibility"] == ("public" if public else "private")
    there = {path.name: path.read_bytes() for path in adapter.iterdir()}
    if public:  # it holds rows of the training data
        del there["golden.json"]
    assert hub.files == there
    assert hub.commit == f"peft of {run}"
    assert (found["path"], found["repository"]) == (None, "owner/name")
    assert not shell.left()


def test_a_repository_that_holds_files_is_left_alone(shell, run, hub):
    hub.files = {"model.safetensors": b"theirs"}

    done = shell.export(run, "--to", "hf:owner/name", **on(hub))

    assert done.returncode == 2
    assert "nothing is overwritten" in done.stderr
    assert hub.files == {"model.safetensors": b"theirs"}


def test_a_repository_that_is_public_takes_a_word_for_it(shell, run, hub):
    hub.files, hub.private = {}, False

    done = shell.export(run, "--to", "hf:owner/name", **on(hub))

    assert done.returncode == 2
    assert "owner/name is public" in done.stderr
    assert not hub.files


def test_a_token_that_is_refused_is_not_told(shell, run, hub):
    other = TOKEN[::-1]

    done = shell.export(run, "--to", "hf:owner/name", **on(hub, other))

    assert done.returncode == 2
    assert "the hub refuses owner/name" in done.stderr
    assert other not in done.stdout + done.stderr
    assert hub.created is None


def test_without_a_token_nothing_is_asked(shell, run, hub):
    done = shell.export(run, "--to", "hf:owner/name", HF_ENDPOINT=hub.url, HOME=str(shell.folder))

    assert done.returncode == 2
    assert "HF_TOKEN has no value" in done.stderr


@pytest.mark.parametrize("to", ["hf:", "hf:name", "hf:a/b/c", "hf:../x", "hf:a/.."])
def test_what_is_no_repository_is_refused(to):
    with pytest.raises(UsageError, match="names no repository"):
        Place.of(to, public=False)


def test_only_a_repository_is_public():
    with pytest.raises(UsageError, match="--public"):
        Place.of("./folder", public=True)


PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "export.md"
BLOCK = re.compile(r"^```(console|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def shape(line, folder, run):
    """A line without what differs from one run to the next: names, and numbers."""
    line = line.replace(str(folder), "DIR").replace("/home/you/project", "DIR")
    line = line.replace(run, "RUN").replace("1aenqqscq", "RUN")
    return re.sub(r"\d[\d.e+-]*", "#", line)


def test_the_page_shows_what_happens(shell, run, tiny):
    blocks = BLOCK.findall(PAGE.read_text("utf-8"))
    shown = [text for kind, text in blocks if kind == "console" and text.startswith("$ ")]
    assert len(shown) == 3
    for text in shown:
        command, *lines = text.splitlines()
        done = shell.export(*shlex.split(command)[3:])
        said = [*done.stderr.splitlines(), *done.stdout.splitlines()]

        assert [shape(line, shell.folder, run) for line in said] == [
            shape(line, shell.folder, run) for line in lines
        ]

    (code,) = [text for kind, text in blocks if kind == "python"]
    code = code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(tiny)).replace("1aenqqscq", run)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=shell.folder,
        env=shell.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
