"""The `[provider.local]` table."""

from __future__ import annotations

import attrs


@attrs.frozen
class LocalConfig:
    """Nothing to set: the machine is what it is, and the shell's own variables pick its devices."""
