"""A request on its way through the engine: its tokens, its room, and whom it tells."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from flash.errors import FlashError
from flash_serving_transformers.cache import Stretch
from flash_serving_transformers.sampling import Chooser, log_probs_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from flash_serving_transformers.adapters import Adapter
    from flash_serving_transformers.requests import Ended, Handle, Take, TakeEnd, Token

HEADROOM = 128
"""Room that a row gets beyond its tokens, where it may say so many."""

_log = logging.getLogger(__name__)


class Row:
    """A request in the batch, or on its way there."""

    def __init__(self, handle: Handle, adapter: Adapter | None, take: Take, ended: TakeEnd) -> None:
        """Begin with the prompt, of which nothing is in the cache."""
        self.handle = handle
        self.adapter = adapter
        self.tokens = list(handle.request.tokens)
        self.most = len(self.tokens) + handle.request.max_tokens
        self.chooser = Chooser(handle.request)
        self.stretch = Stretch(0, 0)
        self.how: Ended | Exception | None = None
        self._take = take
        self._ended = ended

    @property
    def cached(self) -> int:
        """How many of its tokens are in the cache."""
        return self.stretch.used

    @property
    def pending(self) -> int:
        """How many are not."""
        return len(self.tokens) - self.cached

    @property
    def wanted(self) -> int:
        """The room that it asks for when it joins."""
        return min(self.most, len(self.tokens) + HEADROOM)

    @property
    def reusable(self) -> int:
        """How many of its tokens need not be computed for it: the last says what comes next."""
        return len(self.tokens) - 1

    def wants(self, first: int, end: int) -> list[int]:  # noqa: ARG002 - others want more
        """Return which of its tokens `first` to `end` have logits that it needs."""
        return [end - 1] if end == len(self.tokens) else []

    def give(self, token: Token) -> None:
        """Append a token, hand it over, and end where it is the last."""
        self.tokens.append(token.id)
        try:
            self.chooser.accept(token.id)
            complete = self._take(token) or token.id in self.handle.request.stops
        except Exception as error:  # noqa: BLE001 - what a request's own code raises ends it alone
            self.end(error)
            return
        if complete:
            self.end("stop")
        elif len(self.tokens) >= self.most:
            self.end("length")

    def end(self, how: Ended | Exception) -> None:
        """Say how it ends; the first to say so is right."""
        if self.how is None:
            self.how = how

    def tell(self) -> None:
        """Tell whoever asked how it ended; called once, when it has left."""
        try:
            self._ended("cancelled" if self.how is None else self.how)
        except Exception:  # noqa: BLE001 - nobody is left to tell, and the others go on
            _log.exception("what takes the end of a request raised")


class Scored(Row):
    """A row whose tokens are all there: it wants their log-probabilities, and says nothing."""

    def __init__(
        self,
        handle: Handle,
        adapter: Adapter | None,
        completion: Sequence[int],
        ended: Callable[[list[float] | Exception], None],
    ) -> None:
        """Score `completion` behind the prompt; its last token is not even read."""
        self._answer = ended
        self._found: list[float] = []
        self._completion = list(completion)
        self._prompt = len(handle.request.tokens)
        super().__init__(handle, adapter, lambda _: False, self._tell)
        self.tokens += self._completion[:-1]
        self.most = len(self.tokens)

    @property
    def reusable(self) -> int:
        """As in a row; from the prompt's last token on, all say what comes next."""
        return self._prompt - 1

    def wants(self, first: int, end: int) -> list[int]:
        """Return the places from which the completion's tokens are foretold."""
        return list(range(max(first, self._prompt - 1 + len(self._found)), end))

    def score(self, logits_NV: torch.Tensor) -> None:
        """Take the logits of the places wanted next; what was scored is not asked for again."""
        done = len(self._found)
        self._found += log_probs_of(logits_NV, self._completion[done : done + len(logits_NV)])
        if len(self._found) == len(self._completion):
            self.end("stop")

    def _tell(self, how: Ended | Exception) -> None:
        if isinstance(how, Exception):
            self._answer(how)
        elif how == "stop":
            self._answer(self._found)
        else:
            self._answer(FlashError("the engine was closed"))
