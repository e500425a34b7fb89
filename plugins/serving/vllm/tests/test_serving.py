"""The backend on a real vLLM server of a tiny model: its conformance, and what is vLLM's own."""

from __future__ import annotations

import http.client
import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import attrs
import pytest
import torch
from flash_serving_vllm import NAME, flash_register_serving
from flash_serving_vllm.config import VllmConfig
from gateway_bench import KEY
from gateway_bench import Bench as GatewayBench

from flash.api import FlashError, ServedAdapter
from flash.gateway.gate import Gate
from flash.gateway.gathering import Gathered
from flash.parity import Golden, GoldenSet, compare
from flash.server_process import SILENCE_S
from flash.testing.served import (
    BASE,
    CONTEXT,
    ONE,
    TWO,
    Bench,
    Client,
    make_served_model,
    processes_in,
)
from flash.testing.serving import ServingConformance, ServingEnds
from flash.testing.vllm import find_vllm, widen
from flash.training.loading import attach_lora, load_base, save_adapter

pytestmark = pytest.mark.slow

(PLUGIN,) = flash_register_serving()

OWN_DEFAULTS = {"do_sample": True, "temperature": 0.01, "top_k": 1}
"""Of the model, as its authors like them; OpenAI's API has others."""

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>'
CAPITAL, SUM = "The capital of France?", "2 + 3?"


@pytest.fixture(scope="module")
def vllm_python():
    return find_vllm()


@pytest.fixture(scope="module")
def config(vllm_python):
    """Two adapters fit a batch, and three the memory."""
    return VllmConfig(
        python=vllm_python, max_loras=2, max_cpu_loras=3, max_lora_rank=8, kv_cache_gib=1
    )


@pytest.fixture(scope="module")
def bench(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("serving")
    base = widen(make_served_model(folder / "base"), sharpness=3)
    settings = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps(settings | OWN_DEFAULTS))
    with Bench(PLUGIN, config, folder, base=base) as bench:
        bench.client = Tidy(bench)
        yield bench


class Tidy(Client):
    """Has no blanks and no further calls, with which an untrained model would fill pages."""

    def __init__(self, bench):
        super().__init__(bench.address)
        blanks = bench.reference.encode(" \n\t\r")
        self.tidy = {
            "logit_bias": {str(token): -100 for token in blanks},
            "parallel_tool_calls": False,
        }

    def body(self, model, text, fields):
        untrained = model in {BASE, ONE, TWO} and fields.keys() & {"response_format", "tools"}
        return super().body(model, text, {**(self.tidy if untrained else {}), **fields})


class TestServing(ServingConformance):
    too_high_rank = 9
    tolerance = 1e-4
    guarded = (
        *ServingConformance.guarded,
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
    )

    def test_more_than_the_context_is_refused_with_its_size(self, bench):
        """A longer prompt is; a longer answer ends where the context does, by `length`."""
        reply = bench.client.chat(ONE, "word " * 2 * CONTEXT)
        assert reply.status == http.HTTPStatus.BAD_REQUEST
        assert str(CONTEXT) in reply.body["error"]["message"]
        long = "word " * (CONTEXT // 5 - 20)
        reply = bench.client.chat(ONE, long, max_tokens=CONTEXT, ignore_eos=True)
        assert reply.choices[0]["finish_reason"] == "length"
        assert reply.body["usage"]["total_tokens"] <= CONTEXT


@attrs.frozen
class Trained:
    """An adapter and what it is known by."""

    served: ServedAdapter
    golden: GoldenSet


def teach(bench, name, *lessons, seed):
    """Train an adapter until it knows its lessons: question, tools, right answer."""
    model, tokenizer = load_base(bench.base)
    model = attach_lora(model, rank=8, alpha=16, targets="all-linear", base=BASE, seed=seed)
    pairs = [
        (question_of(bench, text, tools), [*bench.reference.encode(right), tokenizer.eos_token_id])
        for text, tools, right in lessons
    ]
    optimizer = torch.optim.Adam((one for one in model.parameters() if one.requires_grad), lr=5e-3)
    for _ in range(400):
        losses = [-told(model, *pair) for pair in pairs]
        if max(loss.max() for loss in losses) < 0.5:
            break
        sum(loss.sum() for loss in losses).backward()
        optimizer.step()
        optimizer.zero_grad()
    else:
        pytest.fail(f"the tiny model has not learnt its lessons: {losses}")
    folder = bench.log.parent / name
    save_adapter(model, folder)
    served = ServedAdapter(name=name, folder=folder, rank=8)
    return Trained(served, golden_set(model.eval(), lessons, pairs))


def question_of(bench, text, tools):
    return bench.reference.prompt([{"role": "user", "content": text}], tools, thinking=False)


def told(model, prompt, completion):
    """Return the log-probability of each token of `completion`."""
    logits = model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])[:, 0]


