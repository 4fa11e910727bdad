"""A running API for each test: real HTTP, SQLite and Valkey, and a generator of a few lines in place of a model."""

import base64
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest
from flask import Flask
from openai import OpenAI
from sqlalchemy import Engine
from werkzeug.serving import make_server

from api.app import create_app
from api.call import Services
from shared import jobs, keys
from shared.config import Settings
from shared.db import read, write
from shared.queue import PREFIX, ChunkWriter, Queue, generate_queue
from shared.specs import Chunk, GeneratedToken, GenerationRequest, StepReport, TokenLogprob, TrainSpec, Usage
from shared.store import adapters, base_models, durable
from shared.store.layout import Layout
from shared.tables import AdapterVersion, BaseModelRow, Job
from tests.servers import Broker

CONTEXT = 128
CONFIG = {
    "architecture": "opt",
    "context_length": CONTEXT,
    "num_parameters": 1000,
    "vocab_size": 100,
    "linear_modules": ["fc1", "fc2", "k_proj", "out_proj", "q_proj", "v_proj"],
    "presets": {
        "attention": ["k_proj", "out_proj", "q_proj", "v_proj"],
        "mlp": ["fc1", "fc2"],
        "all-linear": ["fc1", "fc2", "k_proj", "out_proj", "q_proj", "v_proj"],
    },
    "chat_template": True,
}
SAMPLES = b"".join(b'{"prompt": "%d", "completion": " x"}\n' % n for n in range(20))
WEIGHTS = bytes(range(256)) * 4

both_databases = pytest.mark.parametrize("settings", ["sqlite", "postgres"], indirect=True)

Reply = Callable[[GenerationRequest, ChunkWriter], None]


HELLO = ("Hello", " there")


def say_hello(request: GenerationRequest, writer: ChunkWriter) -> None:
    """'Hello there' in three chunks, as each of the choices, a piece of each in turn.

    A token is a piece of that; its alternatives are as many letters as were asked for, each less likely.
    """
    choices = range(request.n)
    usage = Usage(prompt_tokens=5, completion_tokens=3 * request.n)
    for index in choices:
        writer.write(Chunk(index=index, fingerprint="fp-1"))
    for index in choices:
        writer.write(Chunk(index=index, text=HELLO[0], logprobs=_told(request, HELLO[0], index)))
    for index in choices:
        is_last = index == request.n - 1
        writer.write(
            Chunk(
                index=index, text=HELLO[1], logprobs=_told(request, HELLO[1], index), finish_reason="stop",
                usage=usage if is_last else None, fingerprint="fp-1",
            )
        )  # fmt: skip


def _told(request: GenerationRequest, text: str, index: int) -> list[GeneratedToken] | None:
    """What a chunk with this text tells of its only token."""
    if request.logprobs is None:
        return None
    alternatives = [(letter.encode(), -2.0 - n) for n, letter in enumerate("abcdefghij"[: request.logprobs])]
    return [token(text.encode(), -1.0 - index, *alternatives)]


def token(raw: bytes, logprob: float, *top: tuple[bytes, float]) -> GeneratedToken:
    """A token that was chosen, and the likeliest in its place."""
    likeliest = [TokenLogprob(token=one.decode(errors="replace"), bytes=list(one), logprob=its) for one, its in top]
    return GeneratedToken(token=raw.decode(errors="replace"), bytes=list(raw), logprob=logprob, top=likeliest)


@dataclass
class FakeGenerator:
    """Takes requests for one base model off the broker and lets `reply` answer them."""

    broker: Broker
    queue: Queue
    base_model_id: str
    reply: Reply = say_hello
    requests: list[GenerationRequest] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        while not self._stop.is_set():
            taken: Any = self.broker.client.brpop([PREFIX + generate_queue(self.base_model_id)], timeout=0.05)
            if taken:
                (payload,), _, _ = json.loads(base64.b64decode(json.loads(taken[1])["body"]))
                request = GenerationRequest.model_validate(payload)
                self.requests.append(request)
                self.reply(request, self.queue.writer(request.request_id))

    def stop(self) -> None:
        self._stop.set()


