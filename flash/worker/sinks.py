"""Handing a run's events to its sinks without waiting for any of them."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from typing import TYPE_CHECKING, Any, Final

import attrs

from flash.errors import FlashError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from flash.contracts import Sink
    from flash.values import Event, RunInfo

CAPACITY: Final = 10_000
STUCK_S: Final = 180.0
CLOSE_S: Final = 20.0


@attrs.frozen
class _End:
    """The last item of a queue: how the attempt ended."""

    state: str


class SinkFanout:
    """
    Sinks, each behind a queue and a daemon thread of its own.

    A sink that raises, that stays in one call for `stuck_s`, that falls `capacity` events behind
    or that does not close in time is detached: it gets nothing more, one warning says why, and
    neither training nor the other sinks notice. What it wrote before stays.

    `emit` may be called before `start`; those events are handed over then.
    """

    def __init__(
        self, *, capacity: int = CAPACITY, stuck_s: float = STUCK_S, close_s: float = CLOSE_S
    ) -> None:
        self._capacity = capacity
        self._stuck_s = stuck_s
        self._close_s = close_s
        self._early: list[Event] = []
        self._lanes: list[_Lane] | None = None
        self._warn: Callable[[str], None] | None = None

    def start(
        self,
        sinks: Sequence[tuple[str, Sink]],
        run: RunInfo,
        warn: Callable[[str], None],
    ) -> None:
        """
        Open every sink in its own thread and hand over what was emitted so far.

        `warn` gets one sentence a detached sink, from any thread, never after `close`.
        """
        self._warn = warn
        lanes = [
            _Lane(name, sink, run, self._report, self._capacity, self._stuck_s)
            for name, sink in sinks
        ]
        self._lanes = lanes
        early, self._early = self._early, []
        for event in early:
            for lane in lanes:
                lane.offer(event)

    def emit(self, event: Event) -> None:
        """Queue the event for every sink; returns at once and never raises for a sink's sake."""
        if self._lanes is None:
            if len(self._early) < self._capacity:
                self._early.append(event)
            return
        for lane in self._lanes:
            lane.offer(event)

    def close(self, state: str) -> None:
        """Let the sinks finish what is queued, together for at most `close_s`, and detach them."""
        lanes, self._lanes = self._lanes or [], []
        for lane in lanes:
            lane.end(state)
        deadline = time.monotonic() + self._close_s
        for lane in lanes:
            lane.join(deadline)
            lane.detach(
                f"it did not finish within {self._close_s:g} s; its last events may be lost"
            )
        self._warn = None

    def _report(self, message: str) -> None:
        if self._warn is not None:
            self._warn(message)


class _Lane:
    """One sink, its queue and its thread. `offer` belongs to the trainer, `_run` to the thread."""

    def __init__(
        self,
        name: str,
        sink: Sink,
        run: RunInfo,
        report: Callable[[str], None],
        capacity: int,
        stuck_s: float,
    ) -> None:
        self._name = name
        self._sink = sink
        self._info = run
        self._report = report
        self._capacity = capacity
        self._stuck_s = stuck_s
        # Unbounded, and bounded by looking at its size: a put never blocks and the end always fits.
        self._queue: queue.SimpleQueue[Event | _End] = queue.SimpleQueue()
        self._busy_since: float | None = None
        self._detached = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name=f"flash-sink-{name}", daemon=True)
        self._thread.start()

    def offer(self, event: Event) -> None:
        if self._detached:
            return
        busy_since = self._busy_since
        if busy_since is not None and time.monotonic() - busy_since > self._stuck_s:
            self.detach(f"it has not answered for {self._stuck_s:g} s")
        elif self._queue.qsize() >= self._capacity:
            self.detach(f"it fell {self._capacity} events behind")
        else:
            self._queue.put(event)

    def end(self, state: str) -> None:
        self._queue.put(_End(state))

    def join(self, deadline: float) -> None:
        """Wait for the sink to close; one that was given up already is not waited for."""
        if not self._detached:
            self._thread.join(timeout=max(0.0, deadline - time.monotonic()))

    def detach(self, reason: str) -> None:
        """Stop feeding the sink and say so once; does nothing to a lane that has ended."""
        with self._lock:
            if self._detached:
                return
            self._detached = True
        self._report(f"the sink {self._name} was detached: {reason}")

    def _run(self) -> None:
        closed = False
        try:
            self._call(self._sink.open, self._info)
            while not self._detached:
                item = self._queue.get()
                if isinstance(item, _End):
                    closed = True
                    self._call(self._sink.close, item.state)
                    with self._lock:
                        self._detached = True
                else:
                    self._call(self._sink.emit, item)
        except BaseException as error:  # noqa: BLE001 - whatever a sink raises ends the sink alone
            # Where even the warning fails, the disk is at fault, and the trainer will say so.
            with contextlib.suppress(Exception):
                self.detach(_reason(error))
        if not closed:
            # It may hold files or processes. Why it was detached has been said; this adds nothing.
            with contextlib.suppress(BaseException):
                self._sink.close("detached")

    def _call(self, function: Callable[[Any], None], argument: object) -> None:
        self._busy_since = time.monotonic()
        try:
            function(argument)
        finally:
            self._busy_since = None


def _reason(error: BaseException) -> str:
    if isinstance(error, FlashError):
        return f"{error.message}; {error.hint}" if error.hint else error.message
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
