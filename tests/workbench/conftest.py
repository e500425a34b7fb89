"""A sound environment as objects, and the doctor without a model."""

from __future__ import annotations

from types import MappingProxyType

import pytest

from flash.values import Reward, Step, Task
from flash.workbench.doctor import Asked, diagnose
from flash.workbench.sampled import Sampling

WORDS = ["amber", "birch", "cedar", "delta", "ember", "fjord"]
WORDS += ["grove", "heath", "islet", "junco", "knoll", "larch"]


class Sound:
    """Rows that ask for two words; each right word is half of the score."""

    max_score_concurrency = 4
    counts = MappingProxyType({"train": 24, "eval": 16})

    def splits(self):
        return tuple(self.counts)

    def tasks(self, split):
        return [self.task(split, number) for number in range(self.counts[split])]

    def task(self, split, number):
        return Task(f"{split}-{number}", f"{split} question {number}: which two words?", number)

    def gold(self, task):
        return f"{WORDS[task.data % 12]} {WORDS[(task.data * 5 + 1) % 12]}"

    def start(self, task):
        return [{"role": "user", "content": task.input}]

    def step(self, task, messages, action):
        return Step(done=True)

    def max_turns(self, task):
        return 1

    def target(self, task):
        return [{"role": "assistant", "content": self.gold(task)}]

    def tools(self, task):
        return None

    def score(self, task, episodes):
        return [self.reward(task, episode.completion) for episode in episodes]

    def reward(self, task, said):
        wanted, words = self.gold(task).split(), said.split()
        right = [word == want for word, want in zip(words, wanted, strict=False)]
        score = sum(right) / 2 if len(words) <= 2 else 0.0
        return Reward(score, success=score == 1.0, metrics={"length": float(len(words))})


class Guessing(Sound):
    """The same over three turns: the environment asks for one word after the other."""

    def gold_words(self, task):
        return [WORDS[(task.data + turn) % 12] for turn in range(3)]

    def said(self, messages):
        return [one["content"] for one in messages if one["role"] == "assistant"]

    def max_turns(self, task):
        return 3

    def step(self, task, messages, action):
        if len(self.said(messages)) == 3:
            return Step(done=True)
        return Step(done=False, messages=({"role": "user", "content": "next?"},))

    def target(self, task):
        answers = [{"role": "assistant", "content": word} for word in self.gold_words(task)]
        question = {"role": "user", "content": "next?"}
        return [answers[0], question, answers[1], question, answers[2]]

    def score(self, task, episodes):
        return [self.rate(task, self.said(episode.messages)) for episode in episodes]

    def rate(self, task, said):
        right = [one == word for one, word in zip(said, self.gold_words(task), strict=False)]
        return Reward(sum(right) / 3, success=sum(right) == 3)


@pytest.fixture
def sound():
    return Sound


@pytest.fixture
def guessing():
    return Guessing


@pytest.fixture
def examine(tmp_path):
    """Return a function that tests an environment: the doctor's whole answer."""

    def run(load, **changed):
        settings = {
            "folder": tmp_path,
            "algorithm": "grpo",
            "rewarded": True,
            "split": "train",
            "tasks": 6,
            "configured": True,
            "ours": [],
            "missed": [],
            "sampling": Sampling(
                group_size=4,
                max_tokens=None,
                max_length=None,
                temperature=1.0,
                top_p=1.0,
                thinking=False,
            ),
            "model": None,
        } | changed
        model = settings.pop("model")
        opened = model if callable(model) else (lambda: model) if model else None
        load = load if callable(load) else lambda environment=load: environment
        return diagnose(Asked(**settings), load, opened, lambda _: None)

    return run


@pytest.fixture
def findings(examine):
    """Return a function that tests an environment: level and check of each finding."""

    def run(load, **changed):
        return [(one["level"], one["check"]) for one in examine(load, **changed)["findings"]]

    return run
