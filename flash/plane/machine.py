"""
The states of runs and attempts, as data: what each event does in each state.

    queued ─launch→ provisioning ─start→ running ─finish→ done
      ↑ ↑                │                  │    ─fail→   failed    ─┐
      │ └────requeue─────┴──────────────────┘    ─cancel→ cancelled ─┤
      └───────────────────────────resume─────────────────────────────┘

`done`, `failed` and `cancelled` are final: nothing that a worker, a provider or the supervisor
says leads out of them. A person's `flash resume` does, and nothing else. Every pair of a state and
an event is in the table; where an event changes nothing, that is said there too.
`docs/explanation/runs.md` shows the tables and is tested against them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal, get_args

import attrs

if TYPE_CHECKING:
    from collections.abc import Mapping

RunState = Literal["queued", "provisioning", "running", "done", "failed", "cancelled"]
RunEvent = Literal[
    "ask_cancel",  # a person asks for the end
    "launch",  # a launch is about to be asked for: its attempt is recorded
    "start",  # the provider sees the worker run
    "requeue",  # the attempt ended, and the run is tried again
    "finish",  # the attempt ended with everything done
    "fail",  # the run ends without its result
    "cancel",  # the attempt ended after the run's end was asked for
    "resume",  # a person has a run that ended go on
]
Action = Literal[
    "mark cancel",  # the end is asked for; the supervisor stops the attempt
    "take fence",  # from now on only the new attempt may speak for the run
    "stamp end",  # when the run ended
    "clear end",  # a run that goes on has not ended, and nobody asks for its end
    "tell",  # whoever follows the run from outside gets a notice
]
AttemptAction = Literal["note reference", "note reason", "note spending", "note outcome"]
AttemptState = Literal["launching", "live", "ended", "released"]
"""
launching: written before the provider was asked; live: it has answered with a reference;
ended: the outcome is known, something may still be there; released: the provider says gone.
"""
AttemptEvent = Literal[
    "see",  # the provider shows the instance, or what it says of it has changed
    "stop",  # the attempt is being stopped; the first reason stays
    "spend",  # its worker says what it has spent
    "end",  # the outcome is known; the first to say it is heard
    "release",  # nothing is left of it
]

RUN_STATES: Final = get_args(RunState)
RUN_EVENTS: Final = get_args(RunEvent)
ATTEMPT_STATES: Final = get_args(AttemptState)
ATTEMPT_EVENTS: Final = get_args(AttemptEvent)
FINAL: Final[frozenset[RunState]] = frozenset({"done", "failed", "cancelled"})


@attrs.frozen
class Step:
    """Where an event leads, and what is done in the same transaction."""

    target: RunState
    actions: tuple[Action, ...] = ()


@attrs.frozen
class AttemptStep:
    """The same of an attempt."""

    target: AttemptState
    actions: tuple[AttemptAction, ...] = ()


_ENDS: Final[tuple[Action, ...]] = ("stamp end", "tell")
_RESUMES: Final[tuple[Action, ...]] = ("clear end", "tell")
_DONE, _FAILED, _CANCELLED = Step("done"), Step("failed"), Step("cancelled")

TABLE: Final[Mapping[tuple[RunState, RunEvent], Step]] = {
    ("queued", "ask_cancel"): Step("cancelled", ("mark cancel", *_ENDS)),
    ("queued", "launch"): Step("provisioning", ("take fence",)),
    ("queued", "start"): Step("queued"),
    ("queued", "requeue"): Step("queued"),
    ("queued", "finish"): Step("queued"),
    ("queued", "fail"): Step("failed", _ENDS),
    ("queued", "cancel"): Step("cancelled", _ENDS),
    ("queued", "resume"): Step("queued"),
    ("provisioning", "ask_cancel"): Step("provisioning", ("mark cancel",)),
    ("provisioning", "launch"): Step("provisioning"),
    ("provisioning", "start"): Step("running", ("tell",)),
    ("provisioning", "requeue"): Step("queued", ("tell",)),
    ("provisioning", "finish"): Step("done", _ENDS),
    ("provisioning", "fail"): Step("failed", _ENDS),
    ("provisioning", "cancel"): Step("cancelled", _ENDS),
    ("provisioning", "resume"): Step("provisioning"),
    ("running", "ask_cancel"): Step("running", ("mark cancel",)),
    ("running", "launch"): Step("running"),
    ("running", "start"): Step("running"),
    ("running", "requeue"): Step("queued", ("tell",)),
    ("running", "finish"): Step("done", _ENDS),
    ("running", "fail"): Step("failed", _ENDS),
    ("running", "cancel"): Step("cancelled", _ENDS),
    ("running", "resume"): Step("running"),
    ("done", "ask_cancel"): _DONE,
    ("done", "launch"): _DONE,
    ("done", "start"): _DONE,
    ("done", "requeue"): _DONE,
    ("done", "finish"): _DONE,
    ("done", "fail"): _DONE,
    ("done", "cancel"): _DONE,
    ("done", "resume"): _DONE,
    ("failed", "ask_cancel"): _FAILED,
    ("failed", "launch"): _FAILED,
    ("failed", "start"): _FAILED,
    ("failed", "requeue"): _FAILED,
    ("failed", "finish"): _FAILED,
    ("failed", "fail"): _FAILED,
    ("failed", "cancel"): _FAILED,
    ("failed", "resume"): Step("queued", _RESUMES),
    ("cancelled", "ask_cancel"): _CANCELLED,
    ("cancelled", "launch"): _CANCELLED,
    ("cancelled", "start"): _CANCELLED,
    ("cancelled", "requeue"): _CANCELLED,
    ("cancelled", "finish"): _CANCELLED,
    ("cancelled", "fail"): _CANCELLED,
    ("cancelled", "cancel"): _CANCELLED,
    ("cancelled", "resume"): Step("queued", _RESUMES),
}

ATTEMPT_TABLE: Final[Mapping[tuple[AttemptState, AttemptEvent], AttemptStep]] = {
    ("launching", "see"): AttemptStep("live", ("note reference",)),
    ("launching", "stop"): AttemptStep("launching", ("note reason",)),
    ("launching", "spend"): AttemptStep("launching", ("note spending",)),
    ("launching", "end"): AttemptStep("ended", ("note outcome",)),
    ("launching", "release"): AttemptStep("launching"),
    ("live", "see"): AttemptStep("live", ("note reference",)),
    ("live", "stop"): AttemptStep("live", ("note reason",)),
    ("live", "spend"): AttemptStep("live", ("note spending",)),
    ("live", "end"): AttemptStep("ended", ("note outcome",)),
    ("live", "release"): AttemptStep("live"),
    ("ended", "see"): AttemptStep("ended"),
    ("ended", "stop"): AttemptStep("ended"),
    ("ended", "spend"): AttemptStep("ended"),
    ("ended", "end"): AttemptStep("ended"),
    ("ended", "release"): AttemptStep("released"),
    ("released", "see"): AttemptStep("released"),
    ("released", "stop"): AttemptStep("released"),
    ("released", "spend"): AttemptStep("released"),
    ("released", "end"): AttemptStep("released"),
    ("released", "release"): AttemptStep("released"),
}


def changes(state: RunState, event: RunEvent) -> bool:
    """Say whether the event does anything to a run in this state."""
    step = TABLE[state, event]
    return step.target != state or bool(step.actions)


def origins(event: AttemptEvent) -> list[AttemptState]:
    """Return the states of an attempt in which the event does anything."""
    return [
        state
        for state in ATTEMPT_STATES
        if (step := ATTEMPT_TABLE[state, event]).target != state or step.actions
    ]
