"""What goes by which rule, what never does, and that a removal can be cut short anywhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time

import pytest
import sqlalchemy as sa

from flash.errors import StoreError, UsageError
from flash.evaluations import EvaluationStore
from flash.files import write_atomic
from flash.home import FlashHome
from flash.plane import database as tables
from flash.plane.database import Database
from flash.plane.deployments import Deployments, Wish
from flash.plane.garbage import DAY_S, Garbage, Rules
from flash.plane.ids import new_run_id
from flash.plane.lock import try_lock
from flash.plane.records import Records
from flash.plane.removal import disk_bytes
from flash.worker.checkpoints import CheckpointStore

pytestmark = pytest.mark.slow

NOW_S = time.time()
OLD_S = NOW_S - 100 * DAY_S


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A home with an empty database, to be copied: making one takes longer than a test."""
    root = tmp_path_factory.mktemp("template") / "home"
    Database(FlashHome(root).database).close()
    return root


class Place:
    """A home whose runs are rows and files, and no process."""

    def __init__(self, root):
        self.home = FlashHome(root)
        self.database = Database(self.home.database)
        self.records = Records(self.database)
        self._made_s = NOW_S - 200 * DAY_S

    def run(self, state="done", *, ended_s=NOW_S, attempt="released", start=None, files=()):
        """Add a run with a store; returns its id."""
        self._made_s += 1
        run = new_run_id(self._made_s)
        store = self.home.runs / run
        store.mkdir(mode=0o700)
        started = {"folder": str(start), "reference": "it"} if start else None
        (store / "job.json").write_text(json.dumps({"warm_start": started}))
        for name in files:
            path = store / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("x" * 5000)
        self.records.add(run, spec={"sink": {}}, caller={}, put=lambda: None, take_back=print)
        final = state in {"done", "failed", "cancelled"}
        self.change(
            tables.runs, "id", run, state=state, updated_s=ended_s,
            finished_s=ended_s if final else None,
        )  # fmt: skip
        with self.database.writing() as connection:
            connection.execute(
                tables.attempts.insert().values(
                    run=run, number=1, state=attempt, provider="local", offer={}, started_s=1.0
                )
            )
        return run

    def change(self, table, column, value, **values):
        with self.database.writing() as connection:
            row = table.c[column]
            connection.execute(table.update().where(row == value).values(**values))

    def checkpoint(self, run, step=10):
        def write(folder):
            for part in ("adapter", "state"):
                (folder / part).mkdir()
                (folder / part / "weights").write_text(part * 5000)

        store = CheckpointStore(self.home.runs / run)
        store.save(step, write, metrics={})
        return store

    def find(self, **rules):
        return Garbage(self.home).find(Rules(**rules))

    def kinds(self, **rules):
        return sorted((item.kind, item.run) for item in self.find(**rules)[0])

    def collect(self, **rules):
        """Find and remove; return what stayed."""
        garbage = Garbage(self.home)
        items, _ = garbage.find(Rules(**rules))
        return garbage.remove(items, lambda _: None)

    def rows(self):
        with self.database.reading() as connection:
            return set(connection.scalars(sa.select(tables.runs.c.id)))

    def trash(self):
        folder = self.home.root / "trash"
        return list(folder.iterdir()) if folder.exists() else []


@pytest.fixture
def place(template, tmp_path):
    """A home of the test's own."""
    shutil.copytree(template, tmp_path / "home")
    return Place(tmp_path / "home")


def aged(path, age_s):
    os.utime(path, (NOW_S - age_s, NOW_S - age_s), follow_symlinks=False)
    return path


def folder(path, *, age_s=0.0):
    path.mkdir(parents=True)
    (path / "file").write_text("x" * 5000)
    return aged(path, age_s)


def test_there_is_nothing_to_remove_in_a_new_home(place):
    assert place.find() == ([], [])


def test_the_resume_state_of_a_run_that_is_done_goes_and_its_adapters_stay(place):
    run = place.run()
    checkpoints = place.checkpoint(run)
    torn = place.home.runs / run / "checkpoints" / "step-000020" / "adapter"
    torn.mkdir(parents=True)

    [item] = place.find()[0]
    assert (item.kind, item.run) == ("state", run)
    assert 25_000 <= item.size_bytes < 100_000
    assert place.collect() == []

    [left] = checkpoints.list()
    assert (left.step, left.resumable) == (10, False)
    assert (left.adapter / "weights").exists()
    assert not (left.folder / "state").exists()
    assert not torn.exists()
    assert place.find() == ([], [])


