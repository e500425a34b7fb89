"""The logs of servers that `flash chat` has started for itself, one a process."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Final

from flash.plane.removal import listed
from flash.processes import is_alive

if TYPE_CHECKING:
    from pathlib import Path

    from flash.home import FlashHome

FOLDER: Final = "servers"
_NAME: Final = re.compile(r"chat-([1-9]\d{0,9})\.log")


def chat_log(home: FlashHome) -> Path:
    """Return the log of this process's own server."""
    return home.folder(FOLDER) / f"chat-{os.getpid()}.log"


def logs_of_ended_chats(home: FlashHome) -> list[Path]:
    """Return the logs whose process is gone: it failed, or was killed. Raises `StoreError`."""
    return [
        path
        for path in listed(home.root / FOLDER)
        if (of := _NAME.fullmatch(path.name)) and not is_alive(int(of[1]))
    ]
