"""Group relative policy optimisation: LoRA by practice, on TRL and PEFT."""

from __future__ import annotations

from flash.api import AlgorithmPlugin, hookimpl
from flash_algorithm_grpo.config import GrpoConfig
from flash_algorithm_grpo.recipe import decide, plan


@hookimpl
def flash_register_algorithms() -> list[AlgorithmPlugin]:
    """Return the one algorithm of this plugin."""
    return [
        AlgorithmPlugin(
            name="grpo",
            summary="Reinforcement learning: sample answers, score them, favour the better ones.",
            config=GrpoConfig,
            recipe=decide,
            plan=plan,
            worker="flash_algorithm_grpo.train:run",
        )
    ]
