"""What the sink writes, read back with TensorBoard's own reader."""

from __future__ import annotations

import subprocess
import sys

import pytest
from flash_sink_tensorboard import flash_register_sinks
from flash_sink_tensorboard.config import TensorBoardConfig
from flash_sink_tensorboard.sink import TensorBoardSink
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flash.api import Event, RunInfo, SettingError, Sink

SPEC = {"model": "org/tiny", "train": {"lora_rank": 8}}


def run_info(folder, attempt=1):
    return RunInfo(run="7x1c3d9az", attempt=attempt, folder=str(folder), spec=SPEC)


def metric(step, loss):
    return Event("metric", 1000.0 + step, {"step": step, "total": 10, "loss": loss, "lr": 1})


def write(folder, *events, config=None, attempt=1, time_s=2000.0):
    sink = TensorBoardSink(config or TensorBoardConfig(), lambda: time_s)
    sink.open(run_info(folder, attempt))
    for event in events:
        sink.emit(event)
    sink.close("done")


def read(folder):
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return accumulator


def scalars(folder, tag):
    return [(item.step, item.value) for item in read(folder).Scalars(tag)]


def test_the_record_makes_a_sink():
    (record,) = flash_register_sinks()

    class Context:
        clock = staticmethod(lambda: 0.0)

    assert isinstance(record.make(Context(), record.config()), Sink)


def test_metrics_and_evaluations_are_read_back_by_step(tmp_path):
    evaluation = Event("evaluation", 1002.0, {"step": 2, "loss": 0.25, "best": 1})
    write(tmp_path, metric(1, 0.5), metric(2, 0.375), evaluation)
    folder = tmp_path / "sinks" / "tensorboard"

    assert scalars(folder, "train/loss") == [(1, 0.5), (2, 0.375)]
    assert scalars(folder, "eval/loss") == [(2, 0.25)]
    assert set(read(folder).Tags()["scalars"]) == {
        "train/loss",
        "train/lr",
        "eval/loss",
        "eval/best",
    }
    assert read(folder).Scalars("train/loss")[0].wall_time == 1001.0


def test_the_spec_and_the_end_are_text(tmp_path):
    write(tmp_path, metric(1, 0.5))
    accumulator = read(tmp_path / "sinks" / "tensorboard")
    text = {
        tag: accumulator.Tensors(tag)[0].tensor_proto.string_val[0].decode()
        for tag in accumulator.Tags()["tensors"]
    }

    assert '"model": "org/tiny"' in text["spec/text_summary"]
    assert text["state/text_summary"] == "done"


def test_each_event_is_on_disk_before_the_next(tmp_path):
    sink = TensorBoardSink(TensorBoardConfig(), lambda: 2000.0)
    sink.open(run_info(tmp_path))
    sink.emit(metric(1, 0.5))

    assert scalars(tmp_path / "sinks" / "tensorboard", "train/loss") == [(1, 0.5)]
    sink.close("done")


def test_an_attempt_that_resumes_replaces_the_steps_it_repeats(tmp_path):
    write(tmp_path, metric(1, 0.5), metric(2, 0.375), metric(3, 9.0))
    write(tmp_path, metric(3, 0.25), metric(4, 0.125), attempt=2, time_s=3000.0)

    assert scalars(tmp_path / "sinks" / "tensorboard", "train/loss") == [
        (1, 0.5),
        (2, 0.375),
        (3, 0.25),
        (4, 0.125),
    ]


def test_a_logdir_gets_one_folder_a_run(tmp_path):
    config = TensorBoardConfig(logdir=str(tmp_path / "shared"))
    write(tmp_path / "store", metric(1, 0.5), config=config)

    assert scalars(tmp_path / "shared" / "7x1c3d9az", "train/loss") == [(1, 0.5)]
    assert not (tmp_path / "store").exists()


def test_a_relative_logdir_is_refused():
    with pytest.raises(SettingError, match="must start with"):
        TensorBoardConfig(logdir="logs")


def test_events_without_numbers_write_nothing(tmp_path):
    log = Event("log", 1.0, {"message": "hello"})
    missing = Event("metric", 1.0, {"step": 1, "total": 2, "loss": None})
    write(tmp_path, log, missing, Event("done", 1.0, {"steps": 5}))

    assert read(tmp_path / "sinks" / "tensorboard").Tags()["scalars"] == []


def test_only_the_owner_can_read_the_file(tmp_path):
    write(tmp_path, metric(1, 0.5))
    (file,) = (tmp_path / "sinks" / "tensorboard").iterdir()

    assert file.stat().st_mode & 0o777 == 0o600


def test_closing_what_never_opened_does_nothing():
    TensorBoardSink(TensorBoardConfig(), lambda: 0.0).close("failed")


def test_neither_torch_nor_tensorflow_is_imported(tmp_path):
    code = (
        "import sys; from flash.api import RunInfo\n"
        "from flash_sink_tensorboard.config import TensorBoardConfig\n"
        "from flash_sink_tensorboard.sink import TensorBoardSink\n"
        "sink = TensorBoardSink(TensorBoardConfig(), lambda: 0.0)\n"
        f"sink.open(RunInfo('r', 1, {str(tmp_path)!r}, {{}})); sink.close('done')\n"
        "print(sorted({'torch', 'tensorflow'} & set(sys.modules)))"
    )
    # A TensorFlow that would be found, and that says so if it is.
    (tmp_path / "tensorflow.py").write_text("raise SystemExit('imported')")
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )

    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_registering_does_not_import_tensorboard():
    code = (
        "import sys, flash_sink_tensorboard as p; p.flash_register_sinks();"
        "print('tensorboard' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "False\n"
