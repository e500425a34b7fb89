"""
One run of the GRPO benchmark, in a process of its own.

    python grpo_child.py flash|trl|rollouts|check CASE      prints one line of JSON
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
from sft_child import COLOURS, THINGS, peak_memory_gib

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

SEED = 7
RANK, LEARNING_RATE = 16, 1e-5
PROMPTS, GROUP, NEW_TOKENS = 4, 8, 64
TASKS = 64


@attrs.frozen(kw_only=True)
class Case:
    """One run of a child process; `trl` holds its arguments, None is Flash."""

    model: str
    steps: int
    folder: str
    trl: dict[str, Any] | None = None
    rows: int = 0
    started_s: float = 0.0


def prompts(count: int = TASKS, seed: int = SEED) -> list[str]:
    """Return requests of about 120 tokens with the template's own, that few answers finish."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        things = ", ".join(
            f"{draw.randint(2, 99)} {draw.choice(COLOURS)} {draw.choice(THINGS)}s"
            for _ in range(11)
        )
        made.append(
            f"A shop has {things}. Tell a long story in which every one of these things is sold, "
            "with the name of each buyer and what the weather was like."
        )
    return made


def worth(text: str) -> float:
    """Score an answer: the share of its letters that are vowels, which is never the same."""
    return sum(letter in "aeiou" for letter in text) / max(1, len(text))


@attrs.frozen
class Stories:
    """The prompts as an environment with one split."""

    max_score_concurrency: int = 1

    def splits(self) -> Sequence[str]:
        """Name the one split, so that no evaluation takes time."""
        return ["train"]

    def tasks(self, split: str) -> list[Any]:
        """Make the rows."""
        from flash.api import Task

        return [Task(f"{split}-{number}", text) for number, text in enumerate(prompts())]

    def start(self, task: Any) -> list[dict[str, Any]]:
        """Return the prompt."""
        return [{"role": "user", "content": task.input}]

    def tools(self, _: Any) -> None:
        """Declare none."""

    def max_turns(self, _: Any) -> int:
        """Allow one answer."""
        return 1

    def step(self, *_: Any) -> Any:
        """End the episode."""
        from flash.api import Step

        return Step(done=True)

    def score(self, _: Any, episodes: Sequence[Any]) -> list[Any]:
        """Score each answer."""
        from flash.api import Reward

        return [Reward(worth(episode.completion)) for episode in episodes]


def flash_context(case: Case, metrics: Callable[..., None]) -> Any:
    """Return what the plugin's own entry point is called with."""
    from flash_algorithm_grpo.config import GrpoConfig
    from flash_model_smollm2 import CARD

    class Silent:
        def newest(self) -> None:
            return None

        def __getattr__(self, _: str) -> Callable[..., None]:
            return lambda *_, **__: None

    reporter = Silent()
    reporter.metrics = metrics  # type: ignore[attr-defined] # the one that is listened to
    return argparse.Namespace(
        config=GrpoConfig(
            lora_rank=RANK,
            lora_alpha=2 * RANK,
            learning_rate=LEARNING_RATE,
            steps=case.steps,
            batch_size=PROMPTS,
            group_size=GROUP,
            max_tokens=NEW_TOKENS,
            max_length=512,
            save_every=1000,
            eval_every=1000,
        ),
        thinking=False,
        seed=SEED,
        environment=Stories(),
        split="train",
        model=Path(case.model),
        card=CARD,
        init_adapter=None,
        workdir=Path(case.folder) / "work",
        reporter=reporter,
        checkpoints=Silent(),
        rollouts=Silent(),
        stop=lambda: False,
    )


def run_flash(case: Case) -> dict[str, Any]:
    """Train by the plugin's own entry point."""
    from flash_algorithm_grpo.train import run

    ended_s: list[float] = []
    seen: list[dict[str, float]] = []

    def metrics(_: int, __: int, **values: float) -> None:
        ended_s.append(time.time())
        seen.append(values)

    run(flash_context(case, metrics))
    rest = seen[1:]
    return result(case, ended_s) | {
        "rollout_s": statistics.median(one["rollout_s"] for one in rest),
        "update_s": statistics.median(one["update_s"] for one in rest),
        "completion_tokens": statistics.fmean(one["completion_tokens"] for one in rest),
        "reward": statistics.fmean(one["reward"] for one in rest),
        "sampler_gap": max(one["sampler_gap"] for one in seen),
    }


