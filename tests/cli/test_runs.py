"""`flash runs`, `flash cancel` and `flash checkpoints` on a real plane."""

import json

import pytest

from flash.cli import root
from flash.worker.checkpoints import CheckpointStore

SLEEP = "note_pid(); time.sleep(300)\n"


@pytest.fixture
def flash(bench, monkeypatch, capsys):
    """Return a function that runs a command line in this process: exit code, stdout, stderr."""
    monkeypatch.setenv("FLASH_HOME", str(bench.home.root))

    def run(*words):
        code = root.run(words)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def test_no_runs(flash, monkeypatch, tmp_path):
    monkeypatch.setenv("FLASH_HOME", str(tmp_path))

    assert flash("runs", "--json") == (0, "[]\n", "")
    assert "flash train" in flash("runs")[2]


def test_runs_are_listed_newest_first(bench, flash):
    done, failed = bench.submit(""), bench.submit("sys.exit(10)")
    bench.wait(done)
    bench.wait(failed)

    listed = json.loads(flash("runs", "--json")[1])
    shown = flash("runs")[1].splitlines()

    expected = [(failed, "failed"), (done, "done")]
    assert [(run["run"], run["state"]) for run in listed[:2]] == expected
    assert [tuple(line.split()[:2]) for line in shown[1:3]] == expected
    assert shown[0].split() == ["run", "state", "algorithm", "model", "age", "took"]


def test_cancel_of_a_queued_run_is_at_once(bench, flash):
    run = bench.submit("", memory_gib=1e6)

    assert flash("cancel", run) == (0, f"{run} cancelled\n", "")


def test_cancel_of_a_running_one_says_how_to_see_it_end(bench, flash):
    run = bench.submit(SLEEP)
    bench.started(run)

    code, said, _ = flash("cancel", run[:8])

    assert code == 0
    assert f"flash status {run} --follow" in said
    assert bench.wait(run).state == "cancelled"
    assert flash("status", run, "-f")[0] == 1


def test_cancel_of_a_run_that_has_ended_says_so(bench, flash):
    run = bench.submit("")
    bench.wait(run)

    assert flash("cancel", run) == (0, f"{run} has ended already: done\n", "")


def test_cancel_of_a_run_that_failed_says_how_that_ended(bench, flash):
    run = bench.submit("sys.exit(11)")
    bench.wait(run)

    assert flash("cancel", run)[1] == (
        f"{run} has ended already: failed, attempt 1 ran out of memory: "
        "the worker exited with code 11\n"
    )


def test_cancel_as_json(bench, flash):
    run = bench.submit("", memory_gib=1e6)

    assert json.loads(flash("cancel", run, "--json")[1]) == {
        "run": run,
        "state": "cancelled",
        "cancel_requested": True,
    }


@pytest.fixture
def saved(bench):
    """Return a run with checkpoints of steps 2, 4 and 6, of which 4 is best and 6 is torn."""
    run = bench.submit("")
    bench.wait(run)
    checkpoints = CheckpointStore(bench.plane.store(run))
    for step, loss in ((2, 1.5), (4, 1.25), (5, 1.375), (6, 1.0)):
        checkpoints.save(
            step,
            lambda folder: (folder / "weights").write_bytes(b"x" * 2000),
            metrics={"eval_loss": loss},
        )
    (bench.plane.store(run) / "checkpoints" / "step-000006" / "weights").write_bytes(b"torn")
    return run


def test_complete_checkpoints_are_listed_with_best_and_last(saved, flash):
    listed = json.loads(flash("checkpoints", saved, "--json")[1])

    assert [(item["checkpoint"], item["loss"]) for item in listed] == [
        (f"{saved}/step-2", 1.5),
        (f"{saved}/step-4", 1.25),
        (f"{saved}/step-5", 1.375),
    ]
    assert [item["best"] for item in listed] == [False, True, False]
    assert [item["last"] for item in listed] == [False, False, True]


def test_checkpoints_for_people(saved, flash):
    lines = [line.split() for line in flash("checkpoints", saved)[1].splitlines()]

    assert lines[2] == [f"{saved}/step-4", "1.2500", "0.0", "MB", "best"]
    assert lines[3] == [f"{saved}/step-5", "1.3750", "0.0", "MB", "last"]


def test_of_a_run_with_rewards_the_best_checkpoint_has_the_highest(bench, flash):
    run = bench.submit("", memory_gib=1e6)
    checkpoints = CheckpointStore(bench.plane.store(run))
    for step, metrics in ((2, {"eval_reward": 0.5}), (4, {"eval_reward": 0.75}), (5, {})):
        checkpoints.save(
            step, lambda folder: (folder / "w").touch(), metrics={"reward": 0.9, **metrics}
        )

    listed = json.loads(flash("checkpoints", run, "--json")[1])
    lines = [line.split() for line in flash("checkpoints", run)[1].splitlines()]

    assert [(item["reward"], item["best"]) for item in listed] == [
        (0.5, False),
        (0.75, True),
        (None, False),
    ]
    assert lines[0] == ["checkpoint", "held-out", "reward", "size"]
    assert lines[2] == [f"{run}/step-4", "0.750", "0.0", "MB", "best"]
    assert lines[3] == [f"{run}/step-5", "0.0", "MB", "last"]


def test_a_checkpoint_that_is_no_better_than_before_training_is_not_the_best(bench, flash):
    run = bench.submit("say('evaluation', step=0, reward=0.75, success=0.5)")
    bench.wait(run)
    checkpoints = CheckpointStore(bench.plane.store(run))
    for step, reward in ((2, 0.5), (4, 0.75)):
        checkpoints.save(
            step, lambda folder: (folder / "w").touch(), metrics={"eval_reward": reward}
        )

    code, said, note = flash("checkpoints", run)

    assert "best" not in said
    assert (code, note) == (
        0,
        "none is better than before training: held-out reward 0.750\n",
    )


def test_a_run_without_checkpoints_says_so(bench, flash):
    run = bench.submit("", memory_gib=1e6)

    assert flash("checkpoints", run) == (0, "", f"{run} has no complete checkpoint\n")
    assert flash("checkpoints", run, "--json")[1] == "[]\n"
