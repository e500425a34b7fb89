"""
GRPO by Flash and by stock TRL: seconds a step, rollouts, updates, memory, and the same gradient.

    .venv/bin/python bench/grpo.py

Both train SmolLM2-135M-Instruct with LoRA on the same prompts (4 a step, 8 completions each, up to
64 tokens), with the same reward, seed and threads, each run in a process of its own, alternating.
The first step of a run is warming up. TRL runs as it is by default, and tuned: no bfloat16, no
gradient checkpointing, and the better of two ways to batch, which a first round finds. By default
TRL computes in bfloat16, which is slow on a CPU that emulates it and fast on one that has it; Flash
stays with float32 on CPU. On the episodes of one step, the gradient of Flash is compared with that
of TRL's own code in the same float32, so that speed is not bought with a wrong result. Rollouts
alone are compared with transformers' `generate` on the model as TRL samples from it.
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
from grpo_child import GROUP, NEW_TOKENS, PROMPTS, RANK, Case
from machine import machine, save
from sft import computes_bfloat16, converted

ROOT = Path(__file__).parents[1]
CHILD = Path(__file__).with_name("grpo_child.py")

OFF = {"bf16": False, "gradient_checkpointing": False}
WAYS = {
    "a group a pass": {
        "per_device_train_batch_size": GROUP,
        "gradient_accumulation_steps": PROMPTS,
    },
    "half a group a pass": {
        "per_device_train_batch_size": GROUP // 2,
        "gradient_accumulation_steps": 2 * PROMPTS,
    },
}
ROWS = (8, 32)
NUMBERS = (
    *("step_s", "prompts_per_hour", "rollout_s", "update_s", "first_step_s", "memory_gib"),
    *("completion_tokens", "reward"),
)


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

    def run(self, child: str, steps: int, **more: Any) -> dict[str, Any]:
        """Run one child to its end."""
        case = Case(
            model=self._model, folder=str(self._folder), steps=steps, started_s=time.time(), **more
        )
        done = subprocess.run(
            [sys.executable, CHILD, child, json.dumps(attrs.asdict(case))],
            env=self._environ,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            sys.exit(f"{child} failed:\n{done.stderr[-4000:]}")
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        shown = {key: float(f"{value:.3g}") for key, value in answer.items()}
        print(f"  {child} {more.get('trl') or more.get('rows') or ''}: {shown}", flush=True)
        return answer


def compare(bench: Bench, *, steps: int, rounds: int) -> dict[str, Any]:
    """Find TRL's better way, then run both in turn; return the numbers and ratios."""
    tried = {name: bench.run("trl", 2, trl=OFF | way) for name, way in WAYS.items()}
    best = min(tried, key=lambda name: tried[name]["step_s"])
    runs: dict[str, list[dict[str, Any]]] = {"flash": [], "trl tuned": []}
    for _ in range(rounds):
        runs["flash"].append(bench.run("flash", 2 * steps))
        runs["trl tuned"].append(bench.run("trl", steps, trl=OFF | WAYS[best]))
    runs["trl default"] = [bench.run("trl", 2, trl=WAYS["a group a pass"])]
    summary = {name: summarise(each) for name, each in runs.items()}
    ours = summary["flash"]
    return {
        "tuned": {
            "chosen": best,
            "tried": {
                name: {key: run[key] for key in ("step_s", "memory_gib")}
                for name, run in tried.items()
            },
        },
        "runs": summary,
        "speed_ratios": {
            name: other["step_s"] / ours["step_s"]
            for name, other in summary.items()
            if name != "flash"
        },
        "memory_of_tuned": ours["memory_gib"] / summary["trl tuned"]["memory_gib"],
        "sampler_gap_nat": max(run["sampler_gap"] for run in runs["flash"]),
        **bench.run("check", 1),
        "rollouts_tokens_per_s": {rows: bench.run("rollouts", 3, rows=rows) for rows in ROWS},
    }


def summarise(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Return medians, and the spread of the steps."""
    medians = {key: statistics.median(run[key] for run in runs) for key in NUMBERS}
    steps = [run["step_s"] for run in runs]
    return medians | {"fastest_step_s": min(steps), "slowest_step_s": max(steps), "runs": len(runs)}


def main() -> None:
    """Measure, print the table, write bench/results/grpo.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--model", help="folder of SmolLM2; default: converted for this run")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        bench = Bench(asked.model or converted(folder), folder, asked.threads)
        results = compare(bench, steps=asked.steps, rounds=asked.rounds)
    show(results)
    result = {
        "benchmark": "grpo",
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "prompts_per_step": PROMPTS,
        "group_size": GROUP,
        "most_new_tokens": NEW_TOKENS,
        "lora_rank": RANK,
        "threads": asked.threads,
        "cpu_computes_bfloat16": computes_bfloat16(),
        "machine": machine("torch", "transformers", "trl", "peft", "flash-core"),
        "results": results,
    }
    print(f"\nwritten to {save('grpo', result).relative_to(ROOT)}")


def show(results: dict[str, Any]) -> None:
    """Print the tables."""
    print(
        f"\n{'':12}{'s a step':>10}{'spread':>13}{'rollout':>9}{'update':>8}{'GiB':>6}"
        f"{'prompts/h':>11}{'flash is':>10}"
    )
    for name, run in results["runs"].items():
        spread = f"{run['fastest_step_s']:.1f}-{run['slowest_step_s']:.1f}"
        ratio = results["speed_ratios"].get(name)
        print(
            f"{name:12}{run['step_s']:10.1f}{spread:>13}{run['rollout_s']:9.1f}{run['update_s']:8.1f}"
            f"{run['memory_gib']:6.2f}{run['prompts_per_hour']:11.0f}"
            + (f"{ratio:9.2f}x" if ratio else "")
        )
    print(f"memory: {results['memory_of_tuned']:.2f} of trl tuned")
    print(
        f"gradient against TRL's own code: {results['gradient_difference']:.1e}; "
        f"sampler against trainer: {results['sampler_gap_nat']:.1e} nat"
    )
    for rows, speeds in results["rollouts_tokens_per_s"].items():
        ratio = speeds["flash"] / speeds["generate"]
        print(
            f"{rows:4} rows: {speeds['flash']:.0f} tokens/s, generate {speeds['generate']:.0f}: "
            f"{ratio:.2f}x"
        )


if __name__ == "__main__":
    main()
