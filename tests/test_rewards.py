"""The reward that `[reward.*]` tables put together, of environments and adapters of a few lines."""

import math
import re
import threading

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash.api import (
    Environment,
    EnvironmentFault,
    Episode,
    PluginError,
    Reward,
    RewardPlugin,
    Step,
    Task,
    setting,
)
from flash.contracts import HasSuites
from flash.home import FlashHome
from flash.rewards import CONCURRENCY, Part, RewardedEnvironment, rewarded
from flash.spec.model import read_reward_tables
from flash.testing.host import make_host

TASK = Task("1", "2 + 2?")
EPISODES = [Episode((), text, raw=text) for text in ("4", "5")]


class Asking:
    """An environment whose own score is `own`, and whose gold answer is `gold`."""

    max_score_concurrency = 2

    def __init__(self, *own, gold="4", fault=None):
        self.own = list(own)
        self.gold = gold
        self.fault = fault
        self.scored = []

    def tasks(self, split):
        return [TASK]

    def splits(self):
        return ["train"]

    def start(self, task):
        return [{"role": "user", "content": task.input}]

    def step(self, task, messages, action):
        return Step(done=True)

    def max_turns(self, task):
        return 1

    def target(self, task):
        if self.fault:
            raise self.fault
        return self.gold and [{"role": "assistant", "content": self.gold}]

    def tools(self, task):
        return None

    def score(self, task, episodes):
        self.scored.append(task)
        return self.own


def part(name, *answers, weight=1.0):
    return Part(name, weight, lambda task, episodes: list(answers))


def total(*parts, environment=None, own=None):
    composed = RewardedEnvironment(environment or Asking(), own, parts)
    return composed.score(TASK, EPISODES)


def own(environment, weight=1.0):
    return Part("environment", weight, environment.score)


numbers = st.floats(-1e6, 1e6)


@given(st.lists(st.tuples(numbers, numbers, numbers), min_size=1, max_size=5))
def test_the_reward_is_the_weighted_sum_of_the_scores(rows):
    parts = [
        part(f"p{place}", Reward(one), Reward(other), weight=weight)
        for place, (weight, one, other) in enumerate(rows)
    ]

    first, second = total(*parts)

    assert first.score == pytest.approx(sum(w * one for w, one, _ in rows))
    assert second.score == pytest.approx(sum(w * other for w, _, other in rows))
    assert first.metrics == {f"p{place}": one for place, (_, one, _) in enumerate(rows)}


@given(st.lists(st.booleans(), min_size=2, max_size=5))
def test_one_part_without_a_score_leaves_the_episode_without_one(fails):
    parts = [
        part(f"p{place}", Reward(None, error="no idea") if wrong else Reward(1.0), Reward(0.0))
        for place, wrong in enumerate(fails)
    ]

    first, second = total(*parts)

    assert (first.score is None) == any(fails)
    assert [f"[reward.p{p}]" in (first.error or "") for p in range(len(fails))] == fails
    assert second.score == 0.0
    assert second.error is None


def raises(error):
    def score(task, episodes):
        raise error

    return score


