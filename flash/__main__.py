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
        if sys.stdout is not None:  # it is None where the caller closed it
            sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        # A reader that has left (`flash runs | head -1`) is no error worth a line; a full disk is.
        if not isinstance(error, BrokenPipeError):
            sys.stderr.write(f"error: cannot write the output: {error.strerror}\n")
        # Python flushes once more at exit, and would complain: give it somewhere to write.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
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
