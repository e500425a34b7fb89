"""`flash gc`: free the disk of what nobody needs, and of runs that a person does not want."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final

import click

from flash.cli.app import App, pass_app
from flash.cli.output import is_terminal, note, out, print_json, table, warn
from flash.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flash.plane.garbage import Garbage, Item, Kept

_DAY_S: Final = 24 * 3600.0

JSON_KEYS: Final = {
    "items": "what can go: `kind`, `run` or null, `paths`, `why`, `size_bytes` and whether it was "
    "`removed`",
    "kept": "what stays, though it was asked for or is of no use: `what`, and `why`",
    "freed_bytes": "what was freed of the disk; 0 with `--dry-run`",
}


@click.command()
@click.argument("runs", metavar="[RUN]...", nargs=-1)
@click.option(
    "--older-than",
    type=click.FloatRange(min=0),
    metavar="DAYS",
    help="Remove runs too, with all of them, that ended so many days ago.",
)
@click.option("--rollouts", is_flag=True, help="Remove the rollouts of runs that have ended too.")
@click.option("--logs", is_flag=True, help="Remove the workers' logs of runs that have ended too.")
@click.option("--dry-run", is_flag=True, help="Show what would go; remove nothing.")
@click.option("--yes", is_flag=True, help="Remove without asking.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON; needs --yes or --dry-run.")
@pass_app
@click.pass_context
def gc(  # noqa: PLR0913 - one parameter an option
    ctx: click.Context,
    app: App,
    runs: tuple[str, ...],
    *,
    older_than: float | None,
    rollouts: bool,
    logs: bool,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """
    Show what can be removed, ask, and remove it.

    That is what no run needs: the resume state of runs that are done (every adapter stays), what
    was left by something that was cut short, adapters that were downloaded and no run starts
    from, packages and environments that were not used for 30 days. With RUN, it is these runs,
    whole, and nothing else.
    Nothing of a run that has not ended is touched. With --older-than, a run stays that another
    one was trained from, or that has an evaluation that is kept.
    """
    from flash.plane.garbage import Garbage, Rules
    from flash.plane.plane import Plane

    if runs and (rollouts or logs or older_than is not None):
        message = "a RUN that is named is removed with all of it"
        raise UsageError(message, hint="name runs, or use --older-than, --rollouts and --logs")
    asks = not (yes or dry_run)
    if asks and as_json:
        message = "--json prints nothing to be asked about"
        raise UsageError(message, hint="add --dry-run to look, or --yes to remove")
    plane = Plane(app.home)
    garbage = Garbage(app.home)
    items, kept = garbage.find(
        Rules(
            runs=[plane.find(run).id for run in runs],
            older_than_s=None if older_than is None else older_than * _DAY_S,
            rollouts=rollouts,
            logs=logs,
        )
    )
    if not as_json:
        _show(items, kept)
    removed: list[Item] = []
    stayed: list[Kept] = []
    if items and not dry_run and (yes or _agreed(items)):
        stayed = _remove(garbage, items, removed)
        if not as_json:
            out(f"freed {_size(sum(item.size_bytes for item in removed))}")
    if as_json:
        print_json(_described(items, [*kept, *stayed], removed))
    for one in stayed:
        warn(f"{one.what} stays: {one.why}")
    ctx.exit(1 if stayed else 0)


def _show(items: Sequence[Item], kept: Sequence[Kept]) -> None:
    for one in kept:
        note(f"{one.what} stays: {one.why}")
    if not items:
        note("there is nothing to remove")
        return
    table(
        ("kind", "of", "size", ""),
        [(item.kind, _of(item), _size(item.size_bytes), item.why) for item in items],
        right=("size",),
    )
    out(f"{_size(sum(item.size_bytes for item in items))} in all")


def _of(item: Item) -> str:
    """Return the run, or the names of what goes."""
    if item.run is not None:
        return item.run
    more = f" and {len(item.paths) - 1} more" if len(item.paths) > 1 else ""
    return f"{item.paths[0].name}{more}"


def _agreed(items: Sequence[Item]) -> bool:
    if not (is_terminal(sys.stdin) and is_terminal(sys.stderr)):
        message = "nothing was removed: there is no terminal to ask in"
        raise UsageError(message, hint="--yes removes what is shown, --dry-run only shows it")
    # Whole runs are the one thing here that cannot be made again.
    count = len([item for item in items if item.kind == "run"])
    runs = f", {count} {'run' if count == 1 else 'runs'} for good" if count else ""
    agreed: bool = click.confirm(f"remove all of this{runs}?", err=True)
    if not agreed:
        note("nothing was removed")
    return agreed


def _remove(garbage: Garbage, items: Sequence[Item], removed: list[Item]) -> list[Kept]:
    try:
        return garbage.remove(items, removed.append)
    except KeyboardInterrupt:
        freed = _size(sum(item.size_bytes for item in removed))
        note(f"freed {freed}; the next flash gc finds what is left")
        raise


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.1f} MB"  # noqa: PLR2004 - 1 GB


def _described(
    items: Sequence[Item], kept: Sequence[Kept], removed: Sequence[Item]
) -> dict[str, Any]:
    """Return what `--json` prints."""
    return {
        "items": [
            {
                "kind": item.kind,
                "run": item.run,
                "paths": [str(path) for path in item.paths],
                "why": item.why,
                "size_bytes": item.size_bytes,
                "removed": item in removed,
            }
            for item in items
        ],
        "kept": [{"what": one.what, "why": one.why} for one in kept],
        "freed_bytes": sum(item.size_bytes for item in removed),
    }
