"""What was used of the gateway: one row a request, and their sums."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import attrs
import sqlalchemy as sa

from flash.plane import database as tables

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flash.gateway.usage import UsageRow
    from flash.plane.database import Database

_ROW: Final = tables.usage.c
_ADD: Final = tables.usage.insert().prefix_with("OR IGNORE")


@attrs.frozen(kw_only=True)
class Used:
    """What was used of one model with one key; of a base model, `deployment` is its id too."""

    deployment: str
    base: str
    key: str
    requests: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


class Usage:
    """The usage that one database has."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, rows: Sequence[UsageRow]) -> None:
        """Record requests, on the disk when this returns; one that is there counts once."""
        if rows:
            with self._database.writing() as connection:
                connection.execute(_ADD, [attrs.asdict(row) for row in rows])

    def sums(self, since_s: float = 0.0) -> list[Used]:
        """Return what was used since, for each deployment or base model, and key."""
        groups = (_ROW.deployment, _ROW.base, _ROW.key)
        counted = ("prompt_tokens", "cached_tokens", "completion_tokens")
        query = (
            sa.select(
                *groups,
                sa.func.count().label("requests"),
                *(sa.func.sum(_ROW[name]).label(name) for name in counted),
            )
            .where(_ROW.time_s >= since_s)
            .group_by(*groups)
            .order_by(*groups)
        )
        with self._database.reading() as connection:
            return [Used(**row) for row in connection.execute(query).mappings()]
