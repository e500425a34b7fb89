"""Base models by Hugging Face id, from the local cache or the network, and local folders."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from flash.api import ModelPlugin, hookimpl

if TYPE_CHECKING:
    from flash.api import ModelSource, PluginContext

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9][\w./-]{0,199}", re.ASCII)
_PATH = re.compile(r"(/|~|\.{1,2}/).*", re.DOTALL)
TOKEN = "HF_TOKEN"  # noqa: S105 - the name of a secret, not one


def _claims(model: str) -> bool:
    return bool(_HUB_ID.fullmatch(model) or _PATH.fullmatch(model))


def _claims_adapter(reference: str) -> bool:
    adapter, at, revision = reference.partition("@")
    return bool(_HUB_ID.fullmatch(adapter) and (not at or _REVISION.fullmatch(revision)))


def _make(ctx: PluginContext) -> ModelSource:
    from flash_model_hub.source import HubSource

    return HubSource(token=ctx.secret(TOKEN))


@hookimpl
def flash_register_models() -> list[ModelPlugin]:
    """Return the source for every id that no other plugin has a card for."""
    return [
        ModelPlugin(
            name="hub",
            summary="Any Hugging Face id, cached or downloaded, or a local folder.",
            make=_make,
            claims=_claims,
            claims_adapter=_claims_adapter,
            secrets=(TOKEN,),
        )
    ]
