"""Jobs beyond what the stock client shows: resolved values, waiting, event streams, a broker that is away."""

import json
import threading
import time
from dataclasses import replace
from typing import Any

import httpx2
import pytest

from api.app import create_app
from api.job_spec import plan
from api.schemas.jobs import JobRequest
from shared.config import Settings
from shared.db import write
from shared.specs import TrainSpec
from shared.store import files
from shared.tables import BaseModelRow
from tests.api.conftest import CONFIG, Api, wait_for
from tests.servers import free_port

JOBS = "/v1/fine_tuning/jobs"


def planned(num_samples: int, config: dict[str, Any] = CONFIG, **fields: Any) -> TrainSpec:
    request = JobRequest.model_validate({"model": "tiny", "training_file": "file-1"} | fields)
    return plan(request, BaseModelRow(name="tiny", config=config), num_samples).spec


def test_no_choice_at_all_gives_the_documented_one(api: Api) -> None:
    """Everything left out is resolved and shown: 20 samples make batches of 1 for 5 epochs, which is 100 steps."""
    job = api.job()

    assert job["hyperparameters"] == {"n_epochs": 5, "batch_size": 1, "learning_rate_multiplier": 4.45}
    assert job["method"]["supervised"]["hyperparameters"] == job["hyperparameters"]
    assert job["training"] == {
        "learning_rate": 8.9e-4, "lr_schedule": "linear", "lora_plus_ratio": 1.0, "warmup_steps": 0,
        "weight_decay": 0.0, "max_grad_norm": 1.0, "max_steps": None, "max_seconds": None, "max_seq_len": 128,
        "train_on": "completion", "checkpoint_every": None, "validation_split": None, "eval_every": None,
        "early_stopping_patience": None, "publish": "last", "init_from": None,
    }  # fmt: skip
    assert (job["total_steps"], job["queue_position"], job["step"]) == (100, 1, 0)
    assert job["lora"]["target_modules"] == ["q_proj", "v_proj"]
    assert job["adapter"].startswith("lora-")
    assert job["metadata"] is None


def test_a_missing_seed_is_drawn_and_kept(api: Api) -> None:
    """Two jobs get two seeds, and each is asked for again with the same result."""
    first, second = api.job(), api.job()

    assert first["seed"] != second["seed"]
    assert api.http.get(f"{JOBS}/{first['id']}").json()["seed"] == first["seed"]


@pytest.mark.parametrize(
    ("num_samples", "batch_size", "n_epochs"), [(1, 1, 25), (8, 1, 13), (100, 6, 6), (1000, 8, 3), (10**6, 8, 3)]
)
def test_auto_aims_at_a_hundred_steps(num_samples: int, batch_size: int, n_epochs: int) -> None:
    """Batch: a sixteenth of the samples, 1 to 8. Epochs: enough for 100 steps, 3 to 25."""
    spec = planned(num_samples)

    assert (spec.batch_size, spec.n_epochs) == (batch_size, n_epochs)


