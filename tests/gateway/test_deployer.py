"""Servers side by side: what one waits for holds up no other, and nothing is left of any."""

import threading

import attrs
import pytest
from deploy_bench import BASE, until

from flash.errors import DiskTrouble
from flash.gateway.deploying import Deployer


@pytest.fixture
def deployer(bench):
    deployer = Deployer(bench.parts)
    thread = threading.Thread(target=deployer.run, daemon=True)
    thread.start()
    yield deployer
    deployer.close(limit_s=10)
    thread.join()


def test_a_server_that_hangs_as_it_starts_holds_up_no_other(bench, deployer, hang):
    bench.world.faults["start"] = [hang]
    bench.deploy("slow-1")
    until(lambda: bench.world.names("start"), "the first one starts")
    bench.deploy("blue-2", settings={"context_tokens": 64})

    until(lambda: bench.states()["blue-2"] == "ready", "the other is ready")
    assert bench.states()["slow-1"] == "deploying"


@pytest.mark.slow  # two deployers
def test_nothing_is_left_when_it_closes_and_the_next_one_serves_everything_anew(bench, deployer):
    bench.deploy("blue-1")
    bench.deploy("red-2", settings={"context_tokens": 64})
    until(lambda: set(bench.states().values()) == {"ready"}, "both are ready")
    deployer.close(limit_s=10)
    assert bench.world.live == []
    assert bench.routes == []

    second = Deployer(attrs.evolve(bench.parts))
    second.hold()
    assert "ask again soon" in bench.parts.routes.why_away("blue-1")
    second.round()
    until(lambda: bench.routes == ["blue-1", "red-2", BASE], "both are served again")
    second.close(limit_s=10)


def test_it_is_idle_once_nothing_is_wanted(bench, deployer):
    bench.deploy("blue-1")
    until(lambda: bench.states()["blue-1"] == "ready", "it is ready")
    assert deployer.idle_s < 5
    bench.deployments.ask_gone("blue-1")
    until(lambda: deployer.idle_s > 0.2, "it has nothing to do")
    assert bench.states() == {"blue-1": "undeployed"}
    assert bench.world.live == []
    assert bench.parts.routes.why_away(BASE) is None


def test_the_base_model_is_waited_for_as_long_as_its_server_starts(bench, deployer, hang):
    bench.world.faults["start"] = [hang]
    bench.deploy("blue-1")
    until(lambda: bench.world.names("start"), "it starts")

    assert "is being started" in bench.parts.routes.why_away(BASE)
    bench.deployments.ask_gone("blue-1")
    until(lambda: bench.parts.routes.why_away(BASE) is None, "nobody waits for it any more")


@pytest.mark.slow  # the time that a failing disk is given
def test_a_database_that_fails_for_a_while_holds_nothing_up_for_ever(bench):
    bench.parts = attrs.evolve(bench.parts, times=attrs.evolve(bench.parts.times, trouble_s=0.01))
    failing = Failing(bench.deployments, 20)
    bench.parts = attrs.evolve(bench.parts, deployments=failing)
    deployer = Deployer(bench.parts)
    thread = threading.Thread(target=deployer.run, daemon=True)
    thread.start()
    bench.deploy("blue-1")

    until(lambda: bench.states()["blue-1"] == "ready" and not failing.left, "it is ready after all")
    until(lambda: bench.routes == ["blue-1", BASE], "it is served")
    deployer.close(limit_s=10)
    thread.join()


class Failing:
    """Deployments whose every other call fails, so many times."""

    def __init__(self, deployments, left):
        self.deployments = deployments
        self.left = left
        self.turn = 0

    def __getattr__(self, name):
        self.turn += 1
        if self.left and self.turn % 2:
            self.left -= 1
            raise DiskTrouble("the disk is full")
        return getattr(self.deployments, name)
