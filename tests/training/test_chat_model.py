from __future__ import annotations

import re

import pytest

from flash.episodes import Question
from flash.errors import StoreError
from flash.testing.models import make_tiny_model
from flash.training.chat_model import ChatModel, load_model
from flash.training.sampler import Sampling

THINKING_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>"
    "{% endfor %}<|im_start|>assistant\n"
    "{% if enable_thinking %}<think>\n{% else %}<think>\n\n</think>\n\n{% endif %}"
)
QUESTIONS = [Question(({"role": "user", "content": text},)) for text in ("one", "two", "three")]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_model(make_tiny_model(tmp_path_factory.mktemp("model")), None)


def ask(chat, questions):
    """The answers, in the order of the questions."""
    found = dict(chat(questions))
    return [found[place] for place in range(len(questions))]


def test_questions_are_answered_and_tokens_are_counted(loaded):
    told = []
    chat = ChatModel.here(*loaded, Sampling(4), progress=told.append)

    answers = ask(chat, QUESTIONS)

    alone = [ask(ChatModel.here(*loaded, Sampling(4)), [one])[0] for one in QUESTIONS]
    assert [answer.text for answer in answers] == [answer.text for answer in alone]
    assert chat.tokens == 12
    assert chat.seconds > 0
    assert told[-1] == "sampled 3 of 3 answers"


def test_a_trace_that_the_template_opens_belongs_to_the_answer(loaded):
    model, tokenizer = loaded
    usual, tokenizer.chat_template = tokenizer.chat_template, THINKING_TEMPLATE
    try:
        (thinking,) = ask(
            ChatModel.here(model, tokenizer, Sampling(4), thinking=True), QUESTIONS[:1]
        )
        (plain,) = ask(ChatModel.here(model, tokenizer, Sampling(4)), QUESTIONS[:1])
    finally:
        tokenizer.chat_template = usual

    assert thinking.text.startswith("<think>")
    assert "<think>" not in plain.text


def test_a_question_too_long_for_the_model_is_refused_and_the_others_are_answered(loaded):
    long = Question(({"role": "user", "content": "x" * 600},))

    first, second, third = ask(
        ChatModel.here(*loaded, Sampling(4)), [QUESTIONS[0], long, QUESTIONS[1]]
    )

    assert "does not fit the context of 512" in second.error
    assert first.error is third.error is None


def test_an_answer_has_the_room_that_is_left(loaded):
    model, tokenizer = loaded
    chat = ChatModel.here(model, tokenizer, Sampling(40), context_tokens=50)

    (answer,) = ask(chat, QUESTIONS[:1])

    assert len(answer.turn.prompt) + len(answer.turn.tokens) == 50
    assert answer.truncated


@pytest.mark.parametrize("content", ["no", [{"type": "image"}]])
def test_a_question_that_cannot_be_rendered_is_refused_and_the_others_are_answered(loaded, content):
    model, tokenizer = loaded
    usual = tokenizer.chat_template
    tokenizer.chat_template = (
        "{% if messages[0].content == 'no' %}{{ raise_exception('not this') }}{% endif %}" + usual
    )
    odd = Question(({"role": "user", "content": content},))
    try:
        first, second, third = ask(
            ChatModel.here(model, tokenizer, Sampling(4)), [QUESTIONS[0], odd, QUESTIONS[1]]
        )
    finally:
        tokenizer.chat_template = usual

    assert "not this" in second.error or "'image'" in second.error
    assert first.error is third.error is None
    assert first.text != ""


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_that_does_not_load_is_an_error_that_names_it(file, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = make_tiny_model(tmp_path / "model")
    base, _ = load_model(model, None)
    get_peft_model(base, LoraConfig(r=2, target_modules="all-linear")).save_pretrained(tmp_path)
    (tmp_path / file).write_bytes(b"{}")

    with pytest.raises(StoreError, match=re.escape(str(tmp_path))):
        load_model(model, tmp_path)
