"""`flash eval list`: every evaluation that is kept, newest first."""

from __future__ import annotations

import time
from typing import Final

import click

from flash.cli.app import App, pass_app
from flash.cli.eval import JSON_KEYS as EVALUATION_KEYS
from flash.cli.output import note, print_json, table, warn
from flash.cli.progress import duration

JSON_KEYS: Final = {
    key: meaning for key, meaning in EVALUATION_KEYS.items() if key not in {"rows", "against"}
}


@click.command()
@click.option("--run", metavar="RUN", help="Only those of this run and its checkpoints.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, without the answers.")
@pass_app
def evaluations(app: App, run: str | None, *, as_json: bool) -> None:
    """
    List the evaluations that are kept, newest first.

    `flash compare` says whether one is better than another. They are files in `evals` of
    FLASH_HOME, and yours to delete.
    """
    from flash.evaluations import EvaluationStore

    found, problems = EvaluationStore(app.home).all()
    for problem in problems:
        warn(problem)
    if run is not None:
        from flash.plane.plane import Plane

        wanted = Plane(app.home).find(run).id
        found = [one for one in found if one["run"] == wanted]
    if as_json:
        print_json(found)
    elif not found:
        note("there is no evaluation yet; flash eval TARGET makes one")
    else:
        now = time.time()
        table(
            ("evaluation", "target", "environment", "rows of", "n", "success", "mean", "age"),
            [
                (
                    one["evaluation"],
                    one["target"],
                    f"{one['environment']} {one['digest'].removeprefix('sha256:')[:8]}",
                    one["split"],
                    one["n"],
                    None if one["success"] is None else f"{one['success']:.1%}",
                    None if one["mean"] is None else f"{one['mean']:.3f}",
                    duration(now - one["created_s"]),
                )
                for one in found
            ],
            right=("n", "success", "mean", "age"),
        )
