"""
Runs and attempts: the state machine as a table, and the records that obey it.

    queued ─launch→ provisioning ─start→ running ─finish→ done
       ↑                 │                  │    ─fail→   failed
       └────requeue──────┴──────────────────┘    ─cancel→ cancelled

The last three are final: no event leads out of them. Every change is one compare-and-set in SQL
on the state and the run's fence. The fence is the number of the attempt that may speak for the
run; it grows with each launch, so whoever still acts for an earlier attempt changes nothing.
"""

from __future__ import annotations

import secrets
import time
from typing import TYPE_CHECKING, Any, Final, Literal

import attrs
import sqlalchemy as sa

from flash.errors import StoreError
from flash.plane import database as tables
from flash.plane.ids import ALPHABET

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from flash.plane.database import Database
    from flash.values import Offer, Outcome

RunState = Literal["queued", "provisioning", "running", "done", "failed", "cancelled"]
RunEvent = Literal["launch", "start", "requeue", "finish", "fail", "cancel"]

TRANSITIONS: Final[Mapping[tuple[RunState, RunEvent], RunState]] = {
    ("queued", "launch"): "provisioning",
    ("queued", "fail"): "failed",
    ("queued", "cancel"): "cancelled",
    ("provisioning", "start"): "running",
    ("provisioning", "requeue"): "queued",
    ("provisioning", "finish"): "done",
    ("provisioning", "fail"): "failed",
    ("provisioning", "cancel"): "cancelled",
    ("running", "requeue"): "queued",
    ("running", "finish"): "done",
    ("running", "fail"): "failed",
    ("running", "cancel"): "cancelled",
}
FINAL: Final[frozenset[RunState]] = frozenset({"done", "failed", "cancelled"})

AttemptState = Literal["launching", "live", "ended", "released"]
"""
launching: written before the provider was asked; live: it has answered with a reference;
ended: the outcome is known, something may still be there; released: the provider says gone.
"""

_OWNER_LENGTH = 8


@attrs.frozen(kw_only=True)
class Run:
    """One run as the database has it. Times are seconds since the epoch."""

    id: str
    state: RunState
    fence: int
    cancel_requested: bool
    not_before_s: float | None
    waiting: str | None
    spec: Mapping[str, Any] = attrs.field(repr=False)
    caller: Mapping[str, str] = attrs.field(repr=False)
    error: str | None
    hint: str | None
    created_s: float
    updated_s: float
    finished_s: float | None

    @property
    def final(self) -> bool:
        """Whether nothing can change it any more."""
        return self.state in FINAL


@attrs.frozen(kw_only=True)
class Attempt:
    """One launch of a run's job; `fence` orders launches over all runs."""

    fence: int
    run: str
    number: int
    state: AttemptState
    provider: str
    offer: Mapping[str, Any]
    ref: Mapping[str, Any] | None
    stopping: Outcome | None
    outcome: Outcome | None
    exit_code: int | None
    detail: str | None
    started_s: float
    ended_s: float | None

    @property
    def worker_pid(self) -> int | None:
        """The worker's process where the provider runs it on this machine and says so."""
        return None if self.ref is None else self.ref.get("worker_pid")


@attrs.frozen(kw_only=True)
class Ending:
    """How an attempt ended, and what that makes of its run."""

    outcome: Outcome
    event: RunEvent
    exit_code: int | None = None
    detail: str = ""
    error: str | None = None
    hint: str | None = None
    not_before_s: float | None = None


