"""`flash schema`: the JSON Schema of the TOML, for editors."""

from __future__ import annotations

import json
from pathlib import Path

import click

from flash.cli.app import App, pass_app
from flash.cli.output import note, print_json
from flash.errors import UsageError


@click.command()
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Write to this file, not to stdout."
)
@pass_app
def schema(app: App, *, output: Path | None) -> None:
    """
    Write the JSON Schema of the TOML, with the tables of the installed plugins.

    An editor with a TOML language server reads it from a first line such as
    `#:schema ./flash.schema.json`.
    """
    from flash.spec.schema import json_schema

    written = json_schema(app.host)
    if output is None:
        print_json(written)
        return
    try:
        output.write_text(json.dumps(written, indent=2) + "\n", "utf-8")
    except OSError as error:
        message = f"cannot write {output}: {error.strerror or error}"
        raise UsageError(message) from error
    note(f"wrote {output}")
