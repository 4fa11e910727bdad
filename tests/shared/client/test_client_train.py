"""`lorad train`, `watch`, `jobs` and `cancel` against a server that keeps the contract."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from api.schemas.jobs import JobRequest, Training
from shared.cli.client import COMMANDS
from shared.specs import LoraSpec
from tests.shared.client.conftest import Lorad
from tests.shared.client.server import ContractServer, Json, Script, message, metrics

TRAIN = ("--base", "tiny", "--name", "nya")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "nya.jsonl"
    file.write_text('{"text": "nya~"}\n')
    return file


def succeeding() -> Script:
    first = [message(1, "started"), metrics(1, 4, 3.5)]
    second = [metrics(2, 4, 2.5), metrics(3, 4, 1.5)]
    return Script([("queued", []), ("running", first), ("running", second), ("succeeded", [metrics(4, 4, 0.5)])])


def test_train_uploads_the_very_bytes(server: ContractServer, lorad: Lorad, data: Path) -> None:
    """The service gets the file as it is, under its name, and the job names it."""
    server.script = succeeding()

    lorad("train", data, *TRAIN)

    assert list(server.uploads.values()) == [("nya.jsonl", data.read_bytes())]
    assert [job["training_file"] for job in server.jobs.values()] == list(server.uploads)


def test_train_sends_only_what_was_asked(server: ContractServer, lorad: Lorad, data: Path) -> None:
    """Without options the service chooses, so the body holds only model, name and file."""
    lorad("train", data, *TRAIN, "--detach")

    (request,) = server.requests("POST", "/fine_tuning/jobs")
    assert request.json == {"model": "tiny", "suffix": "nya", "training_file": next(iter(server.uploads))}


EVERY_OPTION = {
    "--epochs=2": ("method.supervised.hyperparameters.n_epochs", 2),
    "--batch-size=4": ("method.supervised.hyperparameters.batch_size", 4),
    "--max-steps=9": ("training.max_steps", 9),
    "--max-seconds=60": ("training.max_seconds", 60),
    "--max-seq-len=512": ("training.max_seq_len", 512),
    "--learning-rate=0.01": ("training.learning_rate", 0.01),
    "--schedule=cosine": ("training.lr_schedule", "cosine"),
    "--warmup-steps=0": ("training.warmup_steps", 0),
    "--weight-decay=0.1": ("training.weight_decay", 0.1),
    "--max-grad-norm=0.5": ("training.max_grad_norm", 0.5),
    "--lora-plus=16": ("training.lora_plus_ratio", 16.0),
    "--train-on=all": ("training.train_on", "all"),
    "--rank=4": ("lora.r", 4),
    "--alpha=8": ("lora.alpha", 8.0),
    "--rslora": ("lora.use_rslora", True),
    "--dropout=0": ("lora.dropout", 0.0),
    "--target=q_proj": ("lora.target_modules", ["q_proj"]),
    "--init-from=math@prod": ("training.init_from", "math@prod"),
    "--validation-split=0.1": ("training.validation_split", 0.1),
    "--eval-every=5": ("training.eval_every", 5),
    "--early-stopping=3": ("training.early_stopping_patience", 3),
    "--publish=best": ("training.publish", "best"),
    "--checkpoint-every=50": ("training.checkpoint_every", 50),
    "--priority=-1": ("priority", -1),
    "--seed=7": ("seed", 7),
}


def test_train_sends_every_option(server: ContractServer, lorad: Lorad, data: Path) -> None:
    """Each option arrives in its place of the job's body, which the API can read, and nothing else does."""
    lorad("train", data, *TRAIN, *EVERY_OPTION, "--detach")

    (request,) = server.requests("POST", "/fine_tuning/jobs")
    assert dict(leaves(request.json)) == dict(EVERY_OPTION.values()) | {
        "model": "tiny", "suffix": "nya", "training_file": next(iter(server.uploads)), "method.type": "supervised"
    }  # fmt: skip
    JobRequest.model_validate(request.json)


