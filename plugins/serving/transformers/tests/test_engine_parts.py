"""The engine's parts, each by itself: room, attention, choice, and adapters on disk."""

import random
from collections import Counter
from itertools import pairwise

import pytest
import torch
from flash_serving_transformers.adapters import Adapter, read_adapter
from flash_serving_transformers.attention import Seen, Span
from flash_serving_transformers.cache import Arena
from flash_serving_transformers.lora import Mixture
from flash_serving_transformers.requests import Request
from flash_serving_transformers.sampling import Chooser, choose
from peft import LoraConfig
from safetensors.torch import save_file

from flash.errors import UsageError


def write(arena, stretch, tokens, value):
    """Write so many columns behind what a stretch holds."""
    start = stretch.start + stretch.used
    arena.columns_N = torch.arange(start, start + tokens)
    states = torch.full((1, 1, tokens, 2), float(value))
    keys, _ = arena.update(states, states, 0)
    stretch.used += tokens
    return keys


def test_stretches_keep_what_they_hold_however_they_come_grow_and_go():
    rng = random.Random(0)
    arena = Arena(1000)
    held = {arena.take(9): [-1]}
    keys = write(arena, *held, 1, -1)
    refused = 0
    for value in range(400):
        which = rng.choice(["take", "write", "write", "write", "free", "gather"])
        if which == "take":
            stretch = arena.take(rng.randrange(1, 200))
            if stretch is not None:
                held[stretch] = []
        elif which == "gather":
            arena.gather()
        elif held:
            stretch = rng.choice(list(held))
            tokens = rng.randrange(1, 150)
            if which == "free":
                arena.free(stretch)
                del held[stretch]
            elif arena.grow(stretch, stretch.used + tokens):
                keys = write(arena, stretch, tokens, value)
                held[stretch] += [value] * tokens
            else:
                refused += 1
                assert arena.used - stretch.room + stretch.used + tokens > 1000 - 64
        for stretch, values in held.items():
            there = keys[0, 0, stretch.start : stretch.start + stretch.used, 0]
            assert there.tolist() == values
        ends = [(one.start, one.end) for one in arena.held]
        assert ends == sorted(ends)
        assert all(end <= start for (_, end), (start, _) in pairwise(ends))
    assert refused > 5


@pytest.mark.parametrize("window", [None, 5])
def test_gathered_rows_read_what_rows_read_one_by_one(window):
    torch.manual_seed(0)
    spans = [Span(130, 9, 1), Span(0, 4, 1), Span(64, 20, 1), Span(200, 12, 7), Span(250, 6, 6)]
    tokens = sum(span.new for span in spans)
    query, key, value = torch.randn(4, tokens, 8), torch.randn(2, 300, 8), torch.randn(2, 300, 8)
    by_row, gathered = (
        Seen(spans, torch.device("cpu"), gather=gather).attend(query, key, value, window, 0.3)
        for gather in (False, True)
    )

    torch.testing.assert_close(by_row, gathered)
    at = 0
    for span in spans:
        for new in range(span.new):
            last = span.length - span.new + new + 1
            first = 0 if window is None else max(0, last - window)
            seen = slice(span.start + first, span.start + last)
            keys, values = (one[:, seen].repeat_interleave(2, 0) for one in (key, value))
            weights = (query[:, at, None] @ keys.transpose(1, 2) * 0.3).softmax(-1)
            torch.testing.assert_close(by_row[at], (weights @ values)[:, 0])
            at += 1


class TwoLayers(torch.nn.Module):
    """All of a model that a mixture looks at."""

    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(6, 9), torch.nn.Linear(9, 5, bias=False)

    def get_output_embeddings(self):
        return None

    def forward(self, x):
        return self.down(self.up(x))


