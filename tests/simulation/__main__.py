"""
Run worlds from the command line.

    python -m tests.simulation 17                     one seed
    python -m tests.simulation 17 --trace             and show what happened
    python -m tests.simulation 0:1000                 many
    python -m tests.simulation 0:400 --bugs 0/2       the first half of the planted bugs, each until
                                                      a seed catches it
    python -m tests.simulation 0:400 --bug "NAME"     one of them
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from typing import TYPE_CHECKING

from .bugs import BUGS, SEEN, plant
from .driver import STEPS, Trace, ground, run_seeds
from .truth import Broken
from .world import World

if TYPE_CHECKING:
    from collections.abc import Sequence


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("seeds", help="a seed, or first:last")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--trace", action="store_true")
    parser.add_argument("--keep-going", action="store_true", help="do not stop at a failure")
    parser.add_argument("--bug", help="plant a bug of the table")
    parser.add_argument("--bugs", help="plant each bug of a part of the table: 0/2, 1/2")
    asked = parser.parse_args()
    first, _, last = asked.seeds.partition(":")
    seeds = range(int(first), int(last) if last else int(first) + 1)
    if asked.bugs:
        part, _, parts = asked.bugs.partition("/")
        return max(_caught(name, seeds, asked.steps) for name in [*BUGS][int(part) :: int(parts)])
    if asked.bug:
        plant(asked.bug)
    if asked.trace:
        return max(_show(seed, asked.steps) for seed in seeds)
    return _run(seeds, asked.steps, keep_going=asked.keep_going)


def say(line: object) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _run(seeds: Sequence[int], steps: int, *, keep_going: bool) -> int:
    began_s = time.perf_counter()
    failed = done = 0
    for failure in run_seeds(seeds, steps=steps):
        done += 1
        if failure is not None:
            failed += 1
            say(failure)
            if not keep_going:
                break
    took_s = time.perf_counter() - began_s
    say(f"{done} seeds, {failed} failed, {took_s:.1f} s, {done / took_s:.1f} seeds/s")
    return 1 if failed else 0


def _caught(name: str, seeds: Sequence[int], steps: int) -> int:
    """Plant a bug in a process of its own; say what catches it, and return 0 if anything did."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            plant(name)
            likely = [SEEN[name]] if name in SEEN else []
            found = next(filter(None, run_seeds([*likely, *seeds], steps=steps)), None)
            # Falling over is not being caught.
            code = 0 if found is not None and found.reason.startswith("Broken") else 1
            say(f"{'CAUGHT' if code == 0 else 'MISSED'} {name}: {found}")
        except BaseException:  # noqa: BLE001 - said, and told by the exit code
            traceback.print_exc()
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _show(seed: int, steps: int) -> int:
    trace = Trace()
    try:
        with ground() as here:
            World(seed, here, trace=trace).run(steps)
    except (Exception, Broken):  # noqa: BLE001 - shown
        say("\n".join(trace.lines))
        traceback.print_exc()
        return 1
    say("\n".join(trace.lines))
    say(f"seed {seed}: {trace.digest}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
