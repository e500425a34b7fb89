"""
What the serving benchmark runs beside the server, each in a process of its own.

    python serving_child.py peft MODEL FOLDER COUNT MORE    PEFT in a plain transformers loop
    python serving_child.py gateway HOME COUNT              the gateway before a server

The first writes adapters with weights of chance, COUNT that it answers with and MORE that it does
not; then it reads one JSON line a round from standard input, and answers each with one. The second
reads where the server is, says where it is itself, and serves until its standard input ends.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

RANK = 16
CHANGE = 0.02
"""The size of the weights in B: enough for every adapter to say something else."""


def write_adapters(model: str, folder: Path, count: int) -> None:
    """Write `count` adapters of every linear layer, `0`, `1`, …."""
    import torch

    from flash.training.loading import attach_lora, load_base, save_adapter

    base, _ = load_base(Path(model))
    adapted = attach_lora(
        base, rank=RANK, alpha=2 * RANK, targets="all-linear", base="bench", seed=0
    )
    for number in range(count):
        draw = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for name, weight in adapted.named_parameters():
                if "lora_A" in name:
                    weight.uniform_(-1, 1, generator=draw).div_(weight.shape[1] ** 0.5)
                elif "lora_B" in name:
                    weight.normal_(0, CHANGE, generator=draw)
        save_adapter(adapted, folder / str(number))


def loop_with_peft(model: str, folder: str, count: str, more: str) -> None:
    """Answer one request after the other: `set_adapter`, then `generate`."""
    import torch
    from peft import PeftModel

    from flash.training.loading import load_base

    write_adapters(model, Path(folder), int(count) + int(more))
    base, tokenizer = load_base(Path(model))
    adapted = PeftModel.from_pretrained(base, str(Path(folder) / "0"), adapter_name="0")
    for number in range(1, int(count)):
        adapted.load_adapter(str(Path(folder) / str(number)), adapter_name=str(number))
    adapted.eval()

    def answer(request: dict[str, Any]) -> list[int]:
        adapted.set_adapter(request["adapter"])
        prompt = tokenizer.apply_chat_template(
            request["messages"], add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        with torch.inference_mode():
            said = adapted.generate(
                **prompt,
                max_new_tokens=request["max_tokens"],
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
        return said[0, prompt["input_ids"].shape[1] :].tolist()

    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        said = [answer(request) for request in json.loads(line)]
        seconds = time.perf_counter() - began
        texts = [tokenizer.decode(one, skip_special_tokens=True) for one in said]
        done = {"texts": texts, "tokens": sum(map(len, said)), "seconds": seconds}
        print(json.dumps(done), flush=True)


def serve(home: str, count: str) -> None:
    """Have the gateway's HTTP side before a server, with its keys and its usage on the disk."""
    from flash.gateway.app import make_app
    from flash.gateway.keys import Keyring
    from flash.gateway.limits import Limits
    from flash.gateway.listening import listening
    from flash.gateway.routes import Route, Routes
    from flash.gateway.usage import UsageWriter
    from flash.home import FlashHome
    from flash.plane.daemon import GATEWAY
    from flash.plane.database import Database
    from flash.plane.keys import Keys
    from flash.plane.usage import Usage
    from flash.values import Address

    place, limits, routes = FlashHome(Path(home)), Limits(), Routes()
    database = Database(place.database)
    keys, log = Keys(database), GATEWAY.logger(place, by_hand=True)
    server = json.loads(sys.stdin.readline())
    for number in range(int(count)):
        routes.set(
            Route(
                name=str(number),
                base="base",
                adapter=True,
                backend="transformers",
                address=Address(server["url"], server["key"], Path(server["socket"])),
                thinking=False,
                stop=(),
                fields=frozenset({"temperature"}),
                context_tokens=2048,
            )
        )

    async def run() -> None:
        with UsageWriter(Usage(database).add, log) as usage:
            app = make_app(routes, Keyring(keys.all, log), usage, limits, log)
            async with listening(app, "127.0.0.1", 0, limits) as port:
                where = {"url": f"http://127.0.0.1:{port}/v1", "key": keys.default(place)}
                print(json.dumps(where), flush=True)
                await asyncio.to_thread(sys.stdin.read)

    asyncio.run(run())


CHILDREN = {"peft": loop_with_peft, "gateway": serve}

if __name__ == "__main__":
    CHILDREN[sys.argv[1]](*sys.argv[2:])
