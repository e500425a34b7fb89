"""`[gateway]` of `config.toml`: where it listens, what requests may ask, and what tokens cost."""

from __future__ import annotations

import attrs

from flash.fields import setting
from flash.gateway.limits import Limits

PORT = 8808


@attrs.frozen(kw_only=True)
class Price:
    """What a million tokens cost, in US dollars."""

    prompt_usd: float = setting(ge=0, doc="A million tokens of prompts.")
    completion_usd: float = setting(ge=0, doc="A million tokens that were generated.")
    cached_usd: float | None = setting(
        None,
        ge=0,
        doc="A million tokens of prompts that the server had from an earlier request; by default "
        "as much as any others of prompts.",
    )

    def usd(self, *, prompt: int, cached: int, completion: int) -> float:
        """Return what so many tokens cost; `cached` are among those of the prompt."""
        cached_usd = self.prompt_usd if self.cached_usd is None else self.cached_usd
        sums = (prompt - cached) * self.prompt_usd + cached * cached_usd
        return (sums + completion * self.completion_usd) / 1e6


@attrs.frozen(kw_only=True)
class GatewayTable(Limits):
    """The gateway of this home: one address on this machine for all that is deployed."""

    port: int = setting(
        PORT, ge=0, le=65535, doc="Where it listens, on 127.0.0.1; 0 takes any port that is free."
    )
    prices: dict[str, Price] = setting(
        factory=dict,
        doc="What tokens cost, one table for each deployment or base model, by its name: "
        '`[gateway.prices."HuggingFaceTB/SmolLM2-135M-Instruct"]`. That of a deployment goes '
        "before that of its base model. `flash usage` counts with them.",
    )

    def price(self, deployment: str, base: str) -> Price | None:
        """Return what tokens of a deployment cost, or None where nobody has said."""
        return self.prices.get(deployment) or self.prices.get(base)
