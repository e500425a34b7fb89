"""The table `[sink.tensorboard]`."""

from __future__ import annotations

import attrs

from flash.api import SettingError, setting


@attrs.frozen
class TensorBoardConfig:
    """Where the event files go."""

    logdir: str | None = setting(
        None,
        doc="Folder for the event files, absolute or below `~`; each run gets a folder of its own "
        "in it. Without it they go to `sinks/tensorboard` in the run's store.",
        non_empty=True,
        example="~/tensorboard",
    )

    def __attrs_post_init__(self) -> None:
        # The worker's working directory is nobody's business, so nothing may depend on it.
        if self.logdir is not None and not self.logdir.startswith(("/", "~")):
            message = f'must start with "/" or "~", got "{self.logdir}"'
            raise SettingError(message, "logdir")
