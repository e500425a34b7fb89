"""`flash undeploy`: serve an adapter no more."""

from __future__ import annotations

import click

from flash.cli.app import App, pass_app
from flash.cli.deploy import followed
from flash.cli.deployments import described
from flash.cli.follow import INTERRUPTED
from flash.cli.output import note, out, print_json


@click.command()
@click.argument("reference", metavar="RUN[/step-N|/final|/best]")
@click.option("--wait/--no-wait", default=True, help="Wait until it is gone; the default.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, and nothing meanwhile.")
@pass_app
@click.pass_context
def undeploy(ctx: click.Context, app: App, reference: str, *, wait: bool, as_json: bool) -> None:
    """
    Serve an adapter no more.

    Requests under way are answered first. The run and its checkpoints stay as they are. What is
    undeployed already stays that.
    """
    from flash.plane.serving import Serving

    serving = Serving(app.home)
    found = serving.undeploy(reference)
    if wait:
        end = followed(serving, found, silent=as_json)
        if end is None:
            ctx.exit(INTERRUPTED)
        if end.generation != found.generation:
            note(f"somebody has asked for something else of {end.id} meanwhile")
        found = end
    elif not as_json:
        out(f"{found.id} {found.state}")
    if as_json:
        print_json(described(found, serving.url()))
    ctx.exit(0 if found.wanted == "gone" else 1)
