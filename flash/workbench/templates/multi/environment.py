"""Orders: the model is asked for the item, the amount and the city of an order, one at a time."""

from __future__ import annotations

from freesolo.datasets import TaskExample
from freesolo.environments import (
    EnvironmentEpisode,
    EnvironmentMultiTurn,
    EnvironmentStepResult,
    RewardMetric,
    RewardResult,
)

QUESTIONS = {
    "item": "What is ordered?",
    "amount": "How many, in digits?",
    "city": "For which city?",
}

SYSTEM = "Read the customer's message and answer each question with one or two words."

# One example shows a small model the form; a large one hardly needs it.
EXAMPLE = ("We are out of green hats in Rome, so send three please.", "green hats", "3", "Rome")

MOST_WORDS = 6


class Orders(EnvironmentMultiTurn):
    """Each answer earns up to a third of the reward; success means that all of them are right."""

    def start_episode(self, example: TaskExample, prompt_text: str) -> list[dict]:
        """Return the example, and the message with the first question."""
        return [
            {"role": "system", "content": SYSTEM},
            *conversation(*EXAMPLE),
            conversation(example.input)[0],
        ]

    def max_episode_turns(self, example: TaskExample) -> int:
        """Return how often the model speaks."""
        return len(QUESTIONS)

    def step_episode(
        self, example: TaskExample, messages: list[dict], assistant_response: str
    ) -> EnvironmentStepResult:
        """
        Ask the next question, whatever the answer was.

        How far an episode is stands in its messages alone: many are under way at the same time.
        """
        asked = len(answers_in(messages))
        if asked == len(QUESTIONS):
            return EnvironmentStepResult(done=True)
        question = conversation(example.input)[2 * asked]
        return EnvironmentStepResult(done=False, messages=(question,))

    def score_episode(self, example: TaskExample, episode: EnvironmentEpisode) -> RewardResult:
        """Grade each answer by its own field."""
        gold = read_fields(example.output)
        grades = [
            grade(said, gold[name])
            for name, said in zip(QUESTIONS, answers_in(episode.messages), strict=False)
        ]
        return RewardResult(
            score=sum(grades) / len(QUESTIONS),
            success=sum(grades) == len(QUESTIONS),
            metrics=tuple(
                RewardMetric(name=name, score=one)
                for name, one in zip(QUESTIONS, grades, strict=False)
            ),
            # One number a turn: each answer is credited with its own grade.
            metadata={"per_turn_rewards": grades},
        )

    def sft_completion(self, example: TaskExample) -> list[dict]:
        """Return the conversation to learn from: what follows the opening."""
        gold = read_fields(example.output)
        return conversation(example.input, *(gold[name] for name in QUESTIONS))[1:]


def conversation(message: str, *answers: str) -> list[dict]:
    """Return the questions about a message in order, each with its answer where there is one."""
    turns = []
    for number, question in enumerate(QUESTIONS.values()):
        said = question if number else f"{message}\n\n{question}"
        turns.append({"role": "user", "content": said})
        answer = answers[number] if number < len(answers) else ""
        turns.append({"role": "assistant", "content": answer})
    return turns


def answers_in(messages: list[dict]) -> list[str]:
    """Return what the model has said so far; the answers of the example are not its own."""
    said = [message["content"] for message in messages if message["role"] == "assistant"]
    return said[len(QUESTIONS) :]


def grade(said: str, gold: str) -> float:
    """Return 1 for the gold answer, a half for few words with it among them, and 0 else."""
    words, wanted = (text.casefold().replace(".", " ").split() for text in (said, gold))
    if words == wanted:
        return 1.0
    starts = range(len(words) - len(wanted) + 1)
    found = any(words[start : start + len(wanted)] == wanted for start in starts)
    return 0.5 if found and len(words) <= MOST_WORDS else 0.0


def read_fields(text: str) -> dict[str, str]:
    """Return the fields of a row's `output`, which has one a line."""
    return dict(line.split(": ", 1) for line in text.splitlines())


def load_environment() -> Orders:
    """Return the environment; Flash calls this."""
    return Orders()
