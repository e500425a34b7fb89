"""
Bugs to plant, one at a time, to show that the simulation would catch them.

Each is a small wrong edit of production code: the function, what is written there, and what is
written instead. Where the code has changed so that the edit does not fit any more, planting fails.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
import textwrap
from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


@attrs.frozen
class Edit:
    """In `where` (`module:name` or `module:Class.name`), `wrong` is written instead of `right`."""

    where: str
    right: str
    wrong: str


def plant(name: str) -> None:
    """Have this process run the wrong code."""
    edits = BUGS[name]
    for where in dict.fromkeys(edit.where for edit in edits):
        _rewrite(where, [edit for edit in edits if edit.where == where])


def _rewrite(where: str, edits: Sequence[Edit]) -> None:
    module_name, _, path = where.partition(":")
    module = importlib.import_module(f"flash.plane.{module_name}")
    owner_name, _, name = path.rpartition(".")
    owner = getattr(module, owner_name) if owner_name else module
    right = vars(owner)[name]
    source = textwrap.dedent(inspect.getsource(right))
    for edit in edits:
        if source.count(edit.right) != 1:
            raise LookupError(f"{where} does not have, once, what is to be replaced: {edit.right}")
        source = source.replace(edit.right, edit.wrong)
    vars(module).update(unkept=unkept, asked_before=asked_before)
    made: dict[str, Any] = {}
    code = compile(f"from __future__ import annotations\n{source}", "planted", "exec")
    exec(code, vars(module), made)
    # Wherever it was imported to.
    loaded = [found for found in sys.modules.values() if found.__name__.startswith("flash.")]
    for place in [owner, *loaded]:
        if vars(place).get(name) is right:
            setattr(place, name, made[name])


@contextlib.contextmanager
def unkept(database: Any) -> Iterator[Any]:
    """Give a connection whose changes are gone at the end."""

    class _Undone(Exception):
        pass

    with contextlib.suppress(_Undone), database.writing() as connection:
        yield connection
        raise _Undone


def asked_before(listing: Any) -> Any:
    """Return which attempts were active when that was asked the last time."""
    now = listing._records.active()
    before = vars(listing).get("_before", now)
    listing._before = now
    return before


def _bug(where: str, *edits: str) -> tuple[Edit, ...]:
    return tuple(Edit(where, *pair) for pair in zip(edits[::2], edits[1::2], strict=True))


BUGS = {
    "a run that is to be cancelled is queued again": _bug(
        "records:Records.end",
        'if event == "requeue" and connection.scalar(asked):',
        "if False:",
    ),
    "a run that was cancelled meanwhile is launched": _bug(
        "records:Records.begin",
        'if state is None or state.fence != run.fence or state.state != "queued":',
        "if state is None:",
    ),
    "a launch is not recorded before it is asked for": _bug(
        "records:Records.begin",
        "with self._database.writing() as connection:",
        "with unkept(self._database) as connection:",
    ),
    "a launch that nobody knows of is asked for again": _bug(
        "decide:_unseen",
        "return LaunchAgain() if view.idempotent and not run.cancel_requested else Unconfirmed()",
        "return LaunchAgain()",
    ),
    "a listing that failed is an empty one": _bug(
        "listing:Listing._listed",
        "if answer.error is not None:",
        "answer = answer if answer.error is None else type(answer)({})\n"
        "    if answer.error is not None:",
    ),
    "what must not be ended is read before the listing": _bug(
        "listing:Listing._end_orphans",
        "self._records.active()",
        "asked_before(self)",
    ),
    "what nobody owns is left": _bug(
        "listing:Listing._end_orphans",
        "if name in self._asks:",
        "if True:",
    ),
    "an end is asked for once and never again": _bug(
        "decide:_stopping",
        "view.asked_s < ASK_AGAIN_S",
        "True",
    ),
    "an end is asked for before its reason is recorded": _bug(
        "supervision:Supervision._move_attempt",
        "self._records.stop(last, reason, detail)",
        "self._terminate(watched, last, 10.0)",
    ),
    "an attempt is released while its machine is there": _bug(
        "supervision:Supervision._release",
        "if attempt.ref is None:",
        "if True:",
    ),
    "a user's error is tried again": _bug(
        "policy:_decide",
        'if outcome == "user_error":',
        "if False:",
        "if count > rules[outcome]:",
        "if count > rules.get(outcome, 9):",
    ),
    "there is no limit to attempts": _bug(
        "policy:_decide",
        'if len(tries) >= rules["max_attempts"]:',
        "if False:",
    ),
    "there is no limit to retries of a kind": _bug(
        "policy:_decide",
        "if count > rules[outcome]:",
        "if False:",
    ),
    "what a run has cost is not looked at": _bug(
        "decide:_reason_to_stop",
        "if over is not None:",
        "if False:",
    ),
    "a run over its limit is launched again": _bug(
        "decide:_queued",
        "if over is not None:",
        "if False:",
    ),
    "what a run has worked is read off the wall clock": _bug(
        "watched:Watched.know",
        "in_this_boot = bool(last.boot) and last.boot == boot_id()",
        "in_this_boot = False",
    ),
    "what judges cost is not counted": _bug(
        "heard:Heard._take",
        'elif event.type == "spend":',
        "elif False:",
    ),
    "what another attempt reports is heard": _bug(
        "heard:Heard._take",
        "read_event(line, self._number)",
        "read_event(line)",
    ),
    "a worker that is silent is waited for": _bug(
        "decide:_reason_to_stop",
        "if view.silent_s > LOST_AFTER_S:",
        "if False:",
        "if view.idle_s > window_s:",
        "if view.idle_s > window_s and view.silent_s < LOST_AFTER_S:",
    ),
    "a worker that makes no progress is waited for": _bug(
        "decide:_reason_to_stop",
        "if view.idle_s > window_s:",
        "if False:",
    ),
    "a machine that is gone is taken for live": _bug(
        "decide:_active",
        "if instance.state not in LIVE:",
        'if instance.state not in LIVE and instance.state != "gone":',
    ),
    "a worker that ended well was stopped": _bug(
        "policy:outcome_of",
        "if instance.exit_code == EXIT_DONE:",
        "if instance.exit_code == EXIT_DONE and attempt.stopping is None:",
    ),
    "a run that is done can be cancelled": _bug(
        "records:Records._move",
        "if not changes(found.state, event):",
        'if found.state == "done" and event == "ask_cancel":\n'
        '        step = TABLE["running", "cancel"]\n'
        "    elif not changes(found.state, event):",
        "step = TABLE[found.state, event]",
        'step = TABLE["running" if found.state == "done" else found.state, '
        'event.replace("ask_", "") if found.state == "done" else event]',
    ),
    "nobody is told that a run failed": _bug(
        "records:Records._move",
        'if moved.rowcount == 1 and "tell" in step.actions:',
        'if moved.rowcount == 1 and "tell" in step.actions and event != "fail":',
    ),
    "a notice that was not delivered counts as delivered": _bug(
        "notices:Notifier._record",
        "if error is None:",
        "if True:",
    ),
    "a notice is tried once": _bug(
        "notices:Notifier._failed",
        "if tries >= MOST_TRIES:",
        "if True:",
    ),
    "secrets are forgotten before the last notice": _bug(
        "notices:Notifier.ended",
        "if told or not names:",
        "if True:",
    ),
    "secrets are forgotten while the run goes on": _bug(
        "outbox:Outbox.once_ended",
        "if found is not None and found[0] in FINAL:",
        "if found is not None:",
    ),
    "secrets are never forgotten": _bug(
        "notices:Notifier.ended",
        "self._outbox.once_ended(run, forget)",
        "return",
    ),
    "a run that goes on does not get its secrets": _bug(
        "records:Records.resume",
        "put()",
        "pass",
    ),
    "a change is passed over": _bug(
        "supervision:Supervision._read_changes",
        "self._seen = newest",
        "self._seen = newest + 1",
    ),
    "a run is added before its files are in place": _bug(
        "records:Records.add_all",
        "            putting = True\n            put()\n            return runs",
        "            putting = True\n        put()\n        return runs",
    ),
    "what a submit that was cut short has left stays": _bug(
        "store:sweep_uncommitted",
        "elif is_run_id(mark.parent.name):",
        "elif False:",
    ),
    "a submit that was cut short is swept though it was committed": _bug(
        "store:sweep_uncommitted",
        "if mark.parent.name in runs:",
        "if False:",
    ),
}

SEEN = {
    "a run that is to be cancelled is queued again": 21,
    "a listing that failed is an empty one": 23,
    "an end is asked for once and never again": 7,
    "a user's error is tried again": 87,
    "what a run has cost is not looked at": 5,
    "what a run has worked is read off the wall clock": 55,
    "what another attempt reports is heard": 25,
    "a worker that is silent is waited for": 136,
    "a worker that makes no progress is waited for": 25,
    "a worker that ended well was stopped": 8,
    "a notice that was not delivered counts as delivered": 3,
    "secrets are never forgotten": 7,
    "a run is added before its files are in place": 22,
    "what a submit that was cut short has left stays": 22,
    "a submit that was cut short is swept though it was committed": 58,
}
"""
A seed that caught the bug when they were last looked for from the first on; it is tried first.

Only for the rare ones: whoever changes the code changes the worlds, and then all seeds are tried.
"""
