"""
The provider: launches are folders, and every call reads them afresh.

A launch's folder stays until `terminate` is called on a launch that has ended; the core does that
once it has recorded the end, and from then on `get` says gone.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any, Literal

from flash.api import BadRequest, Instance, Launch, Offer
from flash_provider_local import machine
from flash_provider_local.launches import EXIT, GUARD, REQUEST, STOP, WORKER, LaunchFolder
from flash_provider_local.processes import MARKER, kill_all, of_launch, same_process

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from flash.api import LaunchRequest, Need

_KEY = re.compile(r"[a-z0-9][a-z0-9-]{0,49}")
_CPU = "cpu"
_DEVICES = "CUDA_VISIBLE_DEVICES"


class LocalProvider:
    """Runs workers on this machine; `workdir` holds one folder a launch."""

    def __init__(self, workdir: Path) -> None:
        self._launches = workdir / "launches"

    def check(self) -> str:
        """Return the user and machine that workers run as and on."""
        return f"{getpass.getuser()}@{platform.node()}"

    def offers(self, need: Need) -> list[Offer]:
        """Return the GPUs that have room for `need`, most room first, then the CPU if it has."""
        found = [
            Offer("local", gpu.uuid, round(gpu.free_gib, 2), accelerator=gpu.name)
            for gpu in machine.gpus(os.environ)
        ]
        found.append(Offer("local", _CPU, round(machine.free_memory_gib(), 2)))
        return [offer for offer in found if offer.memory_gib >= need.memory_gib]

    def launch(self, offer: Offer, request: LaunchRequest) -> Launch:
        """
        Start the guard, which starts the worker; returns once the guard has taken over.

        A key that was launched before is never launched again.
        """
        folder = self._folder(request.key)
        accepted = Launch("accepted", {"key": request.key})
        try:
            self._launches.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.path.mkdir(mode=0o700, exist_ok=True)
            lock = folder.take_lock()
            if lock is None:
                return accepted
            try:
                if folder.read(GUARD) is None:
                    folder.write(REQUEST, _record(folder, offer, request))
                    _start_guard(folder, request, lock)
            finally:
                os.close(lock)
        except (OSError, subprocess.CalledProcessError) as error:
            return Launch("rejected", error=f"cannot start a process here: {error}")
        return accepted

    def get(self, ref: Mapping[str, Any]) -> Instance:
        """
        Return what is seen now.

        Where the guard was killed, what it guarded is killed here, so that a launch which is
        seen to have ended has no process left.
        """
        folder = self._folder(ref["key"])
        if not folder.path.is_dir():
            return Instance(folder.key, ref, "gone")
        guarded = folder.guarded()
        worker = folder.read(WORKER)
        if worker is not None:
            ref = {**ref, "worker_pid": worker["pid"]}
        # Read after the lock was tried: a guard writes how it ended before it lets go.
        ended = folder.read(EXIT)
        if ended is None and guarded:
            return Instance(folder.key, ref, "starting" if worker is None else "running")
        if ended is None and folder.read(GUARD) is None:
            return Instance(folder.key, ref, "gone", detail="the launch was cut short")
        if ended is None:
            _sweep(folder)
            detail = "the process that guards the worker was killed, and the worker with it"
            return Instance(folder.key, ref, "failed", detail=detail)
        return Instance(
            folder.key,
            ref,
            _final_state(ended),
            exit_code=ended["exit_code"],
            out_of_memory=ended["out_of_memory"],
            detail=ended.get("detail", ""),
        )

    def list(self, owner: str) -> list[Instance]:
        """Return every launch of `owner` that has happened and is not cleared away."""
        if not self._launches.is_dir():
            return []
        folders = [LaunchFolder(path) for path in sorted(self._launches.iterdir())]
        instances = [
            self.get({"key": folder.key})
            for folder in folders
            if (folder.read(REQUEST) or {}).get("owner") == owner
        ]
        return [instance for instance in instances if instance.state != "gone"]

    def terminate(self, ref: Mapping[str, Any], *, grace_s: float) -> None:
        """
        Have the guard stop the worker, or clear away a launch that has ended.

        A second call may shorten the grace, never lengthen it.
        """
        folder = self._folder(ref["key"])
        if not folder.path.is_dir():
            return
        ended = folder.read(EXIT) is not None
        if ended or not folder.guarded():
            if not ended:
                _sweep(folder)
            folder.remove()
            return
        deadline_s = time.monotonic() + grace_s
        stop = folder.read(STOP)
        if stop is None or deadline_s < stop["deadline_s"]:
            folder.write(STOP, {"deadline_s": deadline_s})
        guard = folder.read(GUARD)
        # A guard that is just starting reads stop.json itself.
        if guard is not None and folder.guarded():
            with contextlib.suppress(ProcessLookupError):
                os.kill(guard["pid"], signal.SIGTERM)

    def _folder(self, key: str) -> LaunchFolder:
        if not _KEY.fullmatch(key):
            message = f"not a launch key: {key!r}"
            raise BadRequest(message, hint="keys are at most 50 characters of a-z, 0-9 and -")
        return LaunchFolder(self._launches / key)


def _record(folder: LaunchFolder, offer: Offer, request: LaunchRequest) -> dict[str, Any]:
    """Return what the guard is told: everything but the secrets."""
    return {
        "owner": request.owner,
        "argv": list(request.argv),
        "env": {
            **request.caller,
            _DEVICES: _device(offer, request.caller.get(_DEVICES)),
            **request.env,
            MARKER: str(folder.path),
        },
        "workdir": request.workdir,
        "log": request.log,
    }


def _device(offer: Offer, named: str | None) -> str:
    """
    Return the one device that the worker sees.

    `named` is what the submitting shell allows, which need not be what this process was allowed
    when it made the offer; of several devices it is the first.
    """
    if offer.id == _CPU:
        return ""
    allowed = [offer.id] if named is None else [name.strip() for name in named.split(",")]
    return offer.id if offer.id in allowed else allowed[0]


def _start_guard(folder: LaunchFolder, request: LaunchRequest, lock: int) -> None:
    """Run the guard until it has detached; it inherits the lock, and complains into the log."""
    log = os.open(request.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        subprocess.run(
            [sys.executable, "-P", "-m", "flash_provider_local.guard", str(folder.path)],
            input=json.dumps(dict(request.secrets)).encode(),
            stdout=log,
            stderr=log,
            env=dict(request.caller),
            cwd="/",
            pass_fds=(lock,),
            check=True,
        )
    finally:
        os.close(log)


def _sweep(folder: LaunchFolder) -> None:
    """Kill what a guard that is gone may have left."""
    worker = same_process(folder.read(WORKER))
    kill_all(lambda: of_launch(str(folder.path), [worker] if worker is not None else []))


def _final_state(ended: dict[str, Any]) -> Literal["succeeded", "stopped", "failed"]:
    if ended["exit_code"] == 0:
        return "succeeded"
    return "stopped" if ended.get("stopped") else "failed"