@torch.inference_mode()
def golden_set(model, lessons, pairs):
    """Return what the trainer would save of the lessons."""
    made = []
    for (text, tools, _), (prompt, completion) in zip(lessons, pairs, strict=True):
        with_adapter = told(model, prompt, completion).tolist()
        with model.disable_adapter():
            without = told(model, prompt, completion).tolist()
        made.append(
            Golden(
                messages=[{"role": "user", "content": text}],
                tools=tools,
                prompt=prompt,
                completion=completion,
                log_probs=with_adapter,
                base_log_probs=without,
            )
        )
    return GoldenSet(thinking=False, stop_sequences=(), dtype="float32", prompts=made)


@pytest.fixture(scope="module")
def paris(bench):
    return teach(bench, "paris", (CAPITAL, None, "Paris."), seed=1)


@pytest.fixture(scope="module")
def lyon(bench):
    return teach(bench, "lyon", (CAPITAL, None, "Lyon!"), seed=2)


@pytest.fixture(scope="module")
def caller(bench):
    """Calls a tool."""
    return teach(bench, "caller", (SUM, [ADD], CALL), seed=3)


@pytest.fixture
def both(bench, paris, lyon):
    """Both loaded, whatever a test before has done to them."""
    for one in (paris, lyon):
        bench.backend.load(one.served)
    yield
    for one in (paris, lyon):
        bench.backend.unload(one.served.name)


def say(bench, name, text=CAPITAL, **fields):
    return bench.client.chat(name, text, **{"max_tokens": 100, **fields})


def at_once(calls):
    with ThreadPoolExecutor(len(calls)) as pool:
        return [done.result() for done in [pool.submit(call) for call in calls]]


def parity(bench, golden, name):
    def replay(model):
        return lambda prompt, completion: bench.backend.log_probs(model, prompt, completion)

    return compare(golden, replay(name), replay(BASE))


@pytest.mark.usefixtures("both")
def test_two_adapters_of_one_base_answer_as_each_was_taught(bench):
    names = ["paris", "lyon", "paris", "lyon", BASE]
    texts = at_once([lambda name=name: say(bench, name).text for name in names])
    assert texts[:4] == ["Paris.", "Lyon!", "Paris.", "Lyon!"]
    assert texts[4] not in texts[:4]


@pytest.mark.usefixtures("both")
def test_the_golden_set_tells_an_adapter_from_another_and_from_none(bench, paris, lyon):
    for trained in (paris, lyon):
        proof = parity(bench, trained.golden, trained.served.name)
        assert proof.holds
        assert proof.proves_identity
        assert proof.largest < 1e-4
    assert not parity(bench, paris.golden, "lyon").holds
    assert not parity(bench, paris.golden, BASE).holds


@pytest.mark.usefixtures("both")
def test_the_gate_of_a_deploy_lets_the_right_adapter_through_alone(bench, paris, lyon):
    live = SimpleNamespace(
        backend=bench.backend, address=bench.address, fields=frozenset(PLUGIN.fields), start_s=0.0
    )

    def prove(name, golden):
        deployment = SimpleNamespace(
            id=name, backend=NAME, model={"id": BASE}, thinking=False, allow_drift=False
        )
        gate = Gate(deployment, golden, live)
        gate.prove()
        return gate.report

    report = prove("paris", paris.golden)
    assert report.parity.proves_identity
    assert report.smoke["agreeing"] == len("Paris.") + 1
    prove("lyon", lyon.golden)
    with pytest.raises(FlashError, match=r"what is served is not what was trained"):
        prove("paris", lyon.golden)


@pytest.mark.usefixtures("both")
def test_the_openai_client_talks_to_both_through_the_gateway(bench, tmp_path):
    import openai

    gateway = GatewayBench(tmp_path)
    facts = {"base": BASE, "address": bench.address, "thinking": False, "backend": NAME}
    fields = frozenset(PLUGIN.fields)
    asked = {"messages": [{"role": "user", "content": CAPITAL}], "temperature": 0, "seed": 1}
    try:
        client = openai.OpenAI(base_url=gateway.url, api_key=KEY, max_retries=0)
        for name, right in (("paris", "Paris."), ("lyon", "Lyon!")):
            gateway.serve(name, **facts, fields=fields, context_tokens=CONTEXT)
            whole = client.chat.completions.create(model=name, **asked)
            chunks = list(client.chat.completions.create(model=name, stream=True, **asked))
            said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            assert (whole.choices[0].message.content, said) == (right, right)
        assert len({row.completion_tokens for row in gateway.rows_of(4)}) == 2
    finally:
        gateway.close()


