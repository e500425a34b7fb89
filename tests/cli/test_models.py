"""`flash models`: cards, what is on disk, and a plugin that fails beside ones that work."""

import json

import numpy as np
import pytest
from distributions import Shell, install, plugin
from safetensors.numpy import save_file

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"

ZOO = """
    from flash.api import FlashError, ModelCard, ModelPlugin, hookimpl

    def card(name, parameters):
        return ModelCard(
            id=f"zoo/{name}", parameters=parameters, context_tokens=512, hidden_size=8, layers=2,
            intermediate_size=16, vocabulary=64, thinking="hybrid", licence="mit",
            memory_note="none to speak of",
        )

    class Source:
        def card(self, model):
            if model == "zoo/torn":
                raise FlashError("zoo/torn is damaged", hint="delete it")
            return card(model.removeprefix("zoo/"), 900) if model == "zoo/wild" else None

        def look_up(self, model):
            raise AssertionError("listing asks no network")

        def on_disk(self, model):
            from pathlib import Path
            return Path("/cages") / model if model != "zoo/big" else None

        def downloaded(self):
            return ["zoo/wild", "zoo/torn"]

        def fetch(self, model, report):
            raise AssertionError("listing fetches nothing")

    @hookimpl
    def flash_register_models():
        cards = (card("big", 7_240_000_000), card("small", 12_300_000))
        return [ModelPlugin(name="zoo", summary="Animals.", make=lambda _: Source(), cards=cards)]
"""
SICK = """
    from flash.api import ModelCard, ModelPlugin, hookimpl

    CARD = ModelCard("sick/one", 1000, 8, 8, 2, 16, 64)

    @hookimpl
    def flash_register_models():
        return [ModelPlugin(name="sick", summary="", make=lambda _: 1 / 0, cards=(CARD,))]
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return install([plugin("zoo", ZOO), plugin("sick", SICK)], tmp_path_factory.mktemp("plugins"))


@pytest.fixture
def shell(site, tmp_path):
    return Shell(tmp_path, site)


def listed(shell, **environ):
    answer = shell.flash("models", "--json", **environ)
    assert answer.returncode == 0, answer.stderr
    return {model["id"]: model for model in json.loads(answer.stdout)}, answer.stderr


def test_cards_and_what_is_on_disk(shell):
    models, _ = listed(shell, FLASH_DISABLE_PLUGINS="sick")

    assert models["zoo/small"] == {
        "id": "zoo/small",
        "parameters": 12_300_000,
        "context_tokens": 512,
        "hidden_size": 8,
        "layers": 2,
        "intermediate_size": 16,
        "vocabulary": 64,
        "thinking": "hybrid",
        "licence": "mit",
        "memory_note": "none to speak of",
        "summary": "",
        "source": "zoo",
        "on_disk": True,
        "folder": "/cages/zoo/small",
    }
    assert (models["zoo/big"]["on_disk"], models["zoo/big"]["folder"]) == (False, None)
    assert models[SMOLLM2]["on_disk"] is False


def test_a_downloaded_model_without_a_card_is_listed_with_its_facts(shell):
    models, _ = listed(shell, FLASH_DISABLE_PLUGINS="sick")

    assert models["zoo/wild"]["parameters"] == 900
    assert models["zoo/wild"]["on_disk"]


def test_a_damaged_download_is_a_warning_not_a_failure(shell):
    models, stderr = listed(shell, FLASH_DISABLE_PLUGINS="sick")

    assert "zoo/torn" not in models
    assert stderr == "warning: zoo/torn is damaged\nhint: delete it\n"


def test_a_plugin_that_fails_is_named_and_hides_no_other(shell):
    models, stderr = listed(shell)

    assert models["sick/one"]["on_disk"] is False
    assert {"zoo/big", SMOLLM2} <= models.keys()
    assert "warning: plugin sick: list its models raised ZeroDivisionError" in stderr


def test_the_table_says_it_for_eyes(shell):
    answer = shell.flash("models", FLASH_DISABLE_PLUGINS="sick,smollm2,hub")
    lines = [line.split() for line in answer.stdout.splitlines()]

    assert answer.returncode == 0
    assert lines[0][:4] == ["id", "source", "parameters", "context"]
    assert lines[1][:7] == ["zoo/big", "zoo", "7.2B", "512", "hybrid", "mit", "no"]
    assert lines[2][:7] == ["zoo/small", "zoo", "12M", "512", "hybrid", "mit", "yes"]
    assert lines[3][:4] == ["zoo/wild", "zoo", "900", "512"]


def test_without_plugins_the_way_out_is_named(shell):
    answer = shell.flash("models", FLASH_DISABLE_PLUGINS="*")

    assert (answer.returncode, answer.stdout) == (0, "")
    assert "pip install flash-model-smollm2" in answer.stderr


def test_what_other_tools_downloaded_from_hugging_face_is_listed(shell, tmp_path):
    repository = tmp_path / "hub" / "models--org--tiny"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    config = {"model_type": "llama", "hidden_size": 4, "num_hidden_layers": 1, "vocab_size": 8}
    (snapshot / "config.json").write_text(json.dumps(config))
    (snapshot / "tokenizer.json").write_text("{}")
    save_file({"weight": np.zeros((3, 4), np.float32)}, snapshot / "model.safetensors")
    models, _ = listed(shell, FLASH_DISABLE_PLUGINS="sick,zoo", HF_HUB_CACHE=str(tmp_path / "hub"))

    assert models["org/tiny"]["source"] == "hub"
    assert models["org/tiny"]["parameters"] == 12
    assert models["org/tiny"]["folder"] == str(snapshot)


def test_listing_imports_no_heavy_library(shell):
    code = (
        "import sys; from flash.cli.root import run; run(['models'])\n"
        "heavy = {'torch', 'transformers', 'datasets', 'requests', 'httpx2', 'gguf', 'numpy'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    answer = shell.python("-c", code, FLASH_DISABLE_PLUGINS="sick,zoo")

    assert answer.stderr == "[]\n"
    assert SMOLLM2 in answer.stdout
