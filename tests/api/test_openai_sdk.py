"""The stock OpenAI client with strict response validation against a served API."""

import hashlib

import httpx2
import openai
import pytest

from tests.api.conftest import SAMPLES, Api, both_databases


@both_databases
def test_upload_retrieve_list_content_delete(api: Api) -> None:
    """A file goes up, comes back byte for byte, is listed, and is gone after its deletion."""
    client = api.sdk()

    file = client.files.create(file=("data.jsonl", SAMPLES), purpose="fine-tune")
    assert (file.status, file.bytes, file.filename) == ("processed", len(SAMPLES), "data.jsonl")
    assert client.files.retrieve(file.id) == file
    assert client.files.content(file.id).read() == SAMPLES
    assert [listed.id for listed in client.files.list()] == [file.id]
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)


def test_wait_for_processing_returns_at_once(api: Api) -> None:
    """An uploaded file is already checked."""
    client = api.sdk()
    file = client.files.create(file=SAMPLES, purpose="fine-tune")

    assert client.files.wait_for_processing(file.id).status == "processed"


def test_job_is_created_retrieved_and_listed(api: Api) -> None:
    """OpenAI's body works as it is; ours rides in extra_body and comes back resolved."""
    client = api.sdk()
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=api.upload()["id"],
        suffix="math",
        seed=7,
        metadata={"team": "red"},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto"}}},
        extra_body={"lora": {"r": 4}, "priority": 3},
    )

    assert (job.status, job.model, job.seed, job.metadata) == ("queued", "tiny", 7, {"team": "red"})
    assert job.hyperparameters.n_epochs == 2
    assert job.model_extra is not None
    assert job.model_extra["lora"]["r"] == 4
    assert client.fine_tuning.jobs.retrieve(job.id).id == job.id
    assert [listed.id for listed in client.fine_tuning.jobs.list()] == [job.id]


@both_databases
def test_pages_are_followed(api: Api) -> None:
    """The client's auto-paging visits every job once, newest first."""
    file_id = api.upload()["id"]
    made = [api.job(training_file=file_id)["id"] for _ in range(5)]

    assert [job.id for job in api.sdk().fine_tuning.jobs.list(limit=2)] == made[::-1]


@both_databases
def test_jobs_are_filtered_by_metadata(api: Api) -> None:
    """`metadata` finds the jobs that carry it, and None those that carry nothing."""
    client = api.sdk()
    red, plain = api.job(metadata={"team": "red"})["id"], api.job()["id"]
    api.job(metadata={"team": "blue"})

    assert [job.id for job in client.fine_tuning.jobs.list(metadata={"team": "red"})] == [red]
    assert [job.id for job in client.fine_tuning.jobs.list(extra_query={"metadata": "null"})] == [plain]


@both_databases
def test_events_come_newest_first_and_paged(api: Api) -> None:
    """Metrics and messages pass the client's types, in OpenAI's order."""
    job = api.job()
    claim = api.claim()
    for step in (1, 2, 3):
        api.report(claim, step)

    events = list(api.sdk().fine_tuning.jobs.list_events(job["id"], limit=2))
    assert [event.message for event in events[:3]] == ["Step 3", "Step 2", "Step 1"]
    assert events[0].type == "metrics"
    assert events[-1].message == "The job was created and queued."


def test_checkpoints_are_listed(api: Api) -> None:
    """A job without checkpoints has an empty list, not an error."""
    assert list(api.sdk().fine_tuning.jobs.checkpoints.list(api.job()["id"])) == []


def test_cancel_and_its_conflict(api: Api) -> None:
    """The body-less POST of the client cancels; an ended job is a conflict that is not to be tried again."""
    client = api.sdk()
    job = client.fine_tuning.jobs.cancel(api.job()["id"])

    assert job.status == "cancelled"
    done = api.publish()
    with pytest.raises(openai.ConflictError) as conflict:
        client.fine_tuning.jobs.cancel(str(done.job_id))
    assert conflict.value.response.headers["x-should-retry"] == "false"


def test_pause_and_resume(api: Api) -> None:
    """A paused job says so, with a status that OpenAI's enum lacks, and resuming queues it again."""
    lenient = openai.OpenAI(base_url=f"{api.url}/v1", api_key="none", max_retries=0)
    job = api.job()

    assert lenient.fine_tuning.jobs.pause(job["id"]).status == "paused"  # type: ignore[comparison-overlap]  # ours
    assert api.sdk().fine_tuning.jobs.resume(job["id"]).status == "queued"


@both_databases
def test_models_are_listed_retrieved_and_deleted(api: Api) -> None:
    """A base model and an adapter are both models; only the adapter can be deleted."""
    api.publish("math")
    client = api.sdk()

    assert {model.id for model in client.models.list()} == {"tiny", "math"}
    assert client.models.retrieve("math@1").owned_by == "default"
    assert client.models.delete("math").deleted
    assert [model.id for model in client.models.list()] == ["tiny"]
    with pytest.raises(openai.PermissionDeniedError):
        client.models.delete("tiny")


def test_chat_plain(api: Api) -> None:
    """A whole answer with usage, the model that made it, and its fingerprint."""
    answer = api.sdk().chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}])

    assert answer.choices[0].message.content == "Hello there"
    assert (answer.model, answer.system_fingerprint, answer.choices[0].finish_reason) == ("tiny", "fp-1", "stop")
    assert answer.usage is not None
    assert answer.usage.total_tokens == 8


def test_chat_streamed(api: Api) -> None:
    """First the role, then the text, then the reason, then the usage."""
    stream = api.sdk().chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hi"}], stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)

    assert next(c.choices[0].delta.role for c in chunks if c.choices) == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Hello there"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 3
    assert {c.system_fingerprint for c in chunks} == {"fp-1"}


def test_completions_plain_and_streamed(api: Api) -> None:
    """The raw dialect says the same text both ways. (OpenAI's own stream has a null that its strict mode refuses.)"""
    plain = api.sdk().completions.create(model="tiny", prompt="hi")
    lenient = openai.OpenAI(base_url=f"{api.url}/v1", api_key="none", max_retries=0)
    chunks = list(lenient.completions.create(model="tiny", prompt="hi", stream=True))

    assert chunks[-1].choices[0].finish_reason == "stop"
    assert plain.choices[0].text == "".join(c.choices[0].text for c in chunks) == "Hello there"


def test_an_adapter_names_its_version(api: Api) -> None:
    """`math` is answered by, and as, the version that it means, which the generator is told by id."""
    version = api.publish("math")
    answer = api.sdk().chat.completions.create(model="math", messages=[{"role": "user", "content": "hi"}])

    assert answer.model == "math@1"
    assert api.generator.requests[-1].adapters[0].version_id == version.id


def test_an_error_carries_the_request_id(api: Api) -> None:
    """The client shows the id under which our log has the request."""
    with pytest.raises(openai.NotFoundError) as missing:
        api.sdk().models.retrieve("nobody")

    assert missing.value.request_id
    assert missing.value.code == "model_not_found"


def test_a_large_upload_arrives_whole(api: Api) -> None:
    """Five megabytes in many reads keep their hash."""
    content = SAMPLES * 7500
    file = api.sdk().files.create(file=("big.jsonl", content), purpose="fine-tune")

    assert file.bytes == len(content)
    assert file.model_extra is not None
    assert file.model_extra["sha256"] == hashlib.sha256(content).hexdigest()
    assert httpx2.get(f"{api.url}/v1/files/{file.id}/content", trust_env=False).content == content
