"""
The protocols that plugins implement. The words matter more than the types.

Plugins raise plain exceptions or the errors of `flash.errors`; the core wraps everything else at
one boundary that names the plugin and the call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from flash.values import (
        Address,
        Episode,
        Event,
        Instance,
        Launch,
        LaunchRequest,
        Message,
        ModelCard,
        Need,
        Notice,
        Offer,
        Problem,
        Reward,
        Rollout,
        RunInfo,
        ServedAdapter,
        ServedBase,
        Step,
        Task,
    )


class PluginContext(Protocol):
    """
    What every `make` receives. Nothing else of the core is reachable from it.

    `http` is one requests session with timeouts, retries for reads and redaction, made on first
    use; `log` a structlog logger bound to the plugin's name; `workdir` a folder of the plugin's
    own that persists; `clock` returns seconds since the epoch. `environment` is the folder of the
    environment that a reward adapter is made for, None for every other plugin.
    """

    clock: Callable[[], float]
    environment: Path | None

    @property
    def workdir(self) -> Path: ...  # noqa: D102 - described in the class

    @property
    def log(self) -> Any: ...  # noqa: D102 - described in the class

    @property
    def http(self) -> Any: ...  # noqa: D102 - described in the class

    def secret(self, name: str) -> str | None:
        """Return the value of a secret that the plugin's record declares, or None."""
        ...


@runtime_checkable
class Provider(Protocol):
    """A place that runs workers. Every call may be repeated; none sleeps or retries inside."""

    def check(self) -> str:
        """Return who we are there; raise the `ProviderError` that says what is wrong."""
        ...

    def offers(self, need: Need) -> Sequence[Offer]:
        """Return live offers that fit `need`, cheapest first; no side effects, no guesses."""
        ...

    def launch(self, offer: Offer, request: LaunchRequest) -> Launch:
        """
        Start the worker: one create call, never retried inside.

        Idempotent on `request.key` where the provider can be asked first. Returns without
        waiting for the worker to be up.
        """
        ...

    def get(self, ref: Mapping[str, Any]) -> Instance:
        """Return what is seen now; `gone` when nothing is left of it."""
        ...

    def list(self, owner: str) -> Sequence[Instance]:
        """Return every instance of this owner, all pages or an error."""
        ...

    def terminate(self, ref: Mapping[str, Any], *, grace_s: float) -> None:
        """
        Ask for the end and return at once; idempotent.

        First the worker alone is asked, by SIGTERM: it saves a checkpoint and ends by itself while
        its children still serve it. After `grace_s` every process of the launch gets SIGTERM, and
        what is left some seconds later SIGKILL; so does what a worker leaves that ended by itself.
        A later call may shorten the grace, never lengthen it. The end has come when `get` answers
        with a final state: no process of the launch is left then, and no temporary file.
        """
        ...


@runtime_checkable
class Environment(Protocol):
    """Tasks, interaction and scoring, loaded and ready. Single-turn means `max_turns` is 1."""

    max_score_concurrency: int

    def tasks(self, split: str) -> Sequence[Task]:
        """Return the split's rows in order; `EnvironmentFault` when the split does not exist."""
        ...

    def splits(self) -> Sequence[str]:
        """Return the names of the splits that exist, `train` first where it does."""
        ...

    def start(self, task: Task) -> list[Message]:
        """Return the opening messages of an episode."""
        ...

    def step(self, task: Task, messages: Sequence[Message], action: str) -> Step:
        """Answer the model's `action`; `messages` ends with it as an assistant message."""
        ...

    def max_turns(self, task: Task) -> int:
        """Return the most assistant turns that an episode of this task may have."""
        ...

    def target(self, task: Task) -> list[Message] | None:
        """Return the gold continuation of `start(task)` for SFT, or None where there is none."""
        ...

    def tools(self, task: Task) -> list[dict[str, Any]] | None:
        """Return the tool declarations for the chat template, or None."""
        ...

    def score(self, task: Task, episodes: Sequence[Episode]) -> list[Reward]:
        """Return one `Reward` an episode, in order. A failed scoring is data, not an exception."""
        ...


@runtime_checkable
class HasSuites(Protocol):
    """What an `Environment` may have beside its contract: held-out tasks with other graders."""

    def suites(self) -> Mapping[str, Environment]:
        """
        Return each suite by its name, as an environment whose only split holds its tasks.

        Evaluations run them after the split; training never sees them.
        """
        ...


