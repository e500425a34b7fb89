"""`format`: demands on the form of a completion, of which the score is the share that is met."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from flash.api import Reward
from flash_reward_standard.schemas import parse_json

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from flash.api import Episode, Task
    from flash_reward_standard.config import FormatConfig


class Format:
    """Each demand is a metric of its own; all of them together are a success."""

    def __init__(self, config: FormatConfig) -> None:
        self._config = config

    def score(self, task: Task, episodes: Sequence[Episode]) -> list[Reward | None]:  # noqa: ARG002 - the contract's
        """Return the share of the demands that each completion meets."""
        return [self._one(episode.completion) for episode in episodes]

    def _one(self, completion: str) -> Reward:
        met = dict(self._demands(completion))
        missed = [name for name, kept in met.items() if not kept]
        return Reward(
            sum(met.values()) / len(met),
            success=not missed,
            metrics={name: float(kept) for name, kept in met.items()},
            reason=f"not met: {', '.join(missed)}" if missed else None,
        )

    def _demands(self, completion: str) -> Iterator[tuple[str, bool]]:
        config = self._config
        if config.tags:
            yield "tags", has_tags(completion, config.tags)
        if config.only_tags:
            yield "only_tags", not _without_tags(completion, config.tags).strip()
        if config.headings:
            yield "headings", has_headings(completion, config.headings)
        if config.json:
            yield "json", _is_json(completion)
        if config.one_line:
            yield "one_line", len(completion.strip().splitlines()) == 1
        if config.forbidden:
            folded = completion.casefold()
            yield "forbidden", not any(text.casefold() in folded for text in config.forbidden)


def has_tags(text: str, names: Sequence[str]) -> bool:
    """Say whether each element occurs once, in this order, closed and with something in it."""
    end = 0
    for name in names:
        opening, closing = f"<{name}>", f"</{name}>"
        if text.count(opening) != 1 or text.count(closing) != 1:
            return False
        start, stop = text.index(opening), text.index(closing)
        if start < end or not text[start + len(opening) : stop].strip():
            return False
        end = stop
    return True


def _without_tags(text: str, names: Sequence[str]) -> str:
    for name in names:
        before, _, rest = text.partition(f"<{name}>")
        _, closed, after = rest.partition(f"</{name}>")
        text = before + after if closed else text
    return text


def has_headings(text: str, titles: Sequence[str]) -> bool:
    """Say whether each is a heading, in this order, with text before the next one."""
    heading = re.compile(r"^ {0,3}#{1,6}[ \t](.*)$", re.MULTILINE)
    found = list(heading.finditer(text))
    ends = [match.start() for match in found[1:]] + [len(text)]
    filled = [
        match[1].lstrip(" \t").rstrip(" \t#:").casefold()
        for match, end in zip(found, ends, strict=True)
        if text[match.end() : end].strip()
    ]
    rest = iter(filled)
    return all(title.casefold() in rest for title in titles)


def _is_json(text: str) -> bool:
    try:
        parse_json(text)
    except ValueError:
        return False
    return True
