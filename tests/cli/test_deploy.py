"""The verbs of serving, with a gateway that serves nothing."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from serving_bench import ServingBench

from flash.cli import deploy, deployments, keys, root, usage
from flash.gateway.usage import UsageRow
from flash.plane.daemon import GATEWAY, SUPERVISOR
from flash.plane.keys import Keys, digest_of
from flash.plane.lock import try_lock
from flash.plane.usage import Usage

pytestmark = pytest.mark.slow


class Clients(BaseHTTPRequestHandler):
    """Keeps what it was asked in `server.asked`."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((self.path, self.headers["Authorization"], json.loads(body)))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"choices": []}')

    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture(scope="module")
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Clients) as server:
        server.asked = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def bench(tmp_path_factory, server):
    """A home with a gateway; nobody supervises it."""
    bench = ServingBench(tmp_path_factory.mktemp("deploy"))
    (bench.home.root / "url").write_text(f"http://127.0.0.1:{server.server_port}/v1")
    lock = try_lock(SUPERVISOR.lock_path(bench.home))
    GATEWAY.start(bench.home, bench.gateway)
    yield bench
    os.close(lock)
    bench.close()


@pytest.fixture
def flash(bench, monkeypatch, capsys):
    """Return a function that runs a command line in this process: exit code, stdout, stderr."""
    monkeypatch.setenv("FLASH_HOME", str(bench.home.root))

    def run(*words):
        code = root.run(words)
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return code, said.out, said.err

    return run


@pytest.fixture
def run(bench):
    return bench.run(steps=(5, 10))


def test_deploy_shows_the_states_and_how_to_talk_to_it(flash, bench, run, server):
    code, said, _ = flash("deploy", f"{run}/step-5")

    assert code == 0
    lines = said.splitlines()
    assert lines[:2] == [f"{run}/step-5 deploying", f"{run}/step-5 ready"]
    assert f"url    http://127.0.0.1:{server.server_port}/v1" in said
    assert f"model  {run}/step-5" in said
    assert f"key    in {bench.home.root / 'gateway.key'}" in said
    assert f"flash chat {run}/step-5" in said
    key = (bench.home.root / "gateway.key").read_text().strip()
    assert key not in said


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")
def test_the_commands_that_it_shows_work_and_have_no_key_in_them(flash, bench, run, server):
    said = flash("deploy", run)[1]
    command = "\n".join(re.findall(r"^  (sed .*\\|  -H .*\\|  -d .*)$", said, re.MULTILINE))
    key = (bench.home.root / "gateway.key").read_text().strip()

    subprocess.run(["bash", "-c", command], check=True, capture_output=True)

    path, authorization, body = server.asked[-1]
    assert (path, authorization) == ("/v1/chat/completions", f"Bearer {key}")
    assert body["model"] == run


def test_the_python_that_it_shows_works(flash, run, server):
    pytest.importorskip("openai")
    said = flash("deploy", run)[1]
    program = said[said.index("  from pathlib") :].replace("\n  ", "\n").strip()

    exec(program, {})

    assert server.asked[-1][2]["model"] == run


def test_deploy_of_what_is_deployed_says_so_at_once(flash, run, bench):
    flash("deploy", run)
    before = bench.deployments.get(run)

    code, said, _ = flash("deploy", f"{run}/final")

    assert (code, said.splitlines()[0]) == (0, f"{run} ready")
    assert bench.deployments.get(run) == before


def test_a_backend_that_cannot_be_here_leaves_what_is_served_as_it_is(flash, run, bench):
    """Here is no vLLM."""
    flash("deploy", run)
    before = bench.deployments.get(run)

    code, _, error = flash("deploy", run, "--backend", "vllm")
    planned, _, same = flash("deploy", run, "--backend", "vllm", "--dry-run")

    assert (code, planned) == (2, 2)
    assert "vLLM is neither installed here nor set up" in error
    assert "hint: set it up with `flash plugins setup vllm`" in error
    assert same == error
    assert bench.deployments.get(run) == before


def test_a_deployment_that_fails_says_why(flash, bench):
    run = bench.run(broken=True)

    code, said, error = flash("deploy", run)

    assert (code, said) == (1, f"{run} deploying\n{run} failed\n")
    assert error == f"error: {run} is not served: it is broken\nhint: mend\n"
    listed = flash("deployments")
    assert f"warning: {run}: it is broken\nhint: mend\n" in listed[2]


