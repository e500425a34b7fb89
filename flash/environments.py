"""
Where an environment's files are, which plugin reads them, and the snapshot that a run keeps.

A reference is a local folder, `scheme:…` for a plugin that claims the scheme, or an id of the
hub. A snapshot holds plain files and nothing that belongs to the author alone.
"""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import os
import re
import shutil
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

import attrs

from flash.context import plugin_context
from flash.errors import EnvironmentFault, FlashError
from flash.files import mark_used, sha256, store_error
from flash.plugins import boundary
from flash.suggest import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from flash.home import FlashHome
    from flash.plugins import PluginHost
    from flash.spec.model import EnvironmentTable

MOST_BYTES: Final = 256 << 20
MOST_FILES: Final = 5000
_CHUNK_BYTES: Final = 1 << 20

_SCHEME: Final = re.compile(r"([a-z][a-z0-9+-]*):.+")
_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*){1,2}(@[\w.+-]+)?")
_NO_FAULT_OF_THE_FOLDER: Final = frozenset({errno.EIO, errno.EMFILE, errno.ENFILE})
_LOCAL: Final = ("./", "../", "/", "~")

# Folders that start with a dot are left out as well, and a folder with pyvenv.cfg.
_FOLDERS_LEFT_OUT: Final = frozenset({"__pycache__", "node_modules"})
_NAMES_LEFT_OUT: Final = (
    "*.env",
    "*.key",
    "*.p12",
    "*.pem",
    "*.pfx",
    "*.pyc",
    ".DS_Store",
    ".env",
    ".env.*",
    ".git-credentials",
    ".netrc",
    ".npmrc",
    ".pypirc",
    "credentials",
    "credentials.*",
    "id_dsa*",
    "id_ecdsa*",
    "id_ed25519*",
    "id_rsa*",
)
_FILES_LEFT_OUT: Final = re.compile("|".join(fnmatch.translate(n.lower()) for n in _NAMES_LEFT_OUT))


@attrs.frozen(kw_only=True)
class Located:
    """
    An environment that was found.

    `folder` is None for a reference that has to be fetched and was not, as in a dry run;
    `revision` is what the fetch returned.
    """

    plugin: str
    reference: str
    folder: Path | None
    revision: str | None = None


def locate(
    table: EnvironmentTable,
    base: Path,
    host: PluginHost,
    home: FlashHome,
    *,
    offline: bool = False,
) -> Located:
    """
    Find the environment that `[environment]` names, and fetch it unless `offline`.

    Relative folders start at `base`. Raises `EnvironmentFault` and `PluginError`.
    """
    if table.path is not None:
        return _local(table.path, base, host)
    reference = table.id or ""
    scheme = _SCHEME.fullmatch(reference)
    if scheme and not _exists(base, reference):
        plugin = _claiming(scheme[1], reference, host)
        if offline:
            return Located(plugin=plugin, reference=reference, folder=None)
        return _fetched(plugin, reference, host, home)
    if reference.startswith(_LOCAL) or reference in {".", ".."} or _exists(base, reference):
        return _local(reference, base, host)
    if _HUB_ID.fullmatch(reference):
        raise EnvironmentFault(
            f'"{reference}" is the id of a published environment, and there is no hub to ask yet',
            hint="use a local folder (environment.path) or github:owner/repo@ref:path",
        )
    raise EnvironmentFault(
        f'"{reference}" names no environment: there is no such folder in {base}',
        hint="write environment.path for a folder, or github:owner/repo@ref:path",
    )


def _exists(base: Path, reference: str) -> bool:
    try:
        return (base / reference).exists()
    except OSError:  # a name that is too long for the disk names nothing on it
        return False


def _local(reference: str, base: Path, host: PluginHost) -> Located:
    try:
        folder = (base / Path(reference).expanduser()).resolve()
        mode = folder.stat().st_mode
        siblings = [] if stat.S_ISDIR(mode) else [folder.parent]
    except (OSError, RuntimeError) as error:  # RuntimeError: no home folder, endless links
        raise _no_folder(base, reference, error) from error
    if siblings:
        raise EnvironmentFault(
            f"{folder} is a file, and an environment is a folder", hint=f"use {folder.parent}"
        )
    readers = []
    failure: FlashError | None = None
    for name, record in host.all("environment").items():
        try:
            with boundary(name, "detect"):
                if record.detect(folder):
                    readers.append(name)
        except FlashError as error:  # a plugin that fails stops nothing that another one reads
            failure = failure or error
    if failure is not None and not readers:
        raise failure
    if len(readers) > 1:
        raise EnvironmentFault(
            f"several plugins read {folder}: {', '.join(readers)}",
            hint=f"set one aside: FLASH_DISABLE_PLUGINS={readers[-1]}",
        )
    if not readers:
        known = [f"{name}: {record.summary}" for name, record in host.all("environment").items()]
        raise EnvironmentFault(
            f"no installed plugin reads the folder {folder} as an environment",
            hint="; ".join(known) or "no environment plugin is installed",
        )
    return Located(plugin=readers[0], reference=reference, folder=folder)


