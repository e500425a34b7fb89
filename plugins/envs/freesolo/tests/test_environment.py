"""An SDK environment behind Flash's contract: rows, interaction, gold, scoring, suites."""

from __future__ import annotations

import math
import re
import threading
from textwrap import dedent

import pytest
from flash_env_freesolo.loader import FreesoloLoader

from flash.api import Environment, EnvironmentFault, Episode, Reward

SINGLE = """
    from freesolo.environments import EnvironmentSingleTurn, RewardMetric, RewardResult

    class Env(EnvironmentSingleTurn):
        def build_prompt_messages(self, example, prompt_text):
            return [{"role": "user", "content": example.input}]

        def score_response(self, example, response_text):
            right = response_text == example.output
            return RewardResult(
                float(right), success=right, reason="compared", metadata={"seen": response_text},
                metrics=(
                    RewardMetric("exact", score=float(right)),
                    RewardMetric("ok", success=right),
                ),
            )

    def load_environment(**params):
        env = Env()
        env.params = params
        return env
"""

MULTI = """
    from freesolo.environments import EnvironmentMultiTurn, EnvironmentStepResult, RewardResult

    class Env(EnvironmentMultiTurn):
        def start_episode(self, example, prompt_text):
            return [{"role": "user", "content": "guess 0-9"}]

        def max_episode_turns(self, example):
            return 3

        def step_episode(self, example, messages, assistant_response):
            assert messages[-1]["content"] == assistant_response
            if assistant_response == example.output:
                return EnvironmentStepResult(True, final_response_text="won", metadata={"n": 1})
            return EnvironmentStepResult(
                done=False, messages=({"role": "user", "content": "no"},)
            )

        def score_episode(self, example, episode):
            turns = [turn.content for turn in episode.turns if turn.role == "assistant"]
            return RewardResult(1.0 / len(turns), reason=episode.response_text, success=True)

    def load_environment():
        return Env()
"""


class Context:
    """The part of a plugin's context that loading uses."""

    def __init__(self):
        self.notices = []
        self.log = self

    def warning(self, message):
        self.notices.append(message)


@pytest.fixture
def build(tmp_path):
    """Write an environment's files and load it."""

    def build(source, files=None, *, split="train", context=None, **params):
        files = (
            {"dataset/train.jsonl": '{"input": "2+2", "output": "4"}'} if files is None else files
        )
        for path, text in {"environment.py": dedent(source), **files}.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)
        return FreesoloLoader(context or Context()).load(tmp_path, params=params, split=split)

    return build


def answer(text, **more):
    return Episode(messages=({"role": "assistant", "content": text},), completion=text, **more)


def test_it_is_an_environment(build):
    assert isinstance(build(SINGLE), Environment)


def test_rows_become_tasks_with_positional_ids(build):
    rows = '{"input": "a", "id": "mine", "metadata": {"k": 1}}\n\n"b"\n{"input": {"x": 1}}\n'
    tasks = build(SINGLE, {"dataset/train.jsonl": rows}).tasks("train")

    assert [task.id for task in tasks] == ["example_000000", "example_000001", "example_000002"]
    assert [task.input for task in tasks] == ["a", "b", '{\n  "x": 1\n}']
    assert tasks[0].metadata == {"k": 1}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("train.jsonl", '{"input": "a"}\n{"input": "b"}'),
        ("train.json", '["a", {"input": "b"}]'),
        ("train.json", '{"data": ["a", "b"]}'),
        ("train.csv", "input,output\na,x\nb,y\n"),
        ("train.txt", "a\n\n  b\n"),
    ],
)
def test_every_format_is_read(build, name, text):
    tasks = build(SINGLE, {f"dataset/{name}": text}).tasks("train")

    assert [task.input for task in tasks] == ["a", "b"]


def test_a_line_separator_inside_a_json_string_does_not_end_the_row(build):
    (task,) = build(SINGLE, {"dataset/train.jsonl": '{"input": "a\u2028b"}'}).tasks("train")

    assert task.input == "a\u2028b"


def test_splits_are_listed_with_train_first(build):
    files = {"dataset/eval.jsonl": '"a"', "dataset/train.csv": "input\na", "dataset/README.txt": ""}

    assert build(SINGLE, files).splits() == ("train", "eval")


def test_a_missing_split_is_an_error_that_lists_the_others(build):
    environment = build(SINGLE)

    with pytest.raises(EnvironmentFault, match='no split "test"; there is train') as caught:
        environment.tasks("test")
    assert "dataset/test.jsonl" in caught.value.hint


