"""Every verb, with a disk that fails at each of its calls: a sentence and an exit code."""

import errno
import itertools

import pytest
from faults.disk import Fault, failing, open_files

from flash.cli.root import run as flash
from flash.evaluations import EvaluationStore

FAULTS = [
    Fault(
        errno.EIO, frozenset({"open", "create", "list", "write", "mkdir", "rename"}), lasting=True
    ),
    Fault(errno.EMFILE, frozenset({"open", "create", "list"}), lasting=False),
]
SAMPLE = """
import gzip
from flash.values import Rollout
from flash.worker.checkpoints import CheckpointStore
from flash.worker.rollouts import RolloutStore
class Silent:
    def emit(self, *_, **__): pass
    warning = emit
rollout = Rollout(step=1, task="a", sample=0, messages=({"role": "user", "content": "Hello"},),
                  opening=1, completion="x", score=1.0)
RolloutStore(store, Silent()).save(1, [rollout])
def write(folder):
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
CheckpointStore(store).save(1, write, metrics={"eval_loss": 1.0})
print("working")
say("phase", name="train")
say("metric", step=1, total=1, loss=1.0)
say("error", kind="user_error", message="row 3 has no target", hint="give it one")
sys.exit(10)
"""
EVALUATION = {
    "run": None,
    "target": "org/model",
    "split": "eval",
    "n": 1,
    "success": None,
    "mean": None,
    "environment": ".",
    "digest": "sha256:0",
    "rows": [],
    "suites": {},
}
VERBS = {
    "runs": ["runs"],
    "status": ["status", "RUN"],
    "status --json": ["status", "RUN", "--json"],
    "status --logs": ["status", "RUN", "--logs"],
    "status --follow": ["status", "RUN", "--follow"],
    "checkpoints": ["checkpoints", "RUN"],
    "rollouts": ["rollouts", "RUN"],
    "rollouts --step": ["rollouts", "RUN", "--step", "1"],
    "compare": ["compare", "RUN", "RUN"],
    "cancel": ["cancel", "RUN"],
    "eval list": ["eval", "list"],
    "plugins": ["plugins"],
    "gc": ["gc"],
    "deploy --dry-run": ["deploy", "RUN/step-1", "--dry-run"],
    "deployments": ["deployments"],
    "usage": ["usage"],
    "keys": ["keys"],
}


@pytest.fixture(scope="module")
def ended(bench):
    """Return a run that failed and left something of everything."""
    run = bench.submit(SAMPLE)
    assert bench.wait(run).error == "row 3 has no target"
    bench.until(lambda: bench.unfinished() == [])
    bench.kill_supervisor()
    EvaluationStore(bench.home).keep(EVALUATION)
    return run


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=str)
@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_whose_disk_fails_says_so(bench, ended, monkeypatch, capsys, verb, fault):
    monkeypatch.setenv("FLASH_HOME", str(bench.home.root))
    words = [word.replace("RUN", ended) for word in VERBS[verb]]
    flash(words)  # what is imported is imported
    expected = flash(words)
    assert expected == (1 if "--follow" in words else 0)
    capsys.readouterr()
    for at in itertools.count():
        before = open_files()
        with failing(bench.home.root, fault, at) as disk:
            code = flash(words)
        told = capsys.readouterr()
        where = f"call {at}: {told.err}"
        assert "Traceback" not in told.err + told.out, where
        assert "defect" not in told.err, where
        assert code in {expected, 1, 2}, where
        assert code == expected or "error: " in told.err, where
        assert code == expected or "hint: " in told.err, where
        opened = set(open_files().items()) - set(before.items())
        assert not [path for _, path in opened if "flash.db" not in path], where
        if not disk.struck:
            break

    assert code == expected
    assert at > 0 or verb == "plugins"
