"""A GGUF file is what was trained: llama.cpp itself says so, and answers from it."""

from __future__ import annotations

import json
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from flash_model_smollm2 import CARD
from flash_model_smollm2.source import SmolLM2Source
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from flash.errors import FlashError
from flash.testing.adapters import make_adapter
from flash.testing.models import make_tiny_model
from flash.training import gguf
from flash.training.chat import ChatRenderer
from flash.training.export import merge
from flash.training.gguf import LlamaCpp, _unpack, export_gguf

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tools():
    """The folder of llama.cpp, fetched once for all runs of the tests."""
    folder = Path(sys.prefix) / "tools"
    LlamaCpp.made_in(folder, print)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small llama with a tokenizer that llama.cpp knows."""
    source = SmolLM2Source(CARD, tmp_path_factory.mktemp("models")).fetch(CARD.id, print)
    tokenizer = AutoTokenizer.from_pretrained(source)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.get_input_embeddings().weight *= 7
    folder = tmp_path_factory.mktemp("small")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(small, tmp_path_factory):
    return make_adapter(small, tmp_path_factory.mktemp("adapter"), seed=5)


def export(adapter, base, target, tools, *, allow_drift=False):
    return export_gguf(adapter, base, target, lambda _: None, tools=tools, allow_drift=allow_drift)


def test_llama_cpp_says_and_answers_what_was_trained(small, adapter, tools, tmp_path):
    found = export(adapter, small, tmp_path / "model.gguf", tools)

    assert found["parity"]["holds"]
    assert found["parity"]["proves_identity"]
    assert found["parity"]["noise_mean"] < 0.01
    merge(adapter, small, tmp_path / "merged", lambda _: None)
    tokenizer = AutoTokenizer.from_pretrained(small)
    renderer = ChatRenderer(tokenizer, frozenset(), thinking=False)
    prompt = renderer.prompt([{"role": "user", "content": "Say 1"}])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float16).float()
    tokens = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    said = model.generate(tokens, max_new_tokens=8, do_sample=False)[0, tokens.shape[1] :]
    asked = {"prompt": prompt, "max_tokens": 8}
    answer = LlamaCpp.made_in(tools, print).ask(tmp_path / "model.gguf", asked)["answer"]
    assert answer.strip() == tokenizer.decode(said, skip_special_tokens=True).strip()


def test_what_is_not_what_was_trained_is_caught(small, adapter, tools, tmp_path):
    path = adapter / "adapter_config.json"
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | {"lora_alpha": 16}))
    try:
        with pytest.raises(FlashError, match="what was exported is not what was trained"):
            export(adapter, small, tmp_path / "model.gguf", tools)
    finally:
        path.write_text(before)


def test_what_a_killed_export_leaves_is_all_beside_the_file(tmp_path, monkeypatch):
    merged = []

    def die(adapter, base, target, report):
        merged.append(target)
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf.export, "merge", die)
    monkeypatch.setattr(LlamaCpp, "made_in", lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        export(tmp_path, tmp_path, tmp_path / "model.gguf", tmp_path)

    assert merged[0].is_relative_to(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_that_llama_cpp_does_not_know_is_refused(tools, tmp_path):
    base = make_tiny_model(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", seed=5)

    with pytest.raises(FlashError, match="cannot convert the model") as caught:
        export(adapter, base, tmp_path / "model.gguf", tools)
    assert "its last lines" in caught.value.hint


def test_tools_that_cannot_be_had_are_an_error_that_says_why(tmp_path, monkeypatch):
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")

    with pytest.raises(FlashError, match=r"llama-cpp-python \S+ cannot be had") as caught:
        LlamaCpp.made_in(tmp_path, lambda _: None)
    assert "its last lines" in caught.value.hint
    assert not list(tmp_path.glob("*/made"))


def test_the_first_releases_of_python_3_11_take_the_converter_out_too(tmp_path, monkeypatch):
    """They know no `TarInfo.replace` and no filters."""
    inside = tmp_path / "llama_cpp_python-1" / "vendor" / "llama.cpp"
    for name in ("convert_hf_to_gguf.py", "gguf-py/gguf/vocab.py", "src/llama.cpp"):
        (inside / name).parent.mkdir(parents=True, exist_ok=True)
        (inside / name).write_text(name)
    with tarfile.open(tmp_path / "source.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "llama_cpp_python-1", "llama_cpp_python-1")
    for owner, name in ((tarfile.TarInfo, "replace"), (tarfile, "data_filter")):
        monkeypatch.delattr(owner, name, raising=False)

    _unpack(tmp_path / "source.tar.gz", tmp_path / "out")

    found = {path.relative_to(tmp_path / "out").as_posix() for path in tmp_path.glob("out/**/*.py")}
    assert found == {"convert_hf_to_gguf.py", "gguf-py/gguf/vocab.py"}
    assert not (tmp_path / "out" / "src").exists()
