"""What is printed: safe on any terminal, aligned for eyes, JSON for programs."""

import contextlib
import json
import math
import os
import pty
import subprocess
import sys

import pytest

from flash.cli import output
from flash.errors import SpecError
from flash.values import Problem


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("zwölf 漢字 ✓", "zwölf 漢字 ✓"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("over\rwritten\x08", "over\\rwritten\\x08"),
        ("\x9b2J", "\\x9b2J"),
        ("txt.\u202eexe", "txt.\\u202eexe"),
        ("half \ud800", "half \\ud800"),
        ("one\n\ttwo", "one\n\ttwo"),
    ],
)
def test_clean_shows_what_would_act_on_a_terminal(text, shown):
    assert output.clean(text) == shown


def test_a_text_that_stays_on_its_line():
    assert output.clean("one\ntwo", lines=False) == "one\\ntwo"


def test_everything_printed_is_cleaned(capsys):
    hostile = "a\x1b]0;title\x07"

    output.out(hostile)
    output.note(hostile)
    output.warn(hostile, hint=hostile)
    output.table(["name"], [[hostile]])
    output.fail(ValueError(hostile), debug=True)

    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err
    assert captured.out.count("a\\x1b]0;title\\x07") == 2


def test_a_table_is_aligned_lines_where_nobody_looks(capsys):
    output.table(
        ("run", "loss", "note"), [("a", 1.5, None), ("longer", 12.25, "x\ny")], right=["loss"]
    )

    assert capsys.readouterr().out == (
        "run      loss  note\n"
        "a         1.5\n"
        "longer  12.25  x\\ny\n"
    )  # fmt: skip


def test_an_empty_table_is_its_headings(capsys):
    output.table(("run", "state"), [])

    assert capsys.readouterr().out == "run  state\n"


def test_json_is_ascii_and_has_no_nan(capsys):
    output.print_json({"loss": math.nan, "steps": [1, math.inf], "text": "zwölf\x1b"})

    printed = capsys.readouterr().out
    assert printed.isascii()
    assert "\x1b" not in printed
    assert json.loads(printed) == {"loss": None, "steps": [1, None], "text": "zwölf\x1b"}


def test_a_spec_error_is_one_line_a_problem(capsys):
    code = output.fail(
        SpecError(
            [
                Problem("train.rank", "unknown key", hint='did you mean "lora_rank"?'),
                Problem("model", "missing"),
                Problem("seed", "ignored here", severity="warning"),
            ]
        )
    )

    assert code == 2
    assert capsys.readouterr().err == (
        "error: model: missing\n"
        "warning: seed: ignored here\n"
        'error: train.rank: unknown key; did you mean "lora_rank"?\n'
    )


PRINTING = """
from flash.cli import output
output.out("done", fg="green")
output.warn("careful")
output.table(("state",), [("ok",), ("a\x1b[2Jb",)], colours={"ok": "green"})
"""


def on_a_terminal(code, **environ):
    """Return what `code` writes to a terminal of 80 columns."""
    terminal, stream = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={"PATH": os.environ["PATH"], "TERM": "xterm", "COLUMNS": "80", **environ},
        stdin=stream,
        stdout=stream,
        stderr=stream,
    )
    os.close(stream)
    chunks = []
    with os.fdopen(terminal, "rb", buffering=0) as reader, contextlib.suppress(OSError):
        # Linux says EIO, not end of file, once the other side has gone.
        while chunk := reader.read(4096):
            chunks.append(chunk)
    assert process.wait(timeout=60) == 0
    return b"".join(chunks).decode()


def test_a_terminal_gets_colour_and_a_drawn_table():
    shown = on_a_terminal(PRINTING)

    assert "\x1b[32mdone" in shown
    assert "\x1b[33m\x1b[1mwarning:" in shown
    assert "\x1b[32mok" in shown
    assert "─" in shown
    assert "a\\x1b[2Jb" in shown


def test_no_color_is_honoured():
    shown = on_a_terminal(PRINTING, NO_COLOR="1")

    assert "done\r\nwarning: careful\r\n" in shown
    assert "\x1b" not in shown


def test_the_first_column_stays_whole_where_the_terminal_is_narrow():
    path = "train.init_from_adapter"
    code = f"from flash.cli import output; output.table(('path', 'why'), [('{path}', 'so ' * 30)])"

    assert path in on_a_terminal(code, COLUMNS="40")