@runtime_checkable
class EnvironmentLoader(Protocol):
    """Reads one format of environments from a local folder."""

    def fetch(self, reference: str, destination: Path) -> str:
        """
        Put what `reference` names (of a scheme the record claims) into `destination`.

        Returns the exact revision. Archives are hostile: no links, no `..`, bounded size.
        """
        ...

    def check(
        self, folder: Path, *, split: str, params: Mapping[str, Any] | None = None
    ) -> Sequence[Problem]:
        """Return what is wrong without importing anything of the folder."""
        ...

    def rows(self, folder: Path, *, split: str, params: Mapping[str, Any]) -> int | None:
        """
        Return how many rows the split has, or None where only user code can say.

        Imports nothing of the folder; `EnvironmentFault` names a row that cannot be read.
        """
        ...

    def load(self, folder: Path, *, params: Mapping[str, Any], split: str) -> Environment:
        """Import and build it; `EnvironmentFault` names file and line where it cannot."""
        ...


@runtime_checkable
class ModelSource(Protocol):
    """Puts base models on this machine's disk."""

    def card(self, model: str) -> ModelCard | None:
        """Return the facts known without network, or None when they are not known here yet."""
        ...

    def look_up(self, model: str) -> ModelCard:
        """
        Return the facts, from the network where they are not known here; downloads no weights.

        Asked when a run is submitted. Raises `ModelUnavailable` for a model that cannot be had.
        """
        ...

    def on_disk(self, model: str) -> Path | None:
        """Return the folder that transformers can load now, or None."""
        ...

    def downloaded(self) -> Sequence[str]:
        """Return the ids beyond the record's cards that are on this machine's disk."""
        ...

    def fetch(self, model: str, report: Callable[[str], None]) -> Path:
        """
        Return the folder, downloading or converting first where needed.

        Safe to call from several processes at once; `report` gets sentences for the log.
        Raises `ModelUnavailable`.
        """
        ...


@runtime_checkable
class HasAdapters(Protocol):
    """What a `ModelSource` has beside its contract whose record claims adapters."""

    def fetch_adapter(self, reference: str, folder: Path) -> tuple[Path, str]:
        """
        Return where the LoRA adapter is and its exact revision, downloading it first where needed.

        It stays below `folder`, which is the plugin's own and persists, as `adapter_config.json`
        and `adapter_model.safetensors`, and is never changed: every attempt of a run reads it.
        Asked when a run is submitted; safe to call from several processes at once. What comes is
        hostile: bounded sizes, nothing pickled. Raises `ModelUnavailable`.
        """
        ...


@runtime_checkable
class RewardAdapter(Protocol):
    """
    Scores episodes, alone or beside the environment's own score.

    Called from several threads at once, each with a group of its own; an adapter that can only do
    so much at a time bounds itself. Whatever it raises is a failed scoring of the whole group.
    """

    def score(self, task: Task, episodes: Sequence[Episode]) -> list[Reward | None]:
        """
        Return one `Reward` an episode, in order; `task.gold` is the text of the right answer.

        None, like a `Reward` without a score, is a failed scoring: no zero, but data with a reason
        that is in no group's statistics.
        """
        ...


@runtime_checkable
class HasCosts(Protocol):
    """What a `RewardAdapter` has beside its contract whose scores cost money."""

    def spent_usd(self) -> float:
        """
        Return what it has spent since it was made; never less than before.

        Asked from any thread, every few seconds: a run is stopped at its budget.
        """
        ...


@runtime_checkable
class Sink(Protocol):
    """Follows one run's events. Runs behind a queue of its own; may be slow, may fail."""

    def open(self, run: RunInfo) -> None:
        """Get ready; called once, before the first event."""
        ...

    def emit(self, event: Event) -> None:
        """Take one event."""
        ...

    def close(self, state: str) -> None:
        """Finish; `state` is how the attempt ended."""
        ...


@runtime_checkable
class NoticeSink(Protocol):
    """
    Tells somebody what happens to runs. Called by the supervisor, in a thread of its own.

    A worker cannot say that it died; this can.
    """

    def notify(self, notice: Notice) -> None:
        """
        Deliver one notice, within a few seconds; raise where that failed, and it is called again.

        `RateLimited` says how long to wait. The notices of one run come in their order.
        """
        ...


