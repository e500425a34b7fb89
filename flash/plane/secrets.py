"""
The secret values of runs that may still launch: `secrets/<run>.json`, mode 0600.

Values are here from the submit until the run is final, because a later attempt needs them and
nobody is there to be asked. Those that its last notices are delivered with stay until they are
(`flash.plane.notices`). They are in no other file.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

from flash.errors import StoreError
from flash.files import store_error, write_atomic
from flash.plane.barrier import barrier

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    from flash.home import FlashHome


class RunSecrets:
    """The values kept in one home."""

    def __init__(self, home: FlashHome) -> None:
        self._home = home

    def keep(self, runs: Mapping[str, Mapping[str, str]]) -> None:
        """
        Write the values of each run, to stay; nothing is written where there are none.

        The runs are being added: until they are, nobody reads what is half written.
        """
        files = {self._path(run): values for run, values in runs.items() if values}
        if not files:
            return
        folder = self._home.folder("secrets")
        try:
            for path, values in files.items():
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
                with os.fdopen(descriptor, "w") as file:
                    json.dump(dict(values), file)
            barrier([*files, folder])
        except OSError as error:
            raise store_error("write secrets to", folder, error) from error

    def values(self, run: str, names: Collection[str]) -> dict[str, str]:
        """Return the values of `names`; `StoreError` where one is not there."""
        kept = self.there_are(run, names)
        missing = sorted(set(names) - set(kept))
        if missing:
            raise StoreError(
                f"the values of {', '.join(missing)} are no longer in {self._path(run)}",
                hint="submit the run again",
            )
        return kept

    def there_are(self, run: str, names: Collection[str]) -> dict[str, str]:
        """Return what values there are of `names`."""
        try:
            kept = json.loads(self._path(run).read_bytes())
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise store_error("read", self._path(run), error) from error
        except ValueError as error:
            message = f"{self._path(run)} is damaged: it holds no secrets that can be read"
            raise StoreError(message, hint="submit the run again") from error
        return {name: kept[name] for name in names if name in kept}

    def keep_only(self, run: str, names: Collection[str]) -> None:
        """Remove all the run's values but those of `names`."""
        kept = self.there_are(run, names)
        if kept:
            self.replace(run, kept)
        else:
            self.forget(run)

    def replace(self, run: str, values: Mapping[str, str]) -> None:
        """Write the values of a run in the place of those there are; a reader sees one or other."""
        if values:
            write_atomic(self._path(run), json.dumps(dict(values)).encode())

    def forget(self, run: str) -> None:
        """Remove the run's values; those that are gone already are gone. Raises `StoreError`."""
        _remove(self._path(run))

    def left_over(self, live: Collection[str]) -> list[Path]:
        """Return the files that are not the values of one of the `live` runs."""
        names = {f"{run}.json" for run in live}
        folder = self._home.folder("secrets")
        try:
            return [path for path in folder.iterdir() if path.name not in names]
        except OSError as error:
            raise store_error("read", folder, error) from error

    def sweep(self, live: Collection[str]) -> None:
        """
        Remove what crashes have left: values of runs that are final, or were never added.

        Values are written inside the transaction that adds their run, so what is seen while no
        run can be added and belongs to none is nobody's.
        """
        for path in self.left_over(live):
            _remove(path)

    def _path(self, run: str) -> Path:
        return self._home.folder("secrets") / f"{run}.json"


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise store_error("remove the secrets in", path, error) from error
