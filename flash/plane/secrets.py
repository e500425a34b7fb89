"""
The secret values of runs that may still launch: `secrets/<run>.json`, mode 0600.

Values are here from the submit until the run is final, because a later attempt needs them and
nobody is there to be asked. They are in no other file.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from flash.errors import StoreError
from flash.files import store_error, write_atomic

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    from flash.home import FlashHome


class RunSecrets:
    """The values kept in one home."""

    def __init__(self, home: FlashHome) -> None:
        self._home = home

    def keep(self, run: str, values: Mapping[str, str]) -> None:
        """Write the run's values; nothing is written where there are none."""
        if values:
            write_atomic(self._path(run), json.dumps(dict(values)).encode())

    def values(self, run: str, names: Collection[str]) -> dict[str, str]:
        """Return the values of `names`; `StoreError` where one is not there."""
        try:
            kept = json.loads(self._path(run).read_bytes())
        except FileNotFoundError:
            kept = {}
        except OSError as error:
            raise store_error("read", self._path(run), error) from error
        missing = sorted(set(names) - set(kept))
        if missing:
            raise StoreError(
                f"the values of {', '.join(missing)} are no longer in {self._path(run)}",
                hint="submit the run again",
            )
        return {name: kept[name] for name in names}

    def forget(self, run: str) -> None:
        """Remove the run's values; those that are gone already are gone."""
        self._path(run).unlink(missing_ok=True)

    def left_over(self, live: Collection[str]) -> list[Path]:
        """Return the files that are not the values of one of the `live` runs."""
        names = {f"{run}.json" for run in live}
        return [path for path in self._home.folder("secrets").iterdir() if path.name not in names]

    def sweep(self, live: Collection[str]) -> None:
        """
        Remove what crashes have left: values of runs that are final, or were never added.

        Values are written inside the transaction that adds their run, so what is seen while no
        run can be added and belongs to none is nobody's.
        """
        for path in self.left_over(live):
            path.unlink(missing_ok=True)

    def _path(self, run: str) -> Path:
        return self._home.folder("secrets") / f"{run}.json"
