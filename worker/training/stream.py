"""One forward and backward over samples of several jobs at once: a packed stream, routed, its losses told apart.

Shapes: T tokens of the stream, N label positions in it, H hidden width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from worker.attention import packed_segments
from worker.base_model import BaseModel
from worker.lora.manager import AdapterManager
from worker.training.dataset import TokenisedDataset
from worker.training.loss import Score, head_of, score, weighted_loss


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
    def num_tokens(self) -> int:
        return sum(map(self.data.num_tokens, self.indices))


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

    def learn(self, parts: Sequence[Part]) -> list[Gained]:
        """Loss and gradients of each part. Changes no parameter and no `.grad`; if it raises, nothing has changed."""
        hidden_NH, targets_N, counts = self._run(parts)
        weights_N = torch.cat([torch.full((n,), 1 / p.num_labels) for n, p in zip(counts, parts, strict=True)])
        total, losses_N = weighted_loss(hidden_NH, targets_N, weights_N.to(self._device), self._head)
        wanted = [parameter for part in parts for parameter in part.parameters]
        gradients = torch.autograd.grad(total, wanted)
        gained, at = [], 0
        for part, losses in zip(parts, torch.split(losses_N, counts), strict=True):
            own = gradients[at : at + len(part.parameters)]
            at += len(own)
            gained.append(Gained(losses.sum() / part.num_labels, own))
        return gained

    @torch.no_grad()
    def judge(self, part: Part) -> Score:
        """Loss and accuracy of a part, without dropout."""
        self._manager.train(False)
        try:
            hidden_NH, targets_N, _ = self._run([part])
            return score(hidden_NH, targets_N, self._head)
        finally:
            self._manager.train(True)

    def _run(self, parts: Sequence[Part]) -> tuple[Tensor, Tensor, list[int]]:
        """The hidden states (N, H) that predict the label tokens (N,), and how many of these each part has."""
        samples = [(part, *part.data[index]) for part in parts for index in part.indices]
        lengths = [len(tokens) for _, tokens, _ in samples]
        tokens_T = torch.cat([tokens for _, tokens, _ in samples]).to(self._device, torch.int64)
        is_label_T = torch.cat([is_label for _, _, is_label in samples])
        labels_N = is_label_T.nonzero()[:, 0].to(self._device)
        positions_T = torch.cat([torch.arange(length) for length in lengths]).to(self._device)
        counts = [int(own.sum()) for own in torch.split(is_label_T, [part.num_tokens for part in parts])]
        route = [(part.adapter, length) for (part, _, _), length in zip(samples, lengths, strict=True)]
        seeds = [seed for part in parts for seed in part.seeds]
        with packed_segments(lengths), self._manager.routed_segments(route, seeds=seeds):
            hidden_1TH = self._trunk(
                input_ids=tokens_T[None], position_ids=positions_T[None], use_cache=False
            ).last_hidden_state
        return hidden_1TH[0, labels_N - 1], tokens_T[labels_N], counts
