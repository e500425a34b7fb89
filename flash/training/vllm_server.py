"""vLLM's server in an interpreter of its own: arguments, environment (`flash.server_process`)."""

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

RANKS: Final = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The largest ranks that vLLM can make room for."""

MAIN: Final = Path(__file__).with_name("vllm_main.py")
"""What vLLM's interpreter runs."""

STAMP: Final = "flash-setup.txt"
"""In an environment that `flash.training.vllm_setup` has made to its end: what is installed."""


@attrs.frozen(kw_only=True)
class ServerOptions:
    """
    What is served, and how.

    Attributes:
        base: the base model's folder.
        name: what requests call the base model.
        dtype: vLLM's name of the type to compute in.
        cuda: whether it computes on a GPU.
        max_length: most tokens of prompt and answer together; None for as many as the model knows
            and the memory for keys and values holds.
        max_rank: one of `RANKS`.
        max_loras: most adapters in one batch; each has its room whether it is there or not.
        cached_loras: most adapters in main memory; others are read from their folder again.
        concurrent: most sequences that are computed together.
        logprobs_mode: vLLM's.
        max_logprobs: most alternatives to a token that a request may ask for.
        kv_cache_gib: memory for keys and values on CPU, where vLLM takes what it is told.
        gpu_share: what it takes of a GPU's memory, for everything.
        switches: more arguments.

    """

    base: Path
    name: str
    dtype: str
    cuda: bool
    max_length: int | None
    max_rank: int
    max_loras: int
    cached_loras: int
    concurrent: int
    logprobs_mode: str
    max_logprobs: int
    kv_cache_gib: int
    gpu_share: float
    switches: Sequence[str] = ()


def find_python(
    asked: str | None,
    *,
    setting: str = "train.vllm_python",
    command: str = "python -m flash.training.vllm_setup",
) -> str:
    """
    Return the interpreter that has vLLM.

    That is the one `asked` for; else this one, where it has vLLM; else the one that
    `flash.training.vllm_setup` has made. Raises `SpecError`, which names the `setting` that asks
    and the `command` that sets up.
    """
    made = made_environment()
    if asked is not None:
        found, what = Path(asked).expanduser(), f"there is no interpreter {asked}"
    elif find_spec("vllm") is not None:
        return sys.executable
    else:
        found = made / "bin" / "python"
        what = "vLLM is neither installed here nor set up beside Flash"
    half_made = asked is None and not (made / STAMP).exists()
    if half_made or not os.access(found, os.X_OK):
        raise SpecError(
            [Problem(setting, what)],
            hint=f"set it up with `{command}`, or name the Python of an environment that has vLLM",
        )
    return str(found.absolute())


def made_environment() -> Path:
    """Return the folder in Flash's home for an environment that has vLLM."""
    return FlashHome.from_environment().root / "vllm"


class VllmServer(ServerProcess):
    """A vLLM server that serves one base model and adapters of it."""

    def __init__(self, python: str, options: ServerOptions, log: Path) -> None:
        super().__init__(
            "the vLLM server",
            lambda socket: [python, *_arguments(options, socket)],
            log=log,
            key_variable="VLLM_API_KEY",
            environment=_environment(options),
        )


def room_for(rank: int) -> int | None:
    """Return the least of vLLM's ranks that takes `rank`, or None where there is none."""
    return next((room for room in RANKS if room >= rank), None)


def _arguments(options: ServerOptions, socket: Path) -> Sequence[str]:
    listed = {
        "model": options.base,
        "served-model-name": options.name,
        "uds": socket,
        "dtype": options.dtype,
        "max-model-len": options.max_length or -1,
        "max-num-seqs": options.concurrent,
        "max-lora-rank": options.max_rank,
        "max-loras": options.max_loras,
        "max-cpu-loras": options.cached_loras,
        # Not the model's own defaults: what a request leaves open is drawn as it is.
        "generation-config": "vllm",
        "logprobs-mode": options.logprobs_mode,
        "max-logprobs": options.max_logprobs,
    }
    switches = [
        *("--enable-lora", "--disable-log-stats", "--disable-uvicorn-access-log"),
        *options.switches,
    ]
    if options.cuda:
        listed["gpu-memory-utilization"] = options.gpu_share
    else:
        # A seeded request whose prompt is computed in parts ends vLLM 0.32 on CPU ("CPU
        # Generator does not use offset"), so one step must hold any prompt whole; where no length
        # is given, vLLM sees to that.
        if options.max_length is not None:
            listed["max-num-batched-tokens"] = max(4096, options.max_length)
        switches += ["--enforce-eager", "--no-enable-chunked-prefill"]
    return [
        str(MAIN),
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
            "VLLM_CPU_KVCACHE_SPACE": str(options.kv_cache_gib),
            # No core is kept from the server: who starts it waits for it.
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
            # The rank of a drawn token, which nobody asks for, would need a C++ compiler.
            "TORCHDYNAMO_DISABLE": "1",
        }
    return ours
