"""
One step's gradient against the plain truth: float64, each episode alone, TRL's own loss.

The truth shares nothing with the code under test but the episodes: no packing, no shared prompt,
no head in chunks, no fused adapter, no skipped group.
"""

from __future__ import annotations

import pytest
import torch
from flash_algorithm_grpo import train as worker
from flash_algorithm_grpo.config import LOSSES

from flash.training.hotpath import HotPath
from flash.training.loading import attach_lora, load_base

pytestmark = pytest.mark.slow

TEMPERATURE = 0.8


def trainer_of(context, monkeypatch):
    """Return the trainer that a run would use, stopped before its first step."""
    from trl import GRPOTrainer

    made = []
    monkeypatch.setattr(GRPOTrainer, "train", lambda self, **_: made.append(self))
    monkeypatch.setattr(context.checkpoints.__class__, "save_final", lambda *_: None)
    worker.train(context, HotPath())
    (trainer,) = made
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    return trainer


def disturb(model, seed=1):
    """Give the adapter weights that are not zero, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if ".default." in name:
                drawn = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(0.05 * drawn.to(parameter.dtype))


def gradients(model):
    return {
        name: parameter.grad.double().clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def true_gradients(trainer, passes, context):
    """Return loss and gradients of TRL's loss on plain float64 log-probabilities."""
    from trl import GRPOTrainer

    base, _ = load_base(context.model)
    config = context.config
    model = attach_lora(
        base.double(),
        rank=config.lora_rank,
        alpha=config.lora_alpha,
        targets=config.target_modules,
        base="x",
        seed=0,
    ).double()
    disturb(model)

    def plain(model, input_ids, attention_mask, logits_to_keep, **_):
        log_probs, entropies = [], []
        for tokens, mask in zip(input_ids, attention_mask, strict=True):
            alone = tokens[mask.bool()]
            logits = model(input_ids=alone[None], logits_to_keep=0).logits[0, :-1] / TEMPERATURE
            scores = logits.log_softmax(-1)
            said = scores.gather(1, alone[1:, None])[:, 0]
            entropy = -(scores.exp() * scores).sum(-1)
            first = (
                len(tokens) - logits_to_keep - int((1 - mask[: len(tokens) - logits_to_keep]).sum())
            )
            padding = (0, logits_to_keep - (len(alone) - first))
            log_probs.append(torch.nn.functional.pad(said[first - 1 :], padding))
            entropies.append(torch.nn.functional.pad(entropy[first - 1 :], padding))
        return torch.stack(log_probs), torch.stack(entropies), None

    total = 0.0
    found = trainer._get_per_token_logps_and_entropies
    trainer._get_per_token_logps_and_entropies = plain
    try:
        for one in passes:
            wide = {
                name: tensor.double() if tensor.is_floating_point() else tensor
                for name, tensor in one.items()
            }
            loss = GRPOTrainer._compute_loss(trainer, model, wide)
            loss.backward()
            total += loss.item()
    finally:
        trainer._get_per_token_logps_and_entropies = found
    return total, gradients(model)


@pytest.mark.parametrize("turns", [1, 2])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_gradient_is_that_of_each_episode_alone_in_float64(
    make, world, monkeypatch, loss, turns
):
    context = make(
        environment=world(turns=turns, tasks_by_split={"train": 3}),
        settings={"loss": loss, "temperature": TEMPERATURE, "max_tokens": 24, "group_size": 6},
    )
    trainer = trainer_of(context, monkeypatch)
    disturb(trainer.model)
    trainer.model.train()
    passes = trainer._practise()
    trainer.model.zero_grad()
    total = 0.0
    for one in passes:
        part = trainer.compute_loss(trainer.model, dict(one))
        part.backward()
        total += part.item()
    found = gradients(trainer.model)
    true_total, truth = true_gradients(trainer, passes, context)

    assert total == pytest.approx(true_total, rel=1e-5, abs=1e-6)
    assert found.keys() == truth.keys()
    error = torch.stack([(found[name] - truth[name]).norm() for name in truth]).norm()
    size = torch.stack([truth[name].norm() for name in truth]).norm()
    worst = max(float((found[name] - truth[name]).norm() / truth[name].norm()) for name in truth)
    assert float(error / size) < 1e-5
    assert worst < 2e-5
    assert trainer._gap.numbers()["sampler_gap"] < 1e-4


def test_an_engine_with_other_numbers_is_corrected_token_by_token(make, monkeypatch):
    context = make(settings={"group_size": 4})
    trainer = trainer_of(context, monkeypatch)
    trainer.model.train()
    (one, *_) = trainer._practise()
    trainer.use_vllm = True
    one["sampling_per_token_logps"] = one["sampling_per_token_logps"] - 0.1
    one["sampling_per_token_logps"][0] -= 5.0
    trainer.compute_loss(trainer.model, one)
    ratio, mask = one["importance_sampling_ratio"], one["tool_mask"].bool()

    assert torch.allclose(ratio[1:][mask[1:]], torch.tensor(0.1).exp(), atol=1e-4)
    assert torch.equal(ratio[0][mask[0]], torch.full_like(ratio[0][mask[0]], 2.0))
    assert torch.equal(ratio[~mask], torch.ones_like(ratio[~mask]))


@pytest.mark.parametrize(("turns", "episodes"), [(1, 8), (2, 2)])
def test_episodes_of_several_turns_are_updated_on_as_many_at_a_time_as_fit_at_full_length(
    make, world, monkeypatch, turns, episodes
):
    context = make(
        environment=world(turns=turns),
        settings={"max_length": 1024, "max_tokens": 64, "group_size": 8, "batch_size": 1},
    )
    trainer = trainer_of(context, monkeypatch)

    assert [len(one["prompt_ids"]) for one in trainer._practise()] == [episodes] * (8 // episodes)
