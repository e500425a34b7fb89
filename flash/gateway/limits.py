"""What a request may ask, and how long anybody may take: `[gateway]` in `config.toml`."""

from __future__ import annotations

import attrs

from flash.fields import setting


@attrs.frozen(kw_only=True)
class Limits:
    """The limits of one gateway; those of requests hold for each key by itself."""

    requests: int = setting(
        128, ge=1, doc="Requests of one key under way at once; one more is answered with 429."
    )
    body_bytes: int = setting(
        4 << 20, ge=1024, doc="Largest body of a request; a larger one is refused unread."
    )
    tokens: int = setting(
        131_072,
        ge=1,
        doc="Most tokens of one answer. It is also what a request gets that names none, where "
        "the model's context is longer.",
    )
    choices: int = setting(
        16, ge=1, doc="Most answers to one request: `n`, times the prompts of a completion."
    )
    silence_s: float = setting(
        600.0,
        gt=0,
        doc="How long a server may say nothing while it is asked, before the request is given up.",
    )
    client_s: float = setting(
        60.0,
        gt=0,
        doc="How long a client may take to send its request, or to read what it is sent, before "
        "it is given up.",
    )
    idle_s: float = setting(
        75.0, gt=0, doc="How long a connection may stay open without a request on it."
    )
    connections: int = setting(
        1024, ge=1, doc="Connections that are open at once; one more is closed as it comes."
    )
    grace_s: float = setting(
        10.0, ge=0, doc="How long requests under way may go on when the gateway is to stop."
    )
