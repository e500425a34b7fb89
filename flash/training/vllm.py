"""
Rollouts from a vLLM server of this process, whose adapter is replaced at every update.

What the server draws is not quite what the trainer would: other kernels, other roundings. Its
log-probabilities are kept, and whoever trains on them corrects for the gap (`on_policy` is False).
A completion depends on its prompt, its stream and the weights, and in rare near-ties on the
rounding of the batch that it was computed in.

Left out on purpose: merged full weights, several adapters at once, servers that somebody else
started.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TYPE_CHECKING, Any, Final

from flash.errors import FlashError, SpecError
from flash.training.generate import Endings
from flash.training.loading import save_adapter
from flash.training.sampler import Completion, Stopped
from flash.training.vllm_server import RANKS, ServerOptions, VllmServer, find_python, room_for
from flash.values import Problem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from flash.training.sampler import Prompt, Sampling

CONCURRENT: Final = 64
"""Most requests at a time, and most sequences that the server computes together."""

KV_CACHE_GIB: Final = 1
"""Memory for keys and values on CPU."""

GPU_SHARE: Final = 0.4
"""Of the device's memory; the trainer is on the same device."""

RAW, PROCESSED = "raw_logprobs", "processed_logprobs"


class VllmSampler:
    """
    The `flash.training.sampler.Sampler` of one training run.

    Attributes:
        on_policy: False.

    """

    on_policy = False

    def __init__(  # noqa: PLR0913 - what is trained, how it is drawn, and where a server finds it
        self,
        model: Any,
        tokenizer: Any,
        sampling: Sampling,
        *,
        base: Path,
        workdir: Path,
        max_length: int,
        python: str | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """
        Start the server and give it the active adapter of `model`, a PEFT model.

        Its log-probabilities are those of `sampling`, the sampling of training. `base` is the
        folder of the base model; prompt and completion have `max_length` tokens together.
        `workdir` takes the log and the adapters. `python` has vLLM, see `find_python`. Where
        `stop` says so, `Stopped` is raised once the answers under way are there. Raises
        `SpecError` for what vLLM cannot do, `ModelUnavailable` where it cannot serve the model.
        """
        self._mode = _log_probs_mode(sampling)
        self._tokenizer = tokenizer
        self._model = model
        self._workdir = workdir
        self._stop = stop
        self._max_rank = _room_for(_rank(model))
        self._updates = 0
        self._serving: str | None = None
        options = ServerOptions(
            base=base,
            name="base",
            dtype=str(model.dtype).removeprefix("torch."),
            cuda=model.device.type == "cuda",
            max_length=max_length,
            max_rank=self._max_rank,
            max_loras=1,
            cached_loras=2,
            concurrent=CONCURRENT,
            logprobs_mode=self._mode,
            max_logprobs=0,
            kv_cache_gib=KV_CACHE_GIB,
            gpu_share=GPU_SHARE,
        )
        workdir.mkdir(parents=True, exist_ok=True)
        self._server = VllmServer(find_python(python), options, workdir / "vllm.log")
        try:
            self.update(model)
        except BaseException:
            self.close()
            raise

    def sample(
        self, prompts: Sequence[Prompt], sampling: Sampling
    ) -> Iterator[tuple[int, Completion]]:
        """
        Yield each prompt's place in `prompts` with its completion, as they end.

        Raises `FlashError` where the server fails. Log-probabilities are left empty where
        `sampling` differs so from that of training that the server's would be others.
        """
        if not prompts:
            return
        endings = Endings(self._model, self._tokenizer, sampling.stop_sequences)
        with ThreadPoolExecutor(min(CONCURRENT, len(prompts)), "flash-vllm") as pool:
            asked = {
                pool.submit(self._complete, prompt, sampling, endings): place
                for place, prompt in enumerate(prompts)
            }
            try:
                for done in as_completed(asked):
                    if self._stop():
                        raise Stopped
                    yield asked[done], done.result()
            finally:
                for waiting in asked:
                    waiting.cancel()

    def update(self, model: Any) -> None:
        """Serve the weights of `model`'s adapter from now on."""
        if _rank(model) > self._max_rank:
            raise FlashError(
                f"the adapter has rank {_rank(model)} and the vLLM server was started for "
                f"{self._max_rank} at most"
            )
        # A new name each time: what vLLM keeps of prompts it has seen goes by the adapter's name.
        before, self._updates = self._serving, self._updates + 1
        name = f"adapter-{self._updates}"
        save_adapter(model, self._workdir / name)
        load = {"lora_name": name, "lora_path": str((self._workdir / name).absolute())}
        self._server.ask("POST", "/v1/load_lora_adapter", load)
        self._serving = name
        if before is not None:
            self._server.ask("POST", "/v1/unload_lora_adapter", {"lora_name": before})
            shutil.rmtree(self._workdir / before)

    def close(self) -> None:
        """End the server; idempotent."""
        self._server.close()

    def _complete(self, prompt: Prompt, sampling: Sampling, endings: Endings) -> Completion:
        request = {
            "model": self._serving,
            "prompt": list(prompt.tokens),
            "max_tokens": prompt.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": _seed(prompt.stream),
            "stop": endings.sequences,
            "stop_token_ids": sorted(endings.stops),
            "logprobs": 0,
            "return_token_ids": True,
        }
        answer = json.loads(self._server.ask("POST", "/v1/completions", request))
        choice = answer["choices"][0]
        tokens, log_probs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        if choice["finish_reason"] not in {"stop", "length"} or not _are_one_each(
            log_probs, tokens
        ):
            raise FlashError(
                f"the vLLM server's answer has {len(tokens)} tokens, the log-probabilities "
                f"{str(log_probs)[:200]}, and ends by {choice['finish_reason']!r}",
                hint="training may have diverged: lower train.learning_rate",
            )
        return Completion(
            tokens=tuple(tokens),
            text=endings.text(tokens[:-1] if tokens[-1] in endings.stops else tokens),
            truncated=choice["finish_reason"] == "length",
            log_probs=tuple(log_probs) if _are_exact(self._mode, sampling) else (),
        )


def _are_exact(mode: str, sampling: Sampling) -> bool:
    """
    Say whether vLLM's log-probabilities are those at the temperature, before `top_p` cuts.

    Its raw ones are taken before the temperature, its processed ones after the cut. Greedy
    drawing has neither, and counts as temperature 1.
    """
    if mode == RAW:
        return sampling.temperature in {0.0, 1.0}
    return sampling.temperature == 0 or sampling.top_p == 1


def _log_probs_mode(sampling: Sampling) -> str:
    exact = [mode for mode in (PROCESSED, RAW) if _are_exact(mode, sampling)]
    if not exact:
        what = "vLLM does not tell the log-probabilities of a temperature other than 1 before top_p"
        hint = 'set top_p = 1 or temperature = 1, or rollout = "built-in"'
        raise SpecError([Problem("train.top_p", what)], hint=hint)
    return exact[0]


def _rank(model: Any) -> int:
    config = model.peft_config["default"]
    return int(max([config.r, *config.rank_pattern.values()]))


def _room_for(rank: int) -> int:
    room = room_for(rank)
    if room is None:
        what = f"vLLM serves adapters up to rank {RANKS[-1]}, and this one has {rank}"
        raise SpecError(
            [Problem("train.lora_rank", what)], hint='lower it, or set rollout = "built-in"'
        )
    return room


def _seed(stream: str) -> int:
    """Return the seed of a random stream: 63 bits, which is what vLLM takes."""
    return int.from_bytes(hashlib.sha256(stream.encode()).digest()[:8], "big") >> 1


def _are_one_each(log_probs: Sequence[float | None], tokens: Sequence[int]) -> bool:
    return len(log_probs) == len(tokens) > 0 and all(
        number is not None and math.isfinite(number) for number in log_probs
    )
