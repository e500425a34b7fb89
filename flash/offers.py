"""Where a run would go: the first provider, in the order of the spec, that has room for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

from flash.context import plugin_context
from flash.plugins import boundary
from flash.spec.strict import config_fields
from flash.values import Problem

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from flash.home import FlashHome
    from flash.plugins import PluginHost
    from flash.records import ProviderPlugin
    from flash.values import Need, Offer

# Settings that algorithms call alike, in the order in which lowering them saves memory.
_SAVERS = ("max_length", "batch_size", "lora_rank")


@attrs.frozen
class Found:
    """The offer taken, or what each provider that was asked has at most; `asked_all` of them."""

    offer: Offer | None
    most: Mapping[str, Offer | None]
    asked_all: bool


def find_offer(
    providers: Mapping[str, Any],
    need: Need,
    host: PluginHost,
    home: FlashHome,
    *,
    secret: Callable[[str], str | None],
    offline: bool,
) -> Found:
    """
    Ask the providers in order and take the first offer that fits.

    `offline` leaves out those that need a network to answer. Raises what a provider raises.
    """
    most: dict[str, Offer | None] = {}
    for name, config in providers.items():
        record: ProviderPlugin = host.get("provider", name)
        if offline and not record.capabilities.offline:
            continue
        context = plugin_context(home, name, secret, declared=record.secrets)
        with boundary(name, "offers"):
            provider = record.make(context, config)
            fitting = provider.offers(need)
            if fitting:
                return Found(fitting[0], most, asked_all=True)
            anything = provider.offers(attrs.evolve(need, memory_gib=0.0))
        most[name] = max(anything, key=lambda offer: offer.memory_gib, default=None)
    return Found(None, most, asked_all=len(most) == len(providers))


def no_room(need: Need, most: Mapping[str, Offer | None], config: type) -> Problem:
    """Return the problem of a run that fits nowhere: its need, what there is, what to lower."""
    parts = ", ".join(f"{name} {size:.1f}" for name, size in need.memory_parts_gib.items())
    there = "; ".join(
        f"{name} offers {offer.memory_gib:.1f} GiB" if offer else f"{name} offers nothing now"
        for name, offer in most.items()
    )
    lower = [f"train.{name}" for name in _SAVERS if name in config_fields(config)]
    hint = f"lower {' or '.join(lower)}, or choose a smaller model" if lower else None
    detail = f" ({parts})" if parts else ""
    return Problem("train", f"needs {need.memory_gib:.1f} GiB of memory{detail}; {there}", hint)
