"""What an adapter's folder must hold, and what it must fit: whoever has written it."""

from __future__ import annotations

import contextlib
import json
import os
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash.adapters import CONFIG, WEIGHTS, check_fits, read_adapter
from flash.errors import FlashError, StoreError, UsageError
from flash.tensors import read_header

MODULES = {"self_attn.q_proj": (8, 8), "mlp.down_proj": (8, 16)}
LAYERS = 2
RANK = 2
NAMES = {
    np.dtype("f4"): "F32",
    np.dtype("f2"): "F16",
    np.dtype("u2"): "BF16",
    np.dtype("i4"): "I32",
}


def write_tensors(path, tensors, **header):
    """Write a safetensors file; 16-bit integers stand for bfloat16."""
    at, table = 0, dict(header)
    for name, values in tensors.items():
        size = values.nbytes
        table[name] = {
            "dtype": NAMES[values.dtype],
            "shape": list(values.shape),
            "data_offsets": [at, at + size],
        }
        at += size
    text = json.dumps(table).encode()
    content = struct.pack("<Q", len(text)) + text + b"".join(v.tobytes() for v in tensors.values())
    path.write_bytes(content)


def base_tensors(prefix="model.", layers=LAYERS, modules=MODULES):
    tensors = {f"{prefix}embed_tokens.weight": np.zeros((32, 8), "f4")}
    for layer in range(layers):
        for name, shape in modules.items():
            tensors[f"{prefix}layers.{layer}.{name}.weight"] = np.zeros(shape, "f4")
        tensors[f"{prefix}layers.{layer}.norm.weight"] = np.zeros(8, "f4")
    return tensors


def adapter_tensors(rank=RANK, layers=LAYERS, modules=MODULES, kind="f4", prefix="model."):
    tensors = {}
    for layer in range(layers):
        for name, (out, into) in modules.items():
            path = f"base_model.model.{prefix}layers.{layer}.{name}"
            tensors[f"{path}.lora_A.weight"] = np.ones((rank, into), kind)
            tensors[f"{path}.lora_B.weight"] = np.ones((out, rank), kind)
    return tensors


def write_config(folder, **changed):
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "org/tiny",
        "r": RANK,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "down_proj"],
        "bias": "none",
        "init_lora_weights": True,
    }
    (folder / CONFIG).write_text(json.dumps(config | changed))


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    write_tensors(folder / "model.safetensors", base_tensors())
    return folder


