"""
Rows from files: `dataset/<split>.jsonl|json|csv|txt`, with the place of every mistake.

What a row means is the SDK's business (`task_example_from_record`); reading is done here because
the SDK's own reader does not say which line is wrong.
"""

from __future__ import annotations

import csv
import io
import json
from typing import TYPE_CHECKING, Any

import attrs

from flash.api import EnvironmentFault, Task

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from freesolo.datasets import TaskExample

# In the order in which they are taken where a split has several.
SUFFIXES = (".jsonl", ".json", ".csv", ".txt")
FOLDER, OLD_FOLDER = "dataset", "datasets"
_NOT_SPLITS = {"readme", "license", "licence", "notice"}


@attrs.frozen
class Row:
    """One record and where it stands, for errors: `file:line`, or `file: row N` in JSON arrays."""

    record: dict[str, Any]
    place: str


@attrs.frozen
class SplitFiles:
    """
    The files of an environment's splits, and what its author should be told about them.

    Attributes:
        folder: where the file of a further split belongs.
        files: the file that each split is read from.
        notices: sentences about old spellings and about files that are not read.

    """

    folder: Path
    files: dict[str, Path]
    notices: tuple[str, ...]


def find_splits(folder: Path, dataset: Path | None = None) -> SplitFiles:
    """
    Return the split files of an environment; looks at names only.

    `dataset/` is where they belong. `datasets/` is read too, and so are `train.jsonl` and
    `train.json` beside `environment.py`, as in older environments. `dataset` is a folder below
    `folder` that takes the place of all of these.
    """
    files: dict[str, Path] = {}
    notices = []
    for place in (dataset,) if dataset else (folder / FOLDER, folder / OLD_FOLDER):
        for suffix in SUFFIXES:
            for path in sorted(place.glob(f"*{suffix}")):
                if path.stem.startswith((".", "_")) or path.stem.lower() in _NOT_SPLITS:
                    continue
                if path.stem in files:
                    first, second = (one.relative_to(folder) for one in (files[path.stem], path))
                    notices.append(f"{second} is not read: {first} is the same split")
                else:
                    files[path.stem] = path
    if dataset is not None:
        return SplitFiles(dataset, files, tuple(notices))
    if any(path.parent.name == OLD_FOLDER for path in files.values()):
        notices.append(f"{OLD_FOLDER}/ is an old spelling; rename it to {FOLDER}/")
    for name in ("train.jsonl", "train.json"):
        if "train" not in files and (folder / name).is_file():
            files["train"] = folder / name
            notices.append(f"{name} belongs into {FOLDER}/")
    return SplitFiles(folder / FOLDER, files, tuple(notices))


def read_rows(path: Path) -> list[Row]:
    """Return the rows of one file; `EnvironmentFault` names the line that is wrong."""
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise EnvironmentFault(
            f"{path}: rows cannot be read from {path.suffix or 'a file without suffix'}",
            hint=f"use {', '.join(SUFFIXES)}",
        )
    rows = list(reader(path, _text(path)))
    if not rows:
        raise EnvironmentFault(f"{path}: no rows", hint="write at least one row with an input")
    return rows


def rows_from_records(records: Any, place: str) -> list[Row]:
    """Return rows given as a list of records; a bare string is a row's input."""
    if isinstance(records, str | bytes | dict) or not hasattr(records, "__iter__"):
        raise EnvironmentFault(
            f"{place}: expected a list of rows, got {type(records).__name__}",
            hint='write each row as {input = "…", output = "…"}',
        )
    rows = [as_row(record, f"{place}: row {number}") for number, record in enumerate(records, 1)]
    if not rows:
        raise EnvironmentFault(f"{place}: no rows", hint="give at least one row with an input")
    return rows


def as_row(record: Any, place: str) -> Row:
    """Return one row; a bare string is its input. `EnvironmentFault` says what it lacks."""
    if isinstance(record, str):
        record = {"input": record}
    if not isinstance(record, dict):
        raise EnvironmentFault(
            f"{place}: a row must be an object, got {type(record).__name__}",
            hint='write it as {"input": …, "output": …}',
        )
    if record.get("input") is None:
        keys = ", ".join(map(str, record)) or "nothing"
        raise EnvironmentFault(
            f"{place}: the row has no input (it has {keys})",
            hint='every row needs "input"; "output" and "metadata" may follow',
        )
    return Row(record, place)


def _text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise EnvironmentFault(f"{path}: cannot be read: {error.strerror}") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise EnvironmentFault(
            f"{path}:{line}: not UTF-8: byte 0x{content[error.start]:02x}",
            hint="save the file as UTF-8",
        ) from None


def _jsonl(path: Path, text: str) -> Iterator[Row]:
    # Not splitlines: JSON strings may hold U+2028 and its kin unescaped.
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        if line.strip():
            yield as_row(_json(line.strip(), path, number), f"{path}:{number}")


def _json_array(path: Path, text: str) -> Iterator[Row]:
    content = _json(text, path, 1)
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
    if not isinstance(content, list):
        raise EnvironmentFault(
            f"{path}:1: expected an array of rows",
            hint='write [{"input": …}, …], or {"data": […]}, or one row a line in a .jsonl file',
        )
    for number, record in enumerate(content, 1):
        yield as_row(record, f"{path}: row {number}")


def _csv(path: Path, text: str) -> Iterator[Row]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        if reader.fieldnames is not None and "input" not in reader.fieldnames:
            columns = ", ".join(reader.fieldnames)
            raise EnvironmentFault(
                f'{path}:1: no column is called "input" (columns: {columns})',
                hint="name the column with the model's input so",
            )
        for record in reader:
            place = f"{path}:{reader.line_num}"
            if None in record:
                raise EnvironmentFault(
                    f"{place}: the row has more cells than the header",
                    hint="quote cells that hold commas or line breaks",
                )
            yield as_row(dict(record), place)
    except csv.Error as error:
        raise EnvironmentFault(f"{path}:{reader.line_num}: {error}") from error


def _txt(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield Row({"input": line.strip()}, f"{path}:{number}")


def _json(text: str, path: Path, line: int) -> Any:
    """Parse JSON of which the first line is `line` of the file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{path}:{line + error.lineno - 1}"
        raise EnvironmentFault(
            f"{place}: invalid JSON at column {error.colno}: {error.msg}"
        ) from None
    except (RecursionError, ValueError) as error:  # nested too deep; a number of too many digits
        raise EnvironmentFault(f"{path}:{line}: JSON that cannot be read: {error}") from error


_READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".json": _json_array,
    ".csv": _csv,
    ".txt": _txt,
}


def in_order(splits: Iterable[str]) -> tuple[str, ...]:
    """Return the names of splits, `train` first."""
    return tuple(sorted(splits, key=lambda split: (split != "train", split)))


def names(words: Iterable[str]) -> str:
    """Return the words as part of a sentence."""
    return ", ".join(words) or "none"


def task_of(example: TaskExample) -> Task:
    """Return a row of the SDK as the core has it."""
    return Task(
        id=str(example.id),
        input=example.input,
        data=example,
        metadata=dict(example.metadata),
    )
