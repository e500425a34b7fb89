"""The check that imports nothing."""

from __future__ import annotations

from textwrap import dedent

import pytest
from flash_env_freesolo.static import check

FACTORY = "raise SystemExit('never run')\ndef load_environment():\n    pass\n"


@pytest.fixture
def problems(tmp_path):
    def problems(source=FACTORY, files=("dataset/train.jsonl",), *, split="train", **params):
        for name in files:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text("not even JSON")
        if source is not None:
            (tmp_path / "environment.py").write_text(dedent(source))
        found = check(tmp_path, split=split, params=params)
        return [str(problem).removeprefix(f"{tmp_path}/") for problem in found]

    return problems


@pytest.mark.parametrize(
    "source",
    [
        FACTORY,
        "from helpers import load_environment",
        "from helpers import make as load_environment",
        "from helpers import *",
        "load_environment = Env",
        "try:\n    from a import load_environment\nexcept ImportError:\n    pass",
        "# -*- coding: latin-1 -*-\ndef load_environment(): pass",
    ],
)
def test_a_module_that_defines_the_factory_is_fine(problems, source):
    assert problems(source) == []


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "environment.py: cannot be read: no such file or directory"),
        ("x = 1\ndef f(:\n", "environment.py:2: invalid syntax"),
        ("def load(): pass", "environment.py: defines no function load_environment"),
        ("async def load_environment(): pass", "environment.py:1: load_environment is async"),
        ("class A:\n    def load_environment(self): pass", "environment.py: defines no function"),
    ],
)
def test_a_wrong_module_is_named_with_its_line(problems, source, message):
    (problem,) = problems(source)

    assert problem.startswith(message)


def test_a_module_with_a_nul_byte_is_no_python(problems):
    # Python 3.11.4 and later name the line.
    (problem,) = problems("x = '\0'")

    assert problem.startswith("environment.py:")
    assert "source code string cannot contain null bytes" in problem


def test_a_missing_split_is_a_problem_that_lists_the_others(problems):
    (problem,) = problems(files=("dataset/train.jsonl", "dataset/dev.csv"), split="test")

    assert 'there is no split "test"; there is train, dev' in problem


@pytest.mark.parametrize(
    ("source", "params"),
    [
        (FACTORY, {"records": ["a"]}),
        (FACTORY, {"dataset_path": "other.jsonl"}),
        (FACTORY + "def make(env):\n    env.dataset = [1]", {}),
        (FACTORY + "class Env:\n    examples = [1]", {}),
        (FACTORY + "class Env:\n    @property\n    def dataset(self): return []", {}),
    ],
)
def test_rows_that_only_loading_can_see_are_not_a_problem(problems, source, params):
    assert problems(source, files=("dataset/test.jsonl",), **params) == []


def test_without_any_split_file_only_loading_can_tell(problems):
    assert problems(files=()) == []
