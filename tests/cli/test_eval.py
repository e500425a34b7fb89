"""`flash eval` as a user runs it: the real command, a tiny real model, an environment of files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from chat_server import Server, completion

from flash.cli import root
from flash.cli.eval import DIFFERENCE_KEYS, JSON_KEYS, ROW_KEYS
from flash.environments import folder_digest
from flash.evaluations import EvaluationStore
from flash.home import FlashHome
from flash.job import Job
from flash.plane.ids import new_run_id
from flash.plane.plane import Plane
from flash.testing.models import make_tiny_model
from flash.worker.checkpoints import CheckpointStore

ENVIRONMENT = """
import os, sys
from freesolo.environments import EnvironmentSingleTurn, RewardMetric, RewardResult

class Letters(EnvironmentSingleTurn):
    def __init__(self, wanted="x", wait=""):
        self.wanted, self.wait = wanted, wait

    def build_prompt_messages(self, example, prompt_text):
        return [{"role": "user", "content": example.input}]

    def score_response(self, example, text):
        if self.wait:
            open(self.wait, "w").write(str(os.getpid()))
            __import__("time").sleep(600)
        if example.input == "row 1":
            raise ValueError("no score for this row")
        assert self.wanted == "x" or example.input.startswith(os.environ["WANTED_ROW"])
        print("a scorer may print", os.environ.get("JUDGE_KEY"))
        found = self.wanted == os.environ.get("JUDGE_KEY", self.wanted)
        return RewardResult(score=1.0, success=found, metrics=(RewardMetric("one", score=1.0),))

def load_environment(**params):
    return Letters(**params)
