"""Its tasks cannot be read."""

import verifiers.v1 as vf


class Broken(vf.Taskset[vf.Task, vf.TasksetConfig]):
    def load(self):
        raise ValueError("the rows are gone")


__all__ = ["Broken"]
