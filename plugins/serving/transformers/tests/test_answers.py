"""The server's routes over an engine that a test commands: who waits, who goes, what fails."""

import asyncio
import json
import threading
import types

import pytest
import torch
from aiohttp.test_utils import TestClient, TestServer
from flash_serving_transformers.backend import ADAPTERS, LOG_PROBS, TOKENS
from flash_serving_transformers.language import Language
from flash_serving_transformers.requests import Handle, Stats, Token
from flash_serving_transformers.server import make_app
from flash_serving_transformers.service import Service

from flash.testing.models import make_byte_tokenizer

pytestmark = pytest.mark.slow

KEY = {"Authorization": "Bearer key"}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


class Engine:
    """Answers every request with `says`, a byte a token, as soon as `go` is set."""

    def __init__(self, says="Hello", stop_token=None):
        self.tokens = [*says.encode(), *([] if stop_token is None else [stop_token])]
        self.fails = None
        self.alive = True
        self.hangs = None
        self.go = threading.Event()
        self.go.set()
        self.gone = asyncio.Semaphore(0)
        """Counts the requests that were cancelled."""
        self.asked = []

    def submit(self, request, take, ended):
        handle = Handle(request)
        self.asked.append(request)
        threading.Thread(target=self._answer, args=(handle, take, ended), daemon=True).start()
        return handle

    def _answer(self, handle, take, ended):
        end = "length"
        for place, token in enumerate(self.tokens[: handle.request.max_tokens]):
            if place:
                self.go.wait(20)
            if handle.cancelled.is_set():
                end = "cancelled"
                break
            if take(Token(token, -0.5, [(token, -0.5)])):
                end = "stop"
                break
        ended(self.fails or end)

    def cancel(self, handle):
        handle.cancelled.set()
        self.gone.release()

    def log_probs(self, adapter, prompt, completion):
        if self.hangs:
            self.hangs.wait(5)
        if self.fails:
            raise self.fails
        return [-0.5] * len(completion)

    def stats(self):
        return Stats(running=0, waiting=0, cache_tokens_used=0, cache_tokens=9, adapters=())

    def close(self):
        pass


@pytest.fixture(scope="module")
def language():
    tokenizer = make_byte_tokenizer()
    embedding = torch.nn.Embedding(len(tokenizer), 2)
    model = types.SimpleNamespace(generation_config=None, get_input_embeddings=lambda: embedding)
    # The alphabet's order is not that of the bytes: here a token is its byte.
    own = Language(model, tokenizer, 400)
    own.decode = lambda tokens: bytes(one for one in tokens if one < 256).decode(errors="replace")
    return own


def run(language, engine, test, **options):
    """Run `test(client)` against a server of the engine."""

    async def main():
        service = Service(engine, language, base="m", context_tokens=400, **options)
        async with TestClient(
            TestServer(make_app(service, "key"), handler_cancellation=True)
        ) as client:
            return await test(client)

    return asyncio.run(main())


def ask(**fields):
    messages = [{"role": "user", "content": "Hi"}]
    return {"model": "m", "messages": messages, "max_tokens": 120, **fields}


async def post(client, body, path="/v1/chat/completions"):
    async with client.post(path, json=body, headers=KEY) as answer:
        return answer.status, await answer.json()


async def events(answer):
    return [
        json.loads(line[6:])
        async for line in answer.content
        if line.startswith(b"data: ") and b"[DONE]" not in line
    ]


def stop_of(language):
    return min(language.stops)


def test_an_answer_ends_at_the_stop_token_which_is_counted_and_not_said(language):
    engine = Engine("Hi there", stop_of(language))
    status, body = run(language, engine, lambda client: post(client, ask(logprobs=True)))
    (choice,) = body["choices"]
    assert (status, choice["message"]["content"], choice["finish_reason"]) == (
        200,
        "Hi there",
        "stop",
    )
    assert body["usage"]["completion_tokens"] == 9
    assert len(choice["logprobs"]["content"]) == 8