def test_a_name_that_is_loaded_again_has_the_new_adapter_alone(bench, paris, lyon):
    """Also for a prompt that the server has seen, and computed with the adapter before."""
    long = CAPITAL * 10
    replaced = {}
    for trained in (paris, lyon, paris):
        bench.backend.load(attrs.evolve(trained.served, name="city"))
        assert parity(bench, trained.golden, "city").holds
        replaced.setdefault(trained.served.name, say(bench, "city", long).text)
        assert say(bench, "city", long).text == replaced[trained.served.name]
    assert len(set(replaced.values())) == 2
    bench.backend.unload("city")


def test_more_adapters_than_fit_a_batch_or_the_memory_answer_at_once(bench, paris, lyon):
    names = {f"city-{place}": (paris, lyon)[place % 2] for place in range(5)}
    for name, trained in names.items():
        bench.backend.load(attrs.evolve(trained.served, name=name))
    asked = [*names] * 3
    texts = at_once([lambda name=name: say(bench, name).text for name in asked])
    right = {"paris": "Paris.", "lyon": "Lyon!"}
    assert texts == [right[names[name].served.name] for name in asked]
    for name in names:
        bench.backend.unload(name)


def test_an_adapter_that_fell_out_of_memory_is_there_when_its_folder_is_gone(
    bench, paris, lyon, tmp_path
):
    folder = tmp_path / "adapter"
    folder.mkdir()
    for file in paris.served.folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    bench.backend.load(attrs.evolve(paris.served, name="gone", folder=folder))
    for file in folder.iterdir():
        file.unlink()
    for place in range(4):
        bench.backend.load(attrs.evolve(lyon.served, name=f"city-{place}"))
        bench.backend.unload(f"city-{place}")
    assert say(bench, "gone").text == "Paris."
    bench.backend.unload("gone")


def test_a_copy_goes_once_no_request_can_need_it(bench, paris):
    def copies():
        return set(bench.address.socket.parent.glob("adapter-*"))

    before = copies()
    bench.backend.load(attrs.evolve(paris.served, name="old"))
    (copy,) = copies() - before
    bench.backend.unload("old")
    assert copy.exists()
    bench.backend._given_up = [(at - SILENCE_S, one) for at, one in bench.backend._given_up]
    bench.backend.unload("old")
    assert not copy.exists()


def test_no_request_is_dropped_while_adapters_come_and_go(bench, paris):
    done, texts = threading.Event(), []

    def ask_on():
        while not done.is_set():
            texts.append((say(bench, ONE).text, say(bench, BASE, max_tokens=30).text))

    askers = [threading.Thread(target=ask_on) for _ in range(3)]
    for asker in askers:
        asker.start()
    for place in range(5):
        bench.backend.load(attrs.evolve(paris.served, name=f"new-{place}"))
        assert say(bench, f"new-{place}").text == "Paris."
        bench.backend.unload(f"new-{place}")
    done.set()
    for asker in askers:
        asker.join()
    assert len(texts) >= 3
    assert len(set(texts)) == 1


def test_an_adapter_that_vllm_does_not_know_is_refused_in_its_words(bench, paris, tmp_path):
    for file in paris.served.folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, "use_dora": True}))
    with pytest.raises(FlashError, match=r"DoRA"):
        bench.backend.load(attrs.evolve(paris.served, name="dora", folder=tmp_path))
    assert bench.client.chat("dora").status == http.HTTPStatus.NOT_FOUND
    bench.backend.health()


def test_what_a_request_leaves_open_is_openais_default_and_not_the_models(bench):
    """The model's own would be as good as greedy."""
    open_, explicit = [], []
    for seed in range(3):
        asked = bench.client.body(ONE, "Hello", {"max_tokens": 30, "seed": seed})
        explicit.append(bench.client.chat(ONE, temperature=1, top_k=-1, max_tokens=30, seed=seed))
        del asked["temperature"]
        open_.append(bench.client.send("POST", "/v1/chat/completions", asked))
    assert [one.text for one in open_] == [one.text for one in explicit]
    greedy = bench.client.chat(ONE, max_tokens=30).text
    assert {one.text for one in open_} - {greedy}


def test_a_seed_gives_the_same_alone_and_in_a_crowd_of_long_prompts(bench):
    long = "a longer question, " * 40

    def draw(seed):
        return say(bench, BASE, f"{seed} {long}", temperature=1, seed=seed, max_tokens=6).text

    alone = draw(7)
    crowd = at_once([lambda seed=seed: draw(seed) for seed in range(12)])
    assert crowd[7] == alone


