"""
Workers: what they report into the run's store, how they end, and how they fail to.

A worker is a generator that yields the seconds until it does the next thing. It writes the files
that a real one does, by the same rules; its lines may be lost, late, doubled, torn and out of
order, and one that was given up may write on.
"""

from __future__ import annotations

import hashlib
import json
import os
from typing import TYPE_CHECKING, Any

import attrs

from flash.worker.checkpoints import FORMAT, MANIFEST

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from .cloud import Machine
    from .world import World

HEARTBEAT_S = 10.0
STEPS = 12


@attrs.define(eq=False)
class Worker:
    """The worker of one machine; `fault` is what is wrong with it, if anything."""

    world: World
    machine: Machine
    folder: Path
    """The run's store."""
    fault: str | None
    total_s: float
    """How long the whole run takes it."""
    beats: bool = True
    spent_usd: float = 0.0
    written_usd: float = 0.0
    """The most that a line which its reader can see says."""
    heard_s: float = 0.0
    """When anything of it came, and `progressed_s` a whole line that was no heartbeat."""
    progressed_s: float = 0.0
    finished: bool = False
    _torn: tuple[bytes, str, Any] | None = None
    _behind: list[tuple[bytes, str | None, Any]] = attrs.field(factory=list)
    """What waits until the line before it is whole."""

    def start(self) -> None:
        now_s = self.world.clock.monotonic()
        self.heard_s = self.progressed_s = now_s
        self._go_on(self._work())
        self._go_on(self._heartbeats())

    def _go_on(self, life: Iterator[float]) -> None:
        pause_s = next(life, None)
        if pause_s is not None:
            self.world.clock.after(pause_s, lambda: self._go_on(life))

    @property
    def _stopping(self) -> bool:
        return self.machine.stop_asked_s is not None

    @property
    def _runs(self) -> bool:
        # One that nobody sees any more may be alive all the same.
        return self.machine.live or (self.fault == "undead" and self.world.weather.faulty)

    def _heartbeats(self) -> Iterator[float]:
        while self._runs and self.beats and not self.finished:
            self._say("heartbeat")
            yield HEARTBEAT_S

    def _work(self) -> Iterator[float]:
        pace_s = self.total_s / STEPS
        self._say("phase", name="train")
        first = self.world.newest_step(self.machine.run) + 1
        # At which step its fault shows.
        bad = self.world.random.randint(first, STEPS + 1)
        for step in range(first, STEPS + 1):
            yield pace_s * self.world.random.uniform(0.5, 1.5)
            if not self._runs:
                return
            if self._stopping and self.fault not in {"stubborn", "hang", "silent"}:
                yield from self._stop(step - 1)
                return
            if step == bad and self.fault:
                yield from self._go_wrong()
                if not self._runs:
                    return
            self._say("metric", step=step, total=STEPS, loss=1.0)
            if step % 4 == 0:
                self._save(step)
        yield pace_s
        if self._runs:
            self._finish()

    def _stop(self, step: int) -> Iterator[float]:
        yield self.world.random.choice((0.1, 2.0, 20.0))
        if self._runs:
            self._save(step)
            self.world.cloud.end(self.machine, "stopped", 12)

    def _finish(self) -> None:
        self.finished = True
        self._commit(self.folder / "adapter", None)
        self._say("done", steps=STEPS)
        self.world.cloud.end(self.machine, "finished", 0)

    def _go_wrong(self) -> Iterator[float]:
        yield from FAULTS[str(self.fault)](self)

    def _crash(self) -> Iterator[float]:
        yield from self._fail(1, "crash", f"ValueError: {self.world.random.random()}")

    def _crash_the_same_way(self) -> Iterator[float]:
        yield from self._fail(1, "crash", "ValueError: x")

    def _user_error(self) -> Iterator[float]:
        yield from self._fail(10, "user_error", "no such split")

    def _fail(self, code: int, kind: str, message: str) -> Iterator[float]:
        self._say("error", kind=kind, message=message, hint=None)
        self.world.cloud.end(self.machine, "failed", code)
        yield from ()

    def _run_out_of_memory(self) -> Iterator[float]:
        self.world.cloud.end(self.machine, "memory", 11)
        yield from ()

    def _be_killed_for_memory(self) -> Iterator[float]:
        self.world.cloud.end(self.machine, "memory", 137)
        yield from ()

    def _vanish(self) -> Iterator[float]:
        self.world.cloud.end(self.machine, "vanished")
        yield from ()

    def _be_preempted(self) -> Iterator[float]:
        code = self.world.random.choice((None, 12, 143))
        self.world.cloud.end(self.machine, "preempted", code)
        yield from ()

    def _be_stopped(self) -> Iterator[float]:
        self.world.cloud.end(self.machine, "stopped", 12)
        yield from ()

    def _hang(self) -> Iterator[float]:
        while self.machine.live:
            yield 60.0

    def _fall_silent(self) -> Iterator[float]:
        self.beats = False
        yield from self._hang()

    def _report_garbage(self) -> Iterator[float]:
        self._append(self.world.random.choice(GARBAGE))
        yield 1.0

    def _mistake_itself(self) -> Iterator[float]:
        """Write as if it were another attempt, which must not pass for progress."""
        self.beats = False
        while self.machine.live:
            other = self.machine.attempt + self.world.random.choice((-1, 1))
            self._append(_line(self.world, "metric", attempt=other, step=1, total=STEPS))
            yield 20.0

    def _spend(self) -> Iterator[float]:
        self.spent_usd += self.world.random.choice((0.01, 0.2, 1.0))
        self._say("spend", usd=self.spent_usd)
        yield 1.0

    def _go_on_well(self) -> Iterator[float]:
        yield from ()

    def _say(self, type_: str, **data: Any) -> None:
        line = _line(self.world, type_, attempt=self.machine.attempt, **data)
        weather, random = self.world.weather, self.world.random
        # What ends it is written last of all, and is there when its exit code is.
        if type_ in {"done", "error", "spend"} or not weather.chance(weather.lines):
            self._mend()
            self._append(line, type_, data)
            return
        what = random.choice(("lost", "late", "twice", "torn"))
        if what == "late":
            delay_s = random.choice((1.0, 15.0, 200.0))
            self.world.clock.after(delay_s, lambda: self._append(line, type_, data))
        elif what == "twice":
            self._append(line + line, type_, data)
        elif what == "torn":
            cut = random.randrange(len(line))
            self._append(line[:cut])
            self._torn = (line[cut:], type_, data)
            self.world.clock.after(random.choice((0.5, 3.0)), self._mend)

    def _mend(self) -> None:
        """Write the rest of a line, and what had to wait for it."""
        if self._torn is not None and self._runs:
            rest, self._torn = self._torn, None
            self._append(*rest)
            while self._behind:
                self._append(*self._behind.pop(0))

    def _append(self, line: bytes, type_: str | None = None, data: Any = None) -> None:
        if self._torn is not None:
            self._behind.append((line, type_, data))
            return
        path = self.folder / "attempts" / str(self.machine.attempt) / "events.jsonl"
        try:
            with path.open("ab") as file:
                file.write(line)
        except FileNotFoundError:
            return
        # The world's time, which two changes never have in common.
        os.utime(path, ns=self.world.stamp())
        self.heard_s = self.world.clock.monotonic()
        if type_ == "spend":
            self.written_usd = max(self.written_usd, data["usd"])
        if type_ not in {None, "heartbeat"}:
            self.progressed_s = self.heard_s

    def _save(self, step: int) -> None:
        if step > 0:
            folder = self.folder / "checkpoints" / f"step-{step:06d}"
            self._commit(folder, step, torn=self.world.weather.chance(0.05))
            self._say("checkpoint", step=step, final=False)

    def _commit(self, folder: Path, step: int | None, *, torn: bool = False) -> None:
        if (self.folder / "attempts" / str(self.machine.attempt + 1)).exists():
            return  # the fence: its run has gone on without it
        folder.mkdir(parents=True, exist_ok=True)
        content = b"weights"
        (folder / "weights").write_bytes(content)
        if torn:
            return
        entry = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        manifest = {
            "format": FORMAT,
            "created_s": self.world.clock.time(),
            "step": step,
            "metrics": {},
            "files": {"weights": entry},
        }
        (folder / MANIFEST).write_text(json.dumps(manifest))


