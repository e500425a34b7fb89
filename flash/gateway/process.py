"""
The gateway process: `python -m flash.gateway.process`.

One for each home, held by its lock; started on demand (`flash.plane.daemon`), kept by the
supervisor while something is to be served, gone a while after there is nothing. It may be killed
at any moment: its servers end with it, and the next one serves everything that is wanted anew. Its
log is `gateway.log` in the home, or the terminal when it is run by hand.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from typing import Any, Final

from flash.config import UserConfig
from flash.errors import FlashError
from flash.files import keep_end
from flash.gateway.app import make_app
from flash.gateway.bases import Bases
from flash.gateway.deploying import Deployer
from flash.gateway.keys import Keyring
from flash.gateway.listening import listening
from flash.gateway.parts import Parts, Times
from flash.gateway.routes import Routes
from flash.gateway.usage import UsageWriter
from flash.home import FlashHome
from flash.plane.daemon import GATEWAY
from flash.plane.database import Database
from flash.plane.deployments import Deployments
from flash.plane.gateway import address_path, announce
from flash.plane.keys import Keys
from flash.plane.lock import try_lock
from flash.plane.usage import Usage
from flash.plugins import PluginHost
from flash.spec.secrets import SecretFinder

HOST: Final = "127.0.0.1"
IDLE_S: Final = 10.0
"""How long there has been nothing to serve when it leaves."""

LOOK_S: Final = 0.5
LOG_BYTES: Final = 32 << 20
"""The newer half of a log that has more is kept; each request is a line of it."""

STOPPING_S: Final = 20.0
"""How long servers may take to end; what takes longer is ended by its leash."""


class Gateway:
    """Serves the deployments of one home until there are none; the caller holds its lock."""

    def __init__(self, home: FlashHome, log: Any, *, idle_s: float, times: Times) -> None:
        self._home = home
        self._log = log
        self._idle_s = idle_s
        self._settings = UserConfig.read(home.config).gateway
        self._database = database = Database(home.database)
        self._keys = Keys(database)
        self._usage = Usage(database)
        self._routes = Routes()
        host = PluginHost.default(home)
        secret = SecretFinder(host, [home.root]).find
        self._deployments = Deployments(database)
        self._parts = Parts(
            home=home,
            host=host,
            secret=secret,
            bases=Bases(home, host, secret, log),
            deployments=self._deployments,
            routes=self._routes,
            log=log,
            times=times,
        )

    async def run(self) -> bool:
        """Serve; say whether it ends because it was asked to, and not for want of work."""
        asked = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, asked.set)
        deployer = Deployer(self._parts)
        deployer.hold()
        limits = self._settings
        with UsageWriter(self._usage.add, self._log) as usage:
            keyring = Keyring(self._keys.all, self._log)
            app = make_app(self._routes, keyring, usage, limits, self._log)
            try:
                async with listening(app, HOST, self._settings.port, limits) as port:
                    self._keys.default(self._home)
                    announce(self._home, f"http://{HOST}:{port}/v1")
                    self._log.info("serving", port=port, pid=os.getpid())
                    threading.Thread(
                        target=deployer.run, name="flash-deployer", daemon=True
                    ).start()
                    await self._until_idle(deployer, asked)
            finally:
                address_path(self._home).unlink(missing_ok=True)
                await asyncio.to_thread(deployer.close, limit_s=STOPPING_S)
        return asked.is_set()

    async def _until_idle(self, deployer: Deployer, asked: asyncio.Event) -> None:
        while not asked.is_set() and deployer.idle_s < self._idle_s:
            self._database.check_in_place()
            keep_end(GATEWAY.log_path(self._home), LOG_BYTES)
            try:
                async with asyncio.timeout(LOOK_S):
                    await asked.wait()
            except TimeoutError:
                continue

    def has_work(self) -> bool:
        """Say whether something is to be served, or cleared away, now."""
        return self._deployments.any_wanted()


def serve(home: FlashHome, *, idle_s: float = IDLE_S, times: Times | None = None) -> None:
    """Take the lock, or the one that was handed over, and serve until there is nothing to."""
    lock = GATEWAY.handed_over()
    log = GATEWAY.logger(home, by_hand=lock is None)
    if lock is None:
        lock = try_lock(GATEWAY.lock_path(home))
    if lock is None:
        log.info("another gateway is running already", home=str(home.root))
        return
    address_path(home).unlink(missing_ok=True)
    try:
        gateway = Gateway(home, log, idle_s=idle_s, times=times or Times())
        while lock is not None:
            asked = asyncio.run(gateway.run())
            os.close(lock)
            # Whoever deployed just before saw the lock held, and counts on us.
            again = not asked and gateway.has_work()
            lock = try_lock(GATEWAY.lock_path(home)) if again else None
    except FlashError as error:
        log.error("cannot go on", error=error.message, hint=error.hint)  # noqa: TRY400 - a sentence
        sys.exit(error.exit_code)
    log.info("asked to end" if asked else "nothing left to serve")


def main() -> None:
    """Serve the home that the environment names."""
    os.umask(0o077)
    try:
        serve(FlashHome.from_environment())
    except FlashError as error:
        sys.exit(f"error: {error.message}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
