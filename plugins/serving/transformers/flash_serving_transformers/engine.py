"""
The engine: one base model, any number of LoRA adapters, requests of all of them in one batch.

transformers has a continuous batching of its own (`generate_batch`), which knows one set of
weights: a request there names no adapter. That is why this one exists. Left out: beams,
speculation, and adapters beyond plain LoRA on linear layers.
"""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import torch

from flash.errors import FlashError, UsageError
from flash_serving_transformers.adapters import read_adapter
from flash_serving_transformers.batch import Batch
from flash_serving_transformers.decoder import Decoder
from flash_serving_transformers.requests import Handle, Request, Stats
from flash_serving_transformers.rows import Row, Scored

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from flash_serving_transformers.adapters import Adapter
    from flash_serving_transformers.requests import Ended, Take, TakeEnd


class Engine:
    """
    Continues prompts with one base model and its adapters, many at a time.

    Its methods may be called from any thread. One thread of its own computes, and calls `take`
    and `ended` of every request; these must not block.
    """

    def __init__(
        self,
        model: Any,
        *,
        context_tokens: int,
        cache_tokens: int,
        max_rows: int,
        threads: int | None = None,
    ) -> None:
        """
        Take over `model`, a transformers causal language model on its device, and start.

        `context_tokens` bounds prompt and completion of a request, `cache_tokens` the keys and
        values of all rows together, `max_rows` the requests of a batch, `threads` those that a
        CPU computes with (torch's, if None). Raises `UsageError` for a family that cannot be
        decoded here, `FlashError` where memory does not suffice.
        """
        self._like = torch.empty(0, dtype=model.dtype, device=model.device)
        self._words = model.get_input_embeddings().num_embeddings
        self._most_tokens = min(context_tokens, cache_tokens)
        self._cache_tokens = cache_tokens
        self._max_rows = max_rows
        self._adapters: dict[str, Adapter] = {}
        self._waiting: deque[Row] = deque()
        self._changed = threading.Condition()
        self._closed = False
        decoder: Future[Decoder] = Future()
        start = (decoder, model, threads or torch.get_num_threads())
        self._thread = threading.Thread(target=self._run, args=start, name="engine", daemon=True)
        self._thread.start()
        self._decoder = decoder.result()

    def submit(self, request: Request, take: Take, ended: TakeEnd) -> Handle:
        """
        Queue a request; `take` gets its tokens and `ended` its end, exactly once.

        The end is "stop" (a stop token came, or `take` returned True), "length", "cancelled", or
        what went wrong. Raises `UsageError` for a request that can never be served: an unknown
        adapter, an empty prompt, more tokens than the context or the cache has.
        """
        self._check(request)
        handle = Handle(request)
        self._queue(Row(handle, self._adapter(request.adapter), take, ended))
        return handle

    def cancel(self, handle: Handle) -> None:
        """End a request at the next step, as "cancelled"; one that has ended stays as it is."""
        handle.cancelled.set()
        with self._changed:
            self._changed.notify()

    def add_adapter(self, name: str, folder: Path) -> None:
        """
        Read an adapter as PEFT saves it and serve it as `name`, at once.

        Requests in flight go on; those of an adapter that had the name end with its old weights.
        Raises `UsageError`, saying what does not fit, and leaves all as it was.
        """
        adapter = read_adapter(name, folder, self._decoder.mixture.linears, self._like)
        with self._changed:
            self._adapters[name] = adapter

    def remove_adapter(self, name: str) -> None:
        """
        Take no more requests for `name`; those in flight go on to their end. Unknown: nothing.

        Returns at once; the weights are freed with the last of its requests.
        """
        with self._changed:
            self._adapters.pop(name, None)
            self._changed.notify()

    def log_probs(
        self, adapter: str | None, prompt: Sequence[int], completion: Sequence[int]
    ) -> list[float]:
        """
        Return the log-probability of each token of `completion` behind those before it.

        Computed with the requests under way, the very way their tokens are. Blocks. Raises as
        `submit` does, or what went wrong.
        """
        if not completion:
            return []
        request = Request(tokens=prompt, adapter=adapter, max_tokens=len(completion))
        self._check(request)
        self._check_words(completion)
        done = threading.Event()
        found: list[list[float] | Exception] = []

        def answer(what: list[float] | Exception) -> None:
            found.append(what)
            done.set()

        self._queue(Scored(Handle(request), self._adapter(adapter), completion, answer))
        done.wait()
        if isinstance(found[0], Exception):
            raise found[0]
        return found[0]

    def stats(self) -> Stats:
        """Return what the engine does at this moment."""
        with self._changed:
            return Stats(
                running=len(self._batch.rows),
                waiting=len(self._waiting),
                cache_tokens_used=self._batch.cache_used,
                cache_tokens=self._cache_tokens,
                adapters=tuple(self._adapters),
            )

    @property
    def alive(self) -> bool:
        """Whether its thread is there, as it is until it is closed."""
        return self._thread.is_alive()

    def close(self) -> None:
        """End every request as "cancelled" and stop the thread; idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _check(self, request: Request) -> None:
        """Refuse a request that can never be served."""
        if not request.tokens:
            raise UsageError("the prompt is empty")
        if request.max_tokens < 1:
            raise UsageError(f"max_tokens is {request.max_tokens}, and must be at least 1")
        self._check_words([*request.tokens, *request.logit_bias])
        asked = len(request.tokens) + request.max_tokens
        if asked > self._most_tokens:
            raise UsageError(
                f"the prompt has {len(request.tokens):,} tokens and may be continued by "
                f"{request.max_tokens:,}: together they are more than the {self._most_tokens:,} "
                "that one request may have here",
                hint="shorten the prompt, or lower max_tokens",
            )

    def _check_words(self, tokens: Sequence[int]) -> None:
        wrong = next((one for one in tokens if not 0 <= one < self._words), None)
        if wrong is not None:
            raise UsageError(f"there is no token {wrong}: the model has {self._words:,}")

    def _adapter(self, name: str | None) -> Adapter | None:
        if name is None:
            return None
        with self._changed:
            if name in self._adapters:
                return self._adapters[name]
            known = ", ".join(sorted(self._adapters)) or "none"
        raise UsageError(f"there is no adapter {name} on this server; there are: {known}")

    def _queue(self, row: Row) -> None:
        with self._changed:
            if self._closed:
                raise FlashError("the engine is closed")
            self._waiting.append(row)
            self._changed.notify()

    def _run(self, decoder: Future[Decoder], model: Any, threads: int) -> None:
        """Work until closed: the engine's thread. However it ends, every request does."""
        torch.set_num_threads(threads)
        try:
            made = Decoder(model, self._cache_tokens)
        except BaseException as error:  # noqa: BLE001 - raised where the engine is made
            decoder.set_exception(error)
            return
        self._batch = Batch(made)
        decoder.set_result(made)
        try:
            with torch.inference_mode():
                while self._wait():
                    try:
                        self._admit()
                        self._batch.step()
                    except Exception as error:  # noqa: BLE001 - those in the batch bear it
                        self._end(self._batch.rows, error)
                    self._requeue()
        finally:
            with self._changed:
                self._closed = True
            self._requeue()
            self._end([*self._batch.rows, *self._waiting], "cancelled")

    def _wait(self) -> bool:
        """Sleep until there is work; False when closed. Ends what was cancelled."""
        with self._changed:
            while not (self._closed or self._batch.rows or self._waiting):
                self._changed.wait()
            rows = [*self._batch.rows, *self._waiting]
        self._end([row for row in rows if row.handle.cancelled.is_set()], "cancelled")
        return not self._closed

    def _end(self, rows: Sequence[Row], how: Ended | Exception) -> None:
        """Take rows out, wherever they are, and tell how they ended."""
        for row in list(rows):
            row.end(how)
            with self._changed:
                if row in self._waiting:
                    self._waiting.remove(row)
                if row in self._batch.rows:
                    self._batch.leave(row)
            row.tell()

    def _admit(self) -> None:
        """Let those in that wait, the oldest first, while there is room."""
        with self._changed:
            while self._waiting and len(self._batch.rows) < self._max_rows:
                if not self._batch.join(self._waiting[0]):
                    break
                self._waiting.popleft()
            self._batch.keep(self._adapters.values())

    def _requeue(self) -> None:
        with self._changed:
            self._waiting.extendleft(self._batch.evicted)
            self._batch.evicted.clear()
