"""
TRL's `SFTTrainer` with three things replaced: the step through the model, reports, checkpoints.

The loop, data order, optimizer, clipping, several processes and the resume of all these stay
TRL's and transformers'. A step's loss is the mean over the trained tokens of all its examples,
so it does not depend on how they fall into rows or processes.
"""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import torch
from datasets import Dataset
from trl import SFTTrainer

from flash.api import FlashError
from flash.training.packing import Document
from flash.training.trainer import RunTrainer, peak_memory_gib

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trl import SFTConfig as TrlConfig

    from flash.api import WorkerContext
    from flash.training.golden import GoldenMaker
    from flash.training.hotpath import TargetScores


class FlashSftTrainer(RunTrainer, SFTTrainer):  # type: ignore[misc] # TRL ships no types
    """
    Trains on documents and reports to a run.

    `rows` and `held_out` are rows as their documents; `budget` bounds the tokens of a packed row.
    """

    def __init__(  # noqa: PLR0913 - each is needed for every run
        self,
        context: WorkerContext,
        *,
        model: Any,
        tokenizer: Any,
        args: TrlConfig,
        scores: TargetScores,
        golden: GoldenMaker,
        budget: int,
        rows: Sequence[Sequence[Document]],
        held_out: Sequence[Sequence[Document]],
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            processing_class=tokenizer,
            data_collator=_collate,
            train_dataset=_dataset(rows),
            eval_dataset=_dataset(held_out) if held_out else None,
        )
        self.follow(context, golden)
        self._scores = scores
        self._budget = budget
        self._held_out = scores.rows(
            [document for row in held_out for document in row][
                self.args.process_index :: self.args.world_size
            ],
            budget=budget,
        )
        self._progress: _Progress | None = None

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Run forward and backward over the documents of one step; return its loss."""
        del num_items_in_batch  # counted here, where the rows are made
        began_s = time.monotonic()
        model.train()
        rows = self._scores.rows(inputs["documents"], budget=self._budget)
        trained, tokens = self.summed(
            sum(len(row.targets_K) for row in rows), sum(row.tokens for row in rows)
        )
        # Gradients are averaged over processes; the loss is a mean over the tokens of them all.
        scale = self.accelerator.num_processes / trained
        total = torch.zeros((), device=self.args.device)
        right = 0
        for number, row in enumerate(rows, start=1):
            with nullcontext() if number == len(rows) else self.accelerator.no_sync(model):
                scores = self._scores(model, row)
                loss = -scores.log_probs_K.sum() * scale
                self.accelerator.backward(loss)
            total += loss.detach()
            right += int(scores.right_K.sum())
        if not math.isfinite(total.item()):
            raise FlashError(
                f"the loss is {total.item()} at step {self.state.global_step + 1}",
                hint="lower train.learning_rate",
            )
        (right_of_all,) = self.summed(right)
        first = self._progress.first if self._progress else (self.state.global_step, began_s)
        self._progress = _Progress(first, began_s, tokens, right_of_all / trained)
        return total

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """
        Return the schedule: up over the first 3 % of the steps, then down to zero, linearly.

        transformers' own begins at zero and wastes the first step, a good part of a short run.
        """
        if self.lr_scheduler is None:
            warmup = self.args.get_warmup_steps(num_training_steps)
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer,
                partial(_share_of_peak, warmup=warmup, total=num_training_steps),
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Report a step's numbers; the run's events are the history, the state keeps none."""
        del start_time
        if "grad_norm" not in logs or self._progress is None:
            return
        now_s = time.monotonic()
        step, total = self.state.global_step, self.state.max_steps
        before, began_s = self._progress.first
        self.save_metrics = {"loss": logs["loss"]}
        if self.is_world_process_zero():
            self.context.reporter.metrics(
                step,
                total,
                loss=logs["loss"],
                token_accuracy=self._progress.accuracy,
                grad_norm=logs["grad_norm"],
                learning_rate=logs["learning_rate"],
                tokens_per_s=self._progress.tokens / (now_s - self._progress.began_s),
                padding_share=0.0,  # a row is packed or one document: there is nothing to pad
                memory_gib=peak_memory_gib(),
                epoch=self.state.epoch,
                eta_s=(now_s - began_s) / (step - before) * (total - step),
            )

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Return the held-out loss, a mean over all trained tokens."""
        self.context.reporter.phase("evaluate")
        self.model.eval()
        sums = [0.0, 0.0, 0.0]
        with torch.no_grad():
            for row in self._held_out:
                scores = self._scores(self.model, row)
                loss = -float(scores.log_probs_K.sum())
                numbers = (loss, int(scores.right_K.sum()), len(row.targets_K))
                sums = [one + more for one, more in zip(sums, numbers, strict=True)]
        loss, right, trained = self.summed(*sums)
        metrics = {"eval_loss": loss / trained, "eval_token_accuracy": right / trained}
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        self.context.reporter.phase("train")
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Report the evaluation; a new best is saved."""
        best = bool(super()._determine_best_metric(metrics, trial))
        if best:
            self.control.should_save = True
        self.save_metrics["eval_loss"] = metrics["eval_loss"]
        if self.is_world_process_zero():
            self.context.reporter.evaluation(
                self.state.global_step,
                loss=metrics["eval_loss"],
                token_accuracy=metrics["eval_token_accuracy"],
                best=float(best),
            )
        return best


@attrs.frozen
class _Progress:
    """Of the current step: when it began and what it saw; of the first: its number and begin."""

    first: tuple[int, float]
    began_s: float
    tokens: float
    accuracy: float


def _dataset(rows: Sequence[Sequence[Document]]) -> Dataset:
    return Dataset.from_dict(
        {
            "tokens": [[document.tokens for document in row] for row in rows],
            "labels": [[document.labels for document in row] for row in rows],
        }
    )


def _collate(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "documents": [
            Document(tokens, labels)
            for example in examples
            for tokens, labels in zip(example["tokens"], example["labels"], strict=True)
        ]
    }


def _share_of_peak(step: int, *, warmup: int, total: int) -> float:
    """Return the share of the peak learning rate at `step`, counted from 0."""
    if step < warmup:
        return (step + 1) / warmup
    return max(total - step, 0) / max(total - warmup, 1)
