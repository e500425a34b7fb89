"""
TRL's `GRPOTrainer` with these replaced: sampling, the step through the model, reports, checkpoints.

The losses, the loop, the optimizer, clipping and the resume of all these stay TRL's and
transformers'. A prompt that a group shares is computed once in the update as it is in
the sampler; a group without any advantage costs no pass where the loss allows it; and updates on
completions of the built-in sampler need no pass for old log-probabilities, since its own are kept.
"""

from __future__ import annotations

import json
import math
import time
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from datasets import Dataset
from trl import GRPOTrainer

from flash.api import EnvironmentFault, FlashError
from flash.training.sampler import Stopped
from flash.training.trainer import (
    RunTrainer,
    peak_memory_gib,
    random_states,
    set_random_states,
)
from flash.training.undisturbed import undisturbed
from flash_algorithm_grpo.practice import numbers, rollouts
from flash_algorithm_grpo.recipe import ROW_TOKENS
from flash_algorithm_grpo.tensors import (
    completion_log_probs,
    documents_of,
    importance_ratio,
    passes,
)

if TYPE_CHECKING:
    from pathlib import Path

    from trl import GRPOConfig as TrlConfig

    from flash.api import WorkerContext
    from flash.training.golden import GoldenMaker
    from flash.training.hotpath import TargetScores
    from flash.training.sampler import Sampler
    from flash_algorithm_grpo.examination import Examiner
    from flash_algorithm_grpo.practice import Practitioner
    from flash_algorithm_grpo.watch import Watch

_WATCH = "watch.json"
_STEP = "step.json"
_PASSES = "passes.pt"
_DUE = "evaluation-due.json"

_TRL_NUMBERS = {"kl": "kl", "entropy": "entropy", "clip_ratio/region_mean": "clip_share"}
_TRL_NUMBERS["cispo_clip_ratio"] = "clip_share"

_OF_SAMPLING = ("rollout_s", "scoring_s", "rollout_tokens_per_s")
"""Numbers that a further update on the same completions has not."""


