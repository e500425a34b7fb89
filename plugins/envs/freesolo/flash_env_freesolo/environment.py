"""The SDK's environment object behind Flash's `Environment` contract."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from freesolo.datasets import Dataset, TaskExample
from freesolo.datasets.records import load_task_examples
from freesolo.environments import EnvironmentStepResult

from flash.api import EnvironmentFault, Step
from flash_env_freesolo.faults import defined_at, faults_of
from flash_env_freesolo.rows import (
    as_row,
    find_splits,
    in_order,
    names,
    read_rows,
    rows_from_records,
    task_of,
)
from flash_env_freesolo.scoring import Scorer, overridden
from flash_env_freesolo.suites import Suite, load_suites

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from freesolo.environments import Environment as SdkEnvironment

    from flash.api import Episode, Message, Reward, Task
    from flash_env_freesolo.isolation import PrivatePackage
    from flash_env_freesolo.rows import Row, SplitFiles


class FreesoloEnvironment:
    """
    Tasks, interaction and scoring of one loaded `environment.py`.

    Attributes:
        max_score_concurrency: the environment's own cap; 1 where it says `reward_thread_safe =
            False`.

    """

    def __init__(  # noqa: PLR0913 - what the loader found out about one folder
        self,
        sdk: SdkEnvironment,
        package: PrivatePackage,
        *,
        prompt_text: str,
        dataset: Path | None,
        own_rows: Mapping[str, Callable[[], Sequence[Row]]],
        split_in_code: str,
        params: Mapping[str, Any],
    ) -> None:
        """
        Wrap `sdk`.

        `own_rows` reads the rows that `[environment.params]` gives for a split in place of the
        packaged ones; `split_in_code` is the split that rows of the object itself belong to.
        `dataset` is a folder of split files that takes the place of both. `params` are those that
        suites may ask for.
        """
        self._sdk = sdk
        self._package = package
        self._prompt_text = prompt_text
        self._dataset = dataset
        self._own_rows = own_rows
        self._split_in_code = split_in_code
        self._params = dict(params)
        self._tasks: dict[str, tuple[Task, ...]] = {}
        safe = getattr(sdk, "reward_thread_safe", True)
        self.max_score_concurrency = max(1, int(sdk.max_score_concurrency)) if safe else 1
        self._scorer = Scorer(sdk, package, self.max_score_concurrency)

    def splits(self) -> Sequence[str]:
        """Return the splits that exist; rows given in code or in params are one of them."""
        found = {*self._files().files, *self._own_rows}
        if self._rows_in_code() is not None:
            found.add(self._split_in_code)
        return in_order(found)

    def tasks(self, split: str) -> Sequence[Task]:
        """Return the split's rows in order; the same objects on every call."""
        if split not in self._tasks:
            self._tasks[split] = tuple(map(task_of, self._examples(split)))
        return self._tasks[split]

    def start(self, task: Task) -> list[Message]:
        """Return the opening messages."""
        hook = self._opening_hook()
        with faults_of(self._package, hook):
            messages = self._sdk.start_episode(task.data, self._prompt_text)
        return self._messages(messages, hook)

    def step(self, task: Task, messages: Sequence[Message], action: str) -> Step:
        """Answer the model's action."""
        hook = overridden(self._sdk, "step_episode")
        if hook is None:
            # The default ends the episode and normalises the text, as the scorer will again.
            return Step(done=True)
        with faults_of(self._package, hook):
            result = hook(task.data, list(messages), action)
        if not isinstance(result, EnvironmentStepResult):
            raise self._wrong(hook, result, "EnvironmentStepResult")
        return Step(
            done=bool(result.done),
            messages=tuple(self._messages(result.messages, hook, empty=True)),
            final_text=result.final_response_text,
            metadata=dict(result.metadata),
        )

    def max_turns(self, task: Task) -> int:
        """Return the environment's cap for this example."""
        hook = self._sdk.max_episode_turns
        with faults_of(self._package, hook):
            turns = hook(task.data)
        if isinstance(turns, bool) or not isinstance(turns, int) or turns < 1:
            raise EnvironmentFault(
                f"{defined_at(hook)}: returned {turns!r}",
                hint="max_episode_turns must return an int of at least 1",
            )
        return turns

    def target(self, task: Task) -> list[Message] | None:
        """Return the gold continuation; None where the row has no output and no hook makes one."""
        hook = self._sdk.sft_completion
        if overridden(self._sdk, "sft_completion") is None and task.data.output is None:
            return None
        with faults_of(self._package, hook):
            messages = hook(task.data)
        return self._messages(messages, hook, empty=True) or None if messages else None

    def tools(self, task: Task) -> list[dict[str, Any]] | None:
        """Return the row's `tools` (in the record or its metadata), or the environment's."""
        candidates = (
            task.data.metadata.get("tools"),
            task.data.record.get("tools"),
            getattr(self._sdk, "tools", None),
        )
        found = next((tools for tools in candidates if tools), None)
        if found is None:
            return None
        if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
            raise EnvironmentFault(
                f"{self._package.folder}: the tools of {task.id} are not a list of objects",
                hint="declare each tool as the OpenAI API does",
            )
        return found

    def score(self, task: Task, episodes: Sequence[Episode]) -> list[Reward]:
        """Return one `Reward` an episode, in order."""
        return self._scorer.score(task.data, episodes)

    def suites(self) -> dict[str, Suite]:
        """Return the suites of `evaluations.py` by name; none where there is no such file."""
        return {
            suite.name: Suite(self, suite, self._package, self._scorer)
            for suite in load_suites(self._package, self._sdk, self._params)
        }

    def _examples(self, split: str) -> list[TaskExample]:
        if split in self._own_rows:
            return _examples(self._own_rows[split]())
        found = self._files()
        if split in found.files:
            return _examples(read_rows(found.files[split]))
        in_code = self._rows_in_code() if split == self._split_in_code else None
        if in_code is None:
            raise EnvironmentFault(
                f'{self._package.folder}: there is no split "{split}"; '
                f"there is {names(self.splits())}",
                hint=f"add {found.folder.relative_to(self._package.folder)}/{split}.jsonl, or name "
                "another split",
            )
        return self._examples_in_code(in_code)

    def _files(self) -> SplitFiles:
        return find_splits(self._package.folder, self._dataset)

    def _rows_in_code(self) -> Any | None:
        """Return `dataset` or `examples` of the environment object."""
        if self._dataset is not None:
            return None
        with faults_of(self._package):
            for attribute in ("dataset", "examples"):
                rows = getattr(self._sdk, attribute, None)
                if rows is not None:
                    return rows
        return None

    def _examples_in_code(self, rows: Any) -> list[TaskExample]:
        place = f"{self._package.folder / 'environment.py'}: the environment's rows"
        if isinstance(rows, Dataset):
            rows = rows.examples
        with faults_of(self._package):
            items = list(rows) if hasattr(rows, "__iter__") and not isinstance(rows, str) else rows
        if not isinstance(items, list) or not items:
            rows_from_records(items, place)  # says what is wrong with them
        sources = [
            item if isinstance(item, TaskExample) else as_row(item, f"{place}: row {number}").record
            for number, item in enumerate(items, 1)
        ]
        examples: list[TaskExample] = load_task_examples(sources)
        return examples

    def _messages(
        self, messages: Any, hook: Callable[..., Any], *, empty: bool = False
    ) -> list[Message]:
        """Return the messages as a list, checked for the shape that chat templates need."""
        if not isinstance(messages, list | tuple):
            raise self._wrong(hook, messages, "a list of messages")
        if not messages and not empty:
            raise EnvironmentFault(
                f"{defined_at(hook)}: returned no messages",
                hint="return at least one message with role and content",
            )
        for index, message in enumerate(messages):
            role = message.get("role") if isinstance(message, dict) else None
            if not isinstance(role, str) or not role.strip():
                raise EnvironmentFault(
                    f"{defined_at(hook)}: message {index} is {_short(message)}",
                    hint='a message is {"role": "user", "content": "…"}',
                )
            content = message.get("content")
            if not isinstance(content, str | list) and not (
                content is None and message.get("tool_calls")
            ):
                raise EnvironmentFault(
                    f"{defined_at(hook)}: the content of message {index} is {_short(content)}",
                    hint="content is a string, a list of parts, or null next to tool_calls",
                )
        return [dict(message) for message in messages]

    def _opening_hook(self) -> Callable[..., Any]:
        own = overridden(self._sdk, "start_episode")
        return own or cast("Callable[..., Any]", self._sdk.build_prompt_messages)

    def _wrong(self, hook: Callable[..., Any], result: object, wanted: str) -> EnvironmentFault:
        return EnvironmentFault(
            f"{defined_at(hook)}: {hook.__name__} returned {_short(result)}",
            hint=f"return {wanted}",
        )


def _examples(rows: Sequence[Row]) -> list[TaskExample]:
    examples: list[TaskExample] = load_task_examples([row.record for row in rows])
    return examples


def _short(value: object) -> str:
    text = f"{type(value).__name__} {value!r}"
    return text if len(text) <= 80 else f"{text[:79]}…"  # noqa: PLR2004 - one line of an error
