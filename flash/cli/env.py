"""`flash env`: look at an environment before anything is trained on it."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import click

from flash.cli.app import App, pass_app
from flash.cli.output import marked, note, out, print_json, warn

JSON_KEYS: Final = {
    "row": "where it is from",
    "tokens": "how many it has",
    "trained": "how many of them carry the loss",
    "pieces": "its text in order, as `[text, carries the loss]`",
}

_FILE = click.Path(path_type=Path)


@click.group()
def env() -> None:
    """Look at an environment: preview its rows."""


@env.command()
@click.argument("path", metavar="CONFIG", type=_FILE)
@click.option("-n", "count", type=click.IntRange(min=1), default=3, help="Rows; default: 3.")
@click.option("--split", help="Default: the split that CONFIG trains on.")
@click.option(
    "--config", "overlays", metavar="FILE", type=_FILE, multiple=True, help="Lay FILE over CONFIG."
)
@click.option("--set", "sets", metavar="KEY=VALUE", multiple=True, help="Set one value of CONFIG.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@pass_app
def preview(  # noqa: PLR0913 - one parameter an option
    app: App,
    path: Path,
    count: int,
    split: str | None,
    overlays: tuple[Path, ...],
    sets: tuple[str, ...],
    *,
    as_json: bool,
) -> None:
    """
    Show some rows as the model will see them.

    The tokens that carry the loss are coloured, or stand in ⟦ ⟧ where there is no colour.
    """
    from flash import foreground
    from flash.plan import make_plan
    from flash.spec.resolve import resolve
    from flash.spec.secrets import SecretFinder

    def find_run(reference: str) -> Path:
        from flash.plane.plane import Plane  # heavy, and most configs name no run

        return Plane(app.home).adapter(reference)

    resolved = resolve(path, overlays=overlays, sets=sets, host=app.host)
    plan = make_plan(resolved, app.host, app.home, find_run=find_run)
    spec = plan.check()
    for problem in plan.problems:
        warn(str(problem))
    assert plan.environment is not None  # noqa: S101 - a plan without errors has both
    assert plan.model is not None  # noqa: S101
    finder = SecretFinder.beside(resolved.base, app.host)
    shown = foreground.call(
        "preview",
        {
            "environment": foreground.environment_request(
                spec.environment, plan.environment, spec.worker_env
            ),
            "model": {"id": plan.model.id, "plugin": plan.model.plugin},
            "split": split or spec.environment.split,
            "thinking": spec.thinking,
            "count": count,
        },
        home=app.home,
        secrets=finder.require(
            spec.environment.secrets, app.host.get("model", plan.model.plugin).secrets
        ),
        progress=note,
    )
    if shown["refusal"]:
        warn(f"training would refuse these rows: {shown['refusal']}")
    if as_json:
        print_json(shown["rows"])
        return
    for row in shown["rows"]:
        out(f"{row['row']}: {row['tokens']} tokens, {row['trained']} trained", bold=True)
        marked(row["pieces"])
        out()
