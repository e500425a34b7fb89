"""`flash resume` on a real plane: a run that ended goes on, with its id and its checkpoints."""

import json
import shutil

import pytest

from flash.cli import root

pytestmark = pytest.mark.slow  # whole runs, one after the other

FAIL_ONCE = (
    "say('log', message=f'attempt {attempt} speaks')\n"
    "if attempt == 1: sys.exit(11)\n"
    "say('metric', step=2, total=2, loss=1.0)\n"
    "say('done', steps=2)\n"
)


@pytest.fixture
def flash(bench, monkeypatch, capsys, tmp_path):
    """Return a function that runs a command line in this process: exit code, stdout, stderr."""
    monkeypatch.setenv("FLASH_HOME", str(bench.home.root))
    monkeypatch.chdir(tmp_path)

    def run(*words):
        code = root.run(words)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def save(bench, run, step):
    """Put a checkpoint into the run's store as a worker would."""
    from flash.worker.checkpoints import CheckpointStore

    CheckpointStore(bench.plane.store(run)).save(
        step, lambda folder: (folder / "weights").write_text("w"), metrics={}
    )


def test_a_failed_run_goes_on_under_its_id_and_the_status_tells_it(bench, flash):
    run = bench.submit(FAIL_ONCE)
    assert bench.wait(run).state == "failed"
    assert f"flash resume {run}" in flash("status", run)[1]

    code, said, err = flash("resume", run[:7])

    status = json.loads(flash("status", run, "--json")[1])
    assert code == 0
    assert f"{run} goes on from the start: it had saved no checkpoint, as attempt 2" in err
    assert f"{run} done" in said
    assert "attempt 2 speaks" in said
    assert "attempt 1 speaks" not in said
    assert "warning" not in err
    assert (status["state"], status["error"], status["hint"]) == ("done", None, None)
    assert [one["outcome"] for one in status["attempts"]] == ["out_of_memory", "finished"]
    assert status["attempts"][0]["then"].endswith("; resumed by hand")


def test_a_cancelled_run_goes_on_from_its_newest_checkpoint(bench, flash):
    run = bench.submit("if attempt == 1: note_pid(); time.sleep(300)")
    bench.started(run)
    save(bench, run, 4)
    bench.plane.cancel(run)
    assert bench.wait(run).state == "cancelled"

    code, said, err = flash("resume", run, "--background")

    assert (code, said) == (0, f"{run}\n")
    assert f"{run} goes on from step 4, as attempt 2" in err
    assert bench.wait(run).state == "done"
    assert not bench.plane.run(run).cancel_requested


def test_a_run_that_is_done_is_refused(bench, flash):
    run = bench.submit("")
    bench.wait(run)

    code, _, err = flash("resume", run)

    assert code == 2
    assert f"the run {run} is done" in err
    assert "submit a config again" in err


def test_a_run_that_has_not_ended_is_refused(bench, flash):
    run = bench.submit("", memory_gib=1e6)

    code, _, err = flash("resume", run)

    assert code == 2
    assert f"the run {run} has not ended: it is queued" in err


def test_a_run_whose_store_is_gone_is_refused_and_stays_as_it_is(bench, flash):
    run = bench.submit("sys.exit(11)")
    bench.wait(run)
    shutil.rmtree(bench.plane.store(run))

    code, _, err = flash("resume", run)

    assert code == 1
    assert f"{bench.plane.store(run)}/job.json" in err
    assert bench.plane.run(run).state == "failed"


def test_its_secrets_are_looked_for_again_and_a_missing_one_is_named(bench, flash, monkeypatch):
    run = bench.submit(
        "assert secrets == {'SERVICE_KEY': f'value-{attempt}'}\nif attempt == 1: sys.exit(11)",
        secrets={"SERVICE_KEY": "value-1"},
    )
    bench.wait(run)
    kept = bench.home.root / "secrets" / f"{run}.json"
    bench.until(lambda: not kept.exists())

    code, _, err = flash("resume", run)
    assert code == 2
    assert "SERVICE_KEY has no value" in err
    assert "export it, or write it into .env.local or .env" in err
    assert bench.plane.run(run).state == "failed"

    monkeypatch.setenv("SERVICE_KEY", "value-2")
    assert flash("resume", run)[0] == 0
    bench.until(lambda: not kept.exists())


def test_a_run_at_its_budget_is_given_more_or_refused(bench, flash):
    run = bench.submit("if attempt == 1: note_pid(); time.sleep(300)", max_hours=0.5 / 3600)
    assert bench.wait(run).state == "failed"
    assert bench.outcomes(run) == ["over_budget"]

    code, _, err = flash("resume", run)
    assert code == 2
    assert "the run is at its budget" in err
    assert "--max-hours" in err

    code, said, err = flash("resume", run, "--max-hours", "1", "--json")
    assert (code, json.loads(said)["state"], err) == (0, "done", "")
    assert bench.plane.run(run).spec["budget"]["max_hours"] == 1


def test_a_limit_that_is_none_is_refused(bench, flash):
    run = bench.submit("sys.exit(11)")
    bench.wait(run)

    for value in ("0", "-1", "nan", "soon"):
        code, _, err = flash("resume", run, "--max-usd", value)
        assert code == 2
        assert "--max-usd" in err

    assert bench.plane.run(run).state == "failed"


def test_a_resumed_run_gets_all_its_tries_again(bench, flash):
    run = bench.submit("if attempt <= 4: os.kill(os.getpid(), signal.SIGKILL)")
    assert bench.wait(run).state == "failed"
    assert bench.outcomes(run) == ["lost"] * 3

    assert flash("resume", run, "--json")[0] == 0
    assert bench.outcomes(run) == ["lost"] * 4 + ["finished"]
