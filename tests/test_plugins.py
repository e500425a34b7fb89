"""
Plugins in every state, installed at once as real distributions.

The command line stays usable, and says of each what is wrong.
"""

import json
import zipfile

import pytest
from distributions import Shell, build_wheel, install, plugin

from flash.config import PluginList
from flash.errors import PluginError, SpecError, UsageError
from flash.plugins import PluginHost, boundary
from flash.testing.host import make_host

SINK = """
    import attrs
    from flash.api import SinkPlugin, hookimpl

    @attrs.frozen
    class Config:
        pass

    def sink(name):
        return SinkPlugin(name=name, summary="keeps events", make=print, config=Config)
"""


def sinks(*names):
    """Return the code of a plugin that registers sinks of these names."""
    listed = ", ".join(f"sink({name!r})" for name in names)
    return (
        SINK
        + f"""
    @hookimpl
    def flash_register_sinks():
        return [{listed}]
"""
    )


def sink_with(changes):
    """Return the code of a plugin whose sink has other fields than it should."""
    return (
        SINK
        + f"""
    @hookimpl
    def flash_register_sinks():
        made = dict(name="changed", summary="keeps events", make=print, config=Config)
        return [SinkPlugin(**{{**made, **dict({changes})}})]
"""
    )


FINE = (
    sinks("fine")
    + """
    from flash.api import CommandPlugin

    print("a plugin that prints while it is imported")

    @hookimpl
    def flash_register_commands():
        return [
            CommandPlugin(name="greet", help="Say hello.", command="flash_fine.verbs:greet"),
            CommandPlugin(name="stumble", help="Fail.", command="flash_fine.verbs:stumble"),
            CommandPlugin(name="void", help="Nothing.", command="flash_fine.verbs:nothing"),
        ]
"""
)
VERBS = """
    import click

    @click.command()
    def greet():
        click.echo("hello")

    @click.command()
    def stumble():
        raise RuntimeError("over its own feet")

    nothing = None
"""
UNPRINTABLE = """
    class Odd(Exception):
        def __str__(self):
            raise ValueError("cannot be printed")

    raise Odd
"""

FIXTURES = [
    plugin("fine", FINE, modules={"verbs": VERBS}),
    plugin("import", "import a_library_that_is_not_installed"),
    plugin("exits", "raise SystemExit(7)"),
    plugin("unprintable", UNPRINTABLE),
    plugin(
        "raises",
        SINK
        + """
    @hookimpl
    def flash_register_sinks():
        raise RuntimeError("the hook fell over")
""",
    ),
    plugin("old", sinks("old"), requires=("flash-core>=99", "requests")),
    plugin("twin-a", sinks("twin-a"), entry_point="twin"),
    plugin("twin-b", sinks("twin-b"), entry_point="twin"),
    plugin("left", sinks("left", "shared")),
    plugin("right", sinks("right", "shared")),
    plugin(
        "misspelt",
        SINK
        + """
    @hookimpl
    def flash_register_sink():
        return [sink("misspelt")]
""",
    ),
    plugin(
        "unmarked",
        SINK
        + """
    def flash_register_sinks():
        return [sink("unmarked")]
""",
    ),
    plugin(
        "arguments",
        SINK
        + """
    @hookimpl
    def flash_register_sinks(host):
        return [sink("arguments")]
""",
    ),
    plugin("hookless", "X = 1"),
    plugin(
        "text",
        SINK
        + """
    @hookimpl
    def flash_register_sinks():
        return ["a sink by name only"]
""",
    ),
    plugin(
        "single",
        SINK
        + """
    @hookimpl
    def flash_register_sinks():
        return sink("single")
""",
    ),
    plugin("invalid", sinks("Not A Name")),
    plugin(
        "forgets",
        SINK
        + """
    @hookimpl
    def flash_register_sinks():
        [sink("forgets")]
""",
    ),
    plugin("configless", sink_with("config=None")),
    plugin(
        "unresolved",
        """
    from typing import TYPE_CHECKING
    if TYPE_CHECKING:
        from pathlib import Path
"""
        + sink_with("config=Outer")
        + """
    @attrs.frozen
    class Inner:
        folder: "Path"

    @attrs.frozen
    class Outer:
        inners: tuple[Inner, ...] = ()
""",
    ),
    plugin("letters", sink_with('secrets="ZOO_KEY"')),
    plugin("secretless", sink_with("secrets=None")),
    plugin("unsummed", sink_with("summary=3")),
    plugin(
        "cards",
        """
    from flash.api import ModelPlugin, hookimpl

    @hookimpl
    def flash_register_models():
        return [ModelPlugin(name="cards", summary="", make=print, cards=({"id": "x"},))]
""",
    ),
    plugin("repeats", sinks("again", "again")),
    plugin(
        "shadows",
        """
    from flash.api import CommandPlugin, hookimpl

    @hookimpl
    def flash_register_commands():
        return [CommandPlugin(name="train", help="Mine.", command="flash_shadows:train")]
""",
    ),
    plugin("slow", "\n    import time\n    time.sleep(0.55)\n" + sinks("slow")),
]

