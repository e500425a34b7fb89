"""`flash gc`: it shows first, asks, and says what it freed."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys

import pytest

from flash.cli import gc, root
from flash.worker.checkpoints import CheckpointStore

pytestmark = pytest.mark.slow


@pytest.fixture
def flash(bench, monkeypatch, capsys):
    """Return a function that runs a command line in this process: exit code, stdout, stderr."""
    monkeypatch.setenv("FLASH_HOME", str(bench.home.root))

    def run(*words):
        code = root.run(words)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture(scope="module")
def ended(bench):
    """A run that is done."""
    run = bench.submit("")
    bench.wait(run, lambda found: found.final and bench.unfinished() == [])
    return run


@pytest.fixture
def done(bench, ended):
    """A run that is done and has a checkpoint of half a megabyte to resume from."""

    def write(folder):
        for part in ("adapter", "state"):
            (folder / part).mkdir()
            (folder / part / "weights").write_bytes(b"x" * 500_000)

    CheckpointStore(bench.plane.store(ended)).save(1, write, metrics={})
    return ended


def state(bench, run):
    return bench.plane.store(run) / "checkpoints" / "step-000001" / "state"


def test_nothing_to_remove(flash):
    assert flash("gc") == (0, "", "there is nothing to remove\n")


def test_what_would_go_is_shown_and_stays(flash, bench, done):
    code, said, _ = flash("gc", "--dry-run")

    assert code == 0
    row = next(line for line in said.splitlines() if done in line)
    assert row.split()[:4] == ["state", done, "0.5", "MB"]
    assert "0.5 MB in all" in said
    assert state(bench, done).exists()


def test_without_a_terminal_nothing_goes_unless_that_was_said(flash, bench, done):
    code, said, error = flash("gc")

    assert code == 2
    assert done in said
    assert "--yes" in error
    assert state(bench, done).exists()

    assert "freed 0.5 MB" in flash("gc", "--yes")[1]
    assert not state(bench, done).exists()
    assert flash("gc", "--yes") == (0, "", "there is nothing to remove\n")


def test_a_run_that_was_removed_is_no_longer_listed(flash, bench):
    run = bench.submit("print('x' * 900_000)")
    bench.wait(run, lambda found: found.final and bench.unfinished() == [])
    store = bench.plane.store(run)

    code, said, _ = flash("gc", run, "--yes")

    assert code == 0
    assert "freed 0.9 MB" in said
    assert run not in flash("runs")[1]
    assert flash("status", run)[0] == 2
    assert not store.exists()


def test_a_run_that_has_not_ended_cannot_be_removed(flash, bench):
    run = bench.submit("", memory_gib=1e6)

    code, _, error = flash("gc", run, "--yes")

    assert code == 2
    assert f"{run} is " in error
    assert f"flash cancel {run}" in error
    bench.plane.cancel(run)


def test_as_json(flash, done):
    looked = json.loads(flash("gc", "--dry-run", "--json")[1])
    removed = json.loads(flash("gc", "--yes", "--json")[1])

    assert list(removed) == [*gc.JSON_KEYS]
    [item] = looked["items"]
    assert (item["kind"], item["run"], item["removed"]) == ("state", done, False)
    assert removed["items"] == [item | {"removed": True}]
    assert (looked["freed_bytes"], removed["freed_bytes"]) == (0, item["size_bytes"])


@pytest.mark.parametrize(
    "words", [["last", "--logs"], ["last", "--older-than", "3"], ["--json"], ["--older-than", "-1"]]
)
def test_what_cannot_be_meant_is_refused(flash, bench, done, words):
    code, _, error = flash("gc", *words)

    assert code == 2
    assert error
    assert state(bench, done).exists()


@pytest.mark.parametrize(("answer", "stays"), [("n", True), ("", True), ("y", False)])
def test_in_a_terminal_it_asks(bench, done, answer, stays):
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-m", "flash", "gc"],
        env={**os.environ, "FLASH_HOME": str(bench.home.root), "NO_COLOR": "1"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    said = read_until(ours, b"[y/N]: ")

    os.write(ours, f"{answer}\n".encode())

    said += read_until(ours, None)
    assert child.wait() == 0
    os.close(ours)
    assert done in said
    assert ("nothing was removed" in said) is stays
    assert state(bench, done).exists() is stays


def read_until(descriptor, mark):
    said = b""
    while mark is None or mark not in said:
        try:
            piece = os.read(descriptor, 4096)
        except OSError:  # the other side is closed
            break
        if not piece:
            break
        said += piece
    return said.decode()
