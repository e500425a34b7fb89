"""The backend: starts the server in a process of its own, and asks it over its socket."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any, Final

from flash.api import Address, FlashError, UsageError
from flash.server_process import ServerProcess

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from flash.api import Message, ServedAdapter, ServedBase
    from flash_serving_transformers.config import TransformersConfig

KEY_VARIABLE: Final = "FLASH_SERVING_KEY"
"""By this the server is told its key."""

ADAPTERS, TOKENS, LOG_PROBS = "/flash/adapters", "/flash/tokens", "/flash/log_probs"
STATS: Final = "/flash/stats"
"""The routes beside OpenAI's; the last tells what the engine does."""


class TransformersBackend:
    """A `ServingBackend`; nothing of torch is imported in its process."""

    def __init__(self, config: TransformersConfig) -> None:
        self._config = config
        self._server: ServerProcess | None = None

    def start(self, base: ServedBase) -> Address:
        """Start the server, and return once the model is loaded and answers."""
        if self._server is not None:
            raise FlashError("the embedded server runs already", hint="stop it first")
        self._refuse_rank(f"an adapter of {base.id}", base.max_rank)
        bounds = [bound for bound in (base.context_tokens, self._config.context_tokens) if bound]
        options = {
            "id": base.id,
            "folder": str(base.folder.absolute()),
            "context_tokens": min(bounds, default=None),
            "cache_gib": self._config.cache_gib,
            "max_rows": self._config.max_rows,
        }
        threads = self._config.threads
        self._server = ServerProcess(
            "the embedded server",
            lambda socket: _command(options, socket),
            log=base.log,
            key_variable=KEY_VARIABLE,
            environment={
                "HF_HUB_OFFLINE": "1",
                **({} if threads is None else {"OMP_NUM_THREADS": str(threads)}),
            },
        )
        return self._server.address

    def load(self, adapter: ServedAdapter) -> None:
        """Add an adapter, or put it in the place of the one of its name."""
        self._refuse_rank(f"the adapter {adapter.name}", adapter.rank)
        folder = str(adapter.folder.absolute())
        self._ask("POST", ADAPTERS, {"name": adapter.name, "folder": folder})

    def unload(self, name: str) -> None:
        """Remove an adapter; its requests under way end as they would have."""
        self._ask("DELETE", ADAPTERS, {"name": name})

    def tokens(
        self,
        model: str,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None,
        thinking: bool,
    ) -> Sequence[int]:
        """Return the tokens that a chat request with these messages has as its prompt."""
        asked = {"model": model, "messages": messages, "tools": tools, "thinking": thinking}
        return tuple(self._ask("POST", TOKENS, asked)["tokens"])

    def log_probs(
        self, model: str, prompt: Sequence[int], completion: Sequence[int]
    ) -> Sequence[float]:
        """Return the log-probability of each token of `completion`; NaN where it has none."""
        asked = {"model": model, "prompt": list(prompt), "completion": list(completion)}
        return tuple(self._ask("POST", LOG_PROBS, asked)["log_probs"])

    def health(self) -> None:
        """Return if the server answers, and computes."""
        self._running.check()

    def stop(self) -> None:
        """End the server; idempotent."""
        if self._server is not None:
            self._server.close()
            self._server = None

    @property
    def _running(self) -> ServerProcess:
        if self._server is None:
            raise FlashError("the embedded server is not running", hint="start it first")
        return self._server

    def _ask(self, method: str, path: str, content: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the server answers; it says with a good status what it cannot take."""
        answer: dict[str, Any] = json.loads(self._running.ask(method, path, content))
        if "refused" in answer:
            raise UsageError(answer["refused"], hint=answer.get("hint"))
        return answer

    def _refuse_rank(self, what: str, rank: int) -> None:
        if rank > self._config.max_lora_rank:
            raise UsageError(
                f"{what} has rank {rank}, and the server takes {self._config.max_lora_rank} at "
                "most",
                hint=f"set max_lora_rank = {rank} in [serving.transformers]",
            )


def _command(options: Mapping[str, Any], socket: Path) -> list[str]:
    said = json.dumps({**options, "socket": str(socket)})
    return [sys.executable, "-m", "flash_serving_transformers.server", said]