@pytest.fixture
def adapter(tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    write_config(folder)
    write_tensors(folder / WEIGHTS, adapter_tensors(), __metadata__={"format": "pt"})
    return folder


def check(adapter, base):
    check_fits(read_adapter(adapter), base)


def refused(adapter, base, error=UsageError):
    with pytest.raises(error) as caught:
        check(adapter, base)
    assert str(adapter) in caught.value.message or str(base) in caught.value.message
    return caught.value.message


A = "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"
B = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"


class TestWhole:
    def test_what_it_says_of_itself(self, adapter):
        found = read_adapter(adapter)

        assert (found.folder, found.base, found.rank) == (adapter, "org/tiny", RANK)
        assert (found.alpha, found.targets) == (4.0, ("down_proj", "q_proj"))

    @pytest.mark.parametrize("kind", ["f4", "f2", "u2"])
    def test_it_fits_its_model_in_every_usual_type(self, adapter, base, kind):
        write_tensors(adapter / WEIGHTS, adapter_tensors(kind=kind))

        check(adapter, base)

    @pytest.mark.parametrize("prefix", ["", "language_model.model.", "model.language_model."])
    def test_a_models_file_may_call_what_wraps_the_layers_otherwise(self, adapter, base, prefix):
        write_tensors(base / "model.safetensors", base_tensors(prefix=prefix))

        check(adapter, base)

    def test_a_model_may_be_in_several_files(self, adapter, base):
        tensors = base_tensors()
        (base / "model.safetensors").unlink()
        places = {name: f"model-{at % 2}.safetensors" for at, name in enumerate(tensors)}
        for file in set(places.values()):
            write_tensors(base / file, {k: v for k, v in tensors.items() if places[k] == file})
        index = base / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": places}))

        check(adapter, base)

    def test_a_head_that_is_tied_to_the_embeddings_has_their_shape(self, adapter, base):
        head = "base_model.model.lm_head.lora_"
        more = {
            f"{head}A.weight": np.ones((RANK, 8), "f4"),
            f"{head}B.weight": np.ones((32, RANK), "f4"),
        }
        write_config(adapter, target_modules=["q_proj", "down_proj", "lm_head"])
        write_tensors(adapter / WEIGHTS, adapter_tensors() | more)

        check(adapter, base)

        more[f"{head}B.weight"] = np.ones((33, RANK), "f4")
        write_tensors(adapter / WEIGHTS, adapter_tensors() | more)
        assert "adapts lm_head as [33, 8]" in refused(adapter, base)

    def test_layers_may_be_of_several_ranks_and_the_highest_is_its_own(self, adapter, base):
        write_config(adapter, rank_pattern={"down_proj": 3})
        tensors = adapter_tensors()
        for layer in range(LAYERS):
            path = f"base_model.model.model.layers.{layer}.mlp.down_proj.lora_"
            tensors[f"{path}A.weight"] = np.ones((3, 16), "f4")
            tensors[f"{path}B.weight"] = np.ones((8, 3), "f4")
        write_tensors(adapter / WEIGHTS, tensors)

        check(adapter, base)

        assert read_adapter(adapter).rank == 3

    def test_one_that_adapts_some_layers_says_so(self, adapter, base):
        write_tensors(adapter / WEIGHTS, adapter_tensors(layers=1))
        assert "is missing" in refused(adapter, base)

        write_config(adapter, layers_to_transform=[0])
        check(adapter, base)


class TestAnotherModel:
    def test_of_other_sizes(self, adapter, base):
        write_tensors(
            base / "model.safetensors", base_tensors(modules=MODULES | {"mlp.down_proj": (8, 24)})
        )

        said = refused(adapter, base)

        assert "adapts model.layers.0.mlp.down_proj as [8, 16] of org/tiny" in said
        assert "which is [8, 24] in" in said

    def test_of_fewer_layers(self, adapter, base):
        write_tensors(base / "model.safetensors", base_tensors(layers=1))

        assert "has no such layer" in refused(adapter, base)

    def test_of_more_layers(self, adapter, base):
        write_tensors(base / "model.safetensors", base_tensors(layers=3))

        assert "layers.2.mlp.down_proj.lora_A.weight is missing" in refused(adapter, base)

    def test_of_another_family(self, adapter, base):
        modules = {"attn.c_attn": (24, 8), "mlp.c_proj": (8, 16)}
        write_tensors(base / "model.safetensors", base_tensors(prefix="h.", modules=modules))

        assert "has no such layer" in refused(adapter, base)

    def test_without_weights_that_can_be_read(self, adapter, base):
        (base / "model.safetensors").rename(base / "pytorch_model.bin")

        assert "there is no model.safetensors" in refused(adapter, base, StoreError)

    @pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "", 3])
    def test_whose_index_names_a_file_elsewhere(self, adapter, base, name):
        index = base / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"a.weight": name}}))

        assert "names no files of its own folder" in refused(adapter, base, StoreError)


