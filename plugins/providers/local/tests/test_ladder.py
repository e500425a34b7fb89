"""
The steps of an end, with real processes, and what is left after any end: nothing.

SIGTERM for the worker alone, which may save; SIGTERM for every process; SIGKILL for what is left.
"""

from __future__ import annotations

import os
import resource
import socket
import sys
import time
from pathlib import Path

import psutil
import pytest
from flash_provider_local.launches import new_temporary, remove_tree
from flash_provider_local.provider import LocalProvider

from flash.api import LaunchRequest, Offer

pytestmark = pytest.mark.slow

CPU = Offer("local", "cpu", 1.0)
ENDED = {"succeeded", "failed", "stopped", "gone"}
ASK_S = 0.4
BEGIN = """
import itertools, os, signal, socket, subprocess, sys, tempfile, time
from pathlib import Path

def on_term(then):
    signal.signal(signal.SIGTERM, lambda *_: then())

def python(code, **options):
    return subprocess.Popen([sys.executable, "-c", os.environ["BEGIN"] + code], **options)

def ready(text="ready"):
    print(text, flush=True)

"""
# It ends by itself in the end: who killed the tests would have it on the machine for ever.
HOPPER = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
end_s = time.monotonic() + 120
while time.monotonic() < end_s:
    if os.fork():
        os._exit(0)
    os.setsid()
    time.sleep(0.002)
"""


class Launched:
    """One launch of a piece of Python; what it prints is in `log`."""

    def __init__(self, folder, code, **env):
        self.provider = LocalProvider(folder / "provider", ask_s=ASK_S)
        self.folder = folder
        self.log = folder / "worker.log"
        request = LaunchRequest(
            key="flash-me-run-1",
            owner="me",
            argv=(sys.executable, "-c", BEGIN + code),
            env={"BEGIN": BEGIN, **env},
            caller={"PATH": os.environ["PATH"]},
            secrets={},
            memory_gib=0.0,
            workdir=str(folder),
            log=str(self.log),
        )
        self.ref = self.provider.launch(CPU, request).ref

    @property
    def marker(self):
        return str(self.folder / "provider" / "launches" / "flash-me-run-1")

    @property
    def worker(self):
        wait_until(lambda: "worker_pid" in self.provider.get(self.ref).ref)
        return psutil.Process(self.provider.get(self.ref).ref["worker_pid"])

    @property
    def temporary(self):
        return Path(self.worker.environ()["TMPDIR"])

    def says(self, text):
        wait_until(lambda: text in self.log.read_text())

    def end(self, grace_s=0.2):
        self.provider.terminate(self.ref, grace_s=grace_s)
        return self.ended()

    def ended(self):
        wait_until(lambda: self.provider.get(self.ref).state in ENDED)
        return self.provider.get(self.ref)


@pytest.fixture
def launch(tmp_path):
    """Return a function that launches Python code; its processes never outlive the test."""
    launches = []

    def start(code, **env):
        launches.append(Launched(tmp_path, code, **env))
        launches[-1].says("ready")
        return launches[-1]

    yield start
    for one in launches:
        one.end(grace_s=0)
        assert processes(one.marker) == []


def wait_until(condition, timeout_s=20.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def processes(marker):
    """Return what lives with the launch's mark in its environment."""
    found = []
    for process in psutil.process_iter():
        try:
            marked = process.environ().get("FLASH_LAUNCH") == marker
            if marked and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def test_the_worker_is_asked_alone_and_its_children_serve_it_while_it_saves(launch):
    """The child would end at the first SIGTERM; it answers after the worker has got its own."""
    one = launch(
        "child = subprocess.Popen(['cat'], stdin=-1, stdout=-1, start_new_session=True)\n"
        "def save():\n"
        "    time.sleep(0.2)\n"
        "    child.stdin.write(b'saved'); child.stdin.close()\n"
        "    ready(child.stdout.read().decode())\n"
        "    sys.exit(12)\n"
        "on_term(save); ready(); time.sleep(300)\n"
    )

    ended = one.end(grace_s=30)

    assert (ended.state, ended.exit_code) == ("stopped", 12)
    assert "saved" in one.log.read_text()


