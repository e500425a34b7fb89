"""Deploying on a real plane: the copy, the rows, and a gateway that is there when it is needed."""

import json
import os
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
from serving_bench import ServingBench

from flash.errors import SpecError, StoreError, UsageError
from flash.plane import copies
from flash.plane.daemon import GATEWAY, SUPERVISOR
from flash.plane.gateway import Keeper, address_path, url_of
from flash.plane.lock import try_lock
from flash.plugins import PluginHost
from flash.worker.checkpoints import MANIFEST, damaged_file

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def host():
    return PluginHost.load()


@pytest.fixture
def bench(tmp_path):
    bench = ServingBench(tmp_path)
    yield bench
    bench.close()


def states(serving, deployment):
    return [found.state for found in serving.follow(deployment)]


# What is deployed.


@pytest.fixture(scope="module")
def still(tmp_path_factory):
    """A home in which nothing is started."""
    return ServingBench(tmp_path_factory.mktemp("still"))


def test_names_of_deployments_are_those_of_the_adapters(still, host):
    run = still.run(steps=(5, 10))
    serving = still.unattended()

    assert serving.wish(run, host).id == run
    assert serving.wish(f"{run}/final", host) == serving.wish(run, host)
    assert serving.wish(f"{run}/step-5", host).id == f"{run}/step-5"
    assert serving.wish(f"{run}/step-000005", host).id == f"{run}/step-5"


def test_a_best_checkpoint_is_deployed_under_its_step(still, host):
    run = still.run(steps={5: {"eval_loss": 1.0}, 10: {"eval_loss": 2.0}})

    assert still.unattended().wish(f"{run}/best", host).id == f"{run}/step-5"


@pytest.mark.parametrize("state", ["cancelled", "failed"])
def test_a_checkpoint_of_a_run_that_did_not_end_well_can_be_deployed(still, host, state):
    run = still.run(steps=(5,), final=False, state=state)

    assert still.unattended().wish(f"{run}/step-5", host).step == 5
    with pytest.raises(UsageError, match=f"is {state} and has no final adapter") as raised:
        still.unattended().wish(run, host)
    assert raised.value.hint == f"it has {run}/step-5"


@pytest.mark.parametrize("part", ["step-7", "stp-5", "steps", "step-", "best", "final/x"])
def test_what_a_run_has_not_is_answered_with_what_it_has(still, host, part):
    run = still.run(steps=(5, 10))

    with pytest.raises(UsageError) as raised:
        still.unattended().wish(f"{run}/{part}", host)

    assert raised.value.hint == f"it has {run}/step-5, {run}/step-10"


def test_the_backend_is_the_one_of_the_config_or_the_embedded_one(still, host):
    serving = still.unattended()
    tables = {"transformers": {"max_rows": 5}}
    plain, own = still.run(), still.run(serving=tables)
    both = still.run(serving={**tables, "vllm": {}})

    assert serving.wish(plain, host).backend == "transformers"
    assert serving.wish(own, host).settings["max_rows"] == 5
    assert serving.wish(own, host, settings={"max_rows": 6}).settings["max_rows"] == 6
    assert serving.wish(both, host, backend="transformers").settings["max_rows"] == 5
    assert serving.wish(own, host, backend="vllm").settings["max_rows"] != 5
    with pytest.raises(UsageError, match="several backends: transformers, vllm"):
        serving.wish(both, host)
    with pytest.raises(UsageError, match='unknown serving "sglang"'):
        serving.wish(plain, host, backend="sglang")
    with pytest.raises(SpecError, match=r"serving\.transformers\.max_rows: must be at least 1"):
        serving.wish(plain, host, settings={"max_rows": 0})


def test_template_and_stop_sequences_are_those_of_training(still, host):
    run = still.run(thinking=True, train={"stop_sequences": ["###"]})

    wish = still.unattended().wish(run, host)

    assert (wish.thinking, wish.stop, wish.model) == (
        *(True, ("###",)),
        {"id": "org/model", "plugin": "hub"},
    )


# The copy.


def test_what_is_served_is_a_copy_that_the_run_cannot_reach(still, host):
    run = still.run(steps=(5,))
    still.unattended().deploy(f"{run}/step-5", host)
    copy = still.copy(f"{run}/step-5")
    content = (copy / "adapter_model.safetensors").read_bytes()

    shutil.rmtree(still.store(run).path)

    assert (copy / "adapter_model.safetensors").read_bytes() == content
    assert damaged_file(copy) is None
    assert {path.name for path in copy.iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", MANIFEST)
    }
    for path in (copy.parent, *copy.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)


