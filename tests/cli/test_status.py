"""`flash status`: as JSON, for people, followed on a terminal and off it."""

import json
import os
import pty
import signal
import subprocess

import pytest

from flash.cli import root
from flash.cli.status import ATTEMPT_KEYS
from flash.worker.checkpoints import CheckpointStore

METRICS = (
    "say('phase', name='train')\n"
    "for step in range(1, 5):\n"
    "    say('metric', step=step, total=4, loss=4.0 / step, tokens_per_s=100.0, eta_s=9.0)\n"
    "say('evaluation', step=4, loss=1.25)\n"
    "say('warning', message='3 rows were dropped')\n"
    "say('done', steps=4)\n"
)
PRACTICE = (
    "say('evaluation', step=0, reward=0.25, success=0.125, best=0.0)\n"
    "for step in range(1, 5):\n"
    "    say('phase', name='rollout')\n"
    "    say('phase', name='train')\n"
    "    say('metric', step=step, total=4, reward=step / 4, success=0.5, loss=0.0,\n"
    "        flat_groups=0.25, rollout_tokens_per_s=100.0, eta_s=9.0)\n"
    "say('evaluation', step=4, reward=0.75, success=0.5, best=1.0)\n"
    "say('done', steps=4)\n"
)
SLEEP = "note_pid(); time.sleep(300)\n"
FAIL = (
    "for number in range(50): print('line', number, flush=True)\n"
    "say('error', kind='user_error', message='row 3 has no target', hint='give it one')\n"
    "sys.exit(10)\n"
)


@pytest.fixture
def flash(bench, monkeypatch, capsys):
    """Return a function that runs a command line in this process: exit code, stdout, stderr."""
    monkeypatch.setenv("FLASH_HOME", str(bench.home.root))

    def run(*words):
        code = root.run(words)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def test_json_is_the_contract(bench, flash):
    run = bench.submit(METRICS)
    bench.wait(run)
    CheckpointStore(bench.plane.store(run)).save_final(lambda folder: (folder / "w").touch())

    code, said, _ = flash("status", run, "--json")

    status = json.loads(said)
    assert code == 0
    assert (status["run"], status["state"], status["error"]) == (run, "done", None)
    assert status["spec"]["model"] == "org/model"
    assert (status["step"], status["total"], status["phase"]) == (4, 4, "train")
    assert status["metrics"] == {"loss": 1.0, "tokens_per_s": 100.0, "eta_s": 9.0}
    assert status["evaluation"] == {"step": 4, "loss": 1.25}
    assert status["evaluations"] == [status["evaluation"]]
    assert status["losses"] == [[1, 4.0], [2, 2.0], [3, 4 / 3], [4, 1.0]]
    assert status["rewards"] == []
    assert status["warnings"] == ["3 rows were dropped"]
    assert status["adapter"] == str(bench.plane.store(run) / "adapter")
    [attempt] = status["attempts"]
    assert list(attempt) == list(ATTEMPT_KEYS)
    assert (attempt["number"], attempt["outcome"], attempt["exit_code"]) == (1, "finished", 0)


def test_json_of_a_live_run_names_the_workers_process(bench, flash):
    run = bench.submit(SLEEP)
    [pid] = bench.started(run)
    bench.wait(run, lambda run: run.state == "running")

    status = json.loads(flash("status", "last", "--json")[1])

    assert (status["state"], status["adapter"], status["step"]) == ("running", None, None)
    assert [attempt["worker_pid"] for attempt in status["attempts"]] == [pid]


def test_a_done_run_shows_its_curve_and_what_to_do_next(bench, flash):
    run = bench.submit(METRICS)
    bench.wait(run)

    code, said, _ = flash("status", run[:7])

    assert code == 0
    assert said.startswith(f"{run}  done")
    for expected in ("step 4/4", "loss 1.0000", "█▃▂▁", "held-out loss 1.2500", "3 rows were"):
        assert expected in said
    assert said.splitlines()[-3].split()[:3] == ["flash", "eval", run]


def test_a_run_that_practised_shows_its_reward(bench, flash):
    run = bench.submit(PRACTICE)
    bench.wait(run)

    said = flash("status", run)[1]
    status = json.loads(flash("status", run, "--json")[1])

    assert "step 4/4  reward 1.000  success 50%  flat groups 25%  100 tokens/s\n" in said
    assert "reward  ▁▃▆█\n" in said
    assert (
        "held-out reward 0.750, success 50% at step 4; before training reward 0.250, success 12%\n"
    ) in said
    assert status["rewards"] == [[1, 0.25], [2, 0.5], [3, 0.75], [4, 1.0]]
    assert [one["step"] for one in status["evaluations"]] == [0, 4]


def test_a_phase_that_comes_with_every_step_is_said_once(bench, flash):
    run = bench.submit(PRACTICE)

    said = flash("status", run, "--follow")[1]

    assert said.count("phase: rollout") == said.count("phase: train") == 1
    assert "held-out reward 0.250, success 12% at step 0" in said


