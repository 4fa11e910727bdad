"""A batch of many adapters against the model that each of them is once it is merged, alone."""

import copy
import dataclasses
from typing import Any

import pytest
import torch

from shared.specs import AdapterShare
from tests.worker.inference.conftest import AdapterShelf, StartEngine, ask, generated_by_transformers, read
from worker.base_model import BaseModel
from worker.inference.forward import Piece, RowForward
from worker.lora.format import read_adapter
from worker.lora.targets import linear_modules

pytestmark = pytest.mark.usefixtures("computed_by")
RANKS = (2, 4, 8, 16)
PROMPTS = ["a", "Once upon a time", "what is", "the quick brown fox jumps over the lazy dog", "xyz", "to be or not"]


def merged(base: BaseModel, shelf: AdapterShelf, name: str | None) -> Any:
    """A copy of the base whose weights are W + s B A, computed here."""
    model = copy.deepcopy(base.model)
    if name is not None:
        adapter = read_adapter(shelf.directory / name)
        for path, layer in linear_modules(model).items():
            if path in adapter.tensors:
                a_RI, b_OR = adapter.tensors[path]
                layer.weight.data += adapter.spec.scaling(path) * b_OR @ a_RI
    return model


@pytest.mark.parametrize("max_rows", [18, 5])
def test_every_row_gives_the_tokens_of_its_merged_model(base: BaseModel, shelf: AdapterShelf, start: StartEngine,
                                                        max_rows: int) -> None:  # fmt: skip
    """8 adapters of 4 ranks and the bare base over prompts of 6 lengths: all at once, and as rows that join late."""
    names = [shelf.make(f"adapter-{i}", r=RANKS[i % 4]) for i in range(8)]
    wanted = [(PROMPTS[i % 6], (names * 2)[i] if i % 3 else None) for i in range(16)]
    expected = [
        generated_by_transformers(dataclasses.replace(base, model=merged(base, shelf, name)), prompt, 8 + 3 * (i % 4))
        for i, (prompt, name) in enumerate(wanted)
    ]
    engine = start(max_rows=max_rows)

    streams = [engine.submit(ask(prompt, name, max_tokens=8 + 3 * (i % 4))) for i, (prompt, name) in enumerate(wanted)]

    assert [read(stream).text for stream in streams] == expected
    assert len(set(expected)) > 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_base_row_is_the_base_bit_for_bit(base: BaseModel, shelf: AdapterShelf, dtype: torch.dtype) -> None:
    """Its logits are the same whether rows of adapters or of the base stand beside it, while prompts are read and in
    every step after; and the rows beside it do differ."""
    names = [shelf.make(f"adapter-{i}", r=RANKS[i]) for i in range(4)]
    base.model.to(dtype)
    forward = RowForward(base, max_rows=5, cache_bytes=1 << 24)
    for name in names:
        forward.bank.attach(name, forward.bank.pack(read_adapter(shelf.directory / name), name=name))
    ids = [base.tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in PROMPTS[:5]]

    def logits(beside: list[tuple[AdapterShare, ...]]) -> list[torch.Tensor]:
        shares = [*beside[:2], (), *beside[2:]]
        rows = [forward.add_row(60) for _ in range(5)]
        steps = [forward.step([Piece(row, ids[row], shares[row]) for row in range(5)])]
        steps += [forward.step([Piece(row, [token], shares[row]) for row in range(5)]) for token in range(3, 9)]
        for _ in rows:
            forward.remove_row(0)
        return steps

    bare, mixed = logits([()] * 4), logits([(AdapterShare(version_id=name),) for name in names])

    assert all(torch.equal(one[2], other[2]) for one, other in zip(bare, mixed, strict=True))
    assert not any(torch.equal(one[3], other[3]) for one, other in zip(bare, mixed, strict=True))
    forward.close()