def test_log_probs_are_of_the_tokens_before_a_stop_sequence_only(language):
    body = ask(stop=["the"], logprobs=True)
    _, found = run(language, Engine("Hi there"), lambda client: post(client, body))
    assert found["choices"][0]["message"]["content"] == "Hi "
    assert len(found["choices"][0]["logprobs"]["content"]) == 3


def test_a_tool_call_comes_whole_and_as_a_stream(language):
    says = f"Let me see.\n{CALL}"

    async def test(client):
        whole = (await post(client, ask(tools=[TOOL])))[1]["choices"][0]
        async with client.post(
            "/v1/chat/completions", json=ask(tools=[TOOL], stream=True), headers=KEY
        ) as answer:
            return whole, [chunk["choices"][0] for chunk in await events(answer)]

    whole, chunks = run(language, Engine(says, stop_of(language)), test)
    (call,) = whole["message"]["tool_calls"]
    assert (whole["message"]["content"], whole["finish_reason"]) == ("Let me see.", "tool_calls")
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Oslo"}'}
    text = "".join(chunk["delta"].get("content") or "" for chunk in chunks)
    (part,) = [one for chunk in chunks for one in chunk["delta"].get("tool_calls", [])]
    assert (text, part["index"], part["function"]) == ("Let me see.", 0, call["function"])
    assert chunks[-1]["finish_reason"] == "tool_calls"


def test_a_call_that_is_not_complete_is_counted_token_by_token(language):
    options = {"include_usage": True, "continuous_usage_stats": True}

    async def test(client):
        body = ask(tools=[TOOL], stream=True, stream_options=options)
        async with client.post("/v1/chat/completions", json=body, headers=KEY) as answer:
            return [chunk for chunk in await events(answer) if chunk["choices"]]

    _, *chunks, end = run(language, Engine(CALL, stop_of(language)), test)
    assert len(chunks) == len(CALL)
    assert all(chunk["usage"]["completion_tokens"] for chunk in chunks)
    assert end["usage"]["completion_tokens"] == len(CALL) + 1


def test_with_tool_choice_none_what_looks_like_a_call_is_text(language):
    engine = Engine(CALL, stop_of(language))
    body = ask(tools=[TOOL], tool_choice="none")
    _, found = run(language, engine, lambda client: post(client, body))
    assert found["choices"][0]["message"] == {
        "role": "assistant",
        "content": CALL,
        "refusal": None,
    }


@pytest.mark.parametrize("seen", [0, 1, 2])
def test_a_client_that_goes_away_gives_its_rows_back(language, seen):
    engine = Engine("Hello there")

    async def test(client):
        engine.go.clear()
        answer = await client.post("/v1/chat/completions", json=ask(stream=True, n=2), headers=KEY)
        for _ in range(seen):
            await answer.content.readline()
        answer.close()
        for _ in range(2):
            await engine.gone.acquire()
        engine.go.set()
        return await post(client, ask())

    assert run(language, engine, test)[0] == 200


def test_a_client_that_does_not_wait_for_a_whole_answer_gives_its_row_back(language):
    engine = Engine("Hello there")

    async def test(client):
        engine.go.clear()
        with pytest.raises(asyncio.TimeoutError):
            async with asyncio.timeout(0.3):
                await post(client, ask())
        await engine.gone.acquire()
        engine.go.set()

    run(language, engine, test)


@pytest.mark.parametrize(
    ("error", "status"),
    [(torch.OutOfMemoryError("CUDA out of memory"), 503), (RuntimeError("a defect"), 500)],
)
def test_what_fails_in_the_engine_fails_the_request_and_not_the_server(language, error, status):
    engine = Engine()

    async def test(client):
        engine.fails = error
        failed = await post(client, ask())
        async with client.post(
            "/v1/chat/completions", json=ask(stream=True), headers=KEY
        ) as answer:
            streamed = (await events(answer))[-1]
        engine.fails = None
        return failed, streamed, await post(client, ask())

    failed, streamed, after = run(language, engine, test)
    error = failed[1]["error"]
    assert (failed[0], streamed) == (status, {"error": error | {"status": status}})
    assert error["type"] == "server_error"
    assert after[0] == 200