def test_loading_for_a_missing_split_fails_at_once(build):
    with pytest.raises(EnvironmentFault, match='no split "test"'):
        build(SINGLE, split="test")


def test_the_old_folder_is_read_with_one_notice(build):
    context = Context()
    environment = build(SINGLE, {"datasets/train.jsonl": '"a"\n"b"'}, context=context)

    assert len(environment.tasks("train")) == 2
    assert context.notices == ["datasets/ is an old spelling; rename it to dataset/"]


def test_of_two_files_of_one_split_the_second_is_named_as_not_read(build):
    context = Context()
    files = {"dataset/train.jsonl": '"a"', "dataset/train.csv": "input\nb\nc"}
    environment = build(SINGLE, files, context=context)

    assert [task.input for task in environment.tasks("train")] == ["a"]
    assert context.notices == [
        "dataset/train.csv is not read: dataset/train.jsonl is the same split"
    ]


@pytest.mark.parametrize(
    "rows",
    [
        '["a", {"input": "b", "output": "y"}]',
        'load_dataset([{"input": "a"}, {"input": "b"}])',
        'load_dataset([{"input": "a"}, {"input": "b"}]).examples',
        '({"input": text} for text in "ab")',
        '[TaskExample(record={}, input="a", id="mine"), "b"]',
    ],
)
@pytest.mark.parametrize("attribute", ["dataset", "examples"])
def test_rows_in_code_are_the_training_split_where_no_file_is(build, rows, attribute):
    source = dedent(SINGLE) + dedent(f"""
        from freesolo.datasets import TaskExample, load_dataset
        def load_environment():
            env = Env()
            env.{attribute} = {rows}
            return env
    """)
    environment = build(source, {})

    assert [task.input for task in environment.tasks("train")] == ["a", "b"]
    assert [task.data.id for task in environment.tasks("train")] == [
        "example_000000",
        "example_000001",
    ]
    assert environment.splits() == ("train",)
    with pytest.raises(EnvironmentFault, match='no split "test"'):
        environment.tasks("test")


def test_rows_in_code_belong_to_the_split_that_the_factory_was_given(build):
    source = dedent(SINGLE) + dedent("""
        def load_environment(split="train"):
            env = Env()
            env.dataset = [split + " row"]
            return env
    """)

    assert build(source, {}, split="test").tasks("test")[0].input == "test row"


def test_records_in_the_params_replace_the_packaged_rows(build):
    environment = build(SINGLE, records=["x", {"input": "y"}])

    assert [task.input for task in environment.tasks("train")] == ["x", "y"]


@pytest.mark.parametrize("path", ["other/rows.jsonl", "other"])
def test_dataset_path_names_a_file_or_a_folder(build, path):
    files = {"dataset/train.jsonl": '"a"', "other/rows.jsonl": '"x"', "other/train.jsonl": '"x"'}

    assert build(SINGLE, files, dataset_path=path).tasks("train")[0].input == "x"


def test_a_folder_of_the_params_has_all_splits_and_the_packaged_one_none(build):
    files = {
        "dataset/train.jsonl": '"a"',
        "dataset/eval.jsonl": '"a"',
        "dataset/dev.csv": "input",
        "other/train.jsonl": '"x"',
        "other/eval.txt": "y\nz",
    }
    environment = build(SINGLE, files, dataset_path="other")

    assert environment.splits() == ("train", "eval")
    assert [task.input for task in environment.tasks("eval")] == ["y", "z"]
    with pytest.raises(EnvironmentFault, match='no split "dev"; there is train, eval') as caught:
        environment.tasks("dev")
    assert "add other/dev.jsonl" in caught.value.hint


def test_rows_in_code_do_not_stand_in_for_a_split_that_the_named_folder_lacks(build, tmp_path):
    source = dedent(SINGLE) + "\nEnv.examples = ['a']\n"
    files = {"dataset/train.jsonl": '"a"', "other/eval.jsonl": '"x"'}

    with pytest.raises(EnvironmentFault, match='no split "train"; there is eval'):
        build(source, files, dataset_path="other")
    (problem,) = FreesoloLoader(Context()).check(
        tmp_path, split="train", params={"dataset_path": "other"}
    )
    assert 'no split "train"; there is eval' in problem.message
    assert "other/train.jsonl" in problem.hint


def test_the_factory_gets_paths_it_can_open(build, tmp_path):
    environment = build(SINGLE, dataset_path="dataset/train.jsonl")

    assert environment._sdk.params == {"dataset_path": str(tmp_path / "dataset" / "train.jsonl")}


