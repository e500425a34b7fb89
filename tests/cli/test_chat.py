"""`flash chat` with a model that a backend serves for it alone: what is said, printed, and left."""

import contextlib
import io
import json
import os

import attrs
import click
import numpy as np
import pytest
from chat_server import Server, chunk, streamed
from safetensors.numpy import save_file

from flash.cli import output
from flash.cli.app import App
from flash.cli.chat import JSON_KEYS, chat
from flash.environments import folder_digest
from flash.errors import FlashError, ModelUnavailable
from flash.home import FlashHome
from flash.job import Job
from flash.parity import GoldenSet
from flash.plane.daemon import GATEWAY
from flash.plane.deployments import Deployments, Wish
from flash.plane.gateway import announce
from flash.plane.lock import try_lock
from flash.plane.plane import Plane
from flash.records import ModelPlugin, ServingPlugin
from flash.testing.host import make_host
from flash.values import Address, ModelCard

BASE = "tiny/base"
RUN = "1aaaaaaaa"
DEPLOYED = f"{RUN}/step-2"
CARD = ModelCard(
    id=BASE,
    parameters=1,
    context_tokens=64,
    hidden_size=1,
    layers=1,
    intermediate_size=1,
    vocabulary=1,
)


class Models:
    def fetch(self, model, report):
        report("fetching the base")
        return "/base"

    def card(self, model):
        return CARD


@attrs.frozen
class Config:
    room: int = 1


class Backend:
    """Its server says what the test wants; it keeps what it was asked for."""

    def __init__(self, server):
        self.server = server
        self.calls = []

    def start(self, base):
        self.calls.append(("start", base.id, str(base.folder)))
        base.log.write_text("ready\n")
        return Address(self.server.url, "the-key")

    def load(self, adapter):
        self.calls.append(("load", adapter.name, adapter.folder, adapter.rank))

    def tokens(self, model, messages, *, tools, thinking):
        return [1, 2]

    def health(self):
        pass

    def stop(self):
        self.calls.append(("stop",))


def says(*events, prompt="assistant\n"):
    """Return what answers a chat with the events, and tokens with the text of a prompt's end."""
    echo = {"choices": [{"text": prompt}]}
    return lambda body: (200, streamed(*events) if "messages" in body else echo, {})


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.close()


@pytest.fixture
def backend(server):
    server.requests.clear()
    server.answer = says(chunk("Good "), chunk("day", "stop"))
    return Backend(server)


