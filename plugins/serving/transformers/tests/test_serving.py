"""The backend's conformance, on a real server of a tiny model."""

import pytest
from flash_serving_transformers import flash_register_serving
from flash_serving_transformers.backend import ADAPTERS, LOG_PROBS, TOKENS
from flash_serving_transformers.config import TransformersConfig

from flash.testing.served import Bench
from flash.testing.serving import ServingConformance, ServingEnds

pytestmark = pytest.mark.slow

(PLUGIN,) = flash_register_serving()


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    config = TransformersConfig(threads=1, max_rows=16, max_lora_rank=64, cache_gib=0.25)
    with Bench(PLUGIN, config, tmp_path_factory.mktemp("serving")) as bench:
        yield bench


class TestServing(ServingConformance):
    too_high_rank = 65
    tolerance = 1e-4
    guarded = (*ServingConformance.guarded, ADAPTERS, TOKENS, LOG_PROBS, "/docs", "/")


class TestEnds(ServingEnds):
    pass
