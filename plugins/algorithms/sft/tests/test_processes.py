"""SFT where it takes processes of its own: several of them, and the memory that one needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from flash_algorithm_sft.config import SftConfig
from flash_algorithm_sft.recipe import decide, plan
from flash_model_smollm2 import CARD
from flash_model_smollm2.source import SmolLM2Source
from safetensors.torch import load_file

from flash.api import AlgorithmInput
from flash.testing.models import make_tiny_model

pytestmark = pytest.mark.slow

# Trains on made-up rows; argv: model, output, settings and the words of an answer.
SCRIPT = """
import argparse, json, os, sys
from pathlib import Path

import torch
from flash.api import Task
from flash_algorithm_sft.config import SftConfig
from flash_algorithm_sft.train import run
from flash_model_smollm2 import CARD

torch.set_num_threads(1)
model, out, settings, words = Path(sys.argv[1]), Path(sys.argv[2]), *map(json.loads, sys.argv[3:])


class Rows:
    def splits(self):
        return ["train", "eval"]

    def tasks(self, split):
        return [Task(f"{split}-{n}", "", n) for n in range({"train": 48, "eval": 5}[split])]

    def start(self, task):
        return [{"role": "user", "content": f"Count to {task.data}."}]

    def target(self, task):
        count = words or task.data
        return [{"role": "assistant", "content": " ".join(map(str, range(count + 1)))}]

    def tools(self, task):
        return None


class Quiet:
    def __getattr__(self, name):
        return lambda *_, **__: None


class Checkpoints(Quiet):
    def newest(self):
        return None

    def save_final(self, write):
        write(out)


run(
    argparse.Namespace(
        config=SftConfig(**settings),
        thinking=False,
        seed=0,
        environment=Rows(),
        split="train",
        model=model,
        card=CARD,
        init_adapter=None,
        workdir=out / "work",
        reporter=Quiet(),
        checkpoints=Checkpoints(),
        stop=lambda: False,
    )
)
if sys.platform == "linux":
    # Not getrusage's: that peak counts what the process was forked from.
    print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


@pytest.fixture
def train(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)

    def train(model, name, settings, *, words=0, processes=1):
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        done = subprocess.run(
            [
                sys.executable,
                *(launcher if processes > 1 else []),
                str(tmp_path / "script.py"),
                str(model),
                str(tmp_path / name),
                json.dumps(settings),
                json.dumps(words),
            ],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return tmp_path / name, done.stdout

    return train


def test_two_processes_train_what_one_trains(train, tmp_path):
    """The loss is a mean over the tokens of both, however unevenly they fall."""
    model = make_tiny_model(tmp_path / "tiny")
    settings = {
        "lora_rank": 4,
        "lora_alpha": 8.0,
        "learning_rate": 1e-2,
        "batch_size": 8,
        "max_length": 512,
        "max_steps": 6,
        "eval_every": 3,
    }
    one, _ = train(model, "one", settings)
    two, _ = train(model, "two", settings, processes=2)
    first, second = (load_file(each / "adapter_model.safetensors") for each in (one, two))

    for name, tensor in first.items():
        assert torch.dist(tensor, second[name]) < 1e-4 * tensor.norm(), name


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_the_plan_foresees_the_memory_that_smollm2_takes(train, tmp_path):
    model = SmolLM2Source(CARD, tmp_path / "models").fetch(CARD.id, print)
    given = AlgorithmInput(train={}, thinking=False, card=CARD, rows=48)
    decided = {name: one.value for name, one in decide(given).items()}
    settings = {**decided, "batch_size": 16, "max_steps": 1}
    # Answers of some 200 tokens: a step fills a row.
    _, said = train(model, "run", settings, words=90)
    need = plan(
        AlgorithmInput(train=SftConfig(**settings), thinking=False, card=CARD, rows=48)
    ).need

    peak_gib = int(said.splitlines()[-1]) / 2**20
    assert 0.75 * need.memory_gib < peak_gib < 1.1 * need.memory_gib
