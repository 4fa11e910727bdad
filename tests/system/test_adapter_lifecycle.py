"""Adapters that are deleted and made again while clients use them, on running services with SmolLM2-135M."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx2
import pytest
import torch
from sqlalchemy import Engine

from shared import db
from shared.config import Settings
from shared.specs import TrainSpec
from shared.store import adapters, base_models
from shared.store.durable import staging
from shared.store.layout import Layout
from tests.system.services import BASE, Service, wait_for
from worker.lora import LoadedAdapter, write_adapter
from worker.lora.format import read_adapter
from worker.lora.spec import AdapterSpec

pytestmark = [pytest.mark.system, pytest.mark.timeout(400)]

NUM_CLIENTS = 50
WIDTHS = {"q_proj": (576, 576), "v_proj": (576, 192)}
"""In and out features of what the adapters change; SmolLM2-135M has 30 layers."""


@dataclass
class Store:
    """Publishes adapters as a trainer does, without training any."""

    service: Service
    layout: Layout
    database: Engine

    def create(self, name: str, *, seed: int) -> None:
        """The next version of `name`, with an effect of its own for each seed. When this returns, it is there."""
        with db.read(self.database) as tx:
            [base] = base_models.list_all(tx)
        with staging(self.layout) as staged:
            write_adapter(staged, random_adapter(seed), base_model_name=BASE)
            prepared = adapters.prepare(
                self.layout, staged, validate=lambda path: read_adapter(path) and None, base_model_id=base.id,
                base_digest=base.digest, spec=TrainSpec(), job_id=None, name=name, training_sha256=None,
            )  # fmt: skip
        with db.write(self.database) as tx:
            adapters.insert_version(tx, "default", name, prepared, None)

    def delete(self, name: str) -> None:
        assert httpx2.delete(f"{self.service.url}/adapters/{name}", timeout=30).status_code == 200


def random_adapter(seed: int) -> LoadedAdapter:
    draws = torch.Generator().manual_seed(seed)
    return LoadedAdapter(
        spec=AdapterSpec(r=4, alpha=4.0, target_modules=tuple(WIDTHS)),
        tensors={
            f"model.layers.{layer}.self_attn.{name}": (
                torch.randn(4, in_features, generator=draws) * 0.1,
                torch.randn(out_features, 4, generator=draws) * 0.1,
            )
            for layer in range(30)
            for name, (in_features, out_features) in WIDTHS.items()
        },
    )


@pytest.fixture
def store(service: Service) -> Iterator[Store]:
    settings = Settings.from_env({k: v for k, v in service_env(service).items() if k.startswith("LORAD_")})
    database = db.open_engine(settings.database_url)
    yield Store(service, Layout(settings.data_dir), database)
    database.dispose()


def service_env(service: Any) -> dict[str, str]:
    return dict(service.env)


@dataclass(frozen=True)
class Asked:
    """One request: when it began, its status, and what the answer says made it, or the code of its error."""

    began_s: float
    status: int
    model: str = ""
    fingerprint: str = ""
    text: str = ""
    code: str = ""


def ask(url: str, model: str, *, http: httpx2.Client | None = None) -> Asked:
    began_s = time.monotonic()
    body = {"model": model, "prompt": "The sea", "max_tokens": 4, "temperature": 0}
    answer = (http or httpx2).post(f"{url}/completions", json=body, timeout=120)
    said = answer.json()
    if answer.status_code != 200:
        return Asked(began_s, answer.status_code, code=said["error"]["code"])
    return Asked(began_s, 200, said["model"], said["system_fingerprint"], said["choices"][0]["text"])


class Crowd:
    """Clients that each ask for a model over and over, until the end of the block."""

    def __init__(self, url: str, model: str, num_clients: int) -> None:
        self.asked: list[Asked] = []
        self._url, self._model = url, model
        self._stopping = threading.Event()
        self._pool = ThreadPoolExecutor(num_clients)
        self._clients = [self._pool.submit(self._ask_on) for _ in range(num_clients)]

    def _ask_on(self) -> None:
        with httpx2.Client() as http:
            while not self._stopping.is_set():
                self.asked.append(ask(self._url, self._model, http=http))

    def wait_for(self, count: int, *, since_s: float = 0.0) -> None:
        """Until so many requests that began after `since_s` are answered."""
        wait_for(f"{count} answers", lambda: sum(one.began_s > since_s for one in self.asked) >= count, timeout_s=120)

    def __enter__(self) -> "Crowd":
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._pool.shutdown()
        for client in self._clients:
            client.result()


def test_fifty_clients_see_an_adapter_or_that_it_is_gone(service: Service, store: Store) -> None:
    """While fifty clients generate with an adapter it is deleted: every request gets its answer or 404, nothing else,
    and every request that begins after the deletion was answered gets 404."""
    store.create("leaving", seed=1)
    expected = ask(service.url, "leaving")

    with Crowd(service.url, "leaving", NUM_CLIENTS) as crowd:
        crowd.wait_for(2 * NUM_CLIENTS)
        store.delete("leaving")
        deleted_s = time.monotonic()
        crowd.wait_for(NUM_CLIENTS, since_s=deleted_s)

    assert {one.status for one in crowd.asked} == {200, 404}
    assert {one.code for one in crowd.asked if one.status == 404} <= {"model_not_found", "not_found"}
    assert {one.status for one in crowd.asked if one.began_s > deleted_s} == {404}
    assert {(one.model, one.fingerprint) for one in crowd.asked if one.status == 200} == {
        ("leaving@1", expected.fingerprint)
    }


def test_a_recreated_name_answers_with_its_new_weights(service: Service, store: Store) -> None:
    """Deleted and made again three times under load: what begins once the name was made again is never answered by
    old weights, and the weights of every version have been heard."""
    store.create("phoenix", seed=1)
    made_s = [time.monotonic()]
    alone = [ask(service.url, "phoenix")]

    with Crowd(service.url, "phoenix", 8) as crowd:
        for seed in (2, 3, 4):
            crowd.wait_for(16, since_s=made_s[-1])
            store.delete("phoenix")
            store.create("phoenix", seed=seed)
            made_s.append(time.monotonic())
            alone.append(ask(service.url, "phoenix"))
        crowd.wait_for(16, since_s=made_s[-1])

    assert [one.model for one in alone] == [f"phoenix@{version}" for version in (1, 2, 3, 4)]
    assert len({one.fingerprint for one in alone}) == 4
    assert len({one.text for one in alone}) == 4
    assert {one.status for one in crowd.asked} <= {200, 404}
    oldest_allowed = [sum(made <= one.began_s for made in made_s) for one in crowd.asked]
    answered = [(one, oldest) for one, oldest in zip(crowd.asked, oldest_allowed, strict=True) if one.status == 200]
    versions = [int(one.model.removeprefix("phoenix@")) for one, _ in answered]
    assert all(version >= oldest for version, (_, oldest) in zip(versions, answered, strict=True))
    assert all(one.fingerprint == alone[v - 1].fingerprint for v, (one, _) in zip(versions, answered, strict=True))
    assert set(versions) == {1, 2, 3, 4}
