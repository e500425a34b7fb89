"""From a TOML to an adapter, as a user does it: the real command, trainer, processes, database."""

import json
import os
import signal
from pathlib import Path

import pytest
from plane_bench import until

from flash.testing.differences import differences

pytestmark = pytest.mark.slow


def test_a_run_ends_with_an_adapter_that_peft_loads(project):
    done = project.flash("train", "run.toml")

    assert done.returncode == 0, done.stderr + done.stdout
    status = project.json("status", "last")
    assert status["state"] == "done"
    assert status["step"] == 4
    assert status["error"] is None
    assert [attempt["outcome"] for attempt in status["attempts"]] == ["finished"]
    assert status["metrics"]["loss"] > 0

    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(project.model)
    adapted = PeftModel.from_pretrained(base, status["adapter"])
    assert adapted.peft_config["default"].r == 2
    assert adapted.peft_config["default"].base_model_name_or_path == str(project.model)


def test_listings_show_the_run_and_its_checkpoints(project):
    run = project.submit()
    project.wait(run)

    [listed] = project.json("runs")
    assert (listed["run"], listed["state"]) == (run, "done")
    assert [item["step"] for item in project.json("checkpoints", run)] == [2, 4]
    shown = project.flash("status", run[:6])
    assert shown.returncode == 0
    assert f"flash eval {run}" in shown.stdout


def test_eval_gives_the_score_of_a_run_a_checkpoint_and_the_base_model(project):
    run = project.submit()
    project.wait(run)

    for target in (run, f"{run}/step-2"):
        result = project.json("eval", target, "--max-tokens", "4")
        assert result["n"] == 4
        assert result["success"] == 0.0
        low, high = result["interval"]
        assert low == 0.0 < high < 1.0
    base = project.json("eval", str(project.model), "--environment", ".", "--max-tokens", "4")
    assert base["n"] == 4


def test_a_worker_that_is_killed_is_started_again_and_ends_with_the_same_bits(project):
    """The real worker dies in the middle, the supervisor tries again, and nothing is different."""
    project.configure(steps=60)
    broken = project.submit()
    running = project.wait(broken, lambda status: status["attempts"][-1:] and worker_pid(status))
    first = project.store / "runs" / broken / "attempts" / "1" / "events.jsonl"
    until(lambda: first.exists() and '"step": 7,' in first.read_text())
    os.kill(worker_pid(running), signal.SIGKILL)
    whole = project.submit()
    ended = [project.wait(run) for run in (broken, whole)]

    assert [[one["outcome"] for one in status["attempts"]] for status in ended] == [
        ["lost", "finished"],
        ["finished"],
    ]
    runs = project.store / "runs"
    second = runs / broken / "attempts" / "2" / "events.jsonl"
    events = map(json.loads, second.read_text().splitlines())
    assert next(event for event in events if event["type"] == "metric")["step"] > 2
    assert list(differences(runs / whole, runs / broken)) == []


def worker_pid(status):
    return status["attempts"][0]["worker_pid"]


def test_ctrl_c_detaches_and_the_run_goes_on(project):
    import subprocess
    import sys

    project.configure(steps=30)
    follower = subprocess.Popen(
        [sys.executable, "-m", "flash", "train", "run.toml"],
        cwd=project.folder,
        env=project.environ(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    said = []
    for line in follower.stdout:
        said.append(line)
        if "loss" in line:
            break
    os.killpg(follower.pid, signal.SIGINT)
    said.append(follower.stdout.read())

    assert follower.wait(timeout=30) == 130, "".join(said)
    run = project.json("runs")[0]["run"]
    assert f"flash status {run}" in "".join(said)
    assert project.wait(run)["state"] == "done"


def test_the_user_may_change_the_environment_after_submitting(project):
    run = project.submit()
    project.write("environment.py", "raise SystemExit('changed')")

    assert project.wait(run)["state"] == "done"


def test_an_environment_that_fails_in_training_shows_the_reason_first(project):
    project.write(
        "environment.py",
        (project.folder / "environment.py").read_text() + "\n\nclass Late(Echo):\n"
        "    calls = 0\n\n"
        "    def build_prompt_messages(self, example, prompt_text):\n"
        "        Late.calls += 1\n"
        "        if Late.calls > 3:\n"
        "            raise ValueError('the fourth row is broken')\n"
        "        return super().build_prompt_messages(example, prompt_text)\n\n\n"
        "def load_environment():\n    return Late()\n",
    )
    done = project.flash("train", "run.toml")

    assert done.returncode == 1
    shown = project.flash("status", "last").stdout
    lines = [line for line in shown.splitlines() if line.strip()]
    assert "the fourth row is broken" in "\n".join(lines[:6])
    assert "worker.log" in shown
    assert [item["outcome"] for item in project.json("status", "last")["attempts"]] == [
        "user_error"
    ]


def test_two_runs_of_one_config_give_the_same_adapter(project):
    adapters = []
    for _ in range(2):
        run = project.submit()
        status = project.wait(run)
        adapters.append((Path(status["adapter"]) / "adapter_model.safetensors").read_bytes())

    assert adapters[0] == adapters[1]
