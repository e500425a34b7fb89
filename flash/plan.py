"""
From a resolved spec to a plan: what would run, where, what it needs, and every problem found.

Planning imports nothing heavy and starts nothing. Offline it asks no network either; otherwise an
environment that lives elsewhere is fetched and every provider is asked.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar

import attrs

from flash.context import plugin_context
from flash.environments import locate
from flash.errors import FlashError, SpecError, StoreError, UsageError
from flash.models import FOLDER_HINT, choose_model
from flash.offers import find_offer, no_room
from flash.plugins import boundary
from flash.recipe import decide
from flash.records import AlgorithmInput
from flash.rewards import secrets_of
from flash.spec.model import blamed, find_record
from flash.spec.paths import top_level
from flash.spec.resolve import DEFAULT
from flash.spec.secrets import Redactor, SecretFinder, values_in_spec
from flash.spec.strict import Reader, config_fields
from flash.values import Problem
from flash.warm_start import (
    FIELD,
    adapter_folder,
    adapter_owner,
    fetch_adapter,
    misfits,
    not_fetched,
    read_adapter,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from flash.environments import Located
    from flash.home import FlashHome
    from flash.models import ChosenModel
    from flash.plugins import PluginHost
    from flash.recipe import Reason
    from flash.records import AlgorithmPlan
    from flash.spec.model import EnvironmentTable, Spec
    from flash.spec.resolve import Resolved
    from flash.values import Need, Offer
    from flash.warm_start import Adapter

DEFAULT_PROVIDER: Final = "local"

_T = TypeVar("_T")


@attrs.frozen(kw_only=True)
class Plan:
    """
    What would run. Parts that a problem kept from being known are None.

    Attributes:
        spec: every value decided, those of the recipe too.
        sources: dotted path of each value -> the layer that set it.
        reasons: dotted path of each value that was decided here -> why.
        model: the base model and the plugin that brings it.
        environment: the environment and the plugin that reads it.
        rows: rows to train on, where they can be counted.
        warm_start: the adapter that training starts from, if any.
        need: what the algorithm asks of a machine.
        providers: where it may run, in order.
        offer: what the first of them that has room offers; None also where nobody was asked.
        secrets: names of the secrets that the worker gets; `SecretFinder.beside` has the values.
        problems: everything that is wrong or worth knowing, sorted by path.

    """

    spec: Spec | None
    sources: Mapping[str, str]
    reasons: Mapping[str, Reason]
    model: ChosenModel | None
    environment: Located | None
    rows: int | None
    warm_start: Adapter | None
    need: Need | None
    providers: Sequence[str]
    offer: Offer | None
    secrets: Sequence[str]
    problems: Sequence[Problem]

    @property
    def errors(self) -> list[Problem]:
        """The problems that stop a submit."""
        return [problem for problem in self.problems if problem.severity == "error"]

    def check(self) -> Spec:
        """Return the spec of a plan that can be submitted; raise `SpecError` for any other."""
        if self.errors or self.spec is None:
            raise SpecError(self.errors)
        return self.spec


def no_runs(reference: str) -> NoReturn:
    """Stand in for a plane where there is none: no reference names a run."""
    raise UsageError(f'"{reference}" names no adapter: no such folder, and no such run')


def make_plan(
    resolved: Resolved,
    host: PluginHost,
    home: FlashHome,
    *,
    find_run: Callable[[str], Path] = no_runs,
    offline: bool = False,
) -> Plan:
    """
    Plan what the layers say.

    `find_run` returns the adapter's folder of a run or its checkpoint, or raises. With `offline`,
    nothing is fetched and providers that need a network are not asked. Raises only `StoreError`.
    """
    return _Planner(resolved, host, home, find_run=find_run, offline=offline).plan()


class _Planner:
    """One plan in the making; each step adds to `problems` and goes on."""

    def __init__(
        self,
        resolved: Resolved,
        host: PluginHost,
        home: FlashHome,
        *,
        find_run: Callable[[str], Path],
        offline: bool,
    ) -> None:
        self.resolved = resolved
        self.host = host
        self.home = home
        self.find_run = find_run
        self.offline = offline
        self.parts = dict(resolved.parts)
        self.sources = dict(resolved.sources)
        self.reasons: dict[str, Reason] = {}
        self.problems: list[Problem] = list(resolved.problems)
        self.finder = SecretFinder.beside(resolved.base, host)

    def plan(self) -> Plan:
        values = self._values()
        # First, so that a secret's value is neither looked up anywhere nor handed to a plugin.
        leaks = list(values_in_spec(Reader().plain(self.parts), values))
        self.problems += leaks
        for leak in leaks:
            self.parts.pop(top_level(leak.path), None)
        model = self._model()
        table: EnvironmentTable | None = self.parts.get("environment")
        environment = self._environment(table) if table else None
        rows = self._rows(table, environment) if table and environment else None
        adapter = self._warm_start(model)
        train, need = self._algorithm(model, rows, adapter)
        spec = None
        if self.resolved.spec is not None and train is not None and not leaks:
            spec = attrs.evolve(self.resolved.spec, train=train)
        providers = self._providers()
        plan = Plan(
            spec=spec,
            sources=self.sources,
            reasons=self.reasons,
            model=model,
            environment=environment,
            rows=rows,
            warm_start=adapter,
            need=need,
            providers=tuple(providers),
            offer=self._offer(providers, need) if need else None,
            secrets=tuple(self._secrets(model)),
            problems=self.problems,
        )
        if spec is not None:
            self.problems += self.host.review(plan)
        redact = Redactor(values.values()).redact
        shown = dict.fromkeys(_redacted(problem, redact) for problem in self.problems)
        return attrs.evolve(
            plan,
            sources={redact(path): label for path, label in self.sources.items()},
            problems=sorted(shown, key=lambda problem: problem.path),
        )

    def _values(self) -> Mapping[str, str]:
        """Return the values that nothing may show: of every secret that this plan could touch."""
        records = [*self.host.all("model").values()]
        for kind in ("provider", "sink"):
            records += [self.host.get(kind, name) for name in self.parts.get(kind, {})]
        names = {name for record in records for name in record.secrets}
        names |= secrets_of(self.parts.get("reward", {}), self.host)
        found = {
            name: self._ask("environment.secrets", partial(self.finder.find, name))
            for name in sorted(names | {*self.resolved.secrets})
        }
        return {name: value for name, value in found.items() if value}

    def _model(self) -> ChosenModel | None:
        reference = self.parts.get("model")
        if reference is None:
            return None
        base = self.resolved.base_of("model")
        model = self._ask(
            "model",
            lambda: choose_model(
                reference,
                base,
                self.host,
                self.home,
                secret=self.finder.find,
                offline=self.offline,
            ),
        )
        if model is not None:
            self.problems += _model_problems(model, self.parts.get("thinking", False))
        return model

    def _environment(self, table: EnvironmentTable) -> Located | None:
        path = "environment.path" if table.path is not None else "environment.id"
        if table.path is None and table.id is None:
            return None
        base = self.resolved.base_of(path)
        return self._ask(
            path, lambda: locate(table, base, self.host, self.home, offline=self.offline)
        )

    def _rows(self, table: EnvironmentTable, environment: Located) -> int | None:
        folder, name = environment.folder, environment.plugin
        if folder is None:
            return None
        record = self.host.get("environment", name)
        split, params = table.split, table.params

        def check() -> Sequence[Problem]:
            with boundary(name, "check"):
                loader = record.make(plugin_context(self.home, name, {}))
                return list(loader.check(folder, split=split, params=params))

        def count() -> int | None:
            with boundary(name, "rows"):
                loader = record.make(plugin_context(self.home, name, {}))
                rows: int | None = loader.rows(folder, split=split, params=params)
                return rows

        found = self._ask("environment", check)
        self.problems += found or ()
        if found is None or any(problem.severity == "error" for problem in found):
            return None
        return self._ask("environment", count)

    def _warm_start(self, model: ChosenModel | None) -> Adapter | None:
        reference = getattr(self.parts.get("train"), FIELD, None)
        if not reference:
            return None
        path = f"train.{FIELD}"
        base = self.resolved.base_of(path)
        adapter = self._ask(path, lambda: self._adapter(reference, base))
        if adapter is not None and model is not None:
            self.problems += misfits(adapter, model, self._asked())
        return adapter

    def _adapter(self, reference: str, base: Path) -> Adapter | None:
        """Return the adapter to start from; None for one that this plan may not fetch."""
        folder, revision = adapter_folder(reference, base), None
        if folder is None:
            owner = adapter_owner(reference, self.host)
            if owner is None:
                folder = self.find_run(reference)
            elif self.offline:
                self.problems.append(not_fetched(reference))
                return None
            else:
                folder, revision = fetch_adapter(
                    owner, reference, self.host, self.home, secret=self.finder.find
                )
        return read_adapter(reference, folder, revision)

    def _algorithm(
        self, model: ChosenModel | None, rows: int | None, adapter: Adapter | None
    ) -> tuple[Any, Need | None]:
        """Decide what the user left open and ask what the run needs; None where that fails."""
        config, name = self.parts.get("train"), self.parts.get("algorithm", "sft")
        record, _ = find_record(self.host, "algorithm", name, "algorithm")
        if record is None or config is None or model is None:
            return config, None
        facts = AlgorithmInput(
            train=self._asked(),
            thinking=self.parts.get("thinking", False),
            card=model.card,
            rows=rows,
        )
        decision = self._ask("train", lambda: decide(record, config, facts, adapter))
        if decision is None:
            return None, None
        decided, reasons = decision
        self.reasons |= reasons
        self.sources |= {path: reason.label for path, reason in reasons.items()}

        def ask() -> AlgorithmPlan:
            with boundary(name, "plan"):
                answer: AlgorithmPlan = record.plan(attrs.evolve(facts, train=decided))
                return answer

        answer = self._ask("train", ask)
        if answer is None:
            return decided, None
        self.problems += answer.problems
        return decided, answer.need

    def _asked(self) -> dict[str, Any]:
        """Return the settings of `[train]` that a layer set, typed."""
        config = self.parts["train"]
        set_by_layers = {path for path, label in self.sources.items() if label != DEFAULT}
        return {
            name: getattr(config, name)
            for name in config_fields(type(config))
            if any(path.split(".")[:2] == ["train", name] for path in set_by_layers)
        }

    def _providers(self) -> dict[str, Any]:
        """Return the configs of the providers in order; with none named, the default one's."""
        named: dict[str, Any] = self.parts.get("provider", {})
        if named:
            return named
        record, problems = find_record(self.host, "provider", DEFAULT_PROVIDER, "provider")
        self.problems += problems
        if record is None:
            return {}
        config, problems = Reader().read(record.config, {}, ("provider", DEFAULT_PROVIDER))
        self.problems += problems
        return {} if problems else {DEFAULT_PROVIDER: config}

    def _offer(self, providers: Mapping[str, Any], need: Need) -> Offer | None:
        find = self.finder.find
        found = self._ask(
            "provider",
            lambda: find_offer(
                providers, need, self.host, self.home, secret=find, offline=self.offline
            ),
        )
        if found is None:
            return None
        offer: Offer | None = found.offer
        if offer is None and found.asked_all and providers:
            self.problems.append(no_room(need, found.most, type(self.parts["train"])))
        return offer

    def _secrets(self, model: ChosenModel | None) -> Iterable[str]:
        """Return the names the worker gets: what the environment needs and its plugins can use."""
        required = self.resolved.secrets
        plugins = [("sink", name) for name in self.parts.get("sink", {})]
        plugins += [("model", model.plugin)] if model else []
        optional = {s for kind, name in plugins for s in self.host.get(kind, name).secrets}
        optional |= secrets_of(self.parts.get("reward", {}), self.host)
        values = self._ask(
            "environment.secrets", lambda: self.finder.require(required, sorted(optional))
        )
        return sorted(values or ())

    def _ask(self, path: str, question: Callable[[], _T]) -> _T | None:
        """Return the answer, or None and a problem at `path` for what was raised."""
        try:
            return question()
        except StoreError:
            raise
        except SpecError as error:
            self.problems += error.problems
        except FlashError as error:
            self.problems.append(blamed(path, error))
        return None


def _redacted(problem: Problem, redact: Callable[[str], str]) -> Problem:
    return attrs.evolve(
        problem,
        path=redact(problem.path),
        message=redact(problem.message),
        hint=redact(problem.hint) if problem.hint else None,
    )


def _model_problems(model: ChosenModel, thinking: bool) -> Iterable[Problem]:
    if not model.whole:
        yield Problem("model", f"{model.id} cannot be loaded: files are missing", FOLDER_HINT)
    if model.card is None:
        message = f"nothing is known here of {model.id}, so memory and length are not checked"
        yield Problem("model", message, "they are when the run is submitted", severity="warning")
    elif thinking and model.card.thinking == "none":
        yield Problem("thinking", f"{model.id} has no reasoning mode", "leave thinking out")
    elif not thinking and model.card.thinking == "always":
        yield Problem("thinking", f"{model.id} always reasons", "set thinking = true")
