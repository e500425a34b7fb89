"""Server-sent events: one JSON object a line, as OpenAI streams its chunks."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from aiohttp import web

from flash_serving_transformers.errors import Refused

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping


async def stream(
    request: web.Request, chunks: AsyncIterator[Mapping[str, Any]]
) -> web.StreamResponse:
    """
    Send chunks as they come, and `[DONE]`.

    Whatever fails before the first chunk is raised; what fails later is told in the stream, with
    its status, for the answer's own has been sent.
    """
    first = await anext(chunks, None)
    response = web.StreamResponse(
        headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
    )
    await response.prepare(request)
    try:
        if first is not None:
            await _send(response, first)
        async for chunk in chunks:
            await _send(response, chunk)
    except Refused as refused:
        error = refused.body["error"] | {"status": refused.status}
        await _send(response, {"error": error})
    await response.write(b"data: [DONE]\n\n")
    await response.write_eof()
    return response


async def _send(response: web.StreamResponse, chunk: Mapping[str, Any]) -> None:
    text = json.dumps(chunk, ensure_ascii=False, separators=(",", ":"))
    # Half a surrogate pair, which JSON can say and UTF-8 cannot, is no reason to fail.
    await response.write(b"data: " + text.encode(errors="replace") + b"\n\n")
