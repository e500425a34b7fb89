"""Training goes on while a checkpoint is written; what that may leave out, and what it may not."""

import errno
import os
import threading

import pytest

from flash.errors import StoreError
from flash.spec.limits import CheckpointsTable
from flash.worker.checkpoints import MANIFEST, CheckpointStore
from flash.worker.fencing import Superseded
from flash.worker.reporter import EventReporter, read_event
from flash.worker.saving import CheckpointSaver


class Run:
    """A run's store, a saver on it, and a disk that can be held up or broken."""

    def __init__(self, folder, *, always=(), keep=None):
        self.folder = folder
        self.disk = threading.Event()
        self.disk.set()
        self.begun = threading.Semaphore(0)
        self.broken = None
        self.stopped = False
        self.events = folder / "attempts" / "1" / "events.jsonl"
        self.reporter = EventReporter(self.events)
        self.saver = CheckpointSaver(
            CheckpointStore(folder, attempt=1, warn=self.reporter.warning),
            self.reporter,
            keep=keep or CheckpointsTable(),
            always=always,
            stop=lambda: self.stopped,
        )

    def save(self, *steps, **metrics):
        for step in steps:
            self.saver.save(step, self.write, metrics=metrics)

    def write(self, folder):
        broken = self.broken
        self.begun.release()
        assert self.disk.wait(20)
        if broken:
            raise OSError(broken, os.strerror(broken))
        for part in ("adapter", "state"):
            (folder / part).mkdir()
            (folder / part / "file").write_text(folder.name)

    @property
    def steps(self):
        return [one.step for one in CheckpointStore(self.folder).list()]

    def said(self, type_):
        events = [read_event(line) for line in self.events.read_text().splitlines()]
        return [dict(event.data) for event in events if event.type == type_]


@pytest.fixture
def make(tmp_path):
    made = []

    def make(**arguments):
        made.append(Run(tmp_path, **arguments))
        return made[-1]

    yield make
    for run in made:
        run.disk.set()
        run.reporter.close()


def test_a_save_returns_while_the_disk_is_still_busy_and_is_reported_once_it_is_committed(make):
    run = make()
    run.disk.clear()

    with run.saver:
        run.save(5)
        assert run.begun.acquire(timeout=20)
        assert (run.steps, run.said("checkpoint")) == ([], [])
        run.disk.set()

    assert run.steps == [5]
    assert run.said("checkpoint") == [{"step": 5}]


def test_of_the_periodic_saves_that_wait_the_newest_wins_and_the_log_says_so(make):
    run = make()
    run.disk.clear()

    with run.saver:
        run.save(5)
        assert run.begun.acquire(timeout=20)
        run.save(10, 15, 20)
        run.disk.set()

    assert run.steps == [5, 20]
    assert [item["message"].partition(" is left out")[0] for item in run.said("log")] == [
        "the checkpoint of step 10",
        "the checkpoint of step 15",
    ]


def test_steps_that_were_asked_for_or_measured_and_that_of_a_stop_are_never_left_out(make):
    run = make(always=(10, 15))
    run.disk.clear()
    waiting = threading.Event()

    def train():
        run.save(5, 10, 12)
        waiting.set()
        run.save(15)  # of two that must be written one waits, and here the trainer does too
        run.save(20, eval_loss=1.5)
        run.save(25)
        run.stopped = True
        run.save(26)

    with run.saver:
        trainer = threading.Thread(target=train)
        trainer.start()
        assert run.begun.acquire(timeout=20)
        assert waiting.wait(20)
        run.disk.set()
        trainer.join(20)

    assert not trainer.is_alive()
    assert {5, 10, 15, 20, 26} <= set(run.steps)
    assert 12 not in run.steps


def test_the_final_adapter_comes_after_every_save_before_it(make):
    run = make()
    run.disk.clear()
    ended = []

    def end():
        run.save(5, 10)
        run.saver.save_final(lambda folder: ended.append(run.steps))

    with run.saver:
        trainer = threading.Thread(target=end)
        trainer.start()
        assert run.begun.acquire(timeout=20)
        assert ended == []
        run.disk.set()
        trainer.join(20)

    assert ended == [[5, 10]]
    assert CheckpointStore(run.folder).final() is not None


