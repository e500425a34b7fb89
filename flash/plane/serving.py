"""
Deploying as callers see it: have an adapter served, or no more, and wait for that.

Everything here reads and writes the database and the copies that are served; what brings it about
is the gateway process, which is started, and kept by the supervisor, while something is wanted.
"""

from __future__ import annotations

import itertools
import os
import re
import time
from typing import TYPE_CHECKING, Any, Final

from flash.errors import SpecError, UsageError
from flash.job import Job
from flash.plane import copies
from flash.plane.daemon import GATEWAY, Kept
from flash.plane.deployments import Deployments, Wish
from flash.plane.gateway import Gateway, url_of
from flash.plane.keys import Keys
from flash.plane.lock import try_lock
from flash.plane.plane import Plane
from flash.plane.store import RunStore
from flash.plane.usage import Usage

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from flash.home import FlashHome
    from flash.plane.deployments import Deployment
    from flash.plugins import PluginHost

DEFAULT_BACKEND: Final = "transformers"
_STEP: Final = re.compile(r"step-(\d{1,12})")
_LOOK_S: Final = 0.1
_LOOKS_A_CHECK: Final = 20


class Serving:
    """What is served of one home. `gateway` is the command that serves."""

    def __init__(
        self,
        home: FlashHome,
        *,
        plane: Plane | None = None,
        gateway: Sequence[str] = GATEWAY.command,
    ) -> None:
        self._home = home
        self._plane = plane or Plane(home)
        database = self._plane.database
        self._deployments = Deployments(database)
        self._gateway = Kept(GATEWAY, home, gateway)
        self.keys = Keys(database)
        self.usage = Usage(database)

    def last_words(self) -> tuple[str, str]:
        """Return what the gateway's log says last, and what to do about it."""
        return GATEWAY.last_words(self._home)

    @property
    def logs(self) -> Path:
        """The folder with the logs of servers."""
        return self._home.root / "servers"

    def deployments(self) -> list[Deployment]:
        """Return every deployment that there ever was, by id."""
        return self._deployments.all()

    def url(self) -> str | None:
        """Return where the gateway answers, or None where it does not."""
        return url_of(self._home)

    def gateway(self) -> Gateway | None:
        """Return where the gateway answers, with the default key, or None where it does not."""
        url = self.url()
        return None if url is None else Gateway(url, self.keys.default(self._home))

    def wish(
        self,
        reference: str,
        host: PluginHost,
        *,
        backend: str | None = None,
        settings: Mapping[str, Any] | None = None,
        allow_drift: bool = False,
    ) -> Wish:
        """
        Return what `deploy` would have served; changes nothing.

        Without `backend`, it is the one that the run's spec has a table of, or else the embedded
        one. `settings` go before those of that table, which go before the backend's defaults.
        Raises `UsageError` for what is not there, and `SpecError` for settings that are wrong.
        """
        run, checkpoint = self._plane.named(reference)
        job = Job.from_dict(RunStore(self._plane.store(run.id)).job())
        tables = job.spec.get("serving", {})
        name = backend or _only(run.id, tables)
        return Wish(
            id=run.id if checkpoint.step is None else f"{run.id}/step-{checkpoint.step}",
            run=run.id,
            step=checkpoint.step,
            digest=copies.digest_of(checkpoint),
            model=job.model,
            backend=name,
            settings=_read(name, {**tables.get(name, {}), **(settings or {})}, host),
            thinking=job.spec.get("thinking", False),
            stop=job.spec.get("train", {}).get("stop_sequences") or (),
            allow_drift=allow_drift,
        )

    def deploy(
        self,
        reference: str,
        host: PluginHost,
        *,
        backend: str | None = None,
        settings: Mapping[str, Any] | None = None,
        allow_drift: bool = False,
    ) -> Deployment:
        """
        Have an adapter served as `wish` says, and return it; one that is so already stays.

        What is served is a copy, of which every byte was compared with what was saved. Raises as
        `wish` does, and `StoreError` for a file that is not as it was saved. The gateway is
        started; `follow` tells how it goes on.
        """
        wish = self.wish(
            reference, host, backend=backend, settings=settings, allow_drift=allow_drift
        )
        _, checkpoint = self._plane.named(reference)
        with copies.changing(self._home, wish.id):
            found = self._deployments.get(wish.id)
            if found is None or not (found.live and found.wish == wish):
                copies.put(self._home, wish.id, checkpoint)
            deployment = self._deployments.ask(wish)
        self.serve()
        return deployment

    def undeploy(self, reference: str) -> Deployment:
        """
        Have an adapter served no more, and return it; `follow` tells when it is not.

        Raises `UsageError` for what was never deployed.
        """
        found = self._deployments.ask_gone(self._id(reference))
        self._clear_unserved(found)
        self.serve()
        return self._get(found.id)

    def follow(self, deployment: Deployment) -> Iterator[Deployment]:
        """
        Yield the deployment when it has changed, until it is ready, failed or undeployed.

        It is ready when the gateway answers for it. Also ends once somebody has asked for
        something else of it: the last one then has a later `generation`. A gateway or a
        supervisor that was killed is started again. Raises `StoreError` where the gateway cannot
        go on.
        """
        seen: Deployment | None = None
        for look in itertools.count():
            found = self._get(deployment.id)
            settled = found.state in {"failed", "undeployed"} or (
                found.state == "ready" and self.url() is not None
            )
            if found != seen and (settled or found.state != "ready"):
                seen = found
                yield found
            if settled or found.generation != deployment.generation:
                return
            if look % _LOOKS_A_CHECK == _LOOKS_A_CHECK - 1:
                self._clear_unserved(found)
                self.serve()
            time.sleep(_LOOK_S)

    def serve(self) -> None:
        """
        Have a gateway and a supervisor where they are needed.

        Raises `StoreError` where one that this object has started could not go on.
        """
        if self._deployments.any_wanted():
            self._gateway.have()
        self._plane.supervise()

    def _clear_unserved(self, row: Deployment) -> None:
        """Clear what is to go, where no gateway is there that would have to let go of it."""
        if row.state != "undeploying":
            return
        lock = try_lock(GATEWAY.lock_path(self._home))
        if lock is not None:
            try:
                copies.clear(self._home, self._deployments, row)
            finally:
                os.close(lock)

    def _id(self, reference: str) -> str:
        """Return the id of what a person calls a deployment."""
        if self._deployments.get(reference) is not None:
            return reference
        name, _, part = reference.partition("/")
        run = self._plane.find(name).id
        if part == "best":
            part = f"step-{self._plane.named(reference)[1].step}"
        elif match := _STEP.fullmatch(part):
            part = f"step-{int(match[1])}"
        wanted = run if part in {"", "final"} else f"{run}/{part}"
        if self._deployments.get(wanted) is None:
            of_run = [one.id for one in self._plane.deployed(run)]
            hint = f"deployed of it: {', '.join(of_run)}" if of_run else "flash deployments"
            raise UsageError(f"{wanted} is not deployed", hint=hint)
        return wanted

    def _get(self, name: str) -> Deployment:
        found = self._deployments.get(name)
        if found is None:
            raise UsageError(f"{name} was removed", hint="flash deployments lists what there is")
        return found


def _only(run: str, tables: Mapping[str, Any]) -> str:
    """Return the backend that a run's spec has a table of, or the embedded one."""
    if len(tables) > 1:
        message = f"the run {run} has tables of several backends: {', '.join(tables)}"
        raise UsageError(message, hint="say which: --backend NAME")
    return next(iter(tables), DEFAULT_BACKEND)


def _read(backend: str, table: Mapping[str, Any], host: PluginHost) -> dict[str, Any]:
    """Return every setting of a backend, checked as it is now."""
    from flash.spec.strict import Reader  # and with it cattrs

    record = host.get("serving", backend)
    reader = Reader()
    found, problems = reader.read(record.config, table, ("serving", backend))
    if problems:
        raise SpecError(problems)
    plain: dict[str, Any] = reader.plain(found)
    return plain
