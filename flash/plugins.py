"""
The plugin host: which plugins there are, in which state, and what they provide.

Every installed plugin is in one of five states. Loading never raises for a plugin's sake; a
plugin that is not `ok` hurts when it is selected, and the error then names it, the reason and
the way out.

    ok            loaded, its records are valid
    disabled      named in FLASH_DISABLE_PLUGINS or the user's config, or not in the allow-list
    incompatible  its requirement on flash-core is not met; never imported
    conflict      two distributions claim one name, or two plugins one kind and name: none is used
    broken        import, registration or record check failed; the exception is kept
"""

from __future__ import annotations

import collections
import contextlib
import os
from typing import TYPE_CHECKING, Any, Final

import attrs

from flash.config import EVERY, PluginList, UserConfig
from flash.discovery import (
    KINDS,
    Plugin,
    check_requirements,
    describe,
    find_plugins,
    load_plugin,
)
from flash.errors import FlashError, PluginError, UsageError
from flash.suggest import did_you_mean
from flash.values import Problem

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from flash.home import FlashHome
    from flash.plan import Plan

__all__ = ["KINDS", "Plugin", "PluginHost", "boundary"]

DISABLE_VARIABLE: Final = "FLASH_DISABLE_PLUGINS"
SLOW_S: Final = 0.5
"""A plugin that takes longer than this to load is named to the user."""

KNOWN_DISTRIBUTIONS: Final[Mapping[tuple[str, str], str]] = {
    ("algorithm", "grpo"): "flash-algorithm-grpo",
    ("algorithm", "sft"): "flash-algorithm-sft",
    ("environment", "freesolo"): "flash-env-freesolo",
    ("environment", "jsonl"): "flash-env-jsonl",
    ("environment", "verifiers"): "flash-env-verifiers",
    ("model", "hub"): "flash-model-hub",
    ("model", "smollm2"): "flash-model-smollm2",
    ("provider", "local"): "flash-provider-local",
    ("reward", "exact-match"): "flash-reward-standard",
    ("reward", "format"): "flash-reward-standard",
    ("reward", "json-schema"): "flash-reward-standard",
    ("reward", "judge"): "flash-reward-judge",
    ("reward", "length"): "flash-reward-standard",
    ("reward", "math"): "flash-reward-standard",
    ("reward", "python"): "flash-reward-standard",
    ("reward", "regex"): "flash-reward-standard",
    ("serving", "transformers"): "flash-serving-transformers",
    ("serving", "vllm"): "flash-serving-vllm",
    ("sink", "tensorboard"): "flash-sink-tensorboard",
    ("sink", "wandb"): "flash-sink-wandb",
    ("sink", "webhook"): "flash-sink-webhook",
}
"""Where a name that is not installed here can be had from."""


