"""What is kept of a step's episodes."""

from __future__ import annotations

import pytest
from flash_algorithm_grpo.config import GrpoConfig
from flash_algorithm_grpo.practice import Practice, Practitioner, Sample, rollouts

from flash.api import Reward, Task
from flash.episodes import Answer, play
from flash.training.chat_model import Turn


def test_an_episode_that_failed_midway_is_kept_as_far_as_it_went(world):
    class Breaks(world):
        def step(self, task, messages, action):
            raise ValueError("no such move")

    turn = Turn(prompt=(1, 2, 3), tokens=(4, 5), log_probs=(-1.0, -2.0))
    said = Answer("<think>hm</think>e5", turn=turn)
    (played,) = play(Breaks(turns=2), [Task("t", "say 1")], lambda _: [(0, said)])
    reward = Reward(None, error=played.error)
    sample = Sample(played, reward, (0,), (0,), (0,), (0.0,), (0.0,), None)

    (kept,) = rollouts(Practice([[sample]], rollout_s=1.0, scoring_s=0.0), 7)

    assert kept.error == "the environment's step raised ValueError: no such move"
    assert kept.messages == (
        {"role": "user", "content": "say 1, please"},
        {"role": "assistant", "content": "e5"},
    )
    assert (kept.opening, kept.completion) == (1, None)
    assert (kept.thinking, kept.raw) == ("hm", "<think>hm</think>e5")
    assert (kept.prompt_tokens, kept.completion_tokens, kept.turns) == (3, 2, 1)


def practise(environment, texts, **settings):
    """Practise one step on one task, whose episodes say `texts`, turn by turn."""

    def chat(questions):
        for place, question in enumerate(questions):
            turn = int(question.stream.rpartition("/")[2])
            prompt = question.said.turn.prompt + question.said.turn.tokens if turn else (1,)
            said = texts[place][turn]
            yield place, Answer(said, turn=Turn(prompt, (2,) * len(said), (-1.0,) * len(said)))

    config = GrpoConfig(
        batch_size=1, group_size=len(texts), max_tokens=64, max_length=256, **settings
    )
    return Practitioner(
        config=config,
        seed=0,
        environment=environment,
        tasks=[Task("t", "say 1")],
        chat=chat,
        count_tokens=len,
        notice=pytest.fail,
    ).practise(0)


def by_turn(worth):
    """A reward of each episode's turns, from what it said."""

    def reward(task, episode):
        said = [one["content"] for one in episode.messages if one["role"] == "assistant"]
        each = [worth[text] for text in said]
        return Reward(sum(each), metadata={"per_turn_rewards": each})

    return reward


def test_a_thinking_trace_costs_the_turn_that_it_stands_in(world):
    environment = world(turns=2, reward=by_turn({"a": 1.0}))
    texts = [["<think>xxxx</think>a", "a"], ["a", "a"]]
    practice = practise(environment, texts, thinking_length_penalty_coef=0.1, scale_rewards="none")
    thought, plain = practice.samples

    assert thought.reward.score == pytest.approx(1.6)
    assert sorted(set(thought.advantages)) == pytest.approx([-0.2, 0.0])
    assert sorted(set(plain.advantages)) == pytest.approx([0.0, 0.2])
    assert thought.advantages[-1] == plain.advantages[-1] == 0.0


def test_a_group_of_equal_sums_that_differs_turn_by_turn_is_not_flat(world):
    environment = world(turns=2, reward=by_turn({"a": 1.0, "b": 0.0}))

    assert practise(environment, [["a", "b"], ["b", "a"]]).flat == 0
    assert practise(environment, [["a", "b"], ["a", "b"]]).flat == 1
