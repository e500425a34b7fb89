"""`flash env test`: whether training on an environment can teach what it is meant to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs
import click

from flash.cli.app import App, pass_app
from flash.cli.output import note, out, print_json, table
from flash.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flash.cli.place import Place
    from flash.models import ChosenModel

JSON_KEYS: Final = {
    "verdict": "`PASS`, `WARN` or `FAIL`: that of the worst finding",
    "findings": "what was found, the worst first",
    "rows": "the number of rows of each split",
    "probes": "the mean reward of answers whose worth is known, by their kind",
    "sampled": "what a model did, or null where none was asked",
    "seconds": "how long the tests took",
    "algorithm": "what the environment was tested for",
    "model": "the model that was asked, or null",
}

FINDING_KEYS: Final = {
    "level": "`fail`, `warn` or `note`; a note changes no verdict",
    "check": "the name of the check",
    "message": "what was found, and where",
    "fix": "what to do",
}

SAMPLED_KEYS: Final = {
    "tasks": "how many the model was asked",
    "group_size": "how often it was asked each",
    "max_tokens": "the most tokens of one turn",
    "mean": "of its scores, or null",
    "success": "the share of its answers that succeeded, or null",
    "metrics": "the environment's own metrics by name, each the mean",
    "zero_variance": "the share of tasks whose answers all got the same score, or null",
    "saturated": "the share of tasks whose answers were all as good as the gold one, or null",
    "truncated": "the share of answers that were cut off, or null",
    "errors": "answers without a score",
    "seconds_per_score": "how long scoring took, an answer",
    "tokens_per_s": "how fast the model answered, or null",
}

_ALGORITHM: Final = "grpo"
_FROM_ANSWERS: Final = "sft"
"""The algorithm that learns from gold answers and not from scores."""

_SMALL: Final = 500_000_000
"""Most parameters of a model that is asked though nobody named it."""

_COLOURS: Final = {"fail": "red", "warn": "yellow", "note": "cyan", "PASS": "green"}


@click.command()
@click.argument("path", metavar="[PATH]", type=click.Path(path_type=Path), default=Path())
@click.option("--algorithm", help="What it is for; default: what the config says, or grpo.")
@click.option("--split", help="The split to train on; default: what the config says, or train.")
@click.option(
    "--tasks", type=click.IntRange(min=1), default=8, help="Tasks that are played; default: 8."
)
@click.option("--model", "reference", help="The model to ask; default: a small one that is here.")
@click.option("--no-model", is_flag=True, help="Ask no model.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@pass_app
def test(app: App, /, path: Path, *, as_json: bool, **asked: Any) -> int:
    """
    Say whether an environment can teach what it is meant to.

    PATH is an environment's folder, or a config that names one with its rewards and secrets. The
    environment is loaded as a worker would load it, and given answers whose worth is known: gold,
    wrong and empty ones, the question back. Then a small model answers some tasks.

    Ends with PASS, WARN or FAIL and what to do about each finding; exit code 1 for FAIL.
    """
    from flash import foreground
    from flash.rewards import secrets_of
    from flash.spec.secrets import SecretFinder

    if asked["reference"] and asked["no_model"]:
        raise UsageError("--model and --no-model exclude each other", hint="leave one of them out")
    place = _place(app, path, asked["split"])
    algorithm = asked["algorithm"] or (place.spec.algorithm if place.spec else _ALGORITHM)
    app.host.get("algorithm", algorithm)
    model = None if asked["no_model"] else _model(app, place, asked["reference"])
    spec = place.spec
    request = place.request()
    optional = {*secrets_of(request["reward"], app.host)}
    if model is not None:
        optional |= {*app.host.get("model", model.plugin).secrets}
    found = foreground.call(
        "test",
        {
            "environment": request,
            "model": {"id": model.id, "plugin": model.plugin} if model else None,
            "settings": {
                "algorithm": algorithm,
                "rewarded": algorithm != _FROM_ANSWERS,
                "tasks": asked["tasks"],
                "configured": spec is not None,
            },
            "sampling": {
                "group_size": place.setting("group_size", 8),
                "max_tokens": place.setting("max_tokens", None),
                "max_length": place.setting("max_length", None),
                "temperature": place.setting("temperature", 1.0),
                "top_p": place.setting("top_p", 1.0),
                "thinking": spec.thinking if spec else False,
            },
        },
        home=app.home,
        secrets=SecretFinder.beside(place.base, app.host).require(
            place.table.secrets, sorted(optional)
        ),
        progress=note,
    )
    found |= {"algorithm": algorithm, "model": model.id if model else None}
    if as_json:
        print_json(found)
    else:
        _show(found, asked_none=asked["no_model"])
    return 1 if found["verdict"] == "FAIL" else 0


def _place(app: App, path: Path, split: str | None) -> Place:
    """Return what PATH names, fetched, with the split to train on."""
    from flash.cli.place import Place, place_of_config
    from flash.environments import locate
    from flash.spec.model import EnvironmentTable

    if not path.is_dir():
        place = place_of_config(app, path)
        return attrs.evolve(
            place, table=attrs.evolve(place.table, split=split or place.table.split)
        )
    table = EnvironmentTable(path=str(path.resolve()), split=split or "train")
    located = locate(table, Path.cwd(), app.host, app.home)
    return Place(table=table, located=located, base=path)


def _model(app: App, place: Place, reference: str | None) -> ChosenModel | None:
    """
    Return the model to ask, or None where there is none at hand.

    One that was not named is never downloaded at length: it is the config's where that is on this
    machine, or the smallest that a plugin brings along.
    """
    from flash.models import ChosenModel, choose_model
    from flash.spec.secrets import SecretFinder

    find = SecretFinder.beside(place.base, app.host).find
    if reference is not None:
        return choose_model(reference, Path.cwd(), app.host, app.home, secret=find, offline=False)
    if place.spec is not None:
        wanted, base = place.spec.model, place.base
        own = choose_model(wanted, base, app.host, app.home, secret=find, offline=True)
        if _is_at_hand(app, own):
            return own
    brought = [
        ChosenModel(card.id, plugin, card)
        for plugin, record in app.host.all("model").items()
        for card in record.cards
        if card.parameters <= _SMALL
    ]
    return min(brought, key=lambda one: one.card.parameters if one.card else 0, default=None)


def _is_at_hand(app: App, model: ChosenModel) -> bool:
    """Say whether the model can be had without a long download."""
    from flash.context import plugin_context
    from flash.plugins import boundary

    record = app.host.get("model", model.plugin)
    if model.card in record.cards and model.card is not None and model.card.parameters <= _SMALL:
        return True
    with boundary(model.plugin, "look for the model"):
        source = record.make(plugin_context(app.home, model.plugin, {}, declared=record.secrets))
        return source.on_disk(model.id) is not None


def _show(found: Mapping[str, Any], *, asked_none: bool) -> None:
    """Print the figures, the findings and the verdict."""
    if found["rows"]:
        rows = ", ".join(f"{count} of {split}" for split, count in found["rows"].items())
        out(f"rows: {rows}")
        out()
    if found["probes"]:
        from flash.workbench.probes import HALF_RIGHT, WRONG

        says = {"gold": "the gold answer", **HALF_RIGHT, **WRONG}
        lines = [(says[name], f"{mean:.2f}") for name, mean in found["probes"].items()]
        table(["an answer that says", "earns"], lines, right={"earns"})
        out()
    if found["sampled"]:
        _show_sampled(found["model"], found["sampled"])
    elif not asked_none and found["model"] is None:
        out("no model was asked: there is no small one here; name one with --model", dim=True)
        out()
    for finding in found["findings"]:
        out(f"{finding['level'].upper()} {finding['check']}", fg=_COLOURS[finding["level"]])
        out(f"  {finding['message']}")
        out(f"  fix: {finding['fix']}")
    verdict = found["verdict"]
    colour = _COLOURS.get(verdict) or _COLOURS[verdict.lower()]
    out(f"{verdict} for {found['algorithm']}, in {found['seconds']:.1f} s", fg=colour, bold=True)


def _show_sampled(model: str, sampled: Mapping[str, Any]) -> None:
    out(f"{model}, {sampled['group_size']} answers to each of {sampled['tasks']} tasks:")
    shares = {
        "success": "succeed",
        "zero_variance": "of the tasks have answers that all earn the same",
        "saturated": "of the tasks are solved already",
        "truncated": f"of the answers were cut off at {sampled['max_tokens']} tokens",
    }
    if sampled["mean"] is not None:
        out(f"  they earn {sampled['mean']:.2f} on average")
    for name, words in shares.items():
        if sampled[name] is not None:
            out(f"  {sampled[name]:.0%} {words}")
    out(f"  {1000 * sampled['seconds_per_score']:.1f} ms to score an answer", dim=True)
    out()
