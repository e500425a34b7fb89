"""
The process that runs a verifiers environment: `python flash_serve.py FOLDER`, with other packages.

Reads questions as JSON lines and answers each by its number, in whatever order they are done.
Nothing of Flash can be imported here, and verifiers is imported by the first question that needs
it: that it is missing is an answer too.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any, TextIO

GRACE_S = 3.0


def main(folder: Path) -> None:
    """Answer until standard input ends; then stop what runs and go."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one who asks
    with (
        os.fdopen(os.dup(0), encoding="utf-8") as questions,
        os.fdopen(os.dup(1), "w", encoding="utf-8") as answers,
    ):
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # the questions are not the environment's
        os.dup2(2, 1)  # what it prints is a log, and no answer
        sys.path[:0] = [str(Path(__file__).parent), str(folder)]
        asyncio.run(_serve(folder, questions, answers))
        os._exit(0)  # threads of the environment may never end


async def _serve(folder: Path, questions: TextIO, answers: TextIO) -> None:
    from flash_faults import Fault, answer_of
    from flash_world import World

    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    world = World()
    running: set[asyncio.Task[None]] = set()

    async def take(question: dict[str, Any]) -> None:
        number = question.pop("number")
        try:
            answer = await getattr(world, question.pop("do"))(**question)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a broken environment is an answer
            if not isinstance(error, Fault):
                traceback.print_exc()
            answer = answer_of(error, folder)
        answers.write(json.dumps({"number": number, **answer}) + "\n")
        answers.flush()

    def begin(question: dict[str, Any]) -> None:
        task = loop.create_task(take(question))
        running.add(task)
        task.add_done_callback(running.discard)

    def listen() -> None:
        for line in questions:
            loop.call_soon_threadsafe(begin, json.loads(line))
        # Whoever asked is gone: code that never yields must not keep the process.
        timer = threading.Timer(GRACE_S, os._exit, [0])
        timer.daemon = True
        timer.start()
        loop.call_soon_threadsafe(ended.set)

    threading.Thread(target=listen, daemon=True).start()
    await ended.wait()
    await world.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
