"""
The gate of a deploy: whether a server serves what was trained, before any client reaches it.

    check   before anything is loaded: every byte as it was saved, an adapter of this base model
    prove   on the live server: the tokens of training's chat template, the golden set's
            log-probabilities, and a first answer over the address that requests go to

What is found goes into a report, figures and seconds, whether or not it holds.
"""

from __future__ import annotations

import contextlib
import http
import math
import time
from typing import TYPE_CHECKING, Any, Final

import attrs

from flash.adapters import Adapter, check_fits, read_adapter
from flash.errors import FlashError, StoreError
from flash.gateway.asking import ask
from flash.parity import GoldenSet, compare, other_from
from flash.plane.copies import digest_of
from flash.plugins import boundary
from flash.worker.checkpoints import MANIFEST, CheckpointStore, damaged_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from flash.gateway.live import Live
    from flash.parity import Golden, Parity
    from flash.plane.deployments import Deployment
    from flash.values import ServedAdapter

SMOKE_TOKENS: Final = 16
SAME_TOKEN: Final = 0.05
"""Nats: a greedy token as likely as the golden one is taken for the same token."""

BUSY_S: Final = (0.5, 1.0, 2.0, 4.0, 8.0)
"""What is waited before each repetition of a first answer for which the server has no room."""

_BUSY: Final = frozenset({429, 503})
_SHOWN: Final = 300


@attrs.frozen
class Checked:
    """An adapter that may be loaded, and the golden set that it will be known by."""

    adapter: Adapter
    golden: GoldenSet | None


