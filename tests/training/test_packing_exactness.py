"""
Packed training against the truth: the plain model in float64, one document at a time.

The reference's cross-entropy is float64 too: transformers' own loss is float32 and further from
the truth than what is tested here.
"""

from __future__ import annotations

import random

import pytest
import torch
from flash_model_smollm2 import CARD
from flash_model_smollm2.source import SmolLM2Source
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from flash.training.attention import row_inputs
from flash.training.hotpath import HotPath, TargetScores
from flash.training.packing import Document, pack

pytestmark = pytest.mark.slow

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
PACKED = {
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
# What the model has that keeps it from a shortcut, and a word of the reason that is told.
NOT_PACKED = {
    "gemma2": ({"sliding_window": 9}, "softcap"),
    "lfm2": ({"layer_types": ["conv", "full_attention", "conv"]}, "conv"),
    "bloom": ({"n_layer": 2, "n_head": 4}, "attention interface"),
    "phi3": (
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "short_factor": [1.0] * 6,
                "long_factor": [2.0] * 6,
                "rope_theta": 10000.0,
                "original_max_position_embeddings": 64,
            },
            "head_dim": 12,
        },
        "rotary",
    ),
}


@pytest.fixture(autouse=True)
def one_thread():
    """Threads cost small matrices more than they give, a lot more on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    return SmolLM2Source(CARD, tmp_path_factory.mktemp("models")).fetch(CARD.id, print)


def tiny(name: str, **changes):
    torch.manual_seed(0)
    settings = {**TINY, **PACKED.get(name, {}), **changes}
    config = AutoConfig.for_model(settings.pop("model_type", name), **settings)
    # The grouped expert kernels have no float64 for the reference.
    experts = (
        {"experts_implementation": "eager"} if any("experts" in key for key in settings) else {}
    )
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
    scores_of = TargetScores(model, path or HotPath(), told.append)
    model.train()
    model.zero_grad()
    count = sum(len(row.sources) for row in rows)
    total = 0.0
    for row in scores_of.rows(rows, budget=budget):
        loss = -scores_of(model, row).log_probs_K.sum()
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
@pytest.mark.parametrize("name", list(PACKED))
def test_packed_rows_give_the_loss_and_gradients_of_each_document_alone(name, shared):
    rows = documents(TINY["vocab_size"], shared=shared)
    *found, told = ours(tiny(name), rows)

    assert told == []
    assert_exact(found, truth(tiny(name), rows))


@pytest.mark.slow
@pytest.mark.parametrize(("shared", "lengths"), [(0, (41, 12, 30, 23, 55)), (300, (23,))])
def test_smollm2_is_trained_exactly(smollm2, shared, lengths):
    def load():
        return adapted(AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32))

    rows = documents(49_000, shared=shared, lengths=lengths)
    *found, told = ours(load(), rows)

    assert told == []
    assert_exact(found, truth(load(), rows))


@pytest.mark.parametrize("name", list(NOT_PACKED))
def test_a_model_that_cannot_keep_segments_apart_runs_each_document_alone(name):
    changes, reason = NOT_PACKED[name]
    rows = documents(TINY["vocab_size"], shared=30)
    model = tiny(name, **changes)
    before = model.get_base_model().config._attn_implementation
    *found, told = ours(model, rows)

    assert "one document a forward" in told[0]
    assert reason in told[0]
    assert model.get_base_model().config._attn_implementation == before
    assert_exact(found, truth(tiny(name, **changes), rows))


@pytest.mark.parametrize("name", ["cohere", "gemma2"])
def test_a_head_that_scales_or_caps_its_logits_is_left_to_the_model(name):
    rows = documents(TINY["vocab_size"], shared=30)
    *found, told = ours(tiny(name), rows)

    assert "own head" in told[-1]
    assert_exact(found, truth(tiny(name), rows))


@pytest.mark.parametrize("off", ["packing", "sharing", "head", "lora"])
def test_each_shortcut_can_be_taken_back(off):
    rows = documents(TINY["vocab_size"], shared=30)
    found = ours(tiny("qwen3"), rows, path=HotPath(**{off: False}))

    assert_exact(found, truth(tiny("qwen3"), rows))


def test_rows_are_exact_however_small_the_budget():
    rows = documents(TINY["vocab_size"], shared=30)
    model = tiny("llama")
    found = ours(model, rows, budget=70)

    assert_exact(found, truth(tiny("llama"), rows))


def test_rows_are_exact_under_gradient_checkpointing():
    rows = documents(TINY["vocab_size"], shared=30)
    model = tiny("llama")
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    found = ours(model, rows)

    assert_exact(found, truth(tiny("llama"), rows))


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_one_document_changes_no_bit_of_another(changed):
    model = tiny("gemma3_text")
    TargetScores(model, HotPath(), print)
    one, other = (
        pack([Document(text, text) for text in texts], budget=1000)[0]
        for texts in neighbours(changed)
    )
    assert one.segments == other.segments
    trunk = model.get_base_model().base_model
    states, changed_states = (
        trunk(row.tokens_BN, use_cache=False, **row_inputs(row)).last_hidden_state[0]
        for row in (one, other)
    )
    same = (one.tokens_BN == other.tokens_BN)[0]

    assert torch.equal(states[same], changed_states[same])
    assert not torch.equal(states[~same], changed_states[~same])


def neighbours(changed: int) -> tuple[list[list[int]], list[list[int]]]:
    """Three documents, the first two with a common opening; and the same with one changed."""
    opening = list(range(100, 120))
    texts = [[*opening, 3, *[7] * 12], [*opening, 4, *[8] * 15], [5, *[9] * 20]]
    edited = [
        text if at != changed else [*text[:-4], 11, 12, 13, 14] for at, text in enumerate(texts)
    ]
    return texts, edited


def test_without_segments_attention_is_transformers_own():
    model = tiny("llama").eval()
    padded = torch.tensor([[0, 0, 5, 6, 7], [1, 2, 3, 4, 5]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    plain = model(input_ids=padded, attention_mask=mask).logits
    TargetScores(model, HotPath(lora=False), print)

    assert model.get_base_model().config._attn_implementation == "segmented"
    assert torch.equal(model(input_ids=padded, attention_mask=mask).logits, plain)
