"""The surface for plugins: what it holds, and what importing it costs."""

import subprocess
import sys
from pathlib import Path

import pytest

from flash import api

ROOT = Path(__file__).parents[1]
PLUGINS = sorted(path.parent.name for path in ROOT.glob("plugins/*/*/flash_*/__init__.py"))
LIGHT = {"attr", "attrs", "click", "flash", "pluggy"}

SURFACE = [
    "Address",
    "AlgorithmInput",
    "AlgorithmPlan",
    "AlgorithmPlugin",
    "AuthFailed",
    "BadAnswer",
    "BadRequest",
    "Checkpoint",
    "Checkpoints",
    "CommandPlugin",
    "Denied",
    "Environment",
    "EnvironmentFault",
    "EnvironmentLoader",
    "EnvironmentPlugin",
    "Episode",
    "Event",
    "FlashError",
    "HasAdapters",
    "HasCosts",
    "HasSuites",
    "Instance",
    "Launch",
    "LaunchRequest",
    "Message",
    "ModelCard",
    "ModelPlugin",
    "ModelSource",
    "ModelUnavailable",
    "NameTaken",
    "Need",
    "NoCapacity",
    "NoFunds",
    "NotFound",
    "NotSupported",
    "NotYet",
    "Notice",
    "NoticeSink",
    "Offer",
    "PluginContext",
    "PluginError",
    "Problem",
    "Provider",
    "ProviderCapabilities",
    "ProviderError",
    "ProviderPlugin",
    "QuotaExceeded",
    "RateLimited",
    "Recipe",
    "Reporter",
    "Reward",
    "RewardAdapter",
    "RewardPlugin",
    "Rollout",
    "Rollouts",
    "RunInfo",
    "ServedAdapter",
    "ServedBase",
    "ServerFault",
    "ServingBackend",
    "ServingPlugin",
    "SettingError",
    "Sink",
    "SinkPlugin",
    "SpecError",
    "Step",
    "StoreError",
    "Task",
    "TrainingDataError",
    "Unreachable",
    "UsageError",
    "WorkerContext",
    "hookimpl",
    "setting",
]


def imported(statement):
    """Return the top-level packages that `statement` imports, beyond what Python starts with."""
    code = (
        "import sys; before = set(sys.modules)\n"
        f"{statement}\n"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    return set(answer.stdout.split()) - sys.stdlib_module_names


def test_the_surface_for_plugins_changes_only_on_purpose():
    assert api.__all__ == SURFACE
    assert [name for name in SURFACE if not hasattr(api, name)] == []


@pytest.mark.parametrize("module", ["flash.api", "flash.hookspecs", *PLUGINS])
def test_importing_it_imports_nothing_heavy(module):
    allowed = LIGHT | {module.partition(".")[0]}

    assert imported(f"import {module}") <= allowed


def test_the_plugins_of_this_repository_are_looked_at():
    assert {"flash_algorithm_sft", "flash_provider_local"} <= set(PLUGINS)
