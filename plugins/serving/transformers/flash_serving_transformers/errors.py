"""What goes wrong with a request, in OpenAI's shape."""

from __future__ import annotations

from typing import Any

import attrs


class Refused(Exception):
    """A request that gets an answer of this status instead of the one it wanted."""

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code
        self.status = status

    @property
    def body(self) -> dict[str, Any]:
        """The answer."""
        return error_body(self.message, status=self.status, param=self.param, code=self.code)


@attrs.frozen
class _Kind:
    type: str
    code: str | None = None


_KINDS = {
    401: _Kind("authentication_error", "invalid_api_key"),
    404: _Kind("not_found_error"),
    413: _Kind("invalid_request_error", "request_too_large"),
}


def error_body(
    message: str, *, status: int, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """Return an error as OpenAI's clients read it."""
    server = _Kind("server_error") if status >= 500 else _Kind("invalid_request_error")  # noqa: PLR2004 - HTTP's own border
    kind = _KINDS.get(status, server)
    said = {"message": message, "type": kind.type, "param": param, "code": code or kind.code}
    return {"error": said}


def failure(error: Exception) -> Refused:
    """Return what to answer where the engine could not go on."""
    import torch

    from flash.errors import FlashError, UsageError

    if isinstance(error, Refused):
        return error
    if isinstance(error, UsageError):
        return Refused(error.message)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error):
        return Refused(
            "the server's memory is full: send fewer requests at a time, or shorter ones",
            status=503,
            code="out_of_memory",
        )
    said = error.message if isinstance(error, FlashError) else f"{type(error).__name__}: {error}"
    return Refused(f"the server failed: {said}", status=500)
