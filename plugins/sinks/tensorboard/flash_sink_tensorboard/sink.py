"""
The sink: one event file an attempt, written with TensorBoard's own record writer and messages.

Its `EventFileWriter` is left alone: it imports TensorFlow where that is installed, and brings a
thread, which a sink has already.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, types_pb2
from tensorboard.summary.writer.record_writer import RecordWriter

if TYPE_CHECKING:
    from collections.abc import Callable

    from flash.api import Event, RunInfo
    from flash_sink_tensorboard.config import TensorBoardConfig

# Event type -> the group its numbers are shown in.
GROUPS = {"metric": "train", "evaluation": "eval"}
_NOT_NUMBERS_TO_PLOT = {"step", "total"}


class TensorBoardSink:
    """Writes `train/<name>` and `eval/<name>` by optimizer step, and the spec as text."""

    def __init__(self, config: TensorBoardConfig, clock: Callable[[], float]) -> None:
        self._config = config
        self._clock = clock
        self._file: IO[bytes] | None = None
        self._writer: Any = None
        self._started = False

    def open(self, run: RunInfo) -> None:
        """Create the attempt's event file."""
        if self._config.logdir is None:
            folder = Path(run.folder) / "sinks" / "tensorboard"
        else:
            folder = Path(self._config.logdir).expanduser() / run.run
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        # TensorBoard reads the files of a folder in the order of their names.
        name = f"events.out.tfevents.{int(self._clock()):010d}.flash.{run.run}.{run.attempt}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        self._file = os.fdopen(os.open(folder / name, flags, 0o600), "wb")
        self._writer = RecordWriter(self._file)
        self._write(event_pb2.Event(wall_time=self._clock(), file_version="brain.Event:2"))
        self._write(
            event_pb2.Event(wall_time=self._clock(), summary=_text("spec", _as_markdown(run.spec)))
        )

    def emit(self, event: Event) -> None:
        """Write the numbers of a metric or an evaluation; other events say nothing to plot."""
        group = GROUPS.get(event.type)
        step = event.data.get("step")
        if group is None or not isinstance(step, int):
            return
        if not self._started:
            # An attempt that resumes repeats steps: this hides what the one before wrote of them.
            self._started = True
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write(event_pb2.Event(wall_time=event.time_s, step=step, session_log=start))
        summary = summary_pb2.Summary(
            value=[
                summary_pb2.Summary.Value(tag=f"{group}/{name}", simple_value=float(value))
                for name, value in event.data.items()
                if name not in _NOT_NUMBERS_TO_PLOT and isinstance(value, int | float)
            ]
        )
        self._write(event_pb2.Event(wall_time=event.time_s, step=step, summary=summary))

    def close(self, state: str) -> None:
        """Write how the attempt ended and close the file."""
        if self._file is None:
            return
        summary = _text("state", state)
        self._write(event_pb2.Event(wall_time=self._clock(), summary=summary))
        self._file.close()
        self._file = None

    def _write(self, event: Any) -> None:
        if self._file is not None:
            self._writer.write(event.SerializeToString())
            self._file.flush()


def _text(tag: str, text: str) -> Any:
    """Return a summary for TensorBoard's text tab."""
    plugin = summary_pb2.SummaryMetadata.PluginData(plugin_name="text")
    return summary_pb2.Summary(
        value=[
            summary_pb2.Summary.Value(
                tag=f"{tag}/text_summary",
                metadata=summary_pb2.SummaryMetadata(plugin_data=plugin),
                tensor=tensor_pb2.TensorProto(
                    dtype=types_pb2.DT_STRING, string_val=[text.encode()]
                ),
            )
        ]
    )


def _as_markdown(spec: Any) -> str:
    lines = json.dumps(dict(spec), indent=2, default=str).splitlines()
    return "\n".join(f"    {line}" for line in lines)
