"""
A home with thousands of live runs on the fleet, a provider without machines, and their workers.

The supervisor, the database, the stores and the events are real; so is the plugin, which pip
installs. One process appends the heartbeats of all workers (`python tests/fleet.py HOME SECONDS`).
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import attrs
from distributions import install, plugin
from fleet_slots import RUNNING, Slots

from flash.environments import folder_digest
from flash.home import FlashHome
from flash.job import Job
from flash.plane import database as tables
from flash.plane.database import Database
from flash.plane.ids import new_run_id
from flash.plane.orphans import key_of
from flash.plane.records import Records
from flash.values import Offer

PLUGIN = """
    import attrs
    from flash.api import (
        Instance, Launch, Offer, ProviderCapabilities, ProviderPlugin, hookimpl,
    )

    @attrs.frozen(kw_only=True)
    class FleetConfig:
        slots: str = ""

    class Fleet:
        def __init__(self, path):
            from pathlib import Path
            from flash_fleet.slots import Slots
            self._slots = Slots(Path(path))

        def check(self):
            return "the fleet"

        def offers(self, need):
            return [Offer(provider="fleet", id="slot", memory_gib=1e3, price_usd_hour=1.0)]

        def launch(self, offer, request):
            return Launch("accepted", {"slot": self._slots.add(request.key)})

        def get(self, ref):
            return self._instance(ref["slot"], self._slots.one(ref["slot"]))

        def list(self, owner):
            mine = f"flash-{owner}-"
            return [
                self._instance(index, slot)
                for index, slot in enumerate(self._slots.all())
                if slot[0] != GONE and slot[2].startswith(mine)
            ]

        def terminate(self, ref, *, grace_s):
            self._slots.told(ref["slot"])
            running = self._slots.one(ref["slot"])[0] in (STARTING, RUNNING)
            self._slots.end(ref["slot"], STOPPED if running else GONE, 12 if running else 0)

        def _instance(self, index, slot):
            state, code, key, _, _ = slot
            ended = state not in (STARTING, RUNNING)
            return Instance(
                key=key,
                ref={"slot": index},
                state=NAMES[state],
                exit_code=code if ended else None,
            )

    def make(ctx, config):
        return Fleet(config.slots)

    from flash_fleet.slots import GONE, NAMES, RUNNING, STARTING, STOPPED

    @hookimpl
    def flash_register_providers():
        return [ProviderPlugin(
            name="fleet", summary="No machines at all.", make=make, config=FleetConfig,
            capabilities=ProviderCapabilities(
                exit_codes=True, prices=True, offline=True, poll_s=POLL_S, parallel_launches=32,
                settle_s=0.0, idempotent=True,
            ),
        )]

    POLL_S = {poll_s}
