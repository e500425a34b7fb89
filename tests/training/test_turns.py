"""Episodes of several turns: the model's tokens are kept, and each template's glue is between."""

from __future__ import annotations

import random
import threading

import pytest
import torch

from flash.episodes import Answer, Question, play
from flash.scoring import Scoring
from flash.testing.models import CHAT_TEMPLATE, make_tiny_model
from flash.training.chat_model import ChatModel, episode_tokens, load_model
from flash.training.sampler import Sampling
from flash.values import Reward, Step, Task

WAIT_S = 30
OTHER_STOPS = range(40, 60)
"""Tokens that end a turn and that no template writes."""

LLAMA = (
    "{% for message in messages %}<|im_start|>{{ message.role }}<|pad|>\n\n"
    "{{ message.content | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<|pad|>\n\n{% endif %}"
)
STRIPPING = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}{{ message.content.split('</think>')[-1] | trim }}"
    "{% else %}{{ message.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
UNENDED = (
    "{% for message in messages %}{{ message.role | upper }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
TEMPLATES = {
    "chatml": (
        CHAT_TEMPLATE,
        "<|im_end|>",
        "\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
    ),
    "llama": (
        LLAMA,
        "<|im_end|>",
        "<|im_start|>user<|pad|>\n\n{}<|im_end|><|im_start|>assistant<|pad|>\n\n",
    ),
    "stripping": (
        STRIPPING,
        "<|im_end|>",
        "\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>\n",
    ),
    "unended": (UNENDED, "", "\nUSER: {}\nASSISTANT:"),
}
"""Each template with how it ends an answer, and what stands before the next one."""


class Chatter:
    """Answers every turn with what it heard, for as many turns as the task says."""

    max_score_concurrency = 2

    def start(self, task):
        return [{"role": "user", "content": task.input}]

    def tools(self, task):
        return None

    def max_turns(self, task):
        return task.data

    def step(self, task, messages, action):
        return Step(done=False, messages=({"role": "user", "content": said(messages)},))


def said(messages):
    """What the environment says next."""
    return f"{len(messages)} and on"


TASKS = [Task("a", "count up", 3), Task("b", "go", 1), Task("c", "tell me of the sea", 4)]
GROUPS = [task for task in TASKS for _ in range(2)]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A model that says something else on every prompt and often ends its turn."""
    model, tokenizer = load_model(make_tiny_model(tmp_path_factory.mktemp("model")), None)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *OTHER_STOPS]
    return model, tokenizer


@pytest.fixture(params=TEMPLATES)
def speaking(request, loaded):
    """The model with each chat template, and what it writes between two turns."""
    model, tokenizer = loaded
    usual = tokenizer.chat_template
    tokenizer.chat_template, end, between = TEMPLATES[request.param]
    yield model, tokenizer, end, between
    tokenizer.chat_template = usual


def one_rollout(speaking, task, place, sampling):
    """The turns of one episode as (prompt, tokens, log-probs), drawn alone and without a cache."""
    model, tokenizer, end, between = speaking
    stops = {tokenizer.eos_token_id, *OTHER_STOPS}
    messages = Chatter().start(task)
    opening = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    context = tokenizer(opening)["input_ids"]
    turns = []
    for turn in range(task.data):
        stream = random.Random(f"7/{place}/{turn}")
        tokens, log_probs = [], []
        while len(tokens) < sampling.max_tokens and not stops & {*tokens}:
            with torch.no_grad():
                logits_V = model(torch.tensor([context + tokens])).logits[0, -1].double()
            chances_V = (logits_V / sampling.temperature).softmax(-1)
            token = int((chances_V.cumsum(-1) > stream.random()).nonzero()[0])
            tokens.append(token)
            log_probs.append(float(chances_V[token].log()))
        turns.append((tuple(context), tuple(tokens), log_probs))
        messages = [*messages, {"role": "assistant", "content": ""}]
        heard = said(messages)
        messages = [*messages, {"role": "user", "content": heard}]
        ended = tokens[-1] == tokenizer.eos_token_id
        glue = ("" if ended else end) + between.format(heard)
        context = [*context, *tokens, *tokenizer(glue)["input_ids"]]
    return turns


def test_batched_episodes_are_token_for_token_those_played_one_at_a_time(speaking):
    sampling = Sampling(8, temperature=1.0)

    played = play(Chatter(), GROUPS, ChatModel.here(*speaking[:2], sampling), seed=7)

    ended = set()
    for place, (task, one) in enumerate(zip(GROUPS, played, strict=True)):
        expected = one_rollout(speaking, task, place, sampling)
        turns = [answer.turn for answer in one.answers]
        assert [(turn.prompt, turn.tokens) for turn in turns] == [turn[:2] for turn in expected]
        for turn, (_, _, log_probs) in zip(turns, expected, strict=True):
            assert turn.log_probs == pytest.approx(log_probs, abs=1e-4)
        ended |= {answer.truncated for answer in one.answers}
    assert ended == {True, False}, "some turns should end and some be cut off"


def test_the_environments_tokens_and_the_glue_carry_no_loss(speaking):
    model, tokenizer, end, between = speaking
    chat = ChatModel.here(model, tokenizer, Sampling(12, temperature=1.0))
    for one in play(Chatter(), GROUPS, chat, seed=7):
        opening, tokens, sampled, log_probs = episode_tokens(one.answers)

        turns = [answer.turn for answer in one.answers]
        kept = [
            pair
            for pair, mask in zip(zip(tokens, log_probs, strict=True), sampled, strict=True)
            if mask
        ]
        assert kept == [
            pair for turn in turns for pair in zip(turn.tokens, turn.log_probs, strict=True)
        ]
        assert opening == turns[0].prompt
        assert (*opening, *tokens) == (*turns[-1].prompt, *turns[-1].tokens)
        glue = tokenizer.decode([t for t, mask in zip(tokens, sampled, strict=True) if not mask])
        heard = [
            message["content"] for message in one.episode.messages if message["role"] == "user"
        ]
        ends = [end if turn.tokens[-1] != tokenizer.eos_token_id else "" for turn in turns]
        expected = [a + between.format(b) for a, b in zip(ends, heard[1:-1], strict=False)]
        assert glue == "".join(expected)
        assert not any(p for p, mask in zip(log_probs, sampled, strict=True) if not mask)


def test_what_the_model_thought_stays_in_what_it_sees(loaded):
    model, tokenizer = loaded
    usual, tokenizer.chat_template = tokenizer.chat_template, STRIPPING
    try:
        chat = ChatModel.here(model, tokenizer, Sampling(4), thinking=True)
        question = Question(({"role": "user", "content": "go"},))
        ((_, first),) = chat([question])
        again = Question(
            (*question.messages, {"role": "assistant", "content": ""}, *question.messages),
            said=first,
            since=question.messages,
        )
        ((_, second),) = chat([again])
    finally:
        tokenizer.chat_template = usual

    assert first.text.startswith("<think>")
    assert second.text.startswith("<think>")
    before = (*first.turn.prompt, *first.turn.tokens)
    assert second.turn.prompt[: len(before)] == before


def test_a_later_turn_has_the_room_that_is_left_and_none_ends_the_episode(loaded):
    room = [
        play(
            Chatter(),
            [Task("a", "go", 4)],
            ChatModel.here(*loaded, Sampling(12, temperature=1.0), context_tokens=context),
        )[0]
        for context in (60, 80, 400)
    ]

    for context, one in zip((60, 80), room, strict=False):
        last = one.answers[-1].turn
        assert len(one.answers) < 4
        assert len(last.prompt) + len(last.tokens) <= context
        assert one.episode.truncated
    assert len(room[2].answers) == 4


def test_a_template_that_does_not_show_an_answer_refuses_a_second_turn(loaded):
    model, tokenizer = loaded
    usual = tokenizer.chat_template
    tokenizer.chat_template = "{{ messages[-1].content if messages[-1].role == 'user' }}>"
    try:
        (one,) = play(Chatter(), TASKS[:1], ChatModel.here(model, tokenizer, Sampling(4)))
    finally:
        tokenizer.chat_template = usual

    assert "does not show the answer as it was given" in one.error


def test_a_model_elsewhere_is_asked_with_the_whole_conversation(loaded):
    (_, answer), *_ = ChatModel.here(*loaded, Sampling(4))(
        [
            Question(
                (
                    {"role": "user", "content": "one"},
                    {"role": "assistant", "content": "two"},
                    {"role": "user", "content": "three"},
                ),
                said=Answer("two"),
                since=({"role": "user", "content": "three"},),
            )
        ]
    )

    assert "two<|im_end|>" in loaded[1].decode(answer.turn.prompt)


def test_groups_are_scored_while_others_are_sampled(loaded):
    scored = threading.Event()

    class Scored(Chatter):
        def score(self, task, episodes):
            scored.set()
            return [Reward(1.0) for _ in episodes]

    scoring = Scoring(Scored(), group_size=2)
    open_when_scored = []

    def over(place, one):
        scoring.over(place, one)
        ended.add(place)
        if {2, 3} <= ended and not open_when_scored:
            assert scored.wait(WAIT_S), "scoring waits for sampling"
            open_when_scored.append(len(GROUPS) - len(ended))

    ended = set()
    play(Scored(), GROUPS, ChatModel.here(*loaded, Sampling(6, temperature=1.0)), over=over)

    assert open_when_scored == [4]
    assert [reward.score for reward in scoring.rewards()] == [1.0] * 6
