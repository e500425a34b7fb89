"""Many submits: all or none of a batch, each for itself where threads share a transaction."""

import contextlib
import os
import signal
import sys
import threading
from pathlib import Path

import pytest
from plane_bench import Bench, until

from flash.environments import folder_digest
from flash.errors import EnvironmentFault, StoreError
from flash.plane import barrier as barriers
from flash.plane.barrier import barrier, tree
from flash.plane.database import Database
from flash.plane.records import Records
from flash.plane.store import sweep_incoming, sweep_uncommitted
from flash.plane.submit import Submission

KEY = {"KEY": "value-1234"}


@pytest.fixture
def quiet(tmp_path):
    """Return a bench with a supervisor that does nothing."""
    bench = Bench(tmp_path)
    bench.plane = bench.open(supervisor=(sys.executable, "-c", ""))
    return bench


@pytest.fixture
def changed(tmp_path):
    """Return a folder that is not what any job's digest says."""
    folder = tmp_path / "changed"
    folder.mkdir()
    (folder / "environment.py").write_text("changed")
    return folder


def submissions(bench, count):
    """Return so many jobs, each with a secret, under ids of their own."""
    jobs = []
    while len(jobs) < count:
        job = bench.job("pass", secrets=tuple(KEY))
        if not jobs or job.run != jobs[-1].job.run:
            jobs.append(Submission(job=job, environment=bench.environment, secrets=KEY))
    return jobs


def traces(bench):
    """Return the names of what there is of runs in the home."""
    folders = (bench.home.root / "runs", bench.home.root / "secrets")
    return {path.name for folder in folders if folder.is_dir() for path in folder.iterdir()}


def whole(bench, run):
    """Say whether the run's store, environment and secrets are there as they were submitted."""
    store = bench.home.runs / run
    return (
        (store / "job.json").stat().st_size > 0
        and folder_digest(store / "environment") == folder_digest(bench.environment)
        and (bench.home.root / "secrets" / f"{run}.json").read_text() == '{"KEY": "value-1234"}'
    )


def test_a_batch_is_there_whole_in_its_order(quiet):
    batch = submissions(quiet, 5)

    runs = quiet.plane.submit_all(batch)

    assert [run.id for run in runs] == [one.job.run for one in batch]
    assert runs == [quiet.plane.run(one.job.run) for one in batch]
    assert {run.state for run in runs} == {"queued"}
    assert all(whole(quiet, run.id) for run in runs)
    assert not [path for path in quiet.home.runs.rglob(".*") if path.exists()]


def test_no_job_at_all_is_no_run(quiet):
    assert list(quiet.plane.submit_all([])) == []
    assert quiet.plane.runs() == []


def test_a_store_shares_no_file_with_another(quiet):
    """What is written to one run's environment is in no other's."""
    first, second = (run.id for run in quiet.plane.submit_all(submissions(quiet, 2)))

    with (quiet.plane.store(first) / "environment" / "environment.py").open("a") as file:
        file.write("# changed\n")

    assert whole(quiet, second)
    assert not whole(quiet, first)


def test_a_batch_with_a_changed_environment_is_refused_without_a_trace(quiet, changed):
    *fine, last = submissions(quiet, 3)

    with pytest.raises(EnvironmentFault, match="changed while it was being submitted"):
        quiet.plane.submit_all([*fine, Submission(job=last.job, environment=changed)])

    assert quiet.plane.runs() == []
    assert traces(quiet) == set()


def test_a_batch_with_an_id_that_exists_is_refused_and_that_run_keeps_its_files(quiet):
    batch = submissions(quiet, 3)
    there = quiet.plane.submit_all(batch[1:2])[0].id

    with pytest.raises(StoreError, match=f"the run {there} exists already"):
        quiet.plane.submit_all(batch)

    assert [run.id for run in quiet.plane.runs()] == [there]
    assert traces(quiet) == {there, f"{there}.json"}
    assert whole(quiet, there)


