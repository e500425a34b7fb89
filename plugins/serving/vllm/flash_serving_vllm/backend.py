"""The backend: starts vLLM's server in its own interpreter, and asks it over its socket."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import time
from typing import TYPE_CHECKING, Any, Final

from flash.api import Address, FlashError, ModelUnavailable, UsageError
from flash.environ import worker_environment
from flash.server_process import SILENCE_S
from flash.training.vllm_server import RANKS, ServerOptions, VllmServer, find_python, room_for

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from flash.api import Message, ServedAdapter, ServedBase
    from flash_serving_vllm.config import VllmConfig

USUAL_RANK: Final = 32
"""What a server has room for at least, where no setting says it."""

MAX_LOGPROBS: Final = 20
"""OpenAI's limit of alternatives to a token."""

_FILES: Final = ("adapter_config.json", "adapter_model.safetensors")
_PROBE_S: Final = 120
_HAS_CUDA: Final = "import torch; raise SystemExit(0 if torch.cuda.is_available() else 3)"


class VllmBackend:
    """A `ServingBackend`; nothing of vLLM or torch is imported in its process."""

    def __init__(self, config: VllmConfig) -> None:
        self._config = config
        self._server: VllmServer | None = None
        self._max_rank = 0
        self._copies = itertools.count(1)
        self._in_use: dict[str, Path] = {}
        self._given_up: list[tuple[float, Path]] = []

    def interpreter(self) -> str:
        """Return the Python that has vLLM; raises `SpecError` where there is none."""
        return find_python(
            self._config.python,
            setting="serving.vllm.python",
            command="flash plugins setup vllm",
        )

    def start(self, base: ServedBase) -> Address:
        """Start the server, and return once the model is loaded and answers."""
        if self._server is not None:
            raise FlashError("the vLLM server runs already", hint="stop it first")
        python = self.interpreter()
        options = self._options(base, cuda=_has_cuda(python))
        try:
            self._server = VllmServer(python, options, base.log)
        except ModelUnavailable as error:
            raise ModelUnavailable(
                error.message,
                hint=f"{error.hint}; memory, context and types are set in [serving.vllm]",
            ) from error
        self._max_rank = self._config.max_lora_rank or options.max_rank
        return self._server.address

    def load(self, adapter: ServedAdapter) -> None:
        """
        Add an adapter; one of its name goes first, and the name is unknown for that moment.

        vLLM reads an adapter again when it has fallen out of its memory, and a file that is gone
        by then would end the server. So it reads a copy, which goes with the server, or once no
        request can be left that needs it. Each copy has a path of its own, because what vLLM keeps
        of prompts it has seen goes by name and path.
        """
        server = self._running
        self._refuse_rank(adapter)
        self.unload(adapter.name)
        folder = server.folder / f"adapter-{next(self._copies)}"
        try:
            _copy(adapter.folder, folder)
            asked = {"lora_name": adapter.name, "lora_path": str(folder)}
            server.ask("POST", "/v1/load_lora_adapter", asked, repeat=False)
        except BaseException:
            shutil.rmtree(folder)
            raise
        self._in_use[adapter.name] = folder

    def unload(self, name: str) -> None:
        """Remove an adapter; its requests under way end as they would have."""
        server = self._running
        if name in self._in_use:
            if name in _listed(server):
                server.ask("POST", "/v1/unload_lora_adapter", {"lora_name": name}, repeat=False)
            self._given_up.append((time.monotonic(), self._in_use.pop(name)))
        while self._given_up and self._given_up[0][0] < time.monotonic() - SILENCE_S:
            shutil.rmtree(self._given_up.pop(0)[1], ignore_errors=True)

    def tokens(
        self,
        model: str,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None,
        thinking: bool,
    ) -> Sequence[int]:
        """Return the prompt's tokens of a chat request that the server has answered."""
        asked = {
            "model": model,
            "messages": list(messages),
            "chat_template_kwargs": {"enable_thinking": thinking},
            "max_tokens": 1,
            "return_token_ids": True,
            **({"tools": list(tools)} if tools else {}),
        }
        answer = json.loads(self._running.ask("POST", "/v1/chat/completions", asked))
        return tuple(answer["prompt_token_ids"])

    def log_probs(
        self, model: str, prompt: Sequence[int], completion: Sequence[int]
    ) -> Sequence[float]:
        """Return the log-probability of each token of `completion`."""
        if not completion:
            return ()
        tokens = [*prompt, *completion]
        asked = {
            "model": model,
            "prompt": tokens,
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": 0,
        }
        answer = json.loads(self._running.ask("POST", "/v1/completions", asked))
        said = answer["choices"][0]["prompt_logprobs"]
        return tuple(
            said[place][str(tokens[place])]["logprob"] for place in range(len(prompt), len(tokens))
        )

    def health(self) -> None:
        """Return if the server answers."""
        self._running.check()

    def stop(self) -> None:
        """End the server; idempotent."""
        if self._server is not None:
            self._server.close()
            self._server = None
            self._in_use.clear()
            self._given_up.clear()

    @property
    def _running(self) -> VllmServer:
        if self._server is None:
            raise FlashError("the vLLM server is not running", hint="start it first")
        return self._server

    def _options(self, base: ServedBase, *, cuda: bool) -> ServerOptions:
        config = self._config
        rank = config.max_lora_rank or max(base.max_rank, USUAL_RANK)
        bounds = [bound for bound in (base.context_tokens, config.context_tokens) if bound]
        return ServerOptions(
            base=base.folder.absolute(),
            name=base.id,
            dtype=config.dtype or ("bfloat16" if cuda else "float32"),
            cuda=cuda,
            max_length=min(bounds, default=None),
            max_rank=room_for(rank) or RANKS[-1],
            max_loras=config.max_loras,
            cached_loras=config.max_cpu_loras,
            concurrent=config.max_rows or (256 if cuda else 64),
            logprobs_mode="raw_logprobs",
            max_logprobs=MAX_LOGPROBS,
            kv_cache_gib=config.kv_cache_gib,
            gpu_share=config.gpu_memory_utilization,
            switches=(
                "--enable-auto-tool-choice",
                f"--tool-call-parser={config.tool_call_parser}",
                # A call has the arguments that its tool declares, and not just any JSON.
                "--tool-strict-level=parameter",
                # Usage tells how much of a prompt was known.
                "--enable-prompt-tokens-details",
            ),
        )

    def _refuse_rank(self, adapter: ServedAdapter) -> None:
        if adapter.rank <= self._max_rank:
            return
        if adapter.rank > RANKS[-1]:
            hint = 'deploy it on the embedded backend, "transformers"'
        else:
            hint = f"set max_lora_rank = {adapter.rank} in [serving.vllm]"
        raise UsageError(
            f"the adapter {adapter.name} has rank {adapter.rank}, and the vLLM server takes "
            f"{self._max_rank} at most",
            hint=hint,
        )


def _has_cuda(python: str) -> bool:
    """Ask an interpreter whether its torch finds a GPU."""
    environment = worker_environment(os.environ)
    try:
        done = subprocess.run(
            [python, "-c", _HAS_CUDA],
            env=environment,
            capture_output=True,
            text=True,
            timeout=_PROBE_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ModelUnavailable(f"the interpreter {python} cannot be run: {error}") from error
    if done.returncode not in {0, 3}:
        raise ModelUnavailable(
            f"the interpreter {python} has no torch that runs: {done.stderr.strip()[-300:]}",
            hint="name the Python of an environment that has vLLM as python in [serving.vllm]",
        )
    return done.returncode == 0


def _copy(source: Path, folder: Path) -> None:
    """Put an adapter's files into a new folder, as hard links where that goes."""
    folder.mkdir()
    for name in _FILES:
        try:
            os.link(source / name, folder / name)
        except FileNotFoundError as error:
            raise UsageError(f"the adapter in {source} has no {name}") from error
        except OSError:
            shutil.copyfile(source / name, folder / name)


def _listed(server: VllmServer) -> set[str]:
    return {one["id"] for one in json.loads(server.ask("GET", "/v1/models"))["data"]}
