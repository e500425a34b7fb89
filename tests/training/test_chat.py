"""Which tokens of a conversation are trained, over templates of many habits."""

from __future__ import annotations

from pathlib import Path

import pytest
import trl
from transformers import GenerationConfig

from flash.errors import TrainingDataError
from flash.testing.models import make_byte_tokenizer
from flash.training.chat import ChatRenderer, Conversation, stop_tokens

TEMPLATES = Path(trl.__file__).parent / "chat_templates"

ASK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "One?"}]
ANSWER = {"role": "assistant", "content": "First.\nDone é漢."}
TWO_TURNS = [
    {"role": "assistant", "content": "First."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "Second."},
]
THINKING = [
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nFirst."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "<think>\nha\n</think>\n\nSecond."},
]


def renderer(template: str | None = None, *, end: str = "<|im_end|>", thinking: bool = False):
    tokenizer = make_byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": end})
    if template is not None:
        named = not template.startswith("{")
        tokenizer.chat_template = (
            (TEMPLATES / f"{template}.jinja").read_text() if named else template
        )
    return ChatRenderer(tokenizer, stops=stop_tokens(tokenizer, None), thinking=thinking)


def render(renderer, target, opening=ASK, tools=None):
    return renderer.render(Conversation(name="row 7", opening=opening, target=target, tools=tools))


def trained(rendered) -> list[str]:
    return [text for text, train in rendered.pieces() if train]


# The template, the token that ends a turn in it.
ONE_TEXT = [
    ("llama3", "<|eot_id|>"),
    ("gemma3", "<end_of_turn>"),
    ("qwen2_5", "<|im_end|>"),
    ("qwen3_instruct_2507", "<|im_end|>"),
    ("lfm2", "<|im_end|>"),
    ("cohere", "<|END_OF_TURN_TOKEN|>"),
    ("phi3_training", "<|end|>"),
    # Found by its {% generation %} marks: the prompt has an empty thinking block, answers do not.
    ("deepseekv3_training", "<\uff5cend\u2581of\u2581sentence\uff5c>"),
]


@pytest.mark.parametrize(("template", "end"), ONE_TEXT)
def test_every_answer_of_the_target_is_trained_with_its_end(template, end):
    documents = render(renderer(template, end=end), TWO_TURNS)
    answers = [text for one in documents for text in trained(one)]

    assert [text.removeprefix("<\uff5cAssistant\uff5c>") for text in answers] == [
        f"First.{end}",
        f"Second.{end}",
    ]


@pytest.mark.parametrize(("template", "end"), ONE_TEXT[:-1])
def test_the_text_before_an_answer_is_the_prompt_that_asks_for_it(template, end):
    made = renderer(template, end=end)
    (document,) = render(made, [ANSWER])

    assert document.pieces()[0] == (made.prompt(ASK), False)
    assert document.pieces()[1] == (f"First.\nDone é漢.{end}", True)
    assert len(document.pieces()) == 2


def test_a_template_that_drops_earlier_thinking_gives_a_document_a_turn():
    first, second = render(renderer("qwen3", thinking=True), THINKING)

    assert trained(first) == ["<think>\nhm\n</think>\n\nFirst.<|im_end|>"]
    assert trained(second) == ["<think>\nha\n</think>\n\nSecond.<|im_end|>"]
    assert "hm" not in second.text


def test_a_template_that_keeps_earlier_thinking_gives_one_document():
    (document,) = render(renderer("qwen2_5"), THINKING)

    assert len(trained(document)) == 2


def test_the_switch_for_thinking_reaches_the_template():
    (off,) = render(renderer("qwen3", thinking=False), [ANSWER])
    (on,) = render(renderer("qwen3", thinking=True), [ANSWER])

    assert off.pieces()[0][0].endswith("<think>\n\n</think>\n\n")
    assert trained(off) == ["First.\nDone é漢.<|im_end|>"]
    assert trained(on) == ["<think>\n\n</think>\n\nFirst.\nDone é漢.<|im_end|>"]


def test_a_default_system_prompt_is_context():
    smollm2 = (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "<|im_start|>system\nYou are a default.<|im_end|>\n{% endif %}"
        "<|im_start|>{{ message['role'] + '\n' + message['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    (document,) = render(renderer(smollm2), TWO_TURNS, opening=ASK[1:])

    assert "You are a default." in document.pieces()[0][0]
    assert trained(document) == ["First.<|im_end|>", "Second.<|im_end|>"]


def test_answers_in_the_opening_are_context():
    opening = [*ASK, {"role": "assistant", "content": "Shown."}, ASK[1]]
    for template, end in (("qwen2_5", "<|im_end|>"), ("qwen3_training", "<|im_end|>")):
        (document,) = render(renderer(template, end=end), [ANSWER], opening=opening)
        (answer,) = trained(document)

        assert answer.endswith("First.\nDone é漢.<|im_end|>")
        assert "Shown." in document.pieces()[0][0]


def test_tools_go_through_the_template_and_results_are_context():
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}],
    }
    target = [call, {"role": "tool", "content": "2"}, {"role": "assistant", "content": "Two."}]
    (document,) = render(renderer(), target, tools=tools)
    (byte_qwen,) = render(renderer("qwen2_5"), target, tools=tools)

    assert '"name": "add"' in document.pieces()[0][0]
    assert trained(document) == [
        '<call>{"name": "add", "arguments": {"a": 1}}</call><|im_end|>',
        "Two.<|im_end|>",
    ]
    assert len(trained(byte_qwen)) == 2
    assert '"arguments": {"a": 1}' in trained(byte_qwen)[0]


def test_nothing_after_the_stop_token_is_kept():
    (document,) = render(renderer(), [ANSWER, {"role": "user", "content": "Thanks!"}])

    assert document.text.endswith("漢.<|im_end|>")
    assert document.document.labels[-1] == document.document.tokens[-1]


def test_text_parts_are_joined_and_images_refused():
    parts = [{"type": "text", "text": "One"}, {"type": "text", "text": "?"}]
    (document,) = render(renderer(), [ANSWER], opening=[{"role": "user", "content": parts}])

    assert "One?" in document.text
    with pytest.raises(TrainingDataError, match=r"row 7: .*'image_url'"):
        render(renderer(), [ANSWER], opening=[{"role": "user", "content": [{"type": "image_url"}]}])


@pytest.mark.parametrize(
    ("template", "opening", "target", "message"),
    [
        ("deepseekv3", ASK, TWO_TURNS, "row 7: the chat template renders its answer differently"),
        ("qwen3", ASK, THINKING, "row 7: the chat template renders its answer differently"),
        ("gemma", ASK, TWO_TURNS, "row 7: the chat template cannot render it: System role"),
        ("idefics3", ASK, TWO_TURNS, "row 7: the chat template leaves out"),
        (None, ASK, [ASK[1]], "row 7: its target has no assistant message"),
        (None, [], [ANSWER], "row 7: the chat template renders its answer differently"),
    ],
)
def test_what_cannot_be_told_apart_is_refused_with_the_row(template, opening, target, message):
    with pytest.raises(TrainingDataError, match=message):
        render(renderer(template), target, opening=opening)


def test_stop_tokens_are_the_tokenizers_and_the_models():
    tokenizer = make_byte_tokenizer()

    assert stop_tokens(tokenizer, None) == {tokenizer.eos_token_id}
    assert stop_tokens(tokenizer, GenerationConfig(eos_token_id=[3, 5])) == {
        tokenizer.eos_token_id,
        3,
        5,
    }
