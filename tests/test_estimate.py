"""What a run will take, as far as an earlier run like it tells."""

import json
from types import SimpleNamespace

import attrs
import pytest

from flash.api import AlgorithmPlan, AlgorithmPlugin, setting
from flash.environments import folder_digest
from flash.estimate import Estimate, estimate
from flash.job import Job
from flash.plane.store import RunStore
from flash.spec import spec_from_dict
from flash.spec.limits import BudgetTable
from flash.spec.model import spec_to_dict
from flash.testing.host import make_host
from flash.values import Need, Offer

CPU = Offer("local", "cpu", 16.0)
DEAR = Offer("cloud", "a", 80.0, accelerator="H100", count=8, price_usd_hour=16.0)


@attrs.frozen(kw_only=True)
class Sft:
    batch_size: int = setting(16, doc="Rows a step.")
    lora_rank: int = setting(8, doc="Rank.")
    max_length: int = setting(64, doc="Tokens.")
    save_every: int = setting(5, doc="Steps.")
    epochs: float = setting(1.0, doc="Passes.")


HOST = make_host(
    AlgorithmPlugin(
        name="sft",
        summary="A trainer.",
        config=Sft,
        recipe=lambda facts: {},
        plan=lambda facts: AlgorithmPlan(need=Need(1.0)),
        worker="sft:run",
    )
)


class Here:
    """Earlier runs with real stores and events, newest first, and a plan of the next one."""

    def __init__(self, folder):
        self.folder = folder
        self.environment = folder / "environment"
        self.environment.mkdir()
        (self.environment / "environment.py").write_text("# nothing to see\n")
        self.found = []

    def spec(self, model="org/tiny", **train):
        data = {"model": model, "environment": {"path": "."}, "train": train}
        return spec_from_dict(data, HOST)

    def plan(self, steps=100, offer=CPU, **spec):
        return SimpleNamespace(
            check=lambda: self.spec(**spec),
            need=Need(1.0, steps=steps),
            offer=offer,
            environment=SimpleNamespace(folder=self.environment),
        )

    def ran(self, name, times, *, offer=CPU, usd=None, digest=None, started_s=100.0, **spec):
        """Add a run whose only attempt reported each of its steps at one of `times`."""
        plain = spec_to_dict(self.spec(**spec))
        job = Job(
            run=name,
            spec=plain,
            plugins={},
            algorithm="sft:run",
            environment={"digest": digest or folder_digest(self.environment)},
            model={},
            provider=(),
            sinks=(),
            steps=None,
            memory_gib=1.0,
            secrets=(),
            warm_start=None,
        )
        store = RunStore(self.store(name))
        store.path.mkdir()
        events = store.make_attempt(1) / "events.jsonl"
        (store.path / "job.json").write_bytes(job.to_json())
        lines = [
            {"type": "metric", "time_s": time_s, "step": step, "total": 9}
            for step, time_s in enumerate(times, 1)
        ]
        if usd is not None:
            lines.append({"type": "spend", "time_s": 1.0, "usd": usd})
        events.write_text("".join(json.dumps(line) + "\n" for line in lines))
        attempt = SimpleNamespace(number=1, started_s=started_s, offer=attrs.asdict(offer))
        self.found.insert(0, SimpleNamespace(id=name, spec=plain, its=[attempt]))
        return store

    # What it asks of a plane.

    def runs(self):
        return self.found

    def attempts(self, run):
        return next(found.its for found in self.found if found.id == run)

    def store(self, run):
        return self.folder / run


@pytest.fixture
def here(tmp_path):
    return Here(tmp_path)


def test_what_never_ran_here_has_no_estimate(here):
    nothing = Estimate(
        hours=None,
        usd=None,
        basis="no estimate: no sft of org/tiny was measured on local yet",
    )

    assert estimate(here.plan(), None) == nothing
    assert estimate(here.plan(), here) == nothing
    assert nothing.over(BudgetTable(max_hours=1e-9, max_usd=1e-9)) is None


