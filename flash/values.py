"""
The values that travel between the core and plugins: small, frozen, free of behaviour.

Everything here can be written as JSON by `attrs.asdict`, apart from `Task.data`, which stays in
the process that loaded the environment.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import attrs

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

Message = dict[str, Any]
"""One chat message as the OpenAI API writes it: `role`, `content`, and what else the turn needs."""

Severity = Literal["error", "warning"]
Outcome = Literal[
    "finished",
    "user_error",
    "preempted",
    "no_capacity",
    "stalled",
    "lost",
    "out_of_memory",
    "over_budget",
    "cancelled",
]
EventType = Literal[
    "phase",
    "metric",
    "evaluation",
    "rollouts",
    "checkpoint",
    "spend",
    "heartbeat",
    "log",
    "warning",
    "error",
    "done",
]


@attrs.frozen
class Problem:
    """
    Something wrong with a spec or a plan: where, what, and what to do.

    `path` is the dotted path in the TOML (`train.lora_rank`), or a file's path for a file that
    cannot be read. An error stops the submit; a warning is printed. `fault` says whose it is: what
    the user wrote, or an installed plugin.
    """

    path: str
    message: str
    hint: str | None = None
    severity: Severity = "error"
    fault: Literal["spec", "plugin"] = "spec"

    def __str__(self) -> str:
        text = f"{self.path}: {self.message}" if self.path else self.message
        return f"{text}; {self.hint}" if self.hint else text


@attrs.frozen
class Recipe:
    """A default that an algorithm decided for this spec, with its reason and where it is from."""

    value: Any
    reason: str
    source: str


@attrs.frozen
class ModelCard:
    """
    Facts about a base model, enough to plan a run without loading it.

    `memory_note` says what a user should know beyond the estimate; `licence` is an SPDX
    identifier where there is one. `thinking`: "none" never, "hybrid" on request, "always".
    """

    id: str
    parameters: int
    context_tokens: int
    hidden_size: int
    layers: int
    intermediate_size: int
    vocabulary: int
    thinking: Literal["none", "hybrid", "always"] = "none"
    licence: str = "unknown"
    memory_note: str = ""
    summary: str = ""


@attrs.frozen
class Need:
    """
    What a job needs of a machine; `memory_parts_gib` adds up to `memory_gib` and is shown to users.

    `memory_gib` is accelerator memory where there is one, else main memory, at the peak.
    """

    memory_gib: float
    memory_parts_gib: Mapping[str, float] = attrs.field(factory=dict)
    steps: int | None = None
    tokens: int | None = None


@attrs.frozen
class Offer:
    """
    What a provider would rent now. `price_usd_hour` is of the whole of it; this machine costs 0.

    `memory_gib` is the memory a job may use: the accelerator's, or the machine's on CPU.
    """

    provider: str
    id: str
    memory_gib: float
    accelerator: str | None = None
    count: int = 1
    region: str | None = None
    spot: bool = False
    price_usd_hour: float = 0.0


@attrs.frozen
class LaunchRequest:
    """
    One launch of a job.

    Attributes:
        key: at most 50 characters of `[a-z0-9-]`, carries owner, run and attempt; a provider
            writes it into the instance's name or tags before it creates anything.
        owner: this plane's identity, as in `Provider.list`.
        argv: the worker's command, run with the interpreter that has Flash installed.
        env: plain environment variables of the worker.
        caller: what the submitting shell said about its own machine: paths, proxies, devices. Of
            use to a provider that runs workers there, and to no other.
        secrets: values that must never reach a command line, a log or a disk that outlives the run.
        memory_gib: what the job needs, as in `Provider.offers`; a provider that shares a machine
            among launches keeps it free until the worker has taken it.
        workdir: the run's store folder, as the worker sees it.
        log: where the worker's stdout and stderr go, inside the store.

    """

    key: str
    owner: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    caller: Mapping[str, str]
    secrets: Mapping[str, str] = attrs.field(repr=False)
    memory_gib: float
    workdir: str
    log: str


@attrs.frozen
class Launch:
    """
    The answer to a launch: `accepted` with a reference, `rejected` with the error, or `unknown`.

    After `unknown` the core looks for the key before it does anything else.
    """

    state: Literal["accepted", "rejected", "unknown"]
    ref: Mapping[str, Any] = attrs.field(factory=dict)
    error: str | None = None


InstanceState = Literal[
    "queued",
    "starting",
    "running",
    "succeeded",
    "failed",
    "stopped",
    "preempted",
    "gone",
    "unknown",
]


@attrs.frozen
class Instance:
    """
    What a provider sees of one launch now; `gone` is a state, not an error.

    `ref` may say more than the launch's own did (`worker_pid`, an address). `exit_code` is the
    worker's, 128 + n where signal n ended it. `out_of_memory`: the machine killed it for memory.
    """

    key: str
    ref: Mapping[str, Any]
    state: InstanceState
    exit_code: int | None = None
    out_of_memory: bool = False
    bills: bool = False
    detail: str = ""


@attrs.frozen
class Task:
    """
    One row of an environment's dataset.

    `input` is the row's text as people read it; `data` is the environment's own object, opaque to
    the core, and `metadata` what the row carries beside it. `gold` is the text of the row's right
    answer, for reward adapters; None where the row has none, and wherever else a task is met.
    """

    id: str
    input: str
    data: Any = None
    metadata: Mapping[str, Any] = attrs.field(factory=dict)
    gold: str | None = None


@attrs.frozen
class Step:
    """An environment's answer to one action: new messages, and whether the episode is over."""

    done: bool
    messages: tuple[Message, ...] = ()
    final_text: str | None = None
    metadata: Mapping[str, Any] = attrs.field(factory=dict)


