"""`flash train`: from a TOML file to a run, checked before anything starts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from flash.cli.app import App, pass_app
from flash.cli.output import is_terminal, note, out, print_json, table, warn
from flash.cli.progress import duration
from flash.errors import SpecError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flash.estimate import Estimate
    from flash.plan import Plan
    from flash.plane.plane import Plane

JSON_KEYS: Final = {"run": "its id", "state": "as `flash status` has it"}

_FILE = click.Path(path_type=Path)
_NAMED = 8


@click.command()
@click.argument("path", metavar="CONFIG", type=_FILE)
@click.option(
    "--config",
    "overlays",
    metavar="FILE",
    type=_FILE,
    multiple=True,
    help="Lay FILE over CONFIG; of several, later ones win.",
)
@click.option(
    "--set",
    "sets",
    metavar="KEY=VALUE",
    multiple=True,
    help="Set one value, such as train.epochs=2; wins over every file.",
)
@click.option("--dry-run", is_flag=True, help="Show what would run; start nothing.")
@click.option("--yes", is_flag=True, help="Start it, though its estimate is over its budget.")
@click.option("--background", is_flag=True, help="Submit, and do not follow.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, and nothing meanwhile.")
@pass_app
@click.pass_context
def train(  # noqa: PLR0913 - one parameter an option
    ctx: click.Context,
    app: App,
    path: Path,
    overlays: tuple[Path, ...],
    sets: tuple[str, ...],
    *,
    dry_run: bool,
    yes: bool,
    background: bool,
    as_json: bool,
) -> None:
    """
    Train an adapter as CONFIG says.

    CONFIG is checked first, and the environment loaded once; nothing starts while something is
    wrong, or when runs like it tell that it will not keep within its [budget]. Then the run is
    followed. It goes on without this command: Ctrl-C only stops following.
    The exit code is 0 when the run is done, 1 when it ends in any other way.
    """
    from flash.cli.status import go_on
    from flash.config import UserConfig
    from flash.plan import make_plan
    from flash.spec.resolve import resolve
    from flash.spec.secrets import SecretFinder

    defaults = UserConfig.read(app.home.config).defaults
    resolved = resolve(path, overlays=overlays, sets=sets, defaults=defaults, host=app.host)
    plan = make_plan(
        resolved,
        app.host,
        app.home,
        find_run=lambda reference: _plane(app).adapter(reference),
        offline=dry_run,
    )
    if dry_run:
        ctx.exit(_show_plan(app, plan, as_json=as_json))
    spec = plan.check()
    for problem in plan.problems:
        warn(str(problem))
    if not yes and (spec.budget.max_hours, spec.budget.max_usd) != (None, None):
        _keep_within(_estimate(app, plan).over(spec.budget))
    secrets = SecretFinder.beside(resolved.base, app.host).require(plan.secrets)
    plane = _plane(app)
    run = _submit(app, plane, plan, secrets)
    ctx.exit(go_on(plane, run, background=background, as_json=as_json))


def _plane(app: App) -> Plane:
    from flash.plane.plane import Plane  # half of a dry run's time, and most have no use for it

    return Plane(app.home)


def _estimate(app: App, plan: Plan) -> Estimate:
    from flash.estimate import estimate

    return estimate(plan, _plane(app) if app.home.has_runs else None)


def _keep_within(over: str | None) -> None:
    """Refuse a run whose estimate is over its budget, unless a person says to start it."""
    if over is None:
        return
    if not (is_terminal(sys.stdin) and is_terminal(sys.stderr)):
        hint = "--yes starts it all the same, and it is stopped at its limit"
        raise UsageError(over, hint=hint)
    warn(over, hint="it is stopped at its limit, with a checkpoint")
    if not click.confirm("start it all the same?", err=True):
        raise UsageError("nothing was started")


def _show_plan(app: App, plan: Plan, *, as_json: bool) -> int:
    """Print what would run and return the exit code; raises for a plan that would not."""
    from flash.dry_run import dry_run_json, dry_run_rows

    if as_json:
        print_json(dry_run_json(plan, None if plan.errors else _estimate(app, plan)))
        return SpecError(plan.errors).exit_code if plan.errors else 0
    spec, estimate = plan.check(), _estimate(app, plan)
    table(
        ("setting", "value", "from", "why"),
        [(row.path, row.value, row.source, row.reason) for row in dry_run_rows(plan)],
    )
    out()
    if plan.need is not None:
        steps = f"{plan.need.steps} steps, " if plan.need.steps else ""
        out(f"{steps}about {plan.need.memory_gib:.1f} GiB of memory")
    out(_expected(estimate))
    out("nothing was started")
    for problem in plan.problems:
        warn(str(problem))
    over = estimate.over(spec.budget)
    if over is not None:
        warn(over, hint="without --yes it would not be started")
    return 0


def _expected(estimate: Estimate) -> str:
    from flash.estimate import shown

    if estimate.hours is None:
        return estimate.basis
    cost = f", {shown(estimate.usd)} USD" if estimate.usd else ""
    return f"about {duration(estimate.hours * 3600)}{cost}: {estimate.basis}"


def _submit(app: App, plane: Plane, plan: Plan, secrets: Mapping[str, str]) -> str:
    """Load the environment in a process of its own, submit the job, and return its run's id."""
    from flash import foreground
    from flash.environments import left_out
    from flash.job import make_job
    from flash.plane.ids import new_run_id
    from flash.rewards import secrets_of

    located, spec = plan.environment, plan.check()
    if located is None or located.folder is None:
        message = "a plan that was made to be submitted has its environment here"
        raise AssertionError(message)
    unseen = left_out(located.folder)
    if unseen:
        more = f" and {len(unseen) - _NAMED} more" if len(unseen) > _NAMED else ""
        warn(
            f"left out of the run for what they are named: {', '.join(unseen[:_NAMED])}{more}",
            hint="they look like keys; if the environment reads them, give them other names",
        )
    _progress("checking the environment")
    checked = foreground.call(
        "check",
        {
            "environment": foreground.environment_request(
                spec.environment, located, spec.worker_env, spec.reward
            )
        },
        home=app.home,
        secrets={
            name: secrets[name]
            for name in {*spec.environment.secrets, *secrets_of(spec.reward, app.host)}
            if name in secrets
        },
        progress=_progress,
    )
    # What is submitted is what was checked, or is refused.
    job = make_job(plan, app.host, run=new_run_id(), digest=checked["digest"])
    _progress(f"submitting run {job.run}")
    plane.submit(job, environment=located.folder, secrets=secrets)
    return job.run


def _progress(text: str) -> None:
    """Say what takes time, to a person; what else reads stderr gets what matters alone."""
    if is_terminal(sys.stderr):
        note(text)
