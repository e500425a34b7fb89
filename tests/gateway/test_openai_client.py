"""The official `openai` client, against the gateway over a scripted server."""

import threading

import pytest
from gateway_bench import KEY, Answer, Bench, until

from flash.gateway.limits import Limits

pytestmark = pytest.mark.slow

HI = [{"role": "user", "content": "Hi"}]
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}
CALL = {"id": "call-1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    bench = Bench(tmp_path_factory.mktemp("gateway"), Limits(grace_s=0, requests=4, choices=4))
    yield bench
    bench.close()


@pytest.fixture
def bench(shared):
    shared.renew()
    return shared


@pytest.fixture
def client(bench):
    import openai

    with openai.OpenAI(base_url=bench.url, api_key=KEY, max_retries=0) as client:
        yield client


def test_a_chat_is_answered(client):
    answer = client.chat.completions.create(model="tiny", messages=HI)
    assert answer.choices[0].message.content == "Hello you"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (7, 3)
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    assert answer._request_id.startswith("req-")


def test_a_chat_is_streamed_with_its_usage_at_the_end(client):
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=HI, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Hello you"
    assert [c.usage for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], 3)


def test_a_stream_without_usage_has_none(client):
    chunks = list(client.chat.completions.create(model="tiny", messages=HI, stream=True))
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_the_client_collects_a_stream_as_it_does_from_openai(client):
    with client.chat.completions.stream(model="tiny", messages=HI) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == "Hello you"


