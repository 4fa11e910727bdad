"""What a measured process finds out about itself: when each optimizer step ended, and how many tokens it saw."""

import time
from typing import Any

from benchmarks.train.plan import Plan


class StepClock:
    """The times at which optimizer steps ended, and the tokens of each micro-batch in the order they were made."""

    def __init__(self) -> None:
        self.ended_s: list[float] = []
        self.batches: list[tuple[int, int]] = []

    def tick(self) -> None:
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
