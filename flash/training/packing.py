"""
Documents into rows: no padding, exact boundaries, shared openings computed once.

A row is a sequence of groups. The documents of a group begin with the same tokens (a system
prompt, a GRPO prompt); the group lays them out as one prefix followed by one branch each:

    documents   a b c d   a b c e f   x y      (the first two share "a b c")
    row         a b c | d | e f | x y
    positions   0 1 2 | 3 | 3 4 | 0 1

Attention (`flash.training.attention`) lets a branch see its own group's prefix and itself, so
every number is the one that the document alone would give, and the prefix's gradient is the sum
over its documents.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

IGNORED = -100
"""The label of a position that is not trained, as everywhere in transformers."""

_LEAST_SHARED = 8
"""Shorter common openings are not worth the longer way through attention."""


@attrs.frozen(eq=False)
class Document:
    """
    One rendered row: its tokens and, for each, itself where it is trained or `IGNORED`.

    The first token has nothing before it to predict it from, so its label never counts.
    `sources` are the positions that predict the trained tokens.
    """

    tokens: list[int]
    labels: list[int]
    sources: list[int] = attrs.field(init=False)

    @sources.default
    def _find_sources(self) -> list[int]:
        return [at - 1 for at, label in enumerate(self.labels) if at and label != IGNORED]

    @property
    def inputs(self) -> list[int]:
        """The tokens that the model must read: what follows the last source changes nothing."""
        return self.tokens[: self.sources[-1] + 1] if self.sources else []


@attrs.frozen
class Group:
    """Lengths of a shared prefix (0 where there is none) and of the branches behind it."""

    prefix: int
    branches: tuple[int, ...]


@attrs.frozen
class Segments:
    """How a row is divided: what the attention function is told."""

    groups: tuple[Group, ...]

    @property
    def lengths(self) -> list[int]:
        """The lengths of all pieces of the row, in order."""
        return [
            length
            for group in self.groups
            for length in ((group.prefix, *group.branches) if group.prefix else group.branches)
        ]


@attrs.frozen(eq=False)
class Row:
    """
    One packed row, ready for the model.

    `sources_K` are the positions in the row whose hidden states predict `targets_K`; one at the
    end of a prefix occurs once for each branch. They stand document by document, and `documents`
    are those documents' places among the ones that were packed. `tokens` counts the documents'
    tokens as if nothing were shared or left out: the useful tokens.
    """

    tokens_BN: torch.Tensor
    positions_BN: torch.Tensor
    segments: Segments
    sources_K: torch.Tensor
    targets_K: torch.Tensor
    documents: tuple[int, ...]
    tokens: int

    def to(self, device: torch.device) -> Row:
        """Return the row on `device`."""
        return attrs.evolve(
            self,
            tokens_BN=self.tokens_BN.to(device),
            positions_BN=self.positions_BN.to(device),
            sources_K=self.sources_K.to(device),
            targets_K=self.targets_K.to(device),
        )


def pack(documents: Iterable[Document], *, budget: int, share: bool = True) -> list[Row]:
    """
    Pack `documents` into rows of at most `budget` tokens, greedily.

    A document longer than the budget gets a row of its own; one without a trained token has no
    part in any loss and is left out. Documents are taken in the order of their tokens, which
    brings common openings together and changes nothing but the order of a sum.
    """
    rows: list[list[_Sharing]] = []
    size = 0
    for place, document in sorted(_trained(documents), key=lambda one: one[1].tokens):
        alone = _Sharing((document,), (place,), 0)
        last = rows[-1][-1] if rows else alone
        grown = last.joined(alone) if rows and share else None
        if grown is not None and size - last.size + grown.size <= budget:
            rows[-1][-1] = grown
            size += grown.size - last.size
        elif rows and size + alone.size <= budget:
            rows[-1].append(alone)
            size += alone.size
        else:
            rows.append([alone])
            size = alone.size
    return [_row(groups) for groups in rows]


def one_by_one(documents: Iterable[Document]) -> list[Row]:
    """Return a row for each document, for models that cannot keep segments apart."""
    return [_row([_Sharing((document,), (place,), 0)]) for place, document in _trained(documents)]


def _trained(documents: Iterable[Document]) -> Iterator[tuple[int, Document]]:
    return ((place, document) for place, document in enumerate(documents) if document.sources)


@attrs.frozen
class _Sharing:
    """Documents, with their places among all, that will share their first `prefix` tokens."""

    documents: tuple[Document, ...]
    places: tuple[int, ...]
    prefix: int

    @property
    def size(self) -> int:
        """Tokens of the row that the group takes."""
        tokens = sum(len(document.inputs) for document in self.documents)
        return tokens - (len(self.documents) - 1) * self.prefix

    def joined(self, alone: _Sharing) -> _Sharing | None:
        """Return the group with the one document of `alone`, or None where apart is shorter."""
        # In sorted order, what a document shares with the last it shares with all that do.
        (document,) = alone.documents
        prefix = _common(self.documents[-1].inputs, document.inputs)
        if len(self.documents) > 1:
            prefix = min(prefix, self.prefix)
        grown = _Sharing((*self.documents, document), self.places + alone.places, prefix)
        pays = prefix >= _LEAST_SHARED and grown.size <= self.size + len(document.inputs)
        return grown if pays else None


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Count the leading tokens that both share, leaving each at least one of its own."""
    longest = min(len(one), len(other)) - 1
    return next((at for at in range(longest) if one[at] != other[at]), max(longest, 0))


def _row(groups: Sequence[_Sharing]) -> Row:
    tokens: list[int] = []
    positions: list[int] = []
    sources: list[int] = []
    targets: list[int] = []
    layout = []
    for group in groups:
        first = len(tokens)
        tokens += group.documents[0].inputs[: group.prefix]
        positions += range(group.prefix)
        for document in group.documents:
            inputs = document.inputs
            # Position p of this document is at p + offset in the row, or in the shared prefix.
            offset = len(tokens) - group.prefix
            for at in document.sources:
                sources.append(at + (first if at < group.prefix else offset))
                targets.append(document.labels[at + 1])
            tokens += inputs[group.prefix :]
            positions += range(group.prefix, len(inputs))
        branches = tuple(len(document.inputs) - group.prefix for document in group.documents)
        layout.append(Group(group.prefix, branches))
    return Row(
        tokens_BN=torch.tensor([tokens]),
        positions_BN=torch.tensor([positions]),
        segments=Segments(tuple(layout)),
        sources_K=torch.tensor(sources),
        targets_K=torch.tensor(targets),
        documents=tuple(place for group in groups for place in group.places),
        tokens=sum(len(document.tokens) for group in groups for document in group.documents),
    )
