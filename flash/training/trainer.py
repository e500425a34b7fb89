"""
What every trainer of a run does the same way, over transformers' `Trainer`.

Checkpoints in the run's store, resume to the same bits, an early end on request, sums over
processes. Mixed in before TRL's trainer: `class MyTrainer(RunTrainer, trl.GRPOTrainer)`.
"""

from __future__ import annotations

import dataclasses
import json
import random
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME

from flash import parity
from flash.training import resuming
from flash.training.loading import copied, copied_adapter, save_adapter

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from flash.contracts import Checkpoint, WorkerContext
    from flash.training.golden import GoldenMaker

_RNG = "rng.pt"


class RunTrainer:
    """
    A trainer that belongs to a run.

    The host class calls `follow` at the end of its `__init__`. Its `save_metrics` go into the
    manifest of the next checkpoint.
    """

    model: Any
    args: Any
    state: Any
    control: Any
    accelerator: Any
    optimizer: Any
    lr_scheduler: Any
    save_metrics: dict[str, float]
    golden: GoldenMaker | None = None
    _known_by: tuple[int, bytes | None] | None = None

    def follow(self, context: WorkerContext, golden: GoldenMaker | None = None) -> None:
        """Belong to the run of `context` from here on; `golden` makes its golden sets."""
        trainer: Any = self
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_Control(context.config.save_at_steps, self.told_to_stop))
        self.context = context
        self.golden = golden
        self.save_metrics = {}

    def told_to_stop(self) -> bool:
        """Say whether any process was told to stop: all must leave the loop together."""
        (told,) = self.summed(self.context.stop())
        return bool(told)

    def summed(self, *numbers: float) -> list[float]:
        """Return each number summed over all processes."""
        if self.accelerator.num_processes == 1:
            return list(numbers)
        mine = torch.tensor(numbers, dtype=torch.float64, device=self.args.device)
        summed: list[float] = self.accelerator.reduce(mine, reduction="sum").tolist()
        return summed

    def own_state(self) -> dict[str, Any]:
        """
        Return what else the algorithm resumes from, by the name of its file in `state`.

        Of a name that ends in `.json` it is what JSON can hold; else what `torch.load` reads with
        `weights_only`.
        """
        return {}

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Copy adapter and state of this step, and have the copies written to the run's store."""
        del model, trial
        if self.args.should_save:
            self.context.checkpoints.save(
                self.state.global_step, self._copied(), metrics=self.save_metrics
            )

    def save_final(self, start: Checkpoint | None) -> None:
        """Save the final adapter; `start` is the checkpoint that the attempt began at."""
        trainer: Any = self
        if not trainer.is_world_process_zero():
            return
        golden = None
        if start is None or self.state.global_step:
            golden = self._golden_set()
        elif (path := start.folder / "adapter" / parity.NAME).exists():  # of the same step
            golden = path.read_bytes()
        if golden is None and self.golden is not None:  # a stop may have cost the checkpoint's
            golden = self.golden.make(self.model, in_time=False)
        self.context.checkpoints.save_final(lambda folder: save_adapter(self.model, folder, golden))

    def _golden_set(self) -> bytes | None:
        """Return what the adapter of this step is known by; it is made once."""
        step = self.state.global_step
        if self.golden is not None and (self._known_by is None or self._known_by[0] != step):
            self._known_by = (step, self.golden.make(self.model))
        return self._known_by[1] if self._known_by else None

    def _copied(self) -> Callable[[Path], None]:
        """Copy all that a resume needs into host memory; return what writes it to a folder."""
        write_adapter = copied_adapter(self.model, self._golden_set())
        files = copied(
            {
                OPTIMIZER_NAME: self.optimizer.state_dict(),
                SCHEDULER_NAME: self.lr_scheduler.state_dict(),
                TRAINER_STATE_NAME: dataclasses.asdict(self.state),
                _RNG: random_states(),
                resuming.NAME: resuming.machine(self.args.device),
                **self.own_state(),
            }
        )

        def write(folder: Path) -> None:
            write_adapter(folder / "adapter")
            (folder / "state").mkdir()
            for name, value in files.items():
                _write(folder / "state" / name, value)

        return write

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        set_random_states(torch.load(Path(checkpoint) / _RNG, weights_only=True))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Compute as before the break; the adapter of the checkpoint is on the model already."""
        del model
        reporter = self.context.reporter
        resuming.go_on(
            Path(resume_from_checkpoint),
            self.args.device,
            log=reporter.log,
            warn=reporter.warning,
        )

    def _send_telemetry(self) -> None:
        """Send nothing: what is trained here is nobody else's business."""

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0: useful tokens are what is reported, and counting parameters takes time."""
        del inputs
        return 0


def random_states() -> dict[str, Any]:
    """Return every random generator's state as plain values, which `weights_only` can load."""
    kind, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002 - the global one is what libraries draw from
    return {
        "python": random.getstate(),
        "numpy": (kind, [int(key) for key in keys], *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Put every random generator where `random_states` found it."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])  # noqa: NPY002 - see above
    torch.set_rng_state(states["torch"])
    if len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


def _write(path: Path, value: Any) -> None:
    if path.suffix == ".json":
        path.write_text(json.dumps(value))
        return
    with path.open("wb") as file:
        try:
            torch.save(value, file)
        except RuntimeError as error:
            # What torch says of its own state hides what the disk said.
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


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


def quieten() -> None:
    """Keep progress bars out of the worker's log."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


def peak_memory_gib() -> float:
    """Return the most memory that this process has held: the accelerator's where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    # Kilobytes, but bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
