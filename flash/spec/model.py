"""
The spec: what a run is, typed and complete.

The core's own settings are the classes here; `[train]` and the `[provider.*]`, `[reward.*]`,
`[sink.*]` and `[serving.*]` tables are whatever attrs class the named plugin's record gives.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final, Literal

import attrs

from flash.errors import FlashError, PluginError, SpecError
from flash.fields import setting
from flash.records import ENVIRONMENT_REWARD
from flash.spec.layers import clean
from flash.spec.limits import LIMIT_TABLES, BudgetTable, CheckpointsTable, RetryTable
from flash.spec.paths import dotted, suggestion, top_level
from flash.spec.rules import (
    environment_place,
    environment_rules,
    secrets_asked_for,
    secrets_written_down,
    worker_variable_rules,
)
from flash.spec.strict import Reader, WrongType, config_fields, missing, spellings, unknown_keys
from flash.spec.tables import OWN_REWARD, PLUGIN_TABLES, settings_class
from flash.spec.toml import toml_document
from flash.suggest import nearest
from flash.values import Problem

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from flash.plugins import PluginHost

SHORT_TABLES: Final = {"wandb": ("sink", "wandb")}
"""Tables that public configs of the format write at the top level -> where they belong."""

DEFAULT_ALGORITHM: Final = "sft"

_NEVER_QUOTED: Final = ("environment.secrets", "worker_env")


@attrs.frozen(kw_only=True)
class EnvironmentTable:
    """The tasks and their scoring; exactly one of `id` and `path` is needed."""

    id: str | None = setting(
        None,
        doc="A published environment (`org/name` or `org/name@version`), "
        "`github:owner/repo@ref:path`, another scheme that an environment plugin reads, or a "
        "local folder.",
        non_empty=True,
        example="github:your-org/environments@v1:invoices",
    )
    path: str | None = setting(
        None,
        doc="A local folder, relative to the file that says so.",
        non_empty=True,
        example=".",
    )
    params: dict[str, Any] = setting(
        factory=dict,
        doc="Keyword arguments for the environment's `load_environment`. Never a secret's value.",
    )
    pip: tuple[str, ...] = setting(
        (),
        doc="Packages that the environment imports, as pip requirements. They are installed "
        "beside the trainer, never into it; options and credentials are refused.",
        example=["jsonschema>=4"],
    )
    secrets: tuple[str, ...] = setting(
        (),
        doc="Names of environment variables that the environment reads. Values are found in the "
        "process environment, then `.env.local`, then `.env`, when the run is submitted.",
        example=["JUDGE_API_KEY"],
    )
    split: str = setting("train", doc="The dataset split to train on.", non_empty=True)


@attrs.frozen(kw_only=True)
class Spec:
    """One run, resolved: every value decided, every table its plugin's own class."""

    model: str = setting(
        doc="The base model: an id that `flash models` lists, any Hugging Face id, or a local "
        "folder. `<plugin>:<id>` says which model plugin to ask.",
        non_empty=True,
        example="HuggingFaceTB/SmolLM2-135M-Instruct",
    )
    algorithm: str = setting(
        DEFAULT_ALGORITHM, doc="The training algorithm; `[train]` holds its settings."
    )
    thinking: bool = setting(
        default=False, doc="Train with the model's reasoning mode, where the model has one."
    )
    # NumPy, which transformers seeds too, takes 32 bits.
    seed: int = setting(42, doc="Seed of everything that is drawn at random.", ge=0, le=2**32 - 1)
    environment: EnvironmentTable = setting(doc="The tasks and their scoring.")
    train: Any = setting(doc="The algorithm's settings.")
    worker_env: dict[str, str] = setting(
        factory=dict,
        doc="Plain environment variables for the worker. Not for secrets: names and values that "
        "look like one are refused.",
    )
    budget: BudgetTable = setting(factory=BudgetTable, doc="Limits that end a run.")
    retry: RetryTable = setting(factory=RetryTable, doc="How often a run is tried again.")
    checkpoints: CheckpointsTable = setting(
        factory=CheckpointsTable, doc="Which checkpoints stay on the disk."
    )
    provider: dict[str, Any] = setting(
        factory=dict,
        doc="Places to run, one table each, tried in the order of the file. None means this "
        "machine.",
    )
    reward: dict[str, Any] = setting(
        factory=dict,
        doc="Reward adapters, one table each. The reward is the sum of their scores, each times "
        "its `weight`; the environment's own score counts in it as `[reward.environment]` says. "
        "Without any table, the environment's own score is the reward.",
    )
    sink: dict[str, Any] = setting(factory=dict, doc="Followers of the run, one table each.")
    serving: dict[str, Any] = setting(factory=dict, doc="Serving backends, one table each.")


