"""
The environment and its episodes: each runs as the library runs it and waits where it asks a model.

The model that the library is told of is an HTTP address of this process: a request there is what
Flash is asked, and Flash's answer is the response.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import secrets
import time
from typing import TYPE_CHECKING, Any

from flash_faults import Fault, NoEnvironment

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

MOST_TURNS = 64
KEY_VARIABLE = "FLASH_MODEL_API_KEY"
MODEL = "flash"
Messages = list[dict[str, Any]]


class World:
    """What can be asked; each method answers with a JSON object."""

    def __init__(self) -> None:
        self._stack = contextlib.AsyncExitStack()
        self._numbers = itertools.count(1)
        self._games: dict[str, Game] = {}
        self._tasks: dict[str, list[Any]] = {}
        self._splits: dict[str, tuple[Any, Any]] = {}
        self._env: Any = None
        self._model: Any = None

    async def load(
        self,
        id: str,  # noqa: A002 - the library's word
        env: dict[str, Any],
        splits: dict[str, dict[str, Any]],
    ) -> dict[str, Any]:
        """Load the environment and open the model's address."""
        import verifiers.v1 as vf

        _import(id, vf.import_taskset)
        if env.get("id"):
            _import(env["id"], vf.import_environment)
        config = _config(id, env)
        self._env = vf.load_environment(config)
        self._splits = {name: _split(config, one) for name, one in splits.items()}
        for taskset, _ in self._splits.values():
            _refuse_tools(taskset)
        address = await self._stack.enter_async_context(Endpoint(self._playing).serving())
        client = vf.EvalClientConfig(base_url=address, api_key_var=KEY_VARIABLE)
        self._model = vf.ModelContext(model=MODEL, client=client)
        await self._stack.enter_async_context(self._env.serving())
        return {"max_turns": _max_turns(self._env)}

    async def tasks(self, split: str) -> dict[str, Any]:
        """Read the split's tasks, anew each time."""
        taskset, select = self._splits[split]
        chosen = taskset.select(select)
        if not chosen.bounded:
            raise Fault(
                f"the tasks of split {split} never end",
                f"limit = 100 in [environment.params.splits.{split}] takes the first 100",
            )
        self._tasks[split] = list(chosen)
        if not self._tasks[split]:
            raise Fault(f"split {split} has no tasks", "look at its table in the params")
        return {"tasks": _shown(self._tasks[split])}

    async def start(self, split: str, index: int) -> dict[str, Any]:
        """Begin an episode of a task that was read; answers with its name and opening messages."""
        name = str(next(self._numbers))
        self._games[name] = game = Game(self._env, self._model, self._tasks[split][index])
        try:
            messages = await game.opening()
        except BaseException:
            del self._games[name]
            raise
        return {"episode": name, "messages": messages}

    async def step(self, episode: str, text: str) -> dict[str, Any]:
        """Give the model's answer; answers with what follows it."""
        game = self._games[episode]
        return {"messages": await game.answer(text), "over": game.over}

    async def score(self, episode: str) -> dict[str, Any]:
        """End an episode and answer with its reward; it is gone afterwards."""
        try:
            return await self._games[episode].score()
        finally:
            del self._games[episode]

    async def drop(self, episode: str) -> dict[str, Any]:
        """Stop an episode that nobody will score."""
        self._games.pop(episode).cancel()
        return {}

    async def close(self) -> None:
        """Stop everything."""
        for game in self._games.values():
            game.cancel()
        with contextlib.suppress(Exception):  # whoever asked is gone; nobody hears of it
            await self._stack.aclose()

    def _playing(self, trace: str) -> Game | None:
        return next((game for game in self._games.values() if trace in game.traces), None)


