"""
The worker's side of a foreground task: user code runs here and never in the user's own CLI process.

Answers are JSON lines on the original stdout: `{"progress": …}` while it works, then one
`{"result": …}` or `{"error": {…}}`. What user code prints goes to stderr.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from flash.environments import folder_digest
from flash.errors import FlashError, UsageError
from flash.files import disk_error
from flash.home import FlashHome
from flash.plugins import PluginHost
from flash.spec.model import read_reward_tables
from flash.worker.loading import load_environment, open_model

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import TextIO

    from flash.contracts import Environment
    from flash.spec.secrets import Redactor


_LOOK_S: Final = 0.5


def run_task(name: str, given: Mapping[str, Any], answers: TextIO, redactor: Redactor) -> int:
    """Run the task `name` with `given["request"]` and `given["secrets"]`; return the exit code."""

    def answer(**line: Any) -> None:
        answers.write(redactor.redact(json.dumps(line)) + "\n")

    try:
        task = _TASKS.get(name)
        if task is None:
            raise UsageError(f"the worker knows no task {name!r}")  # noqa: TRY301 - one exit
        answer(result=task(given["request"], given["secrets"], lambda text: answer(progress=text)))
    except BaseException as error:  # noqa: BLE001 - the boundary: a crash or sys.exit() is an answer too
        known = error if isinstance(error, FlashError) else disk_error(error)
        if known is None:
            traceback.print_exc()
            known = FlashError(f"{type(error).__name__}: {error}")
        answer(error={"message": known.message, "hint": known.hint, "exit_code": known.exit_code})
        return known.exit_code
    return 0


def leave_with_caller(scratch: Path) -> None:
    """
    Have this process killed, with all of its group, when the caller that started it is gone.

    `scratch`, the caller's folder for this task, is removed first, as the caller would have.
    """
    caller = os.getppid()

    def watch() -> None:
        while os.getppid() == caller:
            time.sleep(_LOOK_S)
        shutil.rmtree(scratch, ignore_errors=True)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, name="flash-caller", daemon=True).start()


def environment_of(
    request: Mapping[str, Any], secrets: Mapping[str, str], report: Callable[[str], None]
) -> Environment:
    """
    Load the environment that `request["environment"]` names by plugin, folder, params, split, pip.

    Of the task's secrets it gets those that are named there, and no other. Its score is the one of
    the `[reward.*]` tables there.
    """
    asked = request["environment"]
    home = FlashHome.from_environment()
    host = PluginHost.default(home)
    return load_environment(
        host,
        home,
        plugin=asked["plugin"],
        folder=Path(asked["folder"]),
        params=asked["params"],
        split=asked["split"],
        pip=asked["pip"],
        secrets={name: secrets[name] for name in asked["secrets"]},
        reward=read_reward_tables(asked["reward"], host),
        reward_secrets=secrets,
        report=report,
    )


def _check(
    request: Mapping[str, Any], secrets: Mapping[str, str], report: Callable[[str], None]
) -> dict[str, Any]:
    """
    Load the environment, read its split and open its first episode.

    Anything wrong is raised by the loader with file and line; returns the number of its rows, and
    the digest of what was checked.
    """
    asked = request["environment"]
    digest = folder_digest(Path(asked["folder"]))  # before user code may write there
    environment = environment_of(request, secrets, report)
    tasks = environment.tasks(asked["split"])
    environment.start(tasks[0])
    return {
        "digest": digest,
        "rows": len(tasks),
        "splits": list(environment.splits()),
        "targets": environment.target(tasks[0]) is not None,
    }


def _evaluate(
    request: Mapping[str, Any], secrets: Mapping[str, str], report: Callable[[str], None]
) -> dict[str, Any]:
    from flash.endpoint import Endpoint
    from flash.evaluate import Evaluation, evaluate

    asked = request["environment"]
    digest = folder_digest(Path(asked["folder"]))  # before user code may write there
    environment = environment_of(request, secrets, report)
    adapter = Path(request["adapter"]) if request["adapter"] else None
    if endpoint := request["endpoint"]:
        key = secrets.get(endpoint["key"])
        model: Path | Endpoint = Endpoint(endpoint["url"], endpoint["model"], key)
    else:
        model = _model_of(request["model"], secrets, report)
    settings = Evaluation(
        model=model, adapter=adapter, trained_on=asked["split"], **request["settings"]
    )
    return evaluate(settings, environment, report) | {
        "digest": digest,
        "adapter": folder_digest(adapter) if adapter else None,
    }


def _preview(
    request: Mapping[str, Any], secrets: Mapping[str, str], report: Callable[[str], None]
) -> dict[str, Any]:
    from flash.training.preview import preview

    environment = environment_of(request, secrets, report)
    return preview(
        environment,
        split=request["split"],
        model=_model_of(request["model"], secrets, report),
        thinking=request["thinking"],
        count=request["count"],
    )


def _test(
    request: Mapping[str, Any], secrets: Mapping[str, str], report: Callable[[str], None]
) -> dict[str, Any]:
    from flash.workbench.doctor import Asked, diagnose
    from flash.workbench.process import record_missing
    from flash.workbench.sampled import Sampling

    model, environment = request["model"], request["environment"]
    asked = Asked(
        folder=Path(environment["folder"]),
        split=environment["split"],
        ours=[*environment["secrets"], str(FlashHome.from_environment().root)],
        missed=record_missing(),
        sampling=Sampling(**request["sampling"]),
        **request["settings"],
    )
    return diagnose(
        asked,
        lambda: environment_of(request, secrets, report),
        (lambda: _model_of(model, secrets, report)) if model else None,
        report,
    )


def _export(
    request: Mapping[str, Any], secrets: Mapping[str, str], report: Callable[[str], None]
) -> dict[str, Any]:
    """Write what the adapter and its base model make together into the folder `target`."""
    base = _model_of(request["model"], secrets, report)
    adapter, target = Path(request["adapter"]), Path(request["target"])
    if request["format"] == "merged":
        from flash.training.export import export_merged

        return export_merged(adapter, base, target, report, allow_drift=request["allow_drift"])
    from flash.training.gguf import export_gguf

    return export_gguf(
        adapter,
        base,
        target / request["file"],
        report,
        tools=Path(request["tools"]),
        allow_drift=request["allow_drift"],
    )


def _fetch(
    request: Mapping[str, Any], secrets: Mapping[str, str], report: Callable[[str], None]
) -> dict[str, Any]:
    """Have the base model on this machine's disk."""
    return {"folder": str(_model_of(request["model"], secrets, report))}


def _model_of(
    named: Mapping[str, str], secrets: Mapping[str, str], report: Callable[[str], None]
) -> Path:
    """Return the folder of the model that a request names by id and plugin."""
    home = FlashHome.from_environment()
    host = PluginHost.default(home)
    declared = host.get("model", named["plugin"]).secrets
    folder, _ = open_model(
        host,
        home,
        plugin=named["plugin"],
        model=named["id"],
        secrets={name: value for name, value in secrets.items() if name in declared},
        report=report,
    )
    return folder


_TASKS = {
    "check": _check,
    "evaluate": _evaluate,
    "export": _export,
    "fetch": _fetch,
    "preview": _preview,
    "test": _test,
}
