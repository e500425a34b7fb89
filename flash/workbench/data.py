"""The checks of the rows: splits, leaks between them, and what stands in a split twice."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Final

from flash.errors import EnvironmentFault
from flash.workbench.findings import Finding
from flash.workbench.subject import named

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from flash.values import Task
    from flash.workbench.subject import Subject

_FEW_ROWS: Final = 16
_LEAK_SHARE: Final = 0.05
_LONG_CHARACTERS: Final = 8000
_LONG_TIMES: Final = 10


def splits(subject: Subject) -> Iterator[Finding]:
    """Yield splits that cannot be read, and the one to train on where it is not there."""
    if subject.split not in {*subject.rows, *subject.unreadable}:
        there = ", ".join(subject.rows) or "none"
        yield Finding(
            "fail",
            "rows",
            f'there is no split "{subject.split}"; there is {there}',
            "name another one (environment.split), or add its rows",
        )
    for split, reason in subject.unreadable.items():
        yield Finding(
            "fail", "rows", f'the split "{split}" cannot be read: {reason}', "correct that row"
        )


def held_out(subject: Subject) -> Iterator[Finding]:
    """Yield an environment on which nobody could say whether training helped."""
    if not subject.unreadable and not any(split != subject.split for split in subject.rows):
        yield Finding(
            "warn",
            "held-out",
            f'"{subject.split}" is the only split, so whether a run improved cannot be told',
            "keep a part of the rows aside, in dataset/eval.jsonl",
        )


def few_rows(subject: Subject) -> Iterator[Finding]:
    """Yield a split that is too small to learn from or to tell anything by."""
    for split, tasks in subject.rows.items():
        if len(tasks) < _FEW_ROWS:
            use = "learn from" if split == subject.split else "judge by"
            yield Finding(
                "warn",
                "few-rows",
                f'the split "{split}" has {len(tasks)} rows, too few to {use}',
                "write more: some hundred to learn from, a hundred to judge by",
            )


def ids(subject: Subject) -> Iterator[Finding]:
    """Yield ids that several rows of a split have."""
    for split, tasks in subject.rows.items():
        again = [one for one, count in Counter(task.id for task in tasks).items() if count > 1]
        if again:
            yield Finding(
                "warn",
                "ids",
                f'several rows of "{split}" have the id {named(again)}',
                "give each row an id of its own: rollouts and scores are told apart by it",
            )


def duplicates(subject: Subject) -> Iterator[Finding]:
    """Yield rows that stand in a split twice."""
    for split, tasks in subject.rows.items():
        counts = Counter(_identity(subject, task) for task in tasks)
        again = sum(count - 1 for count in counts.values())
        if again:
            twice = [task.id for task in tasks if counts[_identity(subject, task)] > 1]
            yield Finding(
                "warn",
                "duplicates",
                f'{again} rows of "{split}" stand there twice ({named(twice)})',
                "leave one of each; the others count as often again",
            )


def contradictions(subject: Subject) -> Iterator[Finding]:
    """Yield rows that ask the same and have different gold answers."""
    for split, tasks in subject.rows.items():
        answers: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
        for task in tasks:
            answers[_text(task), str(task.metadata)].setdefault(_gold(subject, task), task.id)
        differing = [list(found.values()) for found in answers.values() if len(found) > 1]
        if differing:
            yield Finding(
                "warn",
                "contradictions",
                f'{len(differing)} inputs of "{split}" have several gold answers '
                f"({named(differing[0])})",
                "leave one answer of each, or say in the input what tells the rows apart",
            )


def leaks(subject: Subject) -> Iterator[Finding]:
    """Yield held-out rows that are trained on."""
    trained = {_identity(subject, task) for task in subject.rows.get(subject.split, ())}
    for split, tasks in subject.rows.items():
        if split == subject.split:
            continue
        seen = [task for task in tasks if _identity(subject, task) in trained]
        if seen:
            yield Finding(
                "fail" if len(seen) > _LEAK_SHARE * len(tasks) else "warn",
                "leaks",
                f'{len(seen)} of {len(tasks)} rows of "{split}" are trained on '
                f"({named([task.id for task in seen])})",
                f'take them out of "{subject.split}" or out of "{split}"; the held-out score '
                "would count what was learnt by heart",
            )


def long_rows(subject: Subject) -> Iterator[Finding]:
    """Yield rows far longer than the others, by their characters."""
    for split, tasks in subject.rows.items():
        lengths = sorted(len(task.input) for task in tasks)
        usual = lengths[len(lengths) // 2] if lengths else 0
        limit = max(_LONG_CHARACTERS, _LONG_TIMES * usual)
        found = [task for task in tasks if len(task.input) > limit]
        if found:
            longest = max(found, key=lambda task: len(task.input))
            yield Finding(
                "warn",
                "long-rows",
                f'{named([task.id for task in found])} of "{split}" has up to '
                f"{len(longest.input)} characters, where {usual} are usual",
                "shorten it or leave it out: a row longer than train.max_length is not trained on",
            )


CHECKS = (splits, held_out, few_rows, ids, duplicates, contradictions, leaks, long_rows)


def spread(tasks: Sequence[Task], count: int) -> list[Task]:
    """Return up to `count` of the tasks, evenly spread over them."""
    count = min(count, len(tasks))
    return [tasks[place * len(tasks) // count] for place in range(count)]


def _text(task: Task) -> str:
    """Return a row's text, whatever its case and spacing."""
    return " ".join(task.input.casefold().split())


def _gold(subject: Subject, task: Task) -> str:
    try:
        target = subject.environment.target(task)
    except EnvironmentFault:  # reported by `targets`
        return ""
    return str(target) if target else ""


def _identity(subject: Subject, task: Task) -> tuple[str, str]:
    """
    Return what two equal rows have in common: text and gold answer, or else all they carry.

    Text alone is not enough: it may be the same in every row, and the task in the metadata.
    """
    return _text(task), _gold(subject, task) or str(task.metadata)
