"""
The conformance of a serving backend, as tests that a plugin subclasses.

    @pytest.fixture(scope="module")
    def bench(tmp_path_factory):
        with Bench(PLUGIN, MyConfig(), tmp_path_factory.mktemp("serving")) as bench:
            yield bench

    class TestServing(ServingConformance):
        too_high_rank = 512

    class TestEnds(ServingEnds):
        pass

One start of the server serves all of `ServingConformance`; `ServingEnds` starts it twice more. A
field of requests that the record lists is tested for its effect, so that one which is taken and
ignored fails; one that it does not list is skipped.
"""

# ruff: noqa: D102, S101 - these are tests: a name and a body say it, and asserts are the point

from __future__ import annotations

import json
import threading
import time
from typing import TYPE_CHECKING, Any, ClassVar, Final

import pytest

from flash.errors import FlashError, UsageError
from flash.gateway.gathering import Gathered
from flash.testing.served import BASE, CONTEXT, EXTRA, ONE, TWO, Bench, processes_in
from flash.values import ServedAdapter

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

TOOLS: Final = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Oslo", "Rome"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("weather", "population")
]
SCHEMA: Final = {
    "type": "object",
    "properties": {"answer": {"enum": ["yes", "no"]}},
    "required": ["answer"],
    "additionalProperties": False,
}
OK, BAD_REQUEST, UNAUTHORIZED, NOT_FOUND = 200, 400, 401, 404

_ENDS_S: Final = 30.0
_BIASED: Final = 100


