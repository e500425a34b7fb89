"""
The `Environment` contract over a process in which verifiers drives the episodes itself.

The library asks its model for answers; Flash asks its environment for messages. Over there an
episode runs until it asks the model and waits; `start` and `step` return what it asked. Flash names
an episode by its messages, and that is how one is found again here. One that is not known, or was
scored already, is played anew from its messages.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from typing import TYPE_CHECKING, Any, Final

from flash.api import EnvironmentFault, Reward, Step, Task

if TYPE_CHECKING:
    from collections.abc import Sequence
    from concurrent.futures import Future

    from flash.api import Episode, Message
    from flash_env_verifiers.params import Params
    from flash_env_verifiers.process import EnvironmentProcess

MOST_OPEN: Final = 4096
"""Episodes kept open; beyond it the oldest is let go, and played anew should it be asked for."""


class VerifiersEnvironment:
    """Tasks, interaction and scoring of one loaded environment."""

    # Scoring runs over there as soon as an episode ends; here threads only wait for it.
    max_score_concurrency = 32

    def __init__(self, process: EnvironmentProcess, params: Params, *, max_turns: int) -> None:
        self._process = process
        self._params = params
        self._max_turns = max_turns
        self._tasks: dict[str, tuple[Task, ...]] = {}
        self._open = _Open()

    def splits(self) -> Sequence[str]:
        """Return the splits that the params name, `train` first."""
        return tuple(sorted(self._params.splits, key=lambda split: (split != "train", split)))

    def tasks(self, split: str) -> Sequence[Task]:
        """Return the split's tasks in the library's order; the same objects on every call."""
        if split not in self._params.splits:
            raise EnvironmentFault(
                f'there is no split "{split}"; there is {", ".join(self.splits())}',
                hint=f"describe it in [environment.params.splits.{split}]",
            )
        if split not in self._tasks:
            found = self._process.call("tasks", split=split)["tasks"]
            self._tasks[split] = tuple(
                Task(
                    id=task["id"],
                    input=task["input"],
                    data=(split, index),
                    metadata=task["metadata"],
                )
                for index, task in enumerate(found)
            )
        return self._tasks[split]

    def start(self, task: Task) -> list[Message]:
        """Open an episode and return what it asks first."""
        episode, opening = self._begin(task)
        self._keep(task, opening, episode)
        return opening

    def step(self, task: Task, messages: Sequence[Message], action: str) -> Step:
        """Give the model's answer and return what is asked next, if anything is."""
        episode = self._find(task, messages[:-1])
        answer = self._process.call("step", episode=episode, text=action)
        self._keep(task, [*messages, *answer["messages"]], episode)
        return Step(done=answer["over"], messages=tuple(answer["messages"]))

    def max_turns(self, task: Task) -> int:  # noqa: ARG002 - the library's limit is its agent's
        """Return the most turns that the environment's agent may take."""
        return self._max_turns

    def target(self, task: Task) -> list[Message] | None:
        """Return the gold answer, from the field that `params.target` names."""
        if not self._params.target:
            return None
        if self._params.target not in task.metadata:
            raise EnvironmentFault(
                f"environment.params.target: task {task.id} has no field {self._params.target}",
                hint=f"its fields: {', '.join(task.metadata) or 'none'}",
            )
        return [{"role": "assistant", "content": str(task.metadata[self._params.target])}]

    def tools(self, task: Task) -> list[dict[str, Any]] | None:  # noqa: ARG002 - see the README
        """Return None: an environment that serves tools is refused when it is loaded."""
        return None

    def score(self, task: Task, episodes: Sequence[Episode]) -> list[Reward]:
        """Return one `Reward` an episode, in order; the group is scored at once."""
        asked = [self._ask_score(task, episode) for episode in episodes]
        return [one if isinstance(one, Reward) else self._reward(one) for one in asked]

    def _begin(self, task: Task) -> tuple[str, list[Message]]:
        split, index = task.data
        answer = self._process.call("start", split=split, index=index)
        return answer["episode"], answer["messages"]

    def _keep(self, task: Task, messages: Sequence[Message], episode: str) -> None:
        left_out = self._open.keep(task, messages, episode)
        if left_out is not None:
            self._process.ask("drop", episode=left_out)

    def _find(self, task: Task, messages: Sequence[Message]) -> str:
        return self._open.take(task, messages) or self._replay(task, messages)

    def _replay(self, task: Task, messages: Sequence[Message]) -> str:
        """Play an episode anew up to the end of `messages`."""
        episode, seen = self._begin(task)
        while seen == list(messages[: len(seen)]) and len(seen) < len(messages):
            said = messages[len(seen)]
            answer = self._process.call("step", episode=episode, text=said["content"])
            seen = [*seen, said, *answer["messages"]]
            if answer["over"] and len(seen) < len(messages):
                break
        if seen != list(messages):
            self._process.ask("drop", episode=episode)
            raise EnvironmentFault(
                f"task {task.id}: the environment goes another way when it hears the same answers "
                "again",
                hint="an episode can be scored once, and only by the environment that played it",
            )
        return episode

    def _ask_score(self, task: Task, episode: Episode) -> Future[dict[str, Any]] | Reward:
        try:
            return self._process.ask("score", episode=self._find(task, episode.messages))
        except EnvironmentFault as fault:
            return Reward(None, error=fault.message)

    def _reward(self, asked: Future[dict[str, Any]]) -> Reward:
        try:
            answer = self._process.answer(asked)
        except EnvironmentFault as fault:
            return Reward(None, error=fault.message)
        metrics = {name: value for name, value in answer["metrics"].items() if math.isfinite(value)}
        score = answer["score"]
        if not math.isfinite(score):
            return Reward(None, metrics=metrics, error=f"the reward is {score}, not a number")
        success = score >= self._params.success_at
        return Reward(score, success=success, metrics=metrics, reason=answer["reason"])


class _Open:
    """The episodes under way, by their task and messages; equal ones are as good as each other."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._keys: dict[str, str] = {}  # of each episode, the oldest first
        self._episodes: dict[str, list[str]] = {}

    def keep(self, task: Task, messages: Sequence[Message], episode: str) -> str | None:
        """Put an episode where it stands now; returns one that had to make room for it."""
        key = _key(task, messages)
        with self._lock:
            self._keys[episode] = key
            self._episodes.setdefault(key, []).append(episode)
            if len(self._keys) <= MOST_OPEN:
                return None
            oldest = next(iter(self._keys))
            self._remove(oldest)
            return oldest

    def take(self, task: Task, messages: Sequence[Message]) -> str | None:
        """Return an episode that stands there, and forget it; None where there is none."""
        with self._lock:
            standing = self._episodes.get(_key(task, messages))
            if not standing:
                return None
            episode = standing[0]
            self._remove(episode)
            return episode

    def _remove(self, episode: str) -> None:
        key = self._keys.pop(episode)
        self._episodes[key].remove(episode)
        if not self._episodes[key]:
            del self._episodes[key]


def _key(task: Task, messages: Sequence[Message]) -> str:
    text = json.dumps([task.data, list(messages)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
