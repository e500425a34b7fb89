"""What training sampled is kept: bounded, masked, the same bytes each time, never in the way."""

import errno
import gzip
import itertools
import json
import os
import subprocess
import sys
import threading

import attrs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flash.errors import StoreError
from flash.values import Rollout
from flash.worker.checkpoints import CheckpointStore
from flash.worker.rollouts import Limits, RolloutStore, kept_steps, read_rollouts

TEXT = st.text(max_size=9) | st.integers(0, 300).map("x".__mul__)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | TEXT,
    lambda inner: st.lists(inner, max_size=9) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=6,
)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
ROLLOUTS = st.builds(
    Rollout,
    step=st.just(7),
    task=st.text(max_size=2) | TEXT,
    sample=st.integers(0, 99),
    messages=st.lists(
        st.fixed_dictionaries({"role": TEXT, "content": TEXT}, optional={"more": PLAIN}),
        max_size=6,
    ).map(tuple),
    opening=st.integers(0, 6),
    completion=st.none() | TEXT,
    thinking=TEXT,
    raw=TEXT,
    score=st.none() | NUMBERS,
    success=st.booleans(),
    metrics=st.dictionaries(TEXT, NUMBERS, max_size=5),
    reason=st.none() | TEXT,
    error=st.none() | TEXT,
    advantage=st.none() | NUMBERS,
    prompt_tokens=st.integers(0, 10**6),
    completion_tokens=st.integers(0, 10**6),
    turns=st.integers(0, 10**3),
    truncated=st.booleans(),
)
EXAMPLES = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


class Reporter:
    """Remembers what it was told."""

    def __init__(self):
        self.events = []
        self.warnings = []

    def emit(self, type_, **data):
        self.events.append((type_, data))

    def warning(self, message):
        self.warnings.append(message)


@pytest.fixture
def reporter():
    return Reporter()


@pytest.fixture
def make(tmp_path, reporter):
    def make(**settings):
        return RolloutStore(tmp_path, reporter, **settings)

    return make


def rollout(task="a", sample=0, **more):
    said = more.pop("said", f"{task} {sample}")
    fields = {
        "step": 1,
        "task": task,
        "sample": sample,
        "messages": ({"role": "user", "content": task}, {"role": "assistant", "content": said}),
        "opening": 1,
        "completion": said,
        "raw": said,
        "score": 0.5,
        "metrics": {"exact": 1.0},
        "advantage": -0.25,
        "prompt_tokens": 3,
        "completion_tokens": 2,
        "turns": 1,
    }
    return Rollout(**fields | more)


def groups(tasks, size, **more):
    return [rollout(task, sample, **more) for task in tasks for sample in range(size)]


def file(store, step):
    return store / "rollouts" / f"step-{step:06d}.jsonl.gz"


@EXAMPLES
@given(saved=st.lists(ROLLOUTS, max_size=3))
def test_what_fits_is_read_as_it_was_saved(saved, make, reporter, tmp_path):
    make().save(7, saved)

    found = read_rollouts(tmp_path, 7)

    assert reporter.warnings == []
    assert (found.step, found.episodes) == (7, len(saved))
    assert found.rollouts == tuple(sorted(saved, key=lambda r: (r.task, r.sample)))


@EXAMPLES
@given(
    saved=st.lists(ROLLOUTS, min_size=1, max_size=5),
    limits=st.builds(
        Limits,
        text_characters=st.integers(0, 100),
        episode_bytes=st.integers(1500, 4000),
        step_episodes=st.integers(1, 4),
        step_bytes=st.just(8000),
    ),
)
def test_whatever_is_saved_stays_within_the_limits(saved, limits, make, reporter, tmp_path):
    make(limits=limits).save(7, saved)

    unpacked = gzip.decompress(file(tmp_path, 7).read_bytes())
    lines = unpacked.splitlines()[1:]
    assert reporter.warnings == []
    assert max(map(len, lines)) <= limits.episode_bytes
    assert sum(len(line) + 1 for line in lines) <= limits.step_bytes
    assert 1 <= len(read_rollouts(tmp_path, 7).rollouts) <= limits.step_episodes


def test_the_file_is_private_compressed_and_the_same_bytes_each_time(make, reporter, tmp_path):
    make().save(1, groups("ba", 2))
    first = file(tmp_path, 1).read_bytes()
    make().save(1, list(reversed(groups("ab", 2))))

    assert file(tmp_path, 1).read_bytes() == first
    assert file(tmp_path, 1).stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "rollouts").stat().st_mode & 0o777 == 0o700
    assert [path.name for path in (tmp_path / "rollouts").iterdir()] == ["step-000001.jsonl.gz"]
    assert reporter.events == [("rollouts", {"step": 1, "episodes": 4, "kept": 4})] * 2


