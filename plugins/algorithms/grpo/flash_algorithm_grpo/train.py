"""The worker's side of GRPO: `run(context)`."""

from __future__ import annotations

import os
import random
from collections import Counter
from typing import TYPE_CHECKING, Any

from flash.api import EnvironmentFault, FlashError, Problem, SpecError, TrainingDataError
from flash.episodes import guarded
from flash.training.chat import ChatRenderer, Conversation, stop_tokens
from flash.training.chat_model import ChatModel
from flash.training.generate import OwnSampler
from flash.training.golden import GoldenMaker, openings
from flash.training.hotpath import HotPath, TargetScores
from flash.training.loading import attach_lora, load_adapter, load_base
from flash.training.sampler import Sampling, Stopped
from flash_algorithm_grpo.examination import Examiner
from flash_algorithm_grpo.practice import Practitioner
from flash_algorithm_grpo.recipe import HELD_OUT_TASKS, episodes_a_pass
from flash_algorithm_grpo.watch import Watch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flash.api import Task, WorkerContext
    from flash.training.sampler import Sampler
    from flash_algorithm_grpo.config import GrpoConfig


def run(context: WorkerContext) -> None:
    """
    Train to the end, or to a checkpoint when `context.stop` asks for it.

    Begins at the newest complete checkpoint where there is one, and on CPU reaches the bits that
    an uninterrupted run reaches.
    """
    train(context, HotPath())


def train(context: WorkerContext, path: HotPath) -> None:
    """Do the work of `run` along `path`; benchmarks and tests take parts of the path away."""
    config = context.config
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise FlashError(
            f"GRPO trains in one process, and here are {processes} (WORLD_SIZE)",
            hint="start it without a launcher such as torchrun",
        )
    context.reporter.phase("model")
    # Here and not above: TRL takes seconds to import, and the phase says what they are for.
    from flash.training.trainer import quieten
    from flash_algorithm_grpo.trainer import FlashGrpoTrainer

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
    if hasattr(model.get_output_embeddings(), "base_layer"):
        problem = "adapts the model's head, which GRPO cannot train"
        raise SpecError([Problem("train.target_modules", problem, "leave the head out")])
    if context.init_adapter is not None:
        load_adapter(model, context.init_adapter)
    context.reporter.phase("data")
    stops = stop_tokens(tokenizer, base.generation_config)
    renderer = ChatRenderer(tokenizer, stops, context.thinking)
    fit = _fitting(context, renderer, tokenizer, context.split)
    tasks = [task for task, _ in fit]
    if not tasks:
        raise TrainingDataError(f"split {context.split!r} has no tasks")
    sampler = _sampler(context, model, tokenizer)
    try:
        newest = context.checkpoints.newest()
        examiner = _examiner(context, renderer, tokenizer, sampler, stops)
        episodes = episodes_a_pass(config, several_turns=_several_turns(context, tasks))
        scores = TargetScores(model, path, context.reporter.log)
        trainer = FlashGrpoTrainer(
            context,
            model=model,
            tokenizer=tokenizer,
            args=_arguments(
                context,
                episodes=episodes,
                starts=newest is None,
                evaluates=examiner is not None,
            ),
            scores=scores,
            golden=GoldenMaker(
                scores,
                tokenizer,
                openings((opening for _, opening in fit), renderer),
                thinking=context.thinking,
                stop_sequences=_stop_sequences(config),
                stop=context.stop,
                tell=context.reporter.warning,
            ),
            sampler=sampler,
            practitioner=Practitioner(
                config=config,
                seed=context.seed,
                environment=context.environment,
                tasks=tasks,
                chat=_chat(context, sampler, tokenizer, stops, config.temperature, config.top_p),
                count_tokens=lambda text: len(tokenizer(text, add_special_tokens=False).input_ids),
                notice=_once(context.reporter.warning),
                check=lambda: _raise_stopped(context),
            ),
            examiner=examiner,
            watch=Watch(config, context.reporter.warning),
        )
        if newest is not None:
            # After the trainer has kept the start as the reference of its penalty.
            load_adapter(model, newest.folder / "adapter")
            trainer.resume(newest.folder / "state")
            context.reporter.log(f"going on from the checkpoint of step {newest.step}")
        context.reporter.phase("train")
        if newest is None or newest.step < config.steps:
            trainer.train(resume_from_checkpoint=str(newest.folder / "state") if newest else None)
            if trainer.state.global_step < config.steps:
                return
    except Stopped:
        trainer.keep()
        return
    finally:
        sampler.close()
    if trainer.state.best_global_step:
        context.reporter.log(
            f"the highest held-out reward, {trainer.state.best_metric:.4f}, is of the checkpoint "
            f"of step {trainer.state.best_global_step}"
        )
    context.reporter.phase("save")
    trainer.save_final(newest)


