"""SIGTERM is heard whatever user code has put in its handler's place."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from flash.worker.stopping import StopSignal


@pytest.fixture(autouse=True)
def _handler():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_sigterm_asks_to_stop():
    stop = StopSignal()
    assert not stop()

    os.kill(os.getpid(), signal.SIGTERM)

    assert stop()


@pytest.mark.parametrize("other", [signal.SIG_IGN, signal.SIG_DFL, lambda *_: None])
def test_a_handler_that_was_replaced_is_back_once_it_was_asked(other):
    stop = StopSignal()
    signal.signal(signal.SIGTERM, other)
    assert not stop()

    os.kill(os.getpid(), signal.SIGTERM)

    assert stop()


def test_other_threads_may_ask():
    stop = StopSignal()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    said = []

    thread = threading.Thread(target=lambda: said.append(stop()))
    thread.start()
    thread.join()

    assert said == [False]
    assert not stop()
