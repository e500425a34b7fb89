"""
The process that runs a verifiers environment, seen from Flash: questions and answers as JSON lines.

It lives as long as its standard input is open: it goes when the worker goes, however that ends.
"""

from __future__ import annotations

import itertools
import json
import os
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
        self._gone = False
        self._child = subprocess.Popen(
            [str(python), "-P", "-u", str(_SERVE), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=_environ(),
        )
        threading.Thread(target=self._listen, name="flash-verifiers", daemon=True).start()

    def ask(self, what: str, **arguments: Any) -> Future[dict[str, Any]]:
        """Send a question and return what will hold the answer; see `answer`."""
        future: Future[dict[str, Any]] = Future()
        with self._lock:
            if self._gone:
                raise self._ended()
            number = next(self._numbers)
            self._waiting[number] = future
            line = json.dumps({"number": number, "do": what, **arguments}) + "\n"
            assert self._child.stdin is not None  # noqa: S101 - asked for as a pipe
            try:
                self._child.stdin.write(line.encode())
                self._child.stdin.flush()
            except BrokenPipeError:
                raise self._ended() from None
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

    def _listen(self) -> None:
        assert self._child.stdout is not None  # noqa: S101 - asked for as a pipe
        for line in self._child.stdout:
            answer = json.loads(line)
            with self._lock:
                future = self._waiting.pop(answer["number"], None)
            if future is not None:
                future.set_result(answer)
        self._child.wait()
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
