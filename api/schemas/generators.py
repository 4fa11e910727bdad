"""Generators as the API shows them."""

from collections.abc import Mapping
from typing import Literal, Self

from api.schemas.wire import Out
from shared.generators import EngineReport, GeneratorReport


class ServedModel(Out):
    """One base model in one generator. `rows` sequences run at once; `running` have a row, `waiting` have none yet.

    `kv_tokens` of `kv_tokens_capacity` tokens of the key-value cache are held or promised. `adapters` are those of the
    caller in memory, as `name@3`; of all others there is only the number, `other_adapters`.
    """

    model: str
    running: int
    waiting: int
    rows: int
    kv_tokens: int
    kv_tokens_capacity: int
    adapters: list[str]
    other_adapters: int
    adapter_bytes: int
    adapter_bytes_capacity: int
    generated_tokens: int

    @classmethod
    def of(cls, engine: EngineReport, *, model: str, names: Mapping[str, str]) -> Self:
        """`names` by version id are the adapters that may be shown."""
        shown = sorted(names[version_id] for version_id in engine.resident if version_id in names)
        return cls(
            model=model,
            running=engine.running,
            waiting=engine.waiting,
            rows=engine.max_rows,
            kv_tokens=engine.kv_tokens_used,
            kv_tokens_capacity=engine.kv_tokens_total,
            adapters=shown,
            other_adapters=len(engine.resident) - len(shown),
            adapter_bytes=engine.resident_bytes,
            adapter_bytes_capacity=engine.adapter_cache_bytes,
            generated_tokens=engine.meter.counts.get("generated_tokens", 0),
        )


class ServingGenerator(Out):
    """One generator process. It takes `seats` requests at once and has `seats_taken`; with no seats it is leaving."""

    id: str
    object: Literal["generator"] = "generator"
    host: str
    started_at: int
    seats: int
    seats_taken: int
    models: list[ServedModel]

    @classmethod
    def of(cls, report: GeneratorReport, models: list[ServedModel]) -> Self:
        return cls(
            id=report.generator_id,
            host=report.host,
            started_at=int(report.started_unix_s),
            seats=report.seats,
            seats_taken=report.seats_taken,
            models=models,
        )
