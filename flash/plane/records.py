"""
Runs and attempts as the database has them; every change obeys the tables of `flash.plane.machine`.

A change of a run is one compare-and-set on its state and its fence. The fence is the number of the
attempt that may speak for the run; it grows with each launch, so whoever still acts for an earlier
attempt changes nothing. With each change goes, in the same transaction, what it does besides: the
time of the end, a notice for those who follow the run from outside, and the run's `change` number,
by which a reader finds what it has not seen.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import attrs
import sqlalchemy as sa

from flash.errors import StoreError
from flash.plane import database as tables
from flash.plane.identity import owner_of
from flash.plane.machine import ATTEMPT_TABLE, TABLE, changes, origins
from flash.plane.outbox import leave_notices, notice_of
from flash.plane.reading import UNSETTLED, read_active, read_places, read_supervised
from flash.plane.runs import Attempt, Run, Supervised

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from flash.plane.database import Database
    from flash.plane.machine import AttemptEvent, RunEvent, RunState
    from flash.plane.runs import Ending
    from flash.values import Offer, Outcome

# Statements that are run in every round are built once.
_NEWEST_CHANGE = sa.select(sa.func.coalesce(sa.func.max(tables.runs.c.change), 0))
_NEXT_CHANGE = sa.select(
    sa.func.coalesce(sa.func.max(tables.runs.c.change), 0) + 1
).scalar_subquery()

_ADD = (
    tables.runs.insert()
    .values(change=_NEXT_CHANGE)
    .returning(tables.runs, sort_by_parameter_order=True)
)


# In the order in which they were added, whatever the clock was then.
_NEWEST_FIRST = sa.text("runs.rowid DESC")


class Records:
    """The runs and attempts of one database. Changes answer whether they took place."""

    def __init__(self, database: Database, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock

    def owner(self) -> str:
        """Return this plane's identity, made on first use."""
        return owner_of(self._database)

    # What users do.

    def add(
        self,
        run: str,
        *,
        spec: Mapping[str, Any],
        caller: Mapping[str, str],
        put: Callable[[], None],
        take_back: Callable[[], None],
    ) -> None:
        """Add a queued run as `add_all` does."""
        row = {"id": run, "spec": dict(spec), "caller": dict(caller)}
        self.add_all([row], put=put, take_back=take_back)

    def add_all(
        self,
        rows: Sequence[Mapping[str, Any]],
        *,
        put: Callable[[], None],
        take_back: Callable[[], None],
    ) -> list[Run]:
        """
        Add queued runs and return them; they are there with all their files, or none of them is.

        A row has the run's `id`, `spec` and `caller`. `put` puts the files in place, inside the
        transaction; `take_back` undoes that where the transaction fails after. Raises
        `StoreError` for an id that exists.
        """
        now_s = self._clock()
        same = {"state": "queued", "created_s": now_s, "updated_s": now_s}
        putting = False
        try:
            with self._database.writing() as connection:
                added = connection.execute(_ADD, [{**row, **same} for row in rows])
                runs = [Run(**row) for row in added.mappings()]
                putting = True
                put()
                return runs
        except BaseException as error:
            # An interrupt is seen once the disk has taken the commit that it came with.
            if putting and not self._added(rows[0]["id"]):
                take_back()
            if isinstance(error, sa.exc.IntegrityError):
                known = ", ".join(row["id"] for row in rows if self.run(row["id"]) is not None)
                message = f"the run {known} exists already"
                hint = "submit again; it will get another id"
                raise StoreError(message, hint=hint) from error
            raise

    def _added(self, run: str) -> bool:
        """Say whether the run is there for all that is known."""
        try:
            return self.run(run) is not None
        except StoreError:
            return False

    def request_cancel(self, run: str) -> None:
        """Have the run cancelled: now if it waits, else once its worker has ended."""
        with self._database.writing() as connection:
            self._move(connection, run, "ask_cancel")

    def resume(
        self,
        run: str,
        *,
        budget: Mapping[str, Any] | None = None,
        put: Callable[[], None] = lambda: None,
    ) -> bool:
        """
        Have a failed or cancelled run go on; says whether it was one.

        What was tried before does not count as a try any more. `budget` replaces settings of the
        run's `[budget]`. `put` puts what it needs in place, inside the transaction.
        """
        last = sa.select(sa.func.coalesce(sa.func.max(tables.attempts.c.number), 0)).where(
            tables.attempts.c.run == run
        )
        with self._database.writing() as connection:
            values: dict[str, Any] = {"retries_from": last.scalar_subquery()}
            if budget:
                found = tables.runs.c.spec
                spec = connection.scalar(sa.select(found).where(tables.runs.c.id == run)) or {}
                values["spec"] = {**spec, "budget": {**spec.get("budget", {}), **budget}}
                values["budget_warned"] = False
            moved = self._move(connection, run, "resume", **values)
            if moved:
                row = tables.attempts.c
                words = sa.func.coalesce(row.then + "; ", "") + "resumed by hand"
                connection.execute(
                    tables.attempts.update()
                    .where(row.run == run, row.number == last.scalar_subquery())
                    .values(then=words)
                )
                put()
            return moved

    # What is read.

    def run(self, run: str) -> Run | None:
        """Return the run, or None."""
        return next(iter(self._runs(tables.runs.c.id == run)), None)

    def runs(self, *, prefix: str = "") -> list[Run]:
        """Return the runs whose id starts with `prefix`, newest first."""
        return self._runs(tables.runs.c.id.startswith(prefix, autoescape=True))

    def newest(self) -> Run | None:
        """Return the newest run, or None."""
        return next(iter(self._runs(sa.true(), limit=1)), None)

    def attempts(self, run: str) -> list[Attempt]:
        """Return the run's attempts in order."""
        query = (
            sa.select(tables.attempts)
            .where(tables.attempts.c.run == run)
            .order_by(tables.attempts.c.number)
        )
        with self._database.reading() as connection:
            return [Attempt(**row) for row in connection.execute(query).mappings()]

    def unsettled(self) -> list[str]:
        """Return the ids of runs that are not final, or of which something may still be running."""
        query = sa.select(tables.runs.c.id).where(UNSETTLED).order_by(tables.runs.c.id)
        with self._database.reading() as connection:
            return list(connection.scalars(query))

    def with_states(self, act: Callable[[Mapping[str, RunState]], None]) -> None:
        """Call `act` with the state of every run while none can be added."""
        query = sa.select(tables.runs.c.id, tables.runs.c.state)
        with self._database.writing() as connection:
            act({row.id: row.state for row in connection.execute(query)})

    # What the supervisor reads.

    def changes(self, after: int | None) -> tuple[list[Supervised], int]:
        """
        Return the runs that changed after the change `after`, oldest run first, and the newest one.

        With None, the runs that are not settled; also where the numbers began anew, because the
        newest runs were removed.
        """
        with self._database.reading() as connection:
            newest = connection.scalar(_NEWEST_CHANGE) or 0
            if newest == after:
                return [], newest
            if after is not None and newest < after:
                after = None
            condition = UNSETTLED if after is None else tables.runs.c.change > after
            return read_supervised(connection, condition), newest

    def active(self) -> set[tuple[str, int]]:
        """Return (run, number) of every attempt that has not ended: what it launched is its own."""
        with self._database.reading() as connection:
            return read_active(connection)

    def places(self, since_s: float) -> list[tuple[str, Mapping[str, Any]]]:
        """Return each provider, with its run's tables, that an attempt since was launched on."""
        with self._database.reading() as connection:
            return read_places(connection, since_s)

    # What the supervisor writes.

    def wait(self, run: Supervised, reason: str, *, not_before_s: float) -> None:
        """Say why a queued run waits, and until when at least."""
        with self._database.writing() as connection:
            connection.execute(
                tables.runs.update()
                .where(tables.runs.c.id == run.id, tables.runs.c.state == "queued")
                .values(waiting=reason, not_before_s=not_before_s, change=_NEXT_CHANGE)
            )

    def give_up(self, run: Supervised, error: str, hint: str | None) -> bool:
        """Fail a run that cannot even be launched."""
        with self._database.writing() as connection:
            return self._move(
                connection, run.id, "fail", origin="queued", fence=run.fence, error=error, hint=hint
            )

    def begin(
        self,
        run: Run | Supervised,
        provider: str,
        offer: Offer,
        *,
        boot: str = "",
        boot_s: float = 0.0,
    ) -> Attempt | None:
        """
        Record the intent to launch; None when the run was cancelled or launched meanwhile.

        The new attempt's fence becomes the run's.
        """
        number = sa.select(sa.func.coalesce(sa.func.max(tables.attempts.c.number), 0) + 1).where(
            tables.attempts.c.run == run.id
        )
        with self._database.writing() as connection:
            state = connection.execute(
                sa.select(tables.runs.c.state, tables.runs.c.fence).where(
                    tables.runs.c.id == run.id
                )
            ).one_or_none()
            if state is None or state.fence != run.fence or state.state != "queued":
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
                    boot=boot,
                    boot_s=boot_s,
                )
                .returning(tables.attempts)
            )
            attempt = Attempt(**made.mappings().one())
            self._move(
                connection,
                run.id,
                "launch",
                fence=run.fence,
                attempt=attempt,
                waiting=None,
                not_before_s=None,
            )
            return attempt

    def saw(self, attempt: Attempt, ref: Mapping[str, Any]) -> bool:
        """Record what the provider says of a launch that is there."""
        return self._step(attempt, "see", ref=dict(ref))

    def started(self, attempt: Attempt) -> bool:
        """Record that the worker runs."""
        with self._database.writing() as connection:
            return self._move(
                connection, attempt.run, "start", fence=attempt.fence, attempt=attempt
            )

    def stop(self, attempt: Attempt, outcome: Outcome, detail: str | None = None) -> bool:
        """Record that the attempt is being stopped, why and in which words; the first stay."""
        known = tables.attempts.c
        return self._step(
            attempt,
            "stop",
            detail=sa.case((known.stopping.is_(None), detail), else_=known.detail),
            stopping=sa.func.coalesce(known.stopping, outcome),
        )

    def spent(self, attempt: Attempt, reported_usd: float) -> bool:
        """Record what the attempt's worker said that it spent."""
        return self._step(attempt, "spend", reported_usd=reported_usd)

    def end(self, attempt: Attempt, ending: Ending) -> RunEvent | None:
        """
        Record how the attempt ended and move its run; return the event, None for a latecomer.

        Only the first to say how it ended is heard. A run that is to be cancelled is not queued
        again: whoever decided on `ending` may have looked before the cancel came.
        """
        then = ending.then
        with self._database.writing() as connection:
            asked = sa.select(tables.runs.c.cancel_requested).where(tables.runs.c.id == attempt.run)
            event = ending.event
            if event == "requeue" and connection.scalar(asked):
                event, then = "cancel", "not tried again: the run was cancelled"
            if not self._step_in(
                connection,
                attempt,
                "end",
                outcome=ending.outcome,
                exit_code=ending.exit_code,
                detail=ending.detail,
                ended_s=self._clock() if ending.ended_s is None else ending.ended_s,
                step=ending.step,
                then=then,
                reported_usd=ending.reported_usd,
            ):
                return None
            moved = self._move(
                connection,
                attempt.run,
                event,
                fence=attempt.fence,
                attempt=attempt,
                ending=attrs.evolve(ending, then=then),
                error=None if event == "cancel" else ending.error,
                hint=None if event == "cancel" else ending.hint,
                not_before_s=ending.not_before_s if event == "requeue" else None,
            )
            return event if moved else None

    def released(self, attempt: Attempt) -> bool:
        """Record that the provider has nothing left of an ended attempt."""
        return self._step(attempt, "release")

    def warned(self, run: str, words: Mapping[str, Any]) -> bool:
        """Record, once, that the run nears a limit of its budget, and tell those who follow it."""
        with self._database.writing() as connection:
            done = connection.execute(
                tables.runs.update()
                .where(tables.runs.c.id == run, tables.runs.c.budget_warned.is_(False))
                .values(budget_warned=True, change=_NEXT_CHANGE)
            )
            if done.rowcount == 1:
                leave_notices(connection, run, self._clock(), "budget_warning", words)
            return done.rowcount == 1

    # Moving by the tables.

    def _runs(self, condition: Any, *, limit: int | None = None) -> list[Run]:
        query = sa.select(tables.runs).where(condition).order_by(_NEWEST_FIRST)
        with self._database.reading() as connection:
            return [Run(**row) for row in connection.execute(query.limit(limit)).mappings()]

    def _step(self, attempt: Attempt, event: AttemptEvent, **values: Any) -> bool:
        with self._database.writing() as connection:
            return self._step_in(connection, attempt, event, **values)

    def _step_in(
        self, connection: sa.Connection, attempt: Attempt, event: AttemptEvent, **values: Any
    ) -> bool:
        """Apply `event` where the table lets it change anything; its run's change number grows."""
        row = tables.attempts.c
        targets = {state: ATTEMPT_TABLE[state, event].target for state in origins(event)}
        done = connection.execute(
            tables.attempts.update()
            .where(row.fence == attempt.fence, row.state.in_(targets))
            .values(**values, state=sa.case(targets, value=row.state))
        )
        if done.rowcount == 1:
            connection.execute(
                tables.runs.update()
                .where(tables.runs.c.id == attempt.run)
                .values(change=_NEXT_CHANGE)
            )
        return done.rowcount == 1

    def _move(  # noqa: PLR0913 - the event, who says it, and the columns it sets
        self,
        connection: sa.Connection,
        run: str,
        event: RunEvent,
        *,
        origin: RunState | None = None,
        fence: int | None = None,
        attempt: Attempt | None = None,
        ending: Ending | None = None,
        **values: Any,
    ) -> bool:
        """Do what the table says of `event`, if the fence is ours; say whether anything changed."""
        row = tables.runs.c
        found = connection.execute(
            sa.select(row.state, row.fence, row.cancel_requested).where(row.id == run)
        ).one_or_none()
        if found is None or (origin is not None and found.state != origin):
            return False
        if not changes(found.state, event):
            return False
        step = TABLE[found.state, event]
        now_s = self._clock()
        if "mark cancel" in step.actions:
            values["cancel_requested"] = True
        if "take fence" in step.actions and attempt is not None:
            values["fence"] = attempt.fence
        if "stamp end" in step.actions:
            values["finished_s"] = now_s
        if "clear end" in step.actions:
            values |= {"finished_s": None, "cancel_requested": False, "error": None, "hint": None}
            values |= {"not_before_s": None, "waiting": None}
        moved = connection.execute(
            tables.runs.update()
            .where(
                row.id == run,
                row.state == found.state,
                row.fence == (found.fence if fence is None else fence),
            )
            .values(state=step.target, updated_s=now_s, change=_NEXT_CHANGE, **values)
        )
        if moved.rowcount == 1 and "tell" in step.actions:
            leave_notices(
                connection,
                run,
                self._clock(),
                *notice_of(event, step.target, attempt, ending, values),
            )
        return moved.rowcount == 1
