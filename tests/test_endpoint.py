"""Models behind an OpenAI-compatible endpoint, against a real local server."""

from __future__ import annotations

import threading

import pytest
from chat_server import Server, completion

from flash.endpoint import MOST_BYTES, RETRIES, Endpoint, Limits, ServedModel
from flash.episodes import Question
from flash.errors import FlashError, UsageError

QUICK = Limits(answer_s=5, connect_s=5, backoff_s=0.001)


@pytest.fixture
def server():
    served = Server()
    yield served
    served.close()


def asking(url, key=None, **settings):
    settings = {"max_tokens": 16, "temperature": 0.0, "limits": QUICK} | settings
    return ServedModel(Endpoint(url, "tiny", key), **settings)


def question(text="hi", **rest):
    return Question(({"role": "user", "content": text},), **rest)


def answers(model, *questions):
    return [answer for _, answer in sorted(model(questions or [question()]), key=lambda o: o[0])]


def test_a_target_is_an_address_and_a_model():
    endpoint = Endpoint.parse("https://api.example/v1/#org/model-7")

    assert (endpoint.url, endpoint.model) == ("https://api.example/v1", "org/model-7")
    assert Endpoint.parse("http://[::1]:8000/v1").model is None
    assert Endpoint.parse("http://localhost:8000/v1").local


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("http://api.example/v1", "in the clear"),
        ("http://127.0.0.1.example/v1", "in the clear"),
        ("https://user:sk-canary@api.example/v1", "a user, a password"),
        ("https://api.example/v1?key=sk-canary", "a user, a password"),
        ("https:///v1", "has no host"),
        ("https://host:port/v1", "is no address"),
    ],
)
def test_an_address_that_is_not_safe_is_refused(target, said):
    with pytest.raises(UsageError, match=said) as caught:
        Endpoint.parse(target)

    assert "sk-canary" not in f"{caught.value.message} {caught.value.hint}"


