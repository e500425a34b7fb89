"""Rows reach the disk before their requests end, together, whatever troubles a database has."""

import asyncio
import threading

import pytest
from gateway_bench import Lines, Rows, until

from flash.errors import StoreError
from flash.gateway.usage import UsageRow, UsageWriter


def row(name):
    return UsageRow(
        request=name,
        time_s=1.0,
        deployment="blue-1",
        base="tiny",
        key="default",
        prompt_tokens=7,
        cached_tokens=3,
        completion_tokens=2,
        status="ok",
    )


@pytest.fixture
def rows():
    return Rows()


@pytest.fixture
def log():
    return Lines()


@pytest.fixture
def make(rows, log):
    made = []

    def writer(**settings):
        made.append(UsageWriter(rows.add, log, pause_s=0.01, **settings))
        return made[-1]

    yield writer
    rows.trouble = None
    for each in made:
        each.close()


def names(rows):
    return [each.request for each in rows.written]


def test_a_row_is_written_when_its_request_goes_on(make, rows):
    asyncio.run(make().write(row("a")))
    assert names(rows) == ["a"]


def test_requests_that_end_together_share_a_transaction(make, rows):
    rows.slow_s = 0.02
    writer = make()

    async def many():
        await asyncio.gather(*(writer.write(row(str(at))) for at in range(100)))

    asyncio.run(many())
    assert len(rows.written) == 100
    assert rows.batches <= 3


def test_a_database_that_fails_ends_no_request_and_gets_the_rows_later(make, rows, log):
    rows.trouble = StoreError("the disk is full")
    writer = make()
    asyncio.run(writer.write(row("a")))
    asyncio.run(writer.write(row("b")))
    assert log.of("usage cannot be written")[0]["error"] == "the disk is full"
    rows.trouble = None
    until(lambda: names(rows) == ["a", "b"])
    assert log.of("usage is written again")


def test_a_defect_in_the_database_is_no_end_of_the_writer(make, rows, log):
    rows.trouble = KeyError("what?")
    writer = make()
    asyncio.run(writer.write(row("a")))
    assert "KeyError" in log.of("usage cannot be written")[0]["error"]
    rows.trouble = None
    until(lambda: names(rows) == ["a"])


def test_a_database_that_hangs_holds_no_request_up(rows, log):
    go_on = threading.Event()

    def add(found):
        go_on.wait(20)
        rows.add(found)

    writer = UsageWriter(add, log, patience_s=0.01)
    for name in "abc":
        asyncio.run(writer.write(row(name)))
    assert [line["request"] for line in log.of("usage is written late")] == ["a"]
    go_on.set()
    writer.close()
    assert names(rows) == ["a", "b", "c"]


def test_what_is_kept_has_an_end(make, rows, log):
    rows.trouble = StoreError("the disk is full")
    writer = make(most_kept=3)
    for name in "abcde":
        asyncio.run(writer.write(row(name)))
    rows.trouble = None
    until(lambda: log.of("usage is written again"))
    assert names(rows) == ["c", "d", "e"]
    assert log.of("usage is written again")[0]["lost"] == 2


def test_closing_writes_what_there_is(make, rows, log):
    rows.slow_s = 0.01
    writer = make()
    for name in "abc":
        writer.put(row(name))
    writer.close()
    writer.close()
    assert names(rows) == ["a", "b", "c"]
    assert not log.told


def test_closing_tries_what_failed_once_more_and_says_what_is_lost(rows, log):
    rows.trouble = StoreError("the disk is full")
    writer = UsageWriter(rows.add, log)
    writer.put(row("a"))
    until(lambda: log.told)
    writer.close()
    assert log.of("usage is lost")[0]["requests"] == 1


def test_who_is_cancelled_while_waiting_is_counted_all_the_same(make, rows):
    rows.slow_s = 0.02
    writer = make()

    async def leave():
        waiting = asyncio.create_task(writer.write(row("a")))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(leave())
    until(lambda: names(rows) == ["a"])
