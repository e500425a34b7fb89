"""What the gateway says over its socket, to whom, and what it leaves behind."""

import json
import socket
import threading

import pytest
from gateway_bench import KEY, Answer, Bench, events, key_row, text_of, until

from flash.gateway.limits import Limits

HI = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    limits = Limits(grace_s=0, requests=2, body_bytes=1 << 20, client_s=0.4, idle_s=0.4)
    bench = Bench(tmp_path_factory.mktemp("gateway"), limits)
    yield bench
    bench.close()


@pytest.fixture
def bench(shared):
    shared.renew()
    return shared


def error_of(answer):
    status, _, body = answer
    return status, json.loads(body)["error"]


def test_an_answer_comes_back_and_is_counted(bench):
    status, answer = bench.chat()
    assert (status, answer["choices"][0]["message"]["content"]) == (200, "Hello you")
    (row,) = bench.rows.written
    assert (row.deployment, row.base, row.key, row.status) == ("tiny", "tiny", "default", "ok")
    assert (row.prompt_tokens, row.cached_tokens, row.completion_tokens) == (7, 3, 3)


def test_a_stream_comes_back_and_is_counted(bench):
    status, said = bench.chat(stream=True)
    assert (status, text_of(said), said[-1]) == (200, "Hello you", "[DONE]")
    (row,) = bench.rows.written
    assert (row.prompt_tokens, row.completion_tokens, row.status) == (7, 3, "ok")


def test_the_row_is_written_before_the_client_sees_the_end(bench):
    bench.rows.slow_s = 0.05
    seen = []
    for stream in (False, True):
        bench.chat(stream=stream)
        seen.append(len(bench.rows.written))
    assert seen == [1, 2]


def test_the_server_is_asked_with_its_own_key_and_in_the_models_name(bench):
    bench.serve("blue-1/step-10", thinking=True, stop=("END",))
    bench.chat(model="blue-1/step-10")
    (asked,) = bench.backend.requests
    assert (asked["model"], asked["stop"]) == ("blue-1/step-10", ["END"])
    assert asked["chat_template_kwargs"] == {"enable_thinking": True}
    (headers,) = bench.backend.headers
    assert KEY not in str(headers)
    assert bench.rows.written[0].deployment == "blue-1/step-10"


def test_health_alone_asks_for_no_key(bench):
    assert bench.ask("GET", "/health", key=None)[0] == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/v1/models"), ("POST", CHAT), ("GET", "/nowhere"), ("POST", "/health/x")],
)
@pytest.mark.parametrize("key", [None, "", "flash-of-another-home", "ключ", "x" * 4000])
def test_nothing_else_answers_without_a_known_key(bench, method, path, key):
    headers = {} if key is None else {"Authorization": f"Bearer {key}".encode()}
    answer = bench.ask(method, path, HI, key=None, headers=headers)
    status, error = error_of(answer)
    assert (status, error["code"]) == (401, "invalid_api_key")
    assert not key or key not in answer[2].decode()
    assert bench.backend.requests == []


@pytest.mark.parametrize("header", [KEY, f"Basic {KEY}", "Bearer", f"Bearer {KEY}x"])
def test_a_key_must_be_a_bearers_and_whole(bench, header):
    answer = bench.ask("GET", "/v1/models", key=None, headers={"Authorization": header})
    assert error_of(answer)[0] == 401


@pytest.mark.slow
def test_a_key_that_was_made_a_moment_ago_opens_and_a_revoked_one_soon_does_not(bench):
    bench.keys.append(key_row("second", "laptop"))
    until(lambda: bench.ask("GET", "/v1/models", key="second")[0] == 200)
    bench.keys[-1].revoked_s = 1.0
    until(lambda: bench.ask("GET", "/v1/models", key="second")[0] == 401)


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/"), ("POST", "/v1/embeddings"), ("GET", CHAT), ("DELETE", "/v1/models/tiny")],
)
def test_what_is_not_here_is_404_and_says_what_is(bench, method, path):
    status, error = error_of(bench.ask(method, path))
    assert (status, error["code"]) == (404, "unknown_url")
    assert "POST /v1/chat/completions" in error["message"]


def test_models_are_listed_and_found_with_slashes_in_their_names(bench):
    bench.serve("blue-1/step-10")
    _, _, body = bench.ask("GET", "/v1/models")
    assert [each["id"] for each in json.loads(body)["data"]] == ["blue-1/step-10", "tiny"]
    for path in ("blue-1/step-10", "blue-1%2Fstep-10"):
        status, _, body = bench.ask("GET", f"/v1/models/{path}")
        assert (status, json.loads(body)["parent"]) == (200, "tiny")


