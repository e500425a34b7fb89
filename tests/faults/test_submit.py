"""A submit whose disk fails at any call: the run is there whole, or not at all, and told of."""

import json
import os
import shutil

import attrs
import pytest
from faults.disk import FAULTS, Fault, failing, few_files, open_files, small_files
from faults.every_point import Operation, strike_everywhere
from plane_bench import Bench

from flash.environments import folder_digest
from flash.errors import StoreError
from flash.home import FlashHome
from flash.job import Job, read_job
from flash.plane.ids import new_run_id
from flash.plane.plane import Plane
from flash.plane.secrets import RunSecrets
from flash.plane.store import sweep_incoming, sweep_uncommitted

SECRETS = {"KEY": "kanarienvogel-0815"}


@pytest.fixture(autouse=True)
def memory_is_enough(monkeypatch):
    """Syncs are counted and fail, but wait for no real disk: what a power cut does is elsewhere."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A home with its database, to be copied, and a job for its environment."""
    bench = Bench(tmp_path_factory.mktemp("made"))
    bench.plane._records._database.close()
    return bench


class Home:
    """A copy of a home in which nothing supervises."""

    def __init__(self, folder, made):
        self.home = FlashHome(folder / "home")
        shutil.copytree(made.home.root, self.home.root)
        self.environment = made.environment
        self.template = made.job("pass", secrets=tuple(SECRETS))
        self.plane = Plane(self.home, supervisor=("true",))

    def submit(self):
        job = attrs.evolve(self.template, run=new_run_id())
        self.plane.submit(job, environment=self.environment, secrets=SECRETS)

    def sweep(self):
        """Do what the next supervisor begins with."""
        sweep_incoming(self.home)
        live = [run.id for run in self.plane.runs()]
        sweep_uncommitted(self.home, live)
        RunSecrets(self.home).sweep(live)

    def sweep_ended(self):
        """Do what the next supervisor begins with, for the secrets of runs that have ended."""
        RunSecrets(self.home).sweep([run.id for run in self.plane.runs() if not run.final])

    def traces(self):
        folders = (self.home.root / "runs", self.home.root / "secrets")
        return [path for folder in folders if folder.is_dir() for path in folder.iterdir()]

    def check(self):
        """See that every run is whole, and that there is nothing of any other."""
        runs = [run.id for run in self.plane.runs()]
        assert {path.name.removesuffix(".json") for path in self.traces()} == set(runs)
        for run in runs:
            store = self.plane.store(run)
            assert Job.from_dict(read_job(store / "job.json")).run == run
            assert folder_digest(store / "environment") == folder_digest(self.environment)
            kept = self.home.root / "secrets" / f"{run}.json"
            assert json.loads(kept.read_text()) == SECRETS
            assert kept.stat().st_mode & 0o777 == 0o600
        return len(runs)


def whole_or_not_at_all(home, error):
    if error is None:
        assert len(home.plane.runs()) == 1
    elif home.plane.runs():
        assert f"{home.plane.runs()[0].id} is submitted" in error.message
        assert "flash status" in error.hint
    elif not any(word in error.message for word in ("Read-only", "Input/output", "Too many")):
        assert home.traces() == [], "what can be removed is removed at once"
    home.sweep()
    home.check()


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_submit_with_a_fault_at_each_call(tmp_path, made, fault):
    submitting = Operation(
        prepare=lambda folder: Home(folder, made),
        act=Home.submit,
        sound=whole_or_not_at_all,
        done=Home.check,
    )

    assert strike_everywhere(tmp_path, submitting, fault) >= 6


def failed_run(folder, made):
    """Return a home with one run, which has failed and whose secrets are forgotten."""
    home = Home(folder, made)
    home.submit()
    [run] = home.plane.runs()
    home.plane._records.give_up(run, "it failed", None)
    RunSecrets(home.home).forget(run.id)
    return home


def resume(home):
    [run] = home.plane.runs()
    if run.final:
        home.plane.resume(run.id, secrets=lambda names: SECRETS)


def resumed_with_its_secrets_or_as_it_was(home, error):
    home.sweep_ended()
    [run] = home.plane.runs()
    kept = home.home.root / "secrets" / f"{run.id}.json"
    assert run.state == ("failed" if not kept.exists() else "queued")
    assert error is not None or run.state == "queued"
    if error is not None and run.state == "queued":
        assert f"{run.id} is resumed, but nothing supervises it yet" in error.message
    if kept.exists():
        assert json.loads(kept.read_text()) == SECRETS


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_resume_with_a_fault_at_each_call(tmp_path, made, fault):
    resuming = Operation(
        prepare=lambda folder: failed_run(folder, made),
        act=resume,
        sound=resumed_with_its_secrets_or_as_it_was,
        done=lambda home: resumed_with_its_secrets_or_as_it_was(home, None),
    )

    assert strike_everywhere(tmp_path, resuming, fault) >= 3


@pytest.mark.slow
def test_a_submit_where_the_kernel_lets_no_file_grow_beyond_any_size(tmp_path, made):
    """This reaches SQLite, which writes from C: each page of its log fails in turn."""
    failed = 0
    for step in range(200):
        folder = tmp_path / str(step)
        folder.mkdir()
        home = Home(folder, made)
        error = None
        with small_files(step * 512):
            try:
                home.submit()
            except StoreError as caught:
                error = caught
        whole_or_not_at_all(home, error)
        home.submit()
        home.check()
        home.plane._records._database.close()
        if error is None and step > 0 and failed:
            break
        failed += 1
    else:
        pytest.fail("it never succeeded")

    assert failed > 5


@pytest.mark.slow
def test_a_submit_where_the_kernel_gives_no_more_descriptors(tmp_path, made):
    failed = 0
    for more in range(40):
        folder = tmp_path / str(more)
        folder.mkdir()
        home = Home(folder, made)
        before = open_files()
        error = None
        with few_files(more):
            try:
                home.submit()
            except StoreError as caught:
                error = caught
        left = {n: p for n, p in open_files().items() if before.get(n) != p and "flash.db" not in p}
        assert not left
        whole_or_not_at_all(home, error)
        home.submit()
        home.check()
        home.plane._records._database.close()
        if error is None:
            break
        failed += 1

    assert failed > 3


def test_a_run_whose_supervisor_cannot_be_started_is_submitted_and_the_error_says_so(
    tmp_path, made
):
    home = Home(tmp_path, made)
    home.plane = Plane(home.home, supervisor=("/no/such/program",))

    with pytest.raises(StoreError, match="is submitted, but nothing supervises it") as raised:
        home.submit()

    assert "flash status" in raised.value.hint
    assert home.check() == 1


def test_secrets_that_cannot_be_read_are_a_sentence(tmp_path):
    home = FlashHome(tmp_path)
    (home.folder("secrets") / "0abcdefgh.json").write_bytes(b"\xff{")

    with pytest.raises(StoreError, match="damaged") as raised:
        RunSecrets(home).values("0abcdefgh", ["KEY"])

    assert "submit the run again" in raised.value.hint


def test_secrets_that_cannot_be_removed_are_a_sentence(tmp_path):
    home = FlashHome(tmp_path)
    RunSecrets(home).replace("0abcdefgh", SECRETS)
    stays = Fault(30, frozenset({"unlink"}), lasting=True)

    with failing(tmp_path, stays, 0), pytest.raises(StoreError, match="cannot remove the secrets"):
        RunSecrets(home).forget("0abcdefgh")
    with failing(tmp_path, stays, 0), pytest.raises(StoreError, match="cannot remove the secrets"):
        RunSecrets(home).sweep([])
