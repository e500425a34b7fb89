"""
Deployments: the states as data, and their rows.

    deploying ─prove→ ready ─undeploy→ undeploying ─clear→ undeployed
      ↑  ↑ └─fail→ failed ─undeploy────────↑
      │  └─restart── ready
      └─deploy── from every state

A person deploys and undeploys; the rest is what the gateway says. Every change is one
compare-and-set on the generation, which grows with everything that a person asks: a gateway that
still acts for an earlier one changes nothing. Every pair of a state and an event is in the table;
`docs/explanation/deployments.md` shows it and is tested against it.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

import attrs
import sqlalchemy as sa

from flash.errors import UsageError
from flash.plane import database as tables

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from flash.plane.database import Database

State = Literal["deploying", "ready", "undeploying", "undeployed", "failed"]
Event = Literal[
    "deploy",  # a person asks for it, or for it with other settings
    "undeploy",  # a person does not want it any more
    "restart",  # it is not served yet, or no more: it is being served anew
    "prove",  # it answers, and is what was trained
    "fail",  # it cannot be served
    "clear",  # nothing is left of it
]
Action = Literal[
    "new generation",  # from now on only who has read this may speak for it
    "note",  # the reason, what to do about it, and the report are recorded
]

STATES: Final = get_args(State)
EVENTS: Final = get_args(Event)
LIVE: Final[frozenset[State]] = frozenset({"deploying", "ready"})
"""It is served, or will be, if nothing keeps it from that."""

UNSETTLED: Final[frozenset[State]] = LIVE | {"undeploying"}
"""There is something to do, or to keep up."""


@attrs.frozen
class Step:
    """Where an event leads, and what is done in the same transaction."""

    target: State
    actions: tuple[Action, ...] = ()


_ASKED: Final[tuple[Action, ...]] = ("new generation",)
_SAID: Final[tuple[Action, ...]] = ("note",)

TABLE: Final[Mapping[tuple[State, Event], Step]] = {
    ("deploying", "deploy"): Step("deploying", _ASKED),
    ("deploying", "undeploy"): Step("undeploying", _ASKED),
    ("deploying", "restart"): Step("deploying", _SAID),
    ("deploying", "prove"): Step("ready", _SAID),
    ("deploying", "fail"): Step("failed", _SAID),
    ("deploying", "clear"): Step("deploying"),
    ("ready", "deploy"): Step("deploying", _ASKED),
    ("ready", "undeploy"): Step("undeploying", _ASKED),
    ("ready", "restart"): Step("deploying", _SAID),
    ("ready", "prove"): Step("ready", _SAID),
    ("ready", "fail"): Step("failed", _SAID),
    ("ready", "clear"): Step("ready"),
    ("undeploying", "deploy"): Step("deploying", _ASKED),
    ("undeploying", "undeploy"): Step("undeploying"),
    ("undeploying", "restart"): Step("undeploying"),
    ("undeploying", "prove"): Step("undeploying"),
    ("undeploying", "fail"): Step("undeploying"),
    ("undeploying", "clear"): Step("undeployed", _SAID),
    ("undeployed", "deploy"): Step("deploying", _ASKED),
    ("undeployed", "undeploy"): Step("undeployed"),
    ("undeployed", "restart"): Step("undeployed"),
    ("undeployed", "prove"): Step("undeployed"),
    ("undeployed", "fail"): Step("undeployed"),
    ("undeployed", "clear"): Step("undeployed"),
    ("failed", "deploy"): Step("deploying", _ASKED),
    ("failed", "undeploy"): Step("undeploying", _ASKED),
    ("failed", "restart"): Step("failed"),
    ("failed", "prove"): Step("failed"),
    ("failed", "fail"): Step("failed"),
    ("failed", "clear"): Step("failed"),
}

_TOLD: Final[Mapping[State, Event]] = {
    "deploying": "restart",
    "ready": "prove",
    "failed": "fail",
    "undeployed": "clear",
}
"""What the gateway says -> the event that it is."""


def origins(event: Event) -> list[State]:
    """Return the states in which the event does anything."""
    return [
        state for state in STATES if (step := TABLE[state, event]).target != state or step.actions
    ]


@attrs.frozen(kw_only=True)
class Wish:
    """
    What a person wants served, and how.

    Attributes:
        id: what clients call the model: `<run>`, or `<run>/step-N`.
        run, step: whose adapter; None for the step of the final one.
        digest: of the manifest of its copy.
        model: `id` and `plugin` of the base model.
        backend: the serving plugin, and the `settings` of its table.
        thinking, stop: as in training.
        allow_drift: whether it is served though it is not as near to training as it should be.

    """

    id: str
    run: str
    step: int | None
    digest: str
    model: Mapping[str, str]
    backend: str
    settings: Mapping[str, Any]
    thinking: bool
    stop: tuple[str, ...] = attrs.field(converter=tuple)
    allow_drift: bool = False


@attrs.frozen(kw_only=True)
class Deployment(Wish):
    """One deployment as the database has it; times are seconds since the epoch."""

    state: State
    generation: int
    error: str | None
    hint: str | None
    report: Mapping[str, Any] | None
    created_s: float
    updated_s: float

    @property
    def wanted(self) -> Literal["served", "gone"]:
        """What a person asked for last."""
        return "gone" if self.state in {"undeploying", "undeployed"} else "served"

    @property
    def wish(self) -> Wish:
        """What was asked, without how far that is."""
        return Wish(**{name: getattr(self, name) for name in _WISH})

    @property
    def live(self) -> bool:
        """Whether it is served, or will be, if nothing keeps it from that."""
        return self.state in LIVE


_WISH: Final = [field.name for field in attrs.fields(Wish)]
_ROW: Final = tables.deployments.c
_UNSETTLED: Final = sa.select(tables.deployments).where(_ROW.state.in_(sorted(UNSETTLED)))
_ANY: Final = sa.select(sa.exists().where(_ROW.state.in_(sorted(UNSETTLED))))


class Deployments:
    """The deployments of one database. Changes answer whether they took place."""

    def __init__(self, database: Database, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock

    def all(self) -> list[Deployment]:
        """Return every deployment that there ever was, by id."""
        return self._read(sa.select(tables.deployments))

    def get(self, name: str) -> Deployment | None:
        """Return the deployment, or None."""
        return next(iter(self._read(sa.select(tables.deployments).where(_ROW.id == name))), None)

    def of(self, run: str) -> list[Deployment]:
        """Return every deployment that there ever was of a run, by id."""
        return self._read(sa.select(tables.deployments).where(_ROW.run == run))

    def wanted(self) -> list[Deployment]:
        """Return those that a gateway has something to do for, or to keep up; by id."""
        return self._read(_UNSETTLED)

    def any_wanted(self) -> bool:
        """Say whether there is one in `wanted`."""
        with self._database.reading() as connection:
            return bool(connection.scalar(_ANY))

    def ask(self, wish: Wish) -> Deployment:
        """
        Have it served, and return it; where the same is wanted and live, nothing changes.

        Raises `UsageError` where the run is gone.
        """
        plain = attrs.asdict(wish, recurse=False)
        plain |= {name: dict(plain[name]) for name in ("model", "settings")}
        plain["stop"] = list(wish.stop)
        now_s = self._clock()
        try:
            with self._database.writing() as connection:
                found = self._one(connection, wish.id)
                if found is None:
                    made = {"generation": 1, "state": "deploying", "created_s": now_s}
                    connection.execute(
                        tables.deployments.insert().values(**plain, **made, updated_s=now_s)
                    )
                elif not (found.live and found.wish == wish):
                    self._asked(connection, found, "deploy", **plain)
                after = self._one(connection, wish.id)
        except sa.exc.IntegrityError as error:
            message = f"the run {wish.run} was removed meanwhile"
            raise UsageError(message, hint="flash runs lists them") from error
        if after is None:
            message = "what was written a moment ago is there"
            raise AssertionError(message)
        return after

    def ask_gone(self, name: str) -> Deployment:
        """Have it served no more, and return it; raises `UsageError` where there is none."""
        with self._database.writing() as connection:
            found = self._one(connection, name)
            if found is not None:
                self._asked(connection, found, "undeploy")
                found = self._one(connection, name)
        if found is None:
            message = f"{name} is not deployed"
            raise UsageError(message, hint="flash deployments lists what is")
        return found

    def moved(
        self,
        deployment: Deployment,
        state: State,
        *,
        error: str | None = None,
        hint: str | None = None,
        report: Mapping[str, Any] | None = None,
    ) -> bool:
        """
        Record where the gateway has got to with a deployment, as it read it.

        False where somebody has asked for something else since, or where it leads to nothing.
        """
        event = _TOLD[state]
        with self._database.writing() as connection:
            done = connection.execute(
                tables.deployments.update()
                .where(
                    _ROW.id == deployment.id,
                    _ROW.generation == deployment.generation,
                    _ROW.state.in_(origins(event)),
                )
                .values(
                    state=state,
                    error=error,
                    hint=hint,
                    report=None if report is None else dict(report),
                    updated_s=self._clock(),
                )
            )
        return done.rowcount == 1

    def _asked(
        self, connection: sa.Connection, found: Deployment, event: Event, **values: Any
    ) -> None:
        step = TABLE[found.state, event]
        if "new generation" in step.actions:
            connection.execute(
                tables.deployments.update()
                .where(_ROW.id == found.id)
                .values(
                    **values,
                    state=step.target,
                    generation=found.generation + 1,
                    error=None,
                    hint=None,
                    report=None,
                    updated_s=self._clock(),
                )
            )

    def _one(self, connection: sa.Connection, name: str) -> Deployment | None:
        query = sa.select(tables.deployments).where(_ROW.id == name)
        row = connection.execute(query).mappings().one_or_none()
        return None if row is None else Deployment(**row)

    def _read(self, query: sa.Select[Any]) -> list[Deployment]:
        with self._database.reading() as connection:
            rows = connection.execute(query.order_by(_ROW.id)).mappings()
            return [Deployment(**row) for row in rows]
