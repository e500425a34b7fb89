"""What callers of the plane see: finding runs, their checkpoints, following."""

import sys

import pytest

from flash.errors import StoreError, UsageError
from flash.worker.checkpoints import CheckpointStore


@pytest.fixture
def quiet(fresh_bench):
    """Return the bench with a supervisor that does nothing: runs stay queued."""
    fresh_bench.plane = fresh_bench.open(supervisor=(sys.executable, "-c", ""))
    yield fresh_bench
    fresh_bench.plane = fresh_bench.open()


@pytest.fixture
def three(quiet):
    """Return three queued runs, of which the first two share a start that the third has not."""
    runs = []
    for name in ("0aaaaaaa1", "0aaaaaaa2", "0bbbbbbb1"):
        job = quiet.job("")
        job = type(job).from_dict({**job.to_dict(), "run": name})
        runs.append(quiet.plane.submit(job, environment=quiet.environment, secrets={}).id)
    return quiet.plane, runs


def test_runs_are_listed_newest_first(three):
    plane, runs = three

    assert [run.id for run in plane.runs()] == runs[::-1]


def test_a_run_is_found_by_its_id_a_unique_start_and_as_the_last(three):
    plane, runs = three

    assert [plane.find(text).id for text in ("0aaaaaaa2", "0AAAAAAA2", "0b", "last")] == [
        runs[1],
        runs[1],
        runs[2],
        runs[2],
    ]


def test_a_start_of_several_names_them(three):
    plane, runs = three

    with pytest.raises(UsageError, match=f"{runs[1]}, {runs[0]}"):
        plane.find("0a")


@pytest.mark.parametrize("text", ["zzzzzzzzz", "..", "../../etc/passwd", "", "%", "_", "0a*", "\0"])
def test_what_names_no_run_is_a_usage_error(three, text):
    plane, _ = three

    with pytest.raises(UsageError, match="there is no run"):
        plane.find(text)


def test_a_long_text_is_not_repeated_in_full(three):
    plane, _ = three

    with pytest.raises(UsageError) as raised:
        plane.find("x" * 5000)

    assert len(raised.value.message) < 200


def test_the_last_of_no_runs_says_how_to_start_one(quiet):
    with pytest.raises(UsageError, match="no run yet") as raised:
        quiet.plane.find("last")

    assert "flash train" in raised.value.hint


@pytest.mark.parametrize("run", ["..", "../runs", "last", "0aaaaaaa"])
def test_a_store_is_only_given_for_a_whole_id(quiet, run):
    with pytest.raises(UsageError):
        quiet.plane.store(run)


def save(store, *steps):
    for step in steps:
        CheckpointStore(store).save(
            step, lambda folder: (folder / "adapter").mkdir(), metrics={"loss": 1.0}
        )


def test_adapters_are_found_by_run_and_step(three):
    plane, runs = three
    store = plane.store(runs[2])
    save(store, 2, 4)
    CheckpointStore(store).save_final(lambda folder: (folder / "weights").touch())

    assert plane.adapter("0b") == store / "adapter"
    assert plane.adapter("last/step-4") == store / "checkpoints" / "step-000004" / "adapter"
    assert [checkpoint.step for checkpoint in plane.checkpoints(runs[2])] == [2, 4]


def test_an_adapter_that_is_not_there_names_those_that_are(three):
    plane, runs = three
    save(plane.store(runs[2]), 2)

    with pytest.raises(UsageError, match="no complete checkpoint of step 3") as of_step:
        plane.adapter("last/step-3")
    with pytest.raises(UsageError, match="queued and has no final adapter"):
        plane.adapter("last")

    assert f"{runs[2]}/step-2" in of_step.value.hint


def test_a_run_that_has_saved_nothing_says_how_it_comes_to_have_something(three):
    plane, runs = three

    with pytest.raises(UsageError) as queued:
        plane.adapter("last/best")
    plane.cancel(runs[2])
    with pytest.raises(UsageError) as cancelled:
        plane.adapter("last/step-3")
    CheckpointStore(plane.store(runs[2])).save_final(lambda folder: (folder / "weights").touch())
    with pytest.raises(UsageError) as trained:
        plane.adapter("last/step-3")

    assert f"no checkpoint yet; `flash status {runs[2]} --follow`" in queued.value.hint
    assert f"no checkpoint; `flash resume {runs[2]}`" in cancelled.value.hint
    assert trained.value.hint == f"it has the final adapter alone, {runs[2]}"


@pytest.mark.parametrize("reference", ["last", "last/step-2"])
@pytest.mark.parametrize("damage", ["evil", "cut", None])
def test_an_adapter_with_a_damaged_file_is_refused_and_the_file_named(three, reference, damage):
    """Of the size it had, so that only its bytes tell; of another; and one that is gone."""
    plane, runs = three
    checkpoints = CheckpointStore(plane.store(runs[2]))
    checkpoints.save(2, lambda folder: (folder / "weights").write_text("good"), metrics={})
    checkpoints.save_final(lambda folder: (folder / "weights").write_text("good"))
    for weights in plane.store(runs[2]).rglob("weights"):
        weights.write_text(damage) if damage else weights.unlink()

    with pytest.raises(StoreError, match="weights is damaged"):
        plane.adapter(reference)


def test_a_torn_checkpoint_is_not_listed(three):
    plane, runs = three
    store = plane.store(runs[2])
    save(store, 2, 4)
    (store / "checkpoints" / "step-000004" / "manifest.json").unlink()

    assert [checkpoint.step for checkpoint in plane.checkpoints(runs[2])] == [2]


def test_following_ends_with_the_final_run_and_has_every_event_once(bench):
    run = bench.submit(
        "if attempt == 1:\n"
        "    say('metric', step=1, total=3)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "for step in (2, 3): say('metric', step=step, total=3)\n"
    )

    updates = list(bench.plane.follow(run))

    assert updates[-1].run.state == "done"
    steps = [(n, event.data["step"]) for update in updates for n, event in update.events]
    assert steps == [(1, 1), (2, 2), (2, 3)]
    assert [attempt.outcome for attempt in updates[-1].attempts] == ["lost", "finished"]


def test_a_follower_is_told_of_a_supervisor_that_cannot_work(quiet):
    quiet.home.config.write_text("[plugins]\ndisable = 5\n")
    quiet.plane = quiet.open(supervisor=quiet.supervisor)
    run = quiet.submit("")

    with pytest.raises(StoreError, match=r"exit code 2.*disable") as raised:
        list(quiet.plane.follow(run))

    assert "supervisor.log" in raised.value.hint
    quiet.home.config.unlink()


def test_a_follower_brings_a_killed_supervisor_back(bench):
    run = bench.submit("note_pid()\nwhile not (store / 'go').exists(): time.sleep(0.05)")
    bench.started(run)
    bench.kill_supervisor()
    (bench.plane.store(run) / "go").touch()

    assert [update.run.state for update in bench.plane.follow(run)][-1] == "done"