class TestNotWhole:
    @pytest.mark.parametrize("name", [A, B])
    def test_a_tensor_is_missing(self, adapter, base, name):
        tensors = adapter_tensors()
        del tensors[name]
        write_tensors(adapter / WEIGHTS, tensors)

        assert f"its tensor {name} is missing" in refused(adapter, base)

    def test_both_tensors_of_a_layer_are_missing(self, adapter, base):
        tensors = adapter_tensors()
        del tensors[A], tensors[B]
        write_tensors(adapter / WEIGHTS, tensors)

        assert f"its tensor {A} is missing" in refused(adapter, base)

    def test_a_target_has_none(self, adapter, base):
        write_config(adapter, target_modules=["q_proj", "down_proj", "up_proj"])

        assert "no tensors of its target module up_proj" in refused(adapter, base)

    @pytest.mark.parametrize(
        "name",
        [
            "base_model.model.model.layers.0.mlp.down_proj.lora_magnitude_vector",
            "base_model.model.model.embed_tokens.lora_embedding_A",
            "base_model.model.lm_head.weight",
            "extra",
        ],
    )
    def test_a_tensor_belongs_to_nothing(self, adapter, base, name):
        write_tensors(adapter / WEIGHTS, adapter_tensors() | {name: np.ones((2, 8), "f4")})

        assert f"its tensor {name} " in refused(adapter, base)

    def test_a_layer_that_the_model_has_not(self, adapter, base):
        write_tensors(adapter / WEIGHTS, adapter_tensors(layers=3))

        assert "adapts model.layers.2.self_attn.q_proj" in refused(adapter, base)

    def test_no_tensors_at_all(self, adapter, base):
        write_tensors(adapter / WEIGHTS, {})

        assert "holds no tensors" in refused(adapter, base)

    @pytest.mark.parametrize("rank", [1, 4])
    def test_of_another_rank_than_it_says(self, adapter, base, rank):
        write_tensors(adapter / WEIGHTS, adapter_tensors(rank=rank))

        said = refused(adapter, base)

        assert f"are of rank {rank}, and adapter_config.json says 2" in said

    @pytest.mark.parametrize(
        ("kind", "number"),
        [("f4", np.nan), ("f4", -np.inf), ("f2", np.inf), ("u2", 0x7F80), ("u2", 0xFFC1)],
    )
    def test_numbers_that_are_none(self, adapter, base, kind, number):
        tensors = adapter_tensors(kind=kind)
        tensors[B][-1, -1] = number
        write_tensors(adapter / WEIGHTS, tensors)

        assert f"its tensor {B} holds numbers that are not finite" in refused(adapter, base)

    def test_the_largest_numbers_are_numbers(self, adapter, base):
        tensors = adapter_tensors()
        tensors[B][:] = np.finfo("f4").max
        write_tensors(adapter / WEIGHTS, tensors)

        check(adapter, base)

    def test_numbers_of_a_type_that_no_adapter_has(self, adapter, base):
        write_tensors(adapter / WEIGHTS, adapter_tensors(kind="i4"))

        assert "of the type I32" in refused(adapter, base, StoreError)


