"""What a run's events add up to: where it is, its last numbers, and the curve of its loss."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterable

    from flash.values import Event

_BARS = "▁▂▃▄▅▆▇█"
_NOT_METRICS = frozenset({"step", "total"})


@attrs.define
class Progress:
    """
    The state of one run, folded from its events.

    `losses` maps step to loss; a step that a later attempt repeats is overwritten.
    """

    phase: str | None = None
    step: int | None = None
    total: int | None = None
    metrics: dict[str, float | None] = attrs.field(factory=dict)
    evaluation: dict[str, float | None] = attrs.field(factory=dict)
    losses: dict[int, float] = attrs.field(factory=dict)
    warnings: list[str] = attrs.field(factory=list)

    def take(self, events: Iterable[tuple[int, Event]]) -> None:
        """Fold in more events."""
        for _, event in events:
            data: Any = event.data
            if event.type == "phase":
                self.phase = data["name"]
            elif event.type == "metric":
                self.step, self.total = data["step"], data["total"]
                self.metrics = {
                    name: value for name, value in data.items() if name not in _NOT_METRICS
                }
                if data.get("loss") is not None:
                    self.losses[data["step"]] = data["loss"]
            elif event.type == "evaluation":
                self.evaluation = dict(data)
            elif event.type == "warning":
                self.warnings.append(data["message"])

    def sparkline(self, width: int) -> str:
        """Return the curve of the loss in at most `width` bars, each the mean of its steps."""
        values = [loss for _, loss in sorted(self.losses.items())]
        if not values or width < 1:
            return ""
        count = min(width, len(values))
        edges = [round(index * len(values) / count) for index in range(count + 1)]
        means = [sum(values[start:end]) / (end - start) for start, end in itertools.pairwise(edges)]
        low, high = min(means), max(means)
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


def metric_line(progress: Progress) -> str:
    """Return one line of where training is and its numbers."""
    parts = [f"step {progress.step}/{progress.total}"]
    for name, form in (
        ("loss", "loss {:.4f}"),
        ("tokens_per_s", "{:.0f} tokens/s"),
        ("learning_rate", "lr {:.2e}"),
    ):
        value = progress.metrics.get(name)
        if value is not None:
            parts.append(form.format(value))
    eta_s = progress.metrics.get("eta_s")
    if eta_s is not None and progress.step != progress.total:
        parts.append(f"{duration(eta_s)} left")
    return "  ".join(parts)
