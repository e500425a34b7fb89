"""The tiny models of the kit behave as real ones do."""

import pytest

from flash.testing.models import make_byte_tokenizer, make_tiny_model


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_a_tiny_model_loads_runs_and_is_the_same_each_time(tmp_path, architecture):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folders = [make_tiny_model(tmp_path / name, architecture=architecture) for name in "ab"]
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in folders]
    ids = torch.tensor([AutoTokenizer.from_pretrained(folders[0])("hello")["input_ids"]])

    assert models[0].num_parameters() < 100_000
    assert torch.equal(models[0](input_ids=ids).logits, models[1](input_ids=ids).logits)


def test_the_byte_tokenizer_round_trips_any_text_and_ends_turns_with_its_eos_token():
    tokenizer = make_byte_tokenizer()
    text = "Grüße, 世界 \N{ROCKET}"

    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert tokenizer(rendered)["input_ids"][-2] == tokenizer.eos_token_id
