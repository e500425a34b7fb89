"""
The way of a training step through the model, with shortcuts that are proven before they are used.

`TargetScores` turns documents into the log-probabilities of their trained tokens: what the plain
model computes on each document alone. Where a model does not allow a shortcut the plain way is
taken and the reason told; a trial on the loaded model decides (`flash.training.trial`), no list of
names.

Left out: the balancing loss of mixtures of experts. The router is frozen under LoRA, and without
it losses compare between models.
"""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any

import attrs

from flash.training import attention, lora, trial
from flash.training.head import TokenScores, linear_scores, logits_scores
from flash.training.packing import one_by_one, pack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from flash.training.packing import Document, Row


@attrs.frozen
class HotPath:
    """
    Which shortcuts to take; with all off it is transformers' and PEFT's own code.

    Attributes:
        packing: documents of a micro-batch in one row, with exact boundaries.
        sharing: openings that documents share are computed once; needs `packing`.
        head: the language-model head in chunks, and only where a token is trained.
        lora: each LoRA layer as one autograd function.

    """

    packing: bool = True
    sharing: bool = True
    head: bool = True
    lora: bool = True


class TargetScores:
    """
    The log-probabilities of trained tokens on one model.

    `model` is a causal language model, in PEFT or not. Its forward gets one more keyword, `row`,
    so that they can be had through whatever wraps the model for several processes. `tell`
    gets a sentence for each shortcut that this model does not allow.
    """

    def __init__(self, model: Any, path: HotPath, tell: Callable[[str], None]) -> None:
        self._causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._plain = self._causal.forward
        self._shares = path.sharing
        if path.lora:
            lora.fuse(model)
        self._packs = path.packing
        if self._packs and (reason := trial.why_not_packed(self._causal)):
            tell(f"one document a forward, not packed: {reason}")
            self._packs = False
        self._heads = path.head
        if self._heads and (reason := trial.why_own_head(self._causal)):
            tell(f"the model's own head computes the logits: {reason}")
            self._heads = False
        self._bind()

    def rows(self, documents: Iterable[Document], *, budget: int) -> list[Row]:
        """Return rows that hold `documents`, each of at most `budget` tokens where they pack."""
        if self._packs:
            return pack(documents, budget=budget, share=self._shares)
        return one_by_one(documents)

    def __call__(
        self, model: Any, row: Row, *, temperature: float = 1.0, entropy: bool = False
    ) -> TokenScores:
        """Return the scores of the row's targets; `model` may be wrapped."""
        return TokenScores(
            *model(row=row.to(self._causal.device), temperature=temperature, entropy=entropy)
        )

    def _bind(self) -> None:
        @functools.wraps(self._plain)
        def forward(
            *args: Any,
            row: Row | None = None,
            temperature: float = 1.0,
            entropy: bool = False,
            **kwargs: Any,  # with a row, nothing: PEFT names every input that there could be
        ) -> Any:
            if row is None:
                return self._plain(*args, **kwargs)
            scores = self._scores(row, temperature=temperature, entropy=entropy)
            # A tuple, because what wraps the model looks for tensors in what it returns.
            return attrs.astuple(scores, recurse=False)

        self._causal.forward = forward

    def _scores(self, row: Row, **how: Any) -> TokenScores:
        inputs: dict[str, Any] = {"input_ids": row.tokens_BN, "use_cache": False}
        if self._packs:
            inputs |= attention.row_inputs(row)
        if self._heads:
            hidden_NW = self._causal.base_model(**inputs).last_hidden_state[0]
            out = self._causal.get_output_embeddings()
            hidden_KW = hidden_NW.index_select(0, row.sources_K)
            return linear_scores(hidden_KW, out.weight, out.bias, row.targets_K, **how)
        if "logits_to_keep" in inspect.signature(self._plain).parameters:
            # A source may occur several times, at the end of a prompt that documents share.
            logits_KV = self._plain(**inputs, logits_to_keep=row.sources_K).logits[0]
        else:
            logits_KV = self._plain(**inputs).logits[0].index_select(0, row.sources_K)
        return logits_scores(logits_KV, row.targets_K, **how)
