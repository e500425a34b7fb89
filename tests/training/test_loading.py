"""Base models and adapters from disk, and what is said of those that do not load."""

from __future__ import annotations

import json

import pytest
import torch

from flash.errors import ModelUnavailable, SpecError, StoreError
from flash.testing.models import make_tiny_model
from flash.training.loading import attach_lora, load_adapter, load_base, save_adapter


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def adapted(tiny, *, rank=4, targets="all-linear", seed=0):
    model, _ = load_base(tiny)
    return attach_lora(model, rank=rank, alpha=8, targets=targets, base="org/tiny", seed=seed)


def state(model):
    return {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name}


def test_an_adapter_is_drawn_by_its_seed_and_leaves_the_global_stream_alone(tiny):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second, other = (state(adapted(tiny, seed=seed)) for seed in (0, 0, 1))

    assert torch.rand(1) == expected
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_an_adapter_comes_back_as_it_was_saved(tiny, tmp_path):
    model, other = adapted(tiny), adapted(tiny, seed=1)
    save_adapter(model, tmp_path)
    load_adapter(other, tmp_path)

    assert all(torch.equal(state(model)[name], tensor) for name, tensor in state(other).items())


def test_nothing_of_this_machine_is_written(tiny, tmp_path):
    save_adapter(adapted(tiny), tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()

    assert json.loads(text)["base_model_name_or_path"] == "org/tiny"
    assert str(tiny) not in text
    assert "/" not in text.replace("org/tiny", "")


def test_an_adapter_of_another_rank_is_refused(tiny, tmp_path):
    save_adapter(adapted(tiny, rank=2), tmp_path)

    with pytest.raises(SpecError, match=r"is \[2, 32\] there and \[4, 32\] here, and 27 more"):
        load_adapter(adapted(tiny), tmp_path)


def test_an_adapter_of_other_modules_is_refused(tiny, tmp_path):
    save_adapter(adapted(tiny, targets=["q_proj"]), tmp_path)

    with pytest.raises(SpecError, match="does not fit this model"):
        load_adapter(adapted(tiny), tmp_path)


def test_a_damaged_adapter_is_said_to_be_so(tiny, tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"not weights")

    with pytest.raises(StoreError, match="cannot be read"):
        load_adapter(adapted(tiny), tmp_path)


def test_target_modules_that_fit_nothing_are_refused(tiny):
    with pytest.raises(SpecError, match=r"train.target_modules: .*nowhere"):
        adapted(tiny, targets=["nowhere"])


def test_a_folder_without_a_model_is_unavailable(tmp_path):
    with pytest.raises(ModelUnavailable, match="cannot load the model"):
        load_base(tmp_path)


def _quantise(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    path.write_text(json.dumps(config))


def _cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def _resize(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"intermediate_size": 48}))


@pytest.mark.parametrize("damage", [_quantise, _cut, _resize])
def test_a_model_that_transformers_refuses_is_unavailable(tmp_path, damage):
    folder = make_tiny_model(tmp_path / "model")
    damage(folder)

    with pytest.raises(ModelUnavailable, match="cannot load the model"):
        load_base(folder)


def test_a_model_without_chat_template_is_unavailable(tmp_path):
    folder = make_tiny_model(tmp_path / "base")
    (folder / "chat_template.jinja").unlink()

    with pytest.raises(ModelUnavailable, match="no chat template"):
        load_base(folder)
