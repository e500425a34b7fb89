"""Runs worlds, tells of those that break, and shows what happened in one."""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from .truth import Broken
from .world import Ground, World

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

STEPS = 300
# Names that are drawn by the system are no part of what happened.
_WHERE = re.compile(r"/\S*flash-simulation-\w+|(?<=\.json\.)\w+|\b\d{12,}\b")


@attrs.frozen
class Failure:
    """A seed whose world broke: why, and the command that shows it again."""

    seed: int
    steps: int
    reason: str

    @property
    def command(self) -> str:
        steps = f" --steps {self.steps}" if self.steps != STEPS else ""
        return f"python -m tests.simulation {self.seed}{steps} --trace"

    def __str__(self) -> str:
        return f"seed {self.seed}: {self.reason}\n  replay: {self.command}"


@contextlib.contextmanager
def ground() -> Iterator[Ground]:
    """Give a ground in memory, where there is such a folder: nothing has to outlive the process."""
    memory = Path("/dev/shm")
    root = tempfile.mkdtemp(prefix="flash-simulation-", dir=memory if memory.is_dir() else None)
    try:
        yield Ground(Path(root))
    finally:
        shutil.rmtree(root, ignore_errors=True)


def run_seeds(seeds: Iterable[int], *, steps: int = STEPS) -> Iterator[Failure | None]:
    """Run a world for each seed; yield the failure, or None."""
    with ground() as here:
        for seed in seeds:
            yield run_seed(seed, here, steps=steps)


def run_seed(seed: int, here: Ground, *, steps: int, trace: Any = None) -> Failure | None:
    """Run one world; whatever it raises is a failure of the code under test or of this one."""
    try:
        World(seed, here, trace=trace).run(steps)
    except (Exception, Broken) as error:  # noqa: BLE001 - reported with the seed, which brings it back
        return Failure(seed, steps, f"{type(error).__name__}: {error}")
    return None


@attrs.define
class Trace:
    """What happened in a world, as lines; `digest` is the same where the same happened."""

    lines: list[str] = attrs.field(factory=list)

    def __call__(self, step: int, now_s: float, what: str, *details: Any) -> None:
        words = _WHERE.sub("", " ".join(str(detail) for detail in details))
        self.lines.append(f"{step:4} {now_s:10.2f}  {what} {words}")

    @property
    def digest(self) -> str:
        return hashlib.sha256("\n".join(self.lines).encode()).hexdigest()
