"""The guide to rewards, step by step, with its plugin and ours installed as users install them."""

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "how-to" / "rewards.md").read_text("utf-8")
FILES = re.findall(r"^```\w+ (\S+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
OURS = [ROOT / "plugins" / "rewards" / name for name in ("standard", "judge")]
COMMANDS = re.findall(r"^\$ (.+)$", PAGE, re.MULTILINE)


class Shell:
    """Runs `flash` of a virtual environment, in the folder that has the page's files."""

    def __init__(self, folder, python):
        self.folder = folder
        self.python = python

    def flash(self, *words):
        return subprocess.run(
            [self.python, "-m", "flash", *words],
            cwd=self.folder,
            env={"PATH": os.environ["PATH"], "HOME": str(self.folder)},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    """The page's files, and a virtual environment with its plugin and ours on top of this one."""
    folder = tmp_path_factory.mktemp("home")
    for name, content in FILES:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    here = sysconfig.get_path("purelib")
    (site / "zz-here.pth").write_text(f"import site; site.addsitedir({here!r})\n")
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"),
            *("--no-deps", "--no-index", "--no-build-isolation", "--no-compile"),
            *("--target", site, folder / "acme-reward", *OURS),
        ],
        check=True,
        timeout=120,
    )
    return Shell(folder, python)


TESTS = [line for line in COMMANDS if line.startswith("flash env test ")]
OTHERS = [line for line in COMMANDS if line.startswith("flash ") and line not in TESTS]


@pytest.mark.slow
@pytest.mark.parametrize("command", OTHERS)
def test_every_other_command_of_the_page_does_what_it_should(shell, command):
    done = shell.flash(*command.split()[1:])

    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("command", TESTS)
def test_every_reward_of_the_page_passes_the_test_that_the_page_runs(shell, command):
    done = shell.flash(*command.split()[1:], "--json")

    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(done.stdout)
    earned = said["probes"]
    assert said["verdict"] in {"PASS", "WARN"}
    assert earned["gold"] > 2 * max(earned["empty"], earned["junk"], earned["other"]), earned


@pytest.mark.slow
def test_what_the_page_installs_is_found_and_built_whole(shell):
    done = shell.flash("plugins", "--json")

    found = {plugin["name"]: plugin for plugin in json.loads(done.stdout)}
    for name in ("acme-reward", "judge", "standard-rewards"):
        assert found[name]["state"] == "ok", found[name]
    (built,) = (shell.folder / "venv").glob("lib/*/site-packages/flash_reward_standard")
    source = OURS[0] / "flash_reward_standard"
    assert {path.name for path in source.glob("*.py")} <= {path.name for path in built.iterdir()}


def test_the_page_installs_what_it_writes():
    assert "pip install ./acme-reward" in COMMANDS
    assert (len(TESTS), len(OTHERS)) == (3, 2)
    assert {name.partition("/")[0] for name, _ in FILES} >= {"acme-reward", "sums"}
