"""What brings about what the `deployments` table asks for: a thread for each server."""

from __future__ import annotations

import threading
import time
import traceback
from typing import TYPE_CHECKING

from flash.errors import FlashError
from flash.gateway.parts import Key
from flash.gateway.servers import Server

if TYPE_CHECKING:
    from flash.gateway.parts import Parts


class Deployer:
    """Keeps a server for each key that the table has; `run` is a thread's work."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._closing = threading.Event()
        self._threads: dict[Key, threading.Thread] = {}
        self._busy_at_s = time.monotonic()

    def hold(self) -> None:
        """Have those who ask wait for everything that is wanted: nothing of it is served yet."""
        for row in self._parts.deployments.wanted():
            if row.wanted == "served":
                self._parts.routes.hold(row.id, f"{row.id} is being deployed; ask again soon")

    def run(self) -> None:
        """Look at the table until `close`."""
        while not self._closing.wait(self._parts.times.look_s):
            try:
                self.round()
            except Exception as error:  # noqa: BLE001 - the disk, or a defect: it is looked at again
                said = error.message if isinstance(error, FlashError) else traceback.format_exc()
                self._parts.log.error("trouble", error=said)  # noqa: TRY400 - a line of the log
                self._busy_at_s = time.monotonic()
                self._closing.wait(self._parts.times.trouble_s)

    def round(self) -> None:
        """Have a thread for each server that there is something to do for."""
        keys = {Key.of(row) for row in self._parts.deployments.wanted()}
        for key in [key for key, thread in self._threads.items() if not thread.is_alive()]:
            del self._threads[key]
        for key in keys - self._threads.keys():
            server = Server(key, self._parts, self._closing)
            thread = threading.Thread(target=server.run, name=f"flash-{key.name}", daemon=True)
            thread.start()
            self._threads[key] = thread
        if self._threads:
            self._busy_at_s = time.monotonic()

    @property
    def idle_s(self) -> float:
        """How long there has been nothing to do."""
        return time.monotonic() - self._busy_at_s

    def close(self, *, limit_s: float) -> None:
        """Stop every server; what takes longer ends with this process."""
        self._closing.set()
        until_s = time.monotonic() + limit_s
        for thread in list(self._threads.values()):
            thread.join(max(0.0, until_s - time.monotonic()))
