from __future__ import annotations

import math
import threading
import time

import pytest

from flash.episodes import Played
from flash.errors import EnvironmentFault
from flash.scoring import Scoring, score
from flash.values import Episode, Reward, Task

WAIT_S = 30
"""Longer than anything here takes: a wait that runs into it is a failure."""


def played(*completions):
    """Episodes of tasks of their own; one that is None could not be played."""
    return [
        Played(Task(str(place), "in"), None, error="no episode")
        if said is None
        else Played(Task(str(place), "in"), Episode((), said))
        for place, said in enumerate(completions)
    ]


def group(*completions, task="0"):
    """Episodes of one task."""
    return [Played(Task(task, "in"), Episode((), said)) for said in completions]


class Scorer:
    """Scores a group by what `answer` makes of its completions, and notes the calls."""

    def __init__(self, answer=lambda said: Reward(float(said)), *, workers=1):
        self.max_score_concurrency = workers
        self.answer = answer
        self.calls = []

    def score(self, task, episodes):
        self.calls.append((task.id, [episode.completion for episode in episodes]))
        return [self.answer(episode.completion) for episode in episodes]


class Whole(Scorer):
    """Answers a whole group."""

    def score(self, task, episodes):
        return self.answer(episodes)


class Meeting:
    """Scores only when as many groups are being scored at once as it allows."""

    def __init__(self, workers):
        self.max_score_concurrency = workers
        self.threads = set()
        self._all_here = threading.Barrier(workers)

    def score(self, task, episodes):
        self._all_here.wait(WAIT_S)
        self.threads.add(threading.get_ident())
        return [Reward(float(task.id)) for _ in episodes]


@pytest.mark.parametrize("workers", [1, 3])
def test_as_many_groups_are_scored_at_a_time_as_the_environment_allows(workers):
    environment = Meeting(workers)

    rewards = score(environment, played(*"abcdef"))

    assert [reward.score for reward in rewards] == [0, 1, 2, 3, 4, 5]
    if workers == 1:
        assert environment.threads == {threading.get_ident()}
    else:
        assert threading.get_ident() not in environment.threads


@pytest.mark.parametrize("workers", [1, 4])
def test_a_group_is_one_call_and_rewards_come_back_in_order(workers):
    environment = Scorer(workers=workers)
    scoring = Scoring(environment, group_size=2)
    episodes = [*group("1", "2"), *group("3", "4", task="1"), *group("5", task="2")]

    for place in (3, 0, 4, 2, 1):
        scoring.over(place, episodes[place])

    assert [reward.score for reward in scoring.rewards()] == [1, 2, 3, 4, 5]
    assert sorted(environment.calls) == [("0", ["1", "2"]), ("1", ["3", "4"]), ("2", ["5"])]


def test_a_group_is_scored_while_others_are_still_being_sampled():
    scored = threading.Event()
    environment = Scorer(lambda said: scored.set() or Reward(float(said)), workers=2)
    scoring = Scoring(environment, group_size=2)
    episodes = [*group("1", "2"), *group("3", "4", task="1")]

    scoring.over(0, episodes[0])
    assert environment.calls == []
    scoring.over(1, episodes[1])
    assert scored.wait(WAIT_S), "the first group waits for the second"

    scoring.over(2, episodes[2])
    scoring.over(3, episodes[3])
    assert [reward.score for reward in scoring.rewards()] == [1, 2, 3, 4]


def test_64_completions_of_half_a_second_take_less_than_two_at_32_way_concurrency():
    environment = Scorer(lambda said: time.sleep(0.5) or Reward(float(said)), workers=32)
    started = time.monotonic()

    rewards = score(environment, played(*["1"] * 64))

    assert time.monotonic() - started < 2
    assert [reward.score for reward in rewards] == [1] * 64


def test_a_task_without_an_episode_has_its_reason_and_is_not_scored():
    environment = Scorer()

    rewards = score(environment, played("1", None, None, "2"), group_size=2)

    assert [reward.score for reward in rewards] == [1, None, None, 2]
    assert [reward.error for reward in rewards] == [None, "no episode", "no episode", None]
    assert [said for _, said in environment.calls] == [["1"], ["2"]]


def hang(said):
    """Take far too long to score "hang", and catch whatever wants to stop it."""
    if said == "hang":
        try:
            time.sleep(WAIT_S * 10)
        except Exception:  # noqa: BLE001 - as careless scorers do
            return Reward(0.0)
    return Reward(1.0)


def test_a_scorer_that_hangs_is_interrupted_and_the_others_are_scored():
    rewards = score(Scorer(hang), played("a", "hang", "b"), timeout_s=0.05)

    assert [reward.score for reward in rewards] == [1, None, 1]
    assert rewards[1].error == "the environment's score took longer than 0.05 s"


