"""Single-turn: a word, to be spelt backwards. Two rewards with weights, and a metric."""

import difflib

import verifiers.v1 as vf


class WordData(vf.TaskData):
    answer: str


class WordTask(vf.Task[WordData, vf.State, vf.TaskConfig]):
    @vf.reward(weight=1.0)
    async def exact(self, trace):
        return float(trace.last_reply == self.data.answer)

    @vf.reward(weight=0.5)
    async def similar(self, trace):
        return difflib.SequenceMatcher(None, trace.last_reply, self.data.answer).ratio()

    @vf.metric
    async def letters(self, trace):
        return float(len(trace.last_reply))


class WordsConfig(vf.TasksetConfig):
    language: str = "English"


class Words(vf.Taskset[WordTask, WordsConfig]):
    def load(self):
        for word in ("flash", "model", "reward", "value"):
            data = WordData(
                id=word,
                system_prompt=f"Answer with one word of {self.config.language}.",
                prompt=f"Spell {word} backwards.",
                answer=word[::-1],
            )
            yield WordTask(data, self.config.task)


__all__ = ["Words"]