@pytest.mark.parametrize("damage", ["changed", "cut", "gone"])
@pytest.mark.parametrize("part", ["", "/step-5"])
def test_a_file_that_was_tampered_with_is_named_and_nothing_is_deployed(still, host, damage, part):
    run = still.run(steps=(5,))
    store = still.store(run).path
    adapter = store / "checkpoints" / "step-000005" / "adapter" if part else store / "adapter"
    weights = adapter / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    serving = still.unattended()
    wish = serving.wish(f"{run}{part}", host)
    if damage == "changed":
        content[100] ^= 1
        weights.write_bytes(content)
    else:
        weights.unlink() if damage == "gone" else weights.write_bytes(content[:-1])
    with pytest.raises(StoreError, match=r"adapter_model\.safetensors is damaged"):
        serving.deploy(f"{run}{part}", host)

    assert still.deployments.get(wish.id) is None
    assert not still.copy(wish.id).parent.exists()


def test_a_copy_that_was_tampered_with_is_made_anew_when_it_is_deployed_again(still, host):
    run = still.run()
    serving = still.unattended()
    deployment = serving.deploy(run, host)
    config = still.copy(run) / "adapter_config.json"
    config.write_text("{}")
    assert damaged_file(still.copy(run)) == "adapter_config.json"
    still.deployments.moved(deployment, "failed", error="adapter_config.json was changed")

    serving.deploy(run, host)

    assert damaged_file(still.copy(run)) is None
    assert still.state(run) == "deploying"


