"""What a run's events add up to: where it is, its last numbers, and the curve that tells most."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, Final

import attrs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from flash.values import Event

_BARS = "▁▂▃▄▅▆▇█"
_NOT_METRICS = frozenset({"step", "total"})
_MOST_POINTS: Final = 100_000
_MOST_EVALUATIONS: Final = 1000
_MOST_WARNINGS: Final = 200


@attrs.frozen(eq=False)
class Measure:
    """
    The number that a run is judged by.

    Attributes:
        name: of the metric.
        form: how a value of it is written.
        best: the better of two values.
        line: metrics of a step's line and their forms; a share that is 0 is left out.

    """

    name: str
    form: str
    best: Callable[..., Any]
    line: tuple[tuple[str, str], ...]


LOSS: Final = Measure(
    "loss",
    "{:.4f}",
    min,
    (
        ("loss", "loss {:.4f}"),
        ("tokens_per_s", "{:.0f} tokens/s"),
        ("learning_rate", "lr {:.2e}"),
    ),
)
REWARD: Final = Measure(
    "reward",
    "{:.3f}",
    max,
    (
        ("reward", "reward {:.3f}"),
        ("success", "success {:.0%}"),
        ("kl", "kl {:.4f}"),
        ("flat_groups", "flat groups {:.0%}"),
        ("truncated", "truncated {:.0%}"),
        ("unscored", "unscored {:.0%}"),
        ("rollout_tokens_per_s", "{:.0f} tokens/s"),
    ),
)
_SHARES = frozenset({"flat_groups", "truncated", "unscored"})


def measure_of(names: Iterable[str]) -> Measure:
    """Return what a run is judged by that reports numbers of these names."""
    return REWARD if REWARD.name in names else LOSS


@attrs.define
class Progress:
    """
    The state of one run, folded from its events.

    `curves` maps a measure's name to its value by step, `evaluations` a step to its held-out
    numbers; where a later attempt takes up, the steps of the one before end. `attempt` is the one
    that reported last, and each warning is there once. However many there are, it stays small: of
    too many steps every other one goes, of too many warnings the oldest.
    """

    attempt: int = 0
    phase: str | None = None
    step: int | None = None
    total: int | None = None
    metrics: dict[str, float | None] = attrs.field(factory=dict)
    curves: dict[str, dict[int, float]] = attrs.field(factory=lambda: {"loss": {}, "reward": {}})
    evaluations: dict[int, dict[str, float | None]] = attrs.field(factory=dict)
    warnings: list[str] = attrs.field(factory=list)
    _measured: int = 0

    def take(self, events: Iterable[tuple[int, Event]]) -> None:
        """Fold in more events."""
        for attempt, event in events:
            data: Any = event.data
            self.attempt = attempt
            if event.type in {"metric", "evaluation"}:
                self._take_up(attempt, data["step"])
            if event.type == "phase":
                self.phase = data["name"]
            elif event.type == "metric":
                self.step, self.total = data["step"], data.get("total")
                self.metrics = {
                    name: value for name, value in data.items() if name not in _NOT_METRICS
                }
                for name, curve in self.curves.items():
                    if data.get(name) is not None:
                        curve[data["step"]] = data[name]
                        thin(curve, _MOST_POINTS)
            elif event.type == "evaluation":
                self.evaluations[data["step"]] = dict(data)
                thin(self.evaluations, _MOST_EVALUATIONS)
            elif event.type == "warning" and data["message"] not in self.warnings:
                self.warnings.append(data["message"])
                del self.warnings[:-_MOST_WARNINGS]

    def _take_up(self, attempt: int, step: int) -> None:
        """Where an attempt begins to measure, forget the steps that the ones before had beyond."""
        if attempt > self._measured > 0:
            measured: list[dict[int, Any]] = [*self.curves.values(), self.evaluations]
            for by_step in measured:
                for undone in [known for known in by_step if known >= step]:
                    del by_step[undone]
        self._measured = max(self._measured, attempt)

    @property
    def curve(self) -> tuple[str, list[float]]:
        """The measure's name and its value at each step; none before the first."""
        name = measure_of(self.metrics).name
        return name, [value for _, value in sorted(self.curves[name].items())]

    @property
    def evaluation(self) -> dict[str, float | None]:
        """The newest held-out numbers; empty before the first."""
        return self.evaluations[max(self.evaluations)] if self.evaluations else {}


def thin(by_step: dict[int, Any], most: int = _MOST_POINTS) -> None:
    """Drop every other step where there are more than `most`; the first and the newest stay."""
    if len(by_step) > most:
        for step in sorted(by_step)[1:-1:2]:
            del by_step[step]


def sparkline(
    values: Sequence[float], width: int, bounds: tuple[float, float] | None = None
) -> str:
    """
    Return a curve in at most `width` bars, each the mean of its values.

    `bounds` are the values of the lowest and the highest bar; without, those of the curve itself.
    """
    if not values or width < 1:
        return ""
    count = min(width, len(values))
    edges = [round(index * len(values) / count) for index in range(count + 1)]
    means = [sum(values[start:end]) / (end - start) for start, end in itertools.pairwise(edges)]
    low, high = bounds or (min(means), max(means))
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((mean - low) * scale)] for mean in means)


def duration(seconds: float) -> str:
    """Return a time span as people say it: `45 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(max(0.0, seconds))
    if whole < 60:  # noqa: PLR2004 - seconds in a minute
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:  # noqa: PLR2004 - minutes in an hour
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def metric_line(progress: Progress, *, live: bool = True) -> str:
    """Return one line of where training is and its numbers, and of a live run what is left."""
    parts = [f"step {progress.step}" + ("" if progress.total is None else f"/{progress.total}")]
    for name, form in measure_of(progress.metrics).line:
        value = progress.metrics.get(name)
        if value or (value is not None and name not in _SHARES):
            parts.append(form.format(value))
    eta_s = progress.metrics.get("eta_s")
    if live and eta_s is not None and progress.step != progress.total:
        parts.append(f"{duration(eta_s)} left")
    return "  ".join(parts)


def held_out_line(evaluation: Mapping[str, Any]) -> str | None:
    """Return one line of held-out numbers, or None where there is none to show."""
    numbers = _held_out(evaluation)
    return f"held-out {numbers} at step {evaluation['step']}" if numbers else None


def held_out_since(progress: Progress) -> str | None:
    """Return one line of the newest held-out numbers, with those from before training."""
    line, first = held_out_line(progress.evaluation), progress.evaluations.get(0)
    if line is None or first is None or len(progress.evaluations) == 1:
        return line
    return f"{line}; before training {_held_out(first)}"


def _held_out(evaluation: Mapping[str, Any]) -> str | None:
    measure = measure_of(evaluation)
    value, success = evaluation.get(measure.name), evaluation.get("success")
    if value is None:
        return None
    beside = "" if success is None else f", success {success:.0%}"
    return f"{measure.name} {measure.form.format(value)}{beside}"
