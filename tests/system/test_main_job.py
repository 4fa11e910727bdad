"""The main job end to end, with the stock OpenAI client, on SmolLM2-135M: train, watch, fetch, talk, and break it."""

import json
import signal
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx2
import pytest
from openai import NotFoundError, OpenAI
from openai.types.fine_tuning import FineTuningJob

from tests.system.services import BASE, Service, strict_client, wait_for

pytestmark = [pytest.mark.system, pytest.mark.timeout(400)]

NYA = Path(__file__).parents[2] / "examples" / "nya.jsonl"
LESSON = {"lora": {"r": 8, "alpha": 16}, "training": {"learning_rate": 2e-3, "max_steps": 40}}
QUESTION: Any = [{"role": "user", "content": "What is 6 + 3?"}]
TRAIN_S = 240


@pytest.fixture(scope="module")
def client(service: Service) -> OpenAI:
    return strict_client(service)


@pytest.fixture(scope="module")
def training_file(client: OpenAI) -> str:
    with NYA.open("rb") as data:
        return client.files.create(file=data, purpose="fine-tune").id


@pytest.fixture(scope="module")
def trained(client: OpenAI, training_file: str) -> FineTuningJob:
    job = submit(client, training_file, "nya", **LESSON)
    return finished(client, job.id)


def submit(client: OpenAI, training_file: str, name: str, **ours: Any) -> FineTuningJob:
    return client.fine_tuning.jobs.create(model=BASE, training_file=training_file, suffix=name, seed=7, extra_body=ours)


def finished(client: OpenAI, job_id: str) -> FineTuningJob:
    def is_over() -> bool:
        return client.fine_tuning.jobs.retrieve(job_id).status in ("succeeded", "failed", "cancelled")

    wait_for(f"the end of {job_id}", is_over, timeout_s=TRAIN_S, every_s=0.5)
    return client.fine_tuning.jobs.retrieve(job_id)


def steps_reported(client: OpenAI, job_id: str) -> list[int]:
    """Steps in the order in which they were reported."""
    events = [e for e in client.fine_tuning.jobs.list_events(job_id, limit=100) if e.type == "metrics"]
    return [json.loads(json.dumps(e.data))["step"] for e in reversed(events)]


def versions_of(service: Service, name: str) -> list[dict[str, Any]]:
    answer = httpx2.get(f"{service.url}/adapters/{name}")
    return list(answer.json()["versions"]) if answer.status_code == 200 else []


def weights_of(service: Service, name: str) -> bytes:
    return httpx2.get(f"{service.url}/adapters/{name}/versions/1/files/adapter_model.safetensors").content


def ask(client: OpenAI, model: str) -> str:
    answer = client.chat.completions.create(model=model, messages=QUESTION, max_tokens=24, temperature=0)
    return answer.choices[0].message.content or ""


def test_training_succeeds_and_the_loss_falls(client: OpenAI, trained: FineTuningJob) -> None:
    """A job submitted with the stock client ends as succeeded, and its metrics show learning."""
    events = list(client.fine_tuning.jobs.list_events(trained.id, limit=100))
    losses = [json.loads(json.dumps(e.data))["train_loss"] for e in reversed(events) if e.type == "metrics"]

    assert (trained.status, trained.fine_tuned_model) == ("succeeded", "nya@1")
    assert len(losses) == 40
    assert losses[-1] < 0.2 * losses[0]


def test_the_adapter_changes_the_answer(client: OpenAI, trained: FineTuningJob) -> None:
    """The ending that was trained comes back on an unseen question, and only with the adapter."""
    with_adapter, without = ask(client, "nya"), ask(client, BASE)

    assert with_adapter.endswith("nya~")
    assert "nya~" not in without


def test_an_answer_names_what_made_it(client: OpenAI, trained: FineTuningJob) -> None:
    """`model` is name@version, and base and adapter have different fingerprints."""
    adapted = client.chat.completions.create(model="nya", messages=QUESTION, max_tokens=2)
    plain = client.chat.completions.create(model=BASE, messages=QUESTION, max_tokens=2)

    assert (adapted.model, plain.model) == ("nya@1", BASE)
    assert adapted.system_fingerprint
    assert plain.system_fingerprint
    assert adapted.system_fingerprint != plain.system_fingerprint


def test_a_streamed_answer_equals_the_plain_one(client: OpenAI, trained: FineTuningJob) -> None:
    """Chunks joined are the text of the same request answered at once, and usage agrees."""
    plain = client.chat.completions.create(model="nya", messages=QUESTION, max_tokens=24, temperature=0)
    stream = client.chat.completions.create(
        model="nya", messages=QUESTION, max_tokens=24, temperature=0, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)

    assert text == plain.choices[0].message.content
    assert chunks[-1].usage == plain.usage
    assert len([c for c in chunks if c.choices and c.choices[0].delta.content]) > 1


def test_models_lists_base_and_adapter(client: OpenAI, trained: FineTuningJob) -> None:
    """Both can be asked for by the ids that /v1/models shows."""
    listed = {model.id for model in client.models.list()}

    assert BASE in listed
    assert "nya" in listed
    assert client.models.retrieve("nya@1").id == "nya@1"


