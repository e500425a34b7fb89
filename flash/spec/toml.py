"""Plain data as TOML text."""

from __future__ import annotations

from typing import Any


def toml_value(value: Any) -> str:
    """Return one value in a single line."""
    import tomli_w

    if isinstance(value, dict):
        entries = ", ".join(f"{_key(key)} = {toml_value(item)}" for key, item in value.items())
        return f"{{ {entries} }}" if entries else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    return tomli_w.dumps({"v": value}).removeprefix("v = ").rstrip("\n")


def toml_document(data: dict[str, Any]) -> str:
    """Return a whole file; what is None is left out, because TOML has no word for it."""
    import tomli_w

    return tomli_w.dumps(_without_none(data))


def _key(key: str) -> str:
    import tomli_w

    return tomli_w.dumps({key: 0}).removesuffix(" = 0\n")


def _without_none(table: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(value) if isinstance(value, dict) else value
        for key, value in table.items()
        if value is not None
    }
