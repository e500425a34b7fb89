"""The adapters, each made as the core makes them and asked for the score of texts."""

import re
import sys
import threading

import pytest
from flash_reward_standard import flash_register_rewards
from flash_reward_standard.bounded import BoundedCheck
from flash_reward_standard.config import ExactMatchConfig, JsonSchemaConfig, RegexConfig
from flash_reward_standard.schemas import JsonSchema
from flash_reward_standard.texts import ExactMatch, Regex, band
from hypothesis import given
from hypothesis import strategies as st

from flash.api import EnvironmentFault, Episode, FlashError, Reward, RewardAdapter, SpecError, Task
from flash.context import plugin_context
from flash.home import FlashHome
from flash.plugins import PluginHost
from flash.spec.model import read_reward_tables
from flash.time_limit import TimeUp, time_limit

RECORDS = {record.name: record for record in flash_register_rewards()}
HOST = PluginHost.load()
EXPONENTIAL = "(a|aa)+$"
TASK = Task("7", "Where?", gold="Paris", metadata={"label": "Rome", "number": 3, "list": []})


def episode(text, **more):
    return Episode((), text, raw=more.pop("raw", text), **more)


@pytest.fixture
def make(tmp_path):
    """Make an adapter from its table, in an environment whose folder is `tmp_path`."""

    def adapter(name, **settings):
        (config,) = read_reward_tables({name: settings}, HOST).values()
        context = plugin_context(FlashHome(tmp_path / "home"), name, {}, environment=tmp_path)
        made = RECORDS[name].make(context, config)
        assert isinstance(made, RewardAdapter)
        return made

    return adapter


def scores(adapter, *texts, task=TASK):
    return [reward.score for reward in adapter.score(task, [episode(text) for text in texts])]


def problem(name, **settings):
    with pytest.raises(SpecError) as caught:
        read_reward_tables({name: settings}, HOST)
    (found,) = caught.value.problems
    return str(found)


# exact-match


def test_exact_match_is_the_gold_answer_white_space_aside(make):
    texts = ("Paris", "  Paris\n", "paris", "Paris.", "")

    assert scores(make("exact-match"), *texts) == [1, 1, 0, 0, 0]


def test_exact_match_sees_one_text_behind_several_spellings_of_unicode(make):
    composed, decomposed = "caf\u00e9", "cafe\u0301"

    assert scores(make("exact-match"), decomposed, task=Task("1", "", gold=composed)) == [1]


def test_exact_match_can_take_its_answer_from_the_rows_metadata(make):
    assert scores(make("exact-match", answer_key="label"), "Rome", "Paris") == [1, 0]
    assert scores(make("exact-match", answer_key="number"), "3") == [1]


def test_exact_match_compares_what_extract_finds_last(make):
    adapter = make("exact-match", extract=r"Answer: (\w+)", ignore_case=True)

    assert scores(adapter, "Answer: Rome. No: Answer: PARIS", "Paris") == [1, 0]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "the row 7 has no gold answer"),
        (
            {"answer_key": "labels"},
            'the answer_key "labels" of the row 7.*is missing .it has label',
        ),
        ({"answer_key": "list"}, "is no text or number"),
    ],
)
def test_a_row_without_a_right_answer_cannot_be_scored(make, settings, expected):
    task = Task("7", "", metadata=TASK.metadata)

    with pytest.raises(FlashError, match=expected):
        make("exact-match", **settings).score(task, [episode("Paris")])


# regex


def test_regex_is_found_anywhere_or_is_the_whole(make):
    texts = ("yes", "well, yes", "YES\n", "no")

    assert scores(make("regex", pattern="yes"), *texts) == [1, 1, 0, 0]
    assert scores(make("regex", pattern="yes", ignore_case=True, whole=True), *texts) == [
        1,
        0,
        1,
        0,
    ]


