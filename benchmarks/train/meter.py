"""What a measured process finds out about itself: when each optimizer step ended, and how many tokens it saw."""

import time
from collections.abc import Collection
from typing import Any

from benchmarks.processes import peak_rss_bytes
from benchmarks.train.plan import Device, Plan


class StepClock:
    """The times at which optimizer steps ended, and the tokens of each micro-batch in the order they were made.

    On a GPU, steps in `waits_at` end once it has done all it was given, the others when their last kernel was started.
    """

    def __init__(self, *, waits_at: Collection[int] = ()) -> None:
        self._waits_at = waits_at
        self.ended_s: list[float] = []
        self.batches: list[tuple[int, int]] = []

    @classmethod
    def of(cls, plan: Plan) -> "StepClock":
        """One that is exact where timing begins and ends."""
        return cls(waits_at=(plan.warmup_steps, plan.num_steps) if plan.device == "cuda" else ())

    def tick(self) -> None:
        if len(self.ended_s) + 1 in self._waits_at:
            import torch

            torch.cuda.synchronize()
        self.ended_s.append(time.perf_counter())

    def saw(self, num_tokens: int, num_labels: int) -> None:
        """One micro-batch with these many real tokens and label tokens, padding excluded."""
        self.batches.append((num_tokens, num_labels))

    def result(self, plan: Plan) -> dict[str, Any]:
        """Real and label tokens per second over the steps after warm-up.

        Micro-batches belong to steps evenly; a loader that fetched ahead made some that no step used, at the end.
        Asserts that the plan's number of optimizer steps was made.
        """
        steps, warmup = len(self.ended_s), plan.warmup_steps
        assert steps > warmup, f"{steps} steps are not more than the {warmup} of warm-up"
        per_step = max(1, len(self.batches) // steps)
        timed = self.batches[warmup * per_step : steps * per_step]
        seconds = self.ended_s[-1] - self.ended_s[warmup - 1]
        num_tokens, num_labels = (sum(column) for column in zip(*timed, strict=True))
        return {
            "steps": steps,
            "seconds": seconds,
            "num_tokens": num_tokens,
            "num_labels": num_labels,
            "tokens_per_second": num_tokens / seconds,
            "labels_per_second": num_labels / seconds,
        }


def peak_bytes(device: Device) -> int:
    """The most memory this process has had: resident on a CPU; of a GPU, in tensors, whatever the allocator holds."""
    if device == "cpu":
        return peak_rss_bytes()
    import torch

    return torch.cuda.max_memory_allocated()
