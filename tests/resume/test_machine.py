"""A resume computes as before the break where it can, and says where it cannot."""

import json

import pytest
import torch

from flash.training import resuming

CPU = torch.device("cpu")


@pytest.fixture
def go_on(tmp_path):
    """Resume from a checkpoint of this machine with changes; return what is logged and warned."""

    def go_on(**changes):
        (tmp_path / resuming.NAME).write_text(json.dumps(resuming.machine(CPU) | changes))
        logged, warned = [], []
        resuming.go_on(tmp_path, CPU, log=logged.append, warn=warned.append)
        return logged, warned

    return go_on


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_on_the_same_machine_there_is_nothing_to_say(go_on):
    assert go_on() == ([], [])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"device": "cuda", "processor": "H200"}, "the device was cuda and is cpu"),
        ({"instructions": "AVX2"}, "its instruction set was AVX2 and is"),
        ({"torch": "1.0"}, f"torch was 1.0 and is {torch.__version__}"),
    ],
)
def test_what_differs_is_warned_of_in_a_sentence(go_on, changes, said):
    logged, (warning,) = go_on(**changes)

    assert logged == []
    assert warning.startswith("this resume is not bit-exact, because ")
    assert said in warning
    assert warning.endswith("close to those of an unbroken run, but not the same bits")


def test_the_number_of_threads_is_put_back(go_on, one_thread, monkeypatch):
    monkeypatch.setattr(resuming, "_cores", lambda: 2)
    logged, warned = go_on(threads=2)

    assert torch.get_num_threads() == 2
    assert logged == [
        "computing with 2 threads, as before the break, and not 1: the results are the same bits"
    ]
    assert warned == []


def test_more_threads_than_there_are_cores_are_not_started(go_on, one_thread, monkeypatch):
    monkeypatch.setattr(resuming, "_cores", lambda: 2)
    logged, (warning,) = go_on(threads=3)

    assert torch.get_num_threads() == 1
    assert logged == []
    assert "the number of threads was 3 and is 1" in warning


def test_a_checkpoint_from_before_that_was_noted_is_taken_as_it_is(tmp_path):
    resuming.go_on(tmp_path, CPU, log=pytest.fail, warn=pytest.fail)
