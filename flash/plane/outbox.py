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

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from flash.plane.database import Database

_AT_ONCE: Final = 500


@attrs.frozen(kw_only=True)
class Notice:
    """Something to tell a sink of the run outside the worker; `id` is the same at every try."""

    id: int
    run: str
    sink: str
    kind: str
    data: Mapping[str, Any]
    created_s: float
    tries: int


def leave_notices(
    connection: sa.Connection, run: str, now_s: float, kind: str, data: Mapping[str, Any]
) -> None:
    """Leave a notice for each `[sink.*]` of the run."""
    sinks = sa.select(sa.func.json_extract(tables.runs.c.spec, "$.sink"))
    named = connection.scalar(sinks.where(tables.runs.c.id == run))
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
        """Return the notices to be sent now, oldest first."""
        n = tables.notices.c
        query = (
            sa.select(n.id, n.run, n.sink, n.kind, n.data, n.created_s, n.tries)
            .where(n.not_before_s <= now_s)
            .order_by(n.id)
            .limit(_AT_ONCE)
        )
        with self._database.reading() as connection:
            return [Notice(**row) for row in connection.execute(query).mappings()]

    def untold(self) -> set[str]:
        """Return the runs of which there is still something to tell."""
        query = sa.select(tables.notices.c.run).where(tables.notices.c.not_before_s.is_not(None))
        with self._database.reading() as connection:
            return set(connection.scalars(query.distinct()))

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
