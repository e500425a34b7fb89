"""`flash version`: what to write into a bug report."""

from __future__ import annotations

import platform
import sys
from typing import Final

import click

import flash
from flash.cli.output import out, print_json

JSON_KEYS: Final = {
    "flash": "the version of Flash",
    "python": "of the interpreter",
    "platform": "the operating system and processor",
    "executable": "the interpreter that Flash is installed for",
}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def version(*, as_json: bool) -> None:
    """Show the version and what it runs on."""
    facts = {
        "flash": flash.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "executable": sys.executable,
    }
    if as_json:
        print_json(facts)
        return
    out(f"flash {facts['flash']} on Python {facts['python']}, {facts['platform']}")
    out(f"installed for {facts['executable']}", dim=True)
