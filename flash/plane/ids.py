"""
Run ids: nine characters that sort by time and are short enough to type.

Seven characters of time (1/32 s since the start of 2024, good until 2058) and two of chance, in
Crockford's base 32: lower case, without i, l, o and u. Ids that differ only by chance were made
in the same instant; the database refuses a second one that is the same altogether.
"""

from __future__ import annotations

import re
import secrets
import time

ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
LENGTH = 9
LAST = "last"
"""What the command line takes for the newest run."""

_EPOCH_S = 1_704_067_200  # 2024-01-01 UTC
_TICKS_PER_S = 32
_RANDOM_LENGTH = 2
_RUN_ID = re.compile(f"[{ALPHABET}]{{{LENGTH}}}")
_PREFIX = re.compile(f"[{ALPHABET}]{{1,{LENGTH}}}")
# Crockford: what people read or type for the digits.
_CONFUSED = str.maketrans({"i": "1", "l": "1", "o": "0"})


def new_run_id(now_s: float | None = None) -> str:
    """Return an id for a run that is made now."""
    ticks = int(((time.time() if now_s is None else now_s) - _EPOCH_S) * _TICKS_PER_S)
    time_part = _encode(ticks % len(ALPHABET) ** (LENGTH - _RANDOM_LENGTH), LENGTH - _RANDOM_LENGTH)
    chance = _encode(secrets.randbelow(len(ALPHABET) ** _RANDOM_LENGTH), _RANDOM_LENGTH)
    return time_part + chance


def is_run_id(text: str) -> bool:
    """Say whether `text` is exactly as ids are written; nothing else may become a path."""
    return _RUN_ID.fullmatch(text) is not None


def read_prefix(text: str) -> str | None:
    """Return what a person typed as the start of an id, or None where it can be none."""
    folded = text.strip().lower().translate(_CONFUSED)
    return folded if _PREFIX.fullmatch(folded) else None


def _encode(number: int, length: int) -> str:
    digits = []
    for _ in range(length):
        number, digit = divmod(number, len(ALPHABET))
        digits.append(ALPHABET[digit])
    return "".join(reversed(digits))
