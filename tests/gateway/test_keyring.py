"""Who a bearer key is: read again as it grows old, and never guessed."""

import asyncio

import pytest
from gateway_bench import Lines, key_row

from flash.errors import StoreError
from flash.gateway.errors import ApiError
from flash.gateway.keys import Keyring


class Kept:
    """Keys as a database has them, and the time."""

    def __init__(self, *keys):
        self.keys = list(keys)
        self.reads = 0
        self.now = 100.0
        self.trouble = None

    def read(self):
        self.reads += 1
        if self.trouble:
            raise self.trouble
        return list(self.keys)


def asked(kept, *given, log=None):
    """Return who each bearer is, or the status that refuses it; one keyring, one loop."""

    async def ask():
        keyring = Keyring(kept.read, log or Lines(), clock=lambda: kept.now)
        found = []
        for key in given:
            if callable(key):
                key()
                continue
            try:
                found.append(await keyring.whose(None if key is None else f"Bearer {key}"))
            except ApiError as error:
                found.append(error.status)
        return found

    return asyncio.run(ask())


def test_each_key_is_its_own_name_and_no_other_key_is_any():
    kept = Kept(key_row("a", "default"), key_row("b", "laptop"))
    assert asked(kept, "a", "b", "c", "A", "", None) == ["default", "laptop", 401, 401, 401, 401]


def test_a_revoked_key_is_nobodys():
    assert asked(Kept(key_row("a", revoked_s=1.0)), "a") == [401]


def test_a_revoked_key_opens_nothing_after_a_second():
    kept = Kept(key_row("a"))

    def revoke():
        kept.keys[0].revoked_s = 1.0
        kept.now += 1.0

    assert asked(kept, "a", revoke, "a") == ["default", 401]


def test_keys_are_read_once_a_second_however_many_ask():
    kept = Kept(key_row("a"))
    asked(kept, *["a"] * 50)
    assert kept.reads == 1


def test_wrong_keys_do_not_have_them_read_each_time():
    kept = Kept(key_row("a"))
    asked(kept, *["wrong"] * 50)
    assert kept.reads == 1


def test_a_key_that_was_just_made_is_found_at_once():
    kept = Kept(key_row("a"))

    def make():
        kept.keys.append(key_row("b", "laptop"))
        kept.now += 0.2

    assert asked(kept, "a", make, "b") == ["default", "laptop"]


def test_keys_that_cannot_be_read_are_those_of_before_and_nobodys_where_there_were_none():
    kept, log = Kept(key_row("a")), Lines()

    def fail():
        kept.trouble = StoreError("the disk fails")
        kept.now += 10

    assert asked(kept, "a", fail, "a", "b", log=log) == ["default", "default", 401]
    assert log.of("the keys cannot be read")
    assert asked(kept, "a") == [503]


@pytest.mark.parametrize("given", ["\udcff", "ключ", "a b", "Bearer a"])
def test_strange_headers_are_refused(given):
    assert asked(Kept(key_row("a")), given) == [401]
