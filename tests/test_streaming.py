"""An answer as it comes from a real server: its pieces, its counts, and every way to get none."""

import contextlib

import pytest
from chat_server import Server, chunk, streamed

from flash.errors import FlashError
from flash.gateway.reasoning import Splitter
from flash.streaming import Piece, Refused, Reply, Unreachable
from flash.values import Address

BODY = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


def reply_of(server):
    return Reply(Address(server.url, "the-key"), BODY)


def says(server, *events, **how):
    server.answer = lambda _: (200, streamed(*events, **how), {})


def test_pieces_come_in_order_and_what_they_come_to_is_kept(server):
    says(
        server,
        chunk(role="assistant"),
        chunk(reasoning_content="hm"),
        chunk("Good "),
        chunk("day", "stop"),
    )
    reply = reply_of(server)

    pieces = list(reply)

    assert pieces == [Piece("hm", reasoning=True), Piece("Good "), Piece("day")]
    assert (reply.reasoning, reply.content, reply.finish_reason) == ("hm", "Good day", "stop")
    assert (reply.prompt_tokens, reply.completion_tokens) == (5, 3)


def test_a_backends_trace_is_told_apart_from_its_answer(server):
    says(server, chunk("<thi"), chunk("nk>hm"), chunk("</think>\n\n"), chunk("So", "stop"))
    reply = Reply(Address(server.url, "the-key"), BODY, splitter=Splitter(opened=False))

    assert list(reply) == [Piece("hm", reasoning=True), Piece("So")]
    assert (reply.reasoning, reply.content) == ("hm", "So")


def test_a_trace_without_an_end_is_all_there_is(server):
    says(server, chunk("hm and"), chunk(" hm</th", "length"))
    reply = Reply(Address(server.url, "the-key"), BODY, splitter=Splitter(opened=True))

    assert "".join(piece.text for piece in reply if piece.reasoning) == "hm and hm</th"
    assert reply.content == ""


def test_the_request_is_a_stream_with_usage_and_carries_the_key_in_its_header(server):
    says(server, chunk("x", "stop"))

    list(reply_of(server))

    [(path, headers, body)] = server.requests
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer the-key"
    assert body == {**BODY, "stream": True, "stream_options": {"include_usage": True}}


def test_a_refusal_is_told_in_the_servers_words_with_status_and_code(server):
    error = {"error": {"message": "too long", "code": "context_length_exceeded"}}
    server.answer = lambda _: (400, error, {})

    with pytest.raises(Refused) as caught:
        list(reply_of(server))

    assert (caught.value.message, caught.value.status) == ("too long", 400)
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize("body", [b"<html>", b"[1]", b'{"error": 5}', b'{"error": null}', b""])
def test_a_refusal_of_any_form_is_a_sentence(server, body):
    server.answer = lambda _: (502, body, {})

    with pytest.raises(Refused) as caught:
        list(reply_of(server))

    assert caught.value.message


def test_an_error_within_the_stream_is_raised_after_what_came_before_it(server):
    says(server, chunk("so far"), {"error": {"message": "the server died"}})
    reply = reply_of(server)

    with pytest.raises(FlashError, match="the server died"):
        list(reply)

    assert reply.content == "so far"


@pytest.mark.parametrize(
    "body",
    [b"", b"data: {\n\n", b"data: 5\n\n", b"data: " + b"x" * (1 << 21), b'data: {"choices": []}\n'],
    ids=["nothing", "torn", "no object", "endless", "no end"],
)
def test_a_stream_that_is_none_or_has_no_end_is_an_error(server, body):
    server.answer = lambda _: (200, iter([body] if body else []), {})

    with pytest.raises(FlashError, match=r"broke off|no chat completion"):
        list(reply_of(server))


def test_nobody_at_the_address_is_told_from_a_refusal(server):
    server.close()

    with pytest.raises(Unreachable, match="does not answer: Connection refused"):
        list(reply_of(server))


def test_leaving_early_ends_the_request(server):
    def endless():
        while True:
            yield from streamed(chunk("word " * 1000), done=False)

    server.answer = lambda _: (200, endless(), {})
    with contextlib.closing(iter(reply_of(server))) as pieces:
        next(pieces)

    assert server.left.wait(10)