@pytest.mark.parametrize(
    "adapter",
    [
        Regex(RegexConfig(EXPONENTIAL), limit_s=0.02),
        Regex(RegexConfig(EXPONENTIAL, whole=True), limit_s=0.02),
        ExactMatch(ExactMatchConfig(extract=EXPONENTIAL), limit_s=0.02),
    ],
)
def test_a_pattern_that_takes_for_ever_is_a_failed_scoring_not_a_hang(adapter):
    (reward,) = adapter.score(TASK, [episode("a" * 60 + "!")])

    assert reward.score is None
    assert "took longer than 0.02 s" in reward.error


def test_a_pattern_that_is_none_is_a_problem_of_its_setting():
    assert re.match(r"reward\.regex\.pattern: is not a pattern: ", problem("regex", pattern="("))


# json-schema

CITY = {"type": "object", "required": ["city"], "properties": {"city": {"type": "string"}}}


def test_json_schema_takes_what_the_schema_allows(make):
    adapter = make("json-schema", schema=CITY)

    valid, fenced, wrong, prose, nan = adapter.score(
        TASK,
        [
            episode('{"city": "Paris"}'),
            episode('```json\n{"city": "Paris"}\n```'),
            episode('{"city": 3}'),
            episode('Here: {"city": "Paris"}'),
            episode('{"city": NaN}'),
        ],
    )

    assert [r.score for r in (valid, fenced, wrong, prose, nan)] == [1, 1, 0, 0, 0]
    assert (valid.success, wrong.success) == (True, False)
    assert wrong.reason == "$.city: 3 is not of type 'string'"
    assert (wrong.metrics, prose.metrics) == ({"parsed": 1}, {"parsed": 0})
    assert nan.reason == "not JSON: NaN is not JSON"


def test_json_schema_can_lie_in_a_file_and_refuse_fences(make, tmp_path):
    (tmp_path / "city.json").write_text('{"enum": ["Paris"]}')
    adapter = make("json-schema", path="city.json", fenced=False)

    assert scores(adapter, '"Paris"', '"Rome"', '```\n"Paris"\n```') == [1, 0, 0]


def test_json_schema_fetches_nothing(make):
    adapter = make("json-schema", schema={"$ref": "http://127.0.0.1:9/schema.json"})

    (reward,) = adapter.score(TASK, [episode("{}")])

    assert reward.error == "the schema refers to what is not in it: http://127.0.0.1:9/schema.json"


def test_a_schema_that_takes_for_ever_is_a_failed_scoring_and_the_next_one_is_scored():
    config = JsonSchemaConfig(schema={"pattern": f"^{EXPONENTIAL}"})
    adapter = JsonSchema(config, None, limit_s=0.1)

    hangs, right = adapter.score(TASK, [episode(f'"{"a" * 60}!"'), episode('"aa"')])

    assert hangs.error == "checking the JSON by its schema took longer than 0.1 s"
    assert right.score == 1


def test_what_one_completion_breaks_leaves_the_others_of_its_group(make):
    adapter = make("json-schema", schema={"multipleOf": 0.5})

    broken, right = adapter.score(TASK, [episode("1e999"), episode("1.5")])

    assert broken.error == "too much for one check: OverflowError"
    assert right.score == 1


def test_a_check_that_is_interrupted_answers_no_other_question():
    check = BoundedCheck("schemas", 1, doing="checking")
    endless = {"pattern": f"^{EXPONENTIAL}"}

    with pytest.raises(TimeUp), time_limit(0.02):
        check.ask(schema=endless, text=f'"{"a" * 60}!"')

    assert check.ask(schema={}, text="1") == {"wrong": None}


def test_json_nested_without_end_is_no_json(make):
    assert scores(make("json-schema", schema={}), "[" * 100_000) == [0]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "there is no file .*city.json.*"),
        ("{", "cannot be read as JSON"),
        ("[]", "a JSON Schema is an object"),
        ('{"type": "city"}', "not a JSON Schema: 'city' is not valid"),
    ],
)
def test_a_schema_file_that_is_none_says_so(make, tmp_path, content, expected):
    if content is not None:
        (tmp_path / "city.json").write_text(content)

    with pytest.raises(EnvironmentFault, match=expected):
        make("json-schema", path="city.json")


