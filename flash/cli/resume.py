"""`flash resume`: have a run go on that failed or was cancelled."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import click

from flash.cli.app import App, pass_app
from flash.cli.output import note

JSON_KEYS: Final = {"run": "its id", "state": "as `flash status` has it"}


@click.command()
@click.argument("run")
@click.option("--max-hours", type=float, metavar="H", help="Set budget.max_hours to H.")
@click.option("--max-usd", type=float, metavar="U", help="Set budget.max_usd to U.")
@click.option("--background", is_flag=True, help="Do not follow.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, and nothing meanwhile.")
@pass_app
@click.pass_context
def resume(  # noqa: PLR0913 - one parameter an option
    ctx: click.Context,
    app: App,
    run: str,
    *,
    max_hours: float | None,
    max_usd: float | None,
    background: bool,
    as_json: bool,
) -> None:
    """
    Have RUN go on from its newest checkpoint.

    RUN has failed or was cancelled. It keeps its id and gets a new attempt; what was tried before
    counts as no try any more. Its job is frozen: only the limits of its budget can be changed, and
    any other change is a new run (`flash train`). The values of its secrets were forgotten when it
    ended, and are looked for again in the environment and in .env. The exit code is that of
    `flash train`.
    """
    from flash.cli.status import go_on
    from flash.cost import raised, spent
    from flash.plane.plane import Plane, check_resumable
    from flash.spec.secrets import SecretFinder

    plane = Plane(app.home)
    record = plane.find(run)
    check_resumable(record)
    attempts = plane.attempts(record.id)
    budget = raised(
        record.spec.get("budget", {}),
        spent(attempts, live_s=0.0),
        {"max_hours": max_hours, "max_usd": max_usd},
    )
    plane.resume(record.id, secrets=SecretFinder(app.host, [Path.cwd()]).require, budget=budget)
    saved, known = plane.checkpoints(record.id), len(attempts)
    if not as_json:
        start = f"step {saved[-1].step}" if saved else "the start: it had saved no checkpoint"
        note(f"{record.id} goes on from {start}, as attempt {known + 1}")
    ctx.exit(go_on(plane, record.id, background=background, as_json=as_json, known=known))
