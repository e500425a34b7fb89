"""What went wrong with a server, in words for people."""

from __future__ import annotations

import re
from typing import Final

from flash.errors import FlashError

_OUT_OF_MEMORY: Final = re.compile(
    r"out of memory|OutOfMemory|MemoryError|cannot allocate memory|DefaultCPUAllocator",
    re.IGNORECASE,
)
"""How CUDA, torch, Python and the system say it."""

_KILLED: Final = re.compile(r"ended with code (?:9|137)\b")
"""The system kills where memory runs out; it tells the log of the machine alone."""

_HINT: Final = "free some memory, or set a smaller context or cache in the backend's settings"


def explained(error: FlashError) -> FlashError:
    """Return the error; where memory ran out, it says so first, and what to do about it."""
    if _OUT_OF_MEMORY.search(error.message):
        what = "memory ran out"
    elif _KILLED.search(error.message):
        what = "it was killed, as the system does where memory runs out"
    else:
        return error
    hint = f"{_HINT}; {error.hint}" if error.hint else _HINT
    return FlashError(f"{what}: {error.message}", hint=hint)
