"""References, `verifiers.toml`, params, the process and its end: all that needs no library."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from flash_env_verifiers import flash_register_environments, flash_review_plan
from flash_env_verifiers.interpreter import is_made, make_interpreter
from flash_env_verifiers.loader import VerifiersLoader
from flash_env_verifiers.params import read_manifest, read_params
from flash_env_verifiers.process import EnvironmentProcess

from flash.api import EnvironmentFault, EnvironmentLoader, PluginError


class Context:
    """The part of a plugin's context that loading uses."""

    def __init__(self, workdir):
        self.workdir = workdir
        self.log = self

    def warning(self, message):
        raise AssertionError(message)


@pytest.fixture
def loader(tmp_path):
    return VerifiersLoader(Context(tmp_path / "home"))


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "environment"
    folder.mkdir()
    (folder / "verifiers.toml").write_text('id = "backwards"\n')
    return folder


def test_the_record_detects_verifiers_toml_and_claims_the_scheme(folder):
    (record,) = flash_register_environments()

    assert record.schemes == ("verifiers",)
    assert record.detect(folder)
    assert not record.detect(folder.parent)
    assert isinstance(record.make(Context(folder)), EnvironmentLoader)


def test_a_reference_becomes_a_folder_that_names_it(loader, folder):
    assert loader.fetch("verifiers:reverse-text", folder) == "reverse-text"
    assert read_manifest(folder) == "reverse-text"
    assert loader.check(folder, split="train", params={"python": sys.executable}) == []
    assert loader.rows(folder, split="train", params={}) is None


@pytest.mark.parametrize(
    "reference", ["verifiers:a/b", "verifiers:../x", 'verifiers:x"', "verifiers:1"]
)
def test_a_reference_that_is_no_module_s_name_is_refused(loader, folder, reference):
    with pytest.raises(EnvironmentFault, match="is not the name of a verifiers environment"):
        loader.fetch(reference, folder)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("id = ", "is not TOML"),
        ("", "names no environment"),
        ('id = "a"\nversion = "1"', "unknown key version"),
        ("id = 7", "7 is not the name of a verifiers environment"),
    ],
)
def test_a_manifest_that_cannot_be_read_is_told_before_anything_runs(loader, folder, content, says):
    (folder / "verifiers.toml").write_text(content)
    (problem,) = loader.check(folder, split="train", params={})

    assert says in problem.message


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"package": ["a"]}, 'takes no such param; did you mean "packages"?'),
        ({"taskset": {}}, "the verifiers plugin takes no such param"),
        ({"packages": "a"}, "params.packages: expected a list of texts, got 'a'"),
        ({"packages": [1]}, "params.packages: expected a list of texts"),
        ({"env": "a"}, "params.env: expected a table"),
        ({"success_at": True}, "params.success_at: expected a number"),
        ({"splits": {"train": 5}}, "params.splits: expected a table for each split"),
        ({"splits": {"test": {}}}, 'there is no split "train"; there is test'),
        ({"python": "/nowhere/python"}, "/nowhere/python does not exist"),
        ({"python": sys.executable, "packages": ["a"]}, "python names another"),
    ],
)
def test_params_that_are_wrong_are_told_before_anything_runs(loader, folder, params, says):
    (problem,) = loader.check(folder, split="train", params=params)

    assert says in problem.message
    assert problem.path == "environment"


def test_what_will_be_installed_is_said_before_it_is(loader, folder):
    (note,) = loader.check(folder, split="train", params={"packages": ["a"]})

    assert note.severity == "warning"
    assert note.message == "verifiers~=0.4.0, a will be installed for the environment first"


def test_packages_for_flash_s_own_interpreter_are_refused(folder):
    def review(plugin, *pip):
        environment = SimpleNamespace(plugin=plugin)
        spec = SimpleNamespace(environment=SimpleNamespace(pip=pip))
        return flash_review_plan(SimpleNamespace(environment=environment, spec=spec))

    (problem,) = review("verifiers", "my-env")
    assert 'packages = ["my-env"] in [environment.params]' in problem.hint
    assert review("verifiers") == review("freesolo", "my-env") == []


def test_numbers_may_be_whole(folder):
    assert read_params({"success_at": 1, "answer_timeout_s": 5}).answer_timeout_s == 5


def test_an_interpreter_without_the_library_is_told_with_the_command(loader, folder):
    with pytest.raises(EnvironmentFault) as caught:
        loader.load(folder, params={"python": sys.executable}, split="train")

    assert caught.value.message == f"{sys.executable} has no verifiers"
    assert f"{sys.executable} -m pip install verifiers" in caught.value.hint


def test_an_interpreter_that_is_made_already_is_taken_as_it_is(tmp_path):
    made = make_interpreter_without_installing(tmp_path)

    assert make_interpreter(["a", "b"], tmp_path, pytest.fail) == made
    assert make_interpreter(["b", "a"], tmp_path, pytest.fail) == made
    assert is_made(["b", "a"], tmp_path)
    assert not is_made(["a"], tmp_path)


@pytest.mark.slow
def test_packages_that_cannot_be_had_are_told_and_leave_nothing(tmp_path):
    missing = (tmp_path / "nowhere").as_uri()

    with pytest.raises(EnvironmentFault) as caught:
        make_interpreter([f"my-env @ {missing}"], tmp_path / "home", lambda _: None)

    assert "cannot install verifiers~=0.4.0, my-env @ file:///" in caught.value.message
    assert "nowhere" in caught.value.message.partition(": ")[2]
    assert "environment.params.packages" in caught.value.hint
    assert [path.suffix for path in (tmp_path / "home").iterdir()] == [".lock"]


def make_interpreter_without_installing(home):
    """Leave what a finished installation leaves, for the packages a and b."""
    told = []

    def stop(sentence):
        told.append(sentence)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_interpreter(["b", "a"], home, stop)
    assert told == ["installing verifiers~=0.4.0, a, b, once; this takes a minute"]
    (lock,) = home.glob("*.lock")
    folder = lock.with_suffix("")
    folder.mkdir()
    (folder / "ready").touch()
    return folder / "bin" / "python"


def test_a_process_that_ends_says_so_to_whoever_asks(folder):
    process = EnvironmentProcess(Path(shutil.which("false")), folder, timeout_s=20)

    with pytest.raises(PluginError, match=r"the verifiers environment ended \(exit code 1\)"):
        process.call("load", id="backwards", env={}, splits={})


def test_a_process_that_does_not_answer_is_given_up_in_time(tmp_path, folder):
    silent = tmp_path / "python"
    silent.write_text("#!/bin/sh\nexec sleep 60\n")
    silent.chmod(0o700)
    process = EnvironmentProcess(silent, folder, timeout_s=0.05)

    with pytest.raises(EnvironmentFault, match=r"gave no answer in 0\.05 s") as caught:
        process.call("load", id="backwards", env={}, splits={})

    assert "answer_timeout_s" in caught.value.hint
    process.close()


def test_the_process_goes_when_the_one_that_asked_is_killed(folder):
    code = (
        "import os, sys; from pathlib import Path;"
        "from flash_env_verifiers.process import EnvironmentProcess;"
        "one = EnvironmentProcess(Path(sys.executable), Path(sys.argv[1]), timeout_s=9);"
        "print(one._child.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True, check=False
    )
    pid = int(done.stdout)

    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and not _is_zombie(pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _is_zombie(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
