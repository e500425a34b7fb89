"""What the gateway says over its socket, to whom, and what it leaves behind."""

import json

import pytest
from gateway_bench import KEY, Answer, Bench, key_row, text_of


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    bench = Bench(tmp_path_factory.mktemp("gateway"))
    yield bench
    bench.close()


@pytest.fixture
def bench(shared):
    shared.backend.answer = lambda _request: Answer()
    for what in (shared.backend.requests, shared.rows.written, shared.log.told):
        what.clear()
    return shared


def test_an_answer_comes_back_and_is_counted(bench):
    status, answer = bench.chat()
    assert (status, answer["choices"][0]["message"]["content"]) == (200, "Hello you")
    (row,) = bench.rows.written
    assert (row.deployment, row.base, row.key, row.status) == ("tiny", "tiny", "default", "ok")
    assert (row.prompt_tokens, row.cached_tokens, row.completion_tokens) == (7, 3, 3)


def test_a_stream_comes_back_and_is_counted(bench):
    status, said = bench.chat(stream=True)
    assert (status, text_of(said), said[-1]) == (200, "Hello you", "[DONE]")
    assert not any("usage" in chunk for chunk in said[:-1])
    (row,) = bench.rows.written
    assert (row.prompt_tokens, row.completion_tokens, row.status) == (7, 3, "ok")
