"""`flash rollouts`: what the model said at a step of training, and what it was worth."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, Final

import attrs
import click

from flash.cli.app import App, pass_app
from flash.cli.output import note, print_json, warn
from flash.errors import StoreError, UsageError
from flash.suggest import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from flash.plane.plane import Plane
    from flash.plane.runs import Run
    from flash.values import Rollout
    from flash.worker.rollouts import Sampled

JSON_KEYS: Final = {
    "run": "its id",
    "step": "the step that the episodes were sampled for",
    "episodes": "how many were sampled",
    "kept": "how many of them are in the store",
    "rollouts": "those that were asked for",
}

ROLLOUT_KEYS: Final = {
    "step": "the step",
    "task": "the task's id",
    "sample": "its number among the episodes of the task at this step, from 0",
    "messages": "the conversation, as `role` and `content`",
    "opening": "how many of the messages came before the model's first",
    "completion": "the text that was graded, or null where there is none",
    "thinking": "the trace before it",
    "raw": "the last answer as the model wrote it",
    "score": "the reward, or null where scoring failed",
    "success": "whether it counts as solved",
    "metrics": "the named parts of the reward",
    "reason": "why it was scored so, or null",
    "error": "why there is no score, or null",
    "advantage": "what the loss weighted it with; null where it is in no loss",
    "prompt_tokens": "tokens of the opening",
    "completion_tokens": "tokens sampled, of all turns",
    "turns": "how often the model answered",
    "truncated": "whether an answer was cut short",
}

DIFF_KEYS: Final = {
    "run": "its id",
    "steps": "the two steps",
    "tasks": "what both have",
}

TASK_KEYS: Final = {
    "task": "its id",
    "rollouts": "two arrays: its episodes at the one step and at the other",
}

_NAMED: Final = 8


@attrs.frozen
class Choice:
    """Which episodes of a step are asked for; all of them where nothing is set."""

    task: str | None = None
    best: int | None = None
    worst: int | None = None
    errors: bool = False

    @property
    def whole(self) -> bool:
        """Whether it leaves nothing out."""
        return self == Choice()

    def of(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """Return the episodes, the best or the worst first where those are asked for."""
        found = [r for r in rollouts if self.task in {None, r.task}]
        if self.errors:
            return [rollout for rollout in found if rollout.score is None]
        if self.best is not None:
            return by_score(r for r in found if r.score is not None)[: self.best]
        if self.worst is not None:
            return by_score((r for r in found if r.score is not None), worst=True)[: self.worst]
        return found


def by_score(
    rollouts: Iterator[Rollout] | Sequence[Rollout], *, worst: bool = False
) -> list[Rollout]:
    """Return the episodes, best first or worst first; those without a score come last."""

    def rank(rollout: Rollout) -> tuple[bool, float]:
        score = rollout.score or 0.0
        return rollout.score is None, score if worst else -score

    return sorted(rollouts, key=rank)


@click.command()
@click.argument("run")
@click.option(
    "--step", type=click.IntRange(min=1), metavar="N", help="Of step N; default: the newest."
)
@click.option("--task", metavar="ID", help="Only episodes of this task, in full.")
@click.option("--best", type=click.IntRange(min=1), metavar="K", help="The K with most reward.")
@click.option("--worst", type=click.IntRange(min=1), metavar="K", help="The K with least reward.")
@click.option("--errors", is_flag=True, help="Those whose scoring failed, and why.")
@click.option(
    "--diff",
    type=click.IntRange(min=1),
    nargs=2,
    metavar="A B",
    help="The tasks that steps A and B have in common, side by side.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@pass_app
def rollouts(
    app: App,
    /,
    run: str,
    *,
    step: int | None,
    diff: tuple[int, int] | None,
    as_json: bool,
    **choice: Any,
) -> None:
    """
    Show the episodes that RUN sampled to learn from, and what each was worth.

    RUN is an id, the start of one, or `last`. Without --step it is the newest step that has what
    is asked for. Every sampled episode is kept; of a very long run or a very big step, a part.
    """
    from flash.plane.plane import Plane

    if sum((choice["best"] is not None, choice["worst"] is not None, choice["errors"])) > 1:
        raise UsageError("--best, --worst and --errors exclude one another", hint="take one")
    if diff and step is not None:
        raise UsageError("--diff names its own steps", hint="leave --step out")
    plane = Plane(app.home)
    record = plane.find(run)
    reader = Reader(plane, record)
    chosen = Choice(**choice)
    if diff:
        _diff(reader, diff, chosen, as_json=as_json)
    else:
        _list(reader, step, chosen, as_json=as_json)


def _list(reader: Reader, step: int | None, choice: Choice, *, as_json: bool) -> None:
    from flash.cli import rollouts_view as view

    sampled = reader.newest(choice) if step is None else reader.of_step(step, choice)
    found = choice.of(sampled.rollouts)
    if as_json:
        print_json(
            {
                "run": reader.run.id,
                "step": sampled.step,
                "episodes": sampled.episodes,
                "kept": len(sampled.rollouts),
                "rollouts": [attrs.asdict(rollout) for rollout in found],
            }
        )
    elif found and not choice.whole:
        view.show_in_full(found)
    elif found:
        view.show_table(sampled, reader.run.id)
    else:
        note(_nothing(sampled, choice, everywhere=step is None))


def _nothing(sampled: Sampled, choice: Choice, *, everywhere: bool) -> str:
    where = "any step that is kept" if everywhere else f"step {sampled.step}"
    if not sampled.rollouts:
        return f"no episode of {where} was kept"
    if choice.errors:
        return f"no episode of {where} is without a score"
    return f"no episode of {where} has a score; --errors shows why"


def _diff(reader: Reader, steps: tuple[int, int], choice: Choice, *, as_json: bool) -> None:
    from flash.cli import rollouts_view as view

    if steps[0] == steps[1]:
        raise UsageError("--diff takes two different steps", hint=reader.steps_there_are(steps[0]))
    sides = [reader.of_step(step, choice) for step in steps]
    tasks = [task for task in tasks_of(sides[0]) if choice.task in {None, task}]
    common = [task for task in tasks if task in tasks_of(sides[1])]
    if not common:
        raise UsageError(
            f"steps {steps[0]} and {steps[1]} have no task in common",
            hint=reader.steps_that_share(sides[0]),
        )

    def of(side: Sampled, task: str) -> list[Rollout]:
        found = attrs.evolve(choice, task=task).of(side.rollouts)
        return by_score(found, worst=choice.worst is not None)

    pairs = [(task, [of(side, task) for side in sides]) for task in common]
    if as_json:
        listed = [
            {"task": task, "rollouts": [[attrs.asdict(r) for r in side] for side in found]}
            for task, found in pairs
        ]
        print_json({"run": reader.run.id, "steps": list(steps), "tasks": listed})
    else:
        for task, found in pairs:
            view.show_beside(task, steps, found)


def tasks_of(sampled: Sampled) -> list[str]:
    """Return the ids of the step's tasks in order, each once."""
    return list(dict.fromkeys(rollout.task for rollout in sampled.rollouts))


