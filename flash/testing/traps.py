"""
Where a worker can be killed: everything it passes on its way, and one pass at which it dies.

The traps are laid around what every algorithm goes through, whatever it is: torch's data loader,
modules, backward and optimizers, the environment's scorer, the lines of the event log, and every
operation on a file of the run's store. A pass has a name and a number, counted per name in its
process, so that a pass of one run can be found again in another run of the same job.

`lay` is called in a worker's process before any work; nothing takes the traps away again.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PHASES: Final = {
    "start": "before the first step",
    "data": "the data of a step",
    "rollout": "sampling",
    "scoring": "the environment's scorer",
    "forward": "forward",
    "backward": "backward",
    "optimizer": "the optimizer's step",
    "evaluation": "held-out evaluation",
    "report": "a line of the event log",
    "episodes": "a file of rollouts",
    "checkpoint": "the write of a checkpoint, between file operations; one may be left out",
    "final": "the write of the final adapter and of the result",
}
"""The phases that a pass may be of, and what they mean."""

# `tempfile` names: what stands before is kept, so that two runs give a file the same name.
_RANDOM: Final = re.compile(r"^(\..+)\.[a-z0-9_]{8}$")
_WRITES: Final = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_OF_FOLDER: Final = {"checkpoints": "checkpoint", "adapter": "final", "rollouts": "episodes"}
_WHILE: Final = {
    "environment": "start",
    "model": "start",
    "data": "start",
    "evaluate": "evaluation",
}


@attrs.frozen
class Point:
    """
    Where to kill: at pass `number` of `name`.

    `how` is "before" it, "after" it, or "torn": a file that is about to be synced loses its second
    half first, and of a line that is about to be written only half is. "stopped" is no kill: there
    the worker is asked to end early, with SIGTERM.
    """

    name: str
    number: int
    how: str = "before"

    def __str__(self) -> str:
        return f"{self.how} {self.name} #{self.number}"


@attrs.frozen
class Pass:
    """
    One pass of a recorded run.

    `step` is the optimizer step under way, counted from 1, and `doing` the phase that the worker
    reported last.
    """

    name: str
    number: int
    step: int
    doing: str

    @property
    def operation(self) -> str:
        """What is passed: "forward", or "sync" of a file, or "event"."""
        return self.name.partition(" ")[0]

    @property
    def path(self) -> str:
        """What an operation on a file is on, relative to the store; else empty."""
        return "" if self.operation == "event" else self.name.partition(" ")[2]

    @property
    def phase(self) -> str | None:
        """The one of `PHASES` that it belongs to; None for what is no phase of its own."""
        if self.operation == "event":
            return "checkpoint" if self.name == "event checkpoint" else "report"
        if self.path:
            top = self.path.partition("/")[0]
            return "final" if "result.json" in top else _OF_FOLDER.get(top)
        if (self.operation, self.doing) == ("inference", "rollout"):
            return "rollout"
        phase = _WHILE.get(self.doing, self.operation)
        return phase if phase in PHASES else None

    def at(self, how: str = "before") -> Point:
        """Return the point at this pass."""
        return Point(self.name, self.number, how)


class Traps:
    """Counts passes of a worker on `store`, writes each to `record`, and dies at `point`."""

    def __init__(self, store: Path, *, point: Point | None, record: Path | None) -> None:
        self._store = os.path.realpath(store)
        self._point = point
        self._record = None
        if record is not None:
            self._record = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._counts: dict[str, int] = {}
        self._lock = threading.RLock()
        self._step = 1
        self._doing = "environment"
        self._write = os.write

    def lay(self) -> None:
        """Lay the traps; the process must not have begun its work."""
        self._files()
        self._events()
        self._torch()
        self._scorer()

    def _enter(self, name: str, tear: Callable[[], None] = lambda: None) -> int:
        """Count a pass, and die before it where that is the point; return its number."""
        with self._lock:
            number = self._counts[name] = self._counts.get(name, 0) + 1
            if self._record is not None:
                line = json.dumps([name, number, self._step, self._doing])
                self._write(self._record, f"{line}\n".encode())
        if self._point == Point(name, number, "torn"):
            tear()
            _die()
        if self._point == Point(name, number, "before"):
            _die()
        if self._point == Point(name, number, "stopped"):
            os.kill(os.getpid(), signal.SIGTERM)
        return number

    def _leave(self, name: str, number: int) -> None:
        if self._point == Point(name, number, "after"):
            _die()

    def _around(self, name: str, owner: Any, attribute: str) -> None:
        """Make each call of `owner.attribute` a pass."""

        def around(call: Callable[..., Any]) -> Callable[..., Any]:
            def passing(*args: Any, **kwargs: Any) -> Any:
                number = self._enter(name)
                try:
                    return call(*args, **kwargs)
                finally:  # the last batch is followed by an exception
                    self._leave(name, number)

            return passing

        replace(owner, attribute, around)

    def _files(self) -> None:
        def around(sync: Callable[[int], None]) -> Callable[[int], None]:
            def fsync(descriptor: int) -> None:
                path = _path_of(descriptor)
                if name := self._named("sync", path):
                    self._enter(name, lambda: _halve(path))
                sync(descriptor)

            return fsync

        def hear(event: str, args: Sequence[Any]) -> None:
            """Audit hooks see each operation before it is done, whoever asks for it."""
            operation = _OPERATIONS.get(event)
            if operation is None or (event == "open" and not _opens_to_write(args)):
                return
            path = args[1] if event == "os.rename" else args[0]
            folder = args[-1] if event in {"os.remove", "os.rmdir"} else -1
            if isinstance(path, str | bytes | os.PathLike):
                full = os.fsdecode(path)
                if isinstance(folder, int) and folder >= 0:
                    full = os.path.join(_path_of(folder), full)  # noqa: PTH118 - paths as text, for speed
                if name := self._named(operation, full):
                    self._enter(name)

        replace(os, "fsync", around)
        sys.addaudithook(hear)

    def _events(self) -> None:
        def around(write: Callable[[int, bytes], int]) -> Callable[[int, bytes], int]:
            def passing(descriptor: int, data: bytes) -> int:
                name = self._event(descriptor, data)
                if name is None:
                    return write(descriptor, data)
                half = bytes(data)[: len(data) // 2]
                number = self._enter(name, lambda: void(write(descriptor, half)))
                written = write(descriptor, data)
                self._leave(name, number)
                return written

            return passing

        replace(os, "write", around)

    def _event(self, descriptor: int, data: bytes) -> str | None:
        """Return the name of the event that is written, and take notice of what it says."""
        if not bytes(data).startswith(b'{"type"') or not _path_of(descriptor).startswith(
            f"{self._store}/attempts/"
        ):
            return None
        event = json.loads(data)
        if event["type"] == "heartbeat":  # by the clock, and so never the same twice
            return None
        if event["type"] == "phase":
            self._doing = event["name"]
        return f"event {event['type']}"

    def _torch(self) -> None:
        import torch
        from torch.nn.modules.module import register_module_forward_pre_hook
        from torch.optim.optimizer import (
            register_optimizer_step_post_hook,
            register_optimizer_step_pre_hook,
        )
        from torch.utils.data import dataloader

        self._around("data", dataloader._BaseDataLoaderIter, "__next__")  # noqa: SLF001 - there is no public place that every loader passes
        self._around("backward", torch.autograd, "backward")
        register_module_forward_pre_hook(
            lambda *_: void(self._enter("forward" if torch.is_grad_enabled() else "inference"))
        )
        register_optimizer_step_pre_hook(lambda *_: void(self._enter("optimizer")))
        register_optimizer_step_post_hook(lambda *_: self._stepped())

    def _stepped(self) -> None:
        self._leave("optimizer", self._counts["optimizer"])
        self._step += 1

    def _scorer(self) -> None:
        from flash.worker import attempt

        def around(load: Callable[..., Any]) -> Callable[..., Any]:
            def loaded(*args: Any, **kwargs: Any) -> Any:
                environment = load(*args, **kwargs)
                self._around("scoring", type(environment), "score")
                return environment

            return loaded

        replace(attempt, "load_environment", around)

    def _named(self, operation: str, path: str) -> str | None:
        """Return the name of an operation on a file of the store; None for any other file."""
        if not path.startswith(f"{self._store}/"):
            return None
        parts = path[len(self._store) + 1 :].split("/")
        if parts[0] == "attempts":
            return None
        return " ".join([operation, "/".join(_RANDOM.sub(r"\1.*", part) for part in parts)])


_OPERATIONS: Final = {
    "open": "open",
    "os.rename": "rename",
    "os.mkdir": "mkdir",
    "os.remove": "remove",
    "os.rmdir": "rmdir",
}


def lay(store: Path, *, point: Point | None = None, record: Path | None = None) -> None:
    """Lay traps in this process for a worker on `store`: die at `point`, write down each pass."""
    Traps(store, point=point, record=record).lay()


def read_record(path: Path) -> list[Pass]:
    """Return the passes that a run has written down."""
    return [Pass(*json.loads(line)) for line in path.read_text().splitlines()]


def replace(owner: Any, attribute: str, make: Callable[[Any], Any]) -> None:
    """Put what `make` makes of an attribute in its place, for the rest of this process."""
    setattr(owner, attribute, make(getattr(owner, attribute)))


def void(_: object) -> None:
    """Drop a value where a callback must have none."""


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    threading.Event().wait()  # another thread may be the one that the signal ends first


def _halve(path: str) -> None:
    if Path(path).is_file():
        os.truncate(path, Path(path).stat().st_size // 2)


def _opens_to_write(args: Sequence[Any]) -> bool:
    _, mode, flags = args
    return bool(flags & _WRITES) if isinstance(flags, int) else mode not in {None, "r", "rb"}


def _path_of(descriptor: int) -> str:
    """Return what an open descriptor names; empty where that cannot be known."""
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")  # noqa: PTH115 - text, for speed
    except OSError:
        pass
    if sys.platform == "darwin":
        import fcntl

        return os.fsdecode(fcntl.fcntl(descriptor, fcntl.F_GETPATH, bytes(1024)).rstrip(b"\0"))
    return ""
