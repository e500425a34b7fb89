"""
Rows of different adapters in one forward: every linear layer adds each row's own low-rank part.

A step's tokens lie in an order that `Mixture.arrange` decides. Rows that share an adapter with many
others, and pieces of prompts, are each a stretch of tokens with a product of their own. The others'
adapters are stacked, and one batched product answers all of them. A stack outlives the steps: an
adapter is copied into it when it first decodes, and not again while it stays.

Letters: N tokens of the step, S slots of the stack, C rows of a slot, I and O a layer's widths,
R rank.
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import torch

from flash.training.onednn import has_onednn, packed, product

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from flash_serving_transformers.adapters import Adapter

_STACKED = 3
"""So many adapters are worth a stack; fewer have a product each."""


class Mixture:
    """
    The adapters of one step's tokens, and the linear layers of the model that ask for them.

    Making it changes the model: its linear layers compute by `_forward` from then on, and their
    weights are laid out for the fastest product there is.
    """

    def __init__(self, model: Any) -> None:
        """Take over the linear layers of `model`."""
        self.tokens = 0
        self.linears: dict[str, torch.nn.Linear] = {}
        self._partial: set[str] = set()
        self._pieces: list[tuple[int, int, Adapter]] = []
        self._group: _Group | None = None
        self._stack = _Stack()
        head = model.get_output_embeddings()
        for path, module in model.named_modules():
            if module is head and type(head) is torch.nn.Linear and has_onednn(head):
                _compute_by(head, partial(product, head.weight, head.bias))
            elif type(module) is torch.nn.Linear and module is not head:
                self.linears[path] = module
                _compute_by(module, partial(self._forward, path, _quick(module)))
        self._uncalled = set(self.linears)

    def settle(self) -> None:
        """
        Keep as `linears` those that saw every token of the calls so far.

        A layer that is called with a choice of the tokens, such as an expert, cannot tell whose
        they are, and has no adapter here.
        """
        for path in self._partial | self._uncalled:
            self.linears.pop(path, None)

    def arrange(self, decoding: Sequence[Adapter | None]) -> list[int]:
        """Choose the order of the rows that decode, one token each; later calls rely on it."""
        rows_of: dict[Adapter | None, list[int]] = defaultdict(list)
        for row, adapter in enumerate(decoding):
            rows_of[adapter].append(row)
        order = rows_of.pop(None, [])
        self._pieces = []
        stacked = _worth_stacking(rows_of)
        for adapter, rows in rows_of.items():
            if adapter not in stacked:
                self._piece(adapter, len(order), len(rows))
                order += rows
        self._group = None
        if stacked:
            slots = self._stack.hold(stacked)
            members: list[list[int]] = [[] for _ in range(max(slots.values()) + 1)]
            start = len(order)
            for adapter in sorted(stacked, key=lambda one: slots[one]):
                count = len(rows_of[adapter])
                members[slots[adapter]] = [len(order) - start + at for at in range(count)]
                order += rows_of[adapter]
            device = next(iter(stacked[0].parts.values()))[0].device
            self._group = _Group.of(members, start, len(order), device)
        self.tokens = len(order)
        return order

    def append(self, adapter: Adapter | None, tokens: int) -> None:
        """Put a piece of a prompt behind what there is."""
        self._piece(adapter, self.tokens, tokens)
        self.tokens += tokens

    def keep(self, adapters: Collection[Adapter | None]) -> None:
        """Let go of all other adapters' weights."""
        self._stack.keep(adapters)

    def _piece(self, adapter: Adapter | None, start: int, tokens: int) -> None:
        if adapter is None:
            return
        end = start + tokens
        if self._pieces and self._pieces[-1][1:] == (start, adapter):
            start = self._pieces.pop()[0]
        self._pieces.append((start, end, adapter))

    def _forward(
        self, path: str, base: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor
    ) -> torch.Tensor:
        """Return what the layer `path` makes of `x`, one row of it a token of the step."""
        y = base(x)
        self._uncalled.discard(path)
        if x.numel() != self.tokens * x.shape[-1]:
            self._partial.add(path)
        elif self._pieces or self._group is not None:
            x_NI, y_NO = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
            for start, end, adapter in self._pieces:
                if path in adapter.parts:
                    a_IR, b_RO = adapter.parts[path]
                    y_NO[start:end].addmm_(x_NI[start:end] @ a_IR, b_RO)
            if self._group is not None and path in self._stack.parts:
                self._group.add(*self._stack.parts[path], x_NI, y_NO)
        return y


