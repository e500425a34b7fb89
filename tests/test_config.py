"""The user's config.toml is read strictly."""

import pytest

from flash.config import UserConfig
from flash.errors import SpecError


@pytest.fixture
def path(tmp_path):
    return tmp_path / "config.toml"


def problems(path):
    with pytest.raises(SpecError) as caught:
        UserConfig.read(path)
    assert caught.value.exit_code == 2
    return [str(problem).removeprefix(f"{path}: ") for problem in caught.value.problems]


def test_without_a_file_everything_is_allowed(path):
    config = UserConfig.read(path)

    assert config.disable.names == ()
    assert config.allow is None


def test_lists_know_where_they_were_written(path):
    path.write_text('[plugins]\ndisable = ["ray"]\nallow = []\n')

    config = UserConfig.read(path)

    assert config.disable.names == ("ray",)
    assert config.disable.origin == f"{path} [plugins] disable"
    assert config.allow is not None
    assert config.allow.names == ()


@pytest.mark.parametrize(
    ("listed", "answer"),
    [
        ("ray", True),
        ("ray@flash-provider-ray", True),
        ("ray@flash-provider-other", False),
        ("*", True),
        ("ra", False),
    ],
)
def test_a_plugin_is_named_by_name_or_by_distribution_too(path, listed, answer):
    path.write_text(f'[plugins]\ndisable = ["{listed}"]\n')

    assert UserConfig.read(path).disable.names_plugin("ray", "flash-provider-ray") is answer


def test_a_budget_of_ones_own_is_a_layer_that_names_the_file(path):
    path.write_text("[budget]\nmax_hours = 12\nmax_usd = 20.5\n")

    layer = UserConfig.read(path).defaults

    assert layer.label == str(path)
    assert layer.data == {"budget": {"max_hours": 12, "max_usd": 20.5}}


def test_without_a_budget_the_layer_is_empty(path):
    path.write_text("[budget]\n")

    assert UserConfig.read(path).defaults.data == {}


def test_a_budget_is_read_as_strictly_as_a_specs(path):
    path.write_text(
        "[budget]\nmax_hour = 1\nmax_hours = 0\nmax_usd = true\nwarn_at = 80\n[plugins]\n"
    )

    assert problems(path) == [
        'budget.max_hour: unknown key; did you mean "max_hours"?',
        "budget.max_hours: must be greater than 0, got 0",
        "budget.max_usd: must be a number",
        "budget.warn_at: must be at most 1, got 80",
    ]


def test_every_problem_is_reported_at_once(path):
    path.write_text('plugin = 1\n[plugins]\ndisabel = ["ray"]\nallow = "ray"\n')

    assert problems(path) == [
        'plugin: unknown key; did you mean "plugins"?',
        "plugins.allow: must be an array of strings",
        'plugins.disabel: unknown key; did you mean "disable"?',
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[plugins\n", "is not TOML: "),
        (b"\xff\xfe", "is not UTF-8: byte 0"),
        (b"plugins = 3\n", "plugins: must be a table"),
        (b"budget = 3\n", "budget: must be a table"),
        (b"[budget]\nmax_usd = nan\n", "budget.max_usd: must be a finite number, got nan"),
        (b'[budget]\nmax_usd = "5"\n', "budget.max_usd: must be a number"),
        (b"x = " + b"9" * 5000, "is not TOML: "),
        (b"x = " + b"[" * 5000, "is not TOML: "),
    ],
)
def test_a_file_that_cannot_be_read_says_why(path, content, words):
    path.write_bytes(content)

    (problem,) = problems(path)

    assert words in problem


def test_a_folder_in_its_place_says_why(path):
    path.mkdir()

    assert problems(path) == ["cannot be read: Is a directory"]


def test_the_gateway_of_no_file_has_its_defaults(path):
    gateway = UserConfig.read(path).gateway

    assert (gateway.port, gateway.prices) == (8808, {})


def test_the_gateway_of_a_file(path):
    path.write_text(
        "[gateway]\nport = 0\nbody_bytes = 2048\n"
        '[gateway.prices."org/model"]\nprompt_usd = 1\ncompletion_usd = 2.5\n'
        "[gateway.prices.0run]\nprompt_usd = 3.0\ncompletion_usd = 4.0\ncached_usd = 0.0\n"
    )

    gateway = UserConfig.read(path).gateway

    assert (gateway.port, gateway.body_bytes) == (0, 2048)
    assert gateway.price("0run", "org/model").prompt_usd == 3.0
    assert gateway.price("1run", "org/model").prompt_usd == 1.0
    assert gateway.price("1run", "org/other") is None
    whole = gateway.price("1run", "org/model").usd(prompt=2_000_000, cached=1_000_000, completion=0)
    part = gateway.price("0run", "").usd(prompt=2_000_000, cached=1_000_000, completion=1_000_000)
    assert (whole, part) == (2.0, 7.0)


def test_the_gateway_is_read_strictly_and_all_at_once(path):
    path.write_text(
        '[gateway]\nport = "8808"\nprt = 1\nrequests = 0\n'
        '[gateway.prices."org/model"]\nprompt_usd = -1\ncompletion_usd = true\n'
    )

    assert [problem.partition(":")[0] for problem in problems(path)] == [
        "gateway.port",
        'gateway.prices."org/model".completion_usd',
        'gateway.prices."org/model".prompt_usd',
        "gateway.prt",
        "gateway.requests",
    ]


def test_a_gateway_that_is_no_table(path):
    path.write_text("gateway = 8808\n")

    assert problems(path) == ["gateway: expected a table, got an integer 8808"]