class Records:
    """The runs and attempts of one database. Changes answer whether they took place."""

    def __init__(self, database: Database, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock

    def owner(self) -> str:
        """Return this plane's identity, made on first use."""
        with self._database.reading() as connection:
            owner = connection.scalar(sa.select(tables.identity.c.owner))
        if owner is None:
            made = "".join(secrets.choice(ALPHABET) for _ in range(_OWNER_LENGTH))
            with self._database.writing() as connection:
                owner = connection.scalar(sa.select(tables.identity.c.owner))
                if owner is None:
                    connection.execute(tables.identity.insert().values(owner=made))
                    owner = made
        return str(owner)

    def add(
        self,
        run: str,
        *,
        spec: Mapping[str, Any],
        caller: Mapping[str, str],
        put: Callable[[], None],
        take_back: Callable[[], None],
    ) -> None:
        """
        Add a queued run; a run is there with all its files, or not at all.

        `put` puts the files in place, inside the transaction; `take_back` undoes that where the
        transaction fails after. Raises `StoreError` for an id that exists.
        """
        now_s = self._clock()
        row = {"id": run, "state": "queued", "spec": dict(spec), "caller": dict(caller)}
        putting = False
        try:
            with self._database.writing() as connection:
                connection.execute(
                    tables.runs.insert().values(**row, created_s=now_s, updated_s=now_s)
                )
                putting = True
                put()
        except BaseException as error:
            if putting:
                take_back()
            if isinstance(error, sa.exc.IntegrityError):
                message = f"the run {run} exists already"
                hint = "submit again; it will get another id"
                raise StoreError(message, hint=hint) from error
            raise

    def run(self, run: str) -> Run | None:
        """Return the run, or None."""
        return next(iter(self._runs(tables.runs.c.id == run)), None)

    def runs(self, *, prefix: str = "") -> list[Run]:
        """Return the runs whose id starts with `prefix`, newest first."""
        return self._runs(tables.runs.c.id.startswith(prefix, autoescape=True))

    def newest(self) -> Run | None:
        """Return the newest run, or None."""
        return next(iter(self._runs(sa.true(), limit=1)), None)

    def unfinished(self) -> list[Run]:
        """
        Return the runs that are not final, or of which something may still be running.

        Oldest first: who came first is served first.
        """
        unreleased = sa.select(tables.attempts.c.run).where(tables.attempts.c.state != "released")
        found = self._runs(
            tables.runs.c.state.not_in(sorted(FINAL)) | tables.runs.c.id.in_(unreleased)
        )
        return found[::-1]

    def with_states(self, act: Callable[[Mapping[str, RunState]], None]) -> None:
        """Call `act` with the state of every run while none can be added."""
        query = sa.select(tables.runs.c.id, tables.runs.c.state)
        with self._database.writing() as connection:
            act({row.id: row.state for row in connection.execute(query)})

    def attempts(self, run: str) -> list[Attempt]:
        """Return the run's attempts in order."""
        query = (
            sa.select(tables.attempts)
            .where(tables.attempts.c.run == run)
            .order_by(tables.attempts.c.number)
        )
        with self._database.reading() as connection:
            return [Attempt(**row) for row in connection.execute(query).mappings()]

    def request_cancel(self, run: str) -> None:
        """Have the run cancelled: now if it waits, else once its worker has ended."""
        with self._database.writing() as connection:
            connection.execute(
                tables.runs.update()
                .where(tables.runs.c.id == run, tables.runs.c.state.not_in(sorted(FINAL)))
                .values(cancel_requested=True, updated_s=self._clock())
            )
            self._move(connection, run, "cancel", states={"queued"})

    def wait(self, run: Run, reason: str, *, not_before_s: float) -> None:
        """Say why a queued run waits, and until when at least."""
        with self._database.writing() as connection:
            connection.execute(
                tables.runs.update()
                .where(tables.runs.c.id == run.id, tables.runs.c.state == "queued")
                .values(waiting=reason, not_before_s=not_before_s)
            )

    def give_up(self, run: Run, error: str, hint: str | None) -> bool:
        """Fail a run that cannot even be launched."""
        with self._database.writing() as connection:
            return self._move(connection, run.id, "fail", states={"queued"}, error=error, hint=hint)

    def begin(self, run: Run, provider: str, offer: Offer) -> Attempt | None:
        """
        Record the intent to launch; None when the run was cancelled or launched meanwhile.

        The new attempt's fence becomes the run's.
        """
        number = sa.select(sa.func.coalesce(sa.func.max(tables.attempts.c.number), 0) + 1).where(
            tables.attempts.c.run == run.id
        )
        with self._database.writing() as connection:
            if not self._move(
                connection,
                run.id,
                "launch",
                old_fence=run.fence,
                waiting=None,
                not_before_s=None,
            ):
                return None
            made = connection.execute(
                tables.attempts.insert()
                .values(
                    run=run.id,
                    number=number.scalar_subquery(),
                    state="launching",
                    provider=provider,
                    offer=attrs.asdict(offer),
                    started_s=self._clock(),
                )
                .returning(tables.attempts)
            )
            attempt = Attempt(**made.mappings().one())
            connection.execute(
                tables.runs.update().where(tables.runs.c.id == run.id).values(fence=attempt.fence)
            )
            return attempt

    def saw(self, attempt: Attempt, ref: Mapping[str, Any]) -> None:
        """Record what the provider says of a launch that is there."""
        with self._database.writing() as connection:
            connection.execute(
                tables.attempts.update()
                .where(
                    tables.attempts.c.fence == attempt.fence,
                    tables.attempts.c.state.in_(["launching", "live"]),
                )
                .values(state="live", ref=dict(ref))
            )

    def started(self, attempt: Attempt) -> bool:
        """Record that the worker runs."""
        with self._database.writing() as connection:
            return self._move(connection, attempt.run, "start", old_fence=attempt.fence)

    def stop(self, attempt: Attempt, outcome: Outcome) -> None:
        """Record that the attempt is being stopped and why; the first reason stays."""
        with self._database.writing() as connection:
            connection.execute(
                tables.attempts.update()
                .where(
                    tables.attempts.c.fence == attempt.fence, tables.attempts.c.stopping.is_(None)
                )
                .values(stopping=outcome)
            )

    def end(self, attempt: Attempt, ending: Ending) -> RunEvent | None:
        """
        Record how the attempt ended and move its run; return the event, None for a latecomer.

        Only the first to say how it ended is heard. A run that is to be cancelled is not queued
        again: whoever decided on `ending` may have looked before the cancel came.
        """
        with self._database.writing() as connection:
            ended = connection.execute(
                tables.attempts.update()
                .where(
                    tables.attempts.c.fence == attempt.fence,
                    tables.attempts.c.state.in_(["launching", "live"]),
                )
                .values(
                    state="ended",
                    outcome=ending.outcome,
                    exit_code=ending.exit_code,
                    detail=ending.detail,
                    ended_s=self._clock(),
                )
            )
            if ended.rowcount != 1:
                return None
            asked = sa.select(tables.runs.c.cancel_requested).where(tables.runs.c.id == attempt.run)
            cancelled = ending.event == "requeue" and connection.scalar(asked)
            event: RunEvent = "cancel" if cancelled else ending.event
            moved = self._move(
                connection,
                attempt.run,
                event,
                old_fence=attempt.fence,
                error=ending.error,
                hint=ending.hint,
                not_before_s=ending.not_before_s,
            )
            return event if moved else None

    def released(self, attempt: Attempt) -> None:
        """Record that the provider has nothing left of an ended attempt."""
        with self._database.writing() as connection:
            connection.execute(
                tables.attempts.update()
                .where(tables.attempts.c.fence == attempt.fence, tables.attempts.c.state == "ended")
                .values(state="released")
            )

    def _runs(self, condition: Any, *, limit: int | None = None) -> list[Run]:
        query = sa.select(tables.runs).where(condition).order_by(tables.runs.c.id.desc())
        with self._database.reading() as connection:
            return [Run(**row) for row in connection.execute(query.limit(limit)).mappings()]

    def _move(
        self,
        connection: sa.Connection,
        run: str,
        event: RunEvent,
        *,
        states: set[RunState] | None = None,
        old_fence: int | None = None,
        **values: Any,
    ) -> bool:
        """Apply `event` where the table allows it from the run's state, and the fence is ours."""
        origins = {state for (state, known) in TRANSITIONS if known == event}
        (target,) = {TRANSITIONS[state, event] for state in origins}
        now_s = self._clock()
        condition: Sequence[Any] = [
            tables.runs.c.id == run,
            tables.runs.c.state.in_(sorted(origins if states is None else states)),
        ]
        if old_fence is not None:
            condition = [*condition, tables.runs.c.fence == old_fence]
        if event == "launch":
            condition = [*condition, tables.runs.c.cancel_requested.is_(False)]
        moved = connection.execute(
            tables.runs.update()
            .where(*condition)
            .values(
                state=target,
                updated_s=now_s,
                finished_s=now_s if target in FINAL else None,
                **values,
            )
        )
        return moved.rowcount == 1
