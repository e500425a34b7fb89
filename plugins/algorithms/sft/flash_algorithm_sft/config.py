"""The `[train]` table of SFT."""

from __future__ import annotations

import attrs

from flash.api import setting

ALL_LINEAR = "all-linear"


@attrs.frozen(kw_only=True)
class SftConfig:
    """
    Supervised fine-tuning of a LoRA adapter on the environment's target answers.

    The optimizer is AdamW without weight decay, gradients clipped at norm 1; the learning rate
    rises over the first 3 % of the steps and then falls linearly towards zero.
    """

    lora_rank: int = setting(32, doc="Rank of the adapter.", ge=1, le=1024)
    lora_alpha: float | None = setting(
        None,
        doc="Scale of the adapter, divided by the rank. The recipe takes twice the rank.",
        gt=0,
        recipe=True,
    )
    target_modules: str | tuple[str, ...] = setting(
        ALL_LINEAR,
        doc='Modules that get an adapter: "all-linear", or a list of names or endings of names.',
        non_empty=True,
        example=["q_proj", "v_proj"],
    )
    learning_rate: float | None = setting(
        None, doc="Peak learning rate. The recipe goes by model size.", gt=0, lt=1, recipe=True
    )
    batch_size: int | None = setting(
        None,
        doc="Examples per optimizer step. The recipe goes by the number of rows.",
        ge=1,
        recipe=True,
    )
    max_length: int | None = setting(
        None,
        doc="Longest row in tokens, up to its last trained one. Longer rows are left out whole, "
        "counted and reported.",
        ge=2,
        aliases=("max_context_tokens",),
        recipe=True,
    )
    epochs: int = setting(2, doc="Passes over the rows, unless `max_steps` is set.", ge=1)
    max_steps: int = setting(
        0,
        doc="Exact number of optimizer steps, however many passes that takes; 0 for `epochs`.",
        ge=0,
    )
    max_examples: int = setting(
        0, doc="Train on at most this many rows, drawn by the seed; 0 for all.", ge=0
    )
    save_every: int = setting(50, doc="Steps between checkpoints; the last step has one.", ge=1)
    save_at_steps: tuple[int, ...] = setting(
        (), doc="Further steps to save a checkpoint at, increasing.", example=[10, 25]
    )
    eval_every: int | None = setting(
        None,
        doc="Steps between held-out losses, of at most 64 rows drawn by the seed from the first "
        "split that is not trained on; the last step has one. A new best is saved as a "
        "checkpoint. The recipe takes `save_every`.",
        ge=1,
        recipe=True,
    )
    init_from_adapter: str | None = setting(
        None,
        doc="Start from this adapter instead of a fresh one: `<run>`, `<run>/step-N`, "
        "`<run>/best`, a folder or a Hugging Face id. Rank, alpha and modules are taken from it.",
        non_empty=True,
    )
