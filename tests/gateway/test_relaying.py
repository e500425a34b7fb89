"""Bytes of a server in, bytes for a client out: cut anywhere, and held back at the end."""

import itertools
import json

import pytest
from gateway_bench import envelope, event, events, text_of, usage_of
from hypothesis import given, settings
from hypothesis import strategies as st

from flash.gateway.errors import ApiError
from flash.gateway.gathering import Gathered
from flash.gateway.relaying import Relay, Tokens, whole
from flash.gateway.requests import Asked

BODY = {"model": "tiny"}


def asked(**said):
    facts = {
        "body": {},
        "stream": True,
        "streamed": True,
        "tells_usage": False,
        "choices": 1,
        "prompts": 1,
        "splits": True,
        "opened": False,
    }
    return Asked(**facts | said)


def piece(text=None, *, index=0, reason=None, count=0, **delta):
    said = delta | ({} if text is None else {"content": text})
    choice = {"index": index, "delta": said, "finish_reason": reason}
    kind = "chat.completion.chunk"
    return event(envelope(kind, BODY, [choice]) | {"usage": usage_of(7, count)})


def end(count):
    return event(envelope("chat.completion.chunk", BODY, []) | {"usage": usage_of(7, count)})


DONE = b"data: [DONE]\n\n"
STREAM = b"".join(
    [
        piece("", role="assistant"),
        *(
            piece(text, count=at + 1)
            for at, text in enumerate(["<thi", "nk>a b", " </think>", "\nc"])
        ),
        piece(reason="stop", count=4),
        end(4),
        DONE,
    ]
)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, len(STREAM)), max_size=20))
def test_however_a_stream_is_cut_it_says_the_same(cuts):
    relay = Relay(asked())
    places = [0, *sorted(cuts), len(STREAM)]
    out = b"".join(relay.feed(STREAM[a:b]) for a, b in itertools.pairwise(places))
    assert (relay.over, relay.failure, relay.tokens) == (True, None, Tokens(7, 3, 4))
    said = events(out + relay.rest())
    assert (text_of(said, "reasoning_content"), text_of(said)) == ("a b", "c")
    assert said[-1] == "[DONE]"


def test_the_end_is_held_back_until_the_usage_is_written():
    relay = Relay(asked(tells_usage=True))
    sent = events(relay.feed(STREAM))
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in sent)
    *_, last, told, done = [None, *events(relay.rest())]
    assert last["choices"][0]["finish_reason"] == "stop"
    assert (told["choices"], told["usage"]["completion_tokens"], done) == ([], 4, "[DONE]")
    assert all(chunk["usage"] is None for chunk in [*sent, last])


def test_usage_is_told_only_to_those_who_ask():
    relay = Relay(asked())
    said = events(relay.feed(STREAM) + relay.rest())
    assert not any("usage" in chunk for chunk in said[:-1])


def test_several_answers_are_split_each_by_itself():
    relay = Relay(asked(choices=2))
    out = relay.feed(
        piece("<think>a", index=0, count=1)
        + piece("b", index=1, count=1)
        + piece("</think>c", index=0, count=2)
        + piece(reason="stop", index=1, count=1)
    )
    assert not relay.over
    out += relay.feed(piece(reason="length", index=0, count=2) + DONE) + relay.rest()
    said = events(out)
    assert (text_of(said, "reasoning_content"), text_of(said)) == ("a", "c")
    assert (text_of(said, "reasoning_content", 1), text_of(said, index=1)) == ("", "b")
    assert relay.tokens == Tokens(7, 3, 3)


def test_prompts_are_counted_each_once():
    relay = Relay(asked(choices=4, prompts=2, splits=False))
    for index in range(4):
        relay.feed(piece("x", index=index, count=2))
    assert relay.tokens == Tokens(14, 6, 8)


def test_tool_calls_and_log_probabilities_pass_untouched():
    calls = [{"index": 0, "id": "1", "function": {"name": "add", "arguments": "{}"}}]
    logprobs = {"content": [{"token": "<thi", "logprob": -1.0}]}
    relay = Relay(asked())
    held = json.loads(piece("<thi", count=1)[6:])
    held["choices"][0]["logprobs"] = logprobs
    said = events(relay.feed(event(held) + piece(tool_calls=calls, count=2)))
    assert (said[0]["choices"][0]["delta"], said[0]["choices"][0]["logprobs"]) == (
        {"content": ""},
        logprobs,
    )
    assert said[1]["choices"][0]["delta"] == {"tool_calls": calls}


