"""Who this plane is, in the keys of what it launches."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Final

import sqlalchemy as sa

from flash.plane import database as tables
from flash.plane.ids import ALPHABET

if TYPE_CHECKING:
    from flash.plane.database import Database

_LENGTH: Final = 8


def owner_of(database: Database) -> str:
    """Return the name of the plane that has this database, made on first use."""
    known = sa.select(tables.identity.c.owner)
    with database.reading() as connection:
        owner = connection.scalar(known)
    if owner is not None:
        return str(owner)
    made = "".join(secrets.choice(ALPHABET) for _ in range(_LENGTH))
    with database.writing() as connection:
        owner = connection.scalar(known)
        if owner is None:
            connection.execute(tables.identity.insert().values(owner=made))
    return made if owner is None else str(owner)
