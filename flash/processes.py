"""What is known of other processes of this machine."""

from __future__ import annotations

import os


def is_alive(pid: int) -> bool:
    """Say whether there is a process of this number, whosever it is."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # somebody else's
    return True
