"""`flash status`: how a run is doing, or how it ended and why, and what to do next."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from flash.cli.app import App
from flash.cli.follow import FINAL, follow
from flash.cli.output import out, print_json
from flash.cli.progress import Progress, duration, metric_line
from flash.cli.runs import COLOURS
from flash.plane.tail import EventTail

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from flash.plane.plane import Plane
    from flash.plane.runs import Run

_SPARKLINE_WIDTH = 40
_TAIL_LINES = 20
_TAIL_BYTES = 1 << 16


@click.command()
@click.argument("run")
@click.option("--logs", is_flag=True, help="Print the log of the newest attempt.")
@click.option("-f", "--follow", "following", is_flag=True, help="Follow the run to its end.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def status(ctx: click.Context, run: str, *, logs: bool, following: bool, as_json: bool) -> None:
    """
    Show how RUN is doing; follow it, read its log.

    RUN is an id, a unique prefix of one, or `last`. With --follow the exit code is 0 when the run
    ends well and 1 when it does not.
    """
    from flash.plane.plane import Plane

    app = ctx.ensure_object(App)
    plane = Plane(app.home, app.host)
    record = plane.find(run)
    if following and not as_json:
        code = follow(plane, record.id)
        if code in (0, 1):
            show_status(plane, plane.run(record.id))
        ctx.exit(code)
    if as_json:
        print_json(describe(plane, record))
    elif logs:
        path = newest_log(plane, record.id)
        out(path.read_text("utf-8", "replace").rstrip("\n") if path else "the run has no log yet")
    else:
        show_status(plane, record)


def describe(plane: Plane, record: Run) -> dict[str, Any]:
    """Return what `--json` prints; the keys are the contract."""
    progress = _progress(plane, record.id)
    final = plane.final_adapter(record.id)
    return {
        "run": record.id,
        "state": record.state,
        "spec": record.spec,
        "attempts": [
            {
                "number": attempt.number,
                "state": attempt.state,
                "provider": attempt.provider,
                "outcome": attempt.outcome,
                "exit_code": attempt.exit_code,
                "detail": attempt.detail,
                "worker_pid": attempt.worker_pid,
                "started_s": attempt.started_s,
                "ended_s": attempt.ended_s,
            }
            for attempt in plane.attempts(record.id)
        ],
        "phase": progress.phase,
        "step": progress.step,
        "total": progress.total,
        "metrics": progress.metrics,
        "evaluation": progress.evaluation,
        "losses": [[step, loss] for step, loss in sorted(progress.losses.items())],
        "warnings": progress.warnings,
        "adapter": str(final) if final else None,
        "store": str(plane.store(record.id)),
        "error": record.error,
        "hint": record.hint,
        "created_s": record.created_s,
        "updated_s": record.updated_s,
        "finished_s": record.finished_s,
    }


def show_status(plane: Plane, record: Run) -> None:
    """Print the status for people: for a failed run the reason first, for any what to do next."""
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
    yield f"{record.spec['algorithm']} of {record.spec['model']}"
    if record.state == "queued" and record.waiting:
        yield f"waiting: {record.waiting}"
    if record.state not in FINAL and progress.phase:
        yield f"phase: {progress.phase}"
    if progress.step is not None:
        yield metric_line(progress)
        yield f"loss  {progress.sparkline(_SPARKLINE_WIDTH)}"
    if progress.evaluation.get("loss") is not None:
        step, loss = progress.evaluation["step"], progress.evaluation["loss"]
        yield f"held-out loss {loss:.4f} at step {step}"
    attempts = plane.attempts(record.id)
    if len(attempts) > 1 or record.state == "failed":
        for attempt in attempts:
            detail = f": {attempt.detail}" if attempt.detail else ""
            ended = attempt.outcome or attempt.state
            yield f"attempt {attempt.number} on {attempt.provider}: {ended}{detail}"
    final = plane.final_adapter(record.id)
    if final:
        yield f"adapter: {final}"


def _show_failure(plane: Plane, record: Run) -> None:
    out(f"error: {record.error or 'the run failed without a word'}", fg="red", bold=True)
    if record.hint:
        out(f"hint: {record.hint}")
    log = newest_log(plane, record.id)
    if log is not None:
        out()
        for line in _last_lines(log):
            out(f"  | {line}", dim=True)
        out(f"full log: {log}")
    out()


def newest_log(plane: Plane, run: str) -> Path | None:
    """Return the log of the newest attempt that has one."""
    logs = [
        plane.store(run) / "attempts" / str(attempt.number) / "worker.log"
        for attempt in plane.attempts(run)
    ]
    return next((log for log in reversed(logs) if log.exists()), None)


def _last_lines(log: Path) -> list[str]:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
        return file.read().decode("utf-8", "replace").splitlines()[-_TAIL_LINES:]


def _progress(plane: Plane, run: str) -> Progress:
    progress = Progress()
    progress.take(EventTail(plane.store(run)).read())
    return progress


def _next_steps(plane: Plane, record: Run) -> list[tuple[str, str]]:
    run = record.id
    if record.state == "done":
        return [
            (f"flash eval {run}", "score it on held-out rows"),
            (f"flash checkpoints {run}", "the steps that were saved"),
        ]
    if record.state not in FINAL:
        return [
            (f"flash status {run} --follow", "watch it"),
            (f"flash cancel {run}", "stop it and keep its checkpoints"),
        ]
    steps = [(f"flash status {run} --logs", "the whole log")]
    if plane.checkpoints(run):
        steps.append((f"flash checkpoints {run}", "what was saved; any step can be evaluated"))
    return steps
