"""What the user wrote: TOML layers merged, typed strictly, every value with its source."""

from __future__ import annotations

from flash.spec.model import Spec, spec_from_dict, spec_to_dict, spec_to_toml
from flash.spec.resolve import Resolved, resolve

__all__ = ["Resolved", "Spec", "resolve", "spec_from_dict", "spec_to_dict", "spec_to_toml"]