def test_children_of_a_worker_that_does_not_end_are_asked_before_they_are_killed(launch):
    """Those in sessions of their own, and those that lost their parent, too."""
    one = launch(
        "code = 'on_term(lambda: (print(\"bye\", flush=True), os._exit(0)));'\n"
        "code += 'ready(\"up\"); time.sleep(300)'\n"
        "python(code, start_new_session=True)\n"
        "python(f'python({code!r}, start_new_session=True)').wait()\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "ready(); time.sleep(300)\n"
    )
    wait_until(lambda: one.log.read_text().count("up\n") == 2)

    ended = one.end()

    assert (ended.state, ended.exit_code) == ("stopped", 137)
    assert one.log.read_text().count("bye\n") == 2


def test_children_that_a_worker_leaves_are_asked_before_they_are_killed(launch):
    one = launch(
        "python('on_term(lambda: (ready(\"bye\"), os._exit(0))); ready(); time.sleep(300)')\n"
        "time.sleep(300)\n"
    )

    one.worker.kill()

    assert one.ended().exit_code == 137
    assert "bye" in one.log.read_text()


def test_a_worker_that_hangs_in_c_is_killed_when_its_time_is_up(launch):
    """Python's own handler never gets to run there."""
    one = launch("on_term(lambda: sys.exit(12)); ready(); sum(itertools.repeat(0))")

    ended = one.end()

    assert (ended.state, ended.detail) == ("stopped", "the worker was ended by SIGKILL")


def test_a_stopped_worker_goes_on_and_saves(launch):
    one = launch("on_term(lambda: sys.exit(12)); ready(); time.sleep(300)")
    one.worker.suspend()

    assert one.end(grace_s=30).exit_code == 12


def test_a_stopped_child_is_ended_with_the_rest(launch):
    one = launch(
        "child = python('ready(\"child\"); time.sleep(300)')\n"
        "on_term(lambda: sys.exit(12)); ready(); time.sleep(300)\n"
    )
    one.says("child")
    one.worker.children()[0].suspend()

    assert one.end(grace_s=30).exit_code == 12
    assert processes(one.marker) == []


def test_processes_that_fork_while_they_are_killed_are_all_found(launch):
    """Each lives for two milliseconds, in a session of its own, and ignores SIGTERM."""
    one = launch(f"[python({HOPPER!r}) for _ in range(3)]; ready(); time.sleep(300)")

    one.end()

    assert processes(one.marker) == []


def test_a_stopped_guard_hears_that_its_worker_is_to_end(launch):
    one = launch("on_term(lambda: sys.exit(12)); ready(); time.sleep(300)")
    one.worker.parent().suspend()

    assert one.end(grace_s=30).exit_code == 12


def test_a_worker_is_stopped_on_a_full_disk_too(launch):
    one = launch("on_term(lambda: sys.exit(12)); ready(); time.sleep(300)")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        one.provider.terminate(one.ref, grace_s=30)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    ended = one.ended()
    assert (ended.state, ended.exit_code) == ("stopped", 12)


def test_a_worker_whose_guard_was_killed_stops_by_itself(launch):
    """Nobody asks the provider: there may be no supervisor any more."""
    one = launch("on_term(lambda: (ready('saved'), os._exit(12))); ready(); time.sleep(300)")

    one.worker.parent().kill()

    one.says("saved")
    wait_until(lambda: processes(one.marker) == [])


def test_shared_memory_of_a_killed_worker_is_given_back(launch):
    one = launch(
        "from multiprocessing.shared_memory import SharedMemory\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "kept = SharedMemory(create=True, size=4096); ready(kept.name); ready(); time.sleep(300)\n"
    )
    segment = Path("/dev/shm", one.log.read_text().split()[0].lstrip("/"))
    if not segment.exists():
        pytest.skip("this machine keeps shared memory elsewhere")

    one.end()

    assert not segment.exists()


