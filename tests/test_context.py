"""What a plugin's `make` is given."""

import io
import stat
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import requests
from urllib3 import HTTPResponse

from flash.context import plugin_context
from flash.errors import PluginError
from flash.home import FlashHome
from flash.transport import LONGEST_WAIT_S, PatientRetry

KEY = "canary-7f3a9c-secret"


class Server(ThreadingHTTPServer):
    """Answers with the queued statuses in turn, then 200; 0 hangs up. Keeps what it was sent."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.statuses = []
        self.seen = []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def answer(self):
        self.server.seen.append((self.command, dict(self.headers)))
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        status = self.server.statuses.pop(0) if self.server.statuses else 200
        if status:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self.close_connection = True

    do_GET = do_POST = do_DELETE = answer  # noqa: N815 - the base class looks them up by name

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def context(tmp_path):
    return plugin_context(FlashHome(tmp_path / "home"), "ray", {"RAY_KEY": KEY})


@pytest.mark.parametrize("failure", [503, 0])
@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_a_read_or_a_delete_is_repeated(context, server, method, failure):
    server.statuses = [failure]

    response = context.http.request(method, server.url)

    assert response.status_code == 200
    assert [sent for sent, _ in server.seen] == [method, method]


def test_a_create_call_is_sent_once_when_the_server_fails(context, server):
    server.statuses = [503]

    assert context.http.post(server.url, json={}).status_code == 503
    assert len(server.seen) == 1


def test_a_create_call_is_sent_once_when_the_answer_is_lost(context, server):
    server.statuses = [0]

    with pytest.raises(requests.ConnectionError):
        context.http.post(server.url, json={})

    assert len(server.seen) == 1


def test_a_server_cannot_make_us_wait_for_a_day():
    answer = HTTPResponse(headers={"Retry-After": "86400"}, status=503)

    assert PatientRetry().get_retry_after(answer) == LONGEST_WAIT_S


class Recorder(requests.adapters.BaseAdapter):
    def send(self, request, **options):
        self.timeout = options["timeout"]
        response = requests.Response()
        response.status_code, response.url, response.raw = (
            200,
            request.url,
            HTTPResponse(io.BytesIO()),
        )
        return response


@pytest.mark.parametrize(("asked", "given"), [(None, (10, 60)), (5, 5)])
def test_every_call_is_bounded_in_time(context, asked, given):
    recorder = context.http.get_adapter("https://")._once = Recorder()

    context.http.post("https://example.org/", timeout=asked)

    assert recorder.timeout == given


def test_secrets_are_masked_in_http_errors(context, server):
    key = context.secret("RAY_KEY")
    server.statuses = [404, 0]

    with pytest.raises(requests.HTTPError) as refused:
        context.http.post(f"{server.url}?key={key}").raise_for_status()
    with pytest.raises(requests.ConnectionError) as lost:
        context.http.post(f"{server.url}?key={key}")

    assert "key=***" in str(refused.value)
    assert KEY not in f"{refused.value!r} {lost.value!r} {lost.value.__cause__!r}"
    assert lost.value.__suppress_context__


def test_credentials_of_netrc_are_not_sent(context, server, tmp_path, monkeypatch):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login someone password else\n")
    monkeypatch.setenv("NETRC", str(netrc))

    context.http.get(server.url, headers={"Authorization": "Bearer ours"})

    assert server.seen[0][1]["Authorization"] == "Bearer ours"


def test_secrets_are_masked_in_the_log(context, capsys):
    key = context.secret("RAY_KEY")

    context.log.warning("odd answer", body=f"you sent {key}")
    try:
        int(key)
    except ValueError:
        context.log.exception("it failed")

    logged = capsys.readouterr().err
    assert "plugin=ray" in logged
    assert "you sent ***" in logged
    assert "with base 10: '***'" in logged
    assert KEY not in logged


def test_the_log_is_quiet_below_a_warning(context, capsys):
    context.log.info("all is well")

    assert capsys.readouterr().err == ""


def test_a_secret_that_was_not_found_is_none(context):
    assert context.secret("OTHER") is None


def test_asking_for_an_undeclared_secret_is_the_plugins_fault(tmp_path):
    asked = []
    context = plugin_context(FlashHome(tmp_path), "ray", asked.append, declared=["RAY_KEY"])

    with pytest.raises(PluginError, match='plugin ray asked for the secret "AWS_SECRET"'):
        context.secret("AWS_SECRET")

    context.secret("RAY_KEY")
    assert asked == ["RAY_KEY"]


def test_the_folder_of_a_plugin_is_made_when_it_is_first_used(tmp_path):
    home = FlashHome(tmp_path / "home")
    context = plugin_context(home, "ray", {})
    assert not home.root.exists()

    workdir = context.workdir

    assert workdir == home.root / "plugins" / "ray"
    assert stat.S_IMODE(workdir.stat().st_mode) == 0o700


def test_the_clock_is_seconds_since_the_epoch(context):
    assert context.clock() > 1_700_000_000