@pytest.mark.parametrize("path", ["../secrets.jsonl", "/etc/passwd"])
def test_dataset_path_stays_in_the_folder(build, path):
    with pytest.raises(EnvironmentFault, match="outside"):
        build(SINGLE, dataset_path=path)


@pytest.mark.parametrize(
    ("split", "params", "count"),
    [
        ("train", {}, 2),
        ("test", {}, 1),
        ("train", {"records": ["a", "b", "c"]}, 3),
        ("train", {"dataset_path": "dataset/test.csv"}, 1),
        ("test", {"dataset_path": "dataset"}, 1),
        ("dev", {}, None),
    ],
)
def test_rows_are_counted_without_running_code(tmp_path, split, params, count):
    (tmp_path / "environment.py").write_text("raise SystemExit")
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "train.jsonl").write_text('"a"\n"b"\n')
    (tmp_path / "dataset" / "test.csv").write_text("input\na\n")

    assert FreesoloLoader(Context()).rows(tmp_path, split=split, params=params) == count


def test_params_reach_the_factory(build):
    environment = build(SINGLE, level=3, contract_text="be brief")

    assert environment._sdk.params == {"level": 3, "contract_text": "be brief"}


@pytest.mark.parametrize(
    ("files", "params"),
    [
        ({}, {"contract_text": "be brief"}),
        ({"TRAINING_CONTRACT.md": "be brief\n"}, {}),
        ({"docs/rules.md": "be brief"}, {"contract_path": "docs/rules.md"}),
    ],
)
def test_the_contract_becomes_the_system_message(build, files, params):
    environment = build(SINGLE, {"dataset/train.jsonl": '"a"', **files}, **params)

    assert environment.start(environment.tasks("train")[0]) == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "a"},
    ]


def test_a_single_turn_episode(build):
    environment = build(SINGLE)
    (task,) = environment.tasks("train")
    opening = environment.start(task)
    step = environment.step(task, [*opening, {"role": "assistant", "content": "4"}], "4")

    assert opening == [{"role": "user", "content": "2+2"}]
    assert environment.max_turns(task) == 1
    assert (step.done, step.messages, step.final_text) == (True, (), None)
    assert environment.target(task) == [{"role": "assistant", "content": "4"}]


def test_a_multi_turn_episode(build):
    environment = build(MULTI, {"dataset/train.jsonl": '{"input": "x", "output": "7"}'})
    (task,) = environment.tasks("train")
    messages = environment.start(task)
    for action in ("3", "7"):
        messages.append({"role": "assistant", "content": action})
        step = environment.step(task, messages, action)
        messages += step.messages
    (reward,) = environment.score(task, [Episode(tuple(messages), step.final_text)])

    assert environment.max_turns(task) == 3
    assert step.done
    assert step.metadata == {"n": 1}
    assert (reward.score, reward.reason) == (0.5, "won")


def test_multi_turn_targets_keep_tool_calls(build):
    gold = (
        '[{"role": "assistant", "content": null, "tool_calls": [{"id": "1"}]},'
        ' {"role": "tool", "content": "4", "tool_call_id": "1"},'
        ' {"role": "assistant", "content": "4"}]'
    )
    rows = f'{{"input": "2+2", "output": {gold}, "tools": [{{"type": "function"}}]}}'
    environment = build(SINGLE, {"dataset/train.jsonl": rows})
    (task,) = environment.tasks("train")
    target = environment.target(task)

    assert [message["role"] for message in target] == ["assistant", "tool", "assistant"]
    assert target[0]["tool_calls"] == [{"id": "1"}]
    assert environment.tools(task) == [{"type": "function"}]


def test_a_row_without_output_has_no_target_and_no_tools(build):
    environment = build(SINGLE, {"dataset/train.jsonl": '"a"'})
    (task,) = environment.tasks("train")

    assert environment.target(task) is None
    assert environment.tools(task) is None


def test_an_own_sft_completion_is_used(build):
    source = dedent(SINGLE) + dedent("""
        def gold(self, example):
            return [{"role": "assistant", "content": "made"}]
        Env.sft_completion = gold
    """)
    environment = build(source, {"dataset/train.jsonl": '"a"'})

    assert environment.target(environment.tasks("train")[0])[0]["content"] == "made"