def _no_folder(base: Path, reference: str, error: Exception) -> EnvironmentFault:
    if not isinstance(error, FileNotFoundError):
        reason = getattr(error, "strerror", None) or str(error)
        return EnvironmentFault(f'the folder "{reference}" cannot be read: {reason}')
    wanted = base / Path(reference).expanduser()
    try:
        near = did_you_mean(wanted.name, [f.name for f in wanted.parent.iterdir() if f.is_dir()])
    except OSError:
        near = ""
    return EnvironmentFault(f"no such folder: {wanted}{near}")


def _claiming(scheme: str, reference: str, host: PluginHost) -> str:
    records = host.all("environment")
    claimants = [name for name, record in records.items() if scheme in record.schemes]
    if not claimants:
        known = sorted({f"{known}:" for record in records.values() for known in record.schemes})
        raise EnvironmentFault(
            f'no installed environment plugin reads "{reference}"',
            hint=f"schemes that are read here: {', '.join(known) or 'none'}",
        )
    if len(claimants) > 1:
        raise EnvironmentFault(
            f'several plugins read "{scheme}:" references: {", ".join(claimants)}',
            hint=f"set one aside: FLASH_DISABLE_PLUGINS={claimants[-1]}",
        )
    return claimants[0]


def _fetched(plugin: str, reference: str, host: PluginHost, home: FlashHome) -> Located:
    """Fetch into a folder named after the exact revision; a revision that is here is kept."""
    cache = home.folder("environments")
    with tempfile.TemporaryDirectory(dir=cache, prefix=".new-") as scratch:
        fresh = Path(scratch) / "files"
        fresh.mkdir(mode=0o700)
        with boundary(plugin, "fetch"):
            loader = host.get("environment", plugin).make(plugin_context(home, plugin, {}))
            revision = loader.fetch(reference, fresh)
        name = hashlib.sha256(f"{plugin}\n{reference}\n{revision}".encode()).hexdigest()[:24]
        folder = cache / name
        if not folder.is_dir():
            try:
                fresh.rename(folder)
            except OSError as error:
                # Another process fetched the same revision first; its files are these files.
                if not folder.is_dir():
                    raise store_error("keep the environment in", folder, error) from error
    mark_used(folder)
    return Located(plugin=plugin, reference=reference, folder=folder, revision=revision)


def snapshot(folder: Path, destination: Path) -> str:
    """
    Copy the environment's files into `destination`, which must not exist, and return its digest.

    Left out are hidden folders, virtual environments, caches, `.env` files and keys. Links,
    special files and more than 256 MiB or 5,000 files are refused with an `EnvironmentFault`.
    """
    files = list(_files(folder))
    made = whole = False
    try:
        _check_size(folder, files)
        destination.mkdir(mode=0o700)
        made = True
        total = hashlib.sha256()
        for relative in files:
            target = destination / relative
            _make_parents(target.parent, destination)
            executable, content = _copy(folder / relative, target)
            total.update(_line(relative, content, executable=executable))
        whole = True
    except OSError as error:
        raise store_error("copy the environment to", destination, error) from error
    finally:
        if made and not whole:
            shutil.rmtree(destination, ignore_errors=True)
    return f"sha256:{total.hexdigest()}"


def _copy(source: Path, target: Path) -> tuple[bool, str]:
    """Copy a file, for the owner alone; return whether it is executable, and its SHA-256 in hex."""
    content = hashlib.sha256()
    with os.fdopen(os.open(source, os.O_RDONLY | os.O_NOFOLLOW), "rb") as read:
        executable = bool(os.fstat(read.fileno()).st_mode & stat.S_IXUSR)
        mode = 0o700 if executable else 0o600
        with os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as write:
            while chunk := read.read(_CHUNK_BYTES):
                content.update(chunk)
                write.write(chunk)
    return executable, content.hexdigest()