class TestOtherKinds:
    @pytest.mark.parametrize(
        ("changed", "said"),
        [
            ({"use_dora": True}, "use_dora is true"),
            ({"modules_to_save": ["lm_head"]}, 'modules_to_save is ["lm_head"]'),
            ({"bias": "all"}, 'bias is "all"'),
            ({"lora_bias": True}, "lora_bias is true"),
            ({"init_lora_weights": "pissa"}, 'init_lora_weights is "pissa"'),
            ({"trainable_token_indices": list(range(99))}, "trainable_token_indices is [0, 1"),
            ({"peft_type": "IA3"}, "describes no LoRA adapter"),
            ({"r": 0}, "r is 0"),
            ({"r": True}, "does not say"),
            ({"r": 10**400}, "cannot be used: its tensors of"),
            ({"lora_alpha": float("nan")}, "does not say"),
            ({"lora_alpha": 10**400}, "does not say"),
            ({"base_model_name_or_path": None}, "does not say"),
            ({"target_modules": []}, "does not say target_modules"),
            ({"target_modules": [1]}, "does not say target_modules"),
            ({"rank_pattern": [1]}, "rank_pattern is no table"),
            ({"rank_pattern": {"q_proj": "8"}}, "a rank that is none"),
        ],
    )
    def test_are_refused_by_name(self, adapter, base, changed, said):
        write_config(adapter, **changed)

        assert said in refused(adapter, base)

    def test_a_pickle_is_never_read(self, adapter, base):
        (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")

        assert "loading a pickle runs what is in it" in refused(adapter, base)

    @pytest.mark.parametrize("missing", [CONFIG, WEIGHTS])
    def test_a_folder_without_one_of_the_files(self, adapter, base, missing):
        (adapter / missing).unlink()

        assert missing in refused(adapter, base)


class TestHostile:
    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"1234567",
            b"\xff" * 8,
            b"\xff" * 64,
            struct.pack("<Q", 1 << 62) + b"{}",
            struct.pack("<Q", 2) + b"[]",
            struct.pack("<Q", 2) + b"{}more",
            struct.pack("<Q", 60000) + b"[" * 60000,
        ],
    )
    def test_a_file_that_is_none(self, adapter, base, content):
        (adapter / WEIGHTS).write_bytes(content)

        assert "cut short or damaged" in refused(adapter, base, StoreError)

    @pytest.mark.parametrize(
        "said",
        [
            {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 8]},
            {"dtype": "F32", "shape": [2, 1], "data_offsets": [4, 12]},
            {"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]},
            {"dtype": "F32", "shape": [2.0, 1], "data_offsets": [0, 8]},
            {"dtype": "F32", "shape": [1 << 80, 1 << 80], "data_offsets": [0, 8]},
            {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]},
            {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]},
            {"dtype": "F32", "shape": [2], "data_offsets": [0]},
            {"dtype": "F32", "shape": None, "data_offsets": [0, 8]},
            {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]},
            "a tensor",
        ],
    )
    def test_a_header_that_makes_no_sense(self, adapter, base, said):
        text = json.dumps({"a": said}).encode()
        (adapter / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))

        assert "cut short or damaged" in refused(adapter, base, StoreError)

    def test_tensors_that_share_bytes(self, tmp_path):
        entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
        text = json.dumps({"a": entry, "b": entry}).encode()
        (tmp_path / "file").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))

        with pytest.raises(StoreError, match="damaged"):
            read_header(tmp_path / "file")

    @pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
    def test_a_pipe_in_place_of_a_file_is_not_waited_for(self, adapter, base, name):
        (adapter / name).unlink()
        os.mkfifo(adapter / name)

        with pytest.raises(FlashError):
            check(adapter, base)

    @pytest.mark.parametrize(
        "content", [b"{", b"[" * 100_000, b" " * (1 << 20) + b"{}", b"\xff\xfe", b"[]", b"null"]
    )
    def test_a_configuration_that_is_none(self, adapter, base, content):
        (adapter / CONFIG).write_bytes(content)

        refused(adapter, base)

    def test_a_target_that_is_a_slow_pattern_is_not_tried(self, adapter, base):
        write_config(adapter, target_modules="(a|a)*" * 20 + "$")

        check(adapter, base)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_file_that_is_cut_or_changed_anywhere_is_refused_or_fits(tmp_path_factory, data):
    """And never a crash: what is changed among the numbers alone is the manifest's to see."""
    folder = tmp_path_factory.mktemp("one")
    adapter, base = folder / "adapter", folder / "base"
    adapter.mkdir()
    base.mkdir()
    modules = {"self_attn.q_proj": (8, 8)}
    write_config(adapter, target_modules=["q_proj"])
    write_tensors(adapter / WEIGHTS, adapter_tensors(layers=1, modules=modules))
    write_tensors(base / "model.safetensors", base_tensors(layers=1, modules=modules))
    check(adapter, base)
    victim = data.draw(
        st.sampled_from([adapter / CONFIG, adapter / WEIGHTS, base / "model.safetensors"])
    )
    content = bytearray(victim.read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        at = data.draw(st.integers(0, min(len(content), 900) - 1))
        content[at] = data.draw(st.integers(0, 255))
    victim.write_bytes(bytes(content))

    with contextlib.suppress(FlashError):
        check(adapter, base)
        found = read_adapter(adapter)
        assert found.rank == RANK
        assert {len(one.shape) for one in found.tensors.values()} == {2}
