"""
Whether one evaluation is better than another, row by row of the same tasks.

The verdict is that of the mean score; where every score is 0 or 1 and says what success says, it is
that of the success rate, whose interval holds for few rows too. Evaluations that other code or
other rows have scored are not compared.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any, Final

import attrs

from flash.evaluate import by_row, count_of
from flash.statistics import paired_mean, paired_success

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from flash.statistics import Difference

BETTER: Final = "better"
WORSE: Final = "worse"
NO_CHANGE: Final = "no change beyond noise"

_SCORED_BY = {
    "digest": "versions of the environment",
    "params": "[environment.params]",
    "reward": "[reward.*] tables",
    "split": "splits",
}
_SETTINGS = ("samples", "temperature", "max_tokens", "thinking")


@attrs.frozen
class _Pair:
    """The scored answers of both evaluations to one task."""

    before: Sequence[Mapping[str, Any]]
    after: Sequence[Mapping[str, Any]]


def incomparable(before: Mapping[str, Any], after: Mapping[str, Any]) -> str | None:
    """Return why the scores of two evaluations do not mean the same, or None."""
    for key, name in _SCORED_BY.items():
        if before[key] != after[key]:
            sides = " and ".join(_shown(one[key]) for one in (before, after))
            return f"they were scored with different {name}: {sides}"
    return None


def drawn_alike(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Say whether the answers of two evaluations were drawn with the same settings."""
    return all(before[name] == after[name] for name in _SETTINGS)


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """
    Return what `after` gained over `before`, for which `incomparable` has nothing to say.

    See `compare_rows`; its `verdict` is None where no row is in both. `suites` has the same of each
    suite that both ran, and `notes` says in sentences what else the two differ in.
    """
    both = [name for name in after["suites"] if name in before["suites"]]
    return compare_rows(before["rows"], after["rows"]) | {
        "suites": {
            name: compare_rows(before["suites"][name]["rows"], after["suites"][name]["rows"])
            for name in both
        },
        "notes": list(_notes(before, after)),
    }


def compare_rows(
    before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """
    Return the gains over the `n` rows that both have scored.

    `mean` and `success` hold `before`, `after`, `gain`, its 95 % interval and a verdict of their
    own; `metrics` both means by name. `up`, `same` and `down` count rows by their score;
    `left_out` those that only one of the two has scored.
    """
    pairs, left_out = _paired(before, after)
    old_scores, new_scores = _means(p.before for p in pairs), _means(p.after for p in pairs)
    mean = _gain(old_scores, new_scores, paired_mean(old_scores, new_scores))
    old_counts = [count_of(p.before) for p in pairs]
    new_counts = [count_of(p.after) for p in pairs]
    success = _gain(_rates(old_counts), _rates(new_counts), paired_success(old_counts, new_counts))
    answers = [row for pair in pairs for row in (*pair.before, *pair.after)]
    binary = all(row["score"] == float(row["success"]) for row in answers)
    gains = [round(new - old, 12) for old, new in zip(old_scores, new_scores, strict=True)]
    return {
        "verdict": (success if binary else mean)["verdict"] if pairs else None,
        "n": len(pairs),
        "mean": mean,
        "success": success,
        "metrics": _metrics(pairs),
        "up": sum(gain > 0 for gain in gains),
        "same": gains.count(0),
        "down": sum(gain < 0 for gain in gains),
        "left_out": left_out,
    }


def _paired(
    before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]
) -> tuple[list[_Pair], int]:
    """Return the tasks that both have scored, and how many only one has."""
    one, other = (dict(_by_task(rows)) for rows in (before, after))
    pairs = [_Pair(answers, other[key]) for key, answers in one.items() if key in other]
    return pairs, len(one.keys() ^ other.keys())


def _by_task(
    rows: Sequence[Mapping[str, Any]],
) -> Iterator[tuple[tuple[str, str, int], Sequence[Mapping[str, Any]]]]:
    """
    Yield the scored answers to each task under what names it.

    That is its id, its input and, of tasks that share both, which of them it is.
    """
    place: dict[int, tuple[str, str, int]] = {}
    seen: dict[tuple[str, str], int] = {}
    for row in rows:
        if row["row"] not in place:
            name = (row["id"], row["input"])
            seen[name] = seen.get(name, -1) + 1
            place[row["row"]] = (*name, seen[name])
    for answers in by_row(rows):
        yield place[answers[0]["row"]], answers


def _means(groups: Iterable[Sequence[Mapping[str, Any]]]) -> list[float]:
    return [statistics.fmean(row["score"] for row in answers) for answers in groups]


def _rates(counts: Iterable[tuple[int, int]]) -> list[float]:
    return [successes / tried for successes, tried in counts]


def _gain(
    before: Sequence[float], after: Sequence[float], difference: Difference
) -> dict[str, Any]:
    return {
        "before": statistics.fmean(before) if before else None,
        "after": statistics.fmean(after) if after else None,
        **attrs.asdict(difference),
        "verdict": verdict(difference),
    }


def verdict(difference: Difference) -> str:
    """Return the word for a difference."""
    if not difference.beyond_noise:
        return NO_CHANGE
    return BETTER if difference.gain > 0 else WORSE


def _metrics(pairs: Sequence[_Pair]) -> dict[str, list[float]]:
    """Return the means before and after of each metric that both sides have on every row."""
    names = {name for pair in pairs for row in pair.before for name in row["metrics"]}
    return {
        name: [
            statistics.fmean(
                statistics.fmean(row["metrics"][name] for row in side) for side in half
            )
            for half in ([p.before for p in pairs], [p.after for p in pairs])
        ]
        for name in sorted(names)
        if all(name in row["metrics"] for p in pairs for row in (*p.before, *p.after))
    }


def _notes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    for name in _SETTINGS:
        if before[name] != after[name]:
            yield f"{name} differs: {_shown(before[name])} and {_shown(after[name])}"
    for name in sorted(before["suites"].keys() ^ after["suites"].keys()):
        yield f"only one of them has the suite {name}"


def _shown(value: Any) -> str:
    text = str(value)
    if text.startswith("sha256:"):
        return text[:19]
    return text if len(text) <= 80 else f"{text[:79]}…"  # noqa: PLR2004 - part of a sentence
