"""Each way in which an environment's hooks go wrong is one finding, and the right one."""

import pytest

from flash.errors import EnvironmentFault
from flash.values import Step


def test_a_sound_environment_has_no_finding(findings, examine, sound, guessing):
    assert findings(sound) == findings(guessing) == []
    assert examine(sound)["verdict"] == "PASS"


def test_every_finding_says_what_to_do(examine, sound):
    class Broken(sound):
        def start(self, task):
            raise KeyError("question")

    found = examine(Broken)

    assert found["verdict"] == "FAIL"
    assert found["findings"] == [
        {
            "level": "fail",
            "check": "start",
            "message": "6 of 6 tasks do not start (train-0, train-4, train-8 and 3 more): "
            "the environment's start raised KeyError: 'question'",
            "fix": "correct the hook that is named; it is called for every episode of training",
        }
    ]


def test_an_environment_that_cannot_be_loaded_is_a_finding(examine):
    def load():
        raise EnvironmentFault("environment.py:3: NameError: name 'x'", hint="define it")

    found = examine(load)

    assert found["verdict"] == "FAIL"
    assert [(one["check"], one["fix"]) for one in found["findings"]] == [("load", "define it")]


@pytest.mark.parametrize(
    "opening",
    [
        [{"role": "human", "content": "which?"}],
        [{"role": "user", "content": "which?"}, {"role": "assistant", "content": "I"}],
        [{"role": "user", "content": "which?"}, {"role": "system", "content": "be brief"}],
        [{"role": "user", "content": ""}],
    ],
)
def test_an_opening_that_asks_nothing(findings, sound, opening):
    class Environment(sound):
        def start(self, task):
            return [{**message, "task": task.id} for message in opening]

    assert findings(Environment) == [("fail", "messages")]


def test_a_prompt_without_the_row(findings, sound):
    class Environment(sound):
        def start(self, task):
            return [{"role": "user", "content": "which two words?"}]

    assert findings(Environment) == [("fail", "prompts")]


class TestTargets:
    def test_a_hook_that_raises(self, findings, sound):
        class Environment(sound):
            def target(self, task):
                raise EnvironmentFault("environment.py:9: KeyError: 'output'")

        assert findings(Environment) == [("fail", "targets")]

    def test_none_at_all_is_worse_for_sft(self, findings, sound):
        class Environment(sound):
            def target(self, task):
                return None

        assert findings(Environment) == [("warn", "targets")]
        assert findings(Environment, rewarded=False) == [("fail", "targets")]

    def test_some_missing_matters_to_sft_alone(self, findings, sound):
        class Environment(sound):
            def target(self, task):
                return super().target(task) if task.data else None

        assert findings(Environment) == []
        assert findings(Environment, rewarded=False) == [("fail", "targets")]

    def test_tool_calls_are_noted(self, examine, sound):
        class Environment(sound):
            def target(self, task):
                call = {"function": {"name": "look_up", "arguments": "{}"}}
                return [{"role": "assistant", "content": None, "tool_calls": [call]}]

        found = examine(Environment)

        assert found["verdict"] == "PASS"
        assert [(one["level"], one["check"]) for one in found["findings"]] == [("note", "targets")]

    def test_a_blank_one(self, findings, sound):
        class Environment(sound):
            def target(self, task):
                return super().target(task) if task.data else [{"role": "assistant", "content": ""}]

        assert findings(Environment) == [("warn", "targets")]


def test_an_episode_that_breaks_off(examine, guessing):
    class Environment(guessing):
        def step(self, task, messages, action):
            if not action:
                raise ValueError("nothing was said")
            return super().step(task, messages, action)

    (found,) = examine(Environment)["findings"]

    assert (found["level"], found["check"]) == ("fail", "episodes")
    assert (
        "when the model said nothing: the environment's step raised ValueError" in found["message"]
    )


def test_an_episode_without_an_end(findings, guessing):
    class Environment(guessing):
        def max_turns(self, task):
            return 10**6

        def step(self, task, messages, action):
            done = self.said(messages) == self.gold_words(task)
            question = () if done else ({"role": "user", "content": "next?"},)
            return Step(done=done, messages=question)

    assert findings(Environment) == [("fail", "endless")]


def test_a_gold_conversation_that_is_not_the_one_held(findings, guessing):
    class Environment(guessing):
        def max_turns(self, task):
            return 2

        def rate(self, task, said):
            return super().rate(task, [*said, *self.gold_words(task)[2:]][:3])

    assert findings(Environment) == [("warn", "gold-turns")]


def test_an_opening_by_chance(findings, sound):
    class Environment(sound):
        count = 0

        def start(self, task):
            self.count += 1
            return [{"role": "user", "content": f"{task.input} (number {self.count})"}]

    assert findings(Environment) == [("warn", "determinism")]


def test_episodes_that_share_their_state(findings, guessing):
    class Environment(guessing):
        turn = 0

        def step(self, task, messages, action):
            self.turn += 1
            step = super().step(task, messages, action)
            said = [{**one, "content": f"question {self.turn}?"} for one in step.messages]
            return Step(step.done, messages=tuple(said))

    assert findings(Environment) == [("fail", "shared-state")]
