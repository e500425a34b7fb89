"""
A server that belongs to this process: on a private socket, behind a key, ended with its holder.

Model servers open routes that ask for no key, so one listens on a socket in a folder that only
this user may enter, and on no port; its random key goes by environment variable, never by command
line. It gets a worker's harmless variables and none of the environment's secrets. It ends with
this process, however that ends (`flash.leash`).
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from flash.environ import worker_environment
from flash.errors import FlashError, ModelUnavailable
from flash.values import Address

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

START_S: Final = 900
"""How long a server may take to load its model; on CUDA it compiles too."""

SILENCE_S: Final = 1800
"""How long one request may take."""

WAITS_S: Final = (0.5, 1.0, 2.0, 4.0)
"""What is waited before each repetition of a request that failed for a passing reason."""

_LAUNCH: Final = ("FLASH_LAUNCH",)
"""By these a provider knows the processes of a launch, when all that started them are gone."""

_LONGEST_FOLDER: Final = 64
"""vLLM makes sockets of its own there, with 37 characters more; a socket's path has 107."""

_PASSING: Final = frozenset({408, 429, 500, 502, 503, 504})
_LEASH: Final = Path(__file__).with_name("leash.py")
_ERROR: Final = re.compile(r"\b[\w.]*(?:Error|Exception)\b: .+")


class ServerProcess:
    """
    One server, from its start to `close`.

    Made when it answers `GET /health`; raises `ModelUnavailable` with the last words of its log
    where it ends before.
    """

    def __init__(
        self,
        name: str,
        command: Callable[[Path], Sequence[str]],
        *,
        log: Path,
        key_variable: str,
        environment: Mapping[str, str],
        start_s: float = START_S,
    ) -> None:
        """
        Start `command(socket)`; `name` is what errors call it.

        It finds its key in `key_variable`, the `environment` beside the harmless variables, and
        in TMPDIR a folder that is removed with it. Its output is appended to `log`.
        """
        self._name = name
        self._log = log
        self._key = secrets.token_urlsafe(32)
        self._folder = _private_folder()
        self._socket = self._folder / "socket"
        mark = {name: os.environ[name] for name in _LAUNCH if name in os.environ}
        ours = {"TMPDIR": str(self._folder), key_variable: self._key, **environment}
        descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "ab") as output:
            self._leash = subprocess.Popen(
                [sys.executable, "-I", _LEASH, self._folder, *command(self._socket)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                cwd=self._folder,
                env=worker_environment(os.environ) | mark | ours,
                start_new_session=True,
            )
        try:
            self._await_health(start_s)
        except BaseException:
            self.close()
            raise

    @property
    def address(self) -> Address:
        """Where it speaks the OpenAI API."""
        return Address("http://localhost/v1", self._key, self._socket)

    @property
    def folder(self) -> Path:
        """Where its socket is; only this user may enter it, and it is removed with the server."""
        return self._folder

    def ask(
        self,
        method: str,
        path: str,
        content: Any = None,
        *,
        silence_s: float = SILENCE_S,
        repeat: bool = True,
    ) -> bytes:
        """
        Return the body of a good answer; from any thread.

        What may pass by itself is repeated a few times, unless `repeat` is False. Raises
        `FlashError`, in the server's words where it has refused, and with the last words of its
        log where it has failed.
        """
        for wait_s in (*(WAITS_S if repeat else ()), None):
            try:
                status, body = self._send(method, path, content, silence_s)
            except (OSError, http.client.HTTPException) as error:
                said = f"{type(error).__name__}: {error}"
            else:
                if status == http.HTTPStatus.OK:
                    return body
                said = f"{status}: {body.decode(errors='replace')[:500]}"
                if status not in _PASSING:
                    raise FlashError(f"{self._name} refuses {path}: {said}", hint=self._hint)
            if wait_s is None or self._leash.poll() is not None:
                break
            time.sleep(wait_s)
        raise FlashError(
            f"{self._name} fails at {path}: {said}{self.last_words()}", hint=self._hint
        )

    def check(self, silence_s: float = 10) -> None:
        """Return if it answers; raise `FlashError` with the last words of its log if not."""
        code = self._leash.poll()
        if code is not None:
            message = f"{self._name} ended with code {code}{self.last_words()}"
            raise FlashError(message, hint=self._hint)
        if not self._is_healthy(silence_s):
            message = f"{self._name} does not answer within {silence_s:g} s{self.last_words()}"
            raise FlashError(message, hint=self._hint)

    def close(self) -> None:
        """End the server and every process of it; idempotent."""
        if self._leash.stdin and not self._leash.stdin.closed:
            self._leash.stdin.close()
        self._leash.wait()
        if self._folder.exists():  # the leash was killed
            _end_processes_in(self._folder)
            shutil.rmtree(self._folder, ignore_errors=True)

    def last_words(self) -> str:
        """Return the end of the log: its errors, each once, or else its last lines."""
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        failures = (line for line in lines if " WARNING " not in line)
        errors = [found[0] for line in failures if (found := _ERROR.search(line))]
        said = list(dict.fromkeys(errors))[-3:] or [line for line in lines if line.strip()][-5:]
        return "".join(f"\n  {line[:300]}" for line in said)

    @property
    def _hint(self) -> str:
        return f"the server's log is {self._log}"

    def _await_health(self, start_s: float) -> None:
        deadline = time.monotonic() + start_s
        while not self._is_healthy(SILENCE_S):
            code = self._leash.poll()
            if code is not None or time.monotonic() > deadline:
                what = f"ended with code {code}" if code is not None else "was not ready in time"
                raise ModelUnavailable(
                    f"{self._name} {what} as it started{self.last_words()}", hint=self._hint
                )
            time.sleep(0.1)

    def _is_healthy(self, silence_s: float) -> bool:
        try:
            return self._send("GET", "/health", None, silence_s)[0] == http.HTTPStatus.OK
        except (OSError, http.client.HTTPException):
            return False

    def _send(self, method: str, path: str, content: Any, silence_s: float) -> tuple[int, bytes]:
        connection = UnixConnection(self._socket, silence_s)
        try:
            headers = {
                "Authorization": f"Bearer {self._key}",
                "Content-Type": "application/json",
            }
            body = None if content is None else json.dumps(content)
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()


def _end_processes_in(folder: Path) -> None:
    """Kill what of a server is left: its processes work in its folder."""
    for directory in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):  # somebody else's, or just gone
            if directory.readlink() == folder.resolve():
                os.kill(int(directory.parent.name), signal.SIGKILL)


def _private_folder() -> Path:
    """Return a new folder that only this user may enter, where TMPDIR points if that is short."""
    base = tempfile.gettempdir()
    where = (
        base if len(os.fsencode(base)) + len("/flash-serve-12345678") <= _LONGEST_FOLDER else None
    )
    return Path(tempfile.mkdtemp(prefix="flash-serve-", dir=where or "/tmp"))  # noqa: S108 - only the folder made there is used


class UnixConnection(http.client.HTTPConnection):
    """A connection to the server that listens on a Unix socket."""

    def __init__(self, path: Path, silence_s: float) -> None:
        super().__init__("localhost", timeout=silence_s)
        self._path = str(path)

    def connect(self) -> None:
        """Connect to the socket; `http.client` calls it."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)
