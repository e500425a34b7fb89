"""What scoring costs, reported while a run trains, so that its budget counts it."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Final

from flash.contracts import HasCosts
from flash.errors import FlashError, StoreError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flash.contracts import Environment
    from flash.worker.reporter import EventReporter

EVERY_S: Final = 2.0
_LAST_LOOK_S: Final = 10.0


@contextlib.contextmanager
def spending(
    environment: Environment, reporter: EventReporter, *, every_s: float = EVERY_S
) -> Iterator[None]:
    """
    Report what scoring has cost, where that changed, while the block runs and at its end.

    Where an adapter cannot say, one warning does, and no more is counted.
    """
    if not isinstance(environment, HasCosts):
        yield
        return
    over = threading.Event()
    # A thread, because a step may take an hour, and its judge costs meanwhile.
    thread = threading.Thread(
        target=_watch, args=(environment, reporter, over, every_s), name="flash-spend", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(_LAST_LOOK_S)


def _watch(costs: HasCosts, reporter: EventReporter, over: threading.Event, every_s: float) -> None:
    said = 0.0
    last = False
    while not last:
        last = over.wait(every_s)
        try:
            usd = round(costs.spent_usd(), 9)
            if usd != said:
                reporter.emit("spend", usd=usd)
                said = usd
        except StoreError:
            return  # the training thread meets the same fault and reports it
        except FlashError as error:
            with contextlib.suppress(StoreError):
                reporter.warning(f"what rewards cost is not counted any more: {error.message}")
            return
