"""
Run ids: nine characters that sort by time and are short enough to type.

They are the time of submission in Crockford's base 32 (lower case, without i, l, o and u), in
1/16 ms since the start of 2024, good until 2093. The database refuses a second run of the same
instant.
"""

from __future__ import annotations

import re
import time

ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
LENGTH = 9
LAST = "last"
"""What the command line takes for the newest run."""

_EPOCH_S = 1_704_067_200  # 2024-01-01 UTC
_TICKS_PER_S = 16_000
_RUN_ID = re.compile(f"[{ALPHABET}]{{{LENGTH}}}")
_PREFIX = re.compile(f"[{ALPHABET}]{{1,{LENGTH}}}")
# Crockford: what people read or type for the digits.
_CONFUSED = str.maketrans({"i": "1", "l": "1", "o": "0"})


def new_run_id(now_s: float | None = None) -> str:
    """Return an id for a run that is made now."""
    ticks = int(((time.time() if now_s is None else now_s) - _EPOCH_S) * _TICKS_PER_S)
    digits = []
    for _ in range(LENGTH):
        ticks, digit = divmod(ticks, len(ALPHABET))
        digits.append(ALPHABET[digit])
    return "".join(reversed(digits))


def is_run_id(text: str) -> bool:
    """Say whether `text` is exactly as ids are written; nothing else may become a path."""
    return _RUN_ID.fullmatch(text) is not None


def read_prefix(text: str) -> str | None:
    """Return what a person typed as the start of an id, or None where it can be none."""
    folded = text.strip().lower().translate(_CONFUSED)
    return folded if _PREFIX.fullmatch(folded) else None