@attrs.frozen
class Episode:
    """
    One finished interaction, ready to be scored.

    Attributes:
        messages: the whole conversation, the environment's opening included.
        completion: the text that is graded: the last answer, without its thinking trace.
        thinking: the trace, empty where there is none.
        raw: the last answer as the model wrote it.
        truncated: the model ran out of tokens before it ended its turn.

    """

    messages: tuple[Message, ...]
    completion: str
    thinking: str = ""
    raw: str = ""
    truncated: bool = False
    metadata: Mapping[str, Any] = attrs.field(factory=dict)


@attrs.frozen
class Reward:
    """
    How one episode was scored.

    `score` is None exactly when scoring failed; then `error` says why. A failed scoring is never
    a zero. `metrics` are the environment's named parts.
    """

    score: float | None
    success: bool = False
    metrics: Mapping[str, float] = attrs.field(factory=dict)
    reason: str | None = None
    error: str | None = None
    metadata: Mapping[str, Any] = attrs.field(factory=dict)


@attrs.frozen(kw_only=True)
class Rollout:
    """
    One sampled episode of training, as it is kept in the run's store.

    Attributes:
        step: the optimizer step it was sampled for, from 1.
        task: the task's id.
        sample: which of the task's group it is, from 0.
        messages: the whole conversation; the first `opening` of them are the environment's.
        completion: the text that was graded; `thinking` the trace before it.
        raw: the last answer as the model wrote it.
        score: None exactly when there is none; then `error` says why.
        metrics: the environment's and the reward adapters' named parts.
        advantage: what the loss weighted it with; None where it is in no loss.
        prompt_tokens: of the opening. `completion_tokens`: sampled, of all turns.
        turns: the model's.

    """

    step: int
    task: str
    sample: int
    messages: tuple[Message, ...]
    opening: int
    completion: str | None
    thinking: str = ""
    raw: str = ""
    score: float | None
    success: bool = False
    metrics: Mapping[str, float] = attrs.field(factory=dict)
    reason: str | None = None
    error: str | None = None
    advantage: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    turns: int = 0
    truncated: bool = False


@attrs.frozen
class Event:
    """
    One typed line that a worker reports; `time_s` is seconds since the epoch.

    `data` by type: phase `{name}`; metric `{step, total, <name>: number…}`; evaluation
    `{step, <name>: number…}`; rollouts `{step, episodes, kept}`; checkpoint `{step, final}`;
    heartbeat `{}`; spend `{usd}`, what scoring has cost in this attempt so far; log and warning
    `{message}`; error `{kind, message, hint}`; done `{steps}`.
    """

    type: EventType
    time_s: float
    data: Mapping[str, Any] = attrs.field(factory=dict)


NoticeKind = Literal[
    "started", "attempt_ended", "done", "failed", "cancelled", "budget_warning", "resumed"
]


@attrs.frozen(kw_only=True)
class Notice:
    """
    Something that happened to a run, as a sink with `notices` is told of it.

    Told at least once: whoever hears an `id` twice heard one thing twice. `data` has plain facts,
    such as `attempt`, `outcome`, `error` and `hint`; a reader passes over names it does not know.
    """

    id: str
    run: str
    kind: NoticeKind
    time_s: float
    model: str
    algorithm: str
    data: Mapping[str, Any] = attrs.field(factory=dict)


@attrs.frozen
class RunInfo:
    """What a sink is told of the run it follows."""

    run: str
    attempt: int
    folder: str
    spec: Mapping[str, Any]


@attrs.frozen
class Address:
    """
    Where a server answers.

    `url` ends in `/v1`; with `socket` it is asked over that Unix socket. Every request carries
    `Authorization: Bearer` and the `key`.
    """

    url: str
    key: str = attrs.field(repr=False)
    socket: Path | None = None


@attrs.frozen(kw_only=True)
class ServedBase:
    """
    A base model to be served.

    Attributes:
        id: what requests call it.
        folder: with its weights and its tokenizer.
        context_tokens: most tokens of prompt and answer together, or None for the model's own.
        max_rank: the highest LoRA rank that is known to be needed.
        log: the file that the server's output is appended to.

    """

    id: str
    folder: Path
    context_tokens: int | None
    max_rank: int
    log: Path


@attrs.frozen(kw_only=True)
class ServedAdapter:
    """An adapter to be served: what requests call it, its PEFT folder, and its highest rank."""

    name: str
    folder: Path
    rank: int
