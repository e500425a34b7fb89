"""What a client is told that went wrong, in the shape of OpenAI's API."""

from __future__ import annotations

import http
import json
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

_MOST_SAID: Final = 1000


class ApiError(Exception):
    """
    An answer that is an error: the sentence for people, and what programs tell it by.

    `param` is the field that is wrong, `code` OpenAI's word for it. Nothing of a key or of a
    prompt is ever part of the message.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def content(self) -> dict[str, Any]:
        """Return the body, as an object."""
        ours = self.status >= http.HTTPStatus.INTERNAL_SERVER_ERROR
        kind = "server_error" if ours else _KINDS.get(self.status, "invalid_request_error")
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def body(self) -> bytes:
        """Return the body of an answer."""
        return json.dumps(self.content()).encode()

    def event(self) -> bytes:
        """Return the last event of a stream that has begun."""
        return b"data: %b\n\n" % self.body()


_KINDS: Final = {401: "authentication_error", 429: "rate_limit_error"}


def invalid(message: str, param: str | None = None) -> ApiError:
    """Return the error of a request that says something wrong in the field `param`."""
    return ApiError(400, message, param=param, code="invalid_value")


def unauthorized(*, given: bool) -> ApiError:
    """Return the error of a request whose key is missing, or opens nothing."""
    what = (
        "the key of this request is not known here, or was revoked"
        if given
        else "this request has no key: send the header `Authorization: Bearer KEY`"
    )
    return ApiError(
        401,
        f"{what}; `flash keys` lists the keys of this gateway",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def unknown_model(name: str, listed: str) -> ApiError:
    """Return the error of a request for a model that is not served; `listed` says what is."""
    return ApiError(
        404,
        f"no model {name!r} is served here; {listed}. GET /v1/models lists them, and "
        "`flash deployments` what is on its way",
        param="model",
        code="model_not_found",
    )


def too_large(limit: int) -> ApiError:
    """Return the error of a body of more than `limit` bytes."""
    return ApiError(
        413,
        f"the body has more than {limit} bytes, which is the limit of `body_bytes` in [gateway]",
        code="request_too_large",
    )


def too_many(limit: int) -> ApiError:
    """Return the error of a request that comes while `limit` of its key are under way."""
    return ApiError(
        429,
        f"{limit} requests of this key are under way, and no more are taken at once; "
        "wait for one to end",
        code="rate_limit_exceeded",
        headers={"Retry-After": "1"},
    )


def unavailable(message: str, *, code: str = "server_unavailable") -> ApiError:
    """Return the error of a server that is not there, or has no room, at this moment."""
    return ApiError(503, message, code=code, headers={"Retry-After": "1"})


def broken(message: str, *, status: int = 502) -> ApiError:
    """Return the error of a server that failed at what it was asked."""
    return ApiError(status, message, code="server_failed")


def of_server(status: int, said: bytes) -> ApiError:
    """
    Return for a client what a server answered that is no success.

    What the server refuses is the client's to change, in the server's words. Its key, its address
    and its routes are none of the client's business.
    """
    error = _error_in(said)
    message = str(error.get("message") or "").strip()[:_MOST_SAID] or f"status {status}"
    if status in _THE_CLIENTS:
        param, code = (error.get(name) for name in ("param", "code"))
        return ApiError(
            status,
            message,
            param=param if isinstance(param, str) else None,
            code=code if isinstance(code, str) else None,
        )
    if status in _PASSING:
        return unavailable(f"the model's server has no room at this moment: {message}")
    if status in _OUR_KEY:
        return broken("the model's server does not take the gateway's key")
    return broken(f"the model's server failed: {message}")


def of_stream(event: bytes) -> ApiError:
    """
    Return for a client the error that a server said in the middle of its stream.

    Its status is a number in the error, `status` or `code`, where the server says it.
    """
    error = _error_in(event)
    said = next((error[name] for name in ("status", "code") if type(error.get(name)) is int), None)
    return of_server(said or http.HTTPStatus.INTERNAL_SERVER_ERROR, event)


_THE_CLIENTS: Final = frozenset({400, 404, 413, 422})
_PASSING: Final = frozenset({429, 503})
_OUR_KEY: Final = frozenset({401, 403})


def _error_in(said: bytes) -> Mapping[str, Any]:
    try:
        found = json.loads(said)
    except (ValueError, RecursionError):
        return {"message": said.decode(errors="replace")}
    error = found.get("error", found) if isinstance(found, dict) else found
    return error if isinstance(error, dict) else {"message": error}
