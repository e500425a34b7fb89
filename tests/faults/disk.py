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
    """The calls on one folder: how many could have failed, and whether one did."""

    def __init__(self, folder, fault, at):
        self._folder = os.path.realpath(folder)
        self._fault = fault
        self._at = at
        self.count = 0
        self.struck = False

    def call(self, kind, *paths):
        """Raise where this call is one that fails."""
        if self._due(kind, paths):
            raise self.error(paths[0])

    def part(self, kind, path, size):
        """Return how much of `size` bytes is taken of a write; raises where none is."""
        if not self._due(kind, (path,)):
            return size
        first = self.count == self._at + 1
        if self._fault.code == errno.ENOSPC and first and size > 1:
            return size // 2
        raise self.error(path)

    def error(self, path):
        return OSError(self._fault.code, os.strerror(self._fault.code), str(path))

    def _due(self, kind, paths):
        if kind not in self._fault.calls or not any(map(self._holds, paths)):
            return False
        self.count += 1
        due = self.count > self._at if self._fault.lasting else self.count == self._at + 1
        self.struck = self.struck or due
        return due

    def _holds(self, path):
        return path == self._folder or path.startswith(f"{self._folder}{os.sep}")


def _path(target, dir_fd=None):
    """Return the absolute path that a path, or a descriptor, stands for."""
    if isinstance(target, int):
        with contextlib.suppress(OSError):
            return os.readlink(f"/proc/self/fd/{target}")
        return ""
    path = os.fsdecode(target)
    return os.path.join(os.getcwd() if dir_fd is None else _path(dir_fd), path)


@contextlib.contextmanager
def failing(folder, fault, at):
    """Have call number `at` of those in `folder` that the fault is for fail."""
    disk = Disk(folder, fault, at)
    real = {name: getattr(os, name) for name in ("open", "write", "sendfile", "mkdir", "scandir")}

    def open_(path, flags, mode=0o777, *, dir_fd=None):
        changes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        disk.call("create" if changes else "open", _path(path, dir_fd))
        return real["open"](path, flags, mode, dir_fd=dir_fd)

    def write(descriptor, data):
        size = len(memoryview(data).cast("B"))
        taken = disk.part("write", _path(descriptor), size)
        return real["write"](descriptor, memoryview(data).cast("B")[:taken])

    def sendfile(out, source, offset, count, **more):
        return real["sendfile"](out, source, offset, disk.part("write", _path(out), count), **more)

    def mkdir(path, mode=0o777, *, dir_fd=None):
        disk.call("mkdir", _path(path, dir_fd))
        return real["mkdir"](path, mode, dir_fd=dir_fd)

    def scandir(path="."):
        disk.call("list", _path(path))
        return real["scandir"](path)

    def at_path(kind, name):
        function = getattr(os, name)

        def act(path, *args, dir_fd=None, **more):
            disk.call(kind, _path(path, dir_fd))
            return function(path, *args, **more, **({} if dir_fd is None else {"dir_fd": dir_fd}))

        return act

    def between(name):
        function = getattr(os, name)

        def act(source, target, **more):
            disk.call("rename", _path(source), _path(target))
            return function(source, target, **more)

        return act

    with pytest.MonkeyPatch.context() as patch:
        replaced = {
            "open": open_,
            "write": write,
            "sendfile": sendfile,
            "mkdir": mkdir,
            "scandir": scandir,
            **{name: between(name) for name in ("rename", "replace", "link")},
            **{name: at_path("unlink", name) for name in ("unlink", "remove")},
            "rmdir": at_path("rmdir", "rmdir"),
            "fsync": at_path("fsync", "fsync"),
            "ftruncate": at_path("write", "ftruncate"),
            "truncate": at_path("write", "truncate"),
        }
        for name, function in replaced.items():
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
    return {name: _path(int(name)) for name in os.listdir("/proc/self/fd")}


def files_in(folder):
    """Return every path below `folder`, relative to it."""
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*"))
