"""Prometheus figures about generation: what the generators published last, and how much waits for them."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from shared.generators import EngineReport, GeneratorReport, HistogramReport

_ENGINE: Final = ("generator", "base_model")

_GAUGES: Final[dict[str, tuple[str, Callable[[EngineReport], int]]]] = {
    "running": ("Sequences that have a row.", lambda engine: engine.running),
    "waiting": ("Sequences inside the generator that wait for a row.", lambda engine: engine.waiting),
    "rows": ("Sequences that may run at once.", lambda engine: engine.max_rows),
    "kv_tokens": (
        "Tokens of the key-value cache that rows hold or were promised.",
        lambda engine: engine.kv_tokens_used,
    ),
    "kv_tokens_capacity": ("Tokens that the key-value cache can hold.", lambda engine: engine.kv_tokens_total),
    "adapters_resident": ("Adapters in memory.", lambda engine: len(engine.resident)),
    "adapter_bytes": ("Bytes of the adapters in memory.", lambda engine: engine.resident_bytes),
    "adapter_bytes_capacity": ("Bytes that adapters in memory may have.", lambda engine: engine.adapter_cache_bytes),
}
_COUNTERS: Final = {
    "prompt_tokens": "Tokens of prompts that were read.",
    "generated_tokens": "Tokens that were generated.",
    "adapter_loads": "Adapters that were read into memory.",
    "adapter_evictions": "Adapters that left the memory.",
    "decoded_rows": "Rows of all steps that got a token; by the steps' count it is how full they were.",
    "prefilled_tokens": "Tokens of prompts that were computed in steps.",
}
_HISTOGRAMS: Final = {
    "first_token_seconds": "Seconds from a sequence's arrival in the generator to its first token.",
    "next_token_seconds": "Seconds between a sequence's tokens.",
    "adapter_load_seconds": "Seconds to read an adapter into memory.",
    "step_seconds": "Seconds of one forward of the model.",
}


@dataclass(frozen=True)
class Queues:
    """Messages that wait on the broker; `requests` by base model."""

    doorbells: int
    inspections: int
    requests: Mapping[str, int]


def exposition(reports: Sequence[GeneratorReport], queues: Queues | None, base_names: Mapping[str, str]) -> bytes:
    """The figures as text. `base_names` by id. Without a broker there are no queues and no reports.

    Counters are each generator's own since it began, labelled with its id, so they only grow. Figures by adapter are
    those that an engine names itself; adapters are shown by version id, since this is for all tenants' administrator.
    """
    registry = CollectorRegistry()
    registry.register(_Published(reports, queues, base_names))
    return generate_latest(registry)


class _Published(Collector):
    def __init__(
        self, reports: Sequence[GeneratorReport], queues: Queues | None, base_names: Mapping[str, str]
    ) -> None:
        self._reports = reports
        self._queues = queues
        self._base_names = base_names

    def collect(self) -> Iterable[Metric]:
        return itertools.chain(self._broker(), self._generators(), self._engines(), self._histograms())

    def _broker(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("lorad_broker_up", "1 if the broker answers.")
        up.add_metric([], float(self._queues is not None))
        yield up
        if self._queues is None:
            return
        length = GaugeMetricFamily(
            "lorad_queue_length", "Messages that nobody has taken yet.", labels=("queue", "base_model")
        )  # fmt: skip
        length.add_metric(["train", ""], self._queues.doorbells)
        length.add_metric(["inspect", ""], self._queues.inspections)
        for base_model, waiting in self._queues.requests.items():
            length.add_metric(["generate", base_model], waiting)
        yield length

    def _generators(self) -> Iterator[Metric]:
        seats = GaugeMetricFamily("lorad_generator_seats", "Requests that it takes at once.", labels=("generator",))
        taken = GaugeMetricFamily("lorad_generator_seats_taken", "Requests that it has open.", labels=("generator",))
        requests = CounterMetricFamily(
            "lorad_generator_requests", "Requests by how they ended: ok, cancelled, lost, or an error's code.",
            labels=("generator", "outcome"),
        )  # fmt: skip
        for report in self._reports:
            seats.add_metric([report.generator_id], report.seats)
            taken.add_metric([report.generator_id], report.seats_taken)
            for outcome, count in report.outcomes.items():
                requests.add_metric([report.generator_id, outcome], count)
        yield from (seats, taken, requests)

    def _engines(self) -> Iterator[Metric]:
        for name, (meaning, value) in _GAUGES.items():
            gauge = GaugeMetricFamily(f"lorad_generator_{name}", meaning, labels=_ENGINE)
            for labels, engine in self._labelled():
                gauge.add_metric(labels, value(engine))
            yield gauge
        for name, meaning in _COUNTERS.items():
            counter = CounterMetricFamily(f"lorad_generator_{name}", meaning, labels=_ENGINE)
            for labels, engine in self._labelled():
                counter.add_metric(labels, engine.meter.counts.get(name, 0))
            yield counter
        ended = CounterMetricFamily(
            "lorad_generator_sequences", "Sequences by why they ended.", labels=(*_ENGINE, "reason")
        )
        tokens = CounterMetricFamily(
            "lorad_generator_adapter_tokens", "Tokens generated with an adapter since it is one of the busiest.",
            labels=(*_ENGINE, "adapter"),
        )  # fmt: skip
        for labels, engine in self._labelled():
            for reason, count in engine.meter.ended.items():
                ended.add_metric([*labels, reason], count)
            for adapter, count in engine.meter.adapter_tokens.items():
                tokens.add_metric([*labels, adapter], count)
        yield from (ended, tokens)

    def _histograms(self) -> Iterator[Metric]:
        for name, meaning in _HISTOGRAMS.items():
            family = HistogramMetricFamily(f"lorad_generator_{name}", meaning, labels=_ENGINE)
            for labels, engine in self._labelled():
                if (seen := engine.meter.histograms.get(name)) is not None:
                    family.add_metric(labels, buckets=_cumulated(seen), sum_value=seen.sum)
            yield family

    def _labelled(self) -> Iterator[tuple[list[str], EngineReport]]:
        for report in self._reports:
            for engine in report.engines:
                name = self._base_names.get(engine.base_model_id, engine.base_model_id)
                yield [report.generator_id, name], engine


def _cumulated(seen: HistogramReport) -> list[tuple[str, float]]:
    bounds = [*(repr(bound) for bound in seen.bounds), "+Inf"]
    return list(zip(bounds, map(float, itertools.accumulate(seen.counts)), strict=True))
