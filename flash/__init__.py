"""
Flash: one TOML and one environment become a trained LoRA adapter.

Importing this package imports nothing heavy; `hookimpl` is resolved on first use so that
`flash --version` does not pay for pluggy.
"""

from __future__ import annotations

# Type checkers take this name for true; importing `typing` for it is a third of `flash --help`.
TYPE_CHECKING = False

__version__ = "0.1.0"

if TYPE_CHECKING:
    from typing import Any

    from pluggy import HookimplMarker

    hookimpl: HookimplMarker

__all__ = ["__version__", "hookimpl"]


def __getattr__(name: str) -> Any:
    if name == "hookimpl":
        from pluggy import HookimplMarker

        return HookimplMarker("flash")
    msg = f"module 'flash' has no attribute {name!r}"
    raise AttributeError(msg)
