from __future__ import annotations

import signal
import threading
import time

import pytest

from flash.time_limit import TimeUp, time_limit


def test_a_block_that_takes_too_long_is_interrupted():
    with pytest.raises(TimeUp), time_limit(0.02):
        time.sleep(60)


def test_a_block_in_time_and_one_without_a_limit_are_left_alone():
    handler = signal.getsignal(signal.SIGALRM)

    with time_limit(60):
        pass
    with time_limit(None):
        pass

    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert signal.getsignal(signal.SIGALRM) == handler


def test_an_alarm_that_was_set_before_goes_on_afterwards():
    handler = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 60)
    try:
        with time_limit(30):
            assert signal.getitimer(signal.ITIMER_REAL)[0] <= 30

        assert 30 < signal.getitimer(signal.ITIMER_REAL)[0] <= 60
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


def test_limits_nest_and_the_inner_one_does_not_disarm_the_outer():
    def work():
        with time_limit(60):
            pass
        time.sleep(60)

    with pytest.raises(TimeUp), time_limit(0.05):
        work()


def test_other_threads_are_not_limited():
    done = []

    def work():
        with time_limit(0):
            done.append(signal.getitimer(signal.ITIMER_REAL))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()

    assert done == [(0, 0)]
