"""
A home with runs that have adapters, and a gateway that serves nothing: it says that it does.

What it does is the rest of what a gateway does: the inherited lock, `gateway.json`, the rows moved
on, the copies checked and cleared. Where `stubborn` is in the home, it ends at once; a deployment
of a copy whose `adapter_config.json` has `"broken": true` fails.
"""

import json
import os
import signal
import sys
from pathlib import Path

import psutil
from plane_bench import until

from flash.home import FlashHome
from flash.job import Job
from flash.plane import database as tables
from flash.plane.daemon import GATEWAY, SUPERVISOR
from flash.plane.database import Database
from flash.plane.deployments import Deployments
from flash.plane.gateway import address_path
from flash.plane.ids import new_run_id
from flash.plane.plane import Plane
from flash.plane.records import Records
from flash.plane.serving import Serving
from flash.plane.store import RunStore
from flash.worker.checkpoints import CheckpointStore

FAKE = """
import json, sys, time
from flash.home import FlashHome
from flash.plane import copies, gateway
from flash.plane.daemon import GATEWAY
from flash.plane.database import Database
from flash.plane.deployments import Deployments
from flash.worker.checkpoints import damaged_file

home = FlashHome.from_environment()
if (home.root / "stubborn").exists():
    sys.exit("error: the port 8808 is taken; [gateway] port in config.toml sets another")
assert GATEWAY.handed_over() is not None
deployments = Deployments(Database(home.database))
for row in deployments.wanted():
    if row.state == "ready":
        deployments.moved(row, "deploying")
url = home.root / "url"
gateway.announce(home, url.read_text() if url.exists() else "http://127.0.0.1:9/v1")
while True:
    for row in deployments.wanted():
        folder = copies.adapter_folder(home, row.id)
        if row.state == "undeploying":
            copies.clear(home, deployments, row)
        elif row.state == "deploying" and not (home.root / "slow").exists():
            broken = json.loads((folder / "adapter_config.json").read_text())["broken"]
            damaged = damaged_file(folder)
            if damaged or broken:
                deployments.moved(row, "failed", error=f"{damaged or 'it is broken'}", hint="mend")
            else:
                deployments.moved(row, "ready", report={"mean": 0.001})
    time.sleep(0.02)
"""

SUPERVISOR_OF_FAKES = """
from flash.home import FlashHome
from flash.plane.supervisor import supervise

supervise(FlashHome.from_environment(), gateway={gateway!r})
"""


class ServingBench:
    """One home; what it starts ends with `close`."""

    def __init__(self, folder: Path) -> None:
        self.home = FlashHome(folder / "home")
        fake, supervisor = folder / "fake_gateway.py", folder / "supervisor.py"
        fake.write_text(FAKE)
        self.gateway = (sys.executable, "-P", str(fake))
        supervisor.write_text(SUPERVISOR_OF_FAKES.format(gateway=self.gateway))
        self.supervisor = (sys.executable, "-P", str(supervisor))
        self.database = Database(self.home.database)
        self.deployments = Deployments(self.database)

    def serving(self) -> Serving:
        plane = Plane(self.home, supervisor=self.supervisor)
        return Serving(self.home, plane=plane, gateway=self.gateway)

    def unattended(self) -> Serving:
        """Return one that starts nothing that works."""
        nothing = (sys.executable, "-c", "")
        plane = Plane(self.home, supervisor=nothing)
        return Serving(self.home, plane=plane, gateway=nothing)

    def run(self, *, steps=(), final=True, state="done", serving=None, broken=False, **spec) -> str:
        """Add a run that has ended; returns its id."""
        run = new_run_id()
        store = self.home.runs / run
        store.mkdir(mode=0o700)
        told = {"train": {}, "thinking": False, "serving": serving or {}, **spec}
        job = Job(
            run=run,
            spec={"model": "org/model", "algorithm": "sft", **told},
            plugins={},
            algorithm="package.module:run",
            environment={"plugin": "freesolo", "reference": ".", "digest": "sha256:0"},
            model={"id": "org/model", "plugin": "hub"},
            provider=("local",),
            sinks=(),
            steps=None,
            memory_gib=0.0,
            secrets=(),
            warm_start=None,
        )
        (store / "job.json").write_bytes(job.to_json())
        saved = CheckpointStore(store)

        def write(folder):
            folder.mkdir(exist_ok=True)
            config = {"r": 4, "broken": broken}
            (folder / "adapter_config.json").write_text(json.dumps(config))
            (folder / "adapter_model.safetensors").write_bytes(os.urandom(5000))

        for step in steps:
            metrics = steps[step] if isinstance(steps, dict) else {}
            saved.save(step, lambda folder: write(folder / "adapter"), metrics=metrics)
        if final:
            saved.save_final(write)
        Records(self.database).add(
            run, spec=job.spec, caller={}, put=lambda: None, take_back=lambda: None
        )
        with self.database.writing() as connection:
            row = tables.runs.update().where(tables.runs.c.id == run)
            connection.execute(row.values(state=state, finished_s=1.0))
        return run

    def store(self, run: str) -> RunStore:
        return RunStore(self.home.runs / run)

    def copy(self, name: str) -> Path:
        return self.home.root / "deployments" / name.replace("/", "@") / "adapter"

    def state(self, name: str) -> str:
        return self.deployments.get(name).state

    def pid(self, command) -> int | None:
        """Return the process that was started with a command, if it lives."""
        for process in psutil.process_iter():
            try:
                if process.cmdline() == list(command) and process.status() != "zombie":
                    return process.pid
            except psutil.Error:
                continue
        return None

    def gateway_pid(self) -> int:
        return json.loads(address_path(self.home).read_bytes())["pid"]

    def kill(self, command) -> None:
        """Kill a process as the kernel would, and wait until it is dead."""
        pid = self.pid(command)
        if pid is not None:
            process = psutil.Process(pid)
            os.kill(pid, signal.SIGKILL)
            process.wait()

    until = staticmethod(until)

    def describe(self) -> str:
        logs = (daemon.log_path(self.home) for daemon in (SUPERVISOR, GATEWAY))
        said = [path.read_text() for path in logs if path.exists()]
        return "\n".join([*map(str, self.deployments.all()), *said])

    def close(self) -> None:
        # The supervisor first: it would start the other again.
        self.kill(self.supervisor)
        self.kill(self.gateway)
