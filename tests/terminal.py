"""A program in a terminal of its own, as a person has it: what is typed, and all that it shows."""

import os
import pty
import select
import signal
import time

import psutil
import pytest


class Terminal:
    """One program; it ends with the terminal at the latest."""

    def __init__(self, command, folder, environ=os.environ):
        self.shown = ""
        pid, self.screen = pty.fork()
        if not pid:
            # Whoever runs the tests in the background ignores it, and children would too.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.chdir(folder)
            environ = {**environ, "TERM": "xterm", "INPUTRC": "/dev/null"}
            os.execvpe(command[0], command, environ)
        self.pid = pid

    def type(self, text):
        os.write(self.screen, text.encode())

    def line(self, text, *, until="> "):
        """Type a line; return what came until the next prompt."""
        self.type(text + "\n")
        return self.wait(until)

    def wait(self, text, *, deadline_s=60):
        """Return what came up to `text`, and forget it."""
        end = time.monotonic() + deadline_s
        while text not in self.shown:
            if not select.select([self.screen], [], [], max(0, end - time.monotonic()))[0]:
                pytest.fail(f"no {text!r} in {self.shown!r}")
            try:
                self.shown += os.read(self.screen, 4096).decode().replace("\r\n", "\n")
            except OSError:
                pytest.fail(f"ended, with no {text!r} in {self.shown!r}")
        before, _, self.shown = self.shown.partition(text)
        return before

    def wait_asleep(self):
        """
        Wait until it waits, as it does for a key behind a prompt.

        Python's `input` heeds a signal that comes between its prompt and that wait only with the
        next key. A person is not so fast.
        """
        process = psutil.Process(self.pid)
        while process.status() == psutil.STATUS_RUNNING:
            time.sleep(0.001)

    def ended(self):
        """Return the exit code, once it has ended."""
        while True:
            try:
                if not os.read(self.screen, 4096):
                    break
            except OSError:
                break
        os.close(self.screen)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
