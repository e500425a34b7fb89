"""What a broken environment is answered with: a sentence with file and line, never a traceback."""

from __future__ import annotations

import re
from textwrap import dedent

import pytest
from flash_env_freesolo.loader import FreesoloLoader

from flash.api import EnvironmentFault, Episode

GOOD = """\
from freesolo.environments import EnvironmentSingleTurn, RewardResult

class Env(EnvironmentSingleTurn):
    def build_prompt_messages(self, example, prompt_text):
        return [{"role": "user", "content": example.input}]
    def score_response(self, example, response_text):
        return RewardResult(1.0)

def load_environment(level=1):
    return Env()
"""


class Context:
    class log:  # noqa: N801 - stands for ctx.log
        @staticmethod
        def warning(message):
            pass


@pytest.fixture
def load(tmp_path):
    def load(source=GOOD, rows=b'{"input": "a"}', *, name="train.jsonl", files=None, **params):
        (tmp_path / "environment.py").write_text(dedent(source))
        (tmp_path / "dataset").mkdir()
        if rows is not None:
            (tmp_path / "dataset" / name).write_bytes(rows)
        for path, text in (files or {}).items():
            (tmp_path / path).write_text(text)
        return FreesoloLoader(Context()).load(tmp_path, params=params, split="train")

    return load


def fault(call, *arguments, **named):
    with pytest.raises(EnvironmentFault) as caught:
        call(*arguments, **named)
    return caught.value


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import os\nimport no_such_package", r"environment\.py:2: ModuleNotFoundError: No module"),
        ("def f(:\n  pass", r"environment\.py:1: SyntaxError: invalid syntax"),
        ("x = 1\n\ny = x / 0", r"environment\.py:3: ZeroDivisionError: division by zero"),
        ("import sys\nsys.exit('bye')", r"environment\.py:2: SystemExit: bye"),
        ("import helper", r"helper\.py:1: NameError: name 'undefined' is not defined"),
        ("import helper.sub", r"helper\.py:1: NameError"),
        ("import json\njson.loads('{')", r"environment\.py:2: JSONDecodeError: Expecting property"),
        ("load_environment = 3", r"environment\.py: defines no function load_environment"),
        ("", r"environment\.py: defines no function load_environment"),
        ("def load_environment():\n    return 3", r"environment\.py:1: .* returned int"),
        ("async def load_environment():\n    pass", r"environment\.py:1: .* returned coroutine"),
        ("\ndef load_environment():\n    return None.x", r"environment\.py:3: AttributeError: "),
        (f"{GOOD}\nload_environment = lambda: Env", r"environment\.py:\d+: .* returned ABCMeta"),
    ],
)
def test_loading_names_file_and_line_of_the_users_mistake(load, source, message):
    error = fault(load, source, files={"helper.py": "undefined"})

    assert re.search(message, error.message)
    assert "_flash_env_" not in error.message


def test_a_missing_package_gets_the_hint_to_install_it(load):
    hint = fault(load, "import no_such_package.sub").hint

    assert "no_such_package is a package" in hint


def test_a_missing_submodule_is_named_as_its_author_wrote_it(load):
    error = fault(load, "import helper.sub", files={"helper.py": ""})

    assert "No module named 'helper.sub'" in error.message


def test_a_folder_without_environment_py(tmp_path):
    error = fault(FreesoloLoader(Context()).load, tmp_path, params={}, split="train")

    assert "environment.py: no such file" in error.message


def test_running_out_of_memory_is_not_the_environments_fault(load):
    with pytest.raises(MemoryError):
        load("raise MemoryError")


def test_an_unknown_param_is_an_error_that_lists_the_known(load):
    error = fault(load, levle=2)

    assert re.search(r"environment\.py:9: load_environment takes no levle", error.message)
    assert "it takes level" in error.hint


