"""
Between episodes and TRL's tensors.

The letters, beyond the package's legend: B episodes of a pass, P tokens of the longest opening,
T tokens of the longest completion. Openings are padded on the left, completions on the right.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from flash.training.packing import IGNORED, Document

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flash.training.head import TokenScores
    from flash.training.packing import Row
    from flash_algorithm_grpo.practice import Sample

_RATIO_MOST = 2.0
"""
Bound of the importance ratio that corrects for an engine with other numbers, token by token.

Truncated importance sampling: Yao et al., Your Efficient RL Framework Secretly Brings You
Off-Policy RL Training, 2025, https://fengyao.notion.site/off-policy-rl.
"""


def passes(
    groups: Sequence[Sequence[Sample]],
    *,
    episodes: int,
    pad: int,
    device: torch.device,
) -> list[dict[str, torch.Tensor]]:
    """Return the inputs of TRL's loss, `episodes` of one group a pass."""
    # All tokens of the step that carry loss.
    trained = float(sum(sum(sample.sampled) for group in groups for sample in group))
    return [
        {
            name: tensor.to(device)
            for name, tensor in _inputs(group[at : at + episodes], pad).items()
        }
        | {"num_items_in_batch": torch.tensor(trained, device=device)}
        for group in groups
        for at in range(0, len(group), episodes)
    ]


def _inputs(samples: Sequence[Sample], pad: int) -> dict[str, torch.Tensor]:
    openings = [sample.opening for sample in samples]
    width = max(map(len, openings))
    completions = [sample.completion for sample in samples]
    return {
        "prompt_ids": torch.tensor([[pad] * (width - len(one)) + [*one] for one in openings]),
        "prompt_mask": torch.tensor(
            [[0] * (width - len(one)) + [1] * len(one) for one in openings]
        ),
        "completion_ids": _right(completions, pad),
        "completion_mask": _right([[1] * len(one) for one in completions], 0),
        "tool_mask": _right([sample.sampled for sample in samples], 0),
        "sampling_per_token_logps": _right([sample.log_probs for sample in samples], 0.0),
        "advantages": _right([sample.advantages for sample in samples], 0.0),
    }


def _right(rows: Sequence[Sequence[float]], pad: float) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows])


def documents_of(inputs: dict[str, torch.Tensor]) -> list[Document]:
    """Return each episode of a pass as a document whose sampled tokens are trained."""
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "tool_mask")
    documents = []
    for ids, mask, tokens, there, sampled in zip(
        *(inputs[name].tolist() for name in names), strict=True
    ):
        opening = [token for token, real in zip(ids, mask, strict=True) if real]
        said = tokens[: sum(there)]
        labels = [
            token if drawn else IGNORED
            for token, drawn in zip(said, sampled[: len(said)], strict=True)
        ]
        documents.append(Document([*opening, *said], [*[IGNORED] * len(opening), *labels]))
    return documents


def completion_log_probs(
    inputs: dict[str, torch.Tensor], rows: Sequence[Row], found: Sequence[TokenScores]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Put the scores of packed rows back where their tokens stand: (B, T), 0 where none is trained.

    `rows` hold the documents of `documents_of(inputs)`, each with its sampled tokens as targets.
    """
    sampled_BT = inputs["tool_mask"].bool()
    if not rows:  # no episode of the pass was scored
        nothing_BT = torch.zeros_like(inputs["sampling_per_token_logps"])
        return nothing_BT, nothing_BT
    places = torch.cat(
        [
            torch.stack([torch.full_like(at, document), at])
            for row in rows
            for document in row.documents
            for at in [sampled_BT[document].nonzero()[:, 0]]
        ],
        dim=1,
    )
    log_probs_K = torch.cat([scores.log_probs_K for scores in found])
    log_probs_BT = log_probs_K.new_zeros(sampled_BT.shape).index_put(tuple(places), log_probs_K)
    entropies = [scores.entropy_K for scores in found if scores.entropy_K is not None]
    if not entropies:
        return log_probs_BT, None
    entropy_K = torch.cat(entropies)
    return log_probs_BT, entropy_K.new_zeros(sampled_BT.shape).index_put(tuple(places), entropy_K)


def importance_ratio(log_probs_BT: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return how much likelier the trainer finds each token than the engine that drew it."""
    gap_BT = (log_probs_BT - inputs["sampling_per_token_logps"]) * inputs["tool_mask"]
    return gap_BT.exp().clamp(max=_RATIO_MOST)
