"""What the user left open in `[train]`, decided: by the adapter to start from, then the recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import attrs

from flash.errors import PluginError, SpecError
from flash.fields import setting_of
from flash.plugins import boundary
from flash.spec.strict import Reader, config_fields
from flash.values import Recipe
from flash.warm_start import FIELD

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flash.records import AlgorithmInput, AlgorithmPlugin
    from flash.warm_start import Adapter

RECIPE: Final = "recipe"


@attrs.frozen
class Reason:
    """Why a value is what it is; `label` is the layer that decided it, `source` where to read."""

    label: str
    reason: str
    source: str


def decide(
    record: AlgorithmPlugin, config: Any, facts: AlgorithmInput, adapter: Adapter | None
) -> tuple[Any, dict[str, Reason]]:
    """
    Return the config with nothing left open, and the reason of each value decided here by path.

    `facts.train` are the user's own values, which stay. Raises `PluginError` where the recipe
    does not decide exactly its open settings, each within its limits.
    """
    inherited = _of_adapter(adapter) if adapter is not None else {}
    inherited = {name: choice for name, choice in inherited.items() if name not in facts.train}
    given = {**facts.train, **{name: choice.value for name, choice in inherited.items()}}
    with boundary(record.name, "recipe"):
        recipe = dict(record.recipe(attrs.evolve(facts, train=given)))
    recipe = {name: choice for name, choice in recipe.items() if name not in given}
    _check_complete(record, recipe, given)
    decided = {**recipe, **inherited}
    reader = Reader()
    plain = {**reader.plain(config), **{name: choice.value for name, choice in decided.items()}}
    result, problems = reader.read(record.config, plain, ("train",))
    if problems:
        raise SpecError([attrs.evolve(problem, fault="plugin") for problem in problems])
    return result, {
        f"train.{name}": Reason(
            RECIPE if name in recipe else f"train.{FIELD}", choice.reason, choice.source
        )
        for name, choice in decided.items()
    }


def _of_adapter(adapter: Adapter) -> dict[str, Recipe]:
    reason = "as in the adapter that training starts from"
    return {
        "lora_rank": Recipe(adapter.rank, reason, adapter.reference),
        "lora_alpha": Recipe(adapter.alpha, reason, adapter.reference),
        "target_modules": Recipe(adapter.targets, reason, adapter.reference),
    }


def _check_complete(
    record: AlgorithmPlugin, recipe: Mapping[str, Recipe], given: Mapping[str, Any]
) -> None:
    fields = config_fields(record.config)
    open_fields = {name for name, field in fields.items() if setting_of(field).recipe}
    wrong = (open_fields - given.keys()) ^ recipe.keys()
    if wrong:
        message = (
            f"plugin {record.name}: its recipe must decide the settings left to it and no others; "
            f"it is wrong about {', '.join(sorted(wrong))}"
        )
        raise PluginError(message, hint="report it to the plugin's author")
