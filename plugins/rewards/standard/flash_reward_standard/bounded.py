"""Checks of hostile texts, bounded in time and memory: the side that asks `checker.py`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Final

# The libraries need no more of the worker's environment, which holds the environment's secrets.
_VARIABLES: Final = ("HOME", "LANG", "PATH", "PYTHONPATH", "TMPDIR", "VIRTUAL_ENV")


class BoundedCheck:
    """
    One check of `checker.py`, made in a process that is there from the first question on.

    A question that takes longer than `timeout_s` ends the process, and the next one starts another.
    Threads take turns.
    """

    def __init__(self, name: str, timeout_s: float, *, doing: str) -> None:
        self._name = name
        self._timeout_s = timeout_s
        self._doing = doing
        self._process: subprocess.Popen[str] | None = None
        self._one_at_a_time = threading.Lock()

    def ask(self, **question: Any) -> dict[str, Any]:
        """Return the answer, or why there is none as its `error`."""
        with self._one_at_a_time:
            process = self._process or self._start()
            try:
                line = self._asked(process, json.dumps(question))
            except BaseException:  # an interrupt: the answer still to come is to another question
                process.kill()
                self._ended(process)
                raise
            if line:
                answer: dict[str, Any] = json.loads(line)
                return answer
            code = self._ended(process)
            if code == -signal.SIGALRM:
                return {"error": f"{self._doing} took longer than {self._timeout_s:g} s"}
            return {"error": f"{self._doing} failed: its process ended with exit code {code}"}

    def _asked(self, process: subprocess.Popen[str], question: str) -> str:
        assert process.stdin is not None  # noqa: S101 - both were asked for as pipes
        assert process.stdout is not None  # noqa: S101
        with contextlib.suppress(BrokenPipeError):  # it has ended, and says how by its exit code
            process.stdin.write(question + "\n")
            process.stdin.flush()
        return process.stdout.readline()

    def _ended(self, process: subprocess.Popen[str]) -> int:
        self._process = None
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(BrokenPipeError):
                if pipe is not None:
                    pipe.close()
        return process.wait()

    def _start(self) -> subprocess.Popen[str]:
        """Start the process; when this one ends, its standard input does, and so it does."""
        script = Path(__file__).with_name("checker.py")
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(script), self._name, str(self._timeout_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env={name: os.environ[name] for name in _VARIABLES if name in os.environ},
        )
        return self._process
