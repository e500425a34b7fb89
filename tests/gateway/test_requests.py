"""What a request may say: what is wrong is refused by name, the rest is forwarded as it is."""

import json

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash.gateway.checks import read_object, written
from flash.gateway.errors import ApiError
from flash.gateway.limits import Limits
from flash.gateway.requests import _CHAT, _COMPLETION, _ELSEWHERE, accept, model_of
from flash.gateway.routes import Route
from flash.values import Address

LIMITS = Limits(tokens=1000, choices=4)
BASE = Route(
    name="tiny",
    base="tiny",
    adapter=False,
    address=Address("http://localhost/v1", "key"),
    thinking=None,
    stop=(),
    fields=frozenset({"temperature", "n", "stop", "tools", "tool_choice", "logprobs", "echo"}),
    context_tokens=4096,
    backend="transformers",
)
TRAINED = attrs.evolve(BASE, name="blue-1", adapter=True, thinking=True, stop=("END",))
HI = [{"role": "user", "content": "Hi"}]
STREAMED = {
    "stream": True,
    "stream_options": {"include_usage": True, "continuous_usage_stats": True},
}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def chat(route=BASE, limits=LIMITS, **said):
    return accept("chat/completions", {"model": route.name, "messages": HI, **said}, route, limits)


def complete(route=BASE, **said):
    return accept("completions", {"model": route.name, "prompt": "Hi", **said}, route, LIMITS)


def refused(call, *arguments, **said):
    with pytest.raises(ApiError) as caught:
        call(*arguments, **said)
    return caught.value


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b"", "Expecting value"),
        (b"{", "line 1"),
        (b'{"a": 1,}', "line 1"),
        (b"[]", "a list"),
        (b'"text"', "a text"),
        (b"null", "null"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "-Infinity"),
        (b'{"a": 1e999}', "1e999 is too large"),
        (b'{"a": ' + b"9" * 5000 + b"}", "too long"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 50_000, "nested too deeply"),
        (b'{"a": "\xff"}', "not UTF-8"),
        ("{}".encode("utf-16"), "not UTF-8"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "'c' stands twice"),
    ],
)
def test_a_body_that_is_no_json_object_is_refused(body, word):
    error = refused(read_object, body)
    assert error.status == 400
    assert word in error.message


def test_half_a_surrogate_pair_is_refused_before_a_server_stumbles_over_it():
    said = read_object(rb'{"prompt": "\ud800"}')
    assert "surrogate" in refused(written, said).message
    assert written(read_object(rb'{"a": "\ud83d\ude00"}')) == '{"a":"\U0001f600"}'.encode()


@pytest.mark.parametrize(
    ("said", "param", "word"),
    [
        ({"messages": []}, "messages", "is empty"),
        ({"messages": "Hi"}, "messages", "must be a list"),
        ({"messages": ["Hi"]}, "messages[0]", "must be an object"),
        ({"messages": None}, "messages", "is missing"),
        ({"messages": [{"role": "root", "content": "x"}]}, "messages[0].role", "one of system"),
        ({"messages": [{"role": ["user"]}]}, "messages[0].role", "one of system"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "one of system"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "is missing"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "is missing"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "a text or a list"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "is empty"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0]",
            "reads text alone",
        ),
        ({"messages": [{"role": "user", "content": "x", "nmae": "y"}]}, "messages[0].nmae", "name"),
        ({"messages": [{"role": "assistant"}]}, "messages[0]", "neither content nor tool_calls"),
        ({"messages": [{"role": "tool", "content": "4"}]}, "messages[0].tool_call_id", "missing"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "1", "function": {}}]}]},
            "messages[0].tool_calls[0].function.name",
            "is missing",
        ),
        ({"temperature": True}, "temperature", "got a bool"),
        ({"temperature": "1"}, "temperature", "got a text"),
        ({"temperature": -0.1}, "temperature", "from 0 to 2"),
        ({"temperature": 10**400}, "temperature", "from 0 to 2"),
        ({"n": 0}, "n", "from 1"),
        ({"n": 5}, "n", "4 answers at most"),
        ({"n": 1.0}, "n", "a whole number"),
        ({"max_tokens": -1}, "max_tokens", "from 1"),
        ({"max_tokens": 10**30}, "max_tokens", "from 1"),
        ({"max_tokens": 1001}, "max_tokens", "`tokens` in [gateway] is 1000"),
        ({"max_completion_tokens": 1001}, "max_completion_tokens", "at most 1000"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "different limits"),
        ({"stream": "yes"}, "stream", "true or false"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream = true"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "no known field"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"logprobs": 3}, "logprobs", "true or false"),
        ({"stop": [""]}, "stop", "is empty"),
        ({"stop": ["x"] * 17}, "stop", "at most 16"),
        ({"stop": [3]}, "stop[0]", "must be a text"),
        ({"seed": 2**70}, "seed", "from -"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type", 'must be "function"'),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "is missing"),
        (
            {"tools": [{"type": "function", "function": {"name": "a b"}}]},
            "tools[0].function.name",
            "letters",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "a", "strict": True}}]},
            "tools[0].function.strict",
            "response_format",
        ),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tools": [TOOL], "tool_choice": "perhaps"}, "tool_choice", "a tool's name"),
        (
            {
                "tools": [TOOL],
                "tool_choice": {"type": "function", "function": {"name": "sub"}},
            },
            "tool_choice",
            "not in tools",
        ),
        ({"response_format": {"type": "xml"}}, "response_format", "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "no token id"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1", "from -100 to 100"),
        ({"temprature": 1}, "temprature", 'did you mean "temperature"?'),
        ({"wholly_unknown_thing": 1}, "wholly_unknown_thing", "no known field"),
        ({"prompt": "x"}, "prompt", "no field of /v1/chat/completions"),
        ({"functions": []}, "functions", "send tools instead"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "as it was trained"),
        ({"chat_template_kwargs": {"x": 1}}, "chat_template_kwargs.x", "no known field"),
        ({"min_p": 0.5}, "min_p", "not honoured by transformers, the backend of tiny"),
    ],
)
def test_what_is_wrong_with_a_chat_is_said_with_its_field(said, param, word):
    error = refused(chat, **said)
    assert (error.status, error.param) == (400, param)
    assert word in error.message


