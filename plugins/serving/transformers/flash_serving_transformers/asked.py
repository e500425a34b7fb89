"""
What a request says, read strictly: each field's type and range, and no field that is not known.

Readers take the whole body and give back what `chat` and `completion` work with. Everything that
is wrong raises `Refused` with the field's name.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs

from flash_serving_transformers.errors import Refused

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

MOST_CHOICES: Final = 128
MOST_TOP: Final = 20
_MOST_STOPS: Final = 64
_LONGEST_STOP: Final = 1024
_SEEDS: Final = 2**63
_COLDEST: Final = 1e-5

_COMMON: Final = frozenset(
    {
        "frequency_penalty",
        "logit_bias",
        "logprobs",
        "max_tokens",
        "min_p",
        "model",
        "n",
        "presence_penalty",
        "seed",
        "stop",
        "stream",
        "stream_options",
        "temperature",
        "top_k",
        "top_p",
        "user",
    }
)
_CHAT: Final = _COMMON | {
    "chat_template_kwargs",
    "max_completion_tokens",
    "messages",
    "parallel_tool_calls",
    "response_format",
    "tool_choice",
    "tools",
    "top_logprobs",
}
_COMPLETION: Final = _COMMON | {"echo", "prompt"}


@attrs.frozen(kw_only=True)
class Sampling:
    """How tokens are drawn, in the engine's words."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]


@attrs.frozen(kw_only=True)
class Asked:
    """What both kinds of requests say; `top` is how many likeliest tokens, None for none at all."""

    model: str
    sampling: Sampling
    max_tokens: int | None
    n: int
    seed: int | None
    stop: Sequence[str]
    top: int | None
    stream: bool
    usage_at_end: bool
    usage_always: bool


@attrs.frozen(kw_only=True)
class ChatAsked:
    """`POST /v1/chat/completions`; `schema` is that of `response_format`, None for any text."""

    common: Asked
    messages: Sequence[Any]
    tools: Sequence[Mapping[str, Any]]
    tool_choice: str
    """`auto`, `none`, `required`; a tool that is named is the only one of `callable`."""
    callable: Sequence[Mapping[str, Any]]
    parallel: bool
    schema: Mapping[str, Any] | bool | None
    thinking: bool | None


@attrs.frozen(kw_only=True)
class CompletionAsked:
    """`POST /v1/completions`; each prompt is text or tokens."""

    common: Asked
    prompts: Sequence[str | Sequence[int]]
    echo: bool


def read_chat(body: Any) -> ChatAsked:
    """Read the body of a chat request."""
    fields = _Fields(body, _CHAT)
    wants_log_probs = fields.flag("logprobs", default=False)
    top = fields.whole("top_logprobs", None, least=0, most=MOST_TOP)
    if top is not None and not wants_log_probs:
        raise Refused("top_logprobs needs logprobs = true", param="top_logprobs")
    limits = [
        one
        for name in ("max_completion_tokens", "max_tokens")
        if (one := fields.whole(name, None, least=1)) is not None
    ]
    tools = _tools(fields)
    choice, may_call = _tool_choice(fields, tools)
    return ChatAsked(
        common=_common(
            fields, limits[0] if limits else None, (top or 0) if wants_log_probs else None
        ),
        messages=_messages(fields),
        tools=tools,
        tool_choice=choice,
        callable=may_call,
        parallel=fields.flag("parallel_tool_calls", default=True),
        schema=_schema(fields),
        thinking=_thinking(fields),
    )


def read_completion(body: Any) -> CompletionAsked:
    """Read the body of a completion request."""
    fields = _Fields(body, _COMPLETION)
    echo = fields.flag("echo", default=False)
    top = fields.whole("logprobs", None, least=0, most=MOST_TOP)
    if echo and top:
        raise Refused(
            "with echo, logprobs can only be 0: the likeliest other tokens of a prompt are not "
            "known",
            param="logprobs",
        )
    limit = fields.whole("max_tokens", 16, least=0 if echo else 1)
    asked = CompletionAsked(common=_common(fields, limit, top), prompts=_prompts(fields), echo=echo)
    if len(asked.prompts) * asked.common.n > MOST_CHOICES:
        raise Refused(f"prompts times n must be at most {MOST_CHOICES}", param="prompt")
    return asked


def read_tokens(body: Any) -> tuple[str, list[Any], list[Mapping[str, Any]], bool]:
    """Read what is asked of `/flash/tokens`: model, messages, tools and thinking."""
    fields = _Fields(body, frozenset({"model", "messages", "tools", "thinking"}))
    thinking = fields.flag("thinking", default=False)
    return fields.needed("model"), _messages(fields), _tools(fields), thinking


