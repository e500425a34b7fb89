"""
Following a run: a live view on a terminal, plain lines elsewhere, or nothing but the wait.

Following only reads. Ctrl-C leaves the run as it is and says how to come back.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Protocol

from flash.cli import output
from flash.cli.budget import budget_line
from flash.cli.progress import Progress, duration, held_out_line, metric_line, sparkline
from flash.cli.story import ended_as, has_limits, waiting
from flash.plane.tail import LogTail

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import AbstractContextManager

    from rich.console import RenderableType
    from rich.live import Live

    from flash.plane.plane import Plane, Update
    from flash.plane.runs import Attempt, Run
    from flash.values import Event

INTERRUPTED = 130
_LINE_EVERY_S = 2.0
_BAR_WIDTH = 60
SPARKLINE_WIDTH = 40


class View(Protocol):
    """What is shown of a run that is followed, update by update."""

    def show(self, update: Update) -> None:
        """Take the next update."""


def follow(plane: Plane, run: str, view: AbstractContextManager[View]) -> int:
    """
    Show the run until it ends and return the exit code: 0 when it is done, 1 when it is not.

    Ctrl-C returns 130 and leaves the run going.
    """
    try:
        with view as shown:
            for update in plane.follow(run):
                shown.show(update)
    except KeyboardInterrupt:
        return detach(run)
    return 0 if update.run.state == "done" else 1


def detach(run: str) -> int:
    """Say how to come back to a run that goes on; return the exit code of Ctrl-C."""
    output.note(f"detached; the run {run} goes on")
    output.note(f"  flash status {run} --follow   come back to it")
    output.note(f"  flash cancel {run}            stop it")
    return INTERRUPTED


def progress_view(known: int = 0) -> AbstractContextManager[View]:
    """
    Return the view of a run's progress that suits where stdout goes.

    Of the first `known` attempts nothing is told: that was before.
    """
    return live_view(known) if output.is_terminal() else contextlib.nullcontext(Lines(known))


class Silence:
    """Shows nothing: for callers that print the end as JSON."""

    def show(self, update: Update) -> None:
        """Show nothing."""


class Lines:
    """
    A line for what happens.

    Of metrics, the first, the last and one every two seconds; of an attempt's phases, each once.
    """

    def __init__(self, known: int = 0) -> None:
        self._progress = Progress()
        self._state = ""
        self._waiting: str | None = None
        self._known = known
        self._ended = known
        self._phases: set[tuple[int, str]] = set()
        self._metric_s = float("-inf")
        self._metric_due = False

    def show(self, update: Update) -> None:
        """Print what is new: the rest of attempts that ended, how they ended, then what goes on."""
        over = sum(attempt.outcome is not None for attempt in update.attempts)
        turned = False
        for attempt, event in update.events:
            if attempt > over and not turned:
                turned = True
                self._show_turn(update)
            self._show_event(attempt, event)
        if not turned:
            self._show_turn(update)
        if update.run.final:
            self._show_metric()
            output.out(f"{update.run.id} {update.run.state}")

    def _show_turn(self, update: Update) -> None:
        for text in retries(update.run, update.attempts, self._ended):
            self._ended += 1
            output.warn(text)
        self._show_state(update.run)

    def _show_event(self, attempt: int, event: Event) -> None:
        self._progress.take([(attempt, event)])
        if attempt <= self._known:
            return
        if event.type == "metric":
            self._metric_due = True
            if time.monotonic() - self._metric_s >= _LINE_EVERY_S:
                self._show_metric()
        elif (text := sentence(event)) is not None and self._is_news(event, attempt):
            (output.warn if event.type == "warning" else output.out)(text)

    def _is_news(self, event: Event, attempt: int) -> bool:
        """Say whether it is not a phase that the attempt was in before: some come every step."""
        if event.type != "phase":
            return True
        phase = (attempt, event.data["name"])
        seen = phase in self._phases
        self._phases.add(phase)
        return not seen

    def _show_state(self, run: Run) -> None:
        if run.state != self._state and not run.final:
            self._state = run.state
            output.out(f"{run.id} {run.state}")
        if run.waiting != self._waiting:
            self._waiting = run.waiting
            if run.waiting:
                output.out(f"waiting: {run.waiting}")

    def _show_metric(self) -> None:
        if self._metric_due:
            output.out(metric_line(self._progress))
            self._metric_s, self._metric_due = time.monotonic(), False


def sentence(event: Event) -> str | None:
    """Return the line for an event other than a metric, or None for one that needs no line."""
    data = event.data
    if event.type == "phase":
        return f"phase: {data['name']}"
    if event.type in {"log", "warning"}:
        return str(data["message"])
    if event.type == "checkpoint":
        return f"checkpoint at step {data['step']}"
    return held_out_line(data) if event.type == "evaluation" else None


def retries(run: Run, attempts: Sequence[Attempt], known: int) -> Iterator[str]:
    """Yield a line for each attempt beyond the first `known` that ended and was not the last."""
    ended = attempts[:-1] if run.final else attempts
    for attempt in ended[known:]:
        if attempt.outcome is None:
            return
        yield f"attempt {attempt.number} {ended_as(attempt)}" + (
            f"; {attempt.then}" if attempt.then else ""
        )


@contextlib.contextmanager
def live_view(known: int = 0) -> Iterator[View]:
    """Give a view that redraws itself in place, with what happened scrolling by above it."""
    from rich.live import Live

    console = output.console()
    with Live(console=console, refresh_per_second=8) as live:
        yield _Live(live, known)


class _Live:
    def __init__(self, live: Live, known: int) -> None:
        self._live = live
        self._progress = Progress()
        self._known = known
        self._ended = known

    def show(self, update: Update) -> None:
        for attempt, event in update.events:
            self._progress.take([(attempt, event)])
            if attempt <= self._known or event.type in {"metric", "phase"}:
                continue
            if (text := sentence(event)) is not None:
                self._say(text, "yellow" if event.type == "warning" else "dim")
        for text in retries(update.run, update.attempts, self._ended):
            self._ended += 1
            self._say(text, "yellow")
        self._live.update(panel(update.run, update.attempts, self._progress))

    def _say(self, text: str, style: str) -> None:
        self._live.console.print(output.clean(text), style=style)


def panel(run: Run, attempts: Sequence[Attempt], progress: Progress) -> RenderableType:
    """Return the live lines: state and phase, a bar, the numbers, the curve, what is used up."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    phase = f" · {progress.phase}" if progress.phase and run.state == "running" else ""
    took = duration((run.finished_s or time.time()) - run.created_s)
    head = output.clean(f"{run.id}  {run.state}{phase}  {took}", lines=False)
    # A grid, not a group: a bar does not end its line.
    lines = Table.grid()
    lines.add_row(Text(head, style="bold"))
    waits = waiting(run, attempts, time.time())
    if waits:
        lines.add_row(Text(output.clean(waits, lines=False)))
    if progress.step is not None and progress.total:
        bar = ProgressBar(total=progress.total, completed=progress.step, width=_BAR_WIDTH)
        lines.add_row(bar)
        lines.add_row(Text(metric_line(progress)))
    name, values = progress.curve
    if values:
        curve = sparkline(values, SPARKLINE_WIDTH)
        lines.add_row(Text(f"{name} {values[0]:.3f} {curve}", style="cyan"))
    used = budget_line(run, attempts) if has_limits(run) else None
    if used:
        lines.add_row(Text(used))
    return lines


class Log:
    """The log of a run as it grows, each attempt's under a line that names it."""

    def __init__(self, plane: Plane, run: str) -> None:
        self._plane = plane
        self._run = run
        self._attempt = 0
        self._tail: LogTail | None = None

    def show(self, update: Update) -> None:
        """Print what was written since."""
        for attempt in update.attempts:
            if attempt.number > self._attempt:
                self._print_rest()
                self._attempt = attempt.number
                self._tail = LogTail(self._plane.log(self._run, attempt.number))
                if attempt.number > 1:
                    output.note(f"attempt {attempt.number}")
        self._print_rest(to_the_end=update.run.final)

    def _print_rest(self, *, to_the_end: bool = True) -> None:
        """Print whole lines, and to the end also a last one that has no end."""
        for line in self._tail.read(to_the_end=to_the_end) if self._tail else ():
            output.out(line)