def test_deployments_of_one_adapter_at_once_are_one(still, host):
    run = still.run()
    threads = [
        threading.Thread(target=still.unattended().deploy, args=(run, host)) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert still.deployments.get(run).generation == 1
    assert damaged_file(still.copy(run)) is None


def test_a_copy_that_is_wanted_again_is_not_cleared(still, host):
    run = still.run()
    serving = still.unattended()
    serving.deploy(run, host)
    going = still.deployments.ask_gone(run)
    serving.deploy(run, host)

    assert not copies.clear(still.home, still.deployments, going)

    assert still.copy(run).exists()
    assert still.state(run) == "deploying"


RACER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from serving_bench import ServingBench
from flash.plane import copies
from flash.plugins import PluginHost

bench, which, run = ServingBench(Path(sys.argv[1])), sys.argv[3], sys.argv[4]
serving, host = bench.unattended(), PluginHost.load()
for turn in range(25):
    if which == "gateway":
        for row in bench.deployments.wanted():
            if row.wanted == "gone":
                copies.clear(bench.home, bench.deployments, row)
            else:
                bench.deployments.moved(row, "ready")
    elif turn % 2:
        serving._deployments.ask_gone(run)
    else:
        serving.deploy(run, host, allow_drift=which == "two")
"""


def test_processes_that_deploy_undeploy_and_clear_at_once_leave_copy_and_row_in_step(still, host):
    run = still.run()
    still.unattended().deploy(run, host)
    folders = (still.home.root.parent, Path(__file__).parents[1])
    racers = [
        subprocess.Popen([sys.executable, "-c", RACER, *folders, which, run])
        for which in ("one", "two", "gateway")
    ]

    assert [racer.wait() for racer in racers] == [0, 0, 0]

    found = still.deployments.get(run)
    assert found.generation > 25
    if found.wanted == "served":
        assert damaged_file(still.copy(run)) is None
    elif found.state == "undeployed":
        assert not still.copy(run).exists()
    else:
        assert copies.clear(still.home, still.deployments, found)
        assert not still.copy(run).exists()


# With a gateway.


def test_deploy_and_undeploy(bench, host):
    run = bench.run(steps=(5,))
    serving = bench.serving()
    assert serving.gateway() is None

    deployment = serving.deploy(run, host)
    assert states(serving, deployment) == ["deploying", "ready"]
    gateway = serving.gateway()
    assert gateway.url == "http://127.0.0.1:9/v1"
    assert (bench.home.root / "gateway.key").read_text() == f"{gateway.key}\n"
    assert serving.deploy(run, host).generation == deployment.generation
    with pytest.raises(UsageError, match="step-5 is not deployed") as raised:
        serving.undeploy(f"{run}/step-5")
    assert raised.value.hint == f"deployed of it: {run}"

    assert states(serving, serving.undeploy(run)) == ["undeploying", "undeployed"]
    assert not bench.copy(run).parent.exists()
    assert serving.undeploy(run).state == "undeployed"
    with pytest.raises(UsageError, match="step-5 is not deployed") as raised:
        serving.undeploy(f"{run}/step-5")
    assert raised.value.hint == "flash deployments"


def test_undeploy_takes_every_name_that_deploy_takes(still, host):
    run = still.run(steps={5: {"eval_loss": 1.0}, 10: {"eval_loss": 2.0}})
    serving = still.unattended()
    for name in (run, f"{run}/final", "last", "last/best", "last/step-5", f"{run}/step-00005"):
        deployed = serving.deploy(name, host)
        assert serving.undeploy(name).id == deployed.id


def test_a_killed_gateway_is_back_in_seconds_and_serves_what_it_served(bench, host):
    run = bench.run()
    serving = bench.serving()
    assert states(serving, serving.deploy(run, host))[-1] == "ready"
    before = bench.gateway_pid()

    bench.kill(bench.gateway)
    assert serving.gateway() is None
    bench.until(lambda: serving.gateway() is not None, bench.describe, deadline_s=10)

    assert bench.gateway_pid() != before
    bench.until(lambda: bench.state(run) == "ready", bench.describe)
    log = SUPERVISOR.log_path(bench.home).read_text()
    assert "the gateway starts" in log


def test_a_killed_supervisor_is_back_with_the_next_look_and_keeps_the_gateway(bench, host):
    run = bench.run()
    serving = bench.serving()
    states(serving, serving.deploy(run, host))
    bench.kill(bench.supervisor)
    bench.kill(bench.gateway)

    bench.serving().serve()

    bench.until(lambda: bench.serving().gateway() is not None, bench.describe)
    assert bench.pid(bench.supervisor) is not None
    bench.kill(bench.gateway)
    bench.until(lambda: bench.serving().gateway() is not None, bench.describe)


def test_the_supervisor_stays_while_something_is_served_and_no_longer(bench, host):
    run = bench.run()
    serving = bench.serving()
    states(serving, serving.deploy(run, host))
    pid = bench.pid(bench.supervisor)
    bench.kill(bench.gateway)

    # Longer than its patience, at the end of which there is a gateway again.
    bench.until(lambda: serving.gateway() is not None, bench.describe)
    psutil.Process(pid)
    states(serving, serving.undeploy(run))

    bench.until(lambda: bench.pid(bench.supervisor) is None, bench.describe)
    assert "nothing left to do" in SUPERVISOR.log_path(bench.home).read_text()


def test_a_gateway_that_cannot_go_on_is_an_error_with_its_last_words(bench, host):
    run = bench.run()
    serving = bench.serving()
    (bench.home.root / "stubborn").touch()

    with pytest.raises(StoreError, match="the port 8808 is taken") as raised:
        states(serving, serving.deploy(run, host))

    assert "gateway.log" in raised.value.hint
    assert bench.state(run) == "deploying"
    # It needs no gateway to be gone.
    other = bench.serving()
    assert states(other, other.undeploy(run))[-1] == "undeployed"


def test_a_deployment_that_fails_says_why_and_can_be_undeployed(bench, host):
    run = bench.run(broken=True)
    serving = bench.serving()

    *_, found = serving.follow(serving.deploy(run, host))

    assert (found.state, found.error, found.hint) == ("failed", "it is broken", "mend")
    assert states(serving, serving.undeploy(run))[-1] == "undeployed"


def test_who_follows_is_told_when_something_else_is_asked(bench, host):
    run = bench.run()
    (bench.home.root / "slow").touch()
    serving = bench.serving()
    deployment = serving.deploy(run, host)
    following = serving.follow(deployment)
    assert next(following).state == "deploying"

    bench.serving().undeploy(run)

    assert [found.generation for found in following][-1] == deployment.generation + 1


# The keeper, moment by moment.


class Moments:
    """A clock that a test sets, and a log that keeps what is said."""

    def __init__(self):
        self.now_s, self.said = 0.0, []

    def __call__(self):
        return self.now_s

    def info(self, event, **words):
        self.said.append((event, words))

    warning = error = info


def ended(keeper):
    keeper._started.wait()


def test_a_gateway_that_ends_at_once_is_given_time_twice_as_much_each_time(tmp_path, host):
    bench = ServingBench(tmp_path)
    bench.unattended().deploy(bench.run(), host)
    bench.until(lambda: not GATEWAY.runs(bench.home))
    moments = Moments()
    command = (bench.gateway[0], "-c", "raise SystemExit(1)")
    keeper = Keeper(bench.home, bench.deployments, moments, command=command, clock=moments)
    pauses = []
    for _ in range(8):
        assert keeper.round()
        ended(keeper)
        moments.now_s += 0.5
        keeper.round()
        pauses.append(moments.said[-1][1]["next_try_s"])
        moments.now_s += pauses[-1] - 0.1
        keeper.round()
        assert keeper._started is None
        moments.now_s += 0.6

    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]


def test_nothing_is_started_where_nothing_is_wanted_or_one_is_there(tmp_path, host):
    bench = ServingBench(tmp_path)
    moments = Moments()
    keeper = Keeper(bench.home, bench.deployments, moments, command=("false",), clock=moments)
    assert not keeper.round()
    lock = try_lock(GATEWAY.lock_path(bench.home))
    bench.unattended().deploy(bench.run(), host)
    moments.now_s += 1

    assert keeper.round()

    os.close(lock)
    assert moments.said == []


def test_a_damaged_gateway_json_is_a_sentence(tmp_path):
    bench = ServingBench(tmp_path)
    for content in ("{", "[]", '{"url": 1}', json.dumps({"pid": 1})):
        address_path(bench.home).write_text(content)
        with pytest.raises(StoreError, match=r"gateway\.json is damaged"):
            url_of(bench.home)
