"""What is said of a request, in the shapes of OpenAI's API."""

from __future__ import annotations

import secrets
import time
from typing import TYPE_CHECKING, Any, Final

import attrs

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from flash_serving_transformers.language import Language
    from flash_serving_transformers.requests import Token

_LEAST: Final = -9999.0
"""What stands for minus infinity, which JSON does not have."""


@attrs.frozen(kw_only=True)
class Frame:
    """What every object about one request begins with."""

    kind: str
    model: str
    prefix: str
    mark: str = attrs.field(factory=lambda: secrets.token_hex(12))
    created: int = attrs.field(factory=lambda: int(time.time()))

    def body(self, choices: Sequence[Mapping[str, Any]], *, chunk: bool = False) -> dict[str, Any]:
        """Return an object with these choices."""
        chunked = chunk and self.kind == "chat.completion"
        return {
            "id": f"{self.prefix}-{self.mark}",
            "object": f"{self.kind}.chunk" if chunked else self.kind,
            "created": self.created,
            "model": self.model,
            "choices": list(choices),
        }


def usage(prompt: int, cached: int, completion: int) -> dict[str, Any]:
    """Return what a request has used."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def chat_log_probs(tokens: Sequence[Token], language: Language) -> dict[str, Any]:
    """Return `logprobs` as chat completions have them."""

    def entry(token: int, log_prob: float | None) -> dict[str, Any]:
        text, raw = language.token_text(token)
        return {"token": text, "logprob": _finite(log_prob), "bytes": raw}

    return {
        "content": [
            {
                **entry(one.id, one.log_prob),
                "top_logprobs": [entry(token, log_prob) for token, log_prob in one.top],
            }
            for one in tokens
        ]
    }


class LegacyLogProbs:
    """`logprobs` as completions have them: columns, with each token's place in the text."""

    def __init__(self, language: Language) -> None:
        self._language = language
        self._at = 0

    def of(self, tokens: Sequence[Token], *, tops: bool = True) -> dict[str, Any]:
        """Return those of the next tokens; without `tops` the likeliest others are not known."""
        texts = [self._language.token_text(one.id)[0] for one in tokens]
        places = []
        for text in texts:
            places.append(self._at)
            self._at += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [
                None if one.log_prob is None else _finite(one.log_prob) for one in tokens
            ],
            "top_logprobs": [self._likeliest(one) for one in tokens] if tops else None,
            "text_offset": places,
        }

    def _likeliest(self, token: Token) -> dict[str, float] | None:
        if token.log_prob is None:
            return None
        found = {self._language.token_text(one)[0]: _finite(value) for one, value in token.top}
        return found | {self._language.token_text(token.id)[0]: _finite(token.log_prob)}


def _finite(number: float | None) -> float:
    return number if number is not None and number > _LEAST else _LEAST
