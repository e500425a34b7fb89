"""
The whole way in one command: train an adapter, score it and its base model, print a report.

    python examples/demo.py examples/bookings/configs/sft.toml

Everything it does is a public command that it shows first; the report is made of their `--json`
answers. Ctrl-C cancels the run it started.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import shlex
import subprocess
import sys
import textwrap
import time
from pathlib import Path

WIDTH, HEIGHT = 60, 7
SHOWN = 3


def main() -> int:
    """Train, evaluate, report; return the exit code."""
    parser = argparse.ArgumentParser(description="train, score before and after, report")
    parser.add_argument("config", type=Path, help="what to train")
    config = place(parser.parse_args().config.resolve())
    started = time.monotonic()
    run = answer("train", config, "--background")["run"]
    try:
        call("status", run, "--follow")
        status = answer("status", run)
        trained = time.monotonic()
        if status["state"] != "done":
            return 1
        after = answer("eval", run, "--against", status["spec"]["model"])
    except KeyboardInterrupt:
        stop(run)
        return 130
    ended = time.monotonic()
    before = after["against"]
    if status["rewards"]:
        print(headline("mean reward of what it sampled"))
        print(plot([reward for _, reward in status["rewards"]], unicode=is_unicode()))
    else:
        print(headline("loss"))
        losses = [max(loss, 1e-6) for _, loss in status["losses"]]
        print(plot(losses, unicode=is_unicode(), logarithmic=True))
    print(headline(f"held-out rows, {before['difference']['n']} that were not trained on"))
    print(scores(before, after))
    print(headline("what the two say"))
    print(examples(before["rows"], after["rows"]))
    print(headline("the adapter"))
    print(status["adapter"])
    print(f"trained in {trained - started:.0f} s, evaluated in {ended - trained:.0f} s")
    print(headline("next"))
    print(next_commands(run, config, practised=bool(status["rewards"])))
    return 0


def call(*words: str, capture: bool = False) -> str:
    """Show and run one flash command; what it reports meanwhile goes to the terminal."""
    print(f"\n$ {flash(*words)}", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "flash", *words],
        stdout=subprocess.PIPE if capture else None,
        text=True,
        check=False,
    )
    if done.returncode == 130:  # noqa: PLR2004 - how flash says that it was interrupted
        raise KeyboardInterrupt
    if capture and done.returncode:
        sys.exit(done.returncode)  # the command has said why
    return done.stdout or ""


def answer(*words: str) -> dict:
    """Run one flash command and return its JSON answer."""
    return json.loads(call(*words, "--json", capture=True))


def stop(run: str) -> None:
    """Cancel the run, whatever else is interrupted meanwhile."""
    print(f"\ninterrupted: cancelling run {run}; its checkpoints are kept", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        call("cancel", run)


def flash(*words: str) -> str:
    """Return the command as a person would type it here."""
    program = Path(sys.executable).with_name("flash")
    on_path = any(Path(folder) == program.parent for folder in os.get_exec_path())
    return shlex.join(["flash" if on_path else place(program), *words])


def place(path: Path) -> str:
    """Return the path as seen from the working directory, where it is below it."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def is_unicode() -> bool:
    """Say whether the terminal can show block characters."""
    return (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"


def headline(text: str) -> str:
    """Return a line that begins a part of the report."""
    return f"\n-- {text} " + "-" * max(0, WIDTH + 6 - len(text))


def plot(values: list[float], *, unicode: bool, logarithmic: bool = False) -> str:
    """Draw values over the steps; on a logarithmic scale each line is the same factor."""
    if not values:
        return "no step was reported"
    count = min(WIDTH, len(values))
    edges = [round(column * len(values) / count) for column in range(count + 1)]
    means = [sum(values[first:last]) / (last - first) for first, last in itertools.pairwise(edges)]
    heights = [math.log(mean) for mean in means] if logarithmic else means
    low, high = min(heights), max(heights)
    blocks = " ▁▂▃▄▅▆▇█" if unicode else " #"
    steps = len(blocks) - 1
    # The lowest column keeps one mark, so that it can be seen to be there.
    fills = [max(1, round((one - low) / ((high - low) or 1) * HEIGHT * steps)) for one in heights]
    lines = []
    for row in reversed(range(HEIGHT)):
        label = {HEIGHT - 1: f"{max(means):.3g}", 0: f"{min(means):.3g}"}.get(row, "")
        marks = "".join(blocks[min(steps, max(0, fill - row * steps))] for fill in fills)
        lines.append(f"{label:>7} |{marks}".rstrip())
    last = str(len(values))
    ruler = f"step 1{last:>{max(len(last) + 1, count - 6)}}"
    return "\n".join([*lines, f"{'':>7} +{'-' * count}", f"{'':>8} {ruler}"])


def scores(before: dict, after: dict) -> str:
    """Return the numbers of both with their noise bands, and whether the gain is beyond them."""
    gain = before["difference"]["success"]
    width = max(map(len, ["success", *after["metrics"]]))
    lines = [f"{'':<{width}}{'before':>10}{'after':>10}"]
    for name in ("success", *after["metrics"]):
        pair = [
            result["success"] if name == "success" else result["metrics"][name]
            for result in (before, after)
        ]
        # Most metrics are shares; one that is not stays a number.
        form = ".1%" if max(pair) <= 1 else ".1f"
        lines.append(f"{name:<{width}}{pair[0]:>10{form}}{pair[1]:>10{form}}")
    bands = [f"{low:.1%} to {high:.1%}" for low, high in (before["interval"], after["interval"])]
    band = f"{100 * gain['low']:+.1f} to {100 * gain['high']:+.1f}"
    lines += [
        "",
        f"success, 95 % band: before {bands[0]}, after {bands[1]}",
        f"gain on the same rows: {100 * gain['gain']:+.1f} points, 95 % band {band}",
        f"verdict: {gain['verdict']}",
    ]
    return "\n".join(lines)


def examples(before: list[dict], after: list[dict]) -> str:
    """Return some rows with both answers; the last one is still wrong, if any is."""
    pairs = list(zip(before, after, strict=True))
    wrong = [pair for pair in pairs if not pair[1]["success"]][:1]
    right = [pair for pair in pairs if pair[1]["success"]][: SHOWN - len(wrong)]
    return "\n\n".join(
        "\n".join(
            [
                *textwrap.wrap(f"asked    {old['input']}", 96, subsequent_indent=" " * 9),
                f"before   {one_line(old['completion'] or '')}",
                f"after    {one_line(new['completion'] or '')}",
                f"         which is {'right' if new['success'] else 'wrong'}",
            ]
        )
        for old, new in [*right, *wrong]
    )


def one_line(text: str, width: int = 86) -> str:
    """Return the text on one line of printable characters, cut where it is long."""
    line = " ".join(text.split())
    line = "".join(mark if mark.isprintable() else "?" for mark in line)
    return line if len(line) <= width else line[: width - 4] + " ..."


def next_commands(run: str, config: str, *, practised: bool) -> str:
    """Return commands worth trying, each with its purpose."""
    longer = "train.steps=80" if practised else "train.epochs=2"
    commands = [
        (flash("checkpoints", run), "every step that was saved, each can be evaluated"),
        (
            flash("train", config, "--set", longer, "--dry-run"),
            "what a change would do, before it runs",
        ),
        (flash("eval", run, "--temperature", "0.7"), "the same score with sampled answers"),
    ]
    if practised:
        worst = flash("rollouts", run, "--worst", "3")
        commands.insert(0, (worst, "what it sampled in training and was paid least for"))
    return "\n".join(f"{command}\n    {purpose}" for command, purpose in commands)


if __name__ == "__main__":
    sys.exit(main())
