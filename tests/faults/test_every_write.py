"""
Every write of every durable operation fails, in every way, and nothing is worse for it.

An operation's calls are counted while it works, and each is made to fail in turn, for a moment or
for good. What was there stays or what is new is there, whole; the user reads a sentence; once the
disk works again, so does the operation.
"""

import errno
import os

import pytest
from faults.disk import FAULTS, files_in
from faults.every_point import Operation, strike_everywhere

from flash.environments import folder_digest, snapshot
from flash.evaluations import EvaluationStore
from flash.files import write_atomic
from flash.home import FlashHome
from flash.plane.lock import try_lock
from flash.plane.store import RunStore
from flash.values import Rollout
from flash.worker.checkpoints import CheckpointStore, damaged_file
from flash.worker.reporter import EventReporter, read_event
from flash.worker.rollouts import RolloutStore, kept_steps, read_rollouts


def lasting_removal_fails(error):
    """Say whether what is left may lie there: the disk lets nothing be removed either."""
    words = ("Read-only", "Input/output", "Too many")
    return error is not None and any(word in str(error) for word in words)


# write_atomic: job.json, manifests, result.json, secrets, evaluations


def file_with_content(folder):
    write_atomic(folder / "file", b"old")
    return folder / "file"


def old_or_new(path, error):
    assert path.read_bytes() in ({b"old", b"new"} if error else {b"new"})
    assert path.stat().st_mode & 0o777 == 0o600
    if not lasting_removal_fails(error):
        assert files_in(path.parent) == ["file"]


REPLACING = Operation(
    prepare=file_with_content,
    act=lambda path: write_atomic(path, b"new"),
    sound=old_or_new,
    done=lambda path: path.read_bytes() == b"new",
)


# A snapshot of the user's folder


def project(folder):
    source = folder.parent / f"source-{folder.name}"
    (source / "dataset").mkdir(parents=True)
    (source / "environment.py").write_text("# nothing to see\n")
    (source / "dataset" / "train.jsonl").write_text('{"input": 1}\n' * 200)
    return source, folder / "copy"


def copied(given):
    source, copy = given
    assert folder_digest(copy) == folder_digest(source)


def whole_or_not_there(given, error):
    source, copy = given
    if error is None:
        copied(given)
    elif copy.exists():
        # The disk let nothing be removed, or failed after the last byte: told by the digest.
        assert lasting_removal_fails(error) or folder_digest(copy) == folder_digest(source)


