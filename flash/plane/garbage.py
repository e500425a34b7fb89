"""
What of a home can go, by rule, and removing it.

Looking changes nothing. Removing looks again at each thing: what is of a run goes in a
transaction in which the run is found as it was shown, so that a run which went on, or is being
worked on, loses nothing. A run goes in this order: its store is marked as one without a run, its
rows are deleted, its store is moved into the trash, the trash is emptied. Wherever that is cut
short, the run is either whole or gone, and what is left of one that is gone is known for that:
the next look finds it.
"""

from __future__ import annotations

import os
import re
import time
from typing import TYPE_CHECKING, Any, Final, Literal

import attrs
import sqlalchemy as sa

from flash.errors import StoreError, UsageError
from flash.plane import copies
from flash.plane import database as tables
from flash.plane.chat_logs import logs_of_ended_chats
from flash.plane.database import Database
from flash.plane.deployments import Deployments
from flash.plane.ids import is_run_id
from flash.plane.lock import try_lock
from flash.plane.machine import FINAL
from flash.plane.references import References
from flash.plane.removal import TRASH, disk_bytes, empty_trash, inside, listed, remove, set_aside
from flash.plane.store import cut_short, disown, is_disowned, sweep_incoming, sweep_uncommitted
from flash.worker.checkpoints import CheckpointStore

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from flash.home import FlashHome

Kind = Literal[
    "run", "state", "rollouts", "logs", "leftover", "deployment", "secrets", "adapter", "cache"
]
DAY_S: Final = 24 * 3600.0
UNUSED_S: Final = 30 * DAY_S
"""How long packages and environments are kept that were fetched and are not used."""

# What is being made, or was fetched for a run that is submitted next, is younger.
_SETTLED_S: Final = DAY_S
_TORN: Final = re.compile(r"\.[\w.-]+\.[a-z0-9_]{8}")
_ATTEMPT: Final = re.compile(r"[1-9]\d*")


@attrs.frozen(kw_only=True)
class Rules:
    """
    What may go beside what nobody needs.

    The `runs` that are named, with all of them; with `older_than_s`, runs that ended so long ago
    and that nothing refers to; the `rollouts` and the `logs` of every run that has ended.
    """

    runs: Collection[str] = ()
    older_than_s: float | None = None
    rollouts: bool = False
    logs: bool = False


@attrs.frozen(kw_only=True)
class Item:
    """
    One thing that can go: its paths, what it is, and why it can.

    `run` is the run that it is of, and `seen` how that run was when it was looked at.
    """

    kind: Kind
    paths: tuple[Path, ...]
    why: str
    size_bytes: int
    run: str | None = None
    seen: tuple[Any, ...] | None = None


@attrs.frozen
class Kept:
    """Something that stays, though it was asked for or cannot be of use, and why."""

    what: str
    why: str


@attrs.frozen(kw_only=True)
class _Run:
    """What of a run decides about it; `deployed` is a deployment that was not undeployed."""

    id: str
    state: str
    fence: int
    created_s: float
    updated_s: float
    ended_s: float
    busy: bool
    deployed: str | None

    @property
    def settled(self) -> bool:
        """Whether it has ended, and nothing is left to do or to tell about that."""
        return self.state in FINAL and not self.busy

    @property
    def seen(self) -> tuple[Any, ...]:
        """What is another once the run has gone on."""
        return (self.state, self.fence, self.updated_s)


