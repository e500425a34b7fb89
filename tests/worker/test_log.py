"""What a worker prints reaches the log with secret values masked, whoever printed it, and when."""

import subprocess
import sys
import textwrap

import pytest

PROGRAM = """
import atexit, os, subprocess, sys, threading
from flash.spec.secrets import Redactor
from flash.worker.log import run_masked

def work():
{}

run_masked(work, Redactor(["canary-value", "canary-value-and-more"]))
"""


def run(program, code=0):
    """Run the program behind a masked output and return what reached the log, and stdout."""
    done = subprocess.run(
        # As in a worker: what Python prints is not kept back until the end.
        [
            sys.executable,
            "-u",
            "-c",
            PROGRAM.format(textwrap.indent(textwrap.dedent(program), "    ")),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == code, done.stderr
    return done.stderr, done.stdout


def test_everything_on_stdout_and_stderr_is_masked():
    log, out = run(
        r"""
        print("from python: canary-value")
        sys.stderr.write("to stderr: canary-value\n")
        os.write(1, b"below python: canary-value\n")
        subprocess.run(["echo", "from a child: canary-value"], check=True)
        os.write(1, b"cut in ")
        os.write(1, b"canary-")
        os.write(1, b"value halves\n")
        os.write(1, b"\xff not utf-8, no newline at the end")
        return 0
        """
    )

    assert log.splitlines() == [
        "from python: ***",
        "to stderr: ***",
        "below python: ***",
        "from a child: ***",
        "cut in *** halves",
        "\N{REPLACEMENT CHARACTER} not utf-8, no newline at the end",
    ]
    assert out == ""


def test_the_end_of_the_process_waits_for_no_thread_and_prints_nothing_unmasked():
    log, out = run(
        """
        class Late:
            def __del__(self):
                os.write(2, b"finalizer: canary-value")

        sys.late = Late()
        atexit.register(os.write, 2, b"hook: canary-value")
        atexit.register(threading.Event().wait)
        threading.Thread(target=threading.Event().wait).start()
        subprocess.Popen(["cat"], stdin=os.pipe()[0])
        print("the last line")
        return 3
        """,
        code=3,
    )

    assert (log, out) == ("the last line\n", "")


def test_work_that_raises_ends_with_code_1_and_its_traceback_masked():
    log, _ = run("raise ValueError('the key canary-value')", code=1)

    assert log.endswith("ValueError: the key ***\n")


# The pipe is read 64 KiB at a time: before, across and after the end of a read.
@pytest.mark.parametrize("secret", ["canary-value", "canary-value-and-more"])
def test_a_secret_in_an_endless_line_is_masked_wherever_the_line_is_cut(secret):
    log, _ = run(
        f"""
        for before in range((1 << 16) - 40, (1 << 16) + 10):
            os.write(1, b"x" * before + b"{secret}")
        return 0
        """
    )

    assert "canary" not in log
    assert "more" not in log
    assert log.count("***") == 50
    assert log.count("x") == sum(range((1 << 16) - 40, (1 << 16) + 10))