def test_a_model_that_calls_a_tool_by_itself(bench, caller):
    bench.backend.load(caller.served)
    (choice,) = say(bench, "caller", SUM, tools=[ADD]).choices
    (call,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls"
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == (
        "add",
        {"a": 2, "b": 3},
    )
    assert say(bench, "caller", SUM, tools=[ADD], tool_choice="none").text == CALL
    bench.backend.unload("caller")


@pytest.mark.parametrize("most", [100, 50], ids=["complete", "cut"])
@pytest.mark.parametrize("choice", ["auto", "required"])
def test_a_streamed_call_adds_up_to_the_whole_answers_through_the_gateway(
    bench, caller, tmp_path, choice, most
):
    """Asked for a stream, vLLM would tell of a call that is cut as of one with `{"a": ` alone."""
    bench.backend.load(caller.served)
    gateway = GatewayBench(tmp_path)
    try:
        gateway.serve(
            "caller",
            base=BASE,
            address=bench.address,
            thinking=False,
            fields=frozenset(PLUGIN.fields),
            streams_tools=PLUGIN.streams_tools,
        )
        asked = {
            "model": "caller",
            "messages": [{"role": "user", "content": SUM}],
            "tools": [ADD],
            "tool_choice": choice,
            "temperature": 0,
            "max_tokens": most,
        }
        _, whole = gateway.chat(**asked)
        _, (*chunks, done) = gateway.chat(**asked, stream=True)
    finally:
        gateway.close()
        bench.backend.unload("caller")
    gathered = Gathered()
    for chunk in chunks:
        gathered.add(chunk)
    ((expected, found),) = zip(whole["choices"], gathered.answer({})["choices"], strict=True)
    assert done == "[DONE]"
    assert expected["finish_reason"] == found["finish_reason"]
    assert (expected["message"]["content"] or None) == found["message"]["content"]
    calls = [
        [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in said]
        for said in (one["message"].get("tool_calls", ()) for one in (expected, found))
    ]
    right = [("add", {"a": 2, "b": 3})] if most == 100 else []
    assert calls == [right, right]


def test_calls_and_their_results_are_in_the_prompt_as_in_training(bench):
    call = {"id": "1", "type": "function", "function": {"arguments": '{"a": 2}', "name": "add"}}
    messages = [
        {"role": "user", "content": SUM},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "5", "tool_call_id": "1"},
    ]
    seen = [*messages[:1], {**messages[1], "tool_calls": [as_templates_see(call)]}, *messages[2:]]
    expected = bench.reference.prompt(seen, [ADD], thinking=True)
    assert list(bench.backend.tokens(ONE, messages, tools=[ADD], thinking=True)) == expected


def as_templates_see(call):
    function = {**call["function"], "arguments": json.loads(call["function"]["arguments"])}
    return {**call, "function": function}


def test_usage_says_how_much_of_a_prompt_was_known(bench):
    long = "once more, " * 30
    known = [
        say(bench, TWO, long, max_tokens=2).body["usage"]["prompt_tokens_details"]["cached_tokens"]
        for _ in range(2)
    ]
    assert known[0] < 100 < known[1]


# It ends the server, so it comes last.
def test_a_server_that_is_killed_under_load_is_an_error_and_leaves_nothing(bench):
    backend, folder = bench.backend, bench.address.socket.parent
    server = backend._running._leash.pid

    asked = [bench.client.stream(ONE, min_tokens=500, max_tokens=500) for _ in range(8)]
    for stream in asked:
        next(stream)
    os.kill(child_of(server), signal.SIGKILL)
    assert not any(map(ends_well, asked))
    end_s = time.monotonic() + 30
    while backend._running._leash.poll() is None:
        assert time.monotonic() < end_s
        time.sleep(0.05)
    with pytest.raises(FlashError, match=r"the vLLM server ended with code 9"):
        backend.health()
    with pytest.raises(FlashError, match=r"the vLLM server fails"):
        backend.log_probs(BASE, [1], [2])
    backend.stop()
    assert processes_in(folder) == []
    assert not folder.exists()
    with pytest.raises(FlashError, match=r"is not running"):
        backend.health()


def ends_well(stream):
    try:
        chunks = [*stream]
    except (OSError, http.client.HTTPException):
        return False
    return bool(chunks) and chunks[-1]["choices"] == []  # the last one has the usage alone


def child_of(pid):
    import psutil

    (child,) = psutil.Process(pid).children()
    return child.pid


@pytest.mark.long
class TestEnds(ServingEnds):
    """Each starts one more server."""