def test_a_text_is_continued(client):
    assert client.completions.create(model="tiny", prompt="Hi").choices[0].text == "Hello you"
    streamed = client.completions.create(model="tiny", prompt="Hi", stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == "Hello you"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("streams_tools", [False, True])
def test_tools_are_passed_on_and_calls_come_back(bench, client, streams_tools, stream):
    bench.serve("tiny", streams_tools=streams_tools)
    bench.backend.answer = lambda _: Answer(pieces=(), tool_calls=(CALL,))
    asked = {"model": "tiny", "messages": HI, "tools": [ADD], "tool_choice": "required"}
    answer = client.chat.completions.create(**asked, stream=stream)
    if stream:
        (calls,) = [c.choices[0].delta.tool_calls for c in answer if c.choices[0].delta.tool_calls]
    else:
        calls = answer.choices[0].message.tool_calls
    assert (calls[0].function.name, calls[0].function.arguments) == ("add", '{"a": 2}')
    (request,) = bench.backend.requests
    assert (request["tools"], request["tool_choice"]) == ([ADD], "required")


def test_an_answer_goes_back_as_it_came(bench, client):
    bench.backend.answer = lambda _: Answer(pieces=(), tool_calls=(CALL,))
    said = client.chat.completions.create(model="tiny", messages=HI, tools=[ADD])
    again = [
        *HI,
        said.choices[0].message,
        {"role": "tool", "content": "4", "tool_call_id": "call-1"},
    ]
    client.chat.completions.create(model="tiny", messages=again, tools=[ADD])
    sent = bench.backend.requests[-1]["messages"]
    assert sent[1] == {"role": "assistant", "tool_calls": [CALL]}


def test_log_probabilities_pass_untouched(bench, client):
    bench.backend.answer = lambda _: Answer(logprobs=True)
    asked = {"model": "tiny", "messages": HI, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].logprobs.content[0].logprob == -0.5
    streamed = list(client.chat.completions.create(**asked, stream=True))
    tokens = [c.choices[0].logprobs.content[0].token for c in streamed if c.choices[0].logprobs]
    assert tokens == ["Hel", "lo", " you"]
    assert bench.backend.requests[0]["top_logprobs"] == 2


@pytest.mark.parametrize("stream", [False, True])
def test_several_answers_come_each_with_its_index(client, stream):
    answer = client.chat.completions.create(model="tiny", messages=HI, n=3, stream=stream)
    if not stream:
        assert [choice.message.content for choice in answer.choices] == ["Hello you"] * 3
        return
    texts = {0: "", 1: "", 2: ""}
    for chunk in answer:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == dict.fromkeys(range(3), "Hello you")


def test_what_shapes_an_answer_reaches_the_server(bench, client):
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    said = {"seed": 7, "stop": ["END"], "temperature": 0.5, "top_p": 0.9, "response_format": schema}
    client.chat.completions.create(
        model="tiny", messages=HI, max_tokens=9, extra_body={"min_p": 0.1, "top_k": 5}, **said
    )
    (request,) = bench.backend.requests
    assert {name: request[name] for name in said} == said
    assert (request["max_tokens"], request["min_p"], request["top_k"]) == (9, 0.1, 5)


def test_a_trace_is_told_apart(bench, client):
    bench.serve("wise", thinking=True)
    bench.backend.answer = lambda _: Answer(pieces=("<think>2 and", " 2</th", "ink>\n", "4"))
    message = client.chat.completions.create(model="wise", messages=HI).choices[0].message
    assert (message.reasoning_content, message.content) == ("2 and 2", "4")
    deltas = [
        chunk.choices[0].delta
        for chunk in client.chat.completions.create(model="wise", messages=HI, stream=True)
    ]
    assert "".join(getattr(each, "reasoning_content", None) or "" for each in deltas) == "2 and 2"
    assert "".join(each.content or "" for each in deltas) == "4"


def test_models_are_listed(bench, client):
    bench.serve("blue-1/step-10")
    assert [model.id for model in client.models.list()] == ["blue-1/step-10", "tiny"]
    assert client.models.retrieve("blue-1/step-10").parent == "tiny"


def test_errors_are_those_that_the_client_knows(bench, client):
    import openai

    ask = client.chat.completions.create
    with pytest.raises(openai.NotFoundError, match="GET /v1/models lists"):
        ask(model="nobody", messages=HI)
    with pytest.raises(openai.BadRequestError, match="temperature must be") as caught:
        ask(model="tiny", messages=HI, temperature=3)
    assert (caught.value.param, caught.value.code) == ("temperature", "invalid_value")
    bench.serve("plain", fields=frozenset())
    with pytest.raises(openai.BadRequestError, match="min_p is not honoured by transformers"):
        ask(model="plain", messages=HI, extra_body={"min_p": 0.1})
    with pytest.raises(openai.NotFoundError, match="there is no POST /v1/embeddings"):
        client.embeddings.create(model="tiny", input="x")
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    bench.backend.answer = lambda _: Answer(ends="broken")
    with pytest.raises(openai.InternalServerError, match="broke off"):
        ask(model="tiny", messages=HI)
    with pytest.raises(openai.APIError, match="broke off"):
        list(ask(model="tiny", messages=HI, stream=True))


def test_too_much_at_once_is_the_clients_rate_limit(bench, client):
    import openai

    bench.backend.answer = lambda _: Answer(ends="silent")
    streams = [
        client.chat.completions.create(model="tiny", messages=HI, stream=True) for _ in range(4)
    ]
    with pytest.raises(openai.RateLimitError, match="4 requests of this key are under way"):
        client.chat.completions.create(model="tiny", messages=HI)
    for stream in streams:
        stream.close()
    assert {row.status for row in bench.rows_of(4)} == {"aborted"}


def test_a_client_may_ask_again_where_the_server_was_away(bench):
    import openai

    answers = iter([Answer(status=503, said={}), Answer()])
    bench.backend.answer = lambda _: next(answers)
    with openai.OpenAI(base_url=bench.url, api_key=KEY, max_retries=1) as patient:
        answer = patient.chat.completions.create(model="tiny", messages=HI)
    assert answer.choices[0].message.content == "Hello you"
    assert [row.status for row in bench.rows.written] == ["failed", "ok"]


@pytest.mark.parametrize("chunks", range(8))
def test_a_stream_that_is_left_at_any_chunk_is_counted_up_to_there(bench, client, chunks):
    allowed = threading.Semaphore(chunks)
    bench.backend.answer = lambda _: Answer(pieces=tuple("abcdef"), allowed=allowed)
    stream = client.chat.completions.create(model="tiny", messages=HI, stream=True)
    read = [next(stream).choices[0].delta.content for _ in range(chunks)]
    stream.close()
    (row,) = bench.rows_of(1)
    assert "".join(read) == "abcdef"[: max(0, chunks - 1)]
    assert (row.completion_tokens, row.status) == (max(0, chunks - 1), "aborted")
    until(lambda: bench.backend.left == 1)


def test_a_stream_that_is_left_when_only_its_end_is_missing_is_aborted_too(bench, client):
    allowed = threading.Semaphore(8)
    bench.backend.answer = lambda _: Answer(pieces=tuple("abcdef"), allowed=allowed)
    stream = client.chat.completions.create(model="tiny", messages=HI, stream=True)
    for _ in range(7):
        next(stream)
    stream.close()
    assert [row.status for row in bench.rows_of(1)] == ["aborted"]
