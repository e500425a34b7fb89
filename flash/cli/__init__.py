"""
The verbs of the command line, as data.

`flash --help` is written from this table without importing any of them, click included; the
click group in `flash.cli.root` reads the same table and imports a verb when it is called.
"""

from __future__ import annotations

DESCRIPTION = "One TOML and one environment become a trained LoRA adapter."

COMMANDS = {
    "train": ("flash.cli.train:train", "Train an adapter as a TOML file says."),
    "status": ("flash.cli.status:status", "Show how a run is doing; follow it, read its log."),
    "runs": ("flash.cli.runs:runs", "List the runs."),
    "cancel": ("flash.cli.cancel:cancel", "Stop a run and keep its checkpoints."),
    "resume": ("flash.cli.resume:resume", "Have a run go on that failed or was cancelled."),
    "checkpoints": ("flash.cli.checkpoints:checkpoints", "List a run's checkpoints."),
    "rollouts": ("flash.cli.rollouts:rollouts", "Show what a run sampled and what it was worth."),
    "eval": ("flash.cli.eval:eval_", "Score a run, a checkpoint or a model on held-out rows."),
    "eval list": ("flash.cli.evaluations:evaluations", "List the evaluations that are kept."),
    "compare": ("flash.cli.compare:compare", "Show what two runs, or two evaluations, differ in."),
    "env": ("flash.cli.env:env", "Start an environment, test it, preview its rows."),
    "deploy": ("flash.cli.deploy:deploy", "Serve an adapter behind an OpenAI-compatible URL."),
    "deployments": ("flash.cli.deployments:deployments", "List what is deployed."),
    "undeploy": ("flash.cli.undeploy:undeploy", "Serve an adapter no more."),
    "chat": ("flash.cli.chat:chat", "Talk to a run, a checkpoint, a base model or an adapter."),
    "usage": ("flash.cli.usage:usage", "Show what was used of deployments, and what it cost."),
    "keys": ("flash.cli.keys:keys", "List, make and revoke the keys of deployments."),
    "export": ("flash.cli.export:export", "Write an adapter, merged or not, for elsewhere."),
    "gc": ("flash.cli.gc:gc", "Free the disk of what no run needs, and of old runs."),
    "models": ("flash.cli.models:models", "List the base models known here."),
    "plugins": ("flash.cli.plugins:plugins", "List the plugins and say what is wrong with one."),
    "schema": ("flash.cli.schema:schema", "Write the JSON Schema of the TOML for editors."),
    "version": ("flash.cli.version:version", "Show the version and what it runs on."),
}
"""
Name -> (import string of its click command, help line), in the order help shows them.

A verb of two words wins over the first word with an argument.
"""

OPTIONS = (
    ("--debug", "Show the traceback of an error."),
    ("--version", "Show the version and exit."),
    ("-h, --help", "Show this message and exit."),
)

EPILOG = "Plugins may add commands; `flash plugins` lists what each one provides."


def help_text() -> str:
    """Return what `flash --help` prints: word for word what click would."""

    def listed(pairs: list[tuple[str, str]]) -> str:
        width = max(len(name) for name, _ in pairs)
        return "\n".join(f"  {name:<{width}}  {text}" for name, text in pairs)

    commands = [(name, text) for name, (_, text) in COMMANDS.items()]
    return (
        "Usage: flash [OPTIONS] COMMAND [ARGS]...\n\n"
        f"  {DESCRIPTION}\n\n"
        f"Options:\n{listed(list(OPTIONS))}\n\n"
        f"Commands:\n{listed(commands)}\n\n"
        f"  {EPILOG}\n"
    )
