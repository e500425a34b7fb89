from __future__ import annotations

import random
import re

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from flash.errors import FlashError
from flash.testing.models import make_byte_tokenizer
from flash.training.generate import OwnSampler
from flash.training.merging import merged
from flash.training.sampler import Prompt, Sampling

pytestmark = pytest.mark.slow

TOKENIZER = make_byte_tokenizer()
STOPS = [TOKENIZER.eos_token_id, *range(40, 60)]
"""Many tokens that end an answer, so that rows of random weights end at different times."""

PLAIN = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
ARCHITECTURES = {
    "llama": PLAIN,
    "qwen3": PLAIN,
    "mistral": PLAIN | {"sliding_window": 12},
    "lfm2": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "layer_types": ["conv", "full_attention"],
    },
    "mamba": {"state_size": 4},
}
"""Plain attention, a sliding window, a recurrent state beside attention, and no cache at all."""


def tiny(architecture="llama", **config):
    """A model of random weights that says something else on every prompt."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            architecture,
            **{
                "vocab_size": len(TOKENIZER),
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "tie_word_embeddings": False,
                "pad_token_id": TOKENIZER.pad_token_id,
                "eos_token_id": TOKENIZER.eos_token_id,
            }
            | (config or ARCHITECTURES[architecture]),
        )
    )
    model.generation_config.eos_token_id = STOPS
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return model


def prompts(count, *, prefix=9, longest=30, seed=0):
    """Prompts of many lengths that begin alike; two are equal, and one is the others' beginning."""
    rng = random.Random(seed)
    shared = [rng.randrange(200) for _ in range(prefix)]
    rows = [
        shared + [rng.randrange(200) for _ in range(rng.randrange(1, longest))]
        for _ in range(count - 2)
    ]
    return [*rows, rows[0], shared or [7]]


def generate(model, tokenizer, rows, sampling, *, seed=0):
    """The completions of prompts that stand for episodes of their own, in order."""
    asked = [Prompt(row, f"{seed}/{place}", sampling.max_tokens) for place, row in enumerate(rows)]
    found = dict(OwnSampler(model, tokenizer).sample(asked, sampling))
    return [found[place] for place in range(len(rows))]


def one_by_one(model, rows, max_tokens):
    """What transformers says to each prompt alone, greedily, without padding."""
    answers = []
    for row in rows:
        ids_BT = torch.tensor([row])
        found_BT = model.generate(
            input_ids=ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            max_new_tokens=max_tokens,
            do_sample=False,
        )
        answers.append(tuple(found_BT[0, len(row) :].tolist()))
    return answers


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("prefix", [0, 9])
def test_greedy_answers_are_those_of_transformers_row_by_row(architecture, prefix):
    model = tiny(architecture)
    rows = prompts(12, prefix=prefix)

    found = generate(model, TOKENIZER, rows, Sampling(max_tokens=24))

    assert [answer.tokens for answer in found] == one_by_one(model, rows, 24)
    assert len({len(answer.tokens) for answer in found}) > 2, "the rows should end apart"


def test_more_rows_than_one_batch_holds_keep_their_order():
    model = tiny()
    rows = prompts(60, longest=400)

    found = generate(model, TOKENIZER, rows, Sampling(max_tokens=8))

    assert [answer.tokens for answer in found] == one_by_one(model, rows, 8)


def test_no_prompts_give_no_answers():
    assert generate(tiny(), TOKENIZER, [], Sampling(max_tokens=4)) == []


def test_text_leaves_out_the_stop_token_and_a_cut_answer_is_truncated():
    model = tiny()

    found = generate(model, TOKENIZER, prompts(20), Sampling(max_tokens=12))

    ended = [answer for answer in found if not answer.truncated]
    cut = [answer for answer in found if answer.truncated]
    assert ended
    assert cut
    for answer in ended:
        assert answer.tokens[-1] in STOPS
        assert answer.text == TOKENIZER.decode(answer.tokens[:-1], skip_special_tokens=True)
    for answer in cut:
        assert len(answer.tokens) == 12
        assert not set(answer.tokens) & set(STOPS)


def test_a_seed_decides_the_answers():
    model, rows = tiny(), prompts(6)
    sampling = Sampling(max_tokens=10, temperature=1.0)

    first = generate(model, TOKENIZER, rows, sampling, seed=3)

    assert generate(model, TOKENIZER, rows, sampling, seed=3) == first
    assert generate(model, TOKENIZER, rows, sampling, seed=4) != first


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_a_sampled_row_does_not_depend_on_its_neighbours(architecture):
    model, rows = tiny(architecture), prompts(9)
    sampling = Sampling(max_tokens=10, temperature=0.8, top_p=0.9)

    together = generate(model, TOKENIZER, rows, sampling)

    for count in (1, 4):
        alone = generate(model, TOKENIZER, rows[:count], sampling)
        assert [one.tokens for one in alone] == [one.tokens for one in together[:count]]