def take_snapshot(given):
    source, copy = given
    if copy.exists():
        for path in sorted(copy.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        copy.rmdir()
    assert snapshot(source, copy) == folder_digest(source)


SNAPSHOT = Operation(prepare=project, act=take_snapshot, sound=whole_or_not_there, done=copied)


# The folder of an attempt


def store_of_a_run(folder):
    return RunStore(folder)


ATTEMPT = Operation(
    prepare=store_of_a_run,
    act=lambda store: store.make_attempt(1),
    done=lambda store: list(store.attempt(1).iterdir()) == [],
)


# An evaluation

EVALUATION = {"run": "0abcdefgh", "rows": [{"row": 1, "score": 0.5}], "suites": {}}


def no_evaluation_is_torn(home, error):
    found, problems = EvaluationStore(home).all()
    assert problems == []
    assert len(found) == len({one["evaluation"] for one in found})
    for one in found:
        assert EvaluationStore(home).find(one["evaluation"])["rows"] == EVALUATION["rows"]


KEEPING = Operation(
    prepare=FlashHome,
    act=lambda home: EvaluationStore(home).keep(EVALUATION),
    sound=no_evaluation_is_torn,
    done=lambda home: no_evaluation_is_torn(home, None),
)


# Rollouts: never worth a run


class Kept:
    def __init__(self):
        self.warnings, self.events = [], []

    def emit(self, type_, **data):
        self.events.append((type_, data))

    def warning(self, message):
        self.warnings.append(message)


def rollout(step):
    return Rollout(
        step=step,
        task="a",
        sample=0,
        messages=({"role": "user", "content": "Hello"},),
        opening=1,
        completion="x" * 100,
        score=1.0,
    )


def rollouts(folder):
    reporter = Kept()
    store = RolloutStore(folder, reporter)
    store.save(1, [rollout(1)])
    return folder, reporter, store


def save_second(given):
    _, _, store = given
    store.save(2, [rollout(2)])


def every_kept_step_reads(given, error):
    folder, reporter, _ = given
    assert error is None, "rollouts are not worth a run"
    assert 1 in kept_steps(folder)
    for step in kept_steps(folder):
        assert read_rollouts(folder, step).rollouts[0].step == step
    told = len(reporter.events) == 2
    assert told or len(reporter.warnings) == 1
    assert all("Training goes on" in warning for warning in reporter.warnings)


ROLLOUTS = Operation(
    prepare=rollouts,
    act=save_second,
    sound=every_kept_step_reads,
    done=lambda given: read_rollouts(given[0], 2),
)


# Checkpoints, and the final adapter


def checkpoint_of(step):
    def write(folder):
        (folder / "adapter").mkdir()
        (folder / "adapter" / "weights").write_bytes(bytes([step]) * 50)
        (folder / "state").mkdir()
        (folder / "state" / "optimizer").write_bytes(bytes([step]) * 500)

    return write


def one_checkpoint(folder):
    warnings = []
    store = CheckpointStore(folder, warn=warnings.append)
    store.save(1, checkpoint_of(1), metrics={})
    return folder, store, warnings


def save_next(given):
    _, store, _ = given
    store.save(2, checkpoint_of(2), metrics={"eval_loss": 1.0})


def only_whole_checkpoints(given, error):
    _, store, warnings = given
    steps = [one.step for one in store.list()]
    assert steps in ([[1], [1, 2]] if error else [[1, 2]])
    for one in store.list():
        assert damaged_file(one.folder) is None
        assert (one.folder / "state" / "optimizer").read_bytes() == bytes([one.step]) * 500
    assert store.newest().step == steps[-1]
    assert warnings == []


SAVING = Operation(
    prepare=one_checkpoint,
    act=save_next,
    sound=only_whole_checkpoints,
    done=lambda given: only_whole_checkpoints(given, None),
)


def save_final(given):
    _, store, _ = given
    store.save_final(lambda folder: (folder / "weights").write_bytes(b"final"))


def final_or_none(given, error):
    _, store, _ = given
    assert store.newest().step == 1
    final = store.final(intact=True)
    assert final is not None or error is not None


SAVING_LAST = Operation(
    prepare=one_checkpoint,
    act=save_final,
    sound=final_or_none,
    done=lambda given: given[1].final(intact=True) is not None,
)


def four_checkpoints(folder):
    store = CheckpointStore(folder)
    for step in (1, 2, 3, 4):
        store.save(step, checkpoint_of(step), metrics={})
    return store


def what_is_kept_is_whole(store, error):
    found = store.list()
    assert [one.step for one in found][-2:] == [3, 4]
    assert store.newest().step == 4
    for one in found:
        assert damaged_file(one.folder) is None
        assert (one.adapter / "weights").read_bytes() == bytes([one.step]) * 50


TIDYING = Operation(
    prepare=four_checkpoints,
    act=lambda store: store.tidy(4, last=3, best=True),
    sound=what_is_kept_is_whole,
    done=lambda store: (
        [(o.step, o.resumable) for o in store.list()] == [(2, False), (3, True), (4, True)]
    ),
)


# Events: what is reported is kept until it can be written


def report(folder):
    number = 2 if (folder / "1" / "events.jsonl").exists() else 1
    reporter = EventReporter(folder / str(number) / "events.jsonl", attempt=number)
    try:
        for step in (1, 2, 3):
            reporter.metrics(step, 3, loss=0.5)
    finally:
        reporter.close()


def whole_lines_in_order(folder, error):
    for path in folder.glob("*/events.jsonl"):
        lines = path.read_bytes().split(b"\n")
        events = [read_event(line, int(path.parent.name)) for line in lines[:-1]]
        assert None not in events
        steps = [event.data["step"] for event in events if event.type == "metric"]
        assert steps == [1, 2, 3][: len(steps)]
        if error is None:
            assert lines[-1] == b""
            assert len(steps) == 3
            told = [event for event in events if event.type == "warning"]
            assert all("none is lost" in event.data["message"] for event in told)


REPORTING = Operation(
    prepare=lambda folder: folder,
    act=report,
    sound=whole_lines_in_order,
    done=lambda folder: len(list(folder.glob("*/events.jsonl"))) > 0,
)


# The home, and the locks in it


def take_lock(home):
    descriptor = try_lock(home.folder() / "supervisor.lock")
    assert descriptor is not None
    os.close(descriptor)


LOCK = Operation(prepare=lambda folder: FlashHome(folder / "home"), act=take_lock)

OPERATIONS = {
    "a file that is replaced": REPLACING,
    "a snapshot": SNAPSHOT,
    "an attempt's folder": ATTEMPT,
    "an evaluation": KEEPING,
    "rollouts": ROLLOUTS,
    "a checkpoint": SAVING,
    "the final adapter": SAVING_LAST,
    "old checkpoints": TIDYING,
    "events": REPORTING,
    "a lock in a new home": LOCK,
}


@pytest.fixture(autouse=True)
def memory_is_enough(monkeypatch):
    """Syncs are counted and fail, but wait for no real disk: what a power cut does is elsewhere."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


IN_THE_FAST_LANE = {"a file that is replaced", "rollouts"}
NOTHING_TO_FAIL = {("an attempt's folder", errno.EMFILE)}


@pytest.mark.parametrize("fault", FAULTS, ids=str)
@pytest.mark.parametrize(
    "name",
    [
        name if name in IN_THE_FAST_LANE else pytest.param(name, marks=pytest.mark.slow)
        for name in OPERATIONS
    ],
)
def test_every_call_may_fail(tmp_path, name, fault):
    points = strike_everywhere(tmp_path, OPERATIONS[name], fault)

    assert points > 0 or (name, fault.code) in NOTHING_TO_FAIL
