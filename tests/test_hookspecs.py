"""One test a hook, named after it: what a plugin returns from it reaches the one who asks."""

import inspect

import pytest
from distributions import install, plugin

from flash import hookspecs
from flash.config import PluginList
from flash.errors import PluginError
from flash.plugins import KINDS, PluginHost
from flash.values import Problem

EVERYTHING = """
    import attrs
    from flash.api import (
        AlgorithmPlan, AlgorithmPlugin, CommandPlugin, EnvironmentPlugin, ModelPlugin, Need,
        Problem, ProviderPlugin, RewardPlugin, ServingPlugin, SinkPlugin, hookimpl,
    )

    @attrs.frozen
    class Config:
        pass

    common = {"name": "each", "summary": "one of each kind"}
    made = {**common, "make": print, "config": Config}

    @hookimpl
    def flash_register_providers():
        return [ProviderPlugin(**made)]

    @hookimpl
    def flash_register_algorithms():
        return [AlgorithmPlugin(
            **common, config=Config, worker="flash_each:run", recipe=lambda _: {},
            plan=lambda _: AlgorithmPlan(need=Need(memory_gib=1)),
        )]

    @hookimpl
    def flash_register_environments():
        return [EnvironmentPlugin(**common, detect=lambda folder: False, make=print)]

    @hookimpl
    def flash_register_rewards():
        return [RewardPlugin(**made)]

    @hookimpl
    def flash_register_models():
        return [ModelPlugin(**common, make=print)]

    @hookimpl
    def flash_register_serving():
        return [ServingPlugin(**made)]

    @hookimpl
    def flash_register_sinks():
        return [SinkPlugin(**made)]

    @hookimpl
    def flash_register_commands():
        return [CommandPlugin(name="each", help="Each.", command="flash_each:each")]

    @hookimpl
    def flash_review_plan(plan):
        return [Problem("budget", f"{plan} costs too much")]

    @hookimpl
    def flash_find_secret(name):
        return {"TOKEN": "from the vault"}.get(name)
"""
RAISING = """
    from flash.api import hookimpl

    @hookimpl
    def flash_review_plan(plan):
        raise ConnectionError("the policy server is away")

    @hookimpl
    def flash_find_secret(name):
        raise SystemExit("the vault is sealed")
"""
WRONG = """
    from flash.api import hookimpl

    @hookimpl
    def flash_review_plan(plan):
        return "no"

    @hookimpl
    def flash_find_secret(name):
        return 12345678
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    plugins = [plugin("each", EVERYTHING), plugin("away", RAISING), plugin("wrong", WRONG)]
    return install(plugins, tmp_path_factory.mktemp("plugins"))


@pytest.fixture
def load(site, monkeypatch):
    monkeypatch.syspath_prepend(str(site))
    return lambda *names: PluginHost.load(allowed=PluginList(names, "the test"))


def provided(host, kind):
    return type(host.get(kind, "each")), list(host.all(kind))


def test_flash_register_providers(load):
    assert provided(load("each"), "provider") == (KINDS["provider"][1], ["each"])


def test_flash_register_algorithms(load):
    assert provided(load("each"), "algorithm") == (KINDS["algorithm"][1], ["each"])


def test_flash_register_environments(load):
    assert provided(load("each"), "environment") == (KINDS["environment"][1], ["each"])


def test_flash_register_rewards(load):
    assert provided(load("each"), "reward") == (KINDS["reward"][1], ["each"])


def test_flash_register_models(load):
    assert provided(load("each"), "model") == (KINDS["model"][1], ["each"])


def test_flash_register_serving(load):
    assert provided(load("each"), "serving") == (KINDS["serving"][1], ["each"])


def test_flash_register_sinks(load):
    assert provided(load("each"), "sink") == (KINDS["sink"][1], ["each"])


def test_flash_register_commands(load):
    assert provided(load("each"), "command") == (KINDS["command"][1], ["each"])


def test_flash_review_plan(load):
    """Every policy is asked; one that fails blocks, is named, and stops no other."""
    problems = load("each", "away", "wrong").review("the plan")

    assert problems == [
        Problem(
            "",
            "plugin away: flash_review_plan raised ConnectionError: the policy server is away",
            problems[0].hint,
            fault="plugin",
        ),
        Problem("budget", "the plan costs too much"),
        Problem(
            "",
            "plugin wrong: flash_review_plan raised TypeError: "
            "flash_review_plan must return a list of Problem",
            problems[2].hint,
            fault="plugin",
        ),
    ]
    assert [problem.severity for problem in problems] == ["error"] * 3


def test_flash_find_secret(load):
    """The first value wins, even behind a plugin that fails."""
    host = load("each", "away")

    assert host.find_secret("TOKEN") == "from the vault"


def test_a_secret_that_could_not_be_asked_for_is_not_missing(load):
    with pytest.raises(PluginError, match="plugin away: flash_find_secret raised SystemExit"):
        load("each", "away").find_secret("OTHER")

    assert load("each").find_secret("OTHER") is None


def test_a_secret_of_the_wrong_type_is_not_quoted(load):
    with pytest.raises(PluginError, match="must return a string or None, got int") as caught:
        load("wrong").find_secret("TOKEN")

    assert "12345678" not in str(caught.value)


def test_every_hook_has_a_test_named_after_it():
    hooks = {
        name
        for name, function in inspect.getmembers(hookspecs, inspect.isfunction)
        if hasattr(function, "flash_spec")
    }

    assert [name for name in sorted(hooks) if f"test_{name}" not in globals()] == []
    assert {hook for hook, _ in KINDS.values()} <= hooks


def test_every_hook_has_a_docstring_that_is_its_reference():
    hooks = [f for _, f in inspect.getmembers(hookspecs) if hasattr(f, "flash_spec")]

    assert [hook.__name__ for hook in hooks if not hook.__doc__] == []
