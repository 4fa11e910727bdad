"""How much memory a training needs, estimated from sizes alone, before anything is loaded."""

# Shapes: T tokens of one stream; features are inputs and outputs of linear layers, F of all those of the blocks
# together, G of those among them that have an adapter.

from dataclasses import dataclass
from typing import Final

import torch
from torch import nn

from shared.specs import LoraSpec
from worker.lora.spec import AdapterSpec
from worker.lora.targets import bare, linear_modules, resolve_targets
from worker.lora.update import weight_OI
from worker.training.loss import CHUNK_LOGITS

# Measured with `python -m benchmarks.memory` on SmolLM2-135M; measure again after a change of the kernels.
RUNTIME_BYTES: Final = 420 << 20
"""What Python, torch and Transformers take on a CPU without a model, and what the allocator keeps besides."""
ACTIVATIONS_PER_FEATURE: Final = 1.12
ADAPTED_PER_FEATURE: Final = 0.35
"""Numbers in the training dtype that a stream keeps for its backward pass: the first for each token and feature of all
linear layers, the second besides for those that have an adapter."""
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


@dataclass(frozen=True)
class AdapterSizes:
    """What memory depends on in an adapter; `num_features` is G."""

    num_parameters: int
    num_features: int

    @classmethod
    def of(cls, model: nn.Module, lora: LoraSpec) -> "AdapterSizes":
        """The sizes of an adapter for this model: r (I + O) parameters in each module. Raises UnknownTarget."""
        layers, paths = linear_modules(model), resolve_targets(model, lora.target_modules)
        ranks = AdapterSpec(r=lora.r, alpha=lora.alpha, target_modules=tuple(paths), rank_pattern=lora.rank_pattern)
        features = {path: sum(weight_OI(bare(layers[path])).shape) for path in paths}
        return cls(sum(ranks.rank(path) * count for path, count in features.items()), sum(features.values()))


def training_bytes(
    model: ModelSizes, adapter: AdapterSizes, *, dtype: torch.dtype, longest: int, batch_size: int, max_tokens: int
) -> int:
    """The most that a trainer with one such job holds: runtime, weights, adapter, optimizer, one stream's activations.

    runtime + P b + 4 * 9 n + T (1.12 F + 0.35 G) b + logits, with P and n parameters of model and adapter and b bytes
    per number of `dtype`. A stream has T tokens: what one optimizer step sees, at most `max_tokens`, but never less
    than the `longest` sample. An estimate: allocators keep more than is used, and kernels differ.
    """
    num_tokens = max(longest, min(max_tokens, batch_size * longest))
    kept = ACTIVATIONS_PER_FEATURE * model.num_features + ADAPTED_PER_FEATURE * adapter.num_features
    return (
        RUNTIME_BYTES
        + model.num_parameters * dtype.itemsize
        + adapter.num_parameters * 4 * ADAPTER_COPIES
        + int(num_tokens * kept * dtype.itemsize)
        + CHUNK_LOGITS * 4 * LOGIT_COPIES
    )
