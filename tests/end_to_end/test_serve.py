"""
From two trained runs to an OpenAI client, as a user does it: one base model, two adapters.

The trainer, the gateway, the embedded server and the client are the real ones; the base model is
tiny, and its two adapters have learnt the same questions with other answers.
"""

import json
import socket
import sys
import time
from functools import reduce
from pathlib import Path

import openai
import psutil
import pytest
from terminal import Terminal
from test_documents import shape_of, steps_of

from flash.testing.models import make_tiny_model
from flash.testing.vllm import find_vllm, widen

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "serve.md"
WORDS = {
    "french": {"red": "rouge", "blue": "bleu"},
    "german": {"red": "rot", "blue": "blau"},
}
CONFIG = """
model = "{model}"

[environment]
path = "{language}"

[train]
lora_rank = 16
batch_size = 4
max_length = 64
max_steps = 160
learning_rate = 5e-3
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory, new_project):
    """A home with two finished runs, `project.runs` by language."""
    folder = tmp_path_factory.mktemp("serve")
    # A model that is sure of what it says, and that vLLM's kernels take.
    project = new_project(folder, widen(make_tiny_model(folder / "tiny"), sharpness=3))
    (project.store).mkdir()
    (project.store / "config.toml").write_text("[gateway]\nport = 0\n")
    project.runs = {}
    for language, words in WORDS.items():
        environment = (project.folder / "environment.py").read_text()
        project.write(f"{language}/environment.py", environment)
        rows = [{"input": word, "output": answer} for word, answer in words.items()]
        lines = "".join(json.dumps(row) + "\n" for row in 2 * rows)
        project.write(f"{language}/dataset/train.jsonl", lines)
        config = CONFIG.format(model=project.model, language=language)
        project.write(f"{language}.toml", config)
        started = project.json("train", f"{language}.toml", "--background")
        project.runs[language] = started["run"]
    for run in project.runs.values():
        assert project.wait(run)["state"] == "done"
    yield project
    left = processes_of(project)  # of tests that failed
    for process in left:
        process.kill()
    psutil.wait_procs(left, timeout=30)


@pytest.fixture(scope="module")
def deployed(project):
    """Both runs, behind the gateway: its url and its key."""
    french, german = project.runs.values()
    project.flash("deploy", french, "--no-wait")
    for run in (german, french):
        ready = project.json("deploy", run)
        assert ready["state"] == "ready", ready
    return ready


@pytest.fixture(scope="module")
def client(project, deployed):
    return client_of(project, deployed["url"])


def client_of(project, url):
    key = (project.store / "gateway.key").read_text().strip()
    return openai.OpenAI(base_url=url, api_key=key, max_retries=0)


def ask(client, model, text, **more):
    message = {"role": "user", "content": text}
    return client.chat.completions.create(
        model=model, messages=[message], max_tokens=8, temperature=0, **more
    )


def processes_of(project):
    """Return every process that works for the home: their environment names it."""
    found = []
    for process in psutil.process_iter():
        try:
            environ = process.environ()
        except psutil.Error:
            continue
        if str(project.home) in (
            environ.get("HOME"),
            str(Path(environ.get("FLASH_HOME", "/")).parent),
        ):
            found.append(process)
    return found


def test_every_command_of_the_how_to_page_prints_what_it_shows(project):
    port = free_port()
    config = project.store / "config.toml"
    config.write_text(config.read_text().replace("port = 0", f"port = {port}"))
    french, german = project.runs.values()
    here = {
        "127.0.0.1:8808": f"127.0.0.1:{port}",
        "1aenqqscq": german,
        "1aenp7k2w": french,
        "/home/you": str(project.home),
        "HuggingFaceTB/SmolLM2-135M-Instruct": str(project.model),
    }
    for step in steps_of(PAGE):
        command, expected = (
            reduce(lambda text, pair: text.replace(*pair), here.items(), part) for part in step
        )
        done = project.shell(command)

        assert done.returncode == 0, done.stdout
        assert shape_of(expected).fullmatch(done.stdout), f"{command}\n{done.stdout}\n{expected}"


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_what_is_served_is_held_against_what_was_trained(project, deployed):
    for found in project.json("deployments"):
        parity = found["report"]["parity"]
        assert found["state"] == "ready"
        assert found["model"] == str(project.model)
        assert parity["holds"]
        assert parity["proves_identity"]
        assert parity["mean"] < 1e-4 < parity["change_mean"]


@pytest.mark.parametrize("language", WORDS)
def test_the_openai_client_gets_each_adapters_own_answer(project, client, language):
    for word, answer in WORDS[language].items():
        found = ask(client, project.runs[language], word)

        [choice] = found.choices
        assert choice.message.content == answer
        assert choice.finish_reason == "stop"
        assert found.usage.completion_tokens == len(answer) + 1


@pytest.mark.parametrize("language", WORDS)
def test_streams_say_the_same_and_end_with_usage(project, client, language):
    for word, answer in WORDS[language].items():
        options = {"include_usage": True}
        *chunks, last = ask(
            client, project.runs[language], word, stream=True, stream_options=options
        )

        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer
        assert last.choices == []
        assert last.usage.completion_tokens == len(answer) + 1


def test_the_base_model_answers_beside_its_adapters(project, client):
    names = {model.id for model in client.models.list()}
    found = ask(client, str(project.model), "red")

    assert names == {*project.runs.values(), str(project.model)}
    assert found.choices[0].message.content not in {"rouge", "rot"}


def test_usage_counts_every_request_once(project, client):
    run = project.runs["german"]

    def used():
        return next((one for one in project.json("usage") if one["deployment"] == run), None)

    before = used() or dict.fromkeys(("requests", "prompt_tokens", "completion_tokens"), 0)
    answers = [ask(client, run, word) for word in ("red", "blue", "red")]
    after = used()

    assert after["requests"] - before["requests"] == 3
    for name in ("prompt_tokens", "completion_tokens"):
        wanted = sum(getattr(answer.usage, name) for answer in answers)
        assert after[name] - before[name] == wanted
    assert after["key"] == "default"


@pytest.mark.parametrize("language", WORDS)
def test_chat_prints_the_deployments_answer_and_nothing_else(project, deployed, language):
    for word, answer in WORDS[language].items():
        said = project.flash("chat", project.runs[language], "-m", word, "--max-tokens", "8")

        assert (said.returncode, said.stdout) == (0, f"{answer}\n"), said.stderr


def test_after_kill_9_of_gateway_and_supervisor_everything_is_served_again(project, deployed):
    for name in ("gateway", "supervisor"):
        process(project, name).kill()
    project.flash("deployments")
    said = project.flash("chat", project.runs["french"], "-m", "blue", "--max-tokens", "8")
    restored = project.json("deploy", project.runs["german"])

    assert (said.returncode, said.stdout) == (0, "bleu\n"), said.stderr
    assert restored["state"] == "ready"
    client = client_of(project, restored["url"])
    assert ask(client, project.runs["german"], "blue").choices[0].message.content == "blau"


def process(project, name):
    def is_it(one):
        try:
            return any(name in word for word in one.cmdline()[1:4])
        except psutil.Error:  # it has just ended
            return False

    [found] = filter(is_it, processes_of(project))
    return found


@pytest.fixture(scope="module")
def on_vllm(project, deployed):
    """Both runs again, on a real vLLM server."""
    python = find_vllm()
    for run in project.runs.values():
        words = ("--backend", "vllm", "--set", f"python={json.dumps(python)}")
        moved = project.flash("deploy", run, *words, "--no-wait")
        assert moved.returncode == 0, moved.stderr
    end = time.monotonic() + 600
    while True:
        found = project.json("deployments")
        if all(one["state"] != "deploying" for one in found):
            break
        assert time.monotonic() < end, found
        time.sleep(1)
    return found


def test_vllm_serves_what_was_trained_too(project, on_vllm):
    for found in on_vllm:
        assert (found["state"], found["backend"]) == ("ready", "vllm"), found["error"]
        assert found["report"]["parity"]["proves_identity"]


@pytest.mark.parametrize("language", WORDS)
def test_the_openai_client_gets_the_same_answers_of_vllm(project, on_vllm, language):
    client = client_of(project, on_vllm[0]["url"])
    for word, answer in WORDS[language].items():
        whole = ask(client, project.runs[language], word)
        chunks = list(ask(client, project.runs[language], word, stream=True))

        assert whole.choices[0].message.content == answer
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer


@pytest.fixture(scope="module")
def undeployed(project, deployed):
    """Nothing is served any more; runs last."""
    run, other = project.runs.values()
    return [project.flash("undeploy", one) for one in (run, run, other)]


def test_undeploy_can_be_said_twice_and_leaves_nothing_running(project, undeployed):
    assert [done.returncode for done in undeployed] == [0, 0, 0]
    assert {one["state"] for one in project.json("deployments", "--all")} == {"undeployed"}
    assert not any((project.store / "deployments").glob("*/adapter"))
    _, left = psutil.wait_procs(processes_of(project), timeout=60)
    assert left == []


def test_a_conversation_with_what_is_not_deployed_leaves_no_server(project, undeployed):
    run = project.runs["french"]
    words = [sys.executable, "-m", "flash", "chat", run, "--max-tokens", "8"]
    terminal = Terminal(words, project.folder, project.environ())
    terminal.wait("/help lists what can be typed\n> ", deadline_s=120)

    assert terminal.line("red").endswith("red\nrouge\n")
    assert servers_of(project)
    terminal.type("\x03")
    assert terminal.ended() == 0
    assert not servers_of(project)


def test_ctrl_c_while_the_model_is_loaded_leaves_no_server(project, undeployed):
    words = [sys.executable, "-m", "flash", "chat", str(project.model)]
    terminal = Terminal(words, project.folder, project.environ())
    terminal.wait("loading")
    while not servers_of(project):
        time.sleep(0.05)
    terminal.type("\x03")

    assert terminal.ended() == 130
    assert not servers_of(project)


def servers_of(project):
    return [
        one for one in processes_of(project) if "flash_serving_transformers" in str(one.cmdline())
    ]
