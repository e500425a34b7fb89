"""Taking one folder out of a tarball that may be hostile."""

from __future__ import annotations

import gzip
import os
import shutil
import tarfile
import zlib
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, cast

import attrs

from flash.api import EnvironmentFault, StoreError

if TYPE_CHECKING:
    from pathlib import Path
    from typing import IO


@attrs.frozen
class Limits:
    """
    How much an archive may hold.

    Attributes:
        packed_bytes: of the download.
        scanned_members: of the whole repository; the folder's own are the fewer.
        scanned_bytes: unpacked, of the whole repository.
        members: files and folders of the environment.
        bytes: unpacked, of the environment.

    """

    packed_bytes: int = 256 << 20
    scanned_members: int = 200_000
    scanned_bytes: int = 1 << 30
    members: int = 5_000
    bytes: int = 256 << 20


def extract(file: IO[bytes], path: str, destination: Path, limits: Limits) -> None:
    """
    Write the files below `path` of the archive's one top folder into `destination`.

    Only files and folders are taken: a link, a device or a doubled name below `path` refuses the
    whole archive, and so does a `..` or an absolute name anywhere, or breaking a limit.
    `destination` may exist and must be empty; after a failure it is again. Raises
    `EnvironmentFault`, or `StoreError` when the disk fails.
    """
    destination.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        _extract(file, PurePosixPath(path).parts, destination, limits)
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        _empty(destination)
        raise EnvironmentFault(
            f"the archive is damaged: {error}", hint="try again; GitHub makes it anew each time"
        ) from error
    except OSError as error:
        _empty(destination)
        reason = error.strerror or str(error)
        raise StoreError(f"cannot write the environment to {destination}: {reason}") from error
    except BaseException:
        _empty(destination)
        raise


class _Bounded:
    """Unpacks gzip and stops a stream that never ends, headers and padding included."""

    def __init__(self, file: IO[bytes], limits: Limits) -> None:
        self._file = gzip.GzipFile(fileobj=file)
        self._limits = limits
        self._left = limits.scanned_bytes

    def read(self, size: int) -> bytes:
        """Return the next bytes, at most `size`."""
        content = self._file.read(size)
        self._left -= len(content)
        if self._left < 0:
            raise _too_big(
                "the repository", self._limits.scanned_members, self._limits.scanned_bytes
            )
        return content


def _extract(file: IO[bytes], path: tuple[str, ...], destination: Path, limits: Limits) -> None:
    scanned = taken = taken_bytes = 0
    unpacked = cast("IO[bytes]", _Bounded(file, limits))
    with tarfile.open(fileobj=unpacked, mode="r|") as archive:
        for member in archive:
            scanned += 1
            if scanned > limits.scanned_members:
                raise _too_big("the repository", limits.scanned_members, limits.scanned_bytes)
            parts = PurePosixPath(member.name).parts
            if ".." in parts or member.name.startswith("/"):
                raise _refused(member, "its path leaves the archive")
            inner = parts[1:]
            if inner[: len(path)] != path:
                continue
            taken += 1
            taken_bytes += member.size
            if taken > limits.members or taken_bytes > limits.bytes:
                raise _too_big("the environment", limits.members, limits.bytes)
            _write(archive, member, inner[len(path) :], destination)
    if not any(destination.iterdir()):
        raise EnvironmentFault(
            f'the repository has no folder "{"/".join(path)}" with files in it',
            hint="name the folder that holds environment.py after the colon",
        )


def _write(
    archive: tarfile.TarFile, member: tarfile.TarInfo, inner: tuple[str, ...], destination: Path
) -> None:
    if not member.isdir() and not member.isreg():
        raise _refused(member, "it is neither a file nor a folder")
    if member.isreg() and not inner:
        raise _refused(member, "it is a file where the environment's folder should be")
    target = destination.joinpath(*inner)
    if member.isdir():
        target.mkdir(parents=True, exist_ok=True, mode=0o700)
        return
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    source = archive.extractfile(member)
    if source is None or target.exists():
        raise _refused(member, "it is there twice")
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with source, os.fdopen(descriptor, "wb") as out:
        shutil.copyfileobj(source, out)


def _empty(folder: Path) -> None:
    for child in folder.iterdir():
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()


def _refused(member: tarfile.TarInfo, reason: str) -> EnvironmentFault:
    return EnvironmentFault(
        f"the archive holds {member.name!r}, which is refused: {reason}",
        hint="an environment is plain files and folders",
    )


def _too_big(what: str, members: int, size: int) -> EnvironmentFault:
    return EnvironmentFault(
        f"{what} holds more than {members} files or {size >> 20} MiB",
        hint="keep big data elsewhere, or use a local folder: environment.path",
    )
