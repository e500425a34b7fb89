"""Multi-turn: the environment plays the user, keeps state of its own and scores at the end."""

import verifiers.v1 as vf


class NumberData(vf.TaskData):
    number: int


class NumberTask(vf.Task[NumberData, vf.State, vf.TaskConfig]):
    pass


class GuessConfig(vf.EnvConfig):
    player: vf.AgentConfig = vf.AgentConfig(max_turns=4)


class Guess(vf.Env[GuessConfig]):
    async def run(self, task, agents):
        tried = []
        async with agents.player.interaction(task) as talk:
            segment = await talk.turn()
            while not segment.terminated:
                guess = segment.last_reply
                if guess == "crash":
                    raise RuntimeError("the game broke")
                tried.append(guess)
                if guess == str(task.data.number):
                    break
                hint = "higher" if guess.isdigit() and int(guess) < task.data.number else "lower"
                segment = await talk.turn(f"{hint} ({len(tried)} tried)")
        found = str(task.data.number) in tried
        talk.trace.record_reward("found", 1.0 / len(tried) if found else 0.0)


class Numbers(vf.Taskset[NumberTask, vf.TasksetConfig]):
    INFINITE = True

    def load(self):
        number = 0
        while True:
            data = NumberData(prompt="Guess a number from 0 to 9.", number=number % 10)
            yield NumberTask(data, self.config.task)
            number += 7


__all__ = ["Guess", "Numbers"]