class Garbage:
    """The garbage of one home."""

    def __init__(self, home: FlashHome, *, clock: Callable[[], float] = time.time) -> None:
        self._home = home
        self._clock = clock
        self._database = Database(home.database)
        self._deployments = Deployments(self._database)
        self._references = References(home)

    def find(self, rules: Rules) -> tuple[list[Item], list[Kept]]:
        """
        Return what can go, and what stays though it was asked for.

        Raises `UsageError` for a named run that has not ended or that another run needs.
        """
        # Before the rows, so that the store of a run that is submitted meanwhile is known.
        stores = [path for path in listed(self._home.runs) if is_run_id(path.name)]
        with self._database.reading() as connection:
            runs = {run.id: run for run in _runs(connection)}
        going, kept = self._going(rules, runs)
        items = [*self._whole(going)]
        if not rules.runs:
            whole = {run.id for run in going}
            for run in sorted(runs.values(), key=lambda run: run.id):
                if run.settled and run.id not in whole:
                    items += self._parts(run, rules)
            items += [*self._leftovers(runs), *self._caches(runs)]
            kept += [
                Kept(str(path), "the database, which may be a new one, knows no run of this name")
                for path in stores
                if path.name not in runs and not is_disowned(path)
            ]
        items = [item for item in items if item.paths]
        outside = [one for one in items if not all(inside(path, self._home) for path in one.paths)]
        kept += [Kept(str(one.paths[0]), "a link leads there, out of the home") for one in outside]
        return [one for one in items if one not in outside], kept

    def remove(self, items: Sequence[Item], done: Callable[[Item], None]) -> list[Kept]:
        """
        Remove what `find` has found; `done` is called after each thing that went.

        Returns what stays after all: it changed meanwhile, or the disk does not let it go.
        """
        lock = try_lock(self._home.folder() / "gc.lock")
        if lock is None:
            raise StoreError("another flash gc is at work here", hint="wait for it to end")
        kept = []
        try:
            # A run that another was trained from can go when that one has gone: newest first.
            for item in sorted(items, key=lambda one: one.run or "", reverse=True):
                try:
                    why = self._remove(item)
                except StoreError as error:
                    why = error.message
                if why is None:
                    done(item)
                else:
                    kept.append(Kept(item.run or str(item.paths[0]), why))
        finally:
            os.close(lock)
        return kept

    # Whole runs.

    def _going(self, rules: Rules, runs: dict[str, _Run]) -> tuple[list[_Run], list[Kept]]:
        """Return the runs that go whole; raises `UsageError` for a named one that cannot."""
        if rules.runs:
            going = {name: runs[name] for name in rules.runs}
            for run in going.values():
                if why := self._needed(run, runs, going, named=True):
                    raise UsageError(f"the run {run.id} {why}", hint=_hint_for(run))
            return list(going.values()), []
        if rules.older_than_s is None:
            return [], []
        before_s = self._clock() - rules.older_than_s
        going = {
            run.id: run for run in runs.values() if run.state in FINAL and run.ended_s < before_s
        }
        kept = []
        # Each that stays may be what another one is needed by.
        while needed := {
            run.id: why
            for run in going.values()
            if (why := self._needed(run, runs, going, named=False))
        }:
            kept += [Kept(run, why) for run, why in needed.items()]
            going = {name: run for name, run in going.items() if name not in needed}
        return list(going.values()), kept

    def _needed(
        self, run: _Run, runs: Mapping[str, _Run], going: Collection[str], *, named: bool
    ) -> str | None:
        """Say what keeps a run from being removed, or return None."""
        if run.state not in FINAL:
            return f"is {run.state}"
        if run.busy:
            return "has ended, and its end is still being seen to"
        if run.deployed:
            return f"is deployed as {run.deployed}"
        # What a run that is done was trained from nobody reads again: a person may remove it.
        staying = [
            other.id
            for other in runs.values()
            if other.id not in going and not (named and other.state == "done")
        ]
        if users := self._references.trained_from(run.id, staying):
            return f"is what {users[0]} was trained from"
        if not named and (evaluations := self._references.evaluations_of(run.id)):
            return f"has an evaluation that is kept: {evaluations[0]}"
        return None

    def _whole(self, going: Iterable[_Run]) -> Iterator[Item]:
        for run in going:
            days = (self._clock() - run.ended_s) / DAY_S
            why = f"{run.state}, ended {days:.0f} days ago" if days >= 1 else run.state
            if evaluations := self._references.evaluations_of(run.id):
                why += f"; what was found of it in {', '.join(evaluations)} stays"
            path = self._home.runs / run.id
            yield self._item("run", [path], why, run)

    # Parts of runs that have ended.

    def _parts(self, run: _Run, rules: Rules) -> Iterator[Item]:
        store = self._home.runs / run.id
        attempts = [path for path in listed(store / "attempts") if _ATTEMPT.fullmatch(path.name)]
        if run.state == "done":
            states = CheckpointStore(store).unneeded()
            yield self._item("state", states, "done: nothing resumes from it", run)
        copies = _there(path / "environment" for path in attempts)
        torn = [path for folder in (store, *attempts) for path in self._torn(folder)]
        yield self._item("leftover", [*copies, *torn], "of a worker that was killed", run)
        if rules.rollouts:
            yield self._item("rollouts", _there([store / "rollouts"]), run.state, run)
        if rules.logs:
            logs = _there(path / "worker.log" for path in attempts)
            yield self._item("logs", logs, run.state, run)

    # What belongs to no run.

    def _leftovers(self, runs: Collection[str]) -> Iterator[Item]:
        root = self._home.root
        yield self._item("leftover", listed(root / TRASH), "of a removal that was cut short")
        cut = cut_short(self._home, runs)
        yield self._item("leftover", cut, "of a submit or a removal that was cut short")
        torn = [path for name in (".", "secrets", "evals") for path in self._torn(root / name)]
        yield self._item("leftover", torn, "of a write that was cut short")
        for path in copies.needless(self._home, self._deployments):
            if self._unused_s(path) > _SETTLED_S:
                yield self._item("deployment", [path], "a copy of what was undeployed")
        yield self._item("logs", logs_of_ended_chats(self._home), "of chats that have ended")
        secrets = (path for path in listed(root / "secrets") if path.suffix == ".json")
        yield self._item("secrets", [one for one in secrets if one.stem not in runs], "of no run")

    def _torn(self, folder: Path) -> list[Path]:
        """Return what `flash.files` has not got to rename."""
        return [
            path
            for path in listed(folder)
            if _TORN.fullmatch(path.name) and self._unused_s(path) > _SETTLED_S
        ]

    def _caches(self, runs: dict[str, _Run]) -> Iterator[Item]:
        for adapter in self._adapters():
            used = self._references.starts_at(adapter, runs)
            if not used and self._unused_s(adapter) > _SETTLED_S:
                yield self._item("adapter", [adapter], "downloaded; no run was trained from it")
        live = [run.created_s for run in runs.values() if run.state not in FINAL]
        for name, what in (("overlays", "packages"), ("environments", "an environment")):
            for path in listed(self._home.root / name):
                if not path.is_dir():
                    continue
                unused_s = self._unused_s(path)
                used_by_a_run = any(self._clock() - unused_s > start_s - DAY_S for start_s in live)
                most_s = _SETTLED_S if path.name.startswith(".") else UNUSED_S
                if unused_s > most_s and not used_by_a_run:
                    why = f"{what}, fetched and not used for {unused_s / DAY_S:.0f} days"
                    yield self._item("cache", [path], why)

    def _adapters(self) -> Iterator[Path]:
        root = self._home.root / "adapters"
        for current, names, files in os.walk(root):
            if "adapter_config.json" in files:
                names.clear()
                yield root / current

    def _unused_s(self, path: Path) -> float:
        try:
            return self._clock() - path.lstat().st_mtime
        except OSError:
            return 0.0

    def _item(self, kind: Kind, paths: Iterable[Path], why: str, run: _Run | None = None) -> Item:
        found = tuple(paths)
        size_bytes = sum(map(disk_bytes, found))
        run_id, seen = (run.id, run.seen) if run else (None, None)
        return Item(kind=kind, paths=found, why=why, size_bytes=size_bytes, run=run_id, seen=seen)

    # Removing.

    def _remove(self, item: Item) -> str | None:
        """Remove one thing, or return why it stays. Raises `StoreError`."""
        why = None
        if item.kind == "run":
            why = self._remove_run(item)
        elif item.run is not None:
            why = self._remove_part(item)
        elif item.kind == "leftover":
            self._remove_leftovers(item)
        elif item.kind == "deployment":
            why = copies.remove_needless(self._home, self._deployments, item.paths[0])
        else:
            why = self._remove_unused(item)
        empty_trash(self._home)
        return why

    def _remove_run(self, item: Item) -> str | None:
        (store,) = item.paths
        with self._database.writing() as connection:
            if why := _has_changed(connection, item):
                return why
            row = tables.runs.c
            others = sa.select(row.id).where(row.id != item.run, row.state != "done")
            live = connection.scalars(others).all()
            if users := self._references.trained_from(str(item.run), live):
                return f"it is what {users[0]} was trained from"
            if store.is_dir() and not store.is_symlink():
                disown(store)
            _delete(connection, str(item.run))
        remove(set_aside(store, self._home))
        remove(self._home.root / "secrets" / f"{item.run}.json")
        return None

    def _remove_part(self, item: Item) -> str | None:
        with self._database.writing() as connection:
            if why := _has_changed(connection, item):
                return why
            if item.kind != "state":
                aside = [set_aside(path, self._home) for path in item.paths]
        if item.kind == "state":  # of a run that is done, and nothing leads out of that
            CheckpointStore(self._home.runs / str(item.run)).thin()
        else:
            for path in aside:
                remove(path)
        return None

    def _remove_leftovers(self, item: Item) -> None:
        with self._database.writing() as connection:
            sweep_uncommitted(self._home, {run.id for run in _runs(connection)})
        sweep_incoming(self._home)
        for path in item.paths:
            if _TORN.fullmatch(path.name):
                remove(path)

    def _remove_unused(self, item: Item) -> str | None:
        """Remove what no run needs, if none has come that does."""
        with self._database.writing() as connection:
            runs = [run.id for run in _runs(connection)]
            if any(self._references.starts_at(path, runs) for path in item.paths):
                return "a run that was submitted meanwhile starts from it"
            needless = [path for path in item.paths if path.stem not in runs]
            aside = [set_aside(path, self._home) for path in needless]
        for path in aside:
            remove(path)
        return None


