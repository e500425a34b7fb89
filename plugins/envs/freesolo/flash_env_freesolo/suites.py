"""`evaluations.py`: held-out cases with graders of their own, as environments of one split."""

from __future__ import annotations

import inspect
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from freesolo.datasets import TaskExample
from freesolo.environments import EvalSuite, has_evaluations

from flash.api import EnvironmentFault
from flash_env_freesolo.faults import defined_at, faults_of
from flash_env_freesolo.rows import task_of
from flash_env_freesolo.scoring import graded_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from freesolo.environments import Environment as SdkEnvironment

    from flash.api import Environment, Episode, Message, Reward, Step, Task
    from flash_env_freesolo.isolation import PrivatePackage
    from flash_env_freesolo.scoring import Scorer

SPLIT: Final = "cases"


class Suite:
    """
    One `EvalSuite` behind Flash's `Environment` contract.

    Its cases are asked as the environment asks its own rows; the suite grades the text that an
    episode ends with.
    """

    def __init__(
        self, environment: Environment, suite: EvalSuite, package: PrivatePackage, scorer: Scorer
    ) -> None:
        self._environment = environment
        self._suite = suite
        self._package = package
        self._scorer = scorer
        self.max_score_concurrency = environment.max_score_concurrency

    def splits(self) -> Sequence[str]:
        """Return the one split."""
        return (SPLIT,)

    def tasks(self, split: str) -> Sequence[Task]:
        """Return the suite's cases in order."""
        if split != SPLIT:
            raise EnvironmentFault(f'a suite has no split "{split}", only "{SPLIT}"')
        hook = self._suite.cases
        with faults_of(self._package, hook):
            cases = list(hook())
        strangers = [case for case in cases if not isinstance(case, TaskExample)]
        if strangers:
            raise EnvironmentFault(
                f"{defined_at(hook)}: {type(strangers[0]).__name__} is not a TaskExample",
                hint="build cases with freesolo.datasets.load_dataset([…]).examples",
            )
        return list(map(task_of, cases))

    def start(self, task: Task) -> list[Message]:
        """Return the environment's opening messages."""
        return self._environment.start(task)

    def step(self, task: Task, messages: Sequence[Message], action: str) -> Step:
        """Answer as the environment does."""
        return self._environment.step(task, messages, action)

    def max_turns(self, task: Task) -> int:
        """Return the environment's cap."""
        return self._environment.max_turns(task)

    def target(self, task: Task) -> list[Message] | None:
        """Return the environment's gold continuation."""
        return self._environment.target(task)

    def tools(self, task: Task) -> list[dict[str, Any]] | None:
        """Return the environment's tools."""
        return self._environment.tools(task)

    def score(self, task: Task, episodes: Sequence[Episode]) -> list[Reward]:
        """Return the suite's grade of each episode, in order; a failure is data."""
        hook = self._suite.score
        texts = map(graded_text, episodes)
        return [self._scorer.graded(hook, partial(hook, task.data, text)) for text in texts]


def load_suites(
    package: PrivatePackage, sdk: SdkEnvironment, params: Mapping[str, Any]
) -> list[EvalSuite]:
    """
    Return the suites of `evaluations.py`, none where there is no such file.

    Taken from its `load_evaluations`, which gets the SDK's environment and the `params` that it
    names, or from its list `EVALUATIONS`.
    """
    if not has_evaluations(package.folder):
        return []
    path = package.folder / "evaluations.py"
    with faults_of(package):
        module = package.load("evaluations")
        factory = getattr(module, "load_evaluations", None)
        if factory is not None:
            accepted = inspect.signature(factory).parameters
            known = {**params, "environment": sdk}
            suites = factory(**{name: known[name] for name in accepted if name in known})
        else:
            suites = getattr(module, "EVALUATIONS", None)
        if isinstance(suites, EvalSuite):
            suites = [suites]
        if suites is None:
            raise EnvironmentFault(
                f"{path}: defines neither load_evaluations nor EVALUATIONS",
                hint="define load_evaluations() returning a list of EvalSuite",
            )
        found = list(suites)
        strangers = [suite for suite in found if not isinstance(suite, EvalSuite)]
        names = [] if strangers else [str(suite.name) for suite in found]
    if strangers:
        raise EnvironmentFault(
            f"{path}: {type(strangers[0]).__name__} is not an EvalSuite",
            hint="return EvalSuite objects of freesolo.environments",
        )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise EnvironmentFault(
            f'{path}: two suites are called "{twice[0]}"', hint="give each a `name` of its own"
        )
    return found
