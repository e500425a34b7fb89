"""The parity gate: what is served is what was trained, and whatever else it may be is seen."""

from __future__ import annotations

import json
import math

import attrs
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from flash.adapters import CONFIG, WEIGHTS
from flash.errors import StoreError
from flash.parity import FORMAT, NAME, Golden, GoldenSet, compare, other_from
from flash.testing.adapters import make_adapter
from flash.testing.models import CHAT_TEMPLATE, make_tiny_model
from flash.training.chat import ChatRenderer
from flash.training.loading import load_base


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny model that is sure of some tokens, as real ones are."""
    folder = make_tiny_model(tmp_path_factory.mktemp("model"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_input_embeddings().weight *= 7
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory):
    return make_adapter(tiny, tmp_path_factory.mktemp("adapter"), seed=5)


@pytest.fixture(scope="module")
def golden(adapter):
    return GoldenSet.read(adapter)


def copied(adapter, folder, tensors=lambda one: one, **config):
    """Copy an adapter, with its tensors and its configuration changed."""
    said = json.loads((adapter / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(said | config))
    save_file(tensors(load_file(adapter / WEIGHTS)), folder / WEIGHTS)
    return folder


def replay(tiny, adapter=None, dtype=torch.float32, merged_in=None):
    """Serve the model, with an adapter or without, and say the log-probabilities of tokens."""
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=merged_in or dtype)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False)
        model = model.to(merged_in or dtype).merge_and_unload()
    model = model.to(dtype).eval()

    @torch.no_grad()
    def log_probs(tokens, completion):
        asked = [*tokens, *completion]
        logits = model(torch.tensor([asked])).logits[0, -len(completion) - 1 : -1].float()
        return logits.log_softmax(-1).gather(1, torch.tensor([completion]).T)[:, 0].tolist()

    return log_probs


def served(golden, tiny, adapter=None, **how):
    return compare(golden, replay(tiny, adapter, **how), replay(tiny))


@pytest.mark.slow
def test_the_adapter_that_was_trained_holds_and_proves_that_it_is_it(golden, tiny, adapter):
    found = served(golden, tiny, adapter)

    assert found.holds
    assert found.proves_identity
    assert found.tokens == sum(len(one.completion) for one in golden.prompts)
    assert found.mean < 1e-5
    assert found.change_mean > 0.1


@pytest.mark.slow
def test_a_server_of_lower_precision_holds_as_its_base_model_does(golden, tiny, adapter):
    both = [replay(tiny, one, dtype=torch.bfloat16) for one in (adapter, None)]

    found = compare(golden, *both)

    assert found.holds
    assert found.mean > 1e-3


@pytest.mark.slow
def test_a_wrong_adapter_is_caught(golden, tiny, tmp_path):
    other = make_adapter(tiny, tmp_path, seed=6)

    assert not served(golden, tiny, other).holds


@pytest.mark.slow
def test_no_adapter_at_all_is_caught(golden, tiny):
    assert not served(golden, tiny).holds


@pytest.mark.slow
def test_a_half_loaded_adapter_is_caught(golden, tiny, adapter, tmp_path):
    def halved(tensors):
        return {k: v * 0 if "layers.1" in k else v for k, v in tensors.items()}

    assert not served(golden, tiny, copied(adapter, tmp_path, halved)).holds


@pytest.mark.slow
@pytest.mark.parametrize("part", ["self_attn.q_proj", "mlp.down_proj"])
def test_an_adapter_without_one_module_of_one_layer_is_caught(
    golden, tiny, adapter, tmp_path, part
):
    def without(tensors):
        return {k: v * 0 if f"layers.1.{part}" in k else v for k, v in tensors.items()}

    assert not served(golden, tiny, copied(adapter, tmp_path, without)).holds


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [16.0, 4.0, 9.0])
def test_a_wrong_scale_is_caught(golden, tiny, adapter, tmp_path, alpha):
    assert not served(golden, tiny, copied(adapter, tmp_path, lora_alpha=alpha)).holds


@pytest.mark.slow
def test_a_wrong_rank_is_caught(golden, tiny, adapter, tmp_path):
    def cut(tensors):
        return {k: (v[:2] if "lora_A" in k else v[:, :2]).contiguous() for k, v in tensors.items()}

    other = copied(adapter, tmp_path, cut, r=2, lora_alpha=4.0)

    assert not served(golden, tiny, other).holds


@pytest.mark.slow
@pytest.mark.parametrize(
    ("template", "differs"),
    [
        (CHAT_TEMPLATE, False),
        (CHAT_TEMPLATE.replace("assistant{{ '\n' }}", "assistant"), True),
        (CHAT_TEMPLATE.replace("<|im_end|>{{ '\n' }}", "<|im_end|>"), True),
        ("<|im_start|>system{{ '\n' }}Be kind<|im_end|>" + CHAT_TEMPLATE, True),
        (CHAT_TEMPLATE + "<think>", True),
    ],
)
def test_a_wrong_chat_template_is_caught(golden, tiny, template, differs):
    """By the prompt's tokens, before any number is asked for."""
    _, tokenizer = load_base(tiny)
    tokenizer.chat_template = template
    renderer = ChatRenderer(tokenizer, frozenset(), golden.thinking)
    for one in golden.prompts:
        text = renderer.prompt(one.messages, one.tools)
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]

        assert (other_from(one, tokens) is not None) == differs


