"""`flash deployments`: what is served, and how far it is."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

import click

from flash.cli.app import App, pass_app
from flash.cli.output import note, print_json, table, warn
from flash.cli.progress import duration

if TYPE_CHECKING:
    from flash.plane.deployments import Deployment

JSON_KEYS: Final = {
    "deployment": "what clients call the model: `RUN`, or `RUN/step-N`",
    "state": "`deploying`, `ready`, `undeploying`, `undeployed` or `failed`",
    "run": "whose adapter it is",
    "step": "its checkpoint's, or null for the final adapter",
    "model": "the base model",
    "backend": "the plugin that serves it",
    "settings": "every value of that plugin's `[serving.*]` table",
    "thinking": "whether it was trained to think before it answers; it is served alike",
    "stop": "the stop sequences of its training, where a request has none",
    "allow_drift": "whether it is served though it is further from training than it should be",
    "error": "why it failed, or what keeps it from being ready, or null",
    "hint": "what to do about that, or null",
    "report": "how its answers compare with training: what is served is what was trained",
    "created_s": "when it was deployed first, in seconds since 1970",
    "updated_s": "when its record last changed",
    "url": "where the gateway answers, or null while it does not",
}

COLOURS: Final = {"ready": "green", "failed": "red", "deploying": "cyan", "undeploying": "cyan"}


@click.command()
@click.option("--all", "everything", is_flag=True, help="List those that were undeployed too.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@pass_app
def deployments(app: App, *, everything: bool, as_json: bool) -> None:
    """
    List what is deployed.

    What is to be served and is not, because the gateway was killed, is restored.
    """
    from flash.plane.serving import Serving

    serving = Serving(app.home)
    found = [one for one in serving.deployments() if everything or one.state != "undeployed"]
    serving.serve()
    url = serving.url()
    if as_json:
        print_json([described(one, url) for one in found])
        return
    if not found:
        note("nothing is deployed; flash deploy RUN serves an adapter")
        return
    now_s = time.time()
    table(
        ("deployment", "state", "model", "backend", "for"),
        [
            (one.id, one.state, one.model["id"], one.backend, duration(now_s - one.updated_s))
            for one in found
        ],
        right=("for",),
        colours=COLOURS,
    )
    for one in found:
        if one.error is not None:
            warn(f"{one.id}: {one.error}", hint=one.hint)
    if url is not None:
        note(f"the gateway answers at {url}")
    elif any(one.live for one in found):
        said, hint = serving.last_words()
        note(f"the gateway does not answer yet: {said}" if said else "the gateway starts")
        note(hint)


def described(deployment: Deployment, url: str | None) -> dict[str, Any]:
    """Return what `--json` prints of a deployment, where the gateway answers at `url`."""
    said = {
        "deployment": deployment.id,
        "model": deployment.model["id"],
        "stop": list(deployment.stop),
        "url": url,
    }
    return {key: said[key] if key in said else getattr(deployment, key) for key in JSON_KEYS}
