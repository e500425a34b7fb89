"""What the adapters share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flash.api import EnvironmentFault, FlashError

if TYPE_CHECKING:
    from pathlib import Path

    from flash.api import Task


def right_answer(task: Task, key: str | None) -> str:
    """Return the row's right answer as text; raises the sentence that says why there is none."""
    if key is None:
        if task.gold is None:
            raise FlashError(
                f"the row {task.id} has no gold answer",
                hint="give it an output, or name the key of its metadata in `answer_key`",
            )
        return task.gold
    found = task.metadata.get(key)
    if isinstance(found, bool) or not isinstance(found, str | int | float):
        has = ", ".join(map(str, task.metadata)) or "nothing"
        wrong = "is no text or number" if key in task.metadata else f"is missing (it has {has})"
        raise FlashError(f'the answer_key "{key}" of the row {task.id}\'s metadata {wrong}')
    return str(found)


def file_in(folder: Path | None, name: str, setting: str) -> Path:
    """Return a file of the environment's folder; raises `EnvironmentFault` for any other."""
    if folder is None:
        raise EnvironmentFault(f"{setting}: there is no environment's folder to look in")
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise EnvironmentFault(
            f"{setting}: {name} is outside the environment's folder",
            hint="only that folder travels with a run; put the file into it",
        )
    if not path.is_file():
        near = sorted(f.name for f in folder.glob(f"*{path.suffix}") if f.is_file())
        raise EnvironmentFault(
            f"{setting}: there is no file {path}",
            hint=f"the folder has {', '.join(near)}" if near else f"put {name} there",
        )
    return path