def test_a_model_that_is_not_served_is_404_and_one_that_is_not_served_yet_503(bench):
    status, error = bench.chat(model="nobody")
    assert (status, error["error"]["code"]) == (404, "model_not_found")
    assert "there are tiny" in error["error"]["message"]
    bench.routes.hold("blue-2", "blue-2 is being deployed")
    answer = bench.ask("POST", CHAT, {**HI, "model": "blue-2"})
    assert error_of(answer)[0] == 503
    assert answer[1]["Retry-After"]
    assert bench.ask("GET", "/v1/models/nobody")[0] == 404


@pytest.mark.slow
def test_what_is_malformed_or_too_large_never_reaches_a_server(bench):
    assert error_of(bench.ask("POST", CHAT, b"{"))[1]["code"] == "invalid_json"
    assert bench.chat(temperature=3)[0] == 400
    large = {**HI, "messages": [{"role": "user", "content": "x" * (10 << 20)}]}
    status, error = error_of(bench.ask("POST", CHAT, large))
    assert (status, error["code"]) == (413, "request_too_large")
    assert bench.backend.requests == []
    assert bench.rows.written == []


def test_a_body_without_a_length_is_refused_once_it_is_too_large(bench):
    def parts():
        for _ in range(20):
            yield b"x" * (1 << 16)

    assert bench.ask("POST", CHAT, parts())[0] == 413


@pytest.mark.slow
def test_a_body_that_unpacks_to_too_much_is_refused(bench):
    import gzip

    small = gzip.compress(b" " * (16 << 20))
    answer = bench.ask("POST", CHAT, small, headers={"Content-Encoding": "gzip"})
    assert answer[0] == 413


@pytest.mark.parametrize("said", [{}, {"stream": True}])
def test_what_the_server_refuses_is_said_in_its_words(bench, said):
    error = {"message": "the prompt has 9000 tokens", "code": None, "param": "messages"}
    bench.backend.answer = lambda _: Answer(status=400, said={"error": error})
    status, *_ = answer = bench.ask("POST", CHAT, {**HI, **said})
    assert status == 400
    assert error_of(answer)[1]["message"] == "the prompt has 9000 tokens"
    assert bench.rows.written[0].status == "failed"


@pytest.mark.parametrize(
    ("status", "shown"), [(500, 502), (503, 503), (429, 503), (401, 502), (302, 502), (404, 404)]
)
def test_a_servers_other_errors_are_the_gateways_own(bench, status, shown):
    bench.backend.answer = lambda _: Answer(status=status, said={"error": {"message": "no"}})
    assert error_of(bench.ask("POST", CHAT, HI))[0] == shown


def test_a_server_that_is_gone_is_503(bench):
    from flash.values import Address

    bench.serve("gone", address=Address("http://localhost/v1", "key", "/tmp/no-such.sock"))
    status, error = bench.chat(model="gone")
    assert (status, error["error"]["code"]) == (503, "server_unavailable")
    assert bench.rows.written[0].status == "failed"


@pytest.mark.parametrize("ends", ["broken", "error", "nonsense"])
def test_a_stream_that_breaks_ends_with_an_error_and_not_in_silence(bench, ends):
    bench.backend.answer = lambda _: Answer(ends=ends)
    status, said = bench.chat(stream=True)
    assert (status, text_of(said)) == (200, "Hello you")
    assert said[-1]["error"]["type"] == "server_error"
    (row,) = bench.rows.written
    assert (row.completion_tokens, row.status) == (3, "failed")


@pytest.mark.parametrize("ends", ["broken", "error", "nonsense"])
def test_an_answer_that_breaks_is_502_and_counted_up_to_there(bench, ends):
    bench.backend.answer = lambda _: Answer(ends=ends)
    status, error = bench.chat()
    assert (status, error["error"]["code"]) == (502, "server_failed")
    (row,) = bench.rows.written
    assert (row.completion_tokens, row.status) == (3, "failed")


