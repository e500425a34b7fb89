"""Wrong input: a sentence that names the place, the documented exit code, nothing started."""

import json
import os
import subprocess
import sys

import pytest

from flash.cli import root


@pytest.fixture
def refused(project, monkeypatch, capsys):
    """
    Return a function that runs `flash` and returns its stderr.

    It must refuse cleanly and leave no run behind. It runs in this process, where it is fast; the
    tests that use `project.flash` show that a process of its own says the same.
    """
    for name in set(os.environ) - set(project.environ()):
        monkeypatch.delenv(name)
    for name, value in project.environ().items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(project.folder)

    def run(*words, code=2):
        assert root.run(words or ("train", "run.toml")) == code
        said = capsys.readouterr()
        return clean_refusal(project, said.out, said.err)

    return run


def clean_refusal(project, out, err):
    assert "Traceback" not in out + err
    assert err.startswith("error: "), err
    runs = project.store / "runs"
    assert not runs.exists() or not list(runs.iterdir())
    return err


RIGHT = 'model = "{model}"\n[environment]\npath = "."\n'
BAD_FILES = {
    "not UTF-8": (b'model = "\xff"\n', "run.toml: is not UTF-8: byte 9 (line 1)"),
    "invalid TOML": ('model = "a"\n[environment\n', "run.toml: line 2, column 13: not valid TOML"),
    "wrong type": (
        'model = 5\n[environment]\npath = "."\n',
        "model: expected a string, got an integer 5",
    ),
    "NaN": (
        RIGHT + "[train]\nlearning_rate = nan\n",
        "train.learning_rate: must be a finite number, got nan",
    ),
    "unknown key": (
        RIGHT + "[train]\nlora_rnk = 3\n",
        'train.lora_rnk: unknown key; did you mean "lora_rank"?',
    ),
    "unknown table": (RIGHT + '[gpu]\ntype = "x"\n', "gpu: unknown key; allowed: algorithm"),
    "no model": (
        '[environment]\npath = "."\n',
        "model: required, but nothing sets it; for example model =",
    ),
    "no environment": (
        'model = "{model}"\n',
        "environment: required, but nothing sets it; write a table [environment]",
    ),
    "unknown algorithm": (
        'algorithm = "sfft"\n' + RIGHT,
        'algorithm: unknown algorithm "sfft"; did you mean "sft"?',
    ),
    "unknown sink": (
        RIGHT + "[sink.tensorbord]\n",
        'sink.tensorbord: unknown sink "tensorbord"; did you mean "tensorboard"?',
    ),
    "unknown provider": (
        RIGHT + "[provider.lokal]\n",
        'provider.lokal: unknown provider "lokal"; did you mean "local"?',
    ),
    "bad seed": ("seed = -1\n" + RIGHT, "seed: must be at least 0, got -1"),
    "pip option": (
        RIGHT + 'pip = ["-r x.txt"]\n',
        "environment.pip[0]: is an option of pip, not a package",
    ),
    "reserved secret": (
        RIGHT + 'secrets = ["HF_TOKEN"]\n',
        "environment.secrets[0]: HF_TOKEN is reserved: Flash and the machine use it themselves",
    ),
    "secret in worker_env": (
        RIGHT + '[worker_env]\nAPI_KEY = "x"\n',
        "worker_env.API_KEY: is the name of a secret; take it out",
    ),
    "no such folder": (
        'model = "{model}"\n[environment]\npath = "nowhere"\n',
        "environment.path: no such folder: ",
    ),
    "hub id": (
        'model = "{model}"\n[environment]\nid = "org/name"\n',
        'environment.id: "org/name" is the id of a published environment, and there is no hub',
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_config_is_refused_with_its_place_and_nothing_else_is_complained_of(
    project, refused, name
):
    content, expected = BAD_FILES[name]
    if isinstance(content, str):
        content = content.replace("{model}", str(project.model)).encode()
    (project.folder / "run.toml").write_bytes(content)

    (line,) = refused().splitlines()

    assert line.startswith(f"error: {expected}")


def test_an_unknown_model_is_refused_in_a_process_of_its_own_too(project):
    project.write("run.toml", 'model = "no-such-org/no-such-model"\n[environment]\npath = "."\n')

    done = project.flash("train", "run.toml", HF_HUB_OFFLINE="1")

    assert done.returncode == 2
    (line,) = clean_refusal(project, done.stdout, done.stderr).splitlines()
    assert line.startswith("error: model: ")
    assert "no-such-org/no-such-model" in line


def test_every_problem_is_reported_at_once(project, refused):
    project.write(
        "run.toml", 'model = 5\nsede = 1\n[environment]\npath = 3\n[train]\nepochs = "two"\n'
    )

    said = refused()

    for path in ("model", "sede", "environment.path", "train.epochs"):
        assert f"{path}: " in said


def test_a_missing_or_unreadable_config_names_the_file(project, refused):
    assert "nope.toml" in refused("train", "nope.toml")
    assert "dataset" in refused("train", "dataset")


BAD_ENVIRONMENTS = {
    "import fails": (
        "import no_such_module_anywhere\ndef load_environment():\n    return None\n",
        "environment.py:1",
    ),
    "syntax error": ("def broken(:\n", "environment.py:1"),
    "no factory": ("VALUE = 1\n", "load_environment"),
    "wrong type": ("def load_environment():\n    return 5\n", "load_environment"),
    "raises": ("def load_environment():\n    raise ValueError('boom')\n", "boom"),
}


@pytest.mark.parametrize("name", BAD_ENVIRONMENTS)
def test_a_bad_environment_is_refused_before_anything_starts(project, refused, name):
    source, expected = BAD_ENVIRONMENTS[name]
    project.write("environment.py", source)

    assert expected in refused()


BAD_ROWS = {
    "no rows": ("", "train.jsonl"),
    "no input": ('{"input": "a", "output": "b"}\n{"output": "b"}\n', "train.jsonl:2"),
    "not JSON": ('{"input": "a", "output": "b"}\n{"input": \n', "train.jsonl:2"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_are_refused_with_file_and_line(project, refused, name):
    content, expected = BAD_ROWS[name]
    project.write("dataset/train.jsonl", content)

    assert expected in refused()


def test_a_missing_split_is_an_error_never_a_fallback(project, refused):
    project.write(
        "run.toml",
        (project.folder / "run.toml")
        .read_text()
        .replace('path = "."', 'path = "."\nsplit = "trian"'),
    )

    assert "trian" in refused()


@pytest.mark.parametrize(
    "run", ["../../etc", "..", "a/../b", "last/../..", "\x1b[31m", "x" * 5000, "", "zzzzzzzzz"]
)
@pytest.mark.parametrize("verb", ["status", "cancel", "checkpoints"])
def test_a_run_id_that_is_none_is_a_sentence(refused, verb, run):
    said = refused(verb, run)

    assert "\x1b" not in said
    assert len(said) < 1000


def test_a_model_that_cannot_fit_this_machine_is_refused_with_the_numbers(project, refused):
    config = json.loads((project.model / "config.json").read_text())
    config |= {"hidden_size": 16384, "intermediate_size": 65536, "num_hidden_layers": 200}
    project.write("huge/config.json", json.dumps(config))
    project.write("run.toml", f'model = "{project.folder / "huge"}"\n[environment]\npath = "."\n')

    assert "GiB" in refused()


def test_an_adapter_of_another_base_is_refused(project, refused):
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "some/other-base",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
    }
    project.write("adapter/adapter_config.json", json.dumps(config))
    project.write("adapter/adapter_model.safetensors", "")
    project.configure(extra='init_from_adapter = "adapter"\n')

    assert "some/other-base" in refused()


def test_an_adapter_of_another_rank_is_refused(project, refused):
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(project.model),
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ["q_proj"],
    }
    project.write("adapter/adapter_config.json", json.dumps(config))
    project.write("adapter/adapter_model.safetensors", "")
    project.configure(extra='init_from_adapter = "adapter"\n')

    said = refused()

    assert "train.lora_rank" in said
    assert "8" in said


def test_a_corrupt_database_is_a_sentence_that_names_the_file(project, refused):
    project.store.mkdir(mode=0o700)
    (project.store / "flash.db").write_bytes(b"this is not a database" * 100)

    said = refused("runs", code=1)

    assert "flash.db" in said


def test_a_second_supervisor_says_so_and_leaves(project):
    first = subprocess.Popen(
        [sys.executable, "-m", "flash.plane.supervisor"], env=project.environ()
    )
    try:
        lock = project.store / "supervisor.lock"
        while first.poll() is None and not lock.exists():
            os.sched_yield()
        second = subprocess.run(
            [sys.executable, "-m", "flash.plane.supervisor"],
            env=project.environ(),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    finally:
        first.kill()
        first.wait()

    assert second.returncode == 0
    assert (
        "already" in second.stderr + second.stdout + (project.store / "supervisor.log").read_text()
    )


def test_a_home_that_cannot_be_written_is_a_sentence(project):
    (project.home / ".flash").write_text("a file where the folder should be")

    done = project.flash("train", "run.toml")

    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert ".flash" in done.stderr


def test_unknown_verbs_and_options_are_usage_errors(project, refused):
    assert "train" in refused("trian", "run.toml")
    assert "--dry-run" in refused("train", "run.toml", "--dryrun")


def test_a_disabled_plugin_that_is_selected_says_who_disabled_it(refused, monkeypatch):
    monkeypatch.setenv("FLASH_DISABLE_PLUGINS", "sft")

    said = refused(code=3)

    assert "FLASH_DISABLE_PLUGINS" in said


@pytest.mark.usefixtures("refused")
@pytest.mark.parametrize("words", [(), ("--dry-run",), ("--dry-run", "--json")], ids=" ".join)
def test_a_secret_that_is_written_down_is_refused_and_on_neither_stream(project, capsys, words):
    value = "kanarienvogel-4711"
    project.write(".env", f"SERVICE_KEY={value}\n")
    table = f'path = "."\nsecrets = ["SERVICE_KEY"]\nparams = {{ key = "{value}" }}'
    config = (project.folder / "run.toml").read_text().replace('path = "."', table)
    project.write("run.toml", config)

    assert root.run(["train", "run.toml", *words]) == 2

    said = "".join(capsys.readouterr())
    assert "contains the value of the secret SERVICE_KEY" in said
    assert value not in said
