"""
The machines of the fleet, a provider that has none: one file that processes share.

Each slot is one launch: its state, its exit code, its key, and when it was launched and first told
to end. The file outlives whoever reads it, so a supervisor can be killed and what it launched
stays; and whoever has it open can end a machine, or see what was asked of it. Standard library
alone: the plugin is this file and a few lines (`fleet.py`).
"""

import mmap
import struct
import threading
import time

STARTING, RUNNING, SUCCEEDED, FAILED, STOPPED, PREEMPTED, GONE = range(7)
NAMES = ("starting", "running", "succeeded", "failed", "stopped", "preempted", "gone")

_COUNT = struct.Struct("<Q")
_SLOT = struct.Struct("<BB46sQQ")
_SIZE = _SLOT.size


class Slots:
    """The slots in the file at `path`; it is made where `room` says for how many."""

    def __init__(self, path, room=None):
        if room is not None:
            with path.open("wb") as file:
                file.truncate(_COUNT.size + room * _SIZE)
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self._adding = threading.Lock()

    def __len__(self):
        return _COUNT.unpack_from(self._map)[0]

    def add(self, key, state=RUNNING):
        """Take the next slot; one process adds at a time."""
        with self._adding:
            index = len(self)
            at = _COUNT.size + index * _SIZE
            _SLOT.pack_into(self._map, at, state, 0, key.encode(), time.time_ns(), 0)
            _COUNT.pack_into(self._map, 0, index + 1)
        return index

    def all(self):
        """Return (state, exit code, key, launched, told to end) of each slot; times in ns."""
        used = self._map[_COUNT.size : _COUNT.size + len(self) * _SIZE]
        return [
            (state, code, key.rstrip(b"\0").decode(), launched, told)
            for state, code, key, launched, told in _SLOT.iter_unpack(used)
        ]

    def states(self):
        """Return the state of each slot, as bytes."""
        return self._map[_COUNT.size : _COUNT.size + len(self) * _SIZE : _SIZE]

    def one(self, index):
        """Return a slot as `all` does."""
        state, code, key, launched, told = _SLOT.unpack_from(self._map, _COUNT.size + index * _SIZE)
        return state, code, key.rstrip(b"\0").decode(), launched, told

    def end(self, index, state, exit_code=0):
        """Let the machine end."""
        at = _COUNT.size + index * _SIZE
        self._map[at + 1] = exit_code
        self._map[at] = state

    def told(self, index):
        """Note that the machine is told to end; only the first time counts."""
        at = _COUNT.size + index * _SIZE + _SIZE - 8
        if not _COUNT.unpack_from(self._map, at)[0]:
            _COUNT.pack_into(self._map, at, time.time_ns())
