"""
An adapter and its base model as one model, proven to compute what was trained.

Merged in float32, whatever the base model is stored in: a product that is rounded twice is another
model. What is written is loaded again, and its log-probabilities of the adapter's golden set are
held against the trainer's; the bare base model in the same type says how much of a difference is
the type's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import torch

from flash.adapters import check_fits, read_adapter
from flash.errors import FlashError, ModelUnavailable, StoreError
from flash.files import disk_error
from flash.parity import GoldenSet, compare, other_from
from flash.training.chat import ChatRenderer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from flash.parity import LogProbs, Parity

    Replay = Callable[[Path], LogProbs]


def export_merged(
    adapter: Path, base: Path, target: Path, report: Callable[[str], None], *, allow_drift: bool
) -> dict[str, Any]:
    """
    Write the merged model to the folder `target`, in the type that the base model is stored in.

    Returns what the parity gate says, see `gate`; raises `FlashError` where the adapter does not
    fit or what was written is not what was trained.
    """
    merge(adapter, base, target, report)
    report("comparing it with what was trained")
    return gate(adapter, target, lambda: (replay(target), replay(base)), allow_drift=allow_drift)


def merge(adapter: Path, base: Path, target: Path, report: Callable[[str], None]) -> None:
    """Write the merged model, its tokenizer and its generation settings."""
    from peft import PeftModel
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    check_fits(read_adapter(adapter), base)
    report("loading the base model")
    try:
        stored = AutoModelForCausalLM.from_pretrained(base, dtype="auto", local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise ModelUnavailable(f"the model in {base} cannot be loaded: {error}") from error
    dtype = stored.dtype
    model = stored.to(torch.float32)
    report(f"merging in float32, to be saved in {str(dtype).removeprefix('torch.')}")
    try:
        merged = PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=True)
    except (LookupError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise StoreError(f"the adapter in {adapter} does not load: {error}") from error
    try:
        merged.to(dtype).save_pretrained(target)
        tokenizer.save_pretrained(target)
    except Exception as error:
        if trouble := disk_error(error, unnamed=str(target)):
            hint = "free some space there, or name another folder with --to"
            raise StoreError(trouble.message, hint=hint) from error
        raise


def gate(
    adapter: Path, tokenizer: Path, replays: Callable[[], tuple[LogProbs, LogProbs]], **how: bool
) -> dict[str, Any]:
    """
    Hold a model against the golden set of its adapter.

    `replays` makes the log-probabilities of the model and of its bare base; `tokenizer` is the
    folder with the tokenizer that goes with it. Returns `golden`, whether there is a golden set,
    `parity`, its figures or None, and `drift_allowed`. Raises `FlashError` where it does not hold,
    unless `allow_drift`.
    """
    golden = GoldenSet.read(adapter)
    if golden is None or not golden.prompts:
        return {"golden": False, "parity": None, "drift_allowed": False}
    if (number := _other_prompt(golden, tokenizer)) is not None:
        raise FlashError(
            f"the chat template of the exported model is not that of training: golden prompt "
            f"{number} has other tokens",
            hint="the base model's folder holds another tokenizer or chat template than then",
        )
    parity = compare(golden, *replays())
    if not parity.holds and not how["allow_drift"]:
        raise _drifted(parity)
    figures = attrs.asdict(parity)
    holds = {"holds": parity.holds, "proves_identity": parity.proves_identity}
    return {"golden": True, "parity": figures | holds, "drift_allowed": not parity.holds}


def _drifted(parity: Parity) -> FlashError:
    what = (
        "the base model is not that of training"
        if parity.foreign
        else "what was exported is not what was trained"
    )
    return FlashError(
        f"{what}: its log-probabilities of {parity.tokens} golden tokens are off by "
        f"{parity.mean:.2g} nats on average and {parity.largest:.2g} at most, where "
        f"{parity.limit_mean:.2g} and {parity.limit_largest:.2g} are allowed (the bare base model "
        f"in the same type: {parity.noise_mean:.2g} and {parity.noise_largest:.2g}; the adapter "
        f"itself changes {parity.change_mean:.2g})",
        hint="--allow-drift exports it nevertheless",
    )


def _other_prompt(golden: GoldenSet, folder: Path) -> int | None:
    """Return the first golden prompt, from 1, of which a tokenizer makes other tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    renderer = ChatRenderer(tokenizer, frozenset(), golden.thinking)
    for number, one in enumerate(golden.prompts, 1):
        text = renderer.prompt(one.messages, one.tools)
        tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if other_from(one, tokens) is not None:
            return number
    return None


def replay(folder: Path) -> LogProbs:
    """Return the log-probabilities of the model in `folder`, which is loaded when first asked."""
    from transformers import AutoModelForCausalLM

    loaded: list[Any] = []

    @torch.inference_mode()
    def log_probs(prompt: Sequence[int], completion: Sequence[int]) -> list[float]:
        if not loaded:
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype="auto", local_files_only=True
            )
            loaded.append(model.to("cuda" if torch.cuda.is_available() else "cpu").eval())
        (model,) = loaded
        tokens_BT = torch.tensor([[*prompt, *completion]], device=model.device)
        kept = len(completion) + 1
        logits_CV = model(tokens_BT, logits_to_keep=kept).logits[0, -kept:-1].float()
        targets_C1 = torch.tensor(list(completion), device=model.device)[:, None]
        found: list[float] = logits_CV.log_softmax(-1).gather(1, targets_C1)[:, 0].tolist()
        return found

    return log_probs