def test_a_file_outside_of_the_folder_is_refused(make, tmp_path):
    (tmp_path.parent / "outside.json").write_text("{}")

    with pytest.raises(EnvironmentFault, match=r"outside\.json is outside the environment's"):
        make("json-schema", path="../outside.json")


def test_json_schema_needs_one_place_for_its_schema():
    assert problem("json-schema") == "reward.json-schema.schema: needs `schema` or `path`"
    both = problem("json-schema", schema={}, path="x.json")
    assert both == "reward.json-schema.path: takes `schema` or `path`, not both"


# length


def test_length_is_right_inside_its_band_and_counts_what_it_is_told(make):
    adapter = make("length", min=2, max=3)

    assert scores(adapter, "a b", "a b c") == [1, 1]
    (short,) = adapter.score(TASK, [episode("a")])
    assert 0 < short.score < 1
    assert (short.success, short.metrics) == (False, {"words": 1})
    assert scores(make("length", max=3, unit="characters"), "abc") == [1]
    assert scores(make("length", max=1, unit="lines", slack=1), "a\nb") == [0.5]


bounds = st.integers(0, 1000)


@given(bounds, bounds, st.none() | st.floats(0.1, 1000), bounds)
def test_the_band_is_1_inside_and_falls_without_a_step_and_without_an_end(one, other, slack, n):
    low, high = sorted((one, other))

    here, further = band(n, low, high, slack), band(n + (1 if n >= high else -1), low, high, slack)

    assert 0 < here <= 1
    assert (here == 1) == (low <= n <= high)
    if not low <= n <= high:
        assert further < here
    assert band(high + 1e-6, low, high, slack) > 1 - 1e-4


@given(bounds, st.floats(0.5, 1000))
def test_half_the_score_is_left_at_the_slack(high, slack):
    assert band(high + slack, None, high, slack) == pytest.approx(0.5)
    assert band(high - slack, high, None, slack) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "reward.length.min: needs `min`, `max` or both"),
        ({"min": 5, "max": 4}, "reward.length.min: is above max = 4"),
        ({"max": "9"}, 'reward.length.max: expected an integer, got the string "9"'),
        ({"max": 9, "unit": "tokens"}, "reward.length.unit: expected one of"),
        ({"max": 9, "weight": "1"}, 'reward.length.weight: expected a number, got the string "1"'),
        ({"max": 9, "wieght": 1}, 'reward.length.wieght: unknown key; did you mean "weight"'),
    ],
)
def test_a_table_that_is_wrong_is_a_problem_at_its_key(settings, expected):
    assert problem("length", **settings).startswith(expected)


# format


def test_format_is_the_share_of_the_demands_that_are_met(make):
    adapter = make("format", tags=["plan", "answer"], one_line=True)

    (half,) = adapter.score(TASK, [episode("<plan>go</plan>\n<answer>4</answer>")])

    assert (half.score, half.success) == (0.5, False)
    assert half.metrics == {"tags": 1, "one_line": 0}
    assert half.reason == "not met: one_line"


@pytest.mark.parametrize(
    ("text", "met"),
    [
        ("<plan>go</plan><answer>4</answer>", True),
        ("First <plan>go</plan> and <answer>4</answer>.", True),
        ("<answer>4</answer><plan>go</plan>", False),
        ("<plan>go</plan>", False),
        ("<plan> </plan><answer>4</answer>", False),
        ("<plan>go</plan><answer>4</answer><answer>5</answer>", False),
        ("<plan>go</plan></answer>4<answer>", False),
        ("<plan>go<answer>4</plan></answer>", False),
        ("", False),
    ],
)
def test_tags_stand_once_in_order_closed_and_filled(make, text, met):
    assert scores(make("format", tags=["plan", "answer"]), text) == [float(met)]