@pytest.mark.parametrize("state", ["queued", "provisioning", "running", "failed", "cancelled"])
def test_the_resume_state_of_a_run_that_may_go_on_stays(place, state):
    run = place.run(state)
    place.checkpoint(run)

    assert place.find() == ([], [])
    assert place.kinds(older_than_s=0) == (
        [("run", run)] if state in {"failed", "cancelled"} else []
    )


def test_what_a_killed_worker_left_goes(place):
    names = (
        "attempts/1/environment/a.py",
        "attempts/1/events.jsonl",
        "attempts/1/.x.json.ab_d12g8",
    )
    run = place.run(files=names)
    live = place.run("running", files=names)
    aged(place.home.runs / run / names[2], 2 * DAY_S)

    assert place.kinds() == [("leftover", run)]
    assert place.collect() == []

    assert [path.name for path in (place.home.runs / run / "attempts" / "1").iterdir()] == [
        "events.jsonl"
    ]
    assert all((place.home.runs / live / name).exists() for name in names)


def test_rollouts_and_logs_go_when_they_are_asked_for(place):
    names = ("rollouts/step-000001.jsonl.gz", "attempts/1/worker.log", "attempts/1/events.jsonl")
    run, live = place.run("failed", files=names), place.run("queued", files=names)
    store = place.home.runs / run

    assert place.find() == ([], [])
    assert place.kinds(rollouts=True) == [("rollouts", run)]
    assert place.kinds(rollouts=True, logs=True) == [("logs", run), ("rollouts", run)]
    assert place.collect(rollouts=True, logs=True) == []

    assert not (store / "rollouts").exists()
    assert [path.name for path in (store / "attempts" / "1").iterdir()] == ["events.jsonl"]
    assert all((place.home.runs / live / name).exists() for name in names)


def test_runs_that_ended_long_ago_go_with_all_of_them(place):
    old, young, live = place.run(ended_s=OLD_S), place.run(), place.run("running", ended_s=OLD_S)
    secrets = place.home.folder("secrets") / f"{old}.json"
    secrets.write_text("{}")

    assert place.kinds(older_than_s=30 * DAY_S) == [("run", old)]
    assert place.collect(older_than_s=30 * DAY_S) == []

    assert place.rows() == {young, live}
    assert {path.name for path in place.home.runs.iterdir()} == {young, live}
    assert not secrets.exists()
    assert place.trash() == []


@pytest.mark.parametrize(
    ("state", "attempt"), [("running", "live"), ("queued", "ended"), ("failed", "ended")]
)
def test_a_named_run_goes_only_when_nothing_of_it_is_left_to_do(place, state, attempt):
    run = place.run(state, attempt=attempt)

    with pytest.raises(UsageError, match=run):
        place.find(runs=[run])


def test_a_run_of_which_something_is_still_to_be_told_stays(place):
    run = place.run(ended_s=OLD_S)
    with place.database.writing() as connection:
        connection.execute(
            tables.notices.insert().values(
                run=run, sink="webhook", kind="done", data={}, created_s=1.0, not_before_s=2.0
            )
        )

    items, kept = place.find(older_than_s=DAY_S)

    assert items == []
    assert [one.what for one in kept] == [run]


def test_a_named_run_goes_and_nothing_else(place):
    run, other = place.run(files=["adapter/weights"]), place.run(ended_s=OLD_S)
    place.checkpoint(other)

    assert place.kinds(runs=[run]) == [("run", run)]
    assert place.collect(runs=[run]) == []

    assert place.rows() == {other}


def test_a_run_that_another_was_trained_from_stays_as_long_as_that_one(place):
    first = place.run(ended_s=OLD_S)
    second = place.run(ended_s=OLD_S, start=place.home.runs / first / "adapter")
    third = place.run(start=place.home.runs / second / "checkpoints" / "step-000010" / "adapter")

    items, kept = place.find(older_than_s=DAY_S)

    assert items == []
    assert {one.what: one.why.split()[-4] for one in kept} == {first: second, second: third}
    assert place.kinds(runs=[first, second, third]) == [
        ("run", run) for run in sorted([first, second, third])
    ]
    assert place.collect(runs=[third]) == []
    assert place.collect(older_than_s=DAY_S) == []
    assert place.rows() == set()


