"""Messages forged on the broker, row 57 of the catalogue in tests/api/test_bad_inputs.py: a real worker lives on.

Anybody who reaches the broker can write to its queues. What comes of a message is decided by the ledger and by what is
checked again where it is taken; here, that nothing else comes of it.
"""

import base64
import json
import pickle
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from shared import ids
from shared.answers import PREFIX
from shared.queue import GENERATE_TASK, TRAIN_TASK, Queue, celery_app, generate_queue
from shared.specs import GenerationRequest
from tests.servers import Broker, run_broker

ROOT = Path(__file__).parents[2]
WAIT_S = 30
COPIES = 10
"""More than the worker works on at once: a message that it never gives back would stop it."""
BASE = ids.new_id(ids.BASE_MODEL)


@dataclass
class Consumer:
    """A generator over an engine without a model, in a process of its own, and the way to its queue."""

    broker: Broker
    queue: Queue
    process: "subprocess.Popen[str]"
    log: Path

    def push(self, message: bytes) -> None:
        self.broker.client.lpush(PREFIX + generate_queue(BASE), message)

    def answer(self) -> str:
        """The answer to a good request."""
        return "".join(chunk.text for chunk in self.queue.generate(good_request()))


@pytest.fixture(scope="module")
def consumer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Consumer]:
    log = tmp_path_factory.mktemp("consumer") / "log"
    with run_broker() as broker, log.open("wb") as errors:
        command = [sys.executable, "-m", "tests.worker.fake_engine", broker.url, BASE, "x", "0.01"]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            assert process.stdout is not None
            process.stdout.readline()
            queue = Queue(broker.url)
            try:
                yield Consumer(broker, queue, process, log)
            finally:
                queue.close()
                process.kill()


def good_request(**fields: Any) -> GenerationRequest:
    return GenerationRequest(
        request_id=ids.new_id(ids.REQUEST), base_model_id=BASE, prompt="hi", max_tokens=3,
        deadline_unix_s=time.time() + WAIT_S, **fields,
    )  # fmt: skip


def message(
    *arguments: object, task: str = GENERATE_TASK, content_type: str = "application/json", **headers: object
) -> dict[str, Any]:
    """An envelope as Celery's protocol 2 has it; `content_type` application/x-python-serialize pickles the body."""
    message_id = str(uuid.uuid4())
    content = [arguments, {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}]
    body = json.dumps(content).encode() if content_type == "application/json" else pickle.dumps(content)
    return {
        "body": base64.b64encode(body).decode(),
        "content-encoding": "utf-8",
        "content-type": content_type,
        "headers": {
            "lang": "py", "task": task, "id": message_id, "root_id": message_id, "parent_id": None, "group": None,
            "retries": 0, "eta": None, "expires": None, "timelimit": [None, None], "argsrepr": "", "kwargsrepr": "",
        } | headers,
        "properties": {
            "correlation_id": message_id, "reply_to": "", "delivery_mode": 2, "priority": 0, "body_encoding": "base64",
            "delivery_info": {"exchange": "", "routing_key": generate_queue(BASE)}, "delivery_tag": message_id,
        },
    }  # fmt: skip


def without(envelope: dict[str, Any], *path: str) -> dict[str, Any]:
    """The envelope without the part at `path`."""
    inner = envelope
    for step in path[:-1]:
        inner = inner[step]
    del inner[path[-1]]
    return envelope


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.touch, (self.target,)