def test_a_failed_run_shows_reason_then_log_then_where_it_is(bench, flash):
    run = bench.submit(FAIL)
    bench.wait(run)

    code, said, _ = flash("status", run)

    lines = said.splitlines()
    log = bench.plane.log(run, 1)
    assert code == 0
    assert lines[:3] == ["error: row 3 has no target", "hint: give it one", ""]
    assert lines[3:23] == [f"  | line {number}" for number in range(30, 50)]
    assert lines[23] == f"full log: {log}"
    assert lines[-1].split()[:4] == ["flash", "status", run, "--logs"]


def test_logs_prints_the_whole_log_of_the_newest_attempt(bench, flash):
    run = bench.submit("print('attempt', attempt)\nif attempt == 1: os.kill(os.getpid(), 9)")
    bench.wait(run)

    assert flash("status", run, "--logs") == (0, "attempt 2\n", "")


def test_a_log_cannot_act_on_the_terminal(bench, flash):
    run = bench.submit("print('\\x1b]0;owned\\x07 \\x1b[2J'); sys.exit(10)")
    bench.wait(run)

    for words in (("status", run), ("status", run, "--logs")):
        assert "\x1b" not in flash(*words)[1]


def test_a_waiting_run_says_what_it_waits_for(bench, flash):
    run = bench.submit("", memory_gib=1e6)
    bench.wait(run, lambda run: run.waiting is not None)

    said = flash("status", run)[1]

    assert f"{run}  queued" in said
    assert "waiting: it needs 1000000.0 GiB of memory; local has" in said
    assert f"flash cancel {run}" in said


def test_following_prints_lines_and_then_the_end(bench, flash):
    run = bench.submit(METRICS)

    code, said, err = flash("status", run, "--follow")

    assert code == 0
    assert "phase: train" in said
    assert "step 1/4  loss 4.0000  100 tokens/s  9 s left" in said
    assert "step 4/4  loss 1.0000" in said
    assert "held-out loss 1.2500 at step 4" in said
    assert f"{run} done\n" in said
    assert f"flash eval {run}" in said
    assert "warning: 3 rows were dropped" in err


def test_following_a_run_that_fails_ends_with_1_and_the_reason(bench, flash):
    run = bench.submit(FAIL)

    code, said, _ = flash("status", run, "-f")

    assert code == 1
    assert "error: row 3 has no target" in said


def test_following_tells_of_attempts_that_were_lost(bench, flash):
    run = bench.submit("if attempt == 1: os.kill(os.getpid(), 9)")

    code, _, err = flash("status", run, "-f")

    assert code == 0
    assert (
        "warning: attempt 1 was lost: the worker was ended by SIGKILL (exit code 137); "
        "tried again at once, from the start\n"
    ) in err


def test_following_as_json_prints_the_end_alone(bench, flash):
    run = bench.submit(METRICS)

    code, said, err = flash("status", run, "-f", "--json")

    assert (code, json.loads(said)["state"], err) == (0, "done", "")


def test_following_the_log_prints_it_as_it_grows_over_all_attempts(bench, flash):
    run = bench.submit(
        "print('attempt', attempt, flush=True)\n"
        "if attempt == 1: os.kill(os.getpid(), 9)\n"
        "print('end', end='', flush=True)"
    )

    code, said, err = flash("status", run, "--logs", "-f")

    assert (code, said, err) == (0, "attempt 1\nattempt 2\nend\n", "attempt 2\n")


def test_ctrl_c_detaches_and_the_run_goes_on(bench):
    run = bench.submit("say('phase', name='train')\n" + SLEEP)
    bench.started(run)
    follower = bench.flash(
        "status", run, "-f", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in follower.stdout:
        if "phase" in line:
            break

    follower.send_signal(signal.SIGINT)
    _, err = follower.communicate(timeout=30)

    assert follower.returncode == 130
    assert f"flash status {run} --follow" in err
    assert f"flash cancel {run}" in err
    assert not bench.plane.run(run).final


def test_a_terminal_gets_a_live_view(bench):
    run = bench.submit(
        METRICS.replace(
            "say('done'", "while not (store / 'go').exists(): time.sleep(0.05)\nsay('done'"
        )
    )
    ours, theirs = pty.openpty()
    follower = bench.flash("status", run, "-f", stdout=theirs, stderr=theirs)
    os.close(theirs)
    screen = b""
    while b"running" not in screen or b"step 4/4" not in screen:
        screen += os.read(ours, 4096)
    (bench.plane.store(run) / "go").touch()
    try:
        while chunk := os.read(ours, 4096):
            screen += chunk
    except OSError:  # Linux says that the other side has closed
        pass
    os.close(ours)

    shown = screen.decode()
    assert follower.wait(timeout=30) == 0
    assert f"{run}  running · train" in shown
    assert "loss 4.000 █▃▂▁" in shown
    assert [line for line in shown.splitlines() if "━" in line and "step" in line] == []
    assert "━" in shown
    assert "step 4/4  loss 1.0000  100 tokens/s" in shown
    assert "flash eval" in shown


@pytest.mark.parametrize("words", [("status",), ("cancel",), ("checkpoints",)])
@pytest.mark.parametrize("run", ["..", "../../etc/passwd", "zzzzzzzzz", "x" * 5000, "\x1b[31m", ""])
def test_what_names_no_run_is_a_usage_error(bench, flash, words, run):
    code, said, err = flash(*words, run)

    assert (code, said) == (2, "")
    assert err.startswith("error: there is no run")
    assert "\x1b" not in err
    assert len(err) < 300
