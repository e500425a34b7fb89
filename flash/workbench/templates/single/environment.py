"""Orders: from a customer's message to what is ordered, how many of it, and for which city."""

from __future__ import annotations

from freesolo.datasets import TaskExample
from freesolo.environments import EnvironmentSingleTurn, RewardMetric, RewardResult

FIELDS = ("item", "amount", "city")

SYSTEM = "Answer with three lines and nothing else: item, amount and city."

# One example shows a small model the form; a large one hardly needs it.
EXAMPLE = [
    {"role": "user", "content": "We are out of green hats in Rome, so send three please."},
    {"role": "assistant", "content": "item: green hats\namount: 3\ncity: Rome"},
]


class Orders(EnvironmentSingleTurn):
    """Each right field earns a part of the reward; success means that all is right."""

    def build_prompt_messages(self, example: TaskExample, prompt_text: str) -> list[dict]:
        """Return what the model is asked."""
        return [
            {"role": "system", "content": SYSTEM},
            *EXAMPLE,
            {"role": "user", "content": example.input},
        ]

    def score_response(self, example: TaskExample, response_text: str) -> RewardResult:
        """
        Pay for each right field, so that an answer need not be perfect to be better than another.

        A field that is said twice counts as not said: listing guesses earns nothing. The last
        tenth is for saying the three lines and nothing else.
        """
        gold, said = read_fields(example.output), read_fields(response_text)
        right = {name: said.get(name) == gold[name] for name in FIELDS}
        form = len(response_text.strip().splitlines()) == len(said) == len(FIELDS)
        return RewardResult(
            score=(3 * sum(right.values()) + (form and any(right.values()))) / 10,
            success=form and all(right.values()),
            metrics=(
                RewardMetric(name="form", success=form),
                *(RewardMetric(name=name, success=right[name]) for name in FIELDS),
            ),
        )


def read_fields(text: str) -> dict[str, str]:
    """Return the fields that a text says once, one a line, whatever the case of their values."""
    lines = [line.partition(":") for line in text.splitlines()]
    names = [name.strip() for name, _, _ in lines]
    return {
        name.strip(): value.strip().casefold()
        for name, _, value in lines
        if name.strip() in FIELDS and names.count(name.strip()) == 1
    }


def load_environment() -> Orders:
    """Return the environment; Flash calls this."""
    return Orders()
