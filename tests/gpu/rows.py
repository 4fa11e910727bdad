"""Rows of one model on the GPU through its adapters, and the same sequences alone, in a merged model."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shared.specs import AdapterShare
from tests.gpu.conftest import CUDA
from tests.worker.inference.test_forward import tiny
from tests.worker.lora.test_bank import made
from worker import attention
from worker.base_model import BaseModel
from worker.inference.forward import Piece, RowForward
from worker.lora.bank_route import Shares
from worker.lora.spec import LoadedAdapter
from worker.lora.targets import linear_modules
from worker.lora.update import weight_OI


def shares(*names: str, weight: float = 1.0) -> Shares:
    return tuple(AdapterShare(version_id=name, weight=weight) for name in names)


class Fleet:
    """A tiny model on the CPU in float32, some adapters of it, and what both give in any dtype on the GPU."""

    def __init__(self, model_type: str, ranks: dict[str, int], **changed: Any) -> None:
        self._plain = tiny(model_type, attention.NAME, **changed)
        self._eager = tiny(model_type, "eager", **changed)
        self.adapters: dict[str, LoadedAdapter] = {
            name: made(self._plain, name, r=rank, scale=0.15) for name, rank in ranks.items()
        }

    def rows(self, dtype: torch.dtype, **options: Any) -> RowForward:
        """Rows over a copy of the model, with all adapters attached."""
        model = copy.deepcopy(self._plain).to(CUDA, dtype).requires_grad_(False)
        base = BaseModel(
            model=model, tokenizer=None, name="tiny", digest="", context_length=model.config.max_position_embeddings,
            architecture=model.config.model_type, eos_token_ids=frozenset(), device=CUDA, dtype=dtype,
        )  # fmt: skip
        forward = RowForward(base, **{"max_rows": 8, "cache_bytes": 1 << 24} | options)
        for name, adapter in self.adapters.items():
            self.attach(forward, name, adapter)
        return forward

    @staticmethod
    def attach(forward: RowForward, name: str, adapter: LoadedAdapter) -> None:
        forward.bank.attach(name, forward.bank.pack(adapter, name=name))

    def alone(self, own: Shares, dtype: torch.dtype) -> Any:
        """The model with the adapters of `own` added to its weights, whose attention is Transformers' own."""
        merged = copy.deepcopy(self._eager)
        layers = linear_modules(merged)
        for share in own:
            adapter = self.adapters[share.version_id]
            for path, (a_RI, b_OR) in adapter.tensors.items():
                weight_OI(layers[path]).data.add_(share.weight * adapter.spec.scaling(path) * (b_OR @ a_RI))
        return merged.to(CUDA, dtype)


@torch.no_grad()
def last_logits(model: Any, ids: Sequence[int]) -> Tensor:
    """After a whole sequence, without any cache."""
    logits: Tensor = model(input_ids=torch.tensor([ids], device=CUDA), use_cache=False).logits[0, -1]
    return logits


def added(forward: RowForward, num_positions: int = 64) -> int:
    row = forward.add_row(num_positions)
    assert row is not None
    return row


def decoded(forward: RowForward, tokens: dict[int, int], shares_of: dict[int, Shares]) -> Tensor:
    """The logits after one token more of each row."""
    return forward.step([Piece(row, [token], shares_of.get(row, ())) for row, token in tokens.items()])
