"""`flash train`: what it refuses before anything starts, and runs through the real worker."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from flash.cli import root
from flash.cli.train import JSON_KEYS
from flash.home import FlashHome
from flash.plane.plane import Plane
from flash.testing.models import make_tiny_model

ENVIRONMENT = """
from freesolo.environments import EnvironmentSingleTurn, RewardResult

class Echo(EnvironmentSingleTurn):
    def build_prompt_messages(self, example, prompt_text):
        return [{"role": "user", "content": example.input}]

    def score_response(self, example, response_text):
        return RewardResult(score=1.0, threshold=1.0)

def load_environment(**params):
    return Echo()
"""


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def project(tmp_path, tiny_model, monkeypatch):
    """A working directory with an environment and a config, and a home of its own."""
    folder = tmp_path / "project"
    (folder / "dataset").mkdir(parents=True)
    (folder / "environment.py").write_text(ENVIRONMENT)
    rows = [{"input": f"say {n}", "output": f"word {n}"} for n in range(8)]
    (folder / "dataset" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "run.toml").write_text(
        f'model = "{tiny_model}"\n'
        '[environment]\npath = "."\n'
        "[train]\nlora_rank = 2\nbatch_size = 2\nmax_length = 128\nmax_steps = 2\n"
    )
    monkeypatch.chdir(folder)
    monkeypatch.setenv("FLASH_HOME", str(tmp_path / "home"))
    return folder


@pytest.fixture
def flash(capsys):
    """Return a function that runs a command line in this process: exit code, stdout, stderr."""

    def run(*words):
        code = root.run(words)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def runs():
    """Return the runs there are, without making a home where there is none."""
    home = FlashHome.from_environment()
    return Plane(home).runs() if home.root.exists() else []


def test_a_dry_run_shows_every_value_with_its_layer(project, flash):
    (project / "more.toml").write_text("[train]\nbatch_size = 4\n")

    code, said, err = flash(
        "train", "run.toml", "--config", "more.toml", "--set", "seed=7", "--dry-run"
    )

    rows = [line.split()[:3] for line in said.splitlines() if line]
    assert (code, err) == (0, "")
    assert ["seed", "7", "--set"] in rows
    assert ["train.batch_size", "4", "more.toml"] in rows
    assert ["train.lora_rank", "2", "run.toml"] in rows
    assert ["train.lora_alpha", "4.0", "recipe"] in rows
    assert "nothing was started" in said


def test_a_dry_run_as_json_is_the_contract(project, flash):
    code, said, _ = flash("train", "run.toml", "--dry-run", "--json")

    plan = json.loads(said)
    assert code == 0
    assert plan["spec"]["train"]["lora_rank"] == 2
    assert plan["sources"]["train.lora_rank"] == "run.toml"
    assert [p for p in plan["problems"] if p["severity"] == "error"] == []
    assert plan["need"]["steps"] == 2


def test_a_dry_run_reports_every_problem_at_once(project, flash):
    (project / "run.toml").write_text("model = 5\nsede = 1\n[train]\nlora_rnk = 3\n")

    code, _, err = flash("train", "run.toml", "--dry-run")
    as_json = flash("train", "run.toml", "--dry-run", "--json")

    assert code == as_json[0] == 2
    for path in ("model: ", "sede: ", "environment: ", 'did you mean "lora_rank"'):
        assert path in err
    plan = json.loads(as_json[1])
    assert plan["spec"] is None
    assert {problem["path"] for problem in plan["problems"]} >= {"model", "sede", "environment"}


def test_a_dry_run_imports_no_torch_asks_no_network_and_starts_nothing(project):
    program = (
        "import socket, sys\n"
        "def refuse(*_): raise AssertionError('the network was asked')\n"
        "socket.socket.connect = refuse\n"
        "from flash.cli import root\n"
        "code = root.run(['train', 'run.toml', '--dry-run'])\n"
        "heavy = {'torch', 'transformers', 'datasets', 'trl', 'peft', 'sqlalchemy', 'requests'}\n"
        "sys.exit(code or ', '.join(heavy & set(sys.modules)) or None)\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    home = FlashHome.from_environment().root
    assert not (home / "flash.db").exists()
    assert not (home / "runs").exists()


def test_a_config_that_is_wrong_starts_nothing(project, flash):
    code, _, err = flash("train", "run.toml", "--set", "train.lora_rank=0")

    assert code == 2
    assert err.startswith("error: train.lora_rank")
    assert runs() == []


def test_an_environment_that_does_not_load_starts_nothing(project, flash):
    (project / "environment.py").write_text(ENVIRONMENT + "\nraise RuntimeError('not today')\n")
    (project / "answers.key").write_text("42")

    code, _, err = flash("train", "run.toml")

    assert code == 2
    assert "not today" in err
    assert f"{project}/environment.py:14" in err
    assert "warning: left out of the run for what they are named: answers.key" in err
    assert runs() == []


def test_missing_secrets_are_all_listed_and_nothing_starts(project, flash):
    code, _, err = flash(
        "train", "run.toml", "--set", 'environment.secrets=["FIRST_KEY", "SECOND_KEY"]'
    )

    assert code == 2
    assert "FIRST_KEY" in err
    assert "SECOND_KEY" in err
    assert runs() == []


def test_ctrl_c_while_the_environment_is_checked_submits_nothing(project):
    (project / "environment.py").write_text(
        ENVIRONMENT + "\nopen('/dev/null'); import os, time\n"
        f"open({str(project / 'checking')!r}, 'w').write(str(os.getpid())); time.sleep(300)\n"
    )
    train = subprocess.Popen(
        [sys.executable, "-m", "flash", "train", "run.toml"], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not (project / "checking").exists() or not (project / "checking").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)

    train.send_signal(signal.SIGINT)
    _, err = train.communicate(timeout=30)

    assert train.returncode == 130
    assert "Traceback" not in err
    assert runs() == []
    with pytest.raises(ProcessLookupError):
        os.kill(int((project / "checking").read_text()), 0)


@pytest.mark.slow  # a real training run
def test_in_the_background_it_says_the_run_and_returns(project, flash):
    submitted = json.loads(flash("train", "run.toml", "--background", "--json")[1])
    assert list(submitted) == list(JSON_KEYS)
    assert set(submitted) == {"run", "state"}

    code, said, _ = flash("status", submitted["run"], "--follow", "--json")

    status = json.loads(said)
    assert (code, status["state"], status["step"]) == (0, "done", 2)
    assert status["adapter"] is not None


@pytest.mark.slow  # a real training run
def test_followed_to_the_end_it_shows_the_way_and_what_to_do_next(project, flash):
    code, said, _ = flash("train", "run.toml")

    [run] = runs()
    assert code == 0
    assert f"{run.id} queued" in said
    assert "step 2/2" in said
    assert f"flash eval {run.id}" in said


@pytest.mark.slow  # a real training run
def test_training_starts_from_the_adapter_of_a_run(project, flash):
    first = json.loads(flash("train", "run.toml", "--json")[1])

    second = json.loads(
        flash("train", "run.toml", "--json", "--set", f"train.init_from_adapter={first['run']}")[1]
    )

    assert second["state"] == "done"
    manifest = json.loads(
        (Plane(FlashHome.from_environment()).store(second["run"]) / "job.json").read_text()
    )
    assert manifest["warm_start"] == {"ref": first["run"], "folder": first["adapter"]}
