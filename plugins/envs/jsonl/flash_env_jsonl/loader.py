"""The `EnvironmentLoader` and the `Environment` of a folder of rows: no code of the user's runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flash.api import EnvironmentFault, Problem, Reward, Step, Task
from flash_env_jsonl.rows import FOLDER, find_splits, read_rows

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from flash.api import Environment, Episode, Message
    from flash_env_jsonl.rows import Row

NO_SCORE = (
    "rows in JSONL have no score of their own; add a reward table, "
    "as in [reward.exact-match] weight = 1.0"
)


class JsonlLoader:
    """Reads folders with `dataset/<split>.jsonl` and no code."""

    def fetch(self, reference: str, destination: Path) -> str:  # noqa: ARG002 - the contract's signature
        """Refuse: the plugin claims no scheme."""
        raise EnvironmentFault(f"{reference}: JSONL rows are read from a local folder only")

    def check(
        self, folder: Path, *, split: str, params: Mapping[str, Any] | None = None
    ) -> Sequence[Problem]:
        """Return what is wrong with the params and the split's name; `rows` reads the file."""
        try:
            _no_params(params or {})
            _file(folder, split)
        except EnvironmentFault as fault:
            return [Problem("environment", fault.message, fault.hint)]
        return []

    def rows(
        self,
        folder: Path,
        *,
        split: str,
        params: Mapping[str, Any],  # noqa: ARG002 - `check` has refused them
    ) -> int | None:
        """Return the number of rows in the split's file."""
        return len(read_rows(_file(folder, split)))

    def load(self, folder: Path, *, params: Mapping[str, Any], split: str) -> Environment:
        """Read the split's rows."""
        _no_params(params)
        environment = JsonlEnvironment(folder)
        environment.tasks(split)
        return environment


class JsonlEnvironment:
    """Single-turn episodes over rows; scored by the reward tables of the spec alone."""

    max_score_concurrency = 1

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tasks: dict[str, tuple[Task, ...]] = {}

    def splits(self) -> Sequence[str]:
        """Return the names of the files, `train` first."""
        return tuple(find_splits(self._folder))

    def tasks(self, split: str) -> Sequence[Task]:
        """Return the split's rows in order; the same objects on every call."""
        if split not in self._tasks:
            self._tasks[split] = tuple(
                Task(id=row.id, input=row.input, data=row, metadata=row.metadata)
                for row in read_rows(_file(self._folder, split))
            )
        return self._tasks[split]

    def start(self, task: Task) -> list[Message]:
        """Return the row's messages."""
        return [dict(message) for message in _row(task).opening]

    def step(
        self,
        task: Task,  # noqa: ARG002 - the contract's signature; a row answers nothing
        messages: Sequence[Message],  # noqa: ARG002
        action: str,  # noqa: ARG002
    ) -> Step:
        """End the episode: a row is one question."""
        return Step(done=True)

    def max_turns(self, task: Task) -> int:  # noqa: ARG002 - the contract's signature
        """Return 1."""
        return 1

    def target(self, task: Task) -> list[Message] | None:
        """Return the row's gold answer, or None where it has none."""
        gold = _row(task).target
        return None if gold is None else [dict(message) for message in gold]

    def tools(self, task: Task) -> list[dict[str, Any]] | None:
        """Return the row's tools."""
        return _row(task).tools

    def score(
        self,
        task: Task,  # noqa: ARG002 - the contract's signature
        episodes: Sequence[Episode],
    ) -> list[Reward]:
        """Return no score and the reason: rows say what is right, not how near an answer is."""
        return [Reward(None, error=NO_SCORE) for _ in episodes]


def _row(task: Task) -> Row:
    row: Row = task.data
    return row


def _no_params(params: Mapping[str, Any]) -> None:
    if params:
        raise EnvironmentFault(
            f"environment.params: rows in JSONL take none, and there is {', '.join(params)}",
            hint="remove [environment.params]",
        )


def _file(folder: Path, split: str) -> Path:
    splits = find_splits(folder)
    if split not in splits:
        place = next(iter(splits.values())).parent if splits else folder / FOLDER
        raise EnvironmentFault(
            f'{folder}: there is no split "{split}"; there is {", ".join(splits) or "none"}',
            hint=f"add {place / f'{split}.jsonl'}, or name another split in environment.split",
        )
    return splits[split]
