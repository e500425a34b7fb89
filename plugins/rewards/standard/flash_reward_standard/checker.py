"""
The process that compares expressions: one JSON line in, one out, until standard input ends.

A completion can hold an expression that takes hours or all memory (`9^{9^{9^9}}`), and nothing
inside a process can stop that. So there is a process for it: an alarm ends it where a comparison
takes longer than `argv[1]` seconds, and its memory is bounded.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import resource
import signal
import sys
from typing import Any, Final

MEMORY_BYTES: Final = 3 << 30
_LATEX: Final = re.compile(r"\$|\\\(|\\\[|\\boxed")
_BARE: Final = 200


def main() -> None:
    """Answer until standard input ends."""
    from math_verify import parse, verify

    logging.disable()  # the library warns on every call that its own time limit is off
    with contextlib.suppress(OSError, ValueError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    seconds = float(sys.argv[1])

    def values(text: str) -> list[list[Any]]:
        """Return what the text may say: as it stands, and where it is bare, as one expression."""
        texts = [text]
        if not _LATEX.search(text) and "\n" not in text and len(text) <= _BARE:
            texts.insert(0, f"${text}$")
        read = (parse(text, parsing_timeout=None) for text in texts)
        # Where nothing is understood, the text itself may be all there is of the answer.
        return [found for found in read if any(not isinstance(part, str) for part in found)]

    def compare(gold: str, completion: str) -> dict[str, Any]:
        right, answers = values(gold), values(completion)
        same = bool(right) and any(
            verify(right[0], answer, timeout_seconds=None) for answer in answers
        )
        return {"gold": bool(right), "parsed": bool(answers), "same": same}

    values("$1$")  # loads the grammar, which is not to count against the first comparison
    for line in sys.stdin:
        asked = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            answer = compare(asked["gold"], asked["completion"])
        except (MemoryError, RecursionError, OverflowError) as error:
            answer = {"error": f"too much for one expression: {type(error).__name__}"}
        except Exception as error:  # noqa: BLE001 - whatever a hostile text makes of the library is an answer
            answer = {"error": f"{type(error).__name__}: {error}"[:200]}
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
