"""`flash compare` and `flash eval list`: runs with real stores and events, and kept evaluations."""

from __future__ import annotations

import json
import sys

import pytest

from flash.cli import compare, evaluations, root
from flash.cli.eval import DIFFERENCE_KEYS
from flash.cli.eval import JSON_KEYS as EVALUATION_KEYS
from flash.environments import folder_digest
from flash.evaluate import numbers
from flash.evaluations import EvaluationStore
from flash.home import FlashHome
from flash.job import Job
from flash.plane.ids import new_run_id
from flash.plane.plane import Plane
from flash.worker.checkpoints import CheckpointStore


class Desk:
    """A home with runs that have reported and evaluations that were kept, without the work."""

    def __init__(self, folder):
        self.home = FlashHome(folder / "home")
        self.plane = Plane(self.home, supervisor=[sys.executable, "-c", "pass"])
        self.store = EvaluationStore(self.home)
        self.environment = folder / "environment"
        self.environment.mkdir()
        (self.environment / "environment.py").write_text("# nothing to see\n")

    def run(self, *, losses=(2.0, 1.0), **train):
        spec = {
            "model": "org/model",
            "algorithm": "sft",
            "environment": {"params": {"level": 1}},
            "train": {"steps": 2, **train},
        }
        job = Job(
            run=new_run_id(),
            spec=spec,
            plugins={"algorithm/sft": {"distribution": "flash-algorithm-sft", "version": "0.1"}},
            algorithm="nothing:trains",
            environment={
                "plugin": "freesolo",
                "reference": ".",
                "digest": folder_digest(self.environment),
            },
            model={"id": "org/model", "plugin": "hub"},
            provider=("local",),
            sinks=(),
            steps=None,
            memory_gib=0.0,
            secrets=(),
            warm_start=None,
        )
        run = self.plane.submit(job, environment=self.environment, secrets={}).id
        store = self.plane.store(run)
        CheckpointStore(store).save(2, lambda folder: (folder / "w").touch(), metrics={})
        events = [
            {"type": "metric", "step": step, "total": 2, "loss": loss, "eta_s": 1.0}
            for step, loss in enumerate(losses, 1)
        ] + [{"type": "evaluation", "step": 2, "loss": losses[-1] + 0.5, "note": None}]
        (store / "attempts" / "1").mkdir(parents=True)
        (store / "attempts" / "1" / "events.jsonl").write_text(
            "".join(json.dumps({"time_s": 1.0, **event}) + "\n" for event in events)
        )
        return run

    def evaluation(self, run=None, *, score=0.5, step=None, digest="sha256:1", rows=21, **more):
        answers = [
            {
                "row": place,
                "sample": 0,
                "id": str(place),
                "input": f"row {place}",
                "completion": "out",
                "truncated": False,
                "score": score + place % 3 / 100,
                "success": score > 0.6,
                "metrics": {"format": score},
                "reason": None,
                "error": None,
            }
            for place in range(rows)
        ]
        found = {
            "target": run or "org/model",
            "run": run,
            "step": step,
            "model": "org/model",
            "endpoint": None,
            "environment": ".",
            "params": {},
            "reward": {},
            "thinking": False,
            **numbers(answers),
            "rows": answers,
            "suites": {},
            "split": "eval",
            "samples": 1,
            "temperature": 0.0,
            "seed": 0,
            "max_tokens": 64,
            "tokens": 100,
            "tokens_per_s": 10.0,
            "seconds": 10.0,
            "digest": digest,
            "adapter": None,
        }
        return self.store.keep(found | more)["evaluation"]


@pytest.fixture
def desk(tmp_path):
    return Desk(tmp_path)


@pytest.fixture
def flash(desk, monkeypatch, capsys):
    """Return a function that runs a command line in this process: exit code, stdout, stderr."""
    monkeypatch.setenv("FLASH_HOME", str(desk.home.root))

    def run(*words):
        code = root.run(words)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def test_no_evaluations(flash):
    assert flash("eval", "list", "--json") == (0, "[]\n", "")
    assert "flash eval TARGET" in flash("eval", "list")[2]


def test_evaluations_are_listed_newest_first(desk, flash):
    run = desk.run()
    older, newer = desk.evaluation(), desk.evaluation(run, score=0.75)

    listed = json.loads(flash("eval", "list", "--json")[1])
    shown = flash("eval", "list")[1].splitlines()

    assert [one["evaluation"] for one in listed] == [newer, older]
    assert list(listed[0]) == list(evaluations.JSON_KEYS)
    assert list(evaluations.JSON_KEYS) == [
        key for key in EVALUATION_KEYS if key not in {"rows", "against"}
    ]
    assert shown[0].split()[:3] == ["evaluation", "target", "environment"]
    assert shown[1].split()[:8] == [newer, run, ".", "1", "eval", "21", "100.0%", "0.760"]
    only = json.loads(flash("eval", "list", "--run", run[:8], "--json")[1])
    assert [one["evaluation"] for one in only] == [newer]


def test_a_damaged_evaluation_does_not_hide_the_others(desk, flash):
    damaged, whole = desk.evaluation(), desk.evaluation()
    (desk.home.root / "evals" / f"{damaged}.json").write_text("{")

    code, said, warned = flash("eval", "list", "--json")

    assert (code, [one["evaluation"] for one in json.loads(said)]) == (0, [whole])
    assert f"{damaged}.json is damaged" in warned