HOSTILE = {
    "raises": (raises(ValueError("boom")), r"raised ValueError: boom \(test_rewards\.py:\d+\)"),
    "exits": (raises(SystemExit(3)), r"raised SystemExit: 3"),
    "a sentence for people": (raises(EnvironmentFault("no key", hint="set it")), "no key; set it"),
    "nothing": (lambda *_: None, "answered with nothing, not with a list of Reward"),
    "a generator": (lambda *_: (r for r in ()), "answered with a value of type generator"),
    "too few": (lambda *_: [Reward(1.0)], "answered with 1 rewards for 2 episodes"),
    "no reward": (lambda *_: [None, None], "gave the episode no score"),
    "bare numbers": (lambda *_: [1.0, 0.0], "answered with a value of type float, not with a"),
    "text": (lambda *_: [Reward("1")] * 2, "gave '1' as the score, not a finite number"),
    "NaN": (lambda *_: [Reward(math.nan)] * 2, "gave nan as the score"),
    "a metric": (
        lambda *_: [Reward(1.0, metrics={"depth": math.inf})] * 2,
        "gave the metric depth as inf, not as a finite number",
    ),
    "metrics": (
        lambda *_: [Reward(1.0, metrics=3)] * 2,
        "gave a value of type int as the metrics, not a table of names and numbers",
    ),
    "neither": (lambda *_: [Reward(None)] * 2, "gave the episode no score and no reason"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_an_adapter_that_breaks_its_contract_is_a_failed_scoring_with_its_name(case):
    score, expected = HOSTILE[case]

    rewards = total(Part("mine", 1.0, score), part("fine", Reward(1.0), Reward(1.0)))

    assert [reward.score for reward in rewards] == [None, None]
    for reward in rewards:
        assert re.match(rf"\[reward\.mine\] {expected}", reward.error), reward.error
        assert reward.metrics["fine"] == 1.0


def test_scores_of_numpy_count_as_numbers():
    numpy = pytest.importorskip("numpy")

    first, _ = total(part("p", Reward(numpy.float32(0.5)), Reward(numpy.int64(2))))

    assert (type(first.score), first.score) == (float, 0.5)


def test_a_sum_that_is_not_finite_is_a_failed_scoring():
    parts = [part(name, Reward(1e308), Reward(1.0), weight=1e10) for name in ("a", "b")]

    first, second = total(*parts)

    assert first.score is None
    assert "not finite" in first.error
    assert second.score == 2e10


def test_the_environments_own_score_is_asked_for_only_where_it_counts():
    environment = Asking(Reward(0.25, success=True), Reward(None, error="lost"))
    adapter = part("mine", Reward(1.0), Reward(1.0))

    alone = total(adapter, environment=environment)
    assert environment.scored == []
    assert [reward.score for reward in alone] == [1.0, 1.0]

    both = total(adapter, environment=environment, own=own(environment, 2.0))
    assert environment.scored == [TASK]
    assert both[0].score == 1.5
    assert both[0].metrics == {"environment": 0.25, "mine": 1.0}
    assert both[1].error == "[reward.environment] lost"


@pytest.mark.parametrize(
    ("own_weight", "successes", "weights", "expected"),
    [
        (1.0, (True, False), (1.0,), True),  # the environment's word
        (0.0, (True, False), (1.0,), False),  # measured only: it has no say
        (None, (None, True, True), (1.0, 1.0), True),
        (None, (None, True, False), (1.0, 1.0), False),
        (None, (None, True, False), (1.0, -1.0), True),  # a penalty has no say
        (None, (None, True), (-1.0,), False),
    ],
)
def test_success_is_that_of_the_parts_that_count(own_weight, successes, weights, expected):
    environment = Asking(*[Reward(1.0, success=bool(successes[0]))] * 2)
    parts = [
        part(f"p{place}", *[Reward(1.0, success=success)] * 2, weight=weight)
        for place, (success, weight) in enumerate(zip(successes[1:], weights, strict=True))
    ]
    counted = own(environment, own_weight) if own_weight is not None else None

    assert total(*parts, environment=environment, own=counted)[0].success is expected


def test_metrics_and_reasons_carry_the_name_of_their_part():
    said = Reward(0.5, metrics={"words": 7.0}, reason="too long")

    reward, _ = total(part("length", said, said), part("other", Reward(1.0), Reward(1.0)))

    assert reward.metrics == {"length": 0.5, "length/words": 7.0, "other": 1.0}
    assert reward.reason == "length: too long"


def test_metadata_is_kept_only_where_the_environments_score_is_all_there_is():
    told = Reward(1.0, metadata={"per_turn_rewards": [0.5, 0.5]})
    environment = Asking(told, told)
    adapter = part("mine", Reward(1.0), Reward(1.0))

    def metadata(*parts, weight=1.0):
        return total(*parts, environment=environment, own=own(environment, weight))[0].metadata

    assert metadata() == {"per_turn_rewards": [0.5, 0.5]}
    assert metadata(weight=0.5) == {}
    assert metadata(adapter) == {}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (Asking(gold="4"), "4"),
        (Asking(gold="<think>two and two</think>4"), "4"),
        (Asking(gold=None), None),
        (Asking(gold=[{"type": "text"}]), None),
        (Asking(fault=EnvironmentFault("row 3 has no answer")), None),
    ],
)
def test_an_adapter_is_told_the_gold_answer_and_the_environment_its_own_task(environment, expected):
    seen = []
    environment.own = [Reward(0.0)] * 2

    def score(task, episodes):
        seen.append(task)
        return [Reward(1.0)] * 2

    total(Part("mine", 1.0, score), environment=environment, own=own(environment))

    assert seen == [attrs.evolve(TASK, gold=expected)]
    assert environment.scored == [TASK]


def test_everything_but_the_score_is_the_environments():
    environment = Asking()

    composed = RewardedEnvironment(environment, None, [part("p")])

    assert isinstance(composed, Environment)
    assert composed.tasks("train") == [TASK]
    assert composed.splits() == ["train"]
    assert composed.start(TASK) == environment.start(TASK)
    assert composed.target(TASK) == environment.target(TASK)
    assert composed.max_turns(TASK) == 1
    assert not isinstance(composed, HasSuites)


class Paid:
    """An adapter that says what it costs."""

    def __init__(self, usd):
        self.usd = usd

    def spent_usd(self):
        if isinstance(self.usd, Exception):
            raise self.usd
        return self.usd


