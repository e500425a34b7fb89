"""The fixtures that tests of several folders share."""

import pytest
from plane_bench import Bench


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A home for all tests of a file; runs of other tests may be in it, live ones too."""
    bench = Bench(tmp_path_factory.mktemp("bench"))
    yield bench
    bench.close()


@pytest.fixture
def fresh_bench(tmp_path):
    """A home that no other test has used."""
    bench = Bench(tmp_path)
    yield bench
    bench.close()
