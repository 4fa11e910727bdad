"""What an engine counts: tokens, times between them, ends, loads, and figures by adapter that stay bounded."""

import gc
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from shared.generators import MeterReport
from shared.specs import AdapterShare
from worker.inference.meter import NAMED_ADAPTERS, OTHER, REASONS, Histogram, Meter


@dataclass(eq=False)
class Prompt:
    ids: list[int]


@dataclass(eq=False)
class Choice:
    adapters: tuple[AdapterShare, ...] = ()
    prompt: Prompt = field(default_factory=lambda: Prompt([0] * 7))


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def version(number: int) -> str:
    return f"adv-{number:032x}"


def with_adapter(number: int) -> Choice:
    return Choice((AdapterShare(version_id=version(number)),))


def total(histogram: dict[str, Any]) -> tuple[int, float]:
    """Number and sum of what a histogram has seen."""
    return sum(histogram["counts"]), histogram["sum"]


def test_times_of_a_choice() -> None:
    """The first token counts from the arrival, waiting included; each other from the one before."""
    clock = Clock()
    meter, choice = Meter(clock), Choice()
    for now, event in [
        (1.0, meter.arrived),
        (3.0, meter.admitted),
        (4.0, lambda one: meter.emitted(one, is_first=True)),
        (4.25, lambda one: meter.emitted(one, is_first=False)),
        (4.75, lambda one: meter.emitted(one, is_first=False)),
    ]:
        clock.now = now
        event(choice)
    seen = meter.snapshot()

    assert total(seen["histograms"]["first_token_seconds"]) == (1, 3.0)
    assert total(seen["histograms"]["next_token_seconds"]) == (2, 0.75)
    assert (seen["counts"]["prompt_tokens"], seen["counts"]["generated_tokens"]) == (7, 3)


@pytest.mark.parametrize(("value", "bucket"), [(0.5, 0), (1.0, 0), (1.5, 1), (2.0, 1), (9.0, 2)])
def test_a_bound_is_in_its_bucket(value: float, bucket: int) -> None:
    """Bounds are inclusive, as Prometheus's `le` is; what is above all has a bucket of its own."""
    histogram = Histogram((1.0, 2.0))
    histogram.add(value)

    assert histogram.snapshot()["counts"] == [int(number == bucket) for number in range(3)]


def test_ends_by_reason() -> None:
    """Each end counts under its reason; so many different ones that they could be anything become one."""
    meter = Meter()
    for reason in ["stop", "stop", "length", *(f"r{number}" for number in range(2 * REASONS))]:
        meter.ended(Choice(), reason)
    ended = meter.snapshot()["ended"]

    assert (ended["stop"], ended["length"]) == (2, 1)
    assert len(ended) == REASONS + 1
    assert sum(ended.values()) == 3 + 2 * REASONS


def test_loads_evictions_and_steps() -> None:
    """Loads have a number, bytes and seconds; steps the rows and prompt tokens they computed."""
    meter = Meter()
    meter.adapter_loaded(version(1), 0.02, 100)
    meter.adapter_loaded(version(2), 0.5, 200)
    meter.adapter_evicted(version(1))
    meter.step(0.01, num_decode_rows=3, num_prefill_tokens=40)
    seen = meter.snapshot()

    assert {name: seen["counts"][name] for name in ("adapter_loads", "adapter_bytes", "adapter_evictions")} == {
        "adapter_loads": 2,
        "adapter_bytes": 300,
        "adapter_evictions": 1,
    }
    assert total(seen["histograms"]["adapter_load_seconds"]) == (2, pytest.approx(0.52))
    assert (seen["counts"]["decoded_rows"], seen["counts"]["prefilled_tokens"]) == (3, 40)


def test_the_busiest_adapters_have_their_own_figures() -> None:
    """With a thousand adapters those with most tokens are named, and few figures are told."""
    meter = Meter()
    for number in range(1000):
        meter.emitted(with_adapter(number), is_first=True)
    busy = [with_adapter(2000 + number) for number in range(3)]
    for one in busy:
        for _ in range(500):
            meter.emitted(one, is_first=False)
    tokens = meter.snapshot()["adapter_tokens"]

    assert {version(2000), version(2001), version(2002)} <= tokens.keys()
    assert len(tokens) == NAMED_ADAPTERS + 1
    assert sum(tokens.values()) <= 1000 + 1500


def test_figures_by_adapter_only_grow() -> None:
    """While adapters overtake each other, no figure that is told ever falls, also not that of the others."""
    meter = Meter()
    last: dict[str, int] = {}
    for turn in range(60):
        for _ in range(64):
            meter.emitted(with_adapter(turn), is_first=False)
            meter.emitted(with_adapter(turn % 7), is_first=False)
        tokens = meter.snapshot()["adapter_tokens"]
        assert all(tokens[name] >= last.get(name, 0) for name in tokens)
        last |= tokens

    assert last[OTHER] > 0


def test_a_mix_counts_for_each_of_its_adapters() -> None:
    """A token made with two adapters is one token, and one of each adapter."""
    meter = Meter()
    meter.emitted(Choice(with_adapter(1).adapters + with_adapter(2).adapters), is_first=True)
    seen = meter.snapshot()

    assert seen["counts"]["generated_tokens"] == 1
    assert seen["adapter_tokens"] == {version(1): 1, version(2): 1, OTHER: 0}


def test_choices_that_never_end_are_not_kept() -> None:
    """The meter holds no choice: one that its engine forgot to end is collected."""
    meter = Meter()
    for _ in range(100):
        meter.arrived(Choice())
    gc.collect()

    assert len(meter._times) == 0


def test_many_threads_lose_no_token() -> None:
    """Counting is exact whoever counts at the same time."""
    meter = Meter()
    barrier = threading.Barrier(4)

    def emit() -> None:
        barrier.wait()
        for _ in range(2000):
            meter.emitted(with_adapter(1), is_first=True)

    threads = [threading.Thread(target=emit) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert meter.snapshot()["counts"]["generated_tokens"] == 8000


def test_the_snapshot_is_what_others_read() -> None:
    """It goes through JSON into the report that a generator publishes, which refuses anything else."""
    meter = Meter()
    choice = with_adapter(3)
    steps: list[Callable[[], None]] = [
        lambda: meter.arrived(choice),
        lambda: meter.emitted(choice, is_first=True),
        lambda: meter.ended(choice, "stop"),
    ]
    for step in steps:
        step()
    read = MeterReport.model_validate_json(json.dumps(meter.snapshot()))

    assert read.counts["generated_tokens"] == 1
    assert read.adapter_tokens[version(3)] == 1