def test_scores_metrics_success_and_metadata_come_through(build):
    environment = build(SINGLE)
    rewards = environment.score(environment.tasks("train")[0], [answer("4"), answer("5")])

    assert rewards == [
        Reward(
            float(right),
            success=right,
            metrics={"exact": float(right), "ok": float(right)},
            reason="compared",
            metadata={"seen": text},
        )
        for text, right in (("4", True), ("5", False))
    ]


def test_scorers_see_the_thinking_beside_the_graded_text(build):
    source = SINGLE.replace('"compared"', '"|".join((response_text.thinking, response_text.raw))')
    environment = build(source)
    episode = answer("4", thinking="add", raw="<think>add</think>4")
    (reward,) = environment.score(environment.tasks("train")[0], [episode])

    assert reward.score == 1.0
    assert reward.reason == "add|<think>add</think>4"


FAILING = """
    from freesolo.environments import EnvironmentSingleTurn, RewardMetric, RewardResult

    class Env(EnvironmentSingleTurn):
        def build_prompt_messages(self, example, prompt_text):
            return [{"role": "user", "content": example.input}]

        def score_response(self, example, response_text):
            if response_text == "raise":
                raise ValueError("no verdict")
            if response_text == "exit":
                raise SystemExit(3)
            if response_text == "nan":
                return RewardResult(float("nan"))
            if response_text == "none":
                return RewardResult(None)
            if response_text == "error":
                return RewardResult(0.0, error="judge is down", reason="HTTP 503")
            if response_text == "float":
                return 0.5
            return RewardResult(1.0, metrics=(RewardMetric("odd", value="x"),))

    def load_environment():
        return Env()
"""


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("raise", r"environment\.py:10: ValueError: no verdict"),
        ("exit", r"environment\.py:12: SystemExit: 3"),
        ("nan", r"environment\.py:8: the score is nan"),
        ("none", r"environment\.py:8: the score is None"),
        ("error", "^judge is down$"),
        ("float", r"environment\.py:8: returned float, not RewardResult"),
    ],
)
@pytest.mark.parametrize("concurrency", [1, 8])
def test_a_failed_scoring_is_data_and_leaves_its_neighbours_alone(build, text, error, concurrency):
    environment = build(FAILING + f"\n    Env.max_score_concurrency = {concurrency}\n")
    rewards = environment.score(environment.tasks("train")[0], [answer("a"), answer(text)])

    assert rewards[0].score == 1.0
    assert rewards[1].score is None
    assert not rewards[1].success
    assert re.search(error, rewards[1].error)


def test_a_metric_without_a_number_is_named_not_dropped(build):
    environment = build(FAILING)
    (reward,) = environment.score(environment.tasks("train")[0], [answer("a")])

    assert reward.metrics == {}
    assert reward.metadata == {"metrics_without_number": ["odd"]}


BATCH = """
    from freesolo.environments import EnvironmentSingleTurn, RewardResult

    class Env(EnvironmentSingleTurn):
        def build_prompt_messages(self, example, prompt_text):
            return [{"role": "user", "content": example.input}]
        def score_response(self, example, response_text):
            raise AssertionError("the batch hook scores")
        def score_responses(self, example, response_texts):
            if "short" in response_texts:
                return []
            if "raise" in response_texts:
                raise RuntimeError("batch failed")
            return [RewardResult(float(len(response_texts))) for _ in response_texts]

    def load_environment():
        return Env()
"""


def test_an_own_batch_hook_gets_the_whole_batch(build):
    environment = build(BATCH)
    rewards = environment.score(environment.tasks("train")[0], [answer("a"), answer("b")])

    assert [reward.score for reward in rewards] == [2.0, 2.0]


@pytest.mark.parametrize(
    ("text", "error"), [("short", "returned 0 results for 2"), ("raise", "batch failed")]
)
def test_a_batch_that_fails_fails_for_each_episode(build, text, error):
    environment = build(BATCH)
    rewards = environment.score(environment.tasks("train")[0], [answer("a"), answer(text)])

    assert [reward.score for reward in rewards] == [None, None]
    assert all(error in reward.error for reward in rewards)


CONCURRENT = """
    import threading
    from freesolo.environments import EnvironmentSingleTurn, RewardResult

    class Env(EnvironmentSingleTurn):
        max_score_concurrency = 3
        def build_prompt_messages(self, example, prompt_text):
            return [{"role": "user", "content": example.input}]
        def score_response(self, example, response_text):
            meet.wait(timeout=20)
            return RewardResult(1.0, reason=threading.current_thread().name)

    meet = threading.Barrier(3)
    def load_environment():
        return Env()
"""


