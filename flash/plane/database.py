"""
The embedded plane's database: one SQLite file, migrated when it is opened.

Writers take their turn (`BEGIN IMMEDIATE`, 30 s of patience), readers never wait (WAL), and a
commit has reached the disk when it returns (`synchronous = FULL`), so what was submitted survives
a power cut. Every failure is a `StoreError` that names the file; the runs' stores stay as they
are and usable whatever happens to it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from flash.errors import StoreError
from flash.files import store_error
from flash.plane.lock import locked

if TYPE_CHECKING:
    from collections.abc import Iterator

HEAD = "0003"
"""The newest migration, so that opening a database that has it costs no import of Alembic."""

_BUSY_TIMEOUT_S = 30
_THE_DISKS = ("SQLITE_IOERR", "SQLITE_FULL", "SQLITE_CANTOPEN")
_INDEX_BYTES = 1 << 15
_MIGRATIONS = Path(__file__).parent / "migrations"
# What SQLite's messages begin with or contain -> what to do about it.
_HINTS = {
    "full": "free some space; what was committed before is intact",
    "i/o error": "look after the disk; what was committed before is intact",
    "locked": "another process holds it; wait for it, or find it with `lsof`",
    "readonly": "give yourself write access to the file and its folder",
    "unable to open": "give yourself access to the file and its folder",
}

metadata = sa.MetaData()

identity = sa.Table(
    "identity",
    metadata,
    # This plane's name in the keys of what it launches; made once.
    sa.Column("owner", sa.Text, primary_key=True),
)

runs = sa.Table(
    "runs",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("state", sa.Text, nullable=False, index=True),
    # The fence of the attempt that may change this row; 0 before the first.
    sa.Column("fence", sa.Integer, nullable=False, default=0),
    sa.Column("cancel_requested", sa.Boolean, nullable=False, default=False),
    # Not launched before this time: the pause between attempts.
    sa.Column("not_before_s", sa.Float),
    # Why a queued run waits, in a sentence.
    sa.Column("waiting", sa.Text),
    sa.Column("spec", sa.JSON, nullable=False),
    # The submitting shell's variables that name paths, proxies and devices of this machine.
    sa.Column("caller", sa.JSON, nullable=False),
    sa.Column("error", sa.Text),
    sa.Column("hint", sa.Text),
    sa.Column("created_s", sa.Float, nullable=False),
    sa.Column("updated_s", sa.Float, nullable=False),
    sa.Column("finished_s", sa.Float),
    # Grows over all runs with every write to a run or its attempts: what is above the highest
    # that somebody has read is what they have not seen.
    sa.Column("change", sa.Integer, nullable=False, index=True),
    # Attempts up to this number do not count as tries: a person had the run go on after them.
    sa.Column("retries_from", sa.Integer, nullable=False, default=0),
    sa.Column("budget_warned", sa.Boolean, nullable=False, default=False),
)

attempts = sa.Table(
    "attempts",
    metadata,
    # Grows over all runs and is never used twice: a higher fence is a later launch.
    sa.Column("fence", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("run", sa.Text, sa.ForeignKey("runs.id"), nullable=False),
    sa.Column("number", sa.Integer, nullable=False),
    sa.Column("state", sa.Text, nullable=False, index=True),
    sa.Column("provider", sa.Text, nullable=False),
    sa.Column("offer", sa.JSON, nullable=False),
    # What the provider answered to the launch; NULL until it has.
    sa.Column("ref", sa.JSON(none_as_null=True)),
    # The outcome that a stop we asked for will have; written before the provider is asked.
    sa.Column("stopping", sa.Text),
    sa.Column("outcome", sa.Text),
    sa.Column("exit_code", sa.Integer),
    sa.Column("detail", sa.Text),
    sa.Column("started_s", sa.Float, nullable=False),
    # `ended_s - started_s` is how long it worked, whatever the clock did meanwhile.
    sa.Column("ended_s", sa.Float),
    # Which boot of the supervisor's machine it began in, and when on that boot's own clock.
    sa.Column("boot", sa.Text, nullable=False, default=""),
    sa.Column("boot_s", sa.Float, nullable=False, default=0.0),
    # The newest complete checkpoint when it ended.
    sa.Column("step", sa.Integer),
    # What was done about its end, in a sentence.
    sa.Column("then", sa.Text),
    # What its worker said that it spent, beside the provider's price.
    sa.Column("reported_usd", sa.Float, nullable=False, default=0.0),
    sa.UniqueConstraint("run", "number"),
    sqlite_autoincrement=True,
)

# What is to be told outside, written with the change that it tells of.
notices = sa.Table(
    "notices",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("run", sa.Text, sa.ForeignKey("runs.id"), nullable=False, index=True),
    # The run's `[sink.<name>]` that it is for.
    sa.Column("sink", sa.Text, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("data", sa.JSON, nullable=False),
    sa.Column("created_s", sa.Float, nullable=False),
    sa.Column("tries", sa.Integer, nullable=False, default=0),
    # Not sent before; NULL once it was delivered or given up.
    sa.Column("not_before_s", sa.Float, index=True),
    sa.Column("delivered_s", sa.Float),
    sqlite_autoincrement=True,
)

# What is to be served, and how far that is.
deployments = sa.Table(
    "deployments",
    metadata,
    # What clients call the model: `<run>` for its final adapter, or `<run>/step-N`.
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("run", sa.Text, sa.ForeignKey("runs.id"), nullable=False, index=True),
    sa.Column("step", sa.Integer),
    # Of the manifest of what was copied to be served.
    sa.Column("digest", sa.Text, nullable=False),
    sa.Column("model", sa.JSON, nullable=False),
    sa.Column("backend", sa.Text, nullable=False),
    sa.Column("settings", sa.JSON, nullable=False),
    sa.Column("thinking", sa.Boolean, nullable=False),
    sa.Column("stop", sa.JSON, nullable=False),
    sa.Column("allow_drift", sa.Boolean, nullable=False),
    sa.Column("state", sa.Text, nullable=False, index=True),
    # Grows with everything that a person asks of it: who acts for an earlier one changes nothing.
    sa.Column("generation", sa.Integer, nullable=False),
    sa.Column("error", sa.Text),
    sa.Column("hint", sa.Text),
    sa.Column("report", sa.JSON(none_as_null=True)),
    sa.Column("created_s", sa.Float, nullable=False),
    sa.Column("updated_s", sa.Float, nullable=False),
)

gateway_keys = sa.Table(
    "gateway_keys",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    # The key itself is nowhere but with who was given it.
    sa.Column("sha256", sa.Text, nullable=False),
    # Its first characters, by which people know it.
    sa.Column("prefix", sa.Text, nullable=False),
    sa.Column("created_s", sa.Float, nullable=False),
    sa.Column("revoked_s", sa.Float),
)

usage = sa.Table(
    "usage",
    metadata,
    # The request's id, so that it counts once.
    sa.Column("request", sa.Text, primary_key=True),
    sa.Column("time_s", sa.Float, nullable=False, index=True),
    # The model that was asked for: a deployment, or a base model.
    sa.Column("deployment", sa.Text, nullable=False),
    sa.Column("base", sa.Text, nullable=False),
    # The name of the key.
    sa.Column("key", sa.Text, nullable=False),
    sa.Column("prompt_tokens", sa.Integer, nullable=False),
    # Of the prompt's: the server had them from an earlier request.
    sa.Column("cached_tokens", sa.Integer, nullable=False),
    sa.Column("completion_tokens", sa.Integer, nullable=False),
    sa.Column("status", sa.Text, nullable=False),
)


class Database:
    """
    An open database of the newest shape.

    Raises `StoreError` where the file cannot be opened, is damaged, or is of a newer Flash.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        _make_private(path)
        self._engine = sa.create_engine(sa.URL.create("sqlite", database=str(path)))
        sa.event.listen(self._engine, "connect", _on_connect)
        sa.event.listen(self._engine, "begin", _on_begin)
        try:
            if self._revision() != HEAD:
                with locked(path.with_name(f"{path.name}.lock")):
                    self._migrate()
        except BaseException:
            self.close()
            raise
        self._file = path.stat()

    def check_in_place(self) -> None:
        """
        Raise `StoreError` where the file is no longer there, or another one is in its place.

        SQLite goes on with the file that it has open, which nobody else sees any more.
        """
        try:
            in_place = os.path.samestat(self.path.stat(), self._file)
        except FileNotFoundError:
            in_place = False
        except OSError:
            return  # the next transaction says what is wrong
        if not in_place:
            message = f"{self.path} was removed or replaced while it was in use"
            raise StoreError(message, hint="what was submitted since then is in the new one")

    def close(self) -> None:
        """Close every connection; the object is of no use after."""
        self._engine.dispose()

    @contextlib.contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """Give a connection that sees one state of the database."""
        with self._explained(), self._engine.connect() as connection, connection.begin():
            yield connection

    @contextlib.contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """Give a connection of which nobody else writes meanwhile; commits unless it raises."""
        with self._explained(), self._engine.connect() as connection:
            options = connection.execution_options(flash_begin="BEGIN IMMEDIATE")
            with options.begin():
                yield options

    def _revision(self) -> str | None:
        """Return the migration that the file has, or None for an empty file."""
        with self.reading() as connection:
            if not sa.inspect(connection).has_table("alembic_version"):
                return None
            found = connection.scalar(sa.text("SELECT version_num FROM alembic_version"))
            return None if found is None else str(found)

    def _migrate(self) -> None:
        """Bring the file to `HEAD`; the caller holds the lock. All migrations apply, or none."""
        from alembic import command
        from alembic.config import Config
        from alembic.util.exc import CommandError

        # Kept by the file, so once is enough; it cannot be changed inside a transaction.
        with self._explained(), self._engine.connect() as connection:
            raw: Any = connection.connection.dbapi_connection
            raw.execute("PRAGMA journal_mode = WAL")
        config = Config()
        config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
        try:
            with self.writing() as connection:
                config.attributes["connection"] = connection
                command.upgrade(config, "head")
        except CommandError as error:
            found = self._revision()
            raise StoreError(
                f"{self.path} was written by a newer Flash (its migration is {found}; "
                f"this one knows up to {HEAD})",
                hint=f"upgrade flash-core, or {_set_aside(self.path)}",
            ) from error

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sa.exc.IntegrityError:
            raise  # a question of the records, not of the file
        except sa.exc.DatabaseError as error:
            raise self._explain(error) from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            # Of damage that SQLite does not notice: what was written was sound.
            raise self._damaged(error) from error

    def _damaged(self, said: object) -> StoreError:
        hint = f"to start afresh, {_set_aside(self.path)}"
        return StoreError(f"{self.path} is damaged: {said}", hint=hint)

    def _explain(self, error: sa.exc.DatabaseError) -> StoreError:
        said = str(error.orig)
        code = getattr(error.orig, "sqlite_errorname", "")
        if code.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
            return self._damaged(said)
        why = _why(self.path.parent) if code.startswith(_THE_DISKS) else None
        if why is not None:
            return store_error("use", self.path, why)
        hint = next((hint for words, hint in _HINTS.items() if words in said.lower()), None)
        afresh = f"it is not as Flash made it; to start afresh, {_set_aside(self.path)}"
        return StoreError(f"{self.path}: {said}", hint=hint or afresh)


