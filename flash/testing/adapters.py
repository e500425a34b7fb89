"""Adapters as if trained, in no time: drawn by a seed, and saved as a run saves them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


def make_adapter(  # noqa: PLR0913 - what tests vary
    model: Path,
    folder: Path,
    *,
    seed: int,
    size: float = 0.3,
    base: str | None = None,
    prompts: Sequence[str] = ("Say 0", "Say 1", "Say 2", "Say 3"),
    stop_sequences: Sequence[str] = (),
) -> Path:
    """
    Save an adapter of the model in the folder `model`, with its golden set; return its folder.

    `size` is how large its B matrices are: 0 for one that has not been trained. `base` is what it
    calls its model, default the folder.
    """
    import torch

    from flash.training.chat import ChatRenderer, Conversation, stop_tokens
    from flash.training.golden import GoldenMaker, openings
    from flash.training.hotpath import HotPath, TargetScores
    from flash.training.loading import attach_lora, load_base, save_adapter

    loaded, tokenizer = load_base(model)
    adapted = attach_lora(
        loaded, rank=4, alpha=8.0, targets="all-linear", base=base or str(model), seed=1
    )
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * size)
    stops = stop_tokens(tokenizer, loaded.generation_config)
    rows = [
        Conversation(name=text, opening=[{"role": "user", "content": text}], target=())
        for text in prompts
    ]

    def fail(reason: str) -> None:
        raise AssertionError(reason)

    maker = GoldenMaker(
        TargetScores(adapted, HotPath(), lambda _: None),
        tokenizer,
        openings(rows, ChatRenderer(tokenizer, stops, thinking=False)),
        thinking=False,
        stop_sequences=stop_sequences,
        stop=lambda: False,
        tell=fail,
    )
    save_adapter(adapted, folder, maker.make(adapted))
    return folder
