"""Serves a tool."""

import verifiers.v1 as vf


class Clock(vf.Toolset[vf.ToolsetConfig, vf.State]):
    @vf.tool
    async def now(self) -> str:
        """Tell the time."""
        return "noon"


class TimeTask(vf.Task[vf.TaskData, vf.State, vf.TaskConfig]):
    @classmethod
    def toolsets(cls, config):
        return [Clock(vf.ToolsetConfig())]


class Times(vf.Taskset[TimeTask, vf.TasksetConfig]):
    def load(self):
        yield TimeTask(vf.TaskData(prompt="What time is it?"), self.config.task)


__all__ = ["Times"]
