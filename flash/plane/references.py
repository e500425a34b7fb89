"""What refers to what: which adapter a run was trained from, and what evaluations are of a run."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from flash.evaluations import EvaluationStore

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from flash.home import FlashHome


class References:
    """The references in one home; evaluations are read once, and of each run its manifest."""

    def __init__(self, home: FlashHome) -> None:
        self._home = home
        self._starts: dict[str, Path | None] = {}

    def trained_from(self, run: str, others: Iterable[str]) -> list[str]:
        """Return those of the `others` whose training started from an adapter of `run`."""
        store = (self._home.runs / run).resolve()
        return [other for other in others if self._starts_in(other, store)]

    def starts_at(self, folder: Path, runs: Iterable[str]) -> bool:
        """Say whether the training of one of the runs started from the adapter in `folder`."""
        return any(self._starts_in(run, folder.resolve()) for run in runs)

    def evaluations_of(self, run: str) -> Sequence[str]:
        """Return the ids of the kept evaluations of a run's adapters."""
        return self._evaluations.get(run, ())

    def _starts_in(self, run: str, folder: Path) -> bool:
        if run not in self._starts:
            self._starts[run] = _warm_start(self._home.runs / run / "job.json")
        start = self._starts[run]
        return start is not None and start.is_relative_to(folder)

    @cached_property
    def _evaluations(self) -> Mapping[str, Sequence[str]]:
        found: dict[str, list[str]] = {}
        for evaluation in EvaluationStore(self._home).all()[0]:
            found.setdefault(str(evaluation.get("run")), []).append(evaluation["evaluation"])
        return found


def _warm_start(manifest: Path) -> Path | None:
    """Return where a run's adapter to start from is; a manifest that is damaged starts nothing."""
    try:
        named = json.loads(manifest.read_bytes())["warm_start"]
        return Path(named["folder"]).resolve() if named else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
