"""`<run>/best`: the checkpoint that did best on held-out tasks, wherever a step's is taken."""

import sys

import pytest

from flash.errors import UsageError
from flash.worker.checkpoints import CheckpointStore
from flash.worker.reporter import EventReporter


@pytest.fixture
def plane(fresh_bench):
    """Return a plane whose only run has rewards of 0.2, 0.6 and 0.4 at its steps 10, 20 and 30."""
    fresh_bench.plane = fresh_bench.open(supervisor=(sys.executable, "-c", ""))
    run = fresh_bench.submit("")
    for step, reward in ((10, 0.2), (20, 0.6), (30, 0.4)):
        CheckpointStore(fresh_bench.plane.store(run)).save(
            step, lambda folder: (folder / "adapter").mkdir(), metrics={"eval_reward": reward}
        )
    yield fresh_bench.plane
    fresh_bench.plane = fresh_bench.open()


def measured_before_training(plane, **numbers):
    reporter = EventReporter(plane.store(plane.find("last").id) / "attempts/1/events.jsonl")
    reporter.evaluation(0, **numbers)
    reporter.close()


def test_the_best_checkpoint_is_named_without_its_step(plane):
    assert plane.saved("last/best").step == 20
    assert plane.adapter("last/best") == plane.adapter("last/step-20")


def test_the_best_stays_best_when_training_began_lower(plane):
    measured_before_training(plane, reward=0.5)

    assert plane.best(plane.find("last").id).step == 20


def test_there_is_no_best_where_training_began_at_least_as_high(plane):
    measured_before_training(plane, reward=0.6)

    with pytest.raises(UsageError, match="has no best checkpoint") as raised:
        plane.adapter("last/best")

    assert "/step-30" in raised.value.hint
