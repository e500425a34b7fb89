"""`flash env`: start an environment, and look at it before anything is trained on it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Final

import click

from flash.cli.app import App, pass_app
from flash.cli.env_test import test
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
    """Start an environment, test it, preview its rows."""


env.add_command(test)


@env.command()
@click.argument("folder", metavar="[DIR]", type=_FILE, default=Path())
@click.option("--multi-turn", is_flag=True, help="The model and the environment take turns.")
def setup(folder: Path, *, multi_turn: bool) -> None:
    """
    Write a small project that trains as it stands, to change into your own.

    It has an environment with a reward, rows to train on and rows held out, a config for SFT and
    one for GRPO, and TRAINING.md, which says how to go on. Nothing is overwritten.
    """
    from flash.workbench.setup import scaffold

    for path in scaffold(folder, multi_turn=multi_turn):
        out(str(path))
    inside = "" if folder == Path() else f"cd {shlex.quote(str(folder))} && "
    note(f"next: {inside}flash env test configs/rl.toml")


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
