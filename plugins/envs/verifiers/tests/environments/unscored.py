"""Has no reward, and one that fails."""

import sys

import verifiers.v1 as vf


class FailingConfig(vf.TasksetConfig):
    fails: bool = False


class Plain(vf.Task[vf.TaskData, vf.State, vf.TaskConfig]):
    pass


class Failing(Plain):
    @vf.reward
    async def judged(self, trace):
        assert not sys.stdin.read(), "what Flash asks is not the environment's to read"
        raise RuntimeError("the judge is ill")


class Tasks(vf.Taskset[Plain, FailingConfig]):
    def load(self):
        kind = Failing if self.config.fails else Plain
        yield kind(vf.TaskData(prompt="Say something."), self.config.task)


__all__ = ["Tasks"]