@pytest.fixture
def say(backend, tmp_path, monkeypatch, capsys):
    """Return a function that runs `flash chat`: exit code, stdout, stderr."""
    monkeypatch.setenv("FLASH_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    app = App()
    app.host = make_host(
        ModelPlugin(name="kit", summary="Fakes.", make=lambda _: Models(), cards=(CARD,)),
        ServingPlugin(
            name="transformers", summary="Fakes.", make=lambda *_: backend, config=Config
        ),
    )

    def run(*words, stdin=""):
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        try:
            code = chat.main([*words], standalone_mode=False, obj=app) or 0
        except FlashError as error:
            code = output.fail(error)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def job(folder):
    (folder / "environment").mkdir()
    return Job(
        run=RUN,
        spec={},
        plugins={},
        algorithm="nothing:trains",
        environment={
            "plugin": "jsonl",
            "reference": ".",
            "digest": folder_digest(folder / "environment"),
        },
        model={"id": BASE, "plugin": "kit"},
        provider=("local",),
        sinks=(),
        steps=None,
        memory_gib=0.0,
        secrets=(),
        warm_start=None,
    )


@pytest.fixture
def deployment(server, tmp_path):
    """A ready deployment, as the database has it, behind a gateway that is the test's server."""
    home = FlashHome(tmp_path / "home")
    lock = try_lock(GATEWAY.lock_path(home))
    announce(home, server.url)
    plane = Plane(home, supervisor=("true",))
    plane.submit(job(tmp_path), environment=tmp_path / "environment", secrets={})
    deployments = Deployments(plane.database)
    asked = deployments.ask(
        Wish(
            id=DEPLOYED,
            run=RUN,
            step=2,
            digest="0" * 64,
            model={"id": BASE, "plugin": "kit"},
            backend="transformers",
            settings={},
            thinking=False,
            stop=(),
        )
    )
    deployments.moved(asked, "ready")
    yield deployments, asked
    os.close(lock)


def test_what_is_deployed_answers_through_the_gateway(say, server, backend, deployment):
    code, out, _ = say(DEPLOYED, "-m", "hi", "--json")

    [(_, headers, body)] = server.requests
    assert code == 0
    assert json.loads(out)["via"] == "gateway"
    assert body["model"] == DEPLOYED
    assert headers["Authorization"].startswith("Bearer flash-")
    assert "chat_template_kwargs" not in body
    assert backend.calls == []


def test_a_gateway_that_is_not_that_far_yet_is_asked_again(say, server, deployment, monkeypatch):
    monkeypatch.setattr("flash.cli.chat_partner.PAUSE_S", 0)
    away = {"error": {"message": "it is being deployed", "code": "server_unavailable"}}
    later = iter([(503, away, {}), (503, away, {})])
    last = (200, streamed(chunk("here", "stop")), {})
    server.answer = lambda _: next(later, last)
    code, out, _ = say(DEPLOYED, "-m", "hi")

    assert (code, out) == (0, "here\n")
    assert len(server.requests) == 3


def test_a_failed_deployment_says_why(say, server, deployment):
    deployments, asked = deployment
    deployments.moved(asked, "failed", error="its rank is too high", hint="raise max_lora_rank")
    code, out, err = say(DEPLOYED, "-m", "hi")

    assert (code, out) == (1, "")
    assert f"error: {DEPLOYED} cannot be served: its rank is too high\n" in err
    assert "hint: raise max_lora_rank\n" in err
    assert server.requests == []


def test_one_answer_is_all_that_stdout_gets(say, backend):
    code, out, err = say(BASE, "-m", "hello")

    assert (code, out) == (0, "Good day\n")
    assert "fetching the base\n" in err
    assert [call[0] for call in backend.calls] == ["start", "stop"]


def test_what_is_piped_in_is_the_message(say, server):
    say(BASE, stdin="two\nlines\n")

    [(_, _, body)] = server.requests
    assert body["messages"] == [{"role": "user", "content": "two\nlines"}]


def test_options_are_what_the_request_says(say, server):
    say(BASE, "-m", "hi", "--system", "Be kind.", "--max-tokens", "7", "--temperature", "0.5")

    [(_, headers, body)] = server.requests
    assert headers["Authorization"] == "Bearer the-key"
    assert body["model"] == BASE
    assert (body["max_tokens"], body["temperature"]) == (7, 0.5)
    assert [message["role"] for message in body["messages"]] == ["system", "user"]


def test_by_default_answers_are_greedy_and_at_most_512_tokens_long(say, server):
    say(BASE, "-m", "hi")

    [(_, _, body)] = server.requests
    assert (body["max_tokens"], body["temperature"]) == (512, 0.0)


def test_json_has_the_documented_keys(say, server):
    trace = chunk("<think>hm</think>")
    server.answer = lambda _: (200, streamed(trace, chunk("So\x1b[2J", "length")), {})
    code, out, _ = say(BASE, "-m", "hi", "--json")

    found = json.loads(out)
    assert code == 0
    assert list(found) == list(JSON_KEYS)
    assert (found["content"], found["reasoning"]) == ("So\x1b[2J", "hm")
    assert (found["model"], found["via"]) == (BASE, "transformers")
    assert (found["finish_reason"], found["prompt_tokens"]) == ("length", 5)


def test_reasoning_goes_beside_the_answer(say, server):
    server.answer = lambda _: (200, streamed(chunk("<think>hm</think>"), chunk("So", "stop")), {})
    _, out, err = say(BASE, "-m", "hi")

    assert out == "So\n"
    assert "thinking: hm\n" in err


@pytest.fixture
def adapter(tmp_path):
    """The folder of an adapter of rank 3, trained to think and to stop at a word."""
    folder = tmp_path / "mine"
    folder.mkdir()
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    shapes = {"lora_A": (3, 8), "lora_B": (8, 3)}
    weights = {
        f"{layer}.{part}.weight": np.ones(shape, np.float32) for part, shape in shapes.items()
    }
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["q_proj"]}
    config = config | {"base_model_name_or_path": BASE}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    golden = GoldenSet(thinking=True, stop_sequences=["END"], dtype="float32", prompts=[])
    (folder / "golden.json").write_bytes(golden.to_json())
    return folder


@pytest.mark.parametrize("named", ["mine", "./mine"])
def test_an_adapters_folder_is_served_as_it_was_trained(say, server, backend, adapter, named):
    code, out, _ = say(named, "-m", "hi")

    path, _, body = server.requests[-1]
    assert (code, out) == (0, "Good day\n")
    assert path == "/v1/chat/completions"
    assert ("load", "mine", adapter, 3) in backend.calls
    assert body["model"] == "mine"
    assert body["stop"] == ["END"]
    assert body["chat_template_kwargs"] == {"enable_thinking": True}


