"""The `[train]` table of GRPO."""

from __future__ import annotations

import attrs

from flash.api import setting

LOSSES = ("dapo", "dr_grpo", "grpo", "bnpo", "gspo", "cispo", "sapo")


@attrs.frozen(kw_only=True)
class GrpoConfig:
    """
    Reinforcement learning of a LoRA adapter on the environment's reward.

    Each step samples `group_size` completions for each of `batch_size` prompts, scores them, and
    favours those that did better than their group. The optimizer is AdamW without weight decay,
    gradients clipped at norm 1, at a constant learning rate.
    """

    lora_rank: int = setting(32, doc="Rank of the adapter.", ge=1, le=1024)
    lora_alpha: float | None = setting(
        None,
        doc="Scale of the adapter, divided by the rank. The recipe takes twice the rank.",
        gt=0,
        recipe=True,
    )
    target_modules: str | tuple[str, ...] = setting(
        "all-linear",
        doc='Modules that get an adapter: "all-linear", or a list of names or endings of names.',
        non_empty=True,
        example=["q_proj", "v_proj"],
    )
    learning_rate: float | None = setting(
        None, doc="Learning rate. The recipe goes by model size.", gt=0, lt=1, recipe=True
    )
    steps: int = setting(150, doc="Optimizer steps.", ge=1)
    batch_size: int = setting(8, doc="Prompts per step.", ge=1, aliases=("prompts_per_step",))
    group_size: int = setting(
        8, doc="Completions sampled for each prompt; at least 2, since they are compared.", ge=1
    )
    temperature: float = setting(
        1.0, doc="Of the sampling; above 0, since equal completions teach nothing.", ge=0
    )
    top_p: float = setting(
        1.0, doc="Sample from the likeliest tokens with this mass only.", gt=0, le=1
    )
    max_tokens: int | None = setting(
        None,
        doc="Most tokens of one turn, a thinking trace included.",
        ge=1,
        aliases=("max_completion_tokens",),
        recipe=True,
    )
    max_length: int | None = setting(
        None,
        doc="Most tokens of an episode: prompt, turns and what the environment says between them. "
        "Prompts that leave no room for a turn are left out, counted and reported.",
        ge=2,
        aliases=("max_context_tokens",),
        recipe=True,
    )
    stop_sequences: str | tuple[str, ...] = setting(
        (), doc="A turn ends as soon as its text holds one of these.", example=["</answer>"]
    )
    kl_penalty_coef: float = setting(
        0.0,
        doc="Weight of the divergence from the model that training started from, in the loss.",
        ge=0,
    )
    thinking_length_penalty_coef: float = setting(
        0.0,
        doc="Taken off the reward for each token of the thinking trace; needs `thinking = true`.",
        ge=0,
        le=1,
    )
    loss: str = setting(
        "dapo",
        doc='The loss, as TRL computes it. "dapo" is the mean over all sampled tokens of a step, '
        "so neither long answers nor `max_tokens` change the weight of a token; "
        '"gspo" takes one probability ratio a sequence.',
        choices=LOSSES,
    )
    scale_rewards: str = setting(
        "group",
        doc="Divide advantages by the standard deviation of the rewards of their group, of the "
        "whole step, or not at all.",
        choices=("group", "batch", "none"),
    )
    num_iterations: int = setting(
        1, doc="Optimizer steps on the same completions before new ones are sampled.", ge=1
    )
    advantage_clip: float | None = setting(
        None, doc="Accepted so that public recipes can be read; it has no effect.", ge=0
    )
    rollout: str = setting(
        "built-in",
        doc='The engine that samples: "built-in" shares the trained weights; "vllm" starts a vLLM '
        "server beside the trainer and sends it the adapter before each step.",
        choices=("built-in", "vllm"),
    )
    vllm_python: str | None = setting(
        None,
        doc='Interpreter that has vLLM, for `rollout = "vllm"`; default: the worker\'s own, else '
        "the one that `python -m flash.training.vllm_setup` has made.",
        non_empty=True,
        example="/opt/vllm/bin/python",
    )
    score_timeout_s: float = setting(
        300.0, doc="Seconds that scoring one group may take; more counts as failed.", gt=0
    )
    episode_timeout_s: float = setting(
        600.0,
        doc="Seconds that an episode of several turns may be open: it then ends with the turn "
        "before, as truncated. A single call of the environment that takes so long is a failure.",
        gt=0,
    )
    stop_if_flat: int = setting(
        0,
        doc="End the run after this many steps in a row in which every group's rewards were all "
        "equal, so that nothing was learned; 0 to go on with a warning.",
        ge=0,
    )
    stop_if_collapsed: int = setting(
        0,
        doc="End the run after this many steps in a row in which answers were a quarter as long as "
        "at the start while the reward had risen; 0 to go on with a warning.",
        ge=0,
    )
    save_every: int = setting(20, doc="Steps between checkpoints; the last step has one.", ge=1)
    save_at_steps: tuple[int, ...] = setting(
        (), doc="Further steps to save a checkpoint at, increasing.", example=[10, 25]
    )
    eval_every: int | None = setting(
        None,
        doc="Steps between evaluations, greedy, on at most 64 tasks drawn by the seed from the "
        "first split that is not trained on; before the first step and after the last there is "
        "one. A new best is saved as a checkpoint. The recipe takes `save_every`.",
        ge=1,
        recipe=True,
    )
    init_from_adapter: str | None = setting(
        None,
        doc="Start from this adapter instead of a fresh one: `<run>`, `<run>/step-N`, "
        "`<run>/best`, a folder or a Hugging Face id. Rank, alpha and modules are taken from it.",
        non_empty=True,
    )