@contextlib.contextmanager
def boundary(plugin: str, call: str) -> Iterator[None]:
    """
    Attribute what a plugin raises: FlashErrors pass, anything else becomes a `PluginError`.

    A disk that fails is no plugin's fault, and becomes a `StoreError`. `call` names what was asked
    of the plugin. SystemExit is contained too; KeyboardInterrupt is the user's and passes.
    """
    try:
        yield
    except (FlashError, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        from flash.files import disk_error

        disk = disk_error(error)
        if disk is not None:
            raise disk from error
        message = f"plugin {plugin}: {call} raised {describe(error)}"
        hint = f"--debug shows the traceback; FLASH_DISABLE_PLUGINS={plugin} sets the plugin aside"
        raise PluginError(message, hint=hint) from error


class PluginHost:
    """
    The installed plugins and their records, loaded once and then read-only.

    Made by `default` (what the user's config and environment say) or `load`.
    """

    def __init__(self, plugins: Sequence[Plugin], *, warnings: Sequence[str] = ()) -> None:
        self.warnings = tuple(warnings)
        """Names in a deny-list or allow-list that no installed plugin has."""
        self._plugins = tuple(plugins)
        self._owners = {
            (kind, name): plugin
            for plugin in plugins
            if plugin.state == "ok"
            for kind, named in plugin.records.items()
            for name in named
        }

    @classmethod
    def default(cls, home: FlashHome) -> PluginHost:
        """
        Load as `FLASH_DISABLE_PLUGINS` and the user's config.toml say.

        Raises `SpecError` where config.toml is wrong.
        """
        config = UserConfig.read(home.config)
        named = os.environ.get(DISABLE_VARIABLE, "")
        by_variable = PluginList(
            tuple(part.strip() for part in named.split(",") if part.strip()), DISABLE_VARIABLE
        )
        return cls.load(disabled=[by_variable, config.disable], allowed=config.allow)

    @classmethod
    def load(
        cls, *, disabled: Sequence[PluginList] = (), allowed: PluginList | None = None
    ) -> PluginHost:
        """
        Find and load every installed plugin; never raises for a plugin's sake.

        A disabled plugin, one outside `allowed` and an incompatible one are not imported, nor are
        distributions that claim one name.
        """
        found = find_plugins()
        lists = [*disabled, *([allowed] if allowed else [])]
        chosen = [_switch(plugin, disabled, allowed) for plugin in found]
        fitting = [check_requirements(p) if p.state == "ok" else p for p in chosen]
        unique = _same_name(fitting)
        loaded = [load_plugin(p) if p.state == "ok" else p for p in unique]
        return cls(_same_record(loaded), warnings=_unmatched(lists, found))

    def statuses(self) -> list[Plugin]:
        """Return every installed plugin, in the order of names."""
        return list(self._plugins)

    def all(self, kind: str) -> dict[str, Any]:
        """Return the usable records of a kind, by name, in the order of names."""
        owners = sorted((name, plugin) for (of, name), plugin in self._owners.items() if of == kind)
        return {name: plugin.records[kind][name] for name, plugin in owners}

    def get(self, kind: str, name: str) -> Any:
        """
        Return the record that provides `name`.

        Raises `PluginError` when the plugin that would provide it is unusable, and `UsageError`
        when none is known to; both say what to do.
        """
        return self.owner(kind, name).records[kind][name]

    def owner(self, kind: str, name: str) -> Plugin:
        """Return the plugin that provides `name`; raises as `get` does."""
        if owner := self._owners.get((kind, name)):
            return owner
        for plugin in self._plugins:
            if plugin.state != "ok" and _would_provide(plugin, kind, name):
                message = f'the {kind} "{name}" cannot be used: plugin {plugin.verdict}'
                raise PluginError(message, hint=plugin.hint)
        installed = list(self.all(kind))
        message = f'unknown {kind} "{name}"{did_you_mean(name, installed)}'
        listed = f"installed: {', '.join(installed)}" if installed else f"no {kind} is installed"
        source = KNOWN_DISTRIBUTIONS.get((kind, name))
        hint = f"pip install {source}; {listed}" if source else listed
        raise UsageError(message, hint=hint)

    def review(self, plan: Plan) -> list[Problem]:
        """
        Return what the plugins' policies say of a plan, each asked in its own guard.

        A policy that raises, or answers with something else than problems, blocks: its failure is
        an error among the problems.
        """
        problems: list[Problem] = []
        for plugin in self._implementing("flash_review_plan"):
            try:
                with boundary(plugin.name, "flash_review_plan"):
                    for answer in plugin.hooks.flash_review_plan(plan=plan):
                        problems += _checked_problems(answer)
            except FlashError as error:
                problems.append(Problem("", error.message, error.hint, fault="plugin"))
        return problems

    def find_secret(self, name: str) -> str | None:
        """
        Return the first value that a plugin has for the secret `name`, or None.

        Plugins are asked in the order of their names. One that fails stops nothing while another
        answers; when none does, its failure is raised as a `PluginError`, because a secret that
        could not be asked for is not a secret that is missing.
        """
        failure: FlashError | None = None
        for plugin in self._implementing("flash_find_secret"):
            try:
                with boundary(plugin.name, "flash_find_secret"):
                    value = plugin.hooks.flash_find_secret(name=name)
                    if value is not None:
                        return _checked_secret(value)
            except FlashError as error:
                failure = failure or error
        if failure is not None:
            raise failure
        return None

    def _implementing(self, hook: str) -> list[Any]:
        return [
            plugin
            for plugin in self._plugins
            if plugin.state == "ok" and getattr(plugin.hooks, hook).get_hookimpls()
        ]


def _switch(plugin: Plugin, disabled: Sequence[PluginList], allowed: PluginList | None) -> Plugin:
    """Return the plugin, disabled where a list says so; the reason names the list."""
    for listed in disabled:
        if listed.names_plugin(plugin.name, plugin.distribution):
            reason, hint = f"disabled in {listed.origin}", f"take it out of {listed.origin}"
            return attrs.evolve(plugin, state="disabled", reason=reason, hint=hint)
    if allowed is not None and not allowed.names_plugin(plugin.name, plugin.distribution):
        reason, hint = f"not among {allowed.origin}", f'add "{plugin.name}" to {allowed.origin}'
        return attrs.evolve(plugin, state="disabled", reason=reason, hint=hint)
    return plugin


def _unmatched(lists: Sequence[PluginList], found: Sequence[Plugin]) -> list[str]:
    """Return a sentence for each listed name that no plugin has: a misspelt one does nothing."""
    known = {plugin.name for plugin in found} | {plugin.selector for plugin in found} | {EVERY}
    return [
        f'{listed.origin} names "{name}", which is not installed{did_you_mean(name, known)}'
        for listed in lists
        for name in listed.names
        if name not in known
    ]


def _same_name(plugins: Sequence[Plugin]) -> list[Plugin]:
    """Put plugins of different distributions that carry one name in conflict."""
    named = collections.defaultdict(list)
    for plugin in plugins:
        if plugin.state == "ok":
            named[plugin.name].append(plugin)
    return [
        _in_conflict(plugin, f'also claims the name "{plugin.name}"', others)
        if plugin.state == "ok" and (others := [p for p in named[plugin.name] if p is not plugin])
        else plugin
        for plugin in plugins
    ]


def _same_record(plugins: Sequence[Plugin]) -> list[Plugin]:
    """Put loaded plugins that provide one kind and name in conflict."""
    providing = collections.defaultdict(list)
    for plugin in plugins:
        for kind, named in plugin.records.items():
            for name in named:
                providing[kind, name].append(plugin)
    result = []
    for plugin in plugins:
        shared = [
            (f'the {kind} "{name}"', other)
            for (kind, name), owners in providing.items()
            if plugin in owners
            for other in owners
            if other is not plugin
        ]
        if shared:
            records, rivals = (list(dict.fromkeys(column)) for column in zip(*shared, strict=True))
            claim = f"also provide{'s' if len(rivals) == 1 else ''} {' and '.join(records)}"
            result.append(_in_conflict(plugin, claim, rivals))
        else:
            result.append(plugin)
    return result


def _in_conflict(plugin: Plugin, claim: str, others: Sequence[Plugin]) -> Plugin:
    """Return the plugin in conflict; the hint is the line that keeps this one."""
    rivals = " and ".join(f"{other.distribution} {other.version}" for other in others)
    line = ", ".join(f'"{other.selector}"' for other in others)
    return attrs.evolve(
        plugin,
        state="conflict",
        reason=f"{rivals} {claim}",
        hint=f"to keep {plugin.distribution}, write in config.toml: "
        f"[plugins] disable = [{line}]; or uninstall what you do not want",
    )


def _would_provide(plugin: Plugin, kind: str, name: str) -> bool:
    """
    Say whether an unusable plugin is the one that was meant.

    What was not loaded cannot say what it provides; then its distribution is ours for that name,
    or its own name is the wanted one.
    """
    if plugin.records:
        return name in plugin.records.get(kind, {})
    known = KNOWN_DISTRIBUTIONS.get((kind, name))
    if plugin.distribution in KNOWN_DISTRIBUTIONS.values():
        return plugin.distribution == known
    return plugin.name == name


def _checked_problems(answer: object) -> list[Problem]:
    if isinstance(answer, list | tuple) and all(isinstance(item, Problem) for item in answer):
        return list(answer)
    message = "flash_review_plan must return a list of Problem"
    raise TypeError(message)


def _checked_secret(value: object) -> str:
    if isinstance(value, str):
        return value
    # The value itself must not reach a message.
    message = f"flash_find_secret must return a string or None, got {type(value).__name__}"
    raise TypeError(message)