@attrs.define
class Report:
    """What the gate has found so far; `seconds` of each step, and of its server's start."""

    parity: Parity | None = None
    golden: bool = False
    prompts: int = 0
    drift_allowed: bool = False
    smoke: Mapping[str, Any] | None = None
    seconds: dict[str, float] = attrs.field(factory=dict)

    @contextlib.contextmanager
    def timing(self, step: str) -> Iterator[None]:
        """Note how long a step took, also one that fails."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[step] = round(time.monotonic() - started, 3)

    def to_json(self) -> dict[str, Any]:
        """Return plain data; a figure that is no finite number is None."""
        parity = None
        if self.parity is not None:
            figures = attrs.asdict(self.parity).items()
            parity = {name: value if math.isfinite(value) else None for name, value in figures}
            parity["holds"] = self.parity.holds
            parity["proves_identity"] = self.parity.proves_identity
        return {
            "golden": self.golden,
            "prompts": self.prompts,
            "parity": parity,
            "drift_allowed": self.drift_allowed,
            "smoke": self.smoke,
            "seconds": self.seconds,
        }


def check(deployment: Deployment, folder: Path, base: Path) -> Checked:
    """
    Return what is known of the adapter in `folder`, for the base model in `base`.

    Raises `FlashError` for a file that is not as it was saved, and for an adapter that does not
    fit; nothing was loaded then.
    """
    damaged = damaged_file(folder)
    copy = CheckpointStore(folder.parent).final()
    if damaged is None and (copy is None or digest_of(copy) != deployment.digest):
        damaged = MANIFEST
    if damaged is not None:
        raise StoreError(
            f"{folder / damaged} is not what was deployed: it has changed since",
            hint=f"copy it anew: flash undeploy {deployment.id}, then deploy it again",
        )
    adapter = read_adapter(folder)
    check_fits(adapter, base)
    return Checked(adapter, GoldenSet.read(folder))


class Gate:
    """The proof of one adapter on one live server; `report` grows with it."""

    def __init__(self, deployment: Deployment, golden: GoldenSet | None, live: Live) -> None:
        self.report = Report(golden=golden is not None)
        self.report.seconds["start"] = round(live.start_s, 3)
        self._deployment = deployment
        self._golden = golden
        self._backend = live.backend
        self._address = live.address
        self._log_probs = "logprobs" in live.fields

    def load(self, adapter: ServedAdapter) -> None:
        """Load it."""
        with self.report.timing("load"), boundary(self._deployment.backend, "load"):
            self._backend.load(adapter)

    def prove(self) -> None:
        """Hold what is loaded against training; raises `FlashError` where it is another."""
        if self._golden is not None and self._golden.prompts:
            self.report.prompts = len(self._golden.prompts)
            with self.report.timing("template"):
                for number, one in enumerate(self._golden.prompts, 1):
                    self._check_template(number, one)
            with self.report.timing("parity"):
                self._check_parity(self._golden)
        with self.report.timing("smoke"):
            self._smoke(self._golden.prompts[0] if self.report.prompts and self._golden else None)

    def _check_template(self, number: int, one: Golden) -> None:
        thinking = self._deployment.thinking
        with boundary(self._deployment.backend, "tokens"):
            found = self._backend.tokens(
                self._deployment.id, one.messages, tools=one.tools, thinking=thinking
            )
        at = other_from(one, found)
        if at is None:
            return
        raise FlashError(
            f"the server's chat template is not that of training: of golden prompt {number} it "
            f"makes {len(found)} tokens, training made {len(one.prompt)}; they differ from token "
            f"{at + 1} on",
            hint="the tokenizer or chat template of the base model's folder, or `thinking`, "
            "is another",
        )

    def _check_parity(self, golden: GoldenSet) -> None:
        parity = compare(
            golden, self._replay(self._deployment.id), self._replay(self._deployment.model["id"])
        )
        self.report.parity = parity
        if parity.holds:
            return
        figures = (
            f"its log-probabilities of {parity.tokens} golden tokens are off by "
            f"{parity.mean:.2g} nats on average and {parity.largest:.2g} at most, where "
            f"{parity.limit_mean:.2g} and {parity.limit_largest:.2g} are allowed (the bare base "
            f"model: {parity.noise_mean:.2g} and {parity.noise_largest:.2g}; the adapter itself "
            f"changes {parity.change_mean:.2g})"
        )
        if not all(math.isfinite(one) for one in (parity.mean, parity.noise_mean)):
            raise FlashError(
                f"the server does not say finite log-probabilities of the golden set: {figures}",
                hint="the server computes nonsense: try another dtype or device in its settings",
            )
        if not self._deployment.allow_drift:
            served = "what is served is not what was trained"
            what = "the base model is not that of training" if parity.foreign else served
            raise FlashError(f"{what}: {figures}", hint="--allow-drift serves it nevertheless")
        self.report.drift_allowed = True

    def _replay(self, model: str) -> Callable[[Sequence[int], Sequence[int]], Sequence[float]]:
        def log_probs(prompt: Sequence[int], completion: Sequence[int]) -> Sequence[float]:
            with boundary(self._deployment.backend, "log_probs"):
                return self._backend.log_probs(model, prompt, completion)

        return log_probs

    def _smoke(self, one: Golden | None) -> None:
        """Have a first answer over HTTP, as a client would get it."""
        body: dict[str, Any] = {
            "model": self._deployment.id,
            "messages": one.messages if one else [{"role": "user", "content": "Hello"}],
            "max_tokens": min(SMOKE_TOKENS, max(1, len(one.completion))) if one else SMOKE_TOKENS,
            "temperature": 0,
            "chat_template_kwargs": {"enable_thinking": self._deployment.thinking},
        }
        if one and one.tools:
            body["tools"] = one.tools
        if self._log_probs:
            body["logprobs"] = True
        for pause_s in (*BUSY_S, None):
            status, answer = ask(self._address, "/chat/completions", body)
            if status not in _BUSY or pause_s is None:
                break
            time.sleep(pause_s)
        try:
            if status != http.HTTPStatus.OK:
                raise FlashError(f"its first answer is an error: {status} {_said(answer)}")
            tokens = int(answer["usage"]["completion_tokens"])
            entries = (answer["choices"][0].get("logprobs") or {}).get("content") or []
            found = [float(entry["logprob"]) for entry in entries]
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise FlashError(f"its first answer is no chat completion: {error!r}") from error
        if tokens < 1 or (self._log_probs and not found):
            raise FlashError("its first answer has no token")
        if not all(map(math.isfinite, found)):
            raise FlashError("its first answer has log-probabilities that are no numbers")
        wanted = list(one.log_probs[: len(found)]) if one else []
        agreeing = _agreeing(found, wanted)
        self.report.smoke = {"tokens": tokens, "compared": len(wanted), "agreeing": agreeing}


def _said(answer: Any) -> str:
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    message = error.get("message", error) if isinstance(error, dict) else error
    return str(message)[:_SHOWN]


def _agreeing(found: Sequence[float], wanted: Sequence[float]) -> int:
    """
    Return how many of the first greedy tokens are as likely as the golden ones.

    The golden completion is greedy too: the same model gives the same tokens, of the same
    likelihood, until two are as likely but for rounding.
    """
    pairs = zip(found, wanted, strict=False)
    differing = (index for index, (a, b) in enumerate(pairs) if abs(a - b) > SAME_TOKEN)
    return next(differing, min(len(found), len(wanted)))
