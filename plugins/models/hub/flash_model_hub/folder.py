"""
A folder with a model in it: is it whole, and what do its files say of it.

Only JSON and the headers of safetensors files are read; no weight is loaded and nothing is run.
"""

from __future__ import annotations

import json
import math
import re
from functools import cached_property
from typing import TYPE_CHECKING, Any

from flash.api import ModelCard, ModelUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

CONFIG = "config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

_HEADER_LIMIT = 100_000_000
_GIB = 1 << 30
_NEEDED = ("hidden_size", "layers", "vocabulary")
# Architectures without positions name no longest context.
_NO_LIMIT = 1 << 20
# Other names that config.json files use for the same fact.
_NAMES = {
    "hidden_size": ("hidden_size", "n_embd", "d_model", "dim"),
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "intermediate_size": ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "hidden_dim"),
    "vocabulary": ("vocab_size",),
    "context_tokens": ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"),
}


class ModelFolder:
    """One folder; `where` names it in errors, as the user named the model."""

    def __init__(self, path: Path, where: str) -> None:
        self.path = path
        self._where = where

    @cached_property
    def config(self) -> dict[str, Any]:
        """Return `config.json`; `ModelUnavailable` where there is none that can be read."""
        return self._json(CONFIG)

    def missing(self) -> str | None:
        """Return what keeps transformers from loading the folder, as a phrase; None if nothing."""
        if not (self.path / CONFIG).is_file():
            return f"it has no {CONFIG}"
        names = self._weight_files()
        if not names:
            return missing_weights(path.name for path in self.path.iterdir())
        absent = [name for name in names if not (self.path / name).is_file()]
        if absent:
            return f"{len(absent)} of its {len(names)} weight files are missing"
        torn = [name for name in names if not self._is_whole(name)]
        if torn:
            return f"{torn[0]} is cut short or damaged"
        if not any((self.path / name).is_file() for name in TOKENIZERS):
            return "it has no tokenizer"
        return None

    def card(self, model: str) -> ModelCard:
        """Return the facts; the parameters are counted in the headers where weights are here."""
        refuse_quantised(self.config, self._where)
        # Models with images or sound keep what concerns text one level down.
        text = self.config.get("text_config")
        config = {**self.config, **(text if isinstance(text, dict) else {})}
        facts = {fact: _number(config, names) for fact, names in _NAMES.items()}
        unknown = [_NAMES[fact][0] for fact in _NEEDED if not facts[fact]]
        if unknown:
            raise ModelUnavailable(
                f"{self._where}: {self.path / CONFIG} does not say {', '.join(unknown)}",
                hint="a plan needs these sizes; use a model that states them",
            )
        facts["intermediate_size"] = facts["intermediate_size"] or 4 * facts["hidden_size"]
        facts["context_tokens"] = facts["context_tokens"] or _NO_LIMIT
        counted, stored = self._count()
        return ModelCard(
            id=model,
            parameters=counted or estimate_parameters(config, facts),
            thinking=_thinking(self._chat_template()),
            licence=self._licence(),
            memory_note=f"{stored / _GIB:.1f} GiB of weights as stored" if stored else "",
            summary=str(self.config.get("model_type", "")),
            **facts,
        )

    def _weight_files(self) -> list[str]:
        if (self.path / INDEX).is_file():
            names = self._json(INDEX).get("weight_map", {}).values()
            return sorted({str(name) for name in names})
        return [WEIGHTS] if (self.path / WEIGHTS).is_file() else []

    def _count(self) -> tuple[int, int]:
        """Return parameters and bytes of the weights that are here; zeros if any is not."""
        parameters = stored = 0
        for name in self._weight_files():
            header = self._header(name)
            if header is None:
                return 0, 0
            for tensor in header.values():
                parameters += math.prod(tensor["shape"])
                start, end = tensor["data_offsets"]
                stored += end - start
        return parameters, stored

    def _header(self, name: str) -> dict[str, Any] | None:
        """Return a safetensors file's table of tensors, or None for a file that has none."""
        try:
            with (self.path / name).open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                if size > _HEADER_LIMIT:
                    return None
                header = json.loads(file.read(size))
        except (OSError, ValueError):
            return None
        if not isinstance(header, dict):
            return None
        header.pop("__metadata__", None)
        return header if all(map(_is_tensor, header.values())) else None

    def _is_whole(self, name: str) -> bool:
        header = self._header(name)
        if header is None:
            return False
        path = self.path / name
        with path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
        ends = (tensor["data_offsets"][1] for tensor in header.values())
        return path.stat().st_size == start + max(ends, default=0)

    def _chat_template(self) -> str:
        path = self.path / "chat_template.jinja"
        if path.is_file():
            return path.read_text(encoding="utf-8", errors="replace")
        if not (self.path / "tokenizer_config.json").is_file():
            return ""
        template = self._json("tokenizer_config.json").get("chat_template", "")
        return template if isinstance(template, str) else json.dumps(template)

    def _licence(self) -> str:
        """Return the licence that the model's page declares in its first lines."""
        try:
            text = (self.path / "README.md").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return "unknown"
        front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
        found = re.search(r"^license:\s*([\w.+-]+)\s*$", front[1] if front else "", re.MULTILINE)
        return found[1] if found else "unknown"

    def _json(self, name: str) -> dict[str, Any]:
        path = self.path / name
        try:
            content = json.loads(path.read_bytes())
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise ModelUnavailable(f"{self._where}: {path} cannot be read: {reason}") from error
        except ValueError as error:
            raise ModelUnavailable(f"{self._where}: {path} is not JSON: {error}") from None
        if not isinstance(content, dict):
            raise ModelUnavailable(f"{self._where}: {path} is not a JSON object")
        return content