@attrs.frozen
class Parts:
    """
    The top-level values that could be read, by name, and every problem of the rest.

    A value with the shape of a credential in it counts as one that could not be read, so that
    nothing goes on to look for it or to quote it. `secrets` are the names that may be asked for.
    """

    values: dict[str, Any]
    problems: list[Problem]
    secrets: tuple[str, ...]

    def spec(self) -> Spec | None:
        """Return the spec, or None where an error stands in the way."""
        if any(problem.severity == "error" for problem in self.problems):
            return None
        return Spec(**self.values)


def read_parts(data: Mapping[str, Any], host: PluginHost) -> Parts:
    """Read plain merged data, each top-level key on its own, so that all problems show at once."""
    reader = Reader()
    values: dict[str, Any] = {}
    problems: list[Problem] = []
    fields = config_fields(Spec)
    problems += misplaced_keys(data, fields, host)
    for name, field in fields.items():
        if name == "train":
            found, wrong = _read_train(data, host, reader)
        elif name in PLUGIN_TABLES:
            found, wrong = _read_plugin_tables(name, data.get(name, {}), host, reader)
        elif name in data:
            found, wrong = reader.read(field.type, data[name], (name,), field)
            wrong = [_unquoted(problem) for problem in wrong]
        elif field.default is attrs.NOTHING:
            found, wrong = None, [missing((name,), field)]
        else:
            continue
        problems += wrong
        if not wrong:
            values[name] = found
    if "environment" in values:
        table = values["environment"]
        once = tuple(dict.fromkeys(table.secrets))
        values["environment"] = attrs.evolve(table, secrets=once)
    problems += environment_rules(
        _readable(EnvironmentTable, data.get("environment"), reader), host
    )
    if isinstance(data.get("environment"), dict):
        problems += environment_place(data["environment"])
    problems += worker_variable_rules(data.get("worker_env"))
    written = {problem.path: problem for problem in secrets_written_down(data)}
    problems = [
        *(problem for problem in problems if problem.path not in written),
        *written.values(),
    ]
    for path in written:
        values.pop(top_level(path), None)
    return Parts(values, problems, secrets_asked_for(data.get("environment"), host))


def _unquoted(problem: Problem) -> Problem:
    """Return the problem without the text it quotes, where that is most likely a secret."""
    if not problem.path.startswith(_NEVER_QUOTED):
        return problem
    return attrs.evolve(problem, message=re.sub(r'the string ".*"', "a string", problem.message))


def _readable(cls: type, table: Any, reader: Reader) -> dict[str, Any]:
    """Return the settings of a table that can be read, whatever is wrong with its others."""
    if not isinstance(table, dict):
        return {}
    found = {
        name: reader.read(field.type, table[name], (name,), field)
        for name, field in config_fields(cls).items()
        if name in table
    }
    return {name: value for name, (value, wrong) in found.items() if not wrong}


def _read_train(
    data: Mapping[str, Any], host: PluginHost, reader: Reader
) -> tuple[Any, list[Problem]]:
    algorithm = data.get("algorithm", DEFAULT_ALGORITHM)
    if not isinstance(algorithm, str):
        return None, []  # a wrong type; reported where `algorithm` itself is read
    record, wrong = find_record(host, "algorithm", algorithm, "algorithm")
    table = data.get("train", {})
    if record is None:
        return None, wrong
    if not isinstance(table, dict):
        return None, [_not_a_table("train", table)]
    own = config_fields(record.config)
    elsewhere = {
        key: owners
        for key in table
        if key not in own and (owners := _algorithms_with(host, key, other_than=algorithm))
    }
    rest = {key: value for key, value in table.items() if key not in elsewhere}
    found, problems = reader.read(record.config, rest, ("train",))
    problems += [
        Problem(
            dotted(("train", key)),
            f'belongs to algorithm = "{owners[0]}", not to "{algorithm}"',
            suggestion(key, own),
        )
        for key, owners in elsewhere.items()
    ]
    return found, problems


def _algorithms_with(host: PluginHost, key: str, *, other_than: str) -> list[str]:
    """Return the other installed algorithms that have a `[train]` setting of this name."""
    return [
        name
        for name, record in host.all("algorithm").items()
        if name != other_than
        and (key in config_fields(record.config) or key in spellings(record.config))
    ]


