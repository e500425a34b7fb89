"""
The checks of an environment's hooks: how episodes open, go on and end.

A check is one function of the `Subject`; it yields what it finds. Each looks at one thing and
passes over what another one reports, so that one mistake is one finding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from flash.episodes import play
from flash.errors import EnvironmentFault
from flash.workbench.findings import Finding
from flash.workbench.probes import ENDLESS, GOLD, ScriptedModel, replies, said
from flash.workbench.subject import named

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from flash.values import Message
    from flash.workbench.probes import Trial
    from flash.workbench.subject import Subject

_ROLES: Final = frozenset({"system", "developer", "user", "assistant", "tool"})


def starts(subject: Subject) -> Iterator[Finding]:
    """Yield what keeps episodes from starting."""
    faults = [trial for trial in subject.trials if trial.fault is not None]
    if faults:
        ids = named([trial.task.id for trial in faults])
        yield Finding(
            "fail",
            "start",
            f"{len(faults)} of {len(subject.trials)} tasks do not start ({ids}): {faults[0].fault}",
            "correct the hook that is named; it is called for every episode of training",
        )


def messages(subject: Subject) -> Iterator[Finding]:
    """Yield openings that a chat template or a model can do nothing sensible with."""
    wrong = {
        trial.task.id: reason
        for trial in subject.played()
        if (reason := _wrong_opening(trial.opening)) is not None
    }
    if wrong:
        first = next(iter(wrong.values()))
        yield Finding(
            "fail",
            "messages",
            f"the opening of {named([*wrong])} {first}",
            'return messages such as {"role": "user", "content": "…"}, the question last',
        )


def _wrong_opening(opening: Sequence[Message]) -> str | None:
    roles = [message.get("role") for message in opening]
    strange = [role for role in roles if role not in _ROLES]
    if strange:
        return f"has a message of the role {strange[0]!r}, which chat templates do not know"
    if "system" in roles[1:]:
        return "has its system message after others, which most chat templates refuse"
    if not opening or roles[-1] not in {"user", "tool"}:
        return "does not end with a message that asks the model"
    if not opening[-1].get("content"):
        return "ends with an empty message"
    return None


def prompts(subject: Subject) -> Iterator[Finding]:
    """Yield a prompt that does not depend on the row."""
    trials = subject.played()
    differing = {trial.task.input for trial in trials}
    if len(differing) > 1 and len({str(trial.opening) for trial in trials}) == 1:
        yield Finding(
            "fail",
            "prompts",
            f"{len(trials)} different rows get the same prompt, so nobody can answer them",
            "put the row's input into the messages",
        )


def targets(subject: Subject) -> Iterator[Finding]:
    """Yield gold answers that are missing or cannot be meant."""
    trials = subject.trials
    broken = [trial for trial in trials if trial.target_fault is not None]
    missing = [trial for trial in trials if trial.target is None and trial.target_fault is None]
    blank = [trial for trial in trials if trial.target is not None and _is_blank(trial.target)]
    if broken:
        ids = named([trial.task.id for trial in broken])
        yield Finding(
            "fail",
            "targets",
            f"the gold answer of {ids} cannot be made: {broken[0].target_fault}",
            "correct the hook that is named (sft_completion, or the row's output)",
        )
    if blank:
        ids = named([trial.task.id for trial in blank])
        yield Finding(
            subject.gold_level(),
            "targets",
            f"the gold answer of {ids} says nothing",
            "write an output, or leave the field out of the row",
        )
    if trials and len(missing) == len(trials):
        yield Finding(
            subject.gold_level(),
            "targets",
            "no row has a gold answer, so there is nothing "
            + ("to hold the reward against" if subject.rewarded else f"{subject.algorithm} learns"),
            'give some rows an "output" that deserves the full score',
        )
    elif any(t.target for t in trials) and not blank and not any(t.gold for t in trials):
        yield Finding(
            "note",
            "targets",
            "the gold answers are not plain text (they call tools, or have parts), so the reward "
            "was not held against them",
            "score one of them by hand",
        )
    elif missing and not subject.rewarded:
        yield Finding(
            "fail",
            "targets",
            f"{len(missing)} of {len(trials)} rows have no gold answer "
            f"({named([trial.task.id for trial in missing])})",
            'give every row of the split an "output"',
        )


def _is_blank(target: Sequence[Message]) -> bool:
    said = [message for message in target if message.get("role") == "assistant"]
    return not any(message.get("content") or message.get("tool_calls") for message in said)


def episodes(subject: Subject) -> Iterator[Finding]:
    """Yield what the environment raises while an episode is under way."""
    faults = {
        (trial.task.id, probe): played.error
        for trial in subject.played()
        for probe, played in trial.played.items()
        if played.error not in {None, ENDLESS}
    }
    if faults:
        (task, probe), first = next(iter(faults.items()))
        yield Finding(
            "fail",
            "episodes",
            f"{len(faults)} episodes broke off, the first of {task} when the model said "
            f"{said(probe)}: {first}",
            "let the environment answer whatever a model may say; end the episode where it cannot",
        )


def endless(subject: Subject) -> Iterator[Finding]:
    """Yield episodes that only a limit ends."""
    found = [
        trial.task.id
        for trial in subject.played()
        if any(played.error == ENDLESS for played in trial.played.values())
    ]
    if found:
        yield Finding(
            "fail",
            "endless",
            f"{ENDLESS} ({named(found)})",
            "return done=True once nothing more can be won, and a smaller max_turns",
        )


def gold_turns(subject: Subject) -> Iterator[Finding]:
    """Yield gold conversations that are not the ones the environment holds."""
    wrong = {
        trial.task.id: (len(trial.gold), len(played.answers))
        for trial in subject.played()
        if (played := trial.played.get(GOLD)) is not None
        and played.episode is not None
        and len(played.answers) != len(trial.gold)
    }
    if wrong:
        gold, held = next(iter(wrong.values()))
        yield Finding(
            "warn",
            "gold-turns",
            f"the gold answer of {named([*wrong])} has {gold} turns, and the episode took {held}",
            "let the gold conversation go on exactly as the environment would",
        )


def openings(subject: Subject) -> Iterator[Finding]:
    """Yield tasks that do not open twice in the same way."""
    differing = [
        trial.task.id
        for trial in subject.repeated()
        if _opening_again(subject, trial) != [*trial.opening]
    ]
    if differing:
        yield Finding(
            "warn",
            "determinism",
            f"{named(differing)} opens differently every time",
            "draw from random.Random(the row's id), so that a run can be repeated",
        )


def shared_state(subject: Subject) -> Iterator[Finding]:
    """Yield episodes that go differently when others are under way."""
    golds = [trial.gold for trial in subject.trials if trial.gold]
    for trial in subject.repeated():
        if trial.turns == 1:
            continue
        for probe, reply in replies(trial, golds):
            together = trial.played[probe].episode
            alone = play(subject.environment, [trial.task], ScriptedModel([reply]))[0].episode
            if together is None or alone is None or together.messages == alone.messages:
                continue
            yield Finding(
                "fail",
                "shared-state",
                f"{trial.task.id} goes differently when other episodes are under way: "
                f"{len(together.messages)} messages together, {len(alone.messages)} alone",
                "read the state of an episode from its messages; an attribute of the environment "
                "is shared by all episodes",
            )
            return


CHECKS = (
    starts,
    messages,
    prompts,
    targets,
    episodes,
    endless,
    gold_turns,
    openings,
    shared_state,
)


def _opening_again(subject: Subject, trial: Trial) -> list[Message]:
    try:
        return list(subject.environment.start(trial.task))
    except EnvironmentFault:
        return []
