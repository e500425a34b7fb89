"""One attempt as the provider starts it: a real worker process with an algorithm of a few lines."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import attrs
import pytest

from flash.environments import snapshot
from flash.home import FlashHome
from flash.job import make_job
from flash.plan import make_plan
from flash.plane.ids import new_run_id
from flash.plugins import PluginHost
from flash.spec.resolve import resolve
from flash.worker.rollouts import read_rollouts

ENVIRONMENT = """
import atexit, os, threading
from pathlib import Path

from freesolo.environments import EnvironmentSingleTurn, RewardResult

KEY = os.environ.get("SERVICE_KEY", "")

class Echo(EnvironmentSingleTurn):
    def build_prompt_messages(self, example, prompt_text):
        return [{"role": "user", "content": example.input}]

    def score_response(self, example, response_text):
        return RewardResult(score=1.0, threshold=1.0)

def load_environment():
    return Echo()
"""
PLUGIN = """
import sys
from pathlib import Path

import attrs

from flash.api import ModelCard, ModelPlugin, Reward, RewardPlugin, SinkPlugin, hookimpl

CARD = ModelCard("tiny", 1000, 512, 8, 1, 8, 8)

class Source:
    def __init__(self, ctx): pass
    def fetch(self, model, report): return Path("/")
    def card(self, model): return CARD

@attrs.frozen
class Nothing:
    pass

def no_sink(ctx, config):
    raise ImportError("its library is not here")

class Told:
    def __init__(self, ctx, config):
        self.told = f"{ctx.secret('ADAPTER_KEY')} {(ctx.environment / 'environment.py').exists()}"
    def score(self, task, episodes):
        return [Reward(1.0, metrics={"gold": len(task.gold)}, reason=self.told)]

@hookimpl
def flash_register_rewards():
    keys = ("ADAPTER_KEY",)
    return [RewardPlugin(name="few-lines", summary="1.", make=Told, config=Nothing, secrets=keys)]

@hookimpl
def flash_register_models():
    return [ModelPlugin(name="few-lines", summary="One.", make=Source, cards=(CARD,))]

@hookimpl
def flash_register_sinks():
    inside = SinkPlugin(name="few-lines", summary="None.", make=no_sink, config=Nothing)
    return [inside, SinkPlugin(name="outside", summary="None.", notices=no_sink, config=Nothing)]
"""
FINISH = 'context.checkpoints.save_final(lambda to: (to / "adapter_config.json").write_text("{}"))'


class Worker:
    """A run's store, and attempts at it; a plugin brings a model without weights."""

    def __init__(self, folder):
        self.folder = folder
        self.store = folder / "store"
        self.project = folder / "project"
        (self.project / "dataset").mkdir(parents=True)
        (self.project / "dataset" / "train.jsonl").write_text('{"input": "a", "output": "b"}\n')
        info = folder / "few_lines-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: few-lines\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[flash]\nfew-lines = few_lines\n")
        (folder / "few_lines.py").write_text(PLUGIN)

    def submit(self, environment="", *, steps=None, more=""):
        """Write the store; `environment` is code that the environment runs when it is loaded."""
        (self.project / "environment.py").write_text(ENVIRONMENT + textwrap.dedent(environment))
        config = self.project / "run.toml"
        config.write_text(
            f'model = "tiny"\n[environment]\npath = "."\nsecrets = ["SERVICE_KEY"]\n{more}'
        )
        home = FlashHome(self.folder / "home")
        host = PluginHost.default(home)
        plan = make_plan(resolve(config, overlays=(), sets=(), host=host), host, home)
        self.store.mkdir()
        digest = snapshot(self.project, self.store / "environment")
        job = make_job(plan, host, run=new_run_id(), digest=digest)
        job = attrs.evolve(job, algorithm="algorithm:run", steps=steps)
        (self.store / "job.json").write_bytes(job.to_json())

    def attempt(self, algorithm, number=1):
        """Run one attempt in which the algorithm is this code, given `context`."""
        code = "def run(context):\n" + textwrap.indent(textwrap.dedent(algorithm), "    ")
        (self.folder / "algorithm.py").write_text(code)
        return subprocess.run(
            [sys.executable, "-P", "-m", "flash.worker", "run", str(self.store), str(number)],
            env={
                "PATH": os.environ["PATH"],
                "PYTHONPATH": str(self.folder),
                "FLASH_HOME": str(self.folder / "home"),
            },
            input=json.dumps({"SERVICE_KEY": "canary-4711", "ADAPTER_KEY": "canary-0815"}),
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    def events(self, type_, number=1):
        lines = (self.store / "attempts" / str(number) / "events.jsonl").read_text().splitlines()
        return [event for event in map(json.loads, lines) if event["type"] == type_]


@pytest.fixture
def worker(tmp_path, monkeypatch):
    monkeypatch.setenv("SERVICE_KEY", "canary-4711")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "few_lines", raising=False)
    return Worker(tmp_path)


