"""What an answer may look like: texts that a grammar takes, and the place where it refuses one."""

import types

import pytest
import torch
from flash_serving_transformers.constraint import Grammar, Shape
from flash_serving_transformers.language import Language

from flash.api import UsageError
from flash.testing.models import make_byte_tokenizer

pytestmark = pytest.mark.slow

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}},
    "required": ["a"],
    "additionalProperties": False,
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    }
    for name in ("weather", "population")
]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
OTHER = CALL.replace("weather", "tide")


def nested(depth):
    schema = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.fixture(scope="module", params=["marks are tokens", "marks are text"])
def language(request):
    tokenizer = make_byte_tokenizer()
    if request.param == "marks are tokens":
        tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    embedding = torch.nn.Embedding(len(tokenizer) + 5, 2)
    model = types.SimpleNamespace(generation_config=None, get_input_embeddings=lambda: embedding)
    return Language(model, tokenizer, 100)


def taken(language, shape, text):
    """Return how much of a text, and its end, the grammar takes."""
    constraint = Grammar(shape, language).constraint()
    tokens = [*language.encode(text, special=False), *language.stops]
    for count, token in enumerate(tokens):
        logits = torch.zeros(language.vocabulary)
        constraint.mask(logits)
        if logits[token] != 0:
            return language.decode(tokens[:count])
        constraint.accept(token)
    return f"{text}$"


@pytest.mark.parametrize(
    ("shape", "text", "expected"),
    [
        (Shape(schema=SCHEMA), '{"a": 5}', "$"),
        (Shape(schema=SCHEMA), '{"a": "5"}', '{"a": '),
        (Shape(schema=SCHEMA), '{"a": 5', '{"a": 5'),
        (Shape(schema={"type": "object"}), '{"x": [1, null]}', "$"),
        (Shape(schema={"type": "object"}), "[1]", ""),
        (Shape(schema=SCHEMA, thinks=True), "<think>so {</think>\n\n" + '{"a": 5}', "$"),
        (Shape(schema=SCHEMA, thinks=True), '{"a": 5}', "$"),
        (Shape(schema=SCHEMA, in_thought=True), 'so {</think>\n{"a": 5}', "$"),
        (Shape(schema=SCHEMA, in_thought=True), "so</think>no", "so</think>"),
        (Shape(schema=SCHEMA, in_thought=True), '{"a": 5}', '{"a": 5}'),
        (Shape(tools=TOOLS), CALL, "$"),
        (Shape(tools=TOOLS), f"{CALL}\n{CALL}", "$"),
        (Shape(tools=TOOLS, several=False), f"{CALL}\n{CALL}", CALL),
        (Shape(tools=TOOLS), OTHER, '<tool_call>\n{"name": "'),
        (Shape(tools=TOOLS), "I think", ""),
        (Shape(tools=TOOLS, text=True), "I do not call.", "$"),
        (Shape(tools=TOOLS, text=True), f"I call.\n{CALL}", "$"),
        (Shape(tools=TOOLS, text=True), f"I call.\n{OTHER}", 'I call.\n<tool_call>\n{"name": "'),
        (
            Shape(tools=TOOLS, text=True, several=False),
            f"I call.\n{CALL}\n{CALL}",
            f"I call.\n{CALL}",
        ),
        (Shape(tools=TOOLS, schema=SCHEMA), CALL, "$"),
        (Shape(tools=TOOLS, schema=SCHEMA), '{"a": 5}', "$"),
    ],
)
def test_a_grammar_takes(language, shape, text, expected):
    assert taken(language, shape, text) == (f"{text}$" if expected == "$" else expected)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "obj"},
        {"not": {}},
        {"$ref": "#/nowhere"},
        {"$ref": "http://localhost/schema"},
        {"enum": []},
        {"type": "string", "pattern": "("},
        {"type": "object", "properties": []},
        nested(400),
    ],
    ids=lambda schema: str(schema)[:40],
)
def test_a_schema_that_cannot_be_enforced_is_refused(language, schema):
    with pytest.raises(UsageError, match="cannot be enforced"):
        Grammar(Shape(schema=schema), language)


def test_a_schema_that_would_take_minutes_is_refused(language):
    with pytest.raises(UsageError, match="characters"):
        Grammar(Shape(schema={"enum": [f"value {number}" for number in range(20_000)]}), language)


def test_an_answer_that_has_become_too_complex_fails_and_nothing_else(language):
    grammar = Grammar(Shape(schema={"type": "string", "pattern": "^(a{900}){900}$"}), language)
    constraint = grammar.constraint()
    logits = torch.zeros(language.vocabulary)
    constraint.mask(logits)
    (quote,) = language.encode('"', special=False)
    assert logits[quote] == 0
    with pytest.raises(UsageError, match="cannot go on"):
        constraint.accept(quote)


def test_a_trace_is_for_models_that_have_one(language):
    knows_the_mark = language.single("<think>") is not None
    assert language.thinks == knows_the_mark


def test_choices_of_one_request_go_their_own_ways(language):
    grammar = Grammar(Shape(schema={"enum": ["a", "b"]}), language)
    one, two = grammar.constraint(), grammar.constraint()
    for token in language.encode('"a"', special=False):
        one.accept(token)
    logits = torch.zeros(language.vocabulary)
    two.mask(logits)
    (quote,) = language.encode('"', special=False)
    assert logits[quote] == 0


def test_tokens_that_the_model_has_no_words_for_are_never_drawn(language):
    logits = torch.zeros(language.vocabulary)
    Grammar(Shape(schema=True), language).constraint().mask(logits)
    assert (logits[-5:] == float("-inf")).all()
