"""`flash export`: an adapter as files for elsewhere, proven to be what was trained."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from flash.cli.app import App, pass_app
from flash.cli.output import note, out, print_json, warn
from flash.errors import StoreError, UsageError
from flash.processes import is_alive

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from flash.cli.targets import Target
    from flash.worker.checkpoints import Checkpoint

_HUB: Final = "hf:"
_REPOSITORY: Final = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_PARTIAL: Final = ".partial"
_FORMATS: Final = ("peft", "merged", "gguf")

JSON_KEYS: Final = {
    "run": "the run's id",
    "step": "of the checkpoint, or null for the final adapter",
    "format": "`peft`, `merged` or `gguf`",
    "base": "the base model's id",
    "path": "the folder that was written, or null where it was uploaded",
    "repository": "`owner/name` on the hub, or null",
    "url": "of the repository, or null",
    "files": "name and size in bytes of each file",
    "golden": "whether the adapter has a golden set to be held against; null for `peft`",
    "parity": "`mean` and `largest` difference in nats a token, the same of the bare base model "
    "(`noise_mean`, `noise_largest`), the limits, `holds` and `proves_identity`; null where "
    "nothing was compared",
    "drift_allowed": "whether it is over the limits, and `--allow-drift` kept it",
    "seconds": "how long it took",
}


@click.command()
@click.argument("run")
@click.option(
    "--format",
    "format_",
    type=click.Choice(_FORMATS),
    default="peft",
    show_default=True,
    help="The adapter as it is; merged into its base model; or that as one file for llama.cpp.",
)
@click.option(
    "--to",
    metavar="DIR|hf:OWNER/NAME",
    help="A folder that is new or empty, or a repository of the hub; default: ./RUN-FORMAT.",
)
@click.option("--public", is_flag=True, help="Let everybody read the repository.")
@click.option(
    "--allow-drift",
    is_flag=True,
    help="Keep what is further from what was trained than its type explains.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@pass_app
def export(  # noqa: PLR0913 - its options
    app: App,
    run: str,
    format_: str,
    to: str | None,
    *,
    public: bool,
    allow_drift: bool,
    as_json: bool,
) -> None:
    """
    Write the adapter of RUN, or of a checkpoint of it (`RUN/step-50`, `RUN/best`), for elsewhere.

    What is merged is loaded again and compared with what was trained; if it is another model, there
    is an error and nothing is left of it.
    """
    from flash.cli.targets import find_target
    from flash.plane.plane import Plane

    started_s = time.monotonic()
    target = find_target(app, run)
    if not target.run or target.adapter is None:
        raise UsageError(f"{run} is {target.kind}, and what is exported is a run's adapter")
    _, saved = Plane(app.home).named(run)
    name = target.name.replace("/", "-")
    place = Place.of(to or f"./{name}-{format_}", public=public)
    hub = _hub(app, place)
    try:
        with _stage(place.stage(name)) as stage:
            if format_ == "peft":
                made = _copy(saved, stage, public=place.public)
            else:
                made = _made(app, target, format_, stage, allow_drift=allow_drift)
            files = {
                path.relative_to(stage).as_posix(): path.stat().st_size
                for path in sorted(stage.rglob("*"))
                if path.is_file()
            }
            url = hub.upload(stage, f"{format_} of {target.name}") if hub else None
            if place.folder is not None:
                _move(stage, place.folder)
    except OSError as error:
        message = f"{place} cannot be written: {error.strerror or error}"
        raise StoreError(message, hint="mend that, or name another place with --to") from error
    result = {
        "run": target.run,
        "step": target.step,
        "format": format_,
        "base": target.model and target.model["id"],
        "path": str(place.folder) if place.folder else None,
        "repository": place.repository,
        "url": url,
        "files": files,
        **made,
        "seconds": time.monotonic() - started_s,
    }
    _complain(result)
    if as_json:
        print_json(result)
    else:
        _show(result)


class Place:
    """Where an export goes: a folder, or a repository."""

    def __init__(self, *, folder: Path | None, repository: str | None, public: bool) -> None:
        self.folder = folder
        self.repository = repository
        self.public = public

    def __str__(self) -> str:
        return str(self.folder or self.repository)

    @classmethod
    def of(cls, text: str, *, public: bool) -> Place:
        """Read what the user wrote; raises `UsageError` where nothing may be written there."""
        if text.startswith(_HUB):
            repository = text.removeprefix(_HUB)
            if not _REPOSITORY.fullmatch(repository) or ".." in repository:
                raise UsageError(f"--to {text} names no repository", hint="as hf:owner/name")
            return cls(folder=None, repository=repository, public=public)
        if public:
            raise UsageError("--public is for a repository of the hub", hint="--to hf:owner/name")
        folder = Path(text).expanduser().absolute()
        try:
            taken = (
                folder.is_symlink()
                or folder.is_file()
                or (folder.exists() and any(folder.iterdir()))
            )
        except OSError as error:
            raise UsageError(f"--to {folder}: {error.strerror or error}") from error
        if taken:
            raise UsageError(
                f"{folder} is there already, and nothing is overwritten",
                hint="name a folder that is new or empty with --to",
            )
        if not folder.parent.is_dir():
            raise UsageError(f"there is no folder {folder.parent}", hint="make it, or name another")
        return cls(folder=folder, repository=None, public=public)

    def stage(self, name: str) -> Path:
        """Return where it is made: beside its place, so that it comes there by a rename."""
        own = f"{os.getpid()}{_PARTIAL}"
        if self.folder is not None:
            return self.folder.with_name(f".{self.folder.name}.{own}")
        import tempfile

        return Path(tempfile.gettempdir()) / f"flash-{name}.{own}"


@contextlib.contextmanager
def _stage(folder: Path) -> Iterator[Path]:
    """Make the folder and hold it; it is gone in the end, and so are those of killed exports."""
    _sweep(folder)
    with contextlib.ExitStack() as ends:
        ends.callback(shutil.rmtree, folder, ignore_errors=True)
        folder.mkdir()
        held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        ends.callback(os.close, held)
        with contextlib.suppress(OSError):  # a disk without locks, of which nothing is swept
            fcntl.flock(held, fcntl.LOCK_SH)
        yield folder


def _sweep(stage: Path) -> None:
    """Remove what exports to the same place have left that were killed."""
    prefix = stage.name.removesuffix(f"{os.getpid()}{_PARTIAL}")
    wanted = re.compile(rf"{re.escape(prefix)}([1-9]\d{{0,9}}){re.escape(_PARTIAL)}")
    for path in stage.parent.iterdir():
        of = wanted.fullmatch(path.name)
        if of and not is_alive(int(of[1])) and _is_left(path):
            shutil.rmtree(path, ignore_errors=True)


def _is_left(folder: Path) -> bool:
    """Say whether a folder is ours and nobody holds it, on another machine or in a container."""
    try:
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.fstat(opened).st_uid == os.geteuid()
    except OSError:
        return False
    finally:
        os.close(opened)


def _hub(app: App, place: Place) -> Any:
    """Return the repository of a place, found to be writable; None for a folder."""
    if place.repository is None:
        return None
    from flash.hub_upload import HubRepository
    from flash.spec.secrets import SecretFinder

    token = SecretFinder(app.host, [Path.cwd()]).find("HF_TOKEN")
    if token is None:
        raise UsageError(
            f"to write to {place.repository} takes a token, and HF_TOKEN has no value",
            hint="export HF_TOKEN, or write it into .env here",
        )
    repository = HubRepository(place.repository, token, public=place.public)
    repository.check()
    return repository


def _copy(saved: Checkpoint, stage: Path, *, public: bool) -> dict[str, Any]:
    """
    Copy the adapter's files, each compared with the manifest once it is there.

    What is for everybody to read has no golden set, which holds rows of the training data.
    """
    from flash import parity
    from flash.adapters import read_adapter
    from flash.files import sha256
    from flash.worker.checkpoints import adapter_files

    for name, entry in adapter_files(saved).items():
        if public and name == parity.NAME:
            continue
        (stage / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(saved.adapter / name, stage / name)
        if sha256(stage / name) != entry["sha256"]:
            raise StoreError(
                f"{saved.adapter / name} is damaged: it is not what the manifest says was saved",
                hint="take another: flash checkpoints lists them",
            )
    read_adapter(stage)
    return {"golden": None, "parity": None, "drift_allowed": False}


def _made(
    app: App, target: Target, format_: str, stage: Path, *, allow_drift: bool
) -> dict[str, Any]:
    """Have a child process write the model: this one imports neither torch nor transformers."""
    from flash.foreground import call
    from flash.spec.secrets import SecretFinder

    assert target.model is not None  # noqa: S101 - a run has one
    if format_ == "gguf":
        note("a file for llama.cpp takes its converter and its library, which are made once")
    names = app.host.get("model", target.model["plugin"]).secrets
    return call(
        "export",
        {
            "format": format_,
            "model": dict(target.model),
            "adapter": str(target.adapter),
            "target": str(stage),
            "file": f"{target.name.replace('/', '-')}.gguf",
            "tools": str(app.home.folder("tools")),
            "allow_drift": allow_drift,
        },
        home=app.home,
        secrets=SecretFinder(app.host, [Path.cwd()]).require([], names),
        progress=note,
    )


def _move(stage: Path, folder: Path) -> None:
    """Put what was made in its place; an empty folder that is there gives way."""
    if folder.exists():
        folder.rmdir()
    stage.rename(folder)


def _complain(result: Mapping[str, Any]) -> None:
    if result["golden"] is False:
        warn(
            "the adapter has no golden set, so nobody has compared this with what was trained",
            hint="adapters that this version of Flash saves have one",
        )
    parity = result["parity"]
    if result["drift_allowed"]:
        warn("it is another model than what was trained, by more than its type explains")
    elif parity and not parity["proves_identity"]:
        warn("the adapter changes too little for it to be told from the bare base model")


def _show(result: Mapping[str, Any]) -> None:
    size = sum(result["files"].values())
    files = "1 file" if len(result["files"]) == 1 else f"{len(result['files'])} files"
    out(f"{result['path'] or result['url']}  {files}, {size / 1e6:.1f} MB")
    if parity := result["parity"]:
        out(
            f"off by {parity['mean']:.2g} nats a token from what was trained, at most "
            f"{parity['largest']:.2g}; the bare base model in its type by "
            f"{parity['noise_mean']:.2g}, at most {parity['noise_largest']:.2g}",
            dim=True,
        )
