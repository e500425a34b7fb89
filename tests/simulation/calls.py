"""Provider calls of a supervisor, done at drawn times: soon, late, in another order, or never."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flash.errors import Unreachable
from flash.plane.calls import Answer

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from .world import World


class SimulatedCalls:
    """
    Has the interface of `flash.plane.calls.Calls`, and no threads.

    A call has its effect at one time and its answer later; one that takes longer than its limit
    is given up, and may have its effect all the same. So may those of a supervisor that died.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._answers: list[tuple[Hashable, Answer]] = []
        self._under_way: set[Hashable] = set()
        self._alive = True

    def start(self, name: Hashable, what: str, work: Callable[[], Any], *, limit_s: float) -> None:
        if name in self._under_way:
            message = f"{name} is called twice at a time"
            raise AssertionError(message)
        self._under_way.add(name)
        clock, (effect_s, answer_s) = self._world.clock, self._times(limit_s)
        result: list[Answer] = []

        def act() -> None:
            if self._alive or self._world.random.random() < 0.5:
                result.append(self._done(work))

        def answer() -> None:
            if answer_s > limit_s:
                error = Unreachable(f"{what} did not answer within {limit_s:g} s", sent=True)
                self._answers.append((name, Answer(error=error)))
            else:
                self._answers.extend((name, one) for one in result)

        clock.after(effect_s, act)
        clock.after(min(answer_s, limit_s), answer)

    def finished(self) -> list[tuple[Hashable, Answer]]:
        """Return what was answered, in any order."""
        answers, self._answers = self._answers, []
        if self._world.weather.slow:
            self._world.random.shuffle(answers)
        now_s = self._world.clock.monotonic()
        for name, answer in answers:
            self._under_way.discard(name)
            if isinstance(answer.value, dict):
                for machine in self._world.cloud.machines:
                    if machine.request.key in answer.value:
                        machine.show(now_s)
        return answers

    def wait(self, timeout_s: float) -> None:
        """Let the world go on; it decides for how long."""
        self._world.between_rounds()

    def die(self) -> None:
        """Be the calls of a process that is no more."""
        self._alive = False

    def _times(self, limit_s: float) -> tuple[float, float]:
        """Return when the call has its effect, and when its answer comes."""
        weather, draw = self._world.weather, self._world.random
        if weather.chance(weather.hanging):
            return draw.uniform(0.0, 3 * limit_s), limit_s + 1.0
        answer_s = draw.choice((0.5, 5.0, 40.0)) if weather.chance(weather.slow) else 0.02
        return answer_s * draw.random(), answer_s

    def _done(self, work: Callable[[], Any]) -> Answer:
        with self._world.disk.process(kill_after=None):
            try:
                return Answer(work())
            except Exception as error:  # noqa: BLE001 - whatever a plugin raises is its answer
                return Answer(error=error)


class SimulatedThread:
    """A thread of `flash.plane.notices`, which the world's clock runs."""

    def __init__(
        self, world: World, *, target: Callable[[], None], name: str, daemon: bool
    ) -> None:
        self.world = world
        self._target = target
        self._alive = True

    def start(self) -> None:
        weather, draw = self.world.weather, self.world.random
        if not weather.chance(weather.hanging):
            late = weather.chance(weather.slow)
            self.world.clock.after(draw.choice((1.0, 30.0, 90.0)) if late else 0.02, self._run)

    def _run(self) -> None:
        with self.world.disk.process(kill_after=None):
            self._target()
        self._alive = False

    def is_alive(self) -> bool:
        return self._alive
