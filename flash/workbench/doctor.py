"""
`flash env test`: every check, in the process of a foreground task.

Nothing here is trained, and nothing of the environment's is written.
"""

from __future__ import annotations

import os
import statistics
import time
from typing import TYPE_CHECKING, Any

import attrs

from flash.errors import EnvironmentFault, ModelUnavailable, StoreError, TrainingDataError
from flash.workbench import checks, data, process, reward, sampled
from flash.workbench.findings import Finding, in_order, verdict
from flash.workbench.probes import GOLD, HALF_RIGHT, WRONG, Guarded, examine
from flash.workbench.subject import Subject

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from pathlib import Path

    from flash.contracts import Environment
    from flash.values import Task


@attrs.frozen(kw_only=True)
class Asked:
    """
    What to examine.

    Attributes:
        folder: the environment's files.
        algorithm: what is to be trained with it. `rewarded`: that learns from the scores.
        split: the split to train on.
        tasks: how many of its tasks are played.
        configured: there is a config, so that what it declares is all that a worker will have.
        ours: variables and `sys.path` entries that loading adds.
        missed: the set of variables that were asked for in vain, which grows meanwhile.
        sampling: how a model answers.

    """

    folder: Path
    algorithm: str
    rewarded: bool
    split: str
    tasks: int
    configured: bool
    ours: Sequence[str]
    missed: Collection[str]
    sampling: sampled.Sampling


def diagnose(
    asked: Asked,
    load: Callable[[], Environment],
    open_model: Callable[[], Path] | None,
    report: Callable[[str], None],
) -> dict[str, Any]:
    """
    Return the verdict, the findings and the figures behind them.

    `load` imports the environment, `open_model` returns a model's folder. An environment that
    cannot be loaded is a finding; everything else that is raised is not the environment's fault.
    """
    started = time.monotonic()
    before = process.state()
    report("loading the environment")
    try:
        environment = Guarded(load())
        rows, unreadable = _rows(environment)
    except EnvironmentFault as fault:
        fix = fault.hint or "correct what is named, then test again"
        return _answer([Finding("fail", "load", fault.message, fix)], started)
    loaded = process.state()
    subject = Subject(
        environment=environment,
        folder=asked.folder,
        algorithm=asked.algorithm,
        rewarded=asked.rewarded,
        split=asked.split,
        rows=rows,
        unreadable=unreadable,
        configured=asked.configured,
    )
    report(f"answering {min(asked.tasks, len(rows.get(asked.split, ())))} tasks with probes")
    trials = examine(environment, data.spread(rows.get(asked.split, ()), asked.tasks))
    subject = attrs.evolve(subject, trials=trials)
    found = [
        one for check in (*data.CHECKS, *checks.CHECKS, *reward.CHECKS) for one in check(subject)
    ]
    subject = attrs.evolve(
        subject,
        declared=[*os.environ],
        asked_for=[*asked.missed],
        changed=process.changes(before, loaded, ours=asked.ours)
        | process.changes(loaded, process.state()),
    )
    found += [one for check in process.CHECKS for one in check(subject)]
    figures = None
    if open_model is not None and any(trial.scores() for trial in trials):
        figures, more = _with_model(subject, asked, open_model, report)
        found += more
    return _answer(found, started) | {
        "rows": {split: len(tasks) for split, tasks in rows.items()},
        "probes": _probes(subject),
        "sampled": figures,
    }


def _answer(findings: Sequence[Finding], started: float) -> dict[str, Any]:
    return {
        "verdict": verdict(findings),
        "findings": [finding.as_dict() for finding in in_order(findings)],
        "rows": {},
        "probes": {},
        "sampled": None,
        "seconds": time.monotonic() - started,
    }


def _rows(environment: Guarded) -> tuple[dict[str, Sequence[Task]], dict[str, str]]:
    """Return the rows of each split, and why others cannot be read."""
    rows: dict[str, Sequence[Task]] = {}
    unreadable: dict[str, str] = {}
    for split in environment.splits():
        try:
            rows[split] = environment.tasks(split)
        except EnvironmentFault as fault:
            unreadable[split] = fault.message
    return rows, unreadable


def _probes(subject: Subject) -> dict[str, float]:
    """Return the mean reward of each probe."""
    scores = {
        probe: [s for trial in subject.trials if (s := trial.score(probe)) is not None]
        for probe in (GOLD, *HALF_RIGHT, *WRONG)
    }
    return {probe: statistics.fmean(found) for probe, found in scores.items() if found}


def _with_model(
    subject: Subject, asked: Asked, open_model: Callable[[], Path], report: Callable[[str], None]
) -> tuple[dict[str, Any] | None, list[Finding]]:
    try:
        groups = sampled.sample(subject, asked.sampling, open_model(), report)
    except TrainingDataError as error:
        return None, [sampled.render_fault(error)]
    except (ModelUnavailable, StoreError) as error:
        fix = error.hint or "name another one: --model, or leave it out: --no-model"
        return None, [Finding("warn", "model", f"no model could be asked: {error.message}", fix)]
    found = [one for check in sampled.CHECKS for one in check(subject, groups)]
    return sampled.numbers(groups, subject), found
