"""What is swept is exactly ours, and has no claim to it; hypothesis looks for what is not."""

from __future__ import annotations

import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash.plane.ids import ALPHABET, LENGTH
from flash.plane.orphans import key_of, orphans, parse_key
from flash.values import Instance

OWNER = "0wner123"
RUN = "1aabbccdd"

owners = st.text(ALPHABET, min_size=8, max_size=8)
runs = st.text(ALPHABET, min_size=LENGTH, max_size=LENGTH)
numbers = st.integers(1, 999_999)
# Words of the characters that keys are made of, dashes above all.
words = st.text(string.ascii_lowercase + string.digits + "-", max_size=12)


def seen(*keys):
    return [Instance(key, {"key": key}, "running") for key in keys]


@given(owners, runs, numbers)
def test_a_key_is_read_back_as_it_was_made(owner, run, number):
    key = key_of(owner, run, number)

    assert parse_key(key, owner) == (run, number)
    assert len(key) <= 50


@given(words | owners, words | owners, words | runs, st.integers(-3, 12))
def test_only_keys_that_we_would_make_ourselves_are_ours(ours, owner, run, number):
    """Of two owners with any names, neither is ever told the other's key."""
    key = key_of(owner, run, number)

    assert parse_key(key, ours) in {None, (run, number)}
    if owner != ours:
        assert orphans(seen(key), ours, protected=()) == []


@given(owners, st.integers(1, 7), runs, numbers)
def test_an_owner_that_begins_as_ours_does_is_another(owner, length, run, number):
    shorter = owner[:length]

    assert parse_key(key_of(shorter, run, number), owner) is None
    assert parse_key(key_of(owner, run, number), shorter) is None
    # Written so that, split at the dashes from the left, it would begin as ours does.
    assert parse_key(key_of(shorter, f"{run}-{number}", number), shorter) is None
    assert parse_key(key_of(f"{shorter}-{run}", run, number), shorter) is None


@given(st.text(max_size=60))
def test_what_is_no_key_is_nobodys(text):
    found = parse_key(text, OWNER)

    assert found is None or key_of(OWNER, *found) == text


@pytest.mark.parametrize(
    "key",
    [
        f"flash-{OWNER}-{RUN}-0",
        f"flash-{OWNER}-{RUN}-01",
        f"flash-{OWNER}-{RUN}-",
        f"flash-{OWNER}-{RUN}--1",
        f"flash-{OWNER}-{RUN}-1\n",
        f"flash-{OWNER}-{RUN}-²",
        f"flash-{OWNER}-{RUN}-{'9' * 5000}",
        f"flash-{OWNER}-{RUN.upper()}x-1",
        f"flash-{OWNER}-{RUN[:-1]}-1",
        f"flash-{OWNER}-{RUN}x-1",
        f" flash-{OWNER}-{RUN}-1",
        f"xflash-{OWNER}-{RUN}-1",
        f"flash-{OWNER}-{RUN}-1-1",
        f"flash-{OWNER.upper()}-{RUN}-1",
        "",
    ],
)
def test_a_key_that_is_nearly_ours_is_not(key):
    assert parse_key(key, OWNER) is None


@settings(max_examples=40)
@given(st.sets(st.tuples(runs, numbers), max_size=6), st.data())
def test_all_of_ours_that_has_no_claim_is_returned_and_nothing_that_has(launched, data):
    keys = [key_of(OWNER, *one) for one in sorted(launched)]
    protected = data.draw(st.sets(st.sampled_from(keys)) if keys else st.just(set()))
    others = [key_of("s0me0ne1", *one) for one in launched]

    found = orphans(seen(*keys, *others), OWNER, protected)

    assert [instance.key for instance in found] == [key for key in keys if key not in protected]
