"""The three formats of `docs/how-to/environments.md`, as the page writes them."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from flash.environments import locate
from flash.home import FlashHome
from flash.plugins import PluginHost
from flash.spec.model import EnvironmentTable

PAGE = (Path(__file__).parents[1] / "docs" / "how-to" / "environments.md").read_text("utf-8")
COMMANDS = re.findall(r"^\$ (flash .+)$", PAGE, re.MULTILINE)


@pytest.fixture
def project(tmp_path):
    """Write the files of the page."""
    for name, body in re.findall(r"^```\w+ (\S+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(body)
    return tmp_path


def test_each_folder_is_read_by_the_plugin_that_the_page_says(project):
    home = FlashHome(project / "home")
    host = PluginHost.default(home)

    found = {
        name: locate(EnvironmentTable(path=name), project, host, home).plugin
        for name in ("sums", "rounding", "backwards")
    }

    assert found == {"sums": "jsonl", "rounding": "freesolo", "backwards": "verifiers"}


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_page_does_what_it_says(project, command):
    plugins = project / "home" / "plugins"
    plugins.mkdir(parents=True)
    if "backwards" in command:
        from flash_env_verifiers.interpreter import make_interpreter

        # The library is installed once for all tests, where those of the plugin look for it.
        made = Path(sys.prefix) / "verifiers"
        make_interpreter([], made, print)
        (plugins / "verifiers").symlink_to(made)
    done = subprocess.run(
        [sys.executable, "-m", *shlex.split(command)],
        cwd=project,
        env={**os.environ, "FLASH_HOME": str(project / "home")},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert ("nothing was started" if "--dry-run" in command else "for grpo, in") in done.stdout
