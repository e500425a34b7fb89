"""`flash eval`: the score of a run, a checkpoint or a base model on rows it was not trained on."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs
import click

from flash.cli.app import App, pass_app
from flash.cli.output import note, out, print_json, warn
from flash.errors import FlashError, ModelUnavailable, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flash.plane.plane import Plane

JSON_KEYS: Final = {
    "target": "TARGET as it was given",
    "model": "the base model",
    "n": "rows that were scored",
    "mean": "of their scores, or null where there are none",
    "mean_interval": "its 95 % interval, or null where all scores are equal",
    "success": "the share of rows that succeeded, or null",
    "interval": "its 95 % interval, or null",
    "metrics": "the environment's own metrics by name, each the mean over the rows that have it",
    "errors": "rows that could not be scored, and are in none of the numbers above",
    "truncated": "answers that were cut at `max_tokens`",
    "rows": "every row in order",
    "split": "where they are from",
    "max_tokens": "the most tokens of one turn",
    "tokens": "tokens that were generated",
    "tokens_per_s": "how fast, or null",
    "seconds": "how long it took, loading included",
}

ROW_KEYS: Final = {
    "id": "of the task",
    "input": "of the task",
    "completion": "what the model said, or null",
    "truncated": "whether that was cut",
    "score": "or null where the row could not be scored",
    "success": "whether the environment counts it as one",
    "metrics": "the environment's own metrics by name",
    "reason": "the environment's word on the score, or null",
    "error": "why it could not be scored, or null",
}

_CHECKPOINT = re.compile(r"[^/]+/step-\d+")
_SHOWN_ERRORS = 3


def _finite(_: click.Context, __: click.Parameter, value: float) -> float:
    """Refuse NaN and infinity, which a range lets through."""
    if not math.isfinite(value):
        message = f"{value} is not a finite number."
        raise click.BadParameter(message)
    return value


@attrs.frozen(kw_only=True)
class Target:
    """
    What TARGET names.

    `environment` is the run's own snapshot with its table, as a foreground task is asked for it;
    None for a base model.
    """

    model: Mapping[str, str]
    adapter: Path | None = None
    thinking: bool = False
    environment: Mapping[str, Any] | None = None


@click.command("eval")
@click.argument("target")
@click.option(
    "--environment",
    "reference",
    metavar="REF",
    help="Score on this environment; default: the one the run was trained on, as it was then.",
)
@click.option("--split", help="Rows to score; default: the first split that is not trained on.")
@click.option("-n", "rows", type=click.IntRange(min=1), help="Score only the first so many rows.")
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    help="Most tokens of one turn; default: twice the longest gold answer, or 512.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    callback=_finite,
    help="Default: 0, which is greedy.",
)
@click.option("--seed", type=int, default=0, help="Of the draws above temperature 0; default: 0.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, every row included.")
@pass_app
def eval_(
    app: App, /, target: str, reference: str | None, *, as_json: bool, **settings: Any
) -> None:
    """
    Score TARGET on held-out rows.

    TARGET is a run, a checkpoint (`RUN/step-50`), or a base model, which needs --environment.
    Reports the success rate and the mean score, each with its 95 % interval.
    """
    from flash import foreground
    from flash.rewards import secrets_of
    from flash.spec.secrets import SecretFinder

    found = find_target(app, target)
    environment = _elsewhere(app, reference, found) if reference else found.environment
    if environment is None:
        raise UsageError(
            f"{target} is a base model, so its rows are not known",
            hint="name an environment: --environment FOLDER",
        )
    finder = SecretFinder(app.host, [Path.cwd()])
    result = foreground.call(
        "evaluate",
        {
            "model": found.model,
            "adapter": str(found.adapter) if found.adapter else None,
            "environment": environment,
            "settings": settings | {"thinking": found.thinking},
        },
        home=app.home,
        secrets=finder.require(
            environment["secrets"],
            {
                *app.host.get("model", found.model["plugin"]).secrets,
                *secrets_of(environment["reward"], app.host),
            },
        ),
        progress=note,
    )
    if as_json:
        print_json({"target": target, "model": found.model["id"]} | result)
    else:
        _show(result)
    _complain(result)


def find_target(app: App, text: str) -> Target:
    """Return what `text` names; an id that could be both is a run, if there is such a run."""
    from flash.plane.ids import LAST, read_prefix
    from flash.plane.plane import Plane

    if text == LAST or _CHECKPOINT.fullmatch(text):
        return _run(Plane(app.home), text)
    if read_prefix(text) is None:
        return _base_model(app, text)
    try:
        return _run(Plane(app.home), text)
    except UsageError as no_run:
        try:
            return _base_model(app, text)
        except ModelUnavailable as no_model:
            message = f"{no_run.message}, and {no_model.message}"
            raise UsageError(message, hint=no_model.hint) from None


def _run(plane: Plane, text: str) -> Target:
    from flash.job import Job
    from flash.plane.store import RunStore

    adapter = plane.adapter(text)
    store = RunStore(plane.store(plane.find(text.partition("/")[0]).id))
    job = Job.from_dict(store.job())
    return Target(
        model=job.model,
        adapter=adapter,
        thinking=job.spec["thinking"],
        environment={
            "plugin": job.environment["plugin"],
            "folder": str(store.path / "environment"),
            **{name: job.spec["environment"][name] for name in ("params", "pip", "split")},
            "secrets": list(job.spec["environment"]["secrets"]),
            "reward": job.spec["reward"],
            "env": job.spec["worker_env"],
        },
    )


def _base_model(app: App, text: str) -> Target:
    from flash.models import choose_model
    from flash.spec.secrets import SecretFinder

    finder = SecretFinder(app.host, [Path.cwd()])
    chosen = choose_model(text, Path.cwd(), app.host, app.home, secret=finder.find, offline=False)
    return Target(model={"id": chosen.id, "plugin": chosen.plugin})


def _elsewhere(app: App, reference: str, target: Target) -> dict[str, Any]:
    """Return the environment that --environment names, loaded without params."""
    from flash.environments import locate
    from flash.foreground import environment_request
    from flash.spec.model import EnvironmentTable

    table = EnvironmentTable(id=reference)
    located = locate(table, Path.cwd(), app.host, app.home)
    worker_env = target.environment["env"] if target.environment else {}
    return environment_request(table, located, worker_env)


def _show(result: Mapping[str, Any]) -> None:
    if result["n"]:
        low, high = result["interval"]
        out(
            f"success  {result['success']:.1%}  (95 %: {low:.1%} to {high:.1%})  "
            f"of {result['n']} rows of {result['split']}",
            bold=True,
        )
        between = ""
        if result["mean_interval"]:
            low, high = result["mean_interval"]
            between = f"  (95 %: {low:.3f} to {high:.3f})"
        out(f"mean     {result['mean']:.3f}{between}")
        width = max((len(name) for name in result["metrics"]), default=0)
        for name, value in result["metrics"].items():
            out(f"  {name:<{width}}  {value:.3f}")
    speed = result["tokens_per_s"]
    out(
        f"{result['seconds']:.1f} s" + (f", {speed:.0f} tokens/s sampled" if speed else ""),
        dim=True,
    )


def _complain(result: Mapping[str, Any]) -> None:
    """Say what the numbers leave out; no number at all is a failure."""
    if result["truncated"]:
        warn(
            f"{result['truncated']} answers were cut at {result['max_tokens']} tokens",
            hint="if they should be longer: --max-tokens",
        )
    failures = [row for row in result["rows"] if row["error"]]
    if not result["n"]:
        reason = failures[0]["error"] if failures else "the split has no rows"
        raise FlashError(f"no row could be scored: {reason}")
    if failures:
        shown = "; ".join(f"{row['id']}: {row['error']}" for row in failures[:_SHOWN_ERRORS])
        warn(f"{len(failures)} rows could not be scored and are left out: {shown}")