def test_a_run_that_one_that_may_go_on_was_trained_from_cannot_be_removed(place):
    """A person may remove what a run that is done was trained from: nobody reads it again."""
    base = place.run()
    done = place.run(start=place.home.runs / base / "adapter")
    assert place.kinds(runs=[base]) == [("run", base)]
    failed = place.run("failed", start=place.home.runs / base / "adapter")

    with pytest.raises(UsageError, match=failed):
        place.find(runs=[base])

    assert done in place.rows()


def test_a_run_with_an_evaluation_stays_unless_it_is_named(place):
    run = place.run(ended_s=OLD_S)
    kept = EvaluationStore(place.home).keep({"run": run, "rows": [], "suites": {}})

    items, stays = place.find(older_than_s=DAY_S)
    [named] = place.find(runs=[run])[0]

    assert items == []
    assert kept["evaluation"] in stays[0].why
    assert kept["evaluation"] in named.why


def test_adapters_that_were_downloaded_for_no_run_go(place):
    def adapter(name, *, age_s=2 * DAY_S):
        path = place.home.folder("adapters", "hub", "org--name") / name
        path.mkdir()
        (path / "adapter_config.json").write_text("{}")
        return aged(path, age_s)

    used, unused, fresh = adapter("a" * 40), adapter("b" * 40), adapter("c" * 40, age_s=60)
    run = place.run("failed", start=used)

    assert place.kinds() == [("adapter", None)]
    assert place.collect() == []

    assert (used.exists(), unused.exists(), fresh.exists()) == (True, False, True)
    place.collect(runs=[run])
    assert place.collect() == []
    assert not used.exists()


def test_what_was_fetched_and_not_used_for_long_goes_unless_a_run_may_use_it(place):
    packages = folder(place.home.root / "overlays" / "f00d", age_s=40 * DAY_S)
    environment = folder(place.home.root / "environments" / "f00d", age_s=40 * DAY_S)
    used = folder(place.home.root / "overlays" / "beef", age_s=2 * DAY_S)
    scratch = folder(place.home.root / "overlays" / ".new-abc", age_s=2 * DAY_S)
    live = place.run("running")
    place.change(tables.runs, "id", live, created_s=NOW_S - 50 * DAY_S)
    assert place.kinds() == []
    place.change(tables.runs, "id", live, created_s=NOW_S)

    assert place.collect() == []

    assert not any(path.exists() for path in (packages, environment, scratch))
    assert used.exists()


def test_secrets_of_no_run_go(place):
    run = place.run("failed")
    secrets = place.home.folder("secrets")
    for name in (run, new_run_id()):
        (secrets / f"{name}.json").write_text("{}")

    assert place.kinds() == [("secrets", None)]
    assert place.collect() == []

    assert [path.name for path in secrets.iterdir()] == [f"{run}.json"]


def test_logs_of_chats_whose_process_is_gone_go(place):
    servers = place.home.folder("servers")
    ended = subprocess.Popen(["true"])
    ended.wait()
    kept = [f"chat-{os.getpid()}.log", "transformers-1a2b3c4d.log", "chat-mine.log", "chat-0.log"]
    for name in (f"chat-{ended.pid}.log", *kept):
        (servers / name).write_text("Error: no memory\n")

    assert place.kinds() == [("logs", None)]
    assert place.collect() == []

    assert sorted(path.name for path in servers.iterdir()) == sorted(kept)


def test_what_submits_left_goes_unless_one_is_in_progress(place):
    incoming = folder(place.home.runs / f".incoming-{new_run_id()}")
    cut = folder(place.home.runs / new_run_id())
    (cut / ".uncommitted").touch()
    lock = try_lock(place.home.root / "submits.lock")
    assert place.find() == ([], [])
    os.close(lock)

    assert place.kinds() == [("leftover", None)]
    assert place.collect() == []

    assert not incoming.exists()
    assert not cut.exists()


def test_a_store_that_the_database_does_not_know_is_told_of_and_stays(place):
    """The database may be a new one, because the old one was damaged."""
    unknown = folder(place.home.runs / new_run_id())

    items, kept = place.find(older_than_s=0)

    assert items == []
    assert [one.what for one in kept] == [str(unknown)]


