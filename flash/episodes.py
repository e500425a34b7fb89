"""
Playing episodes: an environment asks, a model answers, until every episode is over.

All open episodes take their turns together, so that the model is asked in batches. A task whose
episode cannot be played is data with a reason, like a failed scoring; it never becomes a zero.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

import attrs

from flash.errors import EnvironmentFault
from flash.values import Episode, Reward

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flash.contracts import Environment
    from flash.values import Message, Task

_OPEN, _CLOSE = "<think>", "</think>"


@attrs.frozen
class Question:
    """What the model is asked at one turn: the conversation and the tools it may name."""

    messages: tuple[Message, ...]
    tools: list[dict[str, Any]] | None = None


@attrs.frozen
class Answer:
    """
    What the model said at one turn.

    `text` is as the model wrote it, with the opening of a thinking trace that its prompt ended in.
    `error` says why there is no answer, for a conversation that the model cannot take.
    """

    text: str
    truncated: bool = False
    error: str | None = None


class Model(Protocol):
    """Answers a batch of questions, in order."""

    def __call__(self, questions: Sequence[Question], /) -> Sequence[Answer]:
        """Return one answer a question."""
        ...


@attrs.frozen
class Played:
    """A task and how it went: an episode, or the reason why there is none."""

    task: Task
    episode: Episode | None
    error: str | None = None


def split_thinking(text: str) -> tuple[str, str]:
    """
    Return the thinking trace and the answer after it; a text without a trace is the answer.

    A trace that was never closed is all there is: then the answer is empty.
    """
    before, opened, after = text.partition(_OPEN)
    if before.strip() or not opened:
        return "", text
    trace, _, answer = after.partition(_CLOSE)
    return trace.strip(), answer.strip()


def play(environment: Environment, tasks: Sequence[Task], model: Model) -> list[Played]:
    """Return how each task went, in order; only what is not the tasks' fault is raised."""
    games = [_Game(environment, task) for task in tasks]
    while waiting := [game for game in games if not game.over]:
        answers = model([game.question() for game in waiting])
        for game, answer in zip(waiting, answers, strict=True):
            game.take(answer)
    return [game.result() for game in games]


def score(environment: Environment, played: Sequence[Played]) -> list[Reward]:
    """
    Return one `Reward` a task, in order; a task without an episode has its reason as the error.

    Up to `max_score_concurrency` tasks are scored at a time.
    """

    def reward(one: Played) -> Reward:
        if one.episode is None:
            return Reward(None, error=one.error)
        return environment.score(one.task, [one.episode])[0]

    workers = environment.max_score_concurrency
    if workers == 1:  # on this thread: such an environment may hold what other threads cannot use
        return [reward(one) for one in played]
    with ThreadPoolExecutor(workers, "flash-score") as pool:
        return list(pool.map(reward, played))


class _Game:
    """One episode under way."""

    def __init__(self, environment: Environment, task: Task) -> None:
        self._environment = environment
        self._task = task
        self._messages: list[Message] = []
        self._tools: list[dict[str, Any]] | None = None
        self._turns_left = 0
        self._truncated = False
        self._episode: Episode | None = None
        self._error: str | None = None
        try:
            self._messages = list(environment.start(task))
            self._tools = environment.tools(task)
            self._turns_left = environment.max_turns(task)
        except EnvironmentFault as fault:
            self._error = fault.message

    @property
    def over(self) -> bool:
        return self._episode is not None or self._error is not None

    def question(self) -> Question:
        return Question(tuple(self._messages), self._tools)

    def result(self) -> Played:
        return Played(self._task, self._episode, self._error)

    def take(self, answer: Answer) -> None:
        """Go one turn on; the thinking trace stays out of what the environment sees."""
        if answer.error is not None:
            self._error = answer.error
            return
        thinking, completion = split_thinking(answer.text)
        self._messages.append({"role": "assistant", "content": completion})
        self._turns_left -= 1
        self._truncated = self._truncated or answer.truncated
        try:
            step = self._environment.step(self._task, tuple(self._messages), completion)
        except EnvironmentFault as fault:
            self._error = fault.message
            return
        self._messages.extend(step.messages)
        if step.done or not self._turns_left:
            self._episode = Episode(
                messages=tuple(self._messages),
                completion=completion if step.final_text is None else step.final_text,
                thinking=thinking,
                raw=answer.text,
                truncated=self._truncated,
                metadata=step.metadata,
            )
