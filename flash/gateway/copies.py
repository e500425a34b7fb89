"""The copies of adapters that are served: `deployments/<id>/adapter` in the home."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from flash.files import store_error
from flash.plane.lock import locked

if TYPE_CHECKING:
    from pathlib import Path

    from flash.home import FlashHome
    from flash.plane.deployments import Deployment, Deployments


def adapter_folder(home: FlashHome, name: str) -> Path:
    """Return where the adapter of a deployment is."""
    return home.folder("deployments") / name.replace("/", "@") / "adapter"


def clear(home: FlashHome, deployments: Deployments, row: Deployment) -> bool:
    """Remove a copy that nobody wants, and say so; False where it is wanted again."""
    folder = adapter_folder(home, row.id).parent
    with locked(folder.with_name(f"{folder.name}.lock")):
        found = deployments.get(row.id)
        if found is None or found.generation != row.generation:
            return False
        try:
            if folder.exists():
                shutil.rmtree(folder)
        except OSError as error:
            raise store_error("remove", folder, error) from error
        return deployments.moved(row, "undeployed")