def test_comments_and_empty_lines_are_passed_over():
    relay = Relay(asked())
    assert relay.feed(b": ping\r\n\r\n") == b""
    assert text_of(events(relay.feed(piece("a").replace(b"\n", b"\r\n")))) == "a"


@pytest.mark.parametrize(
    ("said", "word"),
    [
        (b"data: {what?}\n\n", "no answer of OpenAI's API"),
        (b"data: 3\n\n", "no answer of OpenAI's API"),
        (b'data: {"choices": [3]}\n\n', "no answer of OpenAI's API"),
        (b"data: " + b"[" * 100_000 + b"\n\n", "no answer of OpenAI's API"),
        (event({"error": {"message": "out of memory", "code": 500}}), "out of memory"),
        (DONE, "broke off"),
    ],
)
def test_what_a_server_does_wrong_ends_the_stream_with_an_error(said, word):
    relay = Relay(asked())
    assert relay.feed(piece("a", count=1)) != b""
    relay.feed(said)
    assert relay.over
    assert word in relay.failure.message
    assert relay.tokens == Tokens(7, 3, 1)


def test_a_server_that_closes_before_the_end_has_failed_and_after_it_has_not():
    early, late = Relay(asked()), Relay(asked())
    early.feed(piece("a", count=1))
    late.feed(piece("a", count=1) + piece(reason="stop", count=1))
    early.end()
    late.end()
    assert early.failure.status == 502
    assert (late.failure, late.tokens) == (None, Tokens(7, 3, 1))


def gathered(chunks, **said):
    """Return the answer that a client gets who did not ask for a stream, and what it used."""
    relay = Relay(asked(stream=False, **said))
    assert relay.feed(b"".join(chunks)) == b""
    relay.end()
    assert relay.failure is None
    return json.loads(relay.rest()), relay.tokens


def test_a_whole_answer_is_what_the_stream_adds_up_to():
    answer, tokens = gathered([STREAM])
    assert tokens == Tokens(7, 3, 4)
    assert answer == {
        **envelope("chat.completion", BODY, []),
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "reasoning_content": "a b",
                    "content": "c",
                    "refusal": None,
                },
                "finish_reason": "stop",
            }
        ],
        "usage": usage_of(7, 4),
    }


def test_whole_answers_are_each_put_together_by_itself():
    chunks = [
        piece("a", count=1),
        piece("x", index=1, count=1),
        piece("b", count=2),
        piece(index=1, reason="length", count=1),
        piece(reason="stop", count=2),
    ]
    answer, tokens = gathered(chunks, choices=2)
    said = [(one["message"]["content"], one["finish_reason"]) for one in answer["choices"]]
    assert said == [("ab", "stop"), ("x", "length")]
    assert (tokens, answer["usage"]["total_tokens"]) == (Tokens(7, 3, 3), 10)


def test_a_tool_call_is_put_together_from_its_pieces():
    first = {"index": 0, "id": "a", "type": "function"}
    chunks = [
        piece(role="assistant", tool_calls=[first | {"function": {"name": "add"}}]),
        piece(tool_calls=[{"index": 0, "function": {"arguments": '{"x"'}}]),
        piece(tool_calls=[{"index": 0, "function": {"arguments": ": 1}", "name": None}}]),
        piece(tool_calls=[{**first, "index": 1, "id": "b", "function": {"name": "sub"}}]),
        piece(reason="tool_calls", count=9),
    ]
    (choice,) = gathered(chunks)[0]["choices"]
    assert choice["message"]["content"] is None
    assert choice["message"]["tool_calls"] == [
        {"id": "a", "type": "function", "function": {"name": "add", "arguments": '{"x": 1}'}},
        {"id": "b", "type": "function", "function": {"name": "sub"}},
    ]