"""


def write_environment(folder):
    (folder / "dataset").mkdir(parents=True)
    (folder / "environment.py").write_text(ENVIRONMENT)
    for split, count in (("train", 2), ("eval", 4)):
        rows = [{"input": f"row {number}", "output": "x"} for number in range(count)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "dataset" / f"{split}.jsonl").write_text(text)
    return folder


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"))


class Shell:
    """A project folder with an environment, and a home."""

    def __init__(self, folder):
        self.folder = folder
        self.home = FlashHome(folder / "home")
        self.environment = write_environment(folder / "project")
        self.environ = {
            name: value for name, value in os.environ.items() if not name.startswith("FLASH")
        } | {"FLASH_HOME": str(self.home.root), "NO_COLOR": "1"}

    def start(self, *words):
        return subprocess.Popen(
            [sys.executable, "-m", "flash", "eval", *words],
            cwd=self.folder,
            env=self.environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def eval(self, *words):
        process = self.start(*map(str, words))
        out, err = process.communicate(timeout=240)
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def json(self, *words):
        done = self.eval(*words, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def run(self, model, **table):
        """A run that has a final adapter and a checkpoint, without the training."""
        job = Job(
            run=new_run_id(),
            spec={
                "thinking": False,
                "worker_env": {"WANTED_ROW": "row"},
                "reward": {},
                "environment": {"params": {}, "pip": [], "secrets": [], "split": "train"} | table,
            },
            plugins={},
            algorithm="nothing:trains",
            environment={
                "plugin": "freesolo",
                "reference": ".",
                "digest": folder_digest(self.environment),
            },
            model={"id": str(model), "plugin": "hub"},
            provider=("local",),
            sinks=(),
            steps=None,
            memory_gib=0.0,
            secrets=tuple(table.get("secrets", ())),
            warm_start=None,
        )
        plane = Plane(self.home, supervisor=[sys.executable, "-c", "pass"])
        run = plane.submit(job, environment=self.environment, secrets={})
        checkpoints = CheckpointStore(plane.store(run.id))
        checkpoints.save(2, lambda folder: _save_adapter(model, folder / "adapter"), metrics={})
        checkpoints.save_final(lambda folder: _save_adapter(model, folder))
        return run.id


def _save_adapter(model, folder):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model)
    get_peft_model(base, LoraConfig(r=2, target_modules="all-linear")).save_pretrained(folder)


@pytest.fixture
def shell(tmp_path):
    return Shell(tmp_path)


def test_a_base_model_needs_an_environment(shell, tiny_model):
    done = shell.eval(tiny_model)

    assert done.returncode == 2
    assert "is a base model, so its rows are not known" in done.stderr
    assert "hint: name an environment" in done.stderr


@pytest.mark.parametrize("target", ["last", "zzzzzzzzz", "zzzz/step-3", "./nothing", "no-such"])
def test_a_target_that_is_nothing_is_refused(shell, target):
    done = shell.eval(target, "--environment", "project")

    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ("-n", "0"),
        ("--max-tokens", "0"),
        ("--temperature", "-1"),
        ("--temperature", "nan"),
        ("--temperature", "inf"),
    ],
)
def test_numbers_without_sense_are_refused(shell, tiny_model, words):
    done = shell.eval(tiny_model, "--environment", "project", *words)

    assert done.returncode == 2
    assert done.stderr.startswith("error: ")


@pytest.mark.slow
def test_a_base_model_is_scored_on_the_held_out_rows(shell, tiny_model):
    result = shell.json(tiny_model, "--environment", "project", "--max-tokens", "4")

    assert list(result) == list(JSON_KEYS)
    assert list(result["rows"][0]) == list(ROW_KEYS)
    assert result["against"] is None
    assert result["split"] == "eval"
    assert (result["n"], result["errors"]) == (3, 1)
    assert result["success"] == 1.0
    assert result["mean"] == 1.0
    low, high = result["interval"]
    assert 0.4 < low < high == 1.0
    assert result["metrics"] == {"one": 1.0}
    assert "no score for this row" in result["rows"][1]["error"]
    assert result["model"] == str(tiny_model)


@pytest.mark.slow
def test_the_table_shows_score_and_interval_and_what_was_left_out(shell, tiny_model):
    done = shell.eval(tiny_model, "--environment", "project", "--max-tokens", "4")

    assert done.returncode == 0
    assert "success  100.0%  (95 %: 43.9% to 100.0%)  of 3 rows of eval" in done.stdout
    assert "1 answers could not be scored" in done.stderr
    assert "4 answers were cut at 4 tokens" in done.stderr
    assert "a scorer may print" not in done.stdout + done.stderr


@pytest.mark.slow
def test_a_run_and_its_checkpoint_are_scored_on_the_snapshot(shell, tiny_model):
    run = shell.run(tiny_model)
    (shell.environment / "environment.py").write_text("raise SystemExit('changed since')\n")

    for target in (run[:8], f"{run}/step-2"):
        assert shell.json(target, "-n", "1", "--max-tokens", "2")["n"] == 1

    missing = shell.eval(f"{run}/step-3")
    assert missing.returncode == 2
    assert f"{run}/step-2" in missing.stderr


@pytest.mark.slow
def test_only_declared_secrets_reach_the_environment(shell, tiny_model):
    (shell.folder / ".env").write_text("JUDGE_KEY=canary-7391\n")
    declared = shell.run(tiny_model, secrets=["JUDGE_KEY"], params={"wanted": "canary-7391"})
    silent = shell.run(tiny_model, params={"wanted": "nothing"})
    words = ("-n", "1", "--max-tokens", "2")

    assert shell.json(declared, *words)["success"] == 1.0
    assert shell.json(silent, *words)["success"] == 1.0, "an undeclared secret was there"

    (shell.folder / ".env").unlink()
    refused = shell.eval(declared, *words)
    assert refused.returncode == 2
    assert "JUDGE_KEY has no value" in refused.stderr


@pytest.mark.slow
def test_a_missing_split_is_an_error_that_names_the_others(shell, tiny_model):
    done = shell.eval(tiny_model, "--environment", "project", "--split", "test")

    assert done.returncode == 2
    assert 'there is no split "test"' in done.stderr
    assert "train" in done.stderr


@pytest.mark.slow
def test_ctrl_c_ends_the_child_too(shell, tiny_model):
    pid_file = shell.folder / "pid"
    run = shell.run(tiny_model, params={"wait": str(pid_file)})
    process = shell.start(run, "--max-tokens", "2")
    deadline = time.monotonic() + 120
    while not (pid_file.exists() and pid_file.read_text()):
        assert time.monotonic() < deadline, "the environment never scored"
        time.sleep(0.05)
    child = psutil.Process(int(pid_file.read_text()))

    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)

    assert process.returncode == 130
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


@pytest.mark.slow
def test_the_command_itself_imports_no_torch_and_no_user_code(shell, tiny_model):
    probe = (
        "import sys; from flash.cli import root; "
        f"code = root.run(['eval', {str(tiny_model)!r}, '--environment', 'project', "
        "'-n', '1', '--max-tokens', '2']); "
        "heavy = {'torch', 'transformers', 'peft', 'freesolo'} & sys.modules.keys(); "
        "sys.exit(code or (f'imported {heavy}' if heavy else 0))"
    )

    done = subprocess.run(
        [sys.executable, "-c", probe],
        cwd=shell.folder,
        env=shell.environ,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )

    assert done.returncode == 0, done.stderr


@pytest.fixture
def flash(shell, monkeypatch, capsys):
    """Return a function that runs a command line in this process: exit code, stdout, stderr."""
    for name, value in shell.environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(shell.folder)

    def run(*words):
        code = root.run([str(word) for word in words])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


SERVER = "https://api.example/v1#model"

CONFIG = """
model = "HuggingFaceTB/SmolLM2-135M-Instruct"
algorithm = "sft"

