"""The real process: one for each home, answering, leaving nothing behind however it ends."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
from deploy_bench import DeployBench, until

from flash.plane.daemon import GATEWAY
from flash.plane.gateway import url_of

TESTS = Path(__file__).parents[1]
ENTRY = "[flash]\nfake = fake_serving\n"
METADATA = (
    "Metadata-Version: 2.1\nName: flash-fake\nVersion: 1.0\nRequires-Dist: flash-core~=0.1.0\n"
)

MODULE = ("-m", "flash.gateway.process")
LEAVING = """
from flash.gateway.process import serve
from flash.home import FlashHome

serve(FlashHome.from_environment(), idle_s={})
"""


class Process:
    """A home, and the gateway process that the test starts and ends."""

    def __init__(self, folder):
        self.folder = folder
        self.bench = DeployBench(folder, folder)
        (self.bench.home.root / "config.toml").write_text("[gateway]\nport = 0\n")
        site = folder / "site" / "flash_fake-1.0.dist-info"
        site.mkdir(parents=True)
        (site / "METADATA").write_text(METADATA)
        (site / "entry_points.txt").write_text(ENTRY)
        paths = [*os.environ.get("PYTHONPATH", "").split(":"), str(site.parent), str(TESTS)]
        self.environ = {
            **os.environ,
            "FLASH_HOME": str(self.bench.home.root),
            "PYTHONPATH": ":".join(filter(None, paths)),
            "TMPDIR": str(folder),
        }
        self.process = None

    def start(self, *, idle_s=None):
        self.log = (self.folder / "stderr").open("a")
        self.process = subprocess.Popen(
            [sys.executable, *(MODULE if idle_s is None else ("-c", LEAVING.format(idle_s)))],
            env=self.environ,
            stderr=self.log,
        )

    def kill(self):
        self.process.kill()
        self.process.wait()

    def end(self):
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)

    def until(self, holds, what):
        def look():
            assert self.process.poll() is None, self.said
            return holds()

        return until(look, lambda: f"{what}: {self.bench.states()}\n{self.said}", 60)

    def until_states(self, **states):
        self.until(lambda: self.bench.states() == states, states)

    def until_answers(self, name):
        self.until(lambda: self.ask(name) == f"I am {name}", f"{name} answers")

    def hold(self, call):
        """Have the next such call wait."""
        (self.folder / f"at-{call}").unlink(missing_ok=True)
        (self.folder / f"hold-{call}").touch()

    def release(self, call):
        (self.folder / f"hold-{call}").unlink()

    def killed_at(self, call):
        """Kill it within the call, and start the next."""
        self.until((self.folder / f"at-{call}").exists, f"it comes to {call}")
        self.kill()
        self.release(call)
        self.start()

    @property
    def said(self):
        return (self.folder / "stderr").read_text()

    def ask(self, model, **body):
        url = self.until(lambda: url_of(self.bench.home), "it answers")
        key = (self.bench.home.root / "gateway.key").read_text().strip()
        request = urllib.request.Request(
            f"{url}/chat/completions",
            json.dumps({"model": model, "messages": [{"role": "user", "content": "Hi"}]}).encode(),
            {"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.load(answer)["choices"][0]["message"]["content"]
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)["error"]["message"]

    def servers(self):
        """The processes that serve this home: of each server a leash, and itself."""
        return self.commands("leash.py") | self.commands("server.py")

    def commands(self, program):
        """The command lines of those that run a program, by process id."""
        found = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                command = process.cmdline()
                runs = any(part.endswith(f"/{program}") for part in command[1:3])
                if runs and process.environ().get("FLASH_HOME") == self.environ["FLASH_HOME"]:
                    found[process.pid] = command
        return found

    def folders(self):
        """Where the sockets of the servers are."""
        return [Path(command[3]) for command in self.commands("leash.py").values()]


@pytest.fixture
def gateway(tmp_path):
    """A gateway whose first server waits to be started."""
    gateway = Process(tmp_path)
    gateway.hold("start")
    gateway.start()
    yield gateway
    if gateway.process.poll() is None:
        gateway.kill()
    until(lambda: not gateway.servers(), "its servers end with it")
    gateway.bench.close()


@pytest.mark.slow  # four gateways, one after the other
def test_a_gateway_that_is_killed_is_followed_by_one_that_goes_on_and_serves_everything(gateway):
    gateway.bench.deploy("blue-1")
    gateway.killed_at("start")
    gateway.until_answers("blue-1")

    folders = set(gateway.folders())
    gateway.hold("log_probs")
    gateway.bench.deploy("red-2")
    gateway.killed_at("log_probs")
    gateway.until_answers("blue-1")
    gateway.until_answers("red-2")

    folders |= set(gateway.folders())
    gateway.hold("unload")
    gateway.bench.deployments.ask_gone("red-2")
    gateway.killed_at("unload")
    gateway.until_answers("blue-1")
    gateway.until_states(**{"blue-1": "ready", "red-2": "undeployed"})
    assert gateway.ask("red-2")[0] == 404
    assert not (gateway.bench.home.root / "deployments" / "red-2").exists()
    until(lambda: len(gateway.servers()) == 2, "of those that were killed no server is left")
    assert not any(folder.exists() for folder in folders - set(gateway.folders()))

    assert gateway.end() == 0
    assert "asked to end" in gateway.said
    assert not (gateway.bench.home.root / "gateway.json").exists()
    until(lambda: not gateway.servers(), "its server ends with it")


@pytest.mark.slow  # two gateways, and their servers
def test_a_server_that_is_killed_is_started_anew_while_those_who_ask_are_told(gateway):
    (gateway.folder / "hold-start").unlink()
    gateway.bench.deploy("blue-1")
    gateway.until_answers("blue-1")
    second = subprocess.run(
        [sys.executable, "-m", "flash.gateway.process"],
        env=gateway.environ,
        stderr=subprocess.PIPE,
        text=True,
        check=True,
        timeout=60,
    )
    assert "another gateway is running already" in second.stderr

    gateway.hold("start")
    for pid in gateway.commands("server.py"):
        os.kill(pid, signal.SIGKILL)
    gateway.until((gateway.folder / "at-start").exists, "it is started anew")
    status, said = gateway.ask("blue-1")
    assert (status, "started anew" in said or "is being deployed" in said) == (503, True)
    row = gateway.bench.deployments.get("blue-1")
    assert row.state == "deploying"
    assert "ended with code 9" in row.error
    gateway.release("start")
    gateway.until_answers("blue-1")

    log = (gateway.bench.home.root / "gateway.log").read_text()
    key = (gateway.bench.home.root / "gateway.key").read_text().strip()
    assert key not in log
    assert "Hi" not in log
    assert "broke down" in log
    for name in ("gateway.json", "gateway.key", "gateway.log"):
        assert (gateway.bench.home.root / name).stat().st_mode & 0o777 == 0o600


@pytest.mark.slow  # a gateway
def test_a_port_that_is_taken_is_named_with_its_setting(tmp_path):
    gateway = Process(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        (gateway.bench.home.root / "config.toml").write_text(f"[gateway]\nport = {port}\n")
        gateway.start()
        assert gateway.process.wait(60) > 0
    gateway.bench.close()

    last = gateway.said.splitlines()[-1]
    assert f"port {port} of 127.0.0.1 is taken" in last
    assert "`port` in [gateway]" in last


@pytest.mark.slow  # a gateway
def test_with_nothing_left_to_serve_it_leaves_and_nothing_of_it_is_left(tmp_path):
    gateway = Process(tmp_path)
    gateway.bench.deploy("blue-1")
    gateway.start(idle_s=0.3)
    gateway.until_answers("blue-1")
    gateway.bench.deployments.ask_gone("blue-1")

    assert gateway.process.wait(60) == 0
    assert "nothing left to serve" in gateway.said
    assert gateway.bench.states() == {"blue-1": "undeployed"}
    assert not (gateway.bench.home.root / "gateway.json").exists()
    assert not GATEWAY.runs(gateway.bench.home)
    assert gateway.servers() == {}
    gateway.bench.close()
