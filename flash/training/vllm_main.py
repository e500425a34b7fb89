"""
vLLM's API server, set right where it would serve something else: `python vllm_main.py ARGUMENTS…`.

Run by vLLM's interpreter, which has nothing of Flash, and never imported by ours.

vLLM 0.32 marks a token without an adapter by the index -1, and its operations for CPU take that
for the last adapter: an answer of the base model is then computed with whoever is there. They also
copy an adapter's weights for every token. Here each adapter is multiplied once with all its
tokens, and tokens without one get nothing. The processes that vLLM starts import this file first.

It also shows the chat template a description, null, of every tool that has none: another prompt
than that of training. Here a tool has what it came with.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    # Modules of Flash's are beside this file, and one of them is called vllm.
    beside = Path(__file__).resolve().parent
    sys.path[:] = [path for path in sys.path if not path or Path(path).resolve() != beside]

from typing import Any

from vllm.lora.ops.torch_ops import lora_ops  # type: ignore[import-not-found]  # only there
from vllm.lora.punica_wrapper import punica_cpu  # type: ignore[import-not-found]  # only there


def _multiplied(inputs: Any, weights: Any, indices: Any, dtype: Any) -> Any:
    """Return each row of `inputs` times its adapter's weights, or zero where it has none."""
    inputs = inputs.to(dtype)
    outputs = inputs.new_zeros(inputs.shape[0], weights.shape[-2])
    for index in indices.unique().tolist():
        if index < 0:
            continue
        weight = weights[index].reshape(weights.shape[-2:]).to(dtype)
        rows = (indices == index).nonzero()[:, 0]
        if len(rows) == len(inputs):
            return inputs @ weight.T
        outputs.index_copy_(0, rows, inputs[rows] @ weight.T)
    return outputs


def _shrink(inputs: Any, weights: Any, output: Any, indices: Any, scaling: float = 1.0) -> None:
    outputs = _multiplied(inputs, weights, indices, output.dtype)
    output[:, : outputs.shape[1]] = scaling * outputs


def _expand(inputs: Any, weights: Any, output: Any, indices: Any, add_inputs: bool = True) -> None:
    # An adapter and the model may add different padding to the output.
    width = min(weights.shape[-2], output.shape[1])
    _expand_slice(inputs, weights, output, indices, 0, width, add_inputs)


def _expand_slice(  # noqa: PLR0913, PLR0917 - as vLLM calls it
    inputs: Any,
    weights: Any,
    output: Any,
    indices: Any,
    slice_offset: int,
    slice_size: int,
    add_inputs: bool = True,
) -> None:
    outputs = _multiplied(inputs, weights, indices, output.dtype)[:, :slice_size]
    place = output[:, slice_offset : slice_offset + slice_size]
    if add_inputs:
        place += outputs
    else:
        place.copy_(outputs)


for _module in (lora_ops, punica_cpu):
    _module.bgmv_shrink = _shrink
    _module.bgmv_expand = _expand
    _module.bgmv_expand_slice = _expand_slice


def _leave_tools_as_they_are() -> None:
    from vllm.entrypoints.openai.chat_completion import (  # type: ignore[import-not-found]  # same
        protocol,
    )

    dumped = protocol.ChatCompletionToolsParam.model_dump

    def model_dump(tool: Any, **how: Any) -> Any:
        return dumped(tool, **{"exclude_unset": True, **how})

    protocol.ChatCompletionToolsParam.model_dump = model_dump


if __name__ == "__main__":
    _leave_tools_as_they_are()
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=False)
