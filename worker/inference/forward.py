"""One forward over everything that is being generated: a token of each row that decodes, and pieces of prompts."""

# Shapes: T tokens of the step, W rows whose next token is wanted, V vocabulary.

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from shared.specs import AdapterShare
from worker.attention import cached_rows
from worker.base_model import BaseModel
from worker.inference.cache import PlaneProbe, SlotCache
from worker.kernels.packed_linear import Product, can_pack, packed_product
from worker.kernels.row_attention import Chunk, RowAttention
from worker.lora.bank import AdapterBank
from worker.lora.sites import plain_product
from worker.lora.targets import linear_modules


@dataclass(frozen=True)
class Piece:
    """What a step reads of one row: tokens that go on where the row ends, through `shares`.

    `wants_next`: the logits after the last of them are wanted.
    """

    row: int
    token_ids: Sequence[int]
    shares: tuple[AdapterShare, ...]
    wants_next: bool = True


class RowForward:
    """The model, its adapters and its key-value cache, as rows of tokens in and next-token logits out.

    A forward that raises leaves all rows as long as they were, so it may be tried again with fewer of them. Logits are
    in the model's dtype, on its device. One thread at a time; `close` gives the model back as it was.
    """

    def __init__(self, base: BaseModel, *, max_rows: int, cache_bytes: int) -> None:
        self._model = cast(Any, base.model)
        self._device = base.device
        num_layers = self._model.config.get_text_config().num_hidden_layers
        probe = PlaneProbe(num_layers)

        @torch.inference_mode()
        def look() -> None:
            ids = torch.zeros(1, 2, dtype=torch.long, device=self._device)
            positions = torch.arange(2, device=self._device)[None]
            self._model(input_ids=ids, position_ids=positions, cache=probe, use_cache=True)

        head = self._model.get_output_embeddings()
        packs = can_pack([head.weight, *(layer.weight for layer in linear_modules(base.model).values())])
        self.bank = AdapterBank(base.model, look, product=packed_product if packs else plain_product)
        self._head = head if packs else None
        if packs:
            vars(head)["forward"] = _whole(packed_product(head.weight, head.bias), len(head.weight))
        self.cache = SlotCache(
            probe.planes,
            max_rows=max_rows,
            max_positions=base.context_length,
            budget_bytes=cache_bytes,
            device=base.device,
        )

    def close(self) -> None:
        self.bank.close()
        if self._head is not None:
            vars(self._head).pop("forward", None)

    @torch.inference_mode()
    def add_row(self, num_positions: int) -> int | None:
        """The number of a new row that may grow to so many tokens; None as long as there is no room for it."""
        return self.cache.add_row(num_positions)

    @torch.inference_mode()
    def remove_row(self, row: int) -> None:
        """Drop a row; the last row takes its number."""
        self.cache.remove_row(row)

    @torch.inference_mode()
    def step(self, pieces: Sequence[Piece]) -> Tensor:
        """Append each piece to its row; (W, V) logits after those that want them, in order. One piece a row.

        Pieces of one token form a batch of the rows; longer ones are read one after the other.
        """
        lengths = self.cache.lengths
        order = sorted(range(len(pieces)), key=lambda i: (len(pieces[i].token_ids), pieces[i].row))
        chunks = [Chunk(pieces[i].row, lengths[pieces[i].row], len(pieces[i].token_ids)) for i in order]
        num_single = sum(chunk.num_tokens == 1 for chunk in chunks)
        ids = [token for i in order for token in pieces[i].token_ids]
        positions = [position for chunk in chunks for position in range(chunk.start, chunk.end)]
        ends, last = [], -1
        for chunk in chunks:
            last += chunk.num_tokens
            ends.append(last)
        end_of = dict(zip(order, ends, strict=True))
        wanted = [end_of[i] for i, piece in enumerate(pieces) if piece.wants_next]
        self.cache.begin([(chunk.slot, chunk.start, chunk.num_tokens) for chunk in chunks])
        rows = RowAttention(chunks[:num_single], chunks[num_single:], self._device)
        route = self.bank.routed([(len(pieces[i].token_ids), pieces[i].shares) for i in order])
        with route, cached_rows(rows):
            output = self._model(
                input_ids=torch.tensor([ids], device=self._device),
                position_ids=torch.tensor([positions], device=self._device),
                cache=self.cache,
                use_cache=True,
                logits_to_keep=torch.tensor(wanted, dtype=torch.long, device=self._device),
            )
        self.cache.commit()
        logits: Tensor = output.logits[0]
        return logits


def _whole(product: Product, head_size: int) -> Product:
    """The same for an input of any leading shape."""
    return lambda x: product(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], head_size)