SAMPLE = """
import os
from flash.api import Rollout
said = "my key is " + os.environ["SERVICE_KEY"]
context.rollouts.save(
    3, [Rollout(step=3, task="a", sample=0, messages=(), opening=0, completion=said, score=1.0)]
)
"""


def test_a_run_ends_whatever_user_code_leaves_behind_and_what_it_keeps_is_masked(worker):
    worker.submit(
        """
        threading.Thread(target=threading.Event().wait).start()
        atexit.register(os.write, 2, b"hook says " + KEY.encode())
        print("import says", KEY)
        """,
        steps=100,
        more="[sink.few-lines]\n[sink.outside]\n",
    )

    done = worker.attempt(f"context.reporter.metrics(3, 100, loss=1.0)\n{SAMPLE}\n{FINISH}")

    assert done.returncode == 0, done.stderr
    assert done.stderr == "import says ***\n"
    [ended] = worker.events("done")
    assert ended["steps"] == 3
    [kept] = read_rollouts(worker.store, 3).rollouts
    assert kept.completion == "my key is ***"
    [sampled] = worker.events("rollouts")
    assert (sampled["step"], sampled["episodes"], sampled["kept"]) == (3, 1, 1)
    [warning] = worker.events("warning")
    assert "the sink few-lines is left out: " in warning["message"]
    assert "its library is not here" in warning["message"]


def test_an_algorithm_scores_by_the_reward_tables_and_user_code_has_no_adapters_secret(worker):
    worker.submit(
        "assert 'ADAPTER_KEY' not in os.environ\n",
        more="[reward.environment]\n[reward.few-lines]\nweight = 0.5\n",
    )

    done = worker.attempt(
        f"""
        from flash.api import Episode
        environment = context.environment
        (task,) = environment.tasks("train")
        (reward,) = environment.score(task, [Episode((), "b")])
        assert reward.score == 1.5, reward
        assert reward.metrics == {{"environment": 1.0, "few-lines": 1.0, "few-lines/gold": 1.0}}
        assert reward.reason == "few-lines: " + "canary-" + "0815 True"
        {FINISH}
        """
    )

    assert done.returncode == 0, done.stderr


def test_what_an_environment_writes_into_its_folder_does_not_keep_the_next_attempt_away(worker):
    worker.submit('(Path(__file__).parent / "dataset" / "cache.json").open("x").write("{}")\n')

    first = worker.attempt("raise KeyError('lost')", number=1)
    second = worker.attempt(FINISH, number=2)

    assert (first.returncode, second.returncode) == (1, 0), second.stderr
    assert not list(worker.store.glob("attempts/*/environment"))
    assert not (worker.store / "environment" / "dataset" / "cache.json").exists()


def test_an_error_names_the_environments_folder_in_the_store(worker):
    worker.submit("raise ValueError('boom')\n")

    done = worker.attempt(FINISH)

    assert done.returncode == 10
    [error] = worker.events("error")
    assert f"{worker.store}/environment/environment.py:" in error["message"]


