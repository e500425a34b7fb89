"""
Submitting: the stores, secrets and rows of one run or many, on the disk to stay, or none of them.

The files are written under names that no run has. One barrier makes them durable, then one
transaction puts them in place and adds the rows. Submits of several threads share both: whoever
has the turn commits for all who wait for it, and waits for those who are about to, at most as long
as the last commit took. A group that fails is done again one by one, so that each submit fails or
succeeds for itself.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import shutil
import threading
import time
from pathlib import Path  # noqa: TC003 - attrs reads the annotations
from typing import TYPE_CHECKING

import attrs

from flash.errors import EnvironmentFault, StoreError
from flash.files import sync_folder
from flash.job import Job  # noqa: TC001 - attrs reads the annotations
from flash.plane.barrier import barrier, tree
from flash.plane.ids import is_run_id
from flash.plane.store import committed, incoming_stores, write_job

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from flash.home import FlashHome
    from flash.plane.records import Records
    from flash.plane.runs import Run
    from flash.plane.secrets import RunSecrets


@attrs.frozen(kw_only=True)
class Submission:
    """A job, the folder whose digest it has, and the values of the secrets that it names."""

    job: Job
    environment: Path
    secrets: Mapping[str, str] = attrs.field(factory=dict, repr=False)


@attrs.define(eq=False)
class _Batch:
    """Submissions that are committed together, by where the store of each was built."""

    built: Mapping[Path, Submission]
    caller: Mapping[str, str]
    tried: bool = False
    runs: Sequence[Run] = ()


class Submitter:
    """Submits to one home, from any thread."""

    def __init__(self, home: FlashHome, records: Records, secrets: RunSecrets) -> None:
        self._home = home
        self._records = records
        self._secrets = secrets
        self._turn = threading.Lock()
        self._waiting: collections.deque[_Batch] = collections.deque()
        # How many write their files, and will wait next.
        self._coming = 0
        self._arrived = threading.Condition()
        self._took_s = 0.0

    def submit(self, submissions: Sequence[Submission], caller: Mapping[str, str]) -> Sequence[Run]:
        """
        Take all of the jobs; they are on the disk to stay when this returns their runs.

        `caller` is what is kept of the submitting shell's variables. Each store gets a snapshot
        of its own, and shares no file with another. Raises `StoreError`, or `EnvironmentFault`
        where a folder has changed, and then no trace of any is left.
        """
        runs = [submission.job.run for submission in submissions]
        _check(runs)
        with incoming_stores(self._home, runs) as folders:
            batch = _Batch(dict(zip(folders, submissions, strict=True)), caller)
            try:
                with self._on_the_way():
                    for folder, submission in batch.built.items():
                        _build(folder, submission)
                    self._waiting.append(batch)
                with self._turn:
                    self._take_turn(batch)
            finally:
                if not batch.runs:
                    self._withdraw(batch)
            parent = self._home.runs
            for run in runs:
                committed(parent / run)
        return batch.runs

    @contextlib.contextmanager
    def _on_the_way(self) -> Iterator[None]:
        with self._arrived:
            self._coming += 1
        try:
            yield
        finally:
            with self._arrived:
                self._coming -= 1
                self._arrived.notify_all()

    def _withdraw(self, batch: _Batch) -> None:
        """See to it that nobody commits what goes with its folders now: it failed, or was ended."""
        with self._turn, contextlib.suppress(ValueError):
            self._waiting.remove(batch)

    def _take_turn(self, batch: _Batch) -> None:
        group = [] if batch.tried else self._group()
        if len(group) > 1:
            # Whatever failed is met again, and raised, by the batch that it is about.
            with contextlib.suppress(Exception):
                self._write(group)
        if not batch.runs:
            self._write([batch])

    def _group(self) -> list[_Batch]:
        """Return all that wait; one that failed with its group is on its own from then on."""
        with self._arrived:
            self._arrived.wait_for(lambda: not self._coming, self._took_s)
        group = [self._waiting.popleft() for _ in range(len(self._waiting))]
        for batch in group:
            batch.tried = True
        return group

    def _write(self, group: Sequence[_Batch]) -> None:
        built = {folder: one for batch in group for folder, one in batch.built.items()}
        rows = [
            {"id": one.job.run, "spec": one.job.spec, "caller": dict(batch.caller)}
            for batch in group
            for one in batch.built.values()
        ]
        began_s = time.monotonic()
        barrier(path for folder in built for path in tree(folder))
        added = iter(
            self._records.add_all(
                rows,
                put=lambda: self._put(built),
                take_back=lambda: self._take_back(built),
            )
        )
        self._took_s = time.monotonic() - began_s
        for batch in group:
            batch.runs = list(itertools.islice(added, len(batch.built)))

    def _put(self, built: Mapping[Path, Submission]) -> None:
        self._secrets.keep({one.job.run: one.secrets for one in built.values()})
        runs = self._home.runs
        for folder, one in built.items():
            folder.rename(runs / one.job.run)
        sync_folder(runs)

    def _take_back(self, built: Mapping[Path, Submission]) -> None:
        """Undo `_put`; what the disk does not let go of, the next supervisor sweeps away."""
        for folder, one in built.items():
            with contextlib.suppress(StoreError):
                self._secrets.forget(one.job.run)
            if folder.exists():
                continue
            store = self._home.runs / one.job.run
            try:
                store.rename(folder)
            except FileNotFoundError:
                pass  # a supervisor that started just now has swept it away already
            except OSError:
                shutil.rmtree(store, ignore_errors=True)


def _check(runs: Sequence[str]) -> None:
    for run in runs:
        if not is_run_id(run):
            message = f"not a run id: {run!r}"
            raise StoreError(message, hint="report it as a defect of Flash")
    if len(set(runs)) < len(runs):
        message = "two of the submitted jobs have one id"
        raise StoreError(message, hint="submit again; they will get other ids")


def _build(folder: Path, submission: Submission) -> None:
    from flash.environments import snapshot  # and with it the plugin host

    digest = submission.job.environment["digest"]
    if snapshot(submission.environment, folder / "environment") != digest:
        message = f"{submission.environment} was changed while it was being submitted"
        raise EnvironmentFault(message, hint="submit again")
    write_job(folder, submission.job.to_json())
