"""What the doctor says: findings, each with its fix, and the verdict that follows from them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import attrs

if TYPE_CHECKING:
    from collections.abc import Sequence

Level = Literal["fail", "warn", "note"]
Verdict = Literal["PASS", "WARN", "FAIL"]


@attrs.frozen
class Finding:
    """
    One thing that was found.

    `fail`: training on this would be wasted. `warn`: something to look at first. `note`: what was
    not looked at, or is good to know; it changes no verdict.
    """

    level: Level
    check: str
    message: str
    fix: str

    def as_dict(self) -> dict[str, Any]:
        """Return it as `--json` prints it."""
        return attrs.asdict(self)


def verdict(findings: Sequence[Finding]) -> Verdict:
    """Return the verdict: that of the worst finding."""
    levels = {finding.level for finding in findings}
    return "FAIL" if "fail" in levels else "WARN" if "warn" in levels else "PASS"


def in_order(findings: Sequence[Finding]) -> list[Finding]:
    """Return the worst first, and otherwise in the order of the checks."""
    order: list[Level] = ["fail", "warn", "note"]
    return sorted(findings, key=lambda finding: order.index(finding.level))