def test_scoring_runs_at_the_environments_own_concurrency(build):
    environment = build(CONCURRENT)
    rewards = environment.score(environment.tasks("train")[0], [answer("a")] * 6)

    assert environment.max_score_concurrency == 3
    assert [reward.error for reward in rewards] == [None] * 6
    assert len({reward.reason for reward in rewards}) == 3


def test_a_scorer_that_is_not_thread_safe_stays_on_the_callers_thread(build):
    source = CONCURRENT.replace("meet.wait(timeout=20)", "pass") + (
        "\n    Env.reward_thread_safe = False\n"
    )
    environment = build(source)
    rewards = environment.score(environment.tasks("train")[0], [answer("a")] * 3)

    assert environment.max_score_concurrency == 1
    assert {reward.reason for reward in rewards} == {threading.current_thread().name}


EVALUATIONS = """
from environment import load_environment
from freesolo.datasets import load_dataset
from freesolo.environments import EnvironmentEvalSuite, EvalSuite, RewardResult

CASES = load_dataset([{"input": "1+1", "output": "2"}, {"input": "3+1", "output": "4"}]).examples

class Short(EvalSuite):
    def cases(self):
        return CASES[:1]

    def score(self, case, response_text):
        if response_text == "raise":
            raise RuntimeError("no grade")
        return RewardResult(1.0 / len(response_text), reason=response_text.thinking)

def load_evaluations(environment=None, level=0):
    scorer = environment or load_environment()
    name = f"held out {level}"
    return [EnvironmentEvalSuite(scorer, CASES, name=name), Short()]
"""


def test_evaluation_suites_are_environments_of_one_split(build):
    files = {"dataset/train.jsonl": '"a"', "evaluations.py": EVALUATIONS}
    suites = build(SINGLE, files, level=7).suites()

    assert isinstance(suites["held out 7"], Environment)
    assert {name: suite.splits() for name, suite in suites.items()} == {
        "held out 7": ("cases",),
        "Short": ("cases",),
    }
    suite = suites["held out 7"]
    first, second = suite.tasks("cases")
    assert (first.input, second.input) == ("1+1", "3+1")
    assert suite.start(second) == [{"role": "user", "content": "3+1"}]
    assert suite.target(first) == [{"role": "assistant", "content": "2"}]
    assert suite.step(first, [], "2").done
    (right, wrong) = suite.score(first, [answer("2"), answer("3")])
    assert (right.score, right.success, right.metrics) == (1.0, True, {"exact": 1.0, "ok": 1.0})
    assert (wrong.score, wrong.success) == (0.0, False)


def test_a_suite_grades_in_its_own_way_and_a_failure_is_data(build):
    files = {"dataset/train.jsonl": '"a"', "evaluations.py": EVALUATIONS}
    suite = build(SINGLE, files).suites()["Short"]
    (task,) = suite.tasks("cases")
    episode = Episode((), "four", thinking="hm")

    graded, failed = suite.score(task, [episode, answer("raise")])

    assert (graded.score, graded.reason) == (0.25, "hm")
    assert failed.score is None
    assert re.fullmatch(r".*evaluations\.py:14: RuntimeError: no grade", failed.error)


def test_without_evaluations_there_are_no_suites(build):
    assert build(SINGLE).suites() == {}


SUITE = "from freesolo.environments import EnvironmentEvalSuite as S"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("EVALUATIONS = [1]", "int is not an EvalSuite"),
        ("x = 1", "defines neither load_evaluations nor EVALUATIONS"),
        ("1 / 0", r"evaluations\.py:1: ZeroDivisionError"),
        (
            f"{SUITE}\ndef load_evaluations(environment): return [S(environment, [])] * 2",
            'two suites are called "EnvironmentEvalSuite"',
        ),
    ],
)
def test_evaluations_that_are_no_suites_are_refused(build, source, said):
    files = {"dataset/train.jsonl": '"a"', "evaluations.py": source}

    with pytest.raises(EnvironmentFault, match=said):
        build(SINGLE, files).suites()


def test_numbers_of_other_libraries_are_scores(build):
    import numpy as np

    source = FAILING.replace(
        "return 0.5", "import numpy\n                return RewardResult(numpy.float32(0.5))"
    )
    environment = build(source)
    (reward,) = environment.score(environment.tasks("train")[0], [answer("float")])

    assert math.isclose(reward.score, float(np.float32(0.5)))
    assert type(reward.score) is float
