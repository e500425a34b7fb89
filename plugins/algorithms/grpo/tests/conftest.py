from __future__ import annotations

import attrs
import pytest
import torch
from flash_algorithm_grpo.config import GrpoConfig

from flash.api import Reward, Step, Task
from flash.testing.models import make_tiny_model
from flash.testing.worker import Checkpoints, Context

SETTINGS = {
    "lora_rank": 4,
    "lora_alpha": 8.0,
    "learning_rate": 1e-2,
    "steps": 3,
    "batch_size": 2,
    "group_size": 4,
    "max_tokens": 12,
    "max_length": 128,
    "eval_every": 50,
}


def high_bytes(task, episode):
    """The share of high bytes: it differs between the answers of a tiny model."""
    text = episode.completion
    share = sum(byte >= 100 for byte in text.encode()) / (len(text.encode()) or 1)
    return Reward(share, success=share > 0.5, metrics={"length": float(len(text))})


@attrs.define(kw_only=True)
class Bytes:
    """Asks for anything; `turns` times where that is more than once. `reward` scores an episode."""

    turns: int = 1
    reward: object = high_bytes
    tasks_by_split: dict[str, int] = attrs.field(factory=lambda: {"train": 5, "eval": 3})
    max_score_concurrency: int = 1

    def splits(self):
        return list(self.tasks_by_split)

    def tasks(self, split):
        return [Task(f"{split}-{n}", f"say {n}") for n in range(self.tasks_by_split[split])]

    def start(self, task):
        return [{"role": "user", "content": f"{task.input}, please"}]

    def tools(self, task):
        return None

    def target(self, task):
        return None

    def max_turns(self, task):
        return self.turns

    def step(self, task, messages, action):
        said = sum(message["role"] == "assistant" for message in messages)
        done = said == self.turns
        return Step(done, () if done else ({"role": "user", "content": f"more {said}"},))

    def score(self, task, episodes):
        return [self.reward(task, episode) for episode in episodes]


@pytest.fixture(scope="session")
def world():
    """The environment's class: `world(turns=2, reward=…)`."""
    return Bytes


@pytest.fixture(autouse=True)
def one_thread():
    """Threads cost small matrices more than they give, a lot more on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_decided_model(folder, scale=7):
    """A tiny model that can be sure of a token: its words are `scale` times further apart."""
    from transformers import AutoModelForCausalLM

    make_tiny_model(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_input_embeddings().weight *= scale
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return make_decided_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def sharp(tmp_path_factory):
    """One that has learned, or unlearned, a lot after a few steps."""
    return make_decided_model(tmp_path_factory.mktemp("models") / "sharp", scale=15)


@pytest.fixture
def make(tiny, tmp_path):
    """Make a context; each has a store of its own unless one is given."""
    count = 0

    def make(*, environment=None, store=None, settings=None, **more):
        nonlocal count
        count += 1
        return Context(
            config=GrpoConfig(**SETTINGS | (settings or {})),
            environment=environment or Bytes(),
            workdir=tmp_path / f"work-{count}",
            checkpoints=store or Checkpoints(tmp_path / f"store-{count}"),
            **{"model": tiny} | more,
        )

    return make
