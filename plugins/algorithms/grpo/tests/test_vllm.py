"""The vLLM engine on a real vLLM server, and GRPO that samples from it."""

from __future__ import annotations

import pytest
import torch
from flash_algorithm_grpo.train import run

from flash.testing.models import make_tiny_model
from flash.testing.vllm import find_vllm, widen
from flash.training.loading import attach_lora, load_base
from flash.training.sampler import Prompt, Sampling
from flash.training.vllm import VllmSampler

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def vllm_python():
    return find_vllm()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return widen(make_tiny_model(tmp_path_factory.mktemp("models") / "tiny"))


def shift(model, amount):
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.add_(torch.randn_like(weight), alpha=amount)


def log_probs_of_the_trainer(model, prompt, completion, temperature):
    tokens = torch.tensor([[*prompt.tokens, *completion.tokens]])
    drawn = torch.tensor(completion.tokens)[:, None]
    with torch.inference_mode():
        logits = model(tokens).logits[0, len(prompt.tokens) - 1 : -1].double()
    return (logits / temperature).log_softmax(-1).gather(-1, drawn)[:, 0]


def worst_gap(model, prompts, completions, temperature):
    """The greatest distance of the engine's log-probabilities from the trainer's, in nats."""
    distances = torch.cat(
        [
            log_probs_of_the_trainer(model, prompts[place], completion, temperature)
            - torch.tensor(completion.log_probs)
            for place, completion in completions.items()
        ]
    )
    return distances.abs().max().item()


def test_what_vllm_draws_is_what_the_trainer_would_before_and_after_an_update(
    base, vllm_python, tmp_path
):
    model, tokenizer = load_base(base)
    model = attach_lora(model, rank=4, alpha=8, targets="all-linear", base="tiny", seed=0)
    sampling = Sampling(max_tokens=24, temperature=0.8)
    # More than one step of the server takes, so that prompts wait and none is computed in parts.
    prompts = [
        Prompt(tokenizer(f"{place} " * 40)["input_ids"], f"0/{place}/0", 24) for place in range(50)
    ]
    sampler = VllmSampler(
        model,
        tokenizer,
        sampling,
        base=base,
        workdir=tmp_path,
        max_length=256,
        python=vllm_python,
    )
    try:
        plain = dict(sampler.sample(prompts, sampling))
        assert plain.keys() == set(range(50))
        assert worst_gap(model, prompts, plain, 0.8) < 1e-4
        again = dict(sampler.sample(prompts[:5], sampling))
        assert [again[place].tokens for place in range(5)] == [
            plain[place].tokens for place in range(5)
        ]

        shift(model, 0.2)
        assert worst_gap(model, prompts, plain, 0.8) > 0.1
        sampler.update(model)
        shifted = dict(sampler.sample(prompts, sampling))
        assert worst_gap(model, prompts, shifted, 0.8) < 1e-4

        greedy = Sampling(max_tokens=24)
        ((_, best),) = sampler.sample(prompts[:1], greedy)
        logits = model(torch.tensor([prompts[0].tokens])).logits[0, -1]
        assert best.tokens[0] == logits.argmax()
        assert worst_gap(model, prompts, {0: best}, 1.0) < 1e-4

        word = shifted[0].text[3:5]
        stopping = Sampling(max_tokens=24, temperature=0.8, stop_sequences=(word,))
        ((_, stopped),) = sampler.sample(prompts[:1], stopping)
        assert word not in stopped.text
        assert not stopped.truncated
        assert stopped.tokens == shifted[0].tokens[: len(stopped.tokens)]
    finally:
        sampler.close()


def test_grpo_practises_with_vllm(make, base, vllm_python):
    context = make(
        model=base, settings={"rollout": "vllm", "vllm_python": vllm_python, "top_p": 0.95}
    )
    run(context)
    steps = context.reporter.steps

    assert [one["step"] for one in steps] == [1, 2, 3]
    assert all(one["sampler_gap"] < 1e-4 for one in steps)
    assert all(one["grad_norm"] > 0 for one in steps)
    assert [len(one) for one in context.rollouts.by_step.values()] == [8, 8, 8]
    assert (context.checkpoints.final / "adapter_model.safetensors").exists()
