"""`math`: the completion's expression is worth the same as the right answer's."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from flash.api import Reward
from flash_reward_standard.common import right_answer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flash.api import Episode, Task
    from flash_reward_standard.config import MathConfig

# The library needs no more of the worker's environment, which holds the environment's secrets.
_VARIABLES: Final = ("HOME", "LANG", "PATH", "PYTHONPATH", "TMPDIR", "VIRTUAL_ENV")


class Math:
    """1 where they are the same; a comparison without an end is an error, and hangs nothing."""

    def __init__(self, config: MathConfig) -> None:
        self._config = config
        self._checker: subprocess.Popen[str] | None = None
        self._one_at_a_time = threading.Lock()

    def score(self, task: Task, episodes: Sequence[Episode]) -> list[Reward | None]:
        """Return 1 or 0 for each; the metric `parsed` says whether it held an expression."""
        gold = right_answer(task, self._config.answer_key)
        return [self._one(gold, episode.completion) for episode in episodes]

    def _one(self, gold: str, completion: str) -> Reward:
        if not completion.strip():
            return Reward(0.0, metrics={"parsed": 0.0}, reason="an empty completion")
        answer = self._compare(gold, completion)
        if "error" in answer:
            return Reward(None, error=answer["error"])
        if not answer["gold"]:
            return Reward(None, error=f"the right answer {gold!r:.80} is no expression")
        reason = None if answer["parsed"] else "no expression found"
        return Reward(
            float(answer["same"]),
            success=answer["same"],
            metrics={"parsed": float(answer["parsed"])},
            reason=reason,
        )

    def _compare(self, gold: str, completion: str) -> dict[str, Any]:
        with self._one_at_a_time:
            checker = self._checker or self._start()
            assert checker.stdin is not None  # noqa: S101 - both were asked for as pipes
            assert checker.stdout is not None  # noqa: S101
            with contextlib.suppress(BrokenPipeError):  # it has ended, and says how below
                checker.stdin.write(json.dumps({"gold": gold, "completion": completion}) + "\n")
                checker.stdin.flush()
            line = checker.stdout.readline()
            if line:
                found: dict[str, Any] = json.loads(line)
                return found
            self._checker = None
            with contextlib.suppress(BrokenPipeError):
                checker.stdin.close()
            checker.stdout.close()
            code = checker.wait()
            if code == -signal.SIGALRM:
                seconds = self._config.timeout_s
                return {"error": f"comparing the expressions took longer than {seconds:g} s"}
            return {"error": f"the process that compares expressions ended with exit code {code}"}

    def _start(self) -> subprocess.Popen[str]:
        """Start the checker; when this process ends, its standard input does, and so it does."""
        script = Path(__file__).with_name("checker.py")
        self._checker = subprocess.Popen(
            [sys.executable, "-P", str(script), str(self._config.timeout_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env={name: os.environ[name] for name in _VARIABLES if name in os.environ},
        )
        return self._checker
