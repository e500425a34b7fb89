"""
What requests used: one row a request, on the disk before its end goes out.

Requests that end together share a transaction. Where the database fails, the requests end all the
same; their rows are kept in memory and tried again until it takes them. A row that was written
twice counts once, by its request's id.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
import traceback
from collections import deque
from typing import TYPE_CHECKING, Any, Final, Literal, Self

import attrs

from flash.errors import FlashError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Status = Literal["ok", "aborted", "failed"]
"""Answered; left by the client before its end; ended by the server's failure."""

PATIENCE_S: Final = 5.0
"""A request whose row is not written by then ends without it."""

MOST_KEPT: Final = 100_000
"""Rows that wait for a database that fails; of more, the oldest are lost."""

_LONGEST_PAUSE_S: Final = 30.0


@attrs.frozen(kw_only=True)
class UsageRow:
    """
    What one request used.

    Attributes:
        request: its id, made by the gateway: a row that is written twice counts once.
        time_s: when it came.
        deployment: the model name asked for: a deployment's id, or a base model's.
        base: the base model's id.
        key: the name of the key it came with.
        prompt_tokens: read by the model, with the `cached_tokens` among them.
        cached_tokens: which the server had from an earlier request.
        completion_tokens: that were generated, as far as the server told.
        status: how it ended.

    """

    request: str
    time_s: float
    deployment: str
    base: str
    key: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    status: Status


class UsageWriter:
    """Writes rows on a thread of its own, from its start to `close`."""

    def __init__(
        self,
        add: Callable[[Sequence[UsageRow]], None],
        log: Any,
        *,
        patience_s: float = PATIENCE_S,
        most_kept: int = MOST_KEPT,
        pause_s: float = 0.5,
    ) -> None:
        """
        Start; `add` commits rows, all or none, and passes over those that are there already.

        `pause_s` is waited after a first failure, and twice as long after each more.
        """
        self._add = add
        self._log = log
        self._patience_s = patience_s
        self._most_kept = most_kept
        self._pause_s = pause_s
        self._changed = threading.Condition()
        self._rows: deque[UsageRow] = deque()
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []
        self._failures = 0
        self._lost = 0
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="usage", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def put(self, row: UsageRow) -> None:
        """Have a row written soon."""
        with self._changed:
            self._keep(row)

    async def write(self, row: UsageRow) -> None:
        """Return once the row is on the disk; in spite of all, where the database fails."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        with self._changed:
            if self._failures == 0:
                self._waiting.append((loop, done))
            else:
                done.set_result(None)
            self._keep(row)
        try:
            async with asyncio.timeout(self._patience_s):
                await done
        except TimeoutError:
            with self._changed:
                self._failures = max(1, self._failures)  # the next ones need not wait so long
            self._log.error("usage is written late", request=row.request)

    def close(self) -> None:
        """Write what there is, once more where it failed before, and stop; idempotent."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _keep(self, row: UsageRow) -> None:
        if len(self._rows) >= self._most_kept:
            self._rows.popleft()
            self._lost += 1
        self._rows.append(row)
        self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._rows or self._closing)
                rows, waiting = list(self._rows), self._waiting
                self._rows.clear()
                self._waiting = []
                last = self._closing
            failed = self._write(rows)
            with self._changed:
                self._failures = self._failures + 1 if failed else 0
                if failed:
                    self._rows.extendleft(reversed(rows))
                left = len(self._rows)
                over = last and (failed or not left)
            self._wake(waiting)
            if over:
                if left:
                    self._log.error("usage is lost", requests=left)
                return
            if failed:
                self._pause()

    def _write(self, rows: Sequence[UsageRow]) -> bool:
        """Write rows, and say whether that failed."""
        if not rows:
            return False
        try:
            self._add(rows)
        except Exception as error:  # noqa: BLE001 - whatever it is, rows are not lost by it
            said = error.message if isinstance(error, FlashError) else traceback.format_exc()
            self._log.error("usage cannot be written", error=said, requests=len(rows))
            return True
        if self._failures:
            self._log.warning("usage is written again", requests=len(rows), lost=self._lost)
            self._lost = 0
        return False

    def _pause(self) -> None:
        """Wait before the next try, longer each time, or until there is to be none after it."""
        pause_s = min(_LONGEST_PAUSE_S, self._pause_s * 2 ** min(self._failures - 1, 10))
        until = time.monotonic() + pause_s
        with self._changed:
            while not self._closing and (left_s := until - time.monotonic()) > 0:
                self._changed.wait(left_s)

    def _wake(
        self, waiting: Sequence[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]]
    ) -> None:
        for loop in {loop for loop, _ in waiting}:
            futures = [future for its, future in waiting if its is loop]
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(_resolve, futures)


def _resolve(futures: Sequence[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)