def test_every_knob_of_a_job_has_an_option() -> None:
    """What the API can be asked of a training the command can ask, but for the patterns of single modules."""
    reached = {place.partition(".")[2] for place, _ in EVERY_OPTION.values() if "." in place}

    assert set(Training.model_fields) == {place for place in reached if place in Training.model_fields}
    assert set(LoraSpec.model_fields) - reached == {"rank_pattern", "alpha_pattern"}


def leaves(body: Json, above: str = "") -> Iterator[tuple[str, object]]:
    """The dotted path and the value of everything in a body that is not an object."""
    for name, value in body.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def test_the_rate_may_be_auto(server: ContractServer, lorad: Lorad, data: Path) -> None:
    """`auto` is sent as the word."""
    lorad("train", data, *TRAIN, "--learning-rate", "auto", "--detach")

    (request,) = server.requests("POST", "/fine_tuning/jobs")
    assert request.json["training"] == {"learning_rate": "auto"}


def test_validation_data_is_uploaded_too(server: ContractServer, lorad: Lorad, data: Path, tmp_path: Path) -> None:
    """The two files arrive under their names, each in its place."""
    held_out = tmp_path / "held-out.jsonl"
    held_out.write_text('{"text": "purr"}\n')

    lorad("train", data, *TRAIN, "--validation", held_out, "--early-stopping=2", "--detach")

    (request,) = server.requests("POST", "/fine_tuning/jobs")
    names = {file_id: name for file_id, (name, _) in server.uploads.items()}
    assert names[request.json["training_file"]] == "nya.jsonl"
    assert names[request.json["validation_file"]] == "held-out.jsonl"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--learning-rate=2"], "'--learning-rate': 2.0 is not in the range 0<x<=1.0"),
        (["--learning-rate=fast"], "'--learning-rate': 'fast' is not a valid float|auto"),
        (["--learning-rate=nan"], "'--learning-rate': 'nan' is not a finite number"),
        (["--alpha=nan"], "'--alpha': 'nan' is not a finite number"),
        (["--rank=0"], "'--rank': 0 is not in the range 1<=x<=256"),
        (["--schedule=step"], "'--schedule': 'step' is not one of"),
        (["--validation-split=0.6"], "'--validation-split': 0.6 is not in the range 0<x<=0.5"),
        (["--validation=absent.jsonl"], "'--validation': File 'absent.jsonl' does not exist"),
        (["--eval-every=5"], "--eval-every needs --validation FILE or --validation-split SHARE"),
        (["--early-stopping=5", "--publish=best"], "--early-stopping, --publish best needs --validation"),
        (["--wat"], "No such option"),
    ],
)
def test_a_wrong_option_is_one_line(
    server: ContractServer, lorad: Lorad, data: Path, options: list[str], says: str
) -> None:
    """What is wrong and where help is, on standard error, with exit status 2 and before anything is uploaded."""
    ran = lorad("train", data, *TRAIN, *options)

    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert ran.err.startswith("lorad: ")
    assert says in ran.err
    assert ran.err.endswith("train --help)\n")
    assert server.seen == []


def test_two_kinds_of_validation_data_are_wrong_usage(server: ContractServer, lorad: Lorad, data: Path) -> None:
    """A file and a split cannot both be."""
    ran = lorad("train", data, *TRAIN, "--validation", data, "--validation-split=0.1")

    assert (ran.code, "cannot be combined" in ran.err) == (2, True)
    assert server.seen == []


def test_help_explains_every_option_in_a_group(lorad: Lorad) -> None:
    """Each option stands once, with a word of help, under the heading of its group."""
    told = lorad("train", "--help").out
    (command,) = [command for command in COMMANDS if command.name == "train"]
    options = [option for option in command.params if isinstance(option, click.Option)]

    headings = ["Options", "Length", "Optimizer", "Adapter", "Validation", "Job"]
    assert [line[:-1] for line in told.splitlines() if line.endswith(":") and line[0] != " "] == headings
    assert [option.name for option in options if not option.help] == []
    for option in options:
        assert len(re.findall(rf"^  {option.opts[0]}\b(?!-)", told, re.MULTILINE)) == 1, option.opts


