"""
One world: a home on a real disk, a cloud, people and a supervisor, all drawn from one seed.

Each step lets some time pass and something happen. Everything that is drawn comes from one
generator, so a seed is a world.
"""

from __future__ import annotations

import contextlib
import functools
import random
import shutil
from typing import TYPE_CHECKING, Any
from unittest import mock

import attrs

from flash.environments import folder_digest
from flash.errors import FlashError
from flash.home import FlashHome
from flash.job import Job
from flash.plane import database as tables
from flash.plane.database import Database
from flash.plane.ids import new_run_id
from flash.plane.machine import FINAL
from flash.plane.plane import Plane
from flash.plane.records import Records
from flash.spec.limits import BudgetTable, RetryTable
from flash.spec.strict import Reader
from flash.testing.host import make_host

from . import journal, messenger
from .clock import Clock
from .cloud import NAME, Cloud, provider_of
from .disk import Disk, Killed, mount, watch
from .process import supervise
from .referee import Referee
from .truth import Broken
from .weather import Weather
from .workers import FAULTS, Worker

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from .cloud import Machine

OWNER = "simulate"
MOST_RUNS = 8
CALM_S = 2 * 3600.0
"""How long everything may take to come to its end once faults stop: longer than any wait is."""
LAST_STEPS = 20