def test_json_has_the_documented_keys(flash, run):
    code, said, error = flash("deploy", run, "--json")
    shown = json.loads(said)
    (listed,) = [one for one in json.loads(flash("deployments", "--json")[1]) if one["run"] == run]

    assert (code, error) == (0, "")
    assert [*shown] == [*deployments.JSON_KEYS]
    assert listed == shown
    assert (shown["deployment"], shown["state"], shown["model"]) == (run, "ready", "org/model")
    planned = json.loads(flash("deploy", run, "--dry-run", "--json")[1])
    assert [*planned] == [*deploy.DRY_RUN_KEYS]
    assert planned == {key: shown[key] for key in planned}
    gone = json.loads(flash("undeploy", run, "--json")[1])
    assert [*gone] == [*deployments.JSON_KEYS]
    assert gone["state"] == "undeployed"


def test_a_dry_run_checks_and_changes_nothing(flash, bench, run):
    code, said, _ = flash("deploy", run, "--dry-run", "--set", "max_rows=7")
    assert code == 0
    assert "max_rows = 7" in said
    weights = bench.store(run).path / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(b"x" * len(weights.read_bytes()))

    code, _, error = flash("deploy", run, "--dry-run")

    assert code == 1
    assert "adapter_model.safetensors is damaged" in error
    assert bench.deployments.get(run) is None
    assert not bench.copy(run).exists()


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["deploy", "RUN/step-7"], "has no complete checkpoint of step 7"),
        (["deploy", "0nothere0"], 'there is no run "0nothere0"'),
        (["deploy", "../../etc"], 'there is no run ".."'),
        (["deploy", "RUN", "--backend", "sglang"], 'unknown serving "sglang"'),
        (["deploy", "RUN", "--set", "max_rows=0"], "max_rows: must be at least 1"),
        (["deploy", "RUN", "--set", "max_rwos=1"], 'did you mean "max_rows"'),
        (["deploy", "RUN", "--set", "max_rows"], "is not of the form key=value"),
        (["undeploy", "RUN"], "is not deployed"),
        (["undeploy", "RUN/step-5"], "is not deployed"),
        (["usage", "--since", "tomorrow-ish"], "is neither a date"),
        (["keys", "add", "a key"], "is no name for a key"),
        (["keys", "add", "default"], "is made by Flash itself"),
        (["keys", "revoke", "nobody"], "there is no key nobody"),
    ],
)
def test_a_mistake_is_a_sentence(flash, run, words, error):
    code, _, said = flash(*[word.replace("RUN", run) for word in words])

    assert code == 2
    assert said.startswith("error: ")
    assert error in said


def test_undeploy_is_idempotent_and_what_is_gone_is_listed_on_request(flash, bench, run):
    flash("deploy", run)

    assert flash("undeploy", run)[:2] == (0, f"{run} undeploying\n{run} undeployed\n")
    assert flash("undeploy", run)[:2] == (0, f"{run} undeployed\n")
    assert run not in flash("deployments")[1]
    assert run in flash("deployments", "--all")[1]
    assert not bench.copy(run).parent.exists()


def test_without_waiting_it_is_asked_and_no_more(flash, run):
    code, said, error = flash("deploy", run, "--no-wait")

    assert (code, said) == (0, f"{run} deploying\n")
    assert "flash deployments" in error
    assert flash("undeploy", run, "--no-wait")[:2] == (0, f"{run} undeploying\n")