# pip refuses to install this one; an older pip, or an interrupted one, may leave such a folder.
GARBLED = plugin("garbled", sinks("garbled"), requires=("flash-core ~~ what",))

# What a broken disk or an interrupted copy leaves: name, METADATA, entry_points.txt.
DAMAGED = [
    ("torn", b"Metadata-Version: 2.1\nName: flash-torn\nVersion: 1.0\n", b"[flash]\ntorn\n"),
    ("smudged", b"Name: flash-smudged\nVersion: 1.0\n", b"[flash]\nsmudged = \xff\n"),
    ("smeared", b"Name: flash-smeared\nSummary: \xff\n", b"[flash]\nsmeared = flash_smeared\n"),
]

STATES = {
    "flash-fine": ("ok", ""),
    "flash-slow": ("ok", ""),
    "flash-import": ("broken", "import flash_import raised ModuleNotFoundError"),
    "flash-exits": ("broken", "import flash_exits raised SystemExit: 7"),
    "flash-unprintable": ("broken", "import flash_unprintable raised flash_unprintable.Odd"),
    "flash-raises": ("broken", "flash_register_sinks raised RuntimeError: the hook fell over"),
    "flash-old": ("incompatible", "it needs flash-core>=99; this is flash-core 0.1.0"),
    "flash-garbled": ("broken", "its metadata cannot be read"),
    "flash-torn": ("broken", "its entry_points.txt cannot be read"),
    "flash-smudged": ("broken", "its entry_points.txt cannot be read: UnicodeDecodeError"),
    "flash-smeared": ("broken", "its metadata cannot be read: 'utf-8' codec can't decode"),
    "flash-twin-a": ("conflict", 'flash-twin-b 1.0 also claims the name "twin"'),
    "flash-twin-b": ("conflict", 'flash-twin-a 1.0 also claims the name "twin"'),
    "flash-left": ("conflict", 'flash-right 1.0 also provides the sink "shared"'),
    "flash-right": ("conflict", 'flash-left 1.0 also provides the sink "shared"'),
    "flash-misspelt": ("broken", 'not a hook of Flash; did you mean "flash_register_sinks"?'),
    "flash-unmarked": ("broken", "flash_register_sinks is defined without @flash.hookimpl"),
    "flash-arguments": ("broken", "a hook does not fit its specification"),
    "flash-hookless": ("broken", "flash_hookless implements no hook of Flash"),
    "flash-text": ("broken", "must return SinkPlugin records, got 'a sink by name only'"),
    "flash-single": ("broken", "must return a list of SinkPlugin, got SinkPlugin("),
    "flash-invalid": ("broken", "flash_register_sinks raised ValueError"),
    "flash-forgets": ("broken", "flash_register_sinks returned nothing; it must return a list of"),
    "flash-configless": ("broken", "config must be an attrs class, got None"),
    "flash-unresolved": ("broken", "of Inner cannot be read: name 'Path' is not defined"),
    "flash-letters": ("broken", "secrets must be a tuple of str, got 'ZOO_KEY'"),
    "flash-secretless": ("broken", "secrets must be a tuple of str, got None"),
    "flash-unsummed": ("broken", "summary must be a str, got 3"),
    "flash-cards": ("broken", "cards must be a tuple of ModelCard, got ({'id': 'x'},)"),
    "flash-repeats": ("broken", 'returns the sink "again" twice'),
    "flash-shadows": ("broken", 'the command "train", which is a verb of Flash itself'),
}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plugins")
    site = install(FIXTURES, folder)
    with zipfile.ZipFile(build_wheel(GARBLED, folder)) as wheel:
        wheel.extractall(site)
    for name, metadata, points in DAMAGED:
        info = site / f"flash_{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_bytes(metadata)
        (info / "entry_points.txt").write_bytes(points)
    return site