def test_secrets_are_masked_wherever_they_stand_and_before_a_text_is_cut(make, tmp_path):
    key = "canary-4711"
    saved = rollout(
        task=f"t {key}",
        said="x" * 45 + key + "y" * 200,
        metrics={f"m {key}": 1.0},
        error=key,
        reason=key,
        thinking=key,
        messages=({"role": "user", "content": [{"text": key}]}, {key: key}),
    )

    make(mask=lambda text: text.replace(key, "***"), limits=Limits(text_characters=100)).save(
        1, [saved]
    )

    unpacked = gzip.decompress(file(tmp_path, 1).read_bytes()).decode()
    assert "canary" not in unpacked
    assert "4711" not in unpacked
    assert read_rollouts(tmp_path, 1).rollouts[0].task == "t ***"


def test_a_long_text_keeps_its_ends_and_says_how_much_is_left_out(make, tmp_path):
    make(limits=Limits(text_characters=20)).save(1, [rollout(said="a" * 500 + "b" * 500)])

    [found] = read_rollouts(tmp_path, 1).rollouts
    cut = f"{'a' * 10}…[980 characters left out]…{'b' * 10}"
    assert (found.completion, found.messages[1]["content"]) == (cut, cut)


def test_a_conversation_that_is_too_long_keeps_its_ends_and_where_its_opening_ends(make, tmp_path):
    messages = tuple({"role": "user", "content": str(number)} for number in range(100))
    make(limits=Limits(text_characters=40)).save(1, [rollout(messages=messages, opening=30)])

    [found] = read_rollouts(tmp_path, 1).rollouts
    assert [message["content"] for message in found.messages] == [
        *map(str, range(5)),
        "…[90 left out]…",
        *map(str, range(95, 100)),
    ]
    assert found.opening == 5


def test_of_too_many_episodes_whole_groups_stay_the_same_at_every_step(make, tmp_path):
    store = make(limits=Limits(step_episodes=7))
    tasks = [f"task-{number}" for number in range(10)]
    store.save(1, groups(tasks, 3))
    store.save(2, groups(reversed(tasks), 3, score=0.0))

    first, second = read_rollouts(tmp_path, 1), read_rollouts(tmp_path, 2)

    assert (first.episodes, len(first.rollouts)) == (30, 6)
    kept = [(rollout.task, rollout.sample) for rollout in first.rollouts]
    assert len({task for task, _ in kept}) == 2
    assert [(rollout.task, rollout.sample) for rollout in second.rollouts] == kept


def test_of_a_group_that_is_too_big_the_first_samples_stay(make, tmp_path):
    make(limits=Limits(step_episodes=3)).save(1, groups("a", 5))

    assert [rollout.sample for rollout in read_rollouts(tmp_path, 1).rollouts] == [0, 1, 2]


