"""
A model behind an OpenAI-compatible endpoint, as episodes ask it.

    https://api.openai.com/v1#gpt-4.1-mini      an address and, after #, the model's name there
    http://127.0.0.1:8000/v1                    the only model that a local server has

The key travels in a header, over TLS or within this machine, to the address as it was given: no
redirect is followed. A request has a time limit and is repeated, with growing pauses or after those
the server asks for, where the server is busy or gone for a moment. A question that gets no answer
is one episode's error; after several in a row nothing more is asked.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import attrs

from flash.episodes import Answer
from flash.errors import FlashError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from flash.episodes import Question

CONCURRENCY: Final = 8
RETRIES: Final = 4
MOST_BYTES: Final = 16 << 20
_MOST_FAILURES = 5
_TOLD = 8
"""How often at most a batch says how far it is."""
_TRANSIENT = (408, 409, 429, 500, 502, 503, 504)
_OK, _REQUEST_REFUSED = 200, frozenset({400, 413, 422})
_SHOWN = 300
_CAUSES = (
    "Connection refused",
    "Name or service not known",
    "Remote end closed connection",
    "reset by peer",
    "timed out",
)


def is_endpoint(target: str) -> bool:
    """Say whether a target is an address."""
    return target.startswith(("http://", "https://"))


@attrs.frozen
class Endpoint:
    """
    Where to ask: `url` without a slash at its end, and the model's name there.

    `model` is None for the only one that the server has. `key` goes into the header.
    """

    url: str
    model: str | None = None
    key: str | None = attrs.field(default=None, repr=False)

    @classmethod
    def parse(cls, target: str) -> Endpoint:
        """Read `URL#MODEL`; raises `UsageError` for an address that a key must not travel to."""
        try:
            parts = urlsplit(target)
            host, _ = parts.hostname, parts.port
        except ValueError as error:
            raise UsageError(f'"{target}" is no address: {error}') from error
        shown = parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="")
        if not host:
            raise UsageError(f'"{shown.geturl()}" has no host', hint="https://HOST/v1#MODEL")
        if "@" in parts.netloc or parts.query:
            raise UsageError(
                f"{shown.geturl()} was given with a user, a password or a query",
                hint="a key is read from the environment: --key-from NAME",
            )
        if parts.scheme == "http" and not _is_loopback(host):
            raise UsageError(
                f"http://{host} would carry the key and the rows over the network in the clear",
                hint="use https://; http:// is for a server on this machine",
            )
        return cls(parts._replace(fragment="").geturl().rstrip("/"), parts.fragment or None)

    @property
    def local(self) -> bool:
        """Whether it is on this machine."""
        return _is_loopback(urlsplit(self.url).hostname or "")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@attrs.frozen
class Limits:
    """How long to wait: for one answer, and before a request is repeated."""

    answer_s: float = 600
    connect_s: float = 10
    backoff_s: float = 0.5


class ServedModel:
    """
    Asks the endpoint, several questions at a time; the `Model` that episodes are played with.

    Attributes:
        name: the model's name at the server.
        tokens: sampled so far, as the server counts them.
        seconds: that passed while it was asked.

    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        max_tokens: int,
        temperature: float,
        progress: Callable[[str], None] = lambda _: None,
        limits: Limits | None = None,
    ) -> None:
        """Raises `FlashError` where the model's name must be asked for and cannot be had."""
        self._endpoint = endpoint
        self._limits = limits or Limits()
        self._session = _session(endpoint, self._limits)
        self._max_tokens = max_tokens
        self._temperature = temperature
        self._budget_key = "max_tokens"
        self._progress = progress
        self._failures: list[str] = []
        self.tokens = 0
        self.seconds = 0.0
        self.name = endpoint.model or self._only_model()

    def __call__(self, questions: Sequence[Question], /) -> Iterator[tuple[int, Answer]]:
        """Yield each question's place and answer as they come, or why there is none."""
        started = time.monotonic()
        pool = ThreadPoolExecutor(CONCURRENCY, "flash-ask")
        try:
            asked = {pool.submit(self._ask, one): place for place, one in enumerate(questions)}
            for done, future in enumerate(as_completed(asked), 1):
                answer = future.result()
                if done * _TOLD // len(asked) > (done - 1) * _TOLD // len(asked):
                    self._progress(f"sampled {done} of {len(asked)} answers")
                yield asked[future], answer
        finally:
            # What is still on its way is of no use, and may take as long as the limit allows.
            pool.shutdown(wait=False, cancel_futures=True)
            self.seconds += time.monotonic() - started

    def _ask(self, question: Question) -> Answer:
        if len(self._failures) >= _MOST_FAILURES:
            return Answer("", error=f"not asked after {_MOST_FAILURES} failures: {self._last()}")
        body: dict[str, Any] = {
            "model": self.name,
            "messages": list(question.messages),
            "temperature": self._temperature,
            self._budget_key: self._max_tokens,
        }
        if question.tools:
            body["tools"] = question.tools
        if self._temperature:
            digest = hashlib.sha256(question.stream.encode()).digest()
            body["seed"] = int.from_bytes(digest[:4]) >> 1  # servers take 31 bits
        try:
            status, content = self._call("POST", "chat/completions", body)
        except _NoAnswer as failure:
            self._failures.append(str(failure))
            return Answer("", error=str(failure))
        said = _error_text(content)
        if status in _REQUEST_REFUSED:
            if "max_completion_tokens" in said and "max_tokens" in body:
                self._budget_key = "max_completion_tokens"  # what newer models of OpenAI call it
                return self._ask(question)
            return Answer("", error=f"the server refused the request ({status}): {said}")
        if status != _OK:
            raise self._refusal(status, said)
        self._failures.clear()
        return self._read(content)

    def _read(self, content: bytes) -> Answer:
        try:
            body = json.loads(content)
            choice = body["choices"][0]
            text = _text(choice["message"])
            tokens = (body.get("usage") or {}).get("completion_tokens") or 0
            reason = choice.get("finish_reason")
            self.tokens += int(tokens)
        except (ValueError, LookupError, TypeError, AttributeError):
            shown = content[:_SHOWN].decode("utf-8", "replace")
            return Answer("", error=f"the server's answer is no chat completion: {shown}")
        if reason == "content_filter":
            return Answer("", error="the server withheld the answer (content_filter)")
        return Answer(text, truncated=reason == "length")

    def _only_model(self) -> str:
        hint = f"name it: {self._endpoint.url}#MODEL"
        try:
            status, content = self._call("GET", "models")
        except _NoAnswer as failure:
            raise FlashError(str(failure), hint="is the server up?") from None
        if status != _OK:
            raise self._refusal(status, _error_text(content))
        try:
            names = [str(model["id"]) for model in json.loads(content)["data"]]
        except (ValueError, LookupError, TypeError):
            raise FlashError(f"{self._endpoint.url} does not list its models", hint=hint) from None
        if len(names) != 1:
            listed = ", ".join(names[:_MOST_FAILURES]) or "none"
            raise UsageError(f"{self._endpoint.url} has {len(names)} models: {listed}", hint=hint)
        return names[0]

    def _call(self, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        """Return status and body of a final answer; raises `_NoAnswer` where there is none."""
        import requests

        url, limits = f"{self._endpoint.url}/{path}", self._limits
        deadline = time.monotonic() + limits.answer_s
        try:
            with self._session.request(
                method,
                url,
                json=body,
                stream=True,
                allow_redirects=False,
                timeout=(limits.connect_s, limits.answer_s),
            ) as response:
                content = bytearray()
                for chunk in response.iter_content(1 << 16):
                    content += chunk
                    if len(content) > MOST_BYTES:
                        raise _NoAnswer(f"{url} answered with more than {MOST_BYTES >> 20} MiB")
                    if time.monotonic() > deadline:
                        raise _NoAnswer(f"{url} took longer than {limits.answer_s:g} s")
        except (requests.RequestException, OSError) as error:
            raise _NoAnswer(f"{url} does not answer: {_reason(error)}") from None
        if response.status_code in _TRANSIENT:
            said = _error_text(content)
            raise _NoAnswer(f"{url} answered {response.status_code} {RETRIES + 1} times: {said}")
        return response.status_code, bytes(content)

    def _refusal(self, status: int, said: str) -> FlashError:
        """Return what no other question would get an answer to either."""
        url = self._endpoint.url
        if status in {401, 403}:
            with_key = "the key" if self._endpoint.key else "a request without a key"
            hint = "the key is the value of OPENAI_API_KEY, or of the name after --key-from"
            return FlashError(f"{url} refuses {with_key} ({status}): {said}", hint=hint)
        hint = "the address mostly ends in /v1, and the model's name stands after a #"
        return FlashError(f"{url} answered {status}: {said}", hint=hint)

    def _last(self) -> str:
        return self._failures[-1] if self._failures else ""


class _NoAnswer(Exception):
    """A request that got no final answer, after all its repeats."""


def _session(endpoint: Endpoint, limits: Limits) -> Any:
    from requests.adapters import HTTPAdapter

    from flash.spec.secrets import Redactor
    from flash.transport import PatientRetry, PluginSession

    session = PluginSession(Redactor([endpoint.key] if endpoint.key else []).redact)
    session.trust_env = not endpoint.local  # no proxy between this machine and itself
    if endpoint.key:
        session.headers["Authorization"] = f"Bearer {endpoint.key}"
    # Asking twice costs twice and changes nothing, unlike most POST requests.
    retry = PatientRetry(
        total=RETRIES,
        read=1,
        allowed_methods=None,
        status_forcelist=_TRANSIENT,
        backoff_factor=limits.backoff_s,
        raise_on_status=False,
    )
    session.mount(endpoint.url, HTTPAdapter(max_retries=retry, pool_maxsize=CONCURRENCY))
    return session


def _text(message: dict[str, Any]) -> str:
    """Return what a model of this process would have written: trace, answer, tool calls."""
    content = message.get("content") or ""
    if isinstance(content, list):
        content = "".join(part.get("text") or "" for part in content)
    thinking = message.get("reasoning_content") or message.get("reasoning")
    calls = [
        {"name": call["function"]["name"], "arguments": json.loads(call["function"]["arguments"])}
        for call in message.get("tool_calls") or ()
    ]
    return (
        (f"<think>{thinking}</think>" if thinking else "")
        + str(content)
        + "".join(f"\n<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in calls)
    )


def _error_text(content: bytes | bytearray) -> str:
    """Return the server's own word on an error, or the start of what it sent."""
    text = content[: 4 * _SHOWN].decode("utf-8", "replace")
    try:
        said = json.loads(content)["error"]
        text = said["message"] if isinstance(said, dict) else said
    except (ValueError, LookupError, TypeError):
        pass
    return str(text)[:_SHOWN].strip() or "nothing"


def _reason(error: BaseException) -> str:
    """Return the innermost cause in few words; requests wraps it several times over."""
    text = str(error)
    for known in _CAUSES:
        if known in text:
            return known
    return text[:_SHOWN]