@pytest.fixture
def shell(site, tmp_path):
    """Everything is installed; the slow one is disabled, to keep these tests quick."""
    return Shell(tmp_path, site, {"FLASH_DISABLE_PLUGINS": "slow"})


@pytest.fixture(scope="module")
def listed(site, tmp_path_factory):
    """What `flash plugins --json` says with all of them installed, by distribution."""
    answer = Shell(tmp_path_factory.mktemp("home"), site).flash("plugins", "--json")
    assert answer.returncode == 0, answer.stderr
    return {status["distribution"]: status for status in json.loads(answer.stdout)}


@pytest.fixture
def load(site, monkeypatch):
    """Load chosen fixture plugins into this process; the slow and the broken stay out."""
    monkeypatch.syspath_prepend(str(site))

    def host(*names):
        return PluginHost.load(allowed=PluginList(names, "the test"))

    return host


@pytest.mark.parametrize(("distribution", "state", "reason"), [(k, *v) for k, v in STATES.items()])
def test_each_plugin_is_listed_with_its_state_and_the_reason(listed, distribution, state, reason):
    status = listed[distribution]

    assert status["state"] == state
    assert reason in (status["reason"] or "")


def test_every_fixture_is_expected_above():
    installed = {fixture.name for fixture in FIXTURES}
    damaged = {f"flash-{name}" for name, _, _ in DAMAGED}
    assert STATES.keys() == installed | damaged | {"flash-garbled"}


def test_json_contract(listed):
    fine = listed["flash-fine"]

    assert set(fine) == {
        "name", "state", "distribution", "version", "provides", "reason", "hint", "load_s",
    }  # fmt: skip
    assert fine["provides"] == {"sink": ["fine"], "command": ["greet", "stumble", "void"]}
    assert fine["reason"] is None
    assert listed["flash-old"]["load_s"] is None
    assert listed["flash-twin-a"]["load_s"] is None


def test_every_unhealthy_plugin_says_what_to_do(listed):
    assert [s["name"] for s in listed.values() if s["state"] != "ok" and not s["hint"]] == []


def test_a_slow_plugin_is_timed(listed):
    assert listed["flash-slow"]["load_s"] > 0.5
    assert listed["flash-fine"]["load_s"] < 0.5


def test_listing_names_the_broken_and_the_slow_and_check_exits_3(site, tmp_path):
    answer = Shell(tmp_path, site).flash("plugins", "--check")

    assert answer.returncode == 3
    assert "raises" in answer.stdout
    assert "warning: raises (flash-raises 1.0) is broken: flash_register_sinks" in answer.stderr
    assert "warning: slow (flash-slow 1.0) took 0." in answer.stderr
    assert "Traceback" not in answer.stderr + answer.stdout


