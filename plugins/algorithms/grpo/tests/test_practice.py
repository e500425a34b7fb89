"""What is kept of a step's episodes."""

from __future__ import annotations

from flash_algorithm_grpo.practice import Practice, Sample, rollouts

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
    sample = Sample(played, reward, (0,), (0,), (0,), (0.0,), (0.0,), None, 0)

    (kept,) = rollouts(Practice([[sample]], flat=0, rollout_s=1.0, scoring_s=0.0), 7)

    assert kept.error == "the environment's step raised ValueError: no such move"
    assert kept.messages == (
        {"role": "user", "content": "say 1, please"},
        {"role": "assistant", "content": "e5"},
    )
    assert (kept.opening, kept.completion) == (1, None)
    assert (kept.thinking, kept.raw) == ("hm", "<think>hm</think>e5")
    assert (kept.prompt_tokens, kept.completion_tokens, kept.turns) == (3, 2, 1)