def test_no_link_is_followed_out_of_the_home(place, tmp_path):
    outside = folder(tmp_path / "outside")
    run = place.run(files=["attempts/1/environment/a.py", "rollouts/a"])
    linked = place.run()
    (place.home.runs / run / "attempts/1/environment/link").symlink_to(outside)
    shutil.rmtree(place.home.runs / linked)
    elsewhere = folder(tmp_path / "elsewhere")
    folder(elsewhere / "rollouts")
    (place.home.runs / linked).symlink_to(elsewhere)

    items, kept = place.find(rollouts=True)

    assert {item.run for item in items} == {run}
    assert [one.why for one in kept] == ["a link leads there, out of the home"]
    assert place.collect(rollouts=True) == []
    assert place.collect(runs=[run, linked]) == []
    assert place.rows() == set()
    assert (outside / "file").exists()
    assert (elsewhere / "rollouts" / "file").exists()


def test_folders_without_permissions_go_too(place):
    run = place.run(files=["attempts/1/environment/deep/file"])
    (place.home.runs / run / "attempts/1/environment/deep").chmod(0)

    assert place.collect() == []
    assert not (place.home.runs / run / "attempts/1/environment").exists()


@pytest.mark.parametrize("rules", [{"older_than_s": 0}, {"rollouts": True}])
def test_a_run_that_goes_on_after_it_was_shown_loses_nothing(place, rules):
    run = place.run("failed", files=["rollouts/a"], ended_s=OLD_S)
    garbage = Garbage(place.home)
    items, _ = garbage.find(Rules(**rules))
    place.records.resume(run)

    [stayed] = garbage.remove(items, pytest.fail)

    assert stayed.what == run
    assert "gone on" in stayed.why
    assert (place.home.runs / run / "rollouts" / "a").exists()
    assert place.records.run(run).state == "queued"


def test_a_run_that_went_on_and_failed_again_loses_nothing_either(place):
    """Its end is another than the one that was shown."""
    run = place.run("failed", ended_s=OLD_S)
    garbage = Garbage(place.home)
    items, _ = garbage.find(Rules(runs=[run]))
    place.records.resume(run)
    place.records.request_cancel(run)
    assert place.records.run(run).state == "cancelled"

    assert len(garbage.remove(items, pytest.fail)) == 1
    assert place.rows() == {run}


def test_what_a_new_run_starts_from_stays_though_it_was_shown(place):
    base = place.run(ended_s=OLD_S)
    garbage = Garbage(place.home)
    items, _ = garbage.find(Rules(older_than_s=DAY_S))
    new = place.run("queued", start=place.home.runs / base / "adapter")

    [stayed] = garbage.remove(items, pytest.fail)

    assert new in stayed.why
    assert base in place.rows()


def test_one_removal_at_a_time(place):
    run = place.run()
    lock = try_lock(place.home.root / "gc.lock")

    with pytest.raises(StoreError, match="another"):
        place.collect(runs=[run])

    os.close(lock)
    assert place.collect(runs=[run]) == []


def test_change_numbers_never_fall_when_the_newest_run_goes(place):
    """Who has read the runs up to a change learns of every later one."""
    first, last = place.run(), place.run()
    _, newest = place.records.changes(None)

    assert place.collect(runs=[last]) == []

    place.records.resume(first)
    third = place.run("queued")
    assert third in {run.id for run in place.records.changes(newest)[0]}


def test_the_size_is_what_the_disk_holds_without_what_links_lead_to(tmp_path):
    (tmp_path / "home").mkdir()
    big = folder(tmp_path / "big")
    (big / "more").write_bytes(b"x" * 100_000)
    (tmp_path / "home" / "link").symlink_to(big)

    assert 0 <= disk_bytes(tmp_path / "home") < 100_000 <= disk_bytes(big)


class Cut(BaseException):
    """The power is gone."""


