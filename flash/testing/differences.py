"""Two finished runs of one job, compared bit by bit: what a resume must leave no trace in."""

from __future__ import annotations

import gzip
import json
import math
from typing import TYPE_CHECKING, Any, Final

from flash import parity
from flash.worker.checkpoints import MANIFEST, CheckpointStore
from flash.worker.reporter import read_event

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence
    from pathlib import Path

    from flash.values import Event
    from flash.worker.checkpoints import Checkpoint

_COMPARED: Final = ("metric", "evaluation", "rollouts")
_MEASURED: Final = ("_s", "memory_gib")
"""How the names of numbers end that no two runs share: times, speeds, memory."""

_SHOWN: Final = 60


def differences(whole: Path, broken: Path) -> Iterator[str]:
    """
    Yield a sentence for each thing in which the finished run in `broken` is not that in `whole`.

    Compared are the final adapter; of the newest checkpoint and of every one that both have, the
    adapter, the metrics and, where neither is thinned, all that a resume begins from; what the
    attempts have said of each step, those that said it again included; and the rollouts. Times,
    speeds and memory are not. `whole` must be of one attempt.
    """
    yield from _of_folders("the final adapter", whole / "adapter", broken / "adapter")
    ours, theirs = (
        {one.step or 0: one for one in CheckpointStore(store).list()} for store in (whole, broken)
    )
    if max(ours, default=None) != max(theirs, default=None):
        yield f"the checkpoints are of steps {sorted(theirs)}, not {sorted(ours)}"
    for step in sorted(ours.keys() & theirs.keys()):
        yield from _of_checkpoints(f"the checkpoint of step {step}", ours[step], theirs[step])
    yield from _of_events(attempt_events(whole)[0], attempt_events(broken))
    yield from _of_rollouts(whole / "rollouts", broken / "rollouts")


def attempt_events(store: Path) -> list[list[Event]]:
    """Return the events of each attempt; a line that was cut short is none."""
    folders = sorted((store / "attempts").iterdir(), key=lambda folder: int(folder.name))
    found = []
    for folder in folders:
        path = folder / "events.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        found.append([event for line in lines if (event := read_event(line)) is not None])
    return found


def _of_checkpoints(what: str, one: Checkpoint, other: Checkpoint) -> Iterator[str]:
    yield from _of_values(f"{what}: its metrics", dict(one.metrics), dict(other.metrics))
    folders = (one.adapter, other.adapter)
    # A stop does not wait for a golden set; the final adapter has one.
    both = all((folder / parity.NAME).exists() for folder in folders)
    left_out = {MANIFEST} if both else {MANIFEST, parity.NAME}
    yield from _of_folders(f"the adapter of {what}", *folders, left_out=left_out)
    if one.resumable and other.resumable:
        yield from _of_folders(f"the state of {what}", one.folder / "state", other.folder / "state")


def _of_folders(
    what: str, one: Path, other: Path, *, left_out: Collection[str] = frozenset({MANIFEST})
) -> Iterator[str]:
    """Compare all files but those `left_out`, as a manifest, which holds a time."""
    ours, theirs = (
        {
            path.relative_to(folder).as_posix(): path
            for path in folder.rglob("*")
            if path.is_file() and path.name not in left_out
        }
        for folder in (one, other)
    )
    if ours.keys() != theirs.keys():
        yield f"{what} holds {sorted(theirs)}, not {sorted(ours)}"
    for name in sorted(ours.keys() & theirs.keys()):
        if ours[name].read_bytes() != theirs[name].read_bytes():
            yield from _of_values(f"{what}: {name}", _read(ours[name]), _read(theirs[name]))


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    if path.suffix == ".pt":
        import torch

        return torch.load(path, weights_only=True)
    return json.loads(path.read_bytes()) if path.suffix == ".json" else path.read_bytes()