@attrs.frozen
class _Group:
    """
    Tokens `start` to `end` of a step, by the slots of the stack.

    Where a slot has fewer rows than another, `gather` gives each as many, and `back` undoes that.
    """

    start: int
    end: int
    slots: int
    gather: torch.Tensor | None
    back: torch.Tensor | None

    @classmethod
    def of(cls, members: list[list[int]], start: int, end: int, device: torch.device) -> _Group:
        """Make it from each slot's rows, counted from `start`."""
        most = max(map(len, members))
        if all(len(rows) == most for rows in members):
            return cls(start, end, len(members), None, None)
        gather = [row for rows in members for row in (rows + [0] * most)[:most]]
        back = [slot * most + at for slot, rows in enumerate(members) for at in range(len(rows))]
        return cls(
            start,
            end,
            len(members),
            torch.tensor(gather, device=device),
            torch.tensor(back, device=device),
        )

    def add(
        self, a_SIR: torch.Tensor, b_SRO: torch.Tensor, x_NI: torch.Tensor, y_NO: torch.Tensor
    ) -> None:
        """Add every row's low-rank part of `x` to its `y`."""
        x, y = x_NI[self.start : self.end], y_NO[self.start : self.end]
        a_SIR, b_SRO = a_SIR[: self.slots], b_SRO[: self.slots]
        if self.gather is None or self.back is None:
            low_SCR = x.view(self.slots, -1, x.shape[-1]) @ a_SIR
            y.view(self.slots, -1, y.shape[-1]).baddbmm_(low_SCR, b_SRO)
        else:
            x_SCI = x.index_select(0, self.gather).view(self.slots, -1, x.shape[-1])
            more_SCO = (x_SCI @ a_SIR) @ b_SRO
            y += more_SCO.view(-1, y.shape[-1]).index_select(0, self.back)


class _Stack:
    """Adapters side by side, padded to one rank: `parts` has each layer's A as SIR, B as SRO."""

    def __init__(self) -> None:
        self.parts: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._slots: list[Adapter | None] = []
        self._rank = 0

    def hold(self, adapters: Sequence[Adapter]) -> dict[Adapter, int]:
        """Return the slot of each of these, which are in the stack from now on."""
        wanted = set(adapters)
        missing = [one for one in adapters if one not in self._slots]
        free = [at for at, held in enumerate(self._slots) if held not in wanted]
        last = max((at for at, held in enumerate(self._slots) if held in wanted), default=-1)
        sparse = last + 1 > 2 * len(adapters)
        too_narrow = max(one.rank for one in adapters) > self._rank
        if len(missing) > len(free) or too_narrow or sparse:
            self._renew(adapters)
        else:
            for slot, adapter in zip(free, missing, strict=False):
                self._put(slot, adapter)
        return {one: at for at, one in enumerate(self._slots) if one in wanted}

    def keep(self, adapters: Collection[Adapter | None]) -> None:
        """Empty the slots of all others."""
        self._slots = [held if held in adapters else None for held in self._slots]

    def _renew(self, adapters: Sequence[Adapter]) -> None:
        room = 1 << (len(adapters) - 1).bit_length()
        self._rank = max(one.rank for one in adapters)
        self._slots = [None] * room
        self.parts = {}
        for slot, adapter in enumerate(adapters):
            self._put(slot, adapter)

    def _put(self, slot: int, adapter: Adapter) -> None:
        self._slots[slot] = adapter
        for path, (a_IR, b_RO) in adapter.parts.items():
            if path not in self.parts:
                slots = len(self._slots)
                self.parts[path] = (
                    a_IR.new_zeros(slots, len(a_IR), self._rank),
                    b_RO.new_zeros(slots, self._rank, b_RO.shape[1]),
                )
        for path, (a_SIR, b_SRO) in self.parts.items():
            if path not in adapter.parts:
                b_SRO[slot] = 0
                continue
            a_IR, b_RO = adapter.parts[path]
            rank = len(b_RO)
            a_SIR[slot, :, :rank] = a_IR
            a_SIR[slot, :, rank:] = 0
            b_SRO[slot, :rank] = b_RO
            b_SRO[slot, rank:] = 0


def _worth_stacking(rows_of: Mapping[Any, Sequence[int]]) -> list[Adapter]:
    """Return the adapters to answer by one batched product, in which few rows are padding."""
    stacked = sorted(rows_of, key=lambda adapter: len(rows_of[adapter]))
    while stacked:
        rows = sum(len(rows_of[one]) for one in stacked)
        if len(stacked) * len(rows_of[stacked[-1]]) <= 2 * rows:
            break
        stacked.pop()
    return stacked if len(stacked) >= _STACKED else []


def _compute_by(module: Any, forward: Callable[[torch.Tensor], torch.Tensor]) -> None:
    module.forward = forward


def _quick(linear: torch.nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the layer's product, in oneDNN's layout where that is at hand."""
    weight_OI, bias_O = linear.weight.detach(), linear.bias
    if not has_onednn(linear):
        return partial(torch.nn.functional.linear, weight=weight_OI, bias=bias_O)
    laid_out = packed(weight_OI)
    # Nothing reads the weight itself any more: the memory of two copies is not kept.
    linear.weight = torch.nn.Parameter(weight_OI.new_empty(0), requires_grad=False)
    return partial(product, laid_out, bias_O)
