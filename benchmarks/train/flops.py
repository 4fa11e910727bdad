"""Floating point operations that one LoRA training step needs at least, from a Llama configuration."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama model that its cost follows from."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Shape":
        """From the contents of config.json."""
        heads = config["num_attention_heads"]
        return cls(
            hidden=config["hidden_size"],
            layers=config["num_hidden_layers"],
            intermediate=config["intermediate_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            vocabulary=config["vocab_size"],
        )

    def linear(self, name: str) -> tuple[int, int]:
        """(input, output) width of one linear layer of a block."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, q),
            "k_proj": (self.hidden, kv),
            "v_proj": (self.hidden, kv),
            "o_proj": (q, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }[name]


def training_flops(
    shape: Shape, lengths: Iterable[int], num_labels: int, *, targets: str | Sequence[str], r: int
) -> int:
    """Operations, a multiply-add as two, to train on samples of these lengths (in tokens).

    Counted: each frozen matrix product forward and backward to its input (never to its weight); causal attention within
    a sample, twice as much backward; the head forward and backward at label positions only; A and B forward and
    backward. Not counted: what a program computes again or for padding, norms, activations, softmax, the optimizer.
    The first block's q, k and v need no gradient of their input.
    """
    names = [*_ATTENTION, *_MLP] if targets == "all-linear" else list(targets)
    lengths = list(lengths)
    num_tokens = sum(lengths)
    sizes = {name: shape.linear(name) for name in (*_ATTENTION, *_MLP)}
    block = sum(2 * i * o for i, o in sizes.values())
    no_gradient = sum(2 * i * o for name, (i, o) in sizes.items() if name in ("q_proj", "k_proj", "v_proj"))
    linears = num_tokens * (2 * shape.layers * block - no_gradient)
    adapters = num_tokens * shape.layers * sum(6 * r * sum(sizes[name]) for name in names)
    # Two products over the lower triangle forward, four backward.
    attention = 6 * shape.layers * shape.heads * shape.head_dim * sum(n * (n + 1) for n in lengths)
    head = num_labels * 4 * shape.hidden * shape.vocabulary
    return linears + adapters + attention + head