def test_a_trace_is_told_apart_in_whole_answers_and_in_streams(bench):
    bench.serve("wise", thinking=True)
    bench.backend.answer = lambda _: Answer(pieces=("2 and", " 2</th", "ink>\n", "4"))
    _, whole = bench.chat(model="wise")
    message = whole["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("2 and 2", "4")
    _, said = bench.chat(model="wise", stream=True)
    assert (text_of(said, "reasoning_content"), text_of(said)) == ("2 and 2", "4")


def test_a_key_has_room_for_so_many_requests_and_no_more(bench):
    bench.backend.answer = lambda _: Answer(ends="silent")
    open_ones = [leave_open(bench) for _ in range(2)]
    until(lambda: len(bench.backend.requests) == 2)
    answer = bench.ask("POST", CHAT, HI)
    assert error_of(answer)[0] == 429
    assert answer[1]["Retry-After"] == "1"
    bench.keys.append(key_row("second", "laptop"))
    bench.backend.answer = lambda _: Answer()
    until(lambda: bench.ask("POST", CHAT, HI, key="second")[0] == 200)
    for each in open_ones:
        each.close()
    until(lambda: bench.chat()[0] == 200)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_takes_the_servers_work_with_it(bench, stream):
    bench.backend.answer = lambda _: Answer(ends="silent")
    left = leave_open(bench, stream=stream)
    until(lambda: bench.told() == [3])
    left.close()
    until(lambda: bench.backend.left == 1)
    (row,) = bench.rows_of(1)
    assert (row.status, row.completion_tokens) == ("aborted", 3)
    assert bench.routes.under_way("tiny") == 0


@pytest.mark.parametrize("tokens", range(4))
def test_an_answer_that_is_left_at_any_token_is_counted_up_to_there(bench, tokens):
    allowed = threading.Semaphore(tokens + 1)
    bench.backend.answer = lambda _: Answer(allowed=allowed)
    left = leave_open(bench, stream=False)
    until(lambda: bench.backend.requests and bench.told() == [tokens])
    left.close()
    (row,) = bench.rows_of(1)
    assert (row.status, row.completion_tokens) == ("aborted", tokens)


ADD = {"type": "function", "function": {"name": "add"}}
CALL = {"id": "call-1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}


def test_a_stream_with_tools_is_made_of_a_whole_answer_where_the_servers_streams_are_poor(bench):
    bench.serve("tiny", streams_tools=False)
    bench.backend.answer = lambda _: Answer(tool_calls=(CALL,))
    _, said = bench.chat(stream=True, tools=[ADD], stream_options={"include_usage": True})
    (asked,) = bench.backend.requests
    assert "stream" not in asked
    first, last, told, done = said
    assert first["choices"][0]["delta"] == {
        "role": "assistant",
        "tool_calls": [{"index": 0, **CALL}],
    }
    assert last["choices"][0]["finish_reason"] == "tool_calls"
    assert (told["usage"]["completion_tokens"], done) == (3, "[DONE]")
    (row,) = bench.rows.written
    assert (row.prompt_tokens, row.completion_tokens, row.status) == (7, 3, "ok")


def test_an_error_before_a_stream_that_is_made_of_a_whole_answer_keeps_its_status(bench):
    bench.serve("tiny", streams_tools=False)
    asked = {**HI, "stream": True, "tools": [ADD]}
    for answer, status in (
        (Answer(status=400, said={"error": {"message": "too long"}}), 400),
        (Answer(ends="nonsense"), 502),
    ):
        bench.backend.answer = lambda _, answer=answer: answer
        assert error_of(bench.ask("POST", CHAT, asked))[0] == status
    assert [row.status for row in bench.rows_of(2)] == ["failed", "failed"]


def test_a_request_has_an_id_that_both_sides_know(bench):
    answer = bench.ask("POST", CHAT, HI, headers={"X-Request-Id": "mine-1"})
    assert answer[1]["X-Request-Id"] == "mine-1"
    (line,) = bench.log.of("request")
    assert line["client_id"] == "mine-1"
    assert bench.backend.headers[0]["X-Request-Id"] == line["id"] == bench.rows.written[0].request
    assert bench.ask("GET", "/v1/models")[1]["X-Request-Id"].startswith("req-")


def test_an_id_of_a_client_never_lets_a_request_go_uncounted(bench):
    for _ in range(2):
        bench.ask("POST", CHAT, HI, headers={"X-Request-Id": "again"})
    assert len({row.request for row in bench.rows.written}) == 2


def test_the_log_has_a_line_a_request_without_prompt_and_key(bench):
    bench.ask("POST", CHAT, {**HI, "messages": [{"role": "user", "content": "PRIVATE"}]})
    (line,) = bench.log.of("request")
    assert (line["key"], line["model"], line["status"]) == ("default", "tiny", 200)
    assert (line["prompt"], line["cached"], line["completion"]) == (7, 3, 3)
    assert 0 < line["first_ms"] <= line["total_ms"]
    assert KEY not in str(bench.log.told)
    assert "PRIVATE" not in str(bench.log.told)


@pytest.mark.slow
def test_a_body_that_does_not_arrive_is_given_up(bench):
    with socket.create_connection(("127.0.0.1", bench.port)) as slow:
        slow.sendall(
            f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
            "Content-Length: 100\r\n\r\n{".encode()
        )
        assert b" 408 " in slow.recv(4096)


@pytest.mark.slow
def test_a_connection_without_a_request_is_closed(bench):
    with socket.create_connection(("127.0.0.1", bench.port)) as idle:
        idle.sendall(b"GET /v1/models HTTP/1.1\r\nHost:")
        assert idle.recv(1) == b""


@pytest.mark.slow
def test_a_client_that_does_not_read_is_left(bench):
    bench.backend.answer = lambda _: Answer(pieces=("x" * (1 << 16),) * 400)
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", bench.port))
        deaf.sendall(request_of({**HI, "stream": True}))
        (row,) = bench.rows_of(1)
    assert row.status == "aborted"
    assert row.completion_tokens < 400
    until(lambda: bench.backend.left == 1)
    until(lambda: bench.log.told)
    assert [(line["event"], line["status"]) for line in bench.log.told] == [("request", 499)]


def test_a_client_that_leaves_before_its_body_has_arrived_is_no_trouble(bench):
    with socket.create_connection(("127.0.0.1", bench.port)) as asked:
        asked.sendall(request_of(HI)[:-5])
    until(lambda: bench.log.told)
    assert [(line["event"], line["status"]) for line in bench.log.told] == [("request", 499)]


def test_what_is_no_http_is_refused_and_never_repeated_in_the_log(bench):
    with socket.create_connection(("127.0.0.1", bench.port)) as asked:
        asked.sendall(f"GET / HTTP/1.1\r\nHost: x\r\nAuthorization: {KEY}\x01\r\n\r\n".encode())
        assert b" 400 " in asked.recv(4096)
    until(lambda: bench.log.told)
    assert KEY not in str(bench.log.told)


def test_more_connections_than_there_may_be_are_closed(tmp_path):
    bench = Bench(tmp_path, Limits(grace_s=0, connections=2))
    try:
        held = [socket.create_connection(("127.0.0.1", bench.port)) for _ in range(2)]
        for each in held:
            each.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b" 200 " in each.recv(4096)
        with socket.create_connection(("127.0.0.1", bench.port)) as more:
            assert more.recv(1) == b""
        held.pop().close()
        until(lambda: answers(bench))
    finally:
        bench.close()


def answers(bench):
    try:
        return bench.ask("GET", "/health", key=None)[0] == 200
    except OSError:
        return False


def request_of(body):
    content = json.dumps(body).encode()
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


def leave_open(bench, *, stream=True):
    """Ask, and return the connection without having read anything."""
    asked = socket.create_connection(("127.0.0.1", bench.port))
    asked.sendall(request_of({**HI, "stream": stream}))
    return asked


@pytest.mark.parametrize("stream", [True, False])
def test_a_gateway_that_stops_says_so_to_those_it_cannot_wait_for(tmp_path, stream):
    bench = Bench(tmp_path, Limits(grace_s=0.05))
    bench.backend.answer = lambda _: Answer(ends="silent")
    asked = leave_open(bench, stream=stream)
    until(lambda: bench.backend.requests)
    bench.close()
    said = b"".join(iter(lambda: asked.recv(1 << 16), b""))
    assert b"the gateway is being stopped" in said
    (row,) = bench.rows.written
    assert row.status == "failed"


def test_a_gateway_that_stops_says_so_to_those_who_are_still_asking(tmp_path):
    bench = Bench(tmp_path, Limits(grace_s=0.05))
    with socket.create_connection(("127.0.0.1", bench.port)) as asked:
        asked.sendall(request_of(HI)[:-5])
        until(bench.busy)
        bench.close()
        assert b" 503 " in asked.recv(4096)
    assert bench.rows.written == []


def test_a_gateway_that_stops_lets_those_end_who_are_quick(tmp_path):
    bench = Bench(tmp_path, Limits(grace_s=20))
    go_on = threading.Event()
    bench.backend.answer = lambda _: Answer(waits=go_on)
    asked = leave_open(bench)
    until(lambda: bench.backend.requests)
    closing = threading.Thread(target=bench.close)
    closing.start()
    until(lambda: not answers(bench))
    go_on.set()
    said = events(b"".join(iter(lambda: asked.recv(1 << 16), b"")))
    closing.join()
    assert (text_of(said), said[-1]) == ("Hello you", "[DONE]")
    assert bench.rows.written[0].status == "ok"


@pytest.mark.slow
@pytest.mark.parametrize("stream", [True, False])
def test_a_server_that_falls_silent_is_given_up(tmp_path, stream):
    bench = Bench(tmp_path, Limits(grace_s=0, silence_s=0.1))
    bench.backend.answer = lambda _: Answer(ends="silent")
    status, said = bench.chat(stream=stream)
    error = said[-1] if stream else said
    assert status == (200 if stream else 504)
    assert "said nothing for too long" in error["error"]["message"]
    assert bench.rows.written[0].status == "failed"
    until(lambda: bench.backend.left == 1)
    bench.close()