def read_scored(body: Any) -> tuple[str, list[int], list[int]]:
    """Read what is asked of `/flash/log_probs`: model, and the tokens of prompt and completion."""
    fields = _Fields(body, frozenset({"model", "prompt", "completion"}))
    prompt, completion = fields.get("prompt"), fields.get("completion")
    if not (_are_tokens(prompt) and prompt):
        raise Refused("prompt must be a list of token ids that is not empty", param="prompt")
    if not _are_tokens(completion):
        raise Refused("completion must be a list of token ids", param="completion")
    return fields.needed("model"), prompt, completion


def read_adapter(body: Any) -> tuple[str, Path]:
    """Read which adapter is to be loaded: its name and its folder."""
    fields = _Fields(body, frozenset({"name", "folder"}))
    return fields.needed("name"), Path(fields.needed("folder"))


def read_name(body: Any) -> str:
    """Read which adapter is to be unloaded."""
    return _Fields(body, frozenset({"name"})).needed("name")


class _Fields:
    """The fields of a body; null is as good as absent."""

    def __init__(self, body: Any, known: frozenset[str]) -> None:
        if not isinstance(body, dict):
            raise Refused("the body must be a JSON object")
        unknown = sorted(body.keys() - known)
        if unknown:
            raise Refused(f"unknown field: {unknown[0]!r}", param=unknown[0])
        self._found = {name: value for name, value in body.items() if value is not None}

    def get(self, name: str, default: Any = None) -> Any:
        return self._found.get(name, default)

    def flag(self, name: str, *, default: bool) -> bool:
        value = self._found.get(name, default)
        if not isinstance(value, bool):
            raise Refused(f"{name} must be true or false", param=name)
        return value

    def text(self, name: str) -> str | None:
        value = self._found.get(name)
        if value is not None and not isinstance(value, str):
            raise Refused(f"{name} must be a string", param=name)
        return value

    def needed(self, name: str) -> str:
        value = self.text(name)
        if not value:
            raise Refused(f"{name} is missing", param=name)
        return value

    def whole(
        self, name: str, default: int | None, *, least: int, most: int | None = None
    ) -> int | None:
        value = self._found.get(name, default)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool):
            raise Refused(f"{name} must be an integer", param=name)
        if value < least or (most is not None and value > most):
            bounds = f"at least {least}" if most is None else f"from {least} to {most}"
            raise Refused(f"{name} must be {bounds}", param=name)
        return value

    def number(self, name: str, default: float, *, least: float, most: float) -> float:
        value = self._found.get(name, default)
        return _number(name, value, least=least, most=most)


def _number(name: str, value: Any, *, least: float, most: float) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise Refused(f"{name} must be a number", param=name)
    if not least <= value <= most:  # NaN is in no range
        raise Refused(f"{name} must be from {least:g} to {most:g}", param=name)
    return float(value)


def _common(fields: _Fields, max_tokens: int | None, top: int | None) -> Asked:
    model = fields.needed("model")
    fields.text("user")
    top_p = fields.number("top_p", 1.0, least=0, most=1)
    top_k = fields.whole("top_k", 0, least=-1) or 0
    options = fields.get("stream_options", {})
    known = {"include_usage", "continuous_usage_stats", "include_obfuscation"}
    if not isinstance(options, dict) or not all(
        name in known and isinstance(value, bool) for name, value in options.items()
    ):
        raise Refused(
            f"stream_options may have {', '.join(sorted(known))}, each true or false",
            param="stream_options",
        )
    stream = fields.flag("stream", default=False)
    if options and not stream:
        raise Refused("stream_options needs stream = true", param="stream_options")
    temperature = fields.number("temperature", 1.0, least=0, most=2)
    sampling = Sampling(
        # So close to 0 it is 0; logits divided by less would be no numbers.
        temperature=temperature if temperature > _COLDEST else 0.0,
        # Nothing at all cannot be kept: like 0 elsewhere, it keeps the likeliest token.
        top_p=max(top_p, math.ulp(0.0)),
        top_k=max(top_k, 0),
        min_p=fields.number("min_p", 0.0, least=0, most=1),
        presence_penalty=fields.number("presence_penalty", 0.0, least=-2, most=2),
        frequency_penalty=fields.number("frequency_penalty", 0.0, least=-2, most=2),
        logit_bias=_logit_bias(fields),
    )
    return Asked(
        model=model,
        sampling=sampling,
        max_tokens=max_tokens,
        n=fields.whole("n", 1, least=1, most=MOST_CHOICES) or 1,
        seed=fields.whole("seed", None, least=-_SEEDS, most=_SEEDS - 1),
        stop=_stop(fields),
        top=top,
        stream=stream,
        usage_at_end=options.get("include_usage", False),
        usage_always=options.get("continuous_usage_stats", False),
    )


