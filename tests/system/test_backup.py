"""A service that trains is backed up, lost, restored somewhere else, and goes on."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.conftest import free_port
from tests.system.services import BASE, Embedded, lorad, strict_client, wait_for
from tests.system.test_main_job import LESSON, NYA, finished, steps_reported, submit, versions_of, weights_of

pytestmark = [pytest.mark.system, pytest.mark.timeout(400)]


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A short path, since a socket will lie below it."""
    with tempfile.TemporaryDirectory(prefix="lorad-") as directory:
        yield Path(directory)


def test_a_job_that_ran_during_a_backup_ends_in_the_restored_service(base_model_source: Path, scratch: Path) -> None:
    """Backed up in the middle of a job, without a pause; the restored service trains on from the checkpoint, and
    publishes the very bytes that the first one published in the end."""
    (scratch / "first").mkdir()
    (scratch / "second").mkdir()
    first = Embedded(scratch / "first" / "data", free_port())
    try:
        lorad("base", "add", BASE, "--path", str(base_model_source), env=first.env)
        client = strict_client(first)
        with NYA.open("rb") as data:
            file_id = client.files.create(file=data, purpose="fine-tune").id
        job = submit(client, file_id, "nya", **LESSON)
        wait_for("a checkpoint", lambda: list(client.fine_tuning.jobs.checkpoints.list(job.id)), timeout_s=180)
        made = json.loads(lorad("backup", "--json", str(scratch / "kept"), env=first.env))
        assert finished(client, job.id).status == "succeeded"
        expected = weights_of(first, "nya")
    finally:
        first.stop()
    environment = first.env | {"LORAD_DATA_DIR": str(scratch / "second" / "data")}
    brought = json.loads(lorad("restore", "--json", str(scratch / "kept"), env=environment))

    assert (made["damaged"], made["vanished"], brought["missing"], brought["requeued"]) == ([], [], [], 1)
    second = Embedded(scratch / "second" / "data", free_port())
    try:
        client = strict_client(second)
        assert finished(client, job.id).status == "succeeded"
        messages = [event.message for event in client.fine_tuning.jobs.list_events(job.id, limit=100)]
        assert any(message.startswith("Resuming from step") for message in messages)
        assert sorted(set(steps_reported(client, job.id))) == list(range(1, LESSON["training"]["max_steps"] + 1))
        assert [version["version"] for version in versions_of(second, "nya")] == [1]
        assert weights_of(second, "nya") == expected
    finally:
        second.stop()
