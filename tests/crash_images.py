"""
What a disk may hold after a power cut: every image that a recorded sequence of operations allows.

    with recorded(folder) as disk:
        write_atomic(folder / "file", b"new")
    for image in disk.images():
        image.put(elsewhere)          # and then load from there, changing nothing

The model is the weakest one that POSIX allows. The bytes of a file are there for sure once the file
was synced, and a name once its folder was; until then each of them may be there or not, whatever
the order they were made in, and bytes may be torn or zero. Nothing else is taken for granted: to
sync a file does not keep its name.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from pathlib import Path

# Of more possibilities than this at one moment, so many are drawn at random.
_MOST_A_MOMENT = 300
_ROOT = 0


@attrs.frozen
class Names:
    """Names that changed at once: (folder, name) -> what it names, None for nothing more."""

    changes: tuple[tuple[tuple[int, str], int | None], ...]

    def folders(self):
        return {folder for (folder, _), _ in self.changes}


@attrs.frozen
class Content:
    """The bytes of a file, before and after."""

    file: int
    before: bytes
    after: bytes

    def outcomes(self):
        """Return what may be on the disk: nothing of it, all of it, and torn in several ways."""
        size, half = len(self.after), self.after[: len(self.after) // 2]
        torn = (half, half.ljust(size, b"\0"), b"", bytes(size))
        return tuple(dict.fromkeys((self.before, self.after, *torn)))


@attrs.frozen
class Sync:
    """The file's bytes, or the folder's names, are on the disk."""

    node: int


@attrs.frozen
class Image:
    """
    A folder's content after a crash: bytes by path, None for a folder.

    `after` is what had returned by then.
    """

    content: tuple[tuple[str, bytes | None], ...]
    after: tuple[str, ...]

    def put(self, folder: Path, *, over: Image | None = None) -> Path:
        """Make `folder` hold it and nothing else; `over` is the image that it holds."""
        wanted, there = dict(self.content), dict(over.content if over else ())
        folder.mkdir(exist_ok=True)
        for name in sorted(there.keys() - wanted.keys(), reverse=True):
            (folder / name).rmdir() if there[name] is None else (folder / name).unlink()
        for name, content in self.content:
            if name not in there and content is None:
                (folder / name).mkdir()
            elif name not in there or there[name] != content:
                (folder / name).write_bytes(content)
        return folder


class Disk:
    """The operations on a folder, and what they leave; `done` notes that something has returned."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.operations: list[Names | Content | Sync] = []
        self._marks: list[tuple[int, str]] = []
        self._folders = {_ROOT}
        self._nodes: dict[int, int] = {}  # number on the real disk -> number here
        self._seen: dict[str, tuple[int, bytes | None]] = {}
        self._count = itertools.count(1)
        self.look()
        self._start = len(self.operations)

    def done(self, what: str) -> None:
        """Note that `what` has returned, so that from here on it must outlive a crash."""
        self.look()
        self._marks.append((len(self.operations), what))

    def look(self) -> None:
        """Take up what has changed since the last look: at most one removal or rename."""
        found = self._tree()
        for path in [path for path in self._seen if path not in found]:
            node, _ = self._seen.pop(path)
            moved = next((new for new, (other, _) in found.items() if other == node), None)
            changes = {self._slot(path): None}
            if moved is None:
                self._nodes = {real: one for real, one in self._nodes.items() if one != node}
            else:
                changes[self._slot(moved)] = node
                self._seen[moved] = (node, found[moved][1])
            self.operations.append(Names(tuple(changes.items())))
        for path, (node, content) in found.items():
            if path not in self._seen:
                self.operations.append(Names(((self._slot(path), node),)))
                self._seen[path] = (node, None if content is None else b"")
            known, before = self._seen[path]
            assert known == node, f"{path} was removed and made anew between two looks"
            if content != before:
                self.operations.append(Content(node, before, content))
                self._seen[path] = (node, content)

    def sync(self, descriptor: int) -> None:
        """Note that what the descriptor is of is on the disk."""
        self.look()
        real = os.fstat(descriptor).st_ino
        root = real == self._folder.stat().st_ino
        if root or real in self._nodes:
            self.operations.append(Sync(_ROOT if root else self._nodes[real]))

    def images(self):
        """Yield every image of a crash after each operation, each once."""
        drawn = random.Random(0)
        seen = set()
        for moment in range(self._start, len(self.operations) + 1):
            after = tuple(what for place, what in self._marks if place <= moment)
            for chosen in self._choices(moment, drawn):
                image = Image(self._content(moment, chosen), after)
                if image not in seen:
                    seen.add(image)
                    yield image

    def _choices(self, moment, drawn):
        """Yield, for the operations that a crash may lose, what becomes of each."""
        lost = [place for place in range(self._start, moment) if not self._kept(place, moment)]
        options = [self._outcomes(place) for place in lost]
        total = 1
        for one in options:
            total *= len(one)
        if total <= _MOST_A_MOMENT:
            combined = itertools.product(*options)
        else:
            whole, none = [one[-1] for one in options], [one[0] for one in options]
            singles = [
                [*base[:place], outcome, *base[place + 1 :]]
                for base in (whole, none)
                for place, outcomes in enumerate(options)
                for outcome in outcomes
            ]
            sample = ([drawn.choice(one) for one in options] for _ in range(_MOST_A_MOMENT))
            combined = itertools.chain([whole, none], singles, sample)
        for outcomes in combined:
            yield dict(zip(lost, outcomes, strict=True))

    def _outcomes(self, place):
        operation = self.operations[place]
        if isinstance(operation, Content):
            before, after, *torn = operation.outcomes()
            return (before, *torn, after)
        return (False, True)

    def _kept(self, place, moment):
        operation = self.operations[place]
        if isinstance(operation, Sync):
            return True
        synced = {one.node for one in self.operations[place:moment] if isinstance(one, Sync)}
        needed = {operation.file} if isinstance(operation, Content) else operation.folders()
        return needed <= synced

    def _content(self, moment, chosen):
        names, data = {}, {}
        for place, operation in enumerate(self.operations[:moment]):
            outcome = chosen.get(place)
            if isinstance(operation, Content):
                data[operation.file] = operation.after if outcome is None else outcome
            elif isinstance(operation, Names) and outcome is not False:
                names |= dict(operation.changes)
        content = []

        def walk(folder, path):
            for (parent, name), node in sorted(names.items()):
                if parent != folder or node is None:
                    continue
                if node in self._folders:
                    content.append((path + name, None))
                    walk(node, f"{path}{name}/")
                else:
                    content.append((path + name, data.get(node, b"")))

        walk(_ROOT, "")
        return tuple(content)

    def _slot(self, path: str) -> tuple[int, str]:
        folder, _, name = path.rpartition("/")
        return (self._seen[folder][0] if folder else _ROOT, name)

    def _tree(self):
        found = {}
        for path in sorted(self._folder.rglob("*")):
            real = path.stat().st_ino
            if real not in self._nodes:
                self._nodes[real] = next(self._count)
            node = self._nodes[real]
            if path.is_dir():
                self._folders.add(node)
            found[path.relative_to(self._folder).as_posix()] = (
                node,
                None if path.is_dir() else path.read_bytes(),
            )
        return found


_WATCHED = ("mkdir", "rename", "replace", "unlink", "remove", "rmdir")


@contextlib.contextmanager
def recorded(folder: Path):
    """Record what the block does below `folder`, whose content is on the disk before it."""
    disk = Disk(folder)
    real = {name: getattr(os, name) for name in (*_WATCHED, "fsync")}

    def watched(call):
        def run(*arguments, **options):
            disk.look()
            result = call(*arguments, **options)
            disk.look()
            return result

        return run

    def fsync(descriptor):
        real["fsync"](descriptor)
        disk.sync(descriptor)

    for name in _WATCHED:
        setattr(os, name, watched(real[name]))
    os.fsync = fsync
    try:
        yield disk
        disk.look()
    finally:
        for name, call in real.items():
            setattr(os, name, call)