def test_one_id_twice_in_a_batch_is_refused(quiet):
    (one,) = submissions(quiet, 1)

    with pytest.raises(StoreError, match="two of the submitted jobs have one id"):
        quiet.plane.submit_all([one, one])

    assert traces(quiet) == set()


def submit_in_threads(bench, batches):
    """Submit each batch from a thread of its own; return the threads and what each raised."""
    raised = {}

    def submit(number):
        try:
            bench.plane.submit_all(batches[number])
        except (StoreError, EnvironmentFault) as error:
            raised[number] = error

    threads = [threading.Thread(target=submit, args=(number,)) for number in range(len(batches))]
    for thread in threads:
        thread.start()
    return threads, raised


def test_those_who_wait_share_one_transaction(quiet, monkeypatch):
    """Of four submits that come while one is in its transaction, one commits for all."""
    groups = []
    add_all = Records.add_all
    monkeypatch.setattr(
        Records,
        "add_all",
        lambda records, rows, **more: groups.append(len(rows)) or add_all(records, rows, **more),
    )
    batches = [[one] for one in submissions(quiet, 5)]
    with Database(quiet.home.database).writing():
        first, _ = submit_in_threads(quiet, batches[:1])
        until(lambda: groups == [1])
        others, raised = submit_in_threads(quiet, batches[1:])
        until(lambda: len(quiet.plane._submitter._waiting) == 4)
    for thread in first + others:
        thread.join()

    assert groups == [1, 4]
    assert raised == {}
    assert all(whole(quiet, run.id) for run in quiet.plane.runs())
    assert len(quiet.plane.runs()) == 5


def test_a_submit_that_fails_in_a_group_fails_alone(quiet):
    """One has an id that exists; those who were with it are submitted all the same."""
    batches = [[one] for one in submissions(quiet, 5)]
    there = quiet.plane.submit_all(batches[2])[0].id
    turn = quiet.plane._submitter._turn
    with turn:
        threads, raised = submit_in_threads(quiet, batches)
        until(lambda: len(quiet.plane._submitter._waiting) == 5)
    for thread in threads:
        thread.join()

    assert list(raised) == [2]
    assert f"the run {there} exists already" in str(raised[2])
    assert {run.id for run in quiet.plane.runs()} == {one.job.run for (one,) in batches}
    assert all(whole(quiet, run.id) for run in quiet.plane.runs())


def test_a_submit_that_is_interrupted_while_it_waits_is_committed_by_nobody(quiet):
    (one,) = submissions(quiet, 1)
    submitter = quiet.plane._submitter

    def interrupt(*_):
        submitter._turn.release()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    submitter._turn.acquire()
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            quiet.plane.submit_all([one])
    finally:
        signal.signal(signal.SIGALRM, before)

    assert not submitter._waiting
    assert traces(quiet) == set()
    assert len(quiet.plane.submit_all([one])) == 1


CALLS = ("mkdir", "open", "fsync", "rename", "unlink", "rmdir")


def submit_and_be_killed(bench, batch, at):
    """Submit in a process that is killed at its call number `at`; say whether it was."""
    child = os.fork()
    if child == 0:
        count = 0

        def deadly(call):
            def act(*args, **more):
                nonlocal count
                count += 1
                if count > at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **more)

            return act

        plane = bench.open(supervisor=("true",))
        for name in CALLS:
            setattr(os, name, deadly(getattr(os, name)))
        with contextlib.suppress(BaseException):
            plane.submit_all(batch)
            os._exit(0)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_batch_that_was_killed_at_any_call_is_there_whole_or_not_at_all(tmp_path):
    """And what it left is swept away."""
    kept = []
    for at in range(500):
        folder = tmp_path / str(at)
        folder.mkdir()
        bench = Bench(folder)
        batch = submissions(bench, 2)
        runs = {one.job.run for one in batch}

        killed = submit_and_be_killed(bench, batch, at)

        records = Records(Database(bench.home.database))
        sweep_incoming(bench.home)
        records.with_states(lambda states, home=bench.home: sweep_uncommitted(home, states))
        bench.plane._secrets.sweep(records.unsettled())
        there = {run.id for run in bench.plane.runs()}
        assert there in (set(), runs), at
        assert traces(bench) == there | {f"{run}.json" for run in there}, at
        assert all(whole(bench, run) for run in there), at
        kept.append(bool(there))
        if not killed:
            break
    assert not killed
    assert kept == sorted(kept)
    assert kept.count(False) > 20
    assert kept.count(True) >= 3