CALLS = ("rename", "unlink", "rmdir", "replace", "fsync", "mkdir", "open")


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.long)])
def test_a_removal_that_is_cut_short_anywhere_is_finished_by_the_next(template, tmp_path, every):
    """The run is whole or gone at each point, other runs lose nothing, and nothing is left."""
    at = every - 1
    while True:
        root = tmp_path / str(at)
        shutil.copytree(template, root)
        one = Place(root)
        files = ["adapter/weights", "attempts/1/worker.log", "rollouts/a"]
        gone, other = one.run(files=files), one.run(files=[*files, "attempts/1/environment/a"])
        one.checkpoint(other)
        write_atomic(one.home.folder("secrets") / f"{gone}.json", b"{}")
        whole = sorted(path.name for path in (one.home.runs / gone).rglob("*"))
        garbage = Garbage(one.home)
        items = [*garbage.find(Rules(runs=[gone]))[0], *garbage.find(Rules(logs=True))[0]]
        cut = _remove_until(garbage, items, at)

        if gone in one.rows():
            left = {path.name for path in (one.home.runs / gone).rglob("*")}
            assert set(whole) - left <= {"worker.log"}
        assert len(CheckpointStore(one.home.runs / other).list()) == 1
        assert one.collect() == []
        if gone in one.rows():
            one.collect(runs=[gone])
        assert one.collect(logs=True) == []
        assert one.find(logs=True) == ([], [])
        assert one.trash() == []
        assert {path.name for path in one.home.runs.iterdir()} == one.rows() == {other}
        assert list((root / "secrets").iterdir()) == []
        one.database.close()
        shutil.rmtree(root)
        if not cut:
            break
        at += every
    assert at >= 40


def _remove_until(garbage, items, at):
    """Remove, and have the power fail at call number `at` that changes a file; say if it did."""
    count = 0

    def cutting(real):
        def call(*args, **more):
            nonlocal count
            count += 1
            if count > at:
                raise Cut
            return real(*args, **more)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, cutting(getattr(os, name)))
        try:
            garbage.remove(items, lambda _: None)
        except Cut:
            return True
    return False


def deployed(place, run, state="ready"):
    """Add a deployment of the run, with its copy; returns the copy's folder."""
    deployments = Deployments(place.database)
    asked = deployments.ask(
        Wish(
            id=f"{run}/step-10",
            run=run,
            step=10,
            digest="d",
            model={"id": "org/model", "plugin": "hub"},
            backend="transformers",
            settings={},
            thinking=False,
            stop=(),
        )
    )
    if state == "undeployed":
        asked = deployments.ask_gone(asked.id)
    if state != "deploying":
        assert deployments.moved(asked, state)
    return place.home.root / "deployments" / f"{run}@step-10"


@pytest.mark.parametrize("state", ["deploying", "ready", "failed"])
def test_a_run_that_is_deployed_stays_and_so_does_its_copy(place, state):
    run = place.run(ended_s=OLD_S)
    folder(deployed(place, run, state), age_s=100 * DAY_S)

    items, kept = place.find(older_than_s=DAY_S)

    assert items == []
    assert [(one.what, one.why) for one in kept] == [(run, f"is deployed as {run}/step-10")]
    with pytest.raises(UsageError, match="is deployed as") as raised:
        place.find(runs=[run])
    assert raised.value.hint == f"first: flash undeploy {run}/step-10"


def test_a_run_that_was_undeployed_goes_with_its_deployment(place):
    run = place.run()
    deployed(place, run, "undeployed")

    assert place.collect(runs=[run]) == []

    assert place.rows() == set()
    assert Deployments(place.database).all() == []


def test_a_run_that_is_deployed_after_it_was_shown_stays(place):
    run = place.run()
    garbage = Garbage(place.home)
    items, _ = garbage.find(Rules(runs=[run]))
    deployed(place, run)

    assert [(one.what, one.why) for one in garbage.remove(items, print)] == [
        (run, f"it is deployed as {run}/step-10")
    ]
    assert place.rows() == {run}


def test_the_copy_of_what_is_not_deployed_goes_unless_it_is_being_made(place):
    gone, asked = place.run(), place.run()
    old = folder(deployed(place, gone, "undeployed"), age_s=2 * DAY_S)
    folder(place.home.root / "deployments" / "0nobody00", age_s=0)
    late = folder(place.home.root / "deployments" / f"{asked}@step-10", age_s=2 * DAY_S)
    garbage = Garbage(place.home)
    items, _ = garbage.find(Rules())
    assert sorted((item.kind, item.paths) for item in items) == [
        ("deployment", (path,)) for path in sorted((old, late))
    ]
    deployed(place, asked)

    kept = garbage.remove(items, lambda _: None)

    assert [(one.what, one.why) for one in kept] == [(str(late), "it was deployed meanwhile")]
    assert late.exists()
    assert not old.exists()
