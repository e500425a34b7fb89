"""What `--json` prints has the keys that the reference page documents, no more and no less."""

import importlib.util
import json
from pathlib import Path

import click
import pytest

from flash.cli import cancel, checkpoints, models, plugins, root, runs, status, version
from flash.worker.checkpoints import CheckpointStore


@pytest.fixture(scope="module")
def generate():
    """The module that writes the reference pages."""
    path = Path(__file__).parents[2] / "docs" / "generate.py"
    spec = importlib.util.spec_from_file_location("generate", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_verb_that_prints_json_is_documented(generate):
    context = click.Context(root.root, info_name="flash")
    printing = {
        words
        for words, verb in generate.verbs(context)
        if any("--json" in option.opts for option in verb.command.params)
    }

    assert printing <= generate.JSON_OUTPUTS.keys()


@pytest.fixture
def printed(bench, monkeypatch, capsys):
    """Return a function that runs a verb with `--json` and returns the keys it printed."""
    monkeypatch.setenv("FLASH_HOME", str(bench.home.root))

    def keys(*words):
        assert root.run([*words, "--json"]) == 0
        value = json.loads(capsys.readouterr().out)
        assert value
        return list(value[0] if isinstance(value, list) else value)

    return keys


def test_the_keys_of_a_run_are_the_documented_ones(bench, printed):
    run = bench.submit("", memory_gib=1e6)
    CheckpointStore(bench.plane.store(run)).save(
        1, lambda folder: (folder / "w").touch(), metrics={}
    )

    assert printed("status", run) == [*status.JSON_KEYS]
    assert printed("runs") == [*runs.JSON_KEYS]
    assert printed("checkpoints", run) == [*checkpoints.JSON_KEYS]
    assert printed("cancel", run) == [*cancel.JSON_KEYS]


def test_the_keys_of_the_listings_are_the_documented_ones(printed):
    shown = [*plugins.JSON_KEYS]

    assert printed("models") == [*models.JSON_KEYS]
    assert printed("plugins") == shown[:-1]
    assert printed("plugins", "show", "sft", "--traceback") == shown
    assert printed("version") == [*version.JSON_KEYS]
