"""What requests used: one row a request, written before its end goes out."""

from __future__ import annotations

from typing import Literal

import attrs

Status = Literal["ok", "aborted", "failed"]
"""Answered; left by the client before its end; ended by the server's failure."""


@attrs.frozen(kw_only=True)
class UsageRow:
    """
    What one request used.

    Attributes:
        request: its id, made by the gateway: a row that is written twice counts once.
        time_s: when it came.
        deployment: the model name asked for: a deployment's id, or a base model's.
        base: the base model's id.
        key: the id of the key it came with.
        prompt_tokens: read by the model, with the `cached_tokens` among them.
        cached_tokens: which the server had from an earlier request.
        completion_tokens: that were generated, as far as the server told.
        status: how it ended.

    """

    request: str
    time_s: float
    deployment: str
    base: str
    key: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    status: Status
