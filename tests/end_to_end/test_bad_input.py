"""Wrong input: a sentence that names the place, the documented exit code, nothing started."""

import json
import os
import subprocess
import sys

import pytest


def refused(project, *words, code=2, **environ):
    """Run `flash` and return its stderr; it must refuse cleanly and leave no run behind."""
    done = project.flash(*(words or ("train", "run.toml")), **environ)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert done.stderr.startswith(("error: ", "Usage: ")), done.stderr
    runs = project.store / "runs"
    assert not runs.exists() or not list(runs.iterdir())
    return done.stderr


BAD_FILES = {
    "not UTF-8": (b'model = "\xff"\n', "UTF-8"),
    "invalid TOML": (b'model = "a"\n[environment\n', "line 2"),
    "wrong type": (b'model = 5\n[environment]\npath = "."\n', "model"),
    "NaN": (
        b'model = "a/b"\n[environment]\npath = "."\n[train]\nlearning_rate = nan\n',
        "train.learning_rate",
    ),
    "unknown key": (
        b'model = "a/b"\n[environment]\npath = "."\n[train]\nlora_rnk = 3\n',
        'did you mean "lora_rank"',
    ),
    "unknown table": (b'model = "a/b"\n[environment]\npath = "."\n[gpu]\ntype = "x"\n', "gpu"),
    "no model": (b'[environment]\npath = "."\n', "model"),
    "no environment": (b'model = "a/b"\n', "environment"),
    "unknown algorithm": (
        b'model = "a/b"\nalgorithm = "sfft"\n[environment]\npath = "."\n',
        '"sft"',
    ),
    "unknown sink": (
        b'model = "a/b"\n[environment]\npath = "."\n[sink.tensorbord]\n',
        "tensorboard",
    ),
    "unknown provider": (b'model = "a/b"\n[environment]\npath = "."\n[provider.lokal]\n', "local"),
    "bad seed": (b'model = "a/b"\nseed = -1\n[environment]\npath = "."\n', "seed"),
    "pip option": (
        b'model = "a/b"\n[environment]\npath = "."\npip = ["-r x.txt"]\n',
        "environment.pip[0]",
    ),
    "reserved secret": (
        b'model = "a/b"\n[environment]\npath = "."\nsecrets = ["HF_TOKEN"]\n',
        "HF_TOKEN",
    ),
    "secret in worker_env": (
        b'model = "a/b"\n[environment]\npath = "."\n[worker_env]\nAPI_KEY = "x"\n',
        "worker_env.API_KEY",
    ),
    "no such folder": (b'model = "a/b"\n[environment]\npath = "nowhere"\n', "nowhere"),
    "hub id": (b'model = "a/b"\n[environment]\nid = "org/name"\n', "hub"),
    "unknown model": (
        b'model = "no-such-org/no-such-model"\n[environment]\npath = "."\n',
        "no-such-model",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_config_is_refused_with_its_place(project, name):
    content, expected = BAD_FILES[name]
    (project.folder / "run.toml").write_bytes(content)

    said = refused(project, HF_HUB_OFFLINE="1")

    assert expected in said


def test_every_problem_is_reported_at_once(project):
    project.write(
        "run.toml", 'model = 5\nsede = 1\n[environment]\npath = 3\n[train]\nepochs = "two"\n'
    )

    said = refused(project)

    for path in ("model", "sede", "environment.path", "train.epochs"):
        assert f"{path}: " in said


def test_a_missing_or_unreadable_config_names_the_file(project):
    assert "nope.toml" in refused(project, "train", "nope.toml")
    assert "dataset" in refused(project, "train", "dataset")


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
def test_a_bad_environment_is_refused_before_anything_starts(project, name):
    source, expected = BAD_ENVIRONMENTS[name]
    project.write("environment.py", source)

    assert expected in refused(project)


BAD_ROWS = {
    "no rows": ("", "train.jsonl"),
    "no input": ('{"input": "a", "output": "b"}\n{"output": "b"}\n', "train.jsonl:2"),
    "not JSON": ('{"input": "a", "output": "b"}\n{"input": \n', "train.jsonl:2"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_are_refused_with_file_and_line(project, name):
    content, expected = BAD_ROWS[name]
    project.write("dataset/train.jsonl", content)

    assert expected in refused(project)


def test_a_missing_split_is_an_error_never_a_fallback(project):
    project.write(
        "run.toml",
        (project.folder / "run.toml")
        .read_text()
        .replace('path = "."', 'path = "."\nsplit = "trian"'),
    )

    assert "trian" in refused(project)


@pytest.mark.parametrize(
    "run", ["../../etc", "..", "a/../b", "last/../..", "\x1b[31m", "x" * 5000, "", "zzzzzzzzz"]
)
@pytest.mark.parametrize("verb", ["status", "cancel", "checkpoints"])
def test_a_run_id_that_is_none_is_a_sentence(project, verb, run):
    done = project.flash(verb, run)

    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "\x1b" not in done.stderr
    assert len(done.stderr) < 1000


def test_a_model_that_cannot_fit_this_machine_is_refused_with_the_numbers(project):
    config = json.loads((project.model / "config.json").read_text())
    config |= {"hidden_size": 16384, "intermediate_size": 65536, "num_hidden_layers": 200}
    project.write("huge/config.json", json.dumps(config))
    project.write("run.toml", f'model = "{project.folder / "huge"}"\n[environment]\npath = "."\n')

    assert "GiB" in refused(project)


def test_an_adapter_of_another_base_is_refused(project):
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

    assert "some/other-base" in refused(project)


def test_an_adapter_of_another_rank_is_refused(project):
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

    said = refused(project)

    assert "train.lora_rank" in said
    assert "8" in said


def test_a_corrupt_database_is_a_sentence_that_names_the_file(project):
    project.store.mkdir(mode=0o700)
    (project.store / "flash.db").write_bytes(b"this is not a database" * 100)

    said = refused(project, "runs", code=1)

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


def test_unknown_verbs_and_options_are_usage_errors(project):
    assert "train" in refused(project, "trian", "run.toml")
    assert "--dry-run" in refused(project, "train", "run.toml", "--dryrun")


def test_a_disabled_plugin_that_is_selected_says_who_disabled_it(project):
    said = refused(project, FLASH_DISABLE_PLUGINS="sft", code=3)

    assert "FLASH_DISABLE_PLUGINS" in said
