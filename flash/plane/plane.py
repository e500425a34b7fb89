"""
The plane as callers see it: submit a job, look at runs, cancel, follow.

Everything here reads and writes the database and the stores; nothing talks to a provider. What
moves a run is the supervisor, which is started whenever there is something for it to do.
"""

from __future__ import annotations

import itertools
import os
import re
import time
from typing import TYPE_CHECKING, Any, Final

import attrs

from flash.environ import worker_environment
from flash.errors import StoreError, UsageError
from flash.plane.daemon import SUPERVISOR, Kept
from flash.plane.database import Database
from flash.plane.deployments import Deployments
from flash.plane.ids import LAST, is_run_id, read_prefix
from flash.plane.machine import FINAL
from flash.plane.outbox import Outbox
from flash.plane.records import Records
from flash.plane.secrets import RunSecrets
from flash.plane.store import RunStore
from flash.plane.submit import Submission, Submitter
from flash.plane.tail import EventTail
from flash.worker.checkpoints import CheckpointStore, best_of, damaged_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from flash.home import FlashHome
    from flash.job import Job
    from flash.plane.deployments import Deployment
    from flash.plane.runs import Attempt, Run
    from flash.values import Event
    from flash.worker.checkpoints import Checkpoint

_FOLLOW_S: Final = 0.25
_LOOKS_A_CHECK: Final = 8
_SHOWN: Final = 40
_MOST_NAMED: Final = 8
_PART: Final = re.compile(r"step-(?P<step>\d{1,12})|(?P<word>best|final)")


@attrs.frozen
class Update:
    """
    What a follower learns at one look: the run, its attempts, the events since the last.

    The events are read as they are asked for, and only once, however many there are.
    """

    run: Run
    attempts: Sequence[Attempt]
    events: Iterable[tuple[int, Event]]


