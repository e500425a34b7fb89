"""
The frozen records that register hooks return: what a plugin provides, as data.

Building a record does no I/O and imports nothing heavy; the work sits behind `make` or behind an
import string `"package.module:attribute"`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
from attrs import validators

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from flash.contracts import (
        EnvironmentLoader,
        ModelSource,
        PluginContext,
        Provider,
        RewardAdapter,
        ServingBackend,
        Sink,
    )
    from flash.values import ModelCard, Need, Problem, Recipe

NAME = r"[a-z][a-z0-9]*(-[a-z0-9]+)*"
_name = validators.matches_re(NAME)
_import_string = validators.matches_re(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def _attrs_class(_: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if value is not None and not attrs.has(value):  # type: ignore[arg-type]
        msg = f"{attribute.name} must be an attrs class, got {value!r}"
        raise TypeError(msg)


def _callable(_: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if not callable(value):
        msg = f"{attribute.name} must be callable, got {value!r}"
        raise TypeError(msg)


@attrs.frozen
class ProviderCapabilities:
    """
    What a provider can do, readable before `make`.

    `offline`: `offers` needs no network, so a dry run may ask for them.
    """

    logs: bool = False
    exit_codes: bool = False
    spot: bool = False
    prices: bool = False
    offline: bool = False
    name_length: int = 50
    launches_per_minute: int | None = None


@attrs.frozen(kw_only=True)
class ProviderPlugin:
    """
    A place to run. `config` is the attrs class of `[provider.<name>]`.

    `make(ctx, config)` returns the `Provider`; `secrets` are the names it may ask `ctx` for.
    """

    name: str = attrs.field(validator=_name)
    summary: str
    make: Callable[[PluginContext, Any], Provider] = attrs.field(validator=_callable)
    config: type = attrs.field(validator=_attrs_class)
    capabilities: ProviderCapabilities = attrs.field(factory=ProviderCapabilities)
    secrets: tuple[str, ...] = ()


@attrs.frozen(kw_only=True)
class AlgorithmInput:
    """
    What `recipe` and `plan` are told: the spec so far and the facts that are known offline.

    `train` holds the values the user's layers set in `[train]` for `recipe`, and the structured
    config for `plan`. `card` is None for a model whose facts are not on this machine yet; `rows`
    is None where the dataset cannot be counted without running user code.
    """

    train: Any
    thinking: bool
    card: ModelCard | None
    rows: int | None


@attrs.frozen(kw_only=True)
class AlgorithmPlan:
    """What the algorithm would need, and what it finds wrong."""

    need: Need
    problems: Sequence[Problem] = ()


@attrs.frozen(kw_only=True)
class AlgorithmPlugin:
    """
    A training algorithm.

    Attributes:
        config: attrs class of the `[train]` table.
        recipe: decides every field marked `recipe=True` that the user left out; pure.
        plan: says what a run needs and what is wrong with it; pure, on the client, without torch.
        worker: import string of `run(context)`, called in the worker; must resume from the
            newest complete checkpoint to the same bits.

    """

    name: str = attrs.field(validator=_name)
    summary: str
    config: type = attrs.field(validator=_attrs_class)
    recipe: Callable[[AlgorithmInput], Mapping[str, Recipe]] = attrs.field(validator=_callable)
    plan: Callable[[AlgorithmInput], AlgorithmPlan] = attrs.field(validator=_callable)
    worker: str = attrs.field(validator=_import_string)


@attrs.frozen(kw_only=True)
class EnvironmentPlugin:
    """
    A format of environments.

    `schemes` are the `scheme:` prefixes of references that `fetch` understands; `detect(folder)`
    says whether a local folder has this format. `make(ctx)` returns the `EnvironmentLoader`.
    """

    name: str = attrs.field(validator=_name)
    summary: str
    detect: Callable[[Path], bool] = attrs.field(validator=_callable)
    make: Callable[[PluginContext], EnvironmentLoader] = attrs.field(validator=_callable)
    schemes: tuple[str, ...] = ()


@attrs.frozen(kw_only=True)
class RewardPlugin:
    """A reward adapter; `config` is the attrs class of `[reward.<name>]`."""

    name: str = attrs.field(validator=_name)
    summary: str
    make: Callable[[PluginContext, Any], RewardAdapter] = attrs.field(validator=_callable)
    config: type = attrs.field(validator=_attrs_class)
    secrets: tuple[str, ...] = ()


@attrs.frozen(kw_only=True)
class ModelPlugin:
    """
    A source of base models.

    An id that is in some plugin's `cards` belongs to that plugin; any other id goes to the first
    whose `claims(id)` is true, in the order of their names. `secrets` are the names it may ask
    `ctx` for.
    """

    name: str = attrs.field(validator=_name)
    summary: str
    make: Callable[[PluginContext], ModelSource] = attrs.field(validator=_callable)
    cards: tuple[ModelCard, ...] = ()
    claims: Callable[[str], bool] = attrs.field(default=lambda _: False, validator=_callable)
    secrets: tuple[str, ...] = ()


@attrs.frozen(kw_only=True)
class ServingPlugin:
    """A serving backend; `config` is the attrs class of `[serving.<name>]`."""

    name: str = attrs.field(validator=_name)
    summary: str
    make: Callable[[PluginContext, Any], ServingBackend] = attrs.field(validator=_callable)
    config: type = attrs.field(validator=_attrs_class)
    secrets: tuple[str, ...] = ()


@attrs.frozen(kw_only=True)
class SinkPlugin:
    """A follower of run events; `config` is the attrs class of `[sink.<name>]`."""

    name: str = attrs.field(validator=_name)
    summary: str
    make: Callable[[PluginContext, Any], Sink] = attrs.field(validator=_callable)
    config: type = attrs.field(validator=_attrs_class)
    secrets: tuple[str, ...] = ()


@attrs.frozen(kw_only=True)
class CommandPlugin:
    """An extra verb of the CLI: `command` is the import string of a click command."""

    name: str = attrs.field(validator=_name)
    help: str
    command: str = attrs.field(validator=_import_string)
