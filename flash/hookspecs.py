"""
The hooks. A plugin implements the ones it needs under `@flash.hookimpl`.

Register hooks take no arguments, do no I/O, import nothing heavy and return lists of frozen
records; the two acting hooks are called one implementation at a time, each in its own guard.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pluggy import HookspecMarker

if TYPE_CHECKING:
    from flash.plan import Plan
    from flash.records import (
        AlgorithmPlugin,
        CommandPlugin,
        EnvironmentPlugin,
        ModelPlugin,
        ProviderPlugin,
        RewardPlugin,
        ServingPlugin,
        SinkPlugin,
    )
    from flash.values import Problem

hookspec = HookspecMarker("flash")


@hookspec
def flash_register_providers() -> list[ProviderPlugin]:  # type: ignore[empty-body]
    """Return the places to run that this plugin adds, picked by `[provider.<name>]`."""


@hookspec
def flash_register_algorithms() -> list[AlgorithmPlugin]:  # type: ignore[empty-body]
    """Return the training algorithms that this plugin adds, picked by `algorithm = "<name>"`."""


@hookspec
def flash_register_environments() -> list[EnvironmentPlugin]:  # type: ignore[empty-body]
    """Return the environment formats that this plugin reads."""


@hookspec
def flash_register_rewards() -> list[RewardPlugin]:  # type: ignore[empty-body]
    """Return the reward adapters that this plugin adds, picked by `[reward.<name>]`."""


@hookspec
def flash_register_models() -> list[ModelPlugin]:  # type: ignore[empty-body]
    """Return the sources of base models that this plugin adds."""


@hookspec
def flash_register_serving() -> list[ServingPlugin]:  # type: ignore[empty-body]
    """Return the serving backends that this plugin adds, picked by `[serving.<name>]`."""


@hookspec
def flash_register_sinks() -> list[SinkPlugin]:  # type: ignore[empty-body]
    """Return the followers of run events that this plugin adds, picked by `[sink.<name>]`."""


@hookspec
def flash_register_commands() -> list[CommandPlugin]:  # type: ignore[empty-body]
    """Return extra CLI verbs; one that carries a core verb's name is refused."""


@hookspec
def flash_review_plan(plan: Plan) -> list[Problem]:  # type: ignore[empty-body]
    """
    Review a plan before it is submitted: an organisation's policy.

    Returns problems: an error blocks the submit, a warning is printed. Raising blocks too, and
    names the plugin.

    :param plan: the resolved plan; nothing in it may be changed.
    """


@hookspec(firstresult=True)
def flash_find_secret(name: str) -> str | None:
    """
    Return the value of the secret `name`, or None to pass; stops at the first value.

    The process environment and `.env` files are asked last.

    :param name: the name as the spec or a plugin's record declares it.
    """
