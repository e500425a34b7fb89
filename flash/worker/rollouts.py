"""
The episodes that training sampled, kept in the run's store for people to read.

    rollouts/step-000010.jsonl.gz   a first line that says what there was, then one episode a line

They are no part of training's result: what cannot be kept is left out with a warning, and the
first step that fails is the only one that warns. A step's file holds the same bytes whenever the
same episodes are saved, so a run that resumes writes what it wrote before. Secrets are masked
before anything is cut.

What is kept is bounded by `Limits`:

- Of a text that is too long, the first and the last part stay, with a mark that says how many
  characters are left out between them; of a list, likewise; of a table, the first entries. An
  episode that still takes too much is cut to half of that, and again, until it fits.
- Of a step with too many episodes, whole groups are kept: those whose tasks' ids have the lowest
  SHA-256. That depends on neither scores nor chance, and the same tasks are kept at every step.
- When a run's files grow too many, steps are dropped, each time the one whose neighbours are
  closest to each other (of several, the oldest), so that what is left stays evenly spread. The
  first step, the newest, and while there are others those with a checkpoint stay.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import re
import zlib
from types import NoneType
from typing import TYPE_CHECKING, Any, Final

import attrs

from flash.errors import FlashError, StoreError
from flash.files import store_error, write_atomic
from flash.values import Rollout
from flash.worker.checkpoints import MANIFEST
from flash.worker.reporter import cut_text, plain

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from flash.worker.reporter import EventReporter

FORMAT: Final = 1
_FILE: Final = re.compile(r"step-(\d{6,12})\.jsonl\.gz")
# What cannot be one of our files; a small file may unpack to anything.
_MOST_UNPACKED_BYTES: Final = 1 << 26
# Of a list or a table, one item for so many characters that a text may have.
_CHARACTERS_PER_ITEM: Final = 4

_NUMBER: Final = (int, float)
_FIELDS: Final[Mapping[str, tuple[type, ...]]] = {
    "step": _NUMBER,
    "task": (str,),
    "sample": _NUMBER,
    "messages": (list,),
    "opening": (int,),
    "completion": (str, NoneType),
    "thinking": (str,),
    "raw": (str,),
    "score": (*_NUMBER, NoneType),
    "success": (bool,),
    "metrics": (dict,),
    "reason": (str, NoneType),
    "error": (str, NoneType),
    "advantage": (*_NUMBER, NoneType),
    "prompt_tokens": _NUMBER,
    "completion_tokens": _NUMBER,
    "turns": _NUMBER,
    "truncated": (bool,),
}


@attrs.frozen
class Limits:
    """
    What a run may keep: characters of one text, bytes of an episode, episodes and bytes of a step.

    The bytes of an episode and of a step are those of the JSON, before it is compressed;
    `run_bytes` are those of the files.
    """

    text_characters: int = 1 << 14
    episode_bytes: int = 1 << 20
    step_episodes: int = 256
    step_bytes: int = 1 << 24
    run_bytes: int = 1 << 28


@attrs.frozen
class Sampled:
    """What is kept of one step's `episodes`, by task and then by number in the task's group."""

    step: int
    episodes: int
    rollouts: tuple[Rollout, ...]


class RolloutStore:
    """Keeps the rollouts of the run whose store is `store`; see `flash.contracts.Rollouts`."""

    def __init__(
        self,
        store: Path,
        reporter: EventReporter,
        *,
        mask: Callable[[str], str] = str,
        limits: Limits | None = None,
    ) -> None:
        self._store = store
        self._reporter = reporter
        self._mask = mask
        self._limits = limits or Limits()
        self._warned = False

    def save(self, step: int, rollouts: Sequence[Rollout]) -> None:
        """
        Keep the step's episodes and report how many; training goes on where that fails.

        Raises only what the reporter raises.
        """
        try:
            kept = self._write(step, rollouts)
            self._thin(step)
        except Exception as error:  # noqa: BLE001 - the disk, or whatever an environment put into a message; neither is worth the run
            self._complain(step, error)
        else:
            self._reporter.emit("rollouts", step=step, episodes=len(rollouts), kept=kept)

    def _write(self, step: int, rollouts: Sequence[Rollout]) -> int:
        path = _path(self._store, step)
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise store_error("make the folder", path.parent, error) from error
        ordered = sorted(rollouts, key=lambda rollout: (rollout.task, rollout.sample))
        lines = self._choose(ordered)
        head = {"format": FORMAT, "step": step, "episodes": len(rollouts), "kept": len(lines)}
        content = b"\n".join([json.dumps(head).encode(), *lines, b""])
        write_atomic(path, gzip.compress(content, compresslevel=6, mtime=0))
        return len(lines)

    def _choose(self, ordered: Sequence[Rollout]) -> list[bytes]:
        """
        Return the lines of the episodes to keep, in the order of `ordered`, which is by task.

        Groups are taken until one does not fit; of the first, what fits.
        """
        groups = {task: list(group) for task, group in itertools.groupby(ordered, lambda r: r.task)}
        room, room_bytes = self._limits.step_episodes, self._limits.step_bytes
        chosen: dict[str, list[bytes]] = {}
        for task in sorted(groups, key=_rank):
            if chosen and len(groups[task]) > room:
                break
            lines = [self._line(rollout) for rollout in groups[task][:room]]
            sizes = list(itertools.accumulate(len(line) + 1 for line in lines))
            fitting = sum(size <= room_bytes for size in sizes)
            if fitting == len(groups[task]) or not chosen:
                chosen[task] = lines[:fitting]
            if fitting < len(groups[task]):
                break
            room -= fitting
            room_bytes -= sizes[-1]
        return [line for task in groups if task in chosen for line in chosen[task]]

    def _line(self, rollout: Rollout) -> bytes:
        """Return the episode as JSON, cut as little as makes it fit."""
        fields = attrs.asdict(rollout, recurse=False)
        whole = {name: plain(value, self._mask) for name, value in fields.items()}
        _rollout(whole)  # what is written here must be readable
        characters = self._limits.text_characters
        while True:
            line = json.dumps(_cut_episode(whole, characters), separators=(",", ":")).encode()
            if len(line) <= self._limits.episode_bytes or not characters:
                return line
            characters //= 2

    def _thin(self, newest: int) -> None:
        """Drop steps until the files are within the run's limit."""
        sizes = {step: _path(self._store, step).stat().st_size for step in kept_steps(self._store)}
        total = sum(sizes.values())
        while total > self._limits.run_bytes:
            steps = sorted(sizes)
            inner = zip(steps, steps[1:], steps[2:], strict=False)
            ranked = [
                (self._has_checkpoint(step), after - before, step)
                for before, step, after in inner
                if step != newest
            ]
            if not ranked:
                return
            dropped = min(ranked)[-1]
            _path(self._store, dropped).unlink()
            total -= sizes.pop(dropped)

    def _has_checkpoint(self, step: int) -> bool:
        return (self._store / "checkpoints" / f"step-{step:06d}" / MANIFEST).exists()

    def _complain(self, step: int, error: Exception) -> None:
        if self._warned:
            return
        self._warned = True
        if isinstance(error, FlashError):
            reason = f"{error.message}; {error.hint}" if error.hint else error.message
        else:
            reason = f"{type(error).__name__}: {error}"
        self._reporter.warning(
            f"the episodes of step {step} could not be kept: {reason}. Training goes on; steps "
            "that cannot be kept after this one are left out without a word"
        )


