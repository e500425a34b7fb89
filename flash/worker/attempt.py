"""
One attempt at a job, from reading `job.json` to an exit code.

The exit code and the last event say how it ended; nothing else of the process is needed to know.
"""

from __future__ import annotations

import importlib
import json
import shutil
import tempfile
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from flash.context import plugin_context
from flash.environments import snapshot
from flash.errors import FlashError, PluginError, StoreError
from flash.files import disk_error, write_atomic
from flash.job import Job, read_job
from flash.plugins import PluginHost, boundary
from flash.spec.model import spec_from_dict
from flash.spec.secrets import Redactor
from flash.values import ModelCard, RunInfo
from flash.worker.checkpoints import CheckpointStore
from flash.worker.loading import load_environment, open_model
from flash.worker.reporter import EventReporter
from flash.worker.rollouts import RolloutStore
from flash.worker.saving import CheckpointSaver
from flash.worker.sinks import SinkFanout
from flash.worker.spending import spending
from flash.worker.stalls import StackDump
from flash.worker.stopping import StopSignal, is_stop

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from flash.contracts import Environment, Sink
    from flash.home import FlashHome
    from flash.spec.model import Spec
    from flash.values import Event

# What the supervisor reads; documented in docs/explanation/architecture.md.
EXIT_DONE = 0
EXIT_CRASH = 1
EXIT_USER_ERROR = 10
EXIT_OUT_OF_MEMORY = 11
EXIT_STOPPED = 12


@attrs.frozen
class Context:
    """What the algorithm is called with; see `flash.contracts.WorkerContext`."""

    config: Any
    thinking: bool
    seed: int
    environment: Environment
    split: str
    model: Path
    card: ModelCard
    init_adapter: Path | None
    workdir: Path
    reporter: EventReporter
    checkpoints: CheckpointSaver
    rollouts: RolloutStore
    stop: Callable[[], bool]


def run_attempt(
    store: Path, number: int, secrets: Mapping[str, str], home: FlashHome, *, stacks: int = 2
) -> int:
    """
    Run the job in `store` and return the exit code.

    Every way it can end leaves an `error` or `done` event, but for one that was asked for. SIGTERM
    asks for a checkpoint and an early end; while the run is loading it ends it. `stacks` is the
    descriptor that a stalled worker's stacks are written to.
    """
    stop = StopSignal()
    fanout, dump = SinkFanout(), StackDump(stacks)
    folder = store / "attempts" / str(number)
    environment = folder / "environment"
    mask = _mask(Redactor(secrets.values()), environment, store / "environment")
    reporter: EventReporter | None = None
    code = EXIT_CRASH

    def listen(event: Event) -> None:
        dump.note()
        fanout.emit(event)
        stop.note(event)

    try:
        reporter = EventReporter(
            folder / "events.jsonl",
            attempt=number,
            mask=mask,
            listen=listen,
        )
        job = Job.from_dict(read_job(store / "job.json"))
        host = PluginHost.default(home)
        attempt = Attempt(
            number=number,
            job=job,
            spec=spec_from_dict(job.spec, host),
            host=host,
            home=home,
            store=store,
            environment=environment,
            secrets=secrets,
            reporter=reporter,
            rollouts=RolloutStore(store, reporter, mask=mask),
            stop=stop,
        )
        dump.begin(attempt.spec.retry.stalled_after_s)
        attempt.warn_of_other_versions()
        fanout.start(
            attempt.sinks(), RunInfo(job.run, number, str(store), job.spec), reporter.warning
        )
        code = EXIT_DONE if attempt.train() else EXIT_STOPPED
    except BaseException as error:  # noqa: BLE001 - the boundary: whatever it is, sys.exit() of user code too, becomes an event and a code
        if is_stop(error):
            code = EXIT_STOPPED
        else:
            traceback.print_exc()
            code, kind, message, hint = _classify(error)
            if reporter is not None:
                _try(lambda: reporter.emit("error", kind=kind, message=message, hint=hint))
    dump.end()
    _try(lambda: fanout.close({EXIT_DONE: "done", EXIT_STOPPED: "stopped"}.get(code, "failed")))
    if reporter is not None:
        _try(reporter.close)
    shutil.rmtree(environment, ignore_errors=True)
    return code


def _mask(redactor: Redactor, copy: Path, original: Path) -> Callable[[str], str]:
    """Mask secrets, and name the environment's own folder where its copy for this attempt is."""
    return lambda text: redactor.redact(text).replace(str(copy), str(original))


def _try(last_words: Callable[[], None]) -> None:
    """Say it where that can be; how the attempt ended does not change because it cannot."""
    try:
        last_words()
    except Exception:  # noqa: BLE001 - a full disk above all; the exit code says the rest
        traceback.print_exc()


