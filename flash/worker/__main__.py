"""
The worker's command line.

    python -m flash.worker run STORE ATTEMPT    one attempt; secrets as a JSON object on stdin
    python -m flash.worker check|evaluate|…     one foreground task; a JSON request on stdin, JSON
                                                lines on stdout (see flash/foreground.py)
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from pathlib import Path
from typing import NoReturn

from flash.home import FlashHome
from flash.spec.secrets import Redactor
from flash.worker.log import run_masked


def main() -> NoReturn:
    """Run what the command line asks for; the process ends here, and nowhere else."""
    os.umask(0o077)
    # Straight into the log: the thread that masks does not survive what is written of here.
    log = os.dup(2)
    faulthandler.enable(file=log)
    given = json.loads(sys.stdin.buffer.read() or b"{}")
    if sys.argv[1] == "run":
        from flash.worker.attempt import run_attempt

        store, attempt = Path(sys.argv[2]), int(sys.argv[3])
        home = FlashHome.from_environment()
        run_masked(
            lambda: run_attempt(store, attempt, given, home, stacks=log), Redactor(given.values())
        )

    from flash.worker.foreground import leave_with_caller, run_task

    leave_with_caller(Path(given["scratch"]))
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    redactor = Redactor(given["secrets"].values())
    run_masked(lambda: run_task(sys.argv[1], given, answers, redactor), redactor)


if __name__ == "__main__":
    main()
