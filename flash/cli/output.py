"""
The one place that prints.

    out("saved", bold=True)           a line on stdout
    flow("the fir")                   a piece of a text that comes bit by bit
    marked([("said: ", False), ("yes", True)])   one text, parts of it marked
    note("starting the supervisor")   a line on stderr: progress, notices
    warn("…", hint="…")               `warning:` and `hint:` lines on stderr
    fail(error, debug=app.debug)      `error:` and `hint:` lines on stderr; returns the exit code
    table(("run", "state"), rows)     a table for eyes; rich on a terminal, aligned text otherwise
    beside(("a", "b"), pairs)         two columns of long texts, each half as wide as the terminal
    print_json(value)                 the contract for programs, on stdout
    console()                         a rich console for live displays, on a terminal only

Everything printed here is cleaned: text from a model, a log, a plugin or a file cannot move the
cursor, recolour the terminal or reorder a line. Text handed to `console()` is the caller's to
pass through `clean` first. Colour follows the terminal and `NO_COLOR`.
"""

from __future__ import annotations

import json
import math
import os
import sys
import traceback
import unicodedata
from typing import TYPE_CHECKING, Any, Literal

import click

from flash.errors import FlashError, SpecError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence
    from typing import TextIO

    from rich.console import Console

_BIDI_CONTROLS = frozenset(
    "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
)
# Control characters, lone surrogates, and the line and paragraph separators.
_UNSAFE_CATEGORIES = frozenset({"Cc", "Cs", "Zl", "Zp"})


def clean(text: str, *, lines: bool = True) -> str:
    r"""
    Return `text` with every character that could act on a terminal written as an escape.

    `lines` keeps line breaks and tabs; without it they are escaped too, so that the text stays
    on its line.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_shown(character, lines=lines) for character in text)


def _shown(character: str, *, lines: bool) -> str:
    if lines and character in "\n\t":
        return character
    if unicodedata.category(character) in _UNSAFE_CATEGORIES or character in _BIDI_CONTROLS:
        return character.encode("unicode_escape").decode("ascii")
    return character


def is_terminal(stream: TextIO | None = None) -> bool:
    """Say whether `stream` (stdout by default) is a terminal that a person looks at."""
    return (stream or sys.stdout).isatty()


def _colours(stream: TextIO) -> bool:
    return (
        is_terminal(stream) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    )


def out(text: str = "", *, fg: str | None = None, bold: bool = False, dim: bool = False) -> None:
    """Print a line on stdout, styled where the terminal shows it."""
    text = clean(text)
    if (fg or bold or dim) and _colours(sys.stdout):
        text = click.style(text, fg=fg, bold=bold or None, dim=dim or None)
    click.echo(text)


def flow(text: str, *, dim: bool = False, err: bool = False) -> None:
    """Print a piece of a text that comes bit by bit, at once; the caller ends the line."""
    shown = clean(text)
    if dim and _colours(sys.stderr if err else sys.stdout):
        shown = click.style(shown, dim=True)
    click.echo(shown, nl=False, err=err)


def marked(pieces: Iterable[tuple[str, bool]]) -> None:
    """Print pieces of one text on stdout, the marked ones green, or in ⟦ ⟧ without colour."""
    coloured = _colours(sys.stdout)
    for text, mark in pieces:
        shown = clean(text)
        if mark:
            shown = click.style(shown, fg="green") if coloured else f"⟦{shown}⟧"
        click.echo(shown, nl=False)
    click.echo()


def note(text: str) -> None:
    """Print a line on stderr: what is happening, not the result."""
    click.echo(clean(text), err=True)


def warn(text: str, *, hint: str | None = None) -> None:
    """Print a warning, and what to do about it, on stderr."""
    _labelled("warning", "yellow", text)
    if hint:
        _labelled("hint", "cyan", hint)


def fail(error: BaseException, *, debug: bool = False) -> int:
    """
    Print an error and its hint on stderr; return the exit code it stands for.

    An error that is not a FlashError is a defect of Flash, and is said to be one. `debug` prints
    the traceback first.
    """
    if debug:
        click.echo(clean("".join(traceback.format_exception(error))), err=True, nl=False)
    if isinstance(error, SpecError):
        for problem in error.problems:
            colour = "red" if problem.severity == "error" else "yellow"
            _labelled(problem.severity, colour, str(problem))
    elif isinstance(error, FlashError):
        _labelled("error", "red", error.message)
    else:
        described = "".join(traceback.format_exception_only(error)).strip()
        _labelled("error", "red", f"this is a defect in Flash: {described}")
    hint = error.hint if isinstance(error, FlashError) else "flash --debug … shows the traceback"
    if hint and not (debug and not isinstance(error, FlashError)):
        _labelled("hint", "cyan", hint)
    return error.exit_code if isinstance(error, FlashError) else 1


def usage_error(message: str, hint: str | None) -> int:
    """Print what is wrong with the command line; return its exit code."""
    _labelled("error", "red", message)
    if hint:
        _labelled("hint", "cyan", hint)
    return 2


def _labelled(label: str, colour: str, text: str) -> None:
    head = f"{label}:"
    if _colours(sys.stderr):
        head = click.style(head, fg=colour, bold=True)
    # Later lines are indented, so that each `error:` starts one error.
    click.echo(f"{head} {clean(text)}".replace("\n", "\n  "), err=True)


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    right: Collection[str] = (),
    colours: Mapping[str, str] | None = None,
) -> None:
    """
    Print a table.

    Args:
        columns: the headings.
        rows: one cell a column; None is an empty cell.
        right: the columns set flush right, for numbers.
        colours: cell text -> colour, for words such as states.

    """
    cells = [
        ["" if cell is None else clean(str(cell), lines=False) for cell in row] for row in rows
    ]
    if is_terminal():
        _rich_table(columns, cells, right, colours or {})
    else:
        for line in _aligned([list(columns), *cells], [name in right for name in columns]):
            click.echo(line)


def _aligned(rows: Sequence[Sequence[str]], right: Sequence[bool]) -> list[str]:
    """Return the rows as lines with columns two spaces apart."""
    widths = [max(len(row[index]) for row in rows) for index in range(len(right))]
    return [
        "  ".join(
            cell.rjust(width) if flush else cell.ljust(width)
            for cell, width, flush in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in rows
    ]


def _rich_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    right: Collection[str],
    colours: Mapping[str, str],
) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(columns):
        # The first column is what people copy: the others give way to it.
        drawn.add_column(
            Text(name),
            justify="right" if name in right else "left",
            overflow="fold",
            no_wrap=index == 0,
        )
    for row in rows:
        drawn.add_row(*(Text(cell, style=colours.get(cell, "")) for cell in row))
    console().print(drawn)


def beside(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print two columns of texts, each wrapped to half the width of the terminal."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=box.MINIMAL, expand=True, show_lines=True, pad_edge=False)
    for head in heads:
        drawn.add_column(Text(clean(head, lines=False)), ratio=1, overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(clean(cell)) for cell in row))
    console().print(drawn)


def console() -> Console:
    """Return a rich console on stdout; it reads no markup and no emoji codes from text."""
    from rich.console import Console

    # Of itself rich would still print bold where colour is not wanted.
    system: Literal["auto"] | None = "auto" if _colours(sys.stdout) else None
    return Console(color_system=system, markup=False, emoji=False, highlight=False)


def print_json(value: Any) -> None:
    """
    Print plain data as JSON on stdout.

    Only ASCII is written, so that no terminal and no locale can spoil it. JSON has no NaN and no
    infinity; they become null.
    """
    click.echo(json.dumps(_finite(value), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
