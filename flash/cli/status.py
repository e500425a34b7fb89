"""`flash status`: how a run is doing, or how it ended and why, and what to do next."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any, Final

import click

from flash.cli.app import App, pass_app
from flash.cli.budget import budget_json, budget_line, needed_option
from flash.cli.follow import SPARKLINE_WIDTH, Log, Silence, follow, progress_view
from flash.cli.output import note, out, print_json
from flash.cli.progress import Progress, duration, held_out_since, metric_line, sparkline
from flash.cli.runs import COLOURS
from flash.cli.story import has_limits, now, story, usd, waiting, worked_s

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from flash.plane.plane import Plane
    from flash.plane.runs import Attempt, Run

_TAIL_LINES = 20

JSON_KEYS: Final = {
    "run": "its id",
    "state": "`queued`, `provisioning`, `running`, `done`, `failed` or `cancelled`",
    "spec": "every value it runs with",
    "attempts": "its launches, oldest first",
    "waiting": "why it is not running yet, or null",
    "not_before_s": "until when it waits at least, or null",
    "budget": "what it has used of its limits",
    "phase": "what the worker is doing, or null before it started",
    "step": "the optimizer step it has reached, or null",
    "total": "the steps there will be, or null",
    "metrics": "the numbers of that step by name, such as `loss`, `reward` and `tokens_per_s`",
    "evaluation": "the newest held-out `loss`, or `reward` and `success`, with their `step`; empty "
    "before the first",
    "evaluations": "every one of them, by step; one of step 0 is from before training",
    "losses": "`[step, loss]` of every step that was logged",
    "rewards": "the same of the mean reward; empty where nothing was sampled",
    "warnings": "what the worker warned of",
    "adapter": "the folder of the final adapter, or null",
    "deployments": "what is deployed of it: each with `deployment` and `state`",
    "store": "the folder that holds all that the run leaves",
    "error": "why it failed, or null",
    "hint": "what to do about that, or null",
    "cancel_requested": "whether somebody asked for its end",
    "created_s": "when it was submitted, in seconds since 1970",
    "updated_s": "when its record last changed",
    "finished_s": "when it ended, or null",
}

ATTEMPT_KEYS: Final = {
    "number": "1 for the first",
    "state": "how far it is",
    "provider": "the plugin that runs it",
    "offer": "what was rented there",
    "outcome": "how it ended, such as `finished`, `user_error` or `out_of_memory`; null before",
    "exit_code": "the worker's, where it is known",
    "detail": "a sentence on how it ended, or null",
    "stopping": "the outcome that it is being stopped for, or null",
    "then": "what was done about its end, in a sentence, or null",
    "step": "the newest checkpoint's when it ended, or null",
    "worked_s": "how long it worked, or has until now",
    "usd": "what that cost: the provider's price times the time, and `reported_usd`",
    "reported_usd": "what its worker reported as spent on rewards",
    "worker_pid": "the worker's process id where that is on this machine, or null",
    "started_s": "when it was launched",
    "ended_s": "when it ended, or null",
}


@click.command()
@click.argument("run")
@click.option("--logs", is_flag=True, help="Print the log of the newest attempt.")
@click.option("-f", "--follow", "following", is_flag=True, help="Follow the run to its end.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON; with --follow, at the end.")
@pass_app
@click.pass_context
def status(
    ctx: click.Context, app: App, run: str, *, logs: bool, following: bool, as_json: bool
) -> None:
    """
    Show how RUN is doing; follow it, read its log.

    RUN is an id, the start of one, or `last`. With --follow, the exit code is 0 when the run ends
    well and 1 when it does not.
    """
    from flash.plane.plane import Plane

    plane = Plane(app.home)
    record = plane.find(run)
    plane.supervise()
    if following and logs:
        ctx.exit(follow(plane, record.id, contextlib.nullcontext(Log(plane, record.id))))
    if following:
        ctx.exit(follow_to_the_end(plane, record.id, as_json=as_json))
    if as_json:
        print_json(describe(plane, record))
    elif logs:
        _print_log(plane, record.id)
    else:
        show_status(plane, record)


def follow_to_the_end(plane: Plane, run: str, *, as_json: bool, known: int = 0) -> int:
    """
    Follow the run, then print how it ended; return the exit code.

    Of its first `known` attempts nothing is told before the end.
    """
    view = contextlib.nullcontext(Silence()) if as_json else progress_view(known)
    code = follow(plane, run, view)
    record = plane.run(run)
    if record.final:
        if as_json:
            print_json(describe(plane, record))
        else:
            show_status(plane, record)
    return code


def go_on(plane: Plane, run: str, *, background: bool, as_json: bool, known: int = 0) -> int:
    """
    Follow a run that was just started to its end, or say how to; return the exit code.

    It has had `known` attempts before.
    """
    if not background:
        return follow_to_the_end(plane, run, as_json=as_json, known=known)
    if as_json:
        print_json({"run": run, "state": plane.run(run).state})
    else:
        out(run)
        note(f"flash status {run} --follow   shows how it goes")
    return 0


def describe(plane: Plane, record: Run) -> dict[str, Any]:
    """Return what `--json` prints; the keys are the contract."""
    progress = _progress(plane, record.id)
    final = plane.final(record.id)
    attempts = plane.attempts(record.id)
    return {
        "run": record.id,
        "state": record.state,
        "spec": record.spec,
        "attempts": [_described(attempt) for attempt in attempts],
        "waiting": record.waiting,
        "not_before_s": record.not_before_s,
        "budget": budget_json(record, attempts),
        "phase": progress.phase,
        "step": progress.step,
        "total": progress.total,
        "metrics": progress.metrics,
        "evaluation": progress.evaluation,
        "evaluations": [numbers for _, numbers in sorted(progress.evaluations.items())],
        "losses": [[step, loss] for step, loss in sorted(progress.curves["loss"].items())],
        "rewards": [[step, mean] for step, mean in sorted(progress.curves["reward"].items())],
        "warnings": progress.warnings,
        "adapter": str(final.adapter) if final else None,
        "deployments": [
            {"deployment": one.id, "state": one.state} for one in plane.deployed(record.id)
        ],
        "store": str(plane.store(record.id)),
        "error": record.error,
        "hint": record.hint,
        "cancel_requested": record.cancel_requested,
        "created_s": record.created_s,
        "updated_s": record.updated_s,
        "finished_s": record.finished_s,
    }


def _described(attempt: Attempt) -> dict[str, Any]:
    computed = {"worked_s": worked_s(attempt), "usd": usd(attempt)}
    return {
        name: computed[name] if name in computed else getattr(attempt, name)
        for name in ATTEMPT_KEYS
    }


def show_status(plane: Plane, record: Run) -> None:
    """Print the status for people: of a failed run the reason first, of any what to do next."""
    progress = _progress(plane, record.id)
    if record.state == "failed":
        _show_failure(plane, record)
    took = duration((record.finished_s or time.time()) - record.created_s)
    out(f"{record.id}  {record.state}  {took}", fg=COLOURS.get(record.state), bold=True)
    for line in _facts(plane, record, progress):
        out(f"  {line}")
    for warning in progress.warnings:
        out(f"  warning: {warning}", fg="yellow")
    out()
    for command, purpose in _next_steps(plane, record):
        out(f"  {command:<38} {purpose}", dim=True)


def _facts(plane: Plane, record: Run, progress: Progress) -> Iterator[str]:
    attempts = plane.attempts(record.id)
    yield f"{record.spec['algorithm']} of {record.spec['model']}"
    stopping = [now(attempt) for attempt in attempts if attempt.active and attempt.stopping]
    if stopping or (record.cancel_requested and not record.final):
        yield f"it {''.join(stopping) or 'is being stopped'}"
    waits = waiting(record, attempts, time.time())
    if waits:
        yield waits
    if progress.phase and any(each.active and each.number == progress.attempt for each in attempts):
        yield f"phase: {progress.phase}"
    if progress.step is not None:
        yield metric_line(progress, live=not record.final)
        name, values = progress.curve
        yield f"{name}  {sparkline(values, SPARKLINE_WIDTH)}"
    held_out = held_out_since(progress)
    if held_out:
        yield held_out
    retried = len(attempts) > 1 or record.state == "failed"
    if retried:
        yield from story(record, attempts)
    if retried or has_limits(record) or any(map(usd, attempts)):
        line = budget_line(record, attempts)
        yield from [line] if line else []
    final = plane.final(record.id)
    if final:
        yield f"adapter: {final.adapter}"
    for one in plane.deployed(record.id):
        yield f"deployed as {one.id}: {one.state}"


def _show_failure(plane: Plane, record: Run) -> None:
    from flash.plane.store import tail_lines

    out(f"error: {record.error}", fg="red", bold=True)
    if record.hint:
        out(f"hint: {record.hint}")
    log = _newest_log(plane, record.id)
    if log is not None:
        out()
        for line in tail_lines(log, _TAIL_LINES):
            out(f"  | {line}", dim=True)
        out(f"full log: {log}")
    out()


def _print_log(plane: Plane, run: str) -> None:
    from flash.plane.tail import LogTail

    log = _newest_log(plane, run)
    if log is None:
        note("the run has no log yet")
        return
    for line in LogTail(log).read(to_the_end=True):
        out(line)


def _newest_log(plane: Plane, run: str) -> Path | None:
    """Return the log of the newest attempt that has one."""
    logs = (plane.log(run, attempt.number) for attempt in reversed(plane.attempts(run)))
    return next((log for log in logs if log.exists()), None)


def _progress(plane: Plane, run: str) -> Progress:
    progress = Progress()
    progress.take(plane.events(run))
    return progress


def _next_steps(plane: Plane, record: Run) -> Iterator[tuple[str, str]]:
    from flash.worker.rollouts import kept_steps

    run = record.id
    if kept_steps(plane.store(run)):
        yield f"flash rollouts {run}", "what it said at each step, and its reward"
    if record.state == "done":
        yield f"flash eval {run}", "score it on held-out rows"
        yield f"flash deploy {run}", "serve it behind an OpenAI-compatible URL"
        yield f"flash checkpoints {run}", "the steps that were saved"
    elif not record.final:
        yield f"flash status {run} --follow", "watch it"
        yield f"flash cancel {run}", "stop it and keep its checkpoints"
    else:
        yield f"flash status {run} --logs", "the whole log"
        saved = plane.checkpoints(run)
        attempts = plane.attempts(run)
        if not attempts or attempts[-1].outcome != "user_error":
            start = f"from step {saved[-1].step}" if saved else "from the start"
            yield f"flash resume {run}{needed_option(record, attempts)}", f"have it go on {start}"
        if saved:
            yield (
                f"flash checkpoints {run}",
                "what was saved; any step can be evaluated or deployed",
            )
