"""Who a bearer key is."""

from __future__ import annotations

import attrs


@attrs.frozen(kw_only=True)
class KeyRow:
    """
    A key as it is kept: never itself, only the SHA-256 of it, in hex.

    `id` is what usage, logs and listings call it; one that is `revoked` answers for nobody.
    """

    id: str
    hash: str = attrs.field(repr=False)
    revoked: bool = False
