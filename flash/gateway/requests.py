"""
What a request may say, and what of it is forwarded.

A field that is not known, or that the model's backend does not honour, is refused and never
dropped: an answer that looks like what was asked and is not costs more than an error. Null counts
as absent. A value that asks for nothing, such as `n = 1`, is honoured by every backend.

Thinking is as the adapter was trained, whatever a request says; only a base model leaves it to
the client. So are stop sequences, where a request has none of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal

import attrs

from flash.gateway import checks
from flash.gateway.checks import fields, flag, integer, not_empty, number, text, wrong
from flash.gateway.errors import ApiError, invalid
from flash.gateway.messages import messages

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from flash.gateway.checks import Check
    from flash.gateway.limits import Limits
    from flash.gateway.routes import Route

Kind = Literal["chat/completions", "completions"]

_LARGEST_ID: Final = (1 << 31) - 1


@attrs.frozen(kw_only=True)
class Asked:
    """
    A request that may be forwarded.

    Attributes:
        body: what the server is asked.
        stream: whether the client wants the answer as it is made.
        streamed: whether the server is asked for a stream.
        tells_usage: whether the client wants the stream to end with what was used.
        choices: how many answers there will be.
        prompts: to so many prompts, the same number to each.
        splits: whether answers may have a thinking trace to be told apart.
        opened: whether the prompt may have opened the trace.

    """

    body: Mapping[str, Any]
    stream: bool
    streamed: bool
    tells_usage: bool
    choices: int
    prompts: int
    splits: bool
    opened: bool


def model_of(body: Mapping[str, Any]) -> str:
    """Return the name of the model that a request is for."""
    name = body.get("model")
    if name is None:
        raise ApiError(
            400,
            "model is missing; GET /v1/models lists what is served",
            param="model",
            code="missing_required_parameter",
        )
    return str(text(name, "model"))


def accept(kind: Kind, body: Mapping[str, Any], route: Route, limits: Limits) -> Asked:
    """Return what is forwarded of a request; raises `ApiError` for what is wrong with it."""
    said = {name: value for name, value in body.items() if value is not None}
    known = _CHAT if kind == "chat/completions" else _COMPLETION
    _refuse_unknown(said, known, kind)
    said = {name: known[name](value, name) for name, value in said.items() if name in known}
    _together(said, kind)
    forwarded = {name: value for name, value in said.items() if name not in _OURS}
    _refuse_dishonoured(forwarded, route)
    forwarded["model"] = route.name
    _bound_tokens(said, forwarded, route, limits)
    if route.stop and "stop" not in said:
        forwarded["stop"] = list(route.stop)
    thinking = _thinking(said, route)
    if thinking is not None and kind == "chat/completions":
        forwarded["chat_template_kwargs"] = {"enable_thinking": thinking}
    streamed = route.streams_tools or "tools" not in said
    if streamed:
        # Tokens are counted as they come, so that an answer that is left is counted too.
        forwarded["stream"] = True
        forwarded["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    prompts = _prompts(said.get("prompt"))
    return Asked(
        body=forwarded,
        stream=said.get("stream", False),
        streamed=streamed,
        tells_usage=said.get("stream_options", {}).get("include_usage", False),
        choices=_bound_choices(said.get("n", 1), prompts, limits),
        prompts=prompts,
        splits=kind == "chat/completions",
        opened=thinking is True and route.opens is not False,
    )


def _refuse_unknown(said: Mapping[str, Any], known: Mapping[str, Check], kind: Kind) -> None:
    for name, value in said.items():
        if name in known:
            continue
        if name in _ELSEWHERE:
            if not _asks_nothing(name, value):
                raise ApiError(
                    400, f"{name}: {_ELSEWHERE[name]}", param=name, code="unsupported_parameter"
                )
        elif name in _CHAT or name in _COMPLETION:
            raise ApiError(
                400, f"{name} is no field of /v1/{kind}", param=name, code="unknown_parameter"
            )
        else:
            raise checks.unknown(name, "", list(known))


def _together(said: dict[str, Any], kind: Kind) -> None:
    """Refuse fields that contradict one another."""
    required = "messages" if kind == "chat/completions" else "prompt"
    if required not in said:
        raise ApiError(
            400, f"{required} is missing", param=required, code="missing_required_parameter"
        )
    both = {said[name] for name in ("max_tokens", "max_completion_tokens") if name in said}
    if len(both) > 1:
        raise invalid(
            "max_tokens and max_completion_tokens name different limits; send one of them",
            "max_tokens",
        )
    if "stream_options" in said and not said.get("stream"):
        raise invalid("stream_options are for a stream; send stream = true", "stream_options")
    if "top_logprobs" in said and not said.get("logprobs"):
        raise invalid("top_logprobs needs logprobs = true", "top_logprobs")
    if said.get("max_tokens") == 0 and not said.get("echo"):
        raise invalid("max_tokens must be at least 1, unless the prompt is echoed", "max_tokens")
    if not said.get("tools"):
        said.pop("tools", None)
        if said.pop("tool_choice", "none") not in ("none", "auto"):
            raise invalid("tool_choice needs tools", "tool_choice")
        said.pop("parallel_tool_calls", None)
    choice = said.get("tool_choice")
    if isinstance(choice, dict):
        chosen = choice["function"]["name"]
        if chosen not in [tool["function"]["name"] for tool in said["tools"]]:
            raise invalid(f"tool_choice names {chosen!r}, which is not in tools", "tool_choice")


def _refuse_dishonoured(forwarded: dict[str, Any], route: Route) -> None:
    """Drop what asks for nothing, and refuse what the backend would not do."""
    for name in [name for name in forwarded if name in _OPTIONAL and name not in route.fields]:
        if not _asks_nothing(name, forwarded[name]):
            raise ApiError(
                400,
                f"{name} is not honoured by {route.backend}, the backend of {route.name}; leave it "
                "out, or deploy to a backend that honours it",
                param=name,
                code="unsupported_parameter",
            )
        del forwarded[name]


def _asks_nothing(name: str, value: Any) -> bool:
    """Say whether the value is one that changes nothing; 0 and false are two."""
    return any(
        value == nothing and isinstance(value, bool) == isinstance(nothing, bool)
        for nothing in _NOTHING.get(name, ())
    )


def _bound_tokens(
    said: Mapping[str, Any], forwarded: dict[str, Any], route: Route, limits: Limits
) -> None:
    most = min(limits.tokens, route.context_tokens)
    asked = said.get("max_tokens", said.get("max_completion_tokens"))
    if asked is None and limits.tokens < route.context_tokens:
        asked = limits.tokens
    if asked is None:
        return
    if asked > most:
        reason = (
            f"{route.name} has a context of {most} tokens"
            if most == route.context_tokens
            else f"`tokens` in [gateway] is {most}"
        )
        name = "max_tokens" if "max_tokens" in said else "max_completion_tokens"
        raise invalid(f"{name} must be at most {most}: {reason}; got {asked}", name)
    forwarded["max_tokens"] = asked


def _bound_choices(each: int, prompts: int, limits: Limits) -> int:
    choices = each * prompts
    if choices > limits.choices:
        many = f"{prompts} prompts with {each} answers each" if prompts > 1 else f"n = {each}"
        raise invalid(
            f"{many}: a request may have {limits.choices} answers at most (`choices` in "
            "[gateway]); send several",
            "n" if each > 1 else "prompt",
        )
    return choices


def _thinking(said: Mapping[str, Any], route: Route) -> bool | None:
    asked: bool | None = said.get("chat_template_kwargs", {}).get("enable_thinking")
    if route.thinking is None:
        return asked
    if asked is not None and asked != route.thinking:
        trained = "with" if route.thinking else "without"
        raise invalid(
            f"{route.name} was trained {trained} thinking, and is served as it was trained; leave "
            "chat_template_kwargs out",
            "chat_template_kwargs",
        )
    return route.thinking


def _prompts(prompt: Any) -> int:
    return len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1


def _prompt(value: Any, path: str) -> Any:
    """Check a prompt, or a list of them; each a text or its tokens."""
    if isinstance(value, str):
        return not_empty(value, path)
    if not isinstance(value, list):
        wrong(value, path, "a text, a list of token ids, or a list of these")
    not_empty(value, path)
    first = value[0]
    if isinstance(first, int) and not isinstance(first, bool):
        return _tokens(value, path)
    one: Callable[[Any, str], Any] = _tokens if isinstance(first, list) else text
    return [not_empty(one(item, f"{path}[{at}]"), f"{path}[{at}]") for at, item in enumerate(value)]


def _tokens(value: Any, path: str) -> Any:
    if not isinstance(value, list):
        wrong(value, path, "a list of token ids")
    for at, token in enumerate(value):
        if type(token) is not int or not 0 <= token <= _LARGEST_ID:
            wrong(token, f"{path}[{at}]", "a token id")
    return value


def _stream_options(value: Any, path: str) -> Any:
    return fields(value, path, {"include_usage": flag})


def _template(value: Any, path: str) -> Any:
    return fields(value, path, {"enable_thinking": flag})


_SAMPLING: Final[dict[str, Check]] = {
    "temperature": number(0, 2),
    "top_p": number(0, 1, above=True),
    "n": integer(1, 1 << 20),
    "seed": integer(-(1 << 63), (1 << 63) - 1),
    "stop": checks.stop,
    "presence_penalty": number(-2, 2),
    "frequency_penalty": number(-2, 2),
    "logit_bias": checks.logit_bias,
    "min_p": number(0, 1),
    "top_k": integer(-1, _LARGEST_ID),
    "user": text,
}
_CHAT_ONLY: Final[dict[str, Check]] = {
    "logprobs": flag,
    "top_logprobs": integer(0, 20),
    "tools": checks.tools,
    "tool_choice": checks.tool_choice,
    "parallel_tool_calls": flag,
    "response_format": checks.response_format,
}
_COMPLETION_ONLY: Final[dict[str, Check]] = {"logprobs": integer(0, 20), "echo": flag}

_OPTIONAL: Final = frozenset({*_SAMPLING, *_CHAT_ONLY, *_COMPLETION_ONLY})
"""What a backend need not honour (`ServingPlugin.fields`)."""

_OURS: Final = frozenset(
    {"max_tokens", "max_completion_tokens", "stream", "stream_options", "chat_template_kwargs"}
)
"""What the gateway says itself to the server."""

_LIMIT: Final = (1 << 63) - 1
_CHAT: Final[dict[str, Check]] = {
    "model": text,
    "messages": messages,
    "max_tokens": integer(1, _LIMIT),
    "max_completion_tokens": integer(1, _LIMIT),
    "stream": flag,
    "stream_options": _stream_options,
    "chat_template_kwargs": _template,
    **_SAMPLING,
    **_CHAT_ONLY,
}
_COMPLETION: Final[dict[str, Check]] = {
    "model": text,
    "prompt": _prompt,
    "max_tokens": integer(0, _LIMIT),
    "stream": flag,
    "stream_options": _stream_options,
    **_SAMPLING,
    **_COMPLETION_ONLY,
}

_NOTHING: Final[dict[str, tuple[Any, ...]]] = {
    "n": (1,),
    "top_p": (1,),
    "min_p": (0,),
    "top_k": (0, -1),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "echo": (False,),
    "stop": ([],),
    "tool_choice": ("none",),
    "parallel_tool_calls": (True,),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "modalities": (["text"],),
    "best_of": (1,),
    "metadata": ({},),
}
"""Values that ask for nothing."""

_ELSEWHERE: Final = {
    "audio": "answers are text here; leave it out",
    "best_of": "no answers are made to be thrown away; send n, and choose",
    "function_call": "send tool_choice instead",
    "functions": "send tools instead",
    "metadata": "requests are not kept here; leave it out",
    "modalities": 'answers are text here; leave it out, or send ["text"]',
    "prediction": "nothing is predicted here; leave it out",
    "prompt_cache_key": "prompts that begin alike are found without it; leave it out",
    "reasoning_effort": "thinking is as it was trained; leave it out",
    "safety_identifier": "requests are not kept here; leave it out",
    "service_tier": "there is one tier here; leave it out",
    "store": "requests are not kept here; leave it out",
    "suffix": "text is only continued at its end here; leave it out",
    "verbosity": "the model was trained to its length; say it in the messages",
    "web_search_options": "nothing is searched here; leave it out",
}
"""Fields of OpenAI's API that no backend of Flash has -> what to do."""