MESS = (
    "place = Path(tempfile.mkdtemp()); outside = Path('outside')\n"
    "outside.mkdir(); (outside / 'mine').write_text('mine')\n"
    "(place / 'link').symlink_to(outside.absolute()); (place / 'deep').mkdir()\n"
    "(place / 'deep' / 'file').write_text('x' * 100_000); (place / 'deep').chmod(0)\n"
    "listener = socket.socket(socket.AF_UNIX)\n"
    "listener.bind(tempfile.mkdtemp(prefix='pymp-') + '/listener-12345678')\n"
)
ENDS = {
    "done": lambda one: None,
    "failed": lambda one: None,
    "cancelled": lambda one: one.end(),
    "the worker killed": lambda one: one.worker.kill(),
    "the guard killed": lambda one: one.worker.parent().kill(),
}


@pytest.mark.parametrize("how", ENDS)
def test_no_temporary_file_outlives_the_launch(launch, how):
    wait = {"done": "sys.stdin.read(); time.sleep(0.3)", "failed": "time.sleep(0.3); 1 / 0"}
    one = launch(f"{MESS}ready(); {wait.get(how, 'time.sleep(300)')}")
    temporary = one.temporary
    assert any(temporary.iterdir())
    assert temporary.stat().st_mode & 0o777 == 0o700

    ENDS[how](one)
    one.ended()

    assert not temporary.exists()
    assert (one.folder / "outside" / "mine").read_text() == "mine"


def test_temporary_files_go_when_worker_and_guard_died_together(launch):
    one = launch(f"{MESS}ready(); time.sleep(300)")
    temporary, worker = one.temporary, one.worker
    guard = worker.parent()

    guard.suspend()
    worker.kill()
    guard.kill()
    wait_until(lambda: not guard.is_running() or guard.status() == psutil.STATUS_ZOMBIE)
    one.provider.terminate(one.ref, grace_s=0)

    assert not temporary.exists()
    assert one.provider.get(one.ref).state == "gone"


def test_a_folder_of_temporary_files_that_became_a_link_is_not_followed(launch):
    one = launch(
        "Path('outside').mkdir(); Path('outside/mine').write_text('mine')\n"
        "mine = Path(os.environ['TMPDIR']); mine.rmdir(); mine.symlink_to(Path.cwd() / 'outside')\n"
        "ready(); time.sleep(300)\n"
    )
    temporary = one.temporary

    one.end()

    assert not temporary.is_symlink()
    assert (one.folder / "outside" / "mine").read_text() == "mine"


def test_temporary_files_are_where_the_run_or_its_shell_wants_them(tmp_path, launch):
    asked = tmp_path.parent / "t"
    asked.mkdir(exist_ok=True)
    short = len(str(asked)) <= 40

    one = launch("ready(); time.sleep(300)", TMPDIR=str(asked), TMP="/nowhere")

    env = one.worker.environ()
    assert env["TMPDIR"] == env["TMP"]
    assert "TEMP" not in env
    assert (one.temporary.parent == asked) is short


def test_a_name_for_temporary_files_leaves_room_for_a_socket(tmp_path):
    deep = tmp_path / ("d" * 80)
    deep.mkdir()

    named = [
        new_temporary(asked, tmp_path)
        for asked in ([str(deep)], [None], [str(tmp_path / "absent")], ["/dev"], ["/tmp"])
    ]

    assert len(set(named)) == len(named)
    with socket.socket(socket.AF_UNIX) as listener:
        for name in named:
            folder = Path(name)
            folder.mkdir(mode=0o700)
            address = folder / f"{'x' * 40}"
            listener.close()
            listener = socket.socket(socket.AF_UNIX)  # noqa: PLW2901 - one a name
            listener.bind(str(address))
            remove_tree(folder)
            assert not folder.exists()
