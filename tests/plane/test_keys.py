"""The keys of the gateway and what was used with them."""

import threading

import attrs
import pytest

from flash.errors import UsageError
from flash.gateway.usage import UsageRow
from flash.home import FlashHome
from flash.plane import database as tables
from flash.plane.database import Database
from flash.plane.keys import Keys, digest_of, key_path
from flash.plane.usage import Usage, Used


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    return Database(tmp_path_factory.mktemp("keys") / "flash.db")


@pytest.fixture
def keys(database):
    with database.writing() as connection:
        connection.execute(tables.gateway_keys.delete())
    return Keys(database)


@pytest.fixture
def home(tmp_path):
    return FlashHome(tmp_path / "home")


def live(keys):
    return {key.name: key.sha256 for key in keys.all() if key.revoked_s is None}


def test_the_default_key_is_made_once_for_the_owner_alone(keys, home):
    made = keys.default(home)

    assert keys.default(home) == made
    assert len(made) > 40
    assert key_path(home).read_text() == f"{made}\n"
    assert key_path(home).stat().st_mode & 0o777 == 0o600
    assert live(keys) == {"default": digest_of(made)}


@pytest.mark.parametrize("change", ["lost", "changed", "empty", "revoked"])
def test_a_default_key_that_does_not_open_is_made_anew(keys, home, change):
    before = keys.default(home)
    path = key_path(home)
    if change == "revoked":
        keys.revoke("default")
    elif change == "lost":
        path.unlink()
    else:
        path.write_text("flash-mine\n" if change == "changed" else "")

    made = keys.default(home)

    assert made not in {before, "flash-mine", ""}
    assert live(keys) == {"default": digest_of(made)}
    assert path.read_text() == f"{made}\n"


def test_those_who_need_the_first_key_at_once_get_the_same(keys, home):
    home.folder()
    got = []
    threads = [threading.Thread(target=lambda: got.append(keys.default(home))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert got == [got[0]] * 6


def test_a_key_of_a_live_name_is_refused_and_of_a_revoked_one_made_anew(keys):
    first = keys.add("me")
    with pytest.raises(UsageError, match="there is a key me already"):
        keys.add("me")

    assert keys.revoke("me")
    assert not keys.revoke("me")
    assert live(keys) == {}
    second = keys.add("me")

    assert first != second
    assert live(keys) == {"me": digest_of(second)}


@pytest.mark.parametrize("name", ["", " ", "a b", "-a", "a/b", "a\n", "x" * 65, "default", "é"])
def test_names_that_no_key_can_have(keys, name):
    with pytest.raises(UsageError):
        keys.add(name)


def test_a_key_is_in_no_repr(keys):
    keys.add("me")

    assert digest_of("x") not in str(attrs.evolve(keys.all()[0], sha256=digest_of("x")))


ROW = UsageRow(
    request="r",
    time_s=10.0,
    deployment="0run",
    base="org/model",
    key="me",
    prompt_tokens=5,
    cached_tokens=2,
    completion_tokens=3,
    status="ok",
)


def test_a_request_counts_once_however_often_it_is_written(database):
    usage = Usage(database)
    usage.add([])
    usage.add([ROW, attrs.evolve(ROW, request="s", time_s=20.0)])
    usage.add([ROW, attrs.evolve(ROW, request="t", key="you"), ROW])

    expected = Used(
        deployment="0run",
        base="org/model",
        key="me",
        requests=2,
        prompt_tokens=10,
        cached_tokens=4,
        completion_tokens=6,
    )
    one = attrs.evolve(expected, requests=1, prompt_tokens=5, cached_tokens=2, completion_tokens=3)
    assert usage.sums() == [expected, attrs.evolve(one, key="you")]
    assert usage.sums(since_s=15.0) == [one]