def _read_plugin_tables(
    kind: str, tables: Any, host: PluginHost, reader: Reader
) -> tuple[dict[str, Any], list[Problem]]:
    if not isinstance(tables, dict):
        return {}, [_not_a_table(kind, tables, f"write [{kind}.<name>]")]
    found: dict[str, Any] = {}
    problems: list[Problem] = []
    for name, table in tables.items():
        cls, wrong = _table_class(kind, name, host)
        if cls is not None:
            found[name], wrong = reader.read(cls, table, (kind, name))
        problems += wrong
    if kind == "reward" and found and not problems:
        problems += _weightless(found)
    return found, problems


def _table_class(kind: str, name: str, host: PluginHost) -> tuple[type | None, list[Problem]]:
    """Return the class of `[<kind>.<name>]`, or the problem that says why there is none."""
    if (kind, name) == ("reward", ENVIRONMENT_REWARD):
        return OWN_REWARD.config, []
    record, wrong = find_record(host, kind, name, dotted((kind, name)))
    if record is not None:
        return settings_class(record), []
    if kind == "reward" and nearest(name, [ENVIRONMENT_REWARD]):
        hint = f"the environment's own score is [reward.{ENVIRONMENT_REWARD}]"
        wrong = [attrs.evolve(problem, hint=hint) for problem in wrong]
    return None, wrong


def read_reward_tables(tables: Mapping[str, Any], host: PluginHost) -> dict[str, Any]:
    """Read the plain data of the `[reward.*]` tables alone; raises `SpecError`."""
    found, problems = _read_plugin_tables("reward", tables, host, Reader())
    if problems:
        raise SpecError(problems)
    return found


def _weightless(tables: Mapping[str, Any]) -> Iterator[Problem]:
    if all(table.weight == 0 for table in tables.values()):
        yield Problem("reward", "every weight is 0, so every reward would be", "give one a weight")


def find_record(
    host: PluginHost, kind: str, name: str, path: str
) -> tuple[Any | None, list[Problem]]:
    """Return the record, or the problem that says why it cannot be had and whose fault that is."""
    try:
        return host.get(kind, name), []
    except FlashError as error:
        return None, [blamed(path, error)]


def blamed(path: str, error: FlashError) -> Problem:
    """Return an error as the problem of the value at `path`, with whose fault it is."""
    fault: Literal["spec", "plugin"] = "plugin" if isinstance(error, PluginError) else "spec"
    return Problem(path, error.message, error.hint, fault=fault)


def misplaced_keys(
    data: Mapping[str, Any], fields: Mapping[str, object], host: PluginHost
) -> Iterator[Problem]:
    """Yield unknown top-level keys, with a hint where the key belongs somewhere else."""
    unknown = {key for key in data if key not in fields}
    algorithms = host.all("algorithm")
    for key in sorted(unknown):
        if key in algorithms and isinstance(data[key], dict):
            hint = f'settings of an algorithm go into [train], beside algorithm = "{key}"'
        elif any(key in config_fields(record.config) for record in algorithms.values()):
            hint = f"it belongs into [train]: train.{key}"
        elif table := next(
            (t for t, cls in LIMIT_TABLES.items() if key in config_fields(cls)), None
        ):
            hint = f"it belongs into [{table}]: {table}.{key}"
        else:
            continue
        unknown.discard(key)
        yield Problem(dotted((key,)), "unknown key", hint)
    yield from unknown_keys((), unknown, fields)


def _not_a_table(path: str, value: object, hint: str | None = None) -> Problem:
    return Problem(path, str(WrongType("a table", value)), hint)


def spec_to_dict(spec: Spec) -> dict[str, Any]:
    """Return the spec as plain data; `spec_from_dict` gives it back."""
    data: dict[str, Any] = Reader().plain(spec)
    return data


def spec_to_toml(spec: Spec) -> str:
    """Return the spec as TOML that resolves to it again; what is not set is left out."""
    return toml_document(spec_to_dict(spec))


def spec_from_dict(data: Mapping[str, Any], host: PluginHost) -> Spec:
    """Read plain data strictly; raises `SpecError` with every problem."""
    if not isinstance(data, dict):
        raise SpecError([_not_a_table("", data)])
    cleaned, problems = clean(data)
    parts = read_parts(cleaned, host)
    spec = parts.spec()
    if problems or spec is None:
        raise SpecError([*problems, *parts.problems])
    return spec