def _sampler(context: WorkerContext, model: Any, tokenizer: Any) -> Sampler:
    config = context.config
    if config.rollout == "built-in":
        return OwnSampler(model, tokenizer, stop=context.stop)
    from flash.training.vllm import VllmSampler

    context.reporter.log("starting a vLLM server, which takes a minute or so")
    return VllmSampler(
        model,
        tokenizer,
        Sampling(config.max_tokens, config.temperature, config.top_p),
        base=context.model,
        workdir=context.workdir,
        max_length=config.max_length,
        python=config.vllm_python,
        stop=context.stop,
    )


def _chat(
    context: WorkerContext,
    sampler: Sampler,
    tokenizer: Any,
    stops: frozenset[int],
    temperature: float,
    top_p: float,
) -> ChatModel:
    config = context.config
    return ChatModel(
        sampler,
        tokenizer,
        stops,
        Sampling(
            config.max_tokens,
            temperature,
            top_p,
            _stop_sequences(config),
        ),
        context_tokens=config.max_length,
        thinking=context.thinking,
    )


def _stop_sequences(config: GrpoConfig) -> tuple[str, ...]:
    sequences = config.stop_sequences
    return (sequences,) if isinstance(sequences, str) else tuple(sequences)


def _fitting(
    context: WorkerContext, renderer: ChatRenderer, tokenizer: Any, split: str, most: int = 0
) -> list[tuple[Task, Conversation]]:
    """
    Return the tasks of a split, or `most` drawn by the seed, whose opening leaves room for a turn.

    Each comes with its opening.

    Says how many do not, and how many have no opening; raises where that is so for each.
    """
    config, tasks = context.config, list(context.environment.tasks(split))
    if most and len(tasks) > most:
        places = random.Random(context.seed).sample(range(len(tasks)), most)  # noqa: S311 - rows, no secret
        tasks = [tasks[place] for place in sorted(places)]
    found = [_opening(context, renderer, tokenizer, task) for task in tasks]
    reasons = Counter(one for one in found if isinstance(one, str))
    if reasons:
        failed = f"{reasons.total()} of {len(tasks)} tasks of split {split!r} cannot be started"
        failed += f": {reasons.most_common(1)[0][0]}"
        if reasons.total() == len(tasks):
            raise EnvironmentFault(failed, hint="test the environment with `flash env test`")
        context.reporter.warning(f"{failed}; they are left out")
    lengths = [one[1] for one in found if not isinstance(one, str)]
    room = config.max_length - config.max_tokens
    fit = [
        (task, one[0])
        for task, one in zip(tasks, found, strict=True)
        if not isinstance(one, str) and one[1] <= room
    ]
    if lengths and not fit:
        raise TrainingDataError(
            f"none of the {len(lengths)} prompts of split {split!r} leaves room for "
            f"{config.max_tokens} tokens in max_length = {config.max_length}; the shortest has "
            f"{min(lengths)}",
            hint="raise train.max_length, or lower train.max_tokens",
        )
    if len(fit) < len(lengths):
        context.reporter.warning(
            f"{len(lengths) - len(fit)} of {len(tasks)} prompts of split {split!r} are left out: "
            f"they leave no room for {config.max_tokens} tokens in max_length = "
            f"{config.max_length}; the longest has {max(lengths)}"
        )
    return fit


