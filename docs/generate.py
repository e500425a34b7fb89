"""
Writes the reference pages from the code; `--check` only says whether they are up to date.

    python docs/generate.py            rewrite docs/reference/*.md
    python docs/generate.py --check    exit 1 and name the pages that differ
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from flash import hookspecs
from flash.cli import COMMANDS
from flash.cli.root import root
from flash.spec.reference import configuration_page

if TYPE_CHECKING:
    from collections.abc import Iterator

REFERENCE = Path(__file__).parent / "reference"

NOTICE = (
    "<!-- Written by docs/generate.py from the code; edit the code, then run `make docs`. -->\n"
)

CLI_HEAD = """# The command line

Exit codes: 0 ok · 1 the run or action failed · 2 the spec or the command line is wrong ·
3 a plugin is at fault · 130 interrupted. Errors go to stderr as `error: …` and `hint: …`.
`--json` is the contract for programs; tables are for eyes. RUN is a run's id, a unique prefix of
one, or `last`. `FLASH_HOME` names the folder that holds everything (default `~/.flash`).
"""


def cli_page() -> str:
    """Return the page of every verb, as its own `--help` words it."""
    parts = [CLI_HEAD]
    context = click.Context(root, info_name="flash")
    for name in COMMANDS:
        command = root.get_command(context, name)
        assert command is not None  # noqa: S101 - the table's own names
        for words, verb in _verbs(name, command):
            shown = click.Context(verb, info_name=f"flash {words}", terminal_width=100)
            parts.append(f"## flash {words}\n\n```text\n{verb.get_help(shown).strip()}\n```\n")
    return "\n".join(parts)


def _verbs(words: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    yield words, command
    if isinstance(command, click.Group):
        for name, inner in sorted(command.commands.items()):
            yield from _verbs(f"{words} {name}", inner)


def hooks_page() -> str:
    """Return the page of every hook: its exact signature and its docstring."""
    parts = ["# Hooks\n", f"{inspect.getdoc(hookspecs)}\n"]
    for name, hook in vars(hookspecs).items():
        if name.startswith("flash_"):
            signature = str(inspect.signature(hook)).replace("'", "")
            parts.append(
                f"## {name}\n\n```python\n{name}{signature}\n```\n\n{inspect.getdoc(hook)}\n"
            )
    return "\n".join(parts)


def pages() -> dict[str, str]:
    """Return the generated pages by file name."""
    written = {
        "cli.md": cli_page(),
        "configuration.md": configuration_page(),
        "hooks.md": hooks_page(),
    }
    return {name: f"{NOTICE}\n{text.rstrip()}\n" for name, text in written.items()}


def main() -> int:
    """Write the pages, or with `--check` compare them."""
    differing = [
        name
        for name, text in pages().items()
        if not (REFERENCE / name).exists() or (REFERENCE / name).read_text("utf-8") != text
    ]
    if "--check" in sys.argv[1:]:
        for name in differing:
            sys.stderr.write(f"docs/reference/{name} is out of date: run `make docs`\n")
        return 1 if differing else 0
    REFERENCE.mkdir(exist_ok=True)
    for name in differing:
        (REFERENCE / name).write_text(pages()[name], "utf-8")
        sys.stdout.write(f"wrote docs/reference/{name}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
