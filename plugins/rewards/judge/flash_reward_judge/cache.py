"""Grades on disk: one file each, named after a hash of what was asked."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from flash_reward_judge.prompt import Grade

if TYPE_CHECKING:
    from collections.abc import Callable


class GradeCache:
    """
    The grades of one user, shared by runs and processes.

    A file that cannot be read is as good as none. One that cannot be written costs a call later
    and nothing else: `warn` is told, once.
    """

    def __init__(self, folder: Path, warn: Callable[[str], None]) -> None:
        self._folder = folder
        self._warn = warn
        self._warned = False

    def get(self, key: str) -> Grade | None:
        """Return the grade that was kept under `key`."""
        try:
            kept = json.loads(self._path(key).read_bytes())
            grade, reason = float(kept["grade"]), str(kept["reason"])
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            return None
        return Grade(grade, reason) if math.isfinite(grade) else None

    def put(self, key: str, grade: Grade) -> None:
        """Keep the grade: all of it or nothing, for this user alone."""
        path = self._path(key)
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=".new-")
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    json.dump({"grade": grade.grade, "reason": grade.reason}, file)
                Path(name).replace(path)
            except BaseException:
                with contextlib.suppress(OSError):
                    Path(name).unlink()
                raise
        except OSError as error:
            if not self._warned:
                self._warned = True
                self._warn(f"grades are not kept: {path} cannot be written: {error.strerror}")

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key}.json"
