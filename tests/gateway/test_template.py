"""Whether a chat template opens the trace itself is read off the prompt that it makes."""

import pytest

from flash.gateway.template import opens_trace


def answering(text, status=200):
    def ask(path, body):
        assert (path, body["echo"], body["max_tokens"]) == ("/completions", True, 0)
        assert body["prompt"] == list(range(68, 100))
        return status, {"choices": [{"text": text}]}

    return ask


@pytest.mark.parametrize(
    ("text", "opens"),
    [
        ("<|im_start|>assistant\n", False),
        ("<|im_start|>assistant\n<think>\n", True),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("</think>4<|im_end|>\n<|im_start|>assistant\n<think>\n", True),
    ],
)
def test_a_prompt_that_ends_within_the_trace_opens_it(text, opens):
    assert opens_trace(answering(text), "tiny", range(100)) is opens


def test_a_server_that_does_not_echo_leaves_it_open():
    assert opens_trace(answering("no", status=400), "tiny", range(100)) is None
    assert opens_trace(lambda *_: (200, {"choices": []}), "tiny", []) is None