def health(language, engine, **options):
    async def test(client):
        async with client.get("/health") as answer:
            if engine.hangs:
                engine.hangs.set()
            return answer.status

    return run(language, engine, test, **options)


def test_health_is_that_of_the_engine(language):
    dead, hung, failing, full = Engine(), Engine(), Engine(), Engine()
    dead.alive = False
    failing.fails = RuntimeError("a defect")
    full.fails = MemoryError()
    assert health(language, Engine()) == 200
    assert [health(language, one) for one in (dead, failing, full)] == [503, 503, 200]
    for patience_s, status in ((0.1, 503), (60, 200)):
        hung.hangs = threading.Event()
        assert health(language, hung, patience_s=patience_s) == status


@pytest.mark.parametrize(
    "content",
    ["\ud800", "x" * 100_000, [{"type": "image_url", "text": ""}]],
    ids=["no text", "too long", "no words"],
)
def test_a_text_that_is_none_or_can_never_fit_is_the_clients_fault(language, content):
    body = ask(messages=[{"role": "user", "content": content}])
    status, found = run(language, Engine(), lambda client: post(client, body))
    assert (status, found["error"]["type"]) == (400, "invalid_request_error")


def test_each_choice_has_a_seed_of_its_own_and_the_same_one_again(language):
    engine = Engine()
    run(language, engine, lambda client: post(client, ask(n=3, seed=7)))
    assert [request.seed for request in engine.asked] == [7, 8, 9]


def test_a_prompt_is_read_back_with_its_log_probs(language):
    body = {"model": "m", "prompt": "ab", "echo": True, "logprobs": 0, "max_tokens": 0}
    status, found = run(language, Engine(), lambda client: post(client, body, "/v1/completions"))
    (choice,) = found["choices"]
    assert (status, choice["text"], choice["logprobs"]["token_logprobs"]) == (
        200,
        "ab",
        [None, -0.5],
    )
    assert found["usage"]["total_tokens"] == 2


MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", TOKENS, []),
        ("POST", TOKENS, {"messages": MESSAGES}),
        ("POST", TOKENS, {"model": "m"}),
        ("POST", TOKENS, {"model": "m", "messages": [1]}),
        ("POST", TOKENS, {"model": "m", "messages": MESSAGES, "tools": 1}),
        ("POST", TOKENS, {"model": "m", "messages": MESSAGES, "thinking": "yes"}),
        ("POST", TOKENS, {"model": ["m"], "messages": MESSAGES}),
        ("POST", LOG_PROBS, None),
        ("POST", LOG_PROBS, {"model": "m", "prompt": [], "completion": [1]}),
        ("POST", LOG_PROBS, {"model": "m", "prompt": "ab", "completion": [1]}),
        ("POST", LOG_PROBS, {"model": "m", "prompt": [1], "completion": [1.5]}),
        ("POST", LOG_PROBS, {"model": "m", "prompt": [1], "completion": [10**9]}),
        ("POST", LOG_PROBS, {"prompt": [1], "completion": [1]}),
        ("POST", ADAPTERS, {"name": "one"}),
        ("POST", ADAPTERS, {"name": {}, "folder": "/tmp"}),
        ("POST", ADAPTERS, {"name": "one", "folder": "/tmp", "more": 1}),
        ("DELETE", ADAPTERS, {}),
        ("DELETE", ADAPTERS, "one"),
    ],
)
def test_what_is_malformed_is_refused_on_every_route_of_the_server(language, method, path, body):
    async def test(client):
        async with client.request(method, path, json=body, headers=KEY) as answer:
            return answer.status, await answer.json()

    status, found = run(language, Engine(), test)
    assert (status, found["error"]["type"]) == (400, "invalid_request_error")
