"""Dotted paths of the TOML as people write them: `train.lora_rank`, `environment.pip[0]`."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from flash.spec.credentials import looks_like_secret
from flash.suggest import nearest

if TYPE_CHECKING:
    from collections.abc import Iterable

Path = tuple[str | int, ...]
"""Keys of tables and indices of arrays, from the root."""

_BARE = re.compile(r"[A-Za-z0-9_-]+")
_LONGEST_KEY = 60


def dotted(path: Path) -> str:
    """Return the path with keys quoted where TOML would need it and cut where they are endless."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{_key(part)}" if text else _key(part)
    return text


def top_level(path: str) -> str:
    """Return the first key of a dotted path whose first key is one of the spec's own."""
    return re.split(r"[.\[]", path, maxsplit=1)[0]


def _key(part: str) -> str:
    if looks_like_secret(part):
        return "***"
    short = printable(part if len(part) <= _LONGEST_KEY else part[:_LONGEST_KEY] + "…")
    return short if _BARE.fullmatch(short) else json.dumps(short, ensure_ascii=False)


def printable(text: str) -> str:
    """Return text that can be encoded: what a broken file name or argument holds is escaped."""
    return text.encode(errors="backslashreplace").decode()


def suggestion(name: str, allowed: Iterable[str]) -> str:
    """Return the hint for an unknown name: the nearest one where there is one, and all of them."""
    names = sorted(allowed)
    listed = f"allowed: {', '.join(names)}" if names else "none is allowed here"
    near = nearest(name[:_LONGEST_KEY], names)
    return f'did you mean "{near}"? {listed}' if near else listed