def test_zero_is_sent_and_not_taken_for_unset(server: ContractServer, lorad: Lorad, data: Path) -> None:
    """A seed and a dropout of 0 are choices like any other."""
    lorad("train", data, *TRAIN, "--seed=0", "--dropout=0", "--detach")

    (request,) = server.requests("POST", "/fine_tuning/jobs")
    assert (request.json["seed"], request.json["lora"]) == (0, {"dropout": 0.0})


def test_a_preset_target_is_sent_as_a_word(server: ContractServer, lorad: Lorad, data: Path) -> None:
    """`--target all-linear` is the preset, not a module of that name."""
    lorad("train", data, *TRAIN, "--target", "all-linear", "--detach")

    (request,) = server.requests("POST", "/fine_tuning/jobs")
    assert request.json["lora"] == {"target_modules": "all-linear"}


def test_a_preset_among_module_names_is_wrong_usage(server: ContractServer, lorad: Lorad, data: Path) -> None:
    """A preset cannot be combined, and nothing is uploaded."""
    ran = lorad("train", data, *TRAIN, "--target", "mlp", "--target", "q_proj")

    assert ran.code == 2
    assert server.seen == []


def test_a_lost_submit_makes_one_job(server: ContractServer, lorad: Lorad, data: Path) -> None:
    """A submit whose answer was lost is sent again with the same key, and there is one job."""
    server.refuse_next = [(503, {})]
    server.script = succeeding()

    ran = lorad("train", data, *TRAIN)

    assert ran.code == 0
    assert len(server.jobs) == 1
    (request,) = server.requests("POST", "/fine_tuning/jobs")
    assert request.headers["idempotency-key"]


def test_two_runs_make_two_jobs(server: ContractServer, lorad: Lorad, data: Path) -> None:
    """The key belongs to one run of the command: training again is another job."""
    lorad("train", data, *TRAIN, "--detach")
    lorad("train", data, *TRAIN, "--detach")

    assert len(server.jobs) == 2


def test_train_shows_progress_and_ends_with_the_adapter(server: ContractServer, lorad: Lorad, data: Path) -> None:
    """The first and the last step's loss are shown, then how to talk to what was made; the exit status is 0."""
    server.script = succeeding()

    ran = lorad("train", data, *TRAIN)

    assert ran.code == 0
    assert "step 1/4  loss 3.5000  100 tokens/s  0:03 left" in ran.out
    assert "step 4/4  loss 0.5000" in ran.out
    assert ran.out.splitlines()[-1] == "nya@1 is ready; ask it with: lorad chat nya@1"


def test_json_prints_job_every_event_once_and_the_end(server: ContractServer, lorad: Lorad, data: Path) -> None:
    """Programs get the job, each event once and in order, and the job that is over."""
    server.script = succeeding()

    job, *events, end = lorad("train", data, *TRAIN, "--json").lines

    assert job["status"] == "queued"
    assert [e["message"] for e in events] == ["started", "step 1", "step 2", "step 3", "step 4"]
    assert (end["id"], end["status"], end["fine_tuned_model"]) == (job["id"], "succeeded", "nya@1")


def test_more_events_than_a_page_are_all_printed(server: ContractServer, lorad: Lorad, data: Path) -> None:
    """Events that come faster than the client looks are not lost."""
    server.script = Script([("running", []), ("succeeded", [metrics(n, 70, 1.0) for n in range(1, 71)])])

    _, *events, _ = lorad("train", data, *TRAIN, "--json").lines

    assert [e["data"]["step"] for e in events] == list(range(1, 71))


def test_a_failed_job_exits_with_1_and_its_error(server: ContractServer, lorad: Lorad, data: Path) -> None:
    """The job's own error is the last word, on standard error."""
    server.script = Script([("failed", [])])

    ran = lorad("train", data, *TRAIN)

    assert ran.code == 1
    assert "the loss is not finite (training_failed)" in ran.err


def test_a_cancelled_job_exits_with_1(server: ContractServer, lorad: Lorad, data: Path) -> None:
    """What was cancelled is no success."""
    server.script = Script([("cancelled", [])])

    ran = lorad("train", data, *TRAIN)

    assert (ran.code, "cancelled" in ran.err) == (1, True)


