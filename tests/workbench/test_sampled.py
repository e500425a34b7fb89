"""What a model's answers say about a reward."""

from types import MappingProxyType

import attrs
import pytest

from flash.episodes import Played
from flash.errors import ModelUnavailable
from flash.testing.models import make_tiny_model
from flash.values import Episode, Reward
from flash.workbench.data import spread
from flash.workbench.probes import Guarded, examine
from flash.workbench.sampled import CHECKS, Groups, numbers
from flash.workbench.subject import Subject


@pytest.fixture
def subject(sound, tmp_path):
    environment = Guarded(sound())
    rows = {split: environment.tasks(split) for split in environment.splits()}
    return Subject(
        environment=environment,
        folder=tmp_path,
        algorithm="grpo",
        rewarded=True,
        split="train",
        rows=rows,
        trials=examine(environment, spread(rows["train"], 4)),
    )


def groups(subject, scores, *, cut=0, **changed):
    """Groups of these scores, one a task; the first `cut` answers of each are cut off."""
    rewards = [
        [Reward(s, success=s == 1.0, error=None if s is not None else "no") for s in group]
        for group in scores
    ]
    played = [
        [Played(trial.task, Episode((), "x", truncated=at < cut)) for at, _ in enumerate(group)]
        for trial, group in zip(subject.trials, scores, strict=True)
    ]
    known = Groups(
        played=played,
        rewards=rewards,
        max_tokens=32,
        limit=512,
        seconds_per_score=0.001,
        tokens_per_s=100.0,
        too_long={},
    )
    return attrs.evolve(known, **changed)


def found(subject, *arguments, **changed):
    known = groups(subject, *arguments, **changed)
    return [(one.level, one.check) for check in CHECKS for one in check(subject, known)]


VARIED = [[0.0, 0.5], [0.5, 1.0], [1.0, 0.0], [0.0, 0.5]]


def test_groups_that_differ_can_be_learnt_from(subject):
    assert found(subject, VARIED) == []


def test_groups_that_never_differ_cannot(subject):
    flat = [[0.5, 0.5], [0.0, 0.0], [0.5, 0.5], [0.0, 0.0]]

    assert found(subject, flat) == [("fail", "zero-variance")]
    assert found(attrs.evolve(subject, rewarded=False), flat) == []


def test_most_groups_that_do_not_differ_are_a_waste(subject, sound):
    more = attrs.evolve(subject, trials=[*subject.trials, subject.trials[0]])

    assert found(more, [[0.5, 0.5]] * 4 + [[0.0, 1.0]]) == [("warn", "zero-variance")]


def test_a_model_that_knows_it_all_has_nothing_to_learn(subject):
    assert found(subject, [[1.0, 1.0]] * 4) == [("warn", "saturation")]


def test_answers_without_a_score(subject):
    assert found(subject, [[0.0, 1.0, None]] * 4) == [("warn", "sampled-errors")]
    assert found(subject, [[1.0, None, None, 0.0, None]] * 4) == [("fail", "sampled-errors")]


def test_answers_that_are_cut_off(subject):
    assert found(subject, VARIED, cut=1) == []
    assert found(subject, VARIED, cut=2) == [("warn", "truncated")]


def test_rows_that_do_not_fit(subject):
    assert found(subject, VARIED, too_long={"train-3": 700}) == [("warn", "long-rows")]


def test_a_wrong_answer_that_earns_more_than_an_honest_try(subject, sound):
    class Environment(sound):
        def reward(self, task, said):
            earned = super().reward(task, said)
            return earned if said else attrs.evolve(earned, score=0.4)

    tempting = attrs.evolve(
        subject, trials=examine(Guarded(Environment()), [t.task for t in subject.trials])
    )

    assert found(tempting, VARIED) == []
    assert found(tempting, [[0.0, 0.5]] * 4) == [("warn", "temptation")]


def test_the_figures(subject):
    figures = numbers(groups(subject, [[1.0, 1.0], [0.5, 0.5], [0.0, None], [0.0, 1.0]]), subject)

    assert (figures["tasks"], figures["group_size"]) == (4, 2)
    assert figures["mean"] == pytest.approx(4 / 7)
    assert figures["success"] == pytest.approx(3 / 7)
    assert figures["zero_variance"] == 0.75
    assert figures["saturated"] == 0.25
    assert figures["errors"] == 1


def test_nothing_scored_has_no_figures(subject):
    figures = numbers(groups(subject, [[None, None]] * 4), subject)

    assert figures["mean"] is figures["success"] is figures["zero_variance"] is None
    assert figures["errors"] == 8


def test_a_model_that_cannot_be_had_loses_no_finding(examine, sound):
    class Environment(sound):
        counts = MappingProxyType({"train": 24})

    def opened():
        raise ModelUnavailable("x/y is not on this machine", hint="download it")

    answer = examine(Environment, model=opened)

    assert [(one["level"], one["check"]) for one in answer["findings"]] == [
        ("warn", "held-out"),
        ("warn", "model"),
    ]
    assert answer["findings"][1]["fix"] == "download it"


@pytest.mark.slow
class TestWithAModel:
    @pytest.fixture(scope="class")
    def model(self, tmp_path_factory):
        return make_tiny_model(tmp_path_factory.mktemp("model"))

    def test_it_answers_some_tasks(self, examine, sound, model):
        answer = examine(sound, model=model, tasks=3)
        figures = answer["sampled"]

        assert (figures["tasks"], figures["group_size"], figures["max_tokens"]) == (3, 4, 64)
        assert figures["mean"] == 0.0
        assert figures["tokens_per_s"] > 0
        assert {one["check"] for one in answer["findings"]} == {"zero-variance", "truncated"}

    def test_rows_are_measured_in_its_tokens(self, examine, sound, model):
        class Environment(sound):
            def start(self, task):
                longer = "y" * 600 if task.data == 5 else ""
                return [{"role": "user", "content": task.input + longer}]

        answer = examine(Environment, model=model, tasks=2)

        long = next(one for one in answer["findings"] if one["check"] == "long-rows")
        assert "1 rows (train-5) need up to" in long["message"]
        assert "there is room for 512" in long["message"]

    def test_a_prompt_that_its_template_refuses(self, examine, sound, model):
        class Environment(sound):
            def start(self, task):
                return [{"role": "user", "content": [{"type": "image", "url": task.id}]}]

        answer = examine(Environment, model=model, tasks=2)

        assert [one["check"] for one in answer["findings"]] == ["render"]
        assert answer["sampled"] is None
