"""From a job to the loaded environment and the model's folder."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from flash.context import plugin_context
from flash.errors import PluginError
from flash.plugins import boundary
from flash.rewards import rewarded
from flash.worker.overlay import ensure_overlay

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path
    from typing import Any

    from flash.contracts import Environment, ModelSource
    from flash.home import FlashHome
    from flash.plugins import PluginHost
    from flash.values import ModelCard


def load_environment(  # noqa: PLR0913 - the parts of one [environment] table, and its reward's
    host: PluginHost,
    home: FlashHome,
    *,
    plugin: str,
    folder: Path,
    params: Mapping[str, Any],
    split: str,
    pip: Sequence[str],
    secrets: Mapping[str, str],
    reward: Mapping[str, Any],
    reward_secrets: Mapping[str, str],
    report: Callable[[str], None],
) -> Environment:
    """
    Import the environment in `folder` with its packages and its secrets, and nothing else.

    Its `score` is what the `[reward.*]` tables make of it; of `reward_secrets`, an adapter gets
    those that its record declares, and user code none.

    After this call `os.environ` holds `secrets` and `sys.path` ends with the overlay: both stay
    for the life of the process, because user code reads them whenever it runs.
    """
    overlay = ensure_overlay(pip, home, report)
    if overlay is not None:
        sys.path.append(str(overlay))
    os.environ.update(secrets)
    record = host.get("environment", plugin)
    with boundary(plugin, "load the environment"):
        loader = record.make(plugin_context(home, plugin, {}))
        loaded: Environment = loader.load(folder, params=params, split=split)
    return rewarded(loaded, reward, host, home, folder=folder, secrets=reward_secrets)


def open_model(
    host: PluginHost,
    home: FlashHome,
    *,
    plugin: str,
    model: str,
    secrets: Mapping[str, str],
    report: Callable[[str], None],
) -> tuple[Path, ModelCard]:
    """Return the folder transformers can load and the model's facts, fetching it first."""
    record = host.get("model", plugin)
    with boundary(plugin, "fetch the model"):
        source: ModelSource = record.make(plugin_context(home, plugin, secrets))
        folder = source.fetch(model, report)
        card = source.card(model)
    if card is None:
        raise PluginError(
            f"the model plugin {plugin} fetched {model} but knows no facts about it",
            hint="report it to the plugin's author",
        )
    return folder, card
