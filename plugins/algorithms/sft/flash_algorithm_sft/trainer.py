"""
TRL's `SFTTrainer` with three things replaced: the step through the model, reports, checkpoints.

The loop, data order, optimizer, clipping, several processes and the resume of all these stay
TRL's and transformers'. A step's loss is the mean over the trained tokens of all its examples,
so it does not depend on how they fall into rows or processes.
"""

from __future__ import annotations

import math
import random
import resource
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from trl import SFTTrainer

from flash.api import FlashError
from flash.training.loading import save_adapter
from flash.training.packing import Document

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from trl import SFTConfig as TrlConfig

    from flash.api import WorkerContext
    from flash.training.hotpath import TargetScores

_RNG = "rng.pt"


class FlashSftTrainer(SFTTrainer):  # type: ignore[misc] # TRL ships no types
    """
    Trains on documents and reports to a run.

    `rows` and `held_out` are rows as their documents; `budget` bounds the tokens of a packed row.
    """

    lr_scheduler: Any
    control: Any

    def __init__(  # noqa: PLR0913 - each is needed for every run
        self,
        context: WorkerContext,
        *,
        model: Any,
        tokenizer: Any,
        args: TrlConfig,
        scores: TargetScores,
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
        self.remove_callback(PrinterCallback)
        self.add_callback(_Control(context.config.save_at_steps, self._told_to_stop))
        self._context = context
        self._scores = scores
        self._budget = budget
        self._held_out = scores.rows(
            [document for row in held_out for document in row][
                self.args.process_index :: self.args.world_size
            ],
            budget=budget,
        )
        self._progress: _Progress | None = None
        self._saved_metrics: dict[str, float] = {}

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Run forward and backward over the documents of one step; return its loss."""
        del num_items_in_batch  # counted here, where the rows are made
        began_s = time.monotonic()
        model.train()
        rows = self._scores.rows(inputs["documents"], budget=self._budget)
        trained, tokens = self._summed(
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
        (right_of_all,) = self._summed(right)
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
        self._saved_metrics = {"loss": logs["loss"]}
        if self.is_world_process_zero():
            self._context.reporter.metrics(
                step,
                total,
                loss=logs["loss"],
                token_accuracy=self._progress.accuracy,
                grad_norm=logs["grad_norm"],
                learning_rate=logs["learning_rate"],
                tokens_per_s=self._progress.tokens / (now_s - self._progress.began_s),
                padding_share=0.0,  # a row is packed or one document: there is nothing to pad
                memory_gib=_peak_memory_gib(),
                epoch=self.state.epoch,
                eta_s=(now_s - began_s) / (step - before) * (total - step),
            )

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Return the held-out loss, a mean over all trained tokens."""
        self._context.reporter.phase("evaluate")
        self.model.eval()
        sums = [0.0, 0.0, 0.0]
        with torch.no_grad():
            for row in self._held_out:
                scores = self._scores(self.model, row)
                loss = -float(scores.log_probs_K.sum())
                numbers = (loss, int(scores.right_K.sum()), len(row.targets_K))
                sums = [one + more for one, more in zip(sums, numbers, strict=True)]
        loss, right, trained = self._summed(*sums)
        metrics = {"eval_loss": loss / trained, "eval_token_accuracy": right / trained}
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        self._context.reporter.phase("train")
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Report the evaluation; a new best is saved."""
        best = bool(super()._determine_best_metric(metrics, trial))
        if best:
            self.control.should_save = True
        self._saved_metrics["eval_loss"] = metrics["eval_loss"]
        if self.is_world_process_zero():
            self._context.reporter.evaluation(
                self.state.global_step,
                loss=metrics["eval_loss"],
                token_accuracy=metrics["eval_token_accuracy"],
                best=float(best),
            )
        return best

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Commit adapter and state of this step to the run's store."""
        del model, trial

        def write(folder: Path) -> None:
            state = folder / "state"
            state.mkdir(parents=True)
            save_adapter(self.model, folder / "adapter")
            self._save_optimizer_and_scheduler(str(state))
            self._save_rng_state(str(state))
            self.state.save_to_json(str(state / TRAINER_STATE_NAME))

        if self.args.should_save:
            self._context.checkpoints.save(
                self.state.global_step, write, metrics=self._saved_metrics
            )

    def _save_rng_state(self, output_dir: str) -> None:
        """Save every random generator's state as plain values, which `weights_only` can load."""
        kind, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002 - the global one is what libraries draw from
        states = {
            "python": random.getstate(),
            "numpy": (kind, [int(key) for key in keys], *rest),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        torch.save(states, Path(output_dir) / _RNG)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        states = torch.load(Path(checkpoint) / _RNG, weights_only=True)
        random.setstate(states["python"])
        np.random.set_state(states["numpy"])  # noqa: NPY002 - see above
        torch.set_rng_state(states["torch"])
        if len(states["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(states["cuda"])

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Do nothing: the adapter of the checkpoint is on the model already."""

    def _send_telemetry(self) -> None:
        """Send nothing: what is trained here is nobody else's business."""

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0: useful tokens are what is reported, and counting parameters takes time."""
        del inputs
        return 0

    def _told_to_stop(self) -> bool:
        """Say whether any process was told to stop: all must leave the loop together."""
        (told,) = self._summed(self._context.stop())
        return bool(told)

    def _summed(self, *numbers: float) -> list[float]:
        """Return each number summed over all processes."""
        if self.accelerator.num_processes == 1:
            return list(numbers)
        mine = torch.tensor(numbers, dtype=torch.float64, device=self.args.device)
        summed: list[float] = self.accelerator.reduce(mine, reduction="sum").tolist()
        return summed


@attrs.frozen
class _Progress:
    """Of the current step: when it began and what it saw; of the first: its number and begin."""

    first: tuple[int, float]
    began_s: float
    tokens: float
    accuracy: float


class _Control(TrainerCallback):  # type: ignore[misc] # transformers ships no types
    """Saves at the steps that were asked for, and ends the run early when told to."""

    def __init__(self, save_at: Collection[int], told_to_stop: Callable[[], bool]) -> None:
        self._save_at = save_at
        self._told_to_stop = told_to_stop

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set what the loop looks at after the step."""
        del args, kwargs
        stop = self._told_to_stop()
        if stop:
            control.should_training_stop = True
        if stop or state.global_step in self._save_at:
            control.should_save = True


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


def _peak_memory_gib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    # Kilobytes, but bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
