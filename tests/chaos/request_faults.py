"""What may happen to the API while it makes a job, and to what it serves."""

import httpx2

from shared import db
from shared.tables import AdapterVersion, JobState
from tests.chaos.bench import Bench
from tests.chaos.client import Client
from tests.chaos.faults import fault
from tests.chaos.lab import Lab
from tests.chaos.programs import wait_until

REPLAYED = "Idempotent-Replayed"


@fault("F1", "api-killed-before-doorbell", fast=True)
def killed_after_commit(bench: Bench) -> None:
    """kill -9 of the API between COMMIT and doorbell: the job runs once, and its repeated request finds it."""
    with bench.lab() as lab:
        dying = lab.api(failpoint="submit.after_commit:kill")
        file_id = dying.upload()
        assert not _answers(dying, file_id, key="once")
        dying.process.kill()
        lab.trainer()
        lab.sweeper()
        [job] = lab.rows()
        lab.wait_succeeded([job.id])

        again = lab.api().submit(file_id, key="once")

        assert (again.status_code, again.headers.get(REPLAYED)) == (200, "true"), again.text
        assert [row.id for row in lab.rows()] == [job.id] == [again.json()["id"]]
        assert lab.outcomes(job.id) == ["succeeded"]


@fault("F2", "api-killed-before-commit", fast=True)
def killed_before_commit(bench: Bench) -> None:
    """kill -9 of the API before COMMIT: there is no job, and its repeated request makes one."""
    with bench.lab(all_ended=False) as lab:
        dying = lab.api(failpoint="submit.before_commit:kill")
        file_id = dying.upload()
        assert not _answers(dying, file_id, key="once")
        dying.process.kill()
        assert lab.rows() == []

        again = lab.api().submit(file_id, key="once")

        assert (again.status_code, REPLAYED in again.headers) == (200, False), again.text
        assert [row.id for row in lab.rows()] == [again.json()["id"]]


def _answers(client: Client, file_id: str, *, key: str) -> bool:
    """False if the API died instead of answering."""
    try:
        client.submit(file_id, key=key)
    except httpx2.TransportError:
        return False
    return True


@fault("F19", "bit-flipped", fast=True)
def bit_flipped(bench: Bench) -> None:
    """A bit of a stored adapter flips: no byte of it is sent again, and the sweeper finds it within its first round."""
    with bench.lab() as lab:
        version = lab.publish("math", bytes(range(256)))
        api = lab.api()
        path = "/v1/adapters/math/versions/1/files/adapter_model.safetensors"
        assert api.http.get(path).content == bytes(range(256))
        flip(lab, version)

        assert api.http.get(path).status_code == 409
        lab.sweeper()
        wait_until("the damage to be found", lambda: _state(lab, version) == "corrupt", at_most_s=30)
        assert api.http.get("/v1/adapters/math/versions/1").status_code == 409
        asked = api.http.post("/v1/completions", json={"model": "math", "prompt": "1", "max_tokens": 1})
        assert asked.status_code == 409, asked.text


@fault("F19", "bit-flipped-while-served")
def bit_flipped_while_served(bench: Bench) -> None:
    """A generator that has yet to read the adapter refuses it too, before anybody marked it as corrupt."""
    with bench.lab() as lab:
        lab.trainer()
        [job_id] = lab.submit(name="math")
        lab.wait_succeeded([job_id])
        api = lab.api()
        first = lab.start("generator")
        wait_until("an answer", lambda: _asked(api, "math") == 200, at_most_s=60)
        first.kill()
        with db.read(lab.engine) as tx:
            [version] = tx.query(AdapterVersion).all()
        flip(lab, version)

        second = lab.start("generator")
        wait_until("the generator", lambda: second.is_alive and _asked(api, "tiny") == 200, at_most_s=60)
        assert _asked(api, "math") == 409
        assert lab.states([job_id]) == [JobState.SUCCEEDED]
        lab.sweeper()
        wait_until("the damage to be found", lambda: _state(lab, version) == "corrupt", at_most_s=30)


def _asked(api: Client, model: str) -> int:
    """The status of a short completion; 0 if there is no answer."""
    body = {"model": model, "prompt": "1 and 1 is", "max_tokens": 2}
    try:
        return int(api.http.post("/v1/completions", json=body).status_code)
    except httpx2.TransportError:
        return 0


def flip(lab: Lab, version: AdapterVersion) -> None:
    """Change one bit of the stored weights."""
    lab.recorder.spared.add(version.id)
    path = lab.layout.adapter(version.id) / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.chmod(0o600)
    path.write_bytes(content)


def _state(lab: Lab, version: AdapterVersion) -> str:
    with db.read(lab.engine) as tx:
        return tx.get_one(AdapterVersion, version.id).state
