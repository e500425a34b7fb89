"""SIGTERM is heard whatever user code has put in its handler's place."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from flash.values import Event
from flash.worker.stopping import Stopped, StopSignal, is_stop


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


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def phase(name):
    return Event("phase", 1.0, {"name": name})


@pytest.mark.parametrize("name", ["environment", "model", "data"])
def test_while_the_run_is_loading_it_ends_at_once_and_once(name):
    stop = StopSignal()
    stop.note(phase(name))

    with pytest.raises(Stopped):
        terminate()

    terminate()  # on the way out
    assert stop()


def test_what_came_before_the_loading_ends_it_too():
    stop = StopSignal()
    terminate()

    with pytest.raises(Stopped):
        stop.note(phase("model"))


@pytest.mark.parametrize("name", ["train", "rollout", "update", "evaluate", "save"])
def test_once_there_may_be_something_to_save_it_only_asks(name):
    stop = StopSignal()
    stop.note(phase("data"))
    stop.note(phase(name))
    stop.note(Event("log", 1.0, {"message": "m"}))

    terminate()

    assert stop()


def test_an_algorithm_that_names_no_phase_is_only_asked():
    stop = StopSignal()
    stop.note(phase("model"))
    stop.only_ask()

    terminate()

    assert stop()


def test_a_stop_is_recognised_in_what_somebody_made_of_it():
    caught, lost = ValueError("the environment cannot be loaded"), KeyError("on the way out")
    caught.__cause__ = lost
    lost.__context__ = Stopped()

    assert is_stop(caught)
    assert not is_stop(ValueError())
