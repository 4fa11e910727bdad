"""CUDA graphs of one job's forward and backward passes: on small streams, starting thousands of kernels one by one
takes the processor longer than the GPU takes to run them.

Shapes: T tokens of a stream and S segments in it, both rounded up so that one graph serves many streams; H hidden
width; N places of a stream whose hidden states are used.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final

import torch
from torch import Tensor, nn

from worker.base_model import BaseModel
from worker.kernels import varlen
from worker.kernels.recording import GraphRoom

MOST_WORK: Final = 4e12
"""Parameters of the base times tokens of a stream; with more, the GPU is the slower one and a graph gains little. On an
H100, 3,100 tokens of a model of 1.2 billion parameters take 67 ms by graph and 79 without; 1,700 take 37 and 82."""
PAYS_FROM: Final = 2
"""Which stream of the same rounded size is captured, for each adapter; those before run kernel by kernel. Capturing
takes about as long as two of these, and each replay after it less than a quarter of one."""
MOST_GRAPHS: Final = 64
LEAST_LONGEST: Final = 512

Forward = Callable[[Tensor, Tensor, Tensor, int, str], Tensor]
"""(tokens (T,), positions (T,), starts (S + 1,) int32, most tokens of a segment, adapter) -> hidden states (T, H)."""


@dataclass(frozen=True)
class Size:
    """What a graph is made for: streams of so many tokens and segments, the longest of at most so many tokens."""

    num_tokens: int
    num_segments: int
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int]) -> "Size":
        """The least size that holds these segments and another one of what is left over.

        Tokens go in steps of an eighth to a quarter, but at least 64; segments and lengths in powers of two.
        """
        num_tokens = sum(lengths)
        step = max(64, 1 << max(num_tokens.bit_length() - 3, 0))
        rounded = -(-num_tokens // step) * step
        longest = max(LEAST_LONGEST, *lengths, rounded - num_tokens)
        return cls(rounded, max(8, _power_of_two(len(lengths) + 1)), _power_of_two(longest))


class Captured:
    """A forward and a backward pass for any stream of one size through one adapter, at the weights that it has then."""

    def __init__(
        self, run: Forward, adapter: str, parameters: Sequence[nn.Parameter], size: Size, room: GraphRoom
    ) -> None:
        """Raises whatever `run` raises where it cannot be captured, as where a layer waits for a value."""
        device = parameters[0].device
        self._size = size
        self._owner = weakref.ref(parameters[0])
        self._given = torch.zeros(2 * size.num_tokens + size.num_segments + 1, dtype=torch.int64, device=device)
        self._given[2 * size.num_tokens + 1 :] = size.num_tokens  # one segment until a stream is given

        def forward() -> Tensor:
            sizes = [size.num_tokens, size.num_tokens, size.num_segments + 1]
            tokens_T, positions_T, starts_S1 = torch.split(self._given, sizes)
            return run(tokens_T, positions_T, starts_S1.to(torch.int32), size.longest, adapter)

        # Once uncaptured: libraries set themselves up at a first call, which a graph cannot hold.
        hidden_TH = forward()
        self._slope_TH = torch.zeros_like(hidden_TH)
        torch.autograd.grad(hidden_TH, parameters, self._slope_TH)
        del hidden_TH
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with room.capturing(self._forward):
            hidden_TH = forward()
        with room.capturing(self._backward):
            self._gradients = torch.autograd.grad(hidden_TH, parameters, self._slope_TH)
        self._hidden_TH = hidden_TH.detach()

    def is_of(self, parameter: nn.Parameter) -> bool:
        """Whether it was captured with this parameter and not with one of an earlier adapter of the same name."""
        return self._owner() is parameter

    @property
    def is_stale(self) -> bool:
        """Whether its adapter is gone."""
        return self._owner() is None

    def forward(self, tokens_T: Tensor, positions_T: Tensor, lengths: Sequence[int]) -> Tensor:
        """Hidden states of a stream that is given on the CPU, and of what fills it up; valid until the next forward of
        any graph."""
        size = self._size
        filler = torch.zeros(size.num_tokens - len(tokens_T), dtype=torch.int64)
        starts = [0, *accumulate(lengths)]
        starts += [size.num_tokens] * (size.num_segments + 1 - len(starts))
        given = torch.cat([tokens_T, filler, positions_T, filler, torch.tensor(starts)])
        self._given.copy_(given.pin_memory(), non_blocking=True)
        self._forward.replay()
        return self._hidden_TH

    def backward(self, places_N: Tensor, slope_NH: Tensor) -> tuple[Tensor, ...]:
        """The gradients of sum(slope * the last forward's hidden states at these places), in the parameters' order."""
        self._slope_TH.zero_().index_copy_(0, places_N, slope_NH)
        self._backward.replay()
        return tuple(torch._foreach_mul(self._gradients, 1.0))  # copies: the next replay writes over these


class Graphs:
    """The graphs of one base model and its adapters, made as they come to pay. For the thread that owns the model."""

    def __init__(self, base: BaseModel, run: Forward) -> None:
        self._run = run
        self._num_parameters = sum(p.numel() for p in base.model.parameters())
        self._device = base.device
        self._room = GraphRoom(base.device)
        self._made: dict[tuple[str, Size], Captured] = {}
        self._seen: Counter[tuple[str, Size]] = Counter()

    @staticmethod
    def can_serve(base: BaseModel) -> bool:
        """Whether forwards of this model can be captured at all: attention over all segments must be one kernel, and
        nothing may depend on the largest position."""
        config: Any = base.model.config
        rope = getattr(config, "rope_parameters", None) or {}
        return (
            base.dtype in varlen.DTYPES
            and varlen.is_available(base.device)
            and rope.get("rope_type") not in ("longrope", "dynamic")
        )

    def find(self, adapter: str, parameters: Sequence[nn.Parameter], lengths: Sequence[int]) -> Captured | None:
        """The graph for a stream of segments of these lengths, captured now if it comes to pay with this one; None
        where it does not, or not yet."""
        size = Size.of(lengths)
        if size.num_tokens * self._num_parameters > MOST_WORK:
            return None
        key = (adapter, size)
        made = self._made.pop(key, None)
        if made is None or not made.is_of(parameters[0]):
            self._seen[key] = 1 if made else self._seen[key] + 1
            if self._seen[key] < PAYS_FROM:
                return None
            self._make_room()
            made = Captured(self._run, adapter, parameters, size, self._room)
        self._made[key] = made  # put last: the first is the next to be dropped
        return made

    def clear(self) -> None:
        """Let go of all graphs and of their memory."""
        self._made.clear()
        self._seen.clear()

    def _make_room(self) -> None:
        for key in [key for key, captured in self._made.items() if captured.is_stale]:
            del self._made[key], self._seen[key]
        while len(self._made) >= MOST_GRAPHS:
            del self._made[next(iter(self._made))]
        if not self._made:  # the pool went with the last of them
            self._room = GraphRoom(self._device)


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()
