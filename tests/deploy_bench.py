"""
A home with deployments, and a backend whose answers and faults the test decides.

The backend's server is a real one on a port of this machine; what it says of a golden set is what
was trained, unless the test has it lie.
"""

from __future__ import annotations

import collections
import http.server
import json
import math
import shutil
import threading
import time

import attrs
import structlog

from flash.errors import FlashError
from flash.gateway.bases import Bases
from flash.gateway.parts import Key, Parts, Times
from flash.gateway.routes import Routes
from flash.gateway.servers import Server
from flash.home import FlashHome
from flash.parity import Golden, GoldenSet
from flash.plane import database as tables
from flash.plane.copies import adapter_folder, digest_of
from flash.plane.database import Database
from flash.plane.deployments import Deployments, Wish
from flash.records import ModelPlugin, ServingPlugin
from flash.testing.host import make_host
from flash.values import Address, ModelCard
from flash.worker.checkpoints import CheckpointStore

BASE = "tiny/base"
MODULE, SIZE = "model.layers.0.self_attn.q_proj", 32
FIELDS = ("logprobs", "temperature", "tools")
PROMPT, COMPLETION = [1, 2, 3], [4, 5]
TRAINED, BARE = [-0.1, -0.2], [-2.0, -3.0]
QUICK = Times(
    **dict.fromkeys(("fetch_s", "start_s", "load_s", "prove_s", "unload_s"), 5.0),
    health_s=5.0,
    stop_s=5.0,
    drain_s=5.0,
    pause_s=0.0,
    look_s=0.01,
    health_every_s=0.0,
)


@attrs.frozen
class FakeConfig:
    context_tokens: int | None = None


@attrs.define
class World:
    """What the backend does; `faults` are taken one by one at the call of their name."""

    calls: list = attrs.field(factory=list)
    faults: dict = attrs.field(factory=lambda: collections.defaultdict(list))
    log_probs: dict = attrs.field(factory=dict)
    tokens: list = attrs.field(factory=lambda: list(PROMPT))
    smoke: dict = attrs.field(factory=dict)
    dead: bool = False
    live: list = attrs.field(factory=list)

    def called(self, name, *what):
        self.calls.append((name, *what))
        if self.faults[name]:
            fault = self.faults[name].pop(0)
            if isinstance(fault, BaseException):
                raise fault
            fault()
        if self.dead and name not in {"start", "stop"}:
            raise FlashError("the server ended with code 1\n  Error: no more")

    def dies(self):
        self.dead = True
        raise FlashError("the connection was closed")

    def names(self, name):
        return [what[0] for called, *what in self.calls if called == name]


class FakeBackend:
    """A `ServingBackend`."""

    def __init__(self, world):
        self.world = world
        self.loaded = {}
        self.server = None

    def start(self, base):
        self.world.called("start", base.max_rank)
        self.world.dead = False
        self.base = base.id
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.world.live.append(self)
        return Address(f"http://127.0.0.1:{self.server.server_port}/v1", "key")

    def load(self, adapter):
        self.world.called("load", adapter.name)
        self.loaded[adapter.name] = adapter

    def unload(self, name):
        self.world.called("unload", name)
        self.loaded.pop(name, None)

    def tokens(self, model, messages, *, tools, thinking):
        self.world.called("tokens", model)
        return self.world.tokens

    def log_probs(self, model, prompt, completion):
        self.world.called("log_probs", model)
        return self.world.log_probs.get(model, BARE if model == self.base else TRAINED)

    def health(self):
        self.world.called("health")

    def stop(self):
        server, self.server = self.server, None
        if server is not None:
            self.world.called("stop")
            server.shutdown()
            server.server_close()
            self.world.live.remove(self)

    def handler(backend):  # noqa: N805 - `self` is the handler inside
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                assert self.headers["Authorization"] == "Bearer key"
                status = backend.world.smoke.get("status", 200)
                backend.world.called("smoke", body["model"])
                content = [{"token": "a", "logprob": one} for one in TRAINED]
                answer = {
                    "choices": [{"message": {}, "logprobs": {"content": content}}],
                    "usage": {"completion_tokens": len(content)},
                } | backend.world.smoke
                said = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(said)))
                self.end_headers()
                self.wfile.write(said)

            def log_message(self, *_):
                pass

        return Handler


class FakeSource:
    """A `ModelSource` whose one model is a folder."""

    def __init__(self, folder):
        self.folder = folder

    def card(self, model):
        return CARD

    def on_disk(self, model):
        return self.folder


CARD = ModelCard(
    id=BASE,
    parameters=1,
    context_tokens=512,
    hidden_size=32,
    layers=2,
    intermediate_size=64,
    vocabulary=259,
)