@runtime_checkable
class ServingBackend(Protocol):
    """
    One server of one base model, which holds any number of its adapters.

    Its server speaks the OpenAI API (`POST /chat/completions`, `POST /completions`, both as
    streams too) at an address that nobody reaches who has not its key. A request names the base
    model by its id or a loaded adapter by its name. It honours the fields that the record lists,
    `chat_template_kwargs.enable_thinking`, and `stream_options.continuous_usage_stats`: every
    chunk of a stream says how many tokens its choice has by now.

    The methods block, the caller has a time limit; they may be called from any thread, one at a
    time. Errors are `FlashError`s, with the last words of the server's log where it has failed.
    """

    def start(self, base: ServedBase) -> Address:
        """Start the server and return where it answers, once it does."""
        ...

    def load(self, adapter: ServedAdapter) -> None:
        """
        Add an adapter to the live server, under its name; requests under way go on.

        Raises `UsageError` for one that the server cannot take, such as one of too high a rank,
        before anything is loaded. A name that is loaded already is replaced.
        """
        ...

    def unload(self, name: str) -> None:
        """Remove an adapter from the live server; one that is not there is gone already."""
        ...

    def tokens(
        self,
        model: str,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None,
        thinking: bool,
    ) -> Sequence[int]:
        """Return the prompt's tokens that the server makes of a conversation."""
        ...

    def log_probs(
        self, model: str, prompt: Sequence[int], completion: Sequence[int]
    ) -> Sequence[float]:
        """Return the log-probability in nats, at temperature 1, of each token of `completion`."""
        ...

    def health(self) -> None:
        """Return if the server answers; raise what is wrong if not."""
        ...

    def stop(self) -> None:
        """End the server and every process of it; idempotent."""
        ...


class Reporter(Protocol):
    """How a worker reports; every call is one line in the run's `events.jsonl`."""

    def phase(self, name: str) -> None:
        """
        Name what happens now: `model`, `data`, `train`, `evaluate`, `save`.

        In `model` and `data` there is nothing to save yet, and a stop ends the attempt there by an
        exception that is no `Exception`.
        """
        ...

    def metrics(self, step: int, total: int, **values: float) -> None:
        """Report one optimizer step's numbers."""
        ...

    def evaluation(self, step: int, **values: float) -> None:
        """Report held-out numbers."""
        ...

    def log(self, message: str) -> None:
        """Report a sentence."""
        ...

    def warning(self, message: str) -> None:
        """Report something the user should look at."""
        ...


class Checkpoint(Protocol):
    """One complete checkpoint: `folder/adapter` deployable, `folder/state` for exact resume."""

    step: int
    folder: Path


class Checkpoints(Protocol):
    """The run's checkpoints as the algorithm sees them."""

    def newest(self) -> Checkpoint | None:
        """Return the newest complete one to resume from; a torn one is never returned."""
        ...

    def save(
        self, step: int, write: Callable[[Path], None], *, metrics: Mapping[str, float]
    ) -> None:
        """
        Take a checkpoint; training goes on while it is written.

        `write(folder)` fills `folder/adapter` and `folder/state`. It is called later and on
        another thread, so it writes copies, made before this call, of all that training goes on to
        change. The checkpoint exists once its manifest does, by rename. A save of a step that
        exists already does nothing, and one of a periodic step may be left out for a newer one.
        """
        ...

    def save_final(self, write: Callable[[Path], None]) -> None:
        """
        Commit the final adapter: `write(folder)` fills the folder with the adapter's files.

        Every save before is written first; the adapter is on the disk when this returns.
        """
        ...


class Rollouts(Protocol):
    """The sampled episodes of a run, kept for people to read."""

    def save(self, step: int, rollouts: Sequence[Rollout]) -> None:
        """
        Keep the episodes that were sampled for `step`, in place of any kept for it before.

        The store is bounded: see `flash.worker.rollouts` for what is left out. Secrets are masked.
        They are no part of training's result: what cannot be kept, on a full disk say, is a
        warning and raises nothing.
        """
        ...


class WorkerContext(Protocol):
    """
    What an algorithm's worker entry is called with: `run(context)`.

    Attributes:
        config: the structured `[train]` table, every recipe value decided.
        thinking: the spec's `thinking`.
        seed: the spec's `seed`.
        environment: loaded and checked; its `score` counts the spec's reward adapters in.
        split: the split to train on.
        model: folder that transformers loads.
        card: the model's facts.
        init_adapter: folder of a PEFT adapter to start from, or None.
        workdir: scratch space that is removed after the attempt.
        rollouts: where sampled episodes go.
        stop: returns True once the run should save a checkpoint and return.

    """

    config: Any
    thinking: bool
    seed: int
    environment: Environment
    split: str
    model: Path
    card: ModelCard
    init_adapter: Path | None
    workdir: Path
    reporter: Reporter
    checkpoints: Checkpoints
    rollouts: Rollouts
    stop: Callable[[], bool]
