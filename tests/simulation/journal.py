"""
A journal of every change of the database, kept by SQLite itself in the same transactions.

So what the referee sees is what was committed, in its order, whatever code wrote it.
"""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from pathlib import Path

_TABLES = {
    "runs": ("id", "state", "fence", "cancel_requested", "retries_from", "finished_s", "error"),
    "attempts": (
        "fence",
        "run",
        "number",
        "state",
        "stopping",
        "outcome",
        "exit_code",
        "detail",
        "started_s",
        "ended_s",
        "step",
        "reported_usd",
        "offer",
    ),
    "notices": ("id", "run", "sink", "kind", "delivered_s", "not_before_s", "tries"),
}


@attrs.frozen
class Entry:
    """One row that was added (`old` is None), changed, or removed (`new` is None)."""

    table: str
    old: dict[str, Any] | None
    new: dict[str, Any] | None


def install(path: Path) -> None:
    """Have the database at `path` keep a journal."""
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE journal (seq INTEGER PRIMARY KEY, what TEXT, old, new)")
    for table, columns in _TABLES.items():
        old, new = (
            f"json_array({', '.join(f'{row}.{column}' for column in columns)})"
            for row in ("OLD", "NEW")
        )
        differs = " OR ".join(f"OLD.{column} IS NOT NEW.{column}" for column in columns)
        for event, before, after, when in (
            ("INSERT", "NULL", new, ""),
            ("UPDATE", old, new, f"WHEN {differs}"),
            ("DELETE", old, "NULL", ""),
        ):
            connection.execute(
                f"CREATE TRIGGER journal_{table}_{event} AFTER {event} ON {table} {when} BEGIN "
                f"INSERT INTO journal (what, old, new) VALUES ('{table}', {before}, {after}); END"
            )
    connection.commit()
    connection.close()


class Journal:
    """Reads what has been committed since the last look."""

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(path, isolation_level=None)
        self._seen = 0

    def read(self) -> list[Entry]:
        import json

        rows = self._connection.execute(
            "SELECT seq, what, old, new FROM journal WHERE seq > ? ORDER BY seq", (self._seen,)
        ).fetchall()
        if not rows:
            return []
        self._seen = rows[-1][0]

        def row(table: str, values: str | None) -> dict[str, Any] | None:
            if values is None:
                return None
            return dict(zip(_TABLES[table], json.loads(values), strict=True))

        return [Entry(table, row(table, old), row(table, new)) for _, table, old, new in rows]

    def close(self) -> None:
        self._connection.close()
