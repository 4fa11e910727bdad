"""Reading an adapter's safetensors file that a stranger may have made.

The format is 8 bytes of little-endian header length, a JSON header, the data (safetensors documentation, "Format").
The library accepts duplicate keys, zero tensors, tensors of size zero, 100,000 of them, any name and a 100 MB header,
so those are refused here first; overlaps, holes and wrong lengths are left to it.
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from shared import limits
from shared.errors import IncompatibleAdapter

_KEY: Final = re.compile(r"base_model\.model\.([A-Za-z0-9_.]{1,200})\.lora_(A|B)\.weight")
_DTYPES: Final = ("F32", "F16", "BF16")
_MAX_DIM: Final = 1 << 32
_SHOWN: Final = 8


def refuse(problems: list[str], *, file: str) -> IncompatibleAdapter:
    """One error for all problems of a file; of very many, the first and their count."""
    more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return IncompatibleAdapter(f"{file}: {'; '.join(problems[:_SHOWN])}{more}", param=file.partition(".")[0])


def strict_json(text: bytes) -> Any:
    """The JSON value; ValueError on duplicate keys, NaN, Infinity, too deep nesting, or what is not JSON in UTF-8."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"duplicate key {key!r:.120}")
            found[key] = value
        return found

    def no_constant(name: str) -> Any:
        raise ValueError(f"{name} is not allowed")

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=no_constant)
    except RecursionError:
        raise ValueError("nested too deep") from None


def read_bounded(path: Path, *, max_bytes: int, check_start: Callable[[bytes, int], None] | None = None) -> bytes:
    """The whole file, read once into memory. `check_start` sees its first 8 bytes and its size before the rest is
    read. Raises IncompatibleAdapter if the file is missing, no plain file, or larger than allowed."""
    if not path.is_file():
        raise refuse(["there is no such file"], file=path.name)
    with path.open("rb") as file:
        start = file.read(8)
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise refuse([f"{size} bytes; at most {max_bytes} are allowed"], file=path.name)
        if check_start is not None:
            check_start(start, size)
        content = start + file.read(max_bytes + 1 - len(start))
    if len(content) != size:
        raise refuse(["the file changed while it was read"], file=path.name)
    return content


def read_tensors(path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Module path -> (A (R, I), B (O, R)), fp32, in memory of their own (no mmap). Every key is used.

    Raises IncompatibleAdapter that names all that is wrong: unknown keys, halves of a pair, dtypes, shapes, ranks
    that differ within a pair or exceed the limit, values that are not finite.
    """

    def check_start(start: bytes, size: int) -> None:
        length = int.from_bytes(start, "little")
        if size < 8 or length > size - 8:
            raise refuse(["not a safetensors file: the header is longer than the file"], file=path.name)
        if length > limits.SAFETENSORS_HEADER_BYTES:
            allowed = limits.SAFETENSORS_HEADER_BYTES
            raise refuse([f"the header has {length} bytes; at most {allowed} are allowed"], file=path.name)

    content = read_bounded(path, max_bytes=limits.ADAPTER_BYTES, check_start=check_start)
    try:
        header = strict_json(content[8 : 8 + int.from_bytes(content[:8], "little")])
    except ValueError as error:
        raise refuse([f"the header is not valid: {error}"], file=path.name) from None
    if problems := _header_problems(header):
        raise refuse(problems, file=path.name)
    try:
        flat = safetensors.torch.load(content)
    except safetensors.SafetensorError as error:
        raise refuse([f"not a valid safetensors file: {error}"], file=path.name) from None
    pairs, problems = _pairs({key: tensor.to(torch.float32, copy=True) for key, tensor in flat.items()})
    if problems:
        raise refuse(problems, file=path.name)
    return pairs


def _header_problems(header: Any) -> list[str]:
    if not isinstance(header, dict):
        return ["the header is not an object"]
    entries = {key: entry for key, entry in header.items() if key != "__metadata__"}
    if not entries:
        return ["there are no tensors"]
    if len(entries) > limits.SAFETENSORS_TENSORS:
        return [f"{len(entries)} tensors; at most {limits.SAFETENSORS_TENSORS} are allowed"]
    return [f"{key!r:.220} {problem}" for key, entry in entries.items() if (problem := _entry_problem(key, entry))]


def _entry_problem(key: str, entry: Any) -> str | None:
    if not _KEY.fullmatch(key):
        return "is not the key of a LoRA A or B (base_model.model.<module>.lora_A.weight)"
    if not isinstance(entry, dict) or entry.get("dtype") not in _DTYPES:
        given = entry.get("dtype") if isinstance(entry, dict) else entry
        return f"has dtype {given!r:.40}; allowed are {', '.join(_DTYPES)}"
    shape = entry.get("shape")
    if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and 1 <= n < _MAX_DIM for n in shape)):
        return f"has shape {shape!r:.60}; a matrix with at least one element is needed"
    return None


def _pairs(flat: dict[str, Tensor]) -> tuple[dict[str, tuple[Tensor, Tensor]], list[str]]:
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in flat.items():
        found = _KEY.fullmatch(key)
        assert found, "the header was checked"
        halves.setdefault(found[1], {})[found[2]] = tensor
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    problems: list[str] = []
    for path, half in sorted(halves.items()):
        if len(half) != 2:
            problems.append(f"{path} has no lora_{'B' if 'A' in half else 'A'}")
            continue
        a_RI, b_OR = pairs[path] = half["A"], half["B"]
        if a_RI.shape[0] != b_OR.shape[1]:
            problems.append(f"{path}: the rank of lora_A is {a_RI.shape[0]}, that of lora_B is {b_OR.shape[1]}")
        elif a_RI.shape[0] > limits.MAX_RANK:
            problems.append(f"{path}: rank {a_RI.shape[0]}; at most {limits.MAX_RANK} is allowed")
        problems += [f"{path}.lora_{which} holds values that are not finite"
                     for which, tensor in sorted(half.items()) if not tensor.isfinite().all()]  # fmt: skip
    return pairs, problems