def test_events_that_a_full_disk_did_not_take_cost_no_result_and_the_log_says_so(worker):
    worker.submit()
    (worker.store / "attempts" / "1").mkdir(parents=True)
    (worker.store / "attempts" / "1" / "events.jsonl").symlink_to("/dev/full")

    done = worker.attempt(FINISH)

    assert done.returncode == 0
    assert (worker.store / "adapter" / "manifest.json").exists()
    assert "No space left on device; the last events are lost" in done.stderr


def test_an_events_file_that_cannot_be_opened_ends_the_run_with_the_reason_in_the_log(worker):
    worker.submit()
    (worker.store / "attempts" / "1" / "events.jsonl").mkdir(parents=True)

    done = worker.attempt(FINISH)

    assert done.returncode == 10
    assert "StoreError: cannot open" in done.stderr


def test_an_algorithm_that_calls_exit_has_not_succeeded(worker):
    worker.submit()

    done = worker.attempt("raise SystemExit(0)")

    assert done.returncode == 1
    assert "SystemExit" in worker.events("error")[0]["message"]


def test_a_crash_below_python_leaves_its_stack_in_the_log(worker):
    worker.submit()

    done = worker.attempt("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)")

    assert done.returncode == -signal.SIGSEGV
    assert "Segmentation fault" in done.stderr
    assert 'algorithm.py", line 3 in run' in done.stderr


@pytest.mark.slow
def test_a_worker_that_is_told_to_stop_while_it_loads_ends_at_once(worker):
    """What user code makes of it is no error of the run."""
    worker.submit("import signal, time; os.kill(os.getpid(), signal.SIGTERM); time.sleep(300)")

    done = worker.attempt("raise AssertionError")

    assert done.returncode == 12, done.stderr
    assert "Traceback" not in done.stderr
    assert worker.events("error") == []
    assert not (worker.store / "attempts" / "1" / "environment").exists()


@pytest.mark.slow
def test_a_worker_that_is_told_to_stop_while_it_trains_may_save(worker):
    worker.submit()

    done = worker.attempt(
        """
        import os, signal
        context.reporter.phase("train")
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as libraries do
        assert not context.stop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert context.stop()
        context.checkpoints.save(1, lambda folder: (folder / "w").touch(), metrics={})
        """
    )

    assert done.returncode == 12, done.stderr
    assert [path.name for path in (worker.store / "checkpoints").iterdir()] == ["step-000001"]


SAVES = """
import time
def write(to):
    if to.name == "step-000002":
        raise OSError(28, "No space left on device")
    (to / "adapter").mkdir()
    (to / "adapter" / "weights").write_text("w")
    (to / "state").mkdir()
for step in range(1, 1000):
    context.reporter.metrics(step, 1000, loss=1.0)
    if step < 3:
        context.checkpoints.save(step, write, metrics={"eval_loss": 1.0})
    if context.stop():
        context.checkpoints.save(step, write, metrics={})
    time.sleep(0.01)
"""


@pytest.mark.slow
def test_a_step_that_was_asked_for_and_cannot_be_saved_ends_the_attempt_with_the_reason(worker):
    worker.submit(more="[train]\nsave_at_steps = [2]\nmax_steps = 1000\n")

    done = worker.attempt(SAVES)

    [error] = worker.events("error")
    assert done.returncode != 0
    assert "step-000002: No space left on device" in error["message"]
    assert [event["step"] for event in worker.events("checkpoint")] == [1]
    assert len(worker.events("metric")) < 999


@pytest.mark.slow
def test_an_attempt_that_another_has_followed_ends_and_saves_nothing(worker):
    worker.submit()
    (worker.store / "attempts" / "2").mkdir(parents=True)

    done = worker.attempt(FINISH)

    assert done.returncode != 0
    assert "attempt 2 has taken its place" in done.stdout + done.stderr
    assert not (worker.store / "adapter").exists()
    assert not (worker.store / "result.json").exists()
