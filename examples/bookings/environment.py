"""Messages that ask for a restaurant table: answer each with the booking as one JSON object."""

from __future__ import annotations

import json

from freesolo.datasets import TaskExample
from freesolo.environments import EnvironmentSingleTurn, RewardMetric, RewardResult

FIELDS = ("name", "people", "day", "time", "table")

SYSTEM = (
    "Extract the table booking as one line of JSON with the keys name, people (a number), "
    "day (mon to sun), time (H:MM) and table (inside, outside or any)."
)


class Bookings(EnvironmentSingleTurn):
    """Success means that every field is right; the metrics say which ones are."""

    def build_prompt_messages(self, example: TaskExample, prompt_text: str) -> list[dict]:
        """Return what the model is asked."""
        return [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": example.input},
        ]

    def score_response(self, example: TaskExample, response_text: str) -> RewardResult:
        """Compare values, not text: spacing and the order of the keys do not count."""
        gold = json.loads(example.output)
        try:
            said = json.loads(response_text)
        except ValueError:
            said = None
        valid = isinstance(said, dict) and said.keys() == gold.keys()
        right = {name: valid and is_same(said[name], gold[name]) for name in FIELDS}
        success = all(right.values())
        return RewardResult(
            score=float(success),
            success=success,
            metrics=(
                RewardMetric(name="valid_json", success=valid),
                *(RewardMetric(name=name, success=right[name]) for name in FIELDS),
            ),
        )


def is_same(said: object, gold: object) -> bool:
    """Say whether two JSON values are equal; `true` is not 1, and `4.0` is not 4."""
    return type(said) is type(gold) and said == gold


def load_environment() -> Bookings:
    """Return the environment; the SDK's loaders call this."""
    return Bookings()