class Reader:
    """Reads the rollouts of one run; where something is not there, it says what is."""

    def __init__(self, plane: Plane, run: Run) -> None:
        from flash.worker.rollouts import kept_steps

        self.run = run
        self._store: Path = plane.store(run.id)
        self._steps = kept_steps(self._store)
        if not self._steps:
            raise _none_yet(plane, run)

    def read(self, step: int) -> Sampled:
        """Return what is kept of a step."""
        from flash.worker.rollouts import read_rollouts

        if step not in self._steps:
            message = f"the run {self.run.id} has no episodes of step {step}"
            raise UsageError(message, hint=self.steps_there_are(step))
        return read_rollouts(self._store, step)

    def newest(self, choice: Choice) -> Sampled:
        """Return the newest step with an episode that is asked for, or else with its task."""
        best: tuple[bool, Sampled] | None = None
        for sampled in self._all():
            if choice.of(sampled.rollouts):
                return sampled
            has_task = choice.task in {None, *tasks_of(sampled)}
            if best is None or has_task > best[0]:
                best = has_task, sampled
        if best is None:
            raise StoreError(
                f"no file of the run's {len(self._steps)} steps can be read",
                hint=f"they are in {self._store / 'rollouts'}",
            )
        has_task, sampled = best
        if not has_task:
            raise self._no_task("no step that is kept has an episode of task", choice, sampled)
        return sampled

    def of_step(self, step: int, choice: Choice) -> Sampled:
        """Return what is kept of a step; it has an episode of the task that is asked for."""
        sampled = self.read(step)
        if choice.task not in {None, *tasks_of(sampled)}:
            error = self._no_task(f"step {step} has no episode of task", choice, sampled)
            having = [other.step for other in self._all() if choice.task in tasks_of(other)]
            raise UsageError(
                error.message, hint=f"it is in {_steps(having)}" if having else error.hint
            )
        return sampled

    def _no_task(self, what: str, choice: Choice, sampled: Sampled) -> UsageError:
        tasks, task = tasks_of(sampled), str(choice.task)
        return UsageError(
            f'{what} "{task}"{did_you_mean(task, tasks)}',
            hint=f"step {sampled.step} has {_some(tasks)}",
        )

    def steps_there_are(self, near: int) -> str:
        """Return a sentence that names steps that are kept, those next to `near` first."""
        closest = sorted(self._steps, key=lambda step: abs(step - near))[:_NAMED]
        first, last, count = self._steps[0], self._steps[-1], len(self._steps)
        if count <= _NAMED:
            return f"it has {_steps(self._steps)}"
        nearest = _some(sorted(closest))
        return f"it has {count} steps from {first} to {last}; the nearest are {nearest}"

    def steps_that_share(self, sampled: Sampled) -> str:
        """Return a sentence that names steps with a task in common with this one."""
        tasks = set(tasks_of(sampled))
        others = (other for other in self._all() if other.step != sampled.step)
        sharing = (other.step for other in others if tasks.intersection(tasks_of(other)))
        found = sorted(itertools.islice(sharing, _NAMED))
        if not found:
            return f"no other step that is kept has a task of step {sampled.step}"
        return f"step {sampled.step} has tasks in common with {_steps(found)}"

    def _all(self) -> Iterator[Sampled]:
        """Yield the steps, newest first; a file that cannot be read is passed over and named."""
        from flash.worker.rollouts import read_rollouts

        for step in reversed(self._steps):
            try:
                sampled = read_rollouts(self._store, step)
            except StoreError as error:
                warn(error.message)
            else:
                yield sampled


def _none_yet(plane: Plane, run: Run) -> UsageError:
    """Say why there is nothing: it is too early, or the algorithm samples nothing."""
    name = f"the run {run.id} ({run.spec['algorithm']})"
    stepped = any(event.type in {"metric", "done"} for _, event in plane.events(run.id))
    if stepped:
        return UsageError(
            f"{name} has trained and kept no episodes",
            hint="only an algorithm that learns by practice, such as grpo, samples any; "
            f"flash status {run.id} shows the run's warnings",
        )
    if run.final:
        return UsageError(
            f"{name} is {run.state} and sampled nothing before that",
            hint=f"flash status {run.id} says why",
        )
    return UsageError(
        f"{name} has sampled nothing yet: it is {run.state}",
        hint=f"flash status {run.id} --follow watches it",
    )


def _steps(steps: Sequence[int]) -> str:
    return ("step " if len(steps) == 1 else "steps ") + _some(steps)


def _some(names: Sequence[object]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(map(str, names[:_NAMED])) + more if names else "none"