@pytest.mark.parametrize(
    ("said", "param", "word"),
    [
        ({"prompt": None}, "prompt", "is missing"),
        ({"prompt": ""}, "prompt", "is empty"),
        ({"prompt": []}, "prompt", "is empty"),
        ({"prompt": ["a", ""]}, "prompt[1]", "is empty"),
        ({"prompt": ["a", 3]}, "prompt[1]", "must be a text"),
        ({"prompt": [1, "a"]}, "prompt[1]", "a token id"),
        ({"prompt": [1, True]}, "prompt[1]", "a token id"),
        ({"prompt": [1, -1]}, "prompt[1]", "a token id"),
        ({"prompt": [[1], []]}, "prompt[1]", "is empty"),
        ({"prompt": {"a": 1}}, "prompt", "a text, a list of token ids"),
        ({"prompt": ["a"] * 5}, "prompt", "4 answers at most"),
        ({"prompt": ["a"] * 3, "n": 2}, "n", "3 prompts with 2 answers each"),
        ({"logprobs": True}, "logprobs", "a whole number"),
        ({"max_tokens": 0}, "max_tokens", "unless the prompt is echoed"),
        ({"suffix": "x"}, "suffix", "at its end"),
        ({"messages": HI}, "messages", "no field of /v1/completions"),
        ({"best_of": 2}, "best_of", "send n"),
    ],
)
def test_what_is_wrong_with_a_completion_is_said_with_its_field(said, param, word):
    error = refused(complete, **said)
    assert (error.status, error.param) == (400, param)
    assert word in error.message


def test_a_schema_may_not_be_nested_without_end():
    schema = {"type": "object"}
    for _ in range(100):
        schema = {"type": "array", "items": [schema]}
    function = {"name": "add", "parameters": {"type": "object", "properties": {"x": schema}}}
    error = refused(chat, tools=[{"type": "function", "function": function}])
    assert "nested more than 64 deep" in error.message


def test_what_is_said_is_forwarded():
    said = {
        "messages": [
            {"role": "system", "content": "Be kind.", "name": None},
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            },
            {
                "role": "assistant",
                "content": None,
                "refusal": None,
                "annotations": [],
                "tool_calls": [
                    {"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
                ],
            },
            {"role": "tool", "content": "4", "tool_call_id": "1"},
        ],
        "tools": [TOOL],
        "tool_choice": "auto",
        "temperature": 0,
        "max_completion_tokens": 5,
        "seed": None,
    }
    asked = chat(**said)
    first, second, third, fourth = asked.body["messages"]
    assert first == {"role": "system", "content": "Be kind."}
    assert second["content"] == "a\nb"
    assert (third["tool_calls"], fourth) == (said["messages"][2]["tool_calls"], said["messages"][3])
    rest = {name: value for name, value in asked.body.items() if name != "messages"}
    assert rest == {
        "model": "tiny",
        "tools": [TOOL],
        "tool_choice": "auto",
        "temperature": 0,
        "max_tokens": 5,
        **STREAMED,
    }


def test_what_asks_for_nothing_needs_no_backend_that_honours_it():
    nothing = {
        "top_p": 1,
        "min_p": 0,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "response_format": {"type": "text"},
        "tools": [],
        "tool_choice": "none",
        "parallel_tool_calls": True,
        "store": False,
    }
    asked = chat(**nothing, n=1, max_tokens=9)
    assert asked.body == {"model": "tiny", "messages": HI, "n": 1, "max_tokens": 9, **STREAMED}


