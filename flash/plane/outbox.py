"""
What is to be told outside: notices, written in the transaction of the change that they tell of.

So no change goes untold for a crash, and none that did not take place is told. A notice stays
until it was delivered or given up; it may be delivered twice, with the same id.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any, Final

import attrs
import sqlalchemy as sa

from flash.plane import database as tables
from flash.plane.machine import FINAL

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from flash.plane.database import Database
    from flash.plane.machine import RunEvent, RunState
    from flash.plane.runs import Attempt, Ending
    from flash.values import NoticeKind

_AT_ONCE: Final = 500
LONGEST_WAIT_S: Final = 3600.0
"""No try of a notice is further away than this."""

_N: Final = tables.notices.c
# A range, which SQLite looks up in the index; NULL is in none.
_UNTOLD: Final = _N.not_before_s >= 0
# The grouping is of no column as such: its index would have SQLite walk through all ever told.
_FIRST: Final = (
    sa.select(sa.func.min(_N.id)).where(_UNTOLD).group_by(_N.run.concat("/").concat(_N.sink))
)
_NOW_S: Final = sa.bindparam("now_s", type_=sa.Float)
_DUE: Final = (
    sa.select(_N.id, _N.run, _N.sink, _N.kind, _N.data, _N.created_s, _N.tries)
    .where(_N.id.in_(_FIRST))
    .where((_N.not_before_s <= _NOW_S) | (_N.not_before_s > _NOW_S + LONGEST_WAIT_S))
    .order_by(_N.id)
    .limit(_AT_ONCE)
)
_UNTOLD_RUNS: Final = sa.select(_N.run).where(_UNTOLD)
_RUN: Final = sa.bindparam("run", type_=sa.Text)
_SINKS: Final = sa.select(sa.func.json_extract(tables.runs.c.spec, "$.sink")).where(
    tables.runs.c.id == _RUN
)
_STATE_AND_TOLD: Final = sa.select(
    tables.runs.c.state, ~sa.exists().where(_N.run == _RUN, _UNTOLD)
).where(tables.runs.c.id == _RUN)


@attrs.frozen(kw_only=True)
class Notice:
    """Something to tell a sink of the run outside the worker; `id` is the same at every try."""

    id: int
    run: str
    sink: str
    kind: NoticeKind
    data: Mapping[str, Any]
    created_s: float
    tries: int


_TOLD_AS: Final[Mapping[RunEvent, str]] = {
    "start": "started",
    "requeue": "attempt_ended",
    "finish": "done",
    "fail": "failed",
    "cancel": "cancelled",
    "ask_cancel": "cancelled",
    "resume": "resumed",
}
"""What a notice calls the event that it tells of."""


def notice_of(
    event: RunEvent, state: RunState, attempt: Attempt | None, ending: Ending | None, values: Any
) -> tuple[str, dict[str, Any]]:
    """Return kind and data of the notice."""
    words: dict[str, Any] = {"state": state}
    if attempt is not None:
        words |= {"attempt": attempt.number, "provider": attempt.provider}
    if ending is not None:
        known = ("outcome", "exit_code", "detail", "step", "then")
        words |= {name: getattr(ending, name) for name in known}
    if event == "fail":
        words |= {"error": values.get("error"), "hint": values.get("hint")}
    return _TOLD_AS[event], words


def leave_notices(
    connection: sa.Connection, run: str, now_s: float, kind: str, data: Mapping[str, Any]
) -> None:
    """Leave a notice for each `[sink.*]` of the run."""
    named = connection.scalar(_SINKS, {"run": run})
    for sink in json.loads(named or "{}"):
        row = {"run": run, "sink": sink, "kind": kind, "data": dict(data)}
        connection.execute(
            tables.notices.insert().values(**row, created_s=now_s, not_before_s=now_s)
        )


class Outbox:
    """The notices of one database."""

    def __init__(self, database: Database, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock

    def due(self, now_s: float) -> list[Notice]:
        """
        Return the notices to be sent now, oldest first: of each run's sink the oldest untold one.

        One that is due only in a time that no pause is long enough for is due now: the clock was
        set back.
        """
        with self._database.reading() as connection:
            found = connection.execute(_DUE, {"now_s": now_s})
            return [Notice(**row) for row in found.mappings()]

    def untold(self) -> set[str]:
        """Return the runs of which there is still something to tell."""
        with self._database.reading() as connection:
            return set(connection.scalars(_UNTOLD_RUNS))

    def once_ended(self, run: str, act: Callable[[bool], None]) -> None:
        """
        Call `act` if the run has ended, while nobody can have it go on.

        It is told whether nothing is left to tell of the run.
        """
        with self._database.writing() as connection:
            found = connection.execute(_STATE_AND_TOLD, {"run": run}).first()
            if found is not None and found[0] in FINAL:
                act(found[1])

    def delivered(self, notice: int) -> None:
        """Record that it has arrived."""
        self._tried(notice, not_before_s=None, delivered_s=self._clock())

    def failed(self, notice: int, *, not_before_s: float | None) -> None:
        """Record a try that failed, and when the next is due; None gives it up."""
        self._tried(notice, not_before_s=not_before_s)

    def _tried(self, notice: int, **values: Any) -> None:
        n = tables.notices
        with self._database.writing() as connection:
            connection.execute(
                n.update().where(n.c.id == notice).values(tries=n.c.tries + 1, **values)
            )
