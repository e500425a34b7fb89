"""
Delivering notices: what a run's sinks are told by the supervisor, because its worker may be dead.

The notices wait in the outbox. Each is delivered in a thread of its own under a time limit, the
supervisor's rounds wait for none; of a run's sink one at a time, in order. One that fails is tried
again after a pause that doubles, for about a day, and is then given up. Killed anywhere, the next
supervisor goes on: what had arrived unrecorded arrives again, under the same id.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any, Final

import attrs

from flash.context import plugin_context
from flash.errors import FlashError, PluginError, RateLimited, StoreError
from flash.plane.outbox import LONGEST_WAIT_S
from flash.plugins import boundary
from flash.spec.secrets import Redactor
from flash.spec.strict import Reader
from flash.values import Notice

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from flash.home import FlashHome
    from flash.plane import outbox
    from flash.plane.records import Records
    from flash.plane.secrets import RunSecrets
    from flash.plugins import PluginHost
    from flash.records import SinkPlugin

MOST_AT_ONCE: Final = 8
LIMIT_S: Final = 60.0
LOOK_S: Final = 0.25
LONGEST_PAUSE_S: Final = 600.0
MOST_TRIES: Final = 152
"""As many as the pauses fit into a day: counted, because a clock may jump."""


def for_the_worker(job: Mapping[str, Any], host: PluginHost) -> list[str]:
    """Return the names of the job's secrets but for those that only its notices need."""
    known = host.all("sink")
    sinks = [known[name] for name in job["sinks"] if name in known]
    telling = {name for sink in sinks if sink.make is None for name in sink.secrets}
    others = [sink for sink in sinks if sink.make is not None]
    others += [record for kind in ("model", "reward") for record in host.all(kind).values()]
    used = {name for record in others for name in record.secrets}
    used |= {*job["spec"].get("environment", {}).get("secrets", ())}
    return [name for name in job["secrets"] if name not in telling - used]


def pause_after(tries: int) -> float:
    """Return the seconds until the next try of a notice that had failed `tries` times before."""
    return min(2.0 ** min(tries, 32), LONGEST_PAUSE_S)


@attrs.define
class _Delivery:
    """One try under way; `error` and `over` are its thread's to set."""

    notice: outbox.Notice
    limit_s: float
    thread: threading.Thread | None = None
    error: FlashError | None = None
    over: bool = False


