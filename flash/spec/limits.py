"""The tables that bound a run: what it may cost, how often it is tried, which checkpoints stay."""

from __future__ import annotations

from typing import Final

import attrs

from flash.fields import setting


@attrs.frozen(kw_only=True)
class BudgetTable:
    """Limits that end a run: at one of them it saves a checkpoint and is stopped."""

    max_hours: float | None = setting(
        None,
        doc="The run ends after this many hours of work, over all its attempts.",
        gt=0,
        example=2,
    )
    max_usd: float | None = setting(
        None,
        doc="The run ends once it has cost this much: the provider's price times the hours, and "
        "what its reward judges report.",
        gt=0,
        example=5,
    )
    warn_at: float = setting(
        0.8, doc="The share of a limit at which a warning is given, once.", gt=0, le=1
    )


@attrs.frozen(kw_only=True)
class RetryTable:
    """
    How often a run is tried again, by how an attempt ended, each from the newest checkpoint.

    Retries are counted by kind, since the run last got further: an attempt that saved a later
    checkpoint than the ones before starts the counts anew. What the user has to change is never
    tried again.
    """

    max_attempts: int = setting(20, doc="Attempts in all, the first one included.", ge=1)
    preempted: int = setting(8, doc="Retries after the provider took the machine back.", ge=0)
    no_capacity: int = setting(
        8, doc="Retries after a provider that had offered a machine did not start it.", ge=0
    )
    lost: int = setting(
        2, doc="Retries after the worker crashed, vanished, or was not heard of any more.", ge=0
    )
    stalled: int = setting(1, doc="Retries after the worker made no progress.", ge=0)
    out_of_memory: int = setting(
        0,
        doc="Retries after memory ran out. A machine of the same size would run out again, so "
        "this is of use where others share it.",
        ge=0,
    )
    pause_s: float = setting(
        5.0,
        doc="Seconds before the second retry of a kind in a row; doubled for each one after. The "
        "first comes at once, but for `no_capacity`.",
        gt=0,
    )
    max_pause_s: float = setting(300.0, doc="The longest pause, in seconds.", gt=0)
    stalled_after_s: float = setting(
        1800.0,
        doc="A worker that reports nothing but heartbeats for this many seconds is stalled: its "
        "stacks go into its log, and it is stopped. More than the longest step takes.",
        ge=1,
    )


@attrs.frozen(kw_only=True)
class CheckpointsTable:
    """
    Which checkpoints of a run stay on the disk. Each that stays can be deployed.

    The steps of `train.save_at_steps` always stay. What a run resumes from, which is the larger
    part, stays with the newest two alone: the second is for when the first is damaged.
    """

    keep_last: int | None = setting(
        None,
        doc="Keep this many of the newest checkpoints and remove those before. Unset, every step "
        "that was saved stays.",
        ge=1,
        example=3,
    )
    keep_best: bool = setting(
        default=True,
        doc="Keep the checkpoint that did best on held-out tasks, however old it is.",
    )


LIMIT_TABLES: Final = {
    "budget": BudgetTable,
    "retry": RetryTable,
    "checkpoints": CheckpointsTable,
}
"""The tables here by their names in the TOML; `Spec` has a field for each."""
