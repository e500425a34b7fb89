"""
The keys of the gateway: of each the name, and the SHA-256 by which it is known again.

A key is 256 random bits, so its digest tells nothing of it. The default key is made at first use;
it is the one key that Flash itself keeps, in `gateway.key` of the home, for its own commands and
for the person whose home it is.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from typing import TYPE_CHECKING, Final

import attrs
import sqlalchemy as sa

from flash.errors import UsageError
from flash.files import store_error, write_atomic
from flash.plane import database as tables

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from flash.home import FlashHome
    from flash.plane.database import Database

DEFAULT: Final = "default"

_SHOWN: Final = 12
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_ROW: Final = tables.gateway_keys.c


def digest_of(key: str) -> str:
    """Return the SHA-256 of a key, by which it is known."""
    return hashlib.sha256(key.encode()).hexdigest()


def key_path(home: FlashHome) -> Path:
    """Return the file with the default key; it may not exist yet."""
    return home.root / "gateway.key"


@attrs.frozen(kw_only=True)
class Key:
    """A key as the database has it: `prefix` is how it begins; `revoked_s` None for a live one."""

    name: str
    sha256: str = attrs.field(repr=False)
    prefix: str
    created_s: float
    revoked_s: float | None


class Keys:
    """The keys of one database."""

    def __init__(self, database: Database, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock

    def all(self) -> list[Key]:
        """Return every key that there ever was, by name."""
        with self._database.reading() as connection:
            query = sa.select(tables.gateway_keys).order_by(_ROW.name)
            return [Key(**row) for row in connection.execute(query).mappings()]

    def add(self, name: str) -> str:
        """
        Make a key and return it: it can be had nowhere later.

        Raises `UsageError` for a name that is none, or that a live key has.
        """
        if _NAME.fullmatch(name) is None:
            message = f"{name[:_SHOWN]!r} is no name for a key"
            raise UsageError(message, hint="letters, digits, dots, dashes, at most 64")
        if name == DEFAULT:
            message = f"the key {DEFAULT} is made by Flash itself"
            raise UsageError(message, hint="take another name")
        with self._database.writing() as connection:
            live = sa.select(_ROW.name).where(_ROW.name == name, _ROW.revoked_s.is_(None))
            if connection.scalar(live) is not None:
                message = f"there is a key {name} already"
                raise UsageError(message, hint=f"flash keys revoke {name}, or take another name")
            return self._put(connection, name)

    def revoke(self, name: str) -> bool:
        """Let the key open nothing any more; say whether it did. Raises `UsageError`."""
        with self._database.writing() as connection:
            known = connection.scalars(sa.select(_ROW.name).order_by(_ROW.name)).all()
            if name not in known:
                listed = f"there are {', '.join(known)}" if known else "there is none"
                raise UsageError(f"there is no key {name}", hint=listed)
            done = connection.execute(
                tables.gateway_keys.update()
                .where(_ROW.name == name, _ROW.revoked_s.is_(None))
                .values(revoked_s=self._clock())
            )
        return done.rowcount == 1

    def default(self, home: FlashHome) -> str:
        """
        Return the default key, which is made where there is none, or none that is live.

        Raises `StoreError`.
        """
        path = key_path(home)
        live = sa.select(_ROW.sha256).where(_ROW.name == DEFAULT, _ROW.revoked_s.is_(None))
        with self._database.writing() as connection:
            try:
                kept = path.read_text(encoding="ascii", errors="replace").strip()
            except FileNotFoundError:
                kept = ""
            except OSError as error:
                raise store_error("read", path, error) from error
            known = connection.scalar(live)
            if kept and known is not None and secrets.compare_digest(known, digest_of(kept)):
                return kept
            made = self._put(connection, DEFAULT)
            # Before the commit: a file whose key nobody knows is written anew the next time.
            home.folder()
            write_atomic(path, f"{made}\n".encode())
            return made

    def _put(self, connection: sa.Connection, name: str) -> str:
        key = f"flash-{secrets.token_urlsafe(32)}"
        connection.execute(tables.gateway_keys.delete().where(_ROW.name == name))
        connection.execute(
            tables.gateway_keys.insert().values(
                name=name,
                sha256=digest_of(key),
                prefix=key[:_SHOWN],
                created_s=self._clock(),
                revoked_s=None,
            )
        )
        return key