REQUEST = good_request().model_dump(mode="json")
FORGED: dict[str, dict[str, Any]] = {
    "unknown ids": message(REQUEST | {"base_model_id": "../../etc", "request_id": "../../etc/passwd"}),
    "a job id for a request": message("ftjob-" + "0" * 32),
    "a number for a request": message(7),
    "no argument": message(),
    "too many arguments": message(REQUEST, REQUEST),
    "a field too many": message(REQUEST | {"output_dir": "/etc"}),
    "wrong types": message(REQUEST | {"max_tokens": "many", "deadline_unix_s": []}),
    "a deadline in another age": message(REQUEST | {"deadline_unix_s": 1e300}),
    "a doorbell": message(task=TRAIN_TASK),
    "another task": message(task="os.system"),
    "a built-in task": message(task="celery.backend_cleanup"),
    "a task without a name": without(message(REQUEST), "headers", "task"),
    "a task that is a list": message(REQUEST, task=["a"]),  # type: ignore[arg-type]  # that is the point
    "10 MB": message("x" * 10_000_000),
    "another content type": message(REQUEST, content_type="application/x-python-serialize"),
    "another encoding": message(REQUEST) | {"content-encoding": "no-such"},
    "a body that is not base64": message(REQUEST) | {"body": "%%%"},
    "a body that is not JSON": message(REQUEST) | {"body": base64.b64encode(b"{").decode()},
    "a body of another shape": message(REQUEST) | {"body": base64.b64encode(b'{"a": 1}').decode()},
    "no body": without(message(REQUEST), "body"),
    "no headers": without(message(REQUEST), "headers"),
    "no id": without(message(REQUEST), "headers", "id"),
    "no id of another task": without(message(task="x"), "headers", "id"),
    "no properties": without(message(REQUEST), "properties"),
    "no delivery tag": without(message(REQUEST), "properties", "delivery_tag"),
    "a wrong time to start": message(REQUEST, eta="yesterday"),
    "a wrong time to end": message(REQUEST, expires={}),
    "wrong time limits": message(REQUEST, timelimit="x"),
    "no envelope": {},
}
NO_JSON = {"nothing": b"", "garbage": b"\x80\x04K\x01.", "a word": b"hello", "nested deep": b"[" * 200_000, "7": b"7"}


def copies(name: str) -> Iterator[bytes]:
    """Two of each of many, as only their tags tell messages apart."""
    if name in NO_JSON:
        yield from [NO_JSON[name]] * COPIES
        return
    text = json.dumps(FORGED[name])
    tag = FORGED[name].get("properties", {}).get("delivery_tag", "none")
    for number in range(COPIES if len(text) < 1 << 20 else 1):
        yield from [text.replace(tag, f"{tag[:-2]}{number:02}").encode()] * 2


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", [*FORGED, *NO_JSON])
def test_a_forged_message_is_discarded(consumer: Consumer, name: str) -> None:
    """The worker takes it, nobody gets an answer, and the next good request is answered by the same process."""
    for forged in copies(name):
        consumer.push(forged)

    assert consumer.answer() == "xxx"
    assert consumer.process.poll() is None
    assert consumer.broker.client.llen(PREFIX + generate_queue(BASE)) == 0


def test_a_good_envelope_is_taken(consumer: Consumer) -> None:
    """What the forged messages are variations of is answered: they are refused for what is wrong with them."""
    request = good_request()
    consumer.push(json.dumps(message(request.model_dump(mode="json"))).encode())
    stream = f"{PREFIX}chunks:{request.request_id}"
    until = time.monotonic() + WAIT_S
    while not consumer.broker.client.exists(stream):
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_pickle_is_not_loaded(consumer: Consumer, tmp_path: Path) -> None:
    """A body that would run code when it is unpickled runs none, and that it was thrown away is logged."""
    trap = tmp_path / "trap"
    before = consumer.log.read_text(errors="replace").count("discarded a message")
    forged = message(content_type="application/x-python-serialize")
    forged["body"] = base64.b64encode(pickle.dumps([[Bomb(trap)], {}, {}])).decode()
    consumer.push(json.dumps(forged).encode())

    assert consumer.answer() == "xxx"
    assert not trap.exists()
    assert consumer.log.read_text(errors="replace").count("discarded a message") == before + 1
    pickle.loads(base64.b64decode(forged["body"]))
    assert trap.exists()


def test_nobody_can_command_a_worker(consumer: Consumer) -> None:
    """Celery's remote control, by which anybody on the broker could end a worker, is off."""
    app = celery_app(consumer.broker.url)
    app.control.shutdown()
    app.close()

    assert consumer.answer() == "xxx"
    assert consumer.process.poll() is None