class Notifier:
    """
    Delivers what is in the outbox; `round` is called again and again and never waits.

    `log` gets a line for each try that failed. `clock` is the `time` module or alike.
    """

    def __init__(  # noqa: PLR0913 - what it reads, what it calls, and where it says so
        self,
        *,
        home: FlashHome,
        records: Records,
        outbox: outbox.Outbox,
        secrets: RunSecrets,
        host: PluginHost,
        log: Any,
        clock: Any = time,
        limit_s: float = LIMIT_S,
    ) -> None:
        self._home = home
        self._records = records
        self._outbox = outbox
        self._secrets = secrets
        self._host = host
        self._log = log
        self._clock = clock
        self._limit_s = limit_s
        self._deliveries: list[_Delivery] = []
        # Threads of tries that were given up; they count against `MOST_AT_ONCE`, all but one.
        self._stuck: list[threading.Thread] = []
        self._begun = False
        self._look_at = float("-inf")

    def round(self) -> None:
        """Record what became of tries under way, and begin those that are due."""
        if not self._begun:
            # Of ends that a supervisor before was killed over.
            for run in self._outbox.untold():
                self._clear(run)
            self._begun = True
        for delivery in [each for each in self._deliveries if self._is_over(each)]:
            self._deliveries.remove(delivery)
            self._look_at = float("-inf")
            self._record(delivery)
        self._stuck = [thread for thread in self._stuck if thread.is_alive()]
        # One at a time goes on however many never come back.
        room = MOST_AT_ONCE - len(self._deliveries) - min(len(self._stuck), MOST_AT_ONCE - 1)
        if room <= 0 or self._clock.monotonic() < self._look_at:
            return
        self._look_at = self._clock.monotonic() + LOOK_S
        busy = {(each.notice.run, each.notice.sink) for each in self._deliveries}
        due = self._outbox.due(self._clock.time())
        for notice in [each for each in due if (each.run, each.sink) not in busy][:room]:
            self._begin(notice)

    def ended(self, run: str) -> None:
        """
        Forget the secrets of a run that has ended, but for those that its last notices need.

        Does nothing to a run that has not. Whoever sees a run end calls this, and again where it
        is not known whether that was done; the last notice's delivery does so too.
        """
        names = self._needed(run)

        def forget(told: bool) -> None:
            if told or not names:
                self._secrets.forget(run)
            else:
                self._secrets.keep_only(run, names)

        self._outbox.once_ended(run, forget)

    def _clear(self, run: str) -> None:
        try:
            self.ended(run)
        except StoreError as error:
            # No reason to hold up the others; the next supervisor sweeps what stays.
            self._log.warning("not cleared away", run=run, error=error.message)

    def busy(self) -> bool:
        """Say whether there is still something to tell, now or later."""
        return bool(self._outbox.untold())

    def _needed(self, run: str) -> set[str]:
        """Return the names of the secrets that the run's notices may be delivered with."""
        found = self._records.run(run)
        sinks = found.spec.get("sink", {}) if found is not None else {}
        known = self._host.all("sink")
        taking = (known[name] for name in sinks if name in known and known[name].notices)
        return {name for record in taking for name in record.secrets}

    def _begin(self, notice: outbox.Notice) -> None:
        try:
            deliver = self._prepared(notice)
        except StoreError as error:
            self._failed(notice, error)
            return
        except FlashError as error:
            # Without the plugin, or with settings that it does not take, no try can succeed.
            self._give_up(notice, error.message)
            return
        if deliver is None:
            self._outbox.delivered(notice.id)
            self._clear(notice.run)
            return
        delivery = _Delivery(notice, self._clock.monotonic() + self._limit_s)

        def work() -> None:
            try:
                deliver()
            except FlashError as error:
                delivery.error = error
            delivery.over = True

        delivery.thread = threading.Thread(target=work, name=f"notice-{notice.id}", daemon=True)
        self._deliveries.append(delivery)
        delivery.thread.start()

    def _prepared(self, notice: outbox.Notice) -> Callable[[], None] | None:
        """Return what delivers the notice; None where its sink takes none."""
        record: SinkPlugin = self._host.get("sink", notice.sink)
        run = self._records.run(notice.run)
        if record.notices is None or run is None:
            return None
        table = run.spec["sink"][notice.sink]
        config, problems = Reader().read(record.config, table, ("sink", notice.sink))
        if problems:
            raise PluginError("; ".join(map(str, problems)))
        values = self._secrets.there_are(run.id, record.secrets)
        told = Notice(
            id=f"{notice.run}-{notice.id}",
            run=notice.run,
            kind=notice.kind,
            time_s=notice.created_s,
            model=run.spec["model"],
            algorithm=run.spec["algorithm"],
            data=notice.data,
        )
        return lambda: self._deliver(record, config, values, told)

    def _deliver(
        self, record: SinkPlugin, config: Any, values: Mapping[str, str], notice: Notice
    ) -> None:
        """Make the sink and tell it; in a thread, where nothing but files and the network is."""
        if record.notices is None:
            message = "a sink that takes no notices is told none"
            raise AssertionError(message)
        context = plugin_context(self._home, record.name, values.get, declared=record.secrets)
        try:
            with boundary(record.name, "deliver a notice"):
                record.notices(context, config).notify(notice)
        except FlashError as error:
            error.message = Redactor(values.values()).redact(error.message)
            raise

    def _is_over(self, delivery: _Delivery) -> bool:
        return delivery.over or self._clock.monotonic() > delivery.limit_s

    def _record(self, delivery: _Delivery) -> None:
        notice, error = delivery.notice, delivery.error
        if not delivery.over:
            if delivery.thread is not None:
                self._stuck.append(delivery.thread)
            error = StoreError(f"it took longer than {self._limit_s:g} s")
        if error is None:
            self._outbox.delivered(notice.id)
            self._clear(notice.run)
        else:
            self._failed(notice, error)

    def _failed(self, notice: outbox.Notice, error: FlashError) -> None:
        tries = notice.tries + 1
        if tries >= MOST_TRIES:
            self._give_up(notice, error.message)
            return
        pause_s = pause_after(notice.tries)
        if isinstance(error, RateLimited) and error.retry_after_s is not None:
            pause_s = max(pause_s, min(error.retry_after_s, LONGEST_WAIT_S))
        self._outbox.failed(notice.id, not_before_s=self._clock.time() + pause_s)
        self._say("a notice was not delivered", notice, error.message, next_try_s=pause_s)

    def _give_up(self, notice: outbox.Notice, error: str) -> None:
        self._outbox.failed(notice.id, not_before_s=None)
        self._say("a notice is given up", notice, error)
        self._clear(notice.run)

    def _say(self, what: str, notice: outbox.Notice, error: str, **more: Any) -> None:
        facts = {"run": notice.run, "sink": notice.sink, "kind": notice.kind, "id": notice.id}
        self._log.warning(what, **facts, tries=notice.tries + 1, error=error, **more)
