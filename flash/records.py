"""
The frozen records that register hooks return: what a plugin provides, as data.

Building a record does no I/O and imports nothing heavy; the work sits behind `make` or behind an
import string `"package.module:attribute"`.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, get_args

import attrs
from attrs import validators

from flash.fields import setting
from flash.values import ModelCard

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from flash.contracts import (
        EnvironmentLoader,
        ModelSource,
        NoticeSink,
        PluginContext,
        Provider,
        RewardAdapter,
        ServingBackend,
        Sink,
    )
    from flash.values import Need, Problem, Recipe

    Validator = Callable[[object, attrs.Attribute[Any], Any], None]

NAME = r"[a-z][a-z0-9]*(-[a-z0-9]+)*"
_name = validators.matches_re(NAME)
_import_string = validators.matches_re(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def _config_class(_: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if not isinstance(value, type) or not attrs.has(value):
        msg = f"{attribute.name} must be an attrs class, got {value!r}"
        raise TypeError(msg)
    _resolve(value, attribute.name, set())


def _resolve(cls: type, path: str, seen: set[type]) -> None:
    """Find out now, and not in a verb, whether the types of all settings can be read."""
    seen.add(cls)
    try:
        attrs.resolve_types(cls)
    except Exception as error:
        msg = f"{path}: the types of the settings of {cls.__name__} cannot be read: {error}"
        raise TypeError(msg) from error
    for field in attrs.fields(cls):
        for inner in (field.type, *get_args(field.type)):
            if isinstance(inner, type) and attrs.has(inner) and inner not in seen:
                _resolve(inner, f"{path}.{field.name}", seen)


def _instance(kind: type) -> Validator:
    def check(_: object, attribute: attrs.Attribute[Any], value: object) -> None:
        if not isinstance(value, kind):
            msg = f"{attribute.name} must be a {kind.__name__}, got {value!r}"
            raise TypeError(msg)

    return check


def _tuple_of(kind: type) -> Validator:
    def check(_: object, attribute: attrs.Attribute[Any], value: object) -> None:
        if not isinstance(value, tuple) or not all(isinstance(item, kind) for item in value):
            msg = f"{attribute.name} must be a tuple of {kind.__name__}, got {value!r}"
            raise TypeError(msg)

    return check


_text = _instance(str)
_texts = _tuple_of(str)


def _callable(_: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if not callable(value):
        msg = f"{attribute.name} must be callable, got {value!r}"
        raise TypeError(msg)


@attrs.frozen
class ProviderCapabilities:
    """
    What a provider can do, readable before `make`.

    `offline`: `offers` needs no network, so a dry run may ask for them. `poll_s`: how often it may
    be asked what there is. `parallel_launches`: how many launches may be under way at once; 1 where
    the room that one takes shows in the offers for the next. `settle_s`: for how long after a
    launch whose answer was lost its instance may still appear in `list`. `idempotent`: to launch a
    key that was launched before changes nothing and gives the same answer.
    """

    logs: bool = False
    exit_codes: bool = False
    spot: bool = False
    prices: bool = False
    offline: bool = False
    name_length: int = 50
    launches_per_minute: int | None = None
    poll_s: float = 5.0
    parallel_launches: int = 8
    settle_s: float = 120.0
    idempotent: bool = False


@attrs.frozen(kw_only=True)
class ProviderPlugin:
    """
    A place to run. `config` is the attrs class of `[provider.<name>]`.

    `make(ctx, config)` returns the `Provider`; `secrets` are the names it may ask `ctx` for.
    """

    name: str = attrs.field(validator=_name)
    summary: str = attrs.field(validator=_text)
    make: Callable[[PluginContext, Any], Provider] = attrs.field(validator=_callable)
    config: type = attrs.field(validator=_config_class)
    capabilities: ProviderCapabilities = attrs.field(
        factory=ProviderCapabilities, validator=_instance(ProviderCapabilities)
    )
    secrets: tuple[str, ...] = attrs.field(default=(), validator=_texts)


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
    summary: str = attrs.field(validator=_text)
    config: type = attrs.field(validator=_config_class)
    recipe: Callable[[AlgorithmInput], Mapping[str, Recipe]] = attrs.field(validator=_callable)
    plan: Callable[[AlgorithmInput], AlgorithmPlan] = attrs.field(validator=_callable)
    worker: str = attrs.field(validator=_import_string)


@attrs.frozen(kw_only=True)
class EnvironmentPlugin:
    """
    A format of environments.

    `schemes` are the `scheme:` prefixes of references that `fetch` understands; `detect(folder)`
    says whether a local folder has this format. `make(ctx)` returns the `EnvironmentLoader`.
    `scores` is False where only `[reward.*]` tables can score its environments.
    """

    name: str = attrs.field(validator=_name)
    summary: str = attrs.field(validator=_text)
    detect: Callable[[Path], bool] = attrs.field(validator=_callable)
    make: Callable[[PluginContext], EnvironmentLoader] = attrs.field(validator=_callable)
    schemes: tuple[str, ...] = attrs.field(default=(), validator=_texts)
    scores: bool = True


def weighted(config: type) -> type:
    """Return the class of a reward's table: the settings of `config`, and the core's `weight`."""
    weight = setting(
        1.0,
        doc="How often the score is counted in the reward. A negative weight makes it a penalty; "
        "with 0 it is measured and not counted.",
    )
    own = {
        "__doc__": config.__doc__,
        "__module__": config.__module__,
        "__annotations__": {"weight": float},
        "weight": weight,
    }
    table: type = attrs.define(kw_only=True)(type(config.__name__, (config,), own))
    return table


def _reward_name(_: object, __: attrs.Attribute[Any], value: str) -> None:
    if value == ENVIRONMENT_REWARD:
        msg = f"[reward.{value}] is the environment's own score; choose another name"
        raise ValueError(msg)


def _no_weight(_: object, __: attrs.Attribute[Any], value: type) -> None:
    if "weight" in attrs.fields_dict(value):
        msg = f"{value.__name__} has a setting `weight`, which the core adds to every reward"
        raise ValueError(msg)


ENVIRONMENT_REWARD: Final = "environment"
"""The table under `[reward]` that is no adapter's: how much the environment's own score counts."""


@attrs.frozen(kw_only=True)
class RewardPlugin:
    """
    A reward adapter; `config` is the attrs class of `[reward.<name>]`.

    Its settings stand in the TOML beside `weight`, which is the core's; what `make` is given has
    both.
    """

    name: str = attrs.field(validator=[_name, _reward_name])
    summary: str = attrs.field(validator=_text)
    make: Callable[[PluginContext, Any], RewardAdapter] = attrs.field(validator=_callable)
    config: type = attrs.field(validator=[_config_class, _no_weight])
    secrets: tuple[str, ...] = attrs.field(default=(), validator=_texts)

    @cached_property
    def table(self) -> type:
        """The class of `[reward.<name>]`: the settings of `config`, and `weight`."""
        return weighted(self.config)


@attrs.frozen(kw_only=True)
class ModelPlugin:
    """
    A source of base models.

    An id that is in some plugin's `cards` belongs to that plugin; any other id goes to the first
    whose `claims(id)` is true, in the order of their names. So does a reference to a LoRA adapter
    with `claims_adapter`; a source that claims some implements `HasAdapters`. `secrets` are the
    names it may ask `ctx` for.
    """

    name: str = attrs.field(validator=_name)
    summary: str = attrs.field(validator=_text)
    make: Callable[[PluginContext], ModelSource] = attrs.field(validator=_callable)
    cards: tuple[ModelCard, ...] = attrs.field(default=(), validator=_tuple_of(ModelCard))
    claims: Callable[[str], bool] = attrs.field(default=lambda _: False, validator=_callable)
    claims_adapter: Callable[[str], bool] = attrs.field(
        default=lambda _: False, validator=_callable
    )
    secrets: tuple[str, ...] = attrs.field(default=(), validator=_texts)


@attrs.frozen(kw_only=True)
class ServingPlugin:
    """
    A serving backend; `config` is the attrs class of `[serving.<name>]`.

    `make(ctx, config)` starts nothing. It raises where the backend could not be started here at
    all; `flash deploy` then leaves what is served as it is.

    `fields` are the fields of OpenAI's requests that its server honours, beyond `model`,
    `messages`, `prompt`, `max_tokens`, `max_completion_tokens`, `stream` and `stream_options`; a
    request with any other is refused before it gets there. `setup` is the import string of what
    `flash plugins setup` calls, where the server needs more than was installed with the plugin: a
    function of nothing that does what is left to do, and returns a sentence on what is there now.
    `streams_tools` says whether the streams of its server have all that its whole answers have
    where a request has `tools`; where not, such requests are asked for whole answers alone.
    """

    name: str = attrs.field(validator=_name)
    summary: str = attrs.field(validator=_text)
    make: Callable[[PluginContext, Any], ServingBackend] = attrs.field(validator=_callable)
    config: type = attrs.field(validator=_config_class)
    fields: tuple[str, ...] = attrs.field(default=(), validator=_texts)
    secrets: tuple[str, ...] = attrs.field(default=(), validator=_texts)
    setup: str | None = attrs.field(default=None, validator=validators.optional(_import_string))
    streams_tools: bool = True


@attrs.frozen(kw_only=True)
class SinkPlugin:
    """
    A follower of a run; `config` is the attrs class of `[sink.<name>]`.

    `make(ctx, config)` returns the `Sink` that follows the events beside the training,
    `notices(ctx, config)` the `NoticeSink` that the supervisor tells of starts and ends. A record
    has one of the two, or both.
    """

    name: str = attrs.field(validator=_name)
    summary: str = attrs.field(validator=_text)
    make: Callable[[PluginContext, Any], Sink] | None = attrs.field(
        default=None, validator=validators.optional(_callable)
    )
    config: type = attrs.field(validator=_config_class)
    secrets: tuple[str, ...] = attrs.field(default=(), validator=_texts)
    notices: Callable[[PluginContext, Any], NoticeSink] | None = attrs.field(
        default=None, validator=validators.optional(_callable)
    )

    def __attrs_post_init__(self) -> None:
        """Refuse a sink that nobody would call."""
        if self.make is None and self.notices is None:
            msg = "a sink has `make`, `notices`, or both"
            raise TypeError(msg)


@attrs.frozen(kw_only=True)
class CommandPlugin:
    """An extra verb of the CLI: `command` is the import string of a click command."""

    name: str = attrs.field(validator=_name)
    help: str = attrs.field(validator=_text)
    command: str = attrs.field(validator=_import_string)