def test_periodic_saves_that_fail_are_one_warning_and_the_next_one_is_tried(make):
    run = make()
    run.broken = errno.ENOSPC

    with run.saver:
        for step in (5, 10, 15):
            run.saver.save(step, run.write, metrics={"eval_loss": 1.0})  # measured: none waits
        for _ in range(3):
            assert run.begun.acquire(timeout=20)
        run.broken = None
        run.save(20)

    [warning] = run.said("warning")
    assert "step-000005: No space left on device (free some space" in warning["message"]
    assert "training goes on, and each later save tries again" in warning["message"]
    assert run.said("log") == [{"message": "checkpoints are saved again; 3 could not be"}]
    assert run.said("checkpoint") == [{"step": 20}]
    assert not run.saver.failed


def test_a_removal_that_fails_is_one_warning_and_costs_no_checkpoint(make, monkeypatch):
    run = make(keep=CheckpointsTable(keep_last=1))

    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with run.saver:
        for step in (5, 10, 15):
            run.saver.save(step, run.write, metrics={"eval_loss": 1.0})
            if step == 5:
                monkeypatch.setattr("shutil.rmtree", refuse)
    monkeypatch.undo()

    [warning] = run.said("warning")
    assert "cannot remove old checkpoints" in warning["message"]
    assert "they stay until it can be done" in warning["message"]
    assert run.steps[-1] == 15


@pytest.mark.parametrize("why", ["asked for", "stop"])
def test_a_required_save_that_fails_ends_the_attempt(make, why):
    run = make(always=(5,) if why == "asked for" else ())
    run.stopped = why == "stop"
    run.broken = errno.EIO

    with pytest.raises(StoreError, match="step-000005: Input/output error"), run.saver:
        run.save(5)

    assert run.saver.failed
    with pytest.raises(StoreError, match="step-000005"):
        run.save(10)


def test_the_trainer_is_told_to_stop_as_soon_as_a_required_save_has_failed(make):
    run = make(always=(5,))
    run.broken = errno.EROFS

    def train():
        with run.saver:
            run.save(5)
            while not run.saver.failed:
                threading.Event().wait(0.001)
            run.save(6)

    with pytest.raises(StoreError, match="step-000005: Read-only"):
        train()


def test_a_failure_of_training_is_not_hidden_by_one_of_the_disk(make):
    run = make(always=(5,))
    run.broken = errno.ENOSPC

    def train():
        with run.saver:
            run.save(5)
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        train()

    [warning] = run.said("warning")
    assert "a checkpoint could not be saved: cannot save the checkpoint" in warning["message"]


def test_a_bug_in_what_writes_a_checkpoint_ends_the_attempt_with_that_bug(make):
    run = make()

    def write(folder):
        raise ZeroDivisionError(folder.name)

    with pytest.raises(ZeroDivisionError, match="step-000005"), run.saver:
        run.saver.save(5, write, metrics={})


def test_no_thread_is_left_after_the_last_save(make):
    run = make()

    with run.saver:
        run.save(5)

    for thread in threading.enumerate():
        if thread.name == "flash-saver":
            thread.join(20)
            assert not thread.is_alive()


def test_an_attempt_that_another_has_followed_saves_nothing_more(make):
    run = make()
    (run.folder / "attempts" / "2").mkdir()

    with pytest.raises(Superseded, match=r"attempt 1 .* attempt 2 has taken its place"), run.saver:
        run.save(5)
    with pytest.raises(Superseded):
        CheckpointStore(run.folder, attempt=1).save_final(run.write)
    with pytest.raises(Superseded):
        CheckpointStore(run.folder, attempt=1).tidy(5, last=1, best=False)

    assert not list(run.folder.rglob(MANIFEST))


def test_an_attempt_that_is_followed_while_it_writes_commits_nothing(make):
    run = make()
    run.disk.clear()

    def train():
        with run.saver:
            run.save(5)
            assert run.begun.acquire(timeout=20)
            (run.folder / "attempts" / "10").mkdir()
            run.disk.set()

    with pytest.raises(Superseded):
        train()

    assert not list(run.folder.rglob(MANIFEST))


def test_what_is_not_kept_goes_when_the_next_checkpoint_is_on_the_disk(make):
    run = make(always=(2,), keep=CheckpointsTable(keep_last=2))

    with run.saver:
        for step in range(1, 7):
            run.saver.save(step, run.write, metrics={"eval_loss": abs(3.0 - step)})

    assert run.steps == [2, 3, 5, 6]
    whole = [one.step for one in CheckpointStore(run.folder).list() if one.resumable]
    assert whole == [5, 6]
