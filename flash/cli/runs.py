"""`flash runs`: every run, newest first."""

from __future__ import annotations

import time
from typing import Final

import click

from flash.cli.app import App, pass_app
from flash.cli.output import note, print_json, table
from flash.cli.progress import duration

JSON_KEYS: Final = {
    "run": "its id",
    "state": "as `flash status` has it",
    "algorithm": "the training algorithm",
    "model": "the base model",
    "created_s": "when it was submitted, in seconds since 1970",
    "updated_s": "when its record last changed",
    "finished_s": "when it ended, or null",
    "error": "why it failed, or null",
}

COLOURS = {"done": "green", "failed": "red", "cancelled": "yellow", "running": "cyan"}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@pass_app
def runs(app: App, *, as_json: bool) -> None:
    """List the runs, newest first."""
    from flash.plane.plane import Plane

    found = Plane(app.home).runs()
    if as_json:
        print_json(
            [
                {
                    "run": run.id,
                    "state": run.state,
                    "algorithm": run.spec["algorithm"],
                    "model": run.spec["model"],
                    "created_s": run.created_s,
                    "updated_s": run.updated_s,
                    "finished_s": run.finished_s,
                    "error": run.error,
                }
                for run in found
            ]
        )
    elif not found:
        note("there is no run yet; flash train CONFIG starts one")
    else:
        now = time.time()
        table(
            ("run", "state", "algorithm", "model", "age", "took"),
            [
                (
                    run.id,
                    run.state,
                    run.spec["algorithm"],
                    run.spec["model"],
                    duration(now - run.created_s),
                    duration((run.finished_s or now) - run.created_s),
                )
                for run in found
            ],
            right=("age", "took"),
            colours=COLOURS,
        )
