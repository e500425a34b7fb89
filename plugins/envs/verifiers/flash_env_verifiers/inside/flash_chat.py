"""
The harness that plays an agent's seat: one request to the model for each turn of the user.

The library's own chat harness starts a program for every turn and needs uv for it; this one asks
from within the process.
"""

from __future__ import annotations

from typing import Any

import aiohttp
import verifiers.v1 as vf
from verifiers.v1.dialects.chat import message_to_wire

# What the model answers once Flash has ended an episode: to the library its context is full, and it
# scores what there is.
ENDED = "context_length_exceeded"
_BAD = 400


class FlashChat(vf.Harness[vf.HarnessConfig]):  # type: ignore[misc]  # has no types in this interpreter
    """A chat without tools."""

    APPENDS_SYSTEM_PROMPT = True
    SUPPORTS_RESUME = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(  # noqa: PLR0913, PLR0917 - the library's signature
        self,
        ctx: Any,
        trace: Any,  # noqa: ARG002
        runtime: Any,  # noqa: ARG002
        endpoint: str,
        secret: str,
        mcp_urls: Any,  # noqa: ARG002
        data: Any,
    ) -> Any:
        """Ask the model once; the library records the answer on its way."""
        system, prompt = self.resolve_prompt(data)
        messages = [{"role": "system", "content": system}] if system else []
        if isinstance(prompt, str):
            messages.append({"role": "user", "content": prompt})
        else:
            messages += [message_to_wire(message) for message in prompt or ()]
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as http,
            http.post(
                f"{endpoint}/chat/completions",
                json={"model": ctx.model, "messages": messages},
                headers={"Authorization": f"Bearer {secret}"},
            ) as response,
        ):
            text = await response.text()
            failed = response.status >= _BAD and ENDED not in text
        return vf.ProgramResult(exit_code=int(failed), stdout="", stderr=text if failed else "")


__all__ = ["FlashChat"]
