"""A checkpoint is what training was at its step, however much later it is written."""

import resource
import signal
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, TrainerState

from flash.errors import StoreError
from flash.spec.limits import CheckpointsTable
from flash.testing.models import make_tiny_model
from flash.training.loading import attach_lora, load_adapter
from flash.training.trainer import RunTrainer
from flash.worker.checkpoints import CheckpointStore
from flash.worker.reporter import EventReporter
from flash.worker.saving import CheckpointSaver

SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}


class Trainer(RunTrainer):
    """What `RunTrainer` needs of transformers' trainer to save; a step is made of noise."""

    def __init__(self, model, checkpoints):
        self.model = model
        self.trained = [one for one in model.parameters() if one.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-2)
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: 0.9**step
        )
        self.args = SimpleNamespace(should_save=True, device=torch.device("cpu"))
        self.state = TrainerState()
        self.context = SimpleNamespace(checkpoints=checkpoints)
        self.save_metrics = {}
        self.passes = [{"tokens": torch.zeros(3)}]

    def own_state(self):
        return {"passes.pt": self.passes, "numbers.json": {"step": self.state.global_step}}

    def step(self):
        self.state.global_step += 1
        self.passes[0]["tokens"] += torch.rand(3)
        for parameter in self.trained:
            parameter.grad = torch.randn_like(parameter)
        self.optimizer.step()
        self.lr_scheduler.step()

    def save(self):
        self._save_checkpoint(None, None)


class Written:
    """Writes each save when it is told to."""

    def __init__(self, folder):
        self.folder = folder
        self.waiting = []

    def save(self, step, write, *, metrics):
        self.waiting.append((step, write))

    def write(self):
        for step, write in self.waiting:
            (self.folder / str(step)).mkdir(parents=True)
            write(self.folder / str(step))
        self.waiting.clear()


def lora(model, rank):
    return attach_lora(
        model, rank=rank, alpha=2.0 * rank, targets="all-linear", base="org/model", seed=1
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"))


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")}


def test_what_is_written_late_is_what_is_written_at_once(tiny, tmp_path):
    stores = []
    for late in (False, True):
        torch.manual_seed(7)
        stores.append(Written(tmp_path / f"late-{late}"))
        trainer = Trainer(lora(AutoModelForCausalLM.from_pretrained(tiny), 4), stores[-1])
        for _ in range(3):
            trainer.step()
            trainer.save()
            if not late:
                stores[-1].write()
    stores[1].write()

    at_once, late = (content(store.folder) for store in stores)
    assert at_once == late
    names = {str(path) for path in at_once if path.parts[0] == "2"}
    assert names >= {
        f"2/{name}"
        for name in (
            "adapter/adapter_config.json",
            "adapter/adapter_model.safetensors",
            "state/numbers.json",
            "state/optimizer.pt",
            "state/passes.pt",
            "state/rng.pt",
            "state/scheduler.pt",
            "state/trainer_state.json",
        )
    }
    assert at_once[Path("1/state/passes.pt")] != at_once[Path("2/state/passes.pt")]


def test_what_was_saved_loads_as_what_it_was(tiny, tmp_path):
    store = Written(tmp_path)
    trainer = Trainer(lora(AutoModelForCausalLM.from_pretrained(tiny), 4), store)
    trainer.step()
    trainer.save()
    before = [one.detach().clone() for one in trainer.trained]
    moments = trainer.optimizer.state_dict()["state"][0]["exp_avg"].clone()
    drawn = torch.rand(4)
    trainer.step()
    store.write()

    load_adapter(trainer.model, tmp_path / "1" / "adapter")
    found = torch.load(tmp_path / "1" / "state" / "optimizer.pt", weights_only=True)
    trainer._load_rng_state(str(tmp_path / "1" / "state"))

    assert all(torch.equal(*pair) for pair in zip(before, trainer.trained, strict=True))
    assert torch.equal(found["state"][0]["exp_avg"], moments)
    assert torch.equal(torch.rand(4), drawn)
    state = TrainerState.load_from_json(str(tmp_path / "1" / "state" / "trainer_state.json"))
    assert state.global_step == 1


def test_a_disk_that_fills_up_under_torch_is_an_error_of_the_disk(tiny, tmp_path):
    """And so a warning for a periodic save, and no crash."""
    store = CheckpointStore(tmp_path)
    trainer = Trainer(lora(AutoModelForCausalLM.from_pretrained(tiny), 4), store)
    trainer.step()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))
    try:
        with pytest.raises(StoreError, match="step-000001: File too large"):
            trainer.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)

    trainer.save()
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "checkpoints").rglob("*.*")}
    assert sizes["adapter_model.safetensors"] < 40_000 < sizes["optimizer.pt"]


@pytest.mark.slow
def test_training_waits_for_the_copy_and_not_for_the_disk(tmp_path, capsys):
    """Adapter, optimizer and the rest as a run of SmolLM2-135M at the recipe's rank has them."""
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMOLLM2))
    base.to_empty(device="cpu")
    reporter = EventReporter(tmp_path / "attempts" / "1" / "events.jsonl")
    store = CheckpointStore(tmp_path, attempt=1)
    trainer = Trainer(lora(base, 32), None)
    blocked, written = [], []
    for _ in range(5):
        trainer.step()
        with CheckpointSaver(
            store, reporter, keep=CheckpointsTable(), stop=lambda: False
        ) as trainer.context.checkpoints:
            began_s = time.perf_counter()
            trainer.save()
            blocked.append(time.perf_counter() - began_s)
        written.append(time.perf_counter() - began_s)
    reporter.close()

    assert len(store.list()) == 5
    megabytes = store.list()[-1].size_bytes / 1e6
    blocked_s, written_s = statistics.median(blocked), statistics.median(written)
    with capsys.disabled():
        sys.stdout.write(
            f"\na save of {megabytes:.0f} MB: training waits {blocked_s * 1e3:.0f} ms, "
            f"it is on the disk after {written_s * 1e3:.0f} ms "
        )
    assert blocked_s < written_s / 2