def test_check_exits_0_when_what_is_left_is_healthy(shell):
    shell.write_config('[plugins]\nallow = ["fine"]\n')

    answer = shell.flash("plugins", "--check")

    assert answer.returncode == 0
    assert "not among" in answer.stderr


def test_show_traceback_shows_where_it_broke(shell):
    answer = shell.flash("plugins", "show", "raises", "--traceback")

    assert answer.returncode == 0
    assert 'raise RuntimeError("the hook fell over")' in answer.stdout
    assert "flash_raises/__init__.py" in answer.stdout


def test_show_json_has_the_traceback_only_when_asked(shell):
    plain = json.loads(shell.flash("plugins", "show", "raises", "--json").stdout)
    asked = json.loads(shell.flash("plugins", "show", "raises", "--json", "--traceback").stdout)

    assert plain["name"] == "raises"
    assert "traceback" not in plain
    assert "the hook fell over" in asked["traceback"]


def test_show_asks_which_of_two_distributions_is_meant(shell):
    answer = shell.flash("plugins", "show", "twin")
    chosen = shell.flash("plugins", "show", "twin@flash-twin-b")

    assert answer.returncode == 2
    assert "hint: flash plugins show twin@flash-twin-a or twin@flash-twin-b" in answer.stderr
    assert "twin (flash-twin-b 1.0)" in chosen.stdout


def test_show_of_an_unknown_plugin_names_the_nearest(shell):
    answer = shell.flash("plugins", "show", "fein")

    assert answer.returncode == 2
    assert 'error: no plugin "fein" is installed; did you mean "fine"?' in answer.stderr


def test_the_hint_of_a_name_conflict_settles_it(shell, listed):
    line = listed["flash-twin-a"]["hint"].partition("[plugins] ")[2].partition(";")[0]
    shell.write_config(f"[plugins]\n{line}\n")

    states = states_of(shell, "twin")

    assert states == {"flash-twin-a": "ok", "flash-twin-b": "disabled"}


def test_the_hint_of_a_record_conflict_settles_it(shell, listed):
    line = listed["flash-right"]["hint"].partition("[plugins] ")[2].partition(";")[0]
    shell.write_config(f"[plugins]\n{line}\n")

    states = states_of(shell, "left", "right")

    assert states == {"flash-left": "disabled", "flash-right": "ok"}


def test_a_plugin_in_conflict_with_several_names_them_all(tmp_path, monkeypatch):
    """And its one line settles all of it."""
    wide = plugin("wide", sinks("a", "b", "c"))
    rivals = [plugin("narrow-a", sinks("a")), plugin("narrow-b", sinks("b"))]
    monkeypatch.syspath_prepend(str(install([wide, *rivals], tmp_path)))

    host = PluginHost.load(allowed=PluginList(("wide", "narrow-a", "narrow-b"), "the test"))
    (found,) = [status for status in host.statuses() if status.name == "wide"]

    assert found.reason == (
        'flash-narrow-a 1.0 and flash-narrow-b 1.0 also provide the sink "a" and the sink "b"'
    )
    assert 'disable = ["narrow-a@flash-narrow-a", "narrow-b@flash-narrow-b"]' in found.hint
    with pytest.raises(PluginError, match="plugin wide"):
        host.get("sink", "c")


def test_the_environment_variable_disables_and_is_named_as_the_reason(shell):
    answer = shell.flash("plugins", "--json", FLASH_DISABLE_PLUGINS="fine, left")
    states = {s["name"]: s for s in json.loads(answer.stdout)}

    assert states["fine"]["state"] == "disabled"
    assert "FLASH_DISABLE_PLUGINS" in states["fine"]["reason"]
    assert states["right"]["state"] == "ok"


def test_a_star_disables_every_plugin(shell):
    answer = shell.flash("plugins", "--json", FLASH_DISABLE_PLUGINS="*")

    assert {s["state"] for s in json.loads(answer.stdout)} == {"disabled"}


