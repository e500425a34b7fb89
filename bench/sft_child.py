"""
One run of the SFT benchmark, in a process of its own: Flash, TRL, or an adapter's held-out loss.

    python sft_child.py flash|trl|evaluate CASE      prints one line of JSON
"""

from __future__ import annotations

import argparse
import json
import math
import random
import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

SEED = 7
RANK, BATCH, LEARNING_RATE = 16, 8, 5e-4
TRAINED, HELD_OUT = 64, 16

THINGS = [
    "lamp",
    "table",
    "river",
    "bottle",
    "engine",
    "jacket",
    "candle",
    "ladder",
    "basket",
    "mirror",
    "pencil",
    "helmet",
]
COLOURS = ["red", "blue", "green", "yellow", "black", "white", "silver", "orange"]
RULES = (
    "You sort orders for a small shop. Write one line for each kind of thing, in the order of the "
    "alphabet, with the colour in brackets and the number behind a colon."
)


def rows(count: int, seed: int, *, system: bool) -> list[dict[str, Any]]:
    """Orders to sort: long-tailed lengths, and a long system prompt where `system`."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        kinds = min(18, max(1, round(math.exp(draw.gauss(math.log(3.6), 0.8)))))
        order = [
            (draw.choice(THINGS), draw.choice(COLOURS), draw.randint(1, 99)) for _ in range(kinds)
        ]
        asked = ", ".join(f"{number} {colour} {thing}s" for thing, colour, number in order)
        answer = "\n".join(f"{thing} ({colour}): {n}" for thing, colour, n in sorted(order))
        opening = [{"role": "user", "content": f"Sort this order: {asked}."}]
        if system:
            # 300 tokens, the chat template's included.
            text = " ".join([RULES] * 7 + ["Be exact, be brief, add no word of your own."] * 3)
            opening.insert(0, {"role": "system", "content": text})
        made.append({"opening": opening, "target": [{"role": "assistant", "content": answer}]})
    return made


@attrs.frozen(kw_only=True)
class Case:
    """One run of a child process; `trl` holds its arguments, None is Flash."""

    system: bool
    steps: int
    trl: dict[str, Any] | None
    model: str
    adapter: str
    started_s: float = 0.0


@attrs.frozen
class Rows:
    """The rows as an environment with one split."""

    system: bool
    max_score_concurrency: int = 1

    def splits(self) -> Sequence[str]:
        """Name the one split, so that no held-out loss takes time."""
        return ["train"]

    def tasks(self, split: str) -> list[Any]:
        """Make the rows."""
        from flash.api import Task

        made = rows(TRAINED, SEED, system=self.system)
        return [Task(f"{split}-{number}", "", row) for number, row in enumerate(made)]

    def start(self, task: Any) -> list[dict[str, Any]]:
        """Return the prompt."""
        return list(task.data["opening"])

    def target(self, task: Any) -> list[dict[str, Any]]:
        """Return the answer."""
        return list(task.data["target"])

    def tools(self, _: Any) -> None:
        """Declare none."""


@attrs.define
class Recorder:
    """What is seen of a run: when each optimizer step ended, its useful tokens and its loss."""

    ended_s: list[float] = attrs.field(factory=list)
    tokens: list[int] = attrs.field(factory=list)
    losses: list[float] = attrs.field(factory=list)
    tokens_of_step: int = 0

    def batch(self, tokens: int) -> None:
        """Note the useful tokens of a batch, of which a step may have several."""
        self.tokens_of_step += tokens

    def step(self, loss: float) -> None:
        """Note the end of a step."""
        self.ended_s.append(time.time())
        self.losses.append(loss)
        self.tokens.append(self.tokens_of_step)
        self.tokens_of_step = 0

    def result(self, started_s: float) -> dict[str, Any]:
        """Return the run's numbers; its first step is warming up and counts for itself."""
        return {
            "tokens_per_s": sum(self.tokens[1:]) / (self.ended_s[-1] - self.ended_s[0]),
            "first_step_s": self.ended_s[0] - started_s,
            "memory_gib": peak_memory_gib(),
            "losses": self.losses,
        }


def peak_memory_gib() -> float:
    """Return the most main memory that this process has held."""
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30
    # On Linux getrusage's peak counts what the process was forked from.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


def documents(tokenizer: Any, model: Any, made: list[dict[str, Any]]) -> list[Any]:
    """Render rows as Flash does."""
    from flash.training.chat import ChatRenderer, Conversation, stop_tokens

    renderer = ChatRenderer(
        tokenizer, stop_tokens(tokenizer, model.generation_config), thinking=False
    )
    conversations = [Conversation(name=f"row {number}", **row) for number, row in enumerate(made)]
    return [one.document for each in conversations for one in renderer.render(each)]