def test_ctrl_c_leaves_the_deploy_going_and_says_so(bench, run):
    slow = bench.home.root / "slow"
    slow.touch()
    try:
        waiting = subprocess.Popen(
            [sys.executable, "-u", "-m", "flash", "deploy", run],
            env={**os.environ, "FLASH_HOME": str(bench.home.root)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert waiting.stdout.readline() == f"{run} deploying\n"
        waiting.send_signal(signal.SIGINT)
        _, said = waiting.communicate()
    finally:
        slow.unlink()

    assert waiting.returncode == 130
    assert f"detached; {run} is still being deployed" in said
    assert f"flash undeploy {run}" in said
    bench.until(lambda: bench.state(run) == "ready", bench.describe)


def test_the_status_of_a_run_says_what_is_deployed_of_it(flash, run):
    assert f"flash deploy {run}" in flash("status", run)[1]
    flash("deploy", f"{run}/step-5")

    assert f"deployed as {run}/step-5: ready" in flash("status", run)[1]
    assert json.loads(flash("status", run, "--json")[1])["deployments"] == [
        {"deployment": f"{run}/step-5", "state": "ready"}
    ]


def test_a_run_that_is_deployed_is_not_removed_before_it_is_undeployed(flash, bench, run):
    flash("deploy", f"{run}/step-5")

    code, _, error = flash("gc", run, "--yes")
    assert code == 2
    assert f"the run {run} is deployed as {run}/step-5" in error
    assert f"hint: first: flash undeploy {run}/step-5" in error

    flash("undeploy", f"{run}/step-5")
    assert flash("gc", run, "--yes")[0] == 0
    assert not bench.store(run).path.exists()
    assert bench.deployments.get(f"{run}/step-5") is None


def used(request, deployment, key="default", *, time_s=1.0, prompt=1000, cached=0, completion=100):
    return UsageRow(
        request=request,
        time_s=time_s,
        deployment=deployment,
        base="org/model",
        key=key,
        prompt_tokens=prompt,
        cached_tokens=cached,
        completion_tokens=completion,
        status="ok",
    )


@pytest.fixture
def fresh(tmp_path, monkeypatch, capsys):
    """Return a home of its own, and a function that runs a command line on it."""
    bench = ServingBench(tmp_path)
    monkeypatch.setenv("FLASH_HOME", str(bench.home.root))

    def run(*words):
        code = root.run(words)
        said = capsys.readouterr()
        return code, said.out, said.err

    return bench, run


def test_usage_adds_up_and_counts_the_cost(fresh):
    bench, flash = fresh
    assert flash("usage", "--json") == (0, "[]\n", "")
    Usage(bench.database).add(
        [
            used("a", "r1", cached=400),
            used("b", "r1", time_s=2.0),
            used("c", "r1", "somebody", time_s=3.0),
            used("d", "org/model", time_s=4.0),
        ]
    )
    bench.home.config.write_text(
        '[gateway.prices."org/model"]\nprompt_usd = 1.0\ncompletion_usd = 10\n'
        "[gateway.prices.r1]\nprompt_usd = 2.0\ncompletion_usd = 20.0\ncached_usd = 0.5\n"
    )

    found = json.loads(flash("usage", "--json")[1])

    assert [*found[0]] == [*usage.JSON_KEYS]
    assert [(one["deployment"], one["key"], one["requests"], one["usd"]) for one in found] == [
        ("org/model", "default", 1, pytest.approx((1000 * 1 + 100 * 10) / 1e6)),
        ("r1", "default", 2, pytest.approx((1600 * 2 + 400 * 0.5 + 200 * 20) / 1e6)),
        ("r1", "somebody", 1, pytest.approx((1000 * 2 + 100 * 20) / 1e6)),
    ]
    shown = flash("usage")
    assert "0.0134 USD in all" in shown[2]
    since = json.loads(flash("usage", "--since", "1970-01-01T00:00:03+00:00", "--json")[1])
    assert [one["requests"] for one in since] == [1, 1]
    assert json.loads(flash("usage", "--since", "24h", "--json")[1]) == []


def test_keys_are_shown_once_and_kept_as_digests(fresh):
    bench, flash = fresh
    assert "there is no key yet" in flash("keys")[2]
    value = flash("keys", "add", "me")[1].strip()
    other = json.loads(flash("keys", "add", "you", "--json")[1])

    assert [*other] == [*keys.ADD_KEYS]
    listed = flash("keys", "--json")[1]
    assert [*json.loads(listed)[0]] == [*keys.JSON_KEYS]
    assert value not in listed
    assert value.startswith(json.loads(listed)[0]["prefix"])
    for path in bench.home.root.iterdir():
        assert path.is_dir() or value.encode() not in path.read_bytes()
    assert "there is a key me already" in flash("keys", "add", "me")[2]
    assert flash("keys", "revoke", "me")[2] == "me is revoked\n"
    assert flash("keys", "revoke", "me")[2] == "me was revoked already\n"
    again = flash("keys", "add", "me")[1].strip()
    assert again != value
    live = {key.sha256 for key in Keys(bench.database).all() if key.revoked_s is None}
    assert live == {digest_of(again), digest_of(other["value"])}