def test_every_answer_is_counted_as_it_comes_whatever_the_client_wants_told():
    whole, quiet = chat(), chat(stream=True)
    told = chat(stream=True, stream_options={"include_usage": True})
    assert [one.stream for one in (whole, quiet, told)] == [False, True, True]
    assert [one.tells_usage for one in (whole, quiet, told)] == [False, False, True]
    for one in (whole, quiet, told):
        assert one.streamed
        assert {name: one.body[name] for name in STREAMED} == STREAMED


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_of_a_tool_is_asked_for_as_the_server_says_it_whole(stream):
    good, poor = BASE, attrs.evolve(BASE, streams_tools=False)
    asked = [chat(route, tools=[TOOL], stream=stream) for route in (good, poor)]
    assert [one.stream for one in asked] == [stream, stream]
    assert [one.streamed for one in asked] == [True, False]
    assert [one.body.get("stream", False) for one in asked] == [True, False]
    assert chat(poor, stream=stream).streamed


def test_an_adapter_thinks_as_it_was_trained():
    always = {"enable_thinking": True}
    assert chat(TRAINED).body["chat_template_kwargs"] == always
    assert chat(TRAINED, chat_template_kwargs=always).body["chat_template_kwargs"] == always
    assert chat(TRAINED).opened
    error = refused(chat, TRAINED, chat_template_kwargs={"enable_thinking": False})
    assert "trained with thinking" in error.message
    never = attrs.evolve(TRAINED, thinking=False)
    assert chat(never).body["chat_template_kwargs"] == {"enable_thinking": False}


def test_a_template_that_leaves_the_trace_to_the_model_opens_none():
    assert not chat(attrs.evolve(TRAINED, opens=False)).opened
    assert chat(attrs.evolve(TRAINED, opens=True)).opened


def test_a_base_model_thinks_as_the_client_asks():
    assert "chat_template_kwargs" not in chat().body
    asked = chat(chat_template_kwargs={"enable_thinking": True})
    assert (asked.body["chat_template_kwargs"], asked.opened) == ({"enable_thinking": True}, True)


@pytest.mark.parametrize("ask", [chat, complete])
def test_stop_sequences_of_training_hold_where_a_request_has_none(ask):
    assert ask(TRAINED).body["stop"] == ["END"]
    assert ask(TRAINED, stop=None).body["stop"] == ["END"]
    assert ask(TRAINED, stop="X").body["stop"] == ["X"]
    assert ask(TRAINED, stop=[]).body["stop"] == []


def test_an_answer_without_a_limit_has_the_gateways_where_the_context_is_longer():
    assert chat().body["max_tokens"] == 1000
    assert "max_tokens" not in chat(attrs.evolve(BASE, context_tokens=500)).body
    error = refused(chat, attrs.evolve(BASE, context_tokens=500), max_tokens=501)
    assert "context of 500 tokens" in error.message


def test_prompts_may_be_many_and_may_be_tokens():
    assert complete(prompt=["a", "b"], n=2).choices == 4
    assert complete(prompt=[[1, 2], [3]]).prompts == 2
    assert complete(prompt=[1, 2, 3]).body["prompt"] == [1, 2, 3]
    assert complete(echo=True, max_tokens=0).body["max_tokens"] == 0


def test_a_model_must_be_named():
    assert refused(model_of, {}).param == "model"
    assert refused(model_of, {"model": 3}).param == "model"


def test_no_long_field_is_said_back_in_full():
    error = refused(chat, **{"x" * 100_000: 1})
    assert len(json.dumps(error.content())) < 500


SPEAKERS = ["role", "user", "assistant", "tool", "name", "id", "1"]
PARTS = ["content", "type", "text", "function", "arguments", "parameters"]
NAMES = st.sampled_from([*SPEAKERS, *PARTS, "json_schema", "schema", "include_usage"])
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | NAMES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES | st.text(), inner),
    max_leaves=12,
)


@pytest.mark.slow
@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(["chat/completions", "completions"]),
    st.dictionaries(st.sampled_from([*_CHAT, *_COMPLETION, *_ELSEWHERE]), ANYTHING, max_size=3),
    st.booleans(),
)
def test_whatever_a_request_says_it_is_forwarded_or_refused_with_a_sentence(kind, said, trained):
    route = TRAINED if trained else attrs.evolve(BASE, fields=frozenset({*_CHAT, *_COMPLETION}))
    whole = {"messages": HI} if kind == "chat/completions" else {"prompt": "Hi"}
    try:
        asked = accept(kind, read_object(json.dumps(whole | said).encode()), route, LIMITS)
        body = json.loads(written(asked.body))
    except ApiError as error:
        refusal = error
    else:
        assert (body["model"], asked.choices <= LIMITS.choices) == (route.name, True)
        assert body.get("max_tokens", 1) <= LIMITS.tokens
        return
    assert (refusal.status, 10 < len(refusal.message) < 1000) == (400, True)
