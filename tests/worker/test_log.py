"""What a worker prints reaches the log with secret values masked, whoever printed it."""

import subprocess
import sys
import textwrap

PROGRAM = textwrap.dedent(
    """
    import os, subprocess, sys
    from flash.worker.log import masked_output

    with masked_output(lambda text: text.replace("canary-value", "***")):
        print("from python: canary-value")
        sys.stderr.write("to stderr: canary-value\\n")
        os.write(1, b"below python: canary-value\\n")
        subprocess.run(["echo", "from a child: canary-value"], check=True)
        os.write(1, b"cut in ")
        os.write(1, b"canary-")
        os.write(1, b"value halves\\n")
        os.write(1, b"\\xff not utf-8, no newline at the end")
    print("after")
    """
)


def test_everything_on_stdout_and_stderr_is_masked():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )

    assert "canary-value" not in done.stdout + done.stderr
    assert done.stderr.splitlines() == [
        "from python: ***",
        "to stderr: ***",
        "below python: ***",
        "from a child: ***",
        "cut in *** halves",
        "\N{REPLACEMENT CHARACTER} not utf-8, no newline at the end",
    ]
    assert done.stdout == "after\n"


def test_a_child_that_outlives_the_worker_does_not_keep_it_waiting():
    program = textwrap.dedent(
        """
        import subprocess
        from flash.worker.log import masked_output

        with masked_output(str):
            child = subprocess.Popen(["sleep", "60"])
        child.kill()
        """
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=30)
