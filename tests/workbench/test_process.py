"""What an environment does to its process, and which secrets it reads."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from flash.workbench.process import changes, reads, state


@pytest.fixture(autouse=True)
def _kept(monkeypatch):
    """Leave the process as it was."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder, mask = Path.cwd(), os.umask(0o22)
    os.umask(mask)
    handler, chance = signal.getsignal(signal.SIGTERM), random.getstate()
    yield
    os.chdir(folder)
    os.umask(mask)
    signal.signal(signal.SIGTERM, handler)
    random.setstate(chance)


@pytest.mark.parametrize(
    ("level", "what", "change"),
    [
        ("fail", "the working directory of", lambda: os.chdir("/")),
        ("fail", "the umask of", lambda: os.umask(0o077)),
        ("fail", "the signal handlers of", lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN)),
        ("warn", "sys.path of its process: /nowhere", lambda: sys.path.append("/nowhere")),
        ("warn", "Python's random numbers", lambda: random.seed(0)),
        ("warn", "NumPy's random numbers", lambda: np.random.seed(0)),  # noqa: NPY002 - the old way
    ],
)
def test_a_scorer_that_changes_the_process(examine, sound, level, what, change):
    class Environment(sound):
        def score(self, task, episodes):
            change()
            return super().score(task, episodes)

    # Signal handlers can be set on the main thread only, where such an environment is scored.
    Environment.max_score_concurrency = 1
    (found,) = examine(Environment)["findings"]

    assert (found["level"], found["check"]) == (level, "global-state")
    assert f"the environment changes {what}" in found["message"]


def test_an_import_that_changes_the_process(examine, sound):
    def load():
        os.chdir("/")
        return sound()

    (found,) = examine(load)["findings"]

    assert (found["level"], found["check"]) == ("fail", "global-state")


def test_variables_are_named_and_their_values_are_not(examine, sound, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_MODE", "old")
    monkeypatch.setenv("DECLARED_KEY", "old")

    def load():
        os.environ["TOKENIZERS_MODE"] = os.environ["DECLARED_KEY"] = "s3cret-value"
        return sound()

    (found,) = examine(load, ours=["DECLARED_KEY"])["findings"]

    assert (found["level"], found["check"]) == ("warn", "global-state")
    assert found["message"] == (
        "the environment changes the environment variables of its process: TOKENIZERS_MODE"
    )


def test_what_flash_itself_adds_is_no_change():
    before = state()
    after = before | {"sys.path": (*before["sys.path"], "/home/me/.flash/overlays/1")}

    assert changes(before, after) == {"sys.path": "/home/me/.flash/overlays/1"}
    assert changes(before, after, ours=["/home/me/.flash"]) == {}


READS = """
import os
from os import environ, getenv

KEY = os.environ["JUDGE_API_KEY"]
TOKEN = environ.get("JUDGE_TOKEN", "")
MODE = getenv("JUDGE_MODE")
PLACE = os.environ["JUDGE_PLACE"]
os.environ["WRITTEN_KEY"] = "1"
name = "COMPUTED_KEY"
os.environ.get(name)
{"x": 1}["OTHER_KEY"], dict().get("OTHER_KEY")
"""


def test_reads_are_found_in_the_code(tmp_path):
    (tmp_path / "judge").mkdir()
    (tmp_path / "judge" / "client.py").write_text(READS)
    (tmp_path / "broken.py").write_text("def")

    found = {(read.name, read.place, read.required) for read in reads(tmp_path)}

    assert found == {
        ("JUDGE_API_KEY", "judge/client.py:5", True),
        ("JUDGE_TOKEN", "judge/client.py:6", False),
        ("JUDGE_MODE", "judge/client.py:7", False),
        ("JUDGE_PLACE", "judge/client.py:8", True),
    }


class TestSecrets:
    @pytest.fixture(autouse=True)
    def _code(self, tmp_path):
        (tmp_path / "environment.py").write_text(READS)

    def test_what_is_not_declared(self, examine, sound):
        found = examine(sound)["findings"]

        assert [(one["level"], one["check"]) for one in found] == [
            ("fail", "secrets"),
            ("fail", "secrets"),
            ("warn", "secrets"),
        ]
        assert found[0]["message"] == (
            "environment.py:5 reads JUDGE_API_KEY, and a worker will not have it"
        )
        assert 'secrets = ["JUDGE_API_KEY"]' in found[0]["fix"]
        assert "[worker_env] JUDGE_PLACE" in found[2]["fix"]

    def test_a_folder_alone_may_have_a_config_that_declares_them(self, examine, sound):
        found = examine(sound, configured=False)["findings"]

        assert {one["level"] for one in found} == {"warn"}
        assert "flash env test CONFIG" in found[0]["fix"]

    def test_what_is_declared(self, findings, sound, monkeypatch):
        for name in ("JUDGE_API_KEY", "JUDGE_TOKEN", "JUDGE_PLACE"):
            monkeypatch.setenv(name, "x")

        assert findings(sound) == []

    def test_what_only_running_shows(self, examine, sound, tmp_path):
        (tmp_path / "environment.py").unlink()

        found = examine(sound, missed={"COMPUTED_KEY", "SOME_MODE", "HF_TOKEN", "HIDDEN_API_KEY"})

        assert [(one["level"], one["check"]) for one in found["findings"]] == [("fail", "secrets")]
        assert "HIDDEN_API_KEY" in found["findings"][0]["message"]


MISSING = """
import os
from flash.workbench.process import record_missing

missed = record_missing()
os.environ.get("MISSING"), os.getenv("ALSO_MISSING"), os.environ["PATH"]
"THIRD" in os.environ, dict(os.environ), os.environ.copy()
os.environ["SET"] = "1"
os.environ["SET"]
print(sorted(missed))
"""


def test_variables_that_are_asked_for_in_vain_are_noted():
    """In a process of its own: the type of `os.environ` changes for good."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            MISSING,
        ],
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout == "['ALSO_MISSING', 'MISSING', 'THIRD']\n"
