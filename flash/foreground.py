"""
The caller's side of a foreground task: a child process that loads user code, torch and models.

The CLI's own process never imports any of them, and user code sees only the secrets it was
promised. The child has a session of its own and is killed with all it started when the caller
leaves, by Ctrl-C too. Where the caller is killed, or its terminal closed, the child sees to that.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flash.environ import worker_environment
from flash.environments import snapshot
from flash.errors import EnvironmentFault, FlashError, PluginError
from flash.spec.strict import Reader

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from flash.environments import Located
    from flash.home import FlashHome
    from flash.spec.model import EnvironmentTable

_LOG_LINES = 20


def call(
    task: str,
    request: Mapping[str, Any],
    *,
    home: FlashHome,
    secrets: Mapping[str, str],
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """
    Return what a task of the worker does: check, evaluate, export, fetch, preview or test.

    The environment is `request["environment"]`, where the task has one. As in a run, it is loaded
    from a copy without what a snapshot leaves out, and with its `[worker_env]`; what is reported
    names its own folder.

    Raises the error that the child reported, with its exit code, or `FlashError` with the last
    lines of its log when it died without a word.
    """
    asked = request.get("environment")
    own = asked["env"] if asked else {}
    environ = worker_environment(os.environ) | own | {"FLASH_HOME": str(home.root)}
    with (
        tempfile.TemporaryDirectory(prefix="flash-", ignore_cleanup_errors=True) as scratch,
        tempfile.TemporaryFile() as log,
    ):
        copy = str(Path(scratch).resolve() / "environment")
        given = {"request": dict(request), "secrets": dict(secrets), "scratch": scratch}
        if asked:
            snapshot(Path(asked["folder"]), Path(copy))
            given["request"] = {**request, "environment": {**asked, "folder": copy}}
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "flash.worker", task],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environ,
            start_new_session=True,
        )
        try:
            renamed = (copy, asked["folder"] if asked else copy)
            answer = _converse(child, given, progress, renamed=renamed)
        finally:
            # Its answer is all that is wanted of it: threads and hooks of user code may never end.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
            code = child.wait()
        if "result" in answer:
            return dict(answer["result"])
        if "error" in answer:
            raise _error(answer["error"])
        log.seek(0)
        tail = log.read().decode("utf-8", "replace").splitlines()[-_LOG_LINES:]
        raise FlashError(
            f"the {task} process ended without an answer (exit code {code})",
            hint="its last lines:\n" + "\n".join(tail) if tail else None,
        )


def environment_request(
    table: EnvironmentTable,
    located: Located,
    worker_env: Mapping[str, str],
    reward: Mapping[str, Any] = types.MappingProxyType({}),
) -> dict[str, Any]:
    """
    Return what a task is told of its environment; `located` has been fetched.

    `reward` are the spec's `[reward.*]` tables. What their adapters can use belongs into the
    secrets of the task, see `flash.rewards.secrets_of`.
    """
    return {
        "plugin": located.plugin,
        "folder": str(located.folder),
        "params": table.params,
        "pip": list(table.pip),
        "split": table.split,
        "secrets": list(table.secrets),
        "reward": Reader().plain(dict(reward)),
        "env": dict(worker_env),
    }


def _converse(
    child: subprocess.Popen[bytes],
    given: Mapping[str, Any],
    progress: Callable[[str], None],
    *,
    renamed: tuple[str, str],
) -> dict[str, Any]:
    """Return the child's answer; of the two paths in `renamed` the first is told as the second."""
    copy, original = (json.dumps(path)[1:-1].encode() for path in renamed)
    assert child.stdin is not None  # noqa: S101 - both were asked for as pipes
    assert child.stdout is not None  # noqa: S101
    with contextlib.suppress(BrokenPipeError):
        child.stdin.write(json.dumps(given).encode())
    with contextlib.suppress(BrokenPipeError):
        child.stdin.close()
    for line in child.stdout:
        answer = json.loads(line.replace(copy, original))
        if "progress" not in answer:
            return dict(answer)
        progress(answer["progress"])
    return {}


def _error(reported: Mapping[str, Any]) -> FlashError:
    kind = {2: EnvironmentFault, 3: PluginError}.get(reported["exit_code"], FlashError)
    return kind(reported["message"], hint=reported["hint"])
