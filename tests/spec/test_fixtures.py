"""Every good file resolves and comes back the same; every bad one says what its first lines say."""

import json
import tomllib
from pathlib import Path

import jsonschema
import pytest

from flash.spec import resolve, spec_from_dict, spec_to_dict, spec_to_toml
from flash.spec.schema import json_schema

HERE = Path(__file__).parent
GOOD = sorted((HERE / "good").glob("*.toml"))
BAD = sorted((HERE / "bad").glob("*.toml"))


def named(path):
    return path.stem


@pytest.fixture(scope="module")
def schema(host):
    found = json_schema(host)
    jsonschema.Draft202012Validator.check_schema(found)
    return jsonschema.Draft202012Validator(found)


@pytest.mark.parametrize("path", GOOD, ids=named)
def test_a_good_file_resolves(path, host, schema):
    resolved = resolve(path, host=host)

    assert [str(p) for p in resolved.problems if p.severity == "error"] == []
    assert resolved.spec is not None
    schema.validate(tomllib.loads(path.read_text()))


@pytest.mark.parametrize("path", GOOD, ids=named)
def test_a_resolved_spec_comes_back_from_toml_and_json(path, host, tmp_path):
    spec = resolve(path, host=host).spec

    again = tmp_path / "again.toml"
    again.write_text(spec_to_toml(spec))

    assert resolve(again, host=host).spec == spec
    assert spec_from_dict(json.loads(json.dumps(spec_to_dict(spec))), host) == spec


@pytest.mark.parametrize("path", BAD, ids=named)
def test_a_bad_file_says_all_that_is_wrong(path, host):
    lines = path.read_text().splitlines()
    expected = [line.removeprefix("# expect: ") for line in lines if line.startswith("# expect: ")]

    resolved = resolve(path, host=host)

    said = [str(problem) for problem in resolved.problems if problem.severity == "error"]
    assert resolved.spec is None
    assert len(said) == len(expected), "\n".join(said)
    for wanted, got in zip(expected, said, strict=True):
        assert wanted in got
    assert "hunter2" not in "\n".join(said).lower()


@pytest.mark.parametrize("path", BAD, ids=named)
def test_the_schema_refuses_what_a_schema_can_say(path, schema):
    text = path.read_text()
    can_say = "# schema: passes" not in text

    assert schema.is_valid(tomllib.loads(text)) is not can_say
