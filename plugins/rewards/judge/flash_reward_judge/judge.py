"""The adapter: one grade an episode, from the cache or the judge."""

from __future__ import annotations

import hashlib
import json
import random
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

from flash.api import EnvironmentFault, FlashError, Reward
from flash_reward_judge import KEY
from flash_reward_judge.budget import Budget
from flash_reward_judge.cache import GradeCache
from flash_reward_judge.config import LIMITS
from flash_reward_judge.endpoint import Endpoint, Trouble
from flash_reward_judge.prompt import asked_again, messages_for, read_grade

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from concurrent.futures import Future
    from pathlib import Path

    from flash.api import Episode, Message, PluginContext, Task
    from flash_reward_judge.config import JudgeConfig
    from flash_reward_judge.endpoint import Said
    from flash_reward_judge.prompt import Grade

FIRST_WAIT_S: Final = 0.5
LONGEST_WAIT_S: Final = 30.0
_CHANCE: Final = random.Random()  # noqa: S311 - spreads calls; training's own numbers stay as they are
_TEMPLATE_TOKENS: Final = 64
"""More than a chat template puts around a message."""


def make_judge(
    ctx: PluginContext, config: JudgeConfig, *, sleep: Callable[[float], None] = time.sleep
) -> Judge:
    """Return the judge of `[reward.judge]` for the environment in `ctx`; calls nobody yet."""
    endpoint = Endpoint(ctx.http, config.base_url, ctx.secret(KEY), config.timeout_s, ctx.clock)
    cache = GradeCache(ctx.workdir / "cache", ctx.log.warning) if config.cache else None
    return Judge(config, _rubric(config, ctx.environment), endpoint, cache, sleep)


class Judge:
    """Grades episodes side by side; each that cannot be graded says why."""

    def __init__(
        self,
        config: JudgeConfig,
        rubric: str,
        endpoint: Endpoint,
        cache: GradeCache | None,
        sleep: Callable[[float], None],
    ) -> None:
        self._config = config
        self._rubric = rubric
        self._endpoint = endpoint
        self._cache = cache
        self._sleep = sleep
        self._budget = Budget(config.max_calls, config.max_usd)
        self._pool = ThreadPoolExecutor(config.concurrency, "flash-judge")

    def spent_usd(self) -> float:
        """Return what its calls have cost, at the two prices."""
        return self._budget.spent_usd()

    def score(self, task: Task, episodes: Sequence[Episode]) -> list[Reward | None]:
        """Return the grade of each, divided by the scale; equal episodes are graded once."""
        config = self._config
        open_calls: dict[str, Future[Reward]] = {}
        keys = []
        for episode in episodes:
            messages = messages_for(
                self._rubric, config.scale, task, episode, show_answer=config.show_answer
            )
            key = self._key(messages)
            keys.append(key)
            if key not in open_calls:
                open_calls[key] = self._pool.submit(self._reward, key, messages)
        return [open_calls[key].result() for key in keys]

    def _key(self, messages: Sequence[Message]) -> str:
        """Return what names this grade: everything that the judge is told, and who it is."""
        asked = json.dumps([self._config.base_url, self._body(messages)], sort_keys=True)
        return hashlib.sha256(asked.encode()).hexdigest()

    def _body(self, messages: Sequence[Message]) -> dict[str, Any]:
        config = self._config
        body: dict[str, Any] = {
            "model": config.model,
            "messages": list(messages),
            "temperature": config.temperature,
            "max_tokens": config.max_tokens,
        }
        if "max_completion_tokens" in config.request:  # what newer models call the same
            del body["max_tokens"]
        return body | config.request

    def _reward(self, key: str, messages: Sequence[Message]) -> Reward:
        cached = self._cache.get(key) if self._cache else None
        try:
            grade = cached or self._graded(messages)
        except FlashError as error:
            return Reward(
                None, error=f"{error.message}; {error.hint}" if error.hint else error.message
            )
        if self._cache and cached is None:
            self._cache.put(key, grade)
        score = grade.grade / self._config.scale
        return Reward(
            score,
            success=score >= self._config.success_from,
            metrics={"cached": float(cached is not None)},
            reason=grade.reason or None,
        )

    def _graded(self, messages: Sequence[Message]) -> Grade:
        """Ask until there is a grade; raises the last failure, and says how often it was tried."""
        asked, failure, wait_s = messages, "", 0.0
        for attempt in range(self._config.retries + 1):
            if wait_s:
                self._sleep(wait_s)
            try:
                said = self._call(self._body(asked))
            except Trouble as error:
                failure = error.message
                wait_s = _wait_s(attempt) if error.after_s is None else error.after_s
                continue
            try:
                return read_grade(said.text, self._config.scale)
            except ValueError as error:
                failure = f"the judge's answer cannot be read: {error}: {said.text!r:.120}"
                asked, wait_s = (
                    asked_again(messages, said.text, str(error), self._config.scale),
                    0.0,
                )
        tries = self._config.retries + 1
        raise FlashError(f"{failure} (tried {tries} times)" if tries > 1 else failure)

    def _call(self, body: Mapping[str, Any]) -> Said:
        """Make one call within the budget."""
        # A token has at least one byte, so this is the most that the endpoint can count; what it
        # does count takes its place.
        texts = [message["content"] for message in body["messages"]]
        most_in = sum(len(text.encode("utf-8", "replace")) + _TEMPLATE_TOKENS for text in texts)
        most_out = max(body[name] for name in LIMITS if name in body)
        most = self._price(most_in, most_out)
        self._budget.reserve(most)
        try:
            said = self._endpoint.ask(body)
        except FlashError as error:
            if isinstance(error, Trouble) and error.billed:
                self._budget.settle(most, most)
            else:
                self._budget.release(most)
            raise
        cost = most
        if said.tokens_in is not None and said.tokens_out is not None:
            cost = self._price(said.tokens_in, said.tokens_out)
        self._budget.settle(most, cost)
        return said

    def _price(self, tokens_in: float, tokens_out: float) -> float:
        config = self._config
        return (
            tokens_in * config.usd_per_million_input + tokens_out * config.usd_per_million_output
        ) / 1e6


def _wait_s(attempt: int) -> float:
    """Return a wait that doubles, by chance a little longer, so that calls do not meet again."""
    wait_s = min(FIRST_WAIT_S * 2.0**attempt, LONGEST_WAIT_S)
    return wait_s * (1 + _CHANCE.random() / 4)


def _rubric(config: JudgeConfig, folder: Path | None) -> str:
    if config.rubric_path is None:
        return config.rubric or ""
    place = "[reward.judge] rubric_path"
    if folder is None:
        raise EnvironmentFault(f"{place}: there is no environment's folder to look in")
    path = (folder / config.rubric_path).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise EnvironmentFault(
            f"{place}: {config.rubric_path} is outside the environment's folder",
            hint="only that folder travels with a run; put the file into it",
        )
    try:
        text = path.read_text("utf-8").strip()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise EnvironmentFault(f"{place}: {path} cannot be read: {reason}") from None
    if not text:
        raise EnvironmentFault(f"{place}: {path} is empty")
    return text
