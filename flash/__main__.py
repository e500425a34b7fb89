"""
The `flash` command.

`flash`, `flash --help` and `flash --version` are answered from a table, without importing click
or any plugin, so that they cost little more than starting Python.
"""

from __future__ import annotations

import os
import sys


def main() -> int:
    """Run the command line and return its exit code (architecture, section 7)."""
    try:
        code = _answer(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has left (`flash runs | head -1`). Python flushes once more at exit, and
        # would complain, so give it somewhere to write.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    return code


def _answer(arguments: list[str]) -> int:
    # Shell completion asks through this variable, with no arguments.
    completing = "_FLASH_COMPLETE" in os.environ
    if not completing and arguments in ([], ["-h"], ["--help"]):
        from flash.cli import help_text

        sys.stdout.write(help_text())
        return 0
    if arguments == ["--version"]:
        from flash import __version__

        sys.stdout.write(f"flash {__version__}\n")
        return 0

    from flash.cli.root import run

    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
