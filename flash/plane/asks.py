"""
Asking providers without waiting: each question has a name and a handler for its answer.

Questions go to threads (`flash.plane.calls`); their answers are handled on the supervisor's own,
when it takes them. What goes wrong with one run is that run's trouble: it is logged, and the run
is looked at again later and later.
"""

from __future__ import annotations

import collections
import traceback
from typing import TYPE_CHECKING, Any, Final

from flash.errors import FlashError

if TYPE_CHECKING:
    from collections.abc import Callable

    from flash.plane.calls import Answer, Calls
    from flash.plane.watched import Watched

CALL_LIMIT_S: Final = 60.0
_SLOWEST_S: Final = 30.0


class Asks:
    """The questions under way."""

    def __init__(self, calls: Calls, log: Any, clock: Any) -> None:
        self._calls = calls
        self._log = log
        self._clock = clock
        self._handlers: dict[tuple[str, ...], Callable[[Answer], None]] = {}
        self._answers: collections.deque[tuple[Any, Answer]] = collections.deque()

    def __contains__(self, name: tuple[str, ...]) -> bool:
        """Say whether the question of this name is under way."""
        return name in self._handlers

    def __len__(self) -> int:
        """Return how many questions are under way."""
        return len(self._handlers)

    def start(
        self,
        name: tuple[str, ...],
        work: Callable[[], Any],
        then: Callable[[Answer], None],
        *,
        limit_s: float = CALL_LIMIT_S,
    ) -> None:
        """Have `work` done on a thread; `then` gets what came of it."""
        self._handlers[name] = then
        self._calls.start(name, " ".join(name), work, limit_s=limit_s)

    def of_run(
        self, what: str, watched: Watched, work: Callable[[], Any], then: Callable[[Any], None]
    ) -> None:
        """Ask for a run, which takes no other step meanwhile; `then` gets the answer's value."""
        watched.busy = True

        def answered(answer: Answer) -> None:
            watched.busy = False
            watched.look_at = 0.0

            def take() -> None:
                if answer.error is not None:
                    raise answer.error
                then(answer.value)

            self.guarded(watched, take)

        self.start((what, watched.run.id), work, answered)

    def take_answers(self) -> bool:
        """
        Handle what has come; says whether anything has.

        Where a handler raises, the answers after it are there for the next call.
        """
        self._answers.extend(self._calls.finished())
        some = bool(self._answers)
        while self._answers:
            name, answer = self._answers.popleft()
            handler = self._handlers.pop(name, None)
            if handler is not None:
                handler(answer)
        return some

    def guarded(self, watched: Watched, act: Callable[[], None]) -> None:
        """Act for a run; its trouble is its own, and is tried again later."""
        try:
            act()
        except FlashError as error:
            self._trouble(watched, error.message)
        except Exception:  # noqa: BLE001 - a defect in one run's step must not end the others
            self._trouble(watched, traceback.format_exc())

    def _trouble(self, watched: Watched, message: str) -> None:
        watched.failures += 1
        pause_s = min(_SLOWEST_S, 2.0 ** min(watched.failures, 10) / 2)
        watched.look_at = self._clock.monotonic() + pause_s
        self._log.warning("trouble", run=watched.run.id, error=message, next_try_s=pause_s)