class Game:
    """One episode of the library, and the seat in it that Flash's model takes."""

    def __init__(self, env: Any, model: Any, task: Any) -> None:
        self.traces: dict[str, Any] = {}
        self.over = False
        self._seat: Any = None  # the trace of the agent whose turns are Flash's
        self._asked: asyncio.Queue[Messages | None] = asyncio.Queue()  # None: no more will come
        self._reply: asyncio.Future[str | None] | None = None
        self._seen: Messages = []
        self._run = asyncio.create_task(env.run_episode(task, model, on_trace=self._watch))
        self._run.add_done_callback(lambda _: self._asked.put_nowait(None))

    async def opening(self) -> Messages:
        """Return what the model is asked first."""
        messages = await self._asked.get()
        if messages is None:
            raise Fault(f"the episode ended before it asked the model: {self._why()}")
        return messages

    async def answer(self, text: str) -> Messages:
        """Give the model's answer; returns the messages that follow it."""
        if self.over or self._reply is None:
            raise Fault("the episode is over and takes no further answer")
        before = self._seen
        self._reply.set_result(text)
        messages = await self._asked.get()
        if messages is None:
            self.over = True
            return []
        since = messages[len(before) :]
        if messages[: len(before)] != before or not since or since[0]["role"] != "assistant":
            self.over = True
            self.cancel()
            raise Fault(
                "the environment rewrites its conversation between turns, and Flash trains on "
                "conversations that only grow"
            )
        return since[1:]

    async def score(self) -> dict[str, Any]:
        """End it if it is not over, and return what the library scored."""
        if self._reply is not None and not self._reply.done():
            self._reply.set_result(None)
        with contextlib.suppress(asyncio.CancelledError):
            await self._run
        trace = self._seat
        if self._run.cancelled() or trace is None or not trace.ok or not self._run.result().ok:
            raise Fault(f"the environment failed: {self._why()}")
        rewards = {name: reward for name, reward in trace.rewards.items() if reward is not None}
        if not rewards:
            raise Fault("the environment has no reward", "give its Task a method with @vf.reward")
        metrics = {name: reward.score for name, reward in rewards.items()}
        metrics |= {name: value for name, value in trace.metrics.items() if value is not None}
        reason = ", ".join(f"{name} {reward.value:g}" for name, reward in rewards.items())
        return {"score": trace.reward, "metrics": metrics, "reason": reason}

    def cancel(self) -> None:
        """Stop it where it is."""
        self._run.cancel()

    def ask(self, trace: str, messages: Messages) -> asyncio.Future[str | None]:
        """Take a request of the library's; returns what will hold the answer, None to end it."""
        asking = self.traces[trace]
        if self._seat is None and asking.agent.trainable:
            self._seat = asking
        if asking is not self._seat:
            seat = asking.agent.name
            raise Fault(
                f"the agent {seat} asks the model that is trained, which plays another seat",
                f'give it one of its own in [environment.params.env.{seat}]: model = "…", '
                'client = {type = "eval", base_url = "…", api_key_var = "…"}',
            )
        self._seen = messages
        self._reply = asyncio.get_running_loop().create_future()
        self._asked.put_nowait(messages)
        return self._reply

    def _watch(self, trace: Any) -> None:
        self.traces[trace.id] = trace
        trace.watch(self._changed)

    def _changed(self, trace: Any) -> None:
        # The agent's turns are over once its clock stops; what follows is scoring.
        if trace is self._seat and trace.timing.agent.end:
            self._asked.put_nowait(None)

    def _why(self) -> str:
        if self._run.cancelled():
            return "it was stopped"
        if not self._run.done():
            return "it has not ended"
        if (error := self._run.exception()) is not None:
            return f"{type(error).__name__}: {error}"
        errors = [*self._run.result().errors, *(e for t in self.traces.values() for e in t.errors)]
        return errors[-1].message if errors else "it gave no reason"


class Endpoint:
    """The model as the library sees it: an address that speaks the chat completions API."""

    def __init__(self, playing: Callable[[str], Game | None]) -> None:
        self._playing = playing
        self._key = secrets.token_urlsafe(24)

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        """Serve on a port of this machine alone; yields the address."""
        from aiohttp import web

        os.environ[KEY_VARIABLE] = self._key
        app = web.Application(client_max_size=1 << 30)
        app.router.add_post("/v1/chat/completions", self._complete)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        finally:
            await runner.cleanup()

    async def _complete(self, request: Any) -> Any:
        from aiohttp import web
        from flash_chat import ENDED

        def refused(status: int, message: str, code: str = "") -> Any:
            error = {"message": message, "code": code}
            return web.json_response({"error": error}, status=status)

        sent = request.headers.get("Authorization", "")
        if not secrets.compare_digest(sent.encode(), f"Bearer {self._key}".encode()):
            return refused(401, "unauthorized")
        trace = request.headers.get("X-Session-ID", "")
        game = self._playing(trace)
        if game is None:
            return refused(404, "no such episode")
        body = await request.json()
        if body.get("tools"):
            return refused(400, "the agent offers tools, and Flash plays without them")
        try:
            text = await game.ask(trace, body["messages"])
        except Fault as fault:
            return refused(400, f"{fault}; {fault.hint}")
        if text is None:
            return refused(400, "the episode was ended", ENDED)
        message = {"role": "assistant", "content": text}
        return web.json_response(
            {
                "id": f"chatcmpl-{secrets.token_hex(8)}",
                "object": "chat.completion",
                "created": int(time.time()),
                "model": MODEL,
                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            }
        )


