"""
Conversations into documents: chat rendering, and which tokens are trained.

A conversation is an opening and a target. Trained are the assistant's tokens of the target, each
turn's end-of-turn token included, and nothing else: the opening, system prompts, tool
declarations, tool results and the header before a turn are context.

A turn is found by rendering the conversation before it, with the header that asks for an answer,
and the conversation up to its end: the turn is what the second has beyond the first, which is
what the model must produce after that prompt. Where the second does not begin with the first,
the template's own `{% generation %}` marks decide; where it has none, the row is refused.

Some templates rewrite what came before, such as the thinking of earlier turns. Then no single
text holds what the model sees at every turn, and the row becomes several documents, each ending
with a turn as it was written.
"""

from __future__ import annotations

import json
import re
from contextlib import contextmanager
from itertools import count, groupby, pairwise
from typing import TYPE_CHECKING, Any

import attrs

from flash.errors import TrainingDataError
from flash.training.packing import IGNORED, Document

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from flash.values import Message

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@attrs.frozen(kw_only=True)
class Conversation:
    """
    One row as messages.

    `name` is how errors call it. `tools` are the declarations for the chat template.
    """

    name: str
    opening: Sequence[Message]
    target: Sequence[Message]
    tools: Sequence[dict[str, Any]] | None = None


@attrs.frozen(eq=False)
class Rendered:
    """A document with the text it was made from; token i begins at `starts[i]` of the text."""

    document: Document
    text: str
    starts: Sequence[int]

    def pieces(self) -> list[tuple[str, bool]]:
        """Return the whole text in pieces, each with whether it is trained."""
        trained = [label != IGNORED for label in self.document.labels]
        runs = [[*run] for _, run in groupby(range(len(trained)), key=trained.__getitem__)]
        edges = [0, *(self.starts[run[0]] for run in runs[1:]), len(self.text)]
        return [
            (self.text[start:end], trained[run[0]])
            for run, (start, end) in zip(runs, pairwise(edges), strict=True)
        ]


@attrs.frozen
class ChatRenderer:
    """
    Renders with one tokenizer's chat template.

    `stops` are the tokens that end a turn. `thinking` is told to templates that can switch it;
    None leaves it to them.
    """

    tokenizer: Any
    stops: frozenset[int]
    thinking: bool | None

    def prompt(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> str:
        """
        Return the text after which the model writes the next turn.

        Raises `TrainingDataError` where the chat template cannot render the conversation.
        """
        with _template_errors("the conversation"):
            return self._text(plain("the conversation", messages), tools, ask=True)

    def glue(
        self, messages: Sequence[Message], since: int, tools: Sequence[Any] | None = None
    ) -> tuple[str, str]:
        """
        Return what the template writes after an answer: where it is the last, and up to the next.

        The answer is the message before the last `since`, which came after it. Raises
        `TrainingDataError` where the template does not show an answer as it was given.
        """
        name = "the conversation after an answer"
        with _template_errors(name):
            read = plain(name, messages)
            answer = len(read) - since - 1
            mark = _unused(read)
            said = [*read[:answer], {"role": "assistant", "content": mark}]
            asked = self._text([*said, *read[answer + 1 :]], tools, ask=True)
            alone = self._text(said, tools)
        if asked.count(mark) != 1 or alone.count(mark) != 1:
            raise TrainingDataError(
                f"{name}: the chat template does not show the answer as it was given, so a next "
                "turn cannot go on from it",
                hint="use single-turn tasks (max_turns = 1) with this model",
            )
        return alone.partition(mark)[2], asked.partition(mark)[2]

    def render(self, conversation: Conversation) -> list[Rendered]:
        """
        Return the documents of one row: one, unless the template rewrites earlier turns.

        Raises `TrainingDataError`, naming the row, where the trained tokens cannot be told.
        """
        with _template_errors(conversation.name):
            return self._render(conversation)

    def _render(self, row: Conversation) -> list[Rendered]:
        opening, target = plain(row.name, row.opening), plain(row.name, row.target)
        messages = [*opening, *target]
        turns = [at for at, one in enumerate(messages) if at >= len(opening) and _answers(one)]
        if not turns:
            raise TrainingDataError(
                f"{row.name}: its target has no assistant message",
                hint="an SFT row needs an answer to learn",
            )
        texts: list[tuple[str, list[range]]] = []
        for turn in turns:
            full = self._text(messages[: turn + 1], row.tools)
            prompt = self._text(messages[:turn], row.tools, ask=True) if turn else ""
            if not prompt or not full.startswith(prompt):
                return [self._by_marks(row, messages[: turns[-1] + 1], len(opening))]
            span = range(len(prompt), len(full))
            _check_said(row, messages[turn], full[len(prompt) :])
            if texts and full.startswith(texts[-1][0]):
                texts[-1] = (full, [*texts[-1][1], span])
            else:
                texts.append((full, [span]))
        return [self._document(row, text, spans) for text, spans in texts]

    def _by_marks(self, row: Conversation, messages: Sequence[Message], opening: int) -> Rendered:
        """Train what the template marks as generated, without the turns of the opening."""
        if not _MARK.search(self.tokenizer.get_chat_template()):
            raise TrainingDataError(
                f"{row.name}: the chat template renders its answer differently from the prompt "
                "that asks for it, so the answer cannot be told from its context",
                hint="set thinking = true if the answers contain thinking; see that the opening "
                "ends with a user or tool message; or use a model whose chat template has "
                "{% generation %} marks",
            )
        text = self._text(messages, row.tools)
        marks = self.tokenizer.apply_chat_template(
            messages,
            **self._options(row.tools),
            return_dict=True,
            return_assistant_tokens_mask=True,
        )["assistant_masks"]
        _, starts = self._tokens(text)
        edges = [*starts, len(text)]
        runs = [[*run] for mark, run in groupby(range(len(marks)), key=marks.__getitem__) if mark]
        answers = sum(_answers(message) for message in messages)
        if len(runs) != answers or len(marks) != len(starts):
            raise TrainingDataError(
                f"{row.name}: the chat template marks {len(runs)} answers as generated where the "
                f"row has {answers}"
            )
        skipped = sum(_answers(message) for message in messages[:opening])
        spans = [range(edges[run[0]], edges[run[-1] + 1]) for run in runs[skipped:]]
        for message, span in zip(filter(_answers, messages[opening:]), spans, strict=True):
            _check_said(row, message, text[span.start : span.stop])
        return self._document(row, text, spans)

    def _document(self, row: Conversation, text: str, spans: Iterable[range]) -> Rendered:
        """Train each span's tokens, up to the one at which generation would have stopped."""
        tokens, starts = self._tokens(text)
        trained: set[int] = set()
        for span in spans:
            inside = [at for at, start in enumerate(starts) if start in span]
            stop = next((at for at in inside if tokens[at] in self.stops), None)
            trained.update(inside if stop is None else range(inside[0], stop + 1))
        if not trained:
            raise TrainingDataError(f"{row.name}: none of its tokens would be trained")
        end = max(trained) + 1
        labels = [token if at in trained else IGNORED for at, token in enumerate(tokens[:end])]
        text = text[: starts[end]] if end < len(starts) else text
        return Rendered(Document(tokens[:end], labels), text, starts[:end])

    def _text(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, *, ask: bool = False
    ) -> str:
        text: str = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=ask, **self._options(tools)
        )
        return text

    def _options(self, tools: Sequence[Any] | None) -> dict[str, Any]:
        # `enable_thinking` is what hybrid models' templates call it; others do not look at it.
        switch = {} if self.thinking is None else {"enable_thinking": self.thinking}
        return {"tools": list(tools) if tools else None, **switch}

    def _tokens(self, text: str) -> tuple[list[int], list[int]]:
        encoded = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        return list(encoded["input_ids"]), [start for start, _ in encoded["offset_mapping"]]


