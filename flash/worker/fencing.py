"""A worker that its run has gone on without must not write to the store any more."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from flash.errors import StoreError
from flash.files import store_error

if TYPE_CHECKING:
    from pathlib import Path

_NUMBER: Final = re.compile(r"[1-9]\d*")


class Superseded(StoreError):
    """The run has gone on with a later attempt."""


def later_attempt(store: Path, number: int) -> int | None:
    """
    Return the newest attempt at the run in `store` if that is after attempt `number`.

    Raises `StoreError` where the store cannot be read.
    """
    attempts = store / "attempts"
    try:
        names = [path.name for path in attempts.iterdir()]
    except OSError as error:
        raise store_error("list", attempts, error) from error
    newest = max((int(name) for name in names if _NUMBER.fullmatch(name)), default=number)
    return newest if newest > number else None


def check_newest(store: Path, number: int) -> None:
    """Raise `Superseded` where an attempt after attempt `number` at the run has begun."""
    later = later_attempt(store, number)
    if later is not None:
        raise Superseded(
            f"attempt {number} at the run {store.name} writes nothing more: attempt {later} has "
            "taken its place",
            hint="nothing is lost: the later attempt goes on from the newest checkpoint",
        )
