"""
Playing episodes: an environment asks, a model answers, until every episode is over.

All open episodes take their turns together, so that the model is asked in batches. A task whose
episode cannot be played is data with a reason, like a failed scoring; it never becomes a zero.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import attrs

from flash.errors import EnvironmentFault, FlashError
from flash.time_limit import TimeUp, time_limit
from flash.values import Episode, Step

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from flash.contracts import Environment
    from flash.values import Message, Task

_OPEN, _CLOSE = "<think>", "</think>"


@attrs.frozen
class Question:
    """
    What the model is asked at one turn: the conversation and the tools it may name.

    `stream` names the episode and the turn: what a model draws at random should depend on it and
    on nothing beside. From the second turn on, `said` is the model's own answer before, and
    `since` the messages that the environment added to it: a model of this process goes on from the
    tokens that it sampled and does not read them anew from the text.
    """

    messages: tuple[Message, ...]
    tools: list[dict[str, Any]] | None = None
    stream: str = "0/0"
    said: Answer | None = None
    since: tuple[Message, ...] = ()


@attrs.frozen
class Answer:
    """
    What the model said at one turn.

    `text` is as the model wrote it, with the opening of a thinking trace that its prompt ended in.
    `truncated`: it ran out of tokens before it ended its turn. `full`: there was no room left in
    its context for this turn, and the episode ends with the turn before. `error` says why there is
    no answer, for a conversation that the model cannot take. `turn` is what a model of this process
    keeps of it, see `flash.training.chat_model.Turn`.
    """

    text: str
    truncated: bool = False
    full: bool = False
    error: str | None = None
    turn: Any = None


class Model(Protocol):
    """Answers a batch of questions."""

    def __call__(self, questions: Sequence[Question], /) -> Iterable[tuple[int, Answer]]:
        """Yield each question's place in `questions` with its answer, as they are ready."""
        ...


@attrs.frozen
class Played:
    """
    A task and how it went: an episode, or the reason why there is none.

    `answers` are the model's turns, in order, and `messages` the conversation as far as it went;
    the first `opening` of them are the environment's.
    """

    task: Task
    episode: Episode | None
    error: str | None = None
    answers: tuple[Answer, ...] = ()
    messages: tuple[Message, ...] = ()
    opening: int = 0


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


def play(
    environment: Environment,
    tasks: Sequence[Task],
    model: Model,
    *,
    seed: int = 0,
    over: Callable[[int, Played], None] = lambda _place, _played: None,
    timeout_s: float | None = None,
) -> list[Played]:
    """
    Return how each task went, in order; only what is not the tasks' fault is raised.

    A task may stand several times and is then played several times. `seed` is part of every random
    stream. `over` is told the place of each episode as soon as it ends.

    An episode ends with its turn before, as truncated, where the context has no room for the next
    one, or where it has been open for `timeout_s`; they are all open from the start. A call of the
    environment that alone takes so long is interrupted (see `time_limit`), and its episode is lost.
    """
    games = [
        _Game(environment, task, f"{seed}/{place}", timeout_s) for place, task in enumerate(tasks)
    ]
    opened = time.monotonic()
    for place, game in enumerate(games):
        if game.over:
            over(place, game.result())
    while waiting := [place for place, game in enumerate(games) if not game.over]:
        for index, answer in model([games[place].question() for place in waiting]):
            place = waiting[index]
            games[place].take(answer)
            if timeout_s is not None and time.monotonic() - opened > timeout_s:
                games[place].cut_off()
            if games[place].over:
                over(place, games[place].result())
    return [game.result() for game in games]


@contextmanager
def guarded(call: str, timeout_s: float | None, failed: Callable[[str], None]) -> Iterator[None]:
    """Tell `failed` what the environment's `call`, made in the block, does wrong."""
    try:
        with time_limit(timeout_s):
            yield
    except EnvironmentFault as fault:
        failed(fault.message)
    except TimeUp:
        failed(f"the environment's {call} took longer than {timeout_s:g} s")
    except (FlashError, MemoryError):
        raise
    except (Exception, SystemExit) as error:  # noqa: BLE001 - user code: a failure is data
        failed(f"the environment's {call} raised {type(error).__name__}: {error}")


class _Game:
    """One episode under way."""

    def __init__(
        self, environment: Environment, task: Task, stream: str, timeout_s: float | None
    ) -> None:
        self._environment = environment
        self._task = task
        self._stream = stream
        self._timeout_s = timeout_s
        self._messages: list[Message] = []
        self._opening = 0
        self._since: tuple[Message, ...] = ()
        self._answers: list[Answer] = []
        self._tools: list[dict[str, Any]] | None = None
        self._turns_left = 0
        self._truncated = False
        self._metadata: Mapping[str, Any] = {}
        self._episode: Episode | None = None
        self._error: str | None = None
        with self._guarded("start"):
            self._messages = _messages(environment.start(task), "start")
            self._opening = len(self._messages)
            self._tools = environment.tools(task)
            self._turns_left = int(environment.max_turns(task))

    @property
    def over(self) -> bool:
        return self._episode is not None or self._error is not None

    def question(self) -> Question:
        return Question(
            tuple(self._messages),
            self._tools,
            stream=f"{self._stream}/{len(self._answers)}",
            said=self._answers[-1] if self._answers else None,
            since=self._since,
        )

    def result(self) -> Played:
        return Played(
            self._task,
            self._episode,
            self._error,
            tuple(self._answers),
            tuple(self._messages),
            self._opening,
        )

    def take(self, answer: Answer) -> None:
        """Go one turn on; the thinking trace stays out of what the environment sees."""
        if answer.error is not None:
            self._error = answer.error
            return
        if answer.full:
            self.cut_off()
            return
        self._answers.append(answer)
        _, completion = split_thinking(answer.text)
        self._messages.append({"role": "assistant", "content": completion})
        self._turns_left -= 1
        self._truncated = self._truncated or answer.truncated
        with self._guarded("step"):
            step = self._environment.step(self._task, tuple(self._messages), completion)
            if not isinstance(step, Step):
                raise EnvironmentFault(
                    f"the environment's step returned a {type(step).__name__}, not a Step"
                )
            self._since = tuple(_messages(step.messages, "step"))
            self._messages.extend(self._since)
            self._metadata = step.metadata
            if step.done or self._turns_left <= 0:
                self._end(answer, step.final_text)

    def cut_off(self) -> None:
        """End an episode that is not over yet with the turn before."""
        if not self.over:
            self._truncated = True
            self._end(self._answers[-1], None)

    def _guarded(self, call: str) -> AbstractContextManager[None]:
        return guarded(call, self._timeout_s, self._fail)

    def _fail(self, reason: str) -> None:
        self._error = reason

    def _end(self, last: Answer, final_text: str | None) -> None:
        thinking, completion = split_thinking(last.text)
        self._episode = Episode(
            messages=tuple(self._messages),
            completion=completion if final_text is None else final_text,
            thinking=thinking,
            raw=last.text,
            truncated=self._truncated,
            metadata=self._metadata,
        )


def _messages(given: Iterable[Any], call: str) -> list[Message]:
    """Return what the environment's `call` says; `EnvironmentFault` for what is no message."""
    messages = list(given)
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise EnvironmentFault(
                f"the environment's {call} gave {message!r:.80}, which is no message with a role"
            )
    return messages
