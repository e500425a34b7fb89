"""
Evaluations that are kept: `FLASH_HOME/evals/eval-<id>.json`, their answers in `….rows.json.gz`.

The first file has the numbers and what they are of; it is written last, so what it tells of is all
there. Both are private, replaced whole, and the user's to delete.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import time
import zlib
from typing import TYPE_CHECKING, Any, Final

import flash
from flash.errors import StoreError, UsageError
from flash.files import store_error, write_atomic
from flash.plane.ids import ALPHABET, LENGTH, new_run_id

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from flash.home import FlashHome

FORMAT: Final = 1
PREFIX: Final = "eval-"
_ID = re.compile(f"{PREFIX}[{ALPHABET}]{{{LENGTH}}}")


def is_evaluation(text: str) -> bool:
    """Say whether `text` is the id of an evaluation, or the start of one, and of nothing else."""
    return text.startswith(PREFIX)


class EvaluationStore:
    """The kept evaluations of one home."""

    def __init__(self, home: FlashHome) -> None:
        self._home = home

    def keep(self, evaluation: Mapping[str, Any]) -> dict[str, Any]:
        """
        Keep what was found, with `rows` and `suites` as `flash.evaluate` returns them.

        Returns it with its id, time and version; raises `StoreError`.
        """
        kept = {
            "evaluation": PREFIX + new_run_id(),
            "created_s": time.time(),
            "flash": flash.__version__,
            "format": FORMAT,
            **evaluation,
        }
        folder = self._home.folder("evals")
        numbers, rows = _apart(kept)
        rows_path = folder / f"{kept['evaluation']}.rows.json.gz"
        numbers_path = folder / f"{kept['evaluation']}.json"
        try:
            write_atomic(rows_path, gzip.compress(_json(rows), mtime=0))
            write_atomic(numbers_path, _json(numbers))
        except StoreError:
            # In this order: while the numbers are there, their rows are.
            with contextlib.suppress(OSError):
                numbers_path.unlink(missing_ok=True)
                rows_path.unlink(missing_ok=True)
            raise
        return kept

    def all(self) -> tuple[list[dict[str, Any]], list[str]]:
        """Return the numbers of all, newest first, and what is wrong with files left out."""
        found, problems = [], []
        for path in sorted(self._folder.glob(f"{PREFIX}*.json"), reverse=True):
            try:
                found.append(_read(path))
            except StoreError as error:
                problems.append(error.message)
        return found, problems

    def find(self, text: str) -> dict[str, Any]:
        """Return the evaluation with this id, or the only one it starts, with its rows."""
        names = [path.stem for path in self._folder.glob(f"{PREFIX}*.json")]
        fitting = [name for name in sorted(names) if name.startswith(text) and _ID.fullmatch(name)]
        if len(fitting) != 1:
            several = f"{len(fitting)} evaluations start with {text}"
            message = several if fitting else f'there is no evaluation "{text}"'
            raise UsageError(message, hint="flash eval list lists them")
        return self._whole(_read(self._folder / f"{fitting[0]}.json"))

    def of_run(self, run: str) -> list[dict[str, Any]]:
        """Return those of a run's adapters, newest first, with their rows."""
        return [self._whole(one) for one in self.all()[0] if one["run"] == run]

    @property
    def _folder(self) -> Path:
        return self._home.root / "evals"

    def _whole(self, numbers: dict[str, Any]) -> dict[str, Any]:
        path = self._folder / f"{numbers['evaluation']}.rows.json.gz"
        rows = _loaded(path, lambda: gzip.decompress(path.read_bytes()))
        return numbers | {
            "rows": rows["rows"],
            "suites": {
                name: suite | {"rows": rows["suites"][name]}
                for name, suite in numbers["suites"].items()
            },
        }


def _apart(kept: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the numbers, and the rows that they are of."""
    suites = kept["suites"]
    rows = {"rows": kept["rows"], "suites": {name: one["rows"] for name, one in suites.items()}}
    numbers = {name: value for name, value in kept.items() if name != "rows"}
    numbers["suites"] = {
        name: {key: value for key, value in one.items() if key != "rows"}
        for name, one in suites.items()
    }
    return numbers, rows


def _read(path: Path) -> dict[str, Any]:
    numbers = _loaded(path, path.read_bytes)
    if numbers.get("format", 0) > FORMAT:
        raise StoreError(
            f"{path} was written by a newer Flash ({numbers.get('flash')})",
            hint="upgrade flash-core here",
        )
    return numbers


def _loaded(path: Path, read: Any) -> dict[str, Any]:
    try:
        found = json.loads(read())
    except (ValueError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        message = f"{path} is damaged: {error}"
        raise StoreError(message, hint="delete it; flash eval makes a new one") from error
    except OSError as error:
        raise store_error("read", path, error) from error
    if not isinstance(found, dict):
        raise StoreError(f"{path} is damaged", hint="delete it; flash eval makes a new one")
    return found


def _json(value: Any) -> bytes:
    return f"{json.dumps(value, indent=1)}\n".encode()