class FlashGrpoTrainer(RunTrainer, GRPOTrainer):  # type: ignore[misc] # TRL ships no types
    """Practises on an environment and reports to a run."""

    def __init__(  # noqa: PLR0913 - each is needed for every run
        self,
        context: WorkerContext,
        *,
        model: Any,
        tokenizer: Any,
        args: TrlConfig,
        scores: TargetScores,
        golden: GoldenMaker,
        sampler: Sampler,
        practitioner: Practitioner,
        examiner: Examiner | None,
        watch: Watch,
    ) -> None:
        """`examiner` is None where there are no held-out tasks."""
        config = context.config
        # What a step practises on depends on its number alone, so the rows say nothing.
        rows = config.batch_size * math.ceil(config.steps / config.num_iterations)
        nothing = Dataset.from_dict({"prompt": [""] * rows})
        super().__init__(
            model=model,
            args=args,
            processing_class=tokenizer,
            reward_funcs=_scored_elsewhere,
            train_dataset=nothing,
            eval_dataset=nothing if examiner else None,
        )
        self.follow(context, golden)
        self._scores = scores
        self._sampler = sampler
        self._practitioner = practitioner
        self._examiner = examiner
        self._watch = watch
        self._notice = practitioner.notice
        self._passes: list[dict[str, torch.Tensor]] | None = None
        self._pass: dict[str, torch.Tensor] = {}
        self._numbers: dict[str, float] = {}
        self._practice_s = 0.0
        self._step_began_s = 0.0
        self._first_step: tuple[int, float] | None = None
        self._gap = _Gap()
        self._warned = False
        self._states = random_states()
        self._evaluation_due = False
        # TRL multiplies by `importance_sampling_ratio` where its own flag for vLLM is set.
        self.use_vllm = not sampler.on_policy
        self.vllm_importance_sampling_correction = True

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, torch.Tensor]:
        """Return the next pass of the step; practise first where its completions are used up."""
        del generation_batch
        place = self._step % self.args.gradient_accumulation_steps
        if place == 0:
            self._states = random_states()
            self._step_began_s = time.monotonic()
            self._gap = _Gap()
            self._practice_s = 0.0
            if self._first_step is None:
                self._first_step = (self.state.global_step, self._step_began_s)
            if self.state.global_step % self.num_iterations == 0 or self._passes is None:
                self._passes = self._practise()
                self._practice_s = time.monotonic() - self._step_began_s
        elif self.context.stop():
            raise Stopped
        assert self._passes is not None  # noqa: S101 - made at the first place of every step
        one: dict[str, torch.Tensor] = self._passes[place]
        return one

    def _practise(self) -> list[dict[str, torch.Tensor]]:
        """Sample, score and keep the episodes of this step; return them as the passes over them."""
        step = self.state.global_step + 1
        self.context.reporter.phase("rollout")
        self._sampler.update(self.accelerator.unwrap_model(self.model))
        with undisturbed(self._notice):
            practice = self._practitioner.practise((step - 1) // self.num_iterations)
        self.context.rollouts.save(step, rollouts(practice, step))
        if not practice.scored:
            self._end(practice.failure(step))
        self._numbers = numbers(practice)
        self._complain(practice.failure(step) if self._numbers["unscored"] else None)
        self.context.reporter.phase("update")
        made = passes(
            practice.groups,
            episodes=self.args.per_device_train_batch_size,
            pad=self.processing_class.pad_token_id or 0,
            device=self.args.device,
        )
        if self.num_iterations > 1:
            self._keep_old(made)
        if self.beta:
            self._keep_reference(made)
        return made

    def _complain(self, failure: FlashError | None) -> None:
        """Warn once of episodes without a score; every step counts them."""
        if failure is not None and not self._warned:
            self._warned = True
            self.context.reporter.warning(f"{failure.message}; they are left out and counted")

    def _keep_old(self, made: list[dict[str, torch.Tensor]]) -> None:
        """Add what the completions' log-probabilities were before any update on them."""
        for one in made:
            if self._sampler.on_policy:
                one["old_per_token_logps"] = one["sampling_per_token_logps"]
            else:
                with torch.no_grad():
                    one["old_per_token_logps"], _ = self._log_probs(self.model, one, entropy=False)
                one["importance_sampling_ratio"] = importance_ratio(one["old_per_token_logps"], one)

    def _keep_reference(self, made: list[dict[str, torch.Tensor]]) -> None:
        """Add the log-probabilities of the model that training started from."""
        from trl.trainer.utils import use_adapter

        with torch.no_grad(), use_adapter(self.accelerator.unwrap_model(self.model), "ref"):
            for one in made:
                one["ref_per_token_logps"], _ = self._log_probs(self.model, one, entropy=False)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> torch.Tensor:
        """Return TRL's loss of one pass, or zero without a pass where it could be nothing else."""
        if self._teaches_nothing(inputs):
            return _zero(model)
        self._pass = inputs
        loss: torch.Tensor = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not math.isfinite(loss.item()):
            raise FlashError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}",
                hint="lower train.learning_rate",
            )
        return loss

    def _teaches_nothing(self, inputs: dict[str, torch.Tensor]) -> bool:
        counted = inputs["tool_mask"] if self.beta else inputs["advantages"]
        return not counted.any()

    def _get_per_token_logps_and_entropies(
        self, model: Any, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        """Return the log-probability and the entropy of each token of the pass, both (B, T)."""
        inputs = self._pass
        log_probs_BT, entropy_BT = self._log_probs(model, inputs, entropy=True)
        if self.state.global_step % self.num_iterations == 0:
            self._gap.see(log_probs_BT, inputs)
        if self.use_vllm and "importance_sampling_ratio" not in inputs:
            inputs["importance_sampling_ratio"] = importance_ratio(log_probs_BT.detach(), inputs)
        return log_probs_BT, entropy_BT, None

    def _log_probs(
        self, model: Any, inputs: dict[str, torch.Tensor], *, entropy: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        rows = self._scores.rows(documents_of(inputs), budget=ROW_TOKENS)
        found = [
            self._scores(model, row, temperature=self.temperature, entropy=entropy) for row in rows
        ]
        return completion_log_probs(inputs, rows, found)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Report a step's numbers, and end the run where the reward teaches nothing."""
        del start_time
        if "grad_norm" not in logs or self._first_step is None:
            return
        now_s = time.monotonic()
        step, total = self.state.global_step, self.state.max_steps
        before, began_s = self._first_step
        update_s = now_s - self._step_began_s - self._practice_s
        self.save_metrics = {"reward": self._numbers["reward"]}
        self.context.reporter.metrics(
            step,
            total,
            **self._numbers,
            **self._of_trl(),
            **self._gap.numbers(),
            loss=logs["loss"],
            grad_norm=logs["grad_norm"],
            learning_rate=logs["learning_rate"],
            update_s=update_s,
            update_tokens_per_s=self._numbers["episode_tokens"] / update_s,
            memory_gib=peak_memory_gib(),
            eta_s=(now_s - began_s) / (step - before) * (total - step),
        )
        self._watch.see(self._numbers)
        for name in _OF_SAMPLING:
            self._numbers.pop(name, None)
        if failure := self._watch.stop():
            self._end(failure)

    def _of_trl(self) -> dict[str, float]:
        """Return the means of what TRL noted of the passes of this step, and forget it."""
        noted = self._metrics["train"]
        means = {
            name: sum(noted[theirs]) / len(noted[theirs])
            for theirs, name in _TRL_NUMBERS.items()
            if noted[theirs]
        }
        noted.clear()
        return means

    def keep(self) -> None:
        """
        Save what was trained so far, where there is anything.

        What an unfinished step or evaluation has drawn at random is drawn again after a resume.
        """
        if self.state.global_step:
            set_random_states(self._states)
            self._save_checkpoint(None, None)

    def _end(self, failure: FlashError) -> NoReturn:
        """Keep what was trained, and raise."""
        self.keep()
        raise failure

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Return the mean reward and the success rate on the held-out tasks."""
        assert self._examiner is not None  # noqa: S101 - else nothing is evaluated
        self.context.reporter.phase("evaluate")
        self._sampler.update(self.accelerator.unwrap_model(self.model))
        self._states = random_states()
        self._evaluation_due = True
        try:
            with undisturbed(self._notice):
                found = self._examiner.examine()
        except EnvironmentFault as fault:
            self._end(fault)
        self._evaluation_due = False
        metrics = {f"eval_{name}": value for name, value in found.items()}
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        if not self.state.global_step:
            # A checkpoint is the best only if it beats what training started from.
            self.state.best_metric = metrics["eval_reward"]
            self._report_evaluation(metrics, best=False)
        self.context.reporter.phase("update")
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Report the evaluation; a new best is saved."""
        best = bool(super()._determine_best_metric(metrics, trial))
        if best:
            self.control.should_save = True
        self.save_metrics["eval_reward"] = metrics["eval_reward"]
        self._report_evaluation(metrics, best=best)
        return best

    def _report_evaluation(self, metrics: dict[str, float], *, best: bool) -> None:
        plain = {name.removeprefix("eval_"): value for name, value in metrics.items()}
        self.context.reporter.evaluation(self.state.global_step, **plain, best=float(best))

    def own_state(self) -> dict[str, Any]:
        """Keep the watch, and between updates on the same completions these too."""
        kept: dict[str, Any] = {_WATCH: self._watch.state}
        if self.state.global_step % self.num_iterations:
            kept |= {_PASSES: self._passes, _STEP: self._numbers}
        if self._evaluation_due:
            kept[_DUE] = {}
        return kept

    def resume(self, folder: Path) -> None:
        """Take what `own_state` kept."""
        self._watch.state = json.loads((folder / _WATCH).read_text())
        if (folder / _PASSES).exists():
            self._passes = torch.load(
                folder / _PASSES, weights_only=True, map_location=self.args.device
            )
            self._numbers = json.loads((folder / _STEP).read_text())
        self._evaluation_due = (folder / _DUE).exists()

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Take up the generators, and the evaluation that a stop has cut off."""
        super()._load_rng_state(checkpoint)
        if self._evaluation_due:
            self._determine_best_metric(self.evaluate(), None)


class _Gap:
    """How far the sampler's log-probabilities are from the trainer's, over one step."""

    def __init__(self) -> None:
        self._sum = self._most = self._tokens = 0.0

    def see(self, log_probs_BT: torch.Tensor, inputs: dict[str, torch.Tensor]) -> None:
        """Compare a pass through the weights that it was sampled with."""
        gaps = (log_probs_BT.detach() - inputs["sampling_per_token_logps"]).abs()
        gaps = gaps[inputs["tool_mask"].bool()]
        self._sum += float(gaps.sum())
        self._most = max(self._most, float(gaps.max()) if len(gaps) else 0.0)
        self._tokens += len(gaps)

    def numbers(self) -> dict[str, float]:
        """Return mean and maximum in nats; nothing where nothing was compared."""
        if not self._tokens:
            return {}
        return {"sampler_gap": self._sum / self._tokens, "sampler_gap_max": self._most}


def _zero(model: Any) -> torch.Tensor:
    """Return a loss of 0 whose backward leaves gradients of 0 where there are none yet."""
    trained = [one for one in model.parameters() if one.requires_grad]
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return torch.zeros((), device=trained[0].device, requires_grad=True)


def _scored_elsewhere(**_: Any) -> list[float]:
    message = "the environment scores, not TRL"
    raise AssertionError(message)