def refuse_quantised(config: Mapping[str, Any], model: str) -> None:
    """Raise `ModelUnavailable` for weights that are stored quantised."""
    stored = config.get("quantization_config")
    if stored:
        method = stored.get("quant_method") if isinstance(stored, dict) else None
        raise ModelUnavailable(
            f"{model} is stored quantised ({method or 'quantization_config in its config.json'}), "
            "and Flash trains on full weights",
            hint="name the model that it was quantised from",
        )


def missing_weights(names: Iterable[str]) -> str:
    """Return why files of these names are no model that may be loaded."""
    names = sorted(names)
    pickles = [name for name in names if name.endswith(PICKLES)]
    if "adapter_config.json" in names:
        return "it is an adapter, not a base model"
    if pickles:
        return f"its weights are pickled ({pickles[0]}), and loading a pickle runs what is in it"
    if any(name.endswith(".gguf") for name in names):
        return "its weights are GGUF, which cannot be trained as they are"
    return f"it has no {WEIGHTS}"


def estimate_parameters(config: Mapping[str, Any], facts: Mapping[str, int]) -> int:
    """
    Return about how many parameters a decoder of these sizes has.

    Counts embeddings, attention with its own number of key and value heads, and gated
    feed-forward layers, times the experts where there are some. Within some per cent for the
    usual architectures; the exact number is known once the weights are here.
    """
    hidden, layers = facts["hidden_size"], facts["layers"]
    heads = _number(config, ("num_attention_heads", "n_head")) or 1
    head = _number(config, ("head_dim",)) or hidden // heads
    key_value = (_number(config, ("num_key_value_heads",)) or heads) * head
    attention = 2 * hidden * (heads * head + key_value)
    experts = _number(config, ("num_experts", "num_local_experts", "n_routed_experts"))
    width = (_number(config, ("moe_intermediate_size",)) if experts else 0) or facts[
        "intermediate_size"
    ]
    feed_forward = 3 * hidden * width * max(experts, 1)
    embeddings = facts["vocabulary"] * hidden * (1 if config.get("tie_word_embeddings") else 2)
    return embeddings + layers * (attention + feed_forward + 2 * hidden) + hidden


def _is_tensor(entry: object) -> bool:
    """Say whether an entry of a header has the shape that the format gives it."""
    if not isinstance(entry, dict):
        return False
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    match shape, offsets:
        case [*sizes], [start, end]:
            return all(isinstance(number, int) for number in [*sizes, start, end])
    return False


def _number(config: Mapping[str, Any], names: tuple[str, ...]) -> int:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return 0


def _thinking(template: str) -> Any:
    """Judge by the chat template: a switch makes it optional, a bare `<think>` constant."""
    if "enable_thinking" in template:
        return "hybrid"
    return "always" if "<think>" in template else "none"
