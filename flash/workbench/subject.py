"""What the checks look at: an environment, its rows, and how the probes went."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import attrs

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from pathlib import Path

    from flash.values import Task
    from flash.workbench.findings import Level
    from flash.workbench.probes import Guarded, Trial

_NAMED: Final = 3
_REPEATED: Final = 4


@attrs.frozen(kw_only=True)
class Subject:
    """
    What is examined.

    Attributes:
        environment: loaded, its hooks guarded.
        folder: its files.
        algorithm: what it is to be trained with.
        rewarded: whether that learns from the scores; else it learns from the gold answers.
        split: the split to train on.
        rows: the rows of every split that can be read; `unreadable` has the others' reasons.
        trials: how some tasks of `split` went.
        declared: the variables that a worker will have. `configured`: they are those of a config,
            and not just of the folder.
        asked_for: names of variables that were asked for in vain.
        changed: what loading or its hooks changed in the process: what, and how.

    """

    environment: Guarded
    folder: Path
    algorithm: str
    rewarded: bool
    split: str
    rows: Mapping[str, Sequence[Task]]
    unreadable: Mapping[str, str] = attrs.field(factory=dict)
    trials: Sequence[Trial] = ()
    declared: Collection[str] = ()
    configured: bool = False
    asked_for: Collection[str] = ()
    changed: Mapping[str, str] = attrs.field(factory=dict)

    def played(self) -> list[Trial]:
        """Return the trials of tasks that start."""
        return [trial for trial in self.trials if trial.fault is None]

    def repeated(self) -> list[Trial]:
        """Return the trials of tasks that are played and scored again."""
        return self.played()[:_REPEATED]

    def reward_level(self) -> Level:
        """Return how bad a wrong reward is: `fail` where it is what is learnt from."""
        return "fail" if self.rewarded else "warn"

    def gold_level(self) -> Level:
        """Return how bad a missing gold answer is."""
        return "warn" if self.rewarded else "fail"


def named(ids: Sequence[str]) -> str:
    """Return some of the ids as part of a sentence."""
    shown = ", ".join(ids[:_NAMED])
    return f"{shown} and {len(ids) - _NAMED} more" if len(ids) > _NAMED else shown


def most(part: Sequence[object], whole: Sequence[object]) -> bool:
    """Say whether the part is at least half of the whole."""
    return len(part) * 2 >= len(whole) > 0