def test_what_scoring_costs_is_what_its_adapters_say():
    parts = [part("free"), *(Part(f"p{usd}", 1.0, list, Paid(usd)) for usd in (0.25, 0.5))]

    assert RewardedEnvironment(Asking(), None, parts).spent_usd() == 0.75
    assert RewardedEnvironment(Asking(), None, parts[:1]).spent_usd() == 0.0


@pytest.mark.parametrize("said", [None, "much", -1.0, math.nan, math.inf, ValueError("no idea")])
def test_an_adapter_that_cannot_say_what_it_cost_is_named(said):
    composed = RewardedEnvironment(Asking(), None, [Part("dear", 1.0, list, Paid(said))])

    with pytest.raises(PluginError, match="plugin dear: spent_usd raised ValueError: "):
        composed.spent_usd()


def test_suites_have_graders_of_their_own():
    class WithSuites(Asking):
        def suites(self):
            return {"hard": self}

    environment = WithSuites()
    composed = RewardedEnvironment(environment, None, [part("p")])

    assert isinstance(composed, HasSuites)
    assert composed.suites() == {"hard": environment}


def test_groups_are_scored_side_by_side_unless_code_of_the_environment_must_not():
    environment = Asking()

    assert RewardedEnvironment(environment, None, [part("p")]).max_score_concurrency == CONCURRENCY
    assert RewardedEnvironment(environment, own(environment), []).max_score_concurrency == 2


def test_the_gold_answer_is_asked_for_by_one_thread_at_a_time():
    inside, most = [], []

    class Slow(Asking):
        def target(self, task):
            inside.append(1)
            most.append(len(inside))
            both.wait(0.01)
            inside.pop()

    both = threading.Event()
    composed = RewardedEnvironment(Slow(), None, [part("p", Reward(1.0), Reward(1.0))])
    threads = [threading.Thread(target=composed.score, args=(TASK, EPISODES)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert most == [1, 1, 1, 1]


@attrs.frozen
class Band:
    most: int = setting(doc="The most.")


class Adapter:
    def __init__(self, ctx, config):
        self.ctx = ctx
        self.config = config

    def score(self, task, episodes):
        said = self.ctx.secret("BAND_KEY") or "no key"
        metrics = {"most": self.config.most}
        return [Reward(1.0, metrics=metrics, reason=f"{said} {self.ctx.environment.name}")] * 2


def host(make=Adapter):
    record = RewardPlugin(
        name="band", summary="Band.", make=make, config=Band, secrets=("BAND_KEY",)
    )
    return make_host(record)


def compose(tmp_path, tables, *, installed=None, environment=None, **secrets):
    installed = installed or host()
    return rewarded(
        environment or Asking(Reward(0.5), Reward(0.5)),
        read_reward_tables(tables, installed),
        installed,
        FlashHome(tmp_path),
        folder=tmp_path / "project",
        secrets=secrets,
    )


def test_adapters_are_made_with_their_settings_their_secrets_and_the_folder(tmp_path):
    tables = {"band": {"most": 3, "weight": 2}, "environment": {"weight": 4}}

    composed = compose(tmp_path, tables, BAND_KEY="swordfish", OTHER_KEY="hidden")
    reward, _ = composed.score(TASK, EPISODES)

    assert reward.score == 4 * 0.5 + 2 * 1.0
    assert reward.metrics == {"environment": 0.5, "band": 1.0, "band/most": 3.0}
    assert reward.reason == "band: swordfish project"


def test_a_secret_that_the_record_does_not_declare_is_not_given(tmp_path):
    class Greedy(Adapter):
        def score(self, task, episodes):
            return self.ctx.secret("OTHER_KEY")

    tables = {"band": {"most": 3}}
    composed = compose(tmp_path, tables, installed=host(Greedy), OTHER_KEY="hidden")

    assert 'asked for the secret "OTHER_KEY", which it does not declare' in (
        composed.score(TASK, EPISODES)[0].error
    )


def test_without_tables_the_environment_is_as_it_was(tmp_path):
    environment = Asking()

    assert compose(tmp_path, {}, environment=environment) is environment


def test_an_adapter_that_cannot_be_made_is_its_plugins_fault(tmp_path):
    def make(ctx, config):
        raise ImportError("no module named judge")

    with pytest.raises(PluginError, match="plugin band: make the reward adapter raised ImportErr"):
        compose(tmp_path, {"band": {"most": 3}}, installed=host(make))


def test_an_adapter_that_cannot_score_is_its_plugins_fault(tmp_path):
    with pytest.raises(PluginError, match=r"plugin band: made nothing as the .* no score\(\)"):
        compose(tmp_path, {"band": {"most": 3}}, installed=host(lambda ctx, config: None))
