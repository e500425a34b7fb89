"""
The worker's command line.

    python -m flash.worker run STORE ATTEMPT     one attempt; secrets as a JSON object on stdin
    python -m flash.worker check|evaluate|preview    one foreground task; a JSON request on stdin,
                                                     JSON lines on stdout (see flash/foreground.py)
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
from pathlib import Path


def main() -> int:
    """Run what the command line asks for and return the exit code."""
    os.umask(0o077)
    faulthandler.enable()
    # Lets a supervisor have the stacks of a worker that hangs written into the log.
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    given = json.loads(sys.stdin.buffer.read() or b"{}")
    if sys.argv[1] != "run":
        from flash.worker.foreground import run_task

        return run_task(sys.argv[1], given)

    from flash.home import FlashHome
    from flash.spec.secrets import Redactor
    from flash.worker.attempt import run_attempt
    from flash.worker.log import masked_output

    store, attempt = Path(sys.argv[2]), int(sys.argv[3])
    with masked_output(Redactor(given.values()).redact):
        return run_attempt(store, attempt, given, FlashHome.from_environment())


if __name__ == "__main__":
    sys.exit(main())
