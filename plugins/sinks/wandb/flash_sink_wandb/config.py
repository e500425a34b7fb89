"""The table `[sink.wandb]`, also written `[wandb]`."""

from __future__ import annotations

from typing import Literal

import attrs

from flash.api import setting


@attrs.frozen
class WandbConfig:
    """Which Weights & Biases run the events go to."""

    project: str = setting("flash", doc="The W&B project.", non_empty=True, example="triage")
    run_name: str | None = setting(
        None, doc="The name W&B shows; without it, the Flash run's id.", non_empty=True
    )
    entity: str | None = setting(
        None, doc="The W&B user or team; without it, the key's default.", non_empty=True
    )
    mode: Literal["online", "offline", "disabled"] = setting(
        "online",
        doc='"offline" keeps everything in the run\'s store for `wandb sync`; "disabled" records '
        "nothing.",
    )