@pytest.mark.parametrize("verb", [["plugins", "--json"], ["schema"]])
def test_a_misspelt_name_in_a_list_is_pointed_out_once_by_every_verb(shell, verb):
    shell.write_config('[plugins]\ndisable = ["fien"]\n')

    answer = shell.flash(*verb)

    words = '[plugins] disable names "fien", which is not installed; did you mean "fine"?'
    assert answer.stderr.count(words) == 1


def states_of(shell, *names):
    answer = shell.flash("plugins", "--json")
    found = json.loads(answer.stdout)
    return {s["distribution"]: s["state"] for s in found if s["name"] in names}


def test_a_plugin_adds_a_verb(shell):
    answer = shell.flash("greet")

    assert (answer.returncode, answer.stdout) == (0, "hello\n")


def test_a_misspelt_verb_of_a_plugin_is_recognised(shell):
    answer = shell.flash("gret")

    assert answer.returncode == 2
    assert 'error: unknown command "gret"; did you mean "greet"?' in answer.stderr


def test_a_verb_that_raises_is_its_plugins_fault(shell):
    answer = shell.flash("stumble")

    assert answer.returncode == 3
    assert "error: plugin fine: its command raised RuntimeError: over its own feet" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_a_verb_that_is_no_command_is_its_plugins_fault(shell):
    answer = shell.flash("void")

    assert answer.returncode == 3
    assert "flash_fine.verbs:nothing is not a click command" in answer.stderr


def test_get_returns_the_record_and_its_owner(load):
    host = load("fine")

    assert host.get("sink", "fine").summary == "keeps events"
    assert list(host.all("sink")) == ["fine"]
    assert host.owner("sink", "fine").label == "fine (flash-fine 1.0)"


def test_an_unknown_name_lists_what_is_there(load):
    with pytest.raises(UsageError) as caught:
        load("fine").get("sink", "fien")

    assert caught.value.message == 'unknown sink "fien"; did you mean "fine"?'
    assert caught.value.hint == "installed: fine"


def test_an_unknown_name_of_a_known_distribution_gives_the_install_line():
    with pytest.raises(UsageError) as caught:
        PluginHost([]).get("provider", "local")

    assert caught.value.hint == "pip install flash-provider-local; no provider is installed"


@pytest.mark.parametrize(
    ("selected", "kind", "name", "words"),
    [
        (["raises"], "sink", "raises", "plugin raises (flash-raises 1.0) is broken: flash_reg"),
        (["old"], "sink", "old", "is incompatible: it needs flash-core>=99"),
        (["twin"], "sink", "twin", "is in conflict: flash-twin-b 1.0 also claims the name"),
        (["left", "right"], "sink", "shared", "is in conflict: flash-right 1.0 also provides"),
        (["fine"], "sink", "left", "is disabled: not among the test"),
    ],
)
def test_selecting_an_unusable_plugin_says_why(load, selected, kind, name, words):
    with pytest.raises(PluginError) as caught:
        load(*selected).get(kind, name)

    assert words in caught.value.message
    assert caught.value.hint


def test_a_policy_that_raises_is_its_plugins_fault():
    def flash_review_plan(plan):
        raise ConnectionError(f"no answer about {plan}")

    problems = make_host(flash_review_plan=flash_review_plan).review("the plan")

    assert SpecError(problems).exit_code == 3


def test_boundary_attributes_what_a_plugin_raises():
    with pytest.raises(PluginError) as caught, boundary("ray", "launch"):
        raise KeyError("job")

    assert caught.value.message == "plugin ray: launch raised KeyError: 'job'"
    assert isinstance(caught.value.__cause__, KeyError)


def test_boundary_contains_an_exit_and_lets_ours_and_the_users_pass():
    with pytest.raises(PluginError), boundary("ray", "launch"):
        raise SystemExit(0)
    with pytest.raises(UsageError), boundary("ray", "launch"):
        raise UsageError("ours")
    with pytest.raises(KeyboardInterrupt), boundary("ray", "launch"):
        raise KeyboardInterrupt