def test_equal_prompts_are_drawn_from_apart():
    found = generate(tiny(), TOKENIZER, [[5, 6]] * 8, Sampling(max_tokens=6, temperature=1.0))

    assert len({answer.tokens for answer in found}) > 4


def test_a_tiny_top_p_is_greedy():
    model, rows = tiny(), prompts(8)

    narrow = generate(model, TOKENIZER, rows, Sampling(12, temperature=1.0, top_p=1e-6))

    assert narrow == generate(model, TOKENIZER, rows, Sampling(12))


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (2.0, 1.0), (1.0, 0.5)])
def test_first_tokens_are_drawn_as_the_model_says(temperature, top_p):
    model = tiny()
    prompt = [3, 1, 4, 1, 5]
    with torch.inference_mode():
        logits_V = model(torch.tensor([prompt])).logits[0, -1].double()
    chances_V = (logits_V / temperature).softmax(-1)
    ranked_V, order_V = chances_V.sort(descending=True)
    ranked_V[ranked_V.cumsum(-1) - ranked_V >= top_p] = 0
    chances_V = torch.zeros_like(chances_V).scatter(0, order_V, ranked_V / ranked_V.sum())
    draws = 4000

    found = generate(
        model, TOKENIZER, [prompt] * draws, Sampling(1, temperature=temperature, top_p=top_p)
    )

    counts_V = torch.bincount(
        torch.tensor([answer.tokens[0] for answer in found]), minlength=len(TOKENIZER)
    )
    assert not counts_V[chances_V == 0].any()
    spread_V = (draws * chances_V * (1 - chances_V)).sqrt()
    # 300 counts: one beyond five standard deviations would be a wonder.
    assert ((counts_V - draws * chances_V).abs() <= 5 * spread_V + 1).all()


def with_adapter(model, *, spread=1.0):
    """The model with a LoRA adapter that changes its answers."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=spread)
    return adapted


def test_an_adapter_answers_as_it_does_unmerged():
    base = generate(tiny(), TOKENIZER, prompts(8), Sampling(12))
    model = with_adapter(tiny())

    found = generate(model, TOKENIZER, prompts(8), Sampling(12))

    assert [answer.tokens for answer in found] == one_by_one(model, prompts(8), 12)
    assert found != base


def test_sampling_leaves_a_model_in_training_bit_for_bit_as_it_was():
    model = with_adapter(tiny()).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]

    generate(model, TOKENIZER, prompts(4), Sampling(4))

    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert trained == [
        name for name, parameter in model.named_parameters() if parameter.requires_grad
    ]
    model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()


def test_an_error_while_merged_still_gives_the_weights_back():
    model = with_adapter(tiny())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    with pytest.raises(RuntimeError, match="on purpose"), merged(model):
        raise RuntimeError("on purpose")

    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_adapter_that_is_not_plain_is_merged_by_peft():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        tiny(), LoraConfig(r=4, target_modules="all-linear", use_dora=True, init_lora_weights=False)
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    found = generate(model, TOKENIZER, prompts(8), Sampling(12))

    assert [answer.tokens for answer in found] == one_by_one(model, prompts(8), 12)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("use_dora", [False, True])
def test_an_adapter_that_has_diverged_is_an_error(use_dora):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny(), LoraConfig(r=4, target_modules="all-linear", use_dora=use_dora))
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name).fill_(torch.nan)

    with pytest.raises(FlashError, match="not finite"):
        generate(model, TOKENIZER, prompts(4), Sampling(4))


def test_logits_that_are_no_numbers_are_an_error():
    model = tiny()
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(torch.nan)

    with pytest.raises(FlashError, match="logits are not finite"):
        generate(model, TOKENIZER, prompts(4), Sampling(4, temperature=1.0))


def test_a_call_that_is_abandoned_gives_the_weights_back():
    model = with_adapter(tiny())
    usual = [module.forward for module in model.modules()]
    rows = [Prompt(row, str(place), 12) for place, row in enumerate(prompts(8))]

    answers = OwnSampler(model, TOKENIZER).sample(rows, Sampling(12))
    next(answers)
    assert not torch.is_inference_mode_enabled(), "who reads the answers may train"
    answers.close()

    assert [module.forward for module in model.modules()] == usual


def test_answers_come_as_they_end():
    rows = [Prompt(row, str(place), 24) for place, row in enumerate(prompts(12))]

    found = list(OwnSampler(tiny(), TOKENIZER).sample(rows, Sampling(24, temperature=1.0)))

    lengths = [len(answer.tokens) for _, answer in found]
    assert lengths == sorted(lengths)
    assert len(set(lengths)) > 2
    assert sorted(place for place, _ in found) == list(range(12))


@pytest.mark.parametrize("architecture", ["llama", "mamba"])
def test_every_prompt_has_a_budget_of_its_own(architecture):
    budgets = [1, 5, 9, 2]
    rows = [
        Prompt(row, str(place), budget)
        for place, (row, budget) in enumerate(zip(prompts(4), budgets, strict=True))
    ]

    found = dict(OwnSampler(tiny(architecture), TOKENIZER).sample(rows, Sampling(9)))

    for place, budget in enumerate(budgets):
        assert len(found[place].tokens) == budget or not found[place].truncated
        assert len(found[place].tokens) <= budget


def log_probs(model, row, answer, temperature):
    """What the model, without a cache, says of the answer's tokens."""
    whole_BT = torch.tensor([[*row, *answer.tokens]])
    with torch.no_grad():
        logits_TV = model.eval()(whole_BT).logits[0, len(row) - 1 : -1].float()
    chances_TV = (logits_TV / temperature).log_softmax(-1)
    return chances_TV.gather(-1, torch.tensor(answer.tokens)[:, None])[:, 0]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.8), (0.0, 1.0)])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "mamba"])
