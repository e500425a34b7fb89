"""Supervised fine-tuning: LoRA on an environment's target answers, on TRL and PEFT."""

from __future__ import annotations

from flash.api import AlgorithmPlugin, hookimpl
from flash_algorithm_sft.config import SftConfig
from flash_algorithm_sft.recipe import decide, plan


@hookimpl
def flash_register_algorithms() -> list[AlgorithmPlugin]:
    """Return the one algorithm of this plugin."""
    return [
        AlgorithmPlugin(
            name="sft",
            summary="Supervised fine-tuning on the environment's target answers.",
            config=SftConfig,
            recipe=decide,
            plan=plan,
            worker="flash_algorithm_sft.train:run",
        )
    ]