@pytest.mark.parametrize(
    ("demand", "good", "bad"),
    [
        ({"headings": ["Summary", "Next"]}, "# Summary\nx\n## next ##\ny", "# Next\ny\n# Summary"),
        ({"headings": ["Summary"]}, "## Summary:\nx", "## Summary\n\n## Other\nx"),
        ({"json": True}, '{"a": 1}', "a: 1"),
        ({"one_line": True}, "one\n", "one\ntwo"),
        ({"one_line": True}, "one", ""),
        ({"forbidden": ["as an AI"]}, "I can", "As an AI, I cannot"),
        (
            {"tags": ["a"], "only_tags": True},
            " <a>x</a>\n",
            "So: <a></a>",
        ),
    ],
)
def test_each_demand_tells_good_from_bad(make, demand, good, bad):
    assert scores(make("format", **demand), good, bad) == [1, 0]


def test_a_hostile_heading_is_read_in_time_that_grows_with_its_length(make):
    adapter = make("format", headings=["Summary"])

    with time_limit(5):
        assert scores(adapter, "# " + "#" * 1_000_000 + "x\n") == [0]


def test_what_follows_a_tag_that_is_never_closed_stands_outside(make):
    adapter = make("format", tags=["a"], only_tags=True)

    assert scores(adapter, "<a>whatever", "whatever</a>", "<a>x</a>") == [0, 0, 1]


def test_format_without_a_demand_is_a_problem():
    assert "nothing is demanded: set one of tags, only_tags" in problem("format")
    assert problem("format", only_tags=True, json=True) == "reward.format.only_tags: needs `tags`"


# math


@pytest.fixture(scope="module")
def mathematics(tmp_path_factory):
    (config,) = read_reward_tables({"math": {}}, HOST).values()
    home = FlashHome(tmp_path_factory.mktemp("home"))
    return RECORDS["math"].make(plugin_context(home, "math", {}), config)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gold", "completion", "expected"),
    [
        ("72", "So she sold 72 clips.", 1),
        ("72", "72", 1),
        ("72", "71", 0),
        (r"\frac{1}{2}", "0.5", 1),
        (r"\frac{1}{2}", r"It is \boxed{\frac{2}{4}}.", 1),
        ("1/2", r"$\frac{1}{3}$", 0),
        ("x^2 + 1", "1 + x^2", 1),
        ("[0, 1)", "[0, 1)", 1),
        ("[0, 1)", "[0, 1]", 0),
        (r"$\{1, 2\}$", r"$\{2, 1\}$", 1),
        ("18", "#### 18", 1),
        ("1,000", "1000", 1),
        ("3", "no idea", 0),
        ("3", "", 0),
    ],
)
def test_math_compares_what_expressions_are_worth(mathematics, gold, completion, expected):
    task = Task("1", "", gold=gold)

    (reward,) = mathematics.score(task, [episode(completion)])

    assert (reward.score, reward.success) == (expected, bool(expected)), reward


@pytest.mark.slow
def test_a_gold_answer_that_is_no_expression_cannot_be_scored(mathematics):
    (reward,) = mathematics.score(Task("1", "", gold="?"), [episode("4")])

    assert reward.error == "the right answer '?' is no expression"


@pytest.mark.slow
def test_a_hostile_expression_hangs_nothing_and_the_next_one_is_scored(make):
    adapter = make("math", timeout_s=0.5)
    hostile = episode("$9^{9^{9^{9}}} + 10^{10^{10}} - 3^{3^{3^{3^{3}}}}$")

    lost, right = adapter.score(Task("1", "", gold="4"), [hostile, episode("4")])

    assert lost.score is None
    assert lost.error == "comparing the expressions took longer than 0.5 s" or (
        "too much for one check" in lost.error
    )
    assert right.score == 1


