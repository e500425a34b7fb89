"""
The provider: launches are folders, and every call reads them afresh.

A launch's folder stays until `terminate` is called on a launch that has ended; the core does that
once it has recorded the end, and from then on `get` says gone.
"""

from __future__ import annotations

import collections
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
from flash_provider_local.launches import (
    EXIT,
    GUARD,
    REQUEST,
    STOP,
    WORKER,
    LaunchFolder,
    new_temporary,
)
from flash_provider_local.processes import MARKER, end_all, of_launch, same_process

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from flash.api import LaunchRequest, Need
    from flash_provider_local.machine import Gpu

_KEY = re.compile(r"[a-z0-9][a-z0-9-]{0,49}")
_TEMPORARY = ("TMPDIR", "TEMP", "TMP")
"""The variables that name the folder of temporary files, in Python's order."""

_ASK_S = 5.0
_CPU = "cpu"
_NO_GPU = ""
"""The device of a worker that runs on the CPU, as CUDA_VISIBLE_DEVICES has it."""


class LocalProvider:
    """
    Runs workers on this machine; `workdir` holds one folder a launch.

    `gpus` and `free_memory_gib` say what the machine has. `ask_s` is how long the processes that
    outlive the worker, or its time, may take to end on SIGTERM before they are killed.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        gpus: Callable[[Mapping[str, str]], Sequence[Gpu]] = machine.gpus,
        free_memory_gib: Callable[[], float] = machine.free_memory_gib,
        ask_s: float = _ASK_S,
    ) -> None:
        self._launches = workdir / "launches"
        self._gpus = gpus
        self._free_memory_gib = free_memory_gib
        self._ask_s = ask_s

    def check(self) -> str:
        """Return the user and machine that workers run as and on."""
        return f"{getpass.getuser()}@{platform.node()}"

    def offers(self, need: Need) -> list[Offer]:
        """
        Return the GPUs that have room for `need`, most room first, then the CPU if it has.

        Room is what is free now, less what launches that still grow were promised of it.
        """
        promised = self._promised_gib()
        found = [
            Offer("local", gpu.uuid, _left(gpu.free_gib, promised[gpu.uuid]), accelerator=gpu.name)
            for gpu in self._gpus(os.environ)
        ]
        found.sort(key=lambda offer: -offer.memory_gib)
        found.append(Offer("local", _CPU, _left(self._free_memory_gib(), promised[_NO_GPU])))
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
                    device = self._device(offer, request.caller)
                    record = {**_record(folder, device, request), "ask_s": self._ask_s}
                    folder.write(REQUEST, record)
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
        seen to have ended has no process and no temporary file left.
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
        instances = [
            self.get({"key": folder.key})
            for folder in self._folders()
            if (folder.read(REQUEST) or {}).get("owner") == owner
        ]
        return [instance for instance in instances if instance.state != "gone"]

    def terminate(self, ref: Mapping[str, Any], *, grace_s: float) -> None:
        """
        Have the guard stop the worker, or clear away a launch that has ended.

        A second call may shorten the grace, never lengthen it. A guard that somebody stopped goes
        on, to hear it.
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
            # On a full disk the guard hears it all the same, and has a grace of its own.
            with contextlib.suppress(OSError):
                folder.write(STOP, {"deadline_s": deadline_s})
        guard = folder.read(GUARD)
        # A guard that is just starting reads stop.json itself.
        if guard is not None and folder.guarded():
            with contextlib.suppress(ProcessLookupError):
                os.kill(guard["pid"], signal.SIGTERM)
                os.kill(guard["pid"], signal.SIGCONT)

    def _device(self, offer: Offer, caller: Mapping[str, str]) -> str:
        """
        Return the one device that the worker sees.

        It is the offered one, unless the submitting shell does not allow that: its variable need
        not be what this process had when it made the offer. Then it is the roomiest allowed one.
        """
        if offer.id == _CPU:
            return _NO_GPU
        if machine.DEVICES not in caller:
            return offer.id
        allowed = [gpu.uuid for gpu in self._gpus(caller)]
        return offer.id if offer.id in allowed else next(iter(allowed), _NO_GPU)

    def _promised_gib(self) -> Mapping[str, float]:
        """Return by device what live launches asked for and have not taken yet."""
        promised: dict[str, float] = collections.defaultdict(float)
        for folder in self._folders():
            request = folder.read(REQUEST)
            if request is None or folder.read(EXIT) is not None or not folder.guarded():
                continue
            device, worker = request["device"], folder.read(WORKER)
            # What a worker holds of a GPU is not told in a container; then all of it counts twice.
            held = machine.held_gib(worker["pid"]) if worker and device == _NO_GPU else 0.0
            promised[device] += max(0.0, request["memory_gib"] - held)
        return promised

    def _folders(self) -> Sequence[LaunchFolder]:
        if not self._launches.is_dir():
            return []
        return [LaunchFolder(path) for path in sorted(self._launches.iterdir())]

    def _folder(self, key: str) -> LaunchFolder:
        if not _KEY.fullmatch(key):
            message = f"not a launch key: {key!r}"
            raise BadRequest(message, hint="keys are at most 50 characters of a-z, 0-9 and -")
        return LaunchFolder(self._launches / key)


def _left(free_gib: float, promised_gib: float) -> float:
    return round(max(0.0, free_gib - promised_gib), 2)


def _record(folder: LaunchFolder, device: str, request: LaunchRequest) -> dict[str, Any]:
    """Return what is written of a launch: everything but the secrets."""
    env = {**request.caller, **request.env}
    temporary = new_temporary([env.get(name) for name in _TEMPORARY], folder.path)
    return {
        "owner": request.owner,
        "device": device,
        "memory_gib": request.memory_gib,
        "argv": list(request.argv),
        "env": {
            **request.caller,
            machine.DEVICES: device,
            **request.env,
            **{name: temporary for name in _TEMPORARY if name in env or name == _TEMPORARY[0]},
            MARKER: str(folder.path),
        },
        "temporary": temporary,
        "workdir": request.workdir,
        "log": request.log,
    }


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
    """Kill what a guard that is gone may have left, and remove its temporary files."""
    worker = same_process(folder.read(WORKER))
    end_all(lambda: of_launch(str(folder.path), [worker] if worker is not None else []))
    folder.remove_temporary()


def _final_state(ended: dict[str, Any]) -> Literal["succeeded", "stopped", "failed"]:
    if ended["exit_code"] == 0:
        return "succeeded"
    return "stopped" if ended.get("stopped") else "failed"
