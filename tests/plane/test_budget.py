"""A run's limits hold over its attempts: real supervisor, real processes, what they report."""

import attrs
import pytest

from flash.cli.budget import budget_json

pytestmark = pytest.mark.slow

SPENDS = """
def stopped(*_):
    say("spend", usd=0.75)
    os._exit(12)

signal.signal(signal.SIGTERM, stopped)
say("spend", usd=0.25)
say("spend", usd=0.6)
if attempt == 1:
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(600)
"""


def submit(bench, code, **budget):
    job = bench.job(code)
    job = attrs.evolve(job, spec=job.spec | {"budget": budget})
    return bench.plane.submit(job, environment=bench.environment, secrets={}).id


def test_what_workers_report_adds_up_over_attempts_until_the_limit(bench):
    run = submit(bench, SPENDS, max_usd=1.0)

    found = bench.wait(run)

    assert bench.outcomes(run) == ["lost", "over_budget"]
    assert (found.state, found.error) == (
        "failed",
        "the run reached its budget of 1 USD: it cost 1.35, 1.35 of them for rewards",
    )
    assert "flash resume" in found.hint
    attempts = bench.plane.attempts(run)
    assert [attempt.reported_usd for attempt in attempts] == [0.6, 0.75]
    assert budget_json(found, attempts)["usd"] == pytest.approx(1.35)
    assert budget_json(found, attempts)["used"] == pytest.approx(1.35)


def test_a_run_at_its_limit_goes_on_once_it_has_a_higher_one(bench):
    run = submit(bench, SPENDS, max_usd=1.0)
    bench.wait(run)

    bench.plane.resume(run, secrets=lambda *_: {}, budget={"max_usd": 3.0})
    bench.wait(run, lambda found: found.state == "running")
    bench.wait(run, lambda _: bench.plane.attempts(run)[-1].reported_usd == 0.6)

    assert bench.plane.run(run).spec["budget"] == {"max_usd": 3.0}
    assert [attempt.reported_usd for attempt in bench.plane.attempts(run)] == [0.6, 0.75, 0.6]