class DeployBench:
    """
    A home, its table of deployments, and servers of the fake backend.

    What takes long to make is copied from `template`, a folder that many may share.
    """

    def __init__(self, folder, template, times=QUICK, *, base=None, backend=None, fields=FIELDS):
        """Without `base` and `backend`, they are fakes."""
        self.world = World()
        self.template = template
        self.home = FlashHome(folder / ".flash")
        blank = template / "blank.db"
        if not blank.exists():
            Database(blank).close()
        shutil.copy(blank, self.home.database)
        self.base = base or folder / "base"
        if base is None:
            write_base(self.base)
        self.database = Database(self.home.database)
        self.deployments = Deployments(self.database)
        self.closing = threading.Event()
        self.log = structlog.testing.CapturingLogger()
        host = make_host(
            ModelPlugin(
                name="tiny",
                summary="Tiny.",
                make=lambda _: FakeSource(self.base),
                cards=(CARD,),
            ),
            ServingPlugin(
                name="fake",
                summary="Fake.",
                make=lambda _, config: backend or FakeBackend(self.world),
                config=FakeConfig,
                fields=fields,
                streams_tools=False,
            ),
        )
        self.parts = Parts(
            home=self.home,
            host=host,
            secret=lambda _: None,
            bases=Bases(self.home, host, lambda _: None, self.log),
            deployments=self.deployments,
            routes=Routes(),
            log=structlog.wrap_logger(self.log),
            times=times,
        )

    @property
    def routes(self):
        return [route.name for route in self.parts.routes.listed()]

    def deploy(self, name, *, adapter=None, rank=8, golden=True, size=SIZE, **wish):
        """Put an adapter's copy in its place, or that of a folder, and ask for it to be served."""
        folder = adapter_folder(self.home, name)
        saved = self.template / (adapter.name if adapter else f"rank-{rank}-{golden}-{size}")
        if not saved.exists():
            CheckpointStore(saved).save_final(
                lambda to: (
                    shutil.copytree(adapter, to, dirs_exist_ok=True)
                    if adapter
                    else write_adapter(to, rank, golden, size)
                )
            )
        shutil.copytree(saved, folder.parent, dirs_exist_ok=True)
        run, _, step = name.partition("/step-")
        with self.database.writing() as connection:
            known = connection.scalar(tables.sa.select(tables.runs.c.id).filter_by(id=run))
            if known is None:
                connection.execute(tables.runs.insert().values(**RUN, id=run))
        asked = {
            "digest": digest_of(CheckpointStore(folder.parent).final()),
            "model": {"id": BASE, "plugin": "tiny"},
            "backend": "fake",
            "settings": {},
            "thinking": False,
            "stop": (),
        }
        return self.deployments.ask(
            Wish(id=name, run=run, step=int(step) if step else None, **{**asked, **wish})
        )

    def server(self):
        """Return the server of the first row, to be stepped by hand."""
        rows = self.deployments.wanted()
        return Server(Key.of(rows[0]), self.parts, self.closing)

    def steps(self, server, most=50):
        """Take steps until there are none."""
        for _ in range(most):
            if not server.step(server._rows()):
                return
        raise AssertionError(f"it never settles: {self.world.calls}")

    def states(self):
        return {row.id: row.state for row in self.deployments.all()}

    def close(self):
        self.closing.set()
        for backend in list(self.world.live):
            backend.stop()
        self.database.close()


RUN = {
    "state": "done",
    "fence": 0,
    "spec": {},
    "caller": {},
    "created_s": 0.0,
    "updated_s": 0.0,
    "change": 1,
}


def write_base(folder):
    """Write the base model: one matrix."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"hidden_size": SIZE}))
    write_tensors(folder / "model.safetensors", {f"{MODULE}.weight": (SIZE, SIZE)})


def write_adapter(folder, rank=8, golden=True, size=SIZE):
    """Write an adapter of that matrix, or of one of another size."""
    config = {"peft_type": "LORA", "base_model_name_or_path": BASE}
    config |= {"r": rank, "lora_alpha": rank, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    shapes = {"A": (rank, size), "B": (size, rank)}
    tensors = {f"base_model.model.{MODULE}.lora_{part}.weight": shapes[part] for part in shapes}
    write_tensors(folder / "adapter_model.safetensors", tensors)
    if golden:
        (folder / "golden.json").write_bytes(golden_set().to_json())


def write_tensors(path, shapes):
    """Write tensors of zeros as safetensors, without what reads them."""
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    said = json.dumps(header).encode()
    path.write_bytes(len(said).to_bytes(8, "little") + said + bytes(at))


def golden_set(prompts=1):
    one = Golden(
        messages=[{"role": "user", "content": "What?"}],
        tools=None,
        prompt=PROMPT,
        completion=COMPLETION,
        log_probs=TRAINED,
        base_log_probs=BARE,
    )
    return GoldenSet(thinking=False, stop_sequences=(), dtype="float32", prompts=[one] * prompts)


def settled(bench):
    """Return a server with two adapters on it, both ready."""
    bench.deploy("blue-1")
    bench.deploy("red-2/step-10")
    server = bench.server()
    bench.steps(server)
    assert bench.states() == {"blue-1": "ready", "red-2/step-10": "ready"}
    bench.world.calls.clear()
    return server


def until(holds, what, limit_s=30.0):
    """Wait for a condition."""
    end = time.monotonic() + limit_s
    while not (found := holds()):
        assert time.monotonic() < end, what() if callable(what) else what
        time.sleep(0.02)
    return found