def test_a_step_takes_what_it_took_and_so_does_the_start(here):
    here.ran("before", [140.0, 150.0, 160.0])  # 30 s, then 10 s a step

    found = estimate(here.plan(steps=360), here)

    assert found.hours == pytest.approx((30 + 360 * 10) / 3600)
    assert found.usd == 0.0
    assert found.basis == "360 steps at 10 s each, as measured in run before"


def test_of_a_long_run_the_beginning_and_the_end_are_read(here):
    store = here.ran("before", [100.0 + 0.5 * step for step in range(1, 7001)], usd=70.0)
    assert (store.attempt(1) / "events.jsonl").stat().st_size > 1 << 18

    found = estimate(here.plan(steps=7200), here)

    assert found.hours == pytest.approx(1.0)
    assert found.usd == pytest.approx(72.0)


def test_it_costs_the_machines_price_and_what_rewards_cost_a_step(here):
    here.ran("before", [118.0, 136.0, 154.0, 172.0], offer=DEAR, usd=0.4)

    found = estimate(here.plan(steps=200, offer=DEAR), here)

    assert found.hours == pytest.approx(1.0)
    assert found.usd == pytest.approx(16.0 + 200 * 0.1)


@pytest.mark.parametrize(
    "other",
    [
        {"model": "org/other"},
        {"offer": DEAR},
        {"offer": attrs.evolve(CPU, provider="elsewhere")},
        {"times": [110.0]},
        {"times": [120.0, 110.0]},  # a clock that was set back
    ],
)
def test_what_does_not_compare_tells_nothing(here, other):
    here.ran(**{"name": "before", "times": [110.0, 120.0]} | other)

    assert estimate(here.plan(), here).hours is None


def test_the_run_that_is_most_alike_tells_and_of_those_the_newest(here):
    here.ran("first", [101.0, 102.0], batch_size=4)
    here.ran("second", [101.0, 103.0], batch_size=4, epochs=9.0)
    here.ran("third", [101.0, 104.0], batch_size=8)

    found = estimate(here.plan(steps=10, batch_size=4), here)

    assert found.basis == "10 steps at 2 s each, as measured in run second"


def test_what_is_different_in_it_is_said(here):
    here.ran("one", [101.0, 102.5], digest="sha256:0", batch_size=8)

    found = estimate(here.plan(steps=10, batch_size=4), here)

    assert found.basis == (
        "10 steps at 1.5 s each, as measured in run one, which had other files in its environment; "
        "train.batch_size = 8"
    )


def test_many_differences_are_counted(here):
    here.ran("one", [101.0, 102.0], batch_size=8, lora_rank=1, max_length=9, save_every=1)

    assert estimate(here.plan(steps=10), here).basis.endswith(
        "which had train.batch_size = 8; train.lora_rank = 1; train.max_length = 9; 1 more"
    )


def test_a_run_whose_files_are_gone_tells_nothing(here):
    store = here.ran("before", [101.0, 102.0])
    (store.path / "job.json").unlink()

    assert estimate(here.plan(), here).hours is None


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        ({"offer": None}, "no estimate: no machine was asked for yet"),
        (
            {"steps": None},
            "no estimate: how many steps it has is not known before its rows are loaded",
        ),
    ],
)
def test_what_is_not_known_is_said(here, plan, reason):
    here.ran("before", [101.0, 102.0])

    assert estimate(here.plan(**plan), here).basis == reason


@pytest.mark.parametrize(
    ("budget", "over"),
    [
        ({}, None),
        ({"max_hours": 5.2, "max_usd": 12.5}, None),
        (
            {"max_hours": 2, "max_usd": 12},
            "the run would take about 5.2 hours, and budget.max_hours is 2: as measured",
        ),
        (
            {"max_hours": 5, "max_usd": 2.5},
            "the run would cost about 12.5 USD, and budget.max_usd is 2.5: as measured",
        ),
    ],
)
def test_an_estimate_over_a_limit_says_which_with_the_numbers(budget, over):
    found = Estimate(hours=5.2, usd=12.5, basis="as measured")

    assert found.over(BudgetTable(**budget)) == over
