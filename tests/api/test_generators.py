"""What operators see of generators: /v1/generators and /metrics, from reports on a real broker."""

import json
import time
from typing import Any

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from shared import ids, keys
from shared.db import write
from shared.generators import EngineReport, GeneratorReport, Generators, HistogramReport, MeterReport
from tests.api.conftest import Api


def report(base: str, *resident: str, tokens: int = 5, generator_id: str | None = None) -> GeneratorReport:
    meter = MeterReport(
        counts={"generated_tokens": tokens, "prompt_tokens": 9, "adapter_loads": 2, "unheard_of": 1},
        ended={"finished": 3},
        histograms={"first_token_seconds": HistogramReport(bounds=[0.1, 1.0], counts=[2, 1, 1], sum=3.5)},
        adapter_tokens={"other": 4} | ({resident[0]: 1} if resident else {}),
    )
    engine = EngineReport(
        base_model_id=base, running=2, waiting=1, max_rows=8, kv_tokens_used=30, kv_tokens_total=100,
        resident=list(resident), resident_bytes=50, adapter_cache_bytes=500, meter=meter,
    )  # fmt: skip
    return GeneratorReport(
        generator_id=generator_id or ids.new_id(ids.GENERATOR), host="here", pid=1, started_unix_s=1000.0, seats=16,
        seats_taken=3, outcomes={"ok": 3, "cancelled": 1}, engines=[engine],
    )  # fmt: skip


@pytest.fixture
def generators(api: Api) -> Generators:
    """The generators of this API's broker, of which there are none yet."""
    api.generator.broker.client.flushall()
    api.services.queue.generators._read_at_s = -1e9
    return Generators(api.services.queue._client)


def samples(api: Api) -> dict[tuple[str, str], float]:
    """All figures of /metrics by name and labels but the generator's; it must parse."""
    text = api.http.get("/metrics").raise_for_status().text
    found = {}
    for family in text_string_to_metric_families(text):
        for one in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sorted(one.labels.items()) if key != "generator")
            found[one.name, labels] = one.value
    return found


def test_generators_show_whose_adapters_they_hold(api: Api, generators: Generators) -> None:
    """One's own adapters by name and version, those of others and deleted ones as a number."""
    mine = api.publish("math")
    published = report(api.base.id, mine.id, ids.new_id(ids.ADAPTER_VERSION))
    generators.publish(published)
    (seen,) = api.http.get("/v1/generators").raise_for_status().json()["data"]

    assert (seen["id"], seen["host"], seen["seats"], seen["seats_taken"]) == (published.generator_id, "here", 16, 3)
    (model,) = seen["models"]
    assert (model["model"], model["adapters"], model["other_adapters"]) == ("tiny", ["math@1"], 1)
    assert (model["running"], model["rows"], model["kv_tokens"], model["generated_tokens"]) == (2, 8, 30, 5)


def test_another_tenants_adapter_is_a_number(api: Api, generators: Generators) -> None:
    """An administrator's key of one tenant is shown no name of another's adapter."""
    with write(api.engine) as tx:
        _, key = keys.create(tx, tenant="other", scopes=["admin"])
        _, own = keys.create(tx)
    headers = {"Authorization": f"Bearer {key}"}
    api.http.headers["Authorization"] = f"Bearer {own}"
    mine = api.publish("math")
    generators.publish(report(api.base.id, mine.id))
    (seen,) = httpx2.get(f"{api.url}/v1/generators", headers=headers).raise_for_status().json()["data"]

    assert (seen["models"][0]["adapters"], seen["models"][0]["other_adapters"]) == ([], 1)
    assert "math" not in json.dumps(seen)


def test_generators_need_an_administrator(api: Api) -> None:
    """A key that may only generate does not see the machines."""
    with write(api.engine) as tx:
        _, key = keys.create(tx, tenant="default", scopes=["generate"])

    answer = httpx2.get(f"{api.url}/v1/generators", headers={"Authorization": f"Bearer {key}"})
    assert answer.status_code == 403


def test_metrics_tell_what_generators_published(api: Api, generators: Generators) -> None:
    """Rows, cache, tokens, ends, loads and histograms by base model; figures that nobody knows are left out."""
    mine = api.publish("math")
    generators.publish(report(api.base.id, mine.id))
    seen = samples(api)

    assert seen["lorad_generator_running", "base_model=tiny"] == 2
    assert seen["lorad_generator_kv_tokens_capacity", "base_model=tiny"] == 100
    assert seen["lorad_generator_adapters_resident", "base_model=tiny"] == 1
    assert seen["lorad_generator_generated_tokens_total", "base_model=tiny"] == 5
    assert seen["lorad_generator_sequences_total", "base_model=tiny,reason=finished"] == 3
    assert seen["lorad_generator_requests_total", "outcome=ok"] == 3
    assert seen["lorad_generator_adapter_tokens_total", f"adapter={mine.id},base_model=tiny"] == 1
    assert seen["lorad_generator_first_token_seconds_bucket", "base_model=tiny,le=1.0"] == 3
    assert seen["lorad_generator_first_token_seconds_count", "base_model=tiny"] == 4
    assert seen["lorad_generator_first_token_seconds_sum", "base_model=tiny"] == 3.5
    assert seen["lorad_broker_up", ""] == 1
    assert not [name for name, _ in seen if "unheard" in name]


def test_metrics_tell_how_much_waits(api: Api, generators: Generators) -> None:
    """Each queue has a length, requests by base model."""
    api.generator.broker.client.rpush("lorad:inspect", "x")
    seen = samples(api)

    assert seen["lorad_queue_length", "base_model=,queue=inspect"] == 1
    assert seen["lorad_queue_length", "base_model=tiny,queue=generate"] == 0


def test_a_counter_is_one_generators(api: Api, generators: Generators) -> None:
    """Two generators have a series each, so that each only grows; a dead one's series ends."""
    first, second = report(api.base.id, tokens=100), report(api.base.id, tokens=1)
    generators.publish(first)
    generators.publish(second)
    both = api.http.get("/metrics").text
    generators.withdraw(first.generator_id)
    time.sleep(0.6)  # what the API has read is good for half a second
    left = api.http.get("/metrics").text

    for one, tokens in ((first, 100), (second, 1)):
        line = f'lorad_generator_generated_tokens_total{{base_model="tiny",generator="{one.generator_id}"}} {tokens}.0'
        assert line in both
    assert first.generator_id not in left
    assert second.generator_id in left


@pytest.mark.parametrize(
    "forged",
    [
        {"seats": -1},
        {"host": "x" * 300},
        {"extra": 1},
        {"outcomes": {'evil"} 1\nlorad_fake': 1}},
        {"engines": [{"base_model_id": "../x"}]},
        {"started_unix_s": float("inf")},
        {"generator_id": ids.new_id(ids.GENERATOR)},
    ],
)
def test_forged_reports_are_left_out(api: Api, generators: Generators, forged: dict[str, Any]) -> None:
    """Anybody on the broker can write there: what is not a report, or another's, reaches neither page."""
    good, bad = report(api.base.id), report(api.base.id)
    generators.publish(good)
    generators.publish(bad)
    text = json.dumps(bad.model_dump(mode="json") | forged)
    api.generator.broker.client.set(f"lorad:generator:{bad.generator_id}", text)

    listed = api.http.get("/v1/generators").json()["data"]
    assert [one["id"] for one in listed] == [good.generator_id]
    assert bad.generator_id not in api.http.get("/metrics").text