def test_log_probabilities_are_the_trainers(architecture, temperature, top_p):
    model = tiny(architecture)
    model = with_adapter(model) if architecture == "llama" else model
    rows = prompts(6)

    found = generate(model, TOKENIZER, rows, Sampling(10, temperature, top_p))

    gaps = [
        (torch.tensor(answer.log_probs) - log_probs(model, row, answer, temperature or 1.0)).abs()
        for row, answer in zip(rows, found, strict=True)
    ]
    assert torch.cat(gaps).mean() <= 1e-4


@pytest.mark.parametrize("architecture", ["llama", "mamba"])
def test_a_stop_sequence_ends_an_answer_and_is_cut_from_its_text(architecture):
    model, rows = tiny(architecture), prompts(12)
    model.generation_config.eos_token_id = TOKENIZER.eos_token_id
    plain = generate(model, TOKENIZER, rows, Sampling(16, temperature=1.0))
    sequence = next(found[0] for one in plain if (found := re.search("[a-zA-Z ]{2}", one.text)))

    stopped = generate(
        model,
        TOKENIZER,
        rows,
        Sampling(16, temperature=1.0, stop_sequences=("never said", sequence)),
    )

    for before, after in zip(plain, stopped, strict=True):
        assert after.tokens == before.tokens[: len(after.tokens)]
        if sequence in before.text:
            assert after.text == before.text.partition(sequence)[0]
            assert TOKENIZER.decode(after.tokens).endswith(sequence)
            assert not after.truncated
        else:
            assert (after.tokens, after.text) == (before.tokens, before.text)
    assert any(sequence not in one.text for one in plain)


def test_a_special_token_may_be_a_stop_sequence():
    model = tiny()
    model.generation_config.eos_token_id = TOKENIZER.eos_token_id
    start = TOKENIZER.convert_tokens_to_ids("<|im_start|>")
    with torch.no_grad():
        model.get_output_embeddings().weight[start] = model.get_output_embeddings().weight[97]

    found = generate(
        model,
        TOKENIZER,
        prompts(32),
        Sampling(24, temperature=1.0, stop_sequences=("<|im_start|>",)),
    )

    ended = [one for one in found if one.tokens[-1] == start]
    assert ended
    assert not any(one.truncated for one in ended)
    assert all(start not in one.tokens[:-1] for one in found)


@pytest.fixture(scope="module")
def real_model(tmp_path_factory):
    from flash.context import plugin_context
    from flash.home import FlashHome
    from flash.plugins import PluginHost
    from flash.training.loading import load_base

    home = FlashHome(tmp_path_factory.mktemp("home"))
    record = PluginHost.default(home).get("model", "smollm2")
    source = record.make(plugin_context(home, "smollm2", {}))
    return load_base(source.fetch(record.cards[0].id, lambda _: None))


@pytest.mark.slow
def test_a_real_model_answers_as_in_transformers(real_model):
    from flash.training.chat import ChatRenderer

    model, tokenizer = real_model
    render = ChatRenderer(tokenizer, frozenset(), thinking=False).prompt
    texts = [
        render([{"role": "user", "content": f"Name {count} {things}. Be brief."}])
        for count in ("one", "two", "three")
        for things in ("colours", "animals that live in the sea", "towns")
    ]
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]

    found = generate(model, tokenizer, rows, Sampling(max_tokens=24))

    assert [answer.tokens for answer in found] == one_by_one(model, rows, 24)
    assert any(not answer.truncated for answer in found)


@pytest.mark.slow
def test_a_real_models_log_probabilities_are_the_trainers(real_model):
    model, tokenizer = real_model
    adapted = with_adapter(model, spread=0.01)
    texts = [f"{count} {things} are" for count in ("Two", "Nine") for things in ("dogs", "seas")]
    rows = [row for row in tokenizer(texts)["input_ids"] for _ in range(2)]

    found = generate(adapted, tokenizer, rows, Sampling(12, temperature=1.0))

    gaps = [
        (torch.tensor(answer.log_probs) - log_probs(adapted, row, answer, 1.0)).abs()
        for row, answer in zip(rows, found, strict=True)
    ]
    assert torch.cat(gaps).mean() <= 1e-4
