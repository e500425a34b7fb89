"""The vLLM that tests run: an environment made once, in a cache."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flash.training import vllm_setup

SPACE, NEWLINE = "\u0120", "\u010a"
"""As the tiny tokenizer writes these two bytes."""


def find_vllm() -> str:
    """
    Return an interpreter that has vLLM: the one that FLASH_VLLM_PYTHON names, or the cache's.

    Skips the test where vLLM for CPU cannot be installed.
    """
    if named := os.environ.get("FLASH_VLLM_PYTHON"):
        return named
    digest = hashlib.sha256(vllm_setup.REQUIREMENTS.read_bytes()).hexdigest()[:16]
    folder = Path.home() / ".cache" / "flash" / f"vllm-{digest}"
    done = subprocess.run(
        [sys.executable, "-m", "flash.training.vllm_setup", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"vLLM for CPU cannot be installed here: {done.stderr.strip()[-500:]}")
    return done.stdout.split()[-1]


def widen(folder: Path, *, sharpness: float = 1.0) -> Path:
    """
    Give the tiny model in `folder` heads as wide as vLLM's kernels for CPU take them; return it.

    Its weights are new: it is sure of some tokens, and with more sharpness surer, so that an
    adapter of it learns sooner; sharp models hardly say more than ASCII, so that no answer ends
    amid a character.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(folder)
    config.head_dim = 32
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight *= 7
        model.model.norm.weight *= sharpness
        if sharpness > 1:
            tokens = AutoTokenizer.from_pretrained(folder).get_vocab()
            dull = [tokens[one] for one in tokens if one > "~" and one not in {SPACE, NEWLINE}]
            model.get_input_embeddings().weight[dull] = 0
    model.save_pretrained(folder)
    return folder