def test_a_missing_param_is_named(load):
    error = fault(load, GOOD.replace("level=1", "level"))

    assert "missing a required argument: 'level'" in error.message


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        (
            "train.jsonl",
            b'{"input": "a"}\n{"output": "b"}',
            r"train\.jsonl:2: the row has no input",
        ),
        ("train.jsonl", b'{"input": "a"}\n\n{"input": }', r"train\.jsonl:3: invalid JSON at col"),
        ("train.jsonl", b'{"input": "a"}\n[1]', r"train\.jsonl:2: a row must be an object, got l"),
        ("train.jsonl", b'{"input": "a"}\n{"input": "\xff"}', r"train\.jsonl:2: not UTF-8: byte 0"),
        ("train.jsonl", b'{"input": null}', r"train\.jsonl:1: the row has no input"),
        ("train.jsonl", b'"a"\n' + b"[" * 200_000, r"train\.jsonl:2: JSON that cannot be read"),
        ("train.jsonl", b'{"input": ' + b"1" * 5000 + b"}", r"train\.jsonl:1: JSON that cannot be"),
        ("train.jsonl", b"", r"train\.jsonl: no rows"),
        ("train.jsonl", b"\n\n", r"train\.jsonl: no rows"),
        ("train.json", b'[{"input": "a"}, {}]', r"train\.json: row 2: the row has no input"),
        ("train.json", b'[\n{"input": "a"},\n]', r"train\.json:3: invalid JSON"),
        ("train.json", b'{"rows": []}', r"train\.json:1: expected an array"),
        ("train.json", b"[]", r"train\.json: no rows"),
        ("train.csv", b"text,output\na,b", r'train\.csv:1: no column is called "input"'),
        ("train.csv", b'input,output\n"a\nb",c\nd,e,f', r"train\.csv:4: the row has more cells"),
        ("train.csv", b"input\n", r"train\.csv: no rows"),
        ("train.txt", b"a\n\xff", r"train\.txt:2: not UTF-8"),
    ],
)
def test_a_wrong_row_is_named_with_file_and_line(load, name, rows, message):
    assert re.search(message, fault(load, rows=rows, name=name).message)


def test_no_rows_anywhere(load):
    error = fault(load, rows=None)

    assert 'there is no split "train"; there is none' in error.message


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ("text", "expected a list of rows, got str"),
        ([], "no rows"),
        (["a", {"output": "b"}], "row 2: the row has no input"),
        ([3], "row 1: a row must be an object, got int"),
    ],
)
def test_wrong_records_in_the_params(load, records, message):
    assert f"environment.params.records: {message}" in fault(load, records=records).message


@pytest.mark.parametrize("rows", ["3", "[3]", "'path'", "[{}]"])
def test_wrong_rows_in_code(load, rows):
    source = f"{GOOD}\nEnv.dataset = {rows}"

    assert "environment.py: the environment's rows" in fault(load, source, rows=None).message


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("None", "TypeError: 'NoneType' object is not iterable"),
        ("'text'", "message 0 is str 't'"),
        ("[]", "returned no messages"),
        ("['text']", "message 0 is str 'text'"),
        ("[{'content': 'a'}]", "message 0 is dict"),
        ("[{'role': 'user', 'content': 3}]", "the content of message 0 is int 3"),
        ("[{'role': 'user', 'content': example.nope}]", "AttributeError"),
    ],
)
def test_a_wrong_prompt_is_named_with_file_and_line(load, prompt, message):
    source = GOOD.replace('[{"role": "user", "content": example.input}]', prompt)
    environment = load(source)
    error = fault(environment.start, environment.tasks("train")[0])

    assert message in error.message
    assert re.search(r"environment\.py:[45]: ", error.message)


@pytest.mark.parametrize(
    ("hook", "call", "message"),
    [
        ("def step_episode(self, *a): return True", "step", "step_episode returned bool True"),
        ("def step_episode(self, *a): raise KeyError('x')", "step", "KeyError: 'x'"),
        ("def max_episode_turns(self, e): return 0", "max_turns", "returned 0"),
        ("def max_episode_turns(self, e): return '2'", "max_turns", "returned '2'"),
        ("def sft_completion(self, e): return 'x'", "target", "sft_completion returned str 'x'"),
    ],
)
def test_a_wrong_hook_is_named_with_file_and_line(load, hook, call, message):
    environment = load(
        GOOD.replace("    def score_response", f"    {hook}\n    def score_response")
    )
    arguments = [[], "action"] if call == "step" else []
    error = fault(getattr(environment, call), environment.tasks("train")[0], *arguments)

    assert message in error.message
    assert re.search(r"environment\.py:6: ", error.message)


def test_a_failing_row_target_names_the_row_shape(load):
    environment = load(rows=b'{"input": "a", "output": {"messages": [{"role": ""}]}}')
    error = fault(environment.target, environment.tasks("train")[0])

    assert "role must be a non-empty string" in error.message


def test_a_scoring_failure_in_a_helper_points_into_the_helper(load):
    source = GOOD.replace("return RewardResult(1.0)", "import helper; return helper.grade()")
    environment = load(source, files={"helper.py": "def grade():\n    raise OSError('gone')\n"})
    episode = Episode(messages=(), completion="a")
    (reward,) = environment.score(environment.tasks("train")[0], [episode])

    assert reward.score is None
    assert re.search(r"helper\.py:2: OSError: gone", reward.error)
