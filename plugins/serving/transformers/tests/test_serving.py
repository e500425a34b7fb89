"""The backend's conformance, on a real server of a tiny model."""

import time

import psutil
import pytest
from flash_serving_transformers import flash_register_serving
from flash_serving_transformers.backend import ADAPTERS, LOG_PROBS, STATS, TOKENS
from flash_serving_transformers.config import TransformersConfig

from flash.errors import FlashError
from flash.testing.served import ONE, Bench, processes_in
from flash.testing.serving import ServingConformance, ServingEnds

pytestmark = pytest.mark.slow

(PLUGIN,) = flash_register_serving()


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    config = TransformersConfig(threads=1, max_rows=16, max_lora_rank=64, cache_gib=0.25)
    with Bench(PLUGIN, config, tmp_path_factory.mktemp("serving")) as bench:
        yield bench


def wait_until(condition, limit_s=30):
    end_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.02)


class TestServing(ServingConformance):
    too_high_rank = 65
    tolerance = 1e-4
    guarded = (*ServingConformance.guarded, ADAPTERS, TOKENS, LOG_PROBS, STATS, "/docs", "/")

    def test_rows_of_clients_that_went_away_are_free_at_once(self, bench):
        bias = {str(token): -100 for token in bench.reference.stops}
        for seen in range(4):
            stream = bench.client.stream(ONE, max_tokens=900, n=4, logit_bias=bias)
            for _ in range(seen):
                next(stream)
            stream.close()
        wait_until(lambda: bench.client.get(STATS).body["running"] == 0)
        assert bench.client.get(STATS).body["waiting"] == 0

    def test_a_server_that_stops_answering_is_not_healthy(self, bench):
        (server,) = [
            process
            for process in map(psutil.Process, processes_in(bench.address.socket.parent))
            if "flash_serving_transformers.server" in process.cmdline() and not process.children()
        ]
        server.suspend()
        try:
            with pytest.raises(FlashError, match="does not answer"):
                bench.backend._running.check(silence_s=0.5)
        finally:
            server.resume()
        bench.backend.health()


class TestEnds(ServingEnds):
    pass