class ServingConformance:
    """Tests that a started backend with two adapters must pass; `bench` is the module's."""

    too_high_rank: ClassVar[int] = 1024
    """A rank that the backend refuses as it is set up."""

    tolerance: ClassVar[float] = 2e-3
    """How far log-probabilities may be from the trainer's, in nats."""

    guarded: ClassVar[Sequence[str]] = ("/v1/models", "/v1/chat/completions", "/v1/completions")
    """Routes that need the key, with those of the backend's own."""

    # ---- what is served is what was trained

    def test_the_base_and_two_adapters_answer_as_the_trainer_would(self, bench: Bench) -> None:
        expected = {model: bench.reference.text(bench.greedy(model)) for model in (BASE, ONE, TWO)}
        assert expected == {model: bench.client.chat(model).text for model in expected}
        assert len(set(expected.values())) == len(expected)

    def test_requests_of_all_models_at_once_answer_as_each_does_alone(self, bench: Bench) -> None:
        asked = [(model, f"Say {number}") for number in range(4) for model in (BASE, ONE, TWO)]
        found = _at_once(lambda one: bench.client.chat(*one).text, asked)
        expected = [bench.reference.text(bench.greedy(*one)) for one in asked]
        assert expected == found

    @pytest.mark.parametrize("model", [BASE, ONE, TWO])
    def test_log_probs_are_the_trainers(self, bench: Bench, model: str) -> None:
        adapter = None if model == BASE else model
        prompt, completion = (bench.reference.encode(text) for text in ("How far", " is it?"))
        expected = bench.reference.log_probs(adapter, prompt, completion)
        found = bench.backend.log_probs(model, prompt, completion)
        assert expected == pytest.approx(list(found), abs=self.tolerance)

    @pytest.mark.parametrize("thinking", [False, True])
    @pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "tools"])
    def test_a_prompts_tokens_are_those_of_training(
        self, bench: Bench, tools: Any, thinking: bool
    ) -> None:
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hé!"}]
        expected = bench.reference.prompt(messages, tools, thinking=thinking)
        found = bench.backend.tokens(ONE, messages, tools=tools, thinking=thinking)
        assert expected == list(found)

    def test_a_chat_has_the_prompt_that_its_thinking_asks_for(self, bench: Bench) -> None:
        expected, found = {}, {}
        for thinking in (False, True):
            tokens = bench.reference.prompt([{"role": "user", "content": "Hi"}], thinking=thinking)
            expected[thinking] = len(tokens)
            switch = {"enable_thinking": thinking}
            reply = bench.client.chat(ONE, "Hi", chat_template_kwargs=switch, max_tokens=1)
            found[thinking] = reply.body["usage"]["prompt_tokens"]
        assert expected == found
        assert expected[False] != expected[True]

    # ---- adapters come and go

    def test_an_adapter_loads_is_replaced_and_unloads_on_the_live_server(
        self, bench: Bench
    ) -> None:
        for name in (ONE, TWO):
            adapter = ServedAdapter(name=EXTRA, folder=bench.adapters[name], rank=4)
            bench.backend.load(adapter)
            assert bench.client.chat(name).text == bench.client.chat(EXTRA).text
        listed = bench.client.get("/v1/models").body["data"]
        assert {one["id"] for one in listed} == {BASE, ONE, TWO, EXTRA}
        bench.backend.unload(EXTRA)
        bench.backend.unload(EXTRA)
        assert bench.client.chat(EXTRA).status == NOT_FOUND

    def test_a_rank_over_the_servers_is_refused_before_the_load(self, bench: Bench) -> None:
        folder = bench.adapter("too-high", seed=9, rank=8)
        adapter = ServedAdapter(name=EXTRA, folder=folder, rank=self.too_high_rank)
        with pytest.raises(UsageError, match=str(self.too_high_rank)):
            bench.backend.load(adapter)
        assert bench.client.chat(EXTRA).status == NOT_FOUND

    def test_an_adapter_that_is_not_whole_is_refused_and_the_others_go_on(
        self, bench: Bench, tmp_path: Path
    ) -> None:
        config = (bench.adapters[ONE] / "adapter_config.json").read_bytes()
        (tmp_path / "adapter_config.json").write_bytes(config)
        (tmp_path / "adapter_model.safetensors").write_bytes(b"half of it")
        with pytest.raises(FlashError):
            bench.backend.load(ServedAdapter(name=EXTRA, folder=tmp_path, rank=4))
        bench.backend.health()
        assert bench.client.chat(EXTRA).status == NOT_FOUND
        assert bench.client.chat(ONE).status == OK

    def test_requests_under_way_go_on_while_another_adapter_loads_and_unloads(
        self, bench: Bench
    ) -> None:
        asked: dict[str, Any] = {"max_tokens": 96}
        if "logit_bias" in bench.plugin.fields:  # then it does not stop before
            asked["logit_bias"] = {str(token): -_BIASED for token in bench.reference.stops}
        stream = bench.client.stream(ONE, **asked)
        chunks = [next(stream)]
        bench.backend.load(ServedAdapter(name=EXTRA, folder=bench.adapters[TWO], rank=4))
        bench.client.chat(EXTRA)
        bench.backend.unload(EXTRA)
        chunks += stream
        whole = bench.client.chat(ONE, **asked)
        assert (whole.text, whole.body["usage"]["completion_tokens"]) == (
            _said(chunks),
            chunks[-1]["usage"]["completion_tokens"],
        )

    # ---- streams

    def test_a_stream_says_what_a_whole_answer_says_with_usage_in_every_chunk(
        self, bench: Bench
    ) -> None:
        whole = bench.client.chat(ONE, max_tokens=24)
        chunks = list(bench.client.stream(ONE, max_tokens=24))
        assert whole.text == _said(chunks)
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        assert sorted(counts) == counts
        prompts = {chunk["usage"]["prompt_tokens"] for chunk in chunks}
        used = whole.body["usage"]
        assert ({used["prompt_tokens"]}, used["completion_tokens"]) == (prompts, counts[-1])
        ends = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]]
        assert [whole.choices[0]["finish_reason"]] == [end for end in ends if end is not None]

    @pytest.mark.parametrize(
        "asked",
        [
            {"logprobs": True, "top_logprobs": 2},
            {"n": 2, "temperature": 1.0, "seed": 7},
            {"prompt": ["The sea", "A hill"]},
            {"prompt": "The sea", "echo": True, "logprobs": 0},
            {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False},
        ],
        ids="-".join,
    )
    def test_a_stream_adds_up_to_the_whole_answer(
        self, bench: Bench, asked: dict[str, Any]
    ) -> None:
        self._needs(bench, *asked.keys() - {"prompt"})
        if "tools" in asked and not bench.plugin.streams_tools:
            pytest.skip("the backend is asked for answers with tools whole")
        if "prompt" in asked:
            path, body = "/v1/completions", {"model": ONE, "max_tokens": 12, "temperature": 0}
        else:
            path, body = "/v1/chat/completions", bench.client.body(ONE, "Hello", {})
            body["max_tokens"] = 200 if "tools" in asked else 24
        whole = bench.client.send("POST", path, body | asked).body
        gathered, used = Gathered(), {}
        for chunk in bench.client.chunks(path, body | asked):
            used = chunk["usage"]
            gathered.add(chunk)
        found = gathered.answer(used)
        assert [_told(one) for one in whole["choices"]] == [_told(one) for one in found["choices"]]
        assert whole["object"] == found["object"]
        for count in ("prompt_tokens", "completion_tokens"):
            assert whole["usage"][count] == used[count]

    def test_a_client_that_hangs_up_leaves_a_server_that_answers(self, bench: Bench) -> None:
        for seen in range(1, 4):
            stream = bench.client.stream(ONE, max_tokens=200)
            for _ in range(seen):
                next(stream)
            stream.close()
        assert bench.reference.text(bench.greedy(TWO)) == bench.client.chat(TWO).text

    # ---- fields of requests

    def test_temperature(self, bench: Bench) -> None:
        self._needs(bench, "temperature")
        greedy = bench.client.chat(ONE, max_tokens=24)
        drawn = [bench.client.chat(ONE, max_tokens=24, temperature=1.8) for _ in range(3)]
        assert bench.reference.text(bench.greedy(ONE, most=24)) == greedy.text
        assert {one.text for one in drawn} - {greedy.text}

    @pytest.mark.parametrize(
        ("field", "value"), [("top_p", 1e-6), ("top_k", 1), ("min_p", 1.0)], ids=str
    )
    def test_what_keeps_only_the_likeliest_token_is_greedy(
        self, bench: Bench, field: str, value: float
    ) -> None:
        self._needs(bench, field)
        asked: dict[str, Any] = {"temperature": 1.8, field: value, "max_tokens": 16}
        assert bench.client.chat(ONE, max_tokens=16).text == bench.client.chat(ONE, **asked).text

    def test_seed(self, bench: Bench) -> None:
        self._needs(bench, "seed")
        asked = [
            bench.client.chat(ONE, max_tokens=16, temperature=1.5, seed=seed).text
            for seed in (1, 2, 1)
        ]
        assert asked[0] == asked[2]
        assert asked[0] != asked[1]

    def test_n(self, bench: Bench) -> None:
        self._needs(bench, "n")
        reply = bench.client.chat(ONE, n=3, max_tokens=16, temperature=1.8)
        assert sorted(choice["index"] for choice in reply.choices) == [0, 1, 2]
        assert len({choice["message"]["content"] for choice in reply.choices}) > 1
        assert reply.body["usage"]["completion_tokens"] > 16  # noqa: PLR2004 - of all of them

    def test_the_usage_of_a_stream_is_that_of_all_its_answers(self, bench: Bench) -> None:
        self._needs(bench, "n")
        chunks = list(bench.client.stream(ONE, n=3, max_tokens=12, temperature=1.8))
        counts = {
            choice["index"]: chunk["usage"]["completion_tokens"]
            for chunk in chunks
            for choice in chunk["choices"]
        }
        assert sorted(counts) == [0, 1, 2]
        assert sum(counts.values()) == chunks[-1]["usage"]["completion_tokens"]

    def test_stop(self, bench: Bench) -> None:
        self._needs(bench, "stop")
        whole = bench.reference.text(bench.greedy(ONE, most=32))
        mark = _in_the_middle(whole)
        cut = bench.client.chat(ONE, max_tokens=32, stop=[mark])
        streamed = _said(bench.client.stream(ONE, max_tokens=32, stop=mark))
        expected = whole.partition(mark)[0]
        assert (expected, expected) == (cut.text, streamed)
        assert cut.choices[0]["finish_reason"] == "stop"

    def test_logprobs_of_a_chat(self, bench: Bench) -> None:
        self._needs(bench, "logprobs", "top_logprobs")
        tokens = bench.greedy(ONE)
        reply = bench.client.chat(ONE, logprobs=True, top_logprobs=3)
        content = reply.choices[0]["logprobs"]["content"][: len(tokens)]
        prompt = bench.reference.prompt([{"role": "user", "content": "Hello"}], thinking=False)
        expected = bench.reference.log_probs(ONE, prompt, tokens)
        assert expected == pytest.approx([one["logprob"] for one in content], abs=self.tolerance)
        raw = b"".join(bytes(one["bytes"]) for one in content)
        assert bench.reference.text(tokens) == raw.decode(errors="replace")
        for one in content:
            tops = [top["logprob"] for top in one["top_logprobs"]]
            assert sorted(tops, reverse=True) == tops
            assert tops[0] == pytest.approx(one["logprob"], abs=self.tolerance)

    def test_logprobs_of_a_completion(self, bench: Bench) -> None:
        self._needs(bench, "logprobs")
        prompt = bench.reference.encode("The sea")
        tokens = bench.reference.greedy(ONE, prompt, 6)
        reply = bench.client.complete(ONE, prompt, logprobs=2, max_tokens=6, temperature=0)
        found = reply.choices[0]["logprobs"]["token_logprobs"][: len(tokens)]
        expected = bench.reference.log_probs(ONE, prompt, tokens)
        assert expected == pytest.approx(found, abs=self.tolerance)

    def test_logit_bias(self, bench: Bench) -> None:
        self._needs(bench, "logit_bias")
        (token, *_) = bench.reference.encode("x")
        reply = bench.client.chat(ONE, logit_bias={str(token): _BIASED}, max_tokens=5)
        assert bench.reference.text([token] * 5) == reply.text

    @pytest.mark.parametrize("field", ["presence_penalty", "frequency_penalty"])
    def test_penalties(self, bench: Bench, field: str) -> None:
        self._needs(bench, field)
        text = "Say it again and again"
        option = {field.removesuffix("_penalty"): 2.0}
        expected, plain = bench.greedy(ONE, text, 32, **option), bench.greedy(ONE, text, 32)
        assert expected != plain, "the reference's answer repeats nothing: take another prompt"
        reply = bench.client.chat(ONE, text, max_tokens=32, **{field: 2.0})
        assert bench.reference.text(expected) == reply.text

    def test_response_format(self, bench: Bench) -> None:
        self._needs(bench, "response_format")
        wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
        bound = bench.client.chat(ONE, max_tokens=128, response_format=wanted)
        assert json.loads(bound.text)["answer"] in {"yes", "no"}
        asked: dict[str, Any] = {"max_tokens": 48, "response_format": {"type": "json_object"}}
        assert bench.client.chat(ONE, **asked).text.lstrip().startswith("{")

    def test_tools_are_told_to_the_model(self, bench: Bench) -> None:
        self._needs(bench, "tools")
        expected = bench.reference.prompt(
            [{"role": "user", "content": "Hello"}], TOOLS, thinking=False
        )
        reply = bench.client.chat(ONE, tools=TOOLS, max_tokens=1)
        assert len(expected) == reply.body["usage"]["prompt_tokens"]

    def test_tool_choice(self, bench: Bench) -> None:
        self._needs(bench, "tools", "tool_choice")
        named = {"type": "function", "function": {"name": "population"}}
        for choice, names in (("required", {"weather", "population"}), (named, {"population"})):
            asked: dict[str, Any] = {"tools": TOOLS, "tool_choice": choice, "max_tokens": 200}
            (call, *_) = bench.client.chat(ONE, **asked).choices[0]["message"]["tool_calls"]
            assert call["function"]["name"] in names
            assert json.loads(call["function"]["arguments"])["city"] in {"Oslo", "Rome"}
        none = bench.client.chat(ONE, tools=TOOLS, tool_choice="none").choices[0]["message"]
        assert not none.get("tool_calls")

    def test_parallel_tool_calls(self, bench: Bench) -> None:
        self._needs(bench, "tools", "tool_choice", "parallel_tool_calls")
        asked: dict[str, Any] = {
            "tools": TOOLS,
            "tool_choice": "required",
            "parallel_tool_calls": False,
        }
        reply = bench.client.chat(ONE, max_tokens=200, **asked)
        assert len(reply.choices[0]["message"]["tool_calls"]) == 1

    def test_a_streamed_tool_call_is_the_whole_ones(self, bench: Bench) -> None:
        self._needs(bench, "tools", "tool_choice", "parallel_tool_calls")
        named = {"type": "function", "function": {"name": "weather"}}
        asked: dict[str, Any] = {"tools": TOOLS, "tool_choice": named, "parallel_tool_calls": False}
        whole = bench.client.chat(ONE, max_tokens=200, **asked)
        (call,) = whole.choices[0]["message"]["tool_calls"]
        parts = [
            part["function"]
            for chunk in bench.client.stream(ONE, max_tokens=200, **asked)
            for choice in chunk["choices"]
            for part in choice["delta"].get("tool_calls") or ()
        ]
        assert [part["name"] for part in parts if part.get("name")] == ["weather"]
        said = "".join(part.get("arguments") or "" for part in parts)
        assert json.loads(call["function"]["arguments"]) == json.loads(said)

    def test_echo(self, bench: Bench) -> None:
        self._needs(bench, "echo")
        asked: dict[str, Any] = {"max_tokens": 4, "temperature": 0}
        plain = bench.client.complete(ONE, "The sea", **asked).text
        assert "The sea" + plain == bench.client.complete(ONE, "The sea", echo=True, **asked).text

    def test_user(self, bench: Bench) -> None:
        self._needs(bench, "user")
        assert bench.client.chat(ONE, user="somebody").status == OK

    def _needs(self, bench: Bench, *fields: str) -> None:
        missing = [field for field in fields if field not in bench.plugin.fields]
        if missing:
            pytest.skip(f"the backend does not honour {', '.join(missing)}")

    # ---- what must not get through

    def test_no_route_but_health_answers_without_the_key(self, bench: Bench) -> None:
        assert bench.client.get("/health", key="").status == OK
        for path in self.guarded:
            for key in ("", "wrong", bench.address.key[:-1]):
                for method in ("GET", "POST", "DELETE"):
                    reply = bench.client.send(method, path, {"model": ONE}, key=key)
                    assert reply.status == UNAUTHORIZED, (method, path)

    @pytest.mark.parametrize(
        "body", [b"{", b"[]", b"{}", b'{"model": "run-one"}', b"\xff\xfe", b'{"a":' * 5000], ids=str
    )
    def test_a_body_that_is_no_request_is_refused_and_nothing_else(
        self, bench: Bench, body: bytes
    ) -> None:
        reply = bench.client.send("POST", "/v1/chat/completions", body)
        assert BAD_REQUEST <= reply.status < 500  # noqa: PLR2004 - the client's fault
        bench.backend.health()

    def test_more_than_the_context_is_refused_with_its_size(self, bench: Bench) -> None:
        for asked in ({"max_tokens": CONTEXT}, {"text": "word " * 2 * CONTEXT}):
            reply = bench.client.chat(ONE, **asked)
            assert reply.status == BAD_REQUEST
            assert str(CONTEXT) in reply.body["error"]["message"]

    def test_health_and_start_of_a_running_server(self, bench: Bench) -> None:
        bench.backend.health()
        with pytest.raises(FlashError):
            bench.backend.start(bench.served)
        bench.backend.health()