def test_what_is_given_is_taken() -> None:
    """No value that was asked for is replaced."""
    spec = planned(
        10, hyperparameters={"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 5},
        lora={"r": 4, "alpha": 1, "target_modules": "mlp", "use_rslora": True},
        training={"max_steps": 7, "warmup_steps": 2, "lr_schedule": "constant", "train_on": "all", "max_seq_len": 64},
    )  # fmt: skip

    assert (spec.n_epochs, spec.batch_size, spec.max_steps, spec.warmup_steps) == (2, 4, 7, 2)
    assert spec.learning_rate == pytest.approx(1e-3)
    assert (spec.lora.r, spec.lora.target_modules, spec.lora.use_rslora) == (4, "mlp", True)
    assert (spec.lr_schedule, spec.train_on, spec.max_seq_len) == ("constant", "all", 64)


def test_the_default_target_follows_the_model() -> None:
    """Where there are no q_proj and v_proj, the attention preset stands in for them."""
    gpt2 = CONFIG | {"linear_modules": ["c_attn", "c_proj", "c_fc"], "presets": {"attention": ["c_attn", "c_proj"]}}

    assert planned(10, gpt2).lora.target_modules == "attention"
    assert planned(10).lora.target_modules == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        (
            {"method": {"type": "supervised", "supervised": {"hyperparameters": {}}}, "hyperparameters": {}},
            "hyperparameters",
        ),
        (
            {"hyperparameters": {"learning_rate_multiplier": 2}, "training": {"learning_rate": 1e-3}},
            "training.learning_rate",
        ),
    ],
)
def test_two_answers_to_one_question_are_refused(api: Api, fields: dict[str, Any], param: str) -> None:
    """Which of two contradicting values counts is not guessed."""
    answer = api.submit(**fields)

    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_a_bad_data_set_is_reported_and_refused(api: Api) -> None:
    """The upload answers 200 with the line at fault; a job over the file is invalid_training_file."""
    bad = api.upload(b'{"text": "a"}\n{"text": 1}\n')
    answer = api.submit(training_file=bad["id"])
    error = answer.json()["error"]

    assert bad["status"] == "error"
    assert "line 2" in bad["status_details"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "invalid_training_file", "training_file")
    report = api.http.get(f"/v1/files/{bad['id']}/report").json()["report"]
    assert [problem["line"] for problem in report["problems"]] == [2]


def test_a_result_file_is_no_data_set(api: Api) -> None:
    """A file of another purpose cannot be trained on."""
    with write(api.engine) as tx:
        csv = files.add_bytes(
            tx, api.layout, b"step\n", tenant="default", purpose="fine-tune-results", filename="metrics.csv"
        )

    assert api.submit(validation_file=csv.id).json()["error"]["param"] == "validation_file"


def test_deleting_a_needed_file_is_a_conflict(api: Api) -> None:
    """A file stays while an unfinished job needs it, and can go afterwards."""
    job = api.job()
    path = f"/v1/files/{job['training_file']}"
    conflict = api.http.delete(path)

    assert (conflict.status_code, conflict.headers["x-should-retry"]) == (409, "false")
    api.http.post(f"{JOBS}/{job['id']}/cancel")
    assert api.http.delete(path).json() == {"id": job["training_file"], "object": "file", "deleted": True}


def test_a_finished_job_names_its_model(api: Api) -> None:
    """`fine_tuned_model` is null until the version is there, and then what generation understands."""
    job = api.job(suffix="math")
    assert job["fine_tuned_model"] is None
    api.succeed(api.claim())
    done = api.http.get(f"{JOBS}/{job['id']}").json()

    assert (done["status"], done["fine_tuned_model"]) == ("succeeded", "math@1")
    assert api.http.get(f"/v1/models/{done['fine_tuned_model']}").status_code == 200


def test_a_submit_answers_while_the_broker_is_down(settings: Settings, api: Api) -> None:
    """The job is committed first; that nobody could be told of it is no failure."""
    deaf = create_app(replace(settings, broker_url=f"redis://127.0.0.1:{free_port()}/0"))
    body = {"model": "tiny", "training_file": api.upload()["id"]}
    began = time.monotonic()
    answer = deaf.test_client().post(JOBS, json=body)

    assert answer.status_code == 200
    assert time.monotonic() - began < 5
    assert api.row(answer.get_json()["id"]).state == "queued"
    deaf.extensions["lorad"][1].engine.dispose()


def test_a_submit_rings_after_the_commit(api: Api) -> None:
    """One doorbell per job lies on the broker."""
    api.generator.broker.client.delete("lorad:train")
    api.job()

    assert api.generator.broker.client.llen("lorad:train") == 1


def test_a_full_queue_is_429(settings: Settings, api: Api) -> None:
    """The limit of queued jobs holds, and says when to come back."""
    narrow = create_app(replace(settings, max_queued_jobs=1))
    api.job()
    answer = narrow.test_client().post(JOBS, json={"model": "tiny", "training_file": api.upload()["id"]})

    assert (answer.status_code, answer.get_json()["error"]["code"]) == (429, "queue_full")
    assert answer.headers["Retry-After"] == "1"
    narrow.extensions["lorad"][1].engine.dispose()


