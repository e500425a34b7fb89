"""What a worker gives an algorithm, without a run: to call its entry in a test."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - attrs reads the annotations
from typing import TYPE_CHECKING, Any

import attrs

from flash.values import ModelCard, Rollout

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

TINY_CARD = ModelCard(
    id="org/tiny",
    parameters=50_000,
    context_tokens=512,
    hidden_size=32,
    layers=2,
    intermediate_size=64,
    vocabulary=260,
)
"""The facts of `flash.testing.models.make_tiny_model`."""


@attrs.define
class Reports:
    """A reporter that keeps what it is told."""

    steps: list[dict[str, float]] = attrs.field(factory=list)
    evaluations: list[dict[str, float]] = attrs.field(factory=list)
    phases: list[str] = attrs.field(factory=list)
    logs: list[str] = attrs.field(factory=list)
    warnings: list[str] = attrs.field(factory=list)

    def phase(self, name: str) -> None:
        """Keep a phase."""
        self.phases.append(name)

    def metrics(self, step: int, total: int, **values: float) -> None:
        """Keep a step's numbers."""
        self.steps.append({"step": step, "total": total, **values})

    def evaluation(self, step: int, **values: float) -> None:
        """Keep held-out numbers."""
        self.evaluations.append({"step": step, **values})

    def log(self, message: str) -> None:
        """Keep a sentence."""
        self.logs.append(message)

    def warning(self, message: str) -> None:
        """Keep a warning."""
        self.warnings.append(message)


@attrs.define
class Saved:
    """One checkpoint of `Checkpoints`."""

    step: int
    folder: Path
    metrics: dict[str, float]


@attrs.define
class Checkpoints:
    """
    Checkpoints below `root`.

    Each is written as late as may be, when the next is saved or somebody looks: what `write` does
    not hold a copy of has changed by then.
    """

    root: Path
    _saved: list[Saved] = attrs.field(factory=list)
    _late: Callable[[], None] | None = attrs.field(default=None, init=False)

    @property
    def saved(self) -> list[Saved]:
        """Every checkpoint, in the order of the saves."""
        self._catch_up()
        return self._saved

    def newest(self) -> Saved | None:
        """Return the one with the highest step."""
        return max(self.saved, key=lambda one: one.step, default=None)

    def save(
        self, step: int, write: Callable[[Path], None], *, metrics: Mapping[str, float]
    ) -> None:
        """Write a step that is not there yet, later."""
        folder = self.root / f"step-{step:06d}"
        numbers = dict(metrics)
        if step not in [one.step for one in self.saved]:

            def late() -> None:
                folder.mkdir(parents=True)
                write(folder)
                self._saved.append(Saved(step, folder, numbers))

            self._late = late

    def save_final(self, write: Callable[[Path], None]) -> None:
        """Write every checkpoint, and the final adapter."""
        self._catch_up()
        self.final.mkdir(parents=True)
        write(self.final)

    def _catch_up(self) -> None:
        if self._late is not None:
            late, self._late = self._late, None
            late()

    @property
    def final(self) -> Path:
        """Where the final adapter is."""
        return self.root / "adapter"


@attrs.define
class KeptRollouts:
    """A store of episodes that keeps them in memory, by step."""

    by_step: dict[int, list[Rollout]] = attrs.field(factory=dict)

    def save(self, step: int, rollouts: Sequence[Rollout]) -> None:
        """Keep a step's episodes."""
        self.by_step[step] = list(rollouts)


@attrs.define(kw_only=True)
class Context:
    """A `WorkerContext`; asked to stop when `stop_after` steps are done."""

    config: Any
    environment: Any
    model: Path
    workdir: Path
    checkpoints: Checkpoints
    reporter: Reports = attrs.field(factory=Reports)
    rollouts: KeptRollouts = attrs.field(factory=KeptRollouts)
    card: ModelCard = TINY_CARD
    thinking: bool = False
    seed: int = 3
    split: str = "train"
    init_adapter: Path | None = None
    stop_after: int | None = None

    def stop(self) -> bool:
        """Say whether to stop; at the end of a step, before its report, the phase is "train"."""
        done = len(self.reporter.steps) + (self.reporter.phases[-1:] == ["train"])
        return self.stop_after is not None and done >= self.stop_after