def kept_steps(store: Path) -> list[int]:
    """Return the steps whose episodes are in the store, in order; raises `StoreError`."""
    folder = store / "rollouts"
    try:
        names = [path.name for path in folder.iterdir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise store_error("read", folder, error) from error
    return sorted(int(match[1]) for name in names if (match := _FILE.fullmatch(name)))


def read_rollouts(store: Path, step: int) -> Sampled:
    """Return the episodes kept of `step`; `StoreError` where the file is gone or damaged."""
    path = _path(store, step)
    try:
        with gzip.open(path) as file:
            return _parse(file.read(_MOST_UNPACKED_BYTES + 1), step)
    except KeyError as error:
        raise _damaged(path, f"it lacks {error}") from error
    except RecursionError as error:
        raise _damaged(path, "it is nested too deep") from error
    except (gzip.BadGzipFile, zlib.error, EOFError, ValueError, TypeError) as error:
        raise _damaged(path, str(error)) from error
    except OSError as error:
        raise store_error("read", path, error) from error


def _damaged(path: Path, reason: str) -> StoreError:
    return StoreError(f"{path} is damaged: {reason}", hint="look at another step")


def _parse(content: bytes, step: int) -> Sampled:
    if len(content) > _MOST_UNPACKED_BYTES:
        raise ValueError("it unpacks to more than Flash ever writes")
    head, *rows = [json.loads(line) for line in content.splitlines()]
    if head["format"] != FORMAT:
        message = f"the episodes of step {step} are of format {head['format']!r}, not {FORMAT}"
        raise StoreError(message, hint="upgrade flash-core")
    if len(rows) != head["kept"]:
        raise ValueError(f"it has {len(rows)} episodes and says {head['kept']}")
    return Sampled(step, int(head["episodes"]), tuple(map(_rollout, rows)))


def _path(store: Path, step: int) -> Path:
    return store / "rollouts" / f"step-{step:06d}.jsonl.gz"


def _rollout(row: Mapping[str, Any]) -> Rollout:
    """Return the episode of one line; raises `KeyError` or `TypeError` for what is none."""
    for name, kinds in _FIELDS.items():
        if not isinstance(row[name], kinds):
            raise TypeError(f"{name} of an episode cannot be {type(row[name]).__name__}")
    if not all(isinstance(message, dict) for message in row["messages"]):
        raise TypeError("a message of an episode is no table")
    fields = {name: row[name] for name in _FIELDS}
    return Rollout(**fields | {"messages": tuple(row["messages"])})


def _rank(task: str) -> bytes:
    return hashlib.sha256(task.encode("utf-8", "surrogatepass")).digest()


def _cut_episode(whole: Mapping[str, Any], characters: int) -> dict[str, Any]:
    episode = {name: _cut(value, characters) for name, value in whole.items()}
    if len(episode["messages"]) < len(whole["messages"]):
        head = characters // _CHARACTERS_PER_ITEM // 2
        episode["opening"] = min(whole["opening"], head)
        episode["messages"] = [
            {"role": "cut", "content": message} if isinstance(message, str) else message
            for message in episode["messages"]
        ]
    return episode


def _cut(value: Any, characters: int) -> Any:
    """Return plain data with what is too long left out of its middle."""
    items = characters // _CHARACTERS_PER_ITEM
    if isinstance(value, str):
        return cut_text(value, characters)
    if isinstance(value, list):
        left_out = len(value) - items
        if left_out > 1:
            first, last = value[: items // 2], value[len(value) - (items - items // 2) :]
            count = len(value) - len(first) - len(last)
            value = [*first, f"…[{count} left out]…", *last]
        return [_cut(item, characters) for item in value]
    if isinstance(value, dict):
        kept = itertools.islice(value.items(), items)
        return {_cut(key, characters): _cut(item, characters) for key, item in kept}
    return value
