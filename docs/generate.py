"""
Writes the reference pages from the code; `--check` only says whether they are up to date.

    python docs/generate.py            rewrite docs/reference/*.md
    python docs/generate.py --check    exit 1 and name the pages that differ
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from flash import dry_run, hookspecs
from flash.cli import (
    cancel,
    chat,
    checkpoints,
    compare,
    deploy,
    deployments,
    env,
    env_test,
    evaluations,
    export,
    gc,
    models,
    plugins,
    resume,
    rollouts,
    runs,
    status,
    train,
    usage,
    version,
)
from flash.cli import eval as eval_
from flash.cli import keys as keys_
from flash.cli.budget import BUDGET_KEYS
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


_OBJECT: Final = "`--json` prints one object:"
_ARRAY: Final = "`--json` prints an array, of each"
JSON_OUTPUTS: Final = {
    "flash train": {
        "`--dry-run --json` prints one object:": dry_run.JSON_KEYS,
        "`--background --json` prints one object:": train.JSON_KEYS,
        "`--json` alone prints, when the run ends, what `flash status --json` does.": {},
    },
    "flash status": {
        _OBJECT: status.JSON_KEYS,
        "`budget`:": BUDGET_KEYS,
        "Each of `attempts`:": status.ATTEMPT_KEYS,
    },
    "flash runs": {f"{_ARRAY} run:": runs.JSON_KEYS},
    "flash cancel": {_OBJECT: cancel.JSON_KEYS},
    "flash resume": {
        "`--background --json` prints one object:": resume.JSON_KEYS,
        "`--json` alone prints, when the run ends, what `flash status --json` does.": {},
    },
    "flash checkpoints": {f"{_ARRAY} checkpoint:": checkpoints.JSON_KEYS},
    "flash rollouts": {
        "`--json` prints one object, without `--diff`:": rollouts.JSON_KEYS,
        "Each of `rollouts`:": rollouts.ROLLOUT_KEYS,
        "With `--diff`:": rollouts.DIFF_KEYS,
        "Each of `tasks`:": rollouts.TASK_KEYS,
    },
    "flash eval": {
        _OBJECT: eval_.JSON_KEYS,
        "Each of `rows`:": eval_.ROW_KEYS,
        "`difference`:": eval_.DIFFERENCE_KEYS,
    },
    "flash eval list": {f"{_ARRAY} evaluation:": evaluations.JSON_KEYS},
    "flash compare": {_OBJECT: compare.JSON_KEYS},
    "flash chat": {"With `-m`, `--json` prints one object:": chat.JSON_KEYS},
    "flash env test": {
        _OBJECT: env_test.JSON_KEYS,
        "Each of `findings`:": env_test.FINDING_KEYS,
        "`sampled`:": env_test.SAMPLED_KEYS,
    },
    "flash env preview": {f"{_ARRAY} row:": env.JSON_KEYS},
    "flash deploy": {
        "`--json` prints one object, as of each in `flash deployments --json`.": {},
        "`--dry-run --json` prints one object:": deploy.DRY_RUN_KEYS,
    },
    "flash deployments": {f"{_ARRAY} deployment:": deployments.JSON_KEYS},
    "flash undeploy": {"`--json` prints one object, as of each in `flash deployments --json`.": {}},
    "flash usage": {f"{_ARRAY} model and key:": usage.JSON_KEYS},
    "flash export": {_OBJECT: export.JSON_KEYS},
    "flash keys": {f"{_ARRAY} key:": keys_.JSON_KEYS},
    "flash keys add": {_OBJECT: keys_.ADD_KEYS},
    "flash gc": {_OBJECT: gc.JSON_KEYS},
    "flash models": {f"{_ARRAY} model:": models.JSON_KEYS},
    "flash plugins": {f"{_ARRAY} plugin:": plugins.JSON_KEYS},
    "flash plugins show": {"`--json` prints one object, as in `flash plugins --json`.": {}},
    "flash schema": {"It prints a JSON Schema, draft 2020-12.": {}},
    "flash version": {_OBJECT: version.JSON_KEYS},
}
"""Verb -> what it prints as JSON: a sentence an object, and what each of its keys means."""


def cli_page() -> str:
    """Return the page of every verb, as its own `--help` words it, and of what it says in JSON."""
    parts = [CLI_HEAD]
    settings = {"terminal_width": 100, **root.context_settings}
    for words, context in verbs(click.Context(root, info_name="flash", **settings)):
        parts.append(f"## {words}\n\n```text\n{context.get_help().strip()}\n```\n")
        for which, keys in JSON_OUTPUTS.get(words, {}).items():
            parts.append(f"{which}\n")
            if keys:
                listed = "\n".join(f"| `{key}` | {meaning} |" for key, meaning in keys.items())
                parts.append(f"| key | |\n| --- | --- |\n{listed}\n")
    return "\n".join(parts)


def verbs(context: click.Context) -> Iterator[tuple[str, click.Context]]:
    """Yield a command with its context, then those below it, as they are called."""
    yield context.command_path, context
    if isinstance(context.command, click.Group):
        for name in context.command.list_commands(context):
            inner = context.command.get_command(context, name)
            if inner is not None:
                yield from verbs(
                    click.Context(inner, parent=context, info_name=name, **inner.context_settings)
                )


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
