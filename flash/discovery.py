"""
Finding plugins and loading each one in a guard of its own.

A plugin is an entry point of the group `flash` whose value is a module with hook
implementations. Whether it fits this version of Flash is read from its metadata before anything
of it is imported. Every plugin gets a pluggy manager of its own: pluggy checks its hooks against
the specs, and nothing that one plugin does can reach another.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import reprlib
import sys
import time
import traceback
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Final, Literal

import attrs
import pluggy
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import flash
from flash import hookspecs, records
from flash.cli import COMMANDS
from flash.suggest import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

GROUP: Final = "flash"
CORE: Final = "flash-core"

State = Literal["ok", "disabled", "incompatible", "conflict", "broken"]

KINDS: Final[Mapping[str, tuple[str, type[Any]]]] = {
    "provider": ("flash_register_providers", records.ProviderPlugin),
    "algorithm": ("flash_register_algorithms", records.AlgorithmPlugin),
    "environment": ("flash_register_environments", records.EnvironmentPlugin),
    "reward": ("flash_register_rewards", records.RewardPlugin),
    "model": ("flash_register_models", records.ModelPlugin),
    "serving": ("flash_register_serving", records.ServingPlugin),
    "sink": ("flash_register_sinks", records.SinkPlugin),
    "command": ("flash_register_commands", records.CommandPlugin),
}
"""Each kind's register hook and the record that the hook returns a list of."""


@attrs.frozen(kw_only=True, eq=False)
class Plugin:
    """
    One installed plugin: what is known of it, and once it is loaded, what it provides.

    Attributes:
        name: the entry point's name.
        reason: one sentence that says why the state is not `ok`; empty when it is.
        hint: what to do about it.
        load_s: seconds that import and registration took; None where nothing was imported.
        error: the exception that broke it, kept for its traceback.
        records: kind -> name -> record; usable only in state `ok`.
        hooks: calls this plugin's implementations and no other's.

    """

    name: str
    distribution: str
    version: str
    entry_point: importlib.metadata.EntryPoint | None = attrs.field(repr=False, default=None)
    state: State = "ok"
    reason: str = ""
    hint: str | None = None
    load_s: float | None = None
    error: BaseException | None = attrs.field(default=None, repr=False)
    records: Mapping[str, Mapping[str, Any]] = attrs.field(factory=dict, repr=False)
    hooks: pluggy.HookRelay | None = attrs.field(default=None, repr=False)

    @property
    def label(self) -> str:
        """The plugin as messages name it: name, distribution and version."""
        return f"{self.name} ({self.distribution} {self.version})"

    @property
    def verdict(self) -> str:
        """What is wrong with it, in a sentence; for a plugin that is not `ok`."""
        state = "in conflict" if self.state == "conflict" else self.state
        return f"{self.label} is {state}: {self.reason}"

    @property
    def selector(self) -> str:
        """`name@distribution`, which names this plugin even where another has its name."""
        return f"{self.name}@{self.distribution}"


class _FaultError(Exception):
    """Why a plugin is broken, in a sentence; the plugin's own exception is its cause."""


def describe(error: BaseException) -> str:
    """Return `Type: message` in one line, for any exception, even one that cannot be printed."""
    lines = "".join(traceback.format_exception_only(error)).strip().splitlines()
    # A SyntaxError prints its place first and its message last.
    return lines[-1].strip() if isinstance(error, SyntaxError) else " ".join(lines)


def find_plugins() -> list[Plugin]:
    """
    Return every installed plugin, in the order of names, nothing imported.

    Where one distribution is on the path twice, Python imports the first, and so is the first
    read here.
    """
    found: dict[str, list[Plugin]] = {}
    for distribution in importlib.metadata.distributions():
        if f"[{GROUP}]" not in _declared(distribution):
            continue
        name, version = _identity(distribution)
        if name not in found:
            found[name] = _entry_points(distribution, name, version)
    plugins = [plugin for listed in found.values() for plugin in listed]
    return sorted(plugins, key=lambda plugin: (plugin.name, plugin.distribution))


def _declared(distribution: importlib.metadata.Distribution) -> str:
    """Return the text of entry_points.txt, damaged bytes replaced."""
    try:
        return distribution.read_text("entry_points.txt") or ""
    except UnicodeDecodeError as error:
        return bytes(error.object).decode(errors="replace")


def _identity(distribution: importlib.metadata.Distribution) -> tuple[str, str]:
    """Return name and version; those of half-removed or damaged ones are in the folder's name."""
    path = PurePath(str(getattr(distribution, "_path", "unknown-unknown")))
    name, _, version = path.stem.partition("-")
    # A malformed file may raise anything here; it is named when the requirements are checked.
    with contextlib.suppress(Exception):
        metadata = distribution.metadata
        name, version = metadata["Name"] or name, metadata["Version"] or version
    return canonicalize_name(name), version


def _entry_points(
    distribution: importlib.metadata.Distribution, name: str, version: str
) -> list[Plugin]:
    try:
        points = [point for point in distribution.entry_points if point.group == GROUP]
    except Exception as error:  # noqa: BLE001 - any malformed file, one broken plugin
        return [
            Plugin(
                name=name,
                distribution=name,
                version=version,
                state="broken",
                reason=f"its entry_points.txt cannot be read: {describe(error)}",
                hint=f"reinstall it: pip install --force-reinstall {name}",
                error=error,
            )
        ]
    return [
        Plugin(name=point.name, distribution=name, version=version, entry_point=point)
        for point in points
    ]