# The barrier


@pytest.fixture
def waiting(monkeypatch):
    """Return what has the kernel say that much, or nothing, waits to be written."""
    return lambda *, much: monkeypatch.setattr(barriers, "_much_waits", lambda: much)


def synced(monkeypatch, paths):
    """Return what is synced, one by one, by a barrier over `paths`."""
    found = []
    monkeypatch.setattr(barriers, "sync_file", found.append)
    barrier(paths)
    return found


def many_files(folder):
    (folder / "deep").mkdir()
    for number in range(20):
        (folder / "deep" / str(number)).write_text("x")
    return list(tree(folder))


def test_few_files_are_synced_one_by_one_where_much_waits(tmp_path, monkeypatch, waiting):
    waiting(much=True)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "file").write_text("x")

    expected = [tmp_path / "deep" / "file", tmp_path / "deep", tmp_path]
    assert synced(monkeypatch, tree(tmp_path)) == expected


def test_many_are_synced_one_by_one_where_the_file_system_is_not_known(tmp_path, monkeypatch):
    paths = many_files(tmp_path)
    monkeypatch.setattr(barriers, "_KNOWN", {})

    assert synced(monkeypatch, iter(paths)) == paths


@pytest.mark.parametrize(("count", "much"), [(100, True), (100, False), (2, False)])
def test_they_are_synced_at_once_where_the_kernel_can(tmp_path, monkeypatch, waiting, count, much):
    paths = many_files(tmp_path)[:count]
    at_once = barriers._sync_file_system(tmp_path)
    waiting(much=much)

    assert synced(monkeypatch, iter(paths)) == ([] if at_once else paths)


def test_what_waits_is_what_the_kernel_says(monkeypatch):
    said = "MemTotal: 24105 kB\nDirty:  {} kB\nWriteback: 1 kB\n"
    read = {}
    monkeypatch.setattr(Path, "read_text", lambda _: read["text"])

    read["text"] = said.format(60_000)
    assert not barriers._much_waits()
    read["text"] = said.format(70_000)
    assert barriers._much_waits()
    read["text"] = "another kernel"
    assert barriers._much_waits()


def test_a_kernel_that_loses_errors_is_not_relied_on():
    assert barriers._kernel("5.7.19-generic") < barriers._REPORTS_ERRORS
    assert barriers._kernel("5.8.0") >= barriers._REPORTS_ERRORS
    assert barriers._kernel("6.18.44-fc-v669") >= barriers._REPORTS_ERRORS


def test_what_is_in_place_was_synced_before_and_its_name_after(quiet, monkeypatch, waiting):
    """All that a store holds reaches the disk before its rename, and that before the commit."""
    waiting(much=True)
    order = []
    fsync, rename = os.fsync, Path.rename

    def note_sync(descriptor):
        order.append(("sync", Path(f"/proc/self/fd/{descriptor}").readlink()))
        return fsync(descriptor)

    def note_rename(path, target):
        order.append(("rename", path))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "rename", note_rename)
    (run,) = quiet.plane.submit_all(submissions(quiet, 1))

    incoming = quiet.home.runs / f".incoming-{run.id}"
    renamed = order.index(("rename", incoming))
    before = {path for kind, path in order[:renamed] if kind == "sync"}
    after = {path for kind, path in order[renamed:] if kind == "sync"}
    names = {"job.json", ".uncommitted", "environment", "environment/environment.py", "."}
    assert {incoming / name for name in names} <= before
    assert quiet.home.root / "secrets" / f"{run.id}.json" in before
    assert after == {quiet.home.runs}