def test_whole_log_probabilities_are_those_of_all_pieces():
    def text(piece, log_prob, reason=None):
        columns = {"tokens": [piece], "token_logprobs": [log_prob], "top_logprobs": None}
        choice = {"index": 0, "text": piece, "logprobs": columns, "finish_reason": reason}
        return event(envelope("text_completion", BODY, [choice]) | {"usage": usage_of(7, 1)})

    answer, _ = gathered([text("a", None), text("b", -0.5, "stop")], splits=False)
    assert (answer["object"], answer["choices"][0]["text"]) == ("text_completion", "ab")
    assert answer["choices"][0]["logprobs"] == {
        "tokens": ["a", "b"],
        "token_logprobs": [None, -0.5],
        "top_logprobs": None,
    }


@pytest.mark.parametrize(
    ("error", "status"),
    [
        ({"message": "no memory", "status": 503, "code": "out_of_memory"}, 503),
        ({"message": "too long", "code": 400}, 400),
        ({"message": "defect", "code": "unknown"}, 502),
    ],
)
def test_an_error_in_a_stream_has_the_status_that_the_server_says(error, status):
    relay = Relay(asked(stream=False))
    relay.feed(event({"error": error}))
    assert relay.failure.status == status
    assert error["message"] in relay.failure.message


def wanted(**said):
    return asked(stream=False, streamed=False, **said)


def message_of(index, text, reason="stop", **message):
    said = {"role": "assistant", "content": text, "refusal": None, **message}
    return {"index": index, "message": said, "logprobs": None, "finish_reason": reason}


def body_of(*choices):
    answer = envelope("chat.completion", BODY, choices) | {"usage": usage_of(7, 4)}
    return json.dumps(answer).encode()


def test_an_answer_that_the_server_gave_whole_is_split_and_counted():
    said, tokens = whole(body_of(message_of(0, "<think> a </think> b ")), wanted())
    message = json.loads(said)["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("a", "b")
    assert tokens == Tokens(7, 3, 4)
    said, _ = whole(body_of(message_of(0, "a</think>b")), wanted(opened=True))
    assert json.loads(said)["choices"][0]["message"]["reasoning_content"] == "a"


def test_an_answer_that_the_server_gave_whole_without_a_trace_passes_as_it_is():
    for body in (body_of(message_of(0, " a ")), body_of(message_of(0, None, tool_calls=[]))):
        assert whole(body, wanted())[0] is body


CALLS = [
    {"id": f"call-{at}", "type": "function", "function": {"name": "add", "arguments": said}}
    for at, said in enumerate(['{"a": 2}', "{}"])
]


@pytest.mark.parametrize("tells_usage", [False, True])
def test_an_answer_that_the_server_gave_whole_is_a_stream_to_a_client_who_wants_one(tells_usage):
    body = body_of(
        message_of(0, None, "tool_calls", tool_calls=CALLS),
        message_of(1, "<think>a</think>b") | {"logprobs": {"content": [{"token": "b"}]}},
        message_of(2, "", "length", tool_calls=[]),
    )
    said, tokens = whole(body, asked(streamed=False, tells_usage=tells_usage))
    *chunks, done = events(said)
    if tells_usage:
        told = chunks.pop()
        assert (told["choices"], told["usage"]) == ([], usage_of(7, 4))
    assert [chunk.pop("usage", 0) for chunk in chunks] == [None if tells_usage else 0] * 6
    assert (tokens, done) == (Tokens(7, 3, 4), "[DONE]")
    sum_of_all = Gathered()
    for chunk in chunks:
        assert chunk["object"] == "chat.completion.chunk"
        sum_of_all.add(chunk)
    expected = json.loads(whole(body, wanted())[0])
    del expected["choices"][2]["message"]["tool_calls"]
    assert sum_of_all.answer(usage_of(7, 4)) == expected
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert [each["finish_reason"] for each in choices if each["delta"]] == [None] * 3
    calls = choices[0]["delta"]["tool_calls"]
    assert calls == [{"index": at, **call} for at, call in enumerate(CALLS)]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"choices": []}', b"[" * 100_000])
def test_a_whole_answer_that_is_none_is_the_servers_fault(body, stream):
    with pytest.raises(ApiError) as caught:
        whole(body, asked(stream=stream, streamed=False))
    assert caught.value.status == 502
