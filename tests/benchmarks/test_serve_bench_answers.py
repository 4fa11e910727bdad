"""lorad, PEFT and the merged model give the judge the same answers, and wrong ones do not get past it."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.serve import ours, peers, report
from benchmarks.serve.judge import judge
from benchmarks.serve.plan import ROWS, Row
from benchmarks.serve.rounds import Verdicts
from tests.benchmarks.conftest import PLAN

# PEFT asks Transformers for what is called something else now.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

Answers = dict[str, dict[str, list[list[int]]]]
OURS = Row(
    name="ours-fp32",
    title="lorad, fp32",
    program="ours",
    dtype="float32",
    scenarios=("base", "eight", "sixteen"),
    loads=("cold", "zipf", "open"),
)
PEFT = next(row for row in ROWS if row.name == "peft-fp32")
MERGED = next(row for row in ROWS if row.name == "merged-fp32")


def request(work: Path, row: Row, mode: str) -> dict[str, Any]:
    return {"plan": PLAN.to_json(), "work": str(work), "row": row.to_json(), "mode": mode, "number": 1}


@pytest.fixture(scope="module")
def answers(bench_work: Path) -> Answers:
    """Of lorad, PEFT's mixed batch and a merged model."""
    found = {OURS.name: ours.run_row(request(bench_work, OURS, "answers"))["answers"]}
    for row in (PEFT, MERGED):
        found[row.name] = peers.measure(request(bench_work, row, "answers"))["answers"]
    return found


def judged(work: Path, path: Path, answers: Answers) -> Verdicts:
    path.write_text(json.dumps(answers))
    found = judge({"plan": PLAN.to_json(), "work": str(work), "answers": str(path), "crossed_rows": [OURS.name]})
    return Verdicts(found["rows"], found["crossed"])


def test_all_programs_answer_as_the_merged_model(bench_work: Path, tmp_path: Path, answers: Answers) -> None:
    """In fp32 every answer is the merged model's greedy one; under another adapter's model they are not."""
    verdicts = judged(bench_work, tmp_path / "answers.json", answers)

    assert {name: set(found) for name, found in verdicts.rows.items()} == {
        OURS.name: {"base", "eight", "sixteen"},
        PEFT.name: {"eight"},
        MERGED.name: {"one"},
    }
    assert all(v["exact"] == v["answers"] == 4 for found in verdicts.rows.values() for v in found.values())
    assert report.disagreements([OURS, PEFT, MERGED], verdicts, PLAN) == []
    assert set(verdicts.crossed) == {"eight", "sixteen"}
    assert max(verdicts.crossed.values()) < PLAN.max_crossed


def test_answers_of_the_wrong_adapter_are_noticed(bench_work: Path, tmp_path: Path, answers: Answers) -> None:
    """If two requests get each other's adapter, the row is named; so is a single wrong token in the exact row."""
    first, second, *others = answers[PEFT.name]["eight"]
    [token, *rest], *more = answers[OURS.name]["base"]
    wrong = {
        OURS.name: {**answers[OURS.name], "base": [[(token + 1) % 259, *rest], *more]},
        PEFT.name: {"eight": [second, first, *others]},
    }

    said = "\n".join(report.disagreements([OURS, PEFT], judged(bench_work, tmp_path / "answers.json", wrong), PLAN))

    assert "ours-fp32, no adapter: a token is" in said
    assert "peft-fp32, 8 adapters:" in said
    assert "ours-fp32, 8 adapters" not in said


def test_every_figure_of_a_row_is_measured(bench_work: Path) -> None:
    """Rates of all scenarios, pairs of cold and warm, the Zipf load against one adapter, latencies of each arrival."""
    found = ours.run_row(request(bench_work, OURS, "time"))

    assert set(found["rates"]) == set(OURS.timed)
    assert all(rate > 0 for rate in found["rates"].values())
    assert len(found["cold"]["cold_ms"]) == len(found["cold"]["warm_ms"]) == PLAN.cold_requests
    assert found["zipf"]["tokens_per_second"] > 0
    assert 0 < found["zipf"]["distinct"] <= PLAN.zipf_requests
    latencies = found["open"]["20"]
    assert len(latencies["first_ms"]) >= 1
    assert all(first > 0 for first in latencies["first_ms"])
    assert found["dtype"] == "float32"


def test_every_figure_of_a_peer_is_measured(bench_work: Path) -> None:
    """PEFT's mixed batch gives a rate for its scenario."""
    found = peers.measure(request(bench_work, PEFT, "time"))

    assert set(found["rates"]) == {"eight"}
    assert found["rates"]["eight"] > 0
