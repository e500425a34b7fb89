"""The command line as a whole: cheap help, one error boundary, exit codes."""

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from distributions import Shell, install, plugin

import flash
from flash.cli import COMMANDS, DESCRIPTION, EPILOG, OPTIONS, help_text, root
from flash.errors import FlashError

HEAVY = {
    "alembic", "cattrs", "datasets", "flash_loud", "numpy", "peft", "psutil", "requests", "rich",
    "sqlalchemy", "structlog", "torch", "transformers", "trl",
}  # fmt: skip
LOUD = 'raise SystemExit("a plugin was imported")'


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return install([plugin("loud", LOUD)], tmp_path_factory.mktemp("plugins"))


@pytest.fixture
def shell(site, tmp_path):
    return Shell(tmp_path, site)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_is_what_click_would_say(shell, arguments):
    """The fast answer is written without click; click's own rendering is the reference."""
    group = click.Group(
        "flash",
        commands=[click.Command(name, help=text) for name, (_, text) in COMMANDS.items()],
        params=[
            click.Option(["--debug"], is_flag=True, help=dict(OPTIONS)["--debug"]),
            click.Option(["--version"], is_flag=True, help=dict(OPTIONS)["--version"]),
        ],
        help=DESCRIPTION,
        epilog=EPILOG,
        context_settings={"help_option_names": ["-h", "--help"], "terminal_width": 80},
    )
    group.list_commands = lambda _: list(COMMANDS)
    with group.make_context("flash", [], resilient_parsing=True) as context:
        expected = group.get_help(context) + "\n"

    answer = shell.flash(*arguments)

    assert (answer.returncode, answer.stdout, answer.stderr) == (0, expected, "")


def test_help_of_the_real_group_is_the_same():
    with root.root.make_context("flash", [], resilient_parsing=True, terminal_width=80) as context:
        assert root.root.get_help(context) + "\n" == help_text()


def test_version(shell):
    assert shell.flash("--version").stdout == f"flash {flash.__version__}\n"
    assert shell.flash("--debug", "--version").stdout == f"flash {flash.__version__}\n"


@pytest.mark.parametrize("argument", ["--version", "--help", "-h"])
def test_help_and_version_import_nothing(shell, argument):
    """Neither click nor a plugin nor anything else that is not Python's or Flash's own."""
    code = (
        "import sys; before = set(sys.modules)\n"
        f"sys.argv = ['flash', {argument!r}]\n"
        "from flash.__main__ import main\n"
        "assert main() == 0\n"
        "print(*sorted(set(sys.modules) - before), file=sys.stderr)"
    )
    answer = shell.python("-c", code)

    assert answer.returncode == 0
    assert set(answer.stderr.split()) <= {"__future__", "flash", "flash.__main__", "flash.cli"}


@pytest.mark.parametrize("verb", COMMANDS)
def test_every_verb_explains_itself_without_a_plugin_or_a_heavy_library(shell, verb):
    code = (
        "import sys\n"
        f"sys.argv = ['flash', {verb!r}, '--help']\n"
        "from flash.__main__ import main\n"
        "code = main()\n"
        "print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)\n"
        "sys.exit(code)"
    )
    answer = shell.python("-c", code)

    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith(f"Usage: flash {verb} ")
    assert HEAVY & set(answer.stderr.split()) == set()


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        (["trian"], 'unknown command "trian"; did you mean "train"?', "flash --help"),
        (["version", "--jso"], "No such option '--jso'. Did you mean '--json'?", "flash version"),
        (["version", "more"], "Got unexpected extra argument (more)", "flash version --help"),
        (["--debug"], "Missing command.", "flash --help"),
        (["chat", "last", "-m"], "Option '-m' requires an argument.", "flash chat --help"),
    ],
)
def test_a_wrong_command_line_exits_2_with_the_way_out(shell, arguments, error, hint):
    answer = shell.flash(*arguments, FLASH_DISABLE_PLUGINS="*")

    assert answer.returncode == 2
    assert answer.stdout == ""
    first, second = answer.stderr.splitlines()
    assert first.startswith(f"error: {error}")
    assert second.startswith(f"hint: {hint}")


def test_a_wrong_config_exits_2_and_names_the_file(shell):
    shell.write_config("[plugins]\ndisabel = []\n")

    answer = shell.flash("plugins")

    assert answer.returncode == 2
    path = f"{shell.home}/.flash/config.toml"
    message = 'plugins.disabel: unknown key; did you mean "disable"?'
    assert answer.stderr == f"error: {path}: {message}\n"


@pytest.fixture
def verb(monkeypatch, capsys):
    """Run a function as a verb of `flash`, in this process."""

    def run(function, *options):
        monkeypatch.setitem(root.root.commands, "verb", click.Command("verb", callback=function))
        monkeypatch.setattr(root.Verbs, "get_command", click.Group.get_command)
        code = root.run([*options, "verb"])
        return code, *capsys.readouterr()

    return run


def test_a_flash_error_becomes_its_lines_and_its_exit_code(verb):
    class Refused(FlashError):
        exit_code = 3

    def raises():
        raise Refused("the disk\nis full", hint="free some space")

    code, out, err = verb(raises)

    assert (code, out) == (3, "")
    assert err == "error: the disk\n  is full\nhint: free some space\n"


def test_a_defect_is_one_line_and_debug_shows_its_traceback(verb):
    def raises():
        raise ZeroDivisionError("by zero")

    code, _, err = verb(raises)
    debug_code, _, debug_err = verb(raises, "--debug")

    assert (code, debug_code) == (1, 1)
    assert err == (
        "error: this is a defect in Flash: ZeroDivisionError: by zero\n"
        "hint: flash --debug … shows the traceback\n"
    )
    assert debug_err.startswith("Traceback (most recent call last)")
    assert debug_err.endswith("error: this is a defect in Flash: ZeroDivisionError: by zero\n")


def test_a_working_directory_that_is_gone_is_said_to_be(verb, tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()

    code, _, err = verb(Path.cwd)

    assert code == 2
    assert err == (
        "error: the working directory does not exist any more\nhint: cd into a folder that does\n"
    )


def test_an_interrupt_exits_130(verb):
    def raises():
        raise KeyboardInterrupt

    assert verb(raises)[0] == 130


def test_a_verb_chooses_its_exit_code(verb):
    assert verb(lambda: click.get_current_context().exit(3))[0] == 3


def test_a_reader_that_leaves_is_no_error(shell):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as pipe:
        answer = subprocess.run(
            [sys.executable, "-m", "flash", "version", "--json"],
            env=shell.environ(),
            stdout=pipe,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )

    assert answer.stderr == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a disk that is full")
@pytest.mark.parametrize("argument", ["--help", "version"])
def test_a_full_disk_is_one_line(shell, argument):
    with Path("/dev/full").open("w") as full:
        answer = subprocess.run(
            [sys.executable, "-m", "flash", argument],
            env=shell.environ(),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )

    assert answer.returncode == 1
    (line, *_) = answer.stderr.splitlines()
    assert line == "error: cannot write the output: No space left on device"
    assert "Traceback" not in answer.stderr
    assert "Exception" not in answer.stderr


def test_shell_completion_knows_the_verbs(shell):
    answer = shell.flash(_FLASH_COMPLETE="bash_complete", COMP_WORDS="flash check", COMP_CWORD="1")

    assert answer.stdout == "plain,checkpoints\n"
