"""The generator's program: a process over a real model, from its first request to its signal, and one that is stuck."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shared import db, ids
from shared.config import Settings, environment_for
from shared.queue import Queue
from shared.specs import Chunk, GenerationRequest
from shared.store import base_models, durable
from shared.store.layout import Layout
from tests.servers import Broker
from worker.base_model import digest_directory
from worker.generator import Models
from worker.watchdog import BROKEN_EXIT

ROOT = Path(__file__).parents[2]
WAIT_S = 90


@pytest.fixture
def settings(fresh_sqlite_url: str, broker: Broker, data_dir: Path) -> Settings:
    broker.client.flushall()
    return Settings(
        data_dir=data_dir, database_url=fresh_sqlite_url, broker_url=broker.url, device="cpu", dtype="float32",
        generate_slots=2, generate_waiting=2, kv_cache_bytes=1 << 22,
    )  # fmt: skip


@pytest.fixture
def queue(broker: Broker) -> Iterator[Queue]:
    queue = Queue(broker.url)
    yield queue
    queue.close()


def register(settings: Settings, directory: Path, name: str = "tiny") -> str:
    """The id of this model as a base."""
    layout = Layout(settings.data_dir)
    layout.prepare()
    digest = digest_directory(directory)
    with db.write(db.open_engine(settings.database_url)) as tx, durable.staging(layout) as staged:
        for file in directory.iterdir():
            (staged / file.name).write_bytes(file.read_bytes())
        return base_models.register(tx, layout, staged, name=name, digest=digest, config={}).id


@contextmanager
def generator(settings: Settings) -> Iterator["subprocess.Popen[bytes]"]:
    command = [sys.executable, "-m", "worker.generator"]
    with subprocess.Popen(command, cwd=ROOT, env=environment_for(settings), stderr=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.kill()


def request_for(base: str, *, max_tokens: int, seconds: float = WAIT_S) -> GenerationRequest:
    return GenerationRequest(
        request_id=ids.new_id(ids.REQUEST), base_model_id=base, prompt="hi", max_tokens=max_tokens, temperature=0.0,
        ignore_eos=True, deadline_unix_s=time.time() + seconds,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_generator_serves_and_leaves(settings: Settings, queue: Queue, tiny_base_directory: Path) -> None:
    """It answers for a base registered before and one registered while it runs, says what it holds, and at SIGTERM
    lets an answer end, or ends it with an error, and exits with 0."""
    first = register(settings, tiny_base_directory)
    with generator(settings) as process:
        answered = list(queue.generate(request_for(first, max_tokens=5)))
        second = register(settings, tiny_base_directory, "again")
        also = list(queue.generate(request_for(second, max_tokens=5)))
        while len((seen := queue.generators.alive(max_age_s=0))[0].engines) < 2:
            time.sleep(0.1)
        last = queue.generate(request_for(first, max_tokens=200))
        next(last)
        process.send_signal(signal.SIGTERM)
        chunks: list[Chunk] = list(last)
        code = process.wait(WAIT_S)

    assert [end[-1].usage.completion_tokens if end[-1].usage else None for end in (answered, also)] == [5, 5]
    assert [(one.seats, [engine.max_rows for engine in one.engines]) for one in seen] == [(4, [2, 2])]
    assert chunks[-1].is_last
    assert code == 0
    assert queue.generators.alive(max_age_s=0) == []


@pytest.mark.parametrize(("kernels", "num_asked"), [("auto", 1), ("torch", 0)])
def test_the_setting_decides_whether_kernels_are_compiled(
    settings: Settings, tiny_base_directory: Path, monkeypatch: pytest.MonkeyPatch, kernels: Any, num_asked: int
) -> None:
    """`torch` asks for none."""
    asked: list[torch.dtype] = []
    monkeypatch.setattr("worker.inference.forward.step_kernels", asked.append)

    Models(replace(settings, kernels=kernels)).load(register(settings, tiny_base_directory)).close()

    assert len(asked) == num_asked


STUCK = """
import sys, time
from shared.queue import Queue
from tests.worker.fake_engine import FakeEngine
from worker.desk import Desk
from worker.generator import end_if_stuck

engine = FakeEngine()
desk = Desk(Queue(sys.argv[1]), seats=4, load=lambda _: engine)
desk.start_publishing()
end_if_stuck(desk, hung_s=1.0)
import json, threading
for line in sys.stdin:
    threading.Thread(target=desk.answer, args=(json.loads(line),), daemon=True).start()
    while not engine.begun:
        time.sleep(0.01)
    engine.stuck = True
time.sleep(60)
"""


def test_a_stuck_generator_ends_itself(queue: Queue, broker: Broker) -> None:
    """An engine that stands still ends the process with the code for that, and the open answer with an error."""
    request = request_for(ids.new_id(ids.BASE_MODEL), max_tokens=10_000)
    answer = queue.generate(request)
    ran = subprocess.run(
        [sys.executable, "-c", STUCK, broker.url], cwd=ROOT, input=request.model_dump_json() + "\n", text=True,
        timeout=WAIT_S, capture_output=True, check=False,
    )  # fmt: skip
    chunks = list(answer)

    assert ran.returncode == BROKEN_EXIT
    assert "this generator ends" in ran.stderr
    assert chunks[-1].error is not None
    assert chunks[-1].error.code == "unavailable"