def _of_values(where: str, one: Any, other: Any) -> Iterator[str]:
    """Yield where two pieces of plain data, with tensors in them, differ."""
    if type(one) is not type(other):
        yield f"{where} is {_short(other)} and not {_short(one)}"
    elif isinstance(one, dict):
        if one.keys() != other.keys():
            yield f"{where} has {sorted(map(str, other))} and not {sorted(map(str, one))}"
        for key in (key for key in one if key in other):
            yield from _of_values(f"{where}[{key!r}]", one[key], other[key])
    elif isinstance(one, list | tuple):
        if len(one) != len(other):
            yield f"{where} has {len(other)} items and not {len(one)}"
        for place, pair in enumerate(zip(one, other, strict=False)):
            yield from _of_values(f"{where}[{place}]", *pair)
    elif hasattr(one, "untyped_storage"):
        yield from _of_tensors(where, one, other)
    elif one != other and not (isinstance(one, float) and math.isnan(one) and math.isnan(other)):
        yield f"{where} is {_short(other)} and not {_short(one)}"


def _of_tensors(where: str, one: Any, other: Any) -> Iterator[str]:
    import torch

    if one.shape != other.shape or one.dtype != other.dtype:
        kinds = [f"{tensor.dtype} {list(tensor.shape)}" for tensor in (other, one)]
        yield f"{where} is {' and not '.join(kinds)}"
        return
    # As bytes: -0.0 is another number than 0.0 here, and NaN is itself.
    ours, theirs = (tensor.contiguous().view(-1).view(torch.uint8) for tensor in (one, other))
    if not torch.equal(ours, theirs):
        apart = (one.double() - other.double()).abs()
        yield (
            f"{where} differs in {int(one.ne(other).sum())} of {one.numel()} numbers, by up to "
            f"{apart.max().item():.3g}"
        )


def _of_events(said: Sequence[Event], attempts: Sequence[Sequence[Event]]) -> Iterator[str]:
    """Compare what is said of each step, by whichever attempt, with what the whole run said."""
    expected = {_key(event): _lasting(event) for event in said if event.type in _COMPARED}
    warnings = [event.data["message"] for event in said if event.type == "warning"]
    seen: set[tuple[str, int]] = set()
    for number, events in enumerate(attempts, start=1):
        for event in events:
            if event.type == "warning" and event.data["message"] not in warnings:
                yield f"attempt {number} has warned: {event.data['message']}"
        compared = [event for event in events if event.type in _COMPARED]
        seen.update(map(_key, compared))
        yield from _of_attempt(number, compared, expected)
    for type_, step in sorted(expected.keys() - seen):
        yield f"no attempt has reported the {type_} of step {step}"


def _of_attempt(
    number: int, events: Sequence[Event], expected: Mapping[tuple[str, int], Mapping[str, Any]]
) -> Iterator[str]:
    before: dict[str, int] = {}
    for event in events:
        type_, step = _key(event)
        where = f"the {type_} of step {step} in attempt {number}"
        if type_ in before and step <= before[type_]:
            yield f"{where} comes after that of step {before[type_]}"
        before[type_] = step
        if (type_, step) in expected:
            yield from _of_values(where, expected[type_, step], _lasting(event))
        else:
            yield f"{where} is of a step that the unbroken run has not reported"


def _key(event: Event) -> tuple[str, int]:
    return event.type, int(event.data["step"])


def _lasting(event: Event) -> dict[str, Any]:
    return {
        name: value
        for name, value in event.data.items()
        if not name.endswith(_MEASURED) and name != "attempt"
    }


def _of_rollouts(one: Path, other: Path) -> Iterator[str]:
    ours, theirs = (
        {path.name: path for path in sorted(folder.glob("step-*"))} for folder in (one, other)
    )
    if ours.keys() != theirs.keys():
        yield f"there are rollouts in {sorted(theirs)}, not {sorted(ours)}"
    for name in sorted(ours.keys() & theirs.keys()):
        if ours[name].read_bytes() != theirs[name].read_bytes():
            episodes = [
                [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
                for path in (ours[name], theirs[name])
            ]
            yield from _of_values(f"rollouts/{name}", *episodes)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"
