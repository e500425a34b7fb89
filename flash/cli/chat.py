"""`flash chat`: a conversation with what was trained."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from typing import TYPE_CHECKING, Any, Final

import click

from flash.cli.app import App, pass_app
from flash.cli.output import is_terminal, note, out, print_json
from flash.errors import FlashError, UsageError

if TYPE_CHECKING:
    from flash.cli.chat_partner import Partner

JSON_KEYS: Final = {
    "target": "TARGET as it was given",
    "model": "what the server calls it",
    "via": "`gateway`, or the backend that served it for this answer alone",
    "content": "the answer",
    "reasoning": "what was thought before it, or null",
    "finish_reason": "`stop`; `length` where the answer was cut at `--max-tokens` or at the end of "
    "the context",
    "prompt_tokens": "tokens of the prompt, chat template included",
    "completion_tokens": "tokens of answer and reasoning",
    "seconds": "from the question to the end of the answer",
}


def _number(_: click.Context, __: click.Parameter, value: float) -> float:
    """Refuse NaN, which a range lets through."""
    if math.isnan(value):
        raise click.BadParameter(f"{value} is no number.")
    return value


@click.command()
@click.argument("target")
@click.option("-m", "--message", metavar="TEXT", help="Ask this, print the answer, and leave.")
@click.option("--system", metavar="TEXT", help="What the model is told before the conversation.")
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    help="Most tokens of one answer.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(0, 2),
    callback=_number,
    default=0.0,
    show_default=True,
    help="0 is greedy.",
)
@click.option(
    "--backend",
    metavar="NAME",
    help="Serve it for this conversation alone, by this backend, deployed or not.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one answer as JSON.")
@pass_app
def chat(
    app: App,
    /,
    target: str,
    message: str | None,
    system: str | None,
    backend: str | None,
    *,
    as_json: bool,
    **sampling: Any,
) -> None:
    """
    Talk to TARGET.

    TARGET is a run, a checkpoint (`RUN/step-50`, `RUN/best`), a base model, or the folder of an
    adapter. What is deployed answers through the gateway; anything else is loaded for this
    conversation and gone after it. In a terminal /help lists what can be typed. Without one the
    message is read from standard input, and the answer alone is printed.
    """
    from flash.cli.chat_partner import partner_of

    text = _message(message, as_json=as_json)
    with partner_of(app, target, backend) as partner:
        if text is None:
            _converse(partner, target, system, sampling)
        else:
            _answer(partner, target, system, sampling, text, as_json=as_json)


def _message(given: str | None, *, as_json: bool) -> str | None:
    """Return the one message to send, or None for a conversation."""
    if given is None and not sys.stdin.isatty():
        try:
            given = sys.stdin.read().removesuffix("\n")  # it ends the file, and not the message
        except UnicodeDecodeError as error:
            raise UsageError(f"standard input is not text: {error}") from error
    if given is not None and not given.strip():
        raise UsageError("the message is empty", hint='flash chat TARGET -m "Hello"')
    if given is None and as_json:
        raise UsageError("--json is for one answer", hint="give the message with -m")
    if given is None and not is_terminal():
        raise UsageError("a conversation needs a terminal", hint="for one answer: -m TEXT")
    return given


def _answer(
    partner: Partner,
    target: str,
    system: str | None,
    sampling: dict[str, Any],
    text: str,
    *,
    as_json: bool,
) -> None:
    from flash.cli.chat_session import Conversation, Shown, told

    began = time.monotonic()
    talk = Conversation(lambda said: partner.ask(said, sampling), {}, system)
    reply, shown = talk.reply(text), Shown(reasoning_on_stderr=True)
    with contextlib.closing(iter(reply)) as pieces:
        try:
            for piece in pieces:
                if not as_json:
                    shown.take(piece)
        except FlashError as error:
            raise told(error, "send a shorter message") from error
        finally:
            shown.end()
    if as_json:
        print_json(
            {
                "target": target,
                "model": partner.model,
                "via": partner.via,
                "content": reply.content,
                "reasoning": reply.reasoning or None,
                "finish_reason": reply.finish_reason,
                "prompt_tokens": reply.prompt_tokens,
                "completion_tokens": reply.completion_tokens,
                "seconds": round(time.monotonic() - began, 3),
            }
        )
    elif reply.finish_reason == "length":
        note(f"cut after {reply.completion_tokens} tokens: --max-tokens")


def _converse(partner: Partner, target: str, system: str | None, sampling: dict[str, Any]) -> None:
    from flash.cli.chat_session import Conversation, Session

    facts = {"target": target, "model": partner.model, "via": partner.via, **sampling}
    out(f"{partner.model}, served by {partner.via}; /help lists what can be typed", dim=True)
    Session(Conversation(lambda said: partner.ask(said, sampling), facts, system)).run()
