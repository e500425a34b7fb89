"""
The gateway as the plane sees it: kept alive while something is to be served, and where it answers.

The gateway process writes `gateway.json` when it answers. What the file says holds while the
gateway's lock is held; after that anybody may listen there.
"""

from __future__ import annotations

import json
import os
import time
from typing import TYPE_CHECKING, Any, Final

import attrs

from flash.errors import FlashError, StoreError
from flash.files import store_error, write_atomic
from flash.plane.daemon import GATEWAY
from flash.processes import is_alive

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from flash.home import FlashHome
    from flash.plane.deployments import Deployments

LOOK_S: Final = 0.5
LONGEST_PAUSE_S: Final = 60.0
_SOUND_S: Final = 60.0


@attrs.frozen
class Gateway:
    """Where the gateway answers, and a key for it; `url` ends in `/v1`."""

    url: str
    key: str = attrs.field(repr=False)


def address_path(home: FlashHome) -> Path:
    """Return the file that says where the gateway answers."""
    return home.root / str(GATEWAY.address)


def announce(home: FlashHome, url: str) -> None:
    """Say where the gateway answers; called by it, once it does. Raises `StoreError`."""
    said = {"url": url, "pid": os.getpid()}
    write_atomic(address_path(home), f"{json.dumps(said)}\n".encode())


def url_of(home: FlashHome) -> str | None:
    """Return where the gateway answers, or None where it does not. Raises `StoreError`."""
    path = address_path(home)
    try:
        said = json.loads(path.read_bytes())
        url, pid = str(said["url"]), int(said["pid"])
    except FileNotFoundError:
        return None
    except OSError as error:
        raise store_error("read", path, error) from error
    except (ValueError, KeyError, TypeError) as error:
        message = f"{path} is damaged: {error}"
        raise StoreError(message, hint="remove it; the gateway writes it anew") from error
    # Of one that was killed the file stays until the next one writes its own.
    return url if is_alive(pid) and GATEWAY.runs(home) else None


class Keeper:
    """Has a gateway while something is to be served; `round` is called again and again."""

    def __init__(
        self,
        home: FlashHome,
        deployments: Deployments,
        log: Any,
        *,
        command: Sequence[str] = GATEWAY.command,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._home = home
        self._deployments = deployments
        self._log = log
        self._command = command
        self._clock = clock
        self._look_at = self._start_at = float("-inf")
        self._started: subprocess.Popen[bytes] | None = None
        self._started_s = 0.0
        self._pause_s = 0.0
        self._wanted = False

    def round(self) -> bool:
        """See to it that there is a gateway if it is needed; say whether it is."""
        now_s = self._clock()
        if now_s < self._look_at:
            return self._wanted
        self._look_at = now_s + LOOK_S
        self._wanted = self._deployments.any_wanted()
        if self._started is not None and self._started.poll() is not None:
            self._ended(self._started.returncode, now_s)
        if self._wanted and self._started is None and now_s >= self._start_at:
            self._start(now_s)
        return self._wanted

    def _ended(self, code: int, now_s: float) -> None:
        """Note the end of a gateway that we started; one that ends at once is given time."""
        self._started = None
        if code:
            before_s = 0.0 if now_s - self._started_s > _SOUND_S else self._pause_s
            self._pause_s = min(max(1.0, 2 * before_s), LONGEST_PAUSE_S)
            self._start_at = now_s + self._pause_s
            self._log.warning("the gateway ended", code=code, next_try_s=self._pause_s)

    def _start(self, now_s: float) -> None:
        try:
            self._started = GATEWAY.start(self._home, self._command)
        except FlashError as error:
            self._start_at = now_s + LONGEST_PAUSE_S
            self._log.error("no gateway", error=error.message)
            return
        if self._started is not None:
            self._started_s = now_s
            self._log.info("the gateway starts", pid=self._started.pid)