def check_requirements(plugin: Plugin) -> Plugin:
    """Return the plugin, `incompatible` when it asks for another version of Flash."""
    dist = plugin.entry_point.dist if plugin.entry_point else None
    try:
        wanted = [Requirement(line) for line in (dist.requires if dist else None) or ()]
        unmet = [
            requirement
            for requirement in wanted
            if canonicalize_name(requirement.name) == CORE
            and (requirement.marker is None or requirement.marker.evaluate())
            and not requirement.specifier.contains(flash.__version__, prereleases=True)
        ]
    except Exception as error:  # noqa: BLE001 - any malformed file, one broken plugin
        return broken(plugin, f"its metadata cannot be read: {error}", error)
    if not unmet:
        return plugin
    asked = ", ".join(f"{CORE}{requirement.specifier}" for requirement in unmet)
    return attrs.evolve(
        plugin,
        state="incompatible",
        reason=f"it needs {asked}; this is {CORE} {flash.__version__}",
        hint=f"pip install --upgrade {plugin.distribution} {CORE}",
    )


def broken(plugin: Plugin, reason: str, error: BaseException, **known: Any) -> Plugin:
    """Return the plugin as broken, for the given reason."""
    return attrs.evolve(
        plugin,
        state="broken",
        reason=reason,
        hint=f"flash plugins show {plugin.name} --traceback; to set it aside: "
        f"FLASH_DISABLE_PLUGINS={plugin.name}",
        error=error,
        **known,
    )


def load_plugin(plugin: Plugin) -> Plugin:
    """
    Import the plugin and collect its records; returns it `ok` or `broken`.

    Nothing that the plugin raises comes out, SystemExit included; KeyboardInterrupt does. What it
    prints goes to stderr, so that it cannot spoil JSON on stdout.
    """
    started = time.perf_counter()
    reason, cause = "", None
    try:
        with contextlib.redirect_stdout(sys.stderr):
            hooks = _register(plugin)
            collected = _collect(hooks)
    except KeyboardInterrupt:
        raise
    except _FaultError as fault:
        reason, cause = str(fault), fault.__cause__ or fault
    except BaseException as error:  # noqa: BLE001 - whatever a plugin does breaks only itself
        reason, cause = f"loading it raised {describe(error)}", error
    took_s = time.perf_counter() - started
    if cause is not None:
        return broken(plugin, reason, cause, load_s=took_s)
    return attrs.evolve(plugin, load_s=took_s, records=collected, hooks=hooks)


@contextlib.contextmanager
def _calling(call: str) -> Iterator[None]:
    """Turn whatever the plugin raises into a fault that names the call."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        message = f"{call} raised {describe(error)}"
        raise _FaultError(message) from error


def _register(plugin: Plugin) -> pluggy.HookRelay:
    """Import the plugin's module and check its hooks against the specs."""
    point = plugin.entry_point
    assert point is not None, "a plugin without an entry point is broken and never loaded"  # noqa: S101 - for mypy
    with _calling(f"import {point.value}"):
        module = point.load()
    manager = pluggy.PluginManager("flash")
    manager.add_hookspecs(hookspecs)
    known = set(vars(manager.hook))
    try:
        manager.register(module, plugin.name)
    except pluggy.PluginValidationError as error:
        message = f"a hook does not fit its specification: {' '.join(str(error).split())}"
        raise _FaultError(message) from error
    callers = manager.get_hookcallers(module) or []
    for caller in callers:
        optional = all(impl.optionalhook for impl in caller.get_hookimpls())
        if not caller.has_spec() and not optional:
            message = f'"{caller.name}" is not a hook of Flash{did_you_mean(caller.name, known)}'
            raise _FaultError(message)
    implemented = {caller.name for caller in callers}
    for name in sorted(known - implemented):
        if callable(getattr(module, name, None)):
            message = f"{name} is defined without @flash.hookimpl"
            raise _FaultError(message)
    if not implemented:
        message = f"{point.value} implements no hook of Flash"
        raise _FaultError(message)
    return manager.hook


def _collect(hooks: pluggy.HookRelay) -> dict[str, dict[str, Any]]:
    """Call every register hook and check what it returns."""
    collected: dict[str, dict[str, Any]] = {}
    for kind, (hook, record_type) in KINDS.items():
        with _calling(hook):
            results: list[Any] = getattr(hooks, hook)()
        if not results and getattr(hooks, hook).get_hookimpls():
            # pluggy leaves out None.
            message = f"{hook} returned nothing; it must return a list of {record_type.__name__}"
            raise _FaultError(message)
        for returned in results:
            if not isinstance(returned, list | tuple):
                message = f"{hook} must return a list of {record_type.__name__}, got "
                raise _FaultError(message + reprlib.repr(returned))
            for record in returned:
                named = collected.setdefault(kind, {})
                _check(record, kind, hook, record_type)
                if record.name in named:
                    message = f'{hook} returns the {kind} "{record.name}" twice'
                    raise _FaultError(message)
                named[record.name] = record
    return collected


def _check(record: Any, kind: str, hook: str, record_type: type[Any]) -> None:
    if not isinstance(record, record_type):
        message = f"{hook} must return {record_type.__name__} records, got {reprlib.repr(record)}"
        raise _FaultError(message)
    if kind == "command" and record.name in COMMANDS:
        message = f'{hook} returns the command "{record.name}", which is a verb of Flash itself'
        raise _FaultError(message)
