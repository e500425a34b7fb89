"""Runs of GRPO on a tiny model: what is practised, reported, kept, saved and resumed."""

from __future__ import annotations

import math
import random
import shutil

import attrs
import pytest
import torch
from flash_algorithm_grpo.train import run
from safetensors.torch import load_file

from flash.api import EnvironmentFault, FlashError, Reward, SpecError, TrainingDataError
from flash.parity import GoldenSet
from flash.testing.worker import Checkpoints, Context

pytestmark = pytest.mark.slow


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def same_bits(one, other):
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_the_reward_rises_with_practice(make, world, sharp):
    def low_bytes(task, episode):
        said = episode.completion.encode()
        return Reward(sum(byte < 100 for byte in said) / (len(said) or 1))

    context = make(
        environment=world(reward=low_bytes),
        model=sharp,
        settings={"steps": 20, "group_size": 8, "learning_rate": 2e-2},
    )
    run(context)
    rewards = [step["reward"] for step in context.reporter.steps]

    assert sum(rewards[-5:]) / 5 > sum(rewards[:3]) / 3 + 0.15


def test_every_step_reports_its_numbers(make):
    context = make()
    run(context)
    steps = context.reporter.steps

    assert [(one["step"], one["total"]) for one in steps] == [(1, 3), (2, 3), (3, 3)]
    assert steps[0].keys() == {
        *("step", "total", "reward", "reward_std", "success", "reward/length", "flat_groups"),
        *("completion_tokens", "completion_tokens_p95", "truncated", "empty", "unscored"),
        *("episode_tokens", "rollout_s", "scoring_s", "rollout_tokens_per_s", "entropy"),
        *("clip_share", "sampler_gap", "sampler_gap_max", "loss", "grad_norm", "learning_rate"),
        *("update_s", "update_tokens_per_s", "memory_gib", "eta_s"),
    }
    assert steps[0]["sampler_gap"] < 1e-4
    assert steps[0]["grad_norm"] > 0
    assert 0 < steps[0]["entropy"] < math.log(260)
    assert steps[-1]["eta_s"] == 0


def test_every_sampled_episode_is_kept_with_its_advantage(make):
    context = make()
    run(context)
    kept = context.rollouts.by_step

    assert list(kept) == [1, 2, 3]
    assert [len(one) for one in kept.values()] == [8, 8, 8]
    for first in (0, 4):
        group = kept[1][first : first + 4]
        assert len({one.task for one in group}) == 1
        assert [one.sample for one in group] == [0, 1, 2, 3]
        mean = sum(one.score for one in group) / 4
        assert all((one.advantage > 0) == (one.score > mean) for one in group)
        assert sum(one.advantage for one in group) == pytest.approx(0, abs=1e-5)
    one = kept[1][0]
    assert one.messages[0]["content"].endswith("please")
    assert one.opening == 1
    assert 0 < one.completion_tokens <= 12
    assert one.turns == 1


def test_a_further_update_on_the_same_completions_reports_no_sampling(make):
    context = make(settings={"num_iterations": 2, "steps": 4})
    run(context)

    for name in ("sampler_gap", "rollout_s", "scoring_s", "rollout_tokens_per_s"):
        assert [name in one for one in context.reporter.steps] == [True, False, True, False]
    assert all(one["sampler_gap"] < 1e-4 for one in context.reporter.steps[::2])


@pytest.mark.parametrize("iterations", [1, 2])
def test_an_interrupted_run_ends_with_the_bits_of_one_that_was_not(make, iterations):
    settings = {"steps": 5, "num_iterations": iterations, "save_every": 2, "eval_every": 2}
    whole, stopped = make(settings=settings), make(settings=settings, stop_after=3)
    run(whole)
    run(stopped)
    shutil.rmtree(stopped.workdir, ignore_errors=True)
    random.seed(99)
    torch.manual_seed(99)
    resumed = make(settings=settings, store=stopped.checkpoints)
    run(resumed)

    assert len(stopped.reporter.steps) == 3
    assert [one["step"] for one in resumed.reporter.steps] == [4, 5]
    assert same_bits(resumed.checkpoints.final, whole.checkpoints.final)
    for step in resumed.rollouts.by_step:
        assert resumed.rollouts.by_step[step] == whole.rollouts.by_step[step]
    for name in ("reward", "loss", "grad_norm", "entropy"):
        assert [one[name] for one in resumed.reporter.steps] == [
            one[name] for one in whole.reporter.steps[3:]
        ]