def _opening(
    context: WorkerContext, renderer: ChatRenderer, tokenizer: Any, task: Task
) -> tuple[Conversation, int] | str:
    """Return a task's opening and how many tokens it has, or why it has none."""
    environment = context.environment
    found: list[tuple[Conversation, int] | str] = []
    with guarded("start", context.config.episode_timeout_s, found.append):
        try:
            row = Conversation(
                name=f"task {task.id}",
                opening=environment.start(task),
                target=(),
                tools=environment.tools(task),
            )
            text = renderer.prompt(row.opening, row.tools)
        except TrainingDataError as error:
            found.append(error.message)
        else:
            read = tokenizer(text, add_special_tokens=False, verbose=False)
            found.append((row, len(read["input_ids"])))
    return found[-1]


def _examiner(
    context: WorkerContext,
    renderer: ChatRenderer,
    tokenizer: Any,
    sampler: Sampler,
    stops: frozenset[int],
) -> Examiner | None:
    """Return who examines on the first split that is not trained on, None where there is none."""
    split = next((one for one in context.environment.splits() if one != context.split), None)
    if split is None:
        context.reporter.log("no held-out evaluation: the environment has no other split")
        return None
    tasks = [task for task, _ in _fitting(context, renderer, tokenizer, split, HELD_OUT_TASKS)]
    if not tasks:
        context.reporter.log(f"no held-out evaluation: split {split!r} has no tasks")
        return None
    context.reporter.log(f"held-out evaluation on {len(tasks)} tasks of split {split!r}")
    return Examiner(
        environment=context.environment,
        tasks=tasks,
        chat=_chat(context, sampler, tokenizer, stops, 0.0, 1.0),
        episode_timeout_s=context.config.episode_timeout_s,
        score_timeout_s=context.config.score_timeout_s,
    )


def _raise_stopped(context: WorkerContext) -> None:
    if context.stop():
        raise Stopped


def _once(tell: Any) -> Any:
    """Return `tell` for sentences that have not been told yet."""
    told: set[str] = set()

    def tell_once(sentence: str) -> None:
        if sentence not in told:
            told.add(sentence)
            tell(sentence)

    return tell_once


def _several_turns(context: WorkerContext, tasks: Sequence[Task]) -> bool:
    """Say whether an episode may have more than one turn; a task that cannot say has none."""
    failed: list[str] = []
    for task in tasks:
        with guarded("max_turns", context.config.episode_timeout_s, failed.append):
            if context.environment.max_turns(task) > 1:
                return True
    return False


def _arguments(context: WorkerContext, *, episodes: int, starts: bool, evaluates: bool) -> Any:
    """
    Return TRL's arguments, for `episodes` a pass; whatever is not here keeps TRL's default.

    `starts`: the run is at its beginning.
    """
    import torch
    from trl import GRPOConfig

    config = context.config
    cuda = torch.cuda.is_available()
    a_step = config.batch_size * config.group_size // episodes
    return GRPOConfig(
        output_dir=str(context.workdir),
        seed=context.seed,
        max_steps=config.steps,
        per_device_train_batch_size=episodes,
        per_device_eval_batch_size=config.group_size,
        gradient_accumulation_steps=a_step,
        steps_per_generation=a_step,
        num_generations=config.group_size,
        num_iterations=config.num_iterations,
        shuffle_dataset=False,
        temperature=config.temperature,
        top_p=config.top_p,
        max_completion_length=config.max_tokens,
        beta=config.kl_penalty_coef,
        scale_rewards=config.scale_rewards,
        **_LOSS.get(config.loss, {"loss_type": config.loss}),
        learning_rate=config.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=config.save_every,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=config.eval_every,
        eval_on_start=evaluates and starts,
        metric_for_best_model="reward",
        greater_is_better=True,
        use_cpu=not cuda,
        # CPUs emulate bfloat16, or round what the sampler does not.
        bf16=cuda,
        gradient_checkpointing=False,
        # The sampler has none, and a token's probability must be the same in both.
        disable_dropout=True,
        dataloader_pin_memory=cuda,
        remove_unused_columns=False,
        router_aux_loss_coef=0.0,
        report_to=[],
        disable_tqdm=True,
    )


# The clipping bounds that the papers give: GSPO, Zheng et al., 2025, arXiv:2507.18071, section 5.1;
# CISPO as in ScaleRL, Khatri et al., 2025, arXiv:2510.13786.
_LOSS = {
    "gspo": {
        "loss_type": "grpo",
        "importance_sampling_level": "sequence",
        "epsilon": 3e-4,
        "epsilon_high": 4e-4,
    },
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
}
