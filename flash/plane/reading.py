"""Reading runs as the supervisor holds them: thousands at once, and of each what decides."""

from __future__ import annotations

import functools
import json
from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa

from flash.plane import database as tables
from flash.plane.machine import FINAL
from flash.plane.runs import Attempt, Rules, Supervised

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

# What SQLite takes in one statement is bounded.
_AT_ONCE: Final = 500

UNSETTLED = tables.runs.c.state.not_in(sorted(FINAL)) | tables.runs.c.id.in_(
    sa.select(tables.attempts.c.run).where(tables.attempts.c.state != "released")
)
_COLUMNS: Final = (
    "id",
    "state",
    "fence",
    "cancel_requested",
    "not_before_s",
    "waiting",
    "updated_s",
    "retries_from",
    "budget_warned",
)
_RULES: Final = ("budget", "retry", "provider")
_SUPERVISED = sa.select(
    *(tables.runs.c[name] for name in _COLUMNS),
    *(sa.func.json_extract(tables.runs.c.spec, f"$.{name}").label(name) for name in _RULES),
).order_by(tables.runs.c.id)

_ATTEMPTS = (
    sa.select(tables.attempts)
    .where(tables.attempts.c.run.in_(sa.bindparam("runs", expanding=True)))
    .order_by(tables.attempts.c.number)
)


def read_supervised(connection: sa.Connection, condition: Any) -> list[Supervised]:
    """Return the runs of which `condition` holds with their attempts, oldest first."""
    rows = connection.execute(_SUPERVISED.where(condition)).mappings().all()
    attempts: dict[str, list[Attempt]] = {row["id"]: [] for row in rows}
    for names in _parts(list(attempts)):
        for found in connection.execute(_ATTEMPTS, {"runs": list(names)}).mappings():
            attempts[found["run"]].append(Attempt(**found))
    return [_supervised(row, attempts[row["id"]]) for row in rows]


def _supervised(row: sa.RowMapping, attempts: Sequence[Attempt]) -> Supervised:
    known = {name: row[name] for name in _COLUMNS}
    rules = _rules(*(row[name] for name in _RULES))
    return Supervised(**known, rules=rules, attempts=tuple(attempts))


@functools.lru_cache(maxsize=1024)
def _rules(budget: str | None, retry: str | None, provider: str | None) -> Rules:
    return Rules(budget=read_table(budget), retry=read_table(retry), provider=read_table(provider))


def read_table(text: str | None) -> dict[str, Any]:
    """Return a table that SQLite took out of the spec; none is an empty one."""
    found: dict[str, Any] = json.loads(text) if text else {}
    return found


def _parts(names: Sequence[str]) -> Iterable[Sequence[str]]:
    return (names[start : start + _AT_ONCE] for start in range(0, len(names), _AT_ONCE))


def read_active(connection: sa.Connection) -> set[tuple[str, int]]:
    """Return (run, number) of every attempt that has not ended."""
    query = sa.select(tables.attempts.c.run, tables.attempts.c.number).where(
        tables.attempts.c.state.in_(["launching", "live"])
    )
    return {(row.run, row.number) for row in connection.execute(query)}


def read_places(connection: sa.Connection, since_s: float) -> list[tuple[str, Mapping[str, Any]]]:
    """Return each provider, with its run's tables, that a run changed since was launched on."""
    table = sa.func.json_extract(tables.runs.c.spec, "$.provider")
    query = (
        sa.select(tables.attempts.c.provider, table.label("tables"))
        .join(tables.runs, tables.runs.c.id == tables.attempts.c.run)
        .where(tables.runs.c.updated_s >= since_s)
        .distinct()
    )
    return [(row.provider, read_table(row.tables)) for row in connection.execute(query)]
