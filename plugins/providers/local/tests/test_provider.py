"""The provider's contract, with real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from flash_provider_local.machine import Gpu, visible
from flash_provider_local.provider import LocalProvider

from flash.api import BadRequest, LaunchRequest, Need, Offer

CPU = Offer("local", "cpu", 1.0)
GPUS = [Gpu(str(n), f"GPU-{n}f", "NVIDIA H100", 80.0 - n) for n in range(4)]
FREE_GIB = 10.0
FINAL = {"succeeded", "failed", "stopped"}


@pytest.fixture
def provider(tmp_path):
    """Make a provider and clear away whatever a failing test leaves."""
    provider = LocalProvider(
        tmp_path / "provider",
        gpus=lambda environ: visible(GPUS, environ),
        free_memory_gib=lambda: FREE_GIB,
        ask_s=0.3,
    )
    yield provider
    for instance in provider.list("me"):
        provider.terminate(instance.ref, grace_s=0)
        wait_for(provider, instance.ref, *FINAL, "gone")


def request_for(tmp_path, code, *, key="flash-me-run-1", **changes):
    fields = {
        "key": key,
        "owner": "me",
        "argv": (sys.executable, "-c", code),
        "env": {"GREETING": "hello"},
        "caller": {"PATH": os.environ["PATH"]},
        "secrets": {},
        "memory_gib": 0.0,
        "workdir": str(tmp_path),
        "log": str(tmp_path / f"{key}.log"),
    }
    return LaunchRequest(**{**fields, **changes})


def wait_for(provider, ref, *states, timeout_s=20.0):
    deadline = time.monotonic() + timeout_s
    while (instance := provider.get(ref)).state not in states:
        assert time.monotonic() < deadline, f"still {instance}"
        time.sleep(0.02)
    return instance


def test_a_worker_runs_in_its_folder_and_its_exit_code_is_reported(provider, tmp_path):
    code = "import os, sys; print(os.getcwd(), os.environ['GREETING']); sys.exit(10)"

    launch = provider.launch(CPU, request_for(tmp_path, code))
    ended = wait_for(provider, launch.ref, *FINAL)

    assert (launch.state, ended.state, ended.exit_code) == ("accepted", "failed", 10)
    log = Path(tmp_path / "flash-me-run-1.log")
    assert log.read_text() == f"{tmp_path} hello\n"
    assert log.stat().st_mode & 0o777 == 0o600


def test_a_worker_that_ends_well_succeeded(provider, tmp_path):
    ref = provider.launch(CPU, request_for(tmp_path, "")).ref

    assert wait_for(provider, ref, *FINAL).state == "succeeded"


def test_secrets_arrive_on_stdin_and_nowhere_else(provider, tmp_path):
    canary = "canary-7c21"
    code = (
        "import hashlib, os, sys, json; given = json.load(sys.stdin)\n"
        "print(hashlib.sha256(given['TOKEN'].encode()).hexdigest(), flush=True)\n"
        "print('TOKEN' in os.environ, flush=True)\n"
        "import time; time.sleep(60)\n"
    )
    request = request_for(tmp_path, code, secrets={"TOKEN": canary})

    ref = provider.launch(CPU, request).ref
    log = Path(request.log)
    instance = wait_for(provider, ref, "running")
    deadline = time.monotonic() + 20
    while log.read_text().count("\n") < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)

    assert log.read_text().splitlines()[1] == "False"
    assert not [path for path in tmp_path.rglob("*") if holds(path, canary)]
    worker = psutil.Process(instance.ref["worker_pid"])
    guard = worker.parent()
    for process in (worker, guard):
        assert canary not in " ".join(process.cmdline())
        assert canary not in str(process.environ())
    assert canary not in repr(request)


def holds(path, text):
    return path.is_file() and text.encode() in path.read_bytes()


def test_secrets_larger_than_a_pipe_do_not_block_a_worker_that_never_reads(provider, tmp_path):
    request = request_for(tmp_path, "", secrets={"BIG": "x" * 500_000})

    ref = provider.launch(CPU, request).ref

    assert wait_for(provider, ref, *FINAL).state == "succeeded"


def test_a_worker_sees_what_the_request_says_and_nothing_of_our_environment(
    provider, tmp_path, monkeypatch
):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-for-you")
    code = "import os, json; print(json.dumps(dict(os.environ)))"

    request = request_for(tmp_path, code)
    wait_for(provider, provider.launch(CPU, request).ref, *FINAL)

    seen = json.loads(Path(request.log).read_text())
    seen.pop("LC_CTYPE", None)  # set by Python itself
    assert Path(seen.pop("TMPDIR")).name.startswith("flash-")
    assert seen == {
        "PATH": os.environ["PATH"],
        "GREETING": "hello",
        "CUDA_VISIBLE_DEVICES": "",
        "FLASH_LAUNCH": str(tmp_path / "provider" / "launches" / "flash-me-run-1"),
    }


@pytest.mark.parametrize(
    ("offered", "caller", "seen"),
    [
        ("GPU-1f", {}, "GPU-1f"),
        ("GPU-1f", {"CUDA_VISIBLE_DEVICES": "0,1"}, "GPU-1f"),
        ("GPU-1f", {"CUDA_VISIBLE_DEVICES": "GPU-0f, GPU-1"}, "GPU-1f"),
        ("GPU-1f", {"CUDA_VISIBLE_DEVICES": "3,2"}, "GPU-2f"),
        ("GPU-1f", {"CUDA_VISIBLE_DEVICES": "0,-1,1"}, "GPU-0f"),
        ("GPU-1f", {"CUDA_VISIBLE_DEVICES": ""}, ""),
        ("cpu", {"CUDA_VISIBLE_DEVICES": "0"}, ""),
    ],
)
def test_the_worker_sees_one_gpu_that_its_shell_allows(provider, tmp_path, offered, caller, seen):
    offer = Offer("local", offered, 80.0, accelerator=None if offered == "cpu" else "NVIDIA H100")
    code = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"
    request = request_for(tmp_path, code, caller=caller)

    wait_for(provider, provider.launch(offer, request).ref, *FINAL)

    assert Path(request.log).read_text() == f"{seen}\n"


def test_one_key_is_launched_once_however_often_it_is_asked(provider, tmp_path):
    marks = tmp_path / "marks"
    code = f"import time; open({str(marks)!r}, 'a').write('x'); time.sleep(60)"
    request = request_for(tmp_path, code)

    launches = [provider.launch(CPU, request) for _ in range(5)]
    wait_for(provider, launches[0].ref, "running")
    launches.append(LocalProvider(tmp_path / "provider").launch(CPU, request))

    assert all(launch == launches[0] for launch in launches)
    deadline = time.monotonic() + 20
    while not marks.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert marks.read_text() == "x"


def test_racing_launchers_start_one_worker(provider, tmp_path):
    marks = tmp_path / "marks"
    program = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from flash.api import LaunchRequest, Offer\n"
        "from flash_provider_local.provider import LocalProvider\n"
        f"code = \"open({str(marks)!r}, 'a').write('x')\"\n"
        "request = LaunchRequest(key='flash-me-race-1', owner='me',\n"
        "    env={}, caller={}, secrets={}, memory_gib=0.0, argv=(sys.executable, '-c', code),\n"
        f"    workdir={str(tmp_path)!r}, log={str(tmp_path / 'race.log')!r})\n"
        "sys.stdin.read()\n"
        f"provider = LocalProvider(Path({str(tmp_path / 'provider')!r}))\n"
        "print(provider.launch(Offer('local', 'cpu', 1.0), request).state)\n"
    )
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for _ in range(4)
    ]
    for racer in racers:
        racer.stdin.close()
    answers = [racer.stdout.read().decode().strip() for racer in racers]
    for racer in racers:
        racer.wait()
        racer.stdout.close()
    wait_for(provider, {"key": "flash-me-race-1"}, *FINAL)

    assert answers == ["accepted"] * 4
    assert marks.read_text() == "x"


def test_an_ended_launch_is_not_started_again(provider, tmp_path):
    marks = tmp_path / "marks"
    request = request_for(tmp_path, f"open({str(marks)!r}, 'a').write('x')")

    for _ in range(2):
        wait_for(provider, provider.launch(CPU, request).ref, *FINAL)

    assert marks.read_text() == "x"


def test_a_launcher_that_dies_before_it_sent_the_secrets_has_launched_nothing(provider, tmp_path):
    request = request_for(tmp_path, "print('ran')")
    folder = tmp_path / "provider" / "launches" / request.key
    folder.mkdir(parents=True)
    (folder / "request.json").write_text(json.dumps({"owner": "me"}))
    half = subprocess.run(
        [sys.executable, "-m", "flash_provider_local.guard", str(folder)],
        input=b'{"TOKEN": "abc',
        stderr=subprocess.PIPE,
        check=False,
    )

    assert half.returncode == 1
    assert provider.get({"key": request.key}).state == "gone"
    assert provider.list("me") == []

    ref = provider.launch(CPU, request).ref

    assert wait_for(provider, ref, *FINAL).state == "succeeded"
    assert Path(request.log).read_text() == "ran\n"


def test_terminate_asks_first_and_the_worker_may_finish_in_its_own_way(provider, tmp_path):
    code = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(12))\n"
        "print('ready', flush=True); time.sleep(60)\n"
    )
    request = request_for(tmp_path, code)
    ref = provider.launch(CPU, request).ref
    wait_until(lambda: Path(request.log).read_text() == "ready\n")

    provider.terminate(ref, grace_s=30)
    ended = wait_for(provider, ref, *FINAL)

    assert (ended.state, ended.exit_code) == ("stopped", 12)


def test_terminate_kills_a_worker_that_ignores_it_when_its_time_is_up(provider, tmp_path):
    code = (
        "import signal, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print('ready', flush=True); time.sleep(60)\n"
    )
    request = request_for(tmp_path, code)
    ref = provider.launch(CPU, request).ref
    wait_until(lambda: Path(request.log).read_text() == "ready\n")

    provider.terminate(ref, grace_s=60)
    before = time.monotonic()
    provider.terminate(ref, grace_s=0.3)
    ended = wait_for(provider, ref, *FINAL)

    assert (ended.state, ended.exit_code, ended.detail) == (
        "stopped",
        137,
        "the worker was ended by SIGKILL",
    )
    assert not ended.out_of_memory
    assert time.monotonic() - before < 10


def wait_until(condition, timeout_s=20.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_worker_killed_from_outside_failed_with_the_signal(provider, tmp_path):
    ref = provider.launch(CPU, request_for(tmp_path, "import time; time.sleep(60)")).ref
    pid = wait_for(provider, ref, "running").ref["worker_pid"]

    os.kill(pid, signal.SIGKILL)
    ended = wait_for(provider, ref, *FINAL)

    assert (ended.state, ended.exit_code, ended.detail) == (
        "failed",
        137,
        "the worker was ended by SIGKILL",
    )


def test_a_launch_that_ended_is_kept_until_terminate_and_gone_after(provider, tmp_path):
    ref = provider.launch(CPU, request_for(tmp_path, "")).ref
    ended = wait_for(provider, ref, *FINAL)

    assert provider.get(ref) == ended

    for _ in range(2):
        provider.terminate(ref, grace_s=10)

        assert provider.get(ref).state == "gone"
    assert list((tmp_path / "provider" / "launches").iterdir()) == []


def test_a_command_that_does_not_exist_is_a_failure_with_its_reason(provider, tmp_path):
    request = request_for(tmp_path, "", argv=(str(tmp_path / "nothing"),))

    ended = wait_for(provider, provider.launch(CPU, request).ref, *FINAL)

    assert (ended.state, ended.exit_code) == ("failed", 127)
    assert "No such file or directory" in ended.detail


def test_a_launch_that_a_power_cut_ended_is_lost_and_can_be_cleared_away(provider, tmp_path):
    """No process is left, the lock is free, and what was written last may be empty."""
    folder = tmp_path / "provider" / "launches" / "flash-me-run-1"
    folder.mkdir(parents=True)
    (folder / "request.json").write_text(json.dumps({"owner": "me"}))
    (folder / "guard.json").write_text(json.dumps({"pid": os.getpid(), "started_s": 1.0}))
    (folder / "worker.json").write_text(json.dumps({"pid": os.getpid(), "created_s": 1.0}))
    (folder / "exit.json").write_text("")
    [found] = provider.list("me")

    assert (found.state, found.exit_code) == ("failed", None)

    provider.terminate(found.ref, grace_s=0)

    assert provider.get(found.ref).state == "gone"


def test_a_launch_that_cannot_write_its_records_is_rejected(provider, tmp_path):
    (tmp_path / "provider").write_text("a file where the folder should be")

    launch = provider.launch(CPU, request_for(tmp_path, ""))

    assert launch.state == "rejected"
    assert "cannot start a process here" in launch.error
    (tmp_path / "provider").unlink()


def test_list_names_the_owners_launches_only(provider, tmp_path):
    mine = request_for(tmp_path, "", key="flash-me-a-1")
    other = request_for(tmp_path, "", key="flash-you-a-1", owner="you")
    for request in (mine, other):
        wait_for(provider, provider.launch(CPU, request).ref, *FINAL)

    assert [instance.key for instance in provider.list("me")] == ["flash-me-a-1"]
    assert [instance.key for instance in provider.list("you")] == ["flash-you-a-1"]


@pytest.mark.parametrize("key", ["../../etc", "", "A", "a" * 51, "a/b"])
def test_keys_that_are_no_names_are_refused(provider, key):
    with pytest.raises(BadRequest, match="not a launch key"):
        provider.get({"key": key})


def rooms(provider):
    return {offer.id: offer.memory_gib for offer in provider.offers(Need(memory_gib=0.0))}


def test_what_a_worker_was_promised_and_has_not_taken_is_not_offered_again(provider, tmp_path):
    """Two runs of 60 % of the memory are not started together; on a GPU neither."""
    before = rooms(provider)
    requests = [
        request_for(tmp_path, "import time; time.sleep(60)", key=f"flash-me-{n}-1", memory_gib=6.0)
        for n in range(2)
    ]

    refs = [
        provider.launch(offer, request).ref
        for offer, request in zip((CPU, Offer("local", "GPU-1f", 79.0)), requests, strict=True)
    ]

    assert [offer.id for offer in provider.offers(Need(memory_gib=6.0))] == [
        "GPU-0f", "GPU-2f", "GPU-3f", "GPU-1f",
    ]  # fmt: skip
    assert rooms(provider)["GPU-1f"] == before["GPU-1f"] - 6.0
    for ref in refs:
        provider.terminate(ref, grace_s=0)
        wait_for(provider, ref, *FINAL)
    assert rooms(provider) == before


def test_what_a_worker_has_taken_is_not_kept_back_a_second_time(provider, tmp_path):
    code = "taken = bytearray(1 << 28); print('taken', flush=True); import time; time.sleep(60)"
    request = request_for(tmp_path, code, memory_gib=1.0)

    provider.launch(CPU, request)
    wait_until(lambda: Path(request.log).read_text() == "taken\n")

    assert 9.25 <= rooms(provider)["cpu"] < 9.35


def test_the_cpu_is_offered_when_the_job_fits_and_only_then(tmp_path):
    provider = LocalProvider(tmp_path, gpus=lambda _: [])
    offer = provider.offers(Need(memory_gib=0.001))[-1]

    assert (offer.id, offer.accelerator, offer.price_usd_hour) == ("cpu", None, 0.0)
    assert 0.001 <= offer.memory_gib <= psutil.virtual_memory().total / 2**30
    assert provider.offers(Need(memory_gib=1e6)) == []


def test_check_says_who_and_where(provider):
    assert "@" in provider.check()
