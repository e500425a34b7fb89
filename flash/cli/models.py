"""`flash models`: the base models known here, with their facts, and which are on disk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import attrs
import click

from flash.cli.app import App, pass_app
from flash.cli.output import note, print_json, table, warn
from flash.errors import FlashError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from flash.contracts import ModelSource
    from flash.values import ModelCard

JSON_KEYS: Final = {
    "id": "as the TOML names it",
    "parameters": "how many it has",
    "context_tokens": "the longest text it takes",
    "hidden_size": "of its layers",
    "layers": "how many it has",
    "intermediate_size": "of its feed-forward layers",
    "vocabulary": "tokens it knows",
    "thinking": "reasons `none`, `hybrid` (on request) or `always`",
    "licence": "an SPDX identifier where there is one",
    "memory_note": "what to know of its memory beyond the estimate",
    "summary": "one line about it",
    "source": "the plugin it comes from",
    "on_disk": "whether it is on this machine",
    "folder": "where, or null",
}

_BILLION, _MILLION, _THOUSAND = 10**9, 10**6, 10**3


@attrs.frozen
class Known:
    """A model, the plugin it comes from, and the folder it is in where it is on this machine."""

    card: ModelCard
    source: str
    folder: Path | None


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@pass_app
def models(app: App, *, as_json: bool) -> None:
    """
    List the base models known here.

    These are the models that plugins have cards for, and those downloaded before. Any other
    Hugging Face id, or a folder with a model in it, may be named in the TOML just as well.
    """
    found = list(_known(app))
    if as_json:
        print_json([_as_json(model) for model in found])
    elif not found:
        note("no model is known here; pip install flash-model-smollm2 brings one")
    else:
        table(
            ("id", "source", "parameters", "context", "thinking", "licence", "on disk", "memory"),
            [
                (
                    model.card.id,
                    model.source,
                    _short(model.card.parameters),
                    model.card.context_tokens,
                    model.card.thinking,
                    model.card.licence,
                    "yes" if model.folder else "no",
                    model.card.memory_note,
                )
                for model in found
            ],
            right=("parameters", "context"),
            colours={"yes": "green", "no": "dim"},
        )


def _known(app: App) -> Iterator[Known]:
    """Give the models of each plugin; one that fails is warned of and hides no other."""
    from flash.context import plugin_context
    from flash.plugins import boundary

    for name, record in app.host.all("model").items():
        try:
            with boundary(name, "list its models"):
                # Listing needs no network and so no secrets.
                context = plugin_context(app.home, name, {}, declared=record.secrets)
                source: ModelSource = record.make(context)
                models = [Known(card, name, source.on_disk(card.id)) for card in record.cards]
                models += _downloaded(source, name)
        except FlashError as error:
            warn(error.message, hint=error.hint)
            models = [Known(card, name, None) for card in record.cards]
        yield from models


def _downloaded(source: ModelSource, name: str) -> Iterator[Known]:
    for model in source.downloaded():
        try:
            card = source.card(model)
        except FlashError as error:
            warn(error.message, hint=error.hint)
            continue
        if card is not None:
            yield Known(card, name, source.on_disk(model))


def _as_json(model: Known) -> dict[str, Any]:
    """Return the contract of `flash models --json`; `folder` is null for what is not on disk."""
    return {
        **attrs.asdict(model.card),
        "source": model.source,
        "on_disk": model.folder is not None,
        "folder": str(model.folder) if model.folder else None,
    }


def _short(parameters: int) -> str:
    """Return a number of parameters as people say it: 135M, 1.2B."""
    if parameters >= _BILLION:
        return f"{parameters / _BILLION:.1f}B"
    if parameters >= _MILLION:
        return f"{parameters / _MILLION:.0f}M"
    if parameters >= _THOUSAND:
        return f"{parameters / _THOUSAND:.0f}K"
    return str(parameters)
