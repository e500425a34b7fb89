"""`flash env test` as a user runs it: the real command, real folders and configs, a tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flash.cli import env_test, root
from flash.cli.app import App
from flash.testing.models import make_tiny_model
from flash.workbench.setup import scaffold

BOOKINGS = Path(__file__).parents[2] / "examples" / "bookings"
SMALL = "HuggingFaceTB/SmolLM2-135M-Instruct"
CANARY = "canary-5820-value"

SHAPE_ONLY = """
from freesolo.environments import EnvironmentSingleTurn, RewardResult

class Shape(EnvironmentSingleTurn):
    def build_prompt_messages(self, example, prompt_text):
        return [{"role": "user", "content": example.input}]

    def score_response(self, example, response_text):
        return RewardResult(score=float(bool(response_text.strip())), threshold=1.0)

def load_environment():
    return Shape()
"""


class Shell:
    """A folder, and `flash env test` in it."""

    def __init__(self, folder):
        self.folder = folder
        self.environ = {
            name: value for name, value in os.environ.items() if not name.startswith("FLASH")
        } | {"FLASH_HOME": str(folder / "home"), "NO_COLOR": "1"}

    def test(self, *words):
        return subprocess.run(
            [sys.executable, "-m", "flash", "env", "test", *map(str, words)],
            cwd=self.folder,
            env=self.environ,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )

    def json(self, *words):
        done = self.test(*words, "--json")
        assert done.returncode in {0, 1}, done.stderr
        found = json.loads(done.stdout)
        assert done.returncode == (found["verdict"] == "FAIL")
        return found

    def project(self, code, *, config="", rows=24):
        """A project of this environment with its held-out rows and a config."""
        scaffold(self.folder / "project", multi_turn=False)
        place = self.folder / "project"
        (place / "environment.py").write_text(code)
        (place / "configs" / "rl.toml").write_text(
            f'model = "{SMALL}"\nalgorithm = "grpo"\n[environment]\npath = ".."\n{config}'
        )
        return place


@pytest.fixture
def shell(tmp_path):
    return Shell(tmp_path)


def test_a_model_cannot_be_named_and_left_out(tmp_path, capsys):
    assert root.run(["env", "test", str(tmp_path), "--model", "x/y", "--no-model"]) == 2
    assert "--model and --no-model exclude each other" in capsys.readouterr().err


def test_a_path_that_is_nothing_is_refused(tmp_path, capsys):
    assert root.run(["env", "test", str(tmp_path / "nothing.toml")]) == 2
    assert root.run(["env", "test", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "nothing.toml" in said
    assert "no installed plugin reads the folder" in said


def test_every_problem_of_a_config_is_said(tmp_path, capsys):
    (tmp_path / "rl.toml").write_text('algorithm = "grpo"\n[environment]\nsplt = "x"\n')

    assert root.run(["env", "test", str(tmp_path / "rl.toml")]) == 2
    said = capsys.readouterr().err
    assert "error: environment.splt: unknown key" in said
    assert "error: model" in said


class TestWhichModel:
    @pytest.fixture
    def asked(self, tmp_path, monkeypatch):
        """Return a function: which model a config of this model asks, or a folder alone."""
        monkeypatch.setenv("FLASH_HOME", str(tmp_path / "home"))
        scaffold(tmp_path / "project", multi_turn=False)
        config = tmp_path / "project" / "configs" / "rl.toml"

        def run(model=None, *, named=None):
            config.write_text(config.read_text().replace(SMALL, model or SMALL))
            path = config if model else tmp_path / "project"
            return env_test._model(App(), env_test._place(App(), path, None), named).id

        return run

    def test_a_small_one_that_a_plugin_brings(self, asked):
        assert asked() == asked(SMALL) == SMALL

    def test_not_one_that_is_elsewhere(self, asked):
        assert asked("org/seventy-billion") == SMALL

    def test_the_one_that_is_named(self, asked):
        assert asked("org/seventy-billion", named=f"smollm2:{SMALL}") == SMALL


@pytest.mark.slow
@pytest.mark.parametrize("multi_turn", [False, True], ids=["single", "multi"])
def test_what_setup_writes_passes(shell, multi_turn):
    scaffold(shell.folder / "project", multi_turn=multi_turn)

    found = shell.json("project/configs/rl.toml", "--no-model", "--tasks", "40")

    assert (found["verdict"], found["findings"]) == ("PASS", [])
    assert found["probes"]["gold"] == 1.0
    assert max(score for probe, score in found["probes"].items() if probe != "gold") < 0.5


@pytest.mark.slow
def test_the_bookings_example_passes(shell):
    done = shell.test(BOOKINGS, "--no-model")

    assert done.returncode == 0
    assert "rows: 400 of train, 120 of eval" in done.stdout
    assert "\nPASS for grpo, in " in done.stdout


@pytest.mark.slow
def test_a_reward_that_pays_for_anything_fails_with_a_fix(shell):
    shell.project(SHAPE_ONLY)

    done = shell.test("project", "--no-model")

    assert done.returncode == 1
    assert "FAIL junk-reward\n  an answer that says words that have nothing to do with it gets" in (
        done.stdout
    )
    assert "  fix: make the score fall with what is wrong" in done.stdout
    assert "\nFAIL for grpo, in " in done.stdout
    assert shell.json("project", "--no-model", "--algorithm", "sft")["verdict"] == "WARN"


@pytest.mark.slow
def test_the_rewards_of_a_config_count(shell):
    shell.project(SHAPE_ONLY, config="[reward.exact-match]\n")

    found = shell.json("project/configs/rl.toml", "--no-model")

    assert [one for one in found["findings"] if one["level"] == "fail"] == []
    assert (found["probes"]["gold"], found["probes"]["junk"]) == (1.0, 0.0)


@pytest.mark.slow
def test_secrets_are_those_that_the_config_declares(shell):
    code = f"import os\nKEY = os.environ.get('JUDGE_API_KEY')\nprint(KEY)\n{SHAPE_ONLY}"
    place = shell.project(code, config="[reward.exact-match]\n")
    (place / ".env").write_text(f"JUDGE_API_KEY={CANARY}\n")
    shell.environ["JUDGE_API_KEY"] = CANARY

    silent = shell.json("project/configs/rl.toml", "--no-model")
    config = place / "configs" / "rl.toml"
    config.write_text(config.read_text().replace('".."', '".."\nsecrets = ["JUDGE_API_KEY"]'))
    declared = shell.test("project/configs/rl.toml", "--no-model", "--json")

    assert [(one["level"], one["check"]) for one in silent["findings"]] == [("fail", "secrets")]
    assert json.loads(declared.stdout)["verdict"] == "PASS"
    assert CANARY not in declared.stdout + declared.stderr


@pytest.mark.slow
def test_a_scorer_that_ends_the_process_is_an_error(shell):
    shell.project(SHAPE_ONLY.replace("return RewardResult(", "__import__('os')._exit(0)("))

    done = shell.test("project", "--no-model")

    assert done.returncode == 1
    assert "the test process ended without an answer" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_configs_model_answers_and_every_key_is_documented(shell, tmp_path):
    model = make_tiny_model(tmp_path / "model")
    shell.project(
        SHAPE_ONLY, config="[reward.exact-match]\n[train]\ngroup_size = 2\nmax_tokens = 3\n"
    )

    config = shell.folder / "project" / "configs" / "rl.toml"
    config.write_text(config.read_text().replace(SMALL, str(model)))

    found = shell.json("project/configs/rl.toml", "--tasks", "3")

    assert list(found) == [*env_test.JSON_KEYS]
    assert [*found["findings"][0]] == [*env_test.FINDING_KEYS]
    assert [*found["sampled"]] == [*env_test.SAMPLED_KEYS]
    assert found["model"] == str(model)
    sampled = found["sampled"]
    assert (sampled["tasks"], sampled["group_size"], sampled["max_tokens"]) == (3, 2, 3)
    assert {one["check"] for one in found["findings"]} == {"zero-variance", "truncated"}
