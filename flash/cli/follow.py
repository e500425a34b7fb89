"""
Following a run: a live view on a terminal, plain lines elsewhere.

It only reads. Ctrl-C leaves the run as it is and says how to come back.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from flash.cli import output
from flash.cli.progress import Progress, duration, metric_line
from flash.plane.tail import EventTail

if TYPE_CHECKING:
    from rich.console import RenderableType

    from flash.plane.plane import Plane
    from flash.plane.runs import Run
    from flash.values import Event

INTERRUPTED = 130
FINAL = frozenset({"done", "failed", "cancelled"})
_POLL_S = 0.25
_LINE_EVERY_S = 2.0
_SPARKLINE_WIDTH = 40


def follow(plane: Plane, run: str) -> int:
    """
    Show the run until it ends and return the exit code: 0 when it is done, 1 when it is not.

    Ctrl-C returns 130 and leaves the run going.
    """
    try:
        final = _watch_live(plane, run) if output.is_terminal() else _watch_lines(plane, run)
    except KeyboardInterrupt:
        output.note(f"detached; the run {run} goes on")
        output.note(f"  flash status {run} --follow   come back to it")
        output.note(f"  flash cancel {run}            stop it")
        return INTERRUPTED
    return 0 if final.state == "done" else 1


def _watch_lines(plane: Plane, run: str) -> Run:
    """Print a line an event; of metrics, the first, the last and one every two seconds."""
    tail, progress = EventTail(plane.store(run)), Progress()
    state, shown_s, waiting = "", 0.0, False
    while True:
        # The record first: what was written before the run ended is then read below.
        record = plane.run(run)
        if record.state != state:
            state = record.state
            output.out(f"{run} {state}")
        for attempt, event in tail.read():
            progress.take([(attempt, event)])
            if event.type != "metric":
                _print_event(event)
                continue
            due = time.monotonic() - shown_s >= _LINE_EVERY_S
            waiting = not due
            if due:
                output.out(metric_line(progress))
                shown_s = time.monotonic()
        if state in FINAL:
            if waiting:
                output.out(metric_line(progress))
            return record
        time.sleep(_POLL_S)


def _print_event(event: Event) -> None:
    if event.type == "warning":
        output.warn(event.data["message"])
    elif (text := _sentence(event)) is not None:
        output.out(text)


def _sentence(event: Event) -> str | None:
    """Return the line for an event other than a metric, or None for one that needs no line."""
    data = event.data
    if event.type == "phase":
        return f"phase: {data['name']}"
    if event.type == "log":
        return str(data["message"])
    if event.type == "checkpoint":
        return f"checkpoint at step {data['step']}"
    if event.type == "evaluation" and data.get("loss") is not None:
        return f"held-out loss {data['loss']:.4f} at step {data['step']}"
    return None


def _watch_live(plane: Plane, run: str) -> Run:
    from rich.live import Live

    tail, progress = EventTail(plane.store(run)), Progress()
    console = output.console()
    with Live(console=console, refresh_per_second=8, transient=False) as live:
        while True:
            record = plane.run(run)
            for attempt, event in tail.read():
                progress.take([(attempt, event)])
                if event.type in {"warning", "log", "checkpoint", "evaluation"}:
                    text = _sentence(event) or f"warning: {event.data['message']}"
                    console.print(
                        output.clean(text), style="yellow" if event.type == "warning" else "dim"
                    )
            live.update(_panel(record, progress))
            if record.state in FINAL:
                return record
            time.sleep(_POLL_S)


def _panel(record: Run, progress: Progress) -> RenderableType:
    """Return the live lines: state and phase, a bar, the numbers, the curve."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.text import Text

    phase = f" · {progress.phase}" if progress.phase and record.state == "running" else ""
    elapsed = duration((record.finished_s or time.time()) - record.created_s)
    lines: list[RenderableType] = [
        Text(
            f"{record.id}  {record.state}{output.clean(phase, lines=False)}  {elapsed}",
            style="bold",
        )
    ]
    if progress.step is not None and progress.total:
        lines.append(ProgressBar(total=progress.total, completed=progress.step, width=60))
        lines.append(Text(metric_line(progress)))
        curve = progress.sparkline(_SPARKLINE_WIDTH)
        first = progress.losses[min(progress.losses)] if progress.losses else None
        if curve and first is not None:
            lines.append(Text(f"loss {first:.3f} {curve}", style="cyan"))
    return Group(*lines)
