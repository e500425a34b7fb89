"""The click group of all verbs, and the one boundary where errors become lines and exit codes."""

from __future__ import annotations

import io
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import click.shell_completion

import flash
from flash.cli import COMMANDS, DESCRIPTION, EPILOG, OPTIONS, output
from flash.cli.app import App
from flash.errors import FlashError, PluginError, UsageError
from flash.suggest import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Sequence

_HELP = dict(OPTIONS)


class Verbs(click.Group):
    """
    Core verbs from the table, then those of plugins; a verb is imported when it is called.

    Plugins are loaded only for a name that is no core verb, so none can shadow one.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the core verbs in the table's order."""
        del ctx
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return the verb, or None for a name that no usable plugin adds either."""
        if cmd_name in COMMANDS:
            command: click.Command = _imported(COMMANDS[cmd_name][0])
            return command
        return _plugin_command(ctx.ensure_object(App), cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the verb that `args` starts with; an unknown one raises `UsageError`."""
        name, *rest = args
        if rest and f"{name} {rest[0]}" in COMMANDS:
            name, rest = f"{name} {rest[0]}", rest[1:]
        command = self.get_command(ctx, name)
        if command is None:
            added = ctx.ensure_object(App).host.all("command")
            message = f'unknown command "{name}"{did_you_mean(name, [*COMMANDS, *added])}'
            raise UsageError(message, hint="flash --help lists the commands")
        return name, command, rest

    def shell_complete(
        self, ctx: click.Context, incomplete: str
    ) -> list[click.shell_completion.CompletionItem]:
        """Complete core verbs and options; plugins are not loaded while somebody types."""
        verbs = [
            click.shell_completion.CompletionItem(name, help=text)
            for name, (_, text) in COMMANDS.items()
            if name.startswith(incomplete)
        ]
        return verbs + click.Command.shell_complete(self, ctx, incomplete)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table; importing every verb for its first line would take seconds."""
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


def _imported(reference: str) -> Any:
    module, _, attribute = reference.partition(":")
    return getattr(import_module(module), attribute)


def _plugin_command(app: App, name: str) -> click.Command | None:
    from flash.plugins import boundary

    try:
        plugin = app.host.owner("command", name)
    except UsageError:
        return None
    reference = plugin.records["command"][name].command
    with boundary(plugin.name, f"import {reference}"):
        command = _imported(reference)
    if not isinstance(command, click.Command):
        message = f"plugin {plugin.name}: {reference} is not a click command"
        raise PluginError(message, hint=f"flash plugins show {plugin.name}")
    app.running = plugin.name
    return command


@click.group(
    cls=Verbs,
    help=DESCRIPTION,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option("--debug", is_flag=True, help=_HELP["--debug"])
@click.version_option(flash.__version__, message="flash %(version)s", help=_HELP["--version"])
@click.pass_context
def root(ctx: click.Context, *, debug: bool) -> None:
    """Take the options that hold for every verb."""
    ctx.ensure_object(App).debug = debug


def run(arguments: Sequence[str]) -> int:
    """
    Run one command line and return its exit code; prints every error and raises none.

    A verb ends with `ctx.exit(code)`, with a FlashError, or by returning.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A character that the terminal's encoding lacks must not end a run's display.
        sys.stdout.reconfigure(errors="backslashreplace")
    app = App()
    try:
        result = root.main(list(arguments), prog_name="flash", standalone_mode=False, obj=app)
    except click.ClickException as error:
        return _wrong_command_line(error, arguments)
    except (click.Abort, KeyboardInterrupt):
        return 130
    except Exception as error:  # noqa: BLE001 - the boundary: nothing below it may show a traceback
        return output.fail(_named(error, app), debug=app.debug)
    return result if isinstance(result, int) else 0


def _wrong_command_line(error: click.ClickException, arguments: Sequence[str]) -> int:
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        output.note(error.format_message())
        return error.exit_code
    # An option without its value is told by click's parser, which knows no context.
    context: click.Context | None = getattr(error, "ctx", None)
    verb = context.command_path if context else f"flash {_verb(arguments)}".rstrip()
    return output.usage_error(error.format_message(), f"{verb} --help")


def _verb(arguments: Sequence[str]) -> str:
    words = [word for word in arguments if word != "--debug"]
    return next((verb for n in (2, 1) if (verb := " ".join(words[:n])) in COMMANDS), "")


def _in_a_folder() -> bool:
    try:
        return bool(Path.cwd())
    except FileNotFoundError:
        return False


def _named(error: Exception, app: App) -> Exception:
    """Return the error as what it is: the user's, the disk's, a plugin's, or a defect of ours."""
    if isinstance(error, FlashError):
        return error
    named = _of_the_disk(error) or _of_others(error, app)
    if named is None:
        return error
    named.__cause__ = error
    return named


def _of_the_disk(error: Exception) -> FlashError | None:
    from flash.files import disk_error, store_error

    if isinstance(error, PermissionError) and isinstance(error.filename, str):
        return store_error("use", Path(error.filename), error)
    return disk_error(error, unnamed="the output")


def _of_others(error: Exception, app: App) -> FlashError | None:
    if isinstance(error, FileNotFoundError) and not _in_a_folder():
        return UsageError(
            "the working directory does not exist any more", hint="cd into a folder that does"
        )
    if app.running is None:
        return None
    from flash.discovery import describe

    return PluginError(
        f"plugin {app.running}: its command raised {describe(error)}",
        hint="flash --debug … shows the traceback",
    )
