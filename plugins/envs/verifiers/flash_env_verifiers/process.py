"""
The process that runs a verifiers environment, seen from Flash: questions and answers as JSON lines.

It lives as long as its standard input is open: it goes when the worker goes, however that ends.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import subprocess
import threading
from concurrent.futures import Future
from concurrent.futures import TimeoutError as OutOfTime
from pathlib import Path
from typing import Any

from flash.api import EnvironmentFault, PluginError

_SERVE = Path(__file__).parent / "inside" / "flash_serve.py"


class EnvironmentProcess:
    """One child process; its calls may come from several threads."""

    def __init__(self, python: Path, folder: Path, *, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._waiting: dict[int, Future[dict[str, Any]]] = {}
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._questions: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._gone = False
        self._child = subprocess.Popen(
            [str(python), "-P", "-u", str(_SERVE), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=_environ(),
        )
        for work in (self._listen, self._tell):
            threading.Thread(target=work, name="flash-verifiers", daemon=True).start()

    def ask(self, what: str, **arguments: Any) -> Future[dict[str, Any]]:
        """Send a question and return what will hold the answer; see `answer`."""
        future: Future[dict[str, Any]] = Future()
        with self._lock:
            if self._gone:
                raise self._ended()
            number = next(self._numbers)
            self._waiting[number] = future
        line = json.dumps({"number": number, "do": what, **arguments}) + "\n"
        self._questions.put(line.encode())
        return future

    def answer(self, future: Future[dict[str, Any]]) -> dict[str, Any]:
        """Wait for an answer; what went wrong there is an `EnvironmentFault` here."""
        try:
            answer = future.result(self._timeout_s)
        except OutOfTime:
            raise EnvironmentFault(
                f"the verifiers environment gave no answer in {self._timeout_s:g} s",
                hint="environment.params.answer_timeout_s allows more",
            ) from None
        if "error" in answer:
            raise EnvironmentFault(answer["error"], hint=answer.get("hint"))
        return answer

    def call(self, what: str, **arguments: Any) -> dict[str, Any]:
        """Ask, and wait for the answer."""
        return self.answer(self.ask(what, **arguments))

    def close(self) -> None:
        """End it now."""
        self._child.kill()
        self._child.wait()

    def _tell(self) -> None:
        # On a thread of its own: a time limit that interrupts the asker must not cut a line short.
        assert self._child.stdin is not None  # noqa: S101 - asked for as a pipe
        with contextlib.suppress(BrokenPipeError):  # `_listen` sees the end too, and says so
            while (line := self._questions.get()) is not None:
                self._child.stdin.write(line)
                self._child.stdin.flush()

    def _listen(self) -> None:
        assert self._child.stdout is not None  # noqa: S101 - asked for as a pipe
        for line in self._child.stdout:
            answer = json.loads(line)
            with self._lock:
                future = self._waiting.pop(answer["number"], None)
            if future is not None:
                future.set_result(answer)
        self._child.wait()
        self._questions.put(None)
        with self._lock:
            self._gone = True
            left, self._waiting = self._waiting, {}
        for future in left.values():
            future.set_exception(self._ended())

    def _ended(self) -> PluginError:
        return PluginError(
            f"the process of the verifiers environment ended (exit code {self._child.poll()})",
            hint="its last words are in the log above: `flash logs RUN`",
        )


def _environ() -> dict[str, str]:
    """Return ours, with the model's own address left out of every proxy's way."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    local = "127.0.0.1,localhost"
    for name in ("NO_PROXY", "no_proxy"):
        kept[name] = f"{kept[name]},{local}" if kept.get(name) else local
    return kept