[environment]
path = "../project"
secrets = ["JUDGE_KEY"]
params = {wanted = "canary-7391"}

[worker_env]
WANTED_ROW = "row"

[reward.environment]
weight = 0.5

[reward.regex]
pattern = "yes"
"""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((SERVER,), "is a model of a server, so its rows are not known"),
        ((SERVER, "--environment", "project", "--key-from", "sk-canary-7391aBcD7391eFgH"), "a key"),
        ((SERVER, "--environment", "project", "--key-from", "A=canary-7391"), "without a value"),
        ((SERVER, "--environment", "project", "--key-from", "NO_SUCH_KEY"), "has no value"),
        ((SERVER, "--environment", "project", "--samples", "4", "--temperature", "0"), "greedy"),
        ((SERVER, "--environment", "none.toml"), "none.toml: "),
        ((SERVER, "--environment", "broken.toml"), "reward.regexp: unknown reward"),
        ((SERVER, "--environment", "rows"), "nothing scores rows: it has no score of its own"),
        ((SERVER, "--environment", "project", "--against", "eval-1"), 'no evaluation "eval-1"'),
        ((SERVER, "--environment", "project", "--against", "no-such"), "no-such"),
        (("http://api.example/v1", "--environment", "project"), "in the clear"),
        (("https://a:canary-7391@api.example/v1", "--environment", "project"), "a user"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_anything_is_asked(flash, shell, words, said):
    (shell.folder / "broken.toml").write_text(CONFIG.replace("[reward.regex]", "[reward.regexp]"))
    (shell.folder / "rows").mkdir()
    (shell.folder / "rows" / "train.jsonl").write_text('{"input": "1 + 1?", "output": "2"}\n')

    code, _, error = flash("eval", *words)

    assert code == 2
    assert said in error
    assert "canary-7391" not in error


@pytest.fixture
def server():
    served = Server()
    yield served
    served.close()


def says_yes(asked):
    """Answer as the good model, which is right about every row, or as another."""
    return 200, completion("yes" if asked["model"] == "good" else "no"), {}


YES = ENVIRONMENT.replace("found = self.wanted ==", "found = text == 'yes' and self.wanted ==")


@pytest.mark.slow
def test_a_server_is_evaluated_kept_and_compared(shell, flash, server):
    (shell.environment / "environment.py").write_text(YES)
    server.answer = says_yes
    shell.environ["OPENAI_API_KEY"] = "canary-7391"
    here = ("--environment", "project", "--json")
    words = (f"{server.url}#good", "--against", f"{server.url}#bad", "--samples", "3", *here)

    found = shell.json(*words[:-1])

    assert list(found) == list(JSON_KEYS)
    assert (found["model"], found["endpoint"]) == ("good", server.url)
    assert (found["n"], found["errors"], found["samples"]) == (3, 3, 3)
    assert (found["temperature"], found["pass_at"]) == (1.0, {"1": 1.0, "2": 1.0, "3": 1.0})
    assert (found["against"]["model"], found["against"]["success"]) == ("bad", 0.0)
    assert list(found["against"]["difference"]) == list(DIFFERENCE_KEYS)
    assert found["against"]["difference"]["success"]["gain"] == 1.0
    assert {headers["Authorization"] for _, headers, _ in server.requests} == {"Bearer canary-7391"}
    kept = json.loads(flash("eval", "list", "--json")[1])
    assert [one["evaluation"] for one in kept] == [
        found["against"]["evaluation"],
        found["evaluation"],
    ]
    store = EvaluationStore(shell.home)
    assert store.find(found["evaluation"])["rows"] == found["rows"]
    for path in (shell.home.root / "evals").iterdir():
        assert b"canary-7391" not in path.read_bytes()

    again = shell.eval(f"{server.url}#good", "--against", found["evaluation"], *here[:-1])
    assert again.returncode == 0
    assert (
        f"no change beyond noise against {server.url}#good ({found['evaluation']})" in again.stdout
    )
    assert "of 3 rows of eval, 3 answers each at temperature 1" in again.stdout
    assert "kept as eval-" in again.stdout

    (shell.environment / "environment.py").write_text(YES + "# changed\n")
    asked = len(server.requests)
    refused = shell.eval(f"{server.url}#good", "--against", found["evaluation"], *here[:-1])
    assert refused.returncode == 2
    assert "scored with different versions of the environment" in refused.stderr
    assert len(server.requests) == asked


SUITES = """
from freesolo.datasets import load_dataset
from freesolo.environments import EvalSuite, RewardResult