def test_wait_answers_when_the_status_changes(api: Api) -> None:
    """A long poll returns at the change, long before its time is over."""
    job = api.job()
    answers: list[httpx2.Response] = []
    waiter = threading.Thread(target=lambda: answers.append(api.http.get(f"{JOBS}/{job['id']}?wait=15")))
    waiter.start()
    wait_for(lambda: not api.seats_free())
    api.claim()
    waiter.join(10)

    assert answers[0].json()["status"] == "running"


def test_wait_on_an_ended_job_answers_at_once(api: Api) -> None:
    """There is nothing to wait for."""
    job = api.job()
    api.http.post(f"{JOBS}/{job['id']}/cancel")
    began = time.monotonic()

    assert api.http.get(f"{JOBS}/{job['id']}?wait=30").json()["status"] == "cancelled"
    assert time.monotonic() - began < 10


def streamed(api: Api, path: str, **headers: str) -> list[tuple[str, dict[str, Any]]]:
    """Id and data of every event of a stream, to its end."""
    with api.http.stream("GET", path, headers=headers) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line and not line.startswith(":")]
    ids = [line.removeprefix("id: ") for line in lines if line.startswith("id: ")]
    return list(zip(ids, (json.loads(line[6:]) for line in lines if line.startswith("data: ")), strict=True))


def test_the_event_stream_ends_with_the_job(api: Api) -> None:
    """Oldest first, each with its id, those written while the stream is open too, and then it closes by itself."""
    job = api.job()
    claim = api.claim()
    api.report(claim, 1)
    seen: list[tuple[str, dict[str, Any]]] = []
    path = f"{JOBS}/{job['id']}/events?stream=true"
    follower = threading.Thread(target=lambda: seen.extend(streamed(api, path)))
    follower.start()
    wait_for(lambda: not api.seats_free())
    api.report(claim, 2)
    api.succeed(claim)
    follower.join(10)

    messages = [event["message"] for _, event in seen]
    assert messages[0] == "The job was created and queued."
    assert messages.index("Step 1") < messages.index("Step 2") < len(messages) - 1
    assert [event_id for event_id, _ in seen] == [event["id"] for _, event in seen]
    listed = api.http.get(f"{JOBS}/{job['id']}/events").json()["data"]
    assert [event for _, event in seen] == listed[::-1]
    assert api.seats_free()


def test_a_broken_stream_goes_on_after_the_last_event(api: Api) -> None:
    """Last-Event-ID, as browsers send it, skips what was seen; the Accept header alone asks for a stream."""
    job = api.job()
    api.http.post(f"{JOBS}/{job['id']}/cancel")
    events = streamed(api, f"{JOBS}/{job['id']}/events", Accept="text/event-stream")
    assert len(events) > 1

    rest = streamed(api, f"{JOBS}/{job['id']}/events", Accept="text/event-stream", **{"Last-Event-ID": events[0][0]})
    assert rest == events[1:]


def test_a_stream_of_nothing_is_an_http_error(api: Api) -> None:
    """What is wrong is said by the status, not in a stream that began with 200."""
    job = api.job()

    assert api.http.get(f"{JOBS}/ftjob-{'0' * 32}/events?stream=true").status_code == 404
    assert api.http.get(f"{JOBS}/{job['id']}/events?stream=true&after=x").status_code == 400
    assert api.seats_free()


def test_waiting_never_takes_all_threads(settings: Settings, api: Api) -> None:
    """With every seat taken a further waiter is told to come back, and others are answered."""
    job = api.job()
    app = create_app(replace(settings, api_threads=2))
    assert app.extensions["lorad"][1].waiters.take()
    client = app.test_client()
    refused = client.get(f"{JOBS}/{job['id']}?wait=5")

    assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
    assert client.get(f"{JOBS}/{job['id']}/events?stream=true").status_code == 503
    assert client.get(f"{JOBS}/{job['id']}").status_code == 200
    app.extensions["lorad"][1].engine.dispose()
