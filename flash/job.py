"""
The job: the frozen manifest that a worker executes, `job.json` in the run's store.

It carries a digest of itself, so that a file that was edited after the submit is told from the one
that was planned, checked and recorded: it is refused, by the supervisor and by the worker.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any, Final

import attrs

from flash import __version__
from flash.errors import StoreError
from flash.files import store_error

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from flash.plan import Plan
    from flash.plugins import PluginHost
    from flash.warm_start import Adapter

FORMAT: Final = 2
_DIGEST: Final = "digest"
_BEFORE_DIGESTS: Final = 1


@attrs.frozen(kw_only=True)
class Job:
    """
    Everything that decides what a run does, and no secret.

    Attributes:
        run: the run's id.
        spec: the resolved spec as plain data.
        plugins: `kind/name` -> distribution and version, of each plugin that takes part.
        algorithm: import string of the worker entry.
        environment: plugin, reference and digest of the snapshot, and the revision where it was
            fetched.
        model: id, and the plugin that brings it.
        provider: names of the places where it may run, in order.
        sinks: names of the sinks.
        steps: optimizer steps, where they can be known before the rows are loaded.
        memory_gib: what a machine must offer; 0 where it is not known.
        secrets: names of the secrets that the worker is given.
        warm_start: reference and folder of the adapter to start from, and its revision where it
            was fetched; or None.
        flash: the version that wrote this.
        format: of this file; a newer one is refused.

    """

    run: str
    spec: dict[str, Any]
    plugins: dict[str, dict[str, str]]
    algorithm: str
    environment: dict[str, str]
    model: dict[str, str]
    provider: tuple[str, ...]
    sinks: tuple[str, ...]
    steps: int | None
    memory_gib: float
    secrets: tuple[str, ...]
    warm_start: dict[str, str] | None
    flash: str = __version__
    format: int = FORMAT

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; `from_dict` gives the job back."""
        data = attrs.asdict(self, recurse=False)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in data.items()}

    def to_json(self) -> bytes:
        """Return the file's content: the same bytes for the same job."""
        data = self.to_dict()
        whole = {**data, _DIGEST: _digest(data)}
        text = json.dumps(whole, indent=1, ensure_ascii=False, allow_nan=False)
        return f"{text}\n".encode()

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Job:
        """
        Read what `to_dict` wrote.

        Raises `StoreError` for another format and for data that is not a job's.
        """
        # cattrs is not wanted where a job is only built.
        from flash.spec.layers import clean
        from flash.spec.strict import Reader

        _refuse_newer(data)
        given = {k: v for k, v in data.items() if k != _DIGEST} if isinstance(data, dict) else data
        cleaned, unfit = clean(given)
        job, problems = Reader().read(cls, cleaned, ())
        if problems or unfit:
            listed = "; ".join(map(str, [*unfit, *problems]))
            raise StoreError(f"job.json is damaged: {listed}", hint="submit the run again")
        result: Job = job
        return result


def read_job(path: Path) -> dict[str, Any]:
    """
    Return the manifest as plain data, which `Job.from_dict` reads.

    Raises `StoreError` where the file is gone, damaged, of a newer Flash, or not as it was
    submitted.
    """
    try:
        manifest = json.loads(path.read_bytes())
    except OSError as error:
        raise store_error("read", path, error) from error
    except (ValueError, RecursionError) as error:
        message = f"{path} is damaged: {error}"
        raise StoreError(message, hint="submit the run again") from error
    if not isinstance(manifest, dict):
        raise StoreError(f"{path} is damaged: it is no job", hint="submit the run again")
    _refuse_newer(manifest)
    named = manifest.pop(_DIGEST, None)
    if named != _digest(manifest) and manifest.get("format") != _BEFORE_DIGESTS:
        message = f"{path} is not what was submitted: it was changed afterwards"
        raise StoreError(message, hint="change the TOML instead, and submit it as a new run")
    return manifest


def _refuse_newer(data: object) -> None:
    number = data.get("format") if isinstance(data, dict) else None
    if isinstance(data, dict) and isinstance(number, int) and number > FORMAT:
        raise StoreError(
            f"the job was written by a newer Flash ({data.get('flash')}) in format {number}; "
            f"this one reads format {FORMAT}",
            hint="upgrade flash-core here",
        )


def _digest(data: Mapping[str, Any]) -> str:
    content = json.dumps(data, sort_keys=True, separators=(",", ":")).encode()
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def make_job(plan: Plan, host: PluginHost, *, run: str, digest: str) -> Job:
    """
    Freeze a plan without errors into the job of `run`; `digest` is the environment snapshot's.

    Raises `SpecError` for a plan that cannot be submitted.
    """
    from flash.rewards import adapters_of
    from flash.spec.model import spec_to_dict

    spec = plan.check()
    if plan.model is None or plan.environment is None:
        message = "a plan without errors names its model and its environment"
        raise AssertionError(message)
    taking_part = [
        ("algorithm", spec.algorithm),
        ("environment", plan.environment.plugin),
        ("model", plan.model.plugin),
        *(("provider", name) for name in plan.providers),
        *(("reward", name) for name in adapters_of(spec.reward)),
        *(("sink", name) for name in spec.sink),
    ]
    owners = {f"{kind}/{name}": host.owner(kind, name) for kind, name in taking_part}
    return Job(
        run=run,
        spec=spec_to_dict(spec),
        plugins={
            key: {"distribution": owner.distribution, "version": owner.version}
            for key, owner in owners.items()
        },
        algorithm=host.get("algorithm", spec.algorithm).worker,
        environment={
            "plugin": plan.environment.plugin,
            "reference": plan.environment.reference,
            "digest": digest,
            **({"revision": plan.environment.revision} if plan.environment.revision else {}),
        },
        model={"id": plan.model.id, "plugin": plan.model.plugin},
        provider=tuple(plan.providers),
        sinks=tuple(spec.sink),
        steps=plan.need.steps if plan.need else None,
        memory_gib=plan.need.memory_gib if plan.need else 0.0,
        secrets=tuple(plan.secrets),
        warm_start=_warm_start(plan.warm_start) if plan.warm_start else None,
    )


def _warm_start(adapter: Adapter) -> dict[str, str]:
    return {
        "ref": adapter.reference,
        "folder": str(adapter.folder),
        **({"revision": adapter.revision} if adapter.revision else {}),
    }
