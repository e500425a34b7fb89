"""A merged model is what was trained, or an error says by how much it is not."""

from __future__ import annotations

import json
import resource
import shutil
import signal

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from flash.errors import FlashError, StoreError, UsageError
from flash.testing.adapters import make_adapter
from flash.testing.models import make_tiny_model
from flash.training.export import export_merged

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory):
    return make_adapter(tiny, tmp_path_factory.mktemp("adapter"), seed=5)


@pytest.fixture
def adapter(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "adapter")


def export(adapter, base, target, *, allow_drift=False):
    return export_merged(adapter, base, target, lambda _: None, allow_drift=allow_drift)


def test_it_computes_what_base_model_and_adapter_do(tiny, adapter, tmp_path):
    found = export(adapter, tiny, tmp_path / "out")

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), adapter)
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, adapted(tokens).logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(tiny).chat_template
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert found["parity"]["holds"]
    assert found["parity"]["proves_identity"]
    assert found["parity"]["mean"] < 1e-5
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"model.safetensors", "config.json", "generation_config.json"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_saved_in_the_type_of_the_base_model(tmp_path, dtype):
    base = make_tiny_model(tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(base, dtype=dtype).save_pretrained(base)
    adapter = make_adapter(base, tmp_path / "adapter", seed=5)

    found = export(adapter, base, tmp_path / "out")

    kinds = {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()}
    assert kinds == {dtype}
    assert found["parity"]["holds"]
    assert found["parity"]["noise_mean"] > 0


def test_another_scale_than_that_of_training_is_caught(tiny, adapter, tmp_path):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 16}))

    with pytest.raises(FlashError, match="what was exported is not what was trained"):
        export(adapter, tiny, tmp_path / "out")

    found = export(adapter, tiny, tmp_path / "again", allow_drift=True)
    assert found["drift_allowed"]
    assert not found["parity"]["holds"]


def test_another_base_model_than_that_of_training_is_caught(adapter, tmp_path):
    other = make_tiny_model(tmp_path / "other", seed=3)
    weights = load_file(other / "model.safetensors")
    save_file({name: 3 * one for name, one in weights.items()}, other / "model.safetensors")

    with pytest.raises(FlashError, match="the base model is not that of training"):
        export(adapter, other, tmp_path / "out")


def test_another_chat_template_than_that_of_training_is_caught(tiny, adapter, tmp_path):
    other = shutil.copytree(tiny, tmp_path / "other")
    template = other / "chat_template.jinja"
    template.write_text(template.read_text() + "<think>")

    with pytest.raises(FlashError, match="chat template of the exported model is not that of"):
        export(adapter, other, tmp_path / "out")


def test_an_adapter_without_a_golden_set_is_compared_with_nothing(tiny, adapter, tmp_path):
    (adapter / "golden.json").unlink()

    found = export(adapter, tiny, tmp_path / "out")

    assert found == {"golden": False, "parity": None, "drift_allowed": False}


def test_numbers_that_are_none_are_refused_before_anything_is_loaded(tiny, adapter, tmp_path):
    path = adapter / "adapter_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, path)

    with pytest.raises(UsageError, match="not finite"):
        export(adapter, tiny, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_up_is_that_of_the_target(tiny, adapter, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(StoreError, match="merged: File too large") as raised:
            export(adapter, tiny, tmp_path / "merged")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)

    assert "--to" in raised.value.hint
