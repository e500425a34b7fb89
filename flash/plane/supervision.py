"""
Supervising: look at the facts, move one step, look again.

Nothing is remembered that a restart would miss. The facts are the database, what the provider
sees now, and what the worker has written; each step can be repeated, and killed at any point is
the same as not begun: the intent to launch is recorded before the launch, under a key that the
provider knows it by, and the reason to stop before the stop.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from flash.context import plugin_context
from flash.errors import (
    BadAnswer,
    FlashError,
    NoCapacity,
    QuotaExceeded,
    RateLimited,
    ServerFault,
    StoreError,
    Unreachable,
)
from flash.offers import find_offer
from flash.plane import policy
from flash.plane.runs import Ending
from flash.plane.secrets import RunSecrets
from flash.plane.store import RunStore
from flash.plugins import boundary
from flash.spec.secrets import SecretFinder
from flash.spec.strict import Reader
from flash.values import Instance, LaunchRequest, Need, Offer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from flash.contracts import Provider
    from flash.home import FlashHome
    from flash.plane.records import Records
    from flash.plane.runs import Attempt, Run
    from flash.plugins import PluginHost
    from flash.values import Launch

WORKER = (sys.executable, "-P", "-m", "flash.worker", "run")
"""The worker's command; the store and the attempt's number follow."""

_LIVE = frozenset({"queued", "starting", "running", "unknown"})
_ASK_AGAIN_S = 5.0
# Answers after which the same launch may work later; after any other it would fail again.
_LATER = (NoCapacity, QuotaExceeded, RateLimited, ServerFault)


class Supervision:
    """Moves the runs of one plane; each call to `step` does the next thing for one run."""

    def __init__(
        self,
        *,
        home: FlashHome,
        records: Records,
        host: PluginHost,
        log: Any,
        clock: Callable[[], float] = time.time,
        worker: Sequence[str] = WORKER,
    ) -> None:
        self._home = home
        self._records = records
        self._secrets = RunSecrets(home)
        self._host = host
        self._log = log
        self._clock = clock
        self._worker = worker
        self._owner = records.owner()
        self._providers: dict[tuple[str, str], Provider] = {}
        self._find_secret = SecretFinder(host, []).find
        # When each stop was last asked for; forgotten by a restart, which then asks again.
        self._asked_s: dict[int, float] = {}

    def step(self, run: Run) -> None:
        """Do the next thing for a run; raises `FlashError` where it has to be tried again."""
        attempts = self._records.attempts(run.id)
        for attempt in attempts:
            if attempt.state == "ended":
                self._release(run, attempt)
        last = attempts[-1] if attempts else None
        if run.state == "queued":
            self._launch(run)
        elif last is not None and last.state in {"launching", "live"}:
            self._watch(run, attempts)

    # A queued run.

    def _launch(self, run: Run) -> None:
        if run.not_before_s is not None and self._clock() < run.not_before_s:
            return
        try:
            job = RunStore(self._home.runs / run.id).job()
            found = find_offer(
                {name: self._config(run, name) for name in job["provider"]},
                Need(memory_gib=job["memory_gib"]),
                self._host,
                self._home,
                secret=self._find_secret,
                offline=False,
            )
        except (Unreachable, *_LATER) as error:
            self._wait(run, error.message)
            return
        except FlashError as error:
            if self._records.give_up(run, error.message, error.hint):
                self._log.warning("run failed", run=run.id, error=error.message)
                self._secrets.forget(run.id)
            return
        if found.offer is None:
            room = ", ".join(
                f"{name} has {offer.memory_gib:.1f} GiB free" if offer else f"{name} has nothing"
                for name, offer in found.most.items()
            )
            self._wait(run, f"it needs {job['memory_gib']:.1f} GiB of memory; {room}")
            return
        attempt = self._records.begin(run, found.offer.provider, found.offer)
        if attempt is not None:
            self._log.info("launching", run=run.id, attempt=attempt.number, offer=found.offer.id)
            self._ask_to_launch(run, self._records.attempts(run.id))

    def _wait(self, run: Run, reason: str) -> None:
        if run.waiting is None:
            self._log.info("waiting", run=run.id, reason=reason)
        # On one beat for all: runs that wait are looked at in the same round, oldest first.
        beat = self._clock() // _ASK_AGAIN_S + 1
        self._records.wait(run, reason, not_before_s=beat * _ASK_AGAIN_S)

    def _ask_to_launch(self, run: Run, attempts: Sequence[Attempt]) -> None:
        """
        Ask the provider for the last attempt, whose intent is recorded.

        Raises where it is not known whether the launch happened; the next step looks for its key.
        """
        attempt = attempts[-1]
        provider = self._provider(run, attempt)
        try:
            request = self._request(run, attempt)
            with boundary(attempt.provider, "launch"):
                launch: Launch = provider.launch(Offer(**attempt.offer), request)
        except BadAnswer:
            raise
        except (Unreachable, *_LATER) as error:
            if isinstance(error, Unreachable) and error.sent:
                raise
            self._not_launched(attempts, error.message)
            return
        except FlashError as error:
            ending = Ending(
                outcome="no_capacity",
                event="fail",
                detail=error.message,
                error=error.message,
                hint=error.hint,
            )
            self._end(attempt, ending)
            return
        if launch.state == "accepted":
            self._records.saw(attempt, launch.ref)
        elif launch.state == "rejected":
            self._not_launched(attempts, launch.error or "the provider rejected the launch")
        else:
            raise Unreachable(launch.error or "the provider did not say if it launched", sent=True)

    def _request(self, run: Run, attempt: Attempt) -> LaunchRequest:
        store = RunStore(self._home.runs / run.id)
        store.make_attempt(attempt.number)
        job = store.job()
        return LaunchRequest(
            key=self._key(attempt),
            owner=self._owner,
            argv=(*self._worker, str(store.path), str(attempt.number)),
            env=dict(run.spec["worker_env"]),
            caller=dict(run.caller),
            secrets=self._secrets.values(run.id, job["secrets"]),
            memory_gib=job["memory_gib"],
            workdir=str(store.path),
            log=str(store.log(attempt.number)),
        )

    def _key(self, attempt: Attempt) -> str:
        return f"flash-{self._owner}-{attempt.run}-{attempt.number}"

    # A run with a launch that has not ended.

    def _watch(self, run: Run, attempts: Sequence[Attempt]) -> None:
        attempt = attempts[-1]
        provider = self._provider(run, attempt)
        if attempt.ref is None:
            instance = self._find(provider, attempt)
            if instance is None and run.cancel_requested:
                self._end(attempt, Ending(outcome="cancelled", event="cancel"))
            elif instance is None:
                self._ask_to_launch(run, attempts)
        else:
            with boundary(attempt.provider, "get"):
                instance = provider.get(attempt.ref)
        if instance is None:
            return
        if instance.ref != attempt.ref:
            self._records.saw(attempt, instance.ref)
        if instance.state not in _LIVE:
            self._ended(run, attempts, instance)
            return
        if instance.state == "running" and run.state == "provisioning":
            self._records.started(attempt)
            self._log.info("running", run=run.id, attempt=attempt.number)
        self._stop_where_asked(run, attempts, provider, instance)

    def _find(self, provider: Provider, attempt: Attempt) -> Instance | None:
        """Look for a launch whose answer is not known by its key."""
        with boundary(attempt.provider, "list"):
            instances = provider.list(self._owner)
        key = self._key(attempt)
        return next((instance for instance in instances if instance.key == key), None)

    def _stop_where_asked(
        self, run: Run, attempts: Sequence[Attempt], provider: Provider, instance: Instance
    ) -> None:
        attempt = attempts[-1]
        reason = attempt.stopping
        if reason is None and run.cancel_requested:
            reason = "cancelled"
        if reason is None and self._over_budget(run, attempts):
            reason = "over_budget"
        if reason is None or not self._due(attempt):
            return
        if attempt.stopping is None:
            self._records.stop(attempt, reason)
            self._log.info("stopping", run=run.id, attempt=attempt.number, reason=reason)
        with boundary(attempt.provider, "terminate"):
            provider.terminate(instance.ref, grace_s=policy.GRACE_S[reason])

    def _over_budget(self, run: Run, attempts: Sequence[Attempt]) -> bool:
        max_hours = run.spec["budget"]["max_hours"]
        if max_hours is None:
            return False
        now_s = self._clock()
        worked_s = sum((attempt.ended_s or now_s) - attempt.started_s for attempt in attempts)
        return worked_s > float(max_hours) * 3600

    def _due(self, attempt: Attempt) -> bool:
        """Say whether it is time to ask the provider for an end (again)."""
        now_s = self._clock()
        if now_s - self._asked_s.get(attempt.fence, float("-inf")) < _ASK_AGAIN_S:
            return False
        self._asked_s[attempt.fence] = now_s
        return True

    # The end.

    def _ended(self, run: Run, attempts: Sequence[Attempt], instance: Instance) -> None:
        attempt = attempts[-1]
        said = RunStore(self._home.runs / run.id).last_error(attempt.number)
        self._end(attempt, policy.end_of(run, attempts, instance, said, self._clock()))

    def _not_launched(self, attempts: Sequence[Attempt], reason: str) -> None:
        self._end(attempts[-1], policy.not_launched(attempts, reason, self._clock()))

    def _end(self, attempt: Attempt, ending: Ending) -> None:
        event = self._records.end(attempt, ending)
        if event is None:
            return
        self._log.info(
            "ended",
            run=attempt.run,
            attempt=attempt.number,
            outcome=ending.outcome,
            exit_code=ending.exit_code,
            then=event,
        )
        if event != "requeue":
            self._secrets.forget(attempt.run)

    def _release(self, run: Run, attempt: Attempt) -> None:
        """Have the provider clear away an ended attempt until it says that nothing is left."""
        if attempt.ref is not None:
            provider = self._provider(run, attempt)
            with boundary(attempt.provider, "terminate"):
                provider.terminate(attempt.ref, grace_s=0)
            with boundary(attempt.provider, "get"):
                if provider.get(attempt.ref).state != "gone":
                    return
        self._records.released(attempt)

    def _provider(self, run: Run, attempt: Attempt) -> Provider:
        """Return the provider of an attempt, made once for each of its configs."""
        config = self._config(run, attempt.provider)
        known = (attempt.provider, repr(config))
        if known not in self._providers:
            record = self._host.get("provider", attempt.provider)
            context = plugin_context(
                self._home, record.name, self._find_secret, declared=record.secrets
            )
            with boundary(record.name, "make"):
                self._providers[known] = record.make(context, config)
        return self._providers[known]

    def _config(self, run: Run, provider: str) -> Any:
        record = self._host.get("provider", provider)
        table = run.spec["provider"].get(provider, {})
        config, problems = Reader().read(record.config, table, ("provider", provider))
        if problems:
            listed = "; ".join(map(str, problems))
            message = f"the run's [provider.{provider}] does not fit the installed plugin: {listed}"
            raise StoreError(message, hint="submit the run again")
        return config
