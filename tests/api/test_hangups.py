"""Clients that hang up while a real server makes their answer: the generator is told, and the thread is free."""

import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import pytest

from shared.cli.servers import CODE_DIR, api_command
from shared.config import Settings, environment_for
from shared.db import open_engine, write
from shared.queue import ChunkWriter, Queue
from shared.specs import Chunk, GenerationRequest
from shared.store import base_models, durable
from shared.store.layout import Layout
from tests.api.conftest import CONFIG, FakeGenerator, say_hello, wait_for
from tests.servers import Broker, free_port

SOON_S = 2.0
"""A client is looked for four times a second; the rest is for a busy machine."""

BEGUN = [Chunk(fingerprint="fp-1"), Chunk(text="Hel")]


@dataclass
class Patient:
    """Writes these chunks, then goes on until it is told to stop, or for `patience_s`; then it says hello."""

    chunks: list[Chunk]
    patience_s: float = 15.0
    begun: threading.Event = field(default_factory=threading.Event)
    stopped_at: list[float] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    def __call__(self, request: GenerationRequest, writer: ChunkWriter) -> None:
        for chunk in self.chunks:
            writer.write(chunk)
        self.begun.set()
        until = time.monotonic() + self.patience_s
        while time.monotonic() < until and not self.stopped_at:
            if writer.is_cancelled():
                self.stopped_at.append(time.monotonic())
            time.sleep(0.01)
        if not self.stopped_at:
            say_hello(request, writer)
        self.ended.set()


@dataclass
class Line:
    """A gunicorn that answers one request at a time, and what generates for it."""

    port: int
    generator: FakeGenerator


@pytest.fixture(scope="module")
def line(broker: Broker, sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Line]:
    """One for the whole module: a server takes seconds to start."""
    place = tmp_path_factory.mktemp("line")
    database_url = f"sqlite:///{shutil.copyfile(sqlite_template, place / 'lorad.db')}"
    settings = Settings(
        data_dir=place, database_url=database_url, broker_url=broker.url, port=free_port(), api_threads=1
    )
    generator = FakeGenerator(broker, Queue(broker.url), _a_base_model(settings))
    thread = threading.Thread(target=generator.run, daemon=True)
    thread.start()
    with subprocess.Popen(api_command(settings), cwd=CODE_DIR, env=environment_for(settings)) as gunicorn:
        try:
            wait_for(lambda: _answers(settings.port), timeout_s=60)
            yield Line(settings.port, generator)
        finally:
            gunicorn.terminate()
            gunicorn.wait(20)
            generator.stop()
            thread.join(5)
            generator.queue.close()


def _a_base_model(settings: Settings) -> str:
    """The id of `tiny`, which is registered now."""
    layout, engine = Layout(settings.data_dir), open_engine(settings.database_url)
    layout.prepare()
    with write(engine) as tx, durable.staging(layout) as staged:
        (staged / "model.safetensors").write_bytes(b"weights")
        base_model_id = base_models.register(tx, layout, staged, name="tiny", digest="d" * 64, config=CONFIG).id
    engine.dispose()
    return base_model_id


def _answers(port: int) -> bool:
    try:
        return httpx2.get(f"http://127.0.0.1:{port}/healthz", trust_env=False, timeout=1).status_code == 200
    except httpx2.HTTPError:
        return False


def call(port: int, *, stream: bool) -> socket.socket:
    """A connection that has asked and reads nothing yet."""
    body = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "stream": stream})
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    connection = socket.create_connection(("127.0.0.1", port), timeout=20)
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    return connection


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("chunks", [[], BEGUN], ids=["waiting", "begun"])
def test_a_client_that_hangs_up_cancels_at_once(line: Line, chunks: list[Chunk], stream: bool) -> None:
    """Before the first chunk or in the middle, streamed or not; and the only thread answers the next client."""
    line.generator.reply = patient = Patient(chunks)
    with call(line.port, stream=stream):
        assert patient.begun.wait(10)
        assert not patient.stopped_at
    left_at = time.monotonic()

    assert patient.ended.wait(20)
    assert patient.stopped_at
    assert patient.stopped_at[0] - left_at < SOON_S
    assert _answers(line.port)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_client_that_waits_is_served(line: Line, stream: bool) -> None:
    """Silence on the line is no hang-up: after many looks the client still gets the whole answer."""
    line.generator.reply = patient = Patient([], patience_s=1.5)
    with call(line.port, stream=stream) as connection:
        assert patient.ended.wait(20)
        answer = connection.recv(1 << 16)
        while b"there" not in answer:
            answer += connection.recv(1 << 16)

    assert answer.startswith(b"HTTP/1.1 200")
    assert not patient.stopped_at


def test_a_request_that_stands_behind_is_no_hang_up(line: Line) -> None:
    """Bytes that a client sends early stay unread, and are its next request."""
    line.generator.reply = patient = Patient([], patience_s=0.6)
    with call(line.port, stream=False) as connection:
        connection.sendall(
            f"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1:{line.port}\r\nConnection: close\r\n\r\n".encode()
        )
        answer = b""
        while piece := connection.recv(1 << 16):
            answer += piece

    assert not patient.stopped_at
    assert answer.count(b"HTTP/1.1 200") == 2
