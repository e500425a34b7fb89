"""
`python`: a function in the environment's folder is the reward.

It is called with what its parameters name. Where it asks for `completions` or `episodes` it gets
the whole group and answers with a list, else it is called once an episode.
"""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import queue
import sys
import threading
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from flash.api import EnvironmentFault, Reward
from flash_reward_standard.common import file_in

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from flash.api import Episode, Task
    from flash_reward_standard.config import PythonConfig

SETTING: Final = "[reward.python] path"
ONE: Final = ("completion", "episode", "messages", "raw", "thinking")
GROUP: Final = ("completions", "episodes")
EITHER: Final = ("answer", "metadata", "task")
_KEYS: Final = ("score", "success", "metrics", "reason")
_FULL: Final = 1.0


class PythonReward:
    """Calls the function, each call in a thread that is given up when it takes too long."""

    def __init__(self, config: PythonConfig, folder: Path | None) -> None:
        file, _, name = config.path.rpartition(":")
        self._path = file_in(folder, file, SETTING)
        self._folder = str(folder.resolve()) if folder else ""
        self._where = f"{self._path.name}:{name}"
        self._function = _function(_imported(self._path, self._folder), name, self._path)
        self._names = _parameters(self._function, f"{SETTING}: {self._path}:{name}")
        self._for_group = bool(set(GROUP) & set(self._names))
        self._timeout_s = config.timeout_s
        self._pool = ThreadPoolExecutor(config.concurrency, "flash-reward-python")

    def score(self, task: Task, episodes: Sequence[Episode]) -> list[Reward | None]:
        """Return what the function says of each episode."""
        if self._for_group:
            values = {"completions": [e.completion for e in episodes], "episodes": list(episodes)}
            said = self._pool.submit(self._call, task, values).result()
            return _listed(said, len(episodes), self._path)
        calls = [self._pool.submit(self._call, task, _values(e)) for e in episodes]
        return [_reward(call.result(), self._path) for call in calls]

    def _call(self, task: Task, values: Mapping[str, Any]) -> Any:
        """Return what the function returned; what it raised, and its silence, as a `Reward`."""
        known = {**values, "answer": task.gold, "metadata": task.metadata, "task": task}
        arguments = {name: known[name] for name in self._names}
        said: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def call() -> None:
            try:
                returned = self._function(**arguments)
                if isinstance(returned, Iterator) and self._for_group:
                    # Still under the time limit; one more than wanted shows that there are more.
                    returned = list(itertools.islice(returned, len(values["episodes"]) + 1))
                said.put(returned)
            except BaseException as error:  # noqa: BLE001 - user code in its own thread: sys.exit() too is data
                said.put(error)

        threading.Thread(target=call, name="flash-reward-python-call", daemon=True).start()
        try:
            answer = said.get(timeout=self._timeout_s)
        except queue.Empty:
            return Reward(None, error=f"{self._where} took longer than {self._timeout_s:g} s")
        if isinstance(answer, MemoryError):
            raise answer
        if isinstance(answer, BaseException):
            return Reward(None, error=_failure(answer, self._folder, self._where))
        return answer


def _values(episode: Episode) -> dict[str, Any]:
    return {
        "completion": episode.completion,
        "episode": episode,
        "messages": list(episode.messages),
        "raw": episode.raw,
        "thinking": episode.thinking,
    }


