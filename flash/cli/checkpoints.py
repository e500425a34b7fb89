"""`flash checkpoints`: what can be evaluated, deployed, or started from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import click

from flash.cli.app import App, pass_app
from flash.cli.output import note, print_json, table
from flash.cli.progress import Progress, measure_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flash.worker.checkpoints import Checkpoint

JSON_KEYS: Final = {
    "checkpoint": "`RUN/step-N`, as `flash eval` takes it; `RUN/best` is the best of them",
    "step": "N",
    "loss": "the held-out loss there, or null where it was not measured",
    "reward": "the mean reward on held-out tasks there, or null where it was not measured",
    "best": "whether that is the highest reward of all, or the lowest loss, and better than before "
    "training",
    "last": "whether it is the newest",
    "resumable": "whether the run can go on from there; of older ones only the adapter stays",
    "created_s": "when it was saved, in seconds since 1970",
    "size_bytes": "of all its files",
    "adapter": "the folder of its adapter",
}


@click.command()
@click.argument("run")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@pass_app
def checkpoints(app: App, run: str, *, as_json: bool) -> None:
    """
    List the complete checkpoints of RUN.

    `best` has the highest held-out reward, or the lowest held-out loss of a run without rewards;
    none is, where that was no worse before training.
    """
    from flash.plane.plane import Plane
    from flash.worker.checkpoints import HELD_OUT, best_of

    plane = Plane(app.home)
    record = plane.find(run)
    saved = plane.checkpoints(record.id)
    measure = measure_of(name.removeprefix(HELD_OUT) for one in saved for name in one.metrics)
    progress = Progress()
    progress.take(plane.events(record.id))
    start = progress.evaluations.get(0, {})
    found = _described(record.id, saved, best_of(saved, before=start))
    if as_json:
        print_json(found)
    elif not found:
        note(f"{record.id} has no complete checkpoint")
    else:
        title = f"held-out {measure.name}"
        table(
            ("checkpoint", title, "size", ""),
            [
                (
                    item["checkpoint"],
                    "" if item[measure.name] is None else measure.form.format(item[measure.name]),
                    f"{item['size_bytes'] / 1e6:.1f} MB",
                    " ".join(mark for mark in ("best", "last") if item[mark]),
                )
                for item in found
            ],
            right=(title, "size"),
        )
        before = start.get(measure.name)
        if before is not None and not any(item["best"] for item in found):
            note(f"none is better than before training: {title} {measure.form.format(before)}")


def _described(
    run: str, saved: Sequence[Checkpoint], best: Checkpoint | None
) -> list[dict[str, Any]]:
    """Return what `--json` prints."""
    return [
        {
            "checkpoint": f"{run}/step-{one.step}",
            "step": one.step,
            "loss": one.metrics.get("eval_loss"),
            "reward": one.metrics.get("eval_reward"),
            "best": one is best,
            "last": one is saved[-1],
            "resumable": one.resumable,
            "created_s": one.created_s,
            "size_bytes": one.size_bytes,
            "adapter": str(one.adapter),
        }
        for one in saved
    ]
