"""`lorad report` and `lorad train --dry-run` against a server that keeps the contract."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from shared.cli.client_output import Output
from shared.cli.client_report import show_tokens
from tests.shared.client.conftest import Lorad
from tests.shared.client.server import ContractServer, Json

FILE_ID = f"file-{7:032x}"
GOOD: Json = {
    "format": "messages", "compression": "gzip", "num_samples": 3, "num_problems": 0, "problems": [],
    "ignored_keys": ["id"],
}  # fmt: skip
BAD: Json = GOOD | {
    "num_problems": 52,
    "problems": [{"line": 4, "path": "messages[1].role", "code": "bad", "message": "must be a role\x1b[31m"}],
}
TOKENS: Json = {
    "num_samples": 9, "num_used": 8, "num_truncated": 2, "num_dropped": 1, "num_duplicates": 3, "num_tokens": 1000,
    "num_label_tokens": 250, "label_share": 0.25, "longest": 40, "median": 20,
    "histogram": [
        {"max_tokens": 16, "num_samples": 0}, {"max_tokens": 32, "num_samples": 8},
        {"max_tokens": 64, "num_samples": 0}, {"max_tokens": None, "num_samples": 1},
    ],
    "truncated_lines": [2, 5], "dropped_lines": [5], "duplicate_lines": [7],
    "example": {
        "line": 6, "is_whole": False,
        "runs": [{"text": "ask\x1b]0;", "is_label": False}, {"text": "told", "is_label": True}],
    },
}  # fmt: skip
ESTIMATE: Json = {
    "object": "fine_tuning.job.estimate", "steps_per_epoch": 20, "total_steps": 60, "num_tokens": 6000,
    "num_label_tokens": 1500, "trainable_parameters": 460800, "memory_bytes": 2 << 30, "seconds": None,
    "tokens_per_second": None, "hyperparameters": {"batch_size": 4}, "data": {"training": TOKENS, "validation": None},
    "lora": {"r": 8, "alpha": 16.0, "target_modules": ["q_proj", "v_proj"]},
    "training": {"learning_rate": 1e-3, "lr_schedule": "linear"},
}  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "nya.jsonl"
    file.write_text('{"text": "nya~"}\n')
    return file


def test_a_local_file_is_uploaded_and_reported(server: ContractServer, lorad: Lorad, data: Path) -> None:
    """The report is that of the file just sent; without a base nothing is asked about tokens."""
    server.line_report = {"report": GOOD}
    ran = lorad("report", data)

    assert ran.code == 0
    assert "messages, gzip, 3 samples" in ran.out
    assert "skipped: id" in ran.out
    assert [name for name, _ in server.uploads.values()] == ["nya.jsonl"]
    assert len([request for request in server.seen if request.method == "GET"]) == 1


def test_a_file_id_is_not_uploaded(server: ContractServer, lorad: Lorad) -> None:
    """A file that is there already is only asked about."""
    server.line_report = {"report": GOOD}

    assert FILE_ID in lorad("report", FILE_ID).out
    assert server.uploads == {}


def test_what_is_neither_is_one_line(server: ContractServer, lorad: Lorad) -> None:
    """A misspelt name is an error without a request, not a strange path."""
    ran = lorad("report", "no-such.jsonl")

    assert (ran.code, ran.out) == (1, "")
    assert "neither a file" in ran.err
    assert server.seen == []


def test_problems_come_by_line(server: ContractServer, lorad: Lorad) -> None:
    """Each problem is a line of its own with its place, what is not listed is counted, and the command fails."""
    server.line_report = {"report": BAD, "status": "error"}
    ran = lorad("report", FILE_ID, "--base", "tiny")

    assert ran.code == 1
    assert "line 4: messages[1].role: must be a role" in ran.out
    assert "and 51 more problems" in ran.out
    assert "cannot be trained on" in ran.err
    assert "\x1b" not in ran.out


def test_with_a_base_the_tokens_are_shown(server: ContractServer, lorad: Lorad) -> None:
    """Counts, share of labels, what is lost and where, bars in proportion, and a sample with its labels marked."""
    server.line_report = {"report": GOOD}
    server.token_report = {"model": "tiny", "max_seq_len": 32, "train_on": "completion", "data": TOKENS}
    out = lorad("report", FILE_ID, "--base", "tiny", "--max-seq-len", "32").out

    assert "8 of 9 samples, 1,000 tokens, 250 of them learnt (25.0%)" in out
    assert "2 lose labels, being too long (lines 2, 5)" in out
    assert "1 are dropped: no label is left (line 5)" in out
    assert "3 are as an earlier one (lines 7, ...)" in out
    bars = {line.strip()[:5]: line.count("█") for line in out.splitlines() if line.lstrip().startswith(("<=", ">"))}
    assert bars == {"<= 32": 40, "<= 64": 0, "> 64 ": 5}
    assert "«told»" in out
    assert "[...]" in out
    assert "\x1b" not in out


def test_colours_mark_labels_on_a_terminal() -> None:
    """Where there are colours, labels are green and nothing is put around them."""
    out = Output(as_json=False)
    text = io.StringIO()
    out.console = Console(file=text, force_terminal=True, color_system="standard", highlight=False)
    show_tokens(out, TOKENS)

    assert "\x1b[1;32mtold\x1b[0m" in text.getvalue()
    assert "«" not in text.getvalue().replace("«»", "")
    assert "ask\x1b" not in text.getvalue()


def test_json_is_the_report_and_nothing_else(server: ContractServer, lorad: Lorad) -> None:
    """Programs get one object, the fullest that was asked for."""
    server.line_report = {"report": GOOD}
    server.token_report = {"model": "tiny", "max_seq_len": 32, "train_on": "completion", "data": TOKENS}

    (plain,) = lorad("report", FILE_ID, "--json").lines
    (full,) = lorad("report", FILE_ID, "--base", "tiny", "--json").lines

    assert (plain["tokens"], full["tokens"]["data"]) == (None, TOKENS)


def test_a_length_needs_a_base(lorad: Lorad) -> None:
    """Tokens without a tokenizer mean nothing: that is wrong usage."""
    assert lorad("report", FILE_ID, "--max-seq-len", "32").code == 2


def test_a_dry_run_prints_the_estimate_and_makes_no_job(server: ContractServer, lorad: Lorad, data: Path) -> None:
    """The job's body is sent with dry_run, and what comes back is shown; nothing is watched."""
    server.estimate = ESTIMATE
    ran = lorad("train", data, "--base", "tiny", "--name", "nya", "--batch-size", "4", "--dry-run")

    (request,) = server.requests("POST", "/fine_tuning/jobs")
    assert request.json["dry_run"] is True
    assert request.json["method"]["supervised"]["hyperparameters"] == {"batch_size": 4}
    assert server.jobs == {}
    assert "60 steps, 20 an epoch; 6,000 tokens, 1,500 of them learnt" in ran.out
    assert "about 2.0 GiB" in ran.out
    assert "not known" in ran.out
    assert ran.code == 0


def test_a_known_speed_becomes_a_time(server: ContractServer, lorad: Lorad, data: Path) -> None:
    """With seconds in the estimate they are shown in a unit that people use."""
    server.estimate = ESTIMATE | {"seconds": 600.0, "tokens_per_second": 10.0}
    out = lorad("train", data, "--base", "tiny", "--name", "nya", "--dry-run").out

    assert "about 10 min, at 10 tokens/s" in out
    assert "not known" not in out


def test_a_dry_run_in_json_is_the_estimate(server: ContractServer, lorad: Lorad, data: Path) -> None:
    """Programs get the service's answer as it is."""
    server.estimate = ESTIMATE

    assert lorad("train", data, "--base", "tiny", "--name", "nya", "--dry-run", "--json").lines == [ESTIMATE]
