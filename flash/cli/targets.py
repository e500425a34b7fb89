"""
What a TARGET of `flash eval` and `flash chat` names.

A run, a checkpoint, the folder of an adapter, a base model, or a model of a server.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs

from flash.errors import ModelUnavailable, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flash.cli.app import App
    from flash.endpoint import Endpoint
    from flash.plane.plane import Plane

DEFAULT_KEY: Final = "OPENAI_API_KEY"
_CHECKPOINT = re.compile(r"[^/]+/(step-\d+|best|final)")


@attrs.frozen(kw_only=True)
class Target:
    """
    What is evaluated, or talked to.

    Attributes:
        text: as it was given.
        model: id and plugin of the base model; None where a server has the model.
        endpoint: where that server is, without the key.
        adapter: the folder of the adapter, or None.
        run: the run's id, and `step` of its checkpoint; None for what is no run.
        thinking: as the run was trained; None for what was not trained here.
        temperature: that the run sampled at while it was trained, or None.
        environment: the run's own snapshot with its tables, as a foreground task is asked for it.
        reference: what the run calls that environment.
        serving: the `[serving.*]` tables of the run.

    """

    text: str
    model: Mapping[str, str] | None = None
    endpoint: Endpoint | None = None
    adapter: Path | None = None
    run: str | None = None
    step: int | None = None
    thinking: bool | None = None
    temperature: float | None = None
    environment: Mapping[str, Any] | None = None
    reference: str = ""
    serving: Mapping[str, Any] = attrs.field(factory=dict)

    @property
    def kind(self) -> str:
        """What it is, in words."""
        if self.endpoint:
            return "a model of a server"
        if self.run:
            return "a run"
        return "an adapter" if self.adapter else "a base model"

    @property
    def name(self) -> str:
        """What servers call it: a deployment's id, an adapter's folder, a base model's id."""
        if self.run:
            return self.run if self.step is None else f"{self.run}/step-{self.step}"
        if self.adapter:
            return self.adapter.name
        return self.model["id"] if self.model else self.text


def find_target(app: App, text: str) -> Target:
    """Return what `text` names; an id that could be both is a run, if there is such a run."""
    from flash.endpoint import Endpoint, is_endpoint
    from flash.plane.ids import LAST, read_prefix
    from flash.plane.plane import Plane

    if is_endpoint(text):
        endpoint = Endpoint.parse(text)
        return Target(text=text, endpoint=endpoint)
    if text == LAST or _CHECKPOINT.fullmatch(text):
        return _run(Plane(app.home), text)
    if read_prefix(text) is None and not text.isalnum():
        return _no_run(app, text)
    try:
        return _run(Plane(app.home), text)
    except UsageError as no_run:
        try:
            return _no_run(app, text)
        except ModelUnavailable as no_model:
            message = f"{no_run.message}, and {no_model.message}"
            hint = f"`flash runs` lists the runs; {no_model.hint}"
            raise UsageError(message, hint=hint) from None


def _run(plane: Plane, text: str) -> Target:
    from flash.job import Job
    from flash.plane.store import RunStore

    saved = plane.saved(text.removesuffix("/final"))
    run = plane.find(text.partition("/")[0]).id
    store = RunStore(plane.store(run))
    job = Job.from_dict(store.job())
    return Target(
        text=text,
        model=job.model,
        adapter=saved.adapter,
        run=run,
        step=saved.step,
        thinking=job.spec["thinking"],
        temperature=job.spec.get("train", {}).get("temperature"),
        reference=job.environment["reference"],
        environment={
            "plugin": job.environment["plugin"],
            "folder": str(store.path / "environment"),
            **{name: job.spec["environment"][name] for name in ("params", "pip", "split")},
            "secrets": list(job.spec["environment"]["secrets"]),
            "reward": job.spec["reward"],
            "env": job.spec["worker_env"],
        },
        serving=job.spec.get("serving", {}),
    )


def _no_run(app: App, text: str) -> Target:
    """Return the adapter in a folder, or the base model."""
    folder = Path(text).expanduser().absolute()
    if not (folder / "adapter_config.json").is_file():
        return _base_model(app, text)
    from flash.adapters import read_config
    from flash.parity import GoldenSet

    base = _base_model(app, read_config(folder)["base_model_name_or_path"])
    golden = GoldenSet.read(folder)
    thinking = golden.thinking if golden else None
    return attrs.evolve(base, text=text, adapter=folder, thinking=thinking)


def _base_model(app: App, text: str) -> Target:
    from flash.models import choose_model
    from flash.spec.secrets import SecretFinder

    finder = SecretFinder(app.host, [Path.cwd()])
    chosen = choose_model(text, Path.cwd(), app.host, app.home, secret=finder.find, offline=False)
    return Target(text=text, model={"id": chosen.id, "plugin": chosen.plugin})


def wrong_key_name(name: str) -> str | None:
    """Return what is wrong with the name of a key's secret, or None; never repeats a value."""
    from flash.spec.credentials import looks_like_secret, looks_random

    if not name or re.search(r"[\s,=\x00]", name):
        return "must be a name only, without a value"
    if looks_like_secret(name) or looks_random(name):
        return "looks like a key; write the name of the variable that holds it"
    return None


def secrets_for(
    app: App, target: Target, environment: Mapping[str, Any], base: Path, key_from: str | None
) -> dict[str, str]:
    """
    Return the values of the secrets that this evaluation may use; the child deals them out.

    They are looked for beside the environment's config, in `base`, too.
    """
    from flash.rewards import secrets_of
    from flash.spec.secrets import SecretFinder

    finder = SecretFinder.beside(base, app.host)
    optional = {*secrets_of(environment["reward"], app.host)}
    if target.model is not None:
        optional |= {*app.host.get("model", target.model["plugin"]).secrets}
    else:
        optional.add(key_from or DEFAULT_KEY)
    found = finder.require(environment["secrets"], optional)
    if target.endpoint is not None and key_from is not None and key_from not in found:
        hint = "export it, or write it into .env.local or .env here"
        raise UsageError(f"--key-from: {key_from} has no value", hint=hint)
    return found