FAULTS: dict[str, Callable[[Worker], Iterator[float]]] = {
    "crash": Worker._crash,
    "crash the same way": Worker._crash_the_same_way,
    "user error": Worker._user_error,
    "out of memory": Worker._run_out_of_memory,
    "killed for memory": Worker._be_killed_for_memory,
    "hang": Worker._hang,
    "silent": Worker._fall_silent,
    "vanish": Worker._vanish,
    # It is gone for its provider, and goes on all the same.
    "undead": Worker._vanish,
    "preempted": Worker._be_preempted,
    "stopped by itself": Worker._be_stopped,
    # It hears of no stop.
    "stubborn": Worker._go_on_well,
    "garbage": Worker._report_garbage,
    "confused": Worker._mistake_itself,
    "spender": Worker._spend,
}

GARBAGE = (
    b"\n\n\n",
    b"\x00\xff\xfe\n",
    b"{}\n",
    b"[1, 2]\n",
    b"null\n",
    b'{"type": "done"}\n',
    b'{"type": "spend", "time_s": 1, "usd": "much"}\n',
    b'{"type": "spend", "time_s": 1, "usd": NaN}\n',
    b'{"type": "spend", "time_s": 1, "usd": -1e308}\n',
    b'{"type": ["metric"], "time_s": 1}\n',
    b'{"type": "error", "time_s": "x", "message": {}}\n',
    b'{"type": "metric", "time_s": 1, "step": {"a": [1]}, "attempt": null}\n',
    b"{" * 5000 + b"\n",
    b"x" * 100_000 + b"\n",
)


def _line(world: World, type_: str, **data: Any) -> bytes:
    event = {"type": type_, "time_s": world.clock.time(), **data}
    return json.dumps(event).encode() + b"\n"