class Ground:
    """What worlds of one process have in common: a home's path, and a database to begin with."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.home = FlashHome(root / "home")
        self.environment = root / "environment"
        self.environment.mkdir(parents=True)
        (self.environment / "environment.py").write_text("# nothing to see\n")
        self.digest = folder_digest(self.environment)
        self.reader = functools.cache(Reader)
        self.world: World | None = None
        self.host = make_host(
            provider_of(lambda: self._here.cloud), messenger.messenger_of(lambda: self._here)
        )
        # One for all worlds: what it has compiled is of use to the next.
        self.database = Database(self.home.database)
        with self.database.writing() as connection:
            connection.execute(tables.identity.insert().values(owner=OWNER))
        self.database.close()
        journal.install(self.home.database)
        self._template = root / "template.db"
        self.home.database.replace(self._template)
        watch(self.database._engine)

    @property
    def _here(self) -> World:
        assert self.world is not None
        return self.world

    def enter(self, world: World) -> None:
        """Make the home that of a plane that has never been used, and its world this one."""
        self.world = world
        self.database.close()
        shutil.rmtree(self.home.root, ignore_errors=True)
        self.home.folder("runs")
        self.home.folder("secrets")
        shutil.copyfile(self._template, self.home.database)
        self.database._file = self.home.database.stat()


class Over(KeyboardInterrupt):
    """The world ends here; like `Killed`, it passes through everything."""


class World:
    """A seed's world; raises `Broken` at the step where an invariant does not hold."""

    def __init__(self, seed: int, ground: Ground, *, trace: Callable[..., None] | None) -> None:
        self.seed = seed
        self._trace = trace
        self.random = random.Random(seed)
        self.ground = ground
        ground.enter(self)
        self.home, self.home_root = ground.home, ground.home.root
        self.weather = Weather(self.random)
        self.disk = Disk(str(self.home_root))
        self.clock = Clock(self.disk.others)
        mount(self.disk)
        self.disk.between = self._meanwhile
        self.journal = journal.Journal(self.home.database)
        self.cloud = Cloud(self)
        self.referee = Referee(self)
        self.plane, self.other_plane = self._plane(), self._plane()
        self.specs: dict[str, dict[str, Any]] = {}
        self.secrets: dict[str, dict[str, str]] = {}
        self.accepted: set[str] = set()
        self.workers: dict[tuple[str, int], Worker] = {}
        self.steps = self.changes = 0
        self.wanted = False
        """Whether somebody has seen to it that there is a supervisor."""
        self._supervised = False
        self._steps = 0
        self._looked_s: float | None = None
        self._calm_until_s: float | None = None

    def note(self, what: str, *details: Any) -> None:
        """Tell whoever follows what happens."""
        if self._trace is not None:
            self._trace(self.steps, self.clock.monotonic(), what, *details)

    def run(self, steps: int) -> None:
        """Live for `steps` steps, and then until everything is over."""
        self._steps = steps
        start = mock.patch("flash.plane.daemon.Daemon.start", self._want_supervisor)
        try:
            with start, contextlib.suppress(Over):
                self._act(self._submit)
                while True:
                    self._supervise() if self._supervisor_starts() else self._step()
            # A supervisor that starts sweeps what others have left.
            self._calm_until_s = None
            self._steps = self.steps + LAST_STEPS
            with start, contextlib.suppress(Over):
                self._supervise()
            self.referee.at_the_end()
        finally:
            self.journal.close()

    def between_rounds(self) -> None:
        """Go on while the supervisor waits."""
        with self.disk.others():
            now_s = self.clock.monotonic()
            self.referee.look()
            # What a process that was held up could not see does not count.
            if self._looked_s is not None:
                self.referee.after_look(min(now_s - self._looked_s, 5.0))
            self._looked_s = now_s
            self._step()
        self.disk.failing = self.weather.errno
        self.disk.kill_after = self._kill_after()

    def _step(self) -> None:
        """Let time pass and something happen; then everything must be as it must be."""
        draw, weather = self.random, self.weather
        self.steps += 1
        if self._calm_until_s is not None:
            self._calm_step(self._calm_until_s)
            return
        if self.steps > self._steps:
            self.note("calm")
            weather.clear()
            self._calm_until_s = self.clock.monotonic() + CALM_S
            return
        if weather.chance(weather.pauses):
            elapsed_s = draw.uniform(30.0, 900.0)
        else:
            elapsed_s = draw.choice((0.05, 0.2, 0.2, 1.0, 3.0, 10.0, 30.0))
        self.clock.advance(elapsed_s)
        weather.change()
        if weather.chance(weather.jumps):
            seconds = draw.choice((-86_400.0, -600.0, -7.0, 7.0, 600.0, 86_400.0))
            self.note("the clock jumps", seconds)
            self.clock.jump(seconds)
        if weather.chance(weather.commands):
            self._act(draw.choice((self._submit, self._cancel, self._resume)))
        self.referee.after_step()

    def _calm_step(self, end_s: float) -> None:
        """Let time pass without faults: now everything must come to its end."""
        # Most of it is over soon.
        self.clock.advance(1.0 if end_s - self.clock.monotonic() > CALM_S - 60.0 else 5.0)
        self.referee.after_step()
        left = self.referee.unsettled()
        if left is None and not self.wanted:
            left = self.referee.still_there()
            if left is None:
                raise Over
            # It came up when nobody waited for it any more; the next one to use Flash ends it.
            self.wanted = self.wanted or not self._supervised
        if self.clock.monotonic() > end_s:
            raise Broken(f"{CALM_S / 3600:g} hours after the last fault, {left}")
        if not self._supervised and not self.wanted:
            raise Broken(f"the supervisor has left, and {left}")

    # The supervisor.

    def _want_supervisor(self, *_: Any) -> None:
        self.wanted = True

    def _supervisor_starts(self) -> bool:
        """Say whether one starts now: it is needed, and somebody has seen that."""
        return self.wanted and (not self.weather.faulty or self.random.random() < 0.5)

    def _kill_after(self) -> int | None:
        draw = self.random
        return draw.randint(0, 30) if self.weather.chance(self.weather.kills) else None

    def _supervise(self) -> None:
        """Have a supervisor until it is killed, or has nothing left to do."""
        self.note("a supervisor starts")
        self.wanted, self._supervised, self._looked_s = False, True, None
        self.referee.restarted()
        self.disk.failing = self.weather.errno
        try:
            with self.disk.process(kill_after=self._kill_after()):
                supervise(self)
        except Killed as killed:
            self.note("the supervisor is killed at", killed)
            self.wanted = True  # whoever follows a run sees to it
        except FlashError as error:
            # What it cannot go on without, the database above all: it ends with a sentence.
            self.note("the supervisor ends", error)
            if self.disk.failing is None:
                raise Broken(f"the supervisor ended without a reason: {error}") from error
            self.wanted = True
        else:
            self.note("the supervisor has nothing left to do")
            self.referee.look()
            if not (self.weather.kills or self.weather.disk):
                self.referee.assert_cleared()
        finally:
            self._supervised = False
            self.disk.failing = None
            self.referee.look()

    # People.

    def _act(self, command: Callable[[], None]) -> None:
        """Have somebody do something, whose own process may be killed as well."""
        weather = self.weather
        kill_after = self.random.randint(0, 25) if weather.chance(2 * weather.kills) else None
        self.disk.failing = weather.errno
        try:
            with self.disk.process(kill_after=kill_after):
                command()
        except Killed as killed:
            self.note("killed at", killed)
            self.wanted = True  # who was cut off looks what has become of it
        except FlashError as error:
            self.note("refused", error)
        finally:
            self.disk.failing = None
            self.referee.look()
            self.referee.resuming = None

    def _meanwhile(self, what: str) -> None:
        """Somebody else does something between two changes of a process."""
        if what.startswith("os.") and "secrets" not in what:
            return  # maybe under a lock that others wait for
        if not self.weather.chance(self.weather.meanwhile):
            return
        with self.disk.others():
            self.note("meanwhile", what)
            # In a process of their own; and what was begun before is not over.
            self.plane, self.other_plane = self.other_plane, self.plane
            resuming = self.referee.resuming
            self.referee.look()
            with contextlib.suppress(FlashError):
                self.random.choice((self._cancel, self._resume, self._submit))()
            self.referee.look()
            self.referee.resuming = resuming
            self.plane, self.other_plane = self.other_plane, self.plane

    def _plane(self) -> Plane:
        """Return the plane of one more process: its clock, and connections that are kept open."""
        with mock.patch.multiple(
            "flash.plane.plane",
            Database=lambda _: self.ground.database,
            Records=lambda database: Records(database, self.clock.time),
        ):
            return Plane(self.home, environ={}, supervisor=())

    def _submit(self) -> None:
        if len(self.specs) >= MOST_RUNS:
            return
        run = new_run_id(1.8e9 + len(self.specs))
        draw = self.random
        spec = self._spec()
        secrets = draw.choice(({}, {"KEY": f"value-of-{run}"}))
        if spec["sink"]:
            secrets = secrets | {messenger.TOKEN: f"token-of-{run}"}
        job = Job(
            run=run,
            spec=spec,
            plugins={},
            algorithm="package.module:run",
            environment={"plugin": "jsonl", "reference": ".", "digest": self.ground.digest},
            model={"id": "org/model", "plugin": "hub"},
            provider=(NAME,),
            sinks=tuple(spec["sink"]),
            steps=12,
            memory_gib=1.0,
            secrets=tuple(secrets),
            warm_start=None,
        )
        # It counts from here on: a process that is killed later may have been heard.
        self.specs[run], self.secrets[run] = spec, secrets
        self.note("submit", run, spec["budget"], spec["retry"])
        self.plane.submit(job, environment=self.ground.environment, secrets=secrets)
        self.accepted.add(run)

    def _spec(self) -> dict[str, Any]:
        draw = self.random
        budget = BudgetTable(
            max_hours=draw.choice((None, None, 0.05, 0.3)),
            max_usd=draw.choice((None, None, 0.05, 0.5)),
        )
        retry = RetryTable(
            max_attempts=draw.choice((1, 3, 10)),
            preempted=draw.choice((0, 2, 8)),
            no_capacity=draw.choice((0, 2, 8)),
            lost=draw.choice((0, 2, 4)),
            stalled=draw.choice((0, 1, 2)),
            out_of_memory=draw.choice((0, 0, 1)),
            pause_s=draw.choice((1.0, 5.0)),
            max_pause_s=30.0,
            stalled_after_s=draw.choice((60.0, 200.0)),
        )
        return {
            "model": "org/model",
            "algorithm": "sft",
            "train": {},
            "worker_env": {},
            "budget": attrs.asdict(budget),
            "retry": attrs.asdict(retry),
            "provider": {NAME: {}},
            "sink": draw.choice(({}, {messenger.NAME: {}})),
        }

    def _cancel(self) -> None:
        if self.referee.runs:
            run = self.random.choice(list(self.referee.runs))
            self.note("cancel", run)
            self.plane.cancel(run)

    def _resume(self) -> None:
        over = [r for r, row in self.referee.runs.items() if row["state"] in FINAL]
        if over:
            run = self.random.choice(over)
            self.note("resume", run)
            self.referee.resuming = run
            self.plane.resume(run, secrets=lambda _: self.secrets[run])

    # Workers.

    def start_worker(self, machine: Machine) -> None:
        """The machine is up, and the worker begins."""
        weather = self.weather
        fault = self.random.choice(list(FAULTS)) if weather.chance(weather.workers) else None
        total_s = self.random.choice((20.0, 100.0, 400.0))
        worker = Worker(self, machine, self.home_root / "runs" / machine.run, fault, total_s)
        self.workers[machine.run, machine.attempt] = worker
        self.note("worker", machine.id, fault, total_s)
        worker.start()

    def stamp(self) -> tuple[int, int]:
        """Return the times of a file that is changed now."""
        self.changes += 1
        now_ns = int(self.clock.time() * 1e9) + self.changes
        return now_ns, now_ns

    def newest_step(self, run: str) -> int:
        """Return the step of a run's newest complete checkpoint, as its worker finds it."""
        folder = self.home_root / "runs" / run / "checkpoints"
        if not folder.is_dir():
            return 0
        whole = (path for path in folder.iterdir() if (path / "manifest.json").exists())
        return max((int(path.name.removeprefix("step-")) for path in whole), default=0)
