"""Reading an adapter's safetensors file that a stranger may have made.

The format is 8 bytes of little-endian header length, a JSON header, the data (safetensors documentation, "Format"). The
header may name anything; the data of the tensors must follow each other without a hole, from first byte to last.

We read it ourselves: the library accepts duplicate keys, zero tensors, tensors of size zero, 100,000 of them and a
100 MB header, and copies each tensor by itself, which for an adapter of hundreds of small ones takes longer than all
else. Here the data is read into memory once, and the tensors are views of it.
"""

import json
import math
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Final, TypeGuard

import torch
from torch import Tensor

from shared import limits
from shared.errors import IncompatibleAdapter

TENSORS_NAME: Final = "adapter_model.safetensors"
_KEY: Final = re.compile(r"base_model\.model\.([A-Za-z0-9_.]{1,200})\.lora_(A|B)\.weight")
_DTYPES: Final = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MAX_DIM: Final = 1 << 32
_SHOWN: Final = 8


def refuse(problems: list[str], *, file: str) -> IncompatibleAdapter:
    """One error for all problems of a file; of very many, the first and their count."""
    more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return IncompatibleAdapter(f"{file}: {'; '.join(problems[:_SHOWN])}{more}", param=file.partition(".")[0])


def strict_json(text: bytes | bytearray) -> Any:
    """The JSON value; ValueError on duplicate keys, NaN, Infinity, too deep nesting, or what is not JSON in UTF-8."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            keys = sorted(key for key, _ in pairs)
            raise ValueError(f"duplicate key {next(a for a, b in pairwise(keys) if a == b)!r:.120}")
        return found

    def no_constant(name: str) -> Any:
        raise ValueError(f"{name} is not allowed")

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=no_constant)
    except RecursionError:
        raise ValueError("nested too deep") from None


def check_start(start: bytes, size: int) -> None:
    """Refuse a file on its first 8 bytes and its size: one that is too short, or whose header is too long to parse."""
    length = int.from_bytes(start, "little")
    if size < 8 or length > size - 8:
        raise refuse(["not a safetensors file: the header is longer than the file"], file=TENSORS_NAME)
    if length > limits.SAFETENSORS_HEADER_BYTES:
        allowed = limits.SAFETENSORS_HEADER_BYTES
        raise refuse([f"the header has {length} bytes; at most {allowed} are allowed"], file=TENSORS_NAME)


def parse_tensors(content: bytearray) -> dict[str, tuple[Tensor, Tensor]]:
    """Module path -> (A (R, I), B (O, R)), fp32. Every key is used. `content` has passed `check_start`.

    The tensors share the memory of `content` if that is fp32, or one piece of their own, if it is of one dtype. Raises
    IncompatibleAdapter that names all that is wrong: unknown keys, halves of a pair, dtypes, shapes, ranks that differ
    within a pair or exceed the limit, values that are not finite.
    """
    start = 8 + int.from_bytes(content[:8], "little")
    try:
        header = strict_json(content[8:start])
    except ValueError as error:
        raise refuse([f"the header is not valid: {error}"], file=TENSORS_NAME) from None
    problems = _header_problems(header) or _layout_problems(header, len(content) - start)
    if problems:
        raise refuse(problems, file=TENSORS_NAME)
    whole, views = _views(header, content, start)
    pairs, problems = _pairs(views, are_finite=all(map(_is_finite, whole)))
    if problems:
        raise refuse(problems, file=TENSORS_NAME)
    return pairs


def _header_problems(header: Any) -> list[str]:
    if not isinstance(header, dict):
        return ["the header is not an object"]
    metadata = header.pop("__metadata__", {})
    if not (isinstance(metadata, dict) and all(isinstance(text, str) for text in metadata.values())):
        return ["the header's __metadata__ is not an object of texts"]
    if not header:
        return ["there are no tensors"]
    if len(header) > limits.SAFETENSORS_TENSORS:
        return [f"{len(header)} tensors; at most {limits.SAFETENSORS_TENSORS} are allowed"]
    return [f"{key!r:.220} {problem}" for key, entry in header.items() if (problem := _entry_problem(key, entry))]


def _entry_problem(key: str, entry: Any) -> str | None:
    if not _KEY.fullmatch(key):
        return "is not the key of a LoRA A or B (base_model.model.<module>.lora_A.weight)"
    if not isinstance(entry, dict) or entry.get("dtype") not in _DTYPES:
        given = entry.get("dtype") if isinstance(entry, dict) else entry
        return f"has dtype {given!r:.40}; allowed are {', '.join(_DTYPES)}"
    shape = entry.get("shape")
    if not (_are_whole(shape) and all(1 <= n < _MAX_DIM for n in shape)):
        return f"has shape {shape!r:.60}; a matrix with at least one element is needed"
    offsets = entry.get("data_offsets")
    size = math.prod(shape) * _DTYPES[entry["dtype"]].itemsize
    if not (_are_whole(offsets) and offsets[1] - offsets[0] == size):
        return f"has data_offsets {offsets!r:.60}; its shape and dtype need {size} bytes"
    return None


def _are_whole(pair: object) -> TypeGuard[list[int]]:
    return isinstance(pair, list) and len(pair) == 2 and all(type(n) is int for n in pair)


def _layout_problems(header: dict[str, Any], num_bytes: int) -> list[str]:
    """Whether the tensors lie one after the other and fill the file; sorts the entries by where they lie."""
    entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"][0])
    position = 0
    for key, entry in entries:
        start, end = entry["data_offsets"]
        if start != position:
            return [f"not a valid safetensors file: {key!r:.220} starts at byte {start} of the data, not at {position}"]
        position = end
    if position != num_bytes:
        return [f"not a valid safetensors file: the header tells of {position} bytes of data, there are {num_bytes}"]
    header.clear()
    header.update(entries)
    return []


def _views(header: dict[str, Any], content: bytearray, start: int) -> tuple[Sequence[Tensor], dict[str, Tensor]]:
    """Pieces that hold all values, and the tensors, in fp32. `header` is checked, and in the order of the data."""
    # Dividing by 4 keeps fp32 aligned; writers pad the header so.
    data = torch.frombuffer(content, dtype=torch.uint8)[start:] if start % 4 == 0 else torch.frombuffer(
        content[start:], dtype=torch.uint8)  # fmt: skip
    dtypes = {entry["dtype"] for entry in header.values()}
    if len(dtypes) == 1:
        flat = data.view(_DTYPES[dtypes.pop()]).to(torch.float32)
        whole: Sequence[Tensor] = [flat]
        parts = torch.split(flat, [math.prod(entry["shape"]) for entry in header.values()])
    else:
        sizes = [entry["data_offsets"][1] - entry["data_offsets"][0] for entry in header.values()]
        whole = parts = tuple(
            part.clone().view(_DTYPES[entry["dtype"]]).to(torch.float32)
            for part, entry in zip(torch.split(data, sizes), header.values(), strict=True)
        )
    return whole, {key: part.view(entry["shape"]) for (key, entry), part in zip(header.items(), parts, strict=True)}


def _is_finite(values: Tensor) -> bool:
    low, high = torch.aminmax(values)  # of values with a NaN, both are
    return math.isfinite(low.item()) and math.isfinite(high.item())


def _pairs(flat: dict[str, Tensor], *, are_finite: bool) -> tuple[dict[str, tuple[Tensor, Tensor]], list[str]]:
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
        if not are_finite:
            problems += [f"{path}.lora_{which} holds values that are not finite"
                         for which, tensor in sorted(half.items()) if not tensor.isfinite().all()]  # fmt: skip
    return pairs, problems