def test_an_old_run_is_thinned_evenly_and_keeps_first_newest_and_checkpoints(make, tmp_path):
    make().save(1, groups("a", 1))
    size = file(tmp_path, 1).stat().st_size
    CheckpointStore(tmp_path).save(22, lambda folder: (folder / "w").touch(), metrics={})
    store = make(limits=Limits(run_bytes=12 * size + size // 2))
    for step in range(2, 41):
        store.save(step, groups("a", 1, step=1))

    steps = kept_steps(tmp_path)

    assert len(steps) == 12
    assert {1, 22, 40} <= set(steps)
    gaps = [after - before for before, after in itertools.pairwise(steps)]
    assert max(gaps) <= 8
    assert sum(path.stat().st_size for path in (tmp_path / "rollouts").iterdir()) <= 12.5 * size


def test_checkpoints_give_way_where_there_is_nothing_else_to_drop(make, tmp_path):
    for step in range(1, 7):
        CheckpointStore(tmp_path).save(step, lambda folder: (folder / "w").touch(), metrics={})
        make(limits=Limits(run_bytes=1)).save(step, groups("a", 1))

    assert kept_steps(tmp_path) == [1, 6]


def test_a_full_disk_warns_once_and_training_goes_on(make, reporter, tmp_path, monkeypatch):
    store = make()
    store.save(1, groups("a", 1))

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", full)
        store.save(2, groups("a", 1))
        store.save(3, groups("a", 1))
    store.save(4, groups("a", 1))

    [warning] = reporter.warnings
    assert "the episodes of step 2 could not be kept" in warning
    assert "No space left on device; free some space" in warning
    assert kept_steps(tmp_path) == [1, 4]
    assert [data["step"] for _, data in reporter.events] == [1, 4]
    assert len(list((tmp_path / "rollouts").iterdir())) == 2


class Unprintable:
    def __str__(self):
        raise ValueError("no words for it")


@pytest.mark.parametrize(
    "broken",
    [{"metrics": {"m": Unprintable()}}, {"reason": 3}, {"messages": ("words",)}],
    ids=["no text", "wrong type", "no message"],
)
def test_what_cannot_be_written_is_a_warning_that_says_what(broken, make, reporter, tmp_path):
    make().save(1, [rollout(**broken)])

    assert "the episodes of step 1 could not be kept: " in reporter.warnings[0]
    assert kept_steps(tmp_path) == []


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda whole: whole[: len(whole) // 2], "ended before"),
        (lambda whole: whole[:-8] + b"x" * 8, "CRC check failed"),
        (lambda _: b"", "not enough values"),
        (lambda _: b"not compressed", "Not a gzipped file"),
        (lambda _: gzip.compress(b"[]\n"), "list indices"),
        (lambda _: gzip.compress(b'{"format": 1, "kept": 1, "episodes": 1}\n'), "0 episodes"),
        (lambda _: gzip.compress(b'{"format": 1, "kept": 1, "episodes": 1}\n{}\n'), "lacks 'step'"),
        (lambda _: gzip.compress(b"[" * 10**6), "nested too deep"),
        (lambda _: gzip.compress(b'{"format": 1}\n\xff'), "utf-8"),
        (lambda _: gzip.compress(bytes((1 << 26) + 1), 1), "more than Flash ever writes"),
    ],
)
def test_a_damaged_file_is_said_to_be_damaged(damage, reason, make, tmp_path):
    make().save(1, groups("a", 3))
    path = file(tmp_path, 1)
    path.write_bytes(damage(path.read_bytes()))

    with pytest.raises(StoreError, match=r"step-000001\.jsonl\.gz is damaged: .*" + reason):
        read_rollouts(tmp_path, 1)


def test_a_field_of_the_wrong_type_is_damage(make, tmp_path):
    make().save(1, [rollout()])
    head, row = gzip.decompress(file(tmp_path, 1).read_bytes()).splitlines()
    row = json.dumps(json.loads(row) | {"score": "high"}).encode()
    file(tmp_path, 1).write_bytes(gzip.compress(head + b"\n" + row))

    with pytest.raises(StoreError, match="score of an episode cannot be str"):
        read_rollouts(tmp_path, 1)


def test_a_file_of_a_newer_flash_is_not_called_damaged(make, tmp_path):
    make().save(1, [])
    file(tmp_path, 1).write_bytes(gzip.compress(b'{"format": 2}\n'))

    with pytest.raises(StoreError, match="of format 2, not 1") as raised:
        read_rollouts(tmp_path, 1)
    assert raised.value.hint == "upgrade flash-core"


def test_a_reader_beside_the_writer_sees_whole_steps(make, tmp_path):
    """One thread rewrites a step with more and more episodes while another reads it."""
    store = make()
    store.save(1, groups("a", 1))
    writer = threading.Thread(
        target=lambda: [store.save(1, groups("a", size)) for size in range(2, 30)]
    )
    writer.start()
    seen = [read_rollouts(tmp_path, 1)]
    while writer.is_alive():
        seen.append(read_rollouts(tmp_path, 1))
    writer.join()

    assert all(len(found.rollouts) == found.episodes for found in seen)
    assert kept_steps(tmp_path) == [1]


def test_a_writer_that_is_killed_leaves_the_old_file(make, tmp_path):
    make().save(1, groups("a", 2))
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from flash.worker.rollouts import RolloutStore\n"
        "os.fsync = lambda _: os._exit(9)\n"
        "RolloutStore(Path(sys.argv[1]), None).save(1, [])\n"
    )

    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)

    assert done.returncode == 9
    assert len(read_rollouts(tmp_path, 1).rollouts) == 2
    assert kept_steps(tmp_path) == [1]


def test_every_field_of_a_rollout_is_kept(make, tmp_path):
    saved = rollout(thinking="hm", reason="close", truncated=True, success=True)
    make().save(1, [saved])

    row = json.loads(gzip.decompress(file(tmp_path, 1).read_bytes()).splitlines()[1])

    assert row == attrs.asdict(saved) | {"messages": list(saved.messages)}
