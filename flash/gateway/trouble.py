"""What went wrong with a server, in words for people."""

from __future__ import annotations

import re
from typing import Final

from flash.errors import FlashError

_OUT_OF_MEMORY: Final = re.compile(
    r"out of memory|OutOfMemory|MemoryError|cannot allocate memory|DefaultCPUAllocator"
    r"|ended with code (?:9|137)\b",
    re.IGNORECASE,
)
"""How CUDA, torch, Python and the system say it; the system kills with signal 9."""


def explained(error: FlashError) -> FlashError:
    """Return the error; one that memory ran out says so first, and what to do about it."""
    if not _OUT_OF_MEMORY.search(error.message):
        return error
    return FlashError(
        f"memory ran out: {error.message}",
        hint="free some memory, or set a smaller context or cache in the backend's settings"
        + (f"; {error.hint}" if error.hint else ""),
    )