@attrs.define(kw_only=True)
class StopsInAStep(Context):
    """Asked to stop when it is asked the `times`-th time in that phase of the third step."""

    phase: str
    times: int
    asked: int = 0

    def stop(self):
        self.asked += len(self.reporter.steps) == 2 and self.reporter.phases[-1] == self.phase
        return self.asked >= self.times


@pytest.mark.parametrize(("phase", "times"), [("rollout", 3), ("update", 1)])
def test_a_run_that_is_stopped_in_a_step_keeps_those_before_and_goes_on_with_the_same_bits(
    make, phase, times
):
    whole = make(settings={"steps": 4})
    run(whole)
    given = attrs.asdict(make(settings={"steps": 4}), recurse=False)
    stopped = StopsInAStep(**given, phase=phase, times=times)
    run(stopped)
    resumed = make(settings={"steps": 4}, store=stopped.checkpoints)
    saved = [one.step for one in stopped.checkpoints.saved]
    ended = stopped.checkpoints.final.exists()
    run(resumed)

    assert [one["step"] for one in stopped.reporter.steps] == [1, 2]
    assert list(stopped.rollouts.by_step) == ([1, 2] if phase == "rollout" else [1, 2, 3])
    assert saved == [2]
    assert not ended
    assert [one["step"] for one in resumed.reporter.steps] == [3, 4]
    assert same_bits(resumed.checkpoints.final, whole.checkpoints.final)


def test_several_turns_train_on_what_the_model_said_alone(make, world):
    context = make(environment=world(turns=3))
    run(context)
    kept = [one for step in context.rollouts.by_step.values() for one in step]

    assert {one.turns for one in kept} == {3}
    assert {len(one.messages) for one in kept} == {6}
    assert context.reporter.steps[0]["sampler_gap"] < 1e-4
    assert len(context.checkpoints.saved) == 1


def test_credit_goes_to_the_turns_that_earned_it(make, world):
    def by_turn(task, episode):
        said = [one["content"] for one in episode.messages if one["role"] == "assistant"]
        worth = [float(len(text)) for text in said]
        return Reward(sum(worth), metadata={"per_turn_rewards": worth})

    context = make(environment=world(turns=2, reward=by_turn))
    run(context)

    assert context.reporter.warnings == []
    assert context.reporter.steps[0]["grad_norm"] > 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([1.0], "has 1 numbers for 2 turns"),
        ([1.0, math.nan], "not a finite number"),
        ("ab", "is a str"),
    ],
)
def test_unusable_credit_by_turn_is_told_once_and_the_episode_is_credited(make, world, given, said):
    def reward(task, episode):
        worth = float(sum(episode.completion.encode()))
        return Reward(worth, metadata={"per_turn_rewards": given})

    context = make(
        environment=world(turns=2, reward=reward), settings={"steps": 1, "batch_size": 1}
    )
    run(context)

    (warning,) = context.reporter.warnings
    assert said in warning
    assert context.reporter.steps[0]["grad_norm"] > 0


@pytest.mark.parametrize(
    "settings",
    [
        {"loss": "dr_grpo", "scale_rewards": "none"},
        {"loss": "gspo", "num_iterations": 3},
        {"loss": "cispo", "num_iterations": 2},
        {"kl_penalty_coef": 0.1, "num_iterations": 2},
        {"max_tokens": 40, "max_length": 2000, "group_size": 6},
        {"stop_sequences": ["a", "e"]},
        {"top_p": 0.9, "temperature": 0.7, "num_iterations": 2},
    ],
    ids=str,
)
def test_every_way_to_train_moves_the_adapter(make, settings):
    context = make(settings=settings)
    run(context)

    assert all(math.isfinite(one["loss"]) for one in context.reporter.steps)
    assert any(tensor.abs().sum() > 0 for name, tensor in weights(context.checkpoints.final).items()
               if "lora_B" in name)  # fmt: skip
    assert ("kl" in context.reporter.steps[-1]) == ("kl_penalty_coef" in settings)


