"""
What an answer must look like, as a grammar that says which token may come next.

Tokens that a grammar does not allow are never drawn, so a whole answer is always valid JSON of
its schema; one that is cut by `max_tokens` is the beginning of one. A thinking trace before the
answer is left free.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

import attrs

from flash.api import UsageError
from flash_serving_transformers.language import END_OF_THOUGHT, THINK

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from flash_serving_transformers.language import Language

CALL, END_OF_CALL = "<tool_call>", "</tool_call>"
"""Between these a tool call is written, as JSON with `name` and `arguments`."""

_SPACES: Final = r"[\x20\x0A\x0D\x09]{0,32}"
"""White space has an end: small models may go on with it for ever."""

_LARGEST: Final = 2**17
"""Characters of a grammar: larger ones take minutes to compile."""

_FUEL: Final = 50_000
"""What one token may cost in the engine's thread, where all wait for it: a quarter of a second."""

_SPACE: Final = r"\x20?"
"""A call is written in one line, as templates show it."""


@attrs.frozen(kw_only=True)
class Shape:
    """
    What may be said.

    Attributes:
        text: whether free text.
        schema: JSON of this schema; None for none.
        tools: calls of these functions; empty for none.
        several: whether more than one call.
        thinks: whether a thinking trace may come first.
        in_thought: whether the prompt has opened the trace already.

    """

    text: bool = False
    schema: Mapping[str, Any] | bool | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    several: bool = True
    thinks: bool = False
    in_thought: bool = False


class Grammar:
    """A compiled `Shape`; every choice of a request has a `constraint` of its own."""

    def __init__(self, shape: Shape, language: Language) -> None:
        """Compile; raises `UsageError` with what of a schema cannot be had. Takes some time."""
        from llguidance import LLMatcher, LLParserLimits

        text = _lark(shape, language)
        if len(text) > _LARGEST:
            raise UsageError(
                f"the JSON schemas have {len(text):,} characters, and {_LARGEST:,} is the most"
            )
        grammar = LLMatcher.grammar_from_lark(text)
        self._matcher = LLMatcher(
            language.grammar_tokenizer,
            grammar,
            log_level=0,
            limits=LLParserLimits(initial_lexer_fuel=5 * _FUEL, step_lexer_fuel=_FUEL),
        )
        self._size = language.vocabulary
        if self._matcher.is_error():
            said = self._matcher.get_error().strip().partition("\n")[0]
            raise UsageError(f"the JSON schema cannot be enforced: {said}")

    def constraint(self) -> GrammarConstraint:
        """Return a new constraint that stands at the beginning."""
        return GrammarConstraint(self._matcher.deep_copy(), self._size)


class GrammarConstraint:
    """The engine's `Constraint` of one completion."""

    def __init__(self, matcher: Any, size: int) -> None:
        import numpy as np

        self._matcher = matcher
        self._words = np.zeros((1, (size + 31) // 32), dtype=np.int32)

    def mask(self, logits_V: torch.Tensor) -> None:
        """Set the logits of what the grammar does not allow here to minus infinity."""
        import numpy as np
        import torch

        words = self._words
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        self._check()
        bits = np.unpackbits(words.view(np.uint8), bitorder="little")[: logits_V.shape[-1]]
        refused = torch.from_numpy(bits == 0).to(logits_V.device)
        logits_V.masked_fill_(refused.view_as(logits_V), float("-inf"))

    def accept(self, token: int) -> None:
        """Go on behind a token."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            said = self._matcher.get_error().strip().partition("\n")[0]
            raise UsageError(f"the grammar of the answer cannot go on: {said}")


def _lark(shape: Shape, language: Language) -> str:
    """Return the grammar in llguidance's dialect of Lark."""
    answers = []
    rules = []
    if shape.schema is not None:
        answers.append("json")
        rules.append(f"json: %json {_json(shape.schema, _SPACES)}")
    if shape.tools:
        answers.append("said" if shape.text else "calls")
        calls = {"anyOf": [_call_schema(tool) for tool in shape.tools]}
        more = '("\\n" calls)?' if shape.several else ""
        rules += [
            f"calls: {_mark(CALL, language)} call",
            f'call: "\\n" arguments "\\n" {_mark(END_OF_CALL, language)} {more}',
            f"arguments: %json {_json(calls, _SPACE)}",
        ]
        if shape.text:
            rules += _text_before_calls(language)
    thought = ""
    if shape.in_thought or shape.thinks:
        opening = "" if shape.in_thought else _mark(THINK, language)
        thought = "thought " if shape.in_thought else "thought? "
        rules.append(f"thought: {opening} trace SPACE")
        rules.append("SPACE: /[ \\n]*/")
        if language.single(END_OF_THOUGHT) is None:
            end = END_OF_THOUGHT.replace("/", "\\/")
            rules.append(f"trace[lazy]: /(.|\\n)*{end}/")
        else:
            rules += [f"trace: TRACE {_mark(END_OF_THOUGHT, language)}", "TRACE: /(.|\\n)*/"]
    return "\n".join([f"start: {thought}({' | '.join(answers)})", *rules, ""])


def _mark(text: str, language: Language) -> str:
    token = language.single(text)
    return json.dumps(text) if token is None else f"<[{token}]>"


def _text_before_calls(language: Language) -> list[str]:
    """Return the rules of free text that may end in calls; a mark that is a token is in no text."""
    if language.single(CALL) is not None:
        return ["said: FREE calls?", "FREE: /(.|\\n)*/"]
    return [
        "said: FREE | called call",
        f"FREE: /(.|\\n)*/ & ~/(.|\\n)*{CALL}(.|\\n)*/",
        f"called[lazy]: /(.|\\n)*{CALL}/",
    ]


def _json(schema: Mapping[str, Any] | bool, spaces: str) -> str:
    if isinstance(schema, bool):
        return json.dumps(schema)
    return json.dumps({**schema, "x-guidance": {"whitespace_pattern": spaces}})


def _call_schema(tool: Mapping[str, Any]) -> dict[str, Any]:
    function = tool["function"]
    parameters = function.get("parameters") or {"type": "object"}
    return {
        "type": "object",
        "properties": {"name": {"const": function["name"]}, "arguments": parameters},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }
