"""What an adapter is known by: made beside the checkpoint, and never in its way."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from flash.parity import NAME, GoldenSet
from flash.testing.models import make_tiny_model
from flash.training import golden as golden_module
from flash.training.chat import ChatRenderer, Conversation, stop_tokens
from flash.training.golden import GoldenMaker, openings
from flash.training.hotpath import HotPath, TargetScores
from flash.training.loading import attach_lora, load_base, save_adapter
from flash.training.trainer import random_states


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def trained(tiny):
    """A model whose adapter has been drawn rather than trained, and its tokenizer."""
    return _trained(tiny)


def _trained(folder):
    base, tokenizer = load_base(folder)
    model = attach_lora(base, rank=4, alpha=8.0, targets="all-linear", base="org/tiny", seed=1)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)
    return model, tokenizer


def conversation(number, text="Number {number}, please", **more):
    opening = [{"role": "user", "content": text.format(number=number)}]
    return Conversation(name=f"row {number}", opening=opening, target=(), **more)


def maker(model, tokenizer, rows=None, **more):
    renderer = ChatRenderer(
        tokenizer, stop_tokens(tokenizer, model.generation_config), thinking=False
    )
    asked = openings(rows or [conversation(number) for number in range(9)], renderer)
    told: list[str] = []
    settings = {"thinking": False, "stop": lambda: False, "tell": told.append} | more
    return GoldenMaker(
        TargetScores(model, HotPath(), told.append), tokenizer, asked, **settings
    ), told


def read(content, folder):
    (folder / NAME).write_bytes(content)
    return GoldenSet.read(folder)


def state(model):
    return (
        [one.detach().clone() for one in model.parameters()],
        [one.requires_grad for one in model.parameters()],
        [None if one.grad is None else one.grad.clone() for one in model.parameters()],
        [module.training for module in model.modules()],
        list(model.active_adapters),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
    )


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def test_the_log_probabilities_are_the_models_own_with_the_adapter_and_without(trained, tmp_path):
    model, tokenizer = trained
    made, told = maker(model, tokenizer, stop_sequences=("@@",), thinking=True)

    found = read(made.make(model), tmp_path)

    assert not told
    assert (found.thinking, list(found.stop_sequences), found.dtype) == (True, ["@@"], "float32")
    assert len(found.prompts) == golden_module.PROMPTS
    for one in found.prompts:
        tokens = torch.tensor([[*one.prompt, *one.completion]])
        places = slice(len(one.prompt) - 1, -1)
        with torch.no_grad():
            adapted = model(tokens).logits[0, places]
            with model.disable_adapter():
                base = model(tokens).logits[0, places]
        assert adapted.argmax(-1).tolist() == list(one.completion)
        for logits, said in ((adapted, one.log_probs), (base, one.base_log_probs)):
            expected = logits.log_softmax(-1).gather(1, torch.tensor(one.completion)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(said), expected, atol=1e-4, rtol=0)
        text = tokenizer.apply_chat_template(
            one.messages, tokenize=False, add_generation_prompt=True
        )
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == list(one.prompt)


@pytest.mark.parametrize("training", [True, False])
def test_training_goes_on_as_if_none_had_been_made(trained, training):
    model, tokenizer = trained
    model.train(training)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    made, _ = maker(model, tokenizer)
    before, drawn = state(model), random_states()

    assert made.make(model)

    assert equal(state(model), before)
    assert equal(list(random_states().values()), list(drawn.values()))


def test_the_same_adapter_is_known_by_the_same_bytes_in_another_attempt(tiny):
    sets = [
        made.make(model)
        for model, tokenizer in map(_trained, [tiny, tiny])
        for made, _ in [maker(model, tokenizer)]
    ]

    assert sets[0] == sets[1]


def test_an_adapter_without_finite_weights_is_saved_without_and_that_is_told_once(trained):
    model, tokenizer = trained
    with torch.no_grad():
        next(one for name, one in model.named_parameters() if "lora_B" in name).fill_(torch.nan)
    made, told = maker(model, tokenizer)

    assert made.make(model) is None
    assert made.make(model) is None
    (sentence,) = told
    assert "without a golden set" in sentence
    assert "not finite" in sentence


def test_a_stop_costs_the_golden_set_once_it_takes_too_long(trained, monkeypatch):
    model, tokenizer = trained
    made, told = maker(model, tokenizer, stop=lambda: True)
    assert made.make(model)

    ticks = itertools.count()
    monkeypatch.setattr(golden_module.time, "monotonic", lambda: float(next(ticks)))

    assert made.make(model) is None
    assert made.make(model, in_time=False)
    assert not told


def test_a_model_that_fails_to_make_one_costs_no_checkpoint(trained):
    model, tokenizer = trained
    made, told = maker(model, tokenizer)
    model.get_base_model().get_input_embeddings().register_forward_pre_hook(_out_of_memory)

    assert made.make(model) is None
    assert "out of memory" in told[0]


def _out_of_memory(*_):
    message = "CUDA out of memory"
    raise RuntimeError(message)


def test_prompts_are_the_first_distinct_ones_that_are_short_enough(trained):
    _, tokenizer = trained
    renderer = ChatRenderer(tokenizer, frozenset(), thinking=False)
    rows = [
        conversation(1),
        conversation(1),
        conversation(2, text="long " * 200),
        conversation(3, tools=[{"type": "function", "function": {"name": "look"}}]),
        Conversation(
            name="no text", opening=[{"role": "user", "content": [{"type": "image"}]}], target=()
        ),
        *[conversation(number) for number in range(4, 9)],
    ]

    found = openings(rows, renderer)

    said = [one.messages[0]["content"] for one in found]
    assert said == [f"Number {number}, please" for number in (1, 3, 4, 5)]
    assert found[1].tools == rows[3].tools


def test_where_all_are_long_the_shortest_is_asked(trained):
    _, tokenizer = trained
    renderer = ChatRenderer(tokenizer, frozenset(), thinking=False)

    (one,) = openings([conversation(n, text="long " * (200 - n)) for n in range(3)], renderer)

    assert one.messages[0]["content"] == "long " * 198


def test_a_prompt_that_fills_the_models_context_is_none_to_ask(trained):
    model, tokenizer = trained
    made, told = maker(model, tokenizer, rows=[conversation(1, text="x" * 600)])

    assert made.make(model) is None
    assert "leaves room in the model's context" in told[0]


def test_messages_are_kept_as_a_request_has_them(trained):
    _, tokenizer = trained
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "é"}}}
    row = Conversation(
        name="row",
        opening=[
            {"role": "user", "content": [{"type": "text", "text": "Look"}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
        ],
        target=(),
    )

    (one,) = openings([row], ChatRenderer(tokenizer, frozenset(), thinking=False))

    assert one.messages[0]["content"] == "Look"
    (kept,) = one.messages[1]["tool_calls"]
    assert json.loads(kept["function"]["arguments"]) == {"at": "é"}
    assert row.opening[1]["tool_calls"][0]["function"]["arguments"] == {"at": "é"}


def test_it_is_a_file_of_the_adapter(trained, tmp_path):
    model, tokenizer = trained
    made, _ = maker(model, tokenizer)

    save_adapter(model, tmp_path / "with", made.make(model))
    save_adapter(model, tmp_path / "without")

    assert GoldenSet.read(tmp_path / "with") is not None
    assert GoldenSet.read(tmp_path / "without") is None
