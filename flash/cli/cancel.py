"""`flash cancel`: stop a run and keep its checkpoints."""

from __future__ import annotations

from typing import Final

import click

from flash.cli.app import App, pass_app
from flash.cli.output import out, print_json

JSON_KEYS: Final = {
    "run": "its id",
    "state": "as it is now; a worker that has to save first is still `running`",
    "cancel_requested": "whether its end is asked for; false where it had ended before",
}


@click.command()
@click.argument("run")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@pass_app
def cancel(app: App, run: str, *, as_json: bool) -> None:
    """
    Stop RUN and keep its checkpoints.

    The worker is asked to save a checkpoint and stop; after ten seconds it is killed with all
    that it started. A run that has ended stays as it is. `flash resume` has a cancelled one go on.
    """
    from flash.cli.story import ended_as
    from flash.plane.plane import Plane

    plane = Plane(app.home)
    before = plane.find(run)
    after = plane.cancel(before.id)
    if as_json:
        print_json(
            {"run": after.id, "state": after.state, "cancel_requested": after.cancel_requested}
        )
    elif before.final:
        last = plane.attempts(before.id)[-1:] if before.state == "failed" else []
        how = "".join(f", attempt {attempt.number} {ended_as(attempt)}" for attempt in last)
        out(f"{before.id} has ended already: {before.state}{how}")
    elif after.final:
        out(f"{after.id} {after.state}")
    else:
        out(f"{after.id} is being stopped; flash status {after.id} --follow shows it end")