def test_two_runs_as_json(desk, flash):
    a, b = desk.run(rank=8), desk.run(rank=16, losses=(2.0, 0.5), alpha=32)
    of_a, of_b = desk.evaluation(a), desk.evaluation(b, score=0.7)

    found = json.loads(flash("compare", a, b, "--json")[1])

    assert list(found) == list(compare.JSON_KEYS)
    assert found["config"] == [
        {"path": "train.alpha", "a": None, "b": 32},
        {"path": "train.rank", "a": 8, "b": 16},
    ]
    assert found["metrics"] == {"loss": {"a": [[1, 2.0], [2, 1.0]], "b": [[1, 2.0], [2, 0.5]]}}
    assert found["held_out"] == {"loss": {"a": [[2, 1.5]], "b": [[2, 1.0]]}}
    assert (found["evaluations"]["a"], found["evaluations"]["b"]) == (of_a, of_b)
    difference = found["evaluations"]["difference"]
    assert list(difference) == list(DIFFERENCE_KEYS)
    assert difference["verdict"] == "better"
    assert difference["mean"]["gain"] == pytest.approx(0.2)
    assert found["incomparable"] is None


def test_two_runs_for_people(desk, flash):
    a, b = desk.run(rank=8), desk.run(rank=16, losses=(2.0, 0.5))
    of_a, _ = desk.evaluation(a), desk.evaluation(b, score=0.4)

    code, said, _ = flash("compare", a[:8], b)

    lines = [line.split() for line in said.splitlines()]
    assert code == 0
    assert ["setting", a, b] in lines
    assert ["train.rank", "8", "16"] in lines
    assert ["metric", a, "last", b, "last"] in lines
    assert ["loss", "█▃", "1", "█▁", "0.5"] in lines
    assert ["held", "out", a, "last", b, "last"] in lines
    assert f"worse than {a} ({of_a})" in said
    assert "mean     0.510 to 0.410, -0.100" in said
    assert "0 rows up, 0 the same, 21 down" in said


def test_a_checkpoint_stands_for_its_own_evaluations(desk, flash):
    run = desk.run()
    desk.evaluation(run)
    early, late = desk.evaluation(run, step=2, score=0.4), desk.evaluation(run, score=0.6)

    found = json.loads(flash("compare", f"{run}/step-2", run, "--json")[1])

    assert (found["a"], found["b"]) == (f"{run}/step-2", run)
    assert (found["evaluations"]["a"], found["evaluations"]["b"]) == (early, late)
    assert flash("compare", f"{run}/step-3", run)[0] == 2


def test_the_newest_pair_that_can_be_compared_is_taken(desk, flash):
    a, b = desk.run(), desk.run()
    old = desk.evaluation(a), desk.evaluation(b)
    desk.evaluation(b, digest="sha256:2")

    found = json.loads(flash("compare", a, b, "--json")[1])

    assert (found["evaluations"]["a"], found["evaluations"]["b"]) == old


def test_evaluations_that_were_drawn_alike_come_first(desk, flash):
    a, b = desk.run(), desk.run()
    alike = desk.evaluation(a, samples=4), desk.evaluation(b, samples=4)
    desk.evaluation(a)

    found = json.loads(flash("compare", a, b, "--json")[1])

    assert (found["evaluations"]["a"], found["evaluations"]["b"]) == alike


def test_evaluations_of_another_environment_are_not_compared(desk, flash):
    a, b = desk.run(), desk.run()
    desk.evaluation(a)
    desk.evaluation(b, digest="sha256:2")

    code, _, warned = flash("compare", a, b)

    assert code == 0
    assert "different versions of the environment: sha256:1 and sha256:2" in warned
    assert f"flash eval {b} --against {a}" in warned
    found = json.loads(flash("compare", a, b, "--json")[1])
    assert found["evaluations"] is None
    assert "different versions" in found["incomparable"]


def test_runs_without_evaluations_say_how_to_get_them(desk, flash):
    a, b = desk.run(), desk.run()

    assert f"flash eval {b} --against {a}" in flash("compare", a, b)[2]


def test_two_kept_evaluations(desk, flash):
    before, after = desk.evaluation(), desk.evaluation(score=0.8, max_tokens=128)

    code, said, warned = flash("compare", before, after)

    assert code == 0
    assert f"better than org/model ({before})" in said
    assert "success  0.0% to 100.0%, +100.0%" in said
    assert "format  0.500 to 0.800" in said
    assert "max_tokens differs: 64 and 128" in warned


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        ("eval-1", "last", "a run and an evaluation"),
        ("eval-1", "eval-2", 'no evaluation "eval-1"'),
        ("zzzz", "last", 'no run "zzzz"'),
    ],
)
def test_what_is_not_there_is_refused(flash, a, b, said):
    code, _, error = flash("compare", a, b)

    assert code == 2
    assert said in error


def test_text_of_a_model_or_a_config_cannot_move_the_cursor(desk, flash):
    a, b = desk.run(name="x"), desk.run(name="\x1b[2Jevil")
    desk.evaluation(a, target="last\x1b[2J")
    desk.evaluation(b)

    said = "".join(
        part for words in (("compare", a, b), ("eval", "list")) for part in flash(*words)[1:]
    )

    assert "\x1b" not in said
    assert "\\x1b[2Jevil" in said
