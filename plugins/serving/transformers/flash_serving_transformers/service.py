"""What the server's routes share: the model under its names, its limits, and whether it works."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, Final

from flash.api import FlashError, UsageError
from flash_serving_transformers.errors import Refused
from flash_serving_transformers.generation import Generation
from flash_serving_transformers.requests import Request

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from flash_serving_transformers.asked import Asked
    from flash_serving_transformers.constraint import Grammar
    from flash_serving_transformers.engine import Engine
    from flash_serving_transformers.language import Language

HANGS_AFTER_S: Final = 120.0
"""An engine that was asked something and has said nothing for so long is not coming back."""

_LOOK_S: Final = 1.0
_SEEDS: Final = 2**63


class Service:
    """One base model, its adapters, and the engine that computes them."""

    def __init__(
        self,
        engine: Engine,
        language: Language,
        *,
        base: str,
        context_tokens: int,
        patience_s: float = HANGS_AFTER_S,
    ) -> None:
        """Serve `base` by its name; health waits `patience_s` for an engine that says nothing."""
        self.engine = engine
        self.language = language
        self.base = base
        self.context_tokens = context_tokens
        self.created = int(time.time())
        self.adapters: set[str] = set()
        self._patience_s = patience_s
        self._beat_s = time.monotonic()
        self._probe: asyncio.Task[None] | None = None
        self._probed_s = 0.0

    def adapter(self, model: str) -> str | None:
        """Return the adapter that a request's model is; None is the base model."""
        if model == self.base:
            return None
        if model not in self.adapters:
            raise Refused(
                f"the model {model!r} is not served here",
                param="model",
                code="model_not_found",
                status=404,
            )
        return model

    def add_adapter(self, name: str, folder: Path) -> None:
        """Serve an adapter as `name` from now on; blocks. Raises `UsageError`."""
        if name == self.base:
            raise UsageError(f"{name} is the base model's own name")
        self.engine.add_adapter(name, folder)
        self.adapters.add(name)

    def remove_adapter(self, name: str) -> None:
        """Take no more requests for an adapter."""
        self.adapters.discard(name)
        self.engine.remove_adapter(name)

    def room(self, prompt: Sequence[int], asked: int | None) -> int:
        """Return how many tokens may follow a prompt; raises `Refused` with the numbers."""
        unknown = self.language.unknown(prompt)
        if unknown is not None:
            raise Refused(f"the model has no token {unknown}", param="prompt")
        room = self.context_tokens - len(prompt)
        if room < max(1 if asked is None else asked, 0):
            wanted = "" if asked is None else f" and {asked} for the answer"
            raise Refused(
                f"this model's context has {self.context_tokens} tokens, and the request needs "
                f"more: {len(prompt)} for the prompt{wanted}",
                param="messages" if asked is None else "max_tokens",
                code="context_length_exceeded",
            )
        return room if asked is None else asked

    def generation(
        self,
        asked: Asked,
        adapter: str | None,
        prompts: Sequence[Sequence[int]],
        *,
        grammar: Grammar | None = None,
    ) -> Generation:
        """Return the choices of a request, `n` of each prompt, in order; not submitted yet."""
        stops, stop = self.language.endings(asked.stop)
        drawn = asked.sampling
        unknown = self.language.unknown(drawn.logit_bias)
        if unknown is not None:
            raise Refused(f"the model has no token {unknown}", param="logit_bias")
        requests = [
            Request(
                tokens=prompt,
                adapter=adapter,
                max_tokens=self.room(prompt, asked.max_tokens),
                temperature=drawn.temperature,
                top_p=drawn.top_p,
                top_k=drawn.top_k,
                min_p=drawn.min_p,
                presence_penalty=drawn.presence_penalty,
                frequency_penalty=drawn.frequency_penalty,
                logit_bias=drawn.logit_bias,
                seed=None if asked.seed is None else (asked.seed + number) % _SEEDS,
                top_logprobs=asked.top,
                stops=stops,
                constraint=None if grammar is None else grammar.constraint(),
            )
            for prompt in prompts
            for number in range(asked.n)
        ]
        return Generation(self.engine, self.language, requests, stop=stop, beat=self.beat)

    def models(self) -> list[dict[str, Any]]:
        """Return what `GET /v1/models` lists."""
        return [
            {
                "id": name,
                "object": "model",
                "created": self.created,
                "owned_by": "flash",
                "root": self.base,
                "parent": None if name == self.base else self.base,
                "max_model_len": self.context_tokens,
            }
            for name in (self.base, *sorted(self.adapters))
        ]

    def beat(self) -> None:
        """Note that the engine has computed something; called in its thread."""
        self._beat_s = time.monotonic()

    async def check(self) -> None:
        """
        Return if the engine computes; raise what is wrong if not.

        It is asked for the log-probability of one token. Where others' work comes first, their
        tokens tell as much.
        """
        if not self.engine.alive:
            raise FlashError("the engine's thread has ended")
        if self._probe is None or (self._probe.done() and self._since_probe() > _LOOK_S):
            self._probed_s = time.monotonic()
            self._probe = asyncio.create_task(asyncio.to_thread(self._ask_engine))
        await asyncio.wait([self._probe], timeout=_LOOK_S)
        if self._probe.done():
            self._probe.result()
        elif min(self._since_probe(), time.monotonic() - self._beat_s) > self._patience_s:
            raise FlashError(f"the engine has computed nothing for {self._patience_s:g} s")

    def _since_probe(self) -> float:
        return time.monotonic() - self._probed_s

    def _ask_engine(self) -> None:
        import torch

        try:
            self.engine.log_probs(None, [0], [0])
        except (torch.OutOfMemoryError, MemoryError):
            return  # the requests that hold the memory will end
        self.beat()
