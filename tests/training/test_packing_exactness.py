"""
Packed training against the truth: the plain model in float64, one document at a time.

The reference's cross-entropy is float64 too: transformers' own loss is float32 and further from
the truth than what is tested here.
"""

from __future__ import annotations

import random

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from flash.training.hotpath import HotPath, TargetLoss
from flash.training.packing import Document

TINY = {
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
ARCHITECTURES = {
    "llama": {},
    "llama-untied-bias": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "qwen3": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 9},
    "gemma3_text": {
        "sliding_window": 9,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
}


def tiny(name: str, **changes):
    torch.manual_seed(0)
    settings = {**TINY, **ARCHITECTURES.get(name, {}), **changes}
    config = AutoConfig.for_model(settings.pop("model_type", name), **settings)
    # The grouped expert kernels have no float64 for the reference.
    experts = {"experts_implementation": "eager"} if "num_experts" in settings else {}
    return adapted(AutoModelForCausalLM.from_config(config, dtype=torch.float32, **experts))


def adapted(model):
    """LoRA on all linear layers, B drawn at random so that every gradient is alive."""
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02)
    return model


def documents(vocabulary: int, *, shared: int, lengths=(41, 12, 30, 23, 55)) -> list[Document]:
    """Documents of which the first token, the end, and some in the middle are trained."""
    draw = random.Random(2)
    opening = [draw.randrange(vocabulary) for _ in range(shared)]
    made = []
    for length in lengths:
        tokens = opening + [draw.randrange(vocabulary) for _ in range(length)]
        start = len(tokens) // 2
        labels = [-100] * start + tokens[start:]
        labels[-3] = -100
        made.append(Document(tokens, labels))
    # One whose trained tokens begin right behind the shared opening, and inside it.
    tokens = opening + [draw.randrange(vocabulary) for _ in range(9)]
    made.append(Document(tokens, [-100] * max(shared - 2, 1) + tokens[max(shared - 2, 1) :]))
    return made


def gradients(model) -> dict[str, torch.Tensor]:
    return {
        name: parameter.grad.double().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def truth(model, rows):
    """Loss and gradients of the plain model in float64."""
    model = model.double()
    model.zero_grad()
    count = sum(len(row.sources) for row in rows)
    total = 0.0
    for row in rows:
        logits = model(input_ids=torch.tensor([list(row.tokens)])).logits[0]
        loss = cross_entropy(logits[:-1], torch.tensor(row.labels[1:]), reduction="sum") / count
        loss.backward()
        total += loss.item()
    return total, gradients(model)


def ours(model, rows, *, path=None, budget=10_000):
    told = []
    loss_of = TargetLoss(model, path or HotPath(), told.append)
    model.train()
    model.zero_grad()
    count = sum(len(row.sources) for row in rows)
    total = 0.0
    for row in loss_of.rows(rows, budget=budget):
        loss, _ = loss_of(model, row)
        (loss / count).backward()
        total += loss.item() / count
    return total, gradients(model), told


def assert_exact(found, expected, *, overall=1e-5, worst=2e-5):
    (loss, grads), (true_loss, true_grads) = found[:2], expected
    assert loss == pytest.approx(true_loss, rel=1e-6)
    assert grads.keys() == true_grads.keys()
    error = torch.stack([(grads[name] - true_grads[name]).norm() for name in grads]).norm()
    size = torch.stack([true_grads[name].norm() for name in grads]).norm()
    each = {name: ((grads[name] - g).norm() / g.norm()).item() for name, g in true_grads.items()}
    assert error / size < overall
    assert max(each.values()) < worst, max(each, key=each.get)


@pytest.mark.parametrize("shared", [0, 30])
@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_packed_rows_give_the_loss_and_gradients_of_each_document_alone(name, shared):
    rows = documents(TINY["vocab_size"], shared=shared)
    model = tiny(name)
    *found, told = ours(model, rows)
    assert told == []
    assert_exact(found, truth(tiny(name), rows))
