"""What `flash train --dry-run` says of a plan: as JSON for programs, as rows for eyes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import attrs

from flash.spec.layers import leaves
from flash.spec.model import spec_to_dict
from flash.spec.paths import dotted
from flash.spec.toml import toml_value

if TYPE_CHECKING:
    from flash.estimate import Estimate
    from flash.plan import Plan

JSON_KEYS: Final = {
    "spec": "every value it would run with; null where an error keeps it from being complete",
    "sources": "dotted path -> the layer that set the value, `default` or `recipe`",
    "problems": "each with `path`, `message`, `hint`, `severity` (`error` or `warning`) and "
    "`fault` (`spec` or `plugin`); the exit code is 2 with an error among them, or 3 where all "
    "are a plugin's",
    "reasons": "dotted path -> `label`, `reason` and `source` of a value that was decided here",
    "need": "memory, steps and tokens as the algorithm estimates them, or null",
    "offer": "what the first provider with room would rent, or null",
    "estimate": "`hours` and `usd` that it would take, or null, and `basis`: what tells, or why "
    "nothing does; null with an error",
    "rows": "rows to train on, or null where they cannot be counted here",
    "secrets": "names of the secrets that the worker would get",
}


@attrs.frozen
class Row:
    """One value of the resolved spec: where, what, which layer set it, and why if a recipe did."""

    path: str
    value: str
    source: str
    reason: str


def dry_run_json(plan: Plan, estimate: Estimate | None = None) -> dict[str, Any]:
    """
    Return the contract of `--dry-run --json`.

    `spec` is null where an error keeps it from being complete; `sources` and `reasons` go by
    dotted paths.
    """
    return {
        "spec": spec_to_dict(plan.spec) if plan.spec else None,
        "sources": dict(plan.sources),
        "problems": [attrs.asdict(problem) for problem in plan.problems],
        "reasons": {path: attrs.asdict(reason) for path, reason in plan.reasons.items()},
        "need": attrs.asdict(plan.need) if plan.need else None,
        "offer": attrs.asdict(plan.offer) if plan.offer else None,
        "estimate": attrs.asdict(estimate) if estimate else None,
        "rows": plan.rows,
        "secrets": list(plan.secrets),
    }


def dry_run_rows(plan: Plan) -> list[Row]:
    """Return one row a value that is set, in the order of the TOML; none without a spec."""
    if plan.spec is None:
        return []
    data = spec_to_dict(plan.spec)
    rows = []
    for keys in leaves(data):
        path, value = dotted(keys), _at(data, keys)
        # Unset and empty are what a reader expects of a path that is not listed.
        if value in (None, {}, []) and plan.sources.get(path) == "default":
            continue
        reason = plan.reasons.get(path)
        why = f"{reason.reason} ({reason.source})" if reason else ""
        rows.append(Row(path, toml_value(value), plan.sources.get(path, ""), why))
    return rows


def _at(data: Any, keys: tuple[str | int, ...]) -> Any:
    for key in keys:
        data = data[key]
    return data
