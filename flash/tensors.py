"""
The headers of safetensors files, read as what they are: somebody's.

Names, types, shapes and places of tensors, without loading one. A header is believed only where
it accounts for every byte of its file.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, Final

import attrs

from flash.errors import FlashError, StoreError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

MODEL: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"

_LARGEST: Final = 100 << 20
"""Of a header or an index, as in safetensors itself."""

_BYTES: Final = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 1),
}

# Where all bits of the exponent are set, a number is infinite or none.
_EXPONENTS: Final = {"F32": ("<u4", 0x7F80_0000), "F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80)}

_CHUNK_BYTES: Final = 16 << 20


@attrs.frozen
class Tensor:
    """A tensor's type, its shape, and where its bytes are in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    def __str__(self) -> str:
        return f"({self.dtype} {list(self.shape)})"


def read_header(path: Path, *, largest: int = _LARGEST) -> dict[str, Tensor]:
    """Return what is in the file; raises `StoreError` where it is none, or not all of one."""
    damaged = StoreError(
        f"{path} is cut short or damaged: it is no whole safetensors file",
        hint="copy or download it again",
    )
    try:
        if not path.is_file():
            raise StoreError(f"there is no file {path}")
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(size - 8, largest):
                raise damaged
            header = json.loads(file.read(length))
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise damaged from error
    found = _tensors(header, 8 + length)
    if found is None:
        raise damaged
    end = 8 + length
    for tensor in sorted(found.values(), key=lambda one: (one.start, one.end)):
        if tensor.start != end:
            raise damaged
        end = tensor.end
    if end != size:
        raise damaged
    return found


def _tensors(header: Any, offset: int) -> dict[str, Tensor] | None:
    """Return the tensors of a header, None where it does not make sense."""
    if not isinstance(header, dict):
        return None
    found: dict[str, Tensor] = {}
    for name, said in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (start, end) = said["dtype"], said["shape"], said["data_offsets"]
            numbers = [*shape, start, end]
            size = _BYTES[dtype]
        except (TypeError, KeyError, ValueError):
            return None
        if any(type(one) is not int or one < 0 for one in numbers):
            return None
        if end - start != size * math.prod(shape):
            return None
        found[name] = Tensor(dtype, tuple(shape), offset + start, offset + end)
    return found


def table_of(folder: Path) -> dict[str, Tensor]:
    """
    Return the tensors of the model in `folder`, of all its files.

    Raises `StoreError` where it has none that can be read.
    """
    index = folder / INDEX
    if not index.is_file():
        if not (folder / MODEL).is_file():
            raise StoreError(
                f"the model in {folder} has no weights that can be read: there is no {MODEL}",
                hint="fetch the model again",
            )
        return read_header(folder / MODEL)
    content = read_json(index, largest=_LARGEST, error=StoreError, hint="fetch the model again")
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not all(map(_is_file_name, names.values())):
        raise StoreError(f"{index} names no files of its own folder", hint="fetch the model again")
    found: dict[str, Tensor] = {}
    for name in sorted(set(names.values())):
        found |= read_header(folder / name)
    return found


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and bool(name) and not set(name) & {"/", "\\", "\0"}


def read_json(path: Path, *, largest: int, error: type[FlashError], hint: str) -> Any:
    """Return what a JSON file of at most `largest` bytes holds; raises `error`."""
    try:
        if path.exists() and not path.is_file():
            raise error(f"{path} is no file", hint=hint)
        with path.open("rb") as file:
            content = file.read(largest + 1)
    except OSError as failure:
        message = f"{path} cannot be read: {failure.strerror or failure}"
        raise error(message, hint=hint) from failure
    if len(content) > largest:
        raise error(f"{path} is larger than {largest} bytes", hint=hint)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as failure:
        raise error(f"{path} is not JSON: {failure}", hint=hint) from failure


def without_numbers(path: Path, tensors: Mapping[str, Tensor]) -> str | None:
    """
    Return the first tensor of the file that holds a NaN or an infinity, None where none does.

    Raises `StoreError` for a type that is none of the usual ones.
    """
    import numpy as np

    with path.open("rb") as file:
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
            if tensor.dtype not in _EXPONENTS:
                raise StoreError(
                    f"the tensor {name} in {path} is of the type {tensor.dtype}, which is none of "
                    f"{', '.join(_EXPONENTS)}",
                    hint="save the weights in one of these",
                )
            kind, exponent = _EXPONENTS[tensor.dtype]
            file.seek(tensor.start)
            for at in range(tensor.start, tensor.end, _CHUNK_BYTES):
                chunk = file.read(min(_CHUNK_BYTES, tensor.end - at))
                bits = np.frombuffer(chunk, kind)
                if bool(((bits & exponent) == exponent).any()):
                    return name
    return None
