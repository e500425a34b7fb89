"""The sink against the real wandb library, offline: what it wrote is read back from the file."""

from __future__ import annotations

import base64
import json
import os
import struct
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from flash_sink_wandb import flash_register_sinks
from flash_sink_wandb.config import WandbConfig
from flash_sink_wandb.sink import WandbSink

from flash.api import FlashError, RunInfo, Sink

pytestmark = pytest.mark.slow

RUN = "7x1c3d9az"
BLOCK = 1 << 15

# In a process of its own, as in a worker: wandb starts a helper process and keeps global state.
SCRIPT = """
import json, sys
from flash.api import Event, RunInfo
from flash_sink_wandb.config import WandbConfig
from flash_sink_wandb.sink import WandbSink

folder, config, events, state = json.loads(sys.argv[1])
sink = WandbSink(WandbConfig(**config), "0123456789" * 4)
sink.open(RunInfo("7x1c3d9az", 1, folder, {"model": "org/tiny", "train": {"lora_rank": 8}}))
for type_, data in events:
    sink.emit(Event(type_, 1.0, data))
sink.close(state)
"""
EVENTS = [
    ("phase", {"name": "train"}),
    ("metric", {"step": 1, "total": 2, "loss": 0.5, "grad_norm": None}),
    ("metric", {"step": 2, "total": 2, "loss": 0.25}),
    ("evaluation", {"step": 2, "loss": 0.75}),
    ("metric", {"step": 1, "total": 2, "loss": 0.125}),
]


def follow(folder, *, config=None, state="done", server=None):
    """Let a sink follow a run, online on a server that fails; returns what the process printed."""
    settings = {"project": "triage", "mode": "online" if server else "offline"} | (config or {})
    environ = {"PATH": os.environ["PATH"], "HOME": str(folder / "home")}
    if server:
        environ["WANDB_BASE_URL"] = server
    arguments = json.dumps([str(folder / "store"), settings, EVENTS, state])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, arguments],
        capture_output=True,
        text=True,
        env=environ,
        timeout=120,
        check=False,
    )
    assert (done.returncode != 0) == bool(server), done.stderr
    return done.stdout + done.stderr


def records(path):
    """Read a `.wandb` file: a log in LevelDB's framing, each entry one protobuf `Record`."""
    from wandb.proto import wandb_internal_pb2

    data, position, parts = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        if BLOCK - position % BLOCK < 7:
            position += BLOCK - position % BLOCK
            continue
        _, size, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in {1, 4}:  # a whole entry, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """What a run in offline mode left: its records, its folder, and what was printed."""
    folder = tmp_path_factory.mktemp("wandb")
    config = {"run_name": "first try", "entity": "team"}
    printed = follow(folder, config=config)
    (path,) = (folder / "store" / "sinks" / "wandb").rglob("*.wandb")
    return list(records(path)), folder, printed


def of_kind(found, kind):
    return [getattr(record, kind) for record in found if record.WhichOneof("record_type") == kind]


def items(entries):
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in entries}


def test_the_record_declares_its_secret_and_makes_a_sink():
    (record,) = flash_register_sinks()
    asked = []

    class Context:
        @staticmethod
        def secret(name):
            asked.append(name)

    assert isinstance(record.make(Context(), record.config()), Sink)
    assert tuple(asked) == record.secrets == ("WANDB_API_KEY",)


def test_registering_does_not_import_wandb():
    code = (
        "import sys, flash_sink_wandb as p; p.flash_register_sinks();print('wandb' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "False\n"


def test_online_without_a_key_says_how_to_go_on(tmp_path):
    sink = WandbSink(WandbConfig(), None)

    with pytest.raises(FlashError, match="WANDB_API_KEY is not set") as caught:
        sink.open(RunInfo(RUN, 1, str(tmp_path), {}))
    assert 'mode = "offline"' in caught.value.hint
    assert list(tmp_path.iterdir()) == []
    sink.close("detached")


def test_offline_metrics_are_in_the_file_with_their_steps(followed):
    logged = [items(entry.item) for entry in of_kind(followed[0], "history")]
    logged = [{k: v for k, v in entry.items() if not k.startswith("_")} for entry in logged]

    assert logged == [
        {"train/step": 1, "train/total": 2, "train/loss": 0.5},
        {"train/step": 2, "train/total": 2, "train/loss": 0.25},
        {"eval/step": 2, "eval/loss": 0.75},
        {"train/step": 1, "train/total": 2, "train/loss": 0.125},
    ]


def test_numbers_are_plotted_against_the_optimizer_step(followed):
    defined = {
        metric.glob_name: metric.step_metric
        for metric in of_kind(followed[0], "metric")
        if metric.glob_name
    }

    assert defined == {"train/*": "train/step", "eval/*": "eval/step"}


def test_the_run_carries_flashs_id_name_project_and_spec(followed):
    (run, *_) = of_kind(followed[0], "run")

    assert (run.run_id, run.display_name) == (RUN, "first try")
    assert (run.project, run.entity) == ("triage", "team")
    config = items(run.config.update)
    assert config["model"] == "org/tiny"
    assert config["train"] == {"lora_rank": 8}


def test_the_end_is_recorded(followed):
    (end,) = of_kind(followed[0], "exit")
    assert end.exit_code == 0


def test_a_failed_run_ends_as_failed(tmp_path):
    follow(tmp_path, state="failed")
    (path,) = (tmp_path / "store").rglob("*.wandb")
    (end,) = of_kind(records(path), "exit")

    assert end.exit_code == 1


@pytest.fixture
def server():
    """A W&B server here that refuses every key: its address, and the keys that it was sent."""
    keys = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            keys.append(self.headers.get("Authorization", "").removeprefix("Basic "))
            self.send_response(401)
            self.end_headers()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}", keys
        http.shutdown()
        thread.join()


def test_the_key_goes_to_the_server_and_is_written_and_printed_nowhere(tmp_path, server):
    address, keys = server
    printed = follow(tmp_path, server=address)
    key = "0123456789" * 4
    written = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_symlink()]

    assert base64.b64encode(f"api:{key}".encode()).decode() in keys
    assert written
    assert not [path for path in written if key.encode() in path.read_bytes()]
    assert key not in printed


def test_offline_prints_nothing(followed):
    assert followed[2] == ""


def test_everything_lies_in_the_runs_store_closed_to_others(followed):
    folder = followed[1] / "store" / "sinks" / "wandb"

    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.slow
def test_a_second_attempt_continues_under_the_same_id(tmp_path):
    follow(tmp_path)
    first = set((tmp_path / "store").rglob("*.wandb"))
    follow(tmp_path)
    both = set((tmp_path / "store").rglob("*.wandb"))

    assert {path.name for path in both} == {f"run-{RUN}.wandb"}
    assert (len(first), len(both)) == (1, 2)


def test_disabled_writes_no_run(tmp_path):
    follow(tmp_path, config={"mode": "disabled"})

    assert list((tmp_path / "store").rglob("*.wandb")) == []
