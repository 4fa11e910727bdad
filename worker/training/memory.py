"""How much memory a training needs, estimated from sizes alone, before anything is loaded."""

# Shapes: T tokens of one stream, F features: inputs and outputs of all linear layers of the blocks together.

from dataclasses import dataclass
from typing import Final

import torch
from torch import nn

from shared.specs import TrainSpec
from worker.lora.spec import AdapterSpec
from worker.lora.targets import bare, linear_modules, resolve_targets
from worker.lora.update import weight_OI
from worker.training.loss import CHUNK_LOGITS

RUNTIME_BYTES: Final = 360 << 20
"""What Python, torch and Transformers take on a CPU before there is a model. Measured: 348 MiB."""
ACTIVATIONS_PER_FEATURE: Final = 1.2
"""Numbers in the training dtype that a stream keeps for its backward pass, in units of T * F. Recalibrate it with
`benchmarks/memory.py` after every change of the kernels."""
ADAPTER_COPIES: Final = 9
"""fp32 numbers per trained parameter: itself, its gradient twice while one is added to another, two moments, the three
of the point to roll back to, and the best adapter so far."""
LOGIT_COPIES: Final = 3
"""Chunks of fp32 logits alive at once: themselves, their copy in the head's dtype, and room for the softmax."""


@dataclass(frozen=True)
class ModelSizes:
    """What memory depends on in a base model; `num_features` is F."""

    num_parameters: int
    num_features: int

    @classmethod
    def of(cls, model: nn.Module) -> "ModelSizes":
        """The sizes of a model, which may be on the meta device."""
        shapes = [weight_OI(bare(layer)).shape for layer in linear_modules(model).values()]
        return cls(sum(p.numel() for p in model.parameters()), sum(o + i for o, i in shapes))


def trainable_parameters(model: nn.Module, spec: TrainSpec) -> int:
    """How many numbers the adapter of this spec has: r (I + O) for each of its modules. Raises UnknownTarget."""
    lora, layers = spec.lora, linear_modules(model)
    paths = resolve_targets(model, lora.target_modules)
    ranks = AdapterSpec(r=lora.r, alpha=lora.alpha, target_modules=tuple(paths), rank_pattern=lora.rank_pattern)
    return sum(ranks.rank(path) * sum(weight_OI(bare(layers[path])).shape) for path in paths)


def training_bytes(
    sizes: ModelSizes, *, trainable: int, dtype: torch.dtype, longest: int, batch_size: int, max_tokens: int
) -> int:
    """The most that a trainer with one such job holds: runtime, weights, adapter, optimizer, one stream's activations.

    base P b + adapter 4 * 9 n + activations 1.2 T F b + logits, with b bytes per number of `dtype`. A stream has T
    tokens: what one optimizer step sees, at most `max_tokens`, but never less than the `longest` sample.
    An estimate: allocators keep more than is used, and kernels differ; see ACTIVATIONS_PER_FEATURE.
    """
    num_tokens = max(longest, min(max_tokens, batch_size * longest))
    weights = sizes.num_parameters * dtype.itemsize
    adapter = trainable * 4 * ADAPTER_COPIES
    activations = int(ACTIVATIONS_PER_FEATURE * num_tokens * sizes.num_features * dtype.itemsize)
    return RUNTIME_BYTES + weights + adapter + activations + CHUNK_LOGITS * 4 * LOGIT_COPIES
