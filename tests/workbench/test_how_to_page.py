"""The page of the workbench shows what is there, and lists every check."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_documents import shape_of, steps_of

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "how-to" / "environment-workbench.md"


def checks_in(code):
    """Return the name of the check of every `Finding` that is made."""
    return {
        node.args[1].value
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "Finding"
    }


def test_the_page_lists_the_checks_that_there_are():
    made = [checks_in(path.read_text()) for path in (ROOT / "flash" / "workbench").glob("*.py")]
    listed = re.findall(r"^\| ((?:`[a-z-]+`(?:, )?)+) \|", PAGE.read_text("utf-8"), re.MULTILINE)

    assert {name for cell in listed for name in re.findall(r"[a-z-]+", cell)} == set().union(*made)


@pytest.mark.slow
def test_every_command_of_the_page_prints_what_it_shows(tmp_path):
    place = tmp_path / "place"
    place.write_text(str(tmp_path))
    environ = {
        "HOME": str(tmp_path),
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "COLUMNS": "100",
        "NO_COLOR": "1",
    }

    for command, expected in steps_of(PAGE):
        done = subprocess.run(
            ["bash", "-c", f'cd "$(cat {place})" && {command}\ncode=$?; pwd > {place}; exit $code'],
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert shape_of(expected).fullmatch(done.stdout), f"$ {command}\n{done.stdout}\n{expected}"
        assert done.returncode == ("FAIL for" in expected), command
