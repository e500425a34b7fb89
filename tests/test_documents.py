"""Every command the documents show is run, and what they say it prints is what it prints."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```", re.MULTILINE | re.DOTALL)
TUTORIALS = sorted((ROOT / "docs" / "tutorial").glob("*.md"))


def steps_of(page):
    """
    Return (command, expected output) pairs in order; `…` stands for any text.

    A block whose fence names a file writes that file.
    """
    steps = []
    for language, name, body in BLOCK.findall(page.read_text(encoding="utf-8")):
        if name:
            steps.append((f"cat > {shlex.quote(name)} <<'END-OF-FILE'\n{body}END-OF-FILE", ""))
        elif language == "console":
            for entry in re.split(r"^\$ ", body, flags=re.MULTILINE)[1:]:
                command, _, expected = entry.partition("\n")
                steps.append((command, expected.strip()))
    return steps


def shape_of(expected):
    """Return the pattern of an expected output: `…` is any text, blanks are any blanks."""
    words = [re.escape(word).replace("…", r".*?") for word in expected.split()]
    return re.compile(r"\s*" + r"\s+".join(words) + r"\s*", re.DOTALL)


@pytest.fixture
def shell(tmp_path):
    environ = {
        name: value for name, value in os.environ.items() if not name.startswith(("FLASH", "COV"))
    }
    environ |= {
        "HOME": str(tmp_path / "home"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{environ['PATH']}",
        "COLUMNS": "100",
        "NO_COLOR": "1",
    }
    (tmp_path / "home").mkdir()
    place = tmp_path / "place"
    place.write_text(str(tmp_path / "home"))

    def run(command):
        """Run one command where the last one left off."""
        return subprocess.run(
            ["bash", "-c", f'cd "$(cat {place})"\n{command}\ncode=$?; pwd > {place}; exit $code'],
            env=environ,
            capture_output=True,
            text=True,
            timeout=1200,
            check=False,
        )

    return run


@pytest.mark.slow
@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_every_command_of_a_tutorial_prints_what_the_page_shows(page, shell):
    for command, expected in steps_of(page):
        done = shell(command)
        said = done.stdout + done.stderr

        assert shape_of(expected).fullmatch(said), (
            f"$ {command}\n--- said\n{said}\n--- page\n{expected}"
        )


def test_there_is_a_tutorial():
    assert TUTORIALS
    assert all(steps_of(page) for page in TUTORIALS)


def test_every_make_target_that_a_document_names_exists():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *TUTORIALS]
    named = {
        target
        for page in pages
        for target in re.findall(r"\bmake ([a-z][a-z-]+)\b(?=[`\s])", page.read_text("utf-8"))
        if re.search(rf"(?:^\s*|[`$] ?)make {target}\b", page.read_text("utf-8"), re.MULTILINE)
    }

    assert {"demo", "test", "setup"} <= named
    for target in named:
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)


def test_every_link_between_pages_leads_somewhere():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    broken = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in pages
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text("utf-8"))
        if "://" not in target and not (page.parent / target).exists()
    ]

    assert broken == []


def test_every_flash_command_in_the_readme_parses():
    """The words after `flash` are a known verb with options that its `--help` lists."""
    text = (ROOT / "README.md").read_text("utf-8")
    lines = re.findall(r"^\s*(?:\$ )?(flash [^#\n`]+)", text, re.MULTILINE)
    assert lines
    for line in lines:
        words = shlex.split(line)
        verb = words[1]
        shown = subprocess.run(
            [sys.executable, "-m", "flash", verb, "--help"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for option in (word.split("=")[0] for word in words[2:] if word.startswith("-")):
            assert option in shown, f"{line}: {verb} --help does not list {option}"


def test_the_reference_pages_say_what_the_code_says():
    subprocess.run([sys.executable, "docs/generate.py", "--check"], cwd=ROOT, check=True)