@pytest.mark.parametrize(
    ("prompt", "said", "thought"),
    [("<think>\n", "hm</think>So", "hm"), ("assistant\n", "So", None)],
    ids=["by the template", "by the model"],
)
def test_a_trace_is_found_by_whoever_opens_it(say, server, adapter, prompt, said, thought):
    server.answer = says(chunk(said, "stop"), prompt=prompt)
    _, out, _ = say("mine", "-m", "hi", "--json")

    found = json.loads(out)
    assert (found["content"], found["reasoning"]) == ("So", thought)


def test_an_adapter_that_names_no_base_model_is_refused(say, backend, adapter):
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text()) | {"base_model_name_or_path": None}
    path.write_text(json.dumps(config))
    code, _, err = say("mine", "-m", "hi")

    assert code == 2
    assert "does not say base_model_name_or_path" in err
    assert backend.calls == []


def test_a_cut_answer_is_said_to_be_one(say, server):
    server.answer = lambda _: (200, streamed(chunk("and", "length")), {})
    _, out, err = say(BASE, "-m", "hi")

    assert out == "and\n"
    assert "cut after 3 tokens: --max-tokens" in err


def test_a_conversation_that_is_too_long_for_the_model_is_told_so(say, server, backend):
    error = {"error": {"message": "70 of 64 tokens", "code": "context_length_exceeded"}}
    server.answer = lambda _: (400, error, {})
    code, out, err = say(BASE, "-m", "hi")

    assert (code, out) == (1, "")
    assert "error: it does not fit the model's context: 70 of 64 tokens\n" in err
    assert "hint: send a shorter message" in err
    assert backend.calls[-1] == ("stop",)


def test_where_the_context_has_less_room_the_answer_gets_what_there_is(say, server):
    error = {"error": {"message": "22 and 512 of 64 tokens", "code": "context_length_exceeded"}}

    def answer(body):
        if "max_tokens" in body:
            return 400, error, {}
        return 200, streamed(chunk("short", "length")), {}

    server.answer = answer
    code, out, err = say(BASE, "-m", "hi")

    assert (code, out) == (0, "short\n")
    assert "cut after 3 tokens" in err


def test_a_server_that_cannot_start_ends_with_its_words(say, backend):
    def start(_):
        raise ModelUnavailable("no memory", hint="the server's log is there")

    backend.start = start
    code, out, err = say(BASE, "-m", "hi")

    assert (code, out) == (2, "")
    assert "error: no memory\nhint: the server's log is there\n" in err
    assert backend.calls == [("stop",)]


@pytest.mark.parametrize(
    ("words", "stdin", "said"),
    [
        ((BASE, "-m", " "), "", "the message is empty"),
        ((BASE,), "\n", "the message is empty"),
        (("no-such", "-m", "hi"), "", 'unknown model "no-such"'),
        (("nosuch", "-m", "hi"), "", 'there is no run "nosuch", and unknown model "nosuch"'),
        (("zzzz/step-3", "-m", "hi"), "", "zzzz"),
        (("https://api.example.org/v1#m", "-m", "hi"), "", "flash chat talks to what is here"),
        ((BASE, "-m", "hi", "--backend", "nothing"), "", "nothing"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_starts(say, backend, words, stdin, said):
    code, out, err = say(*words, stdin=stdin)

    assert (code, out) == (2, "")
    assert said in err
    assert backend.calls == []


@pytest.mark.parametrize("value", ["-1", "3", "nan", "hot"])
def test_a_temperature_without_sense_is_refused(say, value):
    from click import BadParameter

    with pytest.raises(BadParameter):
        say(BASE, "-m", "hi", "--temperature", value)


def test_of_a_server_that_went_well_no_log_is_left(say):
    say(BASE, "-m", "hi")

    assert not list((FlashHome.from_environment().root / "servers").iterdir())


@pytest.mark.parametrize(("error", "left"), [(KeyboardInterrupt, 0), (ModelUnavailable("no"), 1)])
def test_a_log_is_left_of_what_went_wrong_and_not_of_ctrl_c(say, backend, error, left):
    def start(base):
        base.log.write_text("it loads")
        raise error

    backend.start = start
    with contextlib.suppress(click.Abort):
        say(BASE, "-m", "hi")

    assert backend.calls == [("stop",)]
    assert len(list((FlashHome.from_environment().root / "servers").iterdir())) == left