"""
HEARTBEAT_S = 10.0
_ENVIRONMENT = "# nothing to see\n"
_ROWS = '{"input": "a", "output": "b"}\n' * 20


@attrs.define
class Fleet:
    """The home in `folder`, its supervisor, and the process that is its workers."""

    folder: Path
    home: FlashHome
    slots: Slots
    site: Path
    environment: Path
    owner: str
    runs: list[str]
    supervisor: subprocess.Popen | None = None
    workers: subprocess.Popen | None = None

    @classmethod
    def make(cls, folder, runs, *, lines=60, poll_s=0.4, room=None):
        """Make a home with so many live runs, whose workers have reported `lines` events each."""
        slots_code = Path(__file__).with_name("fleet_slots.py").read_text()
        code = PLUGIN.replace("{poll_s}", str(poll_s))
        site = install([plugin("fleet", code, modules={"slots": slots_code})], folder / "plugin")
        environment = folder / "environment"
        (environment / "dataset").mkdir(parents=True)
        (environment / "environment.py").write_text(_ENVIRONMENT)
        (environment / "dataset" / "train.jsonl").write_text(_ROWS)
        home = FlashHome(folder / "home")
        slots = Slots(folder / "slots", room=room or 2 * runs + 10_000)
        database = Database(home.database)
        owner = Records(database).owner()
        made = cls(folder, home, slots, site, environment, owner, [])
        made._fill(database, runs, lines)
        database.close()
        return made

    def job(self, run):
        """Return a job for the fleet."""
        return Job(
            run=run,
            spec={
                "model": "org/model",
                "algorithm": "sft",
                "train": {"max_steps": 1000},
                "worker_env": {},
                "budget": {"max_hours": 100.0, "max_usd": 500.0, "warn_at": 0.8},
                "retry": {"max_attempts": 20, "lost": 2, "stalled_after_s": 1800.0},
                "provider": {"fleet": {"slots": str(self.folder / "slots")}},
            },
            plugins={},
            algorithm="package.module:run",
            environment={
                "plugin": "freesolo",
                "reference": ".",
                "digest": folder_digest(self.environment),
            },
            model={"id": "org/model", "plugin": "hub"},
            provider=("fleet",),
            sinks=(),
            steps=None,
            memory_gib=0.0,
            secrets=(),
            warm_start=None,
        )

    def _fill(self, database, runs, lines):
        now_s = time.time()
        template = self.job("0" * 9)
        offer = attrs.asdict(Offer(provider="fleet", id="slot", memory_gib=1e3, price_usd_hour=1.0))
        rows, attempts = [], []
        for number in range(runs):
            # Ids that sort in the order in which they were made.
            created_s = now_s - 3600.0 + number * 0.01
            run = new_run_id(created_s)
            self.runs.append(run)
            slot = self.slots.add(key_of(self.owner, run, 1))
            attempt = self.home.runs / run / "attempts" / "1"
            attempt.mkdir(parents=True)
            (self.home.runs / run / "job.json").write_bytes(
                attrs.evolve(template, run=run).to_json()
            )
            (attempt / "events.jsonl").write_text(_history(now_s, lines))
            times = {"created_s": created_s, "updated_s": created_s}
            rows.append(
                {"id": run, "state": "running", "spec": template.spec, "caller": {}, **times}
                | {"change": number + 1, "fence": number + 1}
            )
            attempts.append(
                {"fence": number + 1, "run": run, "number": 1, "state": "live"}
                | {"provider": "fleet", "offer": offer, "ref": {"slot": slot}}
                | {"started_s": created_s}
            )
        with database.writing() as connection:
            connection.execute(tables.runs.insert(), rows)
            connection.execute(tables.attempts.insert(), attempts)

    def environ(self):
        """Return the environment of the supervisor's process."""
        return {
            **os.environ,
            "PYTHONPATH": str(self.site),
            "FLASH_HOME": str(self.home.root),
        }

    def start_supervisor(self):
        """Start `python -m flash.plane.supervisor`."""
        with (self.folder / "supervisor.out").open("ab") as out:
            self.supervisor = subprocess.Popen(
                [sys.executable, "-P", "-m", "flash.plane.supervisor"],
                env=self.environ(),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )
        return self.supervisor

    def kill_supervisor(self):
        """Kill it, as the kernel would."""
        if self.supervisor is not None:
            self.supervisor.kill()
            self.supervisor.wait()
            self.supervisor = None

    def start_workers(self, heartbeat_s=HEARTBEAT_S):
        """Start the process that appends every worker's heartbeats."""
        self.workers = subprocess.Popen(
            [sys.executable, __file__, str(self.folder), str(heartbeat_s)],
            stdout=subprocess.PIPE,
            text=True,
        )

    def stop_workers(self):
        """Stop it; return how many lines it has written, and in how long."""
        if self.workers is None:
            return {}
        self.workers.send_signal(signal.SIGTERM)
        said, _ = self.workers.communicate()
        self.workers = None
        return json.loads(said)

    def close(self):
        """Leave no process."""
        self.kill_supervisor()
        if self.workers is not None:
            self.workers.kill()
            self.workers.wait()
            self.workers.stdout.close()


def _history(now_s, lines):
    events = [_line("phase", now_s - 600, name="train", attempt=1)]
    events += [
        _line("step", now_s - 600 + i, step=i, loss=1.0 / (i + 1), attempt=1)
        if i % 6 == 0
        else _line("heartbeat", now_s - 600 + i, attempt=1)
        for i in range(1, lines)
    ]
    return "".join(events)


def _line(type_, time_s, **data):
    return json.dumps({"type": type_, "time_s": round(time_s, 3), **data}) + "\n"


def work(folder, heartbeat_s):
    """Append a line for every machine that runs, every `heartbeat_s`, spread evenly, until told."""
    slots = Slots(folder / "slots")
    stopping = []
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(True))
    paths = []
    written, behind_s, tick_s = 0, 0.0, 0.01
    began = time.monotonic()
    position = 0.0
    beats = 0
    while not stopping:
        count = len(slots)
        for index in range(len(paths), count):
            _, run, number = slots.one(index)[2].split("-")[1:]
            paths.append(folder / "home" / "runs" / run / "attempts" / number / "events.jsonl")
        states = slots.states()
        position += count * tick_s / heartbeat_s
        while position >= 1 and count:
            position -= 1
            index = beats % count
            round_, beats = beats // count, beats + 1
            if states[index] != RUNNING:
                continue
            step = round_ % 6 == 5
            line = (
                _line(
                    "step",
                    time.time(),
                    step=100 + round_,
                    loss=0.5,
                    attempt=int(paths[index].parent.name),
                )
                if step
                else _line("heartbeat", time.time(), attempt=int(paths[index].parent.name))
            )
            try:
                descriptor = os.open(paths[index], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            except FileNotFoundError:
                continue
            os.write(descriptor, line.encode())
            os.close(descriptor)
            written += 1
        ahead_s = began + tick_s - time.monotonic()
        began += tick_s
        if ahead_s > 0:
            time.sleep(ahead_s)
        else:
            behind_s = max(behind_s, -ahead_s)
    sys.stdout.write(json.dumps({"lines": written, "behind_s": round(behind_s, 3)}))


if __name__ == "__main__":
    work(Path(sys.argv[1]), float(sys.argv[2]))