@pytest.mark.slow
def test_another_base_model_is_caught(golden, tiny, adapter, tmp_path):
    other = make_tiny_model(tmp_path, seed=3)

    found = compare(golden, replay(other, adapter), replay(other))

    assert not found.holds
    assert found.foreign


@pytest.mark.slow
def test_a_model_merged_in_lower_precision_is_caught(golden, tiny, adapter):
    found = served(golden, tiny, adapter, merged_in=torch.bfloat16)

    assert not found.holds
    assert not found.foreign


@pytest.mark.slow
def test_an_untrained_adapter_holds_and_proves_nothing(tiny, tmp_path):
    untrained = make_adapter(tiny, tmp_path, seed=1, size=0.0)
    golden = GoldenSet.read(untrained)

    found = served(golden, tiny, untrained)

    assert found.change_mean == 0
    assert found.holds
    assert not found.proves_identity


ONE = Golden(
    messages=[{"role": "user", "content": "a"}],
    tools=None,
    prompt=[1, 2],
    completion=[3, 4],
    log_probs=[-0.5, -1.0],
    base_log_probs=[-1.5, -2.0],
)
SET = GoldenSet(thinking=False, stop_sequences=[], dtype="float32", prompts=[ONE])


def said(adapted, base=ONE.base_log_probs):
    return compare(SET, lambda *_: adapted, lambda *_: base)


class TestFigures:
    def test_they_are_means_and_maxima_of_distances(self):
        found = said([-0.6, -0.7], [-1.6, -2.0])

        assert (found.tokens, found.change_mean) == (2, 1.0)
        assert (found.mean, found.largest) == pytest.approx((0.2, 0.3))
        assert (found.noise_mean, found.noise_largest) == pytest.approx((0.05, 0.1))

    @pytest.mark.parametrize(
        "adapted", [[math.nan, -1.0], [-math.inf, -1.0], [-0.5], [-0.5, -1.0, 0.0], []]
    )
    @pytest.mark.parametrize("base", [ONE.base_log_probs, [math.nan, -2.0], [-1.5]])
    def test_numbers_that_are_none_or_not_there_never_hold(self, adapted, base):
        found = said(adapted, base)

        assert not found.holds
        assert not found.proves_identity

    def test_noise_without_bounds_excuses_nothing(self):
        assert not said(ONE.log_probs, [-1.5, math.inf]).holds
        assert not said(ONE.log_probs, [-1.5, -9.0]).holds

    def test_one_token_far_off_is_seen_among_many_that_are_not(self):
        many = [-0.5] * 10_000
        long = attrs.evolve(ONE, completion=[3] * 10_000, log_probs=many, base_log_probs=many)
        golden = attrs.evolve(SET, prompts=[long])

        assert compare(golden, lambda *_: many, lambda *_: many).holds
        assert not compare(golden, lambda *_: [-0.6, *many[1:]], lambda *_: many).holds

    def test_a_set_without_prompts_proves_nothing(self):
        found = compare(attrs.evolve(SET, prompts=[]), pytest.fail, pytest.fail)

        assert not found.holds


@pytest.mark.parametrize(
    ("tokens", "place"), [([1, 2], None), ([1, 3], 1), ([1], 1), ([], 0), ([1, 2, 3], 2)]
)
def test_where_a_prompt_is_another(tokens, place):
    assert other_from(ONE, tokens) == place


class TestFile:
    def test_what_is_written_is_what_is_read(self, tmp_path):
        (tmp_path / NAME).write_bytes(SET.to_json())

        assert GoldenSet.read(tmp_path) == SET

    def test_an_adapter_may_have_none(self, tmp_path):
        assert GoldenSet.read(tmp_path) is None

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"{}",
            b"[]",
            b"null",
            b"[" * 100_000,
            SET.to_json()[:-9],
            SET.to_json().replace(b'"thinking"', b'"thinks"'),
            SET.to_json().replace(b"[3, 4]", b"[3]"),
            SET.to_json().replace(b"[3, 4]", b'["3", 4]'),
            SET.to_json().replace(b"[3, 4]", b"7"),
            SET.to_json().replace(b"[1, 2]", b"[]"),
            SET.to_json().replace(b"[1, 2]", b"[-1]"),
            SET.to_json().replace(b"-0.5", b"NaN"),
            SET.to_json().replace(b"-0.5", b"true"),
            SET.to_json().replace(b'"stop_sequences": []', b'"stop_sequences": "a"'),
            SET.to_json().replace(b'"stop_sequences": []', b'"stop_sequences": [1]'),
            SET.to_json().replace(b'{"role": "user", "content": "a"}', b'"hello"'),
            SET.to_json().replace(b'"thinking": false', b'"thinking": 0'),
        ],
    )
    def test_one_that_is_damaged_is_refused(self, tmp_path, content):
        (tmp_path / NAME).write_bytes(content)

        with pytest.raises(StoreError, match="golden"):
            GoldenSet.read(tmp_path)

    def test_one_of_another_format_asks_for_another_flash(self, tmp_path):
        other = SET.to_json().replace(f'"format": {FORMAT}'.encode(), b'"format": 99')
        (tmp_path / NAME).write_bytes(other)

        with pytest.raises(StoreError, match="of another format") as caught:
            GoldenSet.read(tmp_path)
        assert caught.value.hint == "upgrade Flash"
