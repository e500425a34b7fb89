from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from flash.training import attention
from flash.training.forked import Fork, can_fork, forking

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}


def tiny(architecture="llama", **config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(architecture, **(SIZES | config))
    ).eval()


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "olmo2"])
def test_models_of_plain_attention_fork(architecture):
    with torch.inference_mode():
        assert can_fork(tiny(architecture))


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("mistral", {"sliding_window": 4}),
        ("gemma2", {"sliding_window": 4}),
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "attn_implementation": "eager"}),
    ],
)
def test_models_with_more_than_plain_attention_do_not(architecture, config):
    with torch.inference_mode():
        assert not can_fork(tiny(architecture, **config))


def test_a_model_whose_attention_does_more_is_found_out_by_the_trial(monkeypatch):
    model = tiny()
    layer = model.model.layers[1].self_attn
    usual = layer.forward

    def forward(hidden_states, **asked):
        return usual(hidden_states * (1 if asked.get("fork") is None else 1.1), **asked)

    monkeypatch.setattr(layer, "forward", forward)

    with torch.inference_mode():
        assert not can_fork(model)


@pytest.mark.parametrize("before", ["sdpa", attention.NAME])
def test_the_models_own_attention_comes_back(before):
    attention.register()
    model = tiny()
    model.set_attn_implementation(before)

    with torch.inference_mode():
        assert can_fork(model)
    with pytest.raises(RuntimeError, match="on purpose"), forking(model):
        raise RuntimeError("on purpose")

    assert model.config._attn_implementation == before


def test_rows_that_leave_take_nothing_from_those_that_stay():
    """Groups of three, one and two, of prompts that are padded on the left; some rows leave."""
    model = tiny().double()
    prompts = [[5, 6, 7, 8, 9], [0, 0, 11, 12, 13], [0, 21, 22, 23, 24]]
    seen = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 1, 1, 1, 1]], dtype=torch.bool)
    rows = [2, 0, 0, 1, 0, 2]
    said = torch.tensor(
        [[31, 41, 51], [32, 42, 52], [33, 43, 53], [34, 44, 54], [35, 45, 55], [36, 46, 56]]
    )
    stays = [[0, 1, 2, 3, 4, 5], [0, 2, 4, 5], [2, 5]]

    def alone(row, count):
        own = torch.tensor(prompts[rows[row]])[seen[rows[row]]]
        return model(torch.cat([own, said[row, :count]])[None]).logits[0, -1]

    with torch.inference_mode(), forking(model):
        cache = DynamicCache(config=model.config)
        positions = (seen.long().cumsum(-1) - 1).clamp(min=0)
        model(
            torch.tensor(prompts),
            attention_mask=seen.long(),
            position_ids=positions,
            past_key_values=cache,
        )
        fork = Fork(cache, seen, rows, 3)
        for step, staying in enumerate(stays):
            if step:
                fork.select([stays[step - 1].index(row) for row in staying])
            found = fork.forward(model, said[staying, step])
            expected = torch.stack([alone(row, step + 1) for row in staying])
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert len(fork.prefixes[0][0]) == 2, "a prompt without rows is still held"