def new_adapter(folder: str) -> tuple[Any, Any]:
    """Return SmolLM2 with the adapter that both start from, and the tokenizer."""
    from flash.training.loading import attach_lora, load_base

    base, tokenizer = load_base(Path(folder))
    model = attach_lora(
        base, rank=RANK, alpha=2 * RANK, targets="all-linear", base="bench", seed=SEED
    )
    return model, tokenizer


def run_flash(case: Case) -> dict[str, Any]:
    """Train by the plugin's own entry point."""
    from flash_algorithm_sft.config import SftConfig
    from flash_algorithm_sft.train import run
    from flash_model_smollm2 import CARD

    recorder = Recorder()

    class Reporter:
        def metrics(self, _: int, __: int, **values: float) -> None:
            recorder.step(values["loss"])

        def __getattr__(self, _: str) -> Callable[..., None]:
            return lambda *_, **__: None

    class Checkpoints:
        def newest(self) -> None:
            return None

        def save(self, *_: Any, **__: Any) -> None:
            pass

        def save_final(self, write: Callable[[Path], None]) -> None:
            write(Path(case.adapter))

    config = SftConfig(
        lora_rank=RANK,
        lora_alpha=2 * RANK,
        learning_rate=LEARNING_RATE,
        batch_size=BATCH,
        max_length=1024,
        max_steps=case.steps,
        eval_every=1000,
    )
    context = argparse.Namespace(
        config=config,
        thinking=False,
        seed=SEED,
        environment=Rows(case.system),
        split="train",
        model=Path(case.model),
        card=CARD,
        init_adapter=None,
        workdir=Path(case.adapter) / "work",
        reporter=Reporter(),
        checkpoints=Checkpoints(),
        stop=lambda: False,
    )
    from flash_algorithm_sft.trainer import FlashSftTrainer

    plain = FlashSftTrainer.training_step

    def counting(self: Any, model: Any, inputs: Any, *rest: Any) -> Any:
        recorder.batch(sum(len(one.tokens) for one in inputs["documents"]))
        return plain(self, model, inputs, *rest)

    FlashSftTrainer.training_step = counting
    run(context)
    return recorder.result(case.started_s)


def run_trl(case: Case) -> dict[str, Any]:
    """Train with TRL's own trainer; the rows are given as tokens and labels."""
    from datasets import Dataset
    from flash_algorithm_sft.trainer import FlashSftTrainer
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from flash.training.loading import save_adapter

    recorder = Recorder()

    class Steps(TrainerCallback):
        def on_log(self, *_: Any, logs: Any = None, **__: Any) -> None:
            if "grad_norm" in logs:
                recorder.step(logs["loss"])

    class Trainer(SFTTrainer):
        create_scheduler = FlashSftTrainer.create_scheduler

        def training_step(self, model: Any, inputs: Any, *rest: Any) -> Any:
            mask = inputs.get("attention_mask")
            recorder.batch(int(inputs["input_ids"].numel() if mask is None else mask.sum()))
            return super().training_step(model, inputs, *rest)

    model, tokenizer = new_adapter(case.model)
    made = documents(tokenizer, model, rows(TRAINED, SEED, system=case.system))
    trainer = Trainer(
        model=model,
        args=SFTConfig(
            output_dir=f"{case.adapter}/work",
            seed=SEED,
            max_steps=case.steps,
            learning_rate=LEARNING_RATE,
            warmup_steps=0.03,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            **(case.trl or {}),
        ),
        train_dataset=Dataset.from_dict(
            {
                "input_ids": [one.tokens for one in made],
                "labels": [one.labels for one in made],
            }
        ),
        processing_class=tokenizer,
        callbacks=[Steps()],
    )
    trainer.train()
    result = recorder.result(case.started_s)
    save_adapter(model, Path(case.adapter))
    return result


def run_evaluation(case: Case) -> dict[str, Any]:
    """Return the adapter's loss on held-out rows, by transformers' and PEFT's own code."""
    import torch

    from flash.training.hotpath import HotPath, TargetScores
    from flash.training.loading import load_adapter

    model, tokenizer = new_adapter(case.model)
    load_adapter(model, Path(case.adapter))
    model.eval()
    plain = HotPath(packing=False, sharing=False, head=False, lora=False)
    scores_of = TargetScores(model, plain, print)
    total = trained = 0.0
    held_out = documents(tokenizer, model, rows(HELD_OUT, SEED + 1, system=case.system))
    with torch.no_grad():
        for row in scores_of.rows(held_out, budget=1):
            total -= float(scores_of(model, row).log_probs_K.sum())
            trained += len(row.targets_K)
    return {"loss": total / trained}


CHILDREN = {"flash": run_flash, "trl": run_trl, "evaluate": run_evaluation}

if __name__ == "__main__":
    print(json.dumps(CHILDREN[sys.argv[1]](Case(**json.loads(sys.argv[2])))))
