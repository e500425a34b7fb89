"""A budget as a user meets it: refused by its estimate, stopped at its limit, its adapter kept."""

import contextlib
import json
import os
import pty
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ENDLESS = ("--set", "train.max_steps=1000000")
ROOM_S = 2.0
"""Of training, in the run that is stopped."""
CONCURRENCY = 2
"""Calls of the judge."""


def on_a_terminal(project, *words, answer):
    """Run a command line on a terminal of its own; return its exit code and what it showed."""
    keyboard, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "flash", *words],
        cwd=project.folder,
        env=project.environ(),
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
    )
    os.close(terminal)
    os.write(keyboard, answer.encode())
    said = b""
    with contextlib.suppress(OSError):  # how Linux says that nobody holds the other end any more
        while piece := os.read(keyboard, 1 << 16):
            said += piece
    os.close(keyboard)
    return process.wait(), said.decode()


def events(project, run, number=1):
    path = project.store / "runs" / run / "attempts" / str(number) / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_over_its_budget_is_refused_and_one_that_starts_is_stopped_at_it(project):
    measured = project.json("train", "run.toml")
    first = next(e for e in events(project, measured["run"]) if e["type"] == "metric")
    start_s = first["time_s"] - measured["attempts"][0]["started_s"]
    limit = f"budget.max_hours={(2 * start_s + ROOM_S) / 3600}"

    refused = project.flash("train", "run.toml", *ENDLESS, "--set", limit)
    code, declined = on_a_terminal(
        project, "train", "run.toml", *ENDLESS, "--set", limit, answer="n\n"
    )

    assert (refused.returncode, code) == (2, 2)
    assert refused.stderr.startswith("error: the run would take about ")
    assert f"each, as measured in run {measured['run']}\nhint: --yes starts it" in refused.stderr
    assert "start it all the same? [y/N]: " in declined
    assert [path.name for path in (project.store / "runs").iterdir()] == [measured["run"]]

    # What a user wants of every run is in their own file; what is left out here is that.
    (project.store / "config.toml").write_text(f"[budget]\n{limit.removeprefix('budget.')}\n")
    run = project.json("train", "run.toml", *ENDLESS, "--yes", "--background")["run"]
    status = project.wait(run)

    assert (status["state"], status["attempts"][0]["outcome"]) == ("failed", "over_budget")
    assert status["error"].startswith("the run reached its budget of ")
    assert "flash resume" in status["hint"]
    assert 1 <= status["budget"]["used"] < 2
    # It stopped between two steps and kept what it had learned by then.
    saved = project.json("checkpoints", run)
    assert saved[-1]["step"] == status["step"] == status["attempts"][0]["step"]

    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = Path(status["store"]) / "checkpoints" / f"step-{status['step']:06}" / "adapter"
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(project.model), folder)

    again = project.flash("resume", run)
    assert again.returncode == 2
    assert again.stderr.startswith("error: the run is at its budget of ")
    assert "--max-hours" in again.stderr


@pytest.fixture
def judge():
    """A judge that grades by the length of what it reads, and counts 1000 tokens a call."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            content = self.rfile.read(int(self.headers["Content-Length"]))
            asked.append(content)
            grade = json.dumps({"reason": "so", "grade": len(content) % 11})
            answer = {
                "choices": [{"message": {"role": "assistant", "content": grade}}],
                "usage": {"prompt_tokens": 900, "completion_tokens": 100},
            }
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    server.asked = asked
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


RL = """
model = "{model}"
algorithm = "grpo"

[environment]
path = "."

[train]
lora_rank = 2
batch_size = 2
group_size = 2
max_tokens = 8
steps = 1000000
save_every = 1

[reward.judge]
model = "judge-1"
base_url = "http://127.0.0.1:{port}/v1"
rubric = "Long is good."
cache = false
concurrency = {concurrency}
usd_per_million_input = 1000
usd_per_million_output = 1000

[budget]
max_usd = 5
"""


def test_a_run_whose_judge_has_cost_its_budget_is_stopped(project, judge):
    project.write(
        "run.toml", RL.format(model=project.model, port=judge.server_port, concurrency=CONCURRENCY)
    )

    run = project.submit()
    status = project.wait(run)

    assert (status["state"], status["attempts"][0]["outcome"]) == ("failed", "over_budget")
    assert status["error"].startswith("the run reached its budget of 5 USD: it cost ")
    budget = status["budget"]
    assert budget["reported_usd"] == budget["usd"] >= 5
    # Each call costs one dollar; those alone are not counted that were open when it was stopped.
    assert 0 <= len(judge.asked) - round(budget["usd"]) <= CONCURRENCY
    assert project.json("checkpoints", run)
    assert f"of 5 USD ({budget['usd']:.2f} for rewards)" in project.flash("status", run).stdout
