"""`flash deploy`: an adapter behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import json
import shlex
import sys
import threading
from typing import TYPE_CHECKING, Any, Final

import click

from flash.cli import output
from flash.cli.app import App, pass_app
from flash.cli.deployments import COLOURS, JSON_KEYS, described
from flash.cli.follow import INTERRUPTED
from flash.cli.output import note, out, print_json
from flash.errors import FlashError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from flash.plane.deployments import Deployment, Wish
    from flash.plane.gateway import Gateway
    from flash.plane.serving import Serving

_SHOWN: Final = (
    *("deployment", "run", "step", "model", "backend", "settings", "thinking", "stop"),
    "allow_drift",
)
_PATIENCE_S: Final = 10.0
DRY_RUN_KEYS: Final = {key: JSON_KEYS[key] for key in _SHOWN}


@click.command()
@click.argument("reference", metavar="RUN[/step-N|/final|/best]")
@click.option(
    "--backend",
    metavar="NAME",
    help="Default: the one that the run's config has a [serving.*] table of, or transformers.",
)
@click.option(
    "--set", "sets", metavar="KEY=VALUE", multiple=True, help="Set one value of [serving.NAME]."
)
@click.option("--wait/--no-wait", default=True, help="Wait until it is ready; the default.")
@click.option("--dry-run", is_flag=True, help="Show what would be served; change nothing.")
@click.option("--allow-drift", is_flag=True, help="Serve it though its answers are not as trained.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, and nothing meanwhile.")
@pass_app
@click.pass_context
def deploy(  # noqa: PLR0913 - one parameter an option
    ctx: click.Context,
    app: App,
    reference: str,
    *,
    backend: str | None,
    sets: tuple[str, ...],
    wait: bool,
    dry_run: bool,
    allow_drift: bool,
    as_json: bool,
) -> None:
    """
    Serve an adapter behind an OpenAI-compatible endpoint.

    What is served is a copy of what was saved, on the base model it was trained on, with the chat
    template and the stop sequences of its training. Before it is ready its answers are compared
    with those of the trainer: what differs by more than arithmetic does is not served. It stays
    when this terminal closes, until `flash undeploy`. The exit code is 0 once it is ready, and 1
    where it is not.
    """
    from flash.cli.chat_partner import make_backend
    from flash.plane.plane import Plane
    from flash.plane.serving import Serving

    plane = Plane(app.home)
    serving = Serving(app.home, plane=plane)
    settings = _settings(sets)
    chosen: dict[str, Any] = {
        "backend": backend,
        "settings": settings,
        "allow_drift": allow_drift,
    }
    wish = serving.wish(reference, app.host, **chosen)
    make_backend(app, wish.backend, wish.settings)
    if dry_run:
        plane.saved(reference)
        _show_wish(wish, as_json=as_json)
        return
    deployment = serving.deploy(reference, app.host, **chosen)
    if wait:
        ctx.exit(_wait(serving, deployment, app.home.root / "gateway.key", as_json=as_json))
    if as_json:
        print_json(described(deployment, serving.url()))
    else:
        out(f"{deployment.id} {deployment.state}", fg=COLOURS.get(deployment.state))
        note("flash deployments   shows how it goes")


def _settings(sets: Sequence[str]) -> dict[str, Any]:
    """Return the settings that the command line gives; raises `SpecError`."""
    from flash.errors import SpecError
    from flash.spec.layers import clean, read_set

    found: dict[str, Any] = {}
    for text in sets:
        data, problems = clean(read_set(text))
        if problems:
            raise SpecError(problems)
        found |= data
    return found


def _show_wish(wish: Wish, *, as_json: bool) -> None:
    said = {
        "deployment": wish.id,
        "run": wish.run,
        "step": wish.step,
        "model": wish.model["id"],
        "backend": wish.backend,
        "settings": dict(wish.settings),
        "thinking": wish.thinking,
        "stop": list(wish.stop),
        "allow_drift": wish.allow_drift,
    }
    if as_json:
        print_json(said)
        return
    for key in ("deployment", "model", "backend"):
        out(f"{key:<11} {said[key]}")
    for key, value in wish.settings.items():
        out(f"  {key} = {json.dumps(value)}", dim=True)
    note("nothing was deployed: --dry-run")


def _wait(serving: Serving, deployment: Deployment, key: Path, *, as_json: bool) -> int:
    """Follow a deployment until it is ready or is not to be; return the exit code."""
    found = followed(serving, deployment, silent=as_json)
    if found is None:
        return INTERRUPTED
    if as_json:
        print_json(described(found, serving.url()))
    elif found.generation != deployment.generation:
        note(f"somebody has asked for something else of {found.id} meanwhile")
    elif found.state == "failed":
        error = f"{found.id} is not served: {found.error}"
        return output.fail(FlashError(error, hint=found.hint)) and 1
    elif (gateway := serving.gateway()) is not None:
        _show_ready(found, gateway, key)
    return 0 if found.state == "ready" and found.generation == deployment.generation else 1


def followed(serving: Serving, deployment: Deployment, *, silent: bool) -> Deployment | None:
    """Show the states of a deployment to its end and return it; None where Ctrl-C came first."""
    show: Callable[[Deployment], None] = (lambda _: None) if silent else _show_state()
    patience = threading.Timer(_PATIENCE_S, note, [_patience(serving, deployment)])
    patience.daemon = True
    found = deployment
    try:
        if not silent and output.is_terminal(sys.stderr):
            patience.start()
        for found in serving.follow(deployment):
            show(found)
    except KeyboardInterrupt:
        doing = "undeployed" if deployment.wanted == "gone" else "deployed"
        note(f"detached; {deployment.id} is still being {doing}")
        note("  flash deployments   shows how it goes")
        if deployment.wanted == "served":
            note(f"  flash undeploy {deployment.id}   stops it")
        return None
    finally:
        patience.cancel()
    return found


def _patience(serving: Serving, deployment: Deployment) -> str:
    if deployment.wanted == "gone":
        return "requests under way are answered first"
    return f"its server loads the model, which may take minutes; its log is in {serving.logs}"


def _show_state() -> Callable[[Deployment], None]:
    """Return what prints a line for each state, and one for each thing that goes wrong."""
    seen: list[object] = [None, None]

    def show(deployment: Deployment) -> None:
        if deployment.state != seen[0]:
            out(f"{deployment.id} {deployment.state}", fg=COLOURS.get(deployment.state))
        if deployment.error not in {None, seen[1]} and deployment.state == "deploying":
            output.warn(str(deployment.error), hint=deployment.hint)
        seen[:] = [deployment.state, deployment.error]

    return show


def _show_ready(found: Deployment, gateway: Gateway, key: Path) -> None:
    """Print how to talk to it: the key stays out of every command line."""
    for label, value in (("url", gateway.url), ("model", found.id), ("key", f"in {key}")):
        out(f"  {label:<6} {value}")
    _show_report(found.report or {})
    body = {"model": found.id, "messages": [{"role": "user", "content": "Hello"}]}
    where = shlex.quote(str(key))
    out()
    out(f"  flash chat {found.id}", dim=True)
    out()
    out(f"  sed 's/^/Authorization: Bearer /' {where} | curl -H @- \\", dim=True)
    out(f"    -H 'Content-Type: application/json' {gateway.url}/chat/completions \\", dim=True)
    out(f"    -d '{json.dumps(body)}'", dim=True)
    out()
    out("  from pathlib import Path", dim=True)
    out("  from openai import OpenAI", dim=True)
    out(f"  key = Path({str(key)!r}).read_text().strip()", dim=True)
    out(f'  client = OpenAI(base_url="{gateway.url}", api_key=key)', dim=True)
    messages = '[{"role": "user", "content": "Hello"}]'
    out(
        f'  client.chat.completions.create(model="{found.id}", messages={messages})',
        dim=True,
    )


def _show_report(report: Mapping[str, Any]) -> None:
    """Say how near what is served is to what was trained, beside the noise of the arithmetic."""
    parity = report.get("parity")
    if parity is None:
        if report.get("golden") is False:
            output.warn(
                "whether it is what was trained is not known: it was saved without a golden set",
                hint="adapters of runs from now on have one",
            )
        return
    figures = [parity[key] for key in ("mean", "largest", "noise_mean", "noise_largest")]
    mean, largest, *noise = ["no number" if one is None else f"{one:.1e}" for one in figures]
    out(f"  parity {mean} nats a token from training, {largest} at most")
    out(f"         {noise[0]} and {noise[1]} of the bare base model", dim=True)
    if report.get("drift_allowed"):
        output.warn("that is more than arithmetic explains: --allow-drift serves it nevertheless")
    elif not parity["proves_identity"]:
        note("  the adapter changes too little to be told from another by that")
