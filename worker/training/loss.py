"""Cross-entropy at label positions only, in chunks: never more than a few MiB of logits, whatever the vocabulary."""

# Shapes: N label positions, C positions of one chunk, H hidden width, V vocabulary.

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_LOGITS: Final = 1 << 23
"""How many logits are alive at once: 32 MiB in fp32, and as much of their softmax. The head's matrix is larger than a
CPU's caches and is read once a chunk: half of this takes 1.2 times as long over 49,152 words."""
GPU_CHUNKS: Final = 4
"""How many times as many on a GPU, which would wait for the processor to start so many small kernels."""


@dataclass(frozen=True)
class LogitHead:
    """The frozen last step of a language model: logits = cap(multiplier * (h W^T + b)), cap(z) = c tanh(z / c).

    `softcap` c None means no cap. Shapes: weight (V, H), bias (V,).
    """

    weight: Tensor
    bias: Tensor | None
    multiplier: float
    softcap: float | None

    @torch.no_grad()
    def logits(self, hidden_CH: Tensor) -> Tensor:
        """What the model itself would give as logits (C, V), multiplied in its dtype, capped in at least fp32."""
        logits_CV = torch.nn.functional.linear(hidden_CH, self.weight, self.bias)
        logits_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
        if self.multiplier != 1.0:
            logits_CV.mul_(self.multiplier)
        return logits_CV if self.softcap is None else logits_CV.div_(self.softcap).tanh_().mul_(self.softcap)


def head_of(model: Any) -> LogitHead:
    """The output head of a causal language model, with what its `forward` does to logits.

    Gemma 2 and 3 cap them (`final_logit_softcapping`), Cohere multiplies by `logit_scale`, Granite divides by
    `logits_scaling`; a model has at most one of these.
    """
    head, config = model.get_output_embeddings(), model.config
    multiplier = float(getattr(config, "logit_scale", None) or 1.0) / float(
        getattr(config, "logits_scaling", None) or 1
    )
    return LogitHead(head.weight, head.bias, multiplier, getattr(config, "final_logit_softcapping", None))


def weighted_loss(hidden_NH: Tensor, targets_N: Tensor, weights_N: Tensor, head: LogitHead) -> tuple[Tensor, Tensor]:
    """(sum_i w_i l_i, l) with l_i = -log softmax(logits_i)[target_i], in nats: a scalar, 0 for no position, and (N,).

    Only the scalar is differentiable, and only for `hidden_NH`; both are at least fp32. The gradient is formed in the
    forward pass, while a chunk's logits are at hand:
        dL/dlogits = w (softmax(logits) - onehot(target)),   dL/dh = dL/dlogits * cap' * multiplier @ W
    so backward only multiplies. W and b are frozen and get none. Each position has its own row in all of this: one that
    is not finite spoils the scalar and its own gradient, but no other position's gradient or loss.

    hidden (N, H) any float dtype, targets (N,) int64, weights (N,) float.
    Source: the chunking of Liger-Kernel's fused linear cross-entropy, Hsu et al. 2024, arXiv:2410.10989, section 3.2.
    """
    total, losses_N = _WeightedLoss.apply(hidden_NH, targets_N, weights_N, head)  # type: ignore[no-untyped-call]  # torch
    return total, losses_N


@dataclass(frozen=True)
class Score:
    """What a model makes of given labels: summed loss in nats, and how many labels it ranks first, of how many."""

    loss: float
    num_correct: int
    num_labels: int

    def __add__(self, other: "Score") -> "Score":
        return Score(self.loss + other.loss, self.num_correct + other.num_correct, self.num_labels + other.num_labels)


@torch.no_grad()
def score(hidden_NH: Tensor, targets_N: Tensor, head: LogitHead) -> Score:
    """Loss and accuracy without gradients, in chunks."""
    loss = torch.zeros((), dtype=torch.float64, device=hidden_NH.device)
    correct = torch.zeros((), dtype=torch.int64, device=hidden_NH.device)
    for rows in _chunks(targets_N, head):
        targets_C = targets_N[rows]
        logits_CV = head.logits(hidden_NH[rows])
        loss += torch.nn.functional.cross_entropy(logits_CV, targets_C, reduction="sum")
        correct += (logits_CV.argmax(dim=-1) == targets_C).sum()
    return Score(float(loss), int(correct), len(targets_N))


class _WeightedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, targets_N: Tensor, weights_N: Tensor, head: LogitHead
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(hidden_NH.dtype, torch.float32)
        losses_N = torch.empty(len(targets_N), dtype=dtype, device=hidden_NH.device)
        grad_NH = torch.empty_like(hidden_NH)
        for rows in _chunks(targets_N, head):
            at_target_C1 = targets_N[rows, None]
            logits_CV = head.logits(hidden_NH[rows])
            slope_CV = None if head.softcap is None else 1 - (logits_CV / head.softcap).square()
            # One pass each for maximum and softmax gives logsumexp too, at half the time of torch's own:
            # softmax = exp(logit - lse) holds at the largest logit, where it cannot underflow.
            below_top_C1 = logits_CV.amax(dim=-1, keepdim=True) - logits_CV.gather(1, at_target_C1)
            d_logits_CV = torch.softmax(logits_CV, dim=-1)
            losses_N[rows] = (below_top_C1 - d_logits_CV.amax(dim=-1, keepdim=True).log_())[:, 0]
            d_logits_CV.scatter_add_(1, at_target_C1, torch.full_like(below_top_C1, -1.0))
            if slope_CV is not None:
                d_logits_CV.mul_(slope_CV)
            d_logits_CV.mul_(weights_N[rows, None] * head.multiplier)
            torch.mm(d_logits_CV.to(head.weight.dtype), head.weight, out=grad_NH[rows])
        ctx.save_for_backward(grad_NH)
        ctx.mark_non_differentiable(losses_N)
        return weights_N.to(dtype) @ losses_N, losses_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        (grad_NH,) = ctx.saved_tensors
        return (grad_NH * d_total).to(grad_NH.dtype), None, None, None


def _chunks(targets_N: Tensor, head: LogitHead) -> list[slice]:
    most = CHUNK_LOGITS * (1 if targets_N.device.type == "cpu" else GPU_CHUNKS)
    size = max(1, most // head.weight.shape[0])
    return [slice(start, start + size) for start in range(0, len(targets_N), size)]
