"""A thousand worlds, and as many as it takes to catch each bug that is planted in them."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from simulation.bugs import BUGS

ROOT = Path(__file__).parents[2]
SEEDS = 1000
LONG_SEEDS = 20_000
ENOUGH = 400
"""Seeds in which a planted bug must be caught; most are within ten."""


def simulate(*words, **environ):
    """Run `python -m tests.simulation`, which audits and patches the process that it is."""
    return subprocess.run(
        [sys.executable, "-m", "tests.simulation", *words],
        cwd=ROOT,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        check=False,
    )


def on_every_core(calls):
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda words: simulate(*words), calls))
    said = "".join(result.stdout + result.stderr for result in results)
    sys.stdout.write(said)
    return [result.returncode for result in results], said


def assert_all_hold(seeds):
    part = -(-seeds // os.cpu_count())
    parts = [f"{first}:{min(first + part, seeds)}" for first in range(0, seeds, part)]

    codes, said = on_every_core([(part,) for part in parts])

    assert set(codes) == {0}, said


@pytest.mark.slow
def test_a_thousand_worlds_break_no_invariant():
    assert_all_hold(SEEDS)


@pytest.mark.long
def test_twenty_thousand_worlds_break_no_invariant():
    assert_all_hold(LONG_SEEDS)


@pytest.mark.slow
def test_a_seed_is_the_same_world_in_every_process():
    first, second = (
        simulate("7", "--trace", "--steps", "100", PYTHONHASHSEED=hash_seed).stdout.splitlines()[-1]
        for hash_seed in ("1", "2")
    )

    assert first == second
    assert first.startswith("seed 7: ")


@pytest.mark.slow
def test_each_planted_bug_is_caught():
    assert len(BUGS) >= 20
    cores = os.cpu_count()

    codes, said = on_every_core([(f"0:{ENOUGH}", "--bugs", f"{n}/{cores}") for n in range(cores)])

    caught = [line for line in said.splitlines() if line.startswith("CAUGHT ")]
    sys.stdout.write(f"planted: {len(BUGS)}, caught: {len(caught)}\n")
    assert len(caught) == len(BUGS), said
    assert set(codes) == {0}, said
