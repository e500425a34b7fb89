"""`flash checkpoints`: what can be evaluated, deployed, or started from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import click

from flash.cli.app import App, pass_app
from flash.cli.output import note, print_json, table

if TYPE_CHECKING:
    from flash.plane.plane import Plane

JSON_KEYS: Final = {
    "checkpoint": "`RUN/step-N`, as `flash eval` takes it",
    "step": "N",
    "loss": "the held-out loss there, or null where it was not measured",
    "best": "whether that is the lowest of all",
    "last": "whether it is the newest",
    "created_s": "when it was saved, in seconds since 1970",
    "size_bytes": "of all its files",
    "adapter": "the folder of its adapter",
}


@click.command()
@click.argument("run")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@pass_app
def checkpoints(app: App, run: str, *, as_json: bool) -> None:
    """List the complete checkpoints of RUN; `best` has the lowest held-out loss."""
    from flash.plane.plane import Plane

    plane = Plane(app.home)
    record = plane.find(run)
    found = list_checkpoints(plane, record.id)
    if as_json:
        print_json(found)
    elif not found:
        note(f"{record.id} has no complete checkpoint")
    else:
        table(
            ("checkpoint", "held-out loss", "size", ""),
            [
                (
                    item["checkpoint"],
                    "" if item["loss"] is None else f"{item['loss']:.4f}",
                    f"{item['size_bytes'] / 1e6:.1f} MB",
                    " ".join(mark for mark in ("best", "last") if item[mark]),
                )
                for item in found
            ],
            right=("held-out loss", "size"),
        )


def list_checkpoints(plane: Plane, run: str) -> list[dict[str, Any]]:
    """Return the complete checkpoints by step, with the held-out loss where it was measured."""
    found = plane.checkpoints(run)
    losses = {item.step: item.metrics["eval_loss"] for item in found if "eval_loss" in item.metrics}
    best = min(losses, key=lambda step: losses[step], default=None)
    return [
        {
            "checkpoint": f"{run}/step-{item.step}",
            "step": item.step,
            "loss": losses.get(item.step),
            "best": item.step == best and best is not None,
            "last": item is found[-1],
            "created_s": item.created_s,
            "size_bytes": item.size_bytes,
            "adapter": str(item.adapter),
        }
        for item in found
    ]
