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
import secrets
import sys
import urllib.request
from typing import Any

_CERTAIN = 1e4
"""Added to a token's logit, which then is drawn whatever the model says."""


def main() -> None:
    """Answer the request on stdin."""
    request = json.loads(sys.stdin.read())
    # The library writes to both streams as it likes.
    answers = os.dup(1)
    os.dup2(2, 1)
    longest = max(
        (len(prompt) + len(said) for prompt, said in request.get("replay", [])), default=0
    )
    wanted = len(request.get("prompt", "")) + request.get("max_tokens", 0)
    model = Model(request["model"], max(longest, wanted, 512))
    answer: dict[str, Any] = {}
    if "replay" in request:
        answer["log_probs"] = [model.log_probs(*pair) for pair in request["replay"]]
    if "texts" in request:
        answer["tokens"] = [model.tokens(text) for text in request["texts"]]
    if "prompt" in request:
        prompt, most = model.tokens(request["prompt"]), request["max_tokens"]
        answer["answer"] = model.continued(prompt, n_predict=most)["text"]
    os.write(answers, json.dumps(answer).encode())


class Model:
    """A model file in llama.cpp's own server, which only this process has the key of."""

    def __init__(self, path: str, context_tokens: int) -> None:
        """Load it."""
        library = importlib.import_module("xllamacpp")
        self._key = secrets.token_urlsafe(32)
        params = library.CommonParams()
        params.model.path = path
        params.n_ctx = context_tokens
        params.n_parallel = 1
        params.warmup = False
        params.port = 0
        params.api_keys = [self._key]
        self._server = library.Server(params)

    def tokens(self, text: str) -> list[int]:
        """Return the tokens of a text as the file's own vocabulary reads it."""
        asked = urllib.request.Request(  # noqa: S310 - the server of this process
            f"{self._server.listening_address}/tokenize",
            data=json.dumps(
                {"content": text, "add_special": False, "parse_special": True}
            ).encode(),
            headers={"Authorization": f"Bearer {self._key}", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(asked) as answer:  # noqa: S310 - as above
            tokens: list[int] = json.load(answer)["tokens"]
            return tokens

    def log_probs(self, prompt: list[int], completion: list[int]) -> list[float]:
        """Return the log-probability of each token of `completion` behind those before it."""
        found = []
        for at, token in enumerate(completion):
            before = [*prompt, *completion[:at]]
            # What is said of a token is the model's own, before any bias.
            said = self.continued(before, n_predict=1, n_probs=1, logit_bias=[[token, _CERTAIN]])
            (drawn,) = said["logprobs"]["content"]
            if drawn["id"] != token:
                sys.exit(f"llama.cpp drew token {drawn['id']} where only {token} could come")
            found.append(float(drawn["logprob"]))
        return found

    def continued(self, prompt: list[int], **how: Any) -> dict[str, Any]:
        """Return what comes behind the tokens, the likeliest each time."""
        said = self._server.handle_completions({"prompt": prompt, "temperature": 0.0, **how})
        if "choices" not in said:
            sys.exit(f"llama.cpp does not answer: {said}")
        choice: dict[str, Any] = said["choices"][0]
        return choice


if __name__ == "__main__":
    main()
