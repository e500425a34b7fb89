"""The fixtures that tests of deployments share."""

import threading

import attrs
import pytest
from deploy_bench import QUICK, DeployBench


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return tmp_path_factory.mktemp("template")


@pytest.fixture
def make_bench(tmp_path, template):
    """Make the bench, with other times than those that are quick where the test asks."""
    made = []

    def make(**times):
        made.append(DeployBench(tmp_path, template, attrs.evolve(QUICK, **times)))
        return made[-1]

    yield make
    for bench in made:
        bench.close()


@pytest.fixture
def bench(make_bench):
    return make_bench()


@pytest.fixture
def hang():
    """A fault that never answers, until the test is over."""
    over = threading.Event()
    yield lambda: over.wait(60)
    over.set()