def test_threads_that_hang_are_left_behind_and_the_others_are_scored():
    release = threading.Event()
    environment = Scorer(
        lambda said: (said == "hang" and release.wait(WAIT_S)) or Reward(1.0), workers=2
    )
    try:
        rewards = score(environment, played("hang", "hang", "a", "b", "hang", "c"), timeout_s=0.2)
    finally:
        release.set()

    assert [reward.score for reward in rewards] == [None, None, 1, 1, None, 1]
    assert rewards[0].error == "the environment's score took longer than 0.2 s"


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("raised", "error"),
    [
        (EnvironmentFault("scorer.py:3: no"), "scorer.py:3: no"),
        (ValueError("no"), "the environment's score raised ValueError: no"),
        (SystemExit(2), "the environment's score raised SystemExit: 2"),
    ],
)
def test_a_scorer_that_raises_fails_its_own_group(raised, error, workers):
    def answer(said):
        if said == "bad":
            raise raised
        return Reward(1.0)

    episodes = [*group("a", "b"), *group("c", "bad", task="1")]

    rewards = score(Scorer(answer, workers=workers), episodes, group_size=2)

    assert [reward.score for reward in rewards] == [1, 1, None, None]
    assert [reward.error for reward in rewards[2:]] == [error, error]


@pytest.mark.parametrize("workers", [1, 2])
def test_running_out_of_memory_is_no_fault_of_the_scorer(workers):
    def answer(_said):
        raise MemoryError

    with pytest.raises(MemoryError):
        score(Scorer(answer, workers=workers), played("a", "b"))


@pytest.mark.parametrize(
    ("returned", "error"),
    [
        (None, "returned None, not a list of rewards"),
        (1.0, "returned a float, not a list of rewards"),
        ("11", "returned a str, not a list of rewards"),
        ([Reward(1.0)], "returned 1 rewards for 2 episodes"),
        ([Reward(1.0)] * 3, "returned 3 rewards for 2 episodes"),
    ],
)
def test_an_answer_that_is_no_list_of_one_reward_each_fails_the_group(returned, error):
    rewards = score(Whole(lambda _: returned), group("a", "b"), group_size=2)

    assert [reward.score for reward in rewards] == [None, None]
    assert all(error in reward.error for reward in rewards)


@pytest.mark.parametrize(
    ("result", "error"),
    [
        (None, "scored it None"),
        (1.0, "scored it 1.0"),
        (Reward(math.nan), "'score' is nan"),
        (Reward(math.inf), "'score' is inf"),
        (Reward("1"), "'score' is '1'"),
        (Reward(1.0, metrics={"length": math.nan}), "'length' is nan"),
        (Reward(1.0, metrics=None), "metrics are None, no table of names"),
        (
            Reward(1.0, metrics={1: 1.0, "a": 2.0}),
            "metrics are {1: 1.0, 'a': 2.0}, no table of names",
        ),
        (Reward(1.0, metadata=None), "metadata are None, no table of names"),
        (Reward(None), "without a reason"),
        (Reward(None, error="the judge is down"), "the judge is down"),
    ],
)
def test_a_result_that_is_no_finite_reward_fails_its_own_episode(result, error):
    environment = Whole(lambda _: [Reward(1.0), result])

    good, bad = score(environment, group("a", "b"), group_size=2)

    assert good == Reward(1.0)
    assert bad.score is None
    assert error in bad.error


def test_numbers_of_other_libraries_are_scores():
    numpy = pytest.importorskip("numpy")

    (reward,) = score(Scorer(lambda _: Reward(numpy.float32(0.5))), played("a"))

    assert type(reward.score) is float
    assert reward.score == 0.5


def test_leaving_makes_no_more_calls():
    busy, release = threading.Event(), threading.Event()

    def answer(_said):
        busy.set()
        release.wait(WAIT_S)
        return Reward(1.0)

    environment = Scorer(answer, workers=2)
    with Scoring(environment) as scoring:
        for place, one in enumerate(played(*"abcdef")):
            scoring.over(place, one)
        assert busy.wait(WAIT_S)
    release.set()
    for thread in threading.enumerate():
        if thread.name == "flash-score":
            thread.join(WAIT_S)

    assert len(environment.calls) <= 2


@pytest.mark.parametrize("workers", [1, 4])
def test_the_caller_ends_a_wait_for_scorers_by_what_its_check_raises(workers):
    begun, over = threading.Event(), threading.Event()

    def slow(said):
        begun.set()
        # On the caller's own thread it is the next call that is not made.
        return Reward(float(workers == 1 or over.wait(WAIT_S)))

    def check():
        if begun.is_set():
            raise KeyboardInterrupt

    scorer = Scorer(slow, workers=workers)
    scoring = Scoring(scorer, timeout_s=2 * WAIT_S, check=check)
    for place, one in enumerate(played(*"ab")):
        scoring.over(place, one)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        scoring.rewards()
    over.set()

    assert time.monotonic() - started < WAIT_S
    assert workers > 1 or len(scorer.calls) == 1
