"""The webhook against a real server here: what it posts, to whom, and what an answer means."""

from __future__ import annotations

import hashlib
import hmac
import json
import socket
import subprocess
import sys
import threading
from email.utils import formatdate

import attrs
import pytest
from flash_sink_webhook import flash_register_sinks, flash_review_plan, sink
from flash_sink_webhook.config import WebhookConfig
from flash_sink_webhook.sink import make_webhook

from flash.api import FlashError, Notice, NoticeSink, RateLimited, SettingError, Unreachable
from flash.context import plugin_context
from flash.home import FlashHome

TOKEN = "T0PS3CR3T4X2kQ9vLm8ZpWn7"
NOTICE = Notice(
    id="7x1c3d9az-3",
    run="7x1c3d9az",
    kind="failed",
    time_s=1_700_000_000.0,
    model="org/tiny",
    algorithm="sft",
    data={"attempt": 2, "outcome": "lost", "error": "the worker died", "hint": "look"},
)


@pytest.fixture
def make(tmp_path):
    """Return a function that makes the sink as the supervisor does."""

    def make(secrets=None, **config) -> NoticeSink:
        context = plugin_context(FlashHome(tmp_path), "webhook", secrets or {})
        return make_webhook(context, WebhookConfig(**config))

    return make


def test_registering_imports_no_http_library_and_names_both_secrets():
    code = (
        "import sys, flash_sink_webhook as p; (r,) = p.flash_register_sinks()\n"
        "print(r.make, r.secrets, 'requests' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "None ('FLASH_WEBHOOK_URL', 'FLASH_WEBHOOK_SECRET') False\n"


def test_a_notice_is_posted_as_json_with_its_id(receiver, make):
    made = make(url=receiver.url)
    made.notify(NOTICE)

    [(path, headers, body)] = receiver.posts
    assert isinstance(made, NoticeSink)
    assert path == "/flash"
    assert json.loads(body) == {
        "id": "7x1c3d9az-3",
        "event": "failed",
        "run": "7x1c3d9az",
        "model": "org/tiny",
        "algorithm": "sft",
        "time_s": 1_700_000_000.0,
        "text": "run 7x1c3d9az failed: the worker died; look",
        "data": NOTICE.data,
    }
    assert (headers["Flash-Event"], headers["Flash-Delivery"]) == ("failed", "7x1c3d9az-3")
    assert headers["Content-Type"] == "application/json"
    assert "Flash-Signature" not in headers


@pytest.mark.parametrize(
    ("kind", "data", "text"),
    [
        ("started", {"attempt": 1}, "run 7x1c3d9az started: attempt 1"),
        (
            "attempt_ended",
            {"attempt": 1, "outcome": "lost", "detail": "it died", "then": "it was started again"},
            "run 7x1c3d9az goes on: attempt 1 ended as lost: it died; it was started again",
        ),
        ("done", {}, "run 7x1c3d9az is done"),
        ("cancelled", {}, "run 7x1c3d9az is cancelled"),
        ("failed", {}, "run 7x1c3d9az failed"),
        ("budget_warning", {"message": "80 %"}, "run 7x1c3d9az is near its budget: 80 %"),
        ("resumed", {}, "run 7x1c3d9az goes on: somebody resumed it"),
    ],
)
def test_every_event_has_a_sentence(kind, data, text):
    notice = attrs.evolve(NOTICE, kind=kind, data=data)

    assert sink.payload(notice)["text"] == text


def test_a_long_text_is_cut():
    notice = attrs.evolve(NOTICE, data={"error": "x" * 100_000, "attempt": 2})
    posted = sink.payload(notice)

    assert len(posted["text"]) == len(posted["data"]["error"]) == sink.LONGEST_TEXT
    assert posted["data"]["attempt"] == 2


def test_an_event_that_nobody_asked_for_is_not_posted(receiver, make):
    make(url=receiver.url, events=("done",)).notify(NOTICE)

    assert receiver.posts == []


def test_the_signature_is_what_the_readme_checks(receiver, make):
    make({"FLASH_WEBHOOK_SECRET": "the key"}, url=receiver.url).notify(NOTICE)

    [(_, headers, body)] = receiver.posts
    parts = dict(part.split("=", 1) for part in headers["Flash-Signature"].split(","))
    signed = hmac.new(b"the key", f"{parts['t']}.".encode() + body, hashlib.sha256).hexdigest()
    assert parts["v1"] == signed
    assert int(parts["t"]) > NOTICE.time_s


def test_the_address_may_be_a_secret(receiver, make):
    make({"FLASH_WEBHOOK_URL": f"{receiver.url}/{TOKEN}"}).notify(NOTICE)

    assert [path for path, _, _ in receiver.posts] == [f"/flash/{TOKEN}"]


@pytest.mark.parametrize("status", [400, 401, 404, 410, 429, 500, 503])
def test_what_does_not_take_the_notice_is_an_error_without_the_address(receiver, make, status):
    receiver.answer = lambda: (status, {})
    webhook = make({"FLASH_WEBHOOK_URL": f"{receiver.url}/{TOKEN}"})

    with pytest.raises(Unreachable) as caught:
        webhook.notify(NOTICE)

    assert caught.value.message == f"127.0.0.1 answered {status}"
    assert TOKEN not in repr(webhook)


@pytest.mark.parametrize("status", [429, 503])
def test_how_long_to_wait_is_passed_on(receiver, make, status):
    receiver.answer = lambda: (status, {"Retry-After": "7"})

    with pytest.raises(RateLimited) as caught:
        make(url=receiver.url).notify(NOTICE)

    assert caught.value.retry_after_s == 7


def test_how_long_to_wait_may_be_a_date(receiver, make):
    webhook = make(url=receiver.url)
    date = formatdate(webhook.clock() + 100, usegmt=True)
    receiver.answer = lambda: (429, {"Retry-After": date})

    with pytest.raises(RateLimited) as caught:
        webhook.notify(NOTICE)

    assert 90 < caught.value.retry_after_s <= 100


@pytest.mark.parametrize("text", ["soon", "nan", "inf", "", "Sun, 99 Nov 1994 08:49:37 GMT"])
def test_a_wait_that_says_nothing_is_no_wait(receiver, make, text):
    receiver.answer = lambda: (429, {"Retry-After": text})

    with pytest.raises(Unreachable):
        make(url=receiver.url).notify(NOTICE)


def test_a_redirect_is_not_followed(receiver, make):
    receiver.answer = lambda: (307, {"Location": f"{receiver.url}/elsewhere"})

    with pytest.raises(Unreachable, match="a redirect, which is not followed"):
        make(url=receiver.url).notify(NOTICE)

    assert [path for path, _, _ in receiver.posts] == ["/flash"]


def test_a_receiver_that_closes_early_is_no_delivery(receiver, make):
    receiver.answer = lambda: None

    with pytest.raises(Unreachable, match=r"127\.0\.0\.1 cannot be reached"):
        make(url=f"{receiver.url}/{TOKEN[:15]}").notify(NOTICE)


def test_a_receiver_that_does_not_answer_is_given_up_in_time(receiver, make, monkeypatch):
    monkeypatch.setattr(sink, "ANSWER_S", 0.05)
    answered = threading.Event()
    receiver.answer = lambda: (answered.wait(10), (204, {}))[1]

    with pytest.raises(Unreachable, match="it did not answer in time"):
        make(url=receiver.url).notify(NOTICE)

    answered.set()


def test_nobody_there_says_so_without_the_address(make):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/{TOKEN}"

        with pytest.raises(Unreachable) as caught:
            make({"FLASH_WEBHOOK_URL": url}).notify(NOTICE)

    assert caught.value.message == "127.0.0.1 cannot be reached: Connection refused"
    assert caught.value.__cause__ is None


def test_a_huge_answer_is_not_read(receiver, make):
    receiver.answer = lambda: (200, {"bytes": 1 << 27})

    make(url=receiver.url).notify(NOTICE)

    assert receiver.hung_up.wait(10)


def test_http_to_this_machine_goes_to_no_proxy(receiver, make, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)

    make(url=receiver.url).notify(NOTICE)

    assert len(receiver.posts) == 1


@pytest.mark.parametrize(
    "url",
    [
        "https://ops.example.com",
        "https://ops.internal:8443/flash/runs-of-the-team",
        "https://10.0.0.7/flash",
        "http://localhost:8000/x",
        "http://127.9.9.9/x",
        "http://[::1]:80/x",
    ],
)
def test_addresses_that_are_taken(url):
    assert WebhookConfig(url=url).url == url


@pytest.mark.parametrize(
    ("url", "wrong"),
    [
        ("http://ops.example.com/flash", "goes to this machine alone"),
        ("http://localhost.example.com/", "goes to this machine alone"),
        ("http://0x7f.1/", "goes to this machine alone"),
        ("ftp://127.0.0.1/", "must be an https:// address"),
        ("file:///etc/passwd", "must be an https:// address"),
        ("ops.example.com", "must be an https:// address"),
        ("https://", "must be an https:// address"),
        ("https://ops.example.com/a b", "must be an https:// address"),
        ("https://ops.example.com/\r\nHost: evil", "must be an https:// address"),
        ("https://[::1/", "is no address"),
        ("https://ops.example.com:port/", "is no address"),
        ("https://me:password@ops.example.com/", "must not hold a name and password"),
        ("https://ops.example.com/?key=1", "holds what looks like a token"),
        (f"https://hooks.example.com/services/T0/B0/{TOKEN}", "holds what looks like a token"),
    ],
)
def test_addresses_that_are_refused_and_not_quoted(url, wrong):
    with pytest.raises(SettingError) as caught:
        WebhookConfig(url=url)

    assert wrong in caught.value.message
    assert "example" not in caught.value.message


def test_a_secret_address_is_held_to_the_same_and_not_quoted(make):
    with pytest.raises(FlashError) as caught:
        make({"FLASH_WEBHOOK_URL": f"http://ops.example.com/{TOKEN}"})

    assert "FLASH_WEBHOOK_URL" in caught.value.message
    assert TOKEN not in caught.value.message


def test_a_plan_without_an_address_is_refused_before_it_is_submitted():
    @attrs.frozen
    class Spec:
        sink: dict

    @attrs.frozen
    class Plan:
        spec: Spec | None
        secrets: tuple = ()

    here = {"webhook": WebhookConfig()}

    [problem] = flash_review_plan(Plan(Spec(here)))
    assert problem.path == "sink.webhook.url"
    assert "FLASH_WEBHOOK_URL" in problem.message
    assert flash_review_plan(Plan(Spec(here), ("FLASH_WEBHOOK_URL",))) == []
    assert flash_review_plan(Plan(Spec({"webhook": WebhookConfig(url="https://a.b")}))) == []
    assert flash_review_plan(Plan(Spec({}))) == []
    assert flash_review_plan(Plan(None)) == []


def test_the_record_is_for_the_supervisor_alone():
    [record] = flash_register_sinks()

    assert record.make is None
    assert record.notices is not None
