"""
Does GRPO teach anything: the glossary example with several seeds, held-out before and after.

    .venv/bin/python bench/grpo_learning.py

Each seed is a run of `examples/glossary/configs/rl.toml` by the public commands, one after the
other: `flash train`, then `flash eval RUN --against` the base model, greedy, on the words that were
not trained on. What is kept of a run: the reward and the success rate of what it sampled at each
step, its own held-out examinations on the way, and the final held-out success with its 95 %
interval beside the base model's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

from machine import machine, save

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "examples" / "glossary" / "configs" / "rl.toml"
SEEDS = (1, 2, 3)
LIMIT_S = 15 * 60
POLL_S = 5
UNDER_WAY = ("queued", "provisioning", "running")


class Flash:
    """The command line with a home of its own, so that every run starts from nothing."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._environ = {**os.environ, "FLASH_HOME": str(home)}

    def call(self, *words: str) -> Any:
        """Run one command and return its JSON answer."""
        done = subprocess.run(
            [sys.executable, "-m", "flash", *words, "--json"],
            env=self._environ,
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode:
            sys.exit(f"flash {' '.join(words)} failed")  # it has said why
        return json.loads(done.stdout)

    def train(self, seed: int) -> str:
        """Train with `seed` to the end; return the run."""
        run = str(self.call("train", str(CONFIG), "--set", f"seed={seed}", "--background")["run"])
        try:
            while (status := self.call("status", run))["state"] in UNDER_WAY:
                time.sleep(POLL_S)
        except KeyboardInterrupt:
            self.call("cancel", run)
            raise
        if status["state"] != "done":
            sys.exit(f"the run of seed {seed} is {status['state']}: {status['error'] or ''}")
        return run

    def events(self, run: str, kind: str) -> list[dict[str, Any]]:
        """Return what the worker reported, in order."""
        lines = [
            line
            for path in sorted((self._home / "runs" / run).glob("attempts/*/events.jsonl"))
            for line in path.read_text(encoding="utf-8").splitlines()
        ]
        return [event for event in map(json.loads, lines) if event["type"] == kind]


def learn(flash: Flash, seed: int) -> dict[str, Any]:
    """Train and evaluate with one seed; return what is kept of it."""
    started = time.monotonic()
    run = flash.train(seed)
    trained = time.monotonic()
    after = flash.call("eval", run, "--against", flash.call("status", run)["spec"]["model"])
    ended = time.monotonic()
    before = after["against"]
    metrics, examinations = flash.events(run, "metric"), flash.events(run, "evaluation")
    return {
        "seed": seed,
        "train_s": round(trained - started, 1),
        "evaluate_s": round(ended - trained, 1),
        "before": held_out(before),
        "after": held_out(after),
        "success_gain": before["difference"]["success"],
        "mean_gain": before["difference"]["mean"],
        "steps": {
            # A step whose groups are all flat has no entropy: there is no pass through the model.
            name: [None if event.get(name) is None else round(event[name], 4) for event in metrics]
            for name in ("reward", "success", "flat_groups", "completion_tokens", "entropy")
        },
        "examinations": [
            {name: round(event[name], 4) for name in ("step", "reward", "success")}
            for event in examinations
        ],
    }


def held_out(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers of one evaluation, without its rows."""
    names = ("n", "success", "interval", "mean", "mean_interval", "metrics", "truncated")
    return {name: evaluation[name] for name in names}


def show(result: dict[str, Any]) -> None:
    """Print one seed's line."""
    before, after, gain = result["before"], result["after"], result["success_gain"]
    bands = [
        f"{one['success']:.1%} ({one['interval'][0]:.1%} to {one['interval'][1]:.1%})"
        for one in (before, after)
    ]
    seconds = result["train_s"] + result["evaluate_s"]
    print(
        f"seed {result['seed']}: {bands[0]} -> {bands[1]} of {after['n']}, "
        f"{gain['verdict']}, {seconds:.0f} s",
        flush=True,
    )


def main() -> None:
    """Run every seed and write the record; exit with 1 where one did not improve in time."""
    parser = argparse.ArgumentParser(description="train the glossary example with several seeds")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    asked = parser.parse_args()
    facts = machine("flash-core", "flash-algorithm-grpo", "torch", "transformers", "trl", "peft")
    with tempfile.TemporaryDirectory(prefix="flash-learning-") as folder:
        flash = Flash(Path(folder))
        results = []
        for seed in asked.seeds:
            results.append(learn(flash, seed))
            show(results[-1])
    result = {
        "benchmark": "grpo-learning",
        "config": CONFIG.relative_to(ROOT).as_posix(),
        "settings": tomllib.loads(CONFIG.read_text(encoding="utf-8")),
        "machine": facts,
        "seeds": results,
    }
    print(f"written to {save('grpo-learning', result).relative_to(ROOT)}")
    sys.exit(
        not all(
            one["success_gain"]["verdict"] == "better"
            and one["train_s"] + one["evaluate_s"] <= LIMIT_S
            for one in results
        )
    )


if __name__ == "__main__":
    main()