class Plane:
    """
    The plane of one home.

    `environ` is the submitting shell's environment; of it, the variables that name paths, proxies
    and devices are kept with a run. `supervisor` is the command that supervises. `database` is what
    runs and deployments are in.
    """

    def __init__(
        self,
        home: FlashHome,
        *,
        environ: Mapping[str, str] | None = None,
        supervisor: Sequence[str] = SUPERVISOR.command,
    ) -> None:
        self._home = home
        self._environ = os.environ if environ is None else environ
        self._supervisor = Kept(SUPERVISOR, home, supervisor)
        self.database = database = Database(home.database)
        self._records = Records(database)
        self._outbox = Outbox(database)
        self._deployments = Deployments(database)
        self._secrets = RunSecrets(home)
        self._submitter = Submitter(home, self._records, self._secrets)

    def submit(self, job: Job, *, environment: Path, secrets: Mapping[str, str]) -> Run:
        """
        Take the job; it is on the disk to stay when this returns.

        `environment` is the folder whose digest the job has; the store gets a snapshot of it.
        Raises `StoreError`, or `EnvironmentFault` where the folder has changed, and then no
        trace of the run is left. Submits of several threads share what the disk costs. Where only
        the supervisor cannot be started, the run is there, and the `StoreError` says so.
        """
        submission = Submission(job=job, environment=environment, secrets=secrets)
        return self.submit_all([submission])[0]

    def submit_all(self, submissions: Sequence[Submission]) -> Sequence[Run]:
        """Take all of the jobs, or none of them, as `submit` takes one."""
        if not submissions:
            return []
        caller = worker_environment(self._environ) | {"FLASH_HOME": str(self._home.root)}
        runs = self._submitter.submit(submissions, caller)
        if runs:
            self._have_supervised([run.id for run in runs], "submitted")
        return runs

    def run(self, run: str) -> Run:
        """Return the run of exactly this id; raises `UsageError`."""
        found = self._records.run(run)
        if found is None:
            raise _no_run(run)
        return found

    def runs(self) -> list[Run]:
        """Return every run, newest first."""
        return self._records.runs()

    def find(self, text: str) -> Run:
        """Return the run that a person means by an id, a unique prefix of one, or `last`."""
        if text == LAST:
            newest = self._records.newest()
            if newest is None:
                raise UsageError("there is no run yet", hint="flash train CONFIG starts one")
            return newest
        prefix = read_prefix(text)
        if prefix is None:
            raise _no_run(text)
        found = self._records.runs(prefix=prefix)
        if not found:
            raise _no_run(text)
        if len(found) > 1:
            names = ", ".join(run.id for run in found[:_MOST_NAMED])
            more = f" and {len(found) - _MOST_NAMED} more" if len(found) > _MOST_NAMED else ""
            message = f"{len(found)} runs start with {prefix}: {names}{more}"
            raise UsageError(message, hint="write more of the id")
        return found[0]

    def attempts(self, run: str) -> list[Attempt]:
        """Return the run's attempts in order."""
        return self._records.attempts(run)

    def events(self, run: str) -> Iterator[tuple[int, Event]]:
        """Yield what the run's workers have reported, as (attempt, event)."""
        return EventTail(self.store(run)).read()

    def store(self, run: str) -> Path:
        """Return the run's folder; raises `UsageError` for what is no run id."""
        if not is_run_id(run):
            raise _no_run(run)
        return self._path(run)

    def log(self, run: str, attempt: int) -> Path:
        """Return where an attempt's output is; it may not exist yet."""
        return RunStore(self.store(run)).log(attempt)

    def checkpoints(self, run: str) -> list[Checkpoint]:
        """Return the run's complete checkpoints by step."""
        return CheckpointStore(self.store(run)).list()

    def final(self, run: str) -> Checkpoint | None:
        """Return the run's final adapter, once there is one."""
        return CheckpointStore(self.store(run)).final()

    def best(self, run: str) -> Checkpoint | None:
        """Return the checkpoint that did best on held-out tasks, if better than before training."""
        before = (
            event.data
            for _, event in self.events(run)
            if event.type == "evaluation" and event.data["step"] == 0
        )
        return best_of(self.checkpoints(run), before=next(before, None))

    def adapter(self, reference: str) -> Path:
        """Return the folder of the adapter that `saved` finds, with the same errors."""
        return self.saved(reference).adapter

    def saved(self, reference: str) -> Checkpoint:
        """
        Return what `<run>` or `<run>/final`, `<run>/step-N` or `<run>/best` names.

        Raises `UsageError` where there is none, and names those there are; `StoreError` where a
        file of it is not what was saved.
        """
        return _undamaged(self.named(reference)[1])

    def named(self, reference: str) -> tuple[Run, Checkpoint]:
        """Return the run and what `saved` returns, of whose files only the sizes were looked at."""
        name, _, part = reference.partition("/")
        run = self.find(name)
        match = _PART.fullmatch(part or "final")
        saved = self.checkpoints(run.id)
        found = None
        if match is None:
            message = f'the run {run.id} has no "{part[:_SHOWN]}"'
        elif match["word"] == "final":
            found = self.final(run.id)
            message = f"the run {run.id} is {run.state} and has no final adapter"
        elif match["word"] == "best":
            found = self.best(run.id)
            message = (
                f"the run {run.id} has no best checkpoint: none is known to be better on held-out "
                "tasks than before training"
            )
        else:
            step = int(match["step"])
            found = next((checkpoint for checkpoint in saved if checkpoint.step == step), None)
            message = f"the run {run.id} has no complete checkpoint of step {step}"
        if found is not None:
            return run, found
        if match is not None and match["word"] != "best":
            named = None if match["word"] else int(match["step"])
            path = CheckpointStore(self.store(run.id)).damaged(named)
            if path is not None:
                raise _damage(path)
        raise UsageError(message, hint=self._instead(run, saved))

    def _instead(self, run: Run, saved: Sequence[Checkpoint]) -> str:
        """Say what a run has, or how it comes to have something."""
        if saved:
            return "it has " + ", ".join(
                f"{run.id}/step-{one.step}" for one in saved[-_MOST_NAMED:]
            )
        if self.final(run.id):
            return f"it has the final adapter alone, {run.id}"
        if run.state in FINAL:
            return f"it has no checkpoint; `flash resume {run.id}` starts it again"
        return f"it has no checkpoint yet; `flash status {run.id} --follow` watches it"

    def deployed(self, run: str) -> list[Deployment]:
        """Return the deployments of the run that were not undeployed."""
        return [one for one in self._deployments.of(run) if one.state != "undeployed"]

    def cancel(self, run: str) -> Run:
        """Ask for the end of a run and return it; a run that has ended stays as it is."""
        self._records.request_cancel(run)
        found = self.run(run)
        # Where there is still something to tell of it, the supervisor forgets them later.
        self._outbox.once_ended(run, lambda told: self._secrets.forget(run) if told else None)
        self.supervise()
        return found

    def resume(
        self,
        run: str,
        *,
        secrets: Callable[[Sequence[str]], Mapping[str, str]],
        budget: Mapping[str, Any] | None = None,
    ) -> Run:
        """
        Have a failed or cancelled run go on from its newest checkpoint, as a new attempt.

        `secrets` finds the values that the job names: they were forgotten when it ended. `budget`
        replaces settings of its `[budget]`. Raises `UsageError` for a run that is done or has not
        ended, and `StoreError` where its store is gone.
        """
        check_resumable(self.run(run))
        values = secrets(RunStore(self.store(run)).job()["secrets"])
        # Beside the change, so that no supervisor sees one without the other.
        resumed = self._records.resume(
            run, budget=budget, put=lambda: self._secrets.replace(run, values)
        )
        found = self.run(run)
        if not resumed:
            check_resumable(found)
        self._have_supervised([run], "resumed")
        return found

    def follow(self, run: str) -> Iterator[Update]:
        """
        Yield what there is of the run, and again four times a second until it has ended.

        The last update has the final run and every event. A supervisor that was killed is
        started again.
        """
        tail = EventTail(self.store(run))
        for look in itertools.count():
            found = self.run(run)  # before the events: a final run's have all been written
            yield Update(found, self.attempts(run), tail.read())
            if found.final:
                return
            if look % _LOOKS_A_CHECK == 0:
                self.supervise()
            time.sleep(_FOLLOW_S)

    def supervise(self) -> None:
        """
        Have a supervisor where one is needed.

        Raises `StoreError` where the one that this object started before could not go on; one
        that was killed is no reason not to start another.
        """
        unfinished = self._records.unsettled()
        if (
            unfinished
            or self._secrets.left_over(unfinished)
            or self._outbox.untold()
            or self._deployments.any_wanted()
        ):
            self._supervisor.have()

    def _have_supervised(self, runs: Sequence[str], what: str) -> None:
        """Start a supervisor for runs that are taken; one that cannot be does not undo that."""
        try:
            self._supervisor.have()
        except StoreError as error:
            names = ", ".join(runs[:_MOST_NAMED])
            message = f"{names} is {what}, but nothing supervises it yet: {error.message}"
            hint = f"{error.hint}; flash status {runs[0]} then starts what supervises it"
            raise StoreError(message, hint=hint) from error

    def _path(self, run: str) -> Path:
        return self._home.runs / run


def _undamaged(checkpoint: Checkpoint) -> Checkpoint:
    damaged = damaged_file(checkpoint.folder)
    if damaged is not None:
        raise _damage(checkpoint.folder / damaged)
    return checkpoint


def _damage(path: Path) -> StoreError:
    message = f"{path} is damaged: it is not what the checkpoint's manifest says was saved"
    return StoreError(message, hint="take another: flash checkpoints lists them")


def check_resumable(run: Run) -> None:
    """Raise `UsageError` for a run that cannot be resumed: it is done, or goes on already."""
    if run.state == "done":
        message = f"the run {run.id} is done: there is nothing left to train"
        raise UsageError(message, hint="its job is frozen: to train on, submit a config again")
    if not run.final:
        message = f"the run {run.id} has not ended: it is {run.state}"
        raise UsageError(message, hint=f"flash status {run.id} --follow")


def _no_run(text: str) -> UsageError:
    shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
    return UsageError(f'there is no run "{shown}"', hint="flash runs lists them")