def _logit_bias(fields: _Fields) -> dict[int, float]:
    bias = fields.get("logit_bias", {})
    if not isinstance(bias, dict):
        raise Refused("logit_bias must be an object of tokens and numbers", param="logit_bias")
    if not all(name.isascii() and name.isdigit() and len(name) < 10 for name in bias):  # noqa: PLR2004 - what any vocabulary holds
        raise Refused("logit_bias must name tokens by their ids", param="logit_bias")
    return {
        int(name): _number("logit_bias", value, least=-100, most=100)
        for name, value in bias.items()
    }


def _stop(fields: _Fields) -> list[str]:
    stop = fields.get("stop", [])
    several = [stop] if isinstance(stop, str) else stop
    if (
        not isinstance(several, list)
        or len(several) > _MOST_STOPS
        or not all(isinstance(one, str) and 0 < len(one) <= _LONGEST_STOP for one in several)
    ):
        raise Refused(
            f"stop must be a string or a list of up to {_MOST_STOPS} of them, none empty or of "
            f"more than {_LONGEST_STOP} characters",
            param="stop",
        )
    return several


def _messages(fields: _Fields) -> list[Any]:
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refused("messages must be a list that is not empty", param="messages")
    for place, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            where = f"messages[{place}]"
            raise Refused(f"{where} must be an object with a role", param=where)
        _check_content(message, f"messages[{place}]")
    return messages


def _check_content(message: Mapping[str, Any], where: str) -> None:
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    if not isinstance(content, str | list | None) or not all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts
    ):
        raise Refused(
            f"{where}.content must be a string or a list of text parts", param=f"{where}.content"
        )
    calls = message.get("tool_calls")
    if calls is not None and not (
        isinstance(calls, list)
        and all(isinstance(one, dict) and isinstance(one.get("function"), dict) for one in calls)
    ):
        raise Refused(f"{where}.tool_calls must be a list of calls", param=f"{where}.tool_calls")


def _tools(fields: _Fields) -> list[Mapping[str, Any]]:
    tools: list[Mapping[str, Any]] = fields.get("tools", [])
    good = isinstance(tools, list) and all(
        isinstance(tool, dict)
        and tool.get("type") == "function"
        and isinstance(tool.get("function"), dict)
        and isinstance(tool["function"].get("name"), str)
        and isinstance(tool["function"].get("parameters") or {}, dict)
        for tool in tools
    )
    if not good:
        raise Refused(
            "tools must be a list of functions, each with a name and parameters", param="tools"
        )
    return tools


def _tool_choice(
    fields: _Fields, tools: Sequence[Mapping[str, Any]]
) -> tuple[str, Sequence[Mapping[str, Any]]]:
    choice = fields.get("tool_choice")
    if choice is None:
        return "auto" if tools else "none", tools
    if choice in ("none", "auto"):
        return choice if tools else "none", tools
    if choice == "required" and tools:
        return choice, tools
    if isinstance(choice, dict) and choice.get("type") == "function":
        function = choice.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        named = [tool for tool in tools if tool["function"]["name"] == name]
        if named:
            return "required", named
        raise Refused(f"tool_choice names {name!r}, which is not among tools", param="tool_choice")
    raise Refused(
        "tool_choice must be none, auto, required or a function of tools", param="tool_choice"
    )


def _schema(fields: _Fields) -> Mapping[str, Any] | bool | None:
    wanted = fields.get("response_format")
    kind = wanted.get("type") if isinstance(wanted, dict) else None
    if wanted is None or kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    said = wanted.get("json_schema") if kind == "json_schema" else None
    schema = said.get("schema") if isinstance(said, dict) else None
    if not isinstance(schema, dict | bool):
        raise Refused(
            "response_format must be of the type text, json_object, or json_schema with a schema",
            param="response_format",
        )
    return schema


def _thinking(fields: _Fields) -> bool | None:
    given = fields.get("chat_template_kwargs", {})
    if not isinstance(given, dict) or given.keys() - {"enable_thinking"}:
        raise Refused("chat_template_kwargs may have enable_thinking", param="chat_template_kwargs")
    thinking = given.get("enable_thinking")
    if not isinstance(thinking, bool | None):
        raise Refused("enable_thinking must be true or false", param="chat_template_kwargs")
    return thinking


def _prompts(fields: _Fields) -> list[str | list[int]]:
    prompt = fields.get("prompt")
    several = prompt if isinstance(prompt, list) and not _are_tokens(prompt) else [prompt]
    if not several or not all(
        (isinstance(one, str) and one) or (_are_tokens(one) and one) for one in several
    ):
        raise Refused(
            "prompt must be text or token ids, or a list of such prompts, none empty",
            param="prompt",
        )
    return several


def _are_tokens(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in value
    )
