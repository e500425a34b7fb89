"""Two turns; the reward is the share of high letters in both, so that answers differ in it."""

import verifiers.v1 as vf


class TalkTask(vf.Task[vf.TaskData, vf.State, vf.TaskConfig]):
    @vf.reward
    async def high(self, trace):
        said = "".join(message.content or "" for message in trace.assistant_messages).encode()
        return sum(byte >= 100 for byte in said) / (len(said) or 1)

    @vf.metric
    async def turns(self, trace):
        return float(trace.num_turns)


class TalkConfig(vf.EnvConfig):
    talker: vf.AgentConfig = vf.AgentConfig(max_turns=2)


class Talk(vf.Env[TalkConfig]):
    async def run(self, task, agents):
        async with agents.talker.interaction(task) as talk:
            segment = await talk.turn()
            while not segment.terminated:
                segment = await talk.turn("go on")


class Topics(vf.Taskset[TalkTask, vf.TasksetConfig]):
    def load(self):
        for topic in ("rain", "tea", "trains", "moss", "wool"):
            yield TalkTask(vf.TaskData(id=topic, prompt=f"Talk about {topic}."), self.config.task)


__all__ = ["Talk", "Topics"]
