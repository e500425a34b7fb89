"""
A conversation in a terminal: what is typed goes to the model, what it says comes as it is said.

    Session(Conversation(ask, settings)).run()

Ctrl-C stops the answer under way and keeps the session; at the prompt it leaves, as Ctrl-D does.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs

from flash.cli import output
from flash.errors import FlashError, StoreError
from flash.files import write_atomic
from flash.streaming import Refused
from flash.suggest import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from flash.streaming import Piece, Reply

PROMPT: Final = "> "
HELP: Final = {
    "/system TEXT": "what the model is told before the conversation; without TEXT nothing",
    "/reset": "start a new conversation; what /system said stays",
    "/save FILE": "write the conversation as JSON",
    "/help": "show this",
    "/exit": "leave, as Ctrl-D does",
    "//TEXT": "say /TEXT to the model",
}


@attrs.define
class Conversation:
    """
    What was said so far, and how the next answer is asked for.

    `facts` describe it in the file that `save` writes. A message that got no answer is forgotten,
    so that it can be said again.
    """

    ask: Callable[[Sequence[Mapping[str, str]]], Reply]
    facts: Mapping[str, Any]
    system: str | None = None
    turns: list[dict[str, str]] = attrs.field(factory=list)

    def reply(self, text: str) -> Reply:
        """Return the answer to come; `keep` takes it into the conversation."""
        said = [
            {name: turn[name] for name in ("role", "content")}
            for turn in (*self._opening(), *self.turns, {"role": "user", "content": text})
        ]
        return self.ask(said)

    def keep(self, text: str, reply: Reply) -> None:
        """Remember a message and as much of an answer as came."""
        if not reply.content and not reply.reasoning and reply.finish_reason is None:
            return
        answer = {"role": "assistant", "content": reply.content}
        if reply.reasoning:
            answer["reasoning_content"] = reply.reasoning
        self.turns += [{"role": "user", "content": text}, answer]

    def to_json(self) -> bytes:
        """Return it as `/save` writes it."""
        whole = {**self.facts, "messages": [*self._opening(), *self.turns]}
        return (json.dumps(whole, indent=2, ensure_ascii=False) + "\n").encode()

    def _opening(self) -> list[dict[str, str]]:
        return [{"role": "system", "content": self.system}] if self.system else []


def told(error: FlashError, hint: str) -> FlashError:
    """Return the error as a person is told it; `hint` is for a conversation that is too long."""
    if isinstance(error, Refused) and error.too_long:
        return FlashError(f"it does not fit the model's context: {error.message}", hint=hint)
    return error


class Shown:
    """Prints an answer as it comes; its reasoning dimmed, apart, and on stderr if asked to."""

    def __init__(self, *, reasoning_on_stderr: bool = False) -> None:
        self._err = reasoning_on_stderr
        self._thinking = False
        self._line_open = False

    def take(self, piece: Piece) -> None:
        """Print the next piece."""
        if piece.reasoning and not self._thinking:
            output.flow("thinking: ", dim=True, err=self._err)
        elif self._thinking and not piece.reasoning:
            output.flow("\n\n", err=self._err)
        self._thinking = piece.reasoning
        output.flow(piece.text, dim=piece.reasoning, err=piece.reasoning and self._err)
        self._line_open = not piece.text.endswith("\n")

    def end(self) -> None:
        """End the line that the answer ended on."""
        if self._line_open:
            output.flow("\n", err=self._thinking and self._err)
        self._line_open = False


class Session:
    """The conversation's loop, from the first prompt until the user leaves."""

    def __init__(self, conversation: Conversation) -> None:
        self._talk = conversation
        self._commands: dict[str, Callable[[str], None]] = {
            "/system": self._system,
            "/reset": self._reset,
            "/save": self._save,
            "/help": self._help,
        }

    def run(self) -> None:
        """Take what is typed until it is Ctrl-D, Ctrl-C or `/exit`."""
        # Importing it gives `input` its line editing and its history; a Python may lack it.
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - see above
        while True:
            try:
                typed = input(PROMPT).encode(errors="replace").decode().strip()
            except (EOFError, KeyboardInterrupt):
                output.out()
                return
            if typed in {"/exit", "/quit"}:
                return
            try:
                self._act(typed)
            except FlashError as error:
                output.fail(told(error, "/reset starts a new conversation"))

    def _act(self, typed: str) -> None:
        if not typed:
            return
        if not typed.startswith("/") or typed.startswith("//"):
            self._say(typed.removeprefix("/") if typed.startswith("//") else typed)
            return
        name, _, rest = typed.partition(" ")
        if name not in self._commands:
            close = did_you_mean(name, [*self._commands, "/exit"])
            output.note(f"there is no {name}{close or '; /help lists what there is'}")
            return
        self._commands[name](rest.strip())

    def _say(self, text: str) -> None:
        reply, shown = self._talk.reply(text), Shown()
        try:
            with contextlib.closing(iter(reply)) as pieces:
                for piece in pieces:
                    shown.take(piece)
        except KeyboardInterrupt:
            shown.end()
            output.note("stopped")
        finally:
            shown.end()
        self._talk.keep(text, reply)
        if reply.finish_reason == "length":
            output.note(f"cut after {reply.completion_tokens} tokens: --max-tokens, or /reset")

    def _system(self, text: str) -> None:
        self._talk.system = text or None
        output.note("from the next message on" if text else "there is no system message now")

    def _reset(self, _: str) -> None:
        self._talk.turns.clear()
        output.note("a new conversation")

    def _save(self, name: str) -> None:
        if not name:
            output.note("/save FILE")
            return
        path = Path(name).expanduser()
        if os.path.lexists(path) and not _confirmed(f"{path} exists; overwrite it? [y/N] "):
            output.note("not saved")
            return
        if not path.parent.is_dir():
            raise StoreError(f"there is no folder {path.parent}", hint="make it, then /save again")
        write_atomic(path, self._talk.to_json())
        output.note(f"saved to {path}")

    def _help(self, _: str) -> None:
        width = max(map(len, HELP))
        for name, text in HELP.items():
            output.out(f"  {name:<{width}}  {text}")


def _confirmed(question: str) -> bool:
    try:
        return input(question).strip().lower() in {"y", "yes"}
    except (EOFError, KeyboardInterrupt):
        output.out()
        return False