def _imported(path: Path, folder: str) -> dict[str, Any]:
    """Return the names of the module, imported with what lies beside it in reach."""
    spec = importlib.util.spec_from_file_location(f"_flash_reward_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise EnvironmentFault(f"{SETTING}: {path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    # For as long as it is imported: from then on, nobody else's import is changed by it.
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise EnvironmentFault(_failure(error, folder, path.name)) from error
    finally:
        if folder in sys.path:  # what is imported may set it anew
            sys.path.remove(folder)
    return vars(module)


def _function(names: Mapping[str, Any], name: str, path: Path) -> Callable[..., Any]:
    found = names.get(name)
    if callable(found) and not inspect.iscoroutinefunction(found):
        function: Callable[..., Any] = found
        return function
    defined = sorted(
        key
        for key, value in names.items()
        if inspect.isfunction(value) and value.__module__ == names["__name__"]
    )
    wrong = f"{name} is async" if callable(found) else f"defines no function {name}"
    listed = f"it defines {', '.join(defined)}" if defined else "it defines no function"
    hint = "write it with a plain def" if callable(found) else listed
    raise EnvironmentFault(f"{SETTING}: {path}: {wrong}", hint=hint)


def _parameters(function: Callable[..., Any], place: str) -> tuple[str, ...]:
    """Return what the function asks for by the names of its parameters."""
    hint = f"for one episode: {', '.join(ONE)}; for a group: {', '.join(GROUP)}; always: "
    hint += ", ".join(EITHER)
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:
        raise EnvironmentFault(f"{place} does not say what it asks for", hint=hint) from None
    asked = []
    for name, parameter in parameters.items():
        if parameter.kind in {parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD}:
            continue
        known = name in (*ONE, *GROUP, *EITHER) and parameter.kind != parameter.POSITIONAL_ONLY
        if known:
            asked.append(name)
        elif parameter.default is parameter.empty:
            raise EnvironmentFault(f"{place} asks for `{name}`, which is not there", hint=hint)
    if not {*ONE, *GROUP} & {*asked}:
        raise EnvironmentFault(f"{place} asks for nothing to score", hint=hint)
    if {*ONE} & {*asked} and {*GROUP} & {*asked}:
        raise EnvironmentFault(f"{place} asks for one episode and for a group", hint=hint)
    return tuple(asked)


def _listed(said: Any, count: int, path: Path) -> list[Reward | None]:
    if isinstance(said, Reward):  # the call failed as a whole
        return [said] * count
    if isinstance(said, str | bytes | dict) or not hasattr(said, "__iter__"):
        error = f"{path.name} returned {type(said).__name__}, not a list of {count} scores"
        return [Reward(None, error=error)] * count
    answers = list(said)
    if len(answers) != count:
        found = f"more than {count}" if len(answers) > count else len(answers)
        error = f"{path.name} returned {found} scores for {count} completions"
        return [Reward(None, error=error)] * count
    return [_reward(answer, path) for answer in answers]


def _reward(value: Any, path: Path) -> Reward | None:
    """Return a number, a boolean, a table of `score` and more, or a `Reward` as a `Reward`."""
    if value is None or isinstance(value, Reward):
        return value
    if isinstance(value, dict):
        return _from_table(value, path)
    number = _number(value)
    if number is None:
        error = f"{path.name} returned {value!r:.80}, not a number"
        return Reward(None, error=error)
    return Reward(number, success=number >= _FULL)


def _from_table(table: dict[Any, Any], path: Path) -> Reward:
    unknown = [str(key) for key in table if key not in _KEYS]
    if unknown:
        listed = ", ".join(_KEYS)
        error = f"{path.name} returned the key {unknown[0]!r:.80}; known are {listed}"
        return Reward(None, error=error)
    number = _number(table.get("score"))
    if number is None:
        return Reward(None, error=f"{path.name} returned the score {table.get('score')!r:.80}")
    reason = table.get("reason")
    return Reward(
        number,
        success=bool(table.get("success", number >= _FULL)),
        metrics=table.get("metrics") or {},
        reason=None if reason is None else str(reason),
    )


def _number(value: Any) -> float | None:
    """Return a float, whatever scalar it comes as; whether it is finite is the core's to say."""
    if isinstance(value, str | bytes):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _failure(error: BaseException, folder: str, otherwise: str) -> str:
    """Return `file:line: Type: message`, the line being the last one in the user's folder."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename.startswith(f"{folder}/")]
    place = f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else otherwise
    if isinstance(error, SyntaxError) and error.filename:
        place = f"{Path(error.filename).name}:{error.lineno}"
    return f"{place}: {type(error).__name__}: {error}"[:500]
