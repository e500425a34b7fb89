"""
Make the dataset: questions for the meaning of a word, with the facts that an answer may name.

    python generate.py            writes dataset/train.jsonl and dataset/eval.jsonl

The words stand in `words.txt`, in order; every third one of a part is held out, so both splits have
animals, tools and trades, and no word is in both. The same files byte for byte on every machine.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SEED = 7
HELD_OUT = 3


def make_row(line: str) -> dict[str, Any]:
    """Return the row of one line of `words.txt`."""
    definition, facts = line.split(" | ")
    subject = definition.split(" is ")[0]
    # "Honey" and "ice cream" lose their capital, and nothing else changes.
    asked = subject[0].lower() + subject[1:]
    word = asked.split(" ", 1)[1] if asked.startswith(("a ", "an ", "the ")) else asked
    return {
        "input": f"What is {asked}?",
        "output": definition,
        "metadata": {"word": word, "facts": facts.split()},
    }


def make_rows() -> dict[str, list[dict[str, Any]]]:
    """Return the rows of each split."""
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "eval": []}
    for part in (HERE / "words.txt").read_text(encoding="utf-8").split("\n\n")[1:]:
        for place, line in enumerate(part.strip().splitlines()[1:], start=1):
            splits["train" if place % HELD_OUT else "eval"].append(make_row(line))
    rng = random.Random(SEED)
    for rows in splits.values():
        rng.shuffle(rows)
    return splits


def main() -> None:
    """Write one file a split."""
    parser = argparse.ArgumentParser(description="write the dataset of the glossary example")
    parser.add_argument("--out", type=Path, default=HERE / "dataset")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for split, rows in make_rows().items():
        path = options.out / f"{split}.jsonl"
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        path.write_text("".join(lines), encoding="utf-8", newline="\n")
        print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    main()
