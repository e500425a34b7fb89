"""Whatever of a run is not as in the unbroken one is found, and named in a sentence."""

import gzip
import json

import pytest
import torch
from safetensors.torch import save

from flash.testing.differences import differences
from flash.worker.checkpoints import CheckpointStore

METRIC = {"type": "metric", "time_s": 1.0, "attempt": 1, "loss": 0.5, "tokens_per_s": 9.0}


def make_run(store, *, weight=1.0, moment=1.0, epoch=0.5, loss=0.5, attempts=((1, 2),), said="hi"):
    """Write what a run leaves; `attempts` has the steps that each has reported."""
    checkpoints = CheckpointStore(store)

    def write_adapter(folder):
        folder.mkdir(exist_ok=True)
        content = save({"lora_A": torch.tensor([weight, 2.0])})
        (folder / "adapter_model.safetensors").write_bytes(content)

    def write(folder):
        write_adapter(folder / "adapter")
        (folder / "state").mkdir()
        (folder / "state" / "trainer_state.json").write_text(json.dumps({"epoch": epoch}))
        torch.save({"exp_avg": [torch.tensor([moment])]}, folder / "state" / "optimizer.pt")

    checkpoints.save(2, write, metrics={"loss": loss})
    checkpoints.save_final(write_adapter)
    for number, steps in enumerate(attempts, start=1):
        folder = store / "attempts" / str(number)
        folder.mkdir(parents=True)
        events = [{**METRIC, "attempt": number, "step": step, "loss": loss} for step in steps]
        lines = "".join(f"{json.dumps(event)}\n" for event in events)
        (folder / "events.jsonl").write_text(f'{lines}{{"type": "met')
    (store / "rollouts").mkdir()
    rows = [{"step": 1}, {"task": "t", "completion": said}]
    content = "\n".join(map(json.dumps, rows)).encode()
    (store / "rollouts" / "step-000001.jsonl.gz").write_bytes(gzip.compress(content))
    return store


@pytest.fixture
def compare(tmp_path):
    def compare(**changes):
        whole, broken = make_run(tmp_path / "whole"), make_run(tmp_path / "broken", **changes)
        return list(differences(whole, broken))

    return compare


def test_a_run_that_repeated_steps_is_the_same(compare):
    assert compare(attempts=((1, 2), (2,))) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"weight": 1.5},
            (
                "the final adapter: adapter_model.safetensors['lora_A'] differs in 1 of 2 numbers, "
                "by up to 0.5"
            ),
        ),
        ({"weight": -1.0}, "the adapter of the checkpoint of step 2: adapter_model.safetensors"),
        (
            {"moment": 1.0 + 2**-23},
            (
                "the state of the checkpoint of step 2: optimizer.pt['exp_avg'][0] differs in 1 of "
                "1 numbers, by up to 1.19e-07"
            ),
        ),
        ({"epoch": 0.25}, "trainer_state.json['epoch'] is 0.25 and not 0.5"),
        ({"loss": 0.75}, "the checkpoint of step 2: its metrics['loss'] is 0.75 and not 0.5"),
        ({"loss": 0.75}, "the metric of step 1 in attempt 1['loss'] is 0.75 and not 0.5"),
        ({"attempts": ((1,), ())}, "no attempt has reported the metric of step 2"),
        (
            {"attempts": ((2, 1),)},
            "the metric of step 1 in attempt 1 comes after that of step 2",
        ),
        (
            {"attempts": ((1, 2), (3,))},
            "the metric of step 3 in attempt 2 is of a step that the unbroken run has not reported",
        ),
        (
            {"said": "ho"},
            "rollouts/step-000001.jsonl.gz[1]['completion'] is 'ho' and not 'hi'",
        ),
    ],
)
def test_each_difference_is_named(compare, changes, said):
    found = compare(**changes)

    assert any(said in one for one in found), found


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ("checkpoints/step-000002/manifest.json", "the checkpoints are of steps [], not [2]"),
        ("rollouts/step-000001.jsonl.gz", "there are rollouts in [], not ['step-000001.jsonl.gz']"),
        (
            "adapter/adapter_model.safetensors",
            "the final adapter holds [], not ['adapter_model.safetensors']",
        ),
    ],
)
def test_what_is_missing_is_named(tmp_path, gone, said):
    whole, broken = make_run(tmp_path / "whole"), make_run(tmp_path / "broken")
    (broken / gone).unlink()

    assert list(differences(whole, broken)) == [said]


def test_a_warning_that_the_unbroken_run_did_not_give_is_named(tmp_path):
    whole, broken = make_run(tmp_path / "whole"), make_run(tmp_path / "broken")
    warning = {"type": "warning", "time_s": 1.0, "message": "this resume is not bit-exact"}
    (broken / "attempts" / "1" / "events.jsonl").open("a").write(f"\n{json.dumps(warning)}\n")

    assert list(differences(whole, broken)) == [
        "attempt 1 has warned: this resume is not bit-exact"
    ]
