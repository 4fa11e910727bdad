"""One forward and backward over samples of several jobs at once: a packed stream, routed, its losses told apart.

Shapes: T tokens of the stream, N label positions in it, H hidden width.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from worker.attention import packed_segments, replayed_segments
from worker.base_model import BaseModel, one_line
from worker.lora.manager import AdapterManager
from worker.training.dataset import TokenisedDataset
from worker.training.failure import without_frames
from worker.training.graphs import Captured, Graphs
from worker.training.loss import Score, head_of, score, weighted_loss

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Part:
    """Samples of one job in a stream. `seeds`, one per sample, say what its dropout drops.

    Each label weighs 1 / `num_labels`, the label tokens of the whole optimizer step, so that parts add up to its mean.
    """

    adapter: str
    parameters: Sequence[nn.Parameter]
    data: TokenisedDataset
    indices: Sequence[int]
    seeds: Sequence[int]
    num_labels: int

    @property
    def lengths(self) -> list[int]:
        """The tokens of each sample."""
        return [*map(self.data.num_tokens, self.indices)]

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)


@dataclass(frozen=True)
class Gained:
    """What a part gives: its share of the step's mean loss, and of the gradients, in the order of its parameters."""

    loss: Tensor
    gradients: tuple[Tensor, ...]


class Stream:
    """Runs parts through a frozen base and the adapters that are attached to it. For the thread that owns the model.

    What a part gains is what it would gain alone, within the rounding of sums: attention and adapters stay within a
    sample, and a row that is not finite is not finite for its own job only.
    """

    def __init__(self, base: BaseModel, manager: AdapterManager) -> None:
        self._device = base.device
        self._manager = manager
        self._trunk: Any = base.model.base_model  # the model without its head
        self._head = head_of(base.model)
        self._graphs = Graphs(base, self._replayed_hidden) if Graphs.can_serve(base) else None

    def learn(self, parts: Sequence[Part]) -> list[Gained]:
        """Loss and gradients of each part. Changes no parameter and no `.grad`; if it raises, nothing has changed.

        On a GPU, parts that have a CUDA graph go one by one and the others together.
        """
        if self._graphs is not None:
            try:
                return self._learn_by_graphs(parts, self._graphs)
            except Exception as error:  # whatever it was, it shows again without them if it is not theirs
                log.warning("training goes on without CUDA graphs: %s", one_line(without_frames(error)))
            self.release_memory()
            self._graphs = None
        return self._learn_together(parts)

    @torch.no_grad()
    def judge(self, part: Part) -> Score:
        """Loss and accuracy of a part, without dropout."""
        self._manager.train(False)
        try:
            hidden_NH, targets_N = self._run([part], _Laid.of([part]))
            return score(hidden_NH, targets_N, self._head)
        finally:
            self._manager.train(True)

    def release_memory(self) -> None:
        """Give back the memory of a GPU that is kept only to make the next streams faster."""
        if self._graphs is not None:
            self._graphs.clear()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _learn_by_graphs(self, parts: Sequence[Part], graphs: Graphs) -> list[Gained]:
        gained: dict[int, Gained] = {}
        for i, part in enumerate(parts):
            if self._manager.spec(part.adapter).dropout:  # what it drops is drawn for each stream
                continue
            if (captured := graphs.find(part.adapter, part.parameters, part.lengths)) is not None:
                gained[i] = self._learn_captured(part, captured)
        rest = [i for i in range(len(parts)) if i not in gained]
        if rest:
            gained |= zip(rest, self._learn_together([parts[i] for i in rest]), strict=True)
        return [gained[i] for i in range(len(parts))]

    def _learn_captured(self, part: Part, captured: Captured) -> Gained:
        laid = _Laid.of([part])
        hidden_TH = captured.forward(laid.tokens_T, laid.positions_T, laid.lengths)
        labels_N, targets_N = self._on_device(laid.labels_N, laid.tokens_T[laid.labels_N])
        hidden_NH = hidden_TH.index_select(0, labels_N - 1).requires_grad_()
        weights_N = self._weights([part], laid.counts)
        total, losses_N = weighted_loss(hidden_NH, targets_N, weights_N, self._head)
        (slope_NH,) = torch.autograd.grad(total, hidden_NH)
        return Gained(losses_N.sum() / part.num_labels, captured.backward(labels_N - 1, slope_NH))

    def _learn_together(self, parts: Sequence[Part]) -> list[Gained]:
        laid = _Laid.of(parts)
        hidden_NH, targets_N = self._run(parts, laid)
        total, losses_N = weighted_loss(hidden_NH, targets_N, self._weights(parts, laid.counts), self._head)
        wanted = [parameter for part in parts for parameter in part.parameters]
        gradients = torch.autograd.grad(total, wanted)
        gained, at = [], 0
        for part, losses in zip(parts, torch.split(losses_N, laid.counts), strict=True):
            own = gradients[at : at + len(part.parameters)]
            at += len(own)
            gained.append(Gained(losses.sum() / part.num_labels, own))
        return gained

    def _run(self, parts: Sequence[Part], laid: "_Laid") -> tuple[Tensor, Tensor]:
        """The hidden states (N, H) that predict the label tokens, and these (N,)."""
        tokens_T, positions_T, labels_N = self._on_device(laid.tokens_T, laid.positions_T, laid.labels_N)
        route = [(part.adapter, length) for part in parts for length in part.lengths]
        seeds = [seed for part in parts for seed in part.seeds]
        with packed_segments(laid.lengths), self._manager.routed_segments(route, seeds=seeds):
            hidden_TH = self._hidden(tokens_T, positions_T)
        return hidden_TH[labels_N - 1], tokens_T[labels_N]

    def _replayed_hidden(
        self, tokens_T: Tensor, positions_T: Tensor, starts_S1: Tensor, longest: int, adapter: str
    ) -> Tensor:
        """What a graph captures: all of a stream through one adapter."""
        num_tokens = len(tokens_T)
        segments = replayed_segments(starts_S1, num_tokens=num_tokens, longest=longest)
        with segments, self._manager.routed_segments([(adapter, num_tokens)]):
            return self._hidden(tokens_T, positions_T)

    def _hidden(self, tokens_T: Tensor, positions_T: Tensor) -> Tensor:
        found: Tensor = self._trunk(
            input_ids=tokens_T[None], position_ids=positions_T[None], use_cache=False
        ).last_hidden_state
        return found[0]

    def _weights(self, parts: Sequence[Part], counts: Sequence[int]) -> Tensor:
        """(N,): what each label weighs."""
        weights = zip(counts, parts, strict=True)
        return torch.cat([torch.full((n,), 1 / part.num_labels, device=self._device) for n, part in weights])

    def _on_device(self, *numbers: Tensor) -> tuple[Tensor, ...]:
        """int64 tensors from the CPU; to a GPU in one copy, which is not waited for."""
        if self._device.type == "cpu":
            return numbers
        copied = torch.cat(numbers).pin_memory().to(self._device, non_blocking=True)
        return torch.split(copied, [len(own) for own in numbers])


@dataclass(frozen=True)
class _Laid:
    """Samples of parts laid end to end, int64 on the CPU: token ids and positions (T,), the places of the labels (N,);
    the tokens of each sample, and how many labels each part has."""

    tokens_T: Tensor
    positions_T: Tensor
    labels_N: Tensor
    lengths: list[int]
    counts: list[int]

    @classmethod
    def of(cls, parts: Sequence[Part]) -> "_Laid":
        samples = [part.data[index] for part in parts for index in part.indices]
        lengths = [len(tokens) for tokens, _ in samples]
        is_label_T = torch.cat([is_label for _, is_label in samples])
        return cls(
            tokens_T=torch.cat([tokens for tokens, _ in samples]).to(torch.int64),
            positions_T=torch.cat([torch.arange(length) for length in lengths]),
            labels_N=is_label_T.nonzero()[:, 0],
            lengths=lengths,
            counts=[int(own.sum()) for own in torch.split(is_label_T, [part.num_tokens for part in parts])],
        )
