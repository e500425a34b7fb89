"""A worker that hangs is stopped, and its log says where it stood."""

import pytest

HANGS = """

if "attempts" in __file__:  # in the worker; the check before submitting goes through
    import time

    time.sleep(600)
"""


@pytest.mark.slow
def test_a_worker_without_progress_is_stopped_and_its_stacks_are_in_the_log(project):
    environment = (project.folder / "environment.py").read_text()
    project.write("environment.py", environment + HANGS)
    project.configure(extra="\n[retry]\nstalled_after_s = 4\nstalled = 0\n")

    ended = project.wait(project.submit())

    [attempt] = ended["attempts"]
    assert (ended["state"], attempt["outcome"]) == ("failed", "stalled")
    assert "made no progress for 4 s" in ended["error"]
    assert "environment" in ended["error"]
    log = next(project.store.glob("runs/*/attempts/1/worker.log")).read_text()
    assert "Timeout" in log
    assert "environment.py" in log
