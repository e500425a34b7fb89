"""What a request may say: everything else is refused, with the field's name."""

import json
import math

import pytest
from flash_serving_transformers.asked import read_chat, read_completion
from flash_serving_transformers.errors import Refused, failure

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def chat(**fields):
    return read_chat({"model": "m", "messages": [{"role": "user", "content": "Hi"}], **fields})


def completion(**fields):
    return read_completion({"model": "m", "prompt": "Hi", **fields})


def refused(read, fields):
    with pytest.raises(Refused) as error:
        read(**fields)
    assert error.value.status == 400
    return error.value.param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": ""}, "model"),
        ({"model": 3}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [3]}, "messages[0]"),
        ({"messages": [{"content": "Hi"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content",
        ),
        ({"messages": [{"role": "assistant", "tool_calls": [3]}]}, "messages[0].tool_calls"),
        ({"frequency": 1}, "frequency"),
        ({"best_of": 2}, "best_of"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_completion_tokens": "9"}, "max_completion_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"n": 0}, "n"),
        ({"n": 10**9}, "n"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 0.5}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"stop": 0}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"stop": ["x"] * 65}, "stop"),
        ({"stop": {"x": 1}}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"other": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options"),
        ({"logprobs": 2}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logit_bias": []}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"1": "much"}}, "logit_bias"),
        ({"user": 3}, "user"),
        ({"tools": {}}, "tools"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tools": [{"type": "retrieval", "function": {"name": "x"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "always"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": ["auto"]}, "tool_choice"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice",
        ),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"chat_template_kwargs": {"enable_thinking": "yes"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"other": True}}, "chat_template_kwargs"),
    ],
    ids=str,
)
def test_a_chat_request_is_refused(fields, param):
    assert refused(chat, fields) == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ["a"] * 100, "n": 2}, "prompt"),
        ({"messages": []}, "messages"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": True}, "logprobs"),
        ({"echo": True, "logprobs": 1}, "logprobs"),
        ({"suffix": "x"}, "suffix"),
    ],
    ids=str,
)
def test_a_completion_request_is_refused(fields, param):
    assert refused(completion, fields) == param


@pytest.mark.parametrize("body", [None, [], "x", 3, True])
def test_a_body_that_is_no_object_is_refused(body):
    with pytest.raises(Refused, match="must be a JSON object"):
        read_chat(body)


def test_what_is_not_said_is_as_openai_has_it():
    asked = chat(temperature=None)
    assert (asked.common.sampling.temperature, asked.common.n, asked.common.max_tokens) == (
        1.0,
        1,
        None,
    )
    assert (asked.tool_choice, asked.parallel, asked.thinking) == ("none", True, None)
    assert completion().common.max_tokens == 16


def test_a_temperature_that_is_nearly_nothing_is_none():
    assert chat(temperature=1e-320).common.sampling.temperature == 0
    assert chat(temperature=0.01).common.sampling.temperature == 0.01


def test_a_prompt_is_text_or_tokens_or_several_of_them():
    assert [completion(prompt=one).prompts for one in ("a", [1, 2], ["a", "b"], [[1], [2]])] == [
        ["a"],
        [[1, 2]],
        ["a", "b"],
        [[1], [2]],
    ]


def test_a_named_tool_is_the_only_one_that_may_be_called():
    other = {"type": "function", "function": {"name": "other"}}
    choice = {"type": "function", "function": {"name": "weather"}}
    asked = chat(tools=[TOOL, other], tool_choice=choice)
    assert (asked.tool_choice, list(asked.callable)) == ("required", [TOOL])
    assert list(asked.tools) == [TOOL, other]


@pytest.mark.slow
def test_memory_that_is_full_is_no_fault_of_the_client_and_passes():
    found = failure(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 GB"))
    assert (found.status, found.code) == (503, "out_of_memory")
    assert json.dumps(found.body)