def _line(relative: str, content: str, *, executable: bool) -> bytes:
    """Return what goes into the digest of a folder for one of its files."""
    return f"{relative}\0{'x' if executable else '-'}\0{content}\n".encode()


def _make_parents(folder: Path, root: Path) -> None:
    if folder != root and not folder.is_dir():
        _make_parents(folder.parent, root)
        folder.mkdir(mode=0o700)


def folder_digest(folder: Path) -> str:
    """
    Return `sha256:…` over relative paths, contents and executable bits of a snapshot's files.

    What a snapshot leaves out does not count, so that Python's caches do not change it.
    """
    total = hashlib.sha256()
    try:
        for relative in _files(folder):
            path = folder / relative
            total.update(_line(relative, sha256(path), executable=_is_executable(path)))
    except OSError as error:
        raise store_error("read the environment in", folder, error) from error
    return f"sha256:{total.hexdigest()}"


def left_out(folder: Path) -> list[str]:
    """Return what a snapshot leaves out for its name, but for hidden files and caches."""
    unseen: list[str] = []
    for _ in _files(folder, unseen=unseen):
        pass
    return [_shown(name) for name in unseen]


def _files(root: Path, folder: str = "", *, unseen: list[str] | None = None) -> Iterator[str]:
    """
    Yield the relative paths of the files that belong to the environment, in a fixed order.

    Those that do not, for what they are named, are added to `unseen`.
    """
    try:
        entries = sorted(os.scandir(root / folder), key=lambda entry: entry.name)
    except OSError as error:
        if error.errno in _NO_FAULT_OF_THE_FOLDER:
            raise store_error("read", root / folder, error) from error
        raise _refused(root, folder, f"cannot be read: {error.strerror or error}") from error
    for entry in entries:
        relative = f"{folder}/{entry.name}" if folder else entry.name
        is_folder = entry.is_dir(follow_symlinks=False)
        if _left_out(entry, is_folder=is_folder):
            told = not is_folder and not entry.name.startswith(".") and entry.name[-4:] != ".pyc"
            if told and unseen is not None:
                unseen.append(relative)
            continue
        if entry.is_symlink():
            raise _refused(root, relative, "is a link", hint="put the file itself there")
        if not is_folder and not entry.is_file(follow_symlinks=False):
            raise _refused(root, relative, "is not a plain file")
        try:
            relative.encode()
        except UnicodeEncodeError as error:
            raise _refused(root, relative, "has a name that is not Unicode") from error
        if is_folder:
            yield from _files(root, relative, unseen=unseen)
        else:
            yield relative


def _left_out(entry: os.DirEntry[str], *, is_folder: bool) -> bool:
    if is_folder:
        hidden = entry.name.startswith(".") or entry.name in _FOLDERS_LEFT_OUT
        return hidden or Path(entry.path, "pyvenv.cfg").exists()
    if entry.name.endswith(".py"):
        return False
    return _FILES_LEFT_OUT.fullmatch(entry.name.lower()) is not None


def _check_size(folder: Path, files: list[str]) -> None:
    sizes: dict[str, int] = {}
    for relative in files:
        top = relative.split("/", 1)[0]
        sizes[top] = sizes.get(top, 0) + (folder / relative).stat().st_size
    total = sum(sizes.values())
    if len(files) <= MOST_FILES and total <= MOST_BYTES:
        return
    raise EnvironmentFault(
        f"{folder} holds {len(files)} files and {_mib(total)} MiB; an environment may hold "
        f"{MOST_FILES} files and {_mib(MOST_BYTES)} MiB",
        hint=f"the largest: {_largest(sizes)}; move what does not belong to it out of the folder",
    )


def _largest(sizes: Mapping[str, int]) -> str:
    largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
    return ", ".join(f"{name} ({_mib(sizes[name])} MiB)" for name in largest)


def _mib(size: int) -> int:
    return round(size / (1 << 20))


def _is_executable(path: Path) -> bool:
    return bool(path.stat().st_mode & stat.S_IXUSR)


def _refused(root: Path, relative: str, reason: str, hint: str | None = None) -> EnvironmentFault:
    return EnvironmentFault(f"{_shown(str(root / relative))} {reason}", hint=hint)


def _shown(name: str) -> str:
    return name.encode(errors="backslashreplace").decode()
