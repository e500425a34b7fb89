"""`flash plugins setup vllm`, the record and the settings."""

from __future__ import annotations

import sys
import tempfile
from importlib import import_module
from pathlib import Path

import attrs
import pytest
from flash_serving_vllm import NAME, backend, flash_register_serving
from flash_serving_vllm.backend import VllmBackend
from flash_serving_vllm.config import VllmConfig

from flash.api import (
    FlashError,
    ModelUnavailable,
    ServedAdapter,
    ServedBase,
    SettingError,
    UsageError,
)
from flash.cli import root
from flash.training import vllm_setup
from flash.training.vllm_server import STAMP


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("FLASH_HOME", str(tmp_path))
    monkeypatch.setattr(vllm_setup, "has_gpu", lambda: False)  # whatever this machine has
    return tmp_path


@pytest.fixture
def served(tmp_path):
    return ServedBase(
        id="org/base", folder=tmp_path, context_tokens=None, max_rank=4, log=tmp_path / "log"
    )


def test_what_is_set_up_already_is_told_at_once(home, capsys):
    folder = home / "vllm"
    folder.mkdir()
    (folder / STAMP).write_bytes(vllm_setup.REQUIREMENTS.read_bytes())

    assert root.run(["plugins", "setup", NAME]) == 0
    assert capsys.readouterr().out == f"vLLM is set up: {folder / 'bin' / 'python'}\n"
    assert [one.name for one in folder.iterdir()] == [STAMP]


def test_a_plugin_that_needs_no_setup_says_so(home, capsys):
    assert root.run(["plugins", "setup", "sft"]) == 0
    assert "sft needs no setup" in capsys.readouterr().err
    assert root.run(["plugins", "setup", "vlm"]) == 2
    assert 'no plugin "vlm" is installed; did you mean "vllm"?' in capsys.readouterr().err


@pytest.mark.slow
def test_a_setup_that_fails_is_a_sentence_and_the_next_one_starts_anew(home, monkeypatch, capfd):
    """As one does that was stopped half-way."""
    monkeypatch.setenv("PIP_INDEX_URL", "file:///nowhere")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    left = home / "vllm" / "lib" / "half"
    left.mkdir(parents=True)

    assert root.run(["plugins", "setup", NAME]) == 1
    said = capfd.readouterr().err
    assert "ERROR: No matching distribution found" in said
    assert f"error: vLLM could not be set up in {home / 'vllm'}" in said
    assert "hint: see what pip said above" in said
    assert "Traceback" not in said
    assert not left.exists()
    assert not (home / "vllm" / STAMP).exists()


def test_the_record_names_a_setup_that_is_there():
    (record,) = flash_register_serving()
    module, _, name = record.setup.partition(":")

    assert callable(getattr(import_module(module), name))
    with pytest.raises(ValueError, match="setup"):
        attrs.evolve(record, setup="somewhere")


def test_memory_holds_as_many_adapters_as_a_batch():
    with pytest.raises(SettingError, match=r"at least max_loras, which is 8; got 4"):
        VllmConfig(max_cpu_loras=4)


def test_nothing_is_asked_of_a_server_that_is_not_running(served):
    made = VllmBackend(VllmConfig())
    made.stop()
    adapter = ServedAdapter(name="a", folder=served.folder, rank=4)
    for ask in (made.health, lambda: made.load(adapter), lambda: made.unload("a")):
        with pytest.raises(FlashError, match=r"the vLLM server is not running"):
            ask()


def test_an_interpreter_that_is_not_there_is_the_settings_fault(served):
    with pytest.raises(FlashError, match=r"serving.vllm.python: there is no interpreter /no") as e:
        VllmBackend(VllmConfig(python="/nowhere/python")).start(served)
    assert "flash plugins setup vllm" in e.value.hint


@pytest.mark.parametrize(
    ("torch", "said"),
    [
        ("raise ImportError('no torch here')", r"has no torch that runs: .*no torch here"),
        (
            "cuda = type('', (), {'is_available': lambda: False})",
            r"ended with code 1 as it started",
        ),
    ],
)
def test_an_interpreter_without_vllm_is_an_error_that_says_where_to_look(
    served, tmp_path, torch, said
):
    (tmp_path / "torch.py").write_text(torch)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    made = VllmBackend(VllmConfig(python=str(python)))

    with pytest.raises(ModelUnavailable, match=f"(?s){said}") as caught:
        made.start(served)
    assert "[serving.vllm]" in caught.value.hint
    made.stop()


def test_an_adapter_on_another_disk_is_copied_and_one_on_this_is_linked(tmp_path):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        sources = [tmp_path / "here", Path(elsewhere)]
        sources[0].mkdir()
        for place, source in enumerate(sources):
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                (source / name).write_text(name)
            backend._copy(source, tmp_path / f"copy-{place}")
        found = [tmp_path / f"copy-{place}" / "adapter_config.json" for place in range(2)]
        assert [one.read_text() for one in found] == ["adapter_config.json"] * 2
        assert [one.stat().st_nlink for one in found] == [2, 1]


def test_an_adapter_without_its_files_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"has no adapter_config.json"):
        backend._copy(tmp_path, tmp_path / "copy")