# python


def write(folder, code, name="rewards.py"):
    (folder / name).write_text(code)


ONE = episode("Paris", raw="<think>hm</think>Paris", thinking="hm")


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (
            "def score(completion, answer): return float(completion == answer)",
            Reward(1.0, success=True),
        ),
        ("def score(completion): return completion == 'Rome'", Reward(0.0)),
        ("def score(thinking, raw): return len(raw) - len(thinking)", Reward(20.0, success=True)),
        (
            "def score(completion, task, metadata): return metadata['number']",
            Reward(3.0, success=True),
        ),
        ("def score(completion, strict=True): return 0.5", Reward(0.5)),
        ("def score(completion, **rest): return len(rest)", Reward(0.0)),
        ("def score(completion): return None", None),
        (
            "def score(raw):\n    return dict(score=2, success=0, metrics={'n': 1}, reason='why')",
            Reward(2.0, metrics={"n": 1}, reason="why"),
        ),
        (
            "from flash.api import Reward\ndef score(episode): return Reward(0.25, True)",
            Reward(0.25, success=True),
        ),
        ("import numpy\ndef score(completion): return numpy.float32(0.5)", Reward(0.5)),
        (
            "import helpers\ndef score(completion): return helpers.worth()",
            Reward(9.0, success=True),
        ),
        (
            "def score(completions, task): return [1.0 for _ in completions]",
            Reward(1.0, success=True),
        ),
        (
            "class Right:\n    def __call__(self, completion): return 0.5\nscore = Right()",
            Reward(0.5),
        ),
        (
            "from functools import partial\nscore = partial(lambda raw, worth: worth, worth=0.5)",
            Reward(0.5),
        ),
        ("import sys\nsys.path = []\ndef score(completion): return 0.5", Reward(0.5)),
        ("def score(episodes): return (True for _ in episodes)", Reward(1.0, success=True)),
    ],
)
def test_a_function_is_called_with_what_it_names_and_says_a_number_or_more(
    make, tmp_path, monkeypatch, request, code, expected
):
    monkeypatch.setattr(sys, "path", list(sys.path))
    request.addfinalizer(lambda: sys.modules.pop("helpers", None))
    write(tmp_path, "def worth(): return 9", "helpers.py")
    write(tmp_path, code)

    (reward,) = make("python", path="rewards.py:score").score(TASK, [ONE])

    assert reward == expected


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("def score(completion):\n    return 1 / 0", "rewards.py:2: ZeroDivisionError: division"),
        ("def score(completion):\n    raise SystemExit(3)", "rewards.py:2: SystemExit: 3"),
        ("def score(completion): return 'good'", "rewards.py returned 'good', not a number"),
        ("def score(completion): return {'points': 1}", "returned the key 'points'; known are sc"),
        ("def score(completion): return {'score': 'a'}", "returned the score 'a'"),
        ("def score(completions): return [1]", "returned 1 scores for 2 completions"),
        (
            "import itertools\ndef score(completions): return itertools.repeat(1)",
            "returned more than 2 scores for 2 completions",
        ),
        (
            "def score(completions):\n    yield 1\n    yield 1 / 0",
            "rewards.py:3: ZeroDivisionError: division",
        ),
        ("def score(completions): return 1", "returned int, not a list of 2 scores"),
        ("def score(completions): return {'score': 1}", "returned dict, not a list of 2 scores"),
        ("def score(completions): return 1 / 0", "rewards.py:1: ZeroDivisionError: division"),
    ],
)
def test_a_function_that_fails_is_a_failed_scoring_with_file_and_line(
    make, tmp_path, code, expected
):
    write(tmp_path, code)

    rewards = make("python", path="rewards.py:score").score(TASK, [ONE, ONE])

    assert [reward.score for reward in rewards] == [None, None]
    assert all(expected in reward.error for reward in rewards), rewards[0].error


