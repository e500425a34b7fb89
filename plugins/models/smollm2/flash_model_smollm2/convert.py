"""
From the GGUF file to a folder that transformers loads: safetensors, tokenizer, chat template.

The file is pinned by its hash, so the architecture is known and written here; only the values are
read. Neither torch nor a model is needed for that, and a test holds the result against what
transformers itself reads from the same file.

Weights are float32: a Q4_1 value is `scale * nibble + minimum` with both in half precision, which
no 16-bit type holds.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

HEADS, KEY_VALUE_HEADS = 9, 3
CONTEXT_TOKENS = 8192
# GGUF's ids: <|endoftext|>, <|im_start|>, <|im_end|>.
UNKNOWN, BEGIN, END = 0, 1, 2

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": BEGIN,
    "eos_token_id": END,
    "pad_token_id": END,
    "dtype": "float32",
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "max_position_embeddings": CONTEXT_TOKENS,
    "mlp_bias": False,
    "num_attention_heads": HEADS,
    "num_hidden_layers": 30,
    "num_key_value_heads": KEY_VALUE_HEADS,
    "rms_norm_eps": 1e-05,
    "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    "use_cache": True,
    "vocab_size": 49152,
}
GENERATION = {"bos_token_id": BEGIN, "eos_token_id": END, "pad_token_id": END}

_OUTSIDE_LAYERS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert(source: Path, destination: Path) -> None:
    """Write the model in `source` into the folder `destination`."""
    reader = gguf.GGUFReader(source)
    save_file(_weights(reader), destination / "model.safetensors", metadata={"format": "pt"})
    _write_json(destination / "config.json", CONFIG)
    _write_json(destination / "generation_config.json", GENERATION)
    _save_tokenizer(reader, destination)
    for path in destination.iterdir():
        path.chmod(0o600)
        with path.open("rb") as file:
            os.fsync(file.fileno())  # the caller's rename must not outlive the content


def _weights(reader: gguf.GGUFReader) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    """Return every tensor under transformers' name, dequantised."""
    weights = {}
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        if ".attn_q." in tensor.name:
            values = _half_rotated(values, HEADS)
        elif ".attn_k." in tensor.name:
            values = _half_rotated(values, KEY_VALUE_HEADS)
        weights[_name(tensor.name)] = np.ascontiguousarray(values, dtype=np.float32)
    return weights


def _name(name: str) -> str:
    if name in _OUTSIDE_LAYERS:
        return _OUTSIDE_LAYERS[name]
    _, layer, part, _ = name.split(".")
    return f"model.layers.{layer}.{_IN_LAYER[part]}.weight"


def _half_rotated(
    values: np.ndarray[Any, np.dtype[np.float32]], heads: int
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Order each head's rows for rotation by halves: GGUF interleaves the pairs that RoPE turns."""
    rows, columns = values.shape
    pairs = values.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _save_tokenizer(reader: gguf.GGUFReader, destination: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = reader.fields["tokenizer.ggml.tokens"].contents()
    merges: list[str] = reader.fields["tokenizer.ggml.merges"].contents()
    kinds: list[int] = reader.fields["tokenizer.ggml.token_type"].contents()
    vocabulary: Mapping[str, int] = {token: index for index, token in enumerate(tokens)}
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab=dict(vocabulary), merges=pairs))
    # GGUF only names this pre-tokenizer ("smollm"): every digit stands alone, and that before the
    # byte-level split, so that spaces in front of a number are grouped as in the model's training.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == gguf.TokenType.CONTROL
        ]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[BEGIN],
        eos_token=tokens[END],
        pad_token=tokens[END],
        unk_token=tokens[UNKNOWN],
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
        chat_template=reader.fields["tokenizer.chat_template"].contents(),
    ).save_pretrained(destination)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