def stop_tokens(tokenizer: Any, generation_config: Any) -> frozenset[int]:
    """Return the tokens at which generation ends: the tokenizer's and the model's own."""
    configured = getattr(generation_config, "eos_token_id", None)
    several = configured if isinstance(configured, list) else [configured]
    return frozenset(int(one) for one in (tokenizer.eos_token_id, *several) if one is not None)


@contextmanager
def _template_errors(name: str) -> Iterator[None]:
    """Turn what a template raises into a sentence; as its author's code it may raise anything."""
    try:
        yield
    except TrainingDataError:
        raise
    except Exception as error:
        raise TrainingDataError(
            f"{name}: the chat template cannot render it: {error}",
            hint="look at its roles and contents with `flash env preview`",
        ) from error


def _unused(messages: Sequence[Message]) -> str:
    """Return a word that stands in none of the messages."""
    text = str(messages)
    return next(word for number in count() if (word := f"answer{number}here") not in text)


def _answers(message: Message) -> bool:
    return message.get("role") == "assistant"


def _check_said(row: Conversation, message: Message, turn: str) -> None:
    """
    Refuse a turn that lacks the end of what its message says.

    Templates made for other forms of content silently render such a message as nothing.
    """
    said = message["content"].strip().rpartition("\n")[2].strip()
    if said not in turn:
        raise TrainingDataError(
            f"{row.name}: the chat template leaves out what its answer says ({said[:60]!r})",
            hint="this model's template may be made for images; use a text model",
        )


def plain(name: str, messages: Sequence[Message]) -> list[Message]:
    """Return messages as templates expect them: text for content, objects for arguments."""
    found = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            content = "".join(_part_text(name, part) for part in content)
        changed = {**message, "content": content if content is not None else ""}
        if message.get("tool_calls"):
            changed["tool_calls"] = [_plain_call(call) for call in message["tool_calls"]]
        found.append(changed)
    return found


def _part_text(name: str, part: Any) -> str:
    if isinstance(part, dict) and part.get("type") in {"text", "input_text"}:
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise TrainingDataError(
        f"{name}: it has content of the type {kind!r}", hint="only text can be rendered"
    )


def _plain_call(call: dict[str, Any]) -> dict[str, Any]:
    """Return a tool call with its arguments as an object; the API writes them as JSON text."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return call
    return {**call, "function": {**function, "arguments": arguments}}