def test_one_episode_that_fails_leaves_the_others_of_its_group(make, tmp_path):
    write(tmp_path, "def score(completion): return 1 / len(completion)")

    rewards = make("python", path="rewards.py:score").score(TASK, [episode(""), episode("ab")])

    assert [reward.score for reward in rewards] == [None, 0.5]


def test_a_function_that_hangs_is_given_up_and_the_next_calls_are_made(make, tmp_path):
    write(
        tmp_path,
        "import threading\ndef score(completion):\n"
        "    return threading.Event().wait() if completion == 'hang' else 1",
    )
    adapter = make("python", path="rewards.py:score", timeout_s=0.02, concurrency=1)

    rewards = adapter.score(TASK, [episode("hang"), episode("hang"), episode("go on")])

    assert [reward.score for reward in rewards] == [None, None, 1.0]
    assert rewards[0].error == "rewards.py:score took longer than 0.02 s"


def test_calls_are_made_side_by_side_up_to_the_concurrency(make, tmp_path):
    write(
        tmp_path,
        "import threading\nBARRIER = threading.Barrier(3)\n"
        "def score(completion):\n    BARRIER.wait()\n    return 1",
    )
    adapter = make("python", path="rewards.py:score", concurrency=3)

    assert scores(adapter, *"abcdef") == [1.0] * 6


def test_with_a_concurrency_of_one_no_two_calls_meet(make, tmp_path):
    write(
        tmp_path,
        "import threading\nLOCK = threading.Lock()\n"
        "def score(completion):\n"
        "    assert LOCK.acquire(blocking=False)\n    LOCK.release()\n    return 1",
    )
    adapter = make("python", path="rewards.py:score", concurrency=1)
    found = []
    threads = [
        threading.Thread(target=lambda: found.extend(scores(adapter, *"abcd"))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert found == [1.0] * 16


@pytest.mark.parametrize(
    ("path", "code", "expected"),
    [
        ("reward.py:score", "", r"there is no file .*reward\.py; the folder has rewards\.py"),
        ("rewards.py:score", "def scor(completion): pass", "no function score; it defines scor"),
        ("rewards.py:score", "score = 3", "defines no function score; it defines no function"),
        ("rewards.py:score", "async def score(completion): pass", "score is async; write it with"),
        ("rewards.py:score", "def score(:", r"rewards\.py:1: SyntaxError: "),
        ("rewards.py:score", "x = 1\nimport no_such_thing", r"rewards\.py:2: ModuleNotFoundError"),
        ("rewards.py:score", "raise SystemExit(1)", r"rewards\.py:1: SystemExit: 1"),
        ("rewards.py:score", "def score(text): pass", "asks for `text`, which is not there; for o"),
        ("rewards.py:score", "score = int", "score does not say what it asks for"),
        ("rewards.py:score", "def score(answer): pass", "asks for nothing to score"),
        (
            "rewards.py:score",
            "def score(completion, episodes): pass",
            "asks for one episode and for a group",
        ),
        ("../rewards.py:score", "", "is outside the environment's folder"),
    ],
)
def test_a_function_that_cannot_be_called_is_said_when_it_is_loaded(
    make, tmp_path, path, code, expected
):
    write(tmp_path, code)

    with pytest.raises(EnvironmentFault) as caught:
        make("python", path=path)
    assert re.search(expected, f"{caught.value.message}; {caught.value.hint}"), caught.value


def test_what_other_code_imports_is_not_changed(make, tmp_path):
    before = list(sys.path)
    write(tmp_path, "import beside\ndef score(completion): return beside.ONE")
    write(tmp_path, "ONE = 1", "beside.py")

    make("python", path="rewards.py:score")

    assert sys.path == before


def test_a_path_without_a_function_is_a_problem_of_its_setting():
    expected = 'reward.python.path: must be a file and a function, as in "rewards.py:score"'
    assert problem("python", path="rewards.py") == expected
