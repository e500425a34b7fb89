"""Two environments in one process, each with helpers of the same name: neither sees the other's."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from textwrap import dedent

import pytest
from flash_env_freesolo.isolation import PrivatePackage
from flash_env_freesolo.loader import FreesoloLoader

from flash.api import EnvironmentFault, Episode

ENVIRONMENT = """
    from freesolo.environments import EnvironmentSingleTurn, RewardResult
    import helpers
    from graders.exact import NAME as GRADER
    import graders.exact as module_path

    class Env(EnvironmentSingleTurn):
        def build_prompt_messages(self, example, prompt_text):
            return [{"role": "user", "content": example.input}]

        def score_response(self, example, response_text):
            import helpers as lazily
            import importlib
            from importlib import import_module
            from lazy import late
            names = (helpers.NAME, lazily.NAME, late(), GRADER, module_path.NAME,
                     importlib.import_module("helpers").NAME, import_module("graders.exact").NAME,
                     __import__("helpers").NAME)
            return RewardResult(1.0, reason=" ".join(names))

    def load_environment():
        return Env()
"""


def make_environment(folder, name):
    files = {
        "environment.py": ENVIRONMENT,
        "helpers.py": f"NAME = {name!r}",
        "lazy.py": "def late():\n    from helpers import NAME\n    return NAME",
        "graders/__init__.py": "",
        "graders/exact.py": "from helpers import NAME\nfrom . import other\n",
        "graders/other.py": "from .exact import NAME",
        "dataset/train.jsonl": '{"input": "q"}',
    }
    return write(folder, files)


def write(folder, files):
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(dedent(text))
    return folder


class Context:
    class log:  # noqa: N801 - stands for ctx.log
        @staticmethod
        def warning(message):
            pass


def load(folder):
    return FreesoloLoader(Context()).load(folder, params={}, split="train")


def names_seen(environment):
    (reward,) = environment.score(
        environment.tasks("train")[0], [Episode(messages=(), completion="a")]
    )
    assert reward.error is None
    return set(reward.reason.split())


@pytest.fixture
def process_state():
    """Fail if the test leaves modules under public names, or paths, behind."""
    modules, path = set(sys.modules), list(sys.path)
    yield
    new = {name for name in set(sys.modules) - modules if not name.startswith("_flash_env_")}
    assert not {"helpers", "lazy", "graders", "graders.exact", "environment", "vendored"} & new
    assert sys.path == path


def test_same_named_helpers_do_not_leak_at_import_or_later_or_in_threads(tmp_path, process_state):
    first = load(make_environment(tmp_path / "one", "one"))
    second = load(make_environment(tmp_path / "two", "two"))

    assert names_seen(first) == {"one"}
    assert names_seen(second) == {"two"}
    with ThreadPoolExecutor(8) as pool:
        seen = list(pool.map(names_seen, [first, second] * 20))
    assert seen == [{"one"}, {"two"}] * 20


def test_a_helper_that_only_the_other_environment_has_is_not_found(tmp_path, process_state):
    load(make_environment(tmp_path / "one", "one"))
    poor = make_environment(tmp_path / "two", "two")
    (poor / "helpers.py").unlink()

    with pytest.raises(EnvironmentFault, match="No module named 'helpers'"):
        load(poor)


def test_the_same_folder_loaded_twice_has_its_own_module_state(tmp_path, process_state):
    folder = write(
        tmp_path,
        {"counter.py": "SEEN = []", "environment.py": "import counter\ncounter.SEEN.append(1)"},
    )
    first, second = PrivatePackage(folder), PrivatePackage(folder)

    assert first.load("environment").counter.SEEN == [1]
    assert second.load("environment").counter.SEEN == [1]


def test_paths_that_user_code_adds_are_searched_for_it_alone(tmp_path, process_state):
    bootstrap = """
        import sys
        from pathlib import Path
        sys.path.insert(0, str(Path(__file__).parent))
        sys.path.insert(0, str(Path(__file__).parent / "vendor"))
        import vendored
        import helpers
        def later():
            from vendored_too import NAME
            return NAME
    """
    files = {"vendor/vendored.py": "", "vendor/vendored_too.py": "NAME = 1", "helpers.py": ""}
    module = PrivatePackage(write(tmp_path, {**files, "environment.py": bootstrap})).load(
        "environment"
    )

    assert module.later() == 1
    assert module.vendored.__name__.startswith("_flash_env_")


def test_a_module_beside_environment_py_wins_over_an_installed_one(tmp_path, process_state):
    files = {"click.py": "NAME = 'ours'", "environment.py": "import click, json"}
    module = PrivatePackage(write(tmp_path, files)).load("environment")

    assert module.click.NAME == "ours"
    assert module.json is sys.modules["json"]


def test_a_folder_of_rows_does_not_hide_an_installed_package(tmp_path, process_state):
    files = {"click/train.jsonl": "{}", "environment.py": "import click"}
    module = PrivatePackage(write(tmp_path, files)).load("environment")

    assert hasattr(module.click, "command")


def test_dataclasses_typing_and_pickle_work_in_private_modules(tmp_path, process_state):
    source = """
        from __future__ import annotations
        import pickle
        from dataclasses import dataclass, field
        from typing import ClassVar, get_type_hints
        @dataclass
        class Row:
            kind: ClassVar[str] = "row"
            values: list[int] = field(default_factory=list)
        HINTS = get_type_hints(Row)
        COPY = pickle.loads(pickle.dumps(Row([1])))
    """
    module = PrivatePackage(write(tmp_path, {"environment.py": source})).load("environment")

    assert module.Row([1]) == module.COPY
    assert module.HINTS["values"] == list[int]


def test_nothing_is_written_into_the_users_folder(tmp_path, process_state):
    folder = make_environment(tmp_path, "one")
    before = sorted(folder.rglob("*"))
    names_seen(load(folder))

    assert sorted(folder.rglob("*")) == before


def test_a_load_that_fails_leaves_nothing_in_the_process(tmp_path, process_state):
    finders, modules = list(sys.meta_path), set(sys.modules)
    folder = make_environment(tmp_path, "one")
    (folder / "environment.py").write_text("import helpers\n1/0")

    with pytest.raises(EnvironmentFault):
        load(folder)
    assert sys.meta_path == finders
    assert not {name for name in set(sys.modules) - modules if name.startswith("_flash_env_")}
