"""
The sink: one W&B run a Flash run, continued by every attempt.

W&B's step only grows, while an attempt that resumes repeats steps. So the step is a metric of its
own that the others are plotted against, and W&B's counter means nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from flash.api import FlashError
from flash_sink_wandb import KEY

if TYPE_CHECKING:
    from flash.api import Event, RunInfo
    from flash_sink_wandb.config import WandbConfig

# Event type -> the prefix its numbers get.
GROUPS = {"metric": "train", "evaluation": "eval"}
STEP = "step"


class WandbSink:
    """Logs `train/<name>` and `eval/<name>`; needs a key unless the mode is off the network."""

    def __init__(self, config: WandbConfig, key: str | None) -> None:
        self._config = config
        self._key = key
        self._run: Any = None

    def open(self, run: RunInfo) -> None:
        """Start or continue the W&B run whose id is the Flash run's."""
        config = self._config
        online = config.mode == "online"
        if online and not self._key:
            raise FlashError(
                f"{KEY} is not set",
                hint=f'put {KEY} into the environment or .env, or set mode = "offline"',
            )
        import wandb

        folder = Path(run.folder) / "sinks" / "wandb"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._run = wandb.init(
            project=config.project,
            entity=config.entity,
            id=run.run,
            name=config.run_name or run.run,
            dir=folder,
            mode=config.mode,
            config=dict(run.spec),
            # Offline there is no run to continue; `wandb sync` joins the attempts by their id.
            resume="allow" if online else None,
            settings=wandb.Settings(
                # Given here the key is written nowhere, unlike with `wandb.login`.
                api_key=self._key if online else None,
                # The worker's log is Flash's, and the user's code is not ours to upload.
                console="off",
                silent=True,
                save_code=False,
                disable_git=True,
            ),
        )
        for group in GROUPS.values():
            self._run.define_metric(f"{group}/*", step_metric=f"{group}/{STEP}")

    def emit(self, event: Event) -> None:
        """Log the numbers of a metric or an evaluation."""
        group = GROUPS.get(event.type)
        if group is None or self._run is None:
            return
        numbers = {
            f"{group}/{name}": value
            for name, value in event.data.items()
            if isinstance(value, int | float)
        }
        self._run.log(numbers)

    def close(self, state: str) -> None:
        """Upload what is left and end the W&B run as finished or failed."""
        run, self._run = self._run, None
        if run is not None:
            run.summary["state"] = state
            run.finish(exit_code=0 if state in {"done", "stopped"} else 1)