def _import(name: str, find: Callable[[str], Any]) -> None:
    """Import a module of the library's or of another's; what is missing gets a sentence here."""
    wanted = name.replace("-", "_").lower()
    try:
        module = find(name)
    except ModuleNotFoundError as error:
        cause = error.__cause__
        if isinstance(cause, ModuleNotFoundError) and cause.name == wanted:
            raise NoEnvironment(wanted) from error
        raise
    if not hasattr(module, "__all__") and hasattr(module, "load_environment"):
        raise Fault(
            f"{module.__name__} is written for verifiers before 0.4: it defines load_environment",
            "this plugin runs verifiers 0.4, where a module exports its Taskset in __all__",
        )


def _config(name: str, env: dict[str, Any]) -> Any:
    """Return the library's settings, with Flash's harness and this machine where they are open."""
    import verifiers.v1 as vf

    raw = {**env, "taskset": {**env.get("taskset", {}), "id": name}}
    fields = vf.env_config_type(name, raw.get("id") or "").model_fields
    # `bash` is what the library takes for want of another, and `null` its chat without tools. Both
    # start a program for each turn.
    plain = vf.default_harness_id(name) == "bash"
    for seat, field in fields.items():
        if not isinstance(field.default, vf.AgentConfig):
            continue
        declared = field.default.harness
        settings = dict(raw.get(seat) or {})
        if plain if declared is None else declared.id == "null":
            settings.setdefault("harness", {"id": "flash-chat"})
        if isinstance(field.default.runtime, vf.PrimeConfig):
            settings.setdefault("runtime", {"type": "subprocess"})
        raw[seat] = settings
    return vf.resolve_env_config(raw)


def _split(config: Any, settings: dict[str, Any]) -> tuple[Any, Any]:
    """Return the taskset of a split and which of its tasks the split takes."""
    import verifiers.v1 as vf

    select = {key: value for key, value in settings.items() if key != "taskset"}
    raw = {**config.taskset.model_dump(), **settings.get("taskset", {})}
    taskset = vf.load_taskset(type(config.taskset).model_validate(raw))
    return taskset, vf.SelectConfig.model_validate(select)


def _refuse_tools(taskset: Any) -> None:
    served = list(taskset.toolsets(taskset.config))
    served += taskset.task_type().toolsets(taskset.config.task)
    if served:
        names = ", ".join(sorted({type(one).__name__ for one in served}))
        raise Fault(
            f"the environment serves tools ({names}), and Flash plays verifiers environments "
            "without them",
            "take one that speaks with the model in messages alone",
        )


def _max_turns(env: Any) -> int:
    """Return the turns of the seat that the trained model takes: the first without a model."""
    import verifiers.v1 as vf

    seats = [seat for _, seat in env.config if isinstance(seat, vf.AgentConfig)]
    seat = next((seat for seat in seats if seat.model is None), seats[0])
    chats = seat.harness is not None and seat.harness.id == "flash-chat"
    if type(env) is vf.SingleAgentEnv and chats:
        return 1
    return seat.max_turns or MOST_TURNS


def _shown(tasks: list[Any]) -> list[dict[str, Any]]:
    """Return what Flash shows of the tasks; `metadata` is what the environment's own rows add."""
    import verifiers.v1 as vf

    shown: dict[str, dict[str, Any]] = {}
    for task in tasks:
        data = task.data
        name = data.id or data.name or str(data.idx)
        if name in shown:
            name = f"{name}#{data.idx}"
        fields = data.model_dump(mode="json")
        own = {key: value for key, value in fields.items() if key not in vf.TaskData.model_fields}
        text = data.prompt_text or data.description or name
        shown[name] = {"id": name, "input": text, "metadata": own}
    return list(shown.values())