@dataclass
class Api:
    """A served application and what stands behind it."""

    url: str
    engine: Engine
    layout: Layout
    base: BaseModelRow
    http: httpx2.Client
    generator: FakeGenerator
    services: Services
    app: Flask

    def seats_free(self) -> bool:
        """True if nobody waits for news or follows a stream."""
        return self.services.waiters.taken_now == 0

    def sdk(self, key: str = "none") -> OpenAI:
        """The stock client, which checks every answer against its own types."""
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, _strict_response_validation=True)

    def upload(self, content: bytes = SAMPLES, **headers: str) -> dict[str, Any]:
        answer = self.http.post(
            "/v1/files", data={"purpose": "fine-tune"}, files={"file": ("data.jsonl", content)}, headers=headers
        )
        return dict(answer.json())

    def chat(self, **fields: Any) -> httpx2.Response:
        """Ask for a chat completion: the answer to 'hi'."""
        asked = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
        return self.http.post("/v1/chat/completions", json=asked | fields)

    def complete(self, **fields: Any) -> httpx2.Response:
        """Ask for a raw completion, of 'hi'."""
        return self.http.post("/v1/completions", json={"model": "tiny", "prompt": "hi"} | fields)

    def submit(self, **fields: Any) -> httpx2.Response:
        """Ask for a job over a fresh file."""
        fields.setdefault("training_file", self.upload()["id"])
        return self.http.post("/v1/fine_tuning/jobs", json={"model": "tiny"} | fields)

    def job(self, **fields: Any) -> dict[str, Any]:
        return dict(self.submit(**fields).raise_for_status().json())

    def claim(self) -> jobs.Claim:
        with write(self.engine) as tx:
            claim = jobs.claim_next(tx, trainer="t1", lease_s=60.0)
        assert claim is not None
        return claim

    def report(self, claim: jobs.Claim, step: int) -> None:
        """One metrics event, as a trainer writes it."""
        step_report = StepReport(
            step=step, total_steps=9, train_loss=1.0 / step, learning_rate=1e-4, grad_norm=1.0, epoch=0.1, num_tokens=8,
            num_label_tokens=4, tokens_per_second=10.0, eta_seconds=1.0,
        )  # fmt: skip
        with write(self.engine) as tx:
            jobs.add_event(tx, claim, type="metrics", message=f"Step {step}", data=step_report.model_dump())

    def add_base(self, name: str) -> BaseModelRow:
        """Another base model; nobody generates with it."""
        with write(self.engine) as tx, durable.staging(self.layout) as staged:
            (staged / "model.safetensors").write_bytes(name.encode())
            digest = hashlib.sha256(name.encode()).hexdigest()
            return base_models.register(tx, self.layout, staged, name=name, digest=digest, config=CONFIG)

    def publish(self, name: str = "math", *, weights: bytes = WEIGHTS) -> AdapterVersion:
        """A new version of this adapter, as a trainer publishes it."""
        self.job(model=self.base.name, suffix=name)
        return self.succeed(self.claim(), weights=weights)

    def succeed(self, claim: jobs.Claim, *, weights: bytes = WEIGHTS) -> AdapterVersion:
        with durable.staging(self.layout) as staged:
            (staged / "adapter_model.safetensors").write_bytes(weights)
            (staged / "adapter_config.json").write_text("{}")
            prepared = adapters.prepare(
                self.layout, staged, validate=lambda _: None, base_model_id=self.base.id, base_digest=self.base.digest,
                spec=TrainSpec(), job_id=claim.job_id, name=claim.adapter_name, training_sha256=None,
            )  # fmt: skip
        with write(self.engine) as tx:
            return jobs.succeed(tx, claim, prepared)

    def alias(self, name: str, **aliases: int) -> None:
        with write(self.engine) as tx:
            adapters.set_aliases(tx, adapters.get(tx, "default", name), aliases)

    def key(self, tenant: str = "default", *scopes: str) -> str:
        """A new API key; from now on every request needs one."""
        with write(self.engine) as tx:
            return keys.create(tx, tenant=tenant, scopes=scopes or keys.DEFAULT_SCOPES)[1]

    def row(self, job_id: str) -> Job:
        with read(self.engine) as tx:
            return tx.get_one(Job, job_id)


@pytest.fixture
def settings(request: pytest.FixtureRequest, broker_url: str, tmp_path: Path) -> Settings:
    """Over SQLite, or what a test's `both_databases` says."""
    database_url = request.getfixturevalue(f"fresh_{getattr(request, 'param', 'sqlite')}_url")
    return Settings(data_dir=tmp_path / "data", database_url=database_url, broker_url=broker_url)


@pytest.fixture
def api(settings: Settings, broker: Broker) -> Iterator[Api]:
    """The API with one base model, `tiny`, whose generator says hello."""
    with serve(settings, broker) as running:
        yield running


@contextmanager
def serve(settings: Settings, broker: Broker) -> Iterator[Api]:
    """What the fixture `api` is, for as long as a test file wants it."""
    app = create_app(settings)
    services = app.extensions["lorad"][1]
    with write(services.engine) as tx, durable.staging(services.layout) as staged:
        (staged / "model.safetensors").write_bytes(b"weights")
        base = base_models.register(tx, services.layout, staged, name="tiny", digest="d" * 64, config=CONFIG)
    server = make_server("127.0.0.1", 0, app, threaded=True)
    url = f"http://127.0.0.1:{server.server_port}"
    generator = FakeGenerator(broker, services.queue, base.id)
    threads = [
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True),
        threading.Thread(target=generator.run, daemon=True),
    ]
    for thread in threads:
        thread.start()
    with httpx2.Client(base_url=url, timeout=20, trust_env=False) as http:
        yield Api(url, services.engine, services.layout, base, http, generator, services, app)
    generator.stop()
    server.shutdown()
    server.server_close()
    for thread in threads:
        thread.join(5)
    services.queue.close()
    services.engine.dispose()


def wait_for(condition: Callable[[], object], *, timeout_s: float = 10.0) -> None:
    """Return as soon as the condition holds."""
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)
