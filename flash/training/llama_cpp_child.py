"""
Asks llama.cpp, in a process that has it and nothing else of Flash: JSON in, JSON out.

A request names a `model` file and any of: `replay`, pairs of prompt and completion in tokens, to
which `log_probs` answers; `texts`, to which `tokens` does; `prompt` with `max_tokens`, greedily
continued as `answer`.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence


def main() -> None:
    """Answer the request on stdin."""
    request = json.loads(sys.stdin.read())
    # The library writes to both streams as it likes.
    answers = os.dup(1)
    os.dup2(2, 1)
    llama_cpp = importlib.import_module("llama_cpp")

    longest = max(
        (len(prompt) + len(said) for prompt, said in request.get("replay", [])), default=0
    )
    wanted = len(request.get("prompt", "")) + request.get("max_tokens", 0)
    model = llama_cpp.Llama(
        request["model"],
        n_ctx=max(longest, wanted, 512),
        logits_all="replay" in request,
        seed=0,
        verbose=False,
    )
    answer: dict[str, Any] = {}
    if "replay" in request:
        answer["log_probs"] = [_log_probs(model, *pair) for pair in request["replay"]]
    if "texts" in request:
        answer["tokens"] = [
            model.tokenize(text.encode(), add_bos=False, special=True) for text in request["texts"]
        ]
    if "prompt" in request:
        said = model.create_completion(
            model.tokenize(request["prompt"].encode(), add_bos=False, special=True),
            max_tokens=request["max_tokens"],
            temperature=0.0,
        )
        answer["answer"] = said["choices"][0]["text"]
    os.write(answers, json.dumps(answer).encode())


def _log_probs(model: Any, prompt: Sequence[int], completion: Sequence[int]) -> list[float]:
    import numpy as np

    model.reset()
    model.eval([*prompt, *completion])
    logits_CV = np.asarray(model.scores[len(prompt) - 1 : len(prompt) + len(completion) - 1], "f8")
    top_C1 = logits_CV.max(-1, keepdims=True)
    mass_C1 = np.log(np.exp(logits_CV - top_C1).sum(-1, keepdims=True)) + top_C1
    found = np.take_along_axis(logits_CV - mass_C1, np.asarray(completion)[:, None], -1)
    return [float(one) for one in found[:, 0]]


if __name__ == "__main__":
    main()
