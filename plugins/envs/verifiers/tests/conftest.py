"""The library, in an interpreter of its own, for the tests that are marked slow."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from flash_env_verifiers.environment import VerifiersEnvironment
from flash_env_verifiers.interpreter import make_interpreter
from flash_env_verifiers.params import read_params
from flash_env_verifiers.process import EnvironmentProcess

from flash.api import EnvironmentFault

HERE = Path(__file__).parent / "environments"


@pytest.fixture(scope="session")
def python():
    """The interpreter with verifiers; made beside the one that runs the tests, and kept."""
    try:
        return make_interpreter([], Path(sys.prefix) / "verifiers", print)
    except EnvironmentFault as fault:
        pytest.skip(f"verifiers cannot be installed here: {fault}")


@pytest.fixture(scope="session")
def process(python):
    """One process for most of the tests: importing the library takes seconds."""
    process = EnvironmentProcess(python, HERE, timeout_s=120)
    yield process
    process.close()


@pytest.fixture
def load(process):
    """Load one of the environments beside this file, in place of the one before."""

    def load(name, **params):
        known = read_params(params)
        facts = process.call("load", id=name, env=known.env, splits=known.splits)
        return VerifiersEnvironment(process, known, max_turns=facts["max_turns"])

    return load
