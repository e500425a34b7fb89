"""The table `[reward.judge]`."""

from __future__ import annotations

import re
from typing import Any, Final
from urllib.parse import urlsplit

import attrs

from flash.api import SettingError, setting

LIMITS: Final = ("max_tokens", "max_completion_tokens")
"""What the API calls the most tokens of an answer; newer models take the second name alone."""

_URL: Final = re.compile(r"https?://[^/@?#\s]+(/[^@?#\s]*)?")


@attrs.frozen
class JudgeConfig:
    """Who judges, by which rubric, and how much that may cost."""

    model: str = setting(
        doc="The judge, as its endpoint calls it.", non_empty=True, example="gpt-4.1-mini"
    )
    base_url: str = setting(
        "https://api.openai.com/v1",
        doc="The endpoint, up to and without `/chat/completions`.",
        example="http://127.0.0.1:8000/v1",
    )
    rubric: str | None = setting(
        None, doc="What makes a completion good, in your own words.", non_empty=True
    )
    rubric_path: str | None = setting(
        None,
        doc="The rubric's file, relative to the environment's folder.",
        non_empty=True,
        example="rubric.md",
    )
    scale: int = setting(
        10, doc="The best grade; the score is the grade divided by it.", ge=1, le=100
    )
    success_from: float = setting(0.7, doc="The least score that is a success.", ge=0, le=1)
    show_answer: bool = setting(default=True, doc="Show the judge the row's gold answer.")
    concurrency: int = setting(8, doc="Calls that are open at a time.", ge=1, le=256)
    timeout_s: float = setting(60.0, doc="Seconds for one call.", gt=0, le=3600)
    retries: int = setting(
        4, doc="How often a call is repeated that fails or cannot be read.", ge=0, le=20
    )
    max_tokens: int = setting(500, doc="The most tokens of the judge's answer.", ge=1)
    temperature: float = setting(0.0, doc="Of the judge.", ge=0, le=2)
    request: dict[str, Any] = setting(
        factory=dict,
        doc="Further fields of every request, in place of those above where they have their names.",
        example={"reasoning_effort": "low"},
    )
    cache: bool = setting(default=True, doc="Keep grades on disk, and ask for none twice.")
    max_calls: int | None = setting(
        None, doc="The most calls of one attempt, or one evaluation.", ge=1, example=5000
    )
    max_usd: float | None = setting(
        None, doc="The most that they may cost, at the two prices.", gt=0, example=2.0
    )
    usd_per_million_input: float = setting(
        0.0, doc="Price of a million tokens that the judge reads.", ge=0, example=0.4
    )
    usd_per_million_output: float = setting(
        0.0, doc="Price of a million tokens that the judge writes.", ge=0, example=1.6
    )

    @base_url.validator
    def _is_an_address(self, attribute: attrs.Attribute[Any], value: str) -> None:
        if not _URL.fullmatch(value):
            message = "must be an http:// or https:// address without credentials and query"
            raise SettingError(message, attribute.name)

    @request.validator
    def _leaves_ours(self, attribute: attrs.Attribute[Any], value: dict[str, Any]) -> None:
        for name in ("messages", "model", "n", "stream"):
            if name in value:
                raise SettingError(f"cannot hold `{name}`, which is set here", attribute.name)
        for name in LIMITS:
            limit = value.get(name, 1)
            if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
                raise SettingError(f"`{name}` must be a whole number from 1 on", attribute.name)

    @property
    def priced(self) -> bool:
        """Whether its calls cost something."""
        return self.usd_per_million_input + self.usd_per_million_output > 0

    @property
    def is_here(self) -> bool:
        """Whether the endpoint is on this machine."""
        return urlsplit(self.base_url).hostname in {"localhost", "127.0.0.1", "::1"}

    def __attrs_post_init__(self) -> None:
        """One rubric, and prices where there is a budget in dollars."""
        if self.rubric is None and self.rubric_path is None:
            raise SettingError("needs `rubric` or `rubric_path`", "rubric")
        if self.rubric is not None and self.rubric_path is not None:
            raise SettingError("takes `rubric` or `rubric_path`, not both", "rubric_path")
        if self.max_usd is not None and not self.priced:
            message = "needs the prices: usd_per_million_input, usd_per_million_output"
            raise SettingError(message, "max_usd")
