"""A base model and its LoRA adapter, loaded for training on this machine; adapters on disk."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from flash import parity
from flash.errors import ModelUnavailable, SpecError, StoreError
from flash.values import Problem

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

WEIGHTS = "adapter_model.safetensors"


def load_base(folder: Path) -> tuple[Any, Any]:
    """
    Return the causal language model and its tokenizer, on CPU.

    Float32 where it will train on CPU, which computes nothing narrower at speed; bfloat16 for
    CUDA. Code that a model's folder may bring is never run. Raises `ModelUnavailable`.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        if any(said in str(error) for said in ("out of memory", "allocate memory")):
            raise  # the machine is too small, and nothing is wrong with the model
        raise ModelUnavailable(
            f"transformers cannot load the model in {folder}: {error}",
            hint="it must be a causal language model of a family that transformers knows, in a "
            "complete folder",
        ) from error
    if tokenizer.chat_template is None:
        raise ModelUnavailable(
            "the model's tokenizer has no chat template, so conversations cannot be rendered",
            hint="use the instruction-tuned model of the family",
        )
    return model, tokenizer


def attach_lora(
    model: Any, *, rank: int, alpha: float, targets: str | Sequence[str], base: str, seed: int
) -> Any:
    """
    Return `model` with a new LoRA adapter, A drawn by `seed` and B zero.

    `targets` is "all-linear" or module names; `base` is the id that the adapter names as its
    model. Raises `SpecError` where the targets fit no module.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            adapted = get_peft_model(model, config)
        except ValueError as error:
            raise SpecError([Problem("train.target_modules", str(error))]) from error
    # PEFT writes the folder the model was loaded from, which means nothing on another machine.
    adapted.peft_config["default"].base_model_name_or_path = base
    return adapted


def save_adapter(model: Any, folder: Path, golden: bytes | None = None) -> None:
    """
    Write the adapter as PEFT reads it: weights in safetensors, and its configuration.

    `golden` is its golden set, see `flash.parity`.
    """
    copied_adapter(model, golden)(folder)


def copied_adapter(model: Any, golden: bytes | None = None) -> Callable[[Path], None]:
    """Copy the adapter into host memory; return what writes the copy to a folder."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save

    # With embeddings left to "auto", PEFT asks the hub about the base model.
    live = get_peft_model_state_dict(model, save_embedding_layers=False)
    state = copied(dict(live))
    config = copy.deepcopy(model.peft_config["default"])
    config.inference_mode = True
    for name, value in vars(config).items():
        if isinstance(value, set):  # PEFT would write it in another order in every process
            setattr(config, name, sorted(value))

    def write(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # Through memory, so that a full disk is an `OSError` and no library's own error.
        (folder / WEIGHTS).write_bytes(save(state, metadata={"format": "pt"}))
        config.save_pretrained(folder)
        if golden is not None:
            (folder / parity.NAME).write_bytes(golden)

    return write


def copied(value: Any) -> Any:
    """Return a copy, in host memory, of nested dictionaries, lists and tuples of tensors."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(copied(item) for item in value)
    return copy.deepcopy(value)


def load_adapter(model: Any, folder: Path) -> None:
    """
    Give the adapter on `model` the weights in `folder`.

    Raises `SpecError` where they are of another rank or for other modules, `StoreError` where
    they cannot be read.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise StoreError(f"the adapter in {folder} cannot be read: {error}") from error
    wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
    wrong = sorted(found.keys() ^ wanted.keys()) or [
        f"{name} is {list(found[name].shape)} there and {list(wanted[name].shape)} here"
        for name in wanted
        if found[name].shape != wanted[name].shape
    ]
    if wrong:
        raise SpecError(
            [
                Problem(
                    "train.init_from_adapter",
                    f"the adapter in {folder} does not fit this model, rank and target_modules: "
                    f"{wrong[0]}" + (f", and {len(wrong) - 1} more" if wrong[1:] else ""),
                )
            ]
        )
    set_peft_model_state_dict(model, found)
