"""The webhook in the supervisor's hands: runs that end well or badly, receivers that do not."""

import json
import os
import signal
import subprocess
import sys

import attrs
import pytest
from flash_sink_webhook.sink import signature
from plane_bench import Bench, until

pytestmark = pytest.mark.slow  # whole runs, and a supervisor that backs off

KEY = "canary-4711-key"


@pytest.fixture
def bench(tmp_path):
    bench = Bench(tmp_path)
    yield bench
    bench.close()


def submit(bench, receiver, code, **job):
    """Submit a run that a webhook follows, with a key to sign with and a secret of its own."""
    made = bench.job(code, secrets=("FLASH_WEBHOOK_SECRET", "SERVICE_KEY"), **job)
    spec = {**made.spec, "sink": {"webhook": {"url": receiver.url}}}
    made = attrs.evolve(made, spec=spec, sinks=("webhook",))
    secrets = {"FLASH_WEBHOOK_SECRET": KEY, "SERVICE_KEY": "canary-0815"}
    return bench.plane.submit(made, environment=bench.environment, secrets=secrets).id


def told(receiver):
    """Return what has arrived, each checked as its README says to."""
    found = []
    for _, headers, body in list(receiver.posts):
        seconds = headers["Flash-Signature"].split(",")[0].removeprefix("t=")
        assert headers["Flash-Signature"] == signature(KEY, body, int(seconds))
        found.append(json.loads(body))
    return found


def events(receiver):
    return [notice["event"] for notice in told(receiver)]


def test_a_run_whose_worker_dies_is_told_from_start_to_end_and_its_secrets_go(bench, receiver):
    run = submit(
        bench,
        receiver,
        "assert secrets == {'SERVICE_KEY': 'canary-0815'}\n"
        "if attempt == 1: os.kill(os.getpid(), signal.SIGKILL)",
    )
    kept = bench.home.root / "secrets" / f"{run}.json"
    until(lambda: "done" in events(receiver), lambda: bench.describe(run))

    notices = told(receiver)
    # A worker may end before it is seen to run.
    assert [event for event in events(receiver) if event != "started"] == ["attempt_ended", "done"]
    assert {notice["run"] for notice in notices} == {run}
    assert len({notice["id"] for notice in notices}) == len(notices)
    [ended] = [notice for notice in notices if notice["event"] == "attempt_ended"]
    assert ended["data"]["outcome"] == "lost"
    assert ended["data"]["exit_code"] == 137
    assert ended["text"] == (
        f"run {run} goes on: attempt 1 ended as lost: the worker was ended by SIGKILL; "
        "tried again at once, from the start"
    )
    until(lambda: not kept.exists())


def test_a_failure_waits_for_a_receiver_that_is_down_and_the_run_does_not(bench, receiver):
    answers = iter([(500, {}), None])
    receiver.answer = lambda: next(answers, (204, {}))
    run = submit(bench, receiver, "say('error', kind='k', message='m', hint='h'); sys.exit(10)")
    assert bench.wait(run).state == "failed"
    kept = bench.home.root / "secrets" / f"{run}.json"
    until(lambda: kept.exists() and "canary-0815" not in kept.read_text())
    assert KEY in kept.read_text()

    until(lambda: "failed" in events(receiver)[2:] and not kept.exists(), deadline_s=60)

    notices = told(receiver)
    assert len({notice["id"] for notice in notices[:3]}) == 1
    assert notices[-1]["text"] == f"run {run} failed: m; h"
    log = (bench.home.root / "supervisor.log").read_text()
    assert "127.0.0.1 answered 500" in log
    assert "127.0.0.1 cannot be reached" in log
    assert KEY not in log


NOTIFY = """
import sys, time
from pathlib import Path
import structlog
from flash.home import FlashHome
from flash.plane.database import Database
from flash.plane.notices import Notifier
from flash.plane.outbox import Outbox
from flash.plane.records import Records
from flash.plane.secrets import RunSecrets
from flash.plugins import PluginHost

home = FlashHome(Path(sys.argv[1]))
database = Database(home.database)
notifier = Notifier(
    home=home, records=Records(database), outbox=Outbox(database), secrets=RunSecrets(home),
    host=PluginHost.default(home), log=structlog.get_logger(),
)
while notifier.busy():
    notifier.round()
    time.sleep(0.01)
"""


def test_killed_between_the_post_and_its_record_it_posts_again_under_the_same_id(bench, receiver):
    plane = bench.open(supervisor=(sys.executable, "-c", ""))  # one that does nothing
    made = bench.job("")
    spec = {**made.spec, "sink": {"webhook": {"url": receiver.url}}}
    run = plane.submit(attrs.evolve(made, spec=spec), environment=bench.environment, secrets={}).id
    plane.cancel(run)
    command = [sys.executable, "-c", NOTIFY, str(bench.home.root)]
    killed = subprocess.Popen(command)

    def kill():
        os.kill(killed.pid, signal.SIGKILL)
        killed.wait()
        return 204, {}

    receiver.answer = kill
    assert killed.wait(timeout=60) == -signal.SIGKILL
    receiver.answer = lambda: (204, {})
    subprocess.run(command, check=True, timeout=60)

    first, second = [json.loads(body) for _, _, body in receiver.posts]
    assert first == second
    assert first["event"] == "cancelled"
    assert first["id"].startswith(f"{run}-")