def _runs(connection: sa.Connection, name: str | None = None) -> list[_Run]:
    """Return every run, or the one of this name."""
    runs, attempts, notices = tables.runs.c, tables.attempts.c, tables.notices.c
    unreleased = sa.exists().where(attempts.run == runs.id, attempts.state != "released")
    untold = sa.exists().where(notices.run == runs.id, notices.not_before_s.is_not(None))
    row = tables.deployments.c
    served = sa.select(sa.func.min(row.id)).where(row.run == runs.id, row.state != "undeployed")
    query = sa.select(
        runs.id,
        runs.state,
        runs.fence,
        runs.created_s,
        runs.updated_s,
        sa.func.coalesce(runs.finished_s, runs.updated_s).label("ended_s"),
        (unreleased | untold).label("busy"),
        served.scalar_subquery().label("deployed"),
    )
    if name is not None:
        query = query.where(runs.id == name)
    return [_Run(**row) for row in connection.execute(query).mappings()]


def _has_changed(connection: sa.Connection, item: Item) -> str | None:
    """Return a sentence where the run of `item` is not as it was shown."""
    now = next(iter(_runs(connection, item.run)), None)
    if now is None:
        return "somebody else has removed the run"
    if now.seen != item.seen or not now.settled:
        return f"the run has gone on meanwhile; it is {now.state}"
    if item.kind == "run" and now.deployed:
        return f"it is deployed as {now.deployed}"
    return None


def _delete(connection: sa.Connection, run: str) -> None:
    """Delete the rows of a run."""
    rows = tables.runs.c
    newest = connection.scalar(sa.select(sa.func.max(rows.change)))
    connection.execute(tables.notices.delete().where(tables.notices.c.run == run))
    connection.execute(tables.attempts.delete().where(tables.attempts.c.run == run))
    connection.execute(tables.deployments.delete().where(tables.deployments.c.run == run))
    connection.execute(tables.runs.delete().where(rows.id == run))
    # Change numbers only ever grow: who has read this one must not be told it again for another.
    last = sa.select(rows.id).order_by(rows.change.desc()).limit(1).scalar_subquery()
    connection.execute(tables.runs.update().where(rows.id == last).values(change=newest))


def _hint_for(run: _Run) -> str:
    if run.state not in FINAL:
        return f"flash cancel {run.id} ends it"
    if run.deployed:
        return f"first: flash undeploy {run.deployed}"
    return "try again in a moment" if run.busy else "remove that one first, or both together"


def _there(paths: Iterable[Path]) -> list[Path]:
    return [path for path in paths if path.exists() or path.is_symlink()]
