"""
The engine: one base model, any number of LoRA adapters, requests of all of them in one batch.

transformers has a continuous batching of its own (`generate_batch`), which knows one set of
weights: a request there names no adapter. That is why this one exists.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from flash_serving_transformers.requests import Handle, Request, Stats, Take, TakeEnd


class Engine:
    """
    Continues prompts with one base model and its adapters, many at a time.

    Its methods may be called from any thread. One thread of its own computes, and calls `take`
    and `ended` of every request; these must not block.
    """

    def __init__(
        self, model: Any, *, context_tokens: int, cache_tokens: int, max_rows: int
    ) -> None:
        """
        Take over `model`, a transformers causal language model on its device, and start.

        `context_tokens` bounds prompt and completion of a request, `cache_tokens` the keys and
        values of all rows together, `max_rows` the requests of a batch. Raises `UsageError` for a
        family that cannot be decoded here.
        """
        raise NotImplementedError

    def submit(self, request: Request, take: Take, ended: TakeEnd) -> Handle:
        """
        Queue a request; `take` gets its tokens and `ended` its end, exactly once.

        The end is "stop" (a stop token came, or `take` returned True), "length", "cancelled", or
        what went wrong. Raises `UsageError` for a request that can never be served: an unknown
        adapter, an empty prompt, more tokens than the context or the cache has.
        """
        raise NotImplementedError

    def cancel(self, handle: Handle) -> None:
        """End a request at the next step, as "cancelled"; one that has ended stays as it is."""
        raise NotImplementedError

    def add_adapter(self, name: str, folder: Path) -> None:
        """
        Read an adapter as PEFT saves it and serve it as `name`, at once.

        Requests in flight go on; those of an adapter that had the name end with its old weights.
        Raises `UsageError`, saying what does not fit, and leaves all as it was.
        """
        raise NotImplementedError

    def remove_adapter(self, name: str) -> None:
        """
        Take no more requests for `name`; those in flight go on to their end. Unknown: nothing.

        Returns at once; the weights are freed with the last of its requests.
        """
        raise NotImplementedError

    def log_probs(
        self, adapter: str | None, prompt: Sequence[int], completion: Sequence[int]
    ) -> list[float]:
        """
        Return the log-probability of each token of `completion` behind those before it.

        Computed with the requests under way, the very way their tokens are. Blocks. Raises as
        `submit` does, or what went wrong.
        """
        raise NotImplementedError

    def stats(self) -> Stats:
        """Return what the engine does at this moment."""
        raise NotImplementedError

    def close(self) -> None:
        """End every request as "cancelled" and stop the thread; idempotent."""
        raise NotImplementedError
