"""One forward over everything that is being generated: a token of each row that decodes, and pieces of prompts."""

# Shapes: T tokens of the step, W rows whose next token is wanted, V vocabulary.

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from shared.specs import AdapterShare
from worker.attention import cached_rows
from worker.base_model import BaseModel
from worker.inference.cache import PlaneProbe, SlotCache
from worker.inference.compiled import compile_layers
from worker.inference.graphs import StepGraphs
from worker.inference.lean import make_lean
from worker.kernels import norms
from worker.kernels.native.step_kernels import StepKernels, step_kernels
from worker.kernels.native.streamed_product import packed_by
from worker.kernels.packed_linear import can_pack
from worker.kernels.row_attention import Chunk, RowAttention
from worker.lora.bank import AdapterBank
from worker.lora.product import PlainProduct, Product
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
    in the model's dtype, on its device. If `compiles`, a CPU gets C kernels where it can.
    One thread at a time; `close` gives the model back as it was.
    """

    def __init__(self, base: BaseModel, *, max_rows: int, cache_bytes: int, compiles: bool = True) -> None:
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
        self._kernels = _kernels_for(base.model) if compiles and base.device.type == "cpu" else None
        product = packed_by(self._kernels) if packs else PlainProduct
        kernel = None if self._kernels is None else self._kernels.add_updates
        self.bank = AdapterBank(base.model, look, product=product, kernel=kernel)
        self._head = head if packs else None
        if packs:
            vars(head)["forward"] = _whole(product(head.weight, head.bias), len(head.weight))
        # On a GPU graphs hide what starting operations costs, which is what the lean form saves.
        on_gpu = base.device.type == "cuda"
        self._changed = _fuse_norms(base.model) if on_gpu else make_lean(base.model, self.bank.sites)
        if self._kernels is not None:
            compile_layers(self._changed, self.bank, self._kernels)
        self.cache = SlotCache(
            probe.planes,
            max_rows=max_rows,
            max_positions=base.context_length,
            budget_bytes=cache_bytes,
            device=base.device,
        )
        self._graphs = StepGraphs(base, self.cache, self.bank, self._run) if StepGraphs.can_serve(base) else None

    def close(self) -> None:
        if self._graphs is not None:
            self._graphs.clear()
        self.bank.close()
        for module in self._changed:
            vars(module).pop("forward", None)
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

        Pieces of one token form a batch of the rows; longer ones are read one after the other. On a GPU a step of such
        pieces alone is replayed from a CUDA graph, once that pays.
        """
        lengths = self.cache.lengths
        order = sorted(range(len(pieces)), key=lambda i: (len(pieces[i].token_ids), pieces[i].row))
        chunks = [Chunk(pieces[i].row, lengths[pieces[i].row], len(pieces[i].token_ids)) for i in order]
        num_single = sum(chunk.num_tokens == 1 for chunk in chunks)
        ids = [token for i in order for token in pieces[i].token_ids]
        if self._graphs is not None and len(ids) == len(chunks):
            logits_SV = self._graphs.step(ids, chunks, [pieces[i].shares for i in order])
            if logits_SV is not None:
                self.cache.commit()
                return logits_SV[self._there([piece.row for piece in pieces if piece.wants_next])]
        positions = [position for chunk in chunks for position in range(chunk.start, chunk.end)]
        ends, last = [], -1
        for chunk in chunks:
            last += chunk.num_tokens
            ends.append(last)
        end_of = dict(zip(order, ends, strict=True))
        wanted = [end_of[i] for i, piece in enumerate(pieces) if piece.wants_next]
        self.cache.begin([(chunk.slot, chunk.start, chunk.num_tokens) for chunk in chunks])
        rows = RowAttention(chunks[:num_single], chunks[num_single:], self._device, self._kernels)
        route = self.bank.routed([(len(pieces[i].token_ids), pieces[i].shares) for i in order])
        with route, cached_rows(rows):
            logits = self._run(self._there(ids), self._there(positions), self._there(wanted))
        self.cache.commit()
        return logits

    def _run(self, ids_T: Tensor, positions_T: Tensor, wanted: Tensor | int = 0) -> Tensor:
        """(W, V) logits after the tokens at the places `wanted`; 0 are all."""
        output = self._model(
            input_ids=ids_T[None],
            position_ids=positions_T[None],
            cache=self.cache,
            use_cache=True,
            logits_to_keep=wanted,
        )
        logits: Tensor = output.logits[0]
        return logits

    def _there(self, numbers: Sequence[int]) -> Tensor:
        """On the model's device, without waiting for what that is still doing."""
        here = torch.tensor(numbers, dtype=torch.long)
        return here.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else here


def _kernels_for(model: nn.Module) -> StepKernels | None:
    """Compiled kernels, which take tensors of one dtype, for a model that is all of one."""
    dtypes = {parameter.dtype for parameter in model.parameters()}
    return step_kernels(dtypes.pop()) if len(dtypes) == 1 else None


def _fuse_norms(model: nn.Module) -> list[nn.Module]:
    """Make each RMSNorm of the model one kernel; which were."""
    changed = []
    for module in model.modules():
        if norms.is_rms_norm(module) and (fused := norms.fused_forward(module)) is not None:
            vars(module)["forward"] = fused
            changed.append(module)
    return changed


def _whole(product: Product, head_size: int) -> Callable[[Tensor], Tensor]:
    """The same for an input of any leading shape."""
    return lambda x: product(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], head_size)
