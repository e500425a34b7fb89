"""The serving benchmark runs to its end, on a tiny model, and its answers are PEFT's."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from flash.testing.models import make_tiny_model

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_serving_benchmark_measures_every_way(tmp_path):
    model = make_tiny_model(tmp_path / "tiny")
    done = subprocess.run(
        [sys.executable, ROOT / "bench" / "serving.py", "--smoke", "--model", model],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout[done.stdout.index("{\n") :])
    assert found["answers_equal_to_pefts"] == "3 of 3"
    assert found["tokens_per_s"].keys() == {"mixed", "one", "gateway", "peft"}
    assert found["reached"].keys() == found["wanted"].keys()
    assert all(ratio["least"] > 0 for ratio in found["ratios_of_rounds"].values())
    assert found["new_adapter"]["first_token_p95_s"] > found["new_adapter"]["loaded_p50_s"] > 0
    assert found["new_adapter"]["answered_meanwhile"] > 0
