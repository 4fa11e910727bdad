"""Cross-entropy at label positions only, in chunks: never more than a few MiB of logits, whatever the vocabulary."""

# Shapes: N label positions, C positions of one chunk, H hidden width, V vocabulary.

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_LOGITS: Final = 1 << 22
"""How many fp32 logits (16 MiB) are alive at once; gradient and softmax share their storage."""


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


def loss_sum(hidden_NH: Tensor, targets_N: Tensor, head: LogitHead) -> Tensor:
    """Sum over positions of -log softmax(logits)[target], in nats: a differentiable scalar, 0 for no position.

    The gradient for `hidden_NH` is formed in the forward pass, while a chunk's logits are at hand:
        dL/dlogits = softmax(logits) - onehot(target),   dL/dh = dL/dlogits * cap' * multiplier @ W
    so backward only multiplies. W and b are frozen and get none. hidden (N, H) any float dtype, targets (N,) int64.
    Source: the chunking of Liger-Kernel's fused linear cross-entropy, Hsu et al. 2024, arXiv:2410.10989, section 3.2.
    """
    result: Tensor = _LossSum.apply(hidden_NH, targets_N, head)  # type: ignore[no-untyped-call]  # torch types none of these
    return result


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
    for hidden_CH, targets_C in _chunks(hidden_NH, targets_N, head):
        logits_CV = head.logits(hidden_CH)
        loss += torch.nn.functional.cross_entropy(logits_CV, targets_C, reduction="sum")
        correct += (logits_CV.argmax(dim=-1) == targets_C).sum()
    return Score(float(loss), int(correct), len(targets_N))


class _LossSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, targets_N: Tensor, head: LogitHead) -> Tensor:
        total = torch.zeros((), dtype=torch.promote_types(hidden_NH.dtype, torch.float32), device=hidden_NH.device)
        grads = []
        for hidden_CH, targets_C in _chunks(hidden_NH, targets_N, head):
            logits_CV = head.logits(hidden_CH)
            at_target_C1 = targets_C[:, None]
            slope_CV = None if head.softcap is None else 1 - (logits_CV / head.softcap).square()
            lse_C1 = logits_CV.logsumexp(dim=-1, keepdim=True)
            total += (lse_C1 - logits_CV.gather(1, at_target_C1)).sum()
            d_logits_CV = logits_CV.sub_(lse_C1).exp_()
            d_logits_CV.scatter_add_(1, at_target_C1, torch.full_like(lse_C1, -1.0))
            if slope_CV is not None:
                d_logits_CV.mul_(slope_CV)
            grads.append(d_logits_CV.mul_(head.multiplier).to(head.weight.dtype) @ head.weight)
        ctx.save_for_backward(torch.cat(grads) if grads else torch.zeros_like(hidden_NH))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor, None, None]:
        (grad_NH,) = ctx.saved_tensors
        return (grad_NH * d_total).to(grad_NH.dtype), None, None


def _chunks(hidden_NH: Tensor, targets_N: Tensor, head: LogitHead) -> list[tuple[Tensor, Tensor]]:
    size = max(1, CHUNK_LOGITS // head.weight.shape[0])
    starts = range(0, len(targets_N), size)
    return [(hidden_NH[start : start + size], targets_N[start : start + size]) for start in starts]
