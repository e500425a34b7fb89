"""How episodes of the other process are found again by their messages."""

from __future__ import annotations

from concurrent.futures import Future

import pytest
from flash_env_verifiers import environment as module
from flash_env_verifiers.environment import VerifiersEnvironment
from flash_env_verifiers.params import Params

from flash.api import EnvironmentFault, Episode, Task

TASK = Task(id="a", input="a?", data=("train", 0), metadata={"answer": 4})


class Process:
    """Stands in for the other process: echoes twice, then the episode is over."""

    def __init__(self, score=1.0):
        self.open = {}
        self.begun = 0
        self.dropped = []
        self.score = score
        self.salt = ""

    def call(self, what, **arguments):
        return self.answer(self.ask(what, **arguments))

    def ask(self, what, **arguments):
        future = Future()
        try:
            future.set_result(getattr(self, f"_{what}")(**arguments))
        except EnvironmentFault as fault:
            future.set_exception(fault)
        return future

    def answer(self, future):
        return future.result()

    def _start(self, split, index):
        self.begun += 1
        self.open[str(self.begun)] = []
        return {"episode": str(self.begun), "messages": [{"role": "user", "content": "a?"}]}

    def _step(self, episode, text):
        said = self.open[episode]
        said.append(text)
        over = len(said) == 2
        echo = [] if over else [{"role": "user", "content": f"{text}{self.salt}?"}]
        return {"messages": echo, "over": over}

    def _score(self, episode):
        said = self.open.pop(episode)
        return {"score": self.score, "metrics": {"turns": len(said)}, "reason": "+".join(said)}

    def _drop(self, episode):
        del self.open[episode]
        self.dropped.append(episode)
        return {}


@pytest.fixture
def process():
    return Process()


@pytest.fixture
def environment(process):
    return VerifiersEnvironment(process, Params(success_at=1.0), max_turns=2)


def play(environment, *texts):
    messages = environment.start(TASK)
    for text in texts:
        messages.append({"role": "assistant", "content": text})
        messages += environment.step(TASK, messages, text).messages
    return Episode(tuple(messages), texts[-1])


def test_episodes_that_are_open_side_by_side_keep_their_own_state(environment, process):
    one, other = play(environment, "x", "y"), play(environment, "x", "z")

    rewards = environment.score(TASK, [other, one])

    assert [reward.reason for reward in rewards] == ["x+z", "x+y"]
    assert (process.begun, process.open) == (2, {})


def test_what_was_scored_is_played_anew_when_it_is_asked_for_again(environment, process):
    episode = play(environment, "x", "y")

    assert environment.score(TASK, [episode]) == environment.score(TASK, [episode])
    assert process.begun == 2


def test_a_step_that_is_taken_twice_is_played_anew_too(environment, process):
    opening = environment.start(TASK)
    asked = [*opening, {"role": "assistant", "content": "x"}]

    assert environment.step(TASK, asked, "x") == environment.step(TASK, asked, "x")
    assert process.begun == 2


def test_an_environment_that_answers_otherwise_the_second_time_is_a_reason(environment, process):
    episode = play(environment, "x", "y")
    environment.score(TASK, [episode])
    process.salt = "!"

    (reward,) = environment.score(TASK, [episode])

    assert reward.score is None
    assert "goes another way when it hears the same answers again" in reward.error
    assert process.dropped == ["2"]


def test_the_oldest_of_too_many_open_episodes_is_let_go(environment, process, monkeypatch):
    monkeypatch.setattr(module, "MOST_OPEN", 2)
    first, *_ = [play(environment, "x", text) for text in "abc"]

    assert process.dropped == ["1"]
    assert environment.score(TASK, [first])[0].reason == "x+a"


def test_a_reward_that_is_no_number_is_no_reward(environment, process):
    process.score = float("nan")
    (reward,) = environment.score(TASK, [play(environment, "x", "y")])

    assert (reward.score, reward.error) == (None, "the reward is nan, not a number")


def test_success_is_a_reward_that_reaches_the_params_bound(process):
    environment = VerifiersEnvironment(process, Params(success_at=1.5), max_turns=2)

    assert not environment.score(TASK, [play(environment, "x", "y")])[0].success


def test_gold_answers_come_from_the_field_that_the_params_name(process):
    def target_of(field):
        return VerifiersEnvironment(process, Params(target=field), max_turns=2).target(TASK)

    assert target_of("answer") == [{"role": "assistant", "content": "4"}]
    assert target_of("") is None
    with pytest.raises(EnvironmentFault, match="task a has no field anwer"):
        target_of("anwer")