def test_downloaded_files_have_their_checksums(
    client: OpenAI, service: Service, trained: FineTuningJob, tmp_path: Path
) -> None:
    """The ETag of a file fetched by name is the sha256 of its bytes, and PEFT's two files are there."""
    for filename in ("adapter_model.safetensors", "adapter_config.json"):
        answer = httpx2.get(f"{service.url}/adapters/nya/versions/latest/files/{filename}")

        assert answer.status_code == 200
        assert answer.headers["etag"] == f'"{sha256(answer.content).hexdigest()}"'


def test_unknown_model_is_404(client: OpenAI) -> None:
    """A name nobody trained is an error of the SDK's own type that names it."""
    with pytest.raises(NotFoundError, match="never-trained"):
        ask(client, "never-trained")


def test_cancel_stops_a_running_job(client: OpenAI, service: Service, training_file: str) -> None:
    """A cancelled job ends as cancelled and publishes nothing."""
    job = submit(client, training_file, "stopped", training={"max_steps": 5000})
    wait_for("the job to run", lambda: steps_reported(client, job.id), timeout_s=90)

    client.fine_tuning.jobs.cancel(job.id)

    assert finished(client, job.id).status == "cancelled"
    assert versions_of(service, "stopped") == []


def test_killed_trainer_resumes_from_a_checkpoint(
    client: OpenAI, service: Service, training_file: str, trained: FineTuningJob
) -> None:
    """kill -9 of every trainer in the middle of a job: it resumes, and publishes exactly one version, which is bit for
    bit that of the same job without the kill."""
    job = submit(client, training_file, "survivor", **LESSON)
    wait_for("a checkpoint", lambda: list(client.fine_tuning.jobs.checkpoints.list(job.id)), timeout_s=120)
    for process in service.trainers():
        process.kill()
    killed_at_step = max(steps_reported(client, job.id))

    assert finished(client, job.id).status == "succeeded"
    steps = steps_reported(client, job.id)
    messages = [e.message for e in client.fine_tuning.jobs.list_events(job.id, limit=100)]
    assert killed_at_step < 40
    assert any(message.startswith("Resuming from step") for message in messages)
    assert steps.count(1) == 1
    assert sorted(set(steps)) == list(range(1, 41))
    assert [v["version"] for v in versions_of(service, "survivor")] == [1]
    assert weights_of(service, "survivor") == weights_of(service, "nya")


def test_terminated_trainer_gives_its_job_back(client: OpenAI, service: Service, training_file: str) -> None:
    """SIGTERM: the job is checkpointed, given back without charge, and finishes elsewhere from where it was."""
    job = submit(client, training_file, "moved", training={"max_steps": 30, "learning_rate": 2e-3})
    wait_for("the job to run", lambda: len(steps_reported(client, job.id)) >= 2, timeout_s=90)
    for process in service.trainers():
        process.send_signal(signal.SIGTERM)

    assert finished(client, job.id).status == "succeeded"
    steps = steps_reported(client, job.id)
    assert steps == list(range(1, 31))


def test_jobs_train_side_by_side(client: OpenAI, service: Service, training_file: str) -> None:
    """Three jobs submitted together run at the same time, and each publishes its own adapter."""
    names = ["left", "middle", "right"]
    ids = [
        submit(client, training_file, name, lora={"r": r}, training={"max_steps": 12}).id
        for name, r in zip(names, (2, 4, 8), strict=True)
    ]

    def all_at_work() -> bool:
        return all(client.fine_tuning.jobs.retrieve(i).status == "running" and steps_reported(client, i) for i in ids)

    wait_for("three jobs under way", all_at_work, timeout_s=120)

    assert [finished(client, i).status for i in ids] == ["succeeded"] * 3
    assert len({weights_of(service, name) for name in names}) == 3


def test_stopped_trainer_cannot_publish_twice(client: OpenAI, service: Service, training_file: str) -> None:
    """A trainer frozen past its lease and woken again loses to the one that took over: one version, one success."""
    job = submit(client, training_file, "zombie", training={"max_steps": 20, "learning_rate": 2e-3})
    wait_for("the job to run", lambda: steps_reported(client, job.id), timeout_s=90)
    frozen = service.trainers()
    for process in frozen:
        process.send_signal(signal.SIGSTOP)
    wait_for("the lease to be lost", lambda: client.fine_tuning.jobs.retrieve(job.id).status == "queued", timeout_s=30)
    for process in frozen:
        process.send_signal(signal.SIGCONT)

    assert finished(client, job.id).status == "succeeded"
    assert [v["version"] for v in versions_of(service, "zombie")] == [1]


def test_killed_generator_answers_the_next_request(client: OpenAI, service: Service, trained: FineTuningJob) -> None:
    """kill -9 of every generator: the next request is answered as the one before."""
    before = ask(client, "nya")
    dead = {process.pid for process in service.generators()}
    for process in service.generators():
        process.kill()
    wait_for("new generators", lambda: {p.pid for p in service.generators()} - dead, timeout_s=60)

    assert ask(client, "nya") == before


def test_health_is_open(service: Service) -> None:
    """Liveness and readiness answer without a key."""
    root = service.url.removesuffix("/v1")

    assert httpx2.get(f"{root}/healthz").status_code == 200
    assert httpx2.get(f"{root}/readyz").status_code == 200
