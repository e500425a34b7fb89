"""Every command that a scaffolded TRAINING.md shows runs, on the project as it was written."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from flash.testing.models import make_tiny_model
from flash.workbench.setup import scaffold

SMALL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def commands(page):
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


class Project:
    """A scaffolded project whose model is a tiny one and whose runs are short."""

    def __init__(self, folder, *, multi_turn):
        self.folder = folder / "project"
        self.model = str(make_tiny_model(folder / "model"))
        scaffold(self.folder, multi_turn=multi_turn)
        for path in self.folder.rglob("*.jsonl"):
            path.write_text("".join(path.read_text().splitlines(keepends=True)[:16]))
        shorter = {
            SMALL: self.model,
            "steps = 20": "steps = 2",
            "max_length = 256": "max_length = 512",
            "batch_size = 4 ": "batch_size = 2 ",
        }
        for path in self.folder.rglob("*.toml"):
            text = path.read_text()
            for old, new in shorter.items():
                text = text.replace(old, new)
            path.write_text(text)
        self.environ = {
            name: value for name, value in os.environ.items() if not name.startswith("FLASH")
        } | {
            "FLASH_HOME": str(folder / "home"),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
        }

    def filled_in(self, line):
        """Return the command with its model; RUN_A is the oldest run, RUN_B the newest."""
        names = {SMALL: self.model}
        if "RUN_" in line:
            runs = json.loads(self.run("flash runs --json").stdout)
            names |= {"RUN_A": runs[-1]["run"], "RUN_B": runs[0]["run"]}
        return re.sub("|".join(names), lambda found: names[found[0]], line)

    def run(self, command):
        return subprocess.run(
            ["bash", "-c", command],
            cwd=self.folder,
            env=self.environ,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )


@pytest.mark.slow
def test_every_command_of_the_page_runs(tmp_path):
    """In turns, which takes all that a single answer does and more."""
    project = Project(tmp_path, multi_turn=True)
    shown = commands(project.folder / "TRAINING.md")
    assert len(shown) > 10

    for line in shown:
        command = project.filled_in(line)
        done = project.run(command)

        # Random weights teach nothing, which the doctor says.
        expected = 1 if command.startswith("flash env test") else 0
        assert done.returncode == expected, f"$ {command}\n{done.stdout}{done.stderr}"
