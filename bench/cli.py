"""
What a `flash` command costs before it does anything: wall time against bare Python.

    .venv/bin/python bench/cli.py

Each round runs every command once, in an order of its own, so that a busy moment of the machine
and what ran before fall on all of them alike. Every command is measured as installed, and with 50
more plugins in the path. Caches are warm.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import machine, save

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from distributions import install, plugin  # noqa: E402 - the tests' helper, found by the line above

EXTRA_PLUGINS = 50
PLUGIN = """
    import attrs
    from flash.api import SinkPlugin, hookimpl

    @attrs.frozen
    class Config:
        pass

    @hookimpl
    def flash_register_sinks():
        return [SinkPlugin(name="{name}", summary="one of many", make=print, config=Config)]
"""
CONFIG = """
model = "HuggingFaceTB/SmolLM2-135M-Instruct"

[environment]
path = "."

[train]
max_steps = 1
"""
ENVIRONMENT = """
from freesolo.environments import EnvironmentSingleTurn, RewardResult


class Echo(EnvironmentSingleTurn):
    def score_response(self, example, response):
        return RewardResult(reward=float(response == example.output))


def load_environment():
    return Echo()
"""


def main() -> None:
    """Measure, print the table, write bench/results/cli.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        commands = _commands(folder)
        times_s = _measure(commands, folder, rounds)
    bare_s = statistics.median(times_s["python -c pass"])
    rows = {name: _summary(measured, bare_s) for name, measured in times_s.items()}
    _print(rows)
    facts = machine("flash-core", "click", "attrs", "pluggy", "cattrs")
    result = {"benchmark": "cli", "rounds": rounds, "machine": facts, "results": rows}
    print(f"\nwritten to {save('cli', result).relative_to(ROOT)}")


def _commands(folder: Path) -> dict[str, tuple[list[str], dict[str, str]]]:
    """Return name -> (argv, environment), in the order in which they are run."""
    more = [
        plugin(f"extra-{number}", PLUGIN.format(name=f"extra-{number}"))
        for number in range(EXTRA_PLUGINS)
    ]
    site = install(more, folder / "plugins")
    project = folder / "project"
    (project / "dataset").mkdir(parents=True)
    (project / "run.toml").write_text(CONFIG)
    (project / "environment.py").write_text(ENVIRONMENT)
    (project / "dataset" / "train.jsonl").write_text('{"input": "a", "output": "a"}\n' * 20)

    flash = str(Path(sys.executable).with_name("flash"))
    alone = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "FLASH_HOME": str(folder / ".flash"),
    }
    crowded = alone | {"PYTHONPATH": str(site)}
    commands = {"python -c pass": ([sys.executable, "-c", "pass"], alone)}
    for suffix, environ in (("", alone), (f", {EXTRA_PLUGINS} more plugins", crowded)):
        for name in ("--version", "--help", "plugins", "train run.toml --dry-run"):
            commands[f"flash {name}{suffix}"] = ([flash, *name.split()], environ)
    return commands


def _measure(
    commands: dict[str, tuple[list[str], dict[str, str]]], folder: Path, rounds: int
) -> dict[str, list[float]]:
    times_s: dict[str, list[float]] = {name: [] for name in commands}
    order = random.Random(0)
    for number in range(rounds + 1):
        for name in order.sample(list(commands), len(commands)):
            argv, environ = commands[name]
            started = time.perf_counter()
            answer = subprocess.run(
                argv, env=environ, cwd=folder / "project", capture_output=True, check=False
            )
            took_s = time.perf_counter() - started
            if answer.returncode:
                sys.exit(f"{name} failed:\n{answer.stderr.decode()}")
            # The first round fills caches and writes byte code.
            if number:
                times_s[name].append(took_s)
    return times_s


def _summary(times_s: list[float], bare_s: float) -> dict[str, float]:
    low, median, high = statistics.quantiles(times_s, n=4)
    return {
        "median_ms": round(median * 1000, 1),
        "quartile_1_ms": round(low * 1000, 1),
        "quartile_3_ms": round(high * 1000, 1),
        "times_bare_python": round(median / bare_s, 2),
    }


def _print(rows: dict[str, dict[str, float]]) -> None:
    width = max(map(len, rows))
    print(f"{'command':<{width}}  {'median':>9}  {'quartiles':>15}  {'x bare':>6}")
    for name, row in rows.items():
        spread = f"{row['quartile_1_ms']:.0f} to {row['quartile_3_ms']:.0f} ms"
        print(
            f"{name:<{width}}  {row['median_ms']:>6.1f} ms  {spread:>15}"
            f"  {row['times_bare_python']:>6.2f}"
        )


if __name__ == "__main__":
    main()
