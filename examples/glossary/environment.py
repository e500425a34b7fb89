"""What a word means, said in one short sentence."""

from __future__ import annotations

import re

from freesolo.datasets import TaskExample
from freesolo.environments import EnvironmentSingleTurn, RewardMetric, RewardResult

SHORTEST, LONGEST = 5, 12
SYSTEM = f"Answer in one short sentence of at most {LONGEST} words."

# Words that tie others together: a sentence has a share of them, a string of key words has not.
SMALL_WORDS = """
    a an and are as at be by can cannot does for from has have he her his how in into is it its
    keeps made makes not of on or our out she that the their them they to up used uses was we what
    when where which who with you your
"""
SMALL = frozenset(SMALL_WORDS.split())
SMALL_SHARE = 0.3
# A fact of this many letters also stands for longer words that begin with it.
STEM_LETTERS = 4


class Glossary(EnvironmentSingleTurn):
    """Success means one plain sentence, short enough, that names a fact of the word."""

    def build_prompt_messages(self, example: TaskExample, prompt_text: str) -> list[dict]:
        """Return what the model is asked."""
        return [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": example.input},
        ]

    def score_response(self, example: TaskExample, response_text: str) -> RewardResult:
        """
        Score 1 for a success, and less the more too long a right sentence is.

        What is no sentence, or says nothing of the word, has 0: it is never paid for its length.
        """
        text = response_text.strip()
        said = words_of(text)
        sentence = is_sentence(text, said)
        right = names_a_fact(said, example.metadata["word"], example.metadata["facts"])
        short = SHORTEST <= len(said) <= LONGEST
        score = min(1.0, (LONGEST / len(said)) ** 2) if sentence and right else 0.0
        return RewardResult(
            score=score,
            success=sentence and right and short,
            metrics=(
                RewardMetric(name="sentence", success=sentence),
                RewardMetric(name="right", success=right),
                RewardMetric(name="short", success=short),
                RewardMetric(name="words", score=float(len(said))),
            ),
        )


def words_of(text: str) -> list[str]:
    """Return the words of the text in small letters."""
    return re.findall(r"[a-z]+", text.lower())


def is_sentence(text: str, said: list[str]) -> bool:
    """Say whether it is one sentence: no list, no repetition, no string of key words."""
    heavy = [word for word in said if word not in SMALL]
    return (
        re.fullmatch(r"[A-Z][A-Za-z' -]*(, [A-Za-z' -]*)?[.!]", text) is not None
        and len(said) >= SHORTEST
        and len(said) - len(heavy) >= SMALL_SHARE * len(said)
        and len(set(heavy)) == len(heavy)
    )


def names_a_fact(said: list[str], word: str, facts: list[str]) -> bool:
    """Say whether a fact of the word is named; the word itself explains nothing."""
    own = word.split()
    return any(
        other == fact or (len(fact) >= STEM_LETTERS and other.startswith(fact))
        for other in said
        if not other.startswith(tuple(own))
        for fact in facts
    )


def load_environment() -> Glossary:
    """Return the environment; the SDK's loaders call this."""
    return Glossary()
