"""The fixtures that tests of several folders share."""

import pytest
from plane_bench import Bench


@pytest.fixture
def bench(tmp_path):
    bench = Bench(tmp_path)
    yield bench
    bench.close()