def test_each_token_gets_its_own_adapter_whichever_came_and_went():
    torch.manual_seed(0)
    rng = random.Random(0)
    model = TwoLayers()
    shapes = {"up": (6, 9), "down": (9, 5)}
    plain = {path: (getattr(model, path).weight.detach().clone().T) for path in shapes}
    bias = model.up.bias.detach()
    adapters = [None]
    for number in range(11):
        paths = [["up", "down"], ["up"], ["down"]][number % 3]
        rank = number + 1
        parts = {
            p: (torch.randn(shapes[p][0], rank), torch.randn(rank, shapes[p][1])) for p in paths
        }
        adapters.append(Adapter(f"a{number}", rank, parts))
    mixture = Mixture(model)

    def layer(path, adapter, x):
        y = x @ plain[path]
        if adapter is not None and path in adapter.parts:
            a, b = adapter.parts[path]
            y = y + x @ a @ b
        return y

    def alone(adapter, x):
        return layer("down", adapter, layer("up", adapter, x) + bias)

    for _ in range(80):
        few = rng.sample(adapters, rng.randrange(1, 9))
        rows = rng.choices(few, k=rng.randrange(0, 14))
        pieces = [
            (rng.choice(few), rng.randrange(2, 5))
            for _ in range(rng.randrange(0 if rows else 1, 3))
        ]
        order = mixture.arrange(rows)
        for adapter, tokens in pieces:
            mixture.append(adapter, tokens)
        if rng.random() < 0.1:
            mixture.keep(few)
        whose = [rows[at] for at in order] + [one for one, tokens in pieces for _ in range(tokens)]
        assert sorted(order) == list(range(len(rows)))
        x = torch.randn(1, len(whose), 6)
        with torch.inference_mode():
            found = model(x)[0]
        expected = torch.stack([alone(one, x[0, at]) for at, one in enumerate(whose)])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def chooser(**settings):
    return Chooser(Request(tokens=[1], adapter=None, max_tokens=9, **settings))


LOGITS = [2.0, 1.0, 0.0, -1.0, -2.0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": 0.0}, {0}),
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.6}, {0}),
        ({"top_p": 0.65}, {0, 1}),
        ({"top_k": 3, "top_p": 0.9}, {0, 1}),
        ({"min_p": 0.13}, {0, 1, 2}),
        ({"min_p": 1.0}, {0}),
        ({"top_p": 0.0}, {0}),
        ({"logit_bias": {4: 100.0}}, {4}),
        ({"temperature": 0.0, "logit_bias": {0: -100.0}}, {1}),
        ({}, {0, 1, 2, 3, 4}),
    ],
)
def test_settings_leave_the_words_that_they_name(settings, words):
    one = chooser(seed=3, **settings)
    # One of 2000 words more: a vocabulary of several blocks, none of them likely.
    logits = torch.tensor(LOGITS + [-1e9] * 2000)
    drawn = choose(logits.repeat(240, 1), [one] * 240)

    assert {token.id for token in drawn} == words


def test_words_come_as_often_as_they_are_likely_at_the_temperature():
    rows = [chooser(seed=seed, temperature=0.7 + 0.1 * seed) for seed in range(3)]
    counts = [Counter() for _ in rows]
    drawn = choose(torch.tensor([LOGITS] * 2100), rows * 700)
    for count, token in zip(counts * 700, drawn, strict=True):
        count[token.id] += 1

    for row, count in zip(rows, counts, strict=True):
        likely = (torch.tensor(LOGITS) / row.request.temperature).softmax(-1)
        for word, probability in enumerate(likely.tolist()):
            assert count[word] / 700 == pytest.approx(probability, abs=0.06)


def test_penalties_count_what_was_said():
    one = chooser(temperature=0.0, presence_penalty=0.9, frequency_penalty=0.4)
    said = []
    for _ in range(5):
        (token,) = choose(torch.tensor([LOGITS]), [one])
        one.accept(token.id)
        said.append(token.id)

    # 2.0, then 2.0 - 1.3 < 1.0, then 1.0 - 1.3 < 2.0 - 1.3, then 0.0 < 2.0 - 1.7, then 0.0
    assert said == [0, 1, 0, 0, 2]


