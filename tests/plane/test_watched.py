"""How long an attempt has worked, whatever clocks and supervisors do."""

import os

import attrs
import pytest
from plane_records import attempt, run

from flash.plane.store import RunStore
from flash.plane.watched import Watched, boot_id
from flash.values import Instance


@attrs.define
class Clock:
    wall_s: float
    monotonic_s: float

    def time(self):
        return self.wall_s

    def monotonic(self):
        return self.monotonic_s


class Places:
    def get(self, provider, tables):
        return (provider, str(tables))


def worked(found, clock, tmp_path):
    watched = Watched(run(found))
    watched.know("0wner123", RunStore(tmp_path), Places(), clock)
    return watched.worked_for_s(clock.monotonic_s + 10.0)


@pytest.mark.parametrize("wall_s", [1.0, 5000.0, 1e9])
def test_a_new_supervisor_knows_how_long_an_attempt_of_this_boot_has_worked(wall_s, tmp_path):
    found = attempt(started_s=5000.0, boot=boot_id() or pytest.skip("no boot id"), boot_s=100.0)

    assert worked(found, Clock(wall_s, 400.0), tmp_path) == 310.0


def test_after_a_reboot_the_wall_clock_has_to_do_and_nothing_is_negative(tmp_path):
    found = attempt(started_s=5000.0, boot="another", boot_s=100.0)

    assert worked(found, Clock(5060.0, 5.0), tmp_path) == 70.0
    assert worked(found, Clock(4000.0, 5.0), tmp_path) == 10.0


@pytest.mark.parametrize(
    ("boot", "bills", "worked_s"),
    [("another", False, 3600.0), ("another", True, 50_000.0), ("", False, 3600.0)],
)
def test_a_machine_that_was_off_has_not_worked_meanwhile(tmp_path, boot, bills, worked_s):
    found = attempt(started_s=5000.0, boot=boot, boot_s=100.0)
    events = RunStore(tmp_path).make_attempt(1) / "events.jsonl"
    events.touch()
    os.utime(events, (8600.0, 8600.0))
    clock = Clock(55_000.0, 5.0)
    watched = Watched(run(found))
    watched.know("0wner123", RunStore(tmp_path), Places(), clock)
    watched.instance = Instance("key", {}, "failed", bills=bills)
    watched.heard.listen(5.0)

    assert watched.worked_till_its_end_s(5.0) == worked_s
