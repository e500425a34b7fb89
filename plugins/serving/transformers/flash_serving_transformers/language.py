"""What the server knows of the model's language: its chat template, its tokens, and their texts."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import attrs

from flash.training.chat import ChatRenderer, stop_tokens
from flash_serving_transformers.errors import Refused
from flash_serving_transformers.text import Detokenizer

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from flash.api import Message

THINK, END_OF_THOUGHT = "<think>", "</think>"

_OWN_MARK: Final = b"\xff"
"""What llguidance writes before the names of special tokens."""


@attrs.frozen
class Prompt:
    """A rendered conversation; `opens_thought` where the template has opened the trace itself."""

    tokens: tuple[int, ...]
    opens_thought: bool


class Language:
    """One base model's; the same for all its adapters."""

    def __init__(self, model: Any, tokenizer: Any, context_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._context_tokens = context_tokens
        self._longest_text = context_tokens * max(map(len, tokenizer.get_vocab()))
        self.stops = stop_tokens(tokenizer, model.generation_config)
        self._known: int = model.get_input_embeddings().weight.shape[0]
        self.thinks = THINK in str(tokenizer.chat_template) or self.single(THINK) is not None
        """Whether the model may write a thinking trace; others must not be allowed to."""
        self.vocabulary: int = max(self._known, len(tokenizer))
        self._special: dict[str, int] = dict(
            zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
        )

    def prompt(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None,
        *,
        thinking: bool | None,
    ) -> Prompt:
        """
        Return a conversation's prompt as training renders it.

        Raises `TrainingDataError` where the chat template cannot.
        """
        text = ChatRenderer(self._tokenizer, self.stops, thinking).prompt(messages, tools)
        return Prompt(self.encode(text, special=False), text.rstrip().endswith(THINK))

    def encode(self, text: str, *, special: bool) -> tuple[int, ...]:
        """
        Return a text's tokens; `special` adds those that the tokenizer begins a text with.

        Raises `Refused` at once for one that is too long whatever its tokens are: reading ten
        million characters takes half a minute.
        """
        if len(text) > self._longest_text:
            raise Refused(
                f"this model's context has {self._context_tokens} tokens, and the prompt has "
                f"{len(text):,} characters: more than so many tokens can be",
                code="context_length_exceeded",
            )
        encoded = self._tokenizer(text, add_special_tokens=special, verbose=False)
        return tuple(encoded["input_ids"])

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, without special ones."""
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def detokenizer(self) -> Detokenizer:
        """Return what makes the text of one completion."""
        return Detokenizer(self.decode)

    def endings(self, sequences: Sequence[str]) -> tuple[frozenset[int], list[str]]:
        """
        Return the tokens that end an answer, and the sequences that do in its text.

        A special token is never part of a text: as a stop sequence it is one more stop token.
        """
        named = {self._special[one] for one in sequences if one in self._special}
        return self.stops | named, [one for one in sequences if one not in self._special]

    def unknown(self, tokens: Iterable[int]) -> int | None:
        """Return one of the tokens that the model does not have, if there is any."""
        return next((token for token in tokens if not 0 <= token < self._known), None)

    def single(self, text: str) -> int | None:
        """Return the token that alone is `text`, if there is one."""
        tokens = self.encode(text, special=False)
        return tokens[0] if len(tokens) == 1 else None

    def know_bytes(self) -> None:
        """Get ready for `token_text`, which takes some time at its first use."""
        _ = self.grammar_tokenizer

    def token_text(self, token: int) -> tuple[str, list[int]]:
        """Return what one token reads as by itself, and its bytes."""
        text = self._tokenizer.decode([token])
        raw: bytes = self.grammar_tokenizer.decode_bytes([token])
        return text, list(text.encode() if raw.startswith(_OWN_MARK) else raw)

    @cached_property
    def grammar_tokenizer(self) -> Any:
        """The vocabulary as llguidance reads it; made at first use, which takes some time."""
        from llguidance.hf import from_tokenizer

        return from_tokenizer(
            self._tokenizer, n_vocab=self.vocabulary, eos_token=sorted(self.stops)
        )
