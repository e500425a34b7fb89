"""
`flash env setup`: a complete small project to change into one's own.

What it writes lies in `templates/`: the files that every project has in `common`, and the
`environment.py` of the kind that was asked for.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from flash.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

_TEMPLATES: Final = Path(__file__).parent / "templates"
_SHOWN: Final = 5


def scaffold(folder: Path, *, multi_turn: bool) -> list[Path]:
    """
    Write the project into `folder`, made where it is missing; return the new files.

    Nothing is overwritten: `UsageError` names what is there already, and then, as after any other
    error, nothing was written.
    """
    files = _files(multi_turn=multi_turn)
    there = [name for name in files if os.path.lexists(folder / name)]
    if there:
        more = f" and {len(there) - _SHOWN} more" if len(there) > _SHOWN else ""
        raise UsageError(
            f"{folder} has {', '.join(there[:_SHOWN])}{more} already, and nothing is overwritten",
            hint="name another folder: flash env setup FOLDER",
        )
    made: list[Path] = []
    try:
        for name, content in files.items():
            target = folder / name
            _make_folders(target.parent, made)
            with target.open("xb") as file:
                made.append(target)
                file.write(content)
    except OSError as error:
        _undo(made)
        reason = error.strerror or error
        raise UsageError(
            f"cannot write the project to {folder}: {error.filename}: {reason}",
            hint="name another folder: flash env setup FOLDER",
        ) from error
    except BaseException:
        _undo(made)
        raise
    return [path for path in made if path.is_file()]


def _files(*, multi_turn: bool) -> Mapping[str, bytes]:
    """Return the project's files by their relative path."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for root in (_TEMPLATES / ("multi" if multi_turn else "single"), _TEMPLATES / "common")
        for path in sorted(root.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }


def _make_folders(folder: Path, made: list[Path]) -> None:
    """Make a folder and those above it that are missing; a link to a folder is one."""
    if folder.is_dir():
        return
    _make_folders(folder.parent, made)
    folder.mkdir()
    made.append(folder)


def _undo(made: list[Path]) -> None:
    for path in reversed(made):
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink()