def test_a_penalty_holds_the_model_at_the_adapter_it_started_from(make):
    first = make(settings={"steps": 4})
    run(first)
    held, resumed = (
        make(
            settings={"kl_penalty_coef": 0.5, "steps": 2, "save_every": 1},
            init_adapter=first.checkpoints.final,
            stop_after=stop,
        )
        for stop in (None, 1)
    )
    run(held)
    run(resumed)
    again = make(
        settings={"kl_penalty_coef": 0.5, "steps": 2, "save_every": 1},
        init_adapter=first.checkpoints.final,
        store=resumed.checkpoints,
    )
    run(again)

    # At the first step the model is its own reference.
    assert held.reporter.steps[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert held.reporter.steps[1]["kl"] > 0
    assert again.reporter.steps[0]["kl"] == held.reporter.steps[1]["kl"]


def test_a_warm_start_goes_on_from_the_adapter(make):
    first = make(settings={"steps": 2})
    run(first)
    second = make(
        settings={"steps": 1, "learning_rate": 1e-9}, init_adapter=first.checkpoints.final
    )
    run(second)
    one, other = weights(first.checkpoints.final), weights(second.checkpoints.final)

    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)


def test_a_flat_reward_is_warned_of_and_moves_nothing(make, world):
    context = make(environment=world(reward=lambda *_: Reward(0.0)))
    run(context)
    (warning,) = context.reporter.warnings

    assert "the 4 rewards of every group have been equal for 3 steps" in warning
    assert [one["flat_groups"] for one in context.reporter.steps] == [1, 1, 1]
    assert all(
        not tensor.any()
        for name, tensor in weights(context.checkpoints.final).items()
        if "lora_B" in name
    )


def test_a_flat_reward_ends_the_run_where_that_is_asked_and_its_work_is_kept(make, world):
    context = make(
        environment=world(reward=lambda *_: Reward(1.0)), settings={"steps": 9, "stop_if_flat": 2}
    )

    with pytest.raises(FlashError, match="for 2 steps every group's rewards were all equal"):
        run(context)
    assert [one.step for one in context.checkpoints.saved] == [2]


def test_flat_steps_are_counted_with_further_updates_on_the_same_completions(make, world):
    context = make(
        environment=world(reward=lambda *_: Reward(1.0)),
        settings={"steps": 9, "stop_if_flat": 3, "num_iterations": 2},
    )

    with pytest.raises(FlashError, match="for 3 steps every group's rewards were all equal"):
        run(context)
    assert len(context.reporter.steps) == 3


def test_a_flat_group_costs_no_pass(make, world, monkeypatch):
    from flash.training.hotpath import TargetScores

    seen = []
    original = TargetScores.rows

    def rows(self, *arguments, **options):
        if torch.is_grad_enabled():  # a golden set is scored too, and trains nothing
            seen.append(1)
        return original(self, *arguments, **options)

    monkeypatch.setattr(TargetScores, "rows", rows)

    def reward(task, episode):
        return vowel(episode) if task.id == "train-0" else Reward(1.0)

    def vowel(episode):
        return Reward(float(len(episode.completion)))

    context = make(environment=world(reward=reward), settings={"steps": 5})
    run(context)
    groups = [
        one[first : first + 4] for one in context.rollouts.by_step.values() for first in (0, 4)
    ]

    assert len(seen) == sum(group[0].task == "train-0" for group in groups) > 0


def test_episodes_without_a_score_are_left_out_counted_and_kept(make, world):
    def reward(task, episode):
        if len(episode.completion) % 2:
            return Reward(None, error="odd")
        return Reward(float(len(episode.completion)))

    context = make(environment=world(reward=reward), settings={"group_size": 8})
    run(context)
    kept = [one for step in context.rollouts.by_step.values() for one in step]
    (warning,) = [text for text in context.reporter.warnings if "could not be scored" in text]

    assert "of step 1 could not be scored: odd" in warning
    assert all((one.advantage is None) == (one.error is not None) for one in kept)
    assert context.reporter.steps[0]["unscored"] == sum(
        one.error is not None for one in context.rollouts.by_step[1]
    ) / len(context.rollouts.by_step[1])