def test_a_bad_data_set_starts_no_job(server: ContractServer, lorad: Lorad, data: Path) -> None:
    """The line at fault is named, and nothing is submitted."""
    data.write_text("nya")

    ran = lorad("train", data, *TRAIN)

    assert (ran.code, server.jobs) == (1, {})
    assert "line 1: not JSON" in ran.err


def test_the_services_refusal_is_one_line(server: ContractServer, lorad: Lorad, data: Path) -> None:
    """A refused parameter is named on one line."""
    server.refuse_next = [(400, {"error": {"message": "at most 256", "param": "lora.r", "code": "invalid_value"}})]

    assert lorad("train", data, *TRAIN).err == "lorad: at most 256 [lora.r]\n"


def test_errors_are_json_too(server: ContractServer, lorad: Lorad) -> None:
    """With --json, standard error holds the service's error object."""
    ran = lorad("watch", "ftjob-0", "--json")

    assert (ran.code, ran.out) == (1, "")
    assert '"code": "not_found"' in ran.err


def test_watch_follows_to_the_end(server: ContractServer, lorad: Lorad) -> None:
    """A job can be watched by its id alone."""
    job = server.create_job({}, None)
    server.script = succeeding()

    ran = lorad("watch", job["id"])

    assert ran.code == 0
    assert "step 4/4" in ran.out


def test_watch_survives_an_outage(server: ContractServer, lorad: Lorad) -> None:
    """An API that is away for a moment does not end the watching."""
    job = server.create_job({}, None)
    server.script = succeeding()
    server.refuse_next = [(503, {}), (502, {})]

    assert lorad("watch", job["id"]).code == 0


def test_ctrl_c_detaches_without_cancelling(server: ContractServer, data: Path) -> None:
    """SIGINT ends the command, which says how to watch again; no cancel is sent and the job goes on."""
    server.script = Script([("running", [metrics(1, 4, 3.5)])])
    # A shell's background job ignores SIGINT, and hands that down to the tests run in it.
    program = "import signal, shared.cli; signal.signal(signal.SIGINT, signal.default_int_handler); shared.cli.main()"
    command = [sys.executable, "-c", program, "train", str(data), *TRAIN]
    env = os.environ | {"LORAD_BASE_URL": server.url, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        while "step 1/4" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)

    assert (process.returncode, err) == (130, "")
    assert f"lorad watch {next(iter(server.jobs))}" in out
    assert not [request for request in server.seen if request.path.endswith("/cancel")]


def test_cancel_is_sent_without_a_body(server: ContractServer, lorad: Lorad) -> None:
    """`lorad cancel ID` asks the service and says what came of it."""
    job = server.create_job({}, None)

    ran = lorad("cancel", job["id"])

    (request,) = server.requests("POST", f"/fine_tuning/jobs/{job['id']}/cancel")
    assert (request.body, ran.code, ran.out) == (b"", 0, f"{job['id']} is cancelled\n")


def test_jobs_are_listed_newest_first(server: ContractServer, lorad: Lorad) -> None:
    """One JSON object per job, at most as many as asked for."""
    made = [server.create_job({"n": n}, None)["id"] for n in range(4)]

    assert [job["id"] for job in lorad("jobs", "--limit", 3, "--json").lines] == made[:0:-1]


def test_no_jobs_is_said(lorad: Lorad) -> None:
    """An empty list tells people how to begin, and programs nothing."""
    assert "lorad train" in lorad("jobs").out
    assert lorad("jobs", "--json").out == ""


def test_a_wrong_setting_is_one_line_and_exit_2(lorad: Lorad, monkeypatch: pytest.MonkeyPatch) -> None:
    """A LORAD_ variable that is not a setting stops the command before anything is sent."""
    monkeypatch.setenv("LORAD_PROT", "1")

    ran = lorad("jobs")

    assert (ran.code, ran.err) == (2, "lorad: LORAD_PROT is not a setting\n")
