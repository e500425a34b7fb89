"""Every `flash` command that a how-to page shows is one that the command line takes."""

import re
import shlex
from pathlib import Path

import click
import pytest

from flash.cli.root import root

PAGES = sorted((Path(__file__).parents[1] / "docs" / "how-to").glob("*.md"))
BLOCK = re.compile(r"^```console\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^\$ (flash .+)$", re.MULTILINE)


def commands_of(page):
    blocks = BLOCK.findall(page.read_text("utf-8"))
    return [line for block in blocks for line in COMMAND.findall(block)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_of_the_page_parses(page):
    for line in commands_of(page):
        _, *words = shlex.split(line.partition(" | ")[0], comments=True)
        command, name = root, "flash"
        while isinstance(command, click.Group) and words:
            name, command, words = command.resolve_command(click.Context(command), words)
            assert command is not None, line
        try:
            command.make_context(name, words)
        except click.ClickException as error:
            pytest.fail(f"{page.name}: {line}: {error.format_message()}")


def test_there_are_commands_to_parse():
    assert any(commands_of(page) for page in PAGES)