@pytest.mark.parametrize(
    "wrong", [None, "good", math.nan, [Reward(1.0)], Reward(None, error="down")], ids=str
)
def test_a_scorer_that_never_scores_ends_the_run_and_its_earlier_work_is_kept(make, world, wrong):
    calls = []

    class Turns(world):
        def score(self, task, episodes):
            calls.append(task)
            if len(calls) > 2:
                return [wrong] * len(episodes)
            return super().score(task, episodes)

    context = make(environment=Turns(tasks_by_split={"train": 5}))

    with pytest.raises(EnvironmentFault, match="8 of the 8 episodes of step 2 could not be scored"):
        run(context)
    assert [one.step for one in context.checkpoints.saved] == [1]
    assert all(one.error for one in context.rollouts.by_step[2])


def test_a_scorer_that_changes_torchs_settings_changes_nothing_of_training(make, world):
    def reward(task, episode):
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        random.seed(1)
        torch.manual_seed(1)
        return Reward(float(sum(episode.completion.encode())))

    def clean(task, episode):
        return Reward(float(sum(episode.completion.encode())))

    rude, polite = make(environment=world(reward=reward)), make(environment=world(reward=clean))
    run(rude)
    run(polite)

    (warning,) = rude.reporter.warnings
    assert "changed torch's default type and gradient mode; it was put back" in warning
    assert same_bits(rude.checkpoints.final, polite.checkpoints.final)


@pytest.mark.parametrize("settings", [{}, {"num_iterations": 2}], ids=str)
def test_a_group_without_any_score_is_no_trouble_to_a_penalty(make, world, settings):
    def reward(task, episode):
        if task.id == "train-0":
            return Reward(None, error="down")
        return Reward(float(len(episode.completion)))

    context = make(
        environment=world(reward=reward),
        settings={"kl_penalty_coef": 0.1, "steps": 5, "group_size": 2, **settings},
    )
    run(context)

    assert len(context.reporter.steps) == 5
    assert any(0 < one["unscored"] < 1 for one in context.reporter.steps)


def test_held_out_tasks_that_cannot_be_scored_end_the_run_and_its_work_is_kept(make, world):
    examined = []

    def reward(task, episode):
        examined.extend([task] if task.id.startswith("eval") else [])
        if len(examined) > 3:
            return Reward(None, error="down")
        return Reward(float(len(episode.completion)))

    context = make(environment=world(reward=reward), settings={"eval_every": 2})

    with pytest.raises(EnvironmentFault, match="none of the 3 held-out tasks could be scored"):
        run(context)
    assert [one.step for one in context.checkpoints.saved] == [2]


def test_a_task_that_cannot_be_started_is_left_out_and_counted(make, world):
    class Broken(world):
        def start(self, task):
            if task.id in {"train-1", "eval-2"}:
                raise KeyError("picture")
            return super().start(task)

    context = make(environment=Broken())
    run(context)

    reason = "cannot be started: the environment's start raised KeyError: 'picture'"
    assert context.reporter.warnings == [
        f"1 of 5 tasks of split 'train' {reason}; they are left out",
        f"1 of 3 tasks of split 'eval' {reason}; they are left out",
    ]


def test_an_environment_none_of_whose_tasks_can_be_started_is_refused(make, world):
    class Broken(world):
        def tools(self, task):
            raise KeyError("tool")

    with pytest.raises(EnvironmentFault, match="5 of 5 tasks of split 'train' cannot be started"):
        run(make(environment=Broken()))


def test_a_held_out_split_without_tasks_is_none(make, world):
    context = make(environment=world(tasks_by_split={"train": 5, "eval": 0}))
    run(context)

    assert "no held-out evaluation: split 'eval' has no tasks" in context.reporter.logs
    assert context.reporter.evaluations == []


def test_an_adapter_on_the_models_head_is_refused(make):
    with pytest.raises(SpecError, match=r"train\.target_modules: adapts the model's head"):
        run(make(settings={"target_modules": ["q_proj", "lm_head"]}))


