"""
A disk that fails on demand: every call that changes a folder, one after the other.

    for fault in FAULTS:
        for at in itertools.count():
            with failing(folder, fault, at) as disk:
                operation()
            if not disk.struck:
                break  # it was over before its call number `at`

What Python code does to files goes through functions of `os`; so does, while a disk is failing,
what `open` gives, by the standard library's own `_pyio`. The calls take place, but for those that
fail. A fault strikes once, or from its call on; a full disk takes a part of the write first, as
real ones do. SQLite and torch write from C: for them there are `small_files` and `few_files`, which
are the kernel's own limits.
"""

import _pyio
import builtins
import contextlib
import errno
import functools
import io
import os
import resource
from pathlib import Path

import attrs
import pytest

_CHANGING = frozenset({"create", "write", "fsync", "mkdir", "rename"})
_REMOVING = frozenset({"unlink", "rmdir"})
_OPENING = frozenset({"create", "open", "list"})


@attrs.frozen
class Fault:
    """What a call is answered with, and which calls."""

    code: int
    calls: frozenset
    lasting: bool

    def __str__(self) -> str:
        return f"{errno.errorcode[self.code]}-{'lasting' if self.lasting else 'once'}"


FAULTS = [
    Fault(code, calls, lasting)
    for code, calls in (
        (errno.ENOSPC, _CHANGING),
        (errno.EIO, _CHANGING | _REMOVING | {"open"}),
        (errno.EROFS, _CHANGING | _REMOVING),
        (errno.EMFILE, _OPENING),
    )
    for lasting in (False, True)
]


class Disk:
    """
    The functions of `os` that change files, of which those on `folder` are counted and may fail.

    `struck` says whether one did.
    """

    def __init__(self, folder, fault, at):
        self._folder = f"{Path(folder).resolve()}{os.sep}"
        self._fault = fault
        self._at = at
        self._count = 0
        self._real = {name: getattr(os, name) for name in _FUNCTIONS}
        self.struck = False

    def functions(self):
        """Return what takes the place of each function of `os`, by its name."""
        return {name: functools.partial(act, self, name) for name, act in _FUNCTIONS.items()}

    def open(self, name, path, flags, mode=0o777, *, dir_fd=None):
        changes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        self._call("create" if changes else "open", _path(path, dir_fd))
        return self._real[name](path, flags, mode, dir_fd=dir_fd)

    def write(self, name, descriptor, data):
        # A copy: a view would be kept by the traceback of the error.
        data = bytes(data)
        return self._real[name](descriptor, data[: self._part(_path(descriptor), len(data))])

    def sendfile(self, name, out, source, offset, count, **more):
        taken = self._part(_path(out), count)
        return self._real[name](out, source, offset, taken, **more)

    def at_path(self, name, path, *args, dir_fd=None, **more):
        self._call(_KINDS.get(name, name), _path(path, dir_fd))
        at_folder = {} if dir_fd is None else {"dir_fd": dir_fd}
        return self._real[name](path, *args, **more, **at_folder)

    def list(self, name, path="."):
        self._call("list", _path(path))
        return self._real[name](path)

    def between(self, name, source, target, **more):
        self._call("rename", _path(source), _path(target))
        return self._real[name](source, target, **more)

    def _call(self, kind, *paths):
        if self._due(kind, paths):
            raise self._error(paths[0])

    def _part(self, path, size):
        """Return how much of `size` bytes is taken of a write; raises where none is."""
        if not self._due("write", (path,)):
            return size
        if self._fault.code == errno.ENOSPC and self._count == self._at + 1 and size > 1:
            return size // 2
        raise self._error(path)

    def _error(self, path):
        return OSError(self._fault.code, os.strerror(self._fault.code), str(path))

    def _due(self, kind, paths):
        if kind not in self._fault.calls or not any(map(self._holds, paths)):
            return False
        self._count += 1
        past = self._count - 1 - self._at
        due = past >= 0 if self._fault.lasting else past == 0
        self.struck = self.struck or due
        return due

    def _holds(self, path):
        return f"{path}{os.sep}".startswith(self._folder)


_KINDS = {"remove": "unlink", "truncate": "write", "ftruncate": "write"}
_AT_A_PATH = ("mkdir", "rmdir", "unlink", "remove", "fsync", "truncate", "ftruncate")
_FUNCTIONS = {
    "open": Disk.open,
    "write": Disk.write,
    "sendfile": Disk.sendfile,
    **dict.fromkeys(_AT_A_PATH, Disk.at_path),
    **dict.fromkeys(("scandir", "listdir"), Disk.list),
    **dict.fromkeys(("rename", "replace", "link"), Disk.between),
}


def _path(target, dir_fd=None):
    """Return the absolute path that a path, or a descriptor, stands for."""
    if isinstance(target, int):
        try:
            return str(Path(f"/proc/self/fd/{target}").readlink())
        except OSError:
            return ""
    path = os.fsdecode(target)
    if path.startswith(os.sep):
        return path
    return f"{Path.cwd() if dir_fd is None else _path(dir_fd)}{os.sep}{path}"


@contextlib.contextmanager
def failing(folder, fault, at):
    """Have call number `at` of those in `folder` that the fault is for fail."""
    disk = Disk(folder, fault, at)
    with pytest.MonkeyPatch.context() as patch:
        for name, function in disk.functions().items():
            patch.setattr(os, name, function)
        patch.setattr(io, "open", _pyio.open)
        patch.setattr(builtins, "open", _pyio.open)
        yield disk


@contextlib.contextmanager
def small_files(most_bytes):
    """Let no file of this process grow beyond `most_bytes`; writes stop in the middle."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@contextlib.contextmanager
def few_files(more):
    """Let this process open `more` files, and none beyond."""
    old = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.open(os.devnull, os.O_RDONLY)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + more, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, old)


def open_files():
    """Return what this process has open, by descriptor."""
    found = {path.name: _path(int(path.name)) for path in Path("/proc/self/fd").iterdir()}
    # One is the folder itself, while it is read.
    return {name: path for name, path in found.items() if path}


def files_in(folder):
    """Return every path below `folder`, relative to it."""
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*"))
