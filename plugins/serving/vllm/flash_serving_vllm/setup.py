"""What `flash plugins setup vllm` calls."""

from __future__ import annotations

from flash.training.vllm_server import made_environment
from flash.training.vllm_setup import set_up as make_environment


def set_up() -> str:
    """Make vLLM's environment where runs and deployments find it."""
    return f"vLLM is set up: {make_environment(made_environment())}"