def test_several_processes_are_refused(make, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")

    with pytest.raises(FlashError, match="GRPO trains in one process, and here are 2"):
        run(make())


def test_dropout_of_the_model_is_off_as_it_is_where_it_samples(make, tmp_path):
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    from flash.testing.models import make_tiny_model

    folder = make_tiny_model(tmp_path / "gpt2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256}
    config = GPT2Config(
        vocab_size=len(tokenizer),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        resid_pdrop=0.5,
        **sizes,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    context = make(model=folder, settings={"target_modules": ["c_attn"]})
    run(context)

    assert all(one["sampler_gap"] < 1e-4 for one in context.reporter.steps)


def test_prompts_without_room_are_left_out_and_counted(make, world):
    class Long(world):
        def start(self, task):
            return [{"role": "user", "content": "x" * (300 if task.id == "train-1" else 5)}]

    context = make(environment=Long())
    run(context)

    (warning,) = context.reporter.warnings
    assert "1 of 5 prompts of split 'train' are left out" in warning
    assert {one.task for step in context.rollouts.by_step.values() for one in step} == {
        "train-0",
        "train-2",
        "train-3",
        "train-4",
    }


def test_a_dataset_of_prompts_that_are_all_too_long_is_refused(make):
    with pytest.raises(TrainingDataError, match="none of the 5 prompts"):
        run(make(settings={"max_length": 20}))


def test_the_checkpoint_with_the_best_held_out_reward_is_told(make):
    context = make(settings={"steps": 12, "eval_every": 3, "group_size": 8, "learning_rate": 2e-2})
    run(context)
    best = [one["step"] for one in context.reporter.evaluations if one["best"]]

    assert set(best) <= {one.step for one in context.checkpoints.saved}
    assert any(f"is of the checkpoint of step {best[-1]}" in log for log in context.reporter.logs)


def test_each_task_comes_once_a_pass(make, world):
    context = make(environment=world(tasks_by_split={"train": 4}), settings={"steps": 4})
    run(context)
    tasks = [step[first].task for step in context.rollouts.by_step.values() for first in (0, 4)]

    assert sorted(tasks[:4]) == sorted(tasks[4:]) == [f"train-{n}" for n in range(4)]


def test_a_thinking_trace_costs_what_the_penalty_says(make, world, tmp_path):
    seen = []

    def reward(task, episode):
        seen.append(episode)
        return Reward(float(len(episode.completion)))

    context = make(
        environment=world(reward=reward, tasks_by_split={"train": 2}),
        settings={"thinking_length_penalty_coef": 0.5, "steps": 1},
        thinking=True,
        model=thinking_model(tmp_path),
    )
    run(context)
    kept = context.rollouts.by_step[1]

    assert sorted(one.thinking for one in kept) == sorted(one.thinking for one in seen)
    assert any(one.thinking for one in kept)
    for one in kept:
        paid = len(one.completion) - 0.5 * len(one.thinking.encode())
        assert one.score == pytest.approx(paid)


def thinking_model(folder):
    """A model whose template opens a trace that it never closes."""
    from transformers import AutoTokenizer

    from flash.testing.models import make_tiny_model

    model = make_tiny_model(folder / "thinking")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template += "{% if add_generation_prompt %}<think>{% endif %}"
    tokenizer.save_pretrained(model)
    return model


def test_a_store_of_its_own_starts_at_the_beginning(make, tmp_path):
    store = Checkpoints(tmp_path / "mine")
    run(make(store=store))

    assert [one.step for one in store.saved] == [3]


def test_every_saved_adapter_has_a_golden_set_with_what_ends_an_answer(make):
    context = make(settings={"stop_sequences": "@@", "kl_penalty_coef": 0.1}, thinking=True)
    run(context)

    for folder in [
        *(one.folder / "adapter" for one in context.checkpoints.saved),
        context.checkpoints.final,
    ]:
        golden = GoldenSet.read(folder)
        assert (golden.thinking, golden.stop_sequences) == (True, ["@@"])
        assert [one.messages[0]["content"] for one in golden.prompts] == [
            f"say {number}, please" for number in range(4)
        ]
    assert not context.reporter.warnings
