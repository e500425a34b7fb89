"""
Saving while training goes on: one thread writes what the trainer copied into memory.

At most one save is being written. Of those that wait, a periodic one gives way to the next, so a
slow disk costs checkpoints and never steps. A step that the user asked for, one that was measured
on held-out tasks and the one of a stop are always written; where a second of them waits, the
trainer does too, which bounds the memory that the copies take.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final, Self

import attrs

from flash.errors import StoreError
from flash.worker.checkpoints import HELD_OUT
from flash.worker.fencing import Superseded

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from pathlib import Path
    from types import TracebackType

    from flash.spec.limits import CheckpointsTable
    from flash.worker.checkpoints import Checkpoint, CheckpointStore
    from flash.worker.reporter import EventReporter

_MOST_REQUIRED: Final = 2
"""Saves that may not be left out: one in flight, one that waits."""


@attrs.frozen(eq=False)
class _Save:
    step: int
    write: Callable[[Path], None]
    metrics: Mapping[str, float]
    required: bool  # a failure ends the attempt
    skippable: bool


class CheckpointSaver:
    """
    The run's checkpoints as the algorithm sees them; see `flash.contracts.Checkpoints`.

    `always` are the steps that the user asked for, `keep` says which checkpoints stay, and `stop`
    whether the run was told to stop: the save made then must succeed. Each save that is on the
    disk is reported as an event. As a context manager it ends with every save written.

    What goes wrong with a periodic save is a warning, once, and the next one tries again. With a
    required one it ends the attempt: `failed` turns True, and every later call raises it.
    """

    def __init__(
        self,
        store: CheckpointStore,
        reporter: EventReporter,
        *,
        keep: CheckpointsTable,
        always: Collection[int] = (),
        stop: Callable[[], bool],
    ) -> None:
        self._store = store
        self._reporter = reporter
        self._keep = keep
        self._always = frozenset(always)
        self._stop = stop
        self._changed = threading.Condition()
        self._saves: list[_Save] = []  # the first is being written, the others wait
        self._closed = False
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        # Of the writing thread: saves that failed in a row, and whether the last removal did.
        self._missing = 0
        self._untidy = False

    @property
    def failed(self) -> bool:
        """Whether a save failed that the attempt cannot go on without."""
        return self._failure is not None

    def newest(self) -> Checkpoint | None:
        """Return the newest complete checkpoint to resume from, of those that are written."""
        return self._store.newest()

    def save(
        self, step: int, write: Callable[[Path], None], *, metrics: Mapping[str, float]
    ) -> None:
        """Have the checkpoint of `step` written in the background."""
        required = step in self._always or self._stop()
        measured = any(name.startswith(HELD_OUT) for name in metrics)
        save = _Save(step, write, dict(metrics), required, skippable=not (required or measured))
        with self._changed:
            skipped = [one for one in self._saves[1:] if one.skippable]
            self._saves = [one for one in self._saves if one not in skipped]
            if not save.skippable:
                self._changed.wait_for(lambda: len(self._saves) < _MOST_REQUIRED)
            self._raise_failure()
            self._saves.append(save)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="flash-saver", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        for one in skipped:
            self._reporter.log(
                f"the checkpoint of step {one.step} is left out: the disk is slower than the "
                f"steps, and that of step {step} is newer"
            )

    def save_final(self, write: Callable[[Path], None]) -> None:
        """Commit the final adapter, after every save before it; it is there on return."""
        self._flush()
        self._store.save_final(write)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None
    ) -> None:
        """Wait for every save; an error of theirs counts where there is no other."""
        try:
            self._flush()
        except BaseException as failure:
            if error is None:
                raise
            if failure is not error:
                self._reporter.warning(f"a checkpoint could not be saved: {failure}")
        finally:
            with self._changed:
                self._closed = True
                self._changed.notify_all()

    def _flush(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._saves)
            self._raise_failure()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._saves or self._closed)
                if not self._saves:
                    return
                save = self._saves[0]
            failure: BaseException | None = None
            try:
                self._write(save)
            except BaseException as error:  # noqa: BLE001 - whatever it is, the trainer's thread raises it
                failure = error
            with self._changed:
                self._failure = self._failure or failure
                self._saves.pop(0)
                self._changed.notify_all()

    def _write(self, save: _Save) -> None:
        try:
            self._store.save(save.step, save.write, metrics=save.metrics)
        except Superseded:
            raise
        except StoreError as error:
            if save.required:
                raise
            if not self._missing:
                self._reporter.warning(
                    f"{_said(error)}; training goes on, and each later save tries again"
                )
            self._missing += 1
            return
        self._reporter.emit("checkpoint", step=save.step)
        if self._missing:
            self._reporter.log(f"checkpoints are saved again; {self._missing} could not be")
            self._missing = 0
        self._tidy(save.step)

    def _tidy(self, step: int) -> None:
        try:
            self._store.tidy(
                step, last=self._keep.keep_last, best=self._keep.keep_best, always=self._always
            )
        except Superseded:
            raise
        except StoreError as error:
            if not self._untidy:
                self._reporter.warning(f"{_said(error)}; they stay until it can be done")
            self._untidy = True
        else:
            self._untidy = False


def _said(error: StoreError) -> str:
    return f"{error.message} ({error.hint})" if error.hint else error.message
