"""The demo of the examples: what a person sees who runs it, and who interrupts it."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"

CONFIG = """
model = "{model}"
algorithm = "grpo"

[environment]
path = ".."

[train]
steps = {steps}
batch_size = 2
group_size = 4
max_tokens = 24
max_length = 256
lora_rank = 2
"""


@pytest.fixture
def demo(project):
    """Return a way to start the demo on a copy of the glossary with few held-out words."""
    folder = project.folder / "glossary"
    shutil.copytree(EXAMPLES / "glossary", folder, ignore=shutil.ignore_patterns("__pycache__"))
    held_out = folder / "dataset" / "eval.jsonl"
    held_out.write_text("".join(held_out.read_text().splitlines(keepends=True)[:4]))

    def start(model, steps):
        config = folder / "configs" / "rl.toml"
        config.write_text(CONFIG.format(model=model, steps=steps))
        return subprocess.Popen(
            [sys.executable, EXAMPLES / "demo.py", config],
            cwd=project.folder,
            env=project.environ(PYTHONUNBUFFERED="1"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    return start


@pytest.mark.slow
def test_the_demo_trains_the_example_and_reports(demo):
    process = demo(BASE, steps=2)
    shown, _ = process.communicate(timeout=300)

    assert process.returncode == 0, shown
    assert "-- mean reward of what it sampled" in shown
    assert "-- held-out rows, 4 that were not trained on" in shown
    assert "verdict: no change beyond noise" in shown
    assert "\nasked    What is " in shown
    assert "--worst 3" in shown


@pytest.mark.slow
def test_an_interrupted_demo_cancels_its_run(demo, project, tiny_model):
    process = demo(tiny_model, steps=100_000)
    # One signal to the group, as a terminal sends it, once the run is followed.
    lines = iter(process.stdout.readline, "")
    seen = next(line for line in lines if "--follow" in line)
    assert seen.startswith("$ ")
    (run,) = project.json("runs")
    project.wait(run["run"], until=lambda status: status["state"] == "running")
    os.killpg(process.pid, signal.SIGINT)
    shown, _ = process.communicate(timeout=120)

    assert process.returncode == 130, shown
    assert f"interrupted: cancelling run {run['run']}" in shown
    assert project.wait(run["run"])["state"] == "cancelled"