@attrs.frozen(kw_only=True)
class Attempt:
    """
    One attempt: the job, who reads it and where it reports.

    `environment` is where its own copy of the environment goes, for user code to write in.
    """

    number: int
    job: Job
    spec: Spec
    host: PluginHost
    home: FlashHome
    store: Path
    environment: Path
    secrets: Mapping[str, str]
    reporter: EventReporter
    rollouts: RolloutStore
    stop: StopSignal

    def train(self) -> bool:
        """Train to the end and return True, or False when it was asked to stop before."""
        checkpoints = CheckpointStore(self.store, attempt=self.number, warn=self.reporter.warning)
        # Where the attempt before was cut off between its last byte and saying so, there is
        # nothing left to train.
        if checkpoints.final(intact=True) is None:
            with CheckpointSaver(
                checkpoints,
                self.reporter,
                keep=self.spec.checkpoints,
                always=getattr(self.spec.train, "save_at_steps", ()),
                stop=self.stop,
            ) as saver:
                self._run_algorithm(saver)
        if checkpoints.final() is None:
            if self.stop():
                return False
            raise PluginError(
                f"the algorithm {self.spec.algorithm} returned without a final adapter",
                hint="report it to the plugin's author",
            )
        self._write_result()
        # Of an attempt that found everything done, how many there were is not known.
        steps = self.reporter.last_step
        self.reporter.emit("done", **({} if steps is None else {"steps": steps}))
        return True

    def _write_result(self) -> None:
        """Leave a word for whoever looks into the folder; the adapter is there without it."""
        result = {"run": self.job.run, "state": "done", "finished_s": time.time()}
        try:
            write_atomic(self.store / "result.json", json.dumps(result, indent=1).encode())
        except StoreError as error:
            self.reporter.warning(f"{error.message}; the adapter is complete all the same")

    def sinks(self) -> list[tuple[str, Sink]]:
        """
        Make the job's sinks, each with the secrets its record declares and no others.

        One that cannot be made is left out with a warning; one that only takes notices is the
        supervisor's.
        """
        made = []
        for name in self.job.sinks:
            try:
                record = self.host.get("sink", name)
                if record.make is None:
                    continue
                with boundary(name, "make the sink"):
                    context = plugin_context(self.home, name, self._declared(record.secrets))
                    made.append((name, record.make(context, self.spec.sink[name])))
            except FlashError as error:
                hint = f"; {error.hint}" if error.hint else ""
                self.reporter.warning(f"the sink {name} is left out: {error.message}{hint}")
        return made

    def warn_of_other_versions(self) -> None:
        """Say where this worker's plugins are not the ones that the job was planned with."""
        for plugin, named in self.job.plugins.items():
            kind, _, name = plugin.partition("/")
            here = self.host.owner(kind, name)
            if (here.distribution, here.version) != (named["distribution"], named["version"]):
                self.reporter.warning(
                    f"the job was submitted with {named['distribution']} {named['version']}; "
                    f"this worker has {here.distribution} {here.version}"
                )

    def _run_algorithm(self, checkpoints: CheckpointSaver) -> None:
        self.reporter.phase("environment")
        environment = self._environment()
        self.reporter.phase("model")
        plugin = self.job.model["plugin"]
        folder, card = open_model(
            self.host,
            self.home,
            plugin=plugin,
            model=self.job.model["id"],
            secrets=self._declared(self.host.get("model", plugin).secrets),
            report=self.reporter.log,
        )
        warm_start = self.job.warm_start
        # What cannot be removed, because a child still writes there, is no failure of the run.
        with tempfile.TemporaryDirectory(prefix="flash-", ignore_cleanup_errors=True) as workdir:
            context = Context(
                config=self.spec.train,
                thinking=self.spec.thinking,
                seed=self.spec.seed,
                environment=environment,
                split=self.spec.environment.split,
                model=folder,
                card=card,
                init_adapter=Path(warm_start["folder"]) if warm_start else None,
                workdir=Path(workdir),
                reporter=self.reporter,
                checkpoints=checkpoints,
                rollouts=self.rollouts,
                stop=lambda: self.stop() or checkpoints.failed,
            )
            entry = _entry(self.job.algorithm)
            self.stop.only_ask()
            with spending(environment, self.reporter):
                entry(context)

    def _environment(self) -> Environment:
        submitted = self.store / "environment"
        if snapshot(submitted, self.environment) != self.job.environment["digest"]:
            raise StoreError(
                f"the environment in {submitted} is not the one that was submitted",
                hint="submit the run again",
            )
        table = self.spec.environment
        return load_environment(
            self.host,
            self.home,
            plugin=self.job.environment["plugin"],
            folder=self.environment,
            params=table.params,
            split=table.split,
            pip=table.pip,
            secrets=self._declared(table.secrets),
            reward=self.spec.reward,
            reward_secrets=self.secrets,
            report=self.reporter.log,
        )

    def _declared(self, names: Iterable[str]) -> dict[str, str]:
        return {name: self.secrets[name] for name in names if name in self.secrets}


def _entry(worker: str) -> Callable[[Context], None]:
    module, _, attribute = worker.partition(":")
    entry: Callable[[Context], None] = getattr(importlib.import_module(module), attribute)
    return entry


def _classify(error: BaseException) -> tuple[int, str, str, str | None]:
    """Return exit code, kind, message and hint for what ended the attempt."""
    if isinstance(error, MemoryError) or _is_out_of_memory(error):
        return (
            EXIT_OUT_OF_MEMORY,
            "out_of_memory",
            f"out of memory: {error}",
            "lower train.max_length or train.batch_size, or take a smaller model",
        )
    named = error if isinstance(error, FlashError) else disk_error(error)
    if named is not None:
        return EXIT_USER_ERROR, "user_error", named.message, named.hint
    last = traceback.extract_tb(error.__traceback__)[-1:]
    where = f" at {last[0].filename}:{last[0].lineno}" if last else ""
    return (
        EXIT_CRASH,
        "crash",
        f"{type(error).__name__}{where}: {error}",
        "the traceback is in the log",
    )


def _is_out_of_memory(error: BaseException) -> bool:
    """Recognise torch's own, without importing torch."""
    if type(error).__name__ in {"OutOfMemoryError", "AcceleratorError"}:
        return "out of memory" in str(error).lower()
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
