"""`flash schema` and the reference page say what the reader checks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from flash.spec.model import Spec
from flash.spec.reference import configuration_page
from flash.spec.schema import json_schema
from flash.spec.strict import config_fields


@pytest.fixture
def flash(tmp_path):
    def run(*words):
        return subprocess.run(
            [sys.executable, "-m", "flash", *words],
            cwd=tmp_path,
            env={**os.environ, "FLASH_HOME": str(tmp_path / "home")},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def test_the_command_prints_and_writes_a_schema(flash, tmp_path):
    printed = flash("schema")
    written = flash("schema", "-o", "flash.schema.json")

    schema = json.loads(printed.stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert json.loads((tmp_path / "flash.schema.json").read_text()) == schema
    assert written.stdout == ""
    assert "local" in schema["properties"]["provider"]["properties"]


def test_a_schema_that_cannot_be_written_is_a_sentence(flash):
    done = flash("schema", "-o", "no/such/folder/schema.json")

    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot write no/such/folder/schema.json")


def test_every_setting_is_in_the_schema_with_its_words(host):
    schema = json_schema(host)

    assert set(schema["properties"]) == {*config_fields(Spec), "wandb"}
    for name, part in schema["properties"].items():
        assert part.get("description") or "$ref" in part, name
    rank = schema["$defs"]["train.sft"]["properties"]["lora_rank"]
    assert rank == {"type": "integer", "minimum": 1, "description": "Rank.", "default": 32}
    old = schema["$defs"]["train.sft"]["properties"]["max_context_tokens"]
    assert (old["deprecated"], old["minimum"]) == (True, 8)


@pytest.mark.parametrize(
    ("data", "valid"),
    [
        ({"train": {"lora_rank": 4}}, True),
        ({"train": {"group_size": 4}}, False),
        ({"algorithm": "sft", "train": {"group_size": 4}}, False),
        ({"algorithm": "grpo", "train": {"group_size": 4}}, True),
        ({"algorithm": "grpo", "train": {"lora_rank": 4}}, False),
        ({"algorithm": "dpo"}, False),
        ({"sink": {"wandb": {"project": ""}}}, False),
        ({"sink": {"other": {}}}, False),
    ],
)
def test_train_belongs_to_the_chosen_algorithm(host, data, valid):
    complete = {"model": "a/b", "environment": {"path": "."}} | data

    assert jsonschema.Draft202012Validator(json_schema(host)).is_valid(complete) is valid


def test_the_reference_has_every_setting_of_the_core():
    page = configuration_page()

    for name in config_fields(Spec):
        assert f"`{name}`" in page or f"`[{name}" in page, name
    for name in ("id", "path", "params", "pip", "secrets", "split", "max_hours"):
        assert f"| `{name}` |" in page


def test_the_reference_page_in_the_repository_is_up_to_date():
    root = Path(__file__).parents[2]
    written = (root / "docs" / "reference" / "configuration.md").read_text("utf-8")

    assert written.partition("\n\n")[2] == configuration_page().rstrip() + "\n"