def test_questions_are_answered_in_their_places(server):
    server.answer = lambda request: (200, completion(request["messages"][0]["content"][::-1]), {})
    model = asking(server.url, key="sk-canary-1234")

    said = answers(model, *(question(f"row {number}") for number in range(20)))

    assert [answer.text for answer in said] == [f"row {n}"[::-1] for n in range(20)]
    assert model.tokens == 60
    assert model.seconds > 0
    path, headers, request = server.requests[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer sk-canary-1234"
    assert request["model"] == "tiny"
    assert (request["max_tokens"], request["temperature"]) == (16, 0.0)
    assert "seed" not in request


def test_what_is_drawn_depends_on_the_stream_alone(server):
    model = asking(server.url, temperature=1.0)

    answers(model, question(stream="0/1/0"))
    answers(model, question(stream="0/2/0"))
    answers(model, question(stream="0/1/0"))

    seeds = [request["seed"] for _, _, request in server.requests]
    assert seeds[0] == seeds[2] != seeds[1]


def test_trace_tool_calls_and_parts_become_the_text_a_model_writes(server):
    calls = [{"function": {"name": "add", "arguments": '{"a": 1}'}}]
    server.answer = lambda _: (
        200,
        completion(
            [{"type": "text", "text": "so"}], "tool_calls", reasoning_content="hm", tool_calls=calls
        ),
        {},
    )
    tools = [{"type": "function", "function": {"name": "add"}}]

    (said,) = answers(asking(server.url), question(tools=tools))

    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    assert said.text == f"<think>hm</think>so\n{call}"
    assert server.requests[0][2]["tools"] == tools


def test_a_cut_answer_is_truncated_and_a_withheld_one_is_an_error(server):
    reasons = iter(["length", "content_filter"])
    server.answer = lambda _: (200, completion("x", next(reasons)), {})
    model = asking(server.url)

    (cut,), (withheld,) = answers(model), answers(model)

    assert (cut.text, cut.truncated, cut.error) == ("x", True, None)
    assert "withheld" in withheld.error


@pytest.mark.parametrize("status", [408, 409, 429, 500, 503])
def test_a_busy_server_is_asked_again(server, status):
    script = iter([(status, {}, {"Retry-After": "0"}), (200, completion("at last"), {})])
    server.answer = lambda _: next(script)

    (said,) = answers(asking(server.url))

    assert said.text == "at last"


def test_a_server_that_stays_busy_is_one_answers_error_with_its_own_word(server):
    server.answer = lambda _: (429, {"error": {"message": "slow down"}}, {"Retry-After": "0"})

    (said,) = answers(asking(server.url))

    assert said.error.endswith(f"answered 429 {RETRIES + 1} times: slow down")
    assert len(server.requests) == RETRIES + 1


def test_after_several_failures_in_a_row_nothing_more_is_asked(server):
    server.answer = lambda _: (500, {}, {"Retry-After": "0"})
    model = asking(server.url)
    answers(model, *[question()] * 5)
    asked = len(server.requests)

    (said,) = answers(model)

    assert said.error.startswith("not asked after 5 failures: ")
    assert len(server.requests) == asked


def test_a_question_that_the_server_refuses_is_its_own_error(server):
    server.answer = lambda request: (
        (400, {"error": {"message": "context is 10 tokens"}}, {})
        if request["messages"][0]["content"] == "long"
        else (200, completion(), {})
    )

    short, long = answers(asking(server.url), question("short"), question("long"))

    assert short.text == "out"
    assert long.error == "the server refused the request (400): context is 10 tokens"


def test_a_model_with_another_name_for_its_budget_gets_that(server):
    refusal = {"error": {"message": "Use 'max_completion_tokens' instead."}}
    server.answer = lambda request: (
        (400, refusal, {}) if "max_tokens" in request else (200, completion("fine"), {})
    )
    model = asking(server.url)

    assert [answer.text for answer in answers(model, question(), question())] == ["fine"] * 2
    assert server.requests[-1][2]["max_completion_tokens"] == 16


@pytest.mark.parametrize(
    ("status", "said"),
    [(401, "refuses the key"), (403, "refuses the key"), (404, "answered 404: no such model")],
)
def test_what_no_question_would_get_past_ends_it(server, status, said):
    server.answer = lambda _: (status, {"error": {"message": "no such model"}}, {})

    with pytest.raises(FlashError, match=said) as caught:
        answers(asking(server.url, key="sk-canary-1234"))

    assert "sk-canary-1234" not in caught.value.message
    assert len(server.requests) == 1


def test_no_redirect_takes_the_key_elsewhere(server):
    server.answer = lambda _: (307, {}, {"Location": "https://elsewhere.example/v1"})

    with pytest.raises(FlashError, match="answered 307"):
        answers(asking(server.url, key="sk-canary-1234"))


@pytest.mark.parametrize(
    "body", [b"<html>", b"[]", b"{}", b'{"choices": []}', b'{"choices": [{"message": null}]}']
)
def test_nonsense_is_an_error_that_quotes_it(server, body):
    server.answer = lambda _: (200, body, {})

    (said,) = answers(asking(server.url))

    assert said.error == f"the server's answer is no chat completion: {body.decode()}"


def test_an_endless_answer_is_cut_off(server):
    server.answer = lambda _: (200, b" " * (MOST_BYTES + 1), {})

    (said,) = answers(asking(server.url))

    assert said.error.endswith("answered with more than 16 MiB")


def test_a_server_that_hangs_is_left_at_the_limit(server):
    leave = threading.Event()
    server.answer = lambda _: leave.wait(30) and (200, completion(), {})
    limits = Limits(answer_s=0.05, connect_s=5, backoff_s=0.001)

    (said,) = answers(asking(server.url, limits=limits))
    leave.set()

    assert "does not answer: timed out" in said.error


def test_a_server_that_is_down_is_an_error_with_the_reason(server):
    server.close()

    (said,) = answers(asking(server.url))

    assert "does not answer: Connection refused" in said.error


def test_the_only_model_of_a_server_needs_no_name(server):
    assert ServedModel(Endpoint(server.url), max_tokens=1, temperature=0.0).name == "tiny"

    server.models = ["one", "two"]
    with pytest.raises(UsageError, match="has 2 models: one, two") as caught:
        ServedModel(Endpoint(server.url), max_tokens=1, temperature=0.0)
    assert caught.value.hint == f"name it: {server.url}#MODEL"
