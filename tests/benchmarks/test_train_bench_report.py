"""What `make bench-train` says of rows that disagree, crash, or ask for what a peer does not have."""

import dataclasses
from typing import Any

import pytest

from benchmarks.processes import Unavailable
from benchmarks.train import report
from benchmarks.train.peers import _known, _trl
from benchmarks.train.plan import ROWS, Plan, Section
from benchmarks.train.rounds import SectionResult

PLAN = Plan(warmup_steps=1, timed_steps=3, tolerance=0.02)
PEFT, TRL, OURS = (next(row for row in ROWS if row.name == name) for name in ("peft-bf16", "trl", "ours-bf16"))


def answer(rate: float) -> dict[str, Any]:
    """What a row's process answers."""
    return {
        "steps": 4,
        "tokens_per_second": rate,
        "labels_per_second": rate / 2,
        "peak_bytes": int(2e9),
        "left_out": [],
    }


def result_of(answers: dict[str, list[dict[str, Any]]], losses: dict[str, float]) -> SectionResult:
    """A section of the rows above."""
    return SectionResult(Section("q_proj", ["q_proj"], (PEFT, TRL, OURS)), answers, losses)


def test_agreeing_rows_are_no_problem() -> None:
    """Losses within the tolerance of their median and well below the base's pass, and the ratio is ours to theirs."""
    result = result_of(
        {"peft-bf16": [answer(100.0)], "trl": [answer(50.0)], "ours-bf16": [answer(300.0)]},
        {"base": 1.4, "peft-bf16": 1.30, "trl": 1.31, "ours-bf16": 1.305},
    )

    assert report.disagreements(result, PLAN) == []
    assert report.failures(result) == []
    assert "| 300 | 150 | 2.00 GB | 1.3050 | 1.00 |" in report.section_table(result, OURS)
    assert "| 50 | 25 | 2.00 GB | 1.3100 | 6.00 |" in report.section_table(result, OURS)


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ({"peft-bf16": 1.30, "trl": 1.30, "ours-bf16": 1.33}, "ours-bf16 has loss 1.3300, +0.0300 from the median"),
        ({"peft-bf16": 1.39, "trl": 1.39, "ours-bf16": 1.39}, "hardly better than the base's"),
        ({"peft-bf16": 1.30, "trl": 1.30}, "ours-bf16 has no validation loss"),
        ({"peft-bf16": 1.30, "trl": 1.30, "ours-bf16": float("nan")}, "ours-bf16 has loss nan"),
    ],
)
def test_a_row_that_is_off_is_named(losses: dict[str, float], said: str) -> None:
    """Off the median, untrained, not written or not a number: each is a problem."""
    answers = {name: [answer(1.0)] for name in ("peft-bf16", "trl", "ours-bf16")}

    assert said in "\n".join(report.disagreements(result_of(answers, {"base": 1.4, **losses}), PLAN))


def test_another_number_of_steps_is_a_problem() -> None:
    """A row that made fewer optimizer steps is not compared in silence."""
    answers = {"peft-bf16": [answer(1.0)], "trl": [{**answer(1.0), "steps": 3}], "ours-bf16": [answer(1.0)]}
    losses = {"base": 1.4, "peft-bf16": 1.3, "trl": 1.3, "ours-bf16": 1.3}

    assert report.disagreements(result_of(answers, losses), PLAN) == ["q_proj: trl made 3 optimizer steps, not 4"]


def test_a_row_without_figures_says_why() -> None:
    """What a peer cannot do stands in the table and is no failure; a crash is one."""
    answers = {"peft-bf16": [{"failed": "died"}], "trl": [{"unavailable": "no packing"}], "ours-bf16": [answer(1.0)]}
    result = result_of(answers, {"base": 1.4, "ours-bf16": 1.3})

    assert "not measured: no packing" in report.section_table(result, OURS)
    assert report.failures(result) == ["q_proj: peft-bf16 failed: died"]
    assert report.disagreements(result, PLAN) == []


def test_options_that_a_version_lacks_are_named() -> None:
    """They are left out of the call, and said."""

    @dataclasses.dataclass
    class Configuration:
        seed: int

    assert _known(Configuration, {"seed": 1, "packing": True}) == ({"seed": 1}, ["packing"])


def test_a_missing_trl_is_said_and_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without TRL its rows are unavailable."""
    monkeypatch.setitem(__import__("sys").modules, "trl", None)

    with pytest.raises(Unavailable, match="TRL cannot be imported"):
        _trl(None, None, None, [], {}, {}, 8)
