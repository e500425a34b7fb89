"""A foreground task loads user code as a run's worker does, and never waits for it to end."""

import os
import subprocess
import sys
import time

import psutil
import pytest

from flash import foreground
from flash.environments import Located, snapshot
from flash.errors import EnvironmentFault, FlashError
from flash.home import FlashHome
from flash.plugins import PluginHost
from flash.spec.model import EnvironmentTable, read_reward_tables

FACTORY = """
import atexit, os, sys, threading
from pathlib import Path

from freesolo.environments import EnvironmentSingleTurn, RewardResult

HERE = Path(__file__).parent

class Echo(EnvironmentSingleTurn):
    def build_prompt_messages(self, example, prompt_text):
        return [{"role": "user", "content": example.input}]

    def score_response(self, example, response_text):
        return RewardResult(score=1.0, threshold=1.0)

def load_environment():
    return Echo()
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    folder = tmp_path / "project"
    (folder / "dataset").mkdir(parents=True)
    (folder / "dataset" / "train.jsonl").write_text('{"input": "a", "output": "b"}\n')
    monkeypatch.chdir(tmp_path)
    return folder


def check(project, code, worker_env, **reward):
    (project / "environment.py").write_text(FACTORY + code)
    located = Located(plugin="freesolo", reference=".", folder=project)
    table = EnvironmentTable(path=".")
    return foreground.call(
        "check",
        {
            "environment": foreground.environment_request(
                table, located, worker_env, read_reward_tables(reward, PluginHost.load())
            )
        },
        home=FlashHome(project.parent / "home"),
        secrets={},
    )


def test_an_environment_is_checked_as_the_worker_will_load_it(project, monkeypatch):
    monkeypatch.setenv("FLASH_DISABLE_PLUGINS", "wandb")
    (project.parent / "attrs.py").write_text("raise ImportError('of the current folder')\n")
    (project / "answers.key").write_text("42")
    before = snapshot(project, project.parent / "before") and sorted(project.rglob("*"))

    checked = check(
        project,
        """
assert os.environ["BOOKING_MODE"] == "strict"
assert not (HERE / "answers.key").exists(), "the worker will not have it"
assert "flash_sink_wandb" not in sys.modules, "a plugin that the caller denied was imported"
(HERE / "cache.json").write_text("{}")
atexit.register(threading.Event().wait)
threading.Thread(target=threading.Event().wait).start()
""",
        {"BOOKING_MODE": "strict"},
    )

    assert checked["rows"] == 1
    assert checked["digest"] == snapshot(project, project.parent / "after")
    assert {*project.rglob("*")} - {*before} == {project / "environment.py"}


def test_user_code_that_calls_exit_is_an_error_of_its_folder(project):
    with pytest.raises(FlashError, match="SystemExit") as caught:
        check(project, "raise SystemExit(0)\n", {})

    assert f"{project}/environment.py:" in str(caught.value)


def test_a_reward_that_cannot_be_made_is_found_before_anything_is_submitted(project):
    with pytest.raises(EnvironmentFault) as caught:
        check(project, "", {}, python={"path": "rewards.py:score", "weight": 2.0})

    assert caught.value.message == (f"[reward.python] path: there is no file {project}/rewards.py")


CALL = """
import sys
from pathlib import Path
from flash import foreground
from flash.environments import Located
from flash.home import FlashHome
from flash.spec.model import EnvironmentTable

located = Located(plugin="freesolo", reference=".", folder=Path(sys.argv[1]))
asked = foreground.environment_request(EnvironmentTable(path="."), located, {})
foreground.call("check", {"environment": asked}, home=FlashHome(Path(sys.argv[2])), secrets={})
"""


@pytest.mark.slow
def test_a_task_leaves_no_process_and_no_file_when_its_caller_is_killed(project, tmp_path):
    pids, scratch = tmp_path / "pids", tmp_path / "scratch"
    scratch.mkdir()
    (project / "environment.py").write_text(
        "import os, subprocess, time\n"
        "child = subprocess.Popen(['sleep', '300'])\n"
        f"open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{child.pid}} ready')\n"
        "time.sleep(300)\n"
    )
    caller = subprocess.Popen(
        [sys.executable, "-c", CALL, str(project), str(tmp_path / "home")],
        env={**os.environ, "TMPDIR": str(scratch)},
    )
    until(lambda: pids.exists() and "ready" in pids.read_text())
    assert any(scratch.iterdir())

    caller.kill()
    caller.wait()

    until(lambda: not any(map(is_alive, pids.read_text().split()[:2])))
    until(lambda: not any(scratch.iterdir()))


def until(condition):
    end_s = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.02)


def is_alive(pid):
    try:
        return psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
