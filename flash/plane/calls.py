"""
Provider calls off the main loop, each under a time limit.

A call that does not come back in time is given up: its thread stays with it, its late answer is
dropped, and the caller is told that nobody knows whether it took place.
"""

from __future__ import annotations

import collections
import threading
import time
from typing import TYPE_CHECKING, Any, Final

import attrs

from flash.errors import Unreachable

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

AT_ONCE: Final = 32
"""Threads that may be in a provider's code, calls given up included; one more where all were."""


@attrs.frozen
class Answer:
    """What came of a call: its value, or the exception that it raised."""

    value: Any = None
    error: BaseException | None = None


@attrs.define(eq=False)
class _Call:
    name: Hashable
    what: str
    work: Callable[[], Any]
    limit_s: float
    given_up_at: float = 0.0


class Calls:
    """Calls under way; one of each name at a time."""

    def __init__(
        self, *, at_once: int = AT_ONCE, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._at_once = at_once
        self._monotonic = monotonic
        self._changed = threading.Condition()
        self._waiting: collections.deque[_Call] = collections.deque()
        self._running: dict[Hashable, _Call] = {}
        self._answers: list[tuple[Hashable, Answer]] = []
        self._threads = 0

    def start(self, name: Hashable, what: str, work: Callable[[], Any], *, limit_s: float) -> None:
        """Have `work` done on a thread as soon as there is one; `what` names it in an error."""
        with self._changed:
            self._waiting.append(_Call(name, what, work, limit_s))
        self._start_waiting()

    def finished(self) -> list[tuple[Hashable, Answer]]:
        """Return the calls that have been answered or given up since the last time."""
        now_s = self._monotonic()
        with self._changed:
            late = [call for call in self._running.values() if now_s >= call.given_up_at]
            for call in late:
                del self._running[call.name]
                message = f"{call.what} did not answer within {call.limit_s:g} s"
                self._answers.append((call.name, Answer(error=Unreachable(message, sent=True))))
            answers, self._answers = self._answers, []
        self._start_waiting()
        return answers

    def wait(self, timeout_s: float) -> None:
        """Wait for an answer, at most so long."""
        with self._changed:
            if not self._answers:
                self._changed.wait(timeout_s)

    def _start_waiting(self) -> None:
        with self._changed:
            # However many never come back, one at a time goes on.
            while self._waiting and (self._threads < self._at_once or not self._running):
                call = self._waiting[0]
                try:
                    threading.Thread(
                        target=self._work, args=(call,), name="flash-provider-call", daemon=True
                    ).start()
                except RuntimeError:
                    return  # the machine has no thread for it now; the next look tries again
                # Its thread cannot have ended yet: it needs the lock for that.
                self._waiting.popleft()
                call.given_up_at = self._monotonic() + call.limit_s
                self._running[call.name] = call
                self._threads += 1

    def _work(self, call: _Call) -> None:
        try:
            answer = Answer(call.work())
        except BaseException as error:  # noqa: BLE001 - whatever a plugin raises is its answer
            answer = Answer(error=error)
        with self._changed:
            self._threads -= 1
            if self._running.get(call.name) is call:
                del self._running[call.name]
                self._answers.append((call.name, answer))
                self._changed.notify_all()
