"""Run ids sort by time, are short to type, and nothing else passes for one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash.plane.ids import ALPHABET, LENGTH, is_run_id, new_run_id, read_prefix

# 2024 to 2093, the years that an id holds.
times = st.floats(min_value=1_704_067_200, max_value=3_900_000_000, allow_nan=False)


@given(times, times)
def test_ids_sort_by_time(one, other):
    earlier, later = sorted((one, other))
    if later - earlier >= 1 / 16_000:
        assert new_run_id(earlier) < new_run_id(later)


@given(times)
def test_ids_are_ids(now_s):
    run = new_run_id(now_s)

    assert is_run_id(run)
    assert len(run) == LENGTH
    assert read_prefix(run) == run


def test_ids_of_now_are_ids():
    assert is_run_id(new_run_id())


@given(st.text())
def test_nothing_else_passes(text):
    if is_run_id(text):
        assert len(text) == LENGTH
        assert set(text) <= set(ALPHABET)


@pytest.mark.parametrize(
    "text", ["", "..", "../../etc", "0abc/../0", "0abcdefg\n", "u00000000", "0" * 10, "\uff10" * 9]
)
def test_paths_and_look_alikes_are_no_ids(text):
    assert not is_run_id(text)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("0AB", "0ab"), ("oil", "011"), (" 0ab ", "0ab"), ("last", "1ast")],
)
def test_what_people_type_is_read_kindly(typed, meant):
    assert read_prefix(typed) == meant


@pytest.mark.parametrize("typed", ["", " ", "..", "a/b", "u", "0" * 10, "\x1b[31m"])
def test_what_can_start_no_id_is_refused(typed):
    assert read_prefix(typed) is None
