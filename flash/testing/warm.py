"""
Workers in no time: a process that has imported what a worker needs, and forks one an attempt.

Importing torch, transformers and TRL takes seconds; a forked worker starts in milliseconds and
then goes the way of `python -m flash.worker run STORE ATTEMPT`, from its first line on. The
process that forks has no thread and runs nothing of a job, so that a fork is as good as a start.

    with WarmWorkers() as workers:
        workers.run(store, 1, home, point=Point("backward", 7))     # -9
        workers.run(store, 2, home)                                 # 0
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import traceback
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn, Self

import attrs

from flash.environ import worker_environment
from flash.testing.traps import Point, lay, replace

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_ONE_THREAD: Final = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""A pool of threads does not survive a fork, and small matrices have no use for one."""

_HASHES: Final = "PYTHONHASHSEED"

_LOOK_S = 0.01


class WarmWorkers:
    """
    Runs attempts in forks of one process, several at a time where callers have threads.

    `imports` are heavy modules that every attempt will want.
    """

    def __init__(self, *imports: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "flash.testing.warm"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=worker_environment(os.environ) | _ONE_THREAD | {_HASHES: "1"},
        )
        self._waiting: dict[int, Future[int]] = {}
        self._count = 0
        self._lock = threading.Lock()
        self._reader = threading.Thread(target=self._read, name="warm-workers", daemon=True)
        self._reader.start()
        self._imports = ["flash.worker.attempt", *imports]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """End the process and whatever still runs in its forks."""
        assert self._process.stdin is not None  # noqa: S101 - it was asked for
        self._process.stdin.close()
        self._process.wait()
        self._reader.join()

    def run(
        self,
        store: Path,
        number: int,
        home: Path,
        *,
        point: Point | None = None,
        record: Path | None = None,
    ) -> int:
        """
        Run attempt `number` of the job in `store`; return its exit code, or minus its signal.

        It is killed at `point`. One whose passes are written to `record` is no fork but a fresh
        process, with other hashes of strings: what depends on the order of a set shows. What it
        has imported when it ends, later ones have from the beginning. The folder of the attempt
        is made here, as a supervisor makes it.
        """
        (store / "attempts" / str(number)).mkdir(parents=True)
        ended: Future[int] = Future()
        if record is None:
            self._warm_up()
        with self._lock:
            self._count += 1
            self._waiting[self._count] = ended
            self._send(
                {
                    "id": self._count,
                    "store": str(store),
                    "number": number,
                    "home": str(home),
                    "point": attrs.asdict(point) if point else None,
                    "record": str(record) if record else None,
                }
            )
        self._warm_up()
        code = ended.result()
        if record is not None and (imported := _modules_of(record)).exists():
            self._imports += imported.read_text().split()
        return code

    def _warm_up(self) -> None:
        with self._lock:
            if self._imports:
                self._send({"import": self._imports})
                self._imports = []

    def _send(self, request: dict[str, Any]) -> None:
        assert self._process.stdin is not None  # noqa: S101 - it was asked for
        self._process.stdin.write(f"{json.dumps(request)}\n".encode())
        self._process.stdin.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None  # noqa: S101 - it was asked for
        for line in self._process.stdout:
            answer = json.loads(line)
            self._waiting.pop(answer["id"]).set_result(answer["code"])
        for ended in self._waiting.values():
            ended.set_exception(RuntimeError("the process that forks workers has died"))


def _serve() -> None:
    """Fork an attempt a request on stdin, a line each; say on stdout how each has ended."""
    children: dict[int, int] = {}
    requests = b""
    while True:
        if select.select([0], [], [], _LOOK_S if children else None)[0]:
            chunk = os.read(0, 1 << 16)
            if not chunk:
                break
            requests += chunk
        while b"\n" in requests:
            line, _, requests = requests.partition(b"\n")
            request = json.loads(line)
            if "import" in request:
                _import(request["import"])
            elif child := os.fork():
                children[child] = request["id"]
            else:
                _work(request)
        _reap(children)
    for child in children:
        os.kill(child, signal.SIGKILL)


def _reap(children: dict[int, int]) -> None:
    while children:
        child, status = os.waitpid(-1, os.WNOHANG)
        if not child:
            return
        answer = {"id": children.pop(child), "code": os.waitstatus_to_exitcode(status)}
        os.write(1, f"{json.dumps(answer)}\n".encode())


def _import(modules: Sequence[str]) -> None:
    for name in modules:
        # What a library has put among the modules under a name of its choice cannot be imported.
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    others = [thread.name for thread in threading.enumerate()][1:]
    if others:
        message = f"what a worker imports has started threads, which no fork takes along: {others}"
        raise RuntimeError(message)
    # What is there now is never collected: forks share its pages, and have less to look through.
    gc.collect()
    gc.freeze()


def _work(request: dict[str, Any]) -> NoReturn:
    """Be the worker that a provider would have started."""
    if request["record"] and len(sys.argv) == 1:
        os.environ[_HASHES] = "2"
        command = [sys.executable, "-m", "flash.testing.warm", json.dumps(request)]
        os.execv(command[0], command)  # noqa: S606 - a shell has nothing to do here
    store, number = Path(request["store"]), request["number"]
    try:
        log = store / "attempts" / str(number) / "worker.log"
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 - as the interpreter makes its own
        os.environ["FLASH_HOME"] = request["home"]
        sys.argv = ["flash.worker", "run", str(store), str(number)]
        record = Path(request["record"]) if request["record"] else None
        point = Point(**request["point"]) if request["point"] else None
        if record is not None:
            _keep_modules(store, record)
        if record is not None or point is not None:
            lay(store, point=point, record=record)
        from flash.worker.__main__ import main

        main()
    except BaseException:  # noqa: BLE001 - nothing of a fork may go back to the server's loop
        traceback.print_exc()
    os._exit(1)


def _keep_modules(store: Path, record: Path) -> None:
    """Have the worker write down, as it ends, the modules it has but those of its environment."""
    from flash.worker import attempt

    def around(run_attempt: Callable[..., int]) -> Callable[..., int]:
        def keeping(*args: Any, **kwargs: Any) -> int:
            code = run_attempt(*args, **kwargs)
            names = [
                name
                for name, module in sys.modules.copy().items()
                if (file := getattr(module, "__file__", None))
                and not file.startswith(str(store))
                and name != "__main__"
            ]
            _modules_of(record).write_text("\n".join(names))
            return code

        return keeping

    replace(attempt, "run_attempt", around)


def _modules_of(record: Path) -> Path:
    return record.with_suffix(".modules")


if __name__ == "__main__":
    if sys.argv[1:]:
        _work(json.loads(sys.argv[1]))
    _serve()