def _why(folder: Path) -> OSError | None:
    """Return what the disk or the system says, which SQLite keeps to itself, or None."""
    try:
        # Not the file itself: to close it would drop SQLite's locks.
        os.close(os.open(folder, os.O_RDONLY))
        found = os.statvfs(folder)
    except OSError as error:
        return error
    # Even reading takes room: for the index of the log, which whoever comes first makes.
    full = found.f_bavail * found.f_frsize < _INDEX_BYTES
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if full else None


def _make_private(path: Path) -> None:
    """
    Make the file for the owner alone where there is none; SQLite's side files take its mode.

    A file that exists is not touched: to close any descriptor of it would drop the locks that
    SQLite holds on it for this process, and another one would take it for abandoned.
    """
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        return
    except OSError as error:
        raise store_error("make", path, error) from error


def _set_aside(path: Path) -> str:
    files = f"{shlex.quote(str(path))}*"
    return (
        f'move it away: for f in {files}; do mv "$f" "$f.old"; done; '
        f"stores, checkpoints and adapters in {path.parent / 'runs'} stay"
    )


def _on_connect(connection: Any, _: object) -> None:
    # Python's sqlite3 would begin transactions by itself, and too late; `_on_begin` does it.
    connection.isolation_level = None
    for pragma in (
        f"busy_timeout = {_BUSY_TIMEOUT_S * 1000}",
        "foreign_keys = ON",
        "synchronous = FULL",
    ):
        connection.execute(f"PRAGMA {pragma}")


def _on_begin(connection: sa.Connection) -> None:
    connection.exec_driver_sql(connection.get_execution_options().get("flash_begin", "BEGIN"))