class ServingEnds:
    """How a server ends: with nothing left of it."""

    def test_stop_leaves_no_process_and_no_file(self, bench: Bench) -> None:
        backend = bench.make()
        address = backend.start(bench.served)
        folder = _folder(address.socket)
        assert processes_in(folder)
        backend.stop()
        assert (processes_in(folder), folder.exists()) == ([], False)
        backend.stop()
        with pytest.raises(FlashError):
            backend.health()

    def test_a_server_ends_with_its_holder_however_that_ends(self, bench: Bench) -> None:
        folder = _folder(bench.die_with_a_server().socket)
        end_s = time.monotonic() + _ENDS_S
        while processes_in(folder) or folder.exists():
            assert time.monotonic() < end_s, processes_in(folder)
            time.sleep(0.1)


def _folder(socket: Path | None) -> Path:
    assert socket is not None
    return socket.parent


def _said(chunks: Any) -> str:
    """Return the text of the only choice of a stream."""
    return "".join(
        choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"]
    )


def _told(choice: dict[str, Any]) -> tuple[Any, ...]:
    """Return what a choice says, but for figures that need not be the same to the last digit."""
    message, logs = choice.get("message") or {}, choice["logprobs"] or {}
    return (
        choice["index"],
        choice["finish_reason"],
        choice["text"] if "text" in choice else message["content"],
        [one["function"] for one in message.get("tool_calls") or ()],
        [one["token"] for one in logs.get("content") or ()] + (logs.get("tokens") or []),
    )


def _in_the_middle(text: str) -> str:
    """Return a few characters of a text that stand in it for the first time behind its start."""
    return next(
        text[at : at + size]
        for size in range(2, len(text))
        for at in range(len(text) // 3, len(text) - size)
        if text.find(text[at : at + size]) == at
        and "\N{REPLACEMENT CHARACTER}" not in text[at : at + size]
    )


def _at_once(ask: Callable[[Any], Any], asked: Sequence[Any]) -> list[Any]:
    found: dict[int, Any] = {}

    def run(place: int) -> None:
        found[place] = ask(asked[place])

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[place] for place in range(len(asked))]
