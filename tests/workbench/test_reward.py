"""Each way in which a reward teaches nothing, or the wrong thing, is one finding."""

import threading
import time

import attrs
import pytest

from flash.values import Reward


def rewarding(sound, reward):
    class Environment(sound):
        def reward(self, task, said):
            return reward(self, task, said)

    return Environment


def exactly(environment, task, said):
    return float(said == environment.gold(task))


def test_gold_answers_at_zero(findings, sound):
    never = rewarding(sound, lambda *_: Reward(0.0))

    assert findings(never) == [("fail", "gold-reward")]
    assert findings(never, rewarded=False) == [("warn", "gold-reward")]


def test_gold_answers_below_wrong_ones(findings, sound):
    upside_down = rewarding(sound, lambda *told: Reward(-exactly(*told)))

    assert findings(upside_down) == [("fail", "gold-reward")]


def test_a_scale_below_zero_is_sound(findings, sound):
    penalty = rewarding(sound, lambda *told: Reward(exactly(*told) - 1, bool(exactly(*told))))

    assert findings(penalty) == []


def test_every_answer_alike(findings, sound):
    assert findings(rewarding(sound, lambda *_: Reward(0.7, success=True))) == [
        ("fail", "flat-reward")
    ]


@pytest.mark.parametrize(
    ("said", "score"),
    [
        ("nothing", lambda said: not said),
        ("words that have nothing to do with it", lambda said: "purple" in said[:200]),
        ("the question back", lambda said: said.endswith("?")),
        ("junk without an end", lambda said: len(said) > 1000),
        ("that it is right", lambda said: "correct" in said),
    ],
)
def test_a_wrong_answer_that_earns_as_much_as_gold(examine, sound, said, score):
    def reward(environment, task, text):
        earned = exactly(environment, task, text) or float(score(text))
        return Reward(earned, success=bool(earned))

    found = examine(rewarding(sound, reward))["findings"]

    assert {(one["level"], one["check"]) for one in found} == {("fail", "junk-reward")}
    assert f"an answer that says {said}" in found[-1]["message"] + found[0]["message"]


def test_a_reward_that_does_not_look_at_what_is_said(examine, sound):
    """Two words are two words, whoever's they are."""

    def reward(environment, task, said):
        two = len(said.split()) == 2
        return Reward(float(two), success=two)

    shape = rewarding(sound, reward)

    (found,) = examine(shape)["findings"]

    assert (found["level"], found["check"]) == ("fail", "junk-reward")
    assert "another row's gold answer" in found["message"]


def test_some_rows_may_share_what_their_answers_are_worth(findings, sound):
    class Environment(sound):
        def gold(self, task):
            return f"{task.data} apples" if task.data else "four apples"

        def reward(self, task, said):
            right = said.replace("four", "4") == self.gold(task).replace("four", "4")
            return Reward(float(right), success=right)

    assert findings(Environment) == []


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("the first half", lambda gold, said: gold.startswith(said[:2])),
        ("several rows at once", lambda gold, said: gold in said.splitlines()),
    ],
)
def test_a_half_right_answer_that_earns_it_all(examine, sound, said, right):
    def reward(environment, task, text):
        earned = bool(text) and right(environment.gold(task), text)
        return Reward(float(earned), success=earned)

    (found,) = examine(rewarding(sound, reward))["findings"]

    assert (found["level"], found["check"]) == ("warn", "exploits")
    assert said in found["message"]


def test_partial_credit_that_counts_as_success(findings, sound):
    class Environment(sound):
        def reward(self, task, said):
            found = super().reward(task, said)
            half = 0.5 if said and self.gold(task).startswith(said) else found.score
            score = max(half, found.score)
            return Reward(score, success=score > 0)

    assert findings(Environment) == [("warn", "success")]


def test_gold_that_is_no_success(findings, sound):
    assert findings(rewarding(sound, lambda *told: Reward(exactly(*told)))) == [("warn", "success")]


class TestScoresThatAreNone:
    @pytest.mark.parametrize("score", [float("nan"), float("inf"), None, "1.0"])
    def test_what_is_no_finite_number(self, findings, sound, score):
        def reward(environment, task, said):
            return Reward(exactly(environment, task, said) if said else score, success=bool(said))

        assert ("fail", "score-errors") in findings(rewarding(sound, reward))

    def test_a_scorer_that_raises_on_odd_text(self, examine, sound):
        def reward(environment, task, said):
            first = said.split()[0]
            return sound.reward(environment, task, said) if first else None

        found = examine(rewarding(sound, reward))["findings"]

        assert [(one["level"], one["check"]) for one in found] == [("fail", "score-errors")]
        assert "IndexError" in found[0]["message"]

    def test_the_wrong_number_of_results(self, findings, sound):
        class Environment(sound):
            def score(self, task, episodes):
                return super().score(task, episodes)[:-1]

        assert findings(Environment) == [("fail", "score-errors")]
        assert findings(Environment, rewarded=False) == [("warn", "score-errors")]

    def test_a_scorer_that_hangs_is_given_up(self, findings, sound, monkeypatch):
        monkeypatch.setattr("flash.workbench.probes.LIMIT_S", 0.05)
        never = threading.Event()

        class Environment(sound):
            def score(self, task, episodes):
                never.wait()

        assert findings(Environment, tasks=2) == [("fail", "score-errors")]
        never.set()


@pytest.mark.parametrize("given", [[1.0, 0.0], [0.0, float("nan"), 1.0], "1 0 1"])
def test_rewards_of_turns_that_are_not_one_a_turn(findings, guessing, given):
    class Environment(guessing):
        def rate(self, task, said):
            return attrs.evolve(super().rate(task, said), metadata={"per_turn_rewards": given})

    assert findings(Environment) == [("warn", "per-turn")]


def test_rewards_of_turns_that_are(findings, guessing):
    class Environment(guessing):
        def rate(self, task, said):
            return attrs.evolve(
                super().rate(task, said), metadata={"per_turn_rewards": [0, 0.5, 1]}
            )

    assert findings(Environment) == []


def test_a_score_by_chance(findings, sound):
    class Environment(sound):
        calls = 0

        def reward(self, task, said):
            self.calls += 1
            found = super().reward(task, said)
            return Reward(found.score, found.success, metrics={"noise": float(self.calls)})

    assert findings(Environment) == [("warn", "determinism")]


def test_a_batch_scorer_that_mixes_up_its_episodes(findings, sound):
    class Environment(sound):
        def score(self, task, episodes):
            rewards = super().score(task, episodes)
            return [*rewards[:1], *rewards[:0:-1]]

    assert ("fail", "concurrency") in findings(Environment)


def test_a_scorer_that_threads_must_not_share(findings, sound):
    """What one call leaves on the environment, another one reads."""

    class Environment(sound):
        def score(self, task, episodes):
            self.current = task
            time.sleep(0.001)  # lets other threads on
            return super().score(self.current, episodes)

    assert findings(Environment) == [("fail", "concurrency")]

    Environment.max_score_concurrency = 1
    assert findings(Environment) == []


def test_a_scorer_that_is_slow(findings, sound, monkeypatch):
    monkeypatch.setattr("flash.workbench.reward._SLOW_STEP_S", 0.01)

    class Environment(sound):
        def score(self, task, episodes):
            time.sleep(0.005)
            return super().score(task, episodes)

    assert findings(Environment, tasks=1) == [("warn", "speed")]
    assert findings(Environment, tasks=1, rewarded=False) == []
