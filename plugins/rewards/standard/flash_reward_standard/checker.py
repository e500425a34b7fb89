"""
The process that checks completions: one JSON line in, one out, until standard input ends.

A completion can hold an expression that takes hours or all memory (`9^{9^{9^9}}`), or a text that
a schema's pattern searches for ever, and nothing inside a process can stop that. So there is a
process for it: an alarm ends it where one check takes longer than `argv[2]` seconds, and its memory
is bounded. `argv[1]` names what it checks, one of `_CHECKS`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import resource
import signal
import sys
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    Check = Callable[[dict[str, Any]], dict[str, Any]]

MEMORY_BYTES: Final = 3 << 30
_LATEX: Final = re.compile(r"\$|\\\(|\\\[|\\boxed")
_BARE: Final = 200
_SHOWN: Final = 200


def expressions() -> Check:
    """Return what compares `completion` with `gold`, as expressions."""
    from math_verify import parse, verify

    logging.disable()  # the library warns on every call that its own time limit is off

    def values(text: str) -> list[list[Any]]:
        """Return what the text may say: as it stands, and where it is bare, as one expression."""
        texts = [text]
        if not _LATEX.search(text) and "\n" not in text and len(text) <= _BARE:
            texts.insert(0, f"${text}$")
        read = (parse(text, parsing_timeout=None) for text in texts)
        # Where nothing is understood, the text itself may be all there is of the answer.
        return [found for found in read if any(not isinstance(part, str) for part in found)]

    def compare(asked: dict[str, Any]) -> dict[str, Any]:
        right, answers = values(asked["gold"]), values(asked["completion"])
        same = bool(right) and any(
            verify(right[0], answer, timeout_seconds=None) for answer in answers
        )
        return {"gold": bool(right), "parsed": bool(answers), "same": same}

    values("$1$")  # loads the grammar, which is not to count against the first comparison
    return compare


def schemas() -> Check:
    """Return what says why `schema` does not allow the JSON `text`: `wrong`, or None."""
    from jsonschema.exceptions import best_match
    from jsonschema.validators import validator_for
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import EMPTY_REGISTRY

    def check(asked: dict[str, Any]) -> dict[str, Any]:
        # Of its own accord, jsonschema fetches what a schema refers to.
        validator: Any = validator_for(asked["schema"])(asked["schema"], registry=EMPTY_REGISTRY)
        try:
            wrong = best_match(validator.iter_errors(json.loads(asked["text"])))
        except Unresolvable as error:
            return {"error": f"the schema refers to what is not in it: {error.ref}"}
        return {"wrong": f"{wrong.json_path}: {wrong.message}"[:_SHOWN] if wrong else None}

    return check


_CHECKS: Final = {"expressions": expressions, "schemas": schemas}


def main() -> None:
    """Answer until standard input ends."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)  # what a library prints is no answer
        with contextlib.suppress(OSError, ValueError):  # macOS has no such limit
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        check, seconds = _CHECKS[sys.argv[1]](), float(sys.argv[2])
        for line in sys.stdin:
            asked = json.loads(line)
            signal.setitimer(signal.ITIMER_REAL, seconds)
            try:
                answer = check(asked)
            except (MemoryError, RecursionError, OverflowError) as error:
                answer = {"error": f"too much for one check: {type(error).__name__}"}
            except Exception as error:  # noqa: BLE001 - whatever a hostile text makes of the library is an answer
                answer = {"error": f"{type(error).__name__}: {error}"[:_SHOWN]}
            signal.setitimer(signal.ITIMER_REAL, 0)
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
