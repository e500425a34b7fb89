"""The backend's conformance, on a real server of a tiny model."""

import copy
import time

import psutil
import pytest
from flash_serving_transformers import flash_register_serving
from flash_serving_transformers.backend import ADAPTERS, LOG_PROBS, STATS, TOKENS
from flash_serving_transformers.config import TransformersConfig

from flash.errors import FlashError
from flash.testing.served import ONE, Bench, Client, processes_in
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


SHOWN_BY = {
    "echo": ("echo",),
    "frequency_penalty": ("penalties", "frequency_penalty"),
    "logit_bias": ("logit_bias",),
    "logprobs": ("logprobs_of_a_completion",),
    "min_p": ("what_keeps_only_the_likeliest_token_is_greedy", "min_p", 1.0),
    "n": ("n",),
    "parallel_tool_calls": ("parallel_tool_calls",),
    "presence_penalty": ("penalties", "presence_penalty"),
    "response_format": ("response_format",),
    "seed": ("seed",),
    "stop": ("stop",),
    "temperature": ("temperature",),
    "tool_choice": ("tool_choice",),
    "tools": ("tools_are_told_to_the_model",),
    "top_k": ("what_keeps_only_the_likeliest_token_is_greedy", "top_k", 1),
    "top_logprobs": ("logprobs_of_a_chat",),
    "top_p": ("what_keeps_only_the_likeliest_token_is_greedy", "top_p", 1e-6),
}


class Forgetful(Client):
    """Leaves a field out of what it asks, as if the server took no notice of it."""

    def __init__(self, address, field):
        super().__init__(address)
        self._field = field

    def _ask(self, method, path, body, key):
        left = {name: value for name, value in body.items() if name != self._field}
        return super()._ask(method, path, left, key)


@pytest.mark.parametrize("field", sorted({*PLUGIN.fields} - {"user"}))
def test_a_field_that_is_taken_and_ignored_fails_the_suite(bench, field):
    name, *arguments = SHOWN_BY[field]
    ignoring = copy.copy(bench)
    ignoring.client = Forgetful(bench.address, field)
    check = getattr(TestServing(), f"test_{name}")
    with pytest.raises((AssertionError, LookupError, TypeError, ValueError)):
        check(ignoring, *arguments)


class TestEnds(ServingEnds):
    pass
