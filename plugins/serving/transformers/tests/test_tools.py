"""Tool calls in an answer's text, however it is split."""

import json
from itertools import pairwise

import pytest
from flash_serving_transformers.tools import ToolCall, ToolReader

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
WEATHER = ("weather", '{"city": "Oslo"}')


def read(text, cuts=(), *, in_thought=False):
    """Return the text and the calls that a text has, given in pieces."""
    reader = ToolReader(in_thought=in_thought)
    edges = [0, *sorted({cut for cut in cuts if cut < len(text)}), len(text)]
    parts = []
    for start, end in pairwise(edges):
        parts += reader.add(text[start:end])
    parts += reader.end()
    said = "".join(part for part in parts if isinstance(part, str))
    return said, [(part.name, part.arguments) for part in parts if isinstance(part, ToolCall)]


@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        ("No call.\n", "No call.\n", []),
        (CALL, "", [WEATHER]),
        (f"Let me see.\n{CALL}\n", "Let me see.", [WEATHER]),
        (f"{CALL}\n{CALL}", "", [WEATHER, WEATHER]),
        (f"{CALL} and then", " and then", [WEATHER]),
        ("a <tool_call>{not json}</tool_call> b", "a <tool_call>{not json}</tool_call> b", []),
        ("a <tool_call>[1]</tool_call>", "a <tool_call>[1]</tool_call>", []),
        ('cut <tool_call>{"name": "w', 'cut <tool_call>{"name": "w', []),
        ("a <tool_cal", "a <tool_cal", []),
        (f"<think>{CALL}</think>\n{CALL}", f"<think>{CALL}</think>", [WEATHER]),
        (f"<think>{CALL}", f"<think>{CALL}", []),
        ('<tool_call>{"name": "w"}</tool_call>', "", [("w", "{}")]),
        ('<tool_call>{"name": "w", "arguments": "{}"}</tool_call>', "", [("w", "{}")]),
        ("", "", []),
        ("  <", "  <", []),
    ],
)
def test_text_and_calls_wherever_the_text_is_split(text, said, calls):
    for cuts in ([], range(len(text)), *([at] for at in range(1, len(text)))):
        assert (said, calls) == read(text, cuts)


def test_a_trace_that_the_prompt_has_opened_is_not_looked_into():
    text = f"I could {CALL}</think>\n{CALL}"
    assert (f"I could {CALL}</think>", [WEATHER]) == read(text, in_thought=True)


def test_a_call_is_what_openais_clients_read():
    call = ToolCall("weather", "{}").to_json()
    assert call["id"].startswith("call_")
    assert json.loads(json.dumps({**call, "id": 0})) == {
        "id": 0,
        "type": "function",
        "function": {"name": "weather", "arguments": "{}"},
    }
