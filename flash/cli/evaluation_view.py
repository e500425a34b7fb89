"""How an evaluation, and the difference of two, look to people."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from flash.cli.output import out, warn
from flash.errors import FlashError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_SHOWN_ERRORS = 3
_COLOURS = {"better": "green", "worse": "red"}


def show_evaluation(result: Mapping[str, Any]) -> None:
    """Print the numbers of a split and of each suite."""
    if result["n"]:
        _show_numbers(result, f"rows of {result['split']}", result)
    for name, suite in result["suites"].items():
        _show_numbers(suite, f"rows of the suite {name}", result)
    parts = [f"{result['seconds']:.1f} s"]
    if result["tokens_per_s"]:
        parts.append(f"{result['tokens_per_s']:.0f} tokens/s sampled")
    if result["evaluation"]:
        parts.append(f"kept as {result['evaluation']}")
    out(", ".join(parts), dim=True)


def _show_numbers(numbers: Mapping[str, Any], what: str, settings: Mapping[str, Any]) -> None:
    if not numbers["n"]:
        out(f"no score of the {what}")
        return
    samples = settings["samples"]
    drawn = f", {samples} answers each at temperature {settings['temperature']:g}"
    low, high = numbers["interval"]
    out(
        f"success  {numbers['success']:.1%}  (95 %: {low:.1%} to {high:.1%})  "
        f"of {numbers['n']} {what}{drawn if samples > 1 else ''}",
        bold=True,
    )
    between = ""
    if numbers["mean_interval"]:
        low, high = numbers["mean_interval"]
        between = f"  (95 %: {low:.3f} to {high:.3f})"
    out(f"mean     {numbers['mean']:.3f}{between}")
    if numbers["pass_at"]:
        out("pass@k   " + "  ".join(f"{k}: {rate:.1%}" for k, rate in numbers["pass_at"].items()))
    width = max((len(name) for name in numbers["metrics"]), default=0)
    for name, value in numbers["metrics"].items():
        out(f"  {name:<{width}}  {value:.3f}")


def show_difference(before: Mapping[str, Any], difference: Mapping[str, Any]) -> None:
    """Print what the newer evaluation gained over `before`: the verdict first."""
    kept = f" ({before['evaluation']})" if before["evaluation"] else ""
    whom = f"{before['target']}{kept}"
    if difference["verdict"]:
        _show_gain(difference, whom)
    for name, suite in difference["suites"].items():
        _show_gain(suite, whom, f"suite {name}: ")
    for sentence in difference["notes"]:
        warn(f"compared with {whom}, {sentence}")


def _show_gain(difference: Mapping[str, Any], whom: str, prefix: str = "") -> None:
    verdict = difference["verdict"]
    if verdict is None:
        out(f"{prefix}no row that both have scored")
        return
    link = "than" if verdict in _COLOURS else "against"
    out(f"{prefix}{verdict} {link} {whom}", bold=True, fg=_COLOURS.get(verdict))
    for line in _gains(difference):
        out(f"  {line}")
    opposite = {"better": "worse", "worse": "better"}
    for name in ("mean", "success"):
        if difference[name]["verdict"] == opposite.get(verdict):
            label = "mean score" if name == "mean" else "success rate"
            warn(f"the {label} alone is {difference[name]['verdict']}")
    if difference["left_out"]:
        warn(f"{difference['left_out']} rows that only one of the two has scored are left out")


def _gains(difference: Mapping[str, Any]) -> Iterator[str]:
    success, mean = difference["success"], difference["mean"]
    yield (
        f"success  {success['before']:.1%} to {success['after']:.1%}, "
        f"{_between(success, '{:+.1%}')} over {difference['n']} rows"
    )
    yield (
        f"mean     {mean['before']:.3f} to {mean['after']:.3f}, "
        f"{_between(mean, '{:+.3f}')}; {difference['up']} rows up, {difference['same']} the same, "
        f"{difference['down']} down"
    )
    width = max((len(name) for name in difference["metrics"]), default=0)
    for name, (old, new) in difference["metrics"].items():
        yield f"  {name:<{width}}  {old:.3f} to {new:.3f}"


def _between(gain: Mapping[str, Any], form: str) -> str:
    if not math.isfinite(gain["low"]):
        return f"{form.format(gain['gain'])} (too few rows for an interval)"
    ends = f"{form.format(gain['low'])} to {form.format(gain['high'])}"
    return f"{form.format(gain['gain'])} (95 %: {ends})"


def refuse_without_scores(result: Mapping[str, Any]) -> None:
    """Raise `FlashError` where nothing was scored, with the first reason."""
    sets = [result, *result["suites"].values()]
    if not any(one["n"] for one in sets):
        reasons = (row["error"] for one in sets for row in one["rows"] if row["error"])
        reason = next(reasons, "the split has no rows")
        raise FlashError(f"no row could be scored: {reason}")


def complain(result: Mapping[str, Any]) -> None:
    """Say what the numbers leave out."""
    sets = [result, *result["suites"].values()]
    truncated = sum(one["truncated"] for one in sets)
    if truncated:
        warn(
            f"{truncated} answers were cut at {result['max_tokens']} tokens",
            hint="if they should be longer: --max-tokens",
        )
    failures = [row for one in sets for row in one["rows"] if row["error"]]
    if failures:
        shown = "; ".join(f"{row['id']}: {row['error']}" for row in failures[:_SHOWN_ERRORS])
        warn(f"{len(failures)} answers could not be scored and are left out: {shown}")
