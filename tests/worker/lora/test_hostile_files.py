"""Adapter files made by a stranger: refused with one clear error, before any library trusts them."""

import io
import json
import pickle
import struct
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors.torch import save
from torch import Tensor

from shared import limits
from shared.errors import IncompatibleAdapter
from worker.lora import read_adapter

A, B = "base_model.model.layers.0.q_proj.lora_A.weight", "base_model.model.layers.0.q_proj.lora_B.weight"
GOOD_CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}


def good_file(**changes: Tensor | None) -> bytes:
    tensors = {A: torch.ones(2, 4), B: torch.ones(4, 2)} | changes
    return save({name: tensor for name, tensor in tensors.items() if tensor is not None})


def raw(header: object, data: bytes = b"") -> bytes:
    """A safetensors file of this header (an object, or its bytes) and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def members(*pairs: tuple[str, object]) -> bytes:
    """A JSON object that may have a key twice."""
    return b"{" + b", ".join(f"{json.dumps(k)}: {json.dumps(v)}".encode() for k, v in pairs) + b"}"


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def write(tmp_path: Path, content: bytes, config: object = GOOD_CONFIG) -> Path:
    (tmp_path / "adapter_model.safetensors").write_bytes(content)
    text = config if isinstance(config, bytes) else json.dumps(config).encode()
    (tmp_path / "adapter_config.json").write_bytes(text)
    return tmp_path


def refused(directory: Path) -> str:
    with pytest.raises(IncompatibleAdapter) as caught:
        read_adapter(directory)
    assert len(caught.value.message) < 3000
    return caught.value.message


def test_the_good_file_is_read(tmp_path: Path) -> None:
    """What all the files below are variations of is accepted."""
    adapter = read_adapter(write(tmp_path, good_file()))

    assert list(adapter.tensors) == ["layers.0.q_proj"]
    assert read_adapter(write(tmp_path, raw(PAIR, bytes(64)))).tensors.keys() == adapter.tensors.keys()


def archive(kind: str) -> bytes:
    file = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(file, "w") as zipped:
            zipped.writestr("adapter_model.bin", b"x" * 100)
    else:
        with tarfile.open(fileobj=file, mode="w") as tar:
            tar.addfile(tarfile.TarInfo("adapter_model.bin"))
    return file.getvalue()


def torch_bin() -> bytes:
    file = io.BytesIO()
    torch.save({A: torch.ones(2, 4)}, file)
    return file.getvalue()


PAIR = {A: entry([2, 4], 0, 32), B: entry([4, 2], 32, 64)}
NOT_SAFETENSORS = {
    "empty": b"",
    "seven bytes": b"\x02" + bytes(6),
    "pickle": pickle.dumps({A: [1.0]}),
    "zip": archive("zip"),
    "tar": archive("tar"),
    "torch .bin": torch_bin(),
    "gguf": b"GGUF" + struct.pack("<IQQ", 3, 0, 0) + bytes(64),
    "n is 0": struct.pack("<Q", 0) + bytes(64),
    "n is 2^63": struct.pack("<Q", 1 << 63) + bytes(64),
    "n beyond the file": struct.pack("<Q", 1000) + b"{}",
    "truncated": good_file()[:-1],
    "trailing bytes": good_file() + b"x",
    "overlap": raw({A: entry([2, 4], 0, 32), B: entry([4, 2], 16, 48)}, bytes(48)),
    "hole": raw({A: entry([2, 4], 0, 32), B: entry([4, 2], 36, 68)}, bytes(68)),
    "end before start": raw({A: entry([2, 4], 32, 0), B: entry([4, 2], 32, 64)}, bytes(64)),
    "shape and bytes disagree": raw({A: entry([2, 5], 0, 32), B: entry([4, 2], 32, 64)}, bytes(64)),
    "shape overflows": raw({A: entry([(1 << 32) - 1, (1 << 32) - 1], 0, 32), B: PAIR[B]}, bytes(64)),
    "a field twice": raw(members((A, PAIR[A]), (B, PAIR[B])).replace(b'"F32"', b'"F64", "dtype": "F32"'), bytes(64)),
    "no offsets": raw({A: {"dtype": "F32", "shape": [2, 4]}, B: PAIR[B]}, bytes(64)),
    "metadata of numbers": raw(PAIR | {"__metadata__": {"format": 1}}, bytes(64)),
    "metadata is a list": raw(PAIR | {"__metadata__": []}, bytes(64)),
    "header is a list": raw(b"[]"),
    "header is not JSON": raw(b"{'a': 1}"),
    "header is not UTF-8": raw(b'{"\xff": 1}'),
    "header nested deep": raw(b"[" * 100_000),
    "a number of 10,000 digits": raw(b'{"a": ' + b"9" * 10_000 + b"}"),
}


@pytest.mark.parametrize("content", NOT_SAFETENSORS.values(), ids=NOT_SAFETENSORS)
def test_what_is_not_safetensors_is_refused(tmp_path: Path, content: bytes) -> None:
    """Other formats under this name, wrong lengths and wrong headers are one IncompatibleAdapter."""
    assert refused(write(tmp_path, content)).startswith("adapter_model.safetensors: ")


ACCEPTED_BY_THE_LIBRARY = {
    "no tensors": (raw({}), "no tensors"),
    "metadata only": (raw({"__metadata__": {"format": "pt"}}), "no tensors"),
    "duplicate key": (
        raw(members((A, PAIR[A]), (A, PAIR[A]), (B, PAIR[B])), bytes(64)),
        "duplicate key",
    ),
    "zero size": (good_file(**{A: torch.ones(0, 4), B: torch.ones(4, 0)}), "at least one element"),
    "vector": (good_file(**{A: torch.ones(8)}), "matrix"),
    "three dimensions": (good_file(**{A: torch.ones(2, 4, 1)}), "matrix"),
    "path as key": (good_file(**{"../../etc/passwd": torch.ones(2, 4)}), "not the key of a LoRA"),
    "path within a key": (good_file(**{"base_model.model.../../x.lora_A.weight": torch.ones(2, 4)}), "not the key"),
    "line break after a key": (good_file(**{A + "\n": torch.ones(2, 4)}), "not the key"),
    "overlong key": (good_file(**{f"base_model.model.{'x' * 201}.lora_A.weight": torch.ones(2, 4)}), "not the key"),
    "DoRA tensor": (good_file(**{A.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(4)}), "not the key"),
    "full weight": (good_file(**{"base_model.model.lm_head.weight": torch.ones(2, 4)}), "not the key"),
    "F64": (good_file(**{A: torch.ones(2, 4, dtype=torch.float64)}), "dtype 'F64'; allowed are F32, F16, BF16"),
    "I8": (good_file(**{A: torch.ones(2, 4, dtype=torch.int8)}), "dtype 'I8'"),
    "bool": (good_file(**{A: torch.ones(2, 4, dtype=torch.bool)}), "dtype 'BOOL'"),
    "NaN": (good_file(**{A: torch.full((2, 4), torch.nan)}), "layers.0.q_proj.lora_A holds values that are not finite"),
    "one Inf": (good_file(**{B: torch.ones(4, 2).index_fill(0, torch.tensor([3]), torch.inf)}), "not finite"),
    "Inf in half precision": (good_file(**{A: torch.full((2, 4), -torch.inf, dtype=torch.float16)}), "not finite"),
    "A without B": (good_file(**{B: None}), "layers.0.q_proj has no lora_B"),
    "B without A": (good_file(**{A: None}), "layers.0.q_proj has no lora_A"),
    "ranks of a pair": (good_file(**{B: torch.ones(4, 3)}), "rank of lora_A is 2, that of lora_B is 3"),
    "rank 300": (good_file(**{A: torch.ones(300, 4), B: torch.ones(4, 300)}), "rank 300; at most 256"),
    "rank of the config": (
        good_file(**{A: torch.ones(3, 4), B: torch.ones(4, 3)}),
        "has rank 3, adapter_config.json says 2",
    ),
}


@pytest.mark.parametrize(("content", "reason"), ACCEPTED_BY_THE_LIBRARY.values(), ids=ACCEPTED_BY_THE_LIBRARY)
def test_what_the_library_accepts_but_no_adapter_has_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    """The safetensors library alone reads these files; we refuse each and say why."""
    assert safetensors.torch.load(content) is not None
    assert reason in refused(write(tmp_path, content))


def test_too_many_tensors_are_refused(tmp_path: Path) -> None:
    """A header within its size that declares more tensors than allowed is refused before the library allocates."""
    header = {f"{i:x}": 0 for i in range(limits.SAFETENSORS_TENSORS + 1)}

    assert "20001 tensors; at most 20000" in refused(write(tmp_path, raw(header)))


def test_a_large_header_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    """A header over the limit, which the library would accept, is refused on its length alone: it is not even JSON."""
    length = limits.SAFETENSORS_HEADER_BYTES + 1

    message = refused(write(tmp_path, raw(b"x" * length)))

    assert f"the header has {length} bytes; at most {limits.SAFETENSORS_HEADER_BYTES}" in message


def test_a_large_file_is_refused_unread(tmp_path: Path) -> None:
    """A sparse file over the limit is refused on its size; none of it is read into memory."""
    directory = write(tmp_path, good_file())
    with (directory / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(limits.ADAPTER_BYTES + 1)

    assert f"{limits.ADAPTER_BYTES + 1} bytes; at most {limits.ADAPTER_BYTES}" in refused(directory)


def test_all_wrong_tensors_are_in_one_error(tmp_path: Path) -> None:
    """The reader does not stop at the first tensor."""
    message = refused(write(tmp_path, good_file(**{A: torch.ones(8), "x": torch.ones(1), "y": torch.ones(1)})))

    assert all(repr(name) in message for name in (A, "x", "y"))


CONFIGS = {
    "empty": b"",
    "not JSON": b"{",
    "a list": b"[]",
    "not UTF-8": b'{"r": "\xff"}',
    "duplicate key": b'{"peft_type": "LORA", "r": 2, "r": 2, "target_modules": ["q_proj"]}',
    "NaN": b'{"peft_type": "LORA", "lora_alpha": NaN, "target_modules": ["q_proj"]}',
    "Infinity": b'{"peft_type": "LORA", "lora_alpha": Infinity, "target_modules": ["q_proj"]}',
    "infinite number": b'{"peft_type": "LORA", "lora_alpha": 1e999, "target_modules": ["q_proj"]}',
    "nested deep": b'{"a": ' * 50_000,
    "huge integer": b'{"peft_type": "LORA", "r": ' + b"9" * 10_000 + b"}",
    "10 MB": b'{"peft_type": "LORA", "r": 2}' + b" " * 10_000_000,
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_hostile_config_is_refused(tmp_path: Path, config: bytes) -> None:
    """Sizes, duplicate keys and numbers that JSON does not have are one IncompatibleAdapter."""
    assert refused(write(tmp_path, good_file(), config)).startswith("adapter_config.json: ")


@pytest.mark.parametrize(
    "changes",
    [
        {"auto_mapping": {"parent_library": "antigravity", "base_model_class": "fly"}},
        {"megatron_core": "antigravity"},
        {"auto_mapping": {"parent_library": "transformers\nantigravity"}},
    ],
)
def test_no_module_is_imported_on_a_files_word(tmp_path: Path, changes: dict[str, Any]) -> None:
    """A config that names a module to import is refused, and the module is not imported."""
    refused(write(tmp_path, good_file(), GOOD_CONFIG | changes))

    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_missing_file_is_refused(tmp_path: Path, name: str) -> None:
    """Each file must be there; an adapter_model.bin beside it is not looked at."""
    directory = write(tmp_path, good_file())
    (directory / name).rename(directory / "adapter_model.bin")

    assert refused(directory) == f"{name}: there is no such file"


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_directory_in_a_files_place_is_refused(tmp_path: Path, name: str) -> None:
    """What is no plain file is not opened."""
    directory = write(tmp_path, good_file())
    (directory / name).unlink()
    (directory / name).mkdir()

    assert refused(directory).startswith(f"{name}: ")