def test_log_probabilities_are_those_before_temperature_bias_and_cuts():
    rows = [
        chooser(top_logprobs=2, temperature=2.0, top_k=1, logit_bias={3: 50.0}),
        chooser(),
        chooser(top_logprobs=0, temperature=0.0),
    ]
    biased, without, plain = choose(torch.tensor([LOGITS] * 3), rows)
    expected = torch.tensor(LOGITS).log_softmax(-1).tolist()

    assert (biased.id, biased.log_prob) == (3, pytest.approx(expected[3]))
    assert biased.top == ((0, pytest.approx(expected[0])), (1, pytest.approx(expected[1])))
    assert (without.log_prob, without.top) == (None, ())
    assert (plain.id, plain.log_prob, plain.top) == (0, pytest.approx(expected[0]), ())


def test_logits_that_are_no_numbers_are_an_error_of_their_row():
    bad, good = choose(
        torch.tensor([[float("nan")] * 5, LOGITS]), [chooser(), chooser(temperature=0.0)]
    )

    assert "not finite" in str(bad)
    assert good.id == 0


LINEARS = {
    "model.q_proj": torch.nn.Linear(6, 4, bias=False),
    "model.v_proj": torch.nn.Linear(6, 2, bias=False),
}


def save(folder, *, change=lambda tensors: None, **config):
    """Write an adapter of rank 3 for `LINEARS`."""
    settings = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]} | config
    LoraConfig(**settings).save_pretrained(str(folder))
    tensors = {}
    for path, linear in LINEARS.items():
        name = f"base_model.model.{path}.lora_"
        tensors[f"{name}A.weight"] = torch.ones(3, linear.in_features)
        tensors[f"{name}B.weight"] = torch.ones(linear.out_features, 3)
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def test_an_adapter_is_read_with_its_scaling(tmp_path):
    save(tmp_path, alpha_pattern={"v_proj": 3})
    adapter = read_adapter("mine", tmp_path, LINEARS, torch.empty(0))
    save(tmp_path, use_rslora=True)
    stable = read_adapter("mine", tmp_path, LINEARS, torch.empty(0))

    assert adapter.rank == 3
    assert {path: float(b[0, 0]) for path, (_, b) in adapter.parts.items()} == {
        "model.q_proj": 2.0,
        "model.v_proj": 1.0,
    }
    assert float(stable.parts["model.q_proj"][1][0, 0]) == pytest.approx(6 / 3**0.5)


A_OF_Q = "base_model.model.model.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "config", "sentence"),
    [
        (lambda t: t[A_OF_Q].fill_(float("nan")), {}, f"tensor {A_OF_Q} holds .* not finite"),
        (lambda t: t[A_OF_Q].fill_(float("inf")), {}, f"tensor {A_OF_Q} holds .* not finite"),
        (lambda t: t.pop(A_OF_Q), {}, f"tensor {A_OF_Q} is missing"),
        (lambda t: t.clear(), {}, "it holds no tensors"),
        (
            lambda t: t.update({A_OF_Q: torch.ones(3, 5)}),
            {},
            rf"tensor {A_OF_Q} is \[3, 5\], where the base model and rank 3 have \[3, 6\]",
        ),
        (lambda t: None, {"r": 4}, r"is \[3, 6\], where the base model and rank 4 have \[4, 6\]"),
        (
            lambda t: t.update({A_OF_Q.replace("q_", "z_"): torch.ones(3, 6)}),
            {},
            r"z_proj.lora_A.weight belongs to no linear layer that the base model has",
        ),
        (lambda t: t.update({"what": torch.ones(1)}), {}, "its tensor what belongs to no"),
        (lambda t: None, {"use_dora": True}, "use_dora = True, which is not plain LoRA"),
        (lambda t: None, {"modules_to_save": ["x"]}, "modules_to_save = .* not plain LoRA"),
        (lambda t: None, {"bias": "all"}, "bias = 'all', which is not plain LoRA"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_and_the_reason_named(
    tmp_path, change, config, sentence
):
    save(tmp_path, change=change, **config)

    with pytest.raises(UsageError, match=rf"^adapter mine cannot be served: .*{sentence}"):
        read_adapter("mine", tmp_path, LINEARS, torch.empty(0))


def test_a_folder_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"its files in .* cannot be read"):
        read_adapter("mine", tmp_path, LINEARS, torch.empty(0))
    save(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(UsageError, match=r"its files in .* cannot be read"):
        read_adapter("mine", tmp_path, LINEARS, torch.empty(0))