class Brief(EvalSuite):
    def cases(self):
        return load_dataset([{"input": f"case {n}", "output": "x"} for n in range(3)]).examples

    def score(self, case, text):
        return RewardResult(1.0 / len(text))

EVALUATIONS = Brief()
"""


@pytest.mark.slow
def test_a_config_is_an_environment_with_its_params_rewards_and_secrets(shell, flash, server):
    server.answer = says_yes
    configs = shell.folder / "configs"
    configs.mkdir()
    (configs / "rl.toml").write_text(CONFIG)
    (configs / ".env").write_text("JUDGE_KEY=canary-7391\n")

    code, said, error = flash(
        "eval", f"{server.url}#good", "--environment", configs / "rl.toml", "--json"
    )

    assert code == 0, error
    found = json.loads(said)
    assert (found["n"], found["mean"], found["success"]) == (3, 1.5, 1.0)
    assert found["metrics"] == {"environment": 1.0, "environment/one": 1.0, "regex": 1.0}
    assert found["reward"]["environment"] == {"weight": 0.5}
    assert found["params"] == {"wanted": "canary-7391"}


@pytest.mark.slow
def test_suites_of_the_environment_run_too(shell, server):
    (shell.environment / "evaluations.py").write_text(SUITES)

    found = shell.eval(f"{server.url}#m", "--environment", "project")

    assert found.returncode == 0, found.stderr
    assert "of 3 rows of eval" in found.stdout
    assert "of 3 rows of the suite Brief" in found.stdout
    assert "mean     0.333" in found.stdout


@pytest.mark.slow
def test_a_run_is_compared_with_its_base_model(shell, tiny_model):
    run = shell.run(tiny_model)

    found = shell.json(run, "--against", tiny_model, "--max-tokens", "4", "--samples", "2")

    assert (found["run"], found["step"], found["against"]["run"]) == (run, None, None)
    assert found["adapter"].startswith("sha256:")
    assert found["against"]["adapter"] is None
    assert found["against"]["digest"] == found["digest"] == folder_digest(shell.environment)
    assert found["against"]["difference"]["verdict"] == "no change beyond noise"


@pytest.mark.slow
def test_a_server_that_refuses_the_key_is_an_error_and_nothing_is_kept(shell, server):
    server.answer = lambda _: (401, {"error": {"message": "wrong key canary-7391"}}, {})
    (shell.folder / ".env").write_text("TEAM_KEY=canary-7391\n")

    done = shell.eval(f"{server.url}#m", "--environment", "project", "--key-from", "TEAM_KEY")

    assert done.returncode == 1
    assert "refuses the key (401): wrong key ***" in done.stderr
    assert not (shell.home.root / "evals").exists()
