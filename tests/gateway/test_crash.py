"""A gateway that is killed at any moment has written down what anybody has seen the end of."""

import asyncio
import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import sqlalchemy as sa
from aiohttp import web
from gateway_bench import Answer, Backend, until

from flash.home import FlashHome
from flash.plane import database as tables
from flash.plane.database import Database
from flash.plane.keys import Keys

pytestmark = pytest.mark.slow

CHILD = """
import asyncio, sys
from pathlib import Path
from gateway_bench import FIELDS, Lines
from flash.gateway.app import make_app
from flash.gateway.keys import Keyring
from flash.gateway.limits import Limits
from flash.gateway.listening import listening
from flash.gateway.routes import Route, Routes
from flash.gateway.usage import UsageWriter
from flash.plane.database import Database
from flash.plane.keys import Keys
from flash.plane.usage import Usage
from flash.values import Address

database = Database(Path(sys.argv[1]))
log = Lines()
routes, limits = Routes(), Limits()
address = Address("http://localhost/v1", "the-backends-key", Path(sys.argv[2]))
routes.set(Route(name="blue-1", base="tiny", adapter=True, address=address, thinking=None, stop=(),
                 fields=FIELDS, context_tokens=4096))

async def main():
    usage = UsageWriter(Usage(database).add, log)
    app = make_app(routes, Keyring(Keys(database).all, log), usage, limits, log)
    async with listening(app, "127.0.0.1", 0, limits) as port:
        print(port, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.fixture
def backend(tmp_path):
    """A server that outlives the gateways before it."""
    backend = Backend(tmp_path / "backend.sock")
    backend.answer = lambda _: Answer(pieces=("a", "b", "c"))
    loop = asyncio.new_event_loop()
    runner = web.AppRunner(backend.app(), handler_cancellation=True, access_log=None)
    loop.run_until_complete(runner.setup())
    loop.run_until_complete(web.UnixSite(runner, str(backend.address.socket)).start())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield backend
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(20)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


@contextlib.contextmanager
def gateway(home, backend):
    """A gateway in a process of its own; yields it and its port, and kills it."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(home.database), str(backend.address.socket)],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    try:
        yield int(child.stdout.readline())
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()


def keep_asking(port, key, ended, *, stream):
    """Ask until the gateway is gone; `ended` gets the id of each request whose end was seen."""
    body = {"model": "blue-1", "messages": [{"role": "user", "content": "Hi"}], "stream": stream}
    headers = {"Authorization": f"Bearer {key}"}
    with contextlib.suppress(OSError, http.client.HTTPException):
        while True:
            asked = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
            asked.request("POST", "/v1/chat/completions", json.dumps(body), headers)
            answer = asked.getresponse()
            said = b""
            while piece := answer.read1():
                said += piece
                # What tells that an answer is whole, in a stream and in one piece.
                if b'"finish_reason":"stop"' in said.replace(b" ", b""):
                    ended.append(answer.headers["X-Request-Id"])
                    break
            asked.close()


def test_no_request_that_was_seen_to_end_is_lost_and_none_counts_twice(tmp_path, backend):
    home = FlashHome(tmp_path / "home")
    home.folder()
    database = Database(home.database)
    key = Keys(database).default(home)
    ended = []
    for life in range(3):
        before = len(ended)
        with gateway(home, backend) as port:
            askers = [
                threading.Thread(
                    target=keep_asking, args=(port, key, ended), kwargs={"stream": bool(at % 2)}
                )
                for at in range(8)
            ]
            for asker in askers:
                asker.start()
            until(lambda before=before: len(ended) > before + 15)
            time.sleep(0.003 * life)  # it is killed in the middle of something else each time
        for asker in askers:
            asker.join()
    with database.reading() as connection:
        rows = connection.execute(sa.select(tables.usage)).mappings().all()
    counted = {row["request"]: row for row in rows}
    assert len(ended) == len(set(ended)) >= 45
    assert set(ended) <= counted.keys()
    assert len(counted) == len(rows)
    assert {counted[each]["completion_tokens"] for each in ended} == {3}
    assert {counted[each]["status"] for each in ended} <= {"ok"}
    # What nobody saw the end of is counted at most as what the servers were asked.
    assert len(rows) <= len(backend.requests)
