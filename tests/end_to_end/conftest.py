"""A user's project with a tiny real model, and the `flash` command in a home of its own."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flash.testing.models import make_tiny_model

ENVIRONMENT = """
from freesolo.environments import EnvironmentSingleTurn, RewardResult


class Echo(EnvironmentSingleTurn):
    def build_prompt_messages(self, example, prompt_text):
        return [{"role": "user", "content": example.input}]

    def score_response(self, example, response_text):
        return RewardResult(score=float(response_text.strip() == example.output), threshold=1.0)


def load_environment():
    return Echo()
"""

CONFIG = """
model = "{model}"

[environment]
path = "."

[train]
lora_rank = 2
batch_size = 2
max_length = 128
max_steps = {steps}
save_every = 2
"""


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


class Project:
    """A folder with an environment and a config, and a way to run `flash` in it."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder / "project"
        self.home = folder / "home"
        self.model = model
        (self.folder / "dataset").mkdir(parents=True)
        self.home.mkdir()
        self.write("environment.py", ENVIRONMENT)
        self.rows("train", 12)
        self.rows("eval", 4)
        self.configure()

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def rows(self, split: str, count: int) -> None:
        rows = [{"input": f"say {n}", "output": f"word {n}"} for n in range(count)]
        self.write(f"dataset/{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def configure(self, *, steps: int = 4, extra: str = "") -> None:
        self.write("run.toml", CONFIG.format(model=self.model, steps=steps) + extra)

    def environ(self, **more: str) -> dict[str, str]:
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("FLASH", "WANDB", "HF_"))
        }
        return kept | {"HOME": str(self.home), "NO_COLOR": "1", "COLUMNS": "100"} | more

    def flash(self, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "flash", *words],
            cwd=self.folder,
            env=self.environ(**more),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    def shell(self, command: str) -> subprocess.CompletedProcess[str]:
        """Run a line of a page, what it says on both streams as one."""
        place = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return subprocess.run(
            ["bash", "-c", command],
            cwd=self.folder,
            env=self.environ(PATH=place),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
            check=False,
        )

    def json(self, *words: str, **more: str):
        done = self.flash(*words, "--json", **more)
        assert done.returncode == 0, done.stderr + done.stdout
        return json.loads(done.stdout)

    def submit(self, **more: str) -> str:
        return self.json("train", "run.toml", "--background", **more)["run"]

    def wait(self, run: str, until=lambda status: False, *, deadline_s: float = 240.0):
        """Return the first status that `until` accepts, or the final one."""
        end = time.monotonic() + deadline_s
        while time.monotonic() < end:
            status = self.json("status", run)
            if until(status) or status["state"] in {"done", "failed", "cancelled"}:
                return status
        pytest.fail(f"run {run} reached no end in {deadline_s} s: {status}")

    @property
    def store(self) -> Path:
        return self.home / ".flash"


@pytest.fixture(scope="session")
def new_project():
    """Return what makes a project, of a folder and a model, for tests that share one."""
    return Project


@pytest.fixture
def project(tmp_path, tiny_model):
    return Project(tmp_path, tiny_model)