def run_trl(case: Case) -> dict[str, Any]:
    """Train with TRL's own trainer and its own sampling."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    ended_s: list[float] = []
    seen: list[dict[str, float]] = []
    rollouts: list[float] = []

    class Steps(TrainerCallback):
        def on_log(self, *_: Any, logs: Any = None, **__: Any) -> None:
            if "grad_norm" in logs:
                ended_s.append(time.time())
                seen.append(logs)

    class Trainer(GRPOTrainer):
        def _generate(self, *rest: Any) -> Any:
            began_s = time.monotonic()
            found = super()._generate(*rest)
            rollouts.append(time.monotonic() - began_s)
            return found

    def reward(completions: Any, **_: Any) -> list[float]:
        return [worth(one[0]["content"]) for one in completions]

    model, tokenizer = adapted(case.model)
    asked = [{"prompt": [{"role": "user", "content": text}]} for text in prompts()]
    trainer = Trainer(
        model=model,
        args=GRPOConfig(
            output_dir=f"{case.folder}/work",
            seed=SEED,
            max_steps=case.steps,
            learning_rate=LEARNING_RATE,
            num_generations=GROUP,
            max_completion_length=NEW_TOKENS,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            **(case.trl or {}),
        ),
        reward_funcs=reward,
        train_dataset=Dataset.from_list(asked),
        processing_class=tokenizer,
        callbacks=[Steps()],
    )
    trainer.train()
    taken = [after - before for before, after in pairwise(ended_s)]
    return result(case, ended_s) | {
        "rollout_s": statistics.median(rollouts[1:]),
        "update_s": statistics.median(
            step - rollout for step, rollout in zip(taken, rollouts[1:], strict=False)
        ),
        "completion_tokens": statistics.fmean(one["completions/mean_length"] for one in seen[1:]),
        "reward": statistics.fmean(one["reward"] for one in seen[1:]),
    }


def result(case: Case, ended_s: Sequence[float]) -> dict[str, Any]:
    """Return a run's times; its first step is warming up and counts for itself."""
    taken = [after - before for before, after in pairwise(ended_s)]
    step_s = statistics.median(taken)
    return {
        "step_s": step_s,
        "prompts_per_hour": PROMPTS * 3600 / step_s,
        "first_step_s": ended_s[0] - case.started_s,
        "memory_gib": peak_memory_gib(),
    }


def adapted(folder: str, *, disturbed: bool = False) -> tuple[Any, Any]:
    """Return SmolLM2 with the adapter that both start from, and the tokenizer."""
    import torch

    from flash.training.loading import attach_lora, load_base

    base, tokenizer = load_base(Path(folder))
    model = attach_lora(
        base, rank=RANK, alpha=2 * RANK, targets="all-linear", base="bench", seed=SEED
    )
    if disturbed:
        generator = torch.Generator().manual_seed(SEED)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                drawn = torch.randn(parameter.shape, generator=generator)
                parameter.data.copy_(0.01 * drawn)
    return model, tokenizer


def run_rollouts(case: Case) -> dict[str, Any]:
    """Sample `rows` completions by each way in turn; return the tokens a second of each."""
    import torch

    from flash.training.generate import OwnSampler
    from flash.training.sampler import Prompt, Sampling

    model, tokenizer = adapted(case.model, disturbed=True)
    model.eval()
    distinct = max(1, case.rows // GROUP)
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        for text in prompts(distinct)
    ]
    encoded = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    asked = [encoded[row * distinct // case.rows] for row in range(case.rows)]
    width = max(map(len, asked))
    pad = tokenizer.pad_token_id
    padded = torch.tensor([[pad] * (width - len(one)) + one for one in asked])
    mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in asked])

    def ours() -> int:
        sampler = OwnSampler(model, tokenizer)
        drawn = [Prompt(one, str(row), NEW_TOKENS) for row, one in enumerate(asked)]
        found = sampler.sample(drawn, Sampling(NEW_TOKENS, temperature=1.0))
        return sum(len(completion.tokens) for _, completion in found)

    def theirs() -> int:
        with torch.inference_mode():
            found = model.generate(
                input_ids=padded,
                attention_mask=mask,
                max_new_tokens=NEW_TOKENS,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
            )[:, width:]
        stops = (found == tokenizer.eos_token_id).cumsum(1)
        return int((stops == 0).sum() + (stops[:, -1] > 0).sum())

    speeds: dict[str, list[float]] = {"flash": [], "generate": []}
    for turn in range(case.steps + 1):
        for name, way in (("flash", ours), ("generate", theirs)):
            began_s = time.monotonic()
            tokens = way()
            if turn:
                speeds[name].append(tokens / (time.monotonic() - began_s))
    return {name: statistics.median(each) for name, each in speeds.items()}


def run_check(case: Case) -> dict[str, Any]:
    """Return how far the gradient of one step is from TRL's own code on the same episodes."""
    import torch
    from flash_algorithm_grpo import train as worker
    from trl import GRPOTrainer

    from flash.training.hotpath import HotPath

    made: list[Any] = []
    GRPOTrainer.train = lambda self, **_: made.append(self)
    worker.train(flash_context(case, lambda *_, **__: None), HotPath())
    (trainer,) = made
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    passes = trainer._practise()  # noqa: SLF001 - one step's episodes, without the loop

    def gradient(loss_of: Callable[[Any, Any], Any]) -> torch.Tensor:
        trainer.model.train()
        trainer.model.zero_grad()
        for one in passes:
            loss_of(trainer.model, dict(one)).backward()
        found = [one.grad for one in trainer.model.parameters() if one.grad is not None]
        return torch.cat([one.flatten().double() for one in found])

    ours = gradient(trainer.compute_loss)
    own = trainer._get_per_token_logps_and_entropies  # noqa: SLF001 - exchanged for TRL's
    trainer._get_per_token_logps_and_entropies = (  # noqa: SLF001 - same
        lambda *args, **kwargs: GRPOTrainer._get_per_token_logps_and_entropies(  # noqa: SLF001 - same
            trainer, *args, **kwargs
        )
    )
    theirs = gradient(lambda model, one: GRPOTrainer._compute_loss(trainer, model, one))  # noqa: SLF001 - same
    trainer._get_per_token_logps_and_entropies = own  # noqa: SLF001 - same
    return {"gradient_difference": float((ours - theirs).norm() / theirs.norm())}


CHILDREN = {"flash": run_flash, "trl": run_trl, "rollouts": run_rollouts, "check": run_check}

if __name__ == "__main__":
    print(json.dumps(CHILDREN[sys.argv[1]](Case(**json.loads(sys.argv[2])))))
