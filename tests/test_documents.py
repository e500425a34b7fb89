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
    Return (command, expected output) pairs in order.

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


# What differs from run to run: measured numbers, how long it took, run ids, curves.
VARYING = re.compile(
    r"(?P<time>(?:[0-9]+ h )?(?:[0-9]+ min )?\b[0-9]+(?:\.[0-9]+)? s\b)"
    r"|(?P<number>[0-9]+\.[0-9]+(?:e[+-][0-9]+)?|[0-9]+(?= tokens/s\b))"
    r"|(?P<run>\b1[0-9a-hjkmnp-tv-z]{8}\b)"
    r"|(?P<curve>[▁▂▃▄▅▆▇█]+)"
    r"|(?P<anything>…)"
)
SHAPES = {
    "time": r"(?:[0-9]+ h )?(?:[0-9]+ min )?[0-9]+(?:\.[0-9]+)? s",
    "number": r"[0-9]+(?:\.[0-9]+)?(?:e[+-][0-9]+)?",
    "run": r"[0-9a-hjkmnp-tv-z]{9}",
    "curve": r"[▁▂▃▄▅▆▇█]+",
    "anything": r".*?",
}


def shape_of(expected):
    """Return the pattern of an expected output: `…` is any text, blanks are any blanks."""
    text, shape, end = " ".join(expected.split()), "", 0
    for found in VARYING.finditer(text):
        shape += re.escape(text[end : found.start()]) + SHAPES[found.lastgroup]
        end = found.end()
    shape += re.escape(text[end:])
    return re.compile(r"\s*" + shape.replace(r"\ ", r"\s+") + r"\s*", re.DOTALL)


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
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=1200,
            check=False,
        )

    return run


@pytest.mark.slow
@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_every_command_of_a_tutorial_prints_what_the_page_shows(page, shell, tmp_path):
    for command, expected in steps_of(page):
        done = shell(command)
        said = done.stdout.replace(str(tmp_path / "home"), "/home/you")
        # What stands between two other lines only where a machine is slow enough to show it.
        said = re.sub(r"^\w+ provisioning\n", "", said, flags=re.MULTILINE)
        # A checkpoint is reported once the disk has it, between whatever lines that is.
        said = re.sub(r"^checkpoint at step [0-9]+\n", "", said, flags=re.MULTILINE)
        said = re.sub(
            r"^sampled [0-9]+ of [0-9]+ answers\n(?=sampled )", "", said, flags=re.MULTILINE
        )

        assert shape_of(expected).fullmatch(said), (
            f"$ {command}\n--- said\n{said}\n--- page\n{expected}"
        )
        assert done.returncode == (2 if expected.startswith("error: ") else 0), command


def test_the_shape_of_a_transcript_tells_other_text_apart():
    page = "1aennqmxn done 24 s\n  loss 0.25 █▁ of 45 rows\n…"

    assert shape_of(page).fullmatch("1bfnnqmxn  done  3 s\nloss 1e-05 ▁ of 45 rows\nand more")
    assert shape_of(page).fullmatch("1bfnnqmxn  done  1 min 3 s\nloss 0.1 ▁ of 45 rows\n")
    assert not shape_of(page).fullmatch("1bfnnqmxn failed 3 s\nloss 0.5 ▁ of 45 rows\n")
    assert not shape_of(page).fullmatch("1bfnnqmxn done 3 s\nloss 0.5 ▁ of 44 rows\n")


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


@pytest.mark.slow
def test_the_readmes_config_is_planned_and_previewed_as_it_stands(shell):
    """The training itself is the demo's; `tests/end_to_end` has the other verbs."""
    readme = (ROOT / "README.md").read_text("utf-8")
    config = re.search(r"^```toml\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)[1]
    shell(f"cat > run.toml <<'END'\n{config}END\nln -s {shlex.quote(str(ROOT / 'examples'))} .")

    planned = shell("flash train run.toml --dry-run")
    shown = shell("flash env preview run.toml")

    assert planned.returncode == 0, planned.stdout
    assert "nothing was started" in planned.stdout
    assert shown.returncode == 0, shown.stdout
    assert "<|im_end|>⟧" in shown.stdout


def test_the_reference_pages_say_what_the_code_says():
    subprocess.run([sys.executable, "docs/generate.py", "--check"], cwd=ROOT, check=True)
