"""
The worker's side of SFT: `run(context)`.

Left out, with the settings they would need: weight decay, dropout, NEFTune and label smoothing.
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

from flash.api import Problem, SpecError
from flash.training.chat import ChatRenderer, stop_tokens
from flash.training.golden import GoldenMaker, openings
from flash.training.hotpath import HotPath, TargetScores
from flash.training.loading import attach_lora, load_adapter, load_base
from flash.training.rows import held_out_rows, training_rows
from flash_algorithm_sft.recipe import (
    HELD_OUT_ROWS,
    ROW_TOKENS,
    WARMUP_SHARE,
    activation_bytes,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flash.api import WorkerContext
    from flash.training.packing import Document
    from flash.training.rows import TrainingRows


def run(context: WorkerContext) -> None:
    """
    Train to the end, or to a checkpoint when `context.stop` asks for it.

    Begins at the newest complete checkpoint where there is one, and on CPU reaches the bits that
    an uninterrupted run reaches. Raises `TrainingDataError` before any training where the rows
    cannot be trained as they are.
    """
    train(context, HotPath())


def train(context: WorkerContext, path: HotPath) -> None:
    """Do the work of `run` along `path`; benchmarks and tests take parts of the path away."""
    config = context.config
    context.reporter.phase("model")
    # Here and not above: TRL takes seconds to import, and the phase says what they are for.
    from flash.training.trainer import quieten
    from flash_algorithm_sft.trainer import FlashSftTrainer

    quieten()

    base, tokenizer = load_base(context.model)
    model = attach_lora(
        base,
        rank=config.lora_rank,
        alpha=config.lora_alpha,
        targets=config.target_modules,
        base=context.card.id,
        seed=context.seed,
    )
    newest = context.checkpoints.newest()
    start = newest.folder / "adapter" if newest else context.init_adapter
    if start is not None:
        load_adapter(model, start)

    context.reporter.phase("data")
    stops = stop_tokens(tokenizer, base.generation_config)
    renderer = ChatRenderer(tokenizer, stops, context.thinking)
    read = _training_rows(context, renderer)
    held_out = _held_out_rows(context, renderer)
    scores = TargetScores(model, path, context.reporter.log)
    trainer = FlashSftTrainer(
        context,
        model=model,
        tokenizer=tokenizer,
        args=_arguments(context, model, evaluates=bool(held_out)),
        scores=scores,
        golden=GoldenMaker(
            scores,
            tokenizer,
            openings(read.conversations, renderer),
            thinking=context.thinking,
            stop=context.stop,
            tell=context.reporter.warning,
        ),
        budget=ROW_TOKENS,
        rows=read.rows,
        held_out=held_out,
    )
    context.reporter.phase("train")
    steps = config.max_steps or config.epochs * math.ceil(len(read.rows) / config.batch_size)
    if (last := max(config.save_at_steps, default=0)) > steps:
        context.reporter.warning(
            f"train.save_at_steps: there will be no checkpoint of step {last}, because with the "
            f"rows that fit the run has {steps} steps"
        )
    if newest is not None:
        context.reporter.log(f"going on from the checkpoint of step {newest.step} of {steps}")
    if newest is None or newest.step < steps:
        trainer.train(resume_from_checkpoint=str(newest.folder / "state") if newest else None)
        if trainer.state.global_step < steps:
            return
    if trainer.state.best_global_step:
        context.reporter.log(
            f"the lowest held-out loss, {trainer.state.best_metric:.4f}, is of the checkpoint of "
            f"step {trainer.state.best_global_step}"
        )
    context.reporter.phase("save")
    trainer.save_final(newest)


def _training_rows(context: WorkerContext, renderer: ChatRenderer) -> TrainingRows:
    most = context.config.max_length
    read = training_rows(
        context.environment,
        context.split,
        renderer,
        max_length=most,
        most=context.config.max_examples,
        seed=context.seed,
    )
    if read.too_long:
        context.reporter.warning(
            f"{len(read.too_long)} of {len(read.rows) + len(read.too_long)} rows are longer than "
            f"max_length = {most} tokens and are left out; the longest has {max(read.too_long)}"
        )
    return read


def _held_out_rows(context: WorkerContext, renderer: ChatRenderer) -> Sequence[Sequence[Document]]:
    """Return rows of the first split that is not trained on, none where there is none."""
    others = [split for split in context.environment.splits() if split != context.split]
    if not others:
        context.reporter.log("no held-out loss: there is no other split")
        return []
    read = held_out_rows(
        context.environment,
        others[0],
        renderer,
        max_length=context.config.max_length,
        most=HELD_OUT_ROWS,
        seed=context.seed,
    )
    drawn, usable = len(read.rows) + len(read.too_long), read.all_rows - read.without_target
    left_out = {
        f"{drawn} of {usable} drawn": drawn < usable,
        f"{len(read.too_long)} too long": read.too_long,
        f"{read.without_target} without target": read.without_target,
    }
    why = ", ".join(text for text, holds in left_out.items() if holds)
    context.reporter.log(
        ("held-out loss" if read.rows else "no held-out loss:")
        + f" on {len(read.rows)} of {read.all_rows} rows of split {others[0]!r}"
        + (f" ({why})" if why else "")
    )
    return read.rows


def _arguments(context: WorkerContext, model: Any, *, evaluates: bool) -> Any:
    """Return TRL's arguments; whatever is not here keeps transformers' default."""
    import torch
    from trl import SFTConfig

    config = context.config
    cuda = torch.cuda.is_available()
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if config.batch_size % processes:
        problem = f"is {config.batch_size}, which {processes} processes cannot share evenly"
        raise SpecError([Problem("train.batch_size", problem)])
    return SFTConfig(
        output_dir=str(context.workdir),
        seed=context.seed,
        per_device_train_batch_size=config.batch_size // processes,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        learning_rate=config.learning_rate,
        warmup_steps=WARMUP_SHARE,
        max_grad_norm=1.0,
        logging_steps=1,
        # A loss that is not finite ends the run; transformers would report another in its place.
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=config.save_every,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=config.eval_every,
        metric_for_best_model="loss",
        greater_is_better=False,
        use_cpu=not cuda,
        # CPUs emulate bfloat16, many times slower than float32.
        bf16=cuda,
        gradient_checkpointing=cuda and _short_of_memory(context, model),
        dataloader_pin_memory=cuda,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        router_aux_loss_coef=0.0,
        report_to=[],
        disable_tqdm=True,
    )


def _short_of_memory(context: WorkerContext, model: Any) -> bool:
    """Say whether the activations of a full row would not fit beside what is loaded."""
    import torch

    free, _ = torch.cuda.mem_get_info()
    loaded = 0 if model.device.type == "cuda" else model.get_memory_footprint()
    return loaded + activation_bytes(context.config, context.card, width=2) > 0.9 * free
