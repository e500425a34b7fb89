"""What is wrong with the rows is found without anything being played."""

from types import MappingProxyType

import attrs
import pytest

from flash.errors import EnvironmentFault


def changing(sound, change):
    """An environment whose rows `change(split, number, task)` replaces."""

    class Environment(sound):
        def task(self, split, number):
            task = super().task(split, number)
            return change(split, number, task) or task

    return Environment


def test_a_split_that_cannot_be_read(examine, sound):
    class Environment(sound):
        def tasks(self, split):
            if split == "eval":
                raise EnvironmentFault("dataset/eval.jsonl:7: invalid JSON")
            return super().tasks(split)

    (found,) = examine(Environment)["findings"]

    assert (found["level"], found["check"]) == ("fail", "rows")
    assert 'the split "eval" cannot be read: dataset/eval.jsonl:7' in found["message"]


def test_a_split_that_is_not_there(examine, sound):
    (found,) = examine(sound, split="trian")["findings"]

    assert (found["level"], found["check"]) == ("fail", "rows")
    assert found["message"] == 'there is no split "trian"; there is train, eval'


def test_nothing_held_out(findings, sound):
    alone = type("Environment", (sound,), {"counts": {"train": 24}})

    assert findings(alone) == [("warn", "held-out")]


@pytest.mark.parametrize("counts", [{"train": 5, "eval": 16}, {"train": 24, "eval": 5}])
def test_few_rows(findings, sound, counts):
    assert findings(type("Environment", (sound,), {"counts": counts})) == [("warn", "few-rows")]


def test_one_id_for_several_rows(findings, sound):
    same = changing(
        sound, lambda split, number, task: attrs.evolve(task, id=f"{split}-{number % 20}")
    )

    assert findings(same) == [("warn", "ids")]


def test_rows_that_stand_there_twice(examine, sound):
    twice = changing(
        sound, lambda _, n, task: attrs.evolve(task, input="Again?", data=0) if n < 2 else None
    )

    found = [one for one in examine(twice)["findings"] if '"train"' in one["message"]]

    assert ("warn", "duplicates") in [(one["level"], one["check"]) for one in found]
    assert '1 rows of "train" stand there twice (train-0, train-1)' in found[-1]["message"]


def test_rows_that_contradict_each_other(findings, sound):
    same = changing(
        sound, lambda split, n, task: attrs.evolve(task, input=f"{split}?") if n in {0, 1} else None
    )

    assert findings(same) == [("warn", "contradictions")] * 2


def test_rows_that_differ_in_their_metadata_alone_are_different_rows(findings, sound):
    class Environment(sound):
        def task(self, split, number):
            task = super().task(split, number)
            return attrs.evolve(task, input="Play!", metadata={"game": f"{split} {number}"})

        def start(self, task):
            return [{"role": "user", "content": f"Play game {task.metadata['game']}!"}]

        def target(self, task):
            return None

    assert findings(Environment) == [("warn", "targets")]


class TestLeaks:
    def leaking(self, sound, count):
        class Environment(sound):
            counts = MappingProxyType({"train": 40, "eval": 40})

            def task(self, split, number):
                task = super().task(split, number)
                seen = split == "eval" and number < count
                return (
                    attrs.evolve(task, input=f" Train QUESTION {number}: which two words?")
                    if seen
                    else task
                )

        return Environment

    def test_most_of_the_held_out_rows(self, examine, sound):
        (found,) = examine(self.leaking(sound, 30))["findings"]

        assert (found["level"], found["check"]) == ("fail", "leaks")
        assert (
            '30 of 40 rows of "eval" are trained on (eval-0, eval-1, eval-2 and 27 more)'
            in (found["message"])
        )

    def test_one_of_them(self, findings, sound):
        assert findings(self.leaking(sound, 1)) == [("warn", "leaks")]

    def test_training_on_another_split_turns_it_round(self, examine, sound):
        (found,) = examine(self.leaking(sound, 30), split="eval")["findings"]

        assert '30 of 40 rows of "train" are trained on' in found["message"]


def test_rows_far_longer_than_the_others(findings, sound):
    long = changing(
        sound,
        lambda split, n, task: (
            attrs.evolve(task, input="x" * 9000) if (split, n) == ("train", 3) else None
        ),
    )

    assert findings(long) == [("warn", "long-rows")]
